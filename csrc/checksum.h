// Two-level XXH3-64 (see kvoffload/_core.pyi): leaves of kLeafBytes, root over the leaf hashes.
// All functions are thread-safe and use the widest vectors the CPU has.
#pragma once
#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

namespace kvo {

inline constexpr size_t kLeafBytes = 16384;

inline constexpr size_t leaf_count(size_t nbytes) {
    return (nbytes + kLeafBytes - 1) / kLeafBytes;
}

// u64le(key[0:8]) ^ u64le(key[8:16]).
uint64_t seed_of(const uint8_t key[16]);

// XXH3_64(data, n, seed); n is one leaf (or a shorter last one), but any n is allowed.
uint64_t leaf_hash(const void* data, size_t n, uint64_t seed);

// out[i] for every leaf of data; out has leaf_count(n) entries.
void leaf_hashes(const void* data, size_t n, uint64_t seed, uint64_t* out);

// XXH3_64 over the n little-endian leaf hashes.
uint64_t root_of(const uint64_t* leaves, size_t n, uint64_t seed);

// Root of a whole buffer; allocates the leaf hashes.
uint64_t checksum(const void* data, size_t n, uint64_t seed);

// What the running CPU offers of what the core can use, best first.
std::vector<std::string> cpu_features();

// Test hook: "base", "avx2", "avx512". Throws std::invalid_argument where the CPU lacks it.
void set_isa(const std::string& name);
std::string isa();

// memcpy with non-temporal stores; call store_fence() before publishing what was written.
// [dst, dst+n) and [src, src+n) must not overlap; no alignment is required. Falls back to memcpy
// where the architecture has no such stores. ahead > 0: also prefetch [src + ahead, src + ahead +
// n) (it may lie outside of any mapping).
void nt_copy(void* dst, const void* src, size_t n, size_t ahead = 0);
void store_fence();

}  // namespace kvo
