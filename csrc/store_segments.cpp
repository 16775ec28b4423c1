// Segments: taken under the byte bound, recycled, removed.
#include <fcntl.h>
#include <unistd.h>

#include <algorithm>
#include <cstring>

#include "store_impl.h"

namespace kvo::store {
namespace {

constexpr size_t kAtOnce = 4096;                       // ended retentions
constexpr unsigned kMostBackoff = 10;                  // doublings
constexpr auto kReadersEnd = std::chrono::seconds(1);  // by then, of a segment to be recycled

}  // namespace

// The generation from which on deletes may hide something: of all that holds records, in use or
// not. One that cannot be recycled does not count: where all others have deletes, writing would
// end with it.
uint32_t StoreImpl::oldest_gen() const {
    uint32_t oldest = UINT32_MAX;
    for (auto& s : segments) {
        bool holds = s->state == SegState::kOpen || s->state == SegState::kFull ||
                     s->state == SegState::kSealed;
        if (s->own && holds && !s->empty && !s->failed) oldest = std::min(oldest, s->gen);
    }
    return oldest;
}

// Of the oldest tenth the one with the fewest bytes that are kept, then with the fewest that were
// read. One with deletes goes only when it is the oldest: it outlives what it hides. Where there is
// no place for what is kept in it: the oldest for which there is.
StoreSegment* StoreImpl::next_victim(bool in_use) {
    auto older = [](const StoreSegment* a, const StoreSegment* b) { return a->gen < b->gen; };
    const uint32_t oldest = oldest_gen();
    std::vector<StoreSegment*> own;
    StoreSegment *empty = nullptr, *rescued = nullptr;
    for (auto& s : segments) {
        bool soon = in_use && s->state == SegState::kFull;
        if (!s->own || !(s->state == SegState::kSealed || soon) || s.get() == rescuing) continue;
        if (s->aside() || (s->pins && !in_use) || (s->deletes && s->gen != oldest)) continue;
        if (s->rescued && !s->kept_todo()) rescued = s.get();
        if (!s->empty)
            own.push_back(s.get());
        else if (!empty || older(s.get(), empty))
            empty = s.get();
    }
    if (empty || own.empty()) return empty;
    if (rescued) return rescued;
    size_t tenth = std::max<size_t>(1, own.size() / 10);
    std::partial_sort(own.begin(), own.begin() + ptrdiff_t(tenth), own.end(), older);
    auto lighter = [](const StoreSegment* a, const StoreSegment* b) {
        return std::pair(a->kept_todo(), a->hot_bytes) < std::pair(b->kept_todo(), b->hot_bytes);
    };
    StoreSegment* best = own[0];
    for (size_t i = 1; i < tenth; ++i)
        if (lighter(own[i], best)) best = own[i];
    auto movable = [&](const StoreSegment* s) { return s->kept_todo() <= room(s->kept_chunks); };
    if (movable(best)) return best;
    std::sort(own.begin() + 1, own.end(), older);
    for (StoreSegment* s : own) {
        if (movable(s)) return s;
        if (s->kept_todo() < best->kept_todo()) best = s;
    }
    return best;
}

// Where nothing else can go: what could not be read, then what failed longest ago.
StoreSegment* StoreImpl::last_resort() {
    auto order = [](const StoreSegment* s) { return std::pair(s->failed, s->gen); };
    StoreSegment* best = nullptr;
    for (auto& s : segments) {
        bool can = s->own && s->aside() && s->state == SegState::kSealed && !s->pins;
        if (can && (!best || order(s.get()) < order(best))) best = s.get();
    }
    return best;
}

// It could not be recycled: others go before it.
void StoreImpl::set_aside(StoreSegment& seg) {
    seg.state = SegState::kSealed;
    seg.failed = ++last_failed;
    seg.retry_at = taken + (uint64_t{1} << std::min(seg.failures, kMostBackoff));
    ++seg.failures;
}

// One that failed and is due again since others were taken: after an outage all that it hit must
// come back, or what is written goes round in the few that are left. To be tried where no put waits
// for it. The oldest, and nothing that would have to be rescued first.
StoreSegment* StoreImpl::second_chance() {
    const uint32_t oldest = oldest_gen();
    StoreSegment* best = nullptr;
    for (auto& s : segments) {
        bool due = s->own && s->failed && taken >= s->retry_at;
        bool can = s->state == SegState::kSealed && !s->pins && !s->kept_todo() &&
                   s.get() != rescuing && s->bytes == dir.segment_bytes() &&
                   (!s->deletes || s->gen <= oldest);
        if (due && can && (!best || s->gen < best->gen)) best = s.get();
    }
    return best;
}

StoreSegment* StoreImpl::find_segment(uint32_t writer, uint32_t id) {
    for (auto& s : segments)
        if (s->writer == writer && s->id == id && s->state != SegState::kGone) return s.get();
    return nullptr;
}

// Nothing names it any more; a read under way keeps its file.
void StoreImpl::drop_segment(StoreSegment& seg, std::unique_lock<std::mutex>& lk) {
    seg.state = SegState::kRecycling;
    unpublish(seg, lk);
    seg.state = SegState::kGone;
    seg.lost = false;
    std::lock_guard fl(files_mu);
    seg.file.reset();
    seg.header_file.reset();
    std::erase(open_files, &seg);
}

// One of ours, and its file. Failing that, it stays as it is, and others go before it.
int StoreImpl::remove_segment(StoreSegment& seg, std::unique_lock<std::mutex>& lk) {
    seg.state = SegState::kRecycling;
    lk.unlock();
    int err = ::unlinkat(dir.writer_fd(), segment_name(seg.id).c_str(), 0) == 0 ? 0 : errno;
    if (err == ENOENT) err = 0;
    int sync_err = err ? 0 : sync_names(dir.writer_fd());  // else a power cut brings it back
    lk.lock();
    n.io_errors += sync_err != 0;
    if (err) {
        set_aside(seg);
        return err;
    }
    drop_segment(seg, lk);
    return 0;
}

// Takes a segment under the path lock: new while the sum stays below the bound, else our oldest.
int StoreImpl::take_segment(std::unique_lock<std::mutex>& lk) {
    lk.unlock();
    PathLock path(dir.fd(), 2000);
    lk.lock();
    int err = path.held() ? make_room(lk) : EIO;
    taken += !err;
    set_kept_limit();
    plan_stale = true;
    if (!clean.empty()) plan_rescue();  // it promises nothing then, and check() may come next
    if (err && err != ENOSPC && err != EDQUOT && err != EAGAIN && err != EBUSY) ++n.io_errors;
    return err;
}

int StoreImpl::make_room(std::unique_lock<std::mutex>& lk) {
    bool try_new = true;
    auto until = Clock::now() + kReadersEnd;
    auto may_wait = [&] { return Clock::now() < until && !stop_keeper; };
    for (;;) {
        lk.unlock();
        uint64_t now = 0;
        int err = dir.charged_bytes(now);
        lk.lock();
        if (err) return err;  // there may be more than the bound already
        charged = now;
        dir.allow(charged);  // others, told of a larger bound, grow
        bool first = std::none_of(segments.begin(), segments.end(),
                                  [](auto& s) { return s->own && s->state != SegState::kGone; });
        uint64_t want =
            dir.segment_bytes() + kSlack + (first ? 2 * journal_reserve(dir.segment_bytes()) : 0);
        purge_kept(kAtOnce);
        StoreSegment* victim = next_victim();
        if (victim && victim->empty && victim->bytes == dir.segment_bytes() &&
            charged <= dir.max_bytes())
            return recycle(*victim, lk);
        if (try_new && charged + want <= dir.max_bytes()) {
            int err = create_segment(lk);
            if (err != ENOSPC && err != EDQUOT) return err;
            try_new = false;  // the disk is fuller than the bound says
            continue;
        }
        if (StoreSegment* again = need_segment ? nullptr : second_chance();
            again && charged <= dir.max_bytes())
            return recycle(*again, lk);
        uint32_t writer, id;
        lk.unlock();
        bool freed = dir.reclaim_dead(victim ? victim->mtime_ns : INT64_MAX, writer, id);
        lk.lock();
        if (freed) {
            if (StoreSegment* s = find_segment(writer, id)) drop_segment(*s, lk);
            try_new = true;
            continue;
        }
        // The lock was free: a better one may have lost its last reader.
        if (next_victim() != victim && may_wait()) continue;
        if (victim && !need_segment && charged <= dir.max_bytes() && rescuable()) return EAGAIN;
        if (victim && !need_segment && victim->kept_todo()) return EBUSY;
        bool wait = victim ? victim->kept_todo() && emptied_in_use() : in_use();
        if (wait && may_wait()) {
            done_cv.wait_for(lk, std::chrono::milliseconds(10));
            continue;
        }
        if (!victim && need_segment) victim = last_resort();
        if (!victim) return ENOSPC;
        if (victim->bytes == dir.segment_bytes() && charged <= dir.max_bytes())
            return recycle(*victim, lk);
        if (int err = remove_segment(*victim, lk)) return err;
        try_new = true;
    }
}

// Whether a segment could go, were it not being read.
bool StoreImpl::in_use() {
    return std::any_of(segments.begin(), segments.end(), [](auto& s) {
        return s->own && s->state == SegState::kSealed && s->pins && !s->aside();
    });
}

// Whether a segment that nothing is kept in would go next, were it not being read.
bool StoreImpl::emptied_in_use() {
    return std::any_of(segments.begin(), segments.end(), [&](auto& s) {
        return s->own && s->state == SegState::kSealed && s->pins && s.get() != rescuing &&
               !s->aside() && !s->kept_todo();
    });
}

int StoreImpl::create_segment(std::unique_lock<std::mutex>& lk) {
    auto owned = std::make_unique<StoreSegment>();
    StoreSegment& seg = *owned;
    seg.writer = uint32_t(dir.writer());
    seg.id = uint32_t(++last_id);
    seg.own = true;
    seg.bytes = dir.segment_bytes();
    uint64_t gen = ++last_gen;
    seg.gen = uint32_t(gen);
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
            remember_open(seg);
        }
        if (!err) err = make_clean(seg, gen);
        if (!err && ::fsync(f->fd()) != 0) err = errno;
        if (err) ::unlinkat(dir.writer_fd(), name.c_str(), 0);
    }
    lk.lock();
    if (err) {
        std::lock_guard fl(files_mu);
        std::erase(open_files, &seg);
        return err;
    }
    charged += seg.bytes;
    seg.blank_from = kBlock;
    seg.state = SegState::kClean;
    clean.push_back(&seg);
    segments.push_back(std::move(owned));
    tidy_cv.notify_one();
    return 0;
}

// Failing that, it stays as it is, and others go before it: its file keeps the bad place from being
// given to a new one, and where the disk fails as a whole, nothing is lost with every try. Not so
// where the disk is full: the header was changed in place by then, and any other would fail as
// well, so this one is the next again.
int StoreImpl::recycle(StoreSegment& seg, std::unique_lock<std::mutex>& lk) {
    seg.state = SegState::kRecycling;  // readers find nothing of it from here on
    uint64_t gen = ++last_gen;
    lk.unlock();
    int err = make_clean(seg, gen);
    lk.lock();
    if (err == ENOENT) {  // there is nothing left of it
        drop_segment(seg, lk);
    } else if (err == ENOSPC || err == EDQUOT) {
        unpublish(seg, lk);
        seg.state = SegState::kSealed;
        seg.empty = true;
        seg.deletes = 0;
    } else if (err) {
        set_aside(seg);
    }
    if (err) return err;
    if (seg.failed && need_segment)  // as a last resort: the disk is better, and so may be others
        for (auto& s : segments) s->failed = 0;
    seg.failed = seg.failures = 0;
    n.recycled_segments += !seg.empty;
    unpublish(seg, lk);
    seg.gen = uint32_t(gen);
    seg.sealed = false;
    seg.tail = kBlock;
    seg.reserved = 0;
    seg.journal_failed = false;
    seg.lost = false;
    seg.deletes = 0;
    seg.hot_left = seg.kept_left = 0;
    seg.rescued = false;
    seg.empty = seg.unread = false;
    seg.state = SegState::kClean;
    clean.push_back(&seg);
    return 0;
}

// Durable header of the new generation, then its journal and the names of both. No lock held;
// nobody else uses the segment.
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
    if (!j || (err = sync_names(dir.writer_fd()))) return err;
    std::lock_guard fl(files_mu);
    seg.journal = j;
    return 0;
}

}  // namespace kvo::store
