// The chunk store's index in memory: key -> StoreEntry. Entries lie in slabs and never move; beside
// them are 64 open-addressing tables of 8-byte slots, each the upper half of a slot's tag and the
// number of its entry. A table grows by half when it is three quarters full, apart from the others:
// the longest insert moves 1/64 of all slots. Erasing shifts slots back, so there are no
// tombstones.
//
// A chunk key is a SHA-256 of ours and cannot be chosen from outside. The store's Python surface
// takes any 16 bytes, so keys are hashed with seeds drawn per index; if they all collide
// nevertheless, every operation is linear in their number and nothing worse.
//
// Not thread safe: the owner's lock guards it. No I/O.
#pragma once
#include <algorithm>
#include <array>
#include <cstdint>
#include <cstdlib>
#include <memory>
#include <span>
#include <utility>
#include <vector>

#include "store_format.h"

namespace kvo::store {

struct StoreSegment;

// One chunk; slabs are aligned so that it is a cache line. All but `key` and `used` is the owner's.
struct StoreEntry {
    Key key;
    StoreSegment* seg;
    uint64_t root, seq;
    uint32_t gen, off4k, len, ns, depth;
    uint8_t flags;  // reserved for marks of the segment lifecycle; 0 in a fresh entry
    uint8_t used;   // 1: in the index, 0: free
};
static_assert(sizeof(StoreEntry) == 64);

class KeyIndex {
  public:
    static constexpr size_t kBatch = 32;  // keys whose cache misses overlap

    KeyIndex();                                // random seeds
    KeyIndex(uint64_t seed0, uint64_t seed1);  // tests: collisions on purpose
    KeyIndex(const KeyIndex&) = delete;
    KeyIndex& operator=(const KeyIndex&) = delete;

    size_t size() const { return size_; }
    // Makes room for `n` entries in all, in huge pages where the kernel has some. Throws
    // std::bad_alloc.
    void reserve(size_t n);
    // Null when absent. An entry stays where it is until it is erased.
    StoreEntry* find(const Key& key) const;
    // The entry and whether it is new: then all of it but `key` is zero. Throws std::bad_alloc,
    // std::length_error at 2^32 - 2 entries; the index is as it was then.
    std::pair<StoreEntry*, bool> try_emplace(const Key& key);
    bool erase(const Key& key);  // false: was not there
    // find() of at most kBatch keys, their cache misses overlapping.
    void find_batch(const Key* keys, size_t n, StoreEntry** out) const;
    void prefetch(const Key& key) const;  // the slot a find or try_emplace will start at

    // `fn(i, entry or null)` per key in order, until it returns false.
    template <class Fn>
    void each_of(std::span<const Key> keys, Fn&& fn) const {
        StoreEntry* found[kBatch];
        // Few at first: most cold prompts miss with their first chunk.
        for (size_t at = 0, step = 4; at < keys.size(); at += step, step = kBatch) {
            step = std::min(step, keys.size() - at);
            find_batch(keys.data() + at, step, found);
            for (size_t i = 0; i < step; ++i)
                if (!fn(at + i, found[i])) return;
        }
    }
    // Number of leading keys that are there and for which `ok(entry)` holds.
    template <class Ok>
    size_t longest_prefix(std::span<const Key> keys, Ok&& ok) const {
        size_t n = 0;
        each_of(keys, [&](size_t, StoreEntry* e) { return e && ok(*e) && ++n; });
        return n;
    }
    // All entries, oldest slab first. `fn` must not change the index.
    template <class Fn>
    void each(Fn&& fn) const {
        for (size_t id = 0; id < next_id_; ++id)
            if (StoreEntry& e = entry(uint32_t(id)); e.used) fn(e);
    }

    size_t memory_bytes() const;  // of slabs and tables, used or not
    void check() const;           // throws CheckError naming what is broken

  private:
    static constexpr unsigned kTableBits = 6;
    static constexpr size_t kSlab = 32768;  // entries: 2 MiB
    static constexpr size_t kSlabBytes = kSlab * sizeof(StoreEntry);
    static constexpr uint32_t kNone = UINT32_MAX;

    struct FreeDeleter {
        void operator()(void* p) const { std::free(p); }
    };
    // Slot: tag << 32 | number of the entry + 1; 0 is empty. A tag's place in a table of any size
    // is tag * size / 2^32.
    struct Table {
        std::unique_ptr<uint64_t[], FreeDeleter> slots;
        size_t capacity = 0, used = 0;
    };
    struct Place {
        uint32_t table, tag;
    };

    StoreEntry& entry(uint32_t id) const { return slabs_[id / kSlab][id % kSlab]; }
    Place place_of(const Key& key) const;
    static size_t home(const Table& t, uint64_t slot) { return (slot >> 32) * t.capacity >> 32; }
    // The slot of `key`, or of the empty one where it would go. The table must have one.
    size_t probe(const Table& t, uint32_t tag, const Key& key) const;
    void grow(Table& t, size_t capacity);
    uint32_t take_entry();
    void add_slab(bool huge);

    uint64_t seed0_, seed1_;
    std::array<Table, size_t{1} << kTableBits> tables_;
    std::vector<std::unique_ptr<StoreEntry[], FreeDeleter>> slabs_;
    size_t size_ = 0, next_id_ = 0;  // entries in use; entries ever used
    uint32_t free_ = kNone;          // erased ones, linked through `depth`
};

}  // namespace kvo::store
