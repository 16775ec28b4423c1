#include "store_io.h"

#include <fcntl.h>
#include <pthread.h>
#include <signal.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <chrono>
#include <condition_variable>
#include <cstdlib>
#include <deque>
#include <new>
#include <stdexcept>
#include <thread>

namespace kvo::store {

void Faults::set(const std::string& what, int every) {
    if (every < 0) throw std::invalid_argument("inject: every must be >= 0");
    for (auto& [name, knob] : std::initializer_list<std::pair<const char*, std::atomic<int>*>>{
             {"read_eio", &read_eio},
             {"write_eio", &write_eio},
             {"enospc", &enospc},
             {"short_read", &short_read},
             {"slow_read_ms", &slow_read_ms},
             {"hang_read", &hang_read},
             {"flip_read", &flip_read}}) {
        if (what == name) return knob->store(every);
    }
    throw std::invalid_argument("inject: unknown fault " + what);
}

File::~File() {
    ::close(fd_);
}

bool File::drop_direct() {
    direct_.store(false);
    int flags = ::fcntl(fd_, F_GETFL);
    return flags >= 0 && ::fcntl(fd_, F_SETFL, flags & ~O_DIRECT) == 0;
}

FilePtr open_file(int dirfd, const char* name, int flags, bool direct, int& err) {
    flags |=
        O_NOFOLLOW | O_CLOEXEC | O_NONBLOCK;  // NONBLOCK: a FIFO with our name must not hang us
    int fd = direct ? ::openat(dirfd, name, flags | O_DIRECT, 0600) : -1;
    bool got = fd >= 0;
    if (!got && (!direct || errno == EINVAL)) {
        // A file system without O_DIRECT may make the file before it refuses the flag: not "exists"
        // then.
        if (direct) flags &= ~O_EXCL;
        fd = ::openat(dirfd, name, flags, 0600);
    }
    if (fd < 0) {
        err = errno;
        return nullptr;
    }
    auto f = std::make_shared<File>(fd, got);
    struct stat st;
    if (::fstat(fd, &st) != 0 || !S_ISREG(st.st_mode) || st.st_uid != ::geteuid()) {
        err = EPERM;
        return nullptr;
    }
    // A regular file, then: io_uring must be free to wait for it.
    if (int had = ::fcntl(fd, F_GETFL); had >= 0) ::fcntl(fd, F_SETFL, had & ~O_NONBLOCK);
    err = 0;
    return f;
}

AlignedBuf::AlignedBuf(size_t n) : n_((n + 4095) / 4096 * 4096) {
    if (!n_) return;
    p_ = static_cast<uint8_t*>(std::aligned_alloc(4096, n_));
    if (!p_) throw std::bad_alloc();
}
AlignedBuf::~AlignedBuf() {
    std::free(p_);
}
AlignedBuf& AlignedBuf::operator=(AlignedBuf&& o) noexcept {
    std::swap(p_, o.p_);
    std::swap(n_, o.n_);
    return *this;
}

namespace {

bool hit(const std::atomic<int>& every, uint64_t count) {
    int n = every.load(std::memory_order_relaxed);
    return n > 0 && count % unsigned(n) == 0;
}

// As a slow or hung disk would, on the thread that reads.
void wait_out(Faults& f, const Fault& fault) {
    auto ms = [](int n) { std::this_thread::sleep_for(std::chrono::milliseconds(n)); };
    while (fault.hang && f.hang_read.load() > 0) ms(1);
    if (fault.slow_ms) ms(fault.slow_ms);
}

// Runs preadv/pwritev until `total` bytes moved. Works on a copy of the vector.
template <class Op>
int transfer(const File& f, const iovec* iov, size_t n, uint64_t off, size_t total, size_t& done,
             Op op) {
    std::vector<iovec> v(iov, iov + n);
    size_t i = 0;
    for (done = 0; done < total;) {
        size_t batch = std::min<size_t>(v.size() - i, 512);
        ssize_t got = op(f.fd(), &v[i], int(batch), off_t(off + done));
        if (got < 0 && errno == EINTR) continue;
        if (got < 0) return errno;
        if (got == 0) return 0;
        done += size_t(got);
        for (size_t left = size_t(got); left;) {
            size_t step = std::min(left, v[i].iov_len);
            v[i].iov_base = static_cast<uint8_t*>(v[i].iov_base) + step;
            v[i].iov_len -= step;
            left -= step;
            if (!v[i].iov_len) ++i;
        }
    }
    return 0;
}

bool is_bad(const File& f, const Faults& faults) {
    uint64_t inode = faults.bad_inode.load(std::memory_order_relaxed);
    struct stat st;
    return inode && ::fstat(f.fd(), &st) == 0 && st.st_ino == inode;
}

size_t total_of(const iovec* iov, size_t n) {
    size_t t = 0;
    for (size_t i = 0; i < n; ++i) t += iov[i].iov_len;
    return t;
}

}  // namespace

Fault read_fault(Faults& f) {
    uint64_t c = f.reads.fetch_add(1, std::memory_order_relaxed) + 1;
    return {hit(f.read_eio, c) ? EIO : 0, hit(f.short_read, c), f.slow_read_ms.load(),
            f.hang_read.load() > 0, hit(f.flip_read, c)};
}

void flip_bits(const iovec* iov, size_t n) {
    for (size_t i = 0; i < n; ++i)
        if (iov[i].iov_len) static_cast<uint8_t*>(iov[i].iov_base)[iov[i].iov_len / 2] ^= 1;
}

int write_fault(Faults& f) {
    uint64_t c = f.writes.fetch_add(1, std::memory_order_relaxed) + 1;
    return hit(f.enospc, c) ? ENOSPC : hit(f.write_eio, c) ? EIO : 0;
}

int read_full(const File& f, const iovec* iov, size_t n, uint64_t off, Faults& faults,
              size_t& done) {
    Fault fault = read_fault(faults);
    wait_out(faults, fault);
    done = 0;
    if (fault.err || is_bad(f, faults)) return EIO;
    size_t total = total_of(iov, n);
    bool direct = f.direct();
    int e = transfer(f, iov, n, off, total, done, ::preadv);
    if (e == EINVAL && direct && const_cast<File&>(f).drop_direct())
        e = transfer(f, iov, n, off, total, done, ::preadv);
    if (fault.halve) done /= 2;
    if (fault.flip && !e) flip_bits(iov, n);
    return e;
}

int write_full(File& f, const iovec* iov, size_t n, uint64_t off, Faults& faults) {
    if (int e = write_fault(faults)) return e;
    if (is_bad(f, faults)) return EIO;
    size_t total = total_of(iov, n), done = 0;
    bool direct = f.direct();
    int e = transfer(f, iov, n, off, total, done, ::pwritev);
    if (e == EINVAL && direct && f.drop_direct())
        e = transfer(f, iov, n, off, total, done, ::pwritev);
    if (!e && done < total) e = EIO;
    return e;
}

int read_full(const File& f, void* p, size_t n, uint64_t off, Faults& faults, size_t& done) {
    iovec v{p, n};
    return read_full(f, &v, 1, off, faults, done);
}

int write_full(File& f, const void* p, size_t n, uint64_t off, Faults& faults) {
    iovec v{const_cast<void*>(p), n};
    return write_full(f, &v, 1, off, faults);
}

int sync_data(const File& f) {
    return ::fdatasync(f.fd()) == 0 ? 0 : errno;
}

// Best fit, so that small requests leave the large buffers to large ones.
AlignedBuf BufferPool::take(size_t n) {
    {
        std::lock_guard lk(mu_);
        AlignedBuf* best = nullptr;
        for (auto& b : free_)
            if (b.size() >= n && (!best || b.size() < best->size())) best = &b;
        if (best) {
            AlignedBuf out = std::move(*best);
            *best = std::move(free_.back());
            free_.pop_back();
            return out;
        }
    }
    return AlignedBuf(n);
}

void BufferPool::give(AlignedBuf b) {
    if (!b.size() || b.size() > (8u << 20)) return;
    std::lock_guard lk(mu_);
    size_t kept = b.size();
    for (auto& f : free_) kept += f.size();
    if (kept <= (64u << 20) && free_.size() < 256) free_.push_back(std::move(b));
}

void setup_native_thread(const char* name) {
    sigset_t all;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, nullptr);
    pthread_setname_np(pthread_self(), name);
}

namespace {

struct PoolState {
    std::mutex mu;
    std::condition_variable work, gone;
    std::deque<std::unique_ptr<IoRequest>> reads, writes;
    Turns turns;
    bool stopped = false;
    unsigned alive = 0;
    BufferPool buffers;
    std::shared_ptr<Faults> faults;
};

void run_one(PoolState& s, IoRequest& r) {
    size_t done = 0;
    int err;
    try {
        err = r.prepare(r);
        if (!err && r.write)
            err = write_full(*r.file, r.iov.data(), r.iov.size(), r.offset, *s.faults);
        else if (!err)
            err = read_full(*r.file, r.iov.data(), r.iov.size(), r.offset, *s.faults, done);
    } catch (const std::bad_alloc&) {
        err = ENOMEM;
    }
    r.finish(r, err, done);
    s.buffers.give(std::move(r.bounce));
}

void worker(std::shared_ptr<PoolState> s, unsigned i) {
    setup_native_thread(("kvo-io-" + std::to_string(i)).c_str());
    std::unique_lock lk(s->mu);
    for (;;) {
        s->work.wait(lk, [&] { return s->stopped || !s->reads.empty() || !s->writes.empty(); });
        if (s->stopped) break;
        bool write = s->turns.write_next(!s->reads.empty(), !s->writes.empty());
        auto& q = write ? s->writes : s->reads;
        auto r = std::move(q.front());
        q.pop_front();
        lk.unlock();
        run_one(*s, *r);
        r.reset();
        lk.lock();
    }
    if (--s->alive == 0) s->gone.notify_all();
}

class ThreadEngine : public IoEngine {
  public:
    ThreadEngine(unsigned threads, std::shared_ptr<Faults> faults)
        : count_(threads), s_(std::make_shared<PoolState>()) {
        s_->faults = std::move(faults);
        for (unsigned i = 0; i < threads; ++i) {
            ++s_->alive;
            threads_.emplace_back(worker, s_, i);
        }
    }
    ~ThreadEngine() override { stop(0); }

    void submit(std::unique_ptr<IoRequest> r) override {
        {
            std::lock_guard lk(s_->mu);
            if (!s_->stopped) {
                (r->write ? s_->writes : s_->reads).push_back(std::move(r));
                s_->work.notify_one();
                return;
            }
        }
        r->finish(*r, ECANCELED, 0);
    }

    bool stop(int timeout_ms) override {
        std::deque<std::unique_ptr<IoRequest>> left;
        bool clean;
        {
            std::unique_lock lk(s_->mu);
            s_->stopped = true;
            s_->work.notify_all();
            for (auto* q : {&s_->reads, &s_->writes}) {
                for (auto& r : *q) left.push_back(std::move(r));
                q->clear();
            }
        }
        for (auto& r : left) r->finish(*r, ECANCELED, 0);
        {
            std::unique_lock lk(s_->mu);
            clean = s_->gone.wait_for(lk, std::chrono::milliseconds(timeout_ms),
                                      [&] { return s_->alive == 0; });
        }
        for (auto& t : threads_) {
            // The last reference to the store may go away on one of our own threads.
            if (clean && t.get_id() != std::this_thread::get_id())
                t.join();
            else
                t.detach();
        }
        threads_.clear();
        return clean;
    }

    AlignedBuf take_buffer(size_t n) override { return s_->buffers.take(n); }
    const char* name() const override { return "threads"; }
    // Big enough to be cheap, small enough that all threads have one.
    uint64_t merge_bytes(uint64_t total, bool write) const override {
        return std::clamp<uint64_t>(total / count_, (write ? 1024 : 256) << 10, 4 << 20);
    }
    unsigned write_depth() const override { return 2 * count_; }

  private:
    unsigned count_;
    std::shared_ptr<PoolState> s_;
    std::vector<std::thread> threads_;
};

}  // namespace

std::shared_ptr<IoEngine> make_thread_engine(unsigned threads, std::shared_ptr<Faults> faults) {
    return std::make_shared<ThreadEngine>(threads, std::move(faults));
}

}  // namespace kvo::store
