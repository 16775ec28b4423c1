// Internals of SegmentStore, shared by store.cpp (surface), store_jobs.cpp (puts and gets) and
// store_keeper.cpp (segments, journals, recovery). One mutex, `mu`; nothing holds it across I/O.
//
// A segment's life:  CLEAN -> OPEN -> FULL -> SEALED -> RECYCLING -> CLEAN
//   CLEAN      header with a fresh generation is durable, journal made; nothing in it
//   OPEN       extents are handed out
//   FULL       no more extents (no room, or a write failed); sealed when its writes are back
//   SEALED     footer written; or found so, or another writer's
//   RECYCLING  entries leave the index, then the header is rewritten
//   GONE       file removed or unusable
#pragma once
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <deque>
#include <memory>
#include <mutex>
#include <set>
#include <thread>
#include <unordered_map>
#include <unordered_set>
#include <vector>

#include "store.h"
#include "store_io.h"

namespace kvo {

using Clock = std::chrono::steady_clock;

enum class SegState : uint8_t { kClean, kOpen, kFull, kSealed, kRecycling, kGone };

struct Segment {
  uint32_t writer = 0, id = 0, gen = 0;
  bool own = false;
  SegState state = SegState::kSealed;
  uint64_t bytes = 0;
  uint64_t tail = kBlock;   // next free byte; own, OPEN
  uint32_t reserved = 0;    // records promised: written, in flight and tombstones
  uint32_t pins = 0;        // reads and writes under way
  std::vector<Record> records;  // own and not sealed yet, in journal order
  size_t journalled = 0;        // of records
  bool journal_failed = false;
  std::vector<Key> keys;    // what to take out of the index when it goes
  int64_t mtime_ns = 0;     // other writers: to see changes cheaply
  uint64_t seen_records = 0;  // other writers, not sealed: journal records published
  bool sealed_scan = false;
  FilePtr file, header_file, journal;  // under files_mu
};

struct Entry {
  Segment *seg;
  uint64_t root, seq;
  uint32_t gen, off4k, len, ns, depth;
  bool verified;
};

struct Job {
  int64_t id;
  int kind;
  std::vector<uint8_t> results;
  size_t left;
  uint64_t nbytes = 0;
  Clock::time_point start;
  std::shared_ptr<Arena> arena;
  bool done = false;
  int64_t ns = 0;
};
using JobPtr = std::shared_ptr<Job>;

struct WorkItem {
  JobPtr job;
  uint32_t index;  // in job->results
  StoreItem it;
  uint32_t ns = 0;
  // put: where it goes. get: the entry as it was at submit.
  uint64_t off = 0;
  uint64_t root = 0;
  bool usable = true;
};

struct Group {  // one request: adjacent extents of one segment
  Segment *seg;
  uint32_t gen;
  uint64_t off, bytes;  // bytes: padded
  bool bounce;
  std::vector<WorkItem> items;
};

struct Counters {
  std::atomic<uint64_t> puts{0}, gets{0}, hits{0}, misses{0}, corrupt{0}, io_errors{0}, no_space{0},
      dropped{0}, bytes_written{0}, bytes_read{0}, recycled_segments{0}, recovered_entries{0},
      journal_bytes{0}, sealed_segments{0};
};

struct StoreImpl : std::enable_shared_from_this<StoreImpl> {
  explicit StoreImpl(const StoreOptions &opt);
  void start();

  // -- store_jobs.cpp
  void submit_put(int64_t job, std::shared_ptr<Arena> arena, std::vector<StoreItem> &items,
                  uint32_t ns);
  void submit_get(int64_t job, std::shared_ptr<Arena> arena, std::vector<StoreItem> &items);
  JobPtr new_job(int64_t id, int kind, size_t n, std::shared_ptr<Arena> arena);
  void settle(const JobPtr &job, uint32_t index, uint8_t result, uint64_t nbytes);  // mu held
  void place();                                                                     // mu held
  void send_put(std::shared_ptr<Group> g);                                          // mu held
  int prepare_put(Group &g, IoRequest &r);
  void finish_put(Group &g, int err);
  void settle_put(WorkItem &w, uint8_t result);     // mu held
  void fail_queued_puts(uint8_t result);            // mu held
  void send_get(std::shared_ptr<Group> g);
  int prepare_get(Group &g, IoRequest &r);
  void finish_get(Group &g, IoRequest &r, int err, size_t done);
  uint8_t check_read(const WorkItem &w, const uint8_t *data, size_t have, std::vector<uint64_t> &tmp);
  void drop_entry(const Key &key, const Segment *seg, uint32_t gen, uint64_t off);  // mu held

  // -- index (store.cpp), mu held
  void publish(Segment &seg, const Record &r);
  void unpublish(Segment &seg, std::unique_lock<std::mutex> &lk);
  uint64_t next_seq();
  void append_record(Segment &seg, Record r);
  size_t remove(std::span<const Key> keys);
  VerifyReport verify(bool repair, const std::function<bool(uint64_t, uint64_t, uint64_t)> &progress);
  uint8_t verify_one(const Key &key, Entry &e, AlignedBuf &buf);
  void check() const;

  // -- store_keeper.cpp
  void keeper();
  void recover();
  void seal_recovered(Segment &seg);
  void load(uint32_t writer, bool own, WriterScan &&scan);
  void refresh();
  void shrink();
  bool write_journal(Segment &seg, std::unique_lock<std::mutex> &lk);
  bool write_journals(std::unique_lock<std::mutex> &lk);
  int seal(Segment &seg, std::unique_lock<std::mutex> &lk);
  int write_footer(Segment &seg, const std::vector<Record> &recs, uint64_t records_off, bool last);
  int take_segment(std::unique_lock<std::mutex> &lk);  // 0, or an errno
  int create_segment(std::unique_lock<std::mutex> &lk);
  int recycle(Segment &seg, std::unique_lock<std::mutex> &lk);
  int make_clean(Segment &seg, uint64_t gen);  // header + journal
  void remove_segment(Segment &seg, std::unique_lock<std::mutex> &lk);
  Segment *oldest_own(bool unpinned);
  Segment *sealable();
  void drain_keeper(std::unique_lock<std::mutex> &lk);
  FilePtr file_of(Segment &seg, int &err);
  uint64_t foreign_gen(Segment &seg);  // 0: unreadable
  bool flush(int timeout_ms);
  bool close(int timeout_ms, bool discard);
  void wake_keeper() { keeper_cv.notify_one(); }

  StoreOptions opt;
  StoreDir dir;
  std::shared_ptr<Faults> faults = std::make_shared<Faults>();
  std::shared_ptr<IoEngine> engine;
  Counters n;

  mutable std::mutex mu;
  std::condition_variable done_cv, keeper_cv, keeper_gone_cv;
  std::unordered_map<Key, Entry, KeyHash> index;
  std::unordered_map<Key, uint64_t, KeyHash> tombs;  // seq of the newest delete
  std::vector<std::unique_ptr<Segment>> segments;    // never shrinks: pointers stay valid
  std::vector<std::unique_ptr<Segment>> retired;     // GONE
  Segment *open = nullptr, *clean = nullptr;
  uint64_t payload_bytes = 0;  // of all entries

  std::unordered_map<int64_t, JobPtr> jobs;
  std::vector<JobPtr> finished;
  std::deque<WorkItem> put_queue;  // not placed yet
  std::unordered_map<Key, std::vector<WorkItem>, KeyHash> pending;  // key -> puts that wait for the same
  std::set<uint64_t> put_tickets;  // jobs not settled, in order of submission
  std::unordered_map<const Job *, uint64_t> ticket_of;
  uint64_t last_ticket = 0;
  uint64_t queued = 0, puts_in_flight = 0;
  uint64_t records_added = 0, records_journalled = 0, journal_failures = 0;
  bool need_segment = false, miss_hint = false, closed = false, discard = false, stop_keeper = false;
  bool keeper_alive = false;
  Clock::time_point last_refresh{}, oldest_unwritten{};
  uint64_t last_gen = 0, last_seq = 0, last_id = 0, charged = 0;
  double recover_ms = 0;
  std::thread keeper_thread;

  std::mutex files_mu;
  std::deque<Segment *> open_files;  // in order of opening
};

}  // namespace kvo
