// The keeper thread: journals, seals, segments ahead of need, other writers' news. And recovery.
#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cstring>

#include "errors.h"
#include "store_impl.h"

namespace kvo::store {
namespace {

constexpr auto kJournalEvery = std::chrono::milliseconds(10);
constexpr auto kRefreshEvery = std::chrono::seconds(1);
constexpr size_t kMaxOpenFiles = 256;
constexpr uint64_t kSlack = 4 * kBlock;  // the next two openers' directories and locks

}  // namespace

// ---- loop

void StoreImpl::keeper() {
    setup_native_thread("kvo-store");
    std::unique_lock lk(mu);
    while (!stop_keeper) {
        if (keeper_step(lk)) continue;
        if (records_added > records_journalled)
            keeper_cv.wait_until(lk, oldest_unwritten + kJournalEvery);
        else if (miss_hint)
            keeper_cv.wait_until(lk, last_refresh + kRefreshEvery);
        else
            keeper_cv.wait(lk);  // an idle store never wakes
    }
    if (!killed) drain_keeper(lk);
    keeper_alive = false;
    keeper_gone_cv.notify_all();
}

bool StoreImpl::want_ahead() {
    if (!open || clean || discard || ahead_tried == open) return false;
    size_t own = 0;
    for (auto& s : segments) {
        own += s->own && s->state != SegState::kGone;
        if (s->own && s->state == SegState::kFull) return false;
    }
    // A small store would lose a good part of itself to the spare.
    return own >= 4 && open->tail > open->bytes / 4 * 3;
}

bool StoreImpl::keeper_step(std::unique_lock<std::mutex>& lk) {
    if (killed) return false;
    if (StoreSegment* s = sealable()) {
        seal(*s, lk);
        return true;
    }
    uint64_t unwritten = records_added - records_journalled;
    if (unwritten && (unwritten >= kRecordsPerPage || flush_waiters ||
                      Clock::now() >= oldest_unwritten + kJournalEvery)) {
        write_journals(lk);
        return true;
    }
    size_t full = 0;
    for (auto& s : segments) full += s->own && s->state == SegState::kFull;
    if (need_segment && (open || clean)) {  // one taken ahead came first
        need_segment = false;
        place();
        return true;
    }
    if (need_segment && !discard && full < 2) {
        int err = take_segment(lk);
        need_segment = false;
        if (!err)
            place();
        else
            fail_queued_puts(err == ENOSPC || err == EDQUOT ? kNoSpace : kIoError);
        return true;
    }
    if (want_ahead()) {
        ahead_tried = open;
        take_segment(lk);  // failing, it is tried again when it is needed
        return true;
    }
    if (miss_hint && Clock::now() >= last_refresh + kRefreshEvery) {
        miss_hint = false;
        refresh(lk);
        last_refresh = Clock::now();
        return true;
    }
    return false;
}

void StoreImpl::drain_keeper(std::unique_lock<std::mutex>& lk) {
    while (StoreSegment* s = sealable()) seal(*s, lk);
    write_journals(lk);
}

void StoreImpl::close_open() {
    open->state = SegState::kFull;
    open = nullptr;
    wake_keeper();
}

StoreSegment* StoreImpl::sealable() {
    for (auto& s : segments)
        if (s->own && s->state == SegState::kFull && !s->pins) return s.get();
    return nullptr;
}

// ---- journal and footer

void StoreImpl::write_journals(std::unique_lock<std::mutex>& lk) {
    for (size_t i = 0; i < segments.size(); ++i)
        if (segments[i]->journalled < segments[i]->records.size()) write_journal(*segments[i], lk);
}

// The last page is rewritten as it fills: what it held before it holds again.
void StoreImpl::write_journal(StoreSegment& seg, std::unique_lock<std::mutex>& lk) {
    size_t from = seg.journalled / kRecordsPerPage * kRecordsPerPage, to = seg.records.size();
    if (seg.journalled == to) return;
    uint64_t bytes = round_up((to - from) * sizeof(Record));
    AlignedBuf buf(bytes);
    std::memset(buf.data(), 0, bytes);
    std::memcpy(buf.data(), &seg.records[from], (to - from) * sizeof(Record));
    FilePtr f = seg.journal;
    bool skip = seg.journal_failed || !f;
    oldest_unwritten = Clock::now();
    lk.unlock();
    int err = skip ? EIO : write_full(*f, buf.data(), bytes, from * sizeof(Record), *faults);
    lk.lock();
    if (err) {
        // Served as long as we live, and by the footer later; lost if we are killed before.
        if (!skip) ++n.io_errors;
        seg.journal_failed = true;
        ++journal_failures;
        if (open == &seg) close_open();
    } else {
        n.journal_bytes += bytes;
    }
    records_journalled += to - seg.journalled;
    seg.journalled = to;
    done_cv.notify_all();
}

int StoreImpl::write_footer(StoreSegment& seg, const std::vector<Record>& recs, uint64_t off,
                            uint64_t trailer_off) {
    int err = 0;
    FilePtr f = file_of(seg, err);
    if (!f) return err;
    size_t raw = recs.size() * sizeof(Record);
    AlignedBuf buf(round_up(raw) + kBlock);
    std::memset(buf.data(), 0, buf.size());
    std::memcpy(buf.data(), recs.data(), raw);
    SegmentTrailer t =
        make_trailer(dir.uuid(), seg.id, seg.gen, off, recs.size(), crc32c(recs.data(), raw));
    std::memcpy(buf.data() + round_up(raw), &t, sizeof t);
    if (raw) err = write_full(*f, buf.data(), round_up(raw), off, *faults);
    if (!err) err = write_full(*f, buf.data() + round_up(raw), kBlock, trailer_off, *faults);
    return err;
}

void StoreImpl::seal(StoreSegment& seg, std::unique_lock<std::mutex>& lk) {
    std::vector<Record> recs = seg.records;
    uint64_t off = seg.tail, epoch = seg.gen;
    ++seg.pins;  // not recycled, not sealed twice
    lk.unlock();
    int err = write_footer(seg, recs, off, seg.bytes - kBlock);
    if (FilePtr f; !err && (f = file_of(seg, err))) err = sync_data(*f);
    if (!err) ::unlinkat(dir.writer_fd(), journal_name(epoch).c_str(), 0);
    lk.lock();
    --seg.pins;
    if (err) {
        ++n.io_errors;
        write_journal(seg, lk);  // the next opener finds what the footer does not say
    } else {
        records_journalled += seg.records.size() - seg.journalled;
        ++n.sealed_segments;
    }
    seg.sealed = !err;
    seg.empty = seg.records.empty();
    seg.records = {};
    seg.journalled = 0;
    seg.reserved = 0;
    seg.state = SegState::kSealed;
    seg.mtime_ns = unix_ns();
    {
        std::lock_guard fl(files_mu);
        seg.journal.reset();
    }
    done_cv.notify_all();
}

// ---- segments

StoreSegment* StoreImpl::oldest_own() {
    StoreSegment* best = nullptr;
    for (auto& s : segments) {
        if (!s->own || s->state != SegState::kSealed || s->pins) continue;
        if (!best || std::pair(!s->empty, s->gen) < std::pair(!best->empty, best->gen))
            best = s.get();
    }
    return best;
}

StoreSegment* StoreImpl::find_segment(uint32_t writer, uint32_t id) {
    for (auto& s : segments)
        if (s->writer == writer && s->id == id && s->state != SegState::kGone) return s.get();
    return nullptr;
}

void StoreImpl::remove_segment(StoreSegment& seg, std::unique_lock<std::mutex>& lk) {
    seg.state = SegState::kRecycling;
    unpublish(seg, lk);
    seg.state = SegState::kGone;
    {
        std::lock_guard fl(files_mu);
        seg.file.reset();
        seg.header_file.reset();
        std::erase(open_files, &seg);
    }
    if (!seg.own) return;
    lk.unlock();
    ::unlinkat(dir.writer_fd(), segment_name(seg.id).c_str(), 0);
    lk.lock();
}

// Takes a segment under the path lock: new while the sum stays below the bound, else our oldest.
int StoreImpl::take_segment(std::unique_lock<std::mutex>& lk) {
    lk.unlock();
    PathLock path(dir.fd(), 2000);
    lk.lock();
    int err = path.held() ? make_room(lk) : EIO;
    if (err && err != ENOSPC && err != EDQUOT) ++n.io_errors;
    return err;
}

int StoreImpl::make_room(std::unique_lock<std::mutex>& lk) {
    bool try_new = true;
    for (int waited = 0;;) {
        lk.unlock();
        uint64_t now = dir.charged_bytes();
        lk.lock();
        charged = now;
        bool first = std::none_of(segments.begin(), segments.end(),
                                  [](auto& s) { return s->own && s->state != SegState::kGone; });
        uint64_t want =
            dir.segment_bytes() + kSlack + (first ? 2 * journal_reserve(dir.segment_bytes()) : 0);
        StoreSegment* victim = oldest_own();
        if (victim && victim->empty && victim->bytes == dir.segment_bytes() &&
            charged <= dir.max_bytes())
            return recycle(*victim, lk);
        if (try_new && charged + want <= dir.max_bytes()) {
            int err = create_segment(lk);
            if (err != ENOSPC && err != EDQUOT) return err;
            try_new = false;  // the disk is fuller than the bound says
            continue;
        }
        uint32_t writer, id;
        lk.unlock();
        bool freed = dir.reclaim_dead(victim ? victim->mtime_ns : INT64_MAX, writer, id);
        lk.lock();
        if (freed) {
            if (StoreSegment* s = find_segment(writer, id)) remove_segment(*s, lk);
            try_new = true;
        } else if (!victim) {
            bool pinned = std::any_of(segments.begin(), segments.end(), [](auto& s) {
                return s->own && s->state == SegState::kSealed && s->pins;
            });
            if (!pinned || ++waited > 100 || stop_keeper) return ENOSPC;
            done_cv.wait_for(lk, std::chrono::milliseconds(10));
        } else if (victim->bytes != dir.segment_bytes() || charged > dir.max_bytes()) {
            remove_segment(*victim, lk);
            try_new = true;
        } else {
            return recycle(*victim, lk);
        }
    }
}

int StoreImpl::create_segment(std::unique_lock<std::mutex>& lk) {
    auto owned = std::make_unique<StoreSegment>();
    StoreSegment& seg = *owned;
    seg.writer = uint32_t(dir.writer());
    seg.id = uint32_t(++last_id);
    seg.own = true;
    seg.bytes = dir.segment_bytes();
    uint64_t gen = ++last_gen;
    lk.unlock();
    std::string name = segment_name(seg.id);
    int err = 0;
    FilePtr f =
        open_file(dir.writer_fd(), name.c_str(), O_RDWR | O_CREAT | O_EXCL, opt.direct, err);
    if (f) {
        if (::fallocate(f->fd(), 0, 0, off_t(seg.bytes)) != 0) err = errno;
        if (err == EOPNOTSUPP || err == ENOSYS)
            err = ::ftruncate(f->fd(), off_t(seg.bytes)) == 0 ? 0 : errno;
        {
            std::lock_guard fl(files_mu);
            seg.file = f;
            open_files.push_back(&seg);
        }
        if (!err) err = make_clean(seg, gen);
        if (!err && (::fsync(f->fd()) != 0 || ::fsync(dir.writer_fd()) != 0)) err = errno;
        if (err) ::unlinkat(dir.writer_fd(), name.c_str(), 0);
    }
    lk.lock();
    if (err) {
        std::lock_guard fl(files_mu);
        std::erase(open_files, &seg);
        return err;
    }
    charged += seg.bytes;
    seg.state = SegState::kClean;
    clean = &seg;
    segments.push_back(std::move(owned));
    return 0;
}

int StoreImpl::recycle(StoreSegment& seg, std::unique_lock<std::mutex>& lk) {
    seg.state = SegState::kRecycling;
    bool had = !seg.empty;
    unpublish(seg, lk);
    uint64_t gen = ++last_gen;
    lk.unlock();
    int err = make_clean(seg, gen);
    lk.lock();
    seg.gen = uint32_t(gen);
    seg.sealed = false;
    seg.tail = kBlock;
    seg.reserved = 0;
    seg.journal_failed = false;
    if (err) {  // the header may say either generation; nothing of it is in the index
        seg.state = SegState::kSealed;
        seg.empty = true;
        return err;
    }
    seg.empty = false;
    seg.state = SegState::kClean;
    clean = &seg;
    n.recycled_segments += had;
    return 0;
}

// Durable header of the new generation, then its journal. No lock held; nobody else uses the
// segment.
int StoreImpl::make_clean(StoreSegment& seg, uint64_t gen) {
    int err = 0;
    FilePtr f = file_of(seg, err);
    if (!f) return err;
    AlignedBuf page(kBlock);
    SegmentHeader h = make_header(dir.uuid(), seg.writer, seg.id, gen, seg.bytes);
    std::memcpy(page.data(), &h, sizeof h);
    if ((err = write_full(*f, page.data(), kBlock, 0, *faults))) return err;
    if ((err = sync_data(*f))) return err;
    std::string name = journal_name(gen);
    ::unlinkat(dir.writer_fd(), name.c_str(), 0);
    FilePtr j =
        open_file(dir.writer_fd(), name.c_str(), O_RDWR | O_CREAT | O_EXCL, opt.direct, err);
    if (!j) return err;
    std::lock_guard fl(files_mu);
    seg.journal = j;
    seg.gen = uint32_t(gen);
    return 0;
}

FilePtr StoreImpl::file_of(StoreSegment& seg, int& err) {
    std::lock_guard fl(files_mu);
    err = 0;
    if (seg.file) return seg.file;
    std::string name = segment_name(seg.id);
    if (seg.own) {
        seg.file = open_file(dir.writer_fd(), name.c_str(), O_RDWR, opt.direct, err);
    } else {
        Fd d = dir.open_writer(seg.writer);
        if (d)
            seg.file = open_file(d.get(), name.c_str(), O_RDONLY, opt.direct, err);
        else
            err = ENOENT;
    }
    if (!seg.file) return nullptr;
    open_files.push_back(&seg);
    if (open_files.size() > kMaxOpenFiles) {
        open_files.front()->file.reset();  // closes when its last request is done
        open_files.front()->header_file.reset();
        open_files.pop_front();
    }
    return seg.file;
}

// Read through the page cache: the owner's O_DIRECT writes invalidate it, else it costs no I/O.
uint64_t StoreImpl::foreign_gen(StoreSegment& seg) {
    FilePtr f;
    {
        std::lock_guard fl(files_mu);
        if (!seg.header_file) {
            int err;
            Fd d = dir.open_writer(seg.writer);
            if (d)
                seg.header_file =
                    open_file(d.get(), segment_name(seg.id).c_str(), O_RDONLY, false, err);
        }
        f = seg.header_file;
    }
    SegmentHeader h;
    if (!f || ::pread(f->fd(), &h, sizeof h, 0) != ssize_t(sizeof h)) return 0;
    return header_ok(h, dir.uuid(), seg.writer, seg.id) ? h.gen : 0;
}

// ---- recovery and other writers

void StoreImpl::load_segment(uint32_t writer, SegmentScan& s, std::unique_lock<std::mutex>& lk) {
    bool own = int(writer) == dir.writer();
    StoreSegment* seg = find_segment(writer, s.id);
    if (!s.gen && !own) {  // being recycled, or damaged
        if (seg) remove_segment(*seg, lk);
        return;
    }
    if (seg && seg->gen != s.gen) {  // recycled by its owner
        remove_segment(*seg, lk);
        seg = nullptr;
    }
    if (!seg) {
        seg = segments.emplace_back(std::make_unique<StoreSegment>()).get();
        seg->writer = writer;
        seg->id = s.id;
        seg->own = own;
        seg->gen = uint32_t(s.gen);
        seg->empty = own && !s.sealed && s.records.empty();
    }
    seg->bytes = s.bytes;
    seg->mtime_ns = s.mtime_ns;
    seg->sealed = s.sealed;
    for (size_t i = 0; i < s.records.size(); ++i) {
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
    std::set<uint32_t> there;
    for (auto& s : scan.segments) {
        there.insert(s.id);
        load_segment(writer, s, lk);
    }
    for (size_t i = 0; i < segments.size(); ++i) {
        StoreSegment& s = *segments[i];
        if (s.writer == writer && !s.own && s.state != SegState::kGone && !there.count(s.id))
            remove_segment(s, lk);
    }
}

void StoreImpl::recover() {
    auto t0 = Clock::now();
    std::unique_lock lk(mu);
    WriterScan own;
    for (uint32_t w : dir.writers()) {
        lk.unlock();
        WriterScan scan = dir.scan(w, *faults);
        lk.lock();
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
            for (uint64_t e : own.journals) ::unlinkat(dir.writer_fd(), journal_name(e).c_str(), 0);
        shrink(lk);
    }
    charged = dir.charged_bytes();
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
    while ((charged = dir.charged_bytes()) > dir.max_bytes()) {
        StoreSegment* victim = oldest_own();
        uint32_t writer, id;
        if (dir.reclaim_dead(victim ? victim->mtime_ns : INT64_MAX, writer, id)) {
            if (StoreSegment* s = find_segment(writer, id)) remove_segment(*s, lk);
        } else if (victim) {
            remove_segment(*victim, lk);
        } else {
            return;
        }
    }
}

void StoreImpl::refresh(std::unique_lock<std::mutex>& lk) {
    lk.unlock();
    std::vector<uint32_t> ids = dir.writers();
    lk.lock();
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

// ---- flush, close

bool StoreImpl::flush(int timeout_ms) {
    std::unique_lock lk(mu);
    auto until = Clock::now() + std::chrono::milliseconds(timeout_ms);
    uint64_t ticket = last_ticket, failures = journal_failures;
    ++flush_waiters;
    bool ok = done_cv.wait_until(lk, until, [&] {
        return (put_tickets.empty() || *put_tickets.begin() > ticket) && tomb_queue.empty();
    });
    uint64_t records = records_added;
    wake_keeper();
    ok = ok && done_cv.wait_until(lk, until, [&] { return records_journalled >= records; });
    --flush_waiters;
    return ok && journal_failures == failures;
}

bool StoreImpl::close(int timeout_ms, bool kill) {
    auto until = Clock::now() + std::chrono::milliseconds(timeout_ms);
    auto left = [&] {
        auto ms =
            std::chrono::duration_cast<std::chrono::milliseconds>(until - Clock::now()).count();
        return int(std::max<long>(ms, 50));
    };
    std::unique_lock lk(mu);
    if (closed) return released;
    closed = true;
    killed = kill;
    if (!kill)
        done_cv.wait_until(lk, until,
                           [&] { return jobs.size() == finished.size() && tomb_queue.empty(); });
    discard = true;
    fail_queued_puts(kDropped);
    lk.unlock();
    bool clean_stop = engine->stop(left());
    lk.lock();
    stop_keeper = true;
    keeper_cv.notify_all();
    done_cv.notify_all();
    clean_stop &= keeper_gone_cv.wait_for(lk, std::chrono::milliseconds(left()),
                                          [&] { return !keeper_alive; });
    std::vector<StoreJobPtr> lost;
    for (auto& [id, job] : jobs)
        if (!job->done) lost.push_back(job);
    for (auto& job :
         lost) {  // a hung transfer still owns its memory: the job ends, its arena stays
        job->done = true;
        finished.push_back(job);
    }
    done_cv.notify_all();
    lk.unlock();
    if (clean_stop)
        keeper_thread.join();
    else
        keeper_thread.detach();
    if (clean_stop) release();
    return clean_stop;
}

// Files and the writer's lock. Not done while a thread hangs: it could still write.
void StoreImpl::release() {
    std::lock_guard lk(mu);
    std::lock_guard fl(files_mu);
    for (auto& s : segments) {
        s->file.reset();
        s->header_file.reset();
        s->journal.reset();
    }
    open_files.clear();
    dir.release();
    released = true;
}

}  // namespace kvo::store
