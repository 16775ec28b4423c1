// Internals of SegmentStore, shared by store_surface.cpp, store.cpp (index), store_jobs.cpp (puts
// and gets), store_keeper.cpp (journals, seals, segments ahead of need), store_segments.cpp (taking
// segments), store_files.cpp, store_tidy.cpp (rescues, zeros), store_keep.cpp (what hints keep),
// store_cancel.cpp and store_recover.cpp. One mutex, `mu`; nothing holds it across I/O.
//
// A segment's life:  CLEAN -> OPEN -> FULL -> SEALED -> RECYCLING -> CLEAN
//   CLEAN      header with a fresh generation is durable, journal made; nothing in it
//   OPEN       extents are handed out
//   FULL       no more extents (no room, or a write failed); sealed when its writes are back
//   SEALED     footer written; or found so, or another writer's
//   RECYCLING  entries leave the index, then the header is rewritten
//   GONE       file removed or unusable
#pragma once
#include <array>
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <deque>
#include <map>
#include <memory>
#include <mutex>
#include <set>
#include <thread>
#include <tuple>
#include <unordered_map>
#include <vector>

#include "key_index.h"
#include "store.h"
#include "store_io.h"

namespace kvo::store {

using Clock = std::chrono::steady_clock;

enum class SegState : uint8_t { kClean, kOpen, kFull, kSealed, kRecycling, kGone };

struct StoreSegment {
    uint32_t writer = 0, id = 0, gen = 0;
    bool own = false;
    SegState state = SegState::kSealed;
    uint64_t bytes = 0;
    uint64_t tail = kBlock;       // next free byte; own, OPEN
    uint32_t reserved = 0;        // records promised: written, in flight and tombstones
    uint32_t pins = 0;            // reads and writes under way
    std::vector<Record> records;  // own and not sealed yet, in journal order
    size_t journalled = 0;        // of records
    bool journal_failed = false;
    bool lost = false;        // neither journal nor footer could be written
    std::vector<Key> keys;    // what to take out of the index when it goes
    int64_t mtime_ns = 0;     // other writers: to see changes cheaply
    bool sealed = false;      // the footer is on disk
    bool empty = false;       // nothing in it is worth keeping: recycled first
    bool unread = false;      // nobody knows what is in it: it could not be read at open
    uint64_t failed = 0;      // when it was tried last and could not be recycled; 0: not so
    unsigned failures = 0;    // how often in a row
    uint64_t retry_at = 0;    // in segments taken: not before
    uint64_t blank_from = 0;  // CLEAN: never written from here on; 0: all of it was
    bool zeroing = false;     // a write of zeros is under way
    uint32_t deletes = 0;     // delete records in it
    uint64_t hot_bytes = 0;   // payload of its entries that were read since written
    uint64_t hot_left = 0;    // of these, what the last rescue left behind
    uint64_t kept_bytes = 0;  // padded, of its entries that hints keep
    uint64_t kept_left = 0;   // of these, what the last rescue left behind
    uint32_t kept_chunks = 0;
    bool rescued = false;                // it is the next to go: what was worth it has moved
    FilePtr file, header_file, journal;  // under files_mu

    bool aside() const { return unread || failed; }  // goes when nothing else can
    uint64_t kept_todo() const { return kept_bytes > kept_left ? kept_bytes - kept_left : 0; }
};

// In StoreEntry::flags: read since it was written; kept by a hint.
inline constexpr uint8_t kHot = 1, kKept = 2;
inline constexpr unsigned kPinLevel = 4;    // above the priorities of retention, 0 to 3
inline constexpr uint64_t kLargeStore = 8;  // segments
inline constexpr auto kRescueStall = std::chrono::seconds(5);  // a rescue that hangs, by then
// The lifetime file and the one that replaces it, ours; a directory, a lock and a lifetime file for
// each of the next two openers.
inline constexpr uint64_t kSlack = 8 * kBlock;

// What hints ask for a chunk.
struct Keep {
    Clock::time_point end{};  // of retention; the epoch: it is only pinned
    uint64_t owner = 0;       // who asked for retention; 0: several
    uint32_t depth = 0;
    uint8_t level = 0;
    bool pinned = false;
};
// Of one level, least strong first: what ends first, and of a chain its leaf.
using KeepRow = std::tuple<Clock::time_point, uint32_t, Key>;  // end, minus depth

struct StoreGroup;

struct StoreJob {
    int64_t id;
    int kind;
    std::vector<uint8_t> results;
    size_t left;
    uint64_t nbytes = 0;
    Clock::time_point start;
    std::shared_ptr<Arena> arena;
    bool done = false;
    int64_t ns = 0;
    Clock::time_point deadline = Clock::time_point::max();
    bool given_up = false;   // cancelled, or the deadline has passed
    bool abandoned = false;  // it ends as soon as nobody copies from or to its buffers
    size_t touching = 0;     // items in plain buffers that engine threads copy right now
    std::vector<std::weak_ptr<StoreGroup>> groups;  // that hold items of it
};
using StoreJobPtr = std::shared_ptr<StoreJob>;

struct StoreWork {
    StoreJobPtr job;
    uint32_t index;  // in job->results
    StoreItem it;
    uint32_t ns = 0;
    // put: where it goes. get: the entry as it was at submit.
    uint64_t off = 0;
    uint64_t root = 0;
    bool usable = true;
    bool ended = false;    // settled before its request started: its memory is not ours any more
    bool touched = false;  // in a plain buffer, which this request's thread copies from or to
};

struct StoreGroup {  // one request: adjacent extents of one segment
    StoreSegment* seg;
    uint32_t gen;
    uint64_t off, bytes;  // bytes: padded
    bool bounce = false;
    std::vector<StoreWork> items;
    bool started = false;  // an engine thread prepares it: `ended` of its items stays as it is
};

struct StoreCounters {
    std::atomic<uint64_t> puts{0}, gets{0}, hits{0}, misses{0}, corrupt{0}, io_errors{0},
        no_space{0}, dropped{0}, bytes_written{0}, bytes_read{0}, recycled_segments{0},
        recovered_entries{0}, journal_bytes{0}, sealed_segments{0}, reinserted_chunks{0},
        reinserted_bytes{0}, segment_waits{0}, zeroed_bytes{0}, accepted_bytes{0}, retained_cut{0};
};

struct StoreImpl : std::enable_shared_from_this<StoreImpl> {
    explicit StoreImpl(const StoreOptions& opt);
    void start();
    void pick_engine();

    // -- store_jobs.cpp
    static bool is_live(const StoreEntry& e);  // mu held
    StoreEntry* find_live(const Key& key);     // mu held
    void submit_put(int64_t job, std::shared_ptr<Arena> arena, std::vector<StoreItem>& items,
                    uint32_t ns, int64_t deadline_ms);
    void submit_get(int64_t job, std::shared_ptr<Arena> arena, std::vector<StoreItem>& items,
                    int64_t deadline_ms);
    StoreJobPtr new_job(int64_t id, int kind, size_t n, std::shared_ptr<Arena> arena);
    void settle(const StoreJobPtr& job, uint32_t index, uint8_t result,
                uint64_t nbytes);          // mu held
    void end_job(const StoreJobPtr& job);  // mu held
    void place();                          // mu held
    void place_tombs();                    // mu held
    bool next_segment();                   // mu held
    void send(std::shared_ptr<StoreGroup> g, bool write);
    int prepare_put(StoreGroup& g, IoRequest& r);
    int gather_put(StoreGroup& g, IoRequest& r);
    void finish_put(StoreGroup& g, int err);
    void settle_put(StoreWork& w, uint8_t result, uint64_t nbytes);  // mu held
    void fail_queued_puts(uint8_t result);                           // mu held
    int prepare_get(StoreGroup& g, IoRequest& r);
    void finish_get(StoreGroup& g, IoRequest& r, int err, size_t done);
    uint8_t check_read(StoreWork& w, const uint8_t* data, std::vector<uint64_t>& tmp);
    void drop_entry(const Key& key, const StoreSegment* seg, uint32_t gen,
                    uint64_t off);  // mu held

    // -- store_cancel.cpp, mu held unless said
    static bool overdue(const StoreJob& job);
    void set_deadline(const StoreJobPtr& job, int64_t deadline_ms);
    void end_item(StoreWork& w, bool write);
    void drop_put(StoreWork& w);
    size_t give_up(const StoreJobPtr& job);       // number of items that ended
    void expire();                                // jobs whose deadline has passed
    bool start_group(StoreGroup& g, bool write);  // takes mu; false: nothing of it is left
    size_t cancel(int64_t id);                    // takes mu
    bool abandon(int64_t id);                     // takes mu
    void end_abandoned(const StoreJobPtr& job);
    void touch_buffers(StoreGroup& g);      // a request begins to copy from or to plain buffers,
    void untouch_buffers(StoreGroup& g);    // and is done with it
    bool wait(int64_t id, int timeout_ms);  // takes mu
    bool wait_any(int timeout_ms);          // takes mu

    // -- store.cpp, mu held unless said
    void publish(StoreSegment& seg, const Record& r);
    void unpublish(StoreSegment& seg, std::unique_lock<std::mutex>& lk);
    uint64_t next_seq();
    void append_record(StoreSegment& seg, Record r);
    void touch(StoreEntry& e);  // a get asked for it
    void cool(StoreEntry& e);   // it goes, or gets another place
    void erase_entry(StoreEntry& e);
    size_t remove(std::span<const Key> keys);
    void bury(const Key& key);  // tombstone
    VerifyReport verify(bool repair,
                        const std::function<bool(uint64_t, uint64_t, uint64_t)>& progress);
    int verify_one(const StoreEntry& e, AlignedBuf& buf);  // no lock
    void check() const;
    uint64_t index_bytes() const;
    void hint_miss();  // another writer may have it: the keeper looks

    // -- store_keep.cpp, mu held
    void retain(std::span<const Key> keys, double seconds, unsigned level, uint64_t owner,
                uint8_t* extended);
    bool retained(const StoreEntry& e, uint64_t owner) const;
    void retain_none();
    static KeepRow row_of(const Key& key, const Keep& k);
    std::set<KeepRow>& rows_of(const Keep& k);
    void weigh_kept(const StoreEntry& e, bool in);
    bool keep_one(StoreEntry& e, const Keep& want);
    void end_keep(StoreEntry& e, bool pin);
    void unkeep(StoreEntry& e);
    void purge_kept(size_t most);
    void limit_kept();
    void set_kept_limit();
    void plan_rescue(uint64_t next = 0);
    bool can_grow();
    uint64_t room(uint64_t more);
    bool fits(uint64_t bytes) const;
    void check_kept() const;

    // -- store_keeper.cpp
    void keeper();
    bool await_rescue();
    bool keeper_step(std::unique_lock<std::mutex>& lk);  // false: nothing to do now
    size_t ahead_target();
    bool want_ahead();
    size_t unsealed() const;  // segments that are full
    void close_open();        // mu held
    void recover();
    void seal_recovered(StoreSegment& seg);
    void load(uint32_t writer, WriterScan& scan, std::unique_lock<std::mutex>& lk);
    void load_segment(uint32_t writer, SegmentScan& s, std::unique_lock<std::mutex>& lk);
    StoreSegment* find_segment(uint32_t writer, uint32_t id);
    void refresh(std::unique_lock<std::mutex>& lk);
    void shrink(std::unique_lock<std::mutex>& lk);
    void write_journal(StoreSegment& seg, std::unique_lock<std::mutex>& lk);
    void write_journals(std::unique_lock<std::mutex>& lk);
    void seal(StoreSegment& seg, std::unique_lock<std::mutex>& lk);
    int write_footer(StoreSegment& seg, const std::vector<Record>& recs, uint64_t off,
                     uint64_t trailer_off);
    // 0: one more is clean. EAGAIN: its hot chunks come first. Else another errno.
    int take_segment(std::unique_lock<std::mutex>& lk);
    int make_room(std::unique_lock<std::mutex>& lk);
    int create_segment(std::unique_lock<std::mutex>& lk);
    int recycle(StoreSegment& seg, std::unique_lock<std::mutex>& lk);
    int make_clean(StoreSegment& seg, uint64_t gen);  // header + journal
    void drop_segment(StoreSegment& seg, std::unique_lock<std::mutex>& lk);
    int remove_segment(StoreSegment& seg, std::unique_lock<std::mutex>& lk);
    StoreSegment* next_victim(bool in_use = false);  // what to recycle next, or (`in_use`) once
                                                     // nobody reads it; null: nothing can be
    uint32_t oldest_gen() const;
    StoreSegment* last_resort();
    StoreSegment* second_chance();
    void set_aside(StoreSegment& seg);
    bool in_use();
    bool emptied_in_use();
    StoreSegment* sealable();
    void drain_keeper(std::unique_lock<std::mutex>& lk);
    void sync_unsealed(StoreSegment& seg, std::unique_lock<std::mutex>& lk);

    // -- store_tidy.cpp
    void tidy();
    bool tidy_pending();  // mu held, as the next two
    void earn_rescue(uint64_t written);
    StoreSegment* rescuable();  // whose kept and hot chunks should be written again now
    void rescue(StoreSegment& from, std::unique_lock<std::mutex>& lk);
    bool rescue_all(StoreSegment& from, uint8_t mark, AlignedBuf& buf,
                    std::unique_lock<std::mutex>& lk);
    bool rescue_one(StoreSegment& from, const Key& key, uint8_t mark, AlignedBuf& buf,
                    std::unique_lock<std::mutex>& lk);  // false: no place to write to
    bool rewrite(const Key& key, const StoreEntry& e, bool kept, AlignedBuf& buf,
                 std::unique_lock<std::mutex>& lk);
    bool is_at(const Key& key, const StoreEntry& e);
    bool rescue_place(uint64_t pad, bool kept, std::unique_lock<std::mutex>& lk);
    StoreSegment* blank();  // a clean segment to be written over
    void zero_piece(StoreSegment& seg, const AlignedBuf& zeros, std::unique_lock<std::mutex>& lk);
    std::vector<Key> marked_keys(const StoreSegment& seg, uint8_t mark,
                                 std::unique_lock<std::mutex>& lk);

    // -- store_files.cpp
    FilePtr file_of(StoreSegment& seg, int& err);
    FilePtr file_if_open(StoreSegment& seg);  // never waits
    void remember_open(StoreSegment& seg);    // files_mu held; closes what is open longest
    uint64_t foreign_gen(StoreSegment& seg);  // 0: unreadable

    // -- store_keeper.cpp
    bool flush(int timeout_ms);
    bool place_all_tombs(std::unique_lock<std::mutex>& lk, Clock::time_point until);
    bool close(int timeout_ms, bool kill);
    void release();
    void wake_keeper() { keeper_cv.notify_one(); }

    StoreOptions opt;
    StoreDir dir;
    std::shared_ptr<Faults> faults = std::make_shared<Faults>();
    std::shared_ptr<IoEngine> engine;
    std::string engine_note;  // why it is not io_uring, where that was asked for or would be used
    StoreCounters n;

    mutable std::mutex mu;
    std::condition_variable job_cv;  // a job is done: for who waits for jobs
    std::condition_variable done_cv, keeper_cv, keeper_gone_cv, tidy_cv;
    KeyIndex index;
    std::unordered_map<Key, uint64_t, KeyHash> tombs;     // seq of the newest delete
    std::vector<std::unique_ptr<StoreSegment>> segments;  // never shrinks: pointers stay valid
    StoreSegment* open = nullptr;
    std::deque<StoreSegment*> clean;   // in order of generation, which is that of filling
    StoreSegment* rescuing = nullptr;  // pinned; the tidy thread writes its hot chunks again
    uint64_t rescue_credit = 0;        // bytes of hot chunks it may write
    Clock::time_point rescue_moved{};  // when it last got on
    bool hurry = false;                // puts wait for it: kept chunks only, no pauses
    std::unordered_map<Key, Keep, KeyHash> keeps;  // of live entries of ours, which are marked
    std::array<std::set<KeepRow>, kPinLevel + 1> keep_rows;  // of them, by level
    uint64_t kept_bytes = 0, kept_limit = 0;                 // padded
    uint64_t promised = 0, promised_records = 0;             // of the open segment, to the rescue
    bool plan_stale = false;                                 // the promise may be wrong
    bool held_back = false;                                  // puts or deletes wait for it
    uint64_t reads_out = 0, writes_out = 0;                  // requests at the engine
    uint64_t payload_bytes = 0;                              // of all entries

    std::unordered_map<int64_t, StoreJobPtr> jobs;
    std::vector<StoreJobPtr> finished;
    std::deque<StoreWork> put_queue;  // not placed yet
    std::deque<Record> tomb_queue;    // deletes that wait for a segment
    uint64_t tombs_failed = 0;        // how often there was none for them
    std::unordered_map<Key, std::vector<StoreWork>, KeyHash>
        pending;                     // key -> puts that wait for the same
    std::set<uint64_t> put_tickets;  // jobs not settled, in order of submission
    std::unordered_map<const StoreJob*, uint64_t> ticket_of;
    uint64_t last_ticket = 0;
    std::multimap<Clock::time_point, std::weak_ptr<StoreJob>> deadlines;
    uint64_t queued = 0;  // payload bytes of puts not settled
    uint64_t records_added = 0, records_journalled = 0;
    bool need_segment = false, miss_hint = false, stop_keeper = false, keeper_alive = false;
    bool closed = false;   // no new jobs
    bool discard = false;  // queued work is given up; nothing more is sent to the engine
    bool killed = false;   // abandon(): nothing more is written at all
    bool released = false;
    bool stop_tidy = false, tidy_alive = false;
    bool tidy_waits = false;  // for the engine to be idle
    unsigned flush_waiters = 0;
    const StoreSegment* ahead_tried = nullptr;  // taking one ahead failed while this one was open
    Clock::time_point last_refresh{}, oldest_unwritten{};
    uint64_t last_gen = 0, last_seq = 0, last_id = 0, charged = 0, last_failed = 0, taken = 0;
    double recover_ms = 0;
    std::thread keeper_thread, tidy_thread;

    std::mutex files_mu;
    std::deque<StoreSegment*> open_files;  // in order of opening
};

}  // namespace kvo::store
