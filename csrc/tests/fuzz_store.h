// Shared by the fuzzer of the chunk store's files and its mutations.
#pragma once
#include <cstdint>
#include <map>
#include <random>
#include <string>
#include <vector>

#include "test_store.h"

using Files = std::map<std::string, store_test::Bytes>;  // path below the store -> content

inline constexpr uint64_t kKeys = 70;  // numbers of the keys that the unharmed store holds: below

extern std::mt19937_64 fuzz_rng;  // seeded by the case: everything random comes from it

inline uint64_t below(uint64_t n) {
    return n ? fuzz_rng() % n : 0;
}
inline bool one_in(uint64_t n) {
    return below(n) == 0;
}
inline bool is_journal(const std::string& n) {
    return n.find("/journal-") != n.npos;
}

// One mutation. True where only records were forged: most of the store must still be served.
bool mutate(Files& files);
