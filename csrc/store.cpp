// The store's index: what is published, deleted, verified and checked.
#include "store.h"

#include <algorithm>
#include <cstring>

#include "checksum.h"
#include "errors.h"
#include "store_impl.h"

namespace kvo::store {

namespace {
[[noreturn]] void refuse_uring(const StoreOptions& o, const std::string& why) {
    throw OsError(EOPNOTSUPP,
                  "chunk store " + o.path + ": io_engine=uring: " + why + "; use auto or threads");
}

// Before the directory is touched.
const StoreOptions& checked(const StoreOptions& o) {
    if (!o.threads || o.threads > 256) throw std::invalid_argument("threads must be 1 to 256");
    if (o.io_engine != "auto" && o.io_engine != "uring" && o.io_engine != "threads")
        throw std::invalid_argument("io_engine must be auto, uring or threads");
    if (o.io_engine == "uring")
        if (std::string why = uring_problem(); !why.empty()) refuse_uring(o, why);
    return o;
}
}  // namespace

StoreImpl::StoreImpl(const StoreOptions& o) : opt(checked(o)), dir(opt) {}

void StoreImpl::pick_engine() {
    if (opt.io_engine != "threads") {
        engine = make_uring_engine(opt.threads, faults, engine_note);
        if (!engine && opt.io_engine == "uring") refuse_uring(opt, engine_note);
    }
    if (!engine) engine = make_thread_engine(opt.threads, faults);
}

void StoreImpl::start() {
    recover();
    set_kept_limit();
    pick_engine();
    keeper_alive = true;
    keeper_thread = std::thread([self = shared_from_this()] { self->keeper(); });
    if (opt.read_only) return;
    tidy_alive = true;
    tidy_thread = std::thread([self = shared_from_this()] { self->tidy(); });
}

// ---- index

bool StoreImpl::is_live(const StoreEntry& e) {
    return e.seg->state != SegState::kRecycling && e.seg->state != SegState::kGone &&
           e.gen == e.seg->gen;
}

StoreEntry* StoreImpl::find_live(const Key& key) {
    StoreEntry* e = index.find(key);
    return e && is_live(*e) ? e : nullptr;
}

void StoreImpl::touch(StoreEntry& e) {
    if (e.flags & kHot) return;
    e.flags |= kHot;
    e.seg->hot_bytes += e.len;
}

void StoreImpl::cool(StoreEntry& e) {
    if (e.flags & kHot) e.seg->hot_bytes -= e.len;
    e.flags &= uint8_t(~kHot);
}

void StoreImpl::erase_entry(StoreEntry& e) {
    cool(e);
    unkeep(e);
    payload_bytes -= e.len;
    Key key = e.key;  // the entry ends first
    index.erase(key);
}

void StoreImpl::publish(StoreSegment& seg, const Record& r) {
    if (r.type == kDelete) {
        ++seg.deletes;
        uint64_t& t = tombs[r.key];
        t = std::max(t, r.seq);
        if (StoreEntry* e = index.find(r.key); e && e->seq < r.seq) erase_entry(*e);
        return;
    }
    if (auto t = tombs.find(r.key); t != tombs.end() && t->second >= r.seq) return;
    // One search of the index: an open of a million chunks is little else.
    auto [e, fresh] = index.try_emplace(r.key);
    uint8_t kept = 0;
    if (!fresh) {
        if (is_live(*e) && e->seq >= r.seq) return;
        payload_bytes -= e->len;
        cool(*e);
        if (!seg.own) unkeep(*e);
        kept = e->flags & kKept;
        if (kept) weigh_kept(*e, false);
    }
    *e = StoreEntry{r.key, &seg, r.root, r.seq, seg.gen, r.off4k, r.len, r.ns, r.depth, kept, 1};
    if (kept) weigh_kept(*e, true);
    payload_bytes += r.len;
    seg.keys.push_back(r.key);
    if (kept) limit_kept();
}

// Takes a segment's entries out of the index; lets others in between. The state must already keep
// readers away.
void StoreImpl::unpublish(StoreSegment& seg, std::unique_lock<std::mutex>& lk) {
    std::vector<Key> keys = std::move(seg.keys);
    seg.keys.clear();
    for (size_t i = 0; i < keys.size(); ++i) {
        if (StoreEntry* e = index.find(keys[i]); e && e->seg == &seg) {
            n.retained_cut += retained(*e, 0);
            erase_entry(*e);
        }
        if (i % 512 == 511) {
            lk.unlock();
            lk.lock();
        }
    }
}

uint64_t StoreImpl::next_seq() {
    last_seq = std::max(last_seq + 1, uint64_t(unix_ns() / 1000));
    return last_seq;
}

void StoreImpl::append_record(StoreSegment& seg, Record r) {
    r.seq = r.seq ? r.seq : next_seq();
    r.seg = seg.id;
    r.gen = seg.gen;
    seal_record(r, dir.uuid());
    seg.records.push_back(r);
    if (records_added++ == records_journalled) {
        oldest_unwritten = Clock::now();
        wake_keeper();  // starts its 10 ms
    } else if (records_added - records_journalled >= kRecordsPerPage) {
        wake_keeper();
    }
}

void StoreImpl::bury(const Key& key) {
    Record r{};
    r.type = kDelete;
    r.key = key;
    r.seq = next_seq();
    tombs[key] = r.seq;
    tomb_queue.push_back(r);
}

size_t StoreImpl::remove(std::span<const Key> keys) {
    size_t found = 0;
    for (const Key& k : keys) {
        StoreEntry* e = index.find(k);
        if (!e) continue;
        found += is_live(*e);
        erase_entry(*e);
        bury(k);
    }
    if (found) place_tombs();
    return found;
}

// ---- verify

// 0 good, 1 bad, 2 gone meanwhile, 3 could not be read.
int StoreImpl::verify_one(const StoreEntry& e, AlignedBuf& buf) {
    uint64_t pad = round_up(e.len);
    if (buf.size() < pad) buf = AlignedBuf(pad);
    int err = 0;
    size_t done = 0;
    FilePtr f = file_of(*e.seg, err);
    if (f) err = read_full(*f, buf.data(), pad, uint64_t(e.off4k) * kBlock, *faults, done);
    if (!e.seg->own && foreign_gen(*e.seg) != e.gen) return 2;
    if (!f || err) return 3;
    if (done < e.len) return 1;
    return checksum(buf.data(), e.len, seed_of(e.key.b)) == e.root ? 0 : 1;
}

VerifyReport StoreImpl::verify(bool repair,
                               const std::function<bool(uint64_t, uint64_t, uint64_t)>& progress) {
    VerifyReport rep;
    auto t0 = Clock::now();
    std::vector<StoreEntry> all;
    {
        std::lock_guard lk(mu);
        if (closed) throw std::invalid_argument("store is closed");
        if (repair && opt.read_only)
            throw OsError(EROFS, "chunk store " + dir.path() + ": read only");
        all.reserve(index.size());
        index.each([&](StoreEntry& e) { all.push_back(e); });
    }
    std::sort(all.begin(), all.end(), [](auto& a, auto& b) {
        return std::pair(a.seg, a.off4k) < std::pair(b.seg, b.off4k);
    });
    AlignedBuf buf;
    for (size_t i = 0; i < all.size(); ++i) {
        const StoreEntry& e = all[i];
        if (progress && i % 16 == 0 && !progress(i, all.size(), rep.bytes)) break;
        std::unique_lock lk(mu);
        StoreEntry* now = find_live(e.key);
        if (closed) break;
        if (!now || now->seg != e.seg || now->gen != e.gen || now->off4k != e.off4k) continue;
        ++e.seg->pins;
        lk.unlock();
        int res = verify_one(e, buf);
        lk.lock();
        --e.seg->pins;
        wake_keeper();
        done_cv.notify_all();
        if (res == 2) continue;
        ++rep.checked;
        rep.bytes += e.len;
        if (res == 3) ++n.io_errors;
        if (res == 1) ++n.corrupt;
        if (!res) continue;
        ++rep.bad;
        if (repair) rep.dropped += remove(std::span(&e.key, 1));
    }
    if (progress) progress(all.size(), all.size(), rep.bytes);
    rep.seconds = std::chrono::duration<double>(Clock::now() - t0).count();
    return rep;
}

// ---- check

namespace {
void must(bool ok, const std::string& what) {
    if (!ok) throw CheckError("segment store: " + what);
}
}  // namespace

void StoreImpl::check() const {
    std::lock_guard lk(mu);
    uint64_t sum = 0, waiting = 0, recs = 0, journalled = 0;
    std::vector<std::array<uint64_t, 3>> extents;
    std::unordered_map<const StoreSegment*, uint64_t> rank, hot;
    for (auto& s : segments) {
        rank.emplace(s.get(), rank.size());
        must(s->state != SegState::kOpen || s.get() == open, "an OPEN segment is not the open one");
        must(s->state != SegState::kClean || std::ranges::count(clean, s.get()) == 1,
             "a CLEAN segment is not among the clean ones");
        must(s->records.size() <= s->reserved, "more records than were reserved");
        must(!s->zeroing || s->state == SegState::kClean, "zeros are written to a used segment");
        must(s->journalled <= s->records.size(), "journal is ahead of the records");
        bool writing = s->state == SegState::kOpen || s->state == SegState::kFull;
        must(!writing || s->tail + footer_bytes(s->reserved) <= s->bytes,
             "no room left for the footer");
        recs += s->records.size();
        journalled += s->journalled;
    }
    must(!open || (open->own && open->state == SegState::kOpen), "open segment's state");
    for (size_t i = 0; i < clean.size(); ++i) {
        must(clean[i]->blank_from <= clean[i]->bytes, "zeroed past the end");
        must(clean[i]->own && clean[i]->state == SegState::kClean, "clean segment's state");
        must(clean[i]->gen > (i      ? clean[i - 1]
                              : open ? open
                                     : clean[0])
                                 ->gen ||
                 (!i && !open),
             "clean segments out of order");
    }
    must(!rescuing || rescuing->pins, "a segment that is rescued from is not pinned");
    check_kept();
    index.check();
    index.each([&](const StoreEntry& e) {
        sum += e.len;
        auto r = rank.find(e.seg);
        must(r != rank.end(), "entry of an unknown segment");
        if (e.flags & kHot) hot[e.seg] += e.len;
        must(e.len > 0 && e.off4k > 0, "entry without bytes");
        if (e.gen != e.seg->gen || e.seg->state == SegState::kRecycling) return;
        must(e.seg->state != SegState::kGone && e.seg->state != SegState::kClean,
             "entry of a dead segment");
        uint64_t off = uint64_t(e.off4k) * kBlock;
        must(off + round_up(e.len) <= e.seg->bytes, "entry outside its segment");
        must(e.seg != open || off + e.len <= open->tail, "entry behind the tail");
        extents.push_back({r->second, off, off + round_up(e.len)});
    });
    must(sum == payload_bytes, "payload bytes");
    for (auto& s : segments) must(s->hot_bytes == hot[s.get()], "hot bytes");
    std::sort(extents.begin(), extents.end());
    for (size_t i = 1; i < extents.size(); ++i)
        must(extents[i][0] != extents[i - 1][0] || extents[i][1] >= extents[i - 1][2],
             "entries overlap");
    for (auto& w : put_queue) {
        waiting += w.it.nbytes;
        must(pending.count(w.it.key) == 1, "queued put is not pending");
    }
    must(waiting <= queued, "queued bytes");
    must(queued > 0 || pending.empty(), "pending puts without bytes");
    must(put_tickets.size() == ticket_of.size(), "put tickets");
    must(records_journalled + (recs - journalled) >= records_added || killed,
         "records lost track of");
}

void StoreImpl::check_kept() const {
    std::unordered_map<const StoreSegment*, std::pair<uint64_t, uint32_t>> sums;
    uint64_t sum = 0, marked = 0, rows = 0;
    index.each([&](const StoreEntry& e) {
        if (!(e.flags & kKept)) return;
        must(e.seg->own && keeps.count(e.key), "a chunk is marked as kept, and is not");
        sum += round_up(e.len);
        sums[e.seg].first += round_up(e.len);
        ++sums[e.seg].second;
        ++marked;
    });
    for (auto& [key, k] : keeps)
        must(keep_rows[k.pinned ? kPinLevel : k.level].count(row_of(key, k)), "a keep has no row");
    for (auto& r : keep_rows) rows += r.size();
    must(marked == keeps.size() && rows == keeps.size(), "kept chunks");
    must(sum == kept_bytes && sum <= kept_limit, "kept bytes");
    for (auto& s : segments)
        must(s->kept_bytes == sums[s.get()].first && s->kept_chunks == sums[s.get()].second,
             "kept bytes of a segment");
    must(!promised || (open && clean.empty()), "a promise without need");
}

// Memory per chunk: the index, and by segment what is to leave it.
uint64_t StoreImpl::index_bytes() const {
    uint64_t out = index.memory_bytes();
    for (auto& s : segments) out += s->keys.capacity() * sizeof(Key);
    return out;
}

void StoreImpl::hint_miss() {
    if (miss_hint) return;
    miss_hint = true;
    wake_keeper();
}

}  // namespace kvo::store
