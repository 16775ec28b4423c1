#include "copy_item.h"

#include <algorithm>
#include <cstring>
#include <stdexcept>

namespace kvo {
namespace {

[[noreturn]] void invalid(size_t fragment, const char* what) {
    throw std::invalid_argument("copy: fragment " + std::to_string(fragment) + " " + what);
}

// Does some block of `a` share bytes with some block of `b`?
bool overlap(const Fragment& a, const Fragment& b, uint64_t blocks) {
    const uint64_t a_end = a.base + (blocks - 1) * a.stride + a.nbytes;
    const uint64_t b_end = b.base + (blocks - 1) * b.stride + b.nbytes;
    if (a_end <= b.base || b_end <= a.base) return false;
    if (blocks == 1) return true;  // and the strides may be 0
    // Interleaved extents: for each block of a, the two blocks of b that can reach it. With equal
    // strides the picture repeats, except that the first and last blocks of b have no neighbour.
    for (uint64_t i = 0; i < blocks; ++i) {
        const uint64_t lo = a.base + i * a.stride, hi = lo + a.nbytes;
        if (hi <= b.base || lo >= b_end) continue;
        // The last block of b that starts at or before lo.
        const uint64_t first = lo <= b.base ? 0 : (lo - b.base) / b.stride;
        for (uint64_t k = first; k < std::min(blocks, first + 2); ++k) {
            const uint64_t at = b.base + k * b.stride;
            if (at < hi && lo < at + b.nbytes) return true;
        }
        if (a.stride == b.stride && first > 0 && first + 2 < blocks)
            break;  // a full period was clean
    }
    return false;
}

// Calls fn(address, offset in the shard, bytes) for the pieces of wanted blocks inside [lo, hi).
template <class Fn>
void for_pieces(const ItemRef& item, uint64_t lo, uint64_t hi, Fn&& fn) {
    const Group& g = item.group;
    for (uint64_t j = lo / g.block_bytes; j < item.blocks && j * g.block_bytes < hi; ++j) {
        const int32_t id = item.ids[j];
        if (id < 0) continue;
        const uint64_t block = j * g.block_bytes;
        uint64_t at = std::max(lo, block) - block;  // in the block
        const uint64_t end = std::min(hi, block + g.block_bytes) - block;
        auto f = std::upper_bound(g.fragments.begin(), g.fragments.end(), at,
                                  [](uint64_t v, const Fragment& x) { return v < x.at; }) -
                 1;
        for (; at < end; ++f) {
            const uint64_t in = at - f->at;
            const uint64_t n = std::min(f->nbytes - in, end - at);
            fn(reinterpret_cast<uint8_t*>(f->base + uint64_t(id) * f->stride + in), block + at, n);
            at += n;
        }
    }
}

bool wanted(const ItemRef& item, uint64_t lo, uint64_t hi) {
    const uint64_t bb = item.group.block_bytes;
    for (uint64_t j = lo / bb; j < item.blocks && j * bb < hi; ++j)
        if (item.ids[j] >= 0) return true;
    return false;
}

}  // namespace

void check_fragments(Group& g) {
    if (g.fragments.empty()) throw std::invalid_argument("copy: a group needs fragments");
    if (g.num_blocks == 0 || g.num_blocks > uint32_t(INT32_MAX))
        throw std::invalid_argument("copy: num_blocks must be 1 to 2**31-1");
    constexpr uint64_t kSpace = uint64_t(1)
                                << 57;  // user address space, five-level tables included
    g.block_bytes = 0;
    for (size_t i = 0; i < g.fragments.size(); ++i) {
        Fragment& f = g.fragments[i];
        if (f.base == 0 || f.base >= kSpace || f.nbytes == 0 || f.nbytes > g.shard_bytes)
            invalid(i, "has a bad address or size");
        if (g.num_blocks > 1 && f.stride < f.nbytes)
            invalid(i, "overlaps itself: stride below its size");
        if (f.stride > (kSpace - f.base) / g.num_blocks) invalid(i, "leaves the address space");
        f.at = g.block_bytes;
        g.block_bytes += f.nbytes;
    }
    if (g.block_bytes > g.shard_bytes)
        throw std::invalid_argument("copy: a block of " + std::to_string(g.block_bytes) +
                                    " bytes does not fit shard_bytes");
    for (size_t i = 0; i < g.fragments.size(); ++i)
        for (size_t k = 0; k < i; ++k)
            if (overlap(g.fragments[i], g.fragments[k], g.num_blocks))
                invalid(i, "overlaps another fragment");
}

CopyReason gather(Arena& arena, const ItemRef& item, bool nt, uint8_t* bounce) {
    uint8_t* shard = arena.data() + item.offset;
    uint64_t* leaf = arena.leaf_ptr(item.offset);
    for (uint64_t lo = 0; lo < item.group.shard_bytes; lo += kLeafBytes, ++leaf) {
        // Looked at for every leaf: a slot given to someone else must not get our bytes for long.
        if (arena.state_of(item.slot, item.generation) != kFilling) return kSlotLost;
        uint64_t filled = 0;
        for_pieces(item, lo, lo + kLeafBytes, [&](const uint8_t* block, uint64_t at, uint64_t n) {
            std::memcpy(bounce + (at - lo), block, n);
            filled = at - lo + n;
        });
        if (filled < kLeafBytes) std::memset(bounce + filled, 0, kLeafBytes - filled);
        __atomic_store_n(leaf, leaf_hash(bounce, kLeafBytes, item.seed), __ATOMIC_RELAXED);
        if (nt)
            nt_copy(shard + lo, bounce, kLeafBytes);
        else
            std::memcpy(shard + lo, bounce, kLeafBytes);
    }
    store_fence();
    return kNone;
}

CopyReason scatter(Arena& arena, const ItemRef& item, bool nt, bool verify) {
    if (arena.state_of(item.slot, item.generation) != kReady) return kSlotLost;
    const uint8_t* shard = arena.data() + item.offset;
    const uint64_t* leaf = arena.leaf_ptr(item.offset);
    const uint64_t used = std::min(item.group.shard_bytes, item.group.block_bytes * item.blocks);
    for (uint64_t lo = 0; lo < used; lo += kLeafBytes, ++leaf) {
        if (!wanted(item, lo, lo + kLeafBytes)) continue;
        // Hashing brings the leaf into cache, the copy then reads it from there and meanwhile
        // fetches the next one: memory is read while it is written (1.1x on one Xeon core).
        if (verify && leaf_hash(shard + lo, kLeafBytes, item.seed) !=
                          __atomic_load_n(leaf, __ATOMIC_RELAXED)) {
            store_fence();  // earlier leaves' streams
            return arena.state_of(item.slot, item.generation) == kReady ? kMismatch : kSlotLost;
        }
        for_pieces(item, lo, std::min(lo + kLeafBytes, used),
                   [&](uint8_t* block, uint64_t at, uint64_t n) {
                       if (nt)
                           nt_copy(block, shard + at, n, verify ? kLeafBytes : 0);
                       else
                           std::memcpy(block, shard + at, n);
                   });
    }
    store_fence();
    // Seqlock: the reads above must be done before the word is read again.
    std::atomic_thread_fence(std::memory_order_acquire);
    return arena.state_of(item.slot, item.generation) == kReady ? kNone : kSlotLost;
}

}  // namespace kvo
