#include "key_index.h"

#include <sys/mman.h>

#include <cmath>
#include <cstring>
#include <new>
#include <random>
#include <stdexcept>
#include <string>

#include "errors.h"

namespace kvo::store {
namespace {

constexpr size_t kFirstSlots = 8;

// Three quarters full at most: a miss then ends after nine slots on average, in one or two lines.
bool crowded(size_t used, size_t capacity) {
    return used * 4 > capacity * 3;
}

uint64_t random_seed() {
    std::random_device r;
    return uint64_t{r()} << 32 | r();
}

void must(bool ok, const char* what) {
    if (!ok) throw CheckError(std::string("key index: ") + what);
}

}  // namespace

KeyIndex::KeyIndex() : KeyIndex(random_seed(), random_seed()) {}
KeyIndex::KeyIndex(uint64_t seed0, uint64_t seed1) : seed0_(seed0), seed1_(seed1) {}

KeyIndex::Place KeyIndex::place_of(const Key& key) const {
    uint64_t lo, hi;
    std::memcpy(&lo, key.b, 8);
    std::memcpy(&hi, key.b + 8, 8);
    auto m = static_cast<unsigned __int128>(lo ^ seed0_) * (hi ^ seed1_);
    uint64_t h = uint64_t(m) ^ uint64_t(m >> 64);
    return {uint32_t(h >> (64 - kTableBits)), uint32_t(h >> (32 - kTableBits))};
}

size_t KeyIndex::probe(const Table& t, uint32_t tag, const Key& key) const {
    for (size_t at = home(t, uint64_t{tag} << 32);;) {
        uint64_t s = t.slots[at];
        if (!s) return at;
        if (s >> 32 == tag && entry(uint32_t(s) - 1).key == key) return at;
        if (++at == t.capacity) at = 0;
    }
}

StoreEntry* KeyIndex::find(const Key& key) const {
    Place p = place_of(key);
    const Table& t = tables_[p.table];
    if (!t.capacity) return nullptr;
    uint64_t s = t.slots[probe(t, p.tag, key)];
    return s ? &entry(uint32_t(s) - 1) : nullptr;
}

void KeyIndex::prefetch(const Key& key) const {
    Place p = place_of(key);
    const Table& t = tables_[p.table];
    __builtin_prefetch(t.slots.get() + home(t, uint64_t{p.tag} << 32));
}

void KeyIndex::find_batch(const Key* keys, size_t n, StoreEntry** out) const {
    Place places[kBatch];
    for (size_t i = 0; i < n; ++i) {
        places[i] = place_of(keys[i]);
        const Table& t = tables_[places[i].table];
        __builtin_prefetch(t.slots.get() + home(t, uint64_t{places[i].tag} << 32));
    }
    // The first slot with the right tag is nearly always the right one: fetch what it names.
    for (size_t i = 0; i < n; ++i) {
        const Table& t = tables_[places[i].table];
        out[i] = nullptr;
        if (!t.capacity) continue;
        for (size_t at = home(t, uint64_t{places[i].tag} << 32);;) {
            uint64_t s = t.slots[at];
            if (!s) break;
            if (s >> 32 == places[i].tag) {
                out[i] = &entry(uint32_t(s) - 1);
                __builtin_prefetch(out[i]);
                break;
            }
            if (++at == t.capacity) at = 0;
        }
    }
    for (size_t i = 0; i < n; ++i)
        if (out[i] && !(out[i]->key == keys[i])) out[i] = find(keys[i]);
}

std::pair<StoreEntry*, bool> KeyIndex::try_emplace(const Key& key) {
    Place p = place_of(key);
    Table& t = tables_[p.table];
    size_t at = 0;
    if (t.capacity) {
        at = probe(t, p.tag, key);
        if (uint64_t s = t.slots[at]) return {&entry(uint32_t(s) - 1), false};
    }
    if (crowded(t.used + 1, t.capacity)) {
        grow(t, std::max(kFirstSlots, t.capacity + t.capacity / 2));
        at = probe(t, p.tag, key);
    }
    uint32_t id = take_entry();
    StoreEntry& e = entry(id);
    e = StoreEntry{};
    e.key = key;
    e.used = 1;
    t.slots[at] = uint64_t{p.tag} << 32 | (id + 1);
    ++t.used;
    ++size_;
    return {&e, true};
}

bool KeyIndex::erase(const Key& key) {
    Place p = place_of(key);
    Table& t = tables_[p.table];
    if (!t.capacity) return false;
    size_t hole = probe(t, p.tag, key);
    if (!t.slots[hole]) return false;
    uint32_t id = uint32_t(t.slots[hole]) - 1;
    // What follows moves back into the hole unless that is before its home.
    for (size_t at = hole;;) {
        if (++at == t.capacity) at = 0;
        uint64_t s = t.slots[at];
        if (!s) break;
        size_t h = home(t, s);
        bool stays = hole < at ? hole < h && h <= at : hole < h || h <= at;
        if (stays) continue;
        t.slots[hole] = s;
        hole = at;
    }
    t.slots[hole] = 0;
    --t.used;
    --size_;
    StoreEntry& e = entry(id);
    e.used = 0;
    e.depth = free_;
    free_ = id;
    return true;
}

void KeyIndex::grow(Table& t, size_t capacity) {
    Table bigger;
    bigger.slots.reset(static_cast<uint64_t*>(std::calloc(capacity, sizeof(uint64_t))));
    if (!bigger.slots) throw std::bad_alloc();
    bigger.capacity = capacity;
    bigger.used = t.used;
    for (size_t i = 0; i < t.capacity; ++i) {
        if (!t.slots[i]) continue;
        size_t at = home(bigger, t.slots[i]);
        while (bigger.slots[at])
            if (++at == capacity) at = 0;
        bigger.slots[at] = t.slots[i];
    }
    t = std::move(bigger);
}

void KeyIndex::reserve(size_t n) {
    // Random lookups in small pages are a quarter slower: address translation. Only here is time
    // for huge ones, since the kernel may have to make them first.
    while (slabs_.size() * kSlab < n) add_slab(n - slabs_.size() * kSlab >= kSlab);
    // Keys fall on tables like dice: five standard deviations more than an even share.
    size_t share = n / tables_.size();
    size_t luck = 5 * size_t(std::sqrt(double(share)));
    size_t capacity = (share + luck + kFirstSlots) * 4 / 3 + 1;
    for (Table& t : tables_)
        if (t.capacity < capacity) grow(t, capacity);
}

void KeyIndex::add_slab(bool huge) {
    std::unique_ptr<StoreEntry[], FreeDeleter> slab(
        static_cast<StoreEntry*>(std::aligned_alloc(kSlabBytes, kSlabBytes)));
    if (!slab) throw std::bad_alloc();
    if (huge) ::madvise(slab.get(), kSlabBytes, MADV_HUGEPAGE);  // else small pages do
    slabs_.push_back(std::move(slab));
}

uint32_t KeyIndex::take_entry() {
    if (free_ != kNone) {
        uint32_t id = free_;
        free_ = entry(id).depth;
        return id;
    }
    if (next_id_ >= kNone - 1) throw std::length_error("key index is full");
    if (next_id_ == slabs_.size() * kSlab) add_slab(false);
    return uint32_t(next_id_++);
}

size_t KeyIndex::memory_bytes() const {
    size_t out = sizeof *this + slabs_.capacity() * sizeof(slabs_[0]);
    out += slabs_.size() * kSlabBytes;
    for (const Table& t : tables_) out += t.capacity * sizeof(uint64_t);
    return out;
}

void KeyIndex::check() const {
    size_t used = 0, entries = 0, freed = 0;
    std::vector<bool> named(next_id_);
    for (size_t n = 0; n < tables_.size(); ++n) {
        const Table& t = tables_[n];
        size_t here = 0;
        for (size_t i = 0; i < t.capacity; ++i) {
            uint64_t s = t.slots[i];
            if (!s) continue;
            ++here;
            uint32_t id = uint32_t(s) - 1;
            must(id < next_id_ && entry(id).used, "a slot names a free entry");
            must(!named[id], "two slots name one entry");
            named[id] = true;
            Place p = place_of(entry(id).key);
            must(p.table == n && p.tag == s >> 32, "a slot's tag is not its key's");
            must(probe(t, p.tag, entry(id).key) == i, "an entry cannot be found");
        }
        must(here == t.used, "a table's count");
        must(!t.capacity || !crowded(t.used, t.capacity), "a table is overfull");
        used += here;
    }
    each([&](StoreEntry&) { ++entries; });
    for (uint32_t id = free_; id != kNone; id = entry(id).depth) {
        must(id < next_id_ && !entry(id).used && !named[id], "the list of free entries");
        named[id] = true;
        ++freed;
    }
    must(used == size_ && entries == size_ && entries + freed == next_id_, "sizes differ");
}

}  // namespace kvo::store
