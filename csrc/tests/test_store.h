// Shared by the chunk store's native tests and its fuzzer.
#pragma once
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <string>
#include <vector>

#include "../store.h"
#include "../store_format.h"

namespace store_test {

inline std::string failing_in;  // printed before a failed expectation: the case it is about

#define MUST(cond)                                                                        \
    do {                                                                                  \
        if (!(cond)) {                                                                    \
            std::fprintf(stderr, "%s%s:%d: failed: %s\n", store_test::failing_in.c_str(), \
                         __FILE__, __LINE__, #cond);                                      \
            std::exit(1);                                                                 \
        }                                                                                 \
    } while (0)

using Bytes = std::vector<uint8_t>;

inline kvo::store::Key key_of(uint64_t i) {
    kvo::store::Key k;
    uint64_t a = i * 0x9E3779B97F4A7C15ull, b = ~i * 0xC2B2AE3D27D4EB4Full;
    std::memcpy(k.b, &a, 8);
    std::memcpy(k.b + 8, &b, 8);
    return k;
}

// 1 to `most` bytes that are a function of the key: any wrong byte shows.
inline Bytes payload_of(uint64_t i, uint64_t most) {
    std::mt19937_64 r(i + 1);
    Bytes v(1 + r() % most);
    for (auto& b : v) b = uint8_t(r());
    return v;
}

inline kvo::store::StoreOptions options(const std::string& path, uint64_t max_bytes,
                                        uint64_t segment_bytes, unsigned threads) {
    kvo::store::StoreOptions o;
    o.path = path;
    o.max_bytes = max_bytes;
    o.segment_bytes = segment_bytes;
    o.threads = threads;
    return o;
}

// The results of a job, which must end.
inline Bytes finish(kvo::store::SegmentStore& s, int64_t job) {
    MUST(s.wait(job, 20000));
    for (auto& d : s.poll())
        if (d.job == job) return d.results;
    MUST(!"job not polled");
    return {};
}

// Puts the payloads of the keys from..to-1 and waits for them.
inline Bytes put(kvo::store::SegmentStore& s, uint64_t from, uint64_t to, uint64_t most) {
    std::vector<Bytes> data;
    std::vector<kvo::store::StoreItem> items;
    for (uint64_t i = from; i < to; ++i) {
        data.push_back(payload_of(i, most));
        items.push_back({key_of(i), data.back().data(), data.back().size()});
    }
    s.put(1, nullptr, items, 7);
    return finish(s, 1);
}

}  // namespace store_test

void test_key_index();  // test_key_index.cpp

// test_store_engine.cpp: `kind` is "threads" or "uring", `dir` an existing directory.
void test_engine(const std::string& kind, const std::string& dir);

// test_store_forged.cpp: below `dir`.
void test_forged(const std::string& dir);

// test_store_parts.cpp: below `dir`.
void test_parts(const std::string& dir);
