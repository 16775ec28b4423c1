// Log-structured chunk store in one directory; format and protocol: docs/format.md.
//
// Thread rules: every method is safe from any thread. Submits (put*, get*), cancel, poll, contains,
// length, longest_prefix, remove, retain, stats and ls never do I/O and are O(items passed); the
// constructor, wait, flush, verify and close block. Work runs on native threads; no failure of
// theirs is ever an exception.
#pragma once
#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "arena.h"
#include "store_dir.h"
#include "store_format.h"

namespace kvo::store {

// Same numbers as kvoffload.types.StoreResult.
enum StoreResult : uint8_t {
    kOk = 0,
    kMiss = 1,
    kCorrupt = 2,
    kIoError = 3,
    kNoSpace = 4,
    kDropped = 5
};

struct StoreDone {
    int64_t job;
    int kind;  // 0 put, 1 get
    std::vector<uint8_t> results;
    uint64_t nbytes;
    int64_t ns;
};

// One key's memory: a slot of an arena, or a plain buffer of the caller's (alive until the job is
// done). Reads write to `data`, puts only read it.
struct StoreItem {
    Key key;
    uint8_t* data;
    uint64_t nbytes;
    uint64_t* leaves = nullptr;  // arena slots only
    uint32_t slot = 0;
    uint64_t generation = 0;
    uint32_t depth = 0;
};

struct ListedChunk {
    Key key;
    uint32_t ns, depth;
    uint64_t nbytes;
    uint32_t writer, seg;
    uint64_t seq;
};

struct VerifyReport {
    uint64_t checked = 0, bad = 0, bytes = 0, dropped = 0;
    double seconds = 0;
};

struct StoreImpl;

class SegmentStore {
  public:
    // Throws OsError (one line naming the path), std::invalid_argument.
    explicit SegmentStore(const StoreOptions& opt);
    ~SegmentStore();  // close()
    SegmentStore(const SegmentStore&) = delete;
    SegmentStore& operator=(const SegmentStore&) = delete;

    std::string path() const;
    std::string writer_dir() const;
    std::string io_engine() const;       // what runs: "uring" or "threads"
    std::string io_engine_note() const;  // why io_engine "auto" took threads; else empty

    // Throw std::invalid_argument on a job id in use or a closed store, OsError(EROFS) when read
    // only. `arena` is null for plain buffers. `deadline_ms` from now, 0 for none: what no engine
    // thread has started by then ends kDropped, at the latest when poll or wait is called.
    void put(int64_t job, std::shared_ptr<Arena> arena, std::vector<StoreItem> items, uint32_t ns,
             int64_t deadline_ms = 0);
    void get(int64_t job, std::shared_ptr<Arena> arena, std::vector<StoreItem> items,
             int64_t deadline_ms = 0);
    // Ends what of the job has not started (kDropped, no I/O); the number of its keys. The rest
    // ends as it would; 0 for a job that is done or unknown.
    size_t cancel(int64_t job);
    // Ends a job in plain buffers now, kDropped for what has no result, though its I/O goes on or
    // hangs: its buffers are not touched any more. At most a copy of bytes that have come is waited
    // for, by the job. What was being written may still be stored. A job in an arena ends as by
    // cancel. False for a job that is done or unknown.
    bool abandon(int64_t job);
    std::vector<StoreDone> poll();
    bool wait(int64_t job, int timeout_ms);
    bool wait_any(int timeout_ms);  // poll() has something; false: timeout, or no job is out

    void contains(std::span<const Key> keys, uint8_t* out);
    size_t longest_prefix(std::span<const Key> keys);  // leading keys held; stops at the first miss
    int64_t length(const Key& key);
    size_t remove(std::span<const Key> keys);
    // Keeps what of `keys` is held, in this writer's directory, from being recycled: `seconds` from
    // now at `level` 0 to 3, or pinned at level 4; 0 seconds end that. Kept as strongly as the
    // strongest asks. `owner`: who asks, 0 for nobody in particular. extended[i] becomes 1 where a
    // chunk was retained before, and for less. Bounded: beyond half of the store the lowest level,
    // then the earliest end, is given up. In memory only. Throws std::invalid_argument.
    void retain(std::span<const Key> keys, double seconds, unsigned level, uint64_t owner,
                uint8_t* extended);
    // out[i]: 1 where a chunk is pinned, or retained for others than `owner` (0: for anybody).
    void retained(std::span<const Key> keys, uint64_t owner, uint8_t* out);
    void retain_none();  // ends all of it
    uint64_t queued_bytes() const;
    bool flush(int timeout_ms);
    std::map<std::string, double> stats() const;
    std::vector<ListedChunk> ls(size_t limit) const;
    // `progress(done, total, bytes)` is called now and then; false from it stops early.
    VerifyReport verify(bool repair,
                        const std::function<bool(uint64_t, uint64_t, uint64_t)>& progress);
    void inject(const std::string& what, int every);
    void check() const;  // throws CheckError
    // True when all threads ended; false: something hangs, and what it holds stays alive with it.
    bool close(int timeout_ms);
    // Test hook: stop as a kill would, nothing flushed, journalled or sealed.
    void abandon();

  private:
    std::shared_ptr<StoreImpl> s_;
};

}  // namespace kvo::store
