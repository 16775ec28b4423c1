// CPU copies between arena slots and paged KV blocks, on native threads that never take the GIL.
// Semantics: CpuCopyPool in kvoffload/_core.pyi. Every method is safe from any thread.
#pragma once
#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <deque>
#include <list>
#include <memory>
#include <mutex>
#include <thread>
#include <unordered_map>
#include <vector>

#include "arena.h"

namespace kvo {

enum CopyKind : uint8_t { kStore = 0, kLoad = 1 };
enum CopyStatus : uint8_t { kOk = 0, kBad = 1, kCancelled = 2, kExpired = 3 };
// A lost item's reason tells the job's status: kCancel -> kCancelled, kDeadline -> kExpired, else
// kBad.
enum CopyReason : uint8_t {
    kNone = 0,
    kSlotLost = 1,
    kMismatch = 2,
    kDeadline = 3,
    kCancel = 4,
    kInjected = 5
};

struct CopyDone {
    int64_t job;
    int kind, status;
    int64_t failed_item;
    int reason;
    uint64_t nbytes;
    int64_t wait_ns, copy_ns;
};

struct Fragment {
    uint64_t base, stride, nbytes;
    uint64_t at = 0;  // offset in the block's bytes
};

struct Group {
    std::vector<Fragment> fragments;
    uint32_t num_blocks;
    uint64_t shard_bytes;
    uint64_t block_bytes;
};

// What submit_* takes; one entry per item, block_ids items x blocks.
struct CopyItems {
    std::vector<uint32_t> slots;
    std::vector<uint64_t> generations;
    std::vector<uint64_t> offsets;
    std::vector<uint64_t> seeds;
    std::vector<int32_t> block_ids;
    uint32_t blocks = 0;
};

// nt: non-temporal stores into slots (store) respectively into blocks (load). nice: added to the
// threads' nice value, so that background copies give way to the model. cores: thread i may run on
// cores[i % size]; none: where the creator may.
struct CopyOptions {
    bool nt_store = true;
    bool nt_load = true;
    int nice = 0;
    std::vector<std::vector<int>> cores = {};
};

class CpuCopyPool {
  public:
    CpuCopyPool(std::shared_ptr<Arena> arena, uint32_t rank, unsigned threads, CopyOptions options);
    ~CpuCopyPool();
    CpuCopyPool(const CpuCopyPool&) = delete;
    CpuCopyPool& operator=(const CpuCopyPool&) = delete;

    // Throws std::invalid_argument on fragments that overlap or do not fit.
    int add_group(std::vector<Fragment> fragments, uint32_t num_blocks, uint64_t shard_bytes);
    // Both throw std::invalid_argument on anything out of range, before anything is queued.
    void submit_store(int64_t job, int group, CopyItems items);
    void submit_load(int64_t job, int group, CopyItems items, int64_t deadline_ms, bool verify);
    void cancel(int64_t job);
    std::vector<CopyDone> poll();
    bool wait(int64_t job, int64_t timeout_ms);
    size_t pending();
    void inject(uint64_t fail_every) { inject_every_.store(fail_every); }
    void check();
    // Drops what has not started (reported as cancelled), joins the threads. Idempotent.
    void close();

  private:
    struct Job;
    struct Waiting {
        std::shared_ptr<Job> job;
        size_t item;
        int64_t since;
    };
    struct Task {
        std::shared_ptr<Job> job;
        size_t item;
    };

    void submit(std::shared_ptr<Job> job, int group);
    void validate(const Job& job) const;
    void run(unsigned index);
    void idle(std::unique_lock<std::mutex>& lock);
    bool pick(Task* task);
    bool pick_unstarted(std::deque<std::shared_ptr<Job>>& queue, Task* task);
    bool pick_waiting(int64_t now, Task* task);
    void expire(int64_t now);
    bool start(const std::shared_ptr<Job>& job, size_t item, Task* task);
    void wake_next();
    CopyReason execute(const Job& job, size_t item, uint8_t* bounce);
    void finished(const Task& task, CopyReason reason, int64_t begin, int64_t end);
    void lose(Job& job, size_t item, CopyReason reason);
    void stop_job(const std::shared_ptr<Job>& job, size_t after, CopyReason reason);
    void maybe_complete(const std::shared_ptr<Job>& job);

    const std::shared_ptr<Arena> arena_;
    const uint32_t rank_;
    const CopyOptions options_;
    std::atomic<uint64_t> inject_every_{0};
    std::atomic<uint64_t> inject_count_{0};

    std::mutex mu_;
    std::condition_variable work_cv_, done_cv_;
    std::vector<std::shared_ptr<const Group>> groups_;
    std::unordered_map<int64_t, std::shared_ptr<Job>> active_;
    std::deque<std::shared_ptr<Job>> loads_, stores_;  // jobs with items not yet looked at
    std::list<Waiting> waiting_;                       // load items whose slot was still FILLING
    std::vector<CopyDone> done_;
    int64_t next_scan_ = 0;  // waiting_ is not scanned before this time
    unsigned idle_ = 0;      // threads asleep in work_cv_
    unsigned busy_ = 0;      // threads that run an item
    bool poller_ = false;    // a thread sleeps on the first waiting slot
    bool closed_ = false;
    std::vector<std::thread> threads_;
};

}  // namespace kvo
