// Shared arena: one memfd holding [header | slot table | leaf hashes | data, 2 MiB aligned].
//
// Lifetime: the mapping lives as long as the Arena object. C++ users keep a std::shared_ptr<Arena>
// for as long as any of their threads may touch it; Python's Arena.close() only drops Python's
// reference. Thread rules: every method is safe from any thread and any process that mapped it.
#pragma once
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>
#include <thread>
#include <vector>

#include "checksum.h"
#include "errors.h"

namespace kvo {

enum SlotState : uint8_t { kFree = 0, kFilling = 1, kReady = 2, kFailed = 3 };

inline constexpr uint32_t kMaxRanks = 64;

// One cache line per slot. `word` = generation << 2 | state: every transition is one CAS on it.
// `done` and `need` are split in halves of 32 ranks, each carrying the low 32 bits of the
// generation they belong to, so a late rank_done of an old generation can never mark a new one.
struct alignas(64) SlotEntry {
    std::atomic<uint64_t> word;
    std::atomic<uint64_t> done[2];  // generation's low 32 bits << 32 | ranks
    std::atomic<uint64_t> need[2];
    std::atomic<uint32_t>
        waiters;  // hint only: a killed waiter leaves it too high, which costs a syscall
    uint32_t pad_[5];
};
static_assert(sizeof(SlotEntry) == 64);
static_assert(std::atomic<uint64_t>::is_always_lock_free);

struct ArenaHeader;

class Arena {
  public:
    // data_bytes is rounded down to 2 MiB. Throws OsError, std::invalid_argument.
    static std::shared_ptr<Arena> create(uint64_t data_bytes, uint32_t max_slots, uint32_t n_ranks,
                                         bool hugepages);
    // Throws OsError when the path cannot be opened, the inode differs or the header is not ours.
    static std::shared_ptr<Arena> attach(const std::string& path, uint64_t inode);
    ~Arena();
    Arena(const Arena&) = delete;
    Arena& operator=(const Arena&) = delete;

    const std::string& path() const { return path_; }
    uint64_t inode() const { return inode_; }
    uint64_t data_bytes() const { return data_bytes_; }
    uint32_t max_slots() const { return max_slots_; }
    uint32_t n_ranks() const { return n_ranks_; }
    bool hugepages() const { return hugepages_; }
    uint8_t* data() const { return data_; }
    // Leaf hash of the leaf that starts at data offset `offset` (a multiple of kLeafBytes); the
    // hashes of the following leaves follow. No bounds check: see check_range.
    uint64_t* leaf_ptr(uint64_t offset) const { return leaves_ + offset / kLeafBytes; }
    // Throws std::invalid_argument unless [offset, offset+nbytes) is inside the data area and
    // offset is a multiple of kLeafBytes.
    void check_range(uint64_t offset, uint64_t nbytes) const;
    // Throws std::invalid_argument unless slot < max_slots.
    void check_slot(uint32_t slot) const;

    void prefault_start(unsigned threads);
    uint64_t prefaulted_bytes() const { return prefaulted_.load(std::memory_order_relaxed); }

    void set_attached(uint32_t rank);
    uint64_t attached_mask() const;
    uint64_t epoch() const;
    uint64_t bump_epoch();

    // Slot table. `slot` must be < max_slots (not checked here: the bindings and the submit
    // functions check once per call). Everything the filler wrote before rank_done/fill_done is
    // visible to whoever then sees kReady (non-temporal stores need store_fence() first).
    uint64_t begin_fill(uint32_t slot, uint64_t need_mask);
    bool rank_done(uint32_t slot, uint64_t generation, uint32_t rank);
    bool fill_done(uint32_t slot, uint64_t generation);
    bool fail(uint32_t slot, uint64_t generation);
    void set_free(uint32_t slot);
    SlotState state(uint32_t slot) const { return SlotState(word(slot) & 3); }
    uint64_t generation(uint32_t slot) const { return word(slot) >> 2; }
    uint64_t done_mask(uint32_t slot) const;
    uint64_t need_mask(uint32_t slot) const;
    // State of that generation; kFree where the slot has moved on.
    SlotState state_of(uint32_t slot, uint64_t generation) const {
        uint64_t w = word(slot);
        return (w >> 2) == generation ? SlotState(w & 3) : kFree;
    }
    // Blocks until the slot leaves kFilling or its generation changes (kFree). kFilling on timeout.
    SlotState wait_ready(uint32_t slot, uint64_t generation, int64_t timeout_ns) const;

    // Throws CheckError naming the first broken invariant. Safe while others work.
    void check() const;
    // Stops and joins the prefault threads; the destructor does it too.
    void stop_prefault();

  private:
    Arena() = default;
    void map(int fd, uint64_t total, bool hugepages);
    uint64_t word(uint32_t slot) const { return slots_[slot].word.load(std::memory_order_acquire); }
    bool finish(SlotEntry& e, uint64_t from, SlotState to);
    void prefault_range(uint64_t begin, uint64_t end, uint64_t threads);

    std::string path_;
    uint64_t inode_ = 0;
    int fd_ = -1;  // creator only: the name others attach by
    uint8_t* base_ = nullptr;
    uint64_t total_ = 0;
    ArenaHeader* header_ = nullptr;
    SlotEntry* slots_ = nullptr;
    uint64_t* leaves_ = nullptr;
    uint8_t* data_ = nullptr;
    uint64_t data_bytes_ = 0;
    uint32_t max_slots_ = 0;
    uint32_t n_ranks_ = 0;
    bool hugepages_ = false;
    bool collapses_ = false;  // only by asking for each one
    std::vector<std::thread> prefaulters_;
    std::atomic<bool> stop_{false};
    std::atomic<bool> in_use_{false};  // a slot was filled: the prefault gives way
    std::atomic<uint64_t> prefaulted_{0};
};

}  // namespace kvo
