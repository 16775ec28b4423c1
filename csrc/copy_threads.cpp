// The copy pool's threads: which item next, and what its outcome does to the job.
#include <pthread.h>
#include <sys/resource.h>
#include <unistd.h>

#include <algorithm>
#include <cstdlib>
#include <utility>

#include "copy.h"
#include "copy_item.h"
#include "copy_job.h"
#include "futex.h"

namespace kvo {
namespace {

// A scan of the waiting list that found nothing is not repeated sooner than kScanNs while there is
// other work; an idle pool sleeps on a slot for at most kPollNs.
constexpr int64_t kScanNs = 100'000;
constexpr int64_t kPollNs = 1'000'000;

// A core that is gone or not allowed is left out; with none left the thread stays where it may run.
void bind_to(const std::vector<int>& cores) {
    cpu_set_t set;
    CPU_ZERO(&set);
    for (int core : cores)
        if (core >= 0 && core < CPU_SETSIZE) CPU_SET(core, &set);
    pthread_setaffinity_np(pthread_self(), sizeof set, &set);
}

}  // namespace

void CpuCopyPool::run(unsigned index) {
    pthread_setname_np(pthread_self(), ("kvo-copy-" + std::to_string(index)).c_str());
    if (!options_.cores.empty()) bind_to(options_.cores[index % options_.cores.size()]);
    if (options_.nice) setpriority(PRIO_PROCESS, id_t(gettid()), options_.nice);  // this thread's
    alignas(64) uint8_t bounce[kLeafBytes];
    std::unique_lock lock(mu_);
    for (;;) {
        Task task;
        if (pick(&task)) {
            ++busy_;
            wake_next();
            lock.unlock();
            const int64_t begin = now_ns();
            const CopyReason reason = execute(*task.job, task.item, bounce);
            const int64_t end = now_ns();
            lock.lock();
            --busy_;
            finished(task, reason, begin, end);
        } else if (closed_) {
            return;
        } else {
            idle(lock);
        }
    }
}

// Work is handed on one thread at a time: whoever takes an item wakes the next sleeper if more is
// left, or if somebody has to watch the slots that are still being filled.
void CpuCopyPool::wake_next() {
    if (idle_ && (!loads_.empty() || !stores_.empty() || (!waiting_.empty() && !poller_)))
        work_cv_.notify_one();
}

void CpuCopyPool::idle(std::unique_lock<std::mutex>& lock) {
    if (waiting_.empty() || poller_) {
        ++idle_;
        work_cv_.wait(lock);
        --idle_;
        return;
    }
    const Waiting& first = waiting_.front();
    const uint32_t slot = first.job->items.slots[first.item];
    const uint64_t generation = first.job->items.generations[first.item];
    poller_ = true;
    lock.unlock();
    // Another slot may become READY first, or a job arrive with all other threads busy: hence
    // short.
    arena_->wait_ready(slot, generation, kPollNs);
    lock.lock();
    poller_ = false;
    next_scan_ = 0;
}

bool CpuCopyPool::pick(Task* task) {
    const int64_t now = now_ns();
    expire(now);
    const bool scanned = now >= next_scan_;
    if (scanned && pick_waiting(now, task)) return true;
    if (pick_unstarted(loads_, task)) return true;
    if (!scanned && stores_.empty() && pick_waiting(now, task)) return true;
    return pick_unstarted(stores_, task);
}

void CpuCopyPool::expire(int64_t now) {
    // Jobs whose items all run have nothing left to expire; the others are in one of the two lists.
    std::vector<std::shared_ptr<Job>> late;
    for (auto& job : loads_)
        if (now >= job->deadline) late.push_back(job);
    for (auto& w : waiting_)
        if (now >= w.job->deadline) late.push_back(w.job);
    for (auto& job : late) {
        stop_job(job, 0, kDeadline);
        maybe_complete(job);
    }
}

bool CpuCopyPool::start(const std::shared_ptr<Job>& job, size_t item, Task* task) {
    job->state[item] = kRunning;
    ++job->running;
    *task = {job, item};
    return true;
}

bool CpuCopyPool::pick_unstarted(std::deque<std::shared_ptr<Job>>& queue, Task* task) {
    while (!queue.empty()) {
        std::shared_ptr<Job> job = queue.front();
        const size_t item = job->next++;
        if (job->next == job->n()) queue.pop_front();
        if (job->kind == kLoad &&
            arena_->state_of(job->items.slots[item], job->items.generations[item]) == kFilling) {
            job->state[item] = kWaitingReady;
            ++job->waiting;
            waiting_.push_back({job, item, now_ns()});
            continue;
        }
        // Also for a slot that failed or was reused: the copy finds out and reports it.
        return start(job, item, task);
    }
    return false;
}

bool CpuCopyPool::pick_waiting(int64_t now, Task* task) {
    for (auto w = waiting_.begin(); w != waiting_.end(); ++w) {
        const std::shared_ptr<Job>& job = w->job;
        if (arena_->state_of(job->items.slots[w->item], job->items.generations[w->item]) ==
            kFilling)
            continue;
        job->wait_ns = std::max(job->wait_ns, now - w->since);
        --job->waiting;
        start(job, w->item, task);
        waiting_.erase(w);
        return true;
    }
    next_scan_ = now + kScanNs;
    return false;
}

CopyReason CpuCopyPool::execute(const Job& job, size_t item, uint8_t* bounce) {
    const CopyItems& it = job.items;
    const ItemRef ref{*job.group,       it.slots[item], it.generations[item],
                      it.offsets[item], it.seeds[item], job.ids(item),
                      it.blocks};
    if (job.kind == kLoad) {
        const uint64_t every = inject_every_.load(std::memory_order_relaxed);
        if (every && (inject_count_.fetch_add(1, std::memory_order_relaxed) + 1) % every == 0)
            return kInjected;
        return scatter(*arena_, ref, options_.nt_load, job.verify);
    }
    CopyReason reason = gather(*arena_, ref, options_.nt_store, bounce);
    if (reason == kNone && !arena_->rank_done(ref.slot, ref.generation, rank_)) reason = kSlotLost;
    if (reason != kNone) arena_->fail(ref.slot, ref.generation);
    return reason;
}

void CpuCopyPool::finished(const Task& task, CopyReason reason, int64_t begin, int64_t end) {
    const std::shared_ptr<Job>& job = task.job;
    --job->running;
    if (job->first_ns == 0 || begin < job->first_ns) job->first_ns = begin;
    job->last_ns = std::max(job->last_ns, end);
    if (reason == kNone) {
        job->state[task.item] = kDone;
        const int32_t* ids = job->ids(task.item);
        auto copied =
            std::count_if(ids, ids + job->items.blocks, [](int32_t id) { return id >= 0; });
        job->nbytes += uint64_t(copied) * job->group->block_bytes;
    } else {
        job->state[task.item] = kLost;
        job->reason[task.item] = reason;
        // What lies beyond a hole in a prefix is of no use; what lies before it is, and so are the
        // other chunks of a store.
        if (job->kind == kLoad) stop_job(job, task.item, reason);
    }
    maybe_complete(job);
}

}  // namespace kvo
