// The keeper thread: journals, seals, segments ahead of need, other writers' news. Flush and close.
#include <unistd.h>

#include <algorithm>
#include <cstring>

#include "store_impl.h"

namespace kvo::store {
namespace {

constexpr auto kJournalEvery = std::chrono::milliseconds(10);
constexpr auto kRefreshEvery = std::chrono::seconds(1);

}  // namespace

// ---- loop

void StoreImpl::keeper() {
    setup_native_thread("kvo-store");
    std::unique_lock lk(mu);
    while (!stop_keeper) {
        if (keeper_step(lk)) continue;
        if (records_added > records_journalled)
            keeper_cv.wait_until(lk, oldest_unwritten + kJournalEvery);
        else if (rescuing && (promised || need_segment) &&
                 Clock::now() < rescue_moved + kRescueStall)
            keeper_cv.wait_until(lk, rescue_moved + kRescueStall);
        else if (miss_hint)
            keeper_cv.wait_until(lk, last_refresh + kRefreshEvery);
        else
            keeper_cv.wait(lk);  // an idle store never wakes
    }
    if (!killed) drain_keeper(lk);
    keeper_alive = false;
    keeper_gone_cv.notify_all();
}

// Clean segments to keep. A small store would lose a good part of itself to them, and a young one
// may never need them.
size_t StoreImpl::ahead_target() {
    if (!open) return 0;
    auto own = std::ranges::count_if(segments,
                                     [](auto& s) { return s->own && s->state != SegState::kGone; });
    bool large = dir.segments_that_fit() >= kLargeStore, late = open->tail > open->bytes / 4 * 3;
    if (own < 4) return large && late;
    return large ? 2 : late;
}

bool StoreImpl::want_ahead() {
    return open && !discard && !rescuing && ahead_tried != open && clean.size() < ahead_target();
}

// There is room for two journals with records: the open segment's and that of one to be sealed.
size_t StoreImpl::unsealed() const {
    return size_t(std::ranges::count_if(
        segments, [](auto& s) { return s->own && s->state == SegState::kFull; }));
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
    bool room = need_segment && unsealed() < 2;
    if (need_segment && (open || (room && !clean.empty()))) {  // one taken ahead came first
        need_segment = false;
        place();
        return true;
    }
    if (promised && rescuing && Clock::now() >= rescue_moved + kRescueStall) {
        rescuing->kept_left = rescuing->kept_bytes;  // it hangs: puts wait no longer
        plan_rescue();
        place();
        return true;
    }
    if (room && !discard && !await_rescue()) {
        int err = take_segment(lk);
        need_segment = false;
        if (!err)
            place();
        else
            fail_queued_puts(err == ENOSPC || err == EDQUOT ? kNoSpace : kIoError);
        return true;
    }
    if (plan_stale || (promised && !rescuing)) plan_rescue();
    if (held_back && !promised) {
        place();
        return true;
    }
    if (StoreSegment* s = rescuable()) {
        rescuing = s;
        rescue_moved = Clock::now();
        hurry = false;
        plan_rescue();  // from here on its place is kept free
        ++s->pins;
        tidy_cv.notify_one();
    }
    if (want_ahead()) {
        const StoreSegment* now = open;
        int err = take_segment(lk);
        if (err && err != EAGAIN) ahead_tried = now;  // tried again when it is needed
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

// Whether puts wait for a rescue under way: without its segment another one would be recycled with
// what is kept in it. It then moves what is kept and nothing else; one that hangs is left alone.
bool StoreImpl::await_rescue() {
    if (!rescuing || Clock::now() >= rescue_moved + kRescueStall) return false;
    if (StoreSegment* s = next_victim(); !kept_bytes || (s && !s->kept_todo())) return false;
    hurry = true;
    tidy_cv.notify_one();
    return true;
}

void StoreImpl::drain_keeper(std::unique_lock<std::mutex>& lk) {
    while (StoreSegment* s = sealable()) seal(*s, lk);
    write_journals(lk);
    // An orderly end outlasts a power cut: what no seal has flushed is flushed now.
    for (size_t i = 0; i < segments.size(); ++i)
        if (!segments[i]->records.empty()) sync_unsealed(*segments[i], lk);
}

void StoreImpl::sync_unsealed(StoreSegment& seg, std::unique_lock<std::mutex>& lk) {
    FilePtr journal = seg.journal;
    lk.unlock();
    int err = 0;
    FilePtr f = file_of(seg, err);
    if (f) err = sync_data(*f);
    if (!err && journal) err = sync_data(*journal);
    lk.lock();
    n.io_errors += err != 0;
}

void StoreImpl::close_open() {
    open->state = SegState::kFull;
    open = nullptr;
    promised = promised_records = 0;
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
    if (raw) std::memcpy(buf.data(), recs.data(), raw);  // after an outage it may hold nothing
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
    seg.lost = err && seg.journal_failed && !seg.records.empty();
    seg.empty = seg.records.empty();
    seg.records = {};
    seg.keys.shrink_to_fit();
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

// ---- flush, close

bool StoreImpl::flush(int timeout_ms) {
    std::unique_lock lk(mu);
    auto until = Clock::now() + std::chrono::milliseconds(timeout_ms);
    uint64_t ticket = last_ticket;
    ++flush_waiters;
    bool ok = done_cv.wait_until(
        lk, until, [&] { return put_tickets.empty() || *put_tickets.begin() > ticket; });
    ok = place_all_tombs(lk, until) && ok;
    uint64_t records = records_added;
    wake_keeper();
    // Where the journal failed, the footer is what makes the records last.
    auto any = [&](auto&& is) { return std::any_of(segments.begin(), segments.end(), is); };
    ok = ok && done_cv.wait_until(lk, until, [&] {
        return records_journalled >= records &&
               !any([](auto& s) { return s->journal_failed && s->state == SegState::kFull; });
    });
    --flush_waiters;
    return ok && !any([](auto& s) { return s->lost; });
}

// Tries once to find a place for the deletes that have none. False: it failed, or no time is left.
bool StoreImpl::place_all_tombs(std::unique_lock<std::mutex>& lk, Clock::time_point until) {
    uint64_t failed = tombs_failed;
    place_tombs();
    done_cv.wait_until(lk, until, [&] { return tomb_queue.empty() || tombs_failed != failed; });
    return tomb_queue.empty();
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
    if (!kill) {
        done_cv.wait_until(lk, until, [&] { return jobs.size() == finished.size(); });
        place_all_tombs(lk, until);
    }
    discard = true;
    fail_queued_puts(kDropped);
    stop_tidy = true;
    tidy_cv.notify_all();
    lk.unlock();
    bool clean_stop = engine->stop(left());
    lk.lock();
    // What it publishes must be there before the keeper's last look.
    clean_stop &=
        keeper_gone_cv.wait_for(lk, std::chrono::milliseconds(left()), [&] { return !tidy_alive; });
    stop_keeper = true;
    keeper_cv.notify_all();
    done_cv.notify_all();
    clean_stop &= keeper_gone_cv.wait_for(lk, std::chrono::milliseconds(left()),
                                          [&] { return !keeper_alive; });
    std::vector<StoreJobPtr> lost;
    for (auto& [id, job] : jobs)
        if (!job->done) lost.push_back(job);
    for (auto& job : lost) {
        // A hung transfer still owns its arena, which stays. A plain buffer it does not touch
        // again.
        job_cv.wait(lk, [&] { return !job->touching; });
        if (job->done) continue;  // it came to its end meanwhile
        job->done = true;
        finished.push_back(job);
    }
    job_cv.notify_all();
    done_cv.notify_all();
    lk.unlock();
    for (auto* t : {&keeper_thread, &tidy_thread}) {
        if (!t->joinable()) continue;
        if (clean_stop)
            t->join();
        else
            t->detach();
    }
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
