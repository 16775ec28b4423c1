// Copy of one item: a rank's shard of one slot, to or from the blocks of a group. No locks.
#pragma once
#include "copy.h"

namespace kvo {

struct ItemRef {
    const Group& group;
    uint32_t slot;
    uint64_t generation;
    uint64_t offset;  // of the shard, in the arena's data
    uint64_t seed;
    const int32_t* ids;  // `blocks` entries
    uint32_t blocks;
};

// Fills in Fragment::at and Group::block_bytes. Throws std::invalid_argument on fragments that
// overlap each other (in any two blocks), wrap the address space or exceed the shard.
void check_fragments(Group& group);

// Blocks -> slot, leaf hashes included; stores are fenced. kSlotLost as soon as the slot is not
// FILLING with that generation. `bounce`: kLeafBytes of scratch, 64-byte aligned.
CopyReason gather(Arena& arena, const ItemRef& item, bool nt, uint8_t* bounce);

// Slot -> blocks with id >= 0, only leaves such a block touches. A leaf that fails verification is
// not copied (kMismatch); kSlotLost when the slot is not READY with that generation before or
// after.
CopyReason scatter(Arena& arena, const ItemRef& item, bool nt, bool verify);

}  // namespace kvo
