// What hints keep in the store: which keys, until when and how strongly, and how much of it there
// may be. In memory only. What it means for a segment that is to be recycled: store_segments.cpp
// and store_tidy.cpp.
#include <algorithm>
#include <cmath>

#include "store_impl.h"

namespace kvo::store {
namespace {

constexpr auto kNoNews = std::chrono::milliseconds(500);  // a later end by less than this
constexpr double kLongest = 1e9;                          // seconds
constexpr size_t kPurgeAtOnce = 256;

}  // namespace

KeepRow StoreImpl::row_of(const Key& key, const Keep& k) {
    auto end = k.pinned ? Clock::time_point::max() : k.end;
    return {end, ~k.depth, key};
}

std::set<KeepRow>& StoreImpl::rows_of(const Keep& k) {
    return keep_rows[k.pinned ? kPinLevel : k.level];
}

void StoreImpl::weigh_kept(const StoreEntry& e, bool in) {
    uint64_t pad = round_up(e.len);
    e.seg->kept_bytes += in ? pad : -pad;
    e.seg->kept_chunks += in ? 1 : -1u;
    kept_bytes += in ? pad : -pad;
    plan_stale = true;
}

// Nothing keeps `e` any more, or it goes.
void StoreImpl::unkeep(StoreEntry& e) {
    if (!(e.flags & kKept)) return;
    auto k = keeps.find(e.key);
    rows_of(k->second).erase(row_of(e.key, k->second));
    keeps.erase(k);
    e.flags &= uint8_t(~kKept);
    weigh_kept(e, false);
}

// True where the chunk was retained before, and for less.
bool StoreImpl::keep_one(StoreEntry& e, const Keep& want) {
    auto [at, fresh] = keeps.try_emplace(e.key, want);
    Keep& k = at->second;
    bool more = false;
    if (fresh) {
        k.depth = e.depth;
        e.flags |= kKept;
        weigh_kept(e, true);
    } else {
        Keep now = k;
        if (want.pinned) {
            now.pinned = true;
        } else {
            bool was = k.end > Clock::now();  // else only pinned, or it has ended
            bool longer = want.end > k.end + kNoNews, higher = want.level > k.level;
            more = was && (longer || higher);
            if (longer) now.end = want.end;
            now.level = was ? std::max(k.level, want.level) : want.level;
            now.owner = was && k.owner != want.owner ? 0 : want.owner;
        }
        rows_of(k).erase(row_of(e.key, k));
        k = now;
    }
    rows_of(k).insert(row_of(e.key, k));
    return more;
}

// A retention ends, or a pin; the other one stays.
void StoreImpl::end_keep(StoreEntry& e, bool pin) {
    auto at = keeps.find(e.key);
    if (at == keeps.end()) return;
    Keep& k = at->second;
    bool stays = pin ? k.end > Clock::now() : k.pinned;
    if (!stays) return unkeep(e);
    rows_of(k).erase(row_of(e.key, k));
    if (pin) {
        k.pinned = false;
    } else {
        k.end = {};
        k.level = 0;
        k.owner = 0;
    }
    rows_of(k).insert(row_of(e.key, k));
}

void StoreImpl::retain(std::span<const Key> keys, double seconds, unsigned level, uint64_t owner,
                       uint8_t* extended) {
    Keep want;
    want.pinned = level == kPinLevel;
    want.level = want.pinned ? 0 : uint8_t(level);
    want.owner = owner;
    bool on = seconds > 0;
    if (!want.pinned)
        want.end = Clock::now() + std::chrono::duration_cast<Clock::duration>(
                                      std::chrono::duration<double>(std::min(seconds, kLongest)));
    purge_kept(keys.size() + kPurgeAtOnce);
    index.each_of(keys, [&](size_t i, StoreEntry* e) {
        extended[i] = 0;
        if (!e || !is_live(*e) || !e->seg->own) return true;  // others' directories are theirs
        if (on)
            extended[i] = keep_one(*e, want);
        else
            end_keep(*e, want.pinned);
        return true;
    });
    limit_kept();
}

bool StoreImpl::retained(const StoreEntry& e, uint64_t owner) const {
    if (!(e.flags & kKept)) return false;
    const Keep& k = keeps.at(e.key);
    if (k.pinned) return true;
    return k.end > Clock::now() && (!k.owner || k.owner != owner);
}

void StoreImpl::retain_none() {
    for (auto& [key, k] : keeps)
        if (StoreEntry* e = index.find(key)) {
            e->flags &= uint8_t(~kKept);
            weigh_kept(*e, false);
        }
    keeps.clear();
    for (auto& rows : keep_rows) rows.clear();
}

// What has ended, at most so many: there may be hundreds of thousands at a time.
void StoreImpl::purge_kept(size_t most) {
    auto now = Clock::now();
    for (unsigned level = 0; level < kPinLevel; ++level) {
        auto& rows = keep_rows[level];
        for (; !rows.empty() && std::get<0>(*rows.begin()) <= now; --most) {
            if (!most) return;
            unkeep(*index.find(Key(std::get<2>(*rows.begin()))));
        }
    }
}

// Within the bound again: what is kept least strongly is given up.
void StoreImpl::limit_kept() {
    for (unsigned level = 0; kept_bytes > kept_limit && level <= kPinLevel; ++level) {
        auto& rows = keep_rows[level];
        while (kept_bytes > kept_limit && !rows.empty()) {
            n.retained_cut += std::get<0>(*rows.begin()) > Clock::now();
            unkeep(*index.find(Key(std::get<2>(*rows.begin()))));
        }
    }
}

// Half of what is neither open nor clean: going round, every second chunk is written again, so
// two are written for each that comes.
void StoreImpl::set_kept_limit() {
    if (opt.read_only) return;  // keeps nothing
    uint64_t fit = dir.segments_that_fit(), others = 0;
    for (auto& s : segments)
        if ((!s->own || s->aside()) && s->state != SegState::kGone) others += s->bytes;
    uint64_t used =
        (fit >= kLargeStore ? 3 : 1) + (others + dir.segment_bytes() - 1) / dir.segment_bytes();
    kept_limit = fit > used ? (fit - used) * max_payload(dir.segment_bytes()) / 2 : 0;
    limit_kept();
}

// ---- room for it

bool StoreImpl::can_grow() {
    return charged + dir.segment_bytes() + kSlack <= dir.max_bytes();
}

// Payload bytes that fit into the open segment and the clean ones, `more` records included.
uint64_t StoreImpl::room(uint64_t more) {
    uint64_t out = clean.size() * max_payload(dir.segment_bytes());
    if (!open) return out;
    uint64_t used = open->tail + footer_bytes(open->reserved + more + 1);
    return out + (open->bytes > used ? open->bytes - used : 0);
}

// What of the open segment puts must leave alone: nothing is clean, and before another segment can
// be recycled what is kept in it needs a place. Early enough that there is one: at each quarter of
// the open segment it is seen whether the next quarter (a put may reach beyond it by an eighth) or
// `next` bytes would be too late.
void StoreImpl::plan_rescue(uint64_t next) {
    plan_stale = false;
    promised = promised_records = 0;
    if (!open || !clean.empty() || !kept_bytes || discard || !tidy_alive || can_grow()) return;
    purge_kept(kPurgeAtOnce);
    plan_stale = false;
    StoreSegment* s = rescuing ? rescuing : next_victim(true);
    if (!s || !s->kept_todo()) return;
    uint64_t there = room(s->kept_chunks);
    if (!rescuing && there > s->kept_todo() + std::max(open->bytes / 8 * 3, next)) return;
    promised = std::min(s->kept_todo(), there);
    promised_records = s->kept_chunks;
    wake_keeper();
}

// Whether so many bytes, and their record, fit into the open segment beside what is promised.
bool StoreImpl::fits(uint64_t bytes) const {
    uint64_t records = open->reserved + 1 + promised_records;
    return open->tail + bytes + promised + footer_bytes(records) <= open->bytes;
}

}  // namespace kvo::store
