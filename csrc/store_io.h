// I/O seam of the chunk store: files, fault injection, and the engine that runs requests.
//
// Everything the store reads or writes goes through here, so that injected faults reach all of it.
// Nothing here knows the format. All functions return errno values and never throw for I/O errors.
#pragma once
#include <sys/uio.h>

#include <atomic>
#include <cstdint>
#include <functional>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

namespace kvo::store {

// Test hooks. "every n-th" counters; 0 is off. `hang_read` blocks reads until it is 0 again.
struct Faults {
    std::atomic<int> read_eio{0}, write_eio{0}, enospc{0}, short_read{0}, slow_read_ms{0},
        hang_read{0}, flip_read{0};
    std::atomic<uint64_t> reads{0}, writes{0};
    std::atomic<uint64_t> bad_inode{0};  // transfers of that file fail; set by native tests
    // Throws std::invalid_argument on an unknown name.
    void set(const std::string& what, int every);
};

// An open descriptor. Closed with the last reference, so a hung thread keeps its own file alive.
class File {
  public:
    File(int fd, bool direct) : fd_(fd), direct_(direct) {}
    ~File();
    File(const File&) = delete;
    File& operator=(const File&) = delete;
    int fd() const { return fd_; }
    bool direct() const { return direct_.load(std::memory_order_relaxed); }
    // Some file systems accept O_DIRECT at open and refuse it at the first transfer. True when the
    // flag is gone, whoever took it away: several transfers may be refused at once.
    bool drop_direct();

  private:
    int fd_;
    std::atomic<bool> direct_;
};
using FilePtr = std::shared_ptr<File>;

// openat with O_NOFOLLOW|O_CLOEXEC|O_NONBLOCK; refuses what is not a regular file of ours (EPERM).
// O_DIRECT is dropped where the file system refuses it. Returns null and sets err.
FilePtr open_file(int dirfd, const char* name, int flags, bool direct, int& err);

// 4 KiB-aligned memory.
class AlignedBuf {
  public:
    explicit AlignedBuf(size_t n = 0);
    ~AlignedBuf();
    AlignedBuf(AlignedBuf&& o) noexcept : p_(o.p_), n_(o.n_) { o.p_ = nullptr, o.n_ = 0; }
    AlignedBuf& operator=(AlignedBuf&& o) noexcept;
    uint8_t* data() const { return p_; }
    size_t size() const { return n_; }

  private:
    uint8_t* p_ = nullptr;
    size_t n_ = 0;
};

// Buffers are kept after use: the first touch of fresh pages costs more than the copy into them.
class BufferPool {
  public:
    AlignedBuf take(size_t n);
    void give(AlignedBuf b);

  private:
    std::mutex mu_;
    std::vector<AlignedBuf> free_;
};

// Transfers until done, end of file (done < wanted, result 0) or error (errno).
int read_full(const File& f, const iovec* iov, size_t n, uint64_t off, Faults& faults,
              size_t& done);
int write_full(File& f, const iovec* iov, size_t n, uint64_t off, Faults& faults);
int read_full(const File& f, void* p, size_t n, uint64_t off, Faults& faults, size_t& done);
int write_full(File& f, const void* p, size_t n, uint64_t off, Faults& faults);
int sync_data(const File& f);

// What the injected faults want of one transfer. Counts it; never waits.
struct Fault {
    int err = 0;
    bool halve = false;  // report half of what was read
    int slow_ms = 0;
    bool hang = false;  // until Faults::hang_read is 0 again
    bool flip = false;  // one bit of every piece that was read
};
// What a disk that lies does: one bit of every piece is wrong.
void flip_bits(const iovec* iov, size_t n);
Fault read_fault(Faults& faults);
int write_fault(Faults& faults);

// Memory that many requests use, for as long as `owner` lives: an arena.
struct IoRegion {
    std::shared_ptr<const void> owner;
    uint8_t* data = nullptr;
    uint64_t bytes = 0;
};

struct IoRequest {
    bool write = false;
    uint64_t offset = 0;
    uint64_t bytes = 0;      // about how much it moves, known before prepare
    FilePtr file;            // set by prepare at the latest
    std::vector<iovec> iov;  // set by prepare at the latest
    AlignedBuf bounce;       // taken from the engine's pool by prepare, given back after finish
    // Bytes that prepare and finish copy or hash; kMayBlock: they do I/O or wait for something.
    // 0: an engine may run it on its I/O thread, where handing it over costs more.
    static constexpr uint64_t kMayBlock = UINT64_MAX;
    uint64_t prepare_bytes = kMayBlock, finish_bytes = kMayBlock;
    // Both run on an engine thread that holds no lock. prepare returns 0, or an errno: then the
    // transfer is left out and finish gets the errno. ECANCELED: the engine was stopped before.
    std::function<int(IoRequest&)> prepare;
    std::function<void(IoRequest&, int err, size_t done)> finish;
};

struct EngineStats {
    uint64_t fixed_bytes = 0;       // moved through registered buffers
    uint64_t registered_bytes = 0;  // memory registered now
    uint64_t register_errors = 0;   // registrations the kernel refused (RLIMIT_MEMLOCK)
};

// Reads go before writes, but not for ever: a put waits for at most kReadsPerWrite of them.
class Turns {
  public:
    // Which kind to take, of those there are (at least one).
    bool write_next(bool reads, bool writes) {
        bool write = writes && (!reads || in_row_ >= kReadsPerWrite);
        in_row_ = write || !writes ? 0 : in_row_ + 1;
        return write;
    }

  private:
    static constexpr unsigned kReadsPerWrite = 8;
    unsigned in_row_ = 0;  // reads taken while a write waited
};

// Runs requests, reads before writes. Engines: a pread/pwrite thread pool (store_io.cpp), io_uring
// (store_uring.cpp).
class IoEngine {
  public:
    virtual ~IoEngine() = default;
    // Never blocks. After stop(): finish(ECANCELED) on the caller's thread.
    virtual void submit(std::unique_ptr<IoRequest> r) = 0;
    // Cancels what has not started (finish(ECANCELED)), waits for what has. False on timeout: the
    // threads are then detached and hold all they use.
    virtual bool stop(int timeout_ms) = 0;
    virtual AlignedBuf take_buffer(size_t n) = 0;
    // Requests are about to use this memory: an engine may prepare for it. Never blocks.
    virtual void use_region(const IoRegion&) {}
    virtual const char* name() const = 0;
    // The best size of one request where `total` bytes are to be moved together.
    virtual uint64_t merge_bytes(uint64_t total, bool write) const = 0;
    // With so many writes given to it, it always has a next one.
    virtual unsigned write_depth() const = 0;
    virtual EngineStats stats() const { return {}; }
};

std::shared_ptr<IoEngine> make_thread_engine(unsigned threads, std::shared_ptr<Faults> faults);
// Null where this process cannot have it; `why` is then a few words. `threads` prepare and finish.
std::shared_ptr<IoEngine> make_uring_engine(unsigned threads, std::shared_ptr<Faults> faults,
                                            std::string& why);
// Empty when make_uring_engine works here, else why not.
std::string uring_problem();

// Names the calling thread and blocks all signals in it.
void setup_native_thread(const char* name);

}  // namespace kvo::store
