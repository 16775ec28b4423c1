// Native test of the chunk store, meant for ASan/UBSan and TSan builds (run_store.sh).
//   test_store DIRECTORY [rounds of the hostile-file test]
#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <atomic>
#include <cstdio>
#include <filesystem>
#include <fstream>
#include <random>
#include <thread>

#include "../arena.h"
#include "../checksum.h"
#include "../errors.h"
#include "../store.h"
#include "../store_format.h"
#include "../store_impl.h"
#include "../store_io.h"
#include "test_store.h"

namespace fs = std::filesystem;
using namespace kvo::store;
using namespace store_test;

namespace {

std::mt19937_64 rng(20261122);
std::string engine;  // of every store that is opened

constexpr uint64_t kMostPayload = 70000;

Bytes payload_of(uint64_t i) {
    return store_test::payload_of(i, kMostPayload);
}

StoreOptions options(const fs::path& p, uint64_t max = 8 << 20) {
    StoreOptions o = store_test::options(p.string(), max, 512 << 10, 3);
    o.io_engine = engine;
    return o;
}

Bytes put(SegmentStore& s, uint64_t from, uint64_t to) {
    return store_test::put(s, from, to, kMostPayload);
}

// Small puts that come faster than the disk writes them are written together.
void merged(const fs::path& p) {
    constexpr uint64_t kPuts = 600, kSize = 16 << 10;
    StoreOptions o = store_test::options(p.string(), 64 << 20, 16 << 20, 3);
    o.io_engine = engine;
    auto s = std::make_shared<StoreImpl>(o);
    s->start();
    std::vector<Bytes> data;
    for (uint64_t i = 0; i < kPuts; ++i) data.emplace_back(kSize, uint8_t(i));
    auto put = [&](uint64_t i) {
        std::vector<StoreItem> one{{key_of(i), data[i].data(), kSize}};
        s->submit_put(int64_t(i), nullptr, one, 7, 0);
    };
    put(0);
    MUST(s->wait(0, 20000));  // from here on a segment is open: nothing waits for that
    uint64_t before = s->faults->writes;
    for (uint64_t i = 1; i < kPuts; ++i) put(i);
    for (uint64_t i = 1; i < kPuts; ++i) MUST(s->wait(int64_t(i), 20000));
    uint64_t writes = s->faults->writes - before;
    std::printf("merged: %d puts, %d writes\n", int(kPuts), int(writes));
    MUST(writes < kPuts / 2);
    s->check();
    MUST(s->close(5000, false));
}

// Number of hits; a hit with other bytes than were put ends the test.
int get(SegmentStore& s, uint64_t from, uint64_t to) {
    std::vector<Bytes> want, got;
    std::vector<StoreItem> items;
    for (uint64_t i = from; i < to; ++i) {
        want.push_back(payload_of(i));
        got.emplace_back(want.back().size(), uint8_t(0xEE));
        items.push_back({key_of(i), got.back().data(), got.back().size()});
    }
    s.get(2, nullptr, items);
    auto res = finish(s, 2);
    int hits = 0;
    for (size_t i = 0; i < res.size(); ++i) {
        if (res[i] == kOk) {
            MUST(got[i] == want[i]);
            ++hits;
        } else {
            MUST(got[i] == Bytes(want[i].size(), 0xEE));
        }
    }
    return hits;
}

void format() {
    MUST(crc32c("123456789", 9) == 0xE3069283u);  // the check value of CRC-32C
    MUST(crc32c("6789", 4, crc32c("12345", 5)) == 0xE3069283u);
    Uuid u{1, 2, 3};
    Record r{};
    r.type = kPut;
    r.seg = 3;
    r.gen = 9;
    r.off4k = 1;
    r.len = 5000;
    seal_record(r, u);
    MUST(record_ok(r, u, 3, 9, 4 * kBlock) && !record_ok(r, u, 3, 9, 2 * kBlock));
    MUST(!record_ok(r, u, 3, 8, 4 * kBlock) && !record_ok(r, Uuid{}, 3, 9, 4 * kBlock));
    for (size_t bit = 0; bit < 512; ++bit) {
        Record f = r;
        reinterpret_cast<uint8_t*>(&f)[bit / 8] ^= uint8_t(1 << bit % 8);
        MUST(!record_ok(f, u, 3, 9, 4 * kBlock));
    }
    Manifest m, back;
    m.uuid = u;
    m.segment_bytes = 4096;
    unsigned version;
    std::string text = manifest_text(m);
    MUST(parse_manifest(text, back, version) == ManifestError::kNone && back.uuid == u);
    for (size_t i = 0; i < text.size(); ++i) {
        std::string bad = text;
        bad[i] = char(bad[i] ^ (1 << i % 7));
        MUST(parse_manifest(bad, back, version) != ManifestError::kNone);
        MUST(parse_manifest(text.substr(0, i), back, version) != ManifestError::kNone);
    }
}

void basics(const fs::path& p) {
    {
        SegmentStore s(options(p));
        auto res = put(s, 0, 60);
        MUST(std::count(res.begin(), res.end(), kOk) == 60);
        MUST(get(s, 0, 60) == 60 && get(s, 100, 110) == 0);
        Key k = key_of(5);
        MUST(s.remove(std::span(&k, 1)) == 1 && s.length(k) == -1);
        s.check();
        MUST(s.flush(5000));
    }
    SegmentStore s(options(p));
    s.check();
    MUST(get(s, 0, 60) == 59);
    // Five times the bound goes through it: what was read once may stay for two.
    for (uint64_t i = 60; i < 1260; i += 20) put(s, i, i + 20);
    s.check();
    MUST(s.stats()["recycled_segments"] > 10);
    MUST(get(s, 1240, 1260) == 20 && get(s, 0, 60) == 0);
}

void slots(const fs::path& p) {
    auto arena = kvo::Arena::create(8 << 20, 16, 1, false);
    constexpr uint64_t n = 256 << 10;
    SegmentStore s(options(p));
    auto items = [&] {
        std::vector<StoreItem> v;
        for (uint32_t i = 0; i < 8; ++i) {
            uint64_t off = ((i * 5) % 16) * n;  // scattered in memory
            uint64_t gen = arena->begin_fill(i, 1);
            v.push_back({key_of(i), arena->data() + off, n, arena->leaf_ptr(off), i, gen, i});
        }
        return v;
    };
    auto v = items();
    for (auto& it : v) {
        for (uint64_t b = 0; b < n; ++b) it.data[b] = uint8_t(b * 7 + it.slot);
        kvo::leaf_hashes(it.data, n, kvo::seed_of(it.key.b), it.leaves);
        arena->fill_done(it.slot, it.generation);
    }
    arena->fail(v[7].slot, v[7].generation);  // not READY: must not be stored
    s.put(1, arena, v, 0);
    auto res = finish(s, 1);
    MUST(std::count(res.begin(), res.end(), kOk) == 7 && res[7] == kDropped);
    std::memset(arena->data(), 0, arena->data_bytes());
    v = items();
    arena->begin_fill(3, 1);  // slot 3 moved on: its memory is somebody else's now
    s.get(2, arena, v);
    res = finish(s, 2);
    for (auto& it : v) {
        bool good = it.slot != 3 && it.slot != 7;
        MUST(res[it.slot] == (good ? kOk : it.slot == 3 ? kDropped : kMiss));
        MUST(it.slot == 3 || arena->state(it.slot) == (good ? kvo::kReady : kvo::kFailed));
        for (uint64_t b = 0; b < n; ++b) MUST(it.data[b] == (good ? uint8_t(b * 7 + it.slot) : 0));
    }
    s.check();
}

void threads(const fs::path& p) {
    SegmentStore s(options(p));
    std::vector<std::thread> ts;
    for (int t = 0; t < 4; ++t)
        ts.emplace_back([&, t] {
            for (int round = 0; round < 6; ++round) {
                int64_t job = 1000 + t * 100 + round * 2;
                std::vector<Bytes> data;
                std::vector<StoreItem> puts;
                uint64_t from = uint64_t((t / 2) * 60 + round * 8);  // pairs put the same keys
                for (uint64_t i = from; i < from + 8; ++i) {
                    data.push_back(payload_of(i));
                    puts.push_back({key_of(i), data.back().data(), data.back().size()});
                }
                s.put(job, nullptr, puts, 0);
                MUST(s.wait(job, 20000));
                uint8_t held[8];
                Key keys[8];
                for (int i = 0; i < 8; ++i) keys[i] = key_of(from + uint64_t(i));
                s.contains(keys, held);
                if (t == 0) s.remove(std::span(keys, 1));
                if (t == 1) s.verify(false, {});
                s.stats();
                s.check();
            }
        });
    for (auto& t : ts) t.join();
    MUST(s.io_engine() == engine && s.stats()["uring"] == (engine == "uring"));
    MUST(s.flush(5000));
    s.poll();
    get(s, 0, 120);
    s.check();
}

// Puts, gets and deletes of the same few keys while segments come and go.
void life(const fs::path& p) {
    for (uint64_t max : {2, 8}) {  // MiB: too small for clean segments ahead, and large enough
        SegmentStore s(options(p / std::to_string(max), max << 20));
        put(s, 0, 6);
        std::atomic<bool> stop{false};
        auto one = [&](int64_t job, uint64_t i, bool write) {
            auto want = payload_of(i), data = want;
            if (!write) std::fill(data.begin(), data.end(), 0);
            StoreItem it{key_of(i), data.data(), data.size()};
            write ? s.put(job, nullptr, {it}, 0) : s.get(job, nullptr, {it});
            MUST(s.wait(job, 20000));
            MUST(write || data == want || data == std::vector<uint8_t>(data.size(), 0));
        };
        std::vector<std::thread> ts;
        ts.emplace_back([&] {
            for (int64_t job = 1'000'000; !stop; ++job) one(job, uint64_t(job) % 6, false);
        });
        ts.emplace_back([&] {
            for (int64_t job = 2'000'000; !stop; ++job) {
                Key k = key_of(uint64_t(job) % 6);
                if (job % 16 == 0) s.remove(std::span(&k, 1));
                one(job, uint64_t(job) % 6, true);
                s.check();
            }
        });
        for (uint64_t i = 100; i < 700; ++i) {
            one(int64_t(i), i, true);
            if (i % 16 == 0) ::usleep(2000);
        }
        stop = true;
        for (auto& t : ts) t.join();
        auto n = s.stats();
        MUST(n["corrupt"] == 0 && n["io_errors"] == 0 && n["recycled_segments"] > 20);
        MUST(n["reinserted_chunks"] > 0 && 4 * n["reinserted_bytes"] <= n["bytes_written"]);
        MUST((n["zeroed_bytes"] > 0) == (max == 8));
        s.poll();
        MUST(get(s, 699, 700) == 1);
        s.check();
    }
}

// Retained chunks outlive five times the bound, put by one thread while others retain, delete, read
// and look; what is not retained goes.
void retain(const fs::path& p) {
    for (uint64_t max : {2, 8}) {  // MiB
        SegmentStore s(options(p / std::to_string(max), max << 20));
        uint64_t mine = uint64_t(s.stats()["retained_max"]) / (2 * kMostPayload);
        std::vector<Key> keys;
        for (uint64_t i = 0; i < mine; ++i) keys.push_back(key_of(i));
        std::vector<uint8_t> out(keys.size());
        auto ask = [&](double seconds, unsigned level) {
            s.retain(keys, seconds, level, 3, out.data());
        };
        put(s, 0, mine);
        ask(600, 0);
        std::atomic<bool> stop{false};
        std::vector<std::thread> ts;
        ts.emplace_back([&] {
            std::vector<uint8_t> own(keys.size());
            for (unsigned n = 0; !stop; ++n) {
                s.retain(std::span(keys).first(mine / 2), 600 + n, n % 5, 3, own.data());
                if (n % 3 == 0) s.retain(std::span(keys).first(mine / 2), 0, 4, 0, own.data());
                s.retained(keys, 3, own.data());
                s.check();
                ::usleep(1000);  // others need the lock as well
            }
        });
        ts.emplace_back([&] {
            for (int64_t job = 1'000'000; !stop; ++job) {
                uint64_t i = uint64_t(job) % mine;
                Bytes want = payload_of(i), data(want.size());
                s.get(job, nullptr, {{key_of(i), data.data(), data.size()}});
                MUST(s.wait(job, 20000));
                MUST(data == want || data == Bytes(want.size()));
                Key gone = key_of(500 + uint64_t(job) % 900);
                if (job % 64 == 0) s.remove(std::span(&gone, 1));
            }
        });
        for (uint64_t i = 500; i < 500 + max * 150; i += 5) {
            for (uint64_t k = i; k < i + 5; ++k) {
                Bytes data = payload_of(k);
                s.put(int64_t(k), nullptr, {{key_of(k), data.data(), data.size()}}, 7);
                MUST(s.wait(int64_t(k), 20000));
            }
            if (i % 50 == 0) ::usleep(1000);
        }
        stop = true;
        for (auto& t : ts) t.join();
        auto n = s.stats();
        std::printf("retain: %d kept, %d lost, %d written again of %d MiB\n", int(mine),
                    int(n["retained_cut"]), int(n["reinserted_bytes"] / (1 << 20)),
                    int(n["bytes_written"] / (1 << 20)));
        MUST(n["retained_cut"] == 0 && n["no_space"] == 0 && n["corrupt"] == 0);
        MUST(n["retained_chunks"] == double(mine) && n["retained_bytes"] <= n["retained_max"]);
        MUST(n["recycled_segments"] > 10 && n["reinserted_chunks"] >= double(mine));
        s.poll();
        MUST(get(s, 0, mine) == int(mine));
        s.retained(keys, 0, out.data());
        MUST(std::count(out.begin(), out.end(), 1) == int(mine));
        s.check();
        s.retain_none();
        s.retained(keys, 0, out.data());
        MUST(std::count(out.begin(), out.end(), 1) == 0);
        s.check();
    }
}

// What is cancelled before it started does not touch its memory, and what shares a request with it
// goes on.
void cancel(const fs::path& p) {
    {
        put(*std::make_unique<SegmentStore>(options(p)), 0, 60);
    }
    for (int round = 0; round < 6; ++round) {
        SegmentStore s(options(p));
        std::vector<std::vector<uint8_t>> mine(60);
        s.inject("hang_read", 1);
        for (uint64_t i = 0; i < 60; ++i) {  // more than an engine starts
            mine[i] = std::vector<uint8_t>(payload_of(i).size());
            s.get(int64_t(i), nullptr, {{key_of(i), mine[i].data(), mine[i].size()}});
        }
        std::vector<std::vector<uint8_t>> puts;  // they wait for a segment, then lie together
        uint64_t base = 1000 + uint64_t(round) * 100;
        for (uint64_t i = 0; i < 12; ++i) {
            puts.push_back(payload_of(base + i));
            s.put(int64_t(base + i), nullptr, {{key_of(base + i), puts[i].data(), puts[i].size()}},
                  0);
        }
        ::usleep(round * 10000);
        size_t gone = 0;
        std::vector<std::thread> ts;
        for (int t = 0; t < 2; ++t)
            ts.emplace_back([&, t] {
                for (uint64_t i = uint64_t(t); i < 60; i += 2) s.cancel(int64_t(i));
            });
        for (auto& t : ts) t.join();
        for (uint64_t i = 0; i < 12; i += 3) gone += s.cancel(int64_t(base + i));
        MUST(gone == 4);
        for (auto& d : s.poll())
            if (uint64_t(d.job) < 60)
                std::vector<uint8_t>().swap(mine[size_t(d.job)]);
            else
                std::vector<uint8_t>().swap(puts[size_t(d.job) - base]);
        s.check();
        s.inject("hang_read", 0);
        for (uint64_t i = 0; i < 60; ++i)
            MUST(s.wait(int64_t(i), 20000) && (mine[i].empty() || mine[i] == payload_of(i)));
        for (uint64_t i = 0; i < 12; ++i) {
            MUST(s.wait(int64_t(base + i), 20000));
            MUST((s.length(key_of(base + i)) > 0) == (i % 3 != 0));
        }
        s.poll();
        MUST(get(s, base, base + 12) == 8 && s.stats()["corrupt"] == 0);
        s.check();
    }
}

// A job that is abandoned ends whatever its I/O does, and its memory is the caller's again: here it
// is freed. Jobs of the same keys go on.
void abandon(const fs::path& p) {
    {
        put(*std::make_unique<SegmentStore>(options(p)), 0, 60);
    }
    for (int round = 0; round < 8; ++round) {
        SegmentStore s(options(p));
        bool hang = round % 2 == 0;
        s.inject("hang_read", hang);
        std::vector<std::vector<uint8_t>> mine(60);
        std::vector<std::vector<uint8_t>> puts(24);
        uint64_t base = 1000 + uint64_t(round) * 100;
        for (uint64_t i = 0; i < 60; ++i) {
            mine[i] = std::vector<uint8_t>(payload_of(i).size());
            s.get(int64_t(i), nullptr, {{key_of(i), mine[i].data(), mine[i].size()}});
            if (i % 5) continue;
            for (uint64_t j : {i / 5, i / 5 + 12}) {
                uint64_t key = base + i / 5;  // the second of a key waits for the first
                puts[j] = payload_of(key);
                s.put(int64_t(base + j), nullptr, {{key_of(key), puts[j].data(), puts[j].size()}},
                      0);
            }
        }
        ::usleep(round * 3000);
        std::vector<std::thread> ts;
        for (int t = 0; t < 2; ++t)
            ts.emplace_back([&, t] {
                for (uint64_t i = uint64_t(t); i < 60; i += 2)
                    if (i % 10 < 8) s.abandon(int64_t(i));
                for (uint64_t i = uint64_t(t); i < 12; i += 2) s.abandon(int64_t(base + i));
            });
        size_t ended = 0;
        auto free_ended = [&] {
            for (auto& d : s.poll()) {
                bool read = uint64_t(d.job) < 60;
                auto& buf = read ? mine[size_t(d.job)] : puts[size_t(d.job) - base];
                if (read && d.results[0] == kOk) MUST(buf == payload_of(uint64_t(d.job)));
                std::vector<uint8_t>().swap(buf);
                ++ended;
            }
        };
        // What is not abandoned may wait behind reads that hang.
        for (int i = 0; i < 5000 && ended < (hang ? 60 : 84); ++i, ::usleep(2000)) free_ended();
        for (auto& t : ts) t.join();
        MUST(ended >= (hang ? 60 : 84));
        s.check();
        s.inject("hang_read", 0);
        for (uint64_t i = 0; i < 60; ++i) MUST(s.wait(int64_t(i), 20000));
        for (uint64_t i = 0; i < 24; ++i) MUST(s.wait(int64_t(base + i), 20000));
        free_ended();
        MUST(ended == 84);
        for (uint64_t i = 0; i < 12; ++i)
            MUST(s.length(key_of(base + i)) == int64_t(payload_of(base + i).size()));
        MUST(get(s, base, base + 12) == 12 && s.stats()["corrupt"] == 0);
        s.check();
    }
}

void faults(const fs::path& p) {
    auto s = std::make_unique<SegmentStore>(options(p));
    put(*s, 0, 10);
    s->inject("hang_read", 1);
    auto buf = std::make_unique<Bytes>(payload_of(1).size());
    s->get(5, nullptr, {{key_of(1), buf->data(), buf->size()}});
    MUST(!s->wait(5, 50));
    auto t0 = std::chrono::steady_clock::now();
    MUST(!s->close(300));  // what hangs, hangs; close does not
    MUST(std::chrono::steady_clock::now() - t0 < std::chrono::seconds(5));
    auto done = s->poll();
    MUST(done.size() == 1 && done[0].results[0] == kDropped);
    buf.reset();  // the hung read does not touch it any more
    MUST(SegmentStore(options(p)).writer_dir().ends_with("w1"));  // still locked
    s->inject("hang_read", 0);
    s.reset();
    for (int i = 0; i < 500; ++i) {
        if (SegmentStore(options(p)).writer_dir().ends_with("w0")) return;
        ::usleep(20000);
    }
    MUST(!"the lock is never given up");
}

void damage(const fs::path& file) {
    auto size = fs::file_size(file);
    if (rng() % 4 == 0) {
        fs::resize_file(file, rng() % (size + 1));
        return;
    }
    std::fstream f(file, std::ios::in | std::ios::out | std::ios::binary);
    for (int n = 1 + int(rng() % 30); n && size; --n) {
        // Metadata sits at the ends; flips only in the middle would mostly find payload.
        uint64_t at = rng() % 3   ? rng() % size
                      : rng() % 2 ? rng() % std::min<uint64_t>(size, 4096)
                                  : size - 1 - rng() % std::min<uint64_t>(size, 8192);
        f.seekg(std::streamoff(at));
        char c = char(f.get() ^ (1 << rng() % 8));
        f.seekp(std::streamoff(at));
        f.put(c);
    }
}

void hostile(const fs::path& base, int rounds) {
    fs::path master = base / "master";
    {
        SegmentStore s(options(master, 4 << 20));
        put(s, 0, 80);
        Key k = key_of(3);
        s.remove(std::span(&k, 1));
        s.flush(5000);
        s.close(5000);
    }
    int refused = 0, hits = 0;
    for (int r = 0; r < rounds; ++r) {
        fs::path p = base / "copy";
        fs::remove_all(p);
        fs::copy(master, p, fs::copy_options::recursive);
        for (auto& e : fs::recursive_directory_iterator(p))
            ::chmod(e.path().c_str(), e.is_directory() ? 0700 : 0600);
        ::chmod(p.c_str(), 0700);
        std::vector<fs::path> files;
        for (auto& e : fs::recursive_directory_iterator(p))
            if (e.is_regular_file() && (r % 10 == 0 || e.path().filename() != "MANIFEST"))
                files.push_back(e.path());
        for (int n = 1 + int(rng() % 3); n; --n) damage(files[rng() % files.size()]);
        try {
            SegmentStore s(options(p, 4 << 20));
            s.check();
            hits += get(s, 0, 80);
            put(s, 80, 100);
            auto rep = s.verify(true, {});
            MUST(rep.dropped == rep.bad);
            s.check();
            MUST(s.verify(false, {}).bad == 0);
        } catch (const kvo::OsError& e) {
            ++refused;
            MUST(std::string(e.what()).find(p.string()) != std::string::npos);
        }
    }
    std::printf("hostile: %d rounds, %d hits, %d refused\n", rounds, hits, refused);
    MUST(hits > 0);
}

}  // namespace

int main(int argc, char** argv) {
    MUST(argc >= 2);
    fs::path dir = argv[1];
    fs::create_directories(dir);
    format();
    test_key_index();
    test_forged((dir / "forged").string());
    test_parts((dir / "parts").string());
    std::vector<std::string> engines{"threads"};
    if (std::string why = uring_problem(); why.empty())
        engines.push_back("uring");
    else
        std::printf("test_store: uring not tested: %s\n", why.c_str());
    for (auto& e : engines) {
        engine = e;
        fs::path here = dir / e;
        fs::create_directories(here);
        test_engine(e, here.string());
        basics(here / "basics");
        merged(here / "merged");
        slots(here / "slots");
        threads(here / "threads");
        life(here / "life");
        retain(here / "retain");
        cancel(here / "cancel");
        abandon(here / "abandon");
        faults(here / "faults");
        hostile(here, argc > 2 ? std::atoi(argv[2]) : 60);
        std::printf("test_store: %s ok\n", e.c_str());
    }
}
