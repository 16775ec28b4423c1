#include "copy.h"

#include <pthread.h>

#include <algorithm>
#include <chrono>
#include <csignal>
#include <stdexcept>
#include <utility>

#include "copy_item.h"
#include "copy_job.h"
#include "futex.h"

namespace kvo {
namespace {

[[noreturn]] void invalid(const std::string& what) {
    throw std::invalid_argument("copy: " + what);
}

}  // namespace

// -- life
// -------------------------------------------------------------------------------------------

CpuCopyPool::CpuCopyPool(std::shared_ptr<Arena> arena, uint32_t rank, unsigned threads,
                         CopyOptions options)
    : arena_(std::move(arena)), rank_(rank), options_(options) {
    if (rank_ >= arena_->n_ranks()) invalid("rank " + std::to_string(rank_));
    if (threads == 0 || threads > 256) invalid("threads must be 1 to 256");
    sigset_t all, old;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &old);  // inherited: signals stay with Python's threads
    try {
        for (unsigned i = 0; i < threads; ++i) threads_.emplace_back([this, i] { run(i); });
    } catch (...) {
        pthread_sigmask(SIG_SETMASK, &old, nullptr);
        close();
        throw;
    }
    pthread_sigmask(SIG_SETMASK, &old, nullptr);
}

CpuCopyPool::~CpuCopyPool() {
    close();
}

void CpuCopyPool::close() {
    std::vector<std::thread> threads;
    {
        std::lock_guard lock(mu_);
        closed_ = true;
        std::vector<std::shared_ptr<Job>> jobs;
        for (auto& [id, job] : active_) jobs.push_back(job);
        for (auto& job : jobs) {
            stop_job(job, 0, kCancel);
            maybe_complete(job);
        }
        threads.swap(threads_);  // a second close() has nothing to join
        work_cv_.notify_all();
    }
    for (std::thread& t : threads) t.join();
}

// -- groups and submission
// --------------------------------------------------------------------------

int CpuCopyPool::add_group(std::vector<Fragment> fragments, uint32_t num_blocks,
                           uint64_t shard_bytes) {
    auto group = std::make_shared<Group>();
    group->num_blocks = num_blocks;
    group->shard_bytes = shard_bytes;
    group->fragments = std::move(fragments);
    if (shard_bytes == 0 || shard_bytes % kLeafBytes || shard_bytes > arena_->data_bytes())
        invalid("shard_bytes " + std::to_string(shard_bytes) + " is not a multiple of " +
                std::to_string(kLeafBytes) + " that fits the arena");
    check_fragments(*group);
    std::lock_guard lock(mu_);
    groups_.push_back(std::move(group));
    return int(groups_.size()) - 1;
}

void CpuCopyPool::validate(const Job& job) const {
    const CopyItems& it = job.items;
    const Group& g = *job.group;
    const size_t n = it.slots.size();
    if (it.generations.size() != n || it.offsets.size() != n || it.seeds.size() != n ||
        it.block_ids.size() != n * it.blocks)
        invalid("slots, generations, offsets, keys and block_ids differ in length");
    if (n && (it.blocks == 0 || it.blocks > g.shard_bytes / g.block_bytes))
        invalid(std::to_string(it.blocks) + " blocks of " + std::to_string(g.block_bytes) +
                " bytes do not make a shard of " + std::to_string(g.shard_bytes));
    for (size_t i = 0; i < n; ++i) {
        arena_->check_slot(it.slots[i]);
        arena_->check_range(it.offsets[i], g.shard_bytes);
    }
    const int32_t least = job.kind == kStore ? 0 : -1;
    for (int32_t id : it.block_ids)
        if (id < least || (id >= 0 && uint32_t(id) >= g.num_blocks))
            invalid("block id " + std::to_string(id) + " of " + std::to_string(g.num_blocks));
}

void CpuCopyPool::submit(std::shared_ptr<Job> job, int group) {
    {
        std::lock_guard lock(mu_);
        if (group < 0 || size_t(group) >= groups_.size()) invalid("group " + std::to_string(group));
        job->group = groups_[size_t(group)];
    }
    validate(*job);
    job->state.assign(job->n(), kUnstarted);
    job->reason.assign(job->n(), kNone);
    std::lock_guard lock(mu_);
    if (closed_) invalid("pool is closed");
    if (!active_.emplace(job->id, job).second)
        invalid("job " + std::to_string(job->id) + " is pending");
    if (job->n()) {
        (job->kind == kLoad ? loads_ : stores_).push_back(job);
        // A thread that takes an item wakes the next one; but the first may have to wait for the
        // submitter's core, which costs a load of 16 MiB 60 of 1100 us on two cores.
        if (job->kind == kLoad && job->n() > 1)
            work_cv_.notify_all();
        else
            work_cv_.notify_one();
    } else {
        maybe_complete(job);
    }
}

void CpuCopyPool::submit_store(int64_t job, int group, CopyItems items) {
    auto j = std::make_shared<Job>();
    j->id = job;
    j->kind = kStore;
    j->items = std::move(items);
    submit(std::move(j), group);
}

void CpuCopyPool::submit_load(int64_t job, int group, CopyItems items, int64_t deadline_ms,
                              bool verify) {
    if (deadline_ms < 0) invalid("deadline_ms " + std::to_string(deadline_ms));
    auto j = std::make_shared<Job>();
    j->id = job;
    j->kind = kLoad;
    j->items = std::move(items);
    j->deadline = now_ns() + std::min<int64_t>(deadline_ms, 86'400'000) * 1'000'000;
    j->verify = verify;
    submit(std::move(j), group);
}

// -- outcomes
// ---------------------------------------------------------------------------------------

void CpuCopyPool::cancel(int64_t job) {
    std::lock_guard lock(mu_);
    auto it = active_.find(job);
    if (it == active_.end()) return;
    std::shared_ptr<Job> j = it->second;  // completing erases the map's
    stop_job(j, 0, kCancel);
    maybe_complete(j);
}

std::vector<CopyDone> CpuCopyPool::poll() {
    std::lock_guard lock(mu_);
    return std::exchange(done_, {});
}

bool CpuCopyPool::wait(int64_t job, int64_t timeout_ms) {
    std::unique_lock lock(mu_);
    auto end = std::chrono::steady_clock::now() +
               std::chrono::milliseconds(std::clamp<int64_t>(timeout_ms, 0, 86'400'000));
    return done_cv_.wait_until(lock, end, [&] { return !active_.contains(job); });
}

size_t CpuCopyPool::pending() {
    std::lock_guard lock(mu_);
    return active_.size();
}

// Like everything below: the caller holds mu_.
void CpuCopyPool::lose(Job& job, size_t item, CopyReason reason) {
    job.state[item] = kLost;
    job.reason[item] = reason;
    // Nobody else will fill this rank's part: let those who wait for the slot know.
    if (job.kind == kStore) arena_->fail(job.items.slots[item], job.items.generations[item]);
}

// Drop every item from `after` on that has not started; the caller then calls maybe_complete.
// Items start in order, so all that are kUnstarted lie behind any item that failed.
void CpuCopyPool::stop_job(const std::shared_ptr<Job>& job, size_t after, CopyReason reason) {
    waiting_.remove_if([&](const Waiting& w) {
        if (w.job != job || w.item < after) return false;
        --job->waiting;
        lose(*job, w.item, reason);
        return true;
    });
    if (job->next == job->n()) return;
    for (size_t i = job->next; i < job->n(); ++i) lose(*job, i, reason);
    job->next = job->n();
    std::erase(job->kind == kLoad ? loads_ : stores_, job);
}

void CpuCopyPool::maybe_complete(const std::shared_ptr<Job>& job) {
    if (job->completed || job->running || job->waiting || job->next < job->n()) return;
    job->completed = true;
    auto lost =
        std::find_if(job->state.begin(), job->state.end(), [](uint8_t s) { return s != kDone; });
    CopyDone d{};
    d.job = job->id;
    d.kind = job->kind;
    d.failed_item = -1;
    if (lost != job->state.end()) {  // else a cancel that came too late to drop anything: ok
        d.failed_item = lost - job->state.begin();
        d.reason = job->reason[size_t(d.failed_item)];
        d.status = d.reason == kCancel ? kCancelled : d.reason == kDeadline ? kExpired : kBad;
    }
    d.nbytes = job->nbytes;
    d.wait_ns = job->wait_ns;
    d.copy_ns = job->last_ns - job->first_ns;
    done_.push_back(d);
    active_.erase(job->id);
    done_cv_.notify_all();
}

// -- invariants
// -------------------------------------------------------------------------------------

void CpuCopyPool::check() {
    std::lock_guard lock(mu_);
    auto bad = [](int64_t id, const char* what) {
        throw CheckError("copy pool: job " + std::to_string(id) + ": " + what);
    };
    std::unordered_map<const Job*, size_t> waiting;
    for (const Waiting& w : waiting_) ++waiting[w.job.get()];
    size_t running = 0;
    for (auto& [id, job] : active_) {
        auto count = [&](ItemState s) {
            return size_t(std::count(job->state.begin(), job->state.end(), s));
        };
        if (job->id != id || job->completed) bad(id, "finished but still active");
        if (count(kRunning) != job->running) bad(id, "running count");
        if (count(kWaitingReady) != job->waiting || waiting[job.get()] != job->waiting)
            bad(id, "waiting count");
        if (count(kUnstarted) != job->n() - job->next) bad(id, "unstarted count");
        if (!job->running && !job->waiting && job->next == job->n())
            bad(id, "nothing left, not reported");
        waiting.erase(job.get());
        running += job->running;
    }
    if (!waiting.empty()) bad(waiting.begin()->first->id, "waits though it is finished");
    if (running > busy_) bad(-1, "more items run than threads are busy");
    for (auto* queue : {&loads_, &stores_})
        for (auto& job : *queue)
            if (job->next >= job->n()) bad(job->id, "queued with nothing to start");
}

}  // namespace kvo
