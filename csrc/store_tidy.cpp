// The tidy thread: what makes the store better and hardly anybody waits for. Rescue: chunks that
// hints keep, and those that were read since they were written, are written again before their
// segment is recycled. Zeros: a new segment is written once before it is used, the first write to
// preallocated extents being slower.
#include <linux/ioprio.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <cstring>

#include "checksum.h"
#include "store_impl.h"

namespace kvo::store {
namespace {

constexpr auto kQuiet = std::chrono::milliseconds(5);     // longest wait for reads, per chunk
constexpr auto kSealing = std::chrono::milliseconds(10);  // until it is looked again
constexpr uint64_t kPiece = 1 << 20;  // of zeros: what a load may have to wait behind

// Idle I/O priority, where the disk's scheduler knows such a thing. Not nice(2): a thread that is
// kept from running while it holds `mu` would stop everybody.
void lowest_priority() {
    ::syscall(SYS_ioprio_set, IOPRIO_WHO_PROCESS, 0, IOPRIO_PRIO_VALUE(IOPRIO_CLASS_IDLE, 0));
}

}  // namespace

void StoreImpl::tidy() {
    setup_native_thread("kvo-tidy");
    lowest_priority();
    AlignedBuf zeros;
    std::unique_lock lk(mu);
    while (!stop_tidy) {
        StoreSegment* s = nullptr;
        if (rescuing) {
            rescue(*rescuing, lk);
        } else if ((s = blank()) && !reads_out && !queued) {
            if (!zeros.size()) {
                zeros = AlignedBuf(kPiece);
                std::memset(zeros.data(), 0, kPiece);
            }
            zero_piece(*s, zeros, lk);
        } else {
            tidy_waits = s != nullptr;
            if (!s) zeros = AlignedBuf();
            tidy_cv.wait(lk);  // an idle store never wakes
            tidy_waits = false;
        }
    }
    if (rescuing) --rescuing->pins;
    rescuing = nullptr;
    tidy_alive = false;
    keeper_gone_cv.notify_all();
}

// ---- zeros

StoreSegment* StoreImpl::blank() {
    for (auto* s : clean)
        if (s->blank_from) return s;
    return nullptr;
}

// One piece, only while nothing else moves; then as long a pause, so that it never takes more than
// half of the disk. A put that needs the segment waits for the piece and takes it as it is.
void StoreImpl::zero_piece(StoreSegment& seg, const AlignedBuf& zeros,
                           std::unique_lock<std::mutex>& lk) {
    uint64_t from = seg.blank_from, bytes = std::min(kPiece, seg.bytes - from);
    seg.zeroing = true;
    lk.unlock();
    auto start = Clock::now();
    int err = 0;
    FilePtr f = file_of(seg, err);
    if (f) err = write_full(*f, zeros.data(), bytes, from, *faults);
    auto took = Clock::now() - start;
    lk.lock();
    seg.zeroing = false;
    seg.blank_from = from + bytes;
    bool last = seg.blank_from == seg.bytes;
    if (err || last) seg.blank_from = 0;  // failing, it is used as it is
    if (err)
        ++n.io_errors;
    else
        n.zeroed_bytes += bytes;
    if (!discard) place();  // what came meanwhile
    if (err || discard) return;
    if (last) {  // the extents' new state, now and not on a put's time
        lk.unlock();
        err = sync_data(*f);
        lk.lock();
        n.io_errors += err != 0;
    }
    tidy_cv.wait_for(lk, took, [&] { return stop_tidy || rescuing; });
}

// ---- rescue

// A third of what others write is a quarter of all that is written. Not saved up without end: the
// segment it goes to has to hold something new as well.
void StoreImpl::earn_rescue(uint64_t written) {
    rescue_credit = std::min(rescue_credit + written / 3, dir.segment_bytes() / 2);
}

// Early enough to be done before the segment is needed: as the first step of making it clean ahead
// of need, or, where none is kept clean, in the second half of the open one; sooner where so much
// of it is kept that there would be no room (plan_rescue).
StoreSegment* StoreImpl::rescuable() {
    if (rescuing || !open || discard || stop_tidy || !tidy_alive) return nullptr;
    bool hot = rescue_credit >= kBlock;
    if (!hot && !kept_bytes) return nullptr;
    if (can_grow()) return nullptr;  // nothing goes yet
    size_t ahead = ahead_target();
    bool due = ahead ? clean.size() < ahead : open->tail > open->bytes / 2;
    if (!due && !promised) return nullptr;
    StoreSegment* s = next_victim(true);
    if (!s || s->empty || s->state != SegState::kSealed) return nullptr;
    return s->kept_todo() || (hot && s->hot_bytes > s->hot_left) ? s : nullptr;
}

bool StoreImpl::tidy_pending() {
    return unsealed() || rescuing || blank() || rescuable() || want_ahead();
}

// The hot keys of a segment, or the kept ones, these strongest first; shallow ones first: a chunk
// is worth nothing without those above it.
std::vector<Key> StoreImpl::marked_keys(const StoreSegment& seg, uint8_t mark,
                                        std::unique_lock<std::mutex>& lk) {
    std::vector<std::tuple<int, uint32_t, size_t>> order;  // weakness, depth, index in seg.keys
    for (size_t i = 0; i < seg.keys.size(); ++i) {
        StoreEntry* e = find_live(seg.keys[i]);
        if (e && e->seg == &seg && (e->flags & mark)) {
            int weak = 0;
            if (mark == kKept) {
                const Keep& k = keeps.at(e->key);
                weak = -int(k.pinned ? kPinLevel : k.level);
            }
            order.emplace_back(weak, e->depth, i);
        }
        if (i % 512 == 511) {
            lk.unlock();
            lk.lock();
        }
    }
    std::ranges::sort(order);
    std::vector<Key> keys;
    for (auto& row : order) keys.push_back(seg.keys[std::get<2>(row)]);
    return keys;
}

// `from` is pinned by who set `rescuing`, and sealed: its keys stay as they are.
void StoreImpl::rescue(StoreSegment& from, std::unique_lock<std::mutex>& lk) {
    AlignedBuf buf;
    bool on = true;
    // Again while it helps: more may be retained meanwhile.
    for (uint32_t before = 0; on && from.kept_chunks && from.kept_chunks != before;) {
        before = from.kept_chunks;
        on = rescue_all(from, kKept, buf, lk);
    }
    from.kept_left = from.kept_bytes;
    plan_rescue();
    if (!discard) place();  // puts that left room for it
    if (on && !hurry) rescue_all(from, kHot, buf, lk);
    from.hot_left = from.hot_bytes;
    from.rescued = true;
    --from.pins;
    rescuing = nullptr;
    plan_stale = true;
    if (!discard) place();
    done_cv.notify_all();  // the keeper may wait for the pin
    wake_keeper();
}

// False: there is no place to write to, or it is to stop.
bool StoreImpl::rescue_all(StoreSegment& from, uint8_t mark, AlignedBuf& buf,
                           std::unique_lock<std::mutex>& lk) {
    for (const Key& key : marked_keys(from, mark, lk)) {
        if (mark == kHot && (hurry || promised)) break;
        if (!(mark == kKept && (promised || hurry))) {
            tidy_waits = true;
            tidy_cv.wait_for(lk, kQuiet, [&] { return stop_tidy || hurry || !reads_out; });
            tidy_waits = false;
        }
        if (stop_tidy || !rescue_one(from, key, mark, buf, lk)) return false;
        rescue_moved = Clock::now();
    }
    return true;
}

// Whether the index still names that place.
bool StoreImpl::is_at(const Key& key, const StoreEntry& e) {
    StoreEntry* now = find_live(key);
    return now && now->seg == e.seg && now->gen == e.gen && now->off4k == e.off4k;
}

// Reads, verifies and writes one chunk; the old place serves until the new one is published.
bool StoreImpl::rescue_one(StoreSegment& from, const Key& key, uint8_t mark, AlignedBuf& buf,
                           std::unique_lock<std::mutex>& lk) {
    StoreEntry* now = find_live(key);
    if (!now || now->seg != &from || !(now->flags & mark)) return true;
    StoreEntry e = *now;
    bool kept = mark == kKept;
    if (kept && !retained(e, 0)) {  // it has ended
        unkeep(*now);
        return true;
    }
    if (!kept && round_up(e.len) > rescue_credit) return true;  // a smaller one may still fit
    lk.unlock();
    int res = verify_one(e, buf);
    lk.lock();
    if (res == 3) ++n.io_errors;
    if (res == 1 && is_at(key, e)) {
        ++n.corrupt;
        drop_entry(key, &from, e.gen, uint64_t(e.off4k) * kBlock);
    }
    if (res || discard || stop_tidy || !is_at(key, e)) return true;
    return rewrite(key, e, kept, buf, lk);
}

// Makes `open` one that so many bytes fit into. False: there is no place.
bool StoreImpl::rescue_place(uint64_t pad, bool kept, std::unique_lock<std::mutex>& lk) {
    for (;;) {
        if (open && open->tail + pad + footer_bytes(open->reserved + 1) <= open->bytes) return true;
        if (clean.empty()) return false;  // its last bytes are left to puts
        if (open) close_open();
        if (next_segment()) continue;
        if (!kept || stop_tidy || Clock::now() >= rescue_moved + kRescueStall) return false;
        // Two that are full are to be sealed first: what is kept would be given up for good.
        done_cv.wait_for(lk, kSealing);
    }
}

bool StoreImpl::rewrite(const Key& key, const StoreEntry& e, bool kept, AlignedBuf& buf,
                        std::unique_lock<std::mutex>& lk) {
    uint64_t pad = round_up(e.len);
    if (!rescue_place(pad, kept, lk)) return false;
    StoreSegment& to = *open;
    Record r{};
    r.type = kPut;
    r.key = key;
    r.off4k = uint32_t(to.tail / kBlock);
    r.len = e.len;
    r.root = e.root;
    r.ns = e.ns;
    r.depth = e.depth;
    to.tail += pad;
    ++to.reserved;
    ++to.pins;
    if (kept) {
        promised -= std::min(pad, promised);
        promised_records -= promised_records > 0;
    } else {
        rescue_credit -= std::min(pad, rescue_credit);
    }
    lk.unlock();
    std::fill(buf.data() + e.len, buf.data() + pad, uint8_t(0));
    int err = 0;
    FilePtr f = file_of(to, err);
    if (f) err = write_full(*f, buf.data(), pad, uint64_t(r.off4k) * kBlock, *faults);
    lk.lock();
    --to.pins;
    if (err) {
        ++n.io_errors;
        if (open == &to) close_open();
    } else {
        n.bytes_written += pad;
        n.reinserted_bytes += pad;
        if (!killed && is_at(key, e)) {  // else it was deleted meanwhile: the extent is wasted
            ++n.reinserted_chunks;
            append_record(to, r);
            publish(to, to.records.back());
        }
    }
    if (to.state == SegState::kFull && !to.pins) wake_keeper();
    return !err;
}

}  // namespace kvo::store
