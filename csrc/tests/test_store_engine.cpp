// The I/O engines by themselves: every test runs on both, through the same seam.
#include <fcntl.h>
#include <linux/capability.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <condition_variable>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <set>
#include <string>
#include <thread>

#include "../store_io.h"
#include "test_store.h"

using namespace kvo::store;

namespace {

std::shared_ptr<IoEngine> make(const std::string& kind, unsigned threads,
                               std::shared_ptr<Faults> faults) {
    if (kind == "threads") return make_thread_engine(threads, std::move(faults));
    std::string why;
    auto e = make_uring_engine(threads, std::move(faults), why);
    if (!e) std::fprintf(stderr, "no engine: %s\n", why.c_str());
    MUST(e && why.empty() && e->name() == kind);
    return e;
}

uint8_t byte_at(uint64_t i) {
    return uint8_t(i * 31 + (i >> 12) * 7);
}

FilePtr open_at(const std::string& path) {
    int err = 0;
    FilePtr f = open_file(AT_FDCWD, path.c_str(), O_RDWR | O_CREAT, true, err);
    MUST(f && !err);
    return f;
}

FilePtr pattern_file(const std::string& path, size_t n) {
    FilePtr f = open_at(path);
    AlignedBuf b(n);
    for (size_t i = 0; i < n; ++i) b.data()[i] = byte_at(i);
    Faults none;
    MUST(write_full(*f, b.data(), n, 0, none) == 0);
    return f;
}

struct Outcome {
    int err = -1;
    size_t done = 0;
};

// Counts down; the results are safe to read afterwards.
class Count {
  public:
    explicit Count(int n) : n_(n) {}
    void down() {
        std::lock_guard lk(mu_);
        if (--n_ <= 0) cv_.notify_all();
    }
    bool wait(int ms = 20000) {
        std::unique_lock lk(mu_);
        return cv_.wait_for(lk, std::chrono::milliseconds(ms), [&] { return n_ <= 0; });
    }

  private:
    std::mutex mu_;
    std::condition_variable cv_;
    int n_;
};

std::unique_ptr<IoRequest> request(FilePtr f, bool write, uint64_t off, std::vector<iovec> iov,
                                   Outcome& out, Count& left) {
    auto r = std::make_unique<IoRequest>();
    r->write = write;
    r->offset = off;
    for (auto& v : iov) r->bytes += v.iov_len;
    r->prepare = [f, iov](IoRequest& q) {
        q.file = f;
        q.iov = iov;
        return 0;
    };
    r->finish = [&](IoRequest&, int err, size_t done) {
        out = {err, done};
        left.down();
    };
    return r;
}

// Many pieces, continued after 512; an end of file; a write read back by other means.
void pieces(const std::string& kind, const std::string& dir) {
    constexpr size_t n = 1200;
    auto faults = std::make_shared<Faults>();
    auto e = make(kind, 2, faults);
    FilePtr f = pattern_file(dir + "/pieces", n * 4096);
    AlignedBuf b(2 * n * 4096);
    std::vector<iovec> iov;
    for (size_t i = 0; i < n; ++i) iov.push_back({b.data() + (2 * (n - 1 - i)) * 4096, 4096});
    Outcome out, past, wrote;
    Count left(1), left2(1), left3(1);
    e->submit(request(f, false, 0, iov, out, left));
    MUST(left.wait() && out.err == 0 && out.done == n * 4096);
    for (size_t i = 0; i < n * 4096; ++i)
        MUST(static_cast<uint8_t*>(iov[i / 4096].iov_base)[i % 4096] == byte_at(i));
    e->submit(request(f, false, (n - 2) * 4096, {{b.data(), 5 * 4096}}, past, left2));
    MUST(left2.wait() && past.err == 0 && past.done == 2 * 4096);
    e->submit(request(f, true, 4096, iov, wrote, left3));  // one page further
    MUST(left3.wait() && wrote.err == 0);
    Faults none;
    size_t done = 0;
    AlignedBuf back(n * 4096);
    MUST(read_full(*f, back.data(), n * 4096, 4096, none, done) == 0 && done == n * 4096);
    for (size_t i = 4096; i < n * 4096; ++i)
        MUST(back.data()[i] == static_cast<uint8_t*>(iov[i / 4096].iov_base)[i % 4096]);
    MUST(e->stop(5000));
}

// What O_DIRECT refuses goes through the page cache, also when many are refused at once.
void refused_direct(const std::string& kind, const std::string& dir) {
    auto faults = std::make_shared<Faults>();
    for (int round = 0; round < 5; ++round) {
        auto e = make(kind, 4, faults);
        FilePtr f = pattern_file(dir + "/direct", 1 << 20);
        bool direct = f->direct();
        std::vector<std::vector<uint8_t>> bufs(24, std::vector<uint8_t>(30001));
        std::vector<Outcome> out(24);
        Count left(24);
        for (size_t i = 0; i < 24; ++i)
            e->submit(request(f, false, i * 4096, {{bufs[i].data() + 1, 30000}}, out[i], left));
        MUST(left.wait());
        for (size_t i = 0; i < 24; ++i) {
            MUST(out[i].err == 0 && out[i].done == 30000);
            for (size_t b = 0; b < 30000; ++b) MUST(bufs[i][b + 1] == byte_at(i * 4096 + b));
        }
        MUST(!direct || !f->direct());
        MUST(e->stop(5000));
    }
}

// One worker held in a prepare: of many reads and a write that wait, the write is not the last.
void write_gets_a_turn(const std::string& kind, const std::string& dir) {
    auto e = make(kind, 1, std::make_shared<Faults>());
    FilePtr f = pattern_file(dir + "/turns", 1 << 20);
    constexpr int kAll = 30;
    AlignedBuf b(kAll * 4096);
    std::mutex mu;
    std::vector<int> order;
    Count entered(1), gate(1), left(kAll);
    std::vector<Outcome> out(kAll);
    for (int i = 0; i < kAll; ++i) {
        auto r = request(f, i == 1, uint64_t(i) * 8192, {{b.data() + i * 4096, 4096}},
                         out[size_t(i)], left);
        r->prepare = [&, i, inner = r->prepare](IoRequest& q) {
            {
                std::lock_guard lk(mu);
                order.push_back(i);
            }
            if (i == 0) {
                entered.down();
                gate.wait();
            }
            return inner(q);
        };
        e->submit(std::move(r));
        if (i == 0) MUST(entered.wait());
    }
    gate.down();
    MUST(left.wait());
    auto at = std::find(order.begin(), order.end(), 1) - order.begin();
    MUST(at > 4 && at < 12);
    for (auto& o : out) MUST(o.err == 0);
    MUST(e->stop(5000));
}

// One worker held in a prepare: what waits is then taken reads first, in order; stop() gives the
// rest back.
void order_and_cancel(const std::string& kind, const std::string& dir) {
    auto faults = std::make_shared<Faults>();
    auto e = make(kind, 1, faults);
    FilePtr f = pattern_file(dir + "/order", 1 << 20);
    AlignedBuf b(64 * 4096);
    std::mutex mu;
    std::vector<int> order;
    Count entered(1), gate(1), left(12);
    std::vector<Outcome> out(12);
    for (int i = 0; i < 12; ++i) {
        bool write = i % 2 == 0;
        auto r = request(f, write, uint64_t(i) * 8192, {{b.data() + i * 4096, 4096}},
                         out[size_t(i)], left);
        r->prepare = [&, i, f, inner = r->prepare](IoRequest& q) {
            {
                std::lock_guard lk(mu);
                order.push_back(i);
            }
            if (i == 0) {
                entered.down();
                gate.wait();
            }
            return inner(q);
        };
        e->submit(std::move(r));
        if (i == 0) MUST(entered.wait());
    }
    gate.down();
    MUST(left.wait());
    MUST((order == std::vector<int>{0, 1, 3, 5, 7, 9, 11, 2, 4, 6, 8, 10}));
    for (auto& o : out) MUST(o.err == 0);

    Count entered2(1), gate2(1), first(1), rest(6);
    std::vector<Outcome> out2(7);
    auto r = request(f, false, 0, {{b.data(), 4096}}, out2[0], first);
    r->prepare = [&, inner = r->prepare](IoRequest& q) {
        entered2.down();
        gate2.wait();
        return inner(q);
    };
    e->submit(std::move(r));
    MUST(entered2.wait());
    for (size_t i = 1; i < 7; ++i)
        e->submit(request(f, i % 2, i * 8192, {{b.data() + i * 4096, 4096}}, out2[i], rest));
    bool clean = false;
    std::thread stopper([&] { clean = e->stop(20000); });
    MUST(rest.wait());  // before what runs has ended
    for (size_t i = 1; i < 7; ++i) MUST(out2[i].err == ECANCELED);
    gate2.down();
    stopper.join();
    MUST(clean && first.wait(0) && (out2[0].err == 0 || out2[0].err == ECANCELED));
    Outcome late;
    Count done(1);
    e->submit(request(f, false, 0, {{b.data(), 4096}}, late, done));
    MUST(done.wait(0) && late.err == ECANCELED);
}

// A finish that takes long (a checksum) keeps neither reads nor writes from moving.
void slow_finish(const std::string& kind, const std::string& dir) {
    auto faults = std::make_shared<Faults>();
    auto e = make(kind, 2, faults);
    FilePtr f = pattern_file(dir + "/slow", 1 << 20);
    AlignedBuf b(64 * 4096);
    Count gate(1), entered(1), slow(1), left(40);
    std::vector<Outcome> out(41);
    auto r = request(f, false, 0, {{b.data(), 4096}}, out[40], slow);
    r->finish = [&, inner = r->finish](IoRequest& q, int err, size_t done) {
        entered.down();
        gate.wait();
        inner(q, err, done);
    };
    e->submit(std::move(r));
    MUST(entered.wait());
    for (size_t i = 0; i < 40; ++i)
        e->submit(
            request(f, i % 4 == 0, (i + 4) * 4096, {{b.data() + i * 4096, 4096}}, out[i], left));
    MUST(left.wait() && !slow.wait(0));
    gate.down();
    MUST(slow.wait());
    for (auto& o : out) MUST(o.err == 0);
    MUST(e->stop(5000));
}

// Steps without bytes need no worker: with all of them busy, requests of such steps go on, all on
// the ring thread. A checksum never runs there: alone or among many, it waits for a worker.
void short_steps(const std::string& dir) {
    auto e = make("uring", 2, std::make_shared<Faults>());
    FilePtr f = pattern_file(dir + "/short", 1 << 20);
    AlignedBuf b(64 * 4096);
    Count gate(1), entered(2), slow(2), left(40), sum(1), sums(16), more(16);
    std::vector<Outcome> out(59);
    std::mutex mu;
    std::set<std::thread::id> ring, others;  // that finished steps without and with bytes
    auto submit = [&](size_t i, bool write, uint64_t finish_bytes, Count& count) {
        auto r = request(f, write, (i + 4) * 4096, {{b.data() + i * 4096, 4096}}, out[i], count);
        r->prepare_bytes = 0;
        r->finish_bytes = finish_bytes;
        r->finish = [&, finish_bytes, inner = r->finish](IoRequest& q, int err, size_t done) {
            {
                std::lock_guard lk(mu);
                (finish_bytes ? others : ring).insert(std::this_thread::get_id());
            }
            inner(q, err, done);
        };
        e->submit(std::move(r));
    };
    for (size_t i = 40; i < 42; ++i) {
        auto r = request(f, false, 0, {{b.data() + i * 4096, 4096}}, out[i], slow);
        r->finish = [&, inner = r->finish](IoRequest& q, int err, size_t done) {
            entered.down();
            gate.wait();
            inner(q, err, done);
        };
        e->submit(std::move(r));
    }
    MUST(entered.wait());
    for (size_t i = 0; i < 40; ++i) submit(i, i % 4 == 0, 0, left);
    MUST(left.wait());
    submit(42, false, 4096, sum);
    MUST(!sum.wait(50));
    for (size_t i = 43; i < 59; ++i) submit(i, false, 4096, sums);
    for (size_t i = 0; i < 16; ++i) submit(i, i % 4 == 0, 0, more);  // nothing waits behind them
    MUST(more.wait() && !sums.wait(50) && !slow.wait(0));
    {
        std::lock_guard lk(mu);
        MUST(ring.size() == 1 && others.empty());
    }
    gate.down();
    MUST(slow.wait() && sum.wait() && sums.wait());
    MUST(others.size() <= 2 && !others.contains(*ring.begin()));
    for (auto& o : out) MUST(o.err == 0);
    MUST(e->stop(5000));
}

// Hung reads: others go on, stop() gives up in time, and all ends when the disk is back.
void hung(const std::string& kind, const std::string& dir) {
    auto faults = std::make_shared<Faults>();
    auto e = make(kind, 3, faults);
    FilePtr f = pattern_file(dir + "/hung", 1 << 20);
    AlignedBuf b(16 * 4096);
    std::vector<Outcome> out(4);
    Count hung(2), writes(2);
    faults->set("hang_read", 1);
    for (size_t i = 0; i < 2; ++i)
        e->submit(request(f, false, i * 4096, {{b.data() + i * 4096, 4096}}, out[i], hung));
    for (size_t i = 2; i < 4; ++i)
        e->submit(request(f, true, i * 4096, {{b.data() + i * 4096, 4096}}, out[i], writes));
    MUST(writes.wait() && !hung.wait(20));
    auto t0 = std::chrono::steady_clock::now();
    MUST(!e->stop(200));
    MUST(std::chrono::steady_clock::now() - t0 < std::chrono::seconds(5));
    e.reset();  // what hangs keeps all it uses
    faults->set("hang_read", 0);
    MUST(hung.wait());
    for (auto& o : out) MUST(o.err == 0 && (o.done == 4096 || &o > &out[1]));
    // Threads that nobody joins: what is left of them uses nothing of ours.
}

struct Mapping {
    uint8_t* p;
    explicit Mapping(void* at) {
        p = static_cast<uint8_t*>(::mmap(
            at, 1 << 20, PROT_READ | PROT_WRITE,
            MAP_SHARED | MAP_ANONYMOUS | MAP_POPULATE | (at ? MAP_FIXED_NOREPLACE : 0), -1, 0));
        MUST(p != MAP_FAILED);
    }
    ~Mapping() { ::munmap(p, 1 << 20); }
};

// Registered memory: used where one piece lies in it, given back when its owner goes, and never
// confused with other memory that then has the same address.
void regions(const std::string& kind, const std::string& dir, bool allowed = true) {
    bool uring = kind == "uring";
    auto faults = std::make_shared<Faults>();
    auto e = make(kind, 2, faults);
    FilePtr f = pattern_file(dir + "/regions", 1 << 20);
    void* at = nullptr;
    uint64_t fixed = 0;
    for (int round = 0; round < 3; ++round) {
        auto m = std::make_shared<Mapping>(at);
        at = m->p;
        e->use_region({m, m->p, 1 << 20});
        e->use_region({m, m->p, 1 << 20});
        std::vector<Outcome> out(3);
        Count left(3);
        e->submit(request(f, false, 0, {{m->p, 65536}}, out[0], left));
        e->submit(request(f, false, 65536, {{m->p + 65536, 4096}, {m->p + 69632, 4096}}, out[1],
                          left));  // neighbours: one piece
        e->submit(request(f, false, 131072, {{m->p + 131072, 4096}, {m->p + 200704, 4096}}, out[2],
                          left));
        MUST(left.wait());
        for (auto& o : out) MUST(o.err == 0);
        for (size_t i = 0; i < 73728; ++i) MUST(m->p[i] == byte_at(i));
        for (size_t i = 0; i < 4096; ++i) MUST(m->p[200704 + i] == byte_at(131072 + 4096 + i));
        if (uring && allowed) {
            // Two pieces that are no neighbours go through it where the kernel is new enough.
            uint64_t moved = e->stats().fixed_bytes - fixed;
            MUST(moved == 73728 || moved == 73728 + 8192);
            MUST(e->stats().registered_bytes == 1 << 20);
            fixed += moved;
            MUST(e->stats().register_errors == 0);
        } else {
            MUST(e->stats().fixed_bytes == 0 && e->stats().registered_bytes == 0);
            MUST(e->stats().register_errors == (uring ? unsigned(round) + 1 : 0));
        }
        m.reset();
        AlignedBuf b(4096);
        Outcome o;
        Count again(1);
        e->submit(request(f, false, 0, {{b.data(), 4096}}, o, again));
        MUST(again.wait() && o.err == 0);
        MUST(e->stats().registered_bytes == 0);  // given back
    }
    MUST(e->stop(5000));
}

// RLIMIT_MEMLOCK refuses the registration: everything works, unregistered. Capabilities are a
// thread's own; the engine's threads inherit them.
void no_memlock(const std::string& dir) {
    rlimit old, none{512 << 10, 0};  // newer kernels count the ring itself
    MUST(::getrlimit(RLIMIT_MEMLOCK, &old) == 0);
    none.rlim_max = old.rlim_max;
    MUST(::setrlimit(RLIMIT_MEMLOCK, &none) == 0);
    std::thread([&] {
        __user_cap_header_struct head{_LINUX_CAPABILITY_VERSION_3, 0};
        __user_cap_data_struct data[2]{};
        MUST(::syscall(SYS_capset, &head, data) == 0);
        regions("uring", dir, false);
    }).join();
    MUST(::setrlimit(RLIMIT_MEMLOCK, &old) == 0);
}

// Many threads, reads, writes, faults and a stop in the middle of it.
void stress(const std::string& kind, const std::string& dir) {
    for (int round = 0; round < 4; ++round) {
        auto faults = std::make_shared<Faults>();
        auto e = make(kind, 3, faults);
        FilePtr f = pattern_file(dir + "/stress", 1 << 20);
        constexpr size_t per = 150;
        std::vector<Outcome> out(4 * per);
        AlignedBuf b(4 * per * 4096);
        Count left(4 * per);
        faults->set("read_eio", 13);
        faults->set("short_read", 17);
        faults->set("enospc", 11);
        if (round == 1) faults->set("slow_read_ms", 1);
        if (round == 3)  // nothing reaches the disk
            for (auto* what : {"read_eio", "write_eio"}) faults->set(what, 1);
        std::vector<std::thread> ts;
        for (size_t t = 0; t < 4; ++t)
            ts.emplace_back([&, t] {
                for (size_t i = t * per; i < (t + 1) * per; ++i) {
                    auto r = request(f, i % 3 == 0, (i % 256) * 4096, {{b.data() + i * 4096, 4096}},
                                     out[i], left);
                    if (i / 8 % 2) r->prepare_bytes = i % 5 ? 0 : 4096;
                    if (i % 2) r->finish_bytes = i % 7 ? 4096 : 0;
                    e->submit(std::move(r));
                }
            });
        if (round == 2) MUST(e->stop(20000));
        for (auto& t : ts) t.join();
        MUST(left.wait());
        size_t good = 0;
        for (auto& o : out) {
            MUST(o.err == 0 || o.err == EIO || o.err == ENOSPC || o.err == ECANCELED);
            MUST(o.err != ECANCELED || round == 2);
            good += o.err == 0;
        }
        MUST(round == 2 || (round == 3 ? good == 0 : good > 3 * per && good < 4 * per));
        MUST(e->stop(5000));
    }
}

}  // namespace

void test_engine(const std::string& kind, const std::string& dir) {
    pieces(kind, dir);
    refused_direct(kind, dir);
    write_gets_a_turn(kind, dir);
    order_and_cancel(kind, dir);
    slow_finish(kind, dir);
    if (kind == "uring") short_steps(dir);
    hung(kind, dir);
    regions(kind, dir);
    if (kind == "uring") no_memlock(dir);
    stress(kind, dir);
}
