#include "checksum.h"

#include <algorithm>
#include <atomic>
#include <bit>
#include <cstring>
#include <stdexcept>

#if defined(__x86_64__)
#include <emmintrin.h>
#endif

#include "isa.h"

namespace kvo {
namespace {

static_assert(std::endian::native == std::endian::little, "leaf hashes are hashed as stored");

bool supported(const std::string& name) {
    if (name == "base") return true;
#if defined(__x86_64__)
    // GCC and clang also check that the OS saves the registers.
    __builtin_cpu_init();
    if (name == "avx2") return __builtin_cpu_supports("avx2");
    if (name == "avx512") return __builtin_cpu_supports("avx512f");
#endif
    return false;
}

const IsaKernels* find(const std::string& name) {
    if (!supported(name)) return nullptr;
#if defined(__x86_64__)
    if (name == "avx512") return &kIsaAvx512;
    if (name == "avx2") return &kIsaAvx2;
#endif
    return &kIsaBase;
}

const IsaKernels* best() {
    for (const char* name : {"avx512", "avx2"})
        if (const IsaKernels* k = find(name)) return k;
    return &kIsaBase;
}

std::atomic<const IsaKernels*>& active() {
    static std::atomic<const IsaKernels*> k{best()};
    return k;
}

inline const IsaKernels& isa_now() {
    return *active().load(std::memory_order_relaxed);
}

}  // namespace

uint64_t seed_of(const uint8_t key[16]) {
    uint64_t lo, hi;
    std::memcpy(&lo, key, 8);
    std::memcpy(&hi, key + 8, 8);
    return lo ^ hi;
}

uint64_t leaf_hash(const void* data, size_t n, uint64_t seed) {
    return isa_now().hash(data, n, seed);
}

void leaf_hashes(const void* data, size_t n, uint64_t seed, uint64_t* out) {
    const IsaKernels& k = isa_now();
    const uint8_t* p = static_cast<const uint8_t*>(data);
    for (size_t i = 0, off = 0; off < n; ++i, off += kLeafBytes)
        out[i] = k.hash(p + off, std::min(kLeafBytes, n - off), seed);
}

uint64_t root_of(const uint64_t* leaves, size_t n, uint64_t seed) {
    return isa_now().hash(leaves, n * sizeof(uint64_t), seed);
}

uint64_t checksum(const void* data, size_t n, uint64_t seed) {
    std::vector<uint64_t> leaves(leaf_count(n));
    leaf_hashes(data, n, seed, leaves.data());
    return root_of(leaves.data(), leaves.size(), seed);
}

std::vector<std::string> cpu_features() {
    std::vector<std::string> out;
    if (supported("avx512")) out.push_back("avx512f");
    if (supported("avx2")) out.push_back("avx2");
#if defined(__x86_64__)
    out.push_back("sse2");
#elif defined(__aarch64__)
    out.push_back("neon");
#endif
    return out;
}

void set_isa(const std::string& name) {
    const IsaKernels* k = find(name);
    if (!k) throw std::invalid_argument("isa " + name + ": not offered by this CPU");
    active().store(k, std::memory_order_relaxed);
}

std::string isa() {
    return isa_now().name;
}

void nt_copy(void* dst, const void* src, size_t n, size_t ahead) {
    isa_now().nt_copy(dst, src, n, ahead);
}

void store_fence() {
#if defined(__x86_64__)
    _mm_sfence();
#else
    std::atomic_thread_fence(std::memory_order_release);
#endif
}

}  // namespace kvo
