// State of one job of the CPU copy pool. Internal to copy*.cpp; guarded by the pool's mutex, except
// what submit() sets once and running items read: group, items, verify.
#pragma once
#include "copy.h"

namespace kvo {

enum ItemState : uint8_t { kUnstarted, kWaitingReady, kRunning, kDone, kLost };

struct CpuCopyPool::Job {
    int64_t id;
    CopyKind kind;
    std::shared_ptr<const Group> group;
    CopyItems items;
    int64_t deadline = INT64_MAX;  // CLOCK_MONOTONIC ns
    bool verify = true;

    std::vector<uint8_t> state;   // ItemState
    std::vector<uint8_t> reason;  // CopyReason of a lost item
    size_t next = 0;              // items below it left kUnstarted
    size_t running = 0;
    size_t waiting = 0;
    bool completed = false;
    uint64_t nbytes = 0;
    int64_t wait_ns = 0;
    int64_t first_ns = 0, last_ns = 0;

    size_t n() const { return items.slots.size(); }
    const int32_t* ids(size_t item) const { return items.block_ids.data() + item * items.blocks; }
};

}  // namespace kvo
