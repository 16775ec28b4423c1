// Recovery at open, and what other writers did since.
#include <unistd.h>

#include <algorithm>
#include <cstring>
#include "errors.h"

#include "store_impl.h"

namespace kvo::store {
namespace {
constexpr size_t kAhead = 16;  // records: about a memory access of publishing
}

void StoreImpl::load_segment(uint32_t writer, SegmentScan& s, std::unique_lock<std::mutex>& lk) {
    bool own = int(writer) == dir.writer();
    if (own && s.absent) return;
    if (!own && s.unread && !s.gen) return;  // what is known of it stays
    StoreSegment* seg = find_segment(writer, s.id);
    if (!s.gen && !own) {  // being recycled, or damaged
        if (seg) drop_segment(*seg, lk);
        return;
    }
    if (seg && seg->gen != s.gen) {  // recycled by its owner
        drop_segment(*seg, lk);
        seg = nullptr;
    }
    if (!own && s.unread) return;
    if (!seg) {
        seg = segments.emplace_back(std::make_unique<StoreSegment>()).get();
        seg->writer = writer;
        seg->id = s.id;
        seg->own = own;
        seg->gen = uint32_t(s.gen);
        seg->unread = s.unread;  // all of it may be there, only not today
        seg->empty = own && !s.unread && !s.sealed && s.records.empty();
    }
    seg->bytes = s.bytes;
    seg->mtime_ns = s.mtime_ns;
    seg->sealed = s.sealed;
    seg->keys.reserve(seg->keys.size() + s.records.size());
    for (size_t i = 0; i < s.records.size(); ++i) {
        if (i + kAhead < s.records.size()) index.prefetch(s.records[i + kAhead].key);
        publish(*seg, s.records[i]);
        seg->tail = std::max(seg->tail, s.records[i].off4k * kBlock + round_up(s.records[i].len));
        if (i % 512 == 511) {
            lk.unlock();
            lk.lock();
        }
    }
    if (own && !s.sealed) seg->records = std::move(s.records);
}

void StoreImpl::load(uint32_t writer, WriterScan& scan, std::unique_lock<std::mutex>& lk) {
    n.io_errors += scan.read_errors;
    if (scan.list_error) return;  // what is known of it stays
    std::set<uint32_t> there;
    size_t records = 0;
    for (auto& s : scan.segments) records += s.records.size();
    if (records > index.size()) index.reserve(index.size() + records);  // nothing grows on the way
    for (auto& s : scan.segments) {
        there.insert(s.id);
        load_segment(writer, s, lk);
    }
    for (size_t i = 0; i < segments.size(); ++i) {
        StoreSegment& s = *segments[i];
        if (s.writer == writer && !s.own && s.state != SegState::kGone && !there.count(s.id))
            drop_segment(s, lk);
    }
}

void StoreImpl::recover() {
    auto t0 = Clock::now();
    std::unique_lock lk(mu);
    WriterScan own;
    std::vector<uint32_t> ids;
    if (int err = dir.writers(ids))
        throw OsError(err, "chunk store " + dir.path() + ": cannot be listed");
    for (uint32_t w : ids) {
        lk.unlock();
        WriterScan scan = dir.scan(w, *faults);
        lk.lock();
        if (scan.list_error && int(w) == dir.writer())  // else its segments would be strangers
            throw OsError(scan.list_error,
                          "chunk store " + dir.writer_path() + ": cannot be listed");
        load(w, scan, lk);
        last_seq = std::max(last_seq, scan.max_seq);
        if (int(w) == dir.writer()) own = std::move(scan);
    }
    n.recovered_entries = index.size();
    last_id = own.max_id;
    last_gen = std::max<uint64_t>(own.max_gen, uint64_t(unix_ns() / 1000000000));
    if (last_gen >= 0xFFFF0000u)
        throw OsError(EINVAL, "chunk store " + dir.writer_path() + ": generations are used up");
    if (!opt.read_only) {
        bool all = true;
        for (size_t i = 0; i < segments.size(); ++i) {
            StoreSegment& s = *segments[i];
            if (!s.own || s.sealed || s.records.empty()) continue;
            lk.unlock();
            seal_recovered(s);
            lk.lock();
            all &= s.sealed;
            s.records = {};
        }
        if (all)
            for (uint64_t e : own.journals)
                if (!own.needs(e)) ::unlinkat(dir.writer_fd(), journal_name(e).c_str(), 0);
        shrink(lk);
    }
    if (dir.charged_bytes(charged)) charged = std::max(charged, dir.max_bytes());  // as if full
    last_refresh = Clock::now();
    recover_ms = std::chrono::duration<double, std::milli>(Clock::now() - t0).count();
}

// Ends an open segment at its last valid record: footer right behind it, and the rest of the file
// given back. Until the cut the file has no footer where one is looked for, and the journal stands.
void StoreImpl::seal_recovered(StoreSegment& seg) {
    uint64_t end = seg.tail + round_up(seg.records.size() * sizeof(Record));
    int err = write_footer(seg, seg.records, seg.tail, end);
    FilePtr f = err ? nullptr : file_of(seg, err);
    if (f && ::ftruncate(f->fd(), off_t(end + kBlock)) != 0) err = errno;
    if (f && !err) err = sync_data(*f);
    if (err) {
        ++n.io_errors;
        return;
    }
    seg.bytes = end + kBlock;
    seg.sealed = true;
}

void StoreImpl::shrink(std::unique_lock<std::mutex>& lk) {
    PathLock path(dir.fd(), 2000);
    if (!path.held()) return;  // the bound is kept when a segment is taken
    while (dir.charged_bytes(charged) == 0) {
        dir.allow(charged);
        if (charged <= dir.max_bytes()) return;
        StoreSegment* victim = next_victim();
        uint32_t writer, id;
        if (dir.reclaim_dead(victim ? victim->mtime_ns : INT64_MAX, writer, id)) {
            if (StoreSegment* s = find_segment(writer, id)) drop_segment(*s, lk);
        } else if (victim || (victim = last_resort())) {
            if (remove_segment(*victim, lk)) return;
        } else {
            return;
        }
    }
}

void StoreImpl::refresh(std::unique_lock<std::mutex>& lk) {
    lk.unlock();
    std::vector<uint32_t> ids;
    int err = dir.writers(ids);
    lk.lock();
    n.io_errors += err != 0;
    for (uint32_t w : ids) {
        if (int(w) == dir.writer()) continue;
        std::map<uint32_t, SegmentScan> known;
        for (auto& s : segments) {
            if (s->writer != w || s->state == SegState::kGone || !s->sealed) continue;
            SegmentScan& k = known[s->id];
            k.gen = s->gen;
            k.bytes = s->bytes;
            k.mtime_ns = s->mtime_ns;
            k.sealed = true;
        }
        lk.unlock();
        WriterScan scan = dir.scan(w, *faults, &known);
        lk.lock();
        load(w, scan, lk);
    }
}

}  // namespace kvo::store
