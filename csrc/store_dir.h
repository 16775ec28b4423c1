// The store's directory: path checks, MANIFEST, locks, the byte count, and reading what is there.
//
// Layout: <path>/MANIFEST, <path>/w<id>/{LOCK, seg-NNNNN.kv, journal-<epoch>}; more in
// docs/format.md. Nothing is created or changed before every check has passed. Files are 0600,
// directories 0700, all owned by us.
#pragma once
#include <sys/stat.h>

#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "store_format.h"
#include "store_io.h"

namespace kvo::store {

// Room kept for all that is neither segment nor journal: MANIFEST, directories, locks, files of
// totals and names.
constexpr uint64_t kSmallFiles = 16 * kBlock;

struct StoreOptions {
    std::string path;
    // 0: what the MANIFEST says (at creation half of the free space), or what is there already.
    uint64_t max_bytes = 0;
    uint64_t segment_bytes = 0;  // 0: 256 MiB, less where max_bytes is small
    unsigned threads = 4;
    uint64_t queue_bytes = 256 << 20;
    bool direct = true;
    bool read_only = false;
    std::string io_engine = "auto";  // auto, uring, threads
};

class Fd {
  public:
    explicit Fd(int fd = -1) : fd_(fd) {}
    ~Fd();
    Fd(Fd&& o) noexcept : fd_(o.fd_) { o.fd_ = -1; }
    Fd& operator=(Fd&& o) noexcept {
        std::swap(fd_, o.fd_);
        return *this;
    }
    int get() const { return fd_; }
    explicit operator bool() const { return fd_ >= 0; }

  private:
    int fd_;
};

// flock on the store's directory: held while a segment is taken or a writer id is chosen.
class PathLock {
  public:
    PathLock(int dirfd, int timeout_ms);
    ~PathLock();
    bool held() const { return held_; }

  private:
    int fd_;
    bool held_ = false;
};

// What a file says about one segment. gen 0: the header is not usable, or could not be read.
struct SegmentScan {
    uint32_t id = 0;
    bool absent = false;  // gone, or no file of ours: no segment
    bool unread = false;  // it, or its journal, could not be read: nobody knows what it holds
    uint64_t gen = 0, bytes = 0;
    int64_t mtime_ns = 0;
    bool sealed = false;          // the footer is valid; else records come from journals
    std::vector<Record> records;  // all valid, in file order
};
struct WriterScan {
    std::vector<SegmentScan> segments;
    std::vector<uint64_t> journals;  // epochs of the journal files found
    uint64_t max_gen = 0, max_seq = 0;
    uint32_t max_id = 0;
    uint64_t read_errors = 0;
    // Whether a segment that could not be read may need that journal.
    bool needs(uint64_t epoch) const;
    int list_error = 0;  // the directory could not be listed: what is not named may be there
};

class StoreDir {
  public:
    // Throws OsError (one line naming the path), std::invalid_argument.
    explicit StoreDir(const StoreOptions& opt);

    const std::string& path() const { return path_; }
    std::string writer_path() const;
    int fd() const { return root_.get(); }
    int writer_fd() const { return own_.get(); }
    int writer() const { return writer_; }  // -1: read only
    const Uuid& uuid() const { return manifest_.uuid; }
    uint64_t max_bytes() const { return max_bytes_; }
    uint64_t segment_bytes() const { return segment_bytes_; }
    uint64_t segments_that_fit() const;  // below max_bytes, if all is ours

    int writers(
        std::vector<uint32_t>& out) const;  // ids of all w<id> directories, sorted; an errno
    Fd open_writer(uint32_t id) const;      // checked: ours, 0700, no symlink
    // Bytes of everything under the path, room for each writer's journals included. An errno where
    // not all of it could be seen: `total` is then too small to be held against the bound.
    int charged_bytes(uint64_t& total) const;
    // A writer that was given no bound knows only the MANIFEST's, of the store's creation. What is
    // there beyond it others were told to keep: it becomes the bound. The lock of whoever calls
    // guards max_bytes().
    void allow(uint64_t used);
    // Reads a writer's directory. `known` (by segment id): segments whose size, time and generation
    // did not change come back with empty records. Never throws for what files hold.
    WriterScan scan(uint32_t id, Faults& faults,
                    const std::map<uint32_t, SegmentScan>* known = nullptr) const;
    // Unlinks the oldest segment of a writer nobody runs, when it is older than `than_ns` (unix
    // ns). The caller holds the path lock. True and which one when something was freed.
    bool reclaim_dead(int64_t than_ns, uint32_t& writer, uint32_t& seg) const;
    void release();  // gives up the writer's lock

  private:
    void open_root(const StoreOptions& opt);
    void open_manifest(const StoreOptions& opt);
    void create_manifest(const StoreOptions& opt);
    void pick_writer();
    void size_up(const StoreOptions& opt);
    int charge_writer(const std::string& name, uint64_t& total) const;
    [[noreturn]] void refuse(int err, const std::string& why) const;

    std::string path_;
    Fd root_, own_, lock_;
    int writer_ = -1;
    Manifest manifest_;
    uint64_t max_bytes_ = 0, segment_bytes_ = 0;
    bool bounded_ = true;  // by the opener, or it takes nothing
};

std::string segment_name(uint32_t id);
std::string journal_name(uint64_t epoch);
uint64_t auto_segment_bytes(uint64_t max_bytes);
int64_t unix_ns();

int sync_names(int dirfd);  // makes creations and removals in a directory durable; an errno

// Shared with store_scan.cpp. An errno where the listing is not complete.
int each_entry(int dirfd, const std::function<void(const std::string&)>& fn);
// The number between prefix and suffix; nothing unless it is written as we write it.
std::optional<uint64_t> number_in(const std::string& name, const std::string& prefix,
                                  const std::string& suffix, size_t min_digits);
int64_t mtime_of(const struct stat& st);

}  // namespace kvo::store
