// The disk's limit for the store benchmark: O_DIRECT through io_uring at a fixed depth, nothing
// else.
#include <liburing.h>
#include <time.h>

#include <cerrno>
#include <cstdint>

namespace {

double now(clockid_t clock) {
    timespec t;
    clock_gettime(clock, &t);
    return double(t.tv_sec) + double(t.tv_nsec) * 1e-9;
}

// With the signature of io_uring_prep_write_fixed.
void prep_read(io_uring_sqe* sqe, int fd, const void* to, unsigned n, __u64 off, int index) {
    io_uring_prep_read_fixed(sqe, fd, const_cast<void*>(to), n, off, index);
}

}  // namespace

// Moves `n` pieces between file offsets and `memory` (offsets from `base`, which is registered),
// `depth` at a time, until all are through; fills `ms` with each one's time. 0 or an errno.
extern "C" int kvo_raw(int fd, int write, unsigned depth, uint64_t n, uint64_t piece,
                       const uint64_t* offsets, const uint64_t* memory, uint8_t* base,
                       uint64_t base_bytes, double* ms, double* seconds, double* cpu_seconds) {
    io_uring ring;
    int err =
        io_uring_queue_init(depth, &ring, IORING_SETUP_SINGLE_ISSUER | IORING_SETUP_DEFER_TASKRUN);
    if (err) return -err;
    iovec all{base, base_bytes};
    err = io_uring_register_buffers(&ring, &all, 1);
    double start = now(CLOCK_MONOTONIC), cpu = now(CLOCK_PROCESS_CPUTIME_ID);
    uint64_t next = 0, done = 0;
    while (!err && done < n) {
        for (; next < n && next - done < depth; ++next) {
            io_uring_sqe* sqe = io_uring_get_sqe(&ring);
            auto* prepare = write ? &io_uring_prep_write_fixed : &prep_read;
            prepare(sqe, fd, base + memory[next], unsigned(piece), offsets[next], 0);
            sqe->user_data = next;
            ms[next] = now(CLOCK_MONOTONIC);
        }
        err = io_uring_submit_and_wait(&ring, 1);
        err = err < 0 && err != -EINTR ? err : 0;
        io_uring_cqe* cqe;
        unsigned head, seen = 0;
        io_uring_for_each_cqe(&ring, head, cqe) {
            ++seen;
            if (cqe->res != int(piece)) err = cqe->res < 0 ? cqe->res : -EIO;
            ms[cqe->user_data] = (now(CLOCK_MONOTONIC) - ms[cqe->user_data]) * 1e3;
        }
        io_uring_cq_advance(&ring, seen);
        done += seen;
    }
    *seconds = now(CLOCK_MONOTONIC) - start;
    *cpu_seconds = now(CLOCK_PROCESS_CPUTIME_ID) - cpu;
    io_uring_queue_exit(&ring);
    return -err;
}
