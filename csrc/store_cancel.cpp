// Deadlines and cancellation. What an engine thread has begun to prepare has started and ends by
// itself; everything before that ends here, on whose thread asks: a hung disk keeps nobody waiting.
#include "store_impl.h"

namespace kvo::store {

bool StoreImpl::overdue(const StoreJob& job) {
    return job.given_up ||
           (job.deadline != Clock::time_point::max() && Clock::now() >= job.deadline);
}

void StoreImpl::set_deadline(const StoreJobPtr& job, int64_t deadline_ms) {
    if (!deadline_ms) return;
    job->deadline = job->start + std::chrono::milliseconds(deadline_ms);
    deadlines.emplace(job->deadline, job);
}

// One item of a request that has not started. The request may go on with others.
void StoreImpl::end_item(StoreWork& w, bool write) {
    w.ended = true;
    if (write) return drop_put(w);
    if (Arena* a = w.job->arena.get()) a->fail(w.it.slot, w.it.generation);
    settle(w.job, w.index, kDropped, 0);
}

// A put that will not be written. Of others that wait for the same key the first takes its place.
void StoreImpl::drop_put(StoreWork& w) {
    queued -= w.it.nbytes;
    settle(w.job, w.index, kDropped, 0);
    auto p = pending.find(w.it.key);
    auto& waiters = p->second;
    if (waiters.empty()) {
        pending.erase(p);
        if (!queued && tidy_waits) tidy_cv.notify_one();
        return;
    }
    queued += waiters.front().it.nbytes;
    put_queue.push_back(std::move(waiters.front()));
    waiters.erase(waiters.begin());
}

bool StoreImpl::start_group(StoreGroup& g, bool write) {
    std::lock_guard lk(mu);
    g.started = true;
    size_t left = 0;
    for (auto& w : g.items) {
        if (!w.ended && (w.job->done || overdue(*w.job))) end_item(w, write);
        left += !w.ended;
    }
    if (write && g.bounce && left) touch_buffers(g);
    if (write && !put_queue.empty()) place();  // somebody may have taken a place
    return left > 0;
}

size_t StoreImpl::give_up(const StoreJobPtr& job) {
    if (job->done || job->given_up) return 0;
    job->given_up = true;
    size_t before = job->left;
    for (auto& [key, waiters] : pending)
        std::erase_if(waiters, [&](StoreWork& w) {
            if (w.job != job) return false;
            settle(job, w.index, kDropped, 0);
            return true;
        });
    std::deque<StoreWork> gone, kept;
    for (auto& w : put_queue) (w.job == job ? gone : kept).push_back(std::move(w));
    put_queue = std::move(kept);
    for (auto& w : gone) drop_put(w);
    for (auto& weak : job->groups) {
        auto g = weak.lock();
        if (!g || g->started) continue;
        for (auto& w : g->items)
            if (w.job == job && !w.ended) end_item(w, job->kind == 0);
    }
    size_t ended = before - job->left;
    if (job->kind == 0) place();
    return ended;
}

void StoreImpl::expire() {
    auto now = deadlines.empty() ? Clock::time_point::min() : Clock::now();
    while (!deadlines.empty() && deadlines.begin()->first <= now) {
        StoreJobPtr job = deadlines.begin()->second.lock();
        deadlines.erase(deadlines.begin());
        if (job) give_up(job);
    }
}

size_t StoreImpl::cancel(int64_t id) {
    std::lock_guard lk(mu);
    auto it = jobs.find(id);
    return it == jobs.end() ? 0 : give_up(StoreJobPtr(it->second));
}

// Requests in plain buffers do their I/O in buffers of the engine's, so that a caller's memory is
// ours only while it is copied.
bool StoreImpl::abandon(int64_t id) {
    std::lock_guard lk(mu);
    auto it = jobs.find(id);
    if (it == jobs.end() || it->second->done) return false;
    StoreJobPtr job = it->second;
    give_up(job);
    if (job->done || job->arena) return true;
    job->abandoned = true;
    if (!job->touching) end_abandoned(job);
    return true;
}

void StoreImpl::end_abandoned(const StoreJobPtr& job) {
    n.dropped += job->left;
    end_job(job);
}

void StoreImpl::touch_buffers(StoreGroup& g) {
    for (auto& w : g.items) {
        w.touched = !w.ended && !w.job->arena && !w.job->done && !w.job->abandoned;
        w.job->touching += w.touched;
    }
}

void StoreImpl::untouch_buffers(StoreGroup& g) {
    for (auto& w : g.items) {
        if (!w.touched) continue;
        w.touched = false;
        if (--w.job->touching) continue;
        if (w.job->abandoned && !w.job->done) end_abandoned(w.job);
        job_cv.notify_all();  // close() may wait
    }
}

bool StoreImpl::wait(int64_t id, int timeout_ms) {
    std::unique_lock lk(mu);
    auto it = jobs.find(id);
    if (it == jobs.end()) return true;
    StoreJobPtr job = it->second;
    auto until = Clock::now() + std::chrono::milliseconds(timeout_ms);
    while (!job->done) {
        auto now = Clock::now();
        if (!job->given_up && now >= job->deadline)
            give_up(job);
        else if (now >= until)
            return false;
        else
            job_cv.wait_until(lk, job->given_up ? until : std::min(until, job->deadline));
    }
    return true;
}

bool StoreImpl::wait_any(int timeout_ms) {
    std::unique_lock lk(mu);
    auto until = Clock::now() + std::chrono::milliseconds(timeout_ms);
    for (;;) {
        expire();
        if (!finished.empty()) return true;
        if (jobs.empty() || Clock::now() >= until) return false;
        auto next = deadlines.empty() ? until : std::min(until, deadlines.begin()->first);
        job_cv.wait_until(lk, next);
    }
}

}  // namespace kvo::store
