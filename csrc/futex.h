// Cross-process futex on the low half of a 64-bit word (both supported architectures are little
// endian). Never the PRIVATE kind: waiter and waker may be different processes.
#pragma once
#include <linux/futex.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#include <atomic>
#include <climits>
#include <cstdint>

namespace kvo {

inline uint32_t* futex_addr(const std::atomic<uint64_t>& word) {
    return reinterpret_cast<uint32_t*>(const_cast<std::atomic<uint64_t>*>(&word));
}

// Returns after a wake, a change of the word, a signal or `ns`, whichever comes first.
inline void futex_wait(const std::atomic<uint64_t>& word, uint64_t expected, int64_t ns) {
    timespec ts{ns / 1000000000, ns % 1000000000};
    ::syscall(SYS_futex, futex_addr(word), FUTEX_WAIT, uint32_t(expected), &ts, nullptr, 0);
}

inline void futex_wake_all(const std::atomic<uint64_t>& word) {
    ::syscall(SYS_futex, futex_addr(word), FUTEX_WAKE, INT_MAX, nullptr, nullptr, 0);
}

inline int64_t now_ns() {
    timespec ts;
    ::clock_gettime(CLOCK_MONOTONIC, &ts);
    return int64_t(ts.tv_sec) * 1000000000 + ts.tv_nsec;
}

}  // namespace kvo
