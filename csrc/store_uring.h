// Internals of the io_uring engine: what its ring thread (store_ring.cpp) and its workers
// (store_uring.cpp) share.
//
// One ring thread submits and reaps; a few workers run prepare and finish (checksums, copies,
// opening files). A request's way:
//
//   submit -> new -> [worker: prepare] -> ready -> [ring: transfer] -> done -> [worker: finish]
//
// A few more requests are prepared than the ring moves at once, so that it always has a next one.
// Waking a worker costs more CPU than a step that touches no bytes, so the ring thread takes these
// itself. Checksums and copies, short ones too, and all that may block go to the workers: the disk
// never waits for them. Buffers are registered, files are not: reads of 4 KiB, 64 KiB and 1 MiB at
// depth 16 took the same CPU time with and without, and a registered file lives on after it was
// closed.
#pragma once
#include "store_io.h"

// KVO_NO_URING: the build does not link it (setup.py).
#if __has_include(<liburing.h>) && !defined(KVO_NO_URING)
#define KVO_URING 1

#include <chrono>
#include <condition_variable>
#include <deque>
#include <future>

namespace kvo::store::uring {

using Clock = std::chrono::steady_clock;

constexpr unsigned kDepth = 16;      // transfers under way
constexpr unsigned kWriteDepth = 4;  // of these, writes: a read never waits behind many
constexpr unsigned kAhead = 16;      // requests that are prepared before there is room
// Of one request: reads are small, their chunks are waited for; writes are large, nobody waits.
constexpr uint64_t kMinReadBytes = 256 << 10, kReadBytes = 1 << 20;
constexpr uint64_t kMinWriteBytes = 1 << 20, kWriteBytes = 4 << 20;
constexpr unsigned kEntries = 64;          // of the submission queue: kDepth and the wake-up
constexpr uint64_t kBusyBytes = 64 << 20;  // prepared and not finished: bounds bounce memory

// One request with its state in the engine.
struct Op {
    std::unique_ptr<IoRequest> r;
    std::vector<iovec> iov;  // what is left; from the first transfer on
    size_t at = 0;           // first of iov that is not done
    uint64_t total = 0, done = 0;
    int err = 0;
    unsigned refused = 0;  // times the kernel said EAGAIN
    bool prepared = true;  // by a worker, before the ring took it
    bool direct = false;   // the file was, at the last submission
    bool fixed = false;    // that went through a registered buffer
    Fault fault;
    Clock::time_point due{};  // held back until then
};
using OpPtr = std::unique_ptr<Op>;

struct WeakRegion {
    std::weak_ptr<const void> owner;
    uint8_t* data;
    uint64_t bytes;
};

struct Queues {
    std::mutex mu;
    std::condition_variable work, gone;
    std::deque<OpPtr> new_reads, new_writes, ready_reads, ready_writes, done_reads, done_writes;
    Turns turns;                             // of what is prepared
    unsigned in_io = 0, writes_in_io = 0;    // from prepare to the end of the transfer
    unsigned moving = 0, writes_moving = 0;  // of these, taken by the ring
    unsigned busy = 0;                       // from prepare to the end of finish
    uint64_t busy_bytes = 0;
    unsigned idle = 0;    // workers that wait
    bool waking = false;  // one of them was notified and has not looked yet
    std::vector<WeakRegion> new_regions;
    std::vector<std::weak_ptr<const void>> known_regions;
    bool stopped = false, ring_asleep = false;
    unsigned alive = 0;
    int wake_fd = -1;
    uint64_t wake_count = 0;  // read from it
    BufferPool buffers;
    std::shared_ptr<Faults> faults;
    std::atomic<uint64_t> fixed_bytes{0}, registered_bytes{0}, register_errors{0};

    ~Queues();
    void wake_ring();    // mu held
    void wake_worker();  // mu held
    // The next new one is for the ring (nothing to prepare) and may start.
    bool ring_next(bool write) const {  // mu held
        auto& from = write ? new_writes : new_reads;
        return !from.empty() && from.front()->r->prepare_bytes == 0 && ring_room(write) &&
               (busy < 2 || busy_bytes < kBusyBytes);
    }
    bool ring_room(bool write) const {  // mu held
        return moving < kDepth && (!write || writes_moving < kWriteDepth);
    }
    bool worker_next(bool write) const {  // mu held
        auto& from = write ? new_writes : new_reads;
        return !from.empty() && from.front()->r->prepare_bytes != 0 && may_start(write);
    }
    bool may_start(bool write) const {  // mu held
        return in_io < kDepth + kAhead && (busy < 2 || busy_bytes < kBusyBytes) &&
               (!write || writes_in_io < kWriteDepth + kAhead / 4);
    }
    bool has_work() const {  // mu held
        return !done_reads.empty() || !done_writes.empty() || worker_next(false) ||
               worker_next(true);
    }
};

// 0 when a ring with all we need can be had here; else an errno.
int try_ring();
// Both on an engine thread, no lock held. prepare: what the request's own did, ENOMEM included.
int prepare_op(Op& op);
// Ends the request; perhaps with it the store and the engine.
void finish_op(Queues& q, OpPtr op);
// Opens a ring, tells how that went, and runs it until the engine is stopped.
void ring_thread(std::shared_ptr<Queues> q, std::promise<int> up);

}  // namespace kvo::store::uring

#endif
