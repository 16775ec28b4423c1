// Native tests of arena, checksums and copy pool, meant for the sanitizers (run.sh). Exits non-zero
// on the first failed expectation.
#include <signal.h>
#include <sys/wait.h>
#include <unistd.h>

#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <numeric>
#include <random>
#include <thread>
#include <vector>

#include "../arena.h"
#include "../checksum.h"
#include "../copy.h"

#define EXPECT(x)                                                                 \
    do {                                                                          \
        if (!(x)) {                                                               \
            std::fprintf(stderr, "%s:%d: expected %s\n", __FILE__, __LINE__, #x); \
            std::_Exit(1);                                                        \
        }                                                                         \
    } while (0)

using namespace kvo;

namespace {

constexpr int64_t kSecond = 1'000'000'000;

std::vector<uint8_t> random_bytes(size_t n, unsigned seed) {
    std::mt19937_64 rng(seed);
    std::vector<uint8_t> v(n);
    for (auto& b : v) b = uint8_t(rng());
    return v;
}

std::vector<std::string> isas() {
    std::vector<std::string> out{"base"};
    for (const std::string& f : cpu_features()) {
        if (f == "avx2") out.push_back("avx2");
        if (f == "avx512f") out.push_back("avx512");
    }
    return out;
}

void test_isas_agree() {
    const std::string best = isa();
    auto data = random_bytes(3 * kLeafBytes + 77, 1);
    for (size_t n : {size_t(0), size_t(1), size_t(240), size_t(241), size_t(5000), data.size()}) {
        set_isa("base");
        const uint64_t want = checksum(data.data(), n, 42);
        for (const auto& name : isas()) {
            set_isa(name);
            EXPECT(checksum(data.data(), n, 42) == want);
        }
    }
    set_isa(best);
}

void test_nt_copy_is_memcpy() {
    const std::string best = isa();
    auto src = random_bytes(6000, 2);
    for (const auto& name : isas()) {
        set_isa(name);
        for (size_t to = 0; to < 66; to += 5)
            for (size_t from = 0; from < 66; from += 13)
                for (size_t n : {0, 1, 63, 511, 512, 513, 777, 1024, 4096, 5001}) {
                    std::vector<uint8_t> dst(6000, 0xaa), want(6000, 0xaa);
                    std::memcpy(want.data() + to, src.data() + from, n);
                    nt_copy(dst.data() + to, src.data() + from, n);
                    store_fence();
                    EXPECT(dst == want);
                }
    }
    set_isa(best);
}

// Two ranks fill one slot over and over while late reports of the generation before rain in. Every
// generation must become READY by exactly its own two ranks, with both ranks' bytes visible.
void test_generations_do_not_mix() {
    constexpr uint64_t kRounds = 3000;
    auto a = Arena::create(2u << 20, 1, 64, false);
    std::atomic<uint64_t> current{0};
    std::atomic<uint64_t> stale_accepted{0};
    std::atomic<bool> stop{false};
    auto rank = [&](uint32_t r, uint8_t* bytes) {
        for (uint64_t seen = 0; seen < kRounds;) {
            uint64_t g = current.load(std::memory_order_acquire);
            if (g == seen) {
                std::this_thread::yield();
                continue;
            }
            std::memcpy(bytes, &g, 8);
            EXPECT(a->rank_done(0, g, r));
            seen = g;
        }
    };
    auto late = [&](uint32_t r) {
        while (!stop.load()) {
            uint64_t g = current.load();
            if (g > 1 && a->rank_done(0, g - 1, r)) ++stale_accepted;
            a->fail(0, g > 2 ? g - 2 : 0);
        }
    };
    std::thread t0(rank, 0, a->data()), t1(rank, 63, a->data() + 64), l0(late, 0), l1(late, 63);
    for (uint64_t i = 1; i <= kRounds; ++i) {
        uint64_t g = a->begin_fill(0, uint64_t(1) | uint64_t(1) << 63);
        EXPECT(g == i);
        current.store(g, std::memory_order_release);
        EXPECT(a->wait_ready(0, g, 20 * kSecond) == kReady);
        for (int k : {0, 64}) {
            uint64_t v;
            std::memcpy(&v, a->data() + k, 8);
            EXPECT(v == g);
        }
    }
    stop = true;
    for (auto* t : {&t0, &t1, &l0, &l1}) t->join();
    EXPECT(stale_accepted == 0);
    a->check();
}

struct Kv {
    static constexpr uint64_t kFrag = 5000, kStride = 5056;
    std::vector<uint8_t> k, v;
    uint32_t blocks;
    explicit Kv(uint32_t n)
        : k(random_bytes(n * kStride, 3)), v(random_bytes(n * kStride, 4)), blocks(n) {}
    std::vector<Fragment> fragments() {
        return {{reinterpret_cast<uint64_t>(k.data()), kStride, kFrag},
                {reinterpret_cast<uint64_t>(v.data()), kStride, kFrag}};
    }
};

constexpr uint32_t kItems = 16, kPer = 4;
constexpr uint64_t kShard = 3 * kLeafBytes;  // 4 blocks x 10 000 bytes

CopyItems items(const std::vector<uint64_t>& generations) {
    CopyItems it;
    it.generations = generations;
    it.blocks = kPer;
    for (uint32_t i = 0; i < kItems; ++i) {
        it.slots.push_back(i);
        it.offsets.push_back(i * kShard);
        it.seeds.push_back(i * 77);
    }
    it.block_ids.resize(kItems * kPer);
    std::iota(it.block_ids.begin(), it.block_ids.end(), 0);
    return it;
}

std::vector<uint64_t> begin_all(Arena& a) {
    std::vector<uint64_t> g;
    for (uint32_t i = 0; i < kItems; ++i) g.push_back(a.begin_fill(i, 1));
    return g;
}

// Loads are submitted before the stores that fill their slots, while others poll and check.
void test_pool_streams() {
    auto a = Arena::create(8u << 20, kItems, 1, false);
    Kv from(kItems * kPer), to(kItems * kPer);
    std::fill(to.k.begin(), to.k.end(), 0);
    std::fill(to.v.begin(), to.v.end(), 0);
    CpuCopyPool pool(a, 0, 3, {});
    int src = pool.add_group(from.fragments(), from.blocks, kShard);
    int dst = pool.add_group(to.fragments(), to.blocks, kShard);
    std::atomic<bool> stop{false};
    std::thread checker([&] {
        while (!stop.load()) {
            pool.check();
            a->check();
            std::this_thread::yield();
        }
    });
    for (int round = 0; round < 30; ++round) {
        auto g = begin_all(*a);
        pool.submit_load(2 * round, dst, items(g), 20'000, true);
        pool.submit_store(2 * round + 1, src, items(g));
        EXPECT(pool.wait(2 * round, 20'000) && pool.wait(2 * round + 1, 20'000));
        auto done = pool.poll();
        EXPECT(done.size() == 2);
        for (auto& d : done) EXPECT(d.status == kOk && d.nbytes == kItems * kPer * 2 * Kv::kFrag);
        for (uint32_t b = 0; b < to.blocks; ++b) {
            EXPECT(!std::memcmp(&to.k[b * Kv::kStride], &from.k[b * Kv::kStride], Kv::kFrag));
            EXPECT(!std::memcmp(&to.v[b * Kv::kStride], &from.v[b * Kv::kStride], Kv::kFrag));
        }
    }
    stop = true;
    checker.join();
}

// Cancel, deadline and close against running work: every job is reported once and nobody hangs.
void test_pool_interrupted() {
    for (unsigned round = 0; round < 40; ++round) {
        auto a = Arena::create(8u << 20, kItems, 1, false);
        Kv kv(kItems * kPer);
        CpuCopyPool pool(a, 0, 2, {});
        int g = pool.add_group(kv.fragments(), kv.blocks, kShard);
        auto gens = begin_all(*a);
        pool.submit_load(1, g, items(gens), round % 3 == 0 ? 1 : 20'000, true);
        pool.submit_store(2, g, items(gens));
        std::thread canceller([&] { pool.cancel(round % 2 ? 1 : 2); });
        if (round % 4 == 0) pool.close();
        canceller.join();
        EXPECT(pool.wait(1, 20'000) && pool.wait(2, 20'000));
        EXPECT(pool.poll().size() == 2 && pool.pending() == 0);
        pool.check();
        for (uint32_t i = 0; i < kItems; ++i) EXPECT(a->state_of(i, gens[i]) != kFilling);
    }
}

void test_corruption_never_reaches_blocks() {
    auto a = Arena::create(8u << 20, kItems, 1, false);
    Kv kv(kItems * kPer);
    CpuCopyPool pool(a, 0, 1, {});
    int g = pool.add_group(kv.fragments(), kv.blocks, kShard);
    auto gens = begin_all(*a);
    pool.submit_store(1, g, items(gens));
    EXPECT(pool.wait(1, 20'000));
    a->data()[5 * kShard + 100] ^= 1;
    std::fill(kv.k.begin(), kv.k.end(), 0xee);
    pool.submit_load(2, g, items(gens), 20'000, true);
    EXPECT(pool.wait(2, 20'000));
    auto done = pool.poll();
    EXPECT(done.size() == 2 && done[1].status == kBad && done[1].reason == kMismatch &&
           done[1].failed_item == 5);
    for (uint64_t i = 0; i < Kv::kFrag; ++i) EXPECT(kv.k[5 * kPer * Kv::kStride + i] == 0xee);
}

#if !defined(__SANITIZE_THREAD__)
// A process that is killed while it waits, and one that is killed while others wait for it.
void test_killed_processes() {
    auto a = Arena::create(2u << 20, 2, 1, false);
    uint64_t g = a->begin_fill(0, 1);
    pid_t waiter = fork();
    if (waiter == 0) {
        auto b = Arena::attach(a->path(), a->inode());
        b->set_attached(0);
        b->wait_ready(0, g, 60 * kSecond);
        _exit(0);
    }
    while (a->attached_mask() == 0) usleep(1000);
    usleep(20'000);
    kill(waiter, SIGKILL);
    int status;
    EXPECT(waitpid(waiter, &status, 0) == waiter && WIFSIGNALED(status));
    EXPECT(a->wait_ready(0, g, kSecond / 20) == kFilling);
    pid_t filler = fork();
    if (filler == 0) {
        auto b = Arena::attach(a->path(), a->inode());
        usleep(30'000);
        b->rank_done(0, g, 0);
        raise(SIGKILL);
    }
    EXPECT(a->wait_ready(0, g, 20 * kSecond) == kReady);
    EXPECT(waitpid(filler, &status, 0) == filler);
    a->check();
}
#endif

}  // namespace

int main() {
#define RUN(t)                      \
    do {                            \
        t();                        \
        std::printf("ok %s\n", #t); \
        std::fflush(stdout);        \
    } while (0)
#if !defined(__SANITIZE_THREAD__)
    RUN(test_killed_processes);
#endif
    RUN(test_isas_agree);
    RUN(test_nt_copy_is_memcpy);
    RUN(test_generations_do_not_mix);
    RUN(test_pool_streams);
    RUN(test_pool_interrupted);
    RUN(test_corruption_never_reaches_blocks);
}
