// Registered buffers of the io_uring engine. Used by the ring thread only.
#pragma once
#include "store_uring.h"

#ifdef KVO_URING
#include <liburing.h>

namespace kvo::store::uring {

constexpr uint64_t kPiece = 1 << 30;  // most bytes of one registered buffer, and of one transfer

// Registering pins pages, so: only pages that are there already (pinning would fault in the rest,
// for seconds), and never longer than the region's owner lives: memory of a dead owner is given
// back before the next transfer. What the kernel refuses is counted and goes on unregistered.
class Regions {
  public:
    void open(io_uring& ring, Queues& q);
    void add(const WeakRegion& r);
    // To be called before transfers are started: what came after the dead may have its address.
    void drop_dead();
    // The registered buffer that holds all of them, or -1.
    int find(const iovec* v, size_t n);

  private:
    struct Piece {
        int index = -1;
        uint64_t bytes = 0;
        Clock::time_point next{};  // not tried again before
    };
    struct Region {
        std::weak_ptr<const void> owner;
        uint8_t* data;
        uint64_t bytes;
        std::vector<Piece> pieces;
    };

    int find(const iovec& v);
    void try_register(Region& r, size_t i);
    void unregister(Piece& p);

    io_uring* ring_ = nullptr;
    Queues* q_ = nullptr;
    bool sparse_ = false;
    std::vector<Region> list_;
    std::vector<int> free_;
};

}  // namespace kvo::store::uring

#endif
