// The ring thread of the io_uring engine.
#include "store_regions.h"

#ifdef KVO_URING
#include <liburing.h>

#include <algorithm>
#include <cerrno>
#include <thread>

namespace kvo::store::uring {
namespace {

constexpr int kReadvFixed = 60, kWritevFixed = 61;  // kernel 6.15; not in every liburing
constexpr unsigned kRefusals = 1000;                // EAGAINs before it is an error
constexpr auto kRetry = std::chrono::milliseconds(1);

// `vectored`: several pieces of one registered buffer may go in one request.
int supported(io_uring& ring, bool& vectored) {
    io_uring_probe* probe = io_uring_get_probe_ring(&ring);
    if (!probe) return ENOSYS;
    bool all = true;
    for (int op : {IORING_OP_NOP, IORING_OP_READ, IORING_OP_WRITE, IORING_OP_READV,
                   IORING_OP_WRITEV, IORING_OP_READ_FIXED, IORING_OP_WRITE_FIXED})
        all &= io_uring_opcode_supported(probe, op) != 0;
    vectored = true;
    for (int op : {kReadvFixed, kWritevFixed})
        vectored &= io_uring_opcode_supported(probe, op) != 0;
    io_uring_free_probe(probe);
    return all ? 0 : ENOSYS;
}

int try_nop(io_uring& ring) {
    io_uring_prep_nop(io_uring_get_sqe(&ring));
    io_uring_cqe* cqe = nullptr;
    int n = io_uring_submit_and_wait(&ring, 1);
    if (n >= 0) n = io_uring_peek_cqe(&ring, &cqe);
    if (n < 0) return -n;
    int res = cqe->res;
    io_uring_cqe_seen(&ring, cqe);
    return res < 0 ? -res : 0;
}

// A ring for the calling thread only. 0 or an errno.
int open_ring(io_uring& ring, bool& vectored) {
    int err = io_uring_queue_init(kEntries, &ring,
                                  IORING_SETUP_SINGLE_ISSUER | IORING_SETUP_DEFER_TASKRUN);
    if (err == -EINVAL) err = io_uring_queue_init(kEntries, &ring, 0);
    if (err) return -err;
    if (!(ring.features & IORING_FEAT_EXT_ARG))  // waits with a timeout: 5.11
        err = ENOSYS;
    else if (!(err = supported(ring, vectored)))
        err = try_nop(ring);
    if (err) io_uring_queue_exit(&ring);
    return err;
}

class Ring {
  public:
    explicit Ring(Queues& q) : q_(q) {}

    int open() {
        int err = open_ring(ring_, vectored_);
        if (!err) regions_.open(ring_, q_);
        return err;
    }

    void run() {
        for (;;) {
            handed_over_ = false;
            if (!take()) break;
            release_held();
            if (handed_over_) continue;  // ended without a transfer: room for others
            arm_wake();
            wait();
            reap();
            hand_over();
        }
        io_uring_queue_exit(&ring_);
    }

  private:
    // Starts what is ready; false: stopped, and nothing is under way.
    bool take() {
        std::vector<OpPtr> got;
        {
            std::lock_guard lk(q_.mu);
            for (;;) {
                bool reads = next(false), writes = next(true);
                if (!reads && !writes) break;
                got.push_back(pop(turns_.write_next(reads, writes)));
            }
            q_.wake_worker();  // what follows may be for a worker
            for (auto& r : q_.new_regions) regions_.add(r);
            q_.new_regions.clear();
            q_.ring_asleep = true;
            if (q_.stopped && !q_.in_io) return false;
        }
        regions_.drop_dead();
        for (auto& op : got) begin(std::move(op));
        hand_over();  // what failed at once
        return true;
    }

    bool next(bool write) const {  // q_.mu held
        auto& ready = write ? q_.ready_writes : q_.ready_reads;
        return (!ready.empty() && q_.ring_room(write)) || q_.ring_next(write);
    }

    OpPtr pop(bool write) {  // q_.mu held
        auto* from = write ? &q_.ready_writes : &q_.ready_reads;
        bool fresh = from->empty();
        if (fresh) from = write ? &q_.new_writes : &q_.new_reads;
        OpPtr op = std::move(from->front());
        from->pop_front();
        op->prepared = !fresh;
        ++q_.moving;
        q_.writes_moving += write;
        if (fresh) {
            ++q_.in_io;
            q_.writes_in_io += write;
            ++q_.busy;
            q_.busy_bytes += op->r->bytes;
        }
        return op;
    }

    void begin(OpPtr op) {
        if (!op->prepared && (op->err = prepare_op(*op))) return complete(std::move(op));
        op->iov = op->r->iov;
        merge(op->iov);
        for (auto& v : op->iov) op->total += v.iov_len;
        if (op->r->write)
            op->err = write_fault(*q_.faults);
        else
            op->fault = read_fault(*q_.faults);
        if (op->fault.slow_ms)
            op->due = Clock::now() + std::chrono::milliseconds(op->fault.slow_ms);
        if (op->err || !op->total)
            complete(std::move(op));
        else if (op->fault.slow_ms || op->fault.hang)
            held_.push_back(std::move(op));
        else
            start(std::move(op));
    }

    void start(OpPtr op) {
        if (op->fault.err) {
            op->err = op->fault.err;
            return complete(std::move(op));
        }
        transfer(std::move(op));
    }

    // Neighbours in memory become one: fewer pieces, and one piece can be a registered buffer.
    static void merge(std::vector<iovec>& v) {
        size_t n = 0;
        for (size_t i = 0; i < v.size(); ++i) {
            if (!v[i].iov_len) continue;
            if (n && static_cast<uint8_t*>(v[n - 1].iov_base) + v[n - 1].iov_len == v[i].iov_base)
                v[n - 1].iov_len += v[i].iov_len;
            else
                v[n++] = v[i];
        }
        v.resize(n);
    }

    void transfer(OpPtr op) {
        io_uring_sqe* sqe = io_uring_get_sqe(&ring_);
        if (!sqe) return hold(std::move(op));  // the kernel took fewer than we gave it
        iovec* v = &op->iov[op->at];
        size_t n = std::min<size_t>(op->iov.size() - op->at, 512);
        uint64_t off = op->r->offset + op->done;
        int fd = op->r->file->fd(), index = -1;
        op->direct = op->r->file->direct();
        if (n > 1) {
            index = vectored_ ? regions_.find(v, n) : -1;
            if (op->r->write)
                io_uring_prep_writev(sqe, fd, v, unsigned(n), off);
            else
                io_uring_prep_readv(sqe, fd, v, unsigned(n), off);
            if (index >= 0) {
                sqe->opcode = op->r->write ? kWritevFixed : kReadvFixed;
                sqe->buf_index = uint16_t(index);
            }
        } else {
            iovec piece{v->iov_base, std::min<size_t>(v->iov_len, kPiece)};
            auto len = unsigned(piece.iov_len);
            index = regions_.find(&piece, 1);
            if (op->r->write)
                index < 0 ? io_uring_prep_write(sqe, fd, v->iov_base, len, off)
                          : io_uring_prep_write_fixed(sqe, fd, v->iov_base, len, off, index);
            else
                index < 0 ? io_uring_prep_read(sqe, fd, v->iov_base, len, off)
                          : io_uring_prep_read_fixed(sqe, fd, v->iov_base, len, off, index);
        }
        op->fixed = index >= 0;
        io_uring_sqe_set_data(sqe, op.release());
    }

    // Tried again a little later.
    void hold(OpPtr op) {
        op->due = Clock::now() + kRetry;
        held_.push_back(std::move(op));
    }

    void release_held() {
        auto now = Clock::now();
        bool hung = q_.faults->hang_read.load() > 0;
        for (size_t i = 0; i < held_.size();) {
            if ((held_[i]->fault.hang && hung) || held_[i]->due > now) {
                ++i;
                continue;
            }
            OpPtr op = std::move(held_[i]);
            held_[i] = std::move(held_.back());
            held_.pop_back();
            start(std::move(op));
        }
        hand_over();
    }

    void arm_wake() {
        if (wake_armed_) return;
        io_uring_sqe* sqe = io_uring_get_sqe(&ring_);
        if (!sqe) return;  // full: wait() then comes back soon
        io_uring_prep_read(sqe, q_.wake_fd, &q_.wake_count, sizeof q_.wake_count, 0);
        io_uring_sqe_set_data(sqe, nullptr);
        wake_armed_ = true;
    }

    void wait() {
        int n;
        if (held_.empty() && wake_armed_) {
            n = io_uring_submit_and_wait(&ring_, 1);
        } else {
            __kernel_timespec ts{0, std::chrono::nanoseconds(kRetry).count()};
            io_uring_cqe* cqe = nullptr;
            n = io_uring_submit_and_wait_timeout(&ring_, &cqe, 1, &ts, nullptr);
        }
        // EAGAIN, EBUSY, ENOMEM: what is in the queue stays there and is given again. Anything else
        // should not be; a pause keeps it from becoming a busy loop.
        if (n < 0 && n != -EINTR && n != -ETIME) std::this_thread::sleep_for(kRetry);
    }

    void reap() {
        io_uring_cqe* cqe = nullptr;
        unsigned head, n = 0;
        std::vector<std::pair<Op*, int>> got;
        io_uring_for_each_cqe(&ring_, head, cqe) {
            ++n;
            got.emplace_back(static_cast<Op*>(io_uring_cqe_get_data(cqe)), cqe->res);
        }
        io_uring_cq_advance(&ring_, n);
        for (auto& [op, res] : got) {
            if (op)
                arrived(OpPtr(op), res);
            else
                wake_armed_ = false;
        }
    }

    void arrived(OpPtr op, int res) {
        if (res == -EINTR) return transfer(std::move(op));
        if (res == -EAGAIN && ++op->refused < kRefusals) return hold(std::move(op));
        // O_DIRECT refused, at the first transfer or where its end is not aligned.
        if (res == -EINVAL && op->direct && op->r->file->drop_direct())
            return transfer(std::move(op));
        if (res < 0) {
            op->err = -res;
            return complete(std::move(op));
        }
        if (op->fixed) q_.fixed_bytes += unsigned(res);
        op->done += unsigned(res);
        for (size_t left = unsigned(res); left;) {
            iovec& v = op->iov[op->at];
            size_t step = std::min(left, v.iov_len);
            v.iov_base = static_cast<uint8_t*>(v.iov_base) + step;
            v.iov_len -= step;
            left -= step;
            if (!v.iov_len) ++op->at;
        }
        if (res && op->done < op->total) return transfer(std::move(op));  // short: go on
        complete(std::move(op));
    }

    void complete(OpPtr op) {
        if (op->r->write && !op->err && op->done < op->total) op->err = EIO;
        if (op->fault.halve) op->done /= 2;
        if (op->fault.flip && !op->err) flip_bits(op->r->iov.data(), op->r->iov.size());
        completed_.push_back(std::move(op));
    }

    void hand_over() {
        if (completed_.empty()) return;
        std::vector<OpPtr> light;
        {
            std::lock_guard lk(q_.mu);
            q_.ring_asleep = false;  // take() comes next
            for (auto& op : completed_) {
                bool write = op->r->write;
                --q_.in_io;
                --q_.moving;
                q_.writes_moving -= write;
                q_.writes_in_io -= write;
                if (op->r->finish_bytes == 0)
                    light.push_back(std::move(op));
                else
                    (write ? q_.done_writes : q_.done_reads).push_back(std::move(op));
            }
            completed_.clear();
            handed_over_ = true;
            q_.wake_worker();
        }
        for (auto& op : light) finish_op(q_, std::move(op));
    }

    Queues& q_;
    io_uring ring_{};
    Regions regions_;
    std::vector<OpPtr> held_, completed_;
    bool wake_armed_ = false, vectored_ = false, handed_over_ = false;
    Turns turns_;
};

}  // namespace

int try_ring() {
    io_uring ring{};
    bool vectored = false;
    int err = open_ring(ring, vectored);
    if (!err) io_uring_queue_exit(&ring);
    return err;
}

void ring_thread(std::shared_ptr<Queues> q, std::promise<int> up) {
    setup_native_thread("kvo-ring");
    Ring ring(*q);
    int err = ring.open();
    up.set_value(err);
    if (!err) ring.run();
    std::lock_guard lk(q->mu);
    if (--q->alive == 0) q->gone.notify_all();
}

}  // namespace kvo::store::uring

#endif
