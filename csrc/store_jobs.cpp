// Puts and gets: from a submit to the settled job.
#include <algorithm>
#include <cstring>

#include "checksum.h"
#include "errors.h"
#include "store_impl.h"

namespace kvo::store {
namespace {

constexpr size_t kMaxParts = 256;  // iovecs per request

uint8_t result_of(int err) {
    if (err == ENOSPC || err == EDQUOT) return kNoSpace;
    return err == ECANCELED ? kDropped : kIoError;
}

}  // namespace

StoreJobPtr StoreImpl::new_job(int64_t id, int kind, size_t n_items, std::shared_ptr<Arena> arena) {
    if (closed) throw std::invalid_argument("store is closed");
    if (kind == 0 && opt.read_only)
        throw OsError(EROFS, "chunk store " + dir.path() + ": read only");
    auto job = std::make_shared<StoreJob>();
    job->id = id;
    job->kind = kind;
    job->results.assign(n_items, kDropped);
    job->left = n_items;
    job->start = Clock::now();
    job->arena = std::move(arena);
    if (!jobs.emplace(id, job).second) throw std::invalid_argument("job id is in use");
    if (kind == 0) {
        ticket_of[job.get()] = ++last_ticket;
        put_tickets.insert(last_ticket);
    }
    if (!n_items) {  // nothing will ever settle it
        job->left = 1;
        job->results.assign(1, kOk);
        settle(job, 0, kOk, 0);
        job->results.clear();
    }
    return job;
}

void StoreImpl::settle(const StoreJobPtr& job, uint32_t i, uint8_t result, uint64_t nbytes) {
    if (job->done) return;  // abandoned, or given up by close()
    job->results[i] = result;
    job->nbytes += nbytes;
    if (result == kNoSpace) ++n.no_space;
    if (result == kDropped) ++n.dropped;
    if (!--job->left) end_job(job);
}

void StoreImpl::end_job(const StoreJobPtr& job) {
    job->done = true;
    job->ns =
        std::chrono::duration_cast<std::chrono::nanoseconds>(Clock::now() - job->start).count();
    job->arena.reset();
    if (auto t = ticket_of.find(job.get()); t != ticket_of.end()) {
        put_tickets.erase(t->second);
        ticket_of.erase(t);
    }
    finished.push_back(job);
    job_cv.notify_all();
    done_cv.notify_all();
}

// ---- put

void StoreImpl::submit_put(int64_t id, std::shared_ptr<Arena> arena, std::vector<StoreItem>& items,
                           uint32_t ns, int64_t deadline_ms) {
    std::lock_guard lk(mu);
    StoreJobPtr job = new_job(id, 0, items.size(), std::move(arena));
    set_deadline(job, deadline_ms);
    n.puts += items.size();
    for (uint32_t i = 0; i < items.size(); ++i) {
        StoreItem& it = items[i];
        if (find_live(it.key)) {
            settle(job, i, kOk, 0);
            continue;
        }
        if (it.nbytes > max_payload(dir.segment_bytes())) {
            settle(job, i, kNoSpace, 0);
            continue;
        }
        StoreWork w{job, i, it, ns};
        if (auto p = pending.find(it.key); p != pending.end()) {
            p->second.push_back(std::move(w));
            continue;
        }
        if (queued && queued + it.nbytes > opt.queue_bytes) {
            settle(job, i, kDropped, 0);
            continue;
        }
        queued += it.nbytes;
        pending.emplace(it.key, std::vector<StoreWork>{});
        put_queue.push_back(std::move(w));
    }
    place();
}

void StoreImpl::settle_put(StoreWork& w, uint8_t result, uint64_t nbytes) {
    queued -= w.it.nbytes;
    if (!queued && tidy_waits) tidy_cv.notify_one();
    settle(w.job, w.index, result, nbytes);
    auto p = pending.find(w.it.key);
    auto waiters = std::move(p->second);
    pending.erase(p);
    for (auto& o : waiters) settle(o.job, o.index, result, 0);
}

void StoreImpl::fail_queued_puts(uint8_t result) {
    auto q = std::move(put_queue);
    put_queue.clear();
    for (auto& w : q) settle_put(w, result, 0);
    if (discard)
        tomb_queue.clear();  // flush has said that they do not last
    else if (!tomb_queue.empty())
        ++tombs_failed;  // tried again with the next put, delete or flush
    done_cv.notify_all();
}

// Makes `open` usable; else asks the keeper for a segment.
bool StoreImpl::next_segment() {
    if (open) return true;
    if (!clean.empty() && unsealed() < 2) {
        if (clean.front()->zeroing) return false;  // a piece at most; place() comes after it
        open = clean.front();
        open->blank_from = 0;
        clean.pop_front();
        open->state = SegState::kOpen;
        plan_stale = true;
        wake_keeper();
        return true;
    }
    n.segment_waits += !need_segment;
    need_segment = true;
    wake_keeper();
    return false;
}

void StoreImpl::place_tombs() {
    while (!tomb_queue.empty() && next_segment()) {
        if (plan_stale) plan_rescue();
        if (!fits(0)) {
            if ((held_back = promised > 0)) return;  // called again when what is kept has moved
            close_open();
            continue;
        }
        ++open->reserved;
        ++open->deletes;
        append_record(*open, tomb_queue.front());
        tomb_queue.pop_front();
        if (tomb_queue.empty()) done_cv.notify_all();
    }
}

// Gives queued puts their extents, in order: what came together lies together.
void StoreImpl::place() {
    if (discard) return;
    held_back = false;
    place_tombs();
    uint64_t limit = engine->merge_bytes(queued, true);
    // More wait here than at the engine: what comes meanwhile is written together.
    while (!put_queue.empty() && writes_out < engine->write_depth() && next_segment()) {
        if (plan_stale) plan_rescue();
        auto g = std::make_shared<StoreGroup>();
        g->seg = open;
        g->gen = open->gen;
        g->off = open->tail;
        g->bytes = 0;
        while (!put_queue.empty() && g->items.size() < kMaxParts) {
            StoreWork& w = put_queue.front();
            if (overdue(*w.job)) {
                StoreWork late = std::move(w);
                put_queue.pop_front();
                drop_put(late);
                continue;
            }
            if (g->items.empty()) g->bounce = !w.job->arena;
            uint64_t pad = round_up(w.it.nbytes);
            if (pad > open->bytes / 8) plan_rescue(pad);
            if (!fits(pad)) break;
            if (g->bounce != !w.job->arena || (g->bytes && g->bytes + pad > limit)) break;
            w.off = open->tail;
            open->tail += pad;
            g->bytes += pad;
            ++open->reserved;
            // Halves and quarters are where the keeper has something to do ahead of need.
            if (w.off * 4 / open->bytes != open->tail * 4 / open->bytes) {
                wake_keeper();
                plan_rescue();
            }
            auto& known = w.job->groups;
            if (g->items.empty() || g->items.back().job != w.job) known.push_back(g);
            g->items.push_back(std::move(w));
            put_queue.pop_front();
        }
        if (g->items.empty()) {
            if (put_queue.empty()) continue;
            if ((held_back = promised > 0)) return;
            close_open();
            continue;
        }
        ++g->seg->pins;
        ++writes_out;
        send(std::move(g), true);
    }
}

void StoreImpl::send(std::shared_ptr<StoreGroup> g, bool write) {
    auto r = std::make_unique<IoRequest>();
    r->write = write;
    r->offset = g->off;
    r->bytes = g->bytes;
    auto self = shared_from_this();
    r->file = file_if_open(*g->seg);
    if (r->file && g->seg->own) {
        // From slots a put hashes its leaves' hashes: little, but hashing all the same.
        uint64_t leaves = write ? g->bytes / kLeafBytes * sizeof(uint64_t) + 1 : 0;
        r->prepare_bytes = g->bounce ? g->bytes : leaves;
        r->finish_bytes = write ? 0 : g->bounce ? 2 * g->bytes : g->bytes;
    }
    if (write) {
        r->prepare = [self, g](IoRequest& q) { return self->prepare_put(*g, q); };
        r->finish = [self, g](IoRequest&, int err, size_t) { self->finish_put(*g, err); };
    } else {
        r->prepare = [self, g](IoRequest& q) { return self->prepare_get(*g, q); };
        r->finish = [self, g](IoRequest& q, int err, size_t done) {
            self->finish_get(*g, q, err, done);
        };
    }
    engine->submit(std::move(r));
}

int StoreImpl::prepare_put(StoreGroup& g, IoRequest& r) {
    if (!start_group(g, true)) return ECANCELED;
    int err = gather_put(g, r);
    if (g.bounce) {
        std::lock_guard lk(mu);
        untouch_buffers(g);
    }
    return err;
}

int StoreImpl::gather_put(StoreGroup& g, IoRequest& r) {
    int err = 0;
    if (!r.file) r.file = file_of(*g.seg, err);
    if (!r.file) return err;
    std::vector<uint64_t> leaves;
    uint64_t ended = 0;  // their extents are written as well, with zeros
    for (auto& w : g.items)
        if (w.ended) ended = std::max(ended, w.it.nbytes);
    if (g.bounce) {
        r.bounce = engine->take_buffer(g.bytes);
        r.iov.push_back({r.bounce.data(), g.bytes});
    } else if (ended) {
        r.bounce = engine->take_buffer(ended);
        std::memset(r.bounce.data(), 0, ended);
    }
    for (auto& w : g.items) {
        if (w.ended) {
            if (g.bounce)
                std::memset(r.bounce.data() + (w.off - g.off), 0, round_up(w.it.nbytes));
            else
                r.iov.push_back({r.bounce.data(), w.it.nbytes});
            continue;
        }
        uint64_t seed = seed_of(w.it.key.b);
        size_t count = leaf_count(w.it.nbytes);
        if (!g.bounce) {
            // The extent is ours either way; bytes of a slot that moved on are written and never
            // named.
            w.usable = w.job->arena && w.job->arena->state_of(w.it.slot, w.it.generation) == kReady;
            w.root = root_of(w.it.leaves, count, seed);
            r.iov.push_back({w.it.data, w.it.nbytes});
            continue;
        }
        uint8_t* to = r.bounce.data() + (w.off - g.off);
        uint64_t pad = round_up(w.it.nbytes);
        std::memcpy(to, w.it.data, w.it.nbytes);
        std::memset(to + w.it.nbytes, 0, pad - w.it.nbytes);
        leaves.resize(count);
        leaf_hashes(to, w.it.nbytes, seed, leaves.data());
        w.root = root_of(leaves.data(), count, seed);
    }
    return 0;
}

void StoreImpl::finish_put(StoreGroup& g, int err) {
    std::lock_guard lk(mu);
    StoreSegment& seg = *g.seg;
    --seg.pins;
    --writes_out;
    if (err && err != ECANCELED) {
        ++n.io_errors;
        if (open == &seg) close_open();  // abandoned: what it holds stays, nothing more goes in
    }
    if (!err) {
        n.bytes_written += g.bytes;
        earn_rescue(g.bytes);
    }
    for (auto& w : g.items) {
        if (w.ended) continue;
        if (err || killed) {
            settle_put(w, err ? result_of(err) : uint8_t(kDropped), 0);
            continue;
        }
        if (w.job->arena && w.job->arena->state_of(w.it.slot, w.it.generation) != kReady)
            w.usable = false;
        if (!w.usable) {
            settle_put(w, kDropped, 0);
            continue;
        }
        Record r{};
        r.type = kPut;
        r.key = w.it.key;
        r.off4k = uint32_t(w.off / kBlock);
        r.len = uint32_t(w.it.nbytes);
        r.root = w.root;
        r.ns = w.ns;
        r.depth = w.it.depth;
        append_record(seg, r);
        publish(seg, seg.records.back());
        n.accepted_bytes += w.it.nbytes;
        settle_put(w, kOk, w.it.nbytes);
    }
    if (seg.state == SegState::kFull && !seg.pins) wake_keeper();
    place();
}

// ---- get

void StoreImpl::submit_get(int64_t id, std::shared_ptr<Arena> arena, std::vector<StoreItem>& items,
                           int64_t deadline_ms) {
    std::vector<std::shared_ptr<StoreGroup>> groups;
    {
        std::lock_guard lk(mu);
        StoreJobPtr job = new_job(id, 1, items.size(), arena);
        set_deadline(job, deadline_ms);
        n.gets += items.size();
        std::vector<std::pair<StoreEntry, StoreWork>> found;
        uint64_t total = 0;
        for (uint32_t i = 0; i < items.size(); ++i) {
            StoreEntry* e = find_live(items[i].key);
            if (!e || e->len != items[i].nbytes) {
                if (!e) miss_hint = true;
                ++n.misses;
                if (arena) arena->fail(items[i].slot, items[i].generation);
                settle(job, i, kMiss, 0);
                continue;
            }
            touch(*e);
            StoreWork w{job, i, items[i], e->ns, e->off4k * kBlock, e->root};
            total += round_up(e->len);
            found.emplace_back(*e, std::move(w));
        }
        if (miss_hint) wake_keeper();
        std::stable_sort(found.begin(), found.end(), [](auto& a, auto& b) {
            return a.first.seg != b.first.seg ? a.first.seg < b.first.seg
                                              : a.second.off < b.second.off;
        });
        uint64_t limit = engine->merge_bytes(total, false);
        for (auto& [e, w] : found) {
            uint64_t pad = round_up(e.len);
            StoreGroup* g = groups.empty() ? nullptr : groups.back().get();
            if (!g || g->seg != e.seg || g->gen != e.gen || g->off + g->bytes != w.off ||
                g->bytes + pad > limit || g->items.size() >= kMaxParts) {
                g = groups.emplace_back(std::make_shared<StoreGroup>()).get();
                g->seg = e.seg;
                g->gen = e.gen;
                g->off = w.off;
                g->bytes = 0;
                g->bounce = !arena;
                job->groups.push_back(groups.back());
                ++g->seg->pins;
                ++reads_out;
            }
            g->bytes += pad;
            g->items.push_back(std::move(w));
        }
    }
    for (auto& g : groups) send(g, false);
}

int StoreImpl::prepare_get(StoreGroup& g, IoRequest& r) {
    int err = 0;
    if (!start_group(g, false)) return ECANCELED;
    if (!r.file) r.file = file_of(*g.seg, err);
    if (!r.file) return err;
    if (g.bounce) {
        r.bounce = engine->take_buffer(g.bytes);
        r.iov.push_back({r.bounce.data(), g.bytes});
        return 0;
    }
    uint64_t lost = 0;
    for (auto& w : g.items) {
        w.usable = !w.ended && w.job->arena &&
                   w.job->arena->state_of(w.it.slot, w.it.generation) == kFilling;
        if (!w.usable) lost = std::max(lost, w.it.nbytes);
    }
    // A slot that moved on is somebody else's memory: its extent is read past it.
    if (lost) r.bounce = engine->take_buffer(lost);
    for (auto& w : g.items) r.iov.push_back({w.usable ? w.it.data : r.bounce.data(), w.it.nbytes});
    return 0;
}

// Verifies one item's bytes; leaf hashes go to the arena where there is one.
uint8_t StoreImpl::check_read(StoreWork& w, const uint8_t* data, std::vector<uint64_t>& tmp) {
    uint64_t seed = seed_of(w.it.key.b);
    size_t count = leaf_count(w.it.nbytes);
    uint64_t* leaves = w.it.leaves;
    if (!leaves) {
        tmp.resize(count);
        leaves = tmp.data();
    }
    leaf_hashes(data, w.it.nbytes, seed, leaves);
    return root_of(leaves, count, seed) == w.root ? kOk : kCorrupt;
}

void StoreImpl::finish_get(StoreGroup& g, IoRequest& r, int err, size_t done) {
    std::vector<uint64_t> tmp;
    std::vector<uint8_t> results(g.items.size());
    if (g.bounce) {
        std::lock_guard lk(mu);
        touch_buffers(g);
    }
    // Another writer's segment may have been recycled under the read; ours is pinned.
    bool moved = !g.seg->own && err != ECANCELED && foreign_gen(*g.seg) != g.gen;
    for (size_t i = 0; i < g.items.size(); ++i) {
        StoreWork& w = g.items[i];
        if (w.ended) continue;
        uint64_t end = w.off - g.off + w.it.nbytes;
        const uint8_t* data = g.bounce ? r.bounce.data() + (w.off - g.off) : w.it.data;
        uint8_t res = kOk;
        if (err == ECANCELED || !w.usable || (g.bounce && !w.touched))
            res = kDropped;
        else if (moved)
            res = kMiss;
        else if (err || done < end)
            res = kIoError;
        else
            res = check_read(w, data, tmp);
        if (res == kOk && g.bounce) std::memcpy(w.it.data, data, w.it.nbytes);
        if (Arena* a = w.job->arena.get()) {
            if (res != kOk)
                a->fail(w.it.slot, w.it.generation);
            else if (!a->fill_done(w.it.slot, w.it.generation))
                res = kDropped;
        }
        results[i] = res;
    }
    std::lock_guard lk(mu);
    --g.seg->pins;
    if (!--reads_out && tidy_waits) tidy_cv.notify_one();
    if (!g.seg->own || g.seg->state == SegState::kFull) wake_keeper();
    done_cv.notify_all();  // the keeper may wait for the pin
    bool io = false;
    for (size_t i = 0; i < g.items.size(); ++i) {
        StoreWork& w = g.items[i];
        if (w.ended) continue;
        uint8_t res = results[i];
        io |= res == kIoError;
        // EIO may pass; bytes that are wrong, gone or cut off will not come back.
        if (res == kCorrupt || res == kMiss || (res == kIoError && (!err || err == ENOENT)))
            drop_entry(w.it.key, g.seg, g.gen, w.off);
        if (res == kCorrupt) ++n.corrupt;
        if (res == kMiss) ++n.misses;
        if (res == kOk) {
            ++n.hits;
            n.bytes_read += w.it.nbytes;
        }
        settle(w.job, w.index, res, res == kOk ? w.it.nbytes : 0);
    }
    if (g.bounce) untouch_buffers(g);
    if (io) ++n.io_errors;
}

void StoreImpl::drop_entry(const Key& key, const StoreSegment* seg, uint32_t gen, uint64_t off) {
    StoreEntry* e = index.find(key);
    if (e && e->seg == seg && e->gen == gen && e->off4k == off / kBlock) erase_entry(*e);
}

}  // namespace kvo::store
