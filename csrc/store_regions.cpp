#include "store_regions.h"

#ifdef KVO_URING
#include <sys/mman.h>

#include <algorithm>

namespace kvo::store::uring {
namespace {

constexpr unsigned kPieces = 1024;     // registered buffers: 1 TiB of arena
constexpr uint64_t kSample = 2 << 20;  // residency is looked at this far apart
constexpr auto kLookAgain = std::chrono::seconds(1);
constexpr auto kAskAgain = std::chrono::minutes(10);  // RLIMIT_MEMLOCK may be raised, seldom is

bool resident(uint8_t* p, uint64_t n) {
    unsigned char in = 0;
    for (uint64_t at = 0; at < n; at += kSample)
        if (::mincore(p + at, 1, &in) != 0 || !(in & 1)) return false;
    return true;
}

}  // namespace

void Regions::open(io_uring& ring, Queues& q) {
    ring_ = &ring;
    q_ = &q;
    sparse_ = io_uring_register_buffers_sparse(&ring, kPieces) == 0;
    free_.resize(sparse_ ? kPieces : 0);
    for (unsigned i = 0; i < free_.size(); ++i) free_[i] = int(kPieces - 1 - i);
}

void Regions::add(const WeakRegion& r) {
    if (sparse_)
        list_.push_back(
            {r.owner, r.data, r.bytes, std::vector<Piece>((r.bytes + kPiece - 1) / kPiece)});
}

void Regions::drop_dead() {
    for (size_t i = 0; i < list_.size();) {
        if (!list_[i].owner.expired()) {
            ++i;
            continue;
        }
        for (Piece& p : list_[i].pieces)
            if (p.index >= 0) unregister(p);
        list_[i] = std::move(list_.back());
        list_.pop_back();
    }
}

int Regions::find(const iovec* v, size_t n) {
    int index = -1;
    for (size_t i = 0; i < n; ++i) {
        int at = find(v[i]);
        if (at < 0 || (i && at != index)) return -1;
        index = at;
    }
    return index;
}

int Regions::find(const iovec& v) {
    auto* p = static_cast<uint8_t*>(v.iov_base);
    for (Region& r : list_) {
        if (p < r.data || p + v.iov_len > r.data + r.bytes) continue;
        size_t i = size_t(p - r.data) / kPiece;
        if (size_t(p + v.iov_len - 1 - r.data) / kPiece != i) return -1;
        if (r.pieces[i].index < 0) try_register(r, i);
        return r.pieces[i].index;
    }
    return -1;
}

void Regions::try_register(Region& r, size_t i) {
    Piece& p = r.pieces[i];
    auto now = Clock::now();
    if (free_.empty() || now < p.next) return;
    p.next = now + kLookAgain;
    uint64_t bytes = std::min(kPiece, r.bytes - i * kPiece);
    iovec v{r.data + i * kPiece, bytes};
    if (!resident(r.data + i * kPiece, bytes)) return;
    __u64 tag = 0;
    int n = io_uring_register_buffers_update_tag(ring_, unsigned(free_.back()), &v, &tag, 1);
    if (n != 1) {
        ++q_->register_errors;
        p.next = now + kAskAgain;
        return;
    }
    p.index = free_.back();
    p.bytes = bytes;
    free_.pop_back();
    q_->registered_bytes += bytes;
}

void Regions::unregister(Piece& p) {
    iovec none{};
    __u64 tag = 0;
    io_uring_register_buffers_update_tag(ring_, unsigned(p.index), &none, &tag, 1);
    q_->registered_bytes -= p.bytes;
    free_.push_back(p.index);
}

}  // namespace kvo::store::uring

#endif
