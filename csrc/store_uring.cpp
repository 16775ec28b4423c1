// The io_uring engine's workers and its surface.
#include "store_uring.h"

#ifdef KVO_URING
#include <sys/eventfd.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <new>
#include <thread>

namespace kvo::store {
namespace uring {

Queues::~Queues() {
    if (wake_fd >= 0) ::close(wake_fd);
}

void Queues::wake_ring() {
    if (!ring_asleep) return;
    ring_asleep = false;
    uint64_t one = 1;
    // Cannot fail: the counter is read long before it is full.
    [[maybe_unused]] ssize_t n = ::write(wake_fd, &one, sizeof one);
}

// One at a time: who wakes up wakes the next if there is still work. Most steps are so short that
// one worker has done several before another is up.
void Queues::wake_worker() {
    if (waking || !idle || !has_work()) return;
    waking = true;
    work.notify_one();
}

namespace {

std::string why_not(int err) {
    if (err == ENOSYS) return "io_uring is not in this kernel";
    if (err == EPERM || err == EACCES)
        return "io_uring is forbidden here (seccomp or kernel.io_uring_disabled)";
    return std::string("io_uring: ") + std::strerror(err);
}

bool same_owner(const std::weak_ptr<const void>& a, const std::shared_ptr<const void>& b) {
    return !a.owner_before(b) && !b.owner_before(a);
}

}  // namespace

int prepare_op(Op& op) {
    try {
        return op.r->prepare(*op.r);
    } catch (const std::bad_alloc&) {
        return ENOMEM;
    }
}

void finish_op(Queues& q, OpPtr op) {
    IoRequest& r = *op->r;
    r.finish(r, op->err, op->done);
    q.buffers.give(std::move(r.bounce));
    {
        std::lock_guard lk(q.mu);
        --q.busy;
        q.busy_bytes -= r.bytes;
        if (q.stopped && !q.busy) q.work.notify_all();
        if (q.ring_next(false) || q.ring_next(true)) q.wake_ring();  // it waited for busy_bytes
    }
    // Destroys the request, perhaps with it the store and this engine.
}

namespace {

// ---- workers

enum class Step { kNone, kPrepare, kFinish };

// Reads first; what keeps the disk busy before what does not. mu held.
Step next_step(Queues& q, OpPtr& op) {
    auto pop = [&](std::deque<OpPtr>& d) {
        op = std::move(d.front());
        d.pop_front();
    };
    bool reads = q.worker_next(false), writes = q.worker_next(true);
    bool write = false;
    if (reads) {
        write = q.turns.write_next(true, writes);
        pop(write ? q.new_writes : q.new_reads);
    } else if (!q.done_reads.empty()) {
        pop(q.done_reads);
        return Step::kFinish;
    } else if (!q.done_writes.empty()) {
        pop(q.done_writes);
        return Step::kFinish;
    } else if (writes) {
        pop(q.new_writes);
        write = true;
    } else {
        return Step::kNone;
    }
    ++q.in_io;
    q.writes_in_io += write;
    ++q.busy;
    q.busy_bytes += op->r->bytes;
    return Step::kPrepare;
}

void prepare(Queues& q, OpPtr op) {
    op->err = prepare_op(*op);
    {
        std::lock_guard lk(q.mu);
        if (!op->err && q.stopped) op->err = ECANCELED;
        if (!op->err) {
            (op->r->write ? q.ready_writes : q.ready_reads).push_back(std::move(op));
            if (q.moving < kDepth) q.wake_ring();
            return;
        }
        --q.in_io;
        q.writes_in_io -= op->r->write;
        if (q.stopped) q.wake_ring();
    }
    finish_op(q, std::move(op));
}

void worker(std::shared_ptr<Queues> q, unsigned i) {
    setup_native_thread(("kvo-io-" + std::to_string(i)).c_str());
    std::unique_lock lk(q->mu);
    for (;;) {
        OpPtr op;
        Step step = Step::kNone;
        while ((step = next_step(*q, op)) == Step::kNone && !(q->stopped && !q->busy)) {
            ++q->idle;
            q->work.wait(lk);
            --q->idle;
            q->waking = false;
        }
        if (step == Step::kNone) break;
        q->wake_worker();
        lk.unlock();
        if (step == Step::kPrepare)
            prepare(*q, std::move(op));
        else
            finish_op(*q, std::move(op));
        lk.lock();
    }
    if (--q->alive == 0) q->gone.notify_all();
}

class UringEngine : public IoEngine {
  public:
    UringEngine(unsigned threads, std::shared_ptr<Faults> faults, int& err)
        : q_(std::make_shared<Queues>()) {
        q_->faults = std::move(faults);
        q_->wake_fd = ::eventfd(0, EFD_CLOEXEC);
        if (q_->wake_fd < 0) {
            err = errno;
            return;
        }
        std::promise<int> up;
        auto opened = up.get_future();
        q_->alive = 1;
        threads_.emplace_back(ring_thread, q_, std::move(up));
        err = opened.get();
        for (unsigned i = 0; i < threads && !err; ++i) {
            std::lock_guard lk(q_->mu);
            ++q_->alive;
            threads_.emplace_back(worker, q_, i);
        }
    }
    ~UringEngine() override { stop(0); }

    void submit(std::unique_ptr<IoRequest> r) override {
        {
            std::lock_guard lk(q_->mu);
            if (!q_->stopped) {
                auto op = std::make_unique<Op>();
                op->r = std::move(r);
                auto& to = op->r->write ? q_->new_writes : q_->new_reads;
                bool write = op->r->write;
                to.push_back(std::move(op));
                q_->ring_next(write) ? q_->wake_ring() : q_->wake_worker();
                return;
            }
        }
        r->finish(*r, ECANCELED, 0);
    }

    bool stop(int timeout_ms) override {
        std::deque<OpPtr> left;
        bool clean;
        {
            std::unique_lock lk(q_->mu);
            q_->stopped = true;
            for (auto* d : {&q_->new_reads, &q_->new_writes}) {
                for (auto& op : *d) left.push_back(std::move(op));
                d->clear();
            }
            for (auto* d : {&q_->ready_reads, &q_->ready_writes}) {  // prepared: a worker finishes
                for (auto& op : *d) {
                    op->err = ECANCELED;
                    --q_->in_io;
                    q_->writes_in_io -= op->r->write;
                    q_->done_reads.push_back(std::move(op));
                }
                d->clear();
            }
            q_->work.notify_all();
            q_->wake_ring();
        }
        for (auto& op : left) op->r->finish(*op->r, ECANCELED, 0);
        {
            std::unique_lock lk(q_->mu);
            clean = q_->gone.wait_for(lk, std::chrono::milliseconds(timeout_ms),
                                      [&] { return q_->alive == 0; });
        }
        for (auto& t : threads_) {
            // The last reference to the store may go away on one of our own threads.
            if (clean && t.get_id() != std::this_thread::get_id())
                t.join();
            else
                t.detach();
        }
        threads_.clear();
        return clean;
    }

    AlignedBuf take_buffer(size_t n) override { return q_->buffers.take(n); }

    void use_region(const IoRegion& r) override {
        std::lock_guard lk(q_->mu);
        auto& known = q_->known_regions;
        for (auto& k : known)
            if (same_owner(k, r.owner)) return;
        std::erase_if(known, [](auto& k) { return k.expired(); });
        known.push_back(r.owner);
        q_->new_regions.push_back({r.owner, r.data, r.bytes});
    }

    const char* name() const override { return "uring"; }
    uint64_t merge_bytes(uint64_t total, bool write) const override {
        uint64_t each = total / (write ? kWriteDepth : kDepth);
        return std::clamp(each, write ? kMinWriteBytes : kMinReadBytes,
                          write ? kWriteBytes : kReadBytes);
    }
    unsigned write_depth() const override { return 2 * kWriteDepth; }
    EngineStats stats() const override {
        return {q_->fixed_bytes, q_->registered_bytes, q_->register_errors};
    }

  private:
    std::shared_ptr<Queues> q_;
    std::vector<std::thread> threads_;
};

}  // namespace

}  // namespace uring

std::string uring_problem() {
    int err = uring::try_ring();
    return err ? uring::why_not(err) : "";
}

std::shared_ptr<IoEngine> make_uring_engine(unsigned threads, std::shared_ptr<Faults> faults,
                                            std::string& why) {
    int err = 0;
    auto engine = std::make_shared<uring::UringEngine>(threads, std::move(faults), err);
    if (!err) return engine;
    engine->stop(1000);
    why = uring::why_not(err);
    return nullptr;
}

}  // namespace kvo::store

#else

namespace kvo::store {

std::string uring_problem() {
    return "this build has no liburing";
}

std::shared_ptr<IoEngine> make_uring_engine(unsigned, std::shared_ptr<Faults>, std::string& why) {
    why = uring_problem();
    return nullptr;
}

}  // namespace kvo::store

#endif
