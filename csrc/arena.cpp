#include "arena.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <csignal>
#include <cstddef>
#include <cstring>
#include <ctime>
#include <new>
#include <utility>

#include "futex.h"

#ifndef MADV_COLLAPSE
#define MADV_COLLAPSE 25
#endif
#ifndef MADV_POPULATE_WRITE
#define MADV_POPULATE_WRITE 23
#endif

namespace kvo {
namespace {

constexpr uint64_t kMagic = 0x314e52414f564b00;  // "\0KVOARN1"
constexpr uint32_t kVersion = 1;
constexpr uint64_t kHeaderBytes = 4096;
constexpr uint64_t kHuge = 2u << 20;
constexpr uint64_t kGenMask = (uint64_t(1) << 62) - 1;
// A waiter whose waker was killed between its CAS and its wake notices after at most this long.
constexpr int64_t kWaitSliceNs = 20'000'000;

constexpr uint64_t align_up(uint64_t v, uint64_t a) {
    return (v + a - 1) / a * a;
}

struct Geometry {
    uint64_t slots_at, leaves_at, data_at, total;
};

Geometry geometry(uint64_t data_bytes, uint32_t max_slots) {
    Geometry g;
    g.slots_at = kHeaderBytes;
    g.leaves_at = align_up(g.slots_at + uint64_t(max_slots) * sizeof(SlotEntry), 4096);
    g.data_at = align_up(g.leaves_at + leaf_count(data_bytes) * sizeof(uint64_t), kHuge);
    g.total = g.data_at + data_bytes;
    return g;
}

bool sane(uint64_t data_bytes, uint64_t max_slots, uint64_t n_ranks) {
    return data_bytes >= kHuge && data_bytes % kHuge == 0 && data_bytes < (uint64_t(1) << 50) &&
           max_slots > 0 && max_slots < (1u << 31) && n_ranks > 0 && n_ranks <= kMaxRanks;
}

class Fd {
  public:
    explicit Fd(int fd) : fd_(fd) {}
    ~Fd() {
        if (fd_ >= 0) ::close(fd_);
    }
    Fd(const Fd&) = delete;
    Fd& operator=(const Fd&) = delete;
    int get() const { return fd_; }
    int release() { return std::exchange(fd_, -1); }

  private:
    int fd_;
};

uint64_t tagged(uint64_t generation, uint64_t ranks) {
    return generation << 32 | ranks;
}
uint32_t tag_of(uint64_t v) {
    return uint32_t(v >> 32);
}
uint32_t half(uint64_t mask, int h) {
    return uint32_t(mask >> (32 * h));
}

// Give a mask word to `generation` unless a later one already took it (two begin_fill at once).
void claim(std::atomic<uint64_t>& w, uint64_t generation, uint32_t ranks) {
    uint64_t old = w.load(std::memory_order_relaxed);
    while (int32_t(uint32_t(generation) - tag_of(old)) > 0)
        if (w.compare_exchange_weak(old, tagged(generation, ranks), std::memory_order_acq_rel))
            return;
}

// OR ranks into a mask word that still belongs to `generation`. False if it does not.
bool add_ranks(std::atomic<uint64_t>& w, uint64_t generation, uint32_t ranks) {
    uint64_t old = w.load(std::memory_order_acquire);
    while (tag_of(old) == uint32_t(generation)) {
        // seq_cst: of two ranks that finish in different halves at once, at least one must see
        // both.
        if (w.compare_exchange_weak(old, old | ranks, std::memory_order_seq_cst)) return true;
    }
    return false;
}

void wake(SlotEntry& e) {
    // Pairs with wait_ready: it raises `waiters` before it reads the word, both sides seq_cst.
    if (e.waiters.load(std::memory_order_seq_cst) != 0) futex_wake_all(e.word);
}

}  // namespace

struct ArenaHeader {
    uint64_t magic;
    uint32_t version;
    uint32_t n_ranks;
    uint64_t data_bytes;
    uint64_t max_slots;
    uint64_t leaf_bytes;
    uint64_t total;
    alignas(64) std::atomic<uint64_t> attached;
    alignas(64) std::atomic<uint64_t> epoch;
};
static_assert(sizeof(ArenaHeader) <= kHeaderBytes);

// -- mapping
// ----------------------------------------------------------------------------------------

// The kernel accepts MADV_HUGEPAGE on shared memory also where its own switch says it will not act
// on it ("never", "deny").
static bool shmem_thp() {
    char text[128] = {};
    const int fd =
        ::open("/sys/kernel/mm/transparent_hugepage/shmem_enabled", O_RDONLY | O_CLOEXEC);
    if (fd < 0) return false;
    const ssize_t n = ::read(fd, text, sizeof text - 1);
    ::close(fd);
    return n > 0 && !std::strstr(text, "[never]") && !std::strstr(text, "[deny]");
}

// Makes the 2 MiB at `p` one huge page, whatever that switch says except "deny" (Linux 6.1 on);
// what is in it stays. Without one page that is there already it is refused.
static bool collapse(uint8_t* p) {
    return ::madvise(p, 4096, MADV_POPULATE_WRITE) == 0 && ::madvise(p, kHuge, MADV_COLLAPSE) == 0;
}

// Touches the 2 MiB at `p`. False: out of memory; to touch them one by one would be a SIGBUS.
static bool populate(uint8_t* p) {
    int err = 0;
    do err = ::madvise(p, kHuge, MADV_POPULATE_WRITE) ? errno : 0;
    while (err == EINTR || err == EAGAIN);
    if (err != EINVAL) return err == 0;
    // A kernel before 5.14. The OR of nothing keeps bytes others are writing meanwhile.
    for (uint64_t at = 0; at < kHuge; at += 4096) __atomic_fetch_or(p + at, 0, __ATOMIC_RELAXED);
    return true;
}

static double thread_cpu_ms() {
    timespec t;
    ::clock_gettime(CLOCK_THREAD_CPUTIME_ID, &t);
    return double(t.tv_sec) * 1e3 + double(t.tv_nsec) / 1e6;
}

void Arena::map(int fd, uint64_t total, bool hugepages) {
    // Reserve more than needed so that the data area can start on a huge page boundary.
    uint64_t reserve = total + kHuge;
    void* raw =
        ::mmap(nullptr, reserve, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (raw == MAP_FAILED) throw OsError(errno, "arena: reserve address space");
    uint64_t at = align_up(reinterpret_cast<uint64_t>(raw), kHuge);
    void* p = ::mmap(reinterpret_cast<void*>(at), total, PROT_READ | PROT_WRITE,
                     MAP_SHARED | MAP_FIXED, fd, 0);
    if (p == MAP_FAILED) {
        int err = errno;
        ::munmap(raw, reserve);
        throw OsError(err, "arena: map " + std::to_string(total) + " bytes");
    }
    uint64_t lead = at - reinterpret_cast<uint64_t>(raw);
    if (lead) ::munmap(raw, lead);
    if (kHuge - lead) ::munmap(reinterpret_cast<void*>(at + align_up(total, 4096)), kHuge - lead);
    base_ = static_cast<uint8_t*>(p);
    total_ = total;
    Geometry g = geometry(data_bytes_, max_slots_);
    header_ = reinterpret_cast<ArenaHeader*>(base_);
    slots_ = reinterpret_cast<SlotEntry*>(base_ + g.slots_at);
    leaves_ = reinterpret_cast<uint64_t*>(base_ + g.leaves_at);
    data_ = base_ + g.data_at;
    // A core dump must not write tens of GiB of cache; failure to mark it costs only that.
    ::madvise(base_, total, MADV_DONTDUMP);
    hugepages_ = hugepages && ::madvise(data_, data_bytes_, MADV_HUGEPAGE) == 0 && shmem_thp();
}

std::shared_ptr<Arena> Arena::create(uint64_t data_bytes, uint32_t max_slots, uint32_t n_ranks,
                                     bool hugepages) {
    data_bytes = data_bytes / kHuge * kHuge;
    if (!sane(data_bytes, max_slots, n_ranks))
        throw std::invalid_argument(
            "arena: data_bytes must be at least 2 MiB, max_slots at least 1, n_ranks 1 to 64");
    Geometry g = geometry(data_bytes, max_slots);
    // Close-on-exec does not hinder others from opening /proc/<pid>/fd/<n>, and keeps the arena
    // from living on in whatever the engine execs.
    Fd fd(::memfd_create("kvoffload-arena", MFD_CLOEXEC | MFD_ALLOW_SEALING));
    if (fd.get() < 0) throw OsError(errno, "arena: memfd_create");
    if (::ftruncate(fd.get(), off_t(g.total)) != 0)
        throw OsError(errno, "arena: size " + std::to_string(g.total) + " bytes");
    // Nobody can now shrink the file under another process's mapping (SIGBUS).
    if (::fcntl(fd.get(), F_ADD_SEALS, F_SEAL_SHRINK | F_SEAL_GROW) != 0)
        throw OsError(errno, "arena: seal");
    struct stat st;
    if (::fstat(fd.get(), &st) != 0) throw OsError(errno, "arena: stat");

    std::shared_ptr<Arena> a(new Arena);
    a->inode_ = st.st_ino;
    a->data_bytes_ = data_bytes;
    a->max_slots_ = max_slots;
    a->n_ranks_ = n_ranks;
    a->map(fd.get(), g.total, hugepages);
    if (hugepages && !a->hugepages_) a->hugepages_ = a->collapses_ = collapse(a->data_);
    ArenaHeader* h = new (a->header_) ArenaHeader{};
    h->version = kVersion;
    h->n_ranks = n_ranks;
    h->data_bytes = data_bytes;
    h->max_slots = max_slots;
    h->leaf_bytes = kLeafBytes;
    h->total = g.total;
    h->magic = kMagic;
    a->fd_ = fd.release();
    a->path_ = "/proc/" + std::to_string(::getpid()) + "/fd/" + std::to_string(a->fd_);
    return a;
}

std::shared_ptr<Arena> Arena::attach(const std::string& path, uint64_t inode) {
    Fd fd(::open(path.c_str(), O_RDWR | O_CLOEXEC | O_NONBLOCK));
    if (fd.get() < 0) throw OsError(errno, "arena " + path);
    struct stat st;
    if (::fstat(fd.get(), &st) != 0) throw OsError(errno, "arena " + path);
    if (!S_ISREG(st.st_mode) || st.st_ino != inode)
        throw OsError(ESTALE, "arena " + path + ": inode is not " + std::to_string(inode));
    ArenaHeader h{};
    constexpr size_t kFixed = offsetof(ArenaHeader, attached);
    ssize_t got = ::pread(fd.get(), static_cast<void*>(&h), kFixed, 0);
    if (got < 0) throw OsError(errno, "arena " + path + ": read header");
    if (size_t(got) != kFixed || h.magic != kMagic)
        throw OsError(EINVAL, "arena " + path + ": not an arena");
    if (h.version != kVersion || h.leaf_bytes != kLeafBytes)
        throw OsError(EINVAL, "arena " + path + ": made by another version of kvoffload");
    if (!sane(h.data_bytes, h.max_slots, h.n_ranks) || h.total != uint64_t(st.st_size) ||
        geometry(h.data_bytes, uint32_t(h.max_slots)).total != h.total)
        throw OsError(EINVAL, "arena " + path + ": header and size disagree");

    std::shared_ptr<Arena> a(new Arena);
    a->path_ = path;
    a->inode_ = inode;
    a->data_bytes_ = h.data_bytes;
    a->max_slots_ = uint32_t(h.max_slots);
    a->n_ranks_ = h.n_ranks;
    a->map(fd.get(), h.total, true);
    return a;
}

Arena::~Arena() {
    stop_prefault();
    if (base_) ::munmap(base_, total_);
    if (fd_ >= 0) ::close(fd_);
}

void Arena::check_range(uint64_t offset, uint64_t nbytes) const {
    if (offset % kLeafBytes || offset > data_bytes_ || nbytes > data_bytes_ - offset)
        throw std::invalid_argument("arena: range " + std::to_string(offset) + "+" +
                                    std::to_string(nbytes) + " is not leaf-aligned or not inside " +
                                    std::to_string(data_bytes_));
}

void Arena::check_slot(uint32_t slot) const {
    if (slot >= max_slots_)
        throw std::invalid_argument("arena: slot " + std::to_string(slot) + " of " +
                                    std::to_string(max_slots_));
}

// -- prefault
// ---------------------------------------------------------------------------------------

void Arena::prefault_start(unsigned threads) {
    if (!prefaulters_.empty()) return;
    uint64_t huge = data_bytes_ / kHuge;
    uint64_t n = std::clamp<uint64_t>(threads, 1, huge);
    sigset_t all, old;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &old);  // inherited by the threads: signals stay with Python
    for (uint64_t i = 0; i < n; ++i)
        prefaulters_.emplace_back([this, n, b = huge * i / n * kHuge,
                                   e = huge * (i + 1) / n * kHuge] { prefault_range(b, e, n); });
    pthread_sigmask(SIG_SETMASK, &old, nullptr);
}

// Who maps or unmaps memory in this process waits for a step, so it is short, and does not give way
// to others while it holds that lock; once the arena is in use the thread rests instead, nearly all
// the time: an engine may need every core there is. At nice 19 and 64 MiB a step, beside two busy
// threads on two cores, an mmap() elsewhere took 80 ms at the median and up to 500.
void Arena::prefault_range(uint64_t begin, uint64_t end, uint64_t threads) {
    pthread_setname_np(pthread_self(), "kvo-prefault");
    // A huge page takes 0.2 to 0.5 ms of CPU, in a guest at times 5 (its host may have to find the
    // memory first). More, and the kernel moves others' pages about: not at that price.
    constexpr double kDearMs = 8.0;
    constexpr unsigned kGiveUp = 8;  // in a row
    constexpr double kRest = 99.0;   // times what a step took: then a hundredth of a core, for all
    constexpr double kNapMs = 20.0;  // soon enough to stop
    unsigned dear = collapses_ ? 0 : kGiveUp;
    for (; begin < end && !stop_.load(std::memory_order_relaxed); begin += kHuge) {
        const double begun = thread_cpu_ms();
        if (dear < kGiveUp)
            dear = collapse(data_ + begin) && thread_cpu_ms() - begun < kDearMs ? 0 : dear + 1;
        if (!populate(data_ + begin)) return;  // out of memory: prefaulted_bytes() tells
        prefaulted_.fetch_add(kHuge, std::memory_order_relaxed);
        if (!in_use_.load(std::memory_order_relaxed)) continue;
        double rest = std::min(thread_cpu_ms() - begun, kDearMs) * kRest * double(threads);
        for (; rest > 0 && !stop_.load(std::memory_order_relaxed); rest -= kNapMs)
            std::this_thread::sleep_for(std::chrono::duration<double, std::milli>(kNapMs));
    }
}

void Arena::stop_prefault() {
    stop_.store(true, std::memory_order_relaxed);
    for (std::thread& t : prefaulters_) t.join();
    prefaulters_.clear();
}

// -- ranks and epoch
// --------------------------------------------------------------------------------

void Arena::set_attached(uint32_t rank) {
    if (rank >= n_ranks_) throw std::invalid_argument("arena: rank " + std::to_string(rank));
    header_->attached.fetch_or(uint64_t(1) << rank);
}

uint64_t Arena::attached_mask() const {
    return header_->attached.load();
}
uint64_t Arena::epoch() const {
    return header_->epoch.load();
}
uint64_t Arena::bump_epoch() {
    return header_->epoch.fetch_add(1) + 1;
}

// -- slot table
// -------------------------------------------------------------------------------------

uint64_t Arena::begin_fill(uint32_t slot, uint64_t need_mask) {
    if (n_ranks_ < 64 && need_mask >> n_ranks_)
        throw std::invalid_argument("arena: need_mask names a rank beyond n_ranks");
    if (!in_use_.load(std::memory_order_relaxed)) in_use_.store(true, std::memory_order_relaxed);
    SlotEntry& e = slots_[slot];
    uint64_t old = e.word.load(std::memory_order_relaxed);
    uint64_t gen;
    do {
        gen = ((old >> 2) + 1) & kGenMask;
        if (gen == 0) gen = 1;
    } while (!e.word.compare_exchange_weak(old, gen << 2 | kFilling, std::memory_order_seq_cst));
    // From here no CAS of an older generation on the word can succeed, and nobody knows the new one
    // until we return, so the masks may change in any order.
    for (int h = 0; h < 2; ++h) {
        claim(e.need[h], gen, half(need_mask, h));
        claim(e.done[h], gen, 0);
    }
    wake(e);  // waiters of the generation that just ended
    return gen;
}

bool Arena::finish(SlotEntry& e, uint64_t from, SlotState to) {
    if (!e.word.compare_exchange_strong(from, (from & ~uint64_t(3)) | to,
                                        std::memory_order_seq_cst))
        return false;
    wake(e);
    return true;
}

bool Arena::rank_done(uint32_t slot, uint64_t generation, uint32_t rank) {
    if (rank >= n_ranks_) throw std::invalid_argument("arena: rank " + std::to_string(rank));
    SlotEntry& e = slots_[slot];
    const uint64_t filling = generation << 2 | kFilling;
    if (e.word.load(std::memory_order_acquire) != filling) return false;
    const int h = int(rank / 32);
    const uint32_t bit = uint32_t(1) << (rank % 32);
    uint64_t need = e.need[h].load(std::memory_order_acquire);
    if (tag_of(need) != uint32_t(generation) || !(uint32_t(need) & bit)) return false;
    if (!add_ranks(e.done[h], generation, bit)) return false;
    // From here the report counts. If the slot has moved on meanwhile, then because the other ranks
    // completed it and it was used again: only a failure or a release of this generation says no.
    auto counted = [&] {
        const uint64_t w = word(slot);
        return (w >> 2) != generation || (w & 3) == kFilling || (w & 3) == kReady;
    };
    for (int i = 0; i < 2; ++i) {
        uint64_t n = e.need[i].load(std::memory_order_acquire);
        uint64_t d = e.done[i].load(std::memory_order_seq_cst);
        if (tag_of(n) != uint32_t(generation) || tag_of(d) != uint32_t(generation))
            return counted();
        if (uint32_t(n) & ~uint32_t(d)) return counted();  // others are still copying
    }
    return finish(e, filling, kReady) || counted();  // of two last ranks one loses the CAS
}

bool Arena::fill_done(uint32_t slot, uint64_t generation) {
    SlotEntry& e = slots_[slot];
    const uint64_t filling = generation << 2 | kFilling;
    if (e.word.load(std::memory_order_acquire) != filling) return false;
    for (int h = 0; h < 2; ++h) {
        uint64_t n = e.need[h].load(std::memory_order_acquire);
        if (tag_of(n) != uint32_t(generation) || !add_ranks(e.done[h], generation, uint32_t(n)))
            return false;
    }
    return finish(e, filling, kReady);
}

bool Arena::fail(uint32_t slot, uint64_t generation) {
    SlotEntry& e = slots_[slot];
    for (;;) {
        uint64_t w = e.word.load(std::memory_order_acquire);
        if ((w >> 2) != generation || ((w & 3) != kFilling && (w & 3) != kReady)) return false;
        if (finish(e, w, kFailed)) return true;
    }
}

void Arena::set_free(uint32_t slot) {
    SlotEntry& e = slots_[slot];
    uint64_t w = e.word.load(std::memory_order_acquire);
    while (!e.word.compare_exchange_weak(w, w & ~uint64_t(3), std::memory_order_seq_cst)) {
    }
    wake(e);
}

uint64_t Arena::done_mask(uint32_t slot) const {
    const SlotEntry& e = slots_[slot];
    return uint64_t(uint32_t(e.done[1].load())) << 32 | uint32_t(e.done[0].load());
}

uint64_t Arena::need_mask(uint32_t slot) const {
    const SlotEntry& e = slots_[slot];
    return uint64_t(uint32_t(e.need[1].load())) << 32 | uint32_t(e.need[0].load());
}

SlotState Arena::wait_ready(uint32_t slot, uint64_t generation, int64_t timeout_ns) const {
    SlotState s = state_of(slot, generation);
    if (s != kFilling || timeout_ns <= 0) return s;
    SlotEntry& e = slots_[slot];
    const int64_t end = now_ns() + timeout_ns;
    const uint64_t filling = generation << 2 | kFilling;
    e.waiters.fetch_add(1, std::memory_order_seq_cst);
    for (;;) {
        if (e.word.load(std::memory_order_seq_cst) != filling) break;
        int64_t left = end - now_ns();
        if (left <= 0) break;
        futex_wait(e.word, filling, std::min(left, kWaitSliceNs));
    }
    e.waiters.fetch_sub(1, std::memory_order_release);
    return state_of(slot, generation);
}

// -- invariants
// -------------------------------------------------------------------------------------

void Arena::check() const {
    auto bad = [this](const std::string& what) {
        throw CheckError("arena " + path_ + ": " + what);
    };
    if (header_->magic != kMagic || header_->version != kVersion) bad("header overwritten");
    if (header_->data_bytes != data_bytes_ || header_->max_slots != max_slots_ ||
        header_->total != total_)
        bad("geometry changed");
    if (n_ranks_ < 64 && attached_mask() >> n_ranks_) bad("a rank beyond n_ranks is attached");
    for (uint32_t i = 0; i < max_slots_; ++i) {
        const SlotEntry& e = slots_[i];
        std::string broken;
        // begin_fill changes word and masks one after another: only what stays is broken.
        for (int attempt = 0; attempt < 100; ++attempt) {
            broken.clear();
            uint64_t w = e.word.load();
            uint32_t tag = uint32_t(w >> 2);
            for (int h = 0; h < 2; ++h) {
                uint64_t n = e.need[h].load(), d = e.done[h].load();
                if (tag_of(n) != tag || tag_of(d) != tag)
                    broken = "mask of another generation";
                else if (uint32_t(d) & ~uint32_t(n))
                    broken = "a rank is done that was not needed";
                else if ((w & 3) == kReady && uint32_t(n) != uint32_t(d))
                    broken = "READY with ranks missing";
            }
            if (broken.empty()) break;
            if (e.word.load() == w) std::this_thread::yield();
        }
        if (!broken.empty()) bad("slot " + std::to_string(i) + ": " + broken);
    }
}

}  // namespace kvo
