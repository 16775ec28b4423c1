// SegmentStore: the store's surface. Locks, and asks StoreImpl.
#include <algorithm>
#include <cstring>

#include "errors.h"
#include "store.h"
#include "store_impl.h"

namespace kvo::store {

namespace {
void use_arena(IoEngine& engine, const std::shared_ptr<Arena>& arena) {
    if (arena) engine.use_region({arena, arena->data(), arena->data_bytes()});
}
}  // namespace

SegmentStore::SegmentStore(const StoreOptions& opt) : s_(std::make_shared<StoreImpl>(opt)) {
    s_->start();
}
SegmentStore::~SegmentStore() {
    s_->close(5000, false);
}

std::string SegmentStore::path() const {
    return s_->dir.path();
}
std::string SegmentStore::writer_dir() const {
    return s_->dir.writer_path();
}

std::string SegmentStore::io_engine() const {
    return s_->engine->name();
}
std::string SegmentStore::io_engine_note() const {
    return s_->engine_note;
}

void SegmentStore::put(int64_t job, std::shared_ptr<Arena> arena, std::vector<StoreItem> items,
                       uint32_t ns, int64_t deadline_ms) {
    use_arena(*s_->engine, arena);
    s_->submit_put(job, std::move(arena), items, ns, deadline_ms);
}
void SegmentStore::get(int64_t job, std::shared_ptr<Arena> arena, std::vector<StoreItem> items,
                       int64_t deadline_ms) {
    use_arena(*s_->engine, arena);
    s_->submit_get(job, std::move(arena), items, deadline_ms);
}
size_t SegmentStore::cancel(int64_t job) {
    return s_->cancel(job);
}
bool SegmentStore::abandon(int64_t job) {
    return s_->abandon(job);
}

std::vector<StoreDone> SegmentStore::poll() {
    std::lock_guard lk(s_->mu);
    s_->expire();
    std::vector<StoreDone> out;
    for (auto& j : s_->finished) {
        out.push_back({j->id, j->kind, j->results, j->nbytes, j->ns});
        s_->jobs.erase(j->id);
    }
    s_->finished.clear();
    return out;
}

bool SegmentStore::wait(int64_t id, int timeout_ms) {
    return s_->wait(id, timeout_ms);
}
bool SegmentStore::wait_any(int timeout_ms) {
    return s_->wait_any(timeout_ms);
}

void SegmentStore::contains(std::span<const Key> keys, uint8_t* out) {
    std::lock_guard lk(s_->mu);
    bool missed = false;
    s_->index.each_of(keys, [&](size_t i, const StoreEntry* e) {
        out[i] = !s_->closed && e && StoreImpl::is_live(*e);
        missed |= !out[i];
        return true;
    });
    if (missed) s_->hint_miss();
}

size_t SegmentStore::longest_prefix(std::span<const Key> keys) {
    std::lock_guard lk(s_->mu);
    size_t held = s_->closed ? 0 : s_->index.longest_prefix(keys, StoreImpl::is_live);
    if (held < keys.size()) s_->hint_miss();
    return held;
}

int64_t SegmentStore::length(const Key& key) {
    std::lock_guard lk(s_->mu);
    StoreEntry* e = s_->find_live(key);
    return e && !s_->closed ? int64_t(e->len) : -1;
}

size_t SegmentStore::remove(std::span<const Key> keys) {
    std::lock_guard lk(s_->mu);
    if (s_->closed) throw std::invalid_argument("store is closed");
    if (s_->opt.read_only) throw OsError(EROFS, "chunk store " + s_->dir.path() + ": read only");
    return s_->remove(keys);
}

void SegmentStore::retain(std::span<const Key> keys, double seconds, unsigned level, uint64_t owner,
                          uint8_t* extended) {
    if (!(seconds >= 0)) throw std::invalid_argument("seconds must be 0 or more");
    if (level > kPinLevel) throw std::invalid_argument("level must be 0 to 4");
    std::lock_guard lk(s_->mu);
    std::fill_n(extended, keys.size(), uint8_t(0));
    if (!s_->closed && !s_->opt.read_only) s_->retain(keys, seconds, level, owner, extended);
}

void SegmentStore::retained(std::span<const Key> keys, uint64_t owner, uint8_t* out) {
    std::lock_guard lk(s_->mu);
    s_->index.each_of(keys, [&](size_t i, const StoreEntry* e) {
        out[i] = !s_->closed && e && StoreImpl::is_live(*e) && s_->retained(*e, owner);
        return true;
    });
}

void SegmentStore::retain_none() {
    std::lock_guard lk(s_->mu);
    s_->retain_none();
}

uint64_t SegmentStore::queued_bytes() const {
    std::lock_guard lk(s_->mu);
    return s_->queued;
}

bool SegmentStore::flush(int timeout_ms) {
    return s_->flush(timeout_ms);
}

std::map<std::string, double> SegmentStore::stats() const {
    std::lock_guard lk(s_->mu);
    const StoreCounters& n = s_->n;
    uint64_t count = 0;
    EngineStats io = s_->engine->stats();
    std::set<uint32_t> writers;
    for (auto& s : s_->segments) {
        if (s->state == SegState::kGone) continue;
        ++count;
        writers.insert(s->writer);
    }
    return {{"entries", double(s_->index.size())},
            {"payload_bytes", double(s_->payload_bytes)},
            {"index_bytes", double(s_->index_bytes())},
            {"bytes_used", double(s_->charged)},
            {"bytes_max", double(s_->dir.max_bytes())},
            {"segment_bytes", double(s_->dir.segment_bytes())},
            {"segments", double(count)},
            {"writers", double(writers.size())},
            {"puts", double(n.puts)},
            {"gets", double(n.gets)},
            {"hits", double(n.hits)},
            {"misses", double(n.misses)},
            {"corrupt", double(n.corrupt)},
            {"io_errors", double(n.io_errors)},
            {"no_space", double(n.no_space)},
            {"dropped", double(n.dropped)},
            {"bytes_written", double(n.bytes_written)},
            {"accepted_bytes", double(n.accepted_bytes)},
            {"bytes_read", double(n.bytes_read)},
            {"journal_bytes", double(n.journal_bytes)},
            {"sealed_segments", double(n.sealed_segments)},
            {"recycled_segments", double(n.recycled_segments)},
            {"clean_segments", double(s_->clean.size())},
            {"tidy_pending", double(s_->tidy_pending())},
            {"segment_waits", double(n.segment_waits)},
            {"zeroed_bytes", double(n.zeroed_bytes)},
            {"reinserted_chunks", double(n.reinserted_chunks)},
            {"reinserted_bytes", double(n.reinserted_bytes)},
            {"retained_chunks", double(s_->keeps.size())},
            {"retained_bytes", double(s_->kept_bytes)},
            {"retained_max", double(s_->kept_limit)},
            {"retained_cut", double(n.retained_cut)},
            {"recovered_entries", double(n.recovered_entries)},
            {"recover_ms", s_->recover_ms},
            {"queued_bytes", double(s_->queued)},
            {"uring", double(s_->engine->name() == std::string_view("uring"))},
            {"fixed_bytes", double(io.fixed_bytes)},
            {"registered_bytes", double(io.registered_bytes)},
            {"register_errors", double(io.register_errors)}};
}

std::vector<ListedChunk> SegmentStore::ls(size_t limit) const {
    std::vector<ListedChunk> out;
    {
        std::lock_guard lk(s_->mu);
        out.reserve(s_->index.size());
        s_->index.each([&](const StoreEntry& e) {
            out.push_back({e.key, e.ns, e.depth, e.len, e.seg->writer, e.seg->id, e.seq});
        });
    }
    size_t keep = limit ? std::min(limit, out.size()) : out.size();
    std::partial_sort(out.begin(), out.begin() + ptrdiff_t(keep), out.end(),
                      [](auto& a, auto& b) { return a.seq > b.seq; });
    out.resize(keep);
    return out;
}

VerifyReport SegmentStore::verify(
    bool repair, const std::function<bool(uint64_t, uint64_t, uint64_t)>& progress) {
    return s_->verify(repair, progress);
}
void SegmentStore::inject(const std::string& what, int every) {
    s_->faults->set(what, every);
}
void SegmentStore::check() const {
    s_->check();
}
bool SegmentStore::close(int timeout_ms) {
    return s_->close(timeout_ms, false);
}
void SegmentStore::abandon() {
    s_->close(1000, true);
}

}  // namespace kvo::store
