// Native test of the key index against std::unordered_map, part of test_store (run_store.sh).
#include <chrono>
#include <cstring>
#include <random>
#include <unordered_map>

#include "../key_index.h"
#include "test_store.h"

using namespace kvo::store;

namespace {

constexpr uint64_t kSeed0 = 0x0123456789ABCDEFull, kSeed1 = 0x2545F4914F6CDD1Dull;

Key key_of(uint64_t lo, uint64_t hi) {
    Key k;
    std::memcpy(k.b, &lo, 8);
    std::memcpy(k.b + 8, &hi, 8);
    return k;
}

using Model = std::unordered_map<Key, uint64_t, KeyHash>;

void same(const KeyIndex& index, const Model& model) {
    index.check();
    MUST(index.size() == model.size());
    size_t seen = 0;
    index.each([&](const StoreEntry& e) {
        auto it = model.find(e.key);
        MUST(it != model.end() && it->second == e.root && index.find(e.key) == &e);
        ++seen;
    });
    MUST(seen == model.size());
}

// Random inserts and erases of `keys`, first mostly growing, then mostly shrinking, twice.
void churn(KeyIndex& index, const std::vector<Key>& keys, size_t steps, unsigned seed) {
    std::mt19937_64 rng(seed);
    Model model;
    for (size_t step = 0; step < steps; ++step) {
        bool growing = step * 4 / steps % 2 == 0;
        const Key& k = keys[rng() % keys.size()];
        if (rng() % 8 < (growing ? 6u : 2u)) {
            auto [e, fresh] = index.try_emplace(k);
            MUST(fresh == !model.count(k) && e->key == k && e->used);
            MUST(!fresh || (!e->seg && !e->root && !e->len && !e->depth && !e->flags));
            e->root = model[k] = rng();
        } else {
            MUST(index.erase(k) == (model.erase(k) == 1));
        }
        if (step % (steps / 16) == 0) same(index, model);
    }
    same(index, model);
    // Batches and prefixes agree with single finds.
    size_t held = 0;
    index.each_of(keys, [&](size_t i, const StoreEntry* e) {
        MUST(e == index.find(keys[i]) && (e != nullptr) == (model.count(keys[i]) == 1));
        held += e != nullptr;
        return true;
    });
    MUST(held == model.size());
    for (size_t at = 0; at < keys.size(); at += 1 + keys.size() / 97) {
        std::span<const Key> chain(keys.data() + at, keys.size() - at);
        size_t want = 0;
        while (want < chain.size() && model.count(chain[want])) ++want;
        MUST(index.longest_prefix(chain, [](auto&) { return true; }) == want);
    }
    for (auto& [k, v] : Model(model)) MUST(index.erase(k));
    MUST(index.size() == 0 && !index.find(keys[0]));
    index.check();
}

std::vector<Key> random_keys(size_t n, unsigned seed) {
    std::mt19937_64 rng(seed);
    std::vector<Key> keys;
    for (size_t i = 0; i < n; ++i) {
        uint64_t lo = rng();
        keys.push_back(key_of(lo, rng()));
    }
    return keys;
}

void prefixes() {
    KeyIndex index;
    auto keys = random_keys(300, 5);
    MUST(index.longest_prefix(keys, [](auto&) { return true; }) == 0);
    for (auto& k : keys) index.try_emplace(k).first->len = 1;
    for (size_t gone : {0, 1, 3, 4, 5, 31, 35, 36, 37, 299}) {
        index.erase(keys[gone]);
        MUST(index.longest_prefix(keys, [](auto&) { return true; }) == gone);
        index.try_emplace(keys[gone]);
        auto has_len = [](const StoreEntry& e) { return e.len == 1; };
        MUST(index.longest_prefix(keys, has_len) == gone);  // there, but not to the caller's liking
        index.find(keys[gone])->len = 1;
    }
    MUST(index.longest_prefix(keys, [](auto&) { return true; }) == keys.size());
    size_t asked = 0;  // no entry is looked at behind the first that does not do
    MUST(index.longest_prefix(keys, [&](auto&) { return ++asked < 10; }) == 9 && asked == 10);
}

// Erased room is used again: the index stays as large as its largest moment.
void bounded() {
    KeyIndex index;
    auto keys = random_keys(200'000, 7);
    for (size_t i = 0; i < 20'000; ++i) index.try_emplace(keys[i]);
    size_t bytes = 0;
    for (size_t i = 20'000; i < keys.size(); ++i) {
        MUST(index.erase(keys[i - 20'000]));
        index.try_emplace(keys[i]);
        if (i == 60'000) bytes = index.memory_bytes();
    }
    MUST(index.size() == 20'000 && index.memory_bytes() <= bytes + bytes / 8);
    index.check();
}

void footprint() {
    constexpr size_t kSlack = (2 << 20) + (64 << 10);  // a slab not full yet, the tables' heads
    for (bool ahead : {false, true}) {
        KeyIndex index;
        auto keys = random_keys(300'000, 9);
        if (ahead) index.reserve(keys.size());
        size_t before = index.memory_bytes();
        for (size_t i = 0; i < keys.size(); ++i) {
            index.try_emplace(keys[i]);
            if (i == 99'999 || i == 149'999 || i == 299'999)
                MUST(ahead || index.memory_bytes() <= 80 * (i + 1) + kSlack);
        }
        MUST(!ahead || (index.memory_bytes() == before && before <= 76 * keys.size() + kSlack));
        for (auto& k : keys) MUST(index.find(k));
    }
}

}  // namespace

void test_key_index() {
    KeyIndex index;
    churn(index, random_keys(3000, 1), 40'000, 2);
    churn(index, random_keys(40, 3), 4000, 4);  // used before: free entries are taken again
    // All in one table, all with one tag: what an attacker who knew the seeds would send.
    KeyIndex same_tag(kSeed0, kSeed1);
    std::vector<Key> hostile;
    for (uint64_t i = 0; i < 500; ++i) hostile.push_back(key_of(kSeed0, i));
    churn(same_tag, hostile, 8000, 6);
    prefixes();
    bounded();
    footprint();
}
