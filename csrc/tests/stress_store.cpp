// Many threads on one chunk store at once, meant for a TSan build (run_stress.sh).
//   stress_store DIRECTORY SECONDS
//
// Lives of one directory follow each other, engine by engine. In each, threads put, get, delete,
// list, verify, flush, move arena slots on under their I/O, make the disk fail, and open the same
// directory as a second writer; then the store is closed, or killed, while all of that goes on.
// Whatever is served must be the bytes of its key.
#include <algorithm>
#include <chrono>
#include <filesystem>
#include <map>
#include <mutex>
#include <random>
#include <stdexcept>
#include <thread>

#include "../arena.h"
#include "../checksum.h"
#include "../errors.h"
#include "../store.h"
#include "../store_io.h"
#include "test_store.h"

namespace fs = std::filesystem;
using namespace kvo::store;
using store_test::key_of;
using Clock = std::chrono::steady_clock;

namespace {

constexpr uint64_t kKeys = 400;         // plain ones: more than the bound holds
constexpr uint64_t kSlotBytes = 32768;  // of keys behind kKeys
constexpr uint32_t kSlots = 32;

struct Count {
    std::atomic<uint64_t> puts{0}, hits{0}, misses{0}, failed{0}, removed{0}, verified{0},
        slot_puts{0}, slot_hits{0}, moved{0}, neighbours{0}, cut_off{0}, lives{0}, recycled{0};
};

size_t bytes_of(uint64_t i) {
    return i >= kKeys ? kSlotBytes : 1 + i * 7919 % 40000;
}

// A function of the key without repetition: a misplaced sector shows.
void fill(uint64_t i, uint8_t* to) {
    size_t n = bytes_of(i);
    uint64_t word = (i + 1) << 32;
    for (size_t at = 0; at < n; at += 8, ++word) {
        uint64_t v = word * 0x9E3779B97F4A7C15ull;
        std::memcpy(to + at, &v, std::min<size_t>(8, n - at));
    }
}

bool right(uint64_t i, const uint8_t* data) {
    std::vector<uint8_t> want(bytes_of(i));
    fill(i, want.data());
    return std::memcmp(data, want.data(), want.size()) == 0;
}

StoreOptions options(const fs::path& p, const std::string& engine) {
    StoreOptions o = store_test::options(p.string(), 4 << 20, 256 << 10, 3);
    o.queue_bytes = 1 << 20;  // small: some puts are dropped
    o.io_engine = engine;
    return o;
}

// One life. Threads end at the first call that says the store is closed.
class Life {
  public:
    Life(const fs::path& path, const std::string& engine, uint64_t seed, Count& count)
        : path_(path), engine_(engine), seed_(seed), n_(count), s_(options(path, engine)) {
        arena_ = kvo::Arena::create(4 << 20, kSlots, 1, false);
    }

    void run(std::chrono::milliseconds for_ms) {
        std::vector<std::thread> ts;
        uint64_t id = 0;
        auto go = [&](void (Life::*what)(std::mt19937_64&)) {
            ts.emplace_back([this, what, id = id++] {
                std::mt19937_64 rng(seed_ * 100 + id);
                try {
                    while (!over_) (this->*what)(rng);
                } catch (const std::invalid_argument& e) {
                    MUST(std::string(e.what()).find("closed") != std::string::npos);
                    ++n_.cut_off;
                }
            });
        };
        for (int i = 0; i < 2; ++i) go(&Life::put);
        for (int i = 0; i < 2; ++i) go(&Life::get);
        go(&Life::remove);
        go(&Life::look);
        go(&Life::slots);
        go(&Life::verify);
        go(&Life::fail);
        go(&Life::neighbour);
        std::this_thread::sleep_for(for_ms);
        n_.recycled += uint64_t(s_.stats()["recycled_segments"]);
        s_.inject("slow_read_ms", 0);
        if (seed_ % 3 == 0)
            s_.abandon();  // as a kill would
        else
            MUST(s_.close(20000));
        over_ = true;
        for (auto& t : ts) t.join();
        ++n_.lives;
    }

  private:
    struct Job {
        std::vector<uint64_t> ids;
        std::vector<std::vector<uint8_t>> data;
        std::vector<StoreItem> items;
    };

    Job some(std::mt19937_64& rng) {
        Job j;
        for (uint64_t n = 1 + rng() % 8; n; --n) j.ids.push_back(rng() % kKeys);
        for (uint64_t i : j.ids) {
            j.data.emplace_back(bytes_of(i));
            j.items.push_back({key_of(i), j.data.back().data(), j.data.back().size()});
        }
        return j;
    }

    // poll() hands out everybody's results: they are kept for who asks.
    std::vector<uint8_t> result(int64_t job) {
        for (;;) {
            bool ended = s_.wait(job, 20000);
            MUST(ended);
            std::lock_guard lk(mu_);
            for (auto& d : s_.poll()) done_[d.job] = std::move(d.results);
            if (auto it = done_.find(job); it != done_.end()) {
                auto out = std::move(it->second);
                done_.erase(it);
                return out;
            }
        }
    }

    void put(std::mt19937_64& rng) {
        Job j = some(rng);
        for (size_t i = 0; i < j.ids.size(); ++i) fill(j.ids[i], j.data[i].data());
        int64_t job = next_++;
        s_.put(job, nullptr, j.items, 3);
        for (uint8_t r : result(job)) ++(r == kOk ? n_.puts : n_.failed);
    }

    void get(std::mt19937_64& rng) {
        Job j = some(rng);
        int64_t job = next_++;
        s_.get(job, nullptr, j.items);
        auto res = result(job);
        for (size_t i = 0; i < res.size(); ++i) {
            MUST(res[i] != kOk || right(j.ids[i], j.data[i].data()));
            ++(res[i] == kOk ? n_.hits : res[i] == kMiss ? n_.misses : n_.failed);
        }
    }

    void remove(std::mt19937_64& rng) {
        Key keys[3];
        for (Key& k : keys) k = key_of(rng() % (kKeys + kSlots));
        n_.removed += s_.remove(keys);
        if (rng() % 8 == 0) s_.flush(20000);
        std::this_thread::sleep_for(std::chrono::microseconds(rng() % 2000));
    }

    void look(std::mt19937_64& rng) {
        Key keys[8];
        uint8_t held[8];
        for (Key& k : keys) k = key_of(rng() % kKeys);
        s_.contains(keys, held);
        for (Key& k : keys) MUST(s_.length(k) <= 40000);
        MUST(s_.queued_bytes() <= (2 << 20));
        MUST(s_.stats()["bytes_used"] <= s_.stats()["bytes_max"]);
        s_.ls(rng() % 2 ? 5 : 0);
        s_.check();
        {
            std::lock_guard lk(mu_);
            for (auto& d : s_.poll()) done_[d.job] = std::move(d.results);
        }
        std::this_thread::sleep_for(std::chrono::microseconds(rng() % 3000));
    }

    // The slots are ours alone; some move on to another life while the store writes or reads them.
    void slots(std::mt19937_64& rng) {
        std::vector<StoreItem> items;
        std::vector<uint64_t> ids;
        bool write = rng() % 2;
        for (uint32_t slot = 0; slot < kSlots; slot += 1 + uint32_t(rng() % 8)) {
            uint64_t id = kKeys + rng() % kSlots, off = slot * kSlotBytes;
            uint64_t gen = arena_->begin_fill(slot, 1);
            StoreItem it{
                key_of(id), arena_->data() + off, kSlotBytes, arena_->leaf_ptr(off), slot, gen,
                slot};
            if (write) {
                fill(id, it.data);
                kvo::leaf_hashes(it.data, kSlotBytes, kvo::seed_of(it.key.b), it.leaves);
                MUST(arena_->fill_done(slot, gen));
            }
            ids.push_back(id);
            items.push_back(it);
        }
        int64_t job = next_++;
        (write ? s_.put(job, arena_, items, 0) : s_.get(job, arena_, items));
        size_t gone = rng() % 3 ? items.size() : rng() % items.size();
        if (gone < items.size()) ++n_.moved, arena_->begin_fill(items[gone].slot, 1);
        auto res = result(job);
        for (size_t i = 0; i < items.size(); ++i) {
            if (write) {
                n_.slot_puts += res[i] == kOk;
                continue;
            }
            bool ready = arena_->state_of(items[i].slot, items[i].generation) == kvo::kReady;
            MUST(ready == (res[i] == kOk && i != gone));
            if (ready) ++n_.slot_hits;
            MUST(!ready || right(ids[i], items[i].data));
        }
    }

    void verify(std::mt19937_64& rng) {
        auto rep = s_.verify(rng() % 2, [&](uint64_t, uint64_t, uint64_t) { return !over_; });
        MUST(rep.bad == 0 || failing_);
        n_.verified += rep.checked;
        std::this_thread::sleep_for(std::chrono::milliseconds(rng() % 20));
    }

    void fail(std::mt19937_64& rng) {
        static const char* const kinds[] = {"read_eio", "write_eio", "enospc", "short_read",
                                            "slow_read_ms"};
        std::this_thread::sleep_for(std::chrono::milliseconds(rng() % 40));
        const char* kind = kinds[rng() % 5];
        failing_ = true;
        s_.inject(kind, 1 + int(rng() % 5));
        std::this_thread::sleep_for(std::chrono::milliseconds(rng() % 20));
        s_.inject(kind, 0);
    }

    // A second writer of the directory: its segments are read by us, ours by it.
    void neighbour(std::mt19937_64& rng) {
        {
            SegmentStore other(options(path_, engine_));
            for (int n = 0; n < 6; ++n) {
                Job j = some(rng);
                bool write = n < 2;
                for (size_t i = 0; write && i < j.ids.size(); ++i) fill(j.ids[i], j.data[i].data());
                (write ? other.put(n, nullptr, j.items, 3) : other.get(n, nullptr, j.items));
                MUST(other.wait(n, 20000));
                auto done = other.poll();
                MUST(done.size() == 1);
                for (size_t i = 0; !write && i < j.ids.size(); ++i)
                    MUST(done[0].results[i] != kOk || right(j.ids[i], j.data[i].data()));
            }
            other.check();
            ++n_.neighbours;
        }
        std::this_thread::sleep_for(std::chrono::milliseconds(rng() % 50));
    }

    fs::path path_;
    std::string engine_;
    uint64_t seed_;
    Count& n_;
    SegmentStore s_;
    std::shared_ptr<kvo::Arena> arena_;
    std::atomic<int64_t> next_{1};
    std::atomic<bool> over_{false}, failing_{false};
    std::mutex mu_;
    std::map<int64_t, std::vector<uint8_t>> done_;
};

void stress(const fs::path& path, const std::string& engine, std::chrono::milliseconds for_ms) {
    Count n;
    auto end = Clock::now() + for_ms;
    for (uint64_t seed = 1; seed <= 3 || Clock::now() < end; ++seed) {
        Life(path, engine, seed, n).run(std::chrono::milliseconds(200 + seed * 137 % 700));
        // What one life leaves is whole for the next.
        SegmentStore again(options(path, engine));
        again.check();
        MUST(again.verify(false, {}).bad == 0 && again.io_engine() == engine);
    }
    std::printf(
        "stress_store: %s: %lu lives, %lu puts, %lu hits, %lu misses, %lu not done, %lu deleted, "
        "%lu verified, %lu+%lu slots put and read, %lu moved on, %lu neighbours, %lu recycled\n",
        engine.c_str(), n.lives.load(), n.puts.load(), n.hits.load(), n.misses.load(),
        n.failed.load(), n.removed.load(), n.verified.load(), n.slot_puts.load(),
        n.slot_hits.load(), n.moved.load(), n.neighbours.load(), n.recycled.load());
    for (auto* c : {&n.puts, &n.hits, &n.misses, &n.failed, &n.removed, &n.verified, &n.slot_puts,
                    &n.slot_hits, &n.moved, &n.neighbours, &n.cut_off, &n.recycled})
        MUST(*c > 0);
}

}  // namespace

int main(int argc, char** argv) {
    MUST(argc == 3);
    fs::path dir = argv[1];
    fs::create_directories(dir);
    std::vector<std::string> engines{"threads"};
    if (std::string why = uring_problem(); why.empty())
        engines.push_back("uring");
    else
        std::printf("stress_store: uring not tested: %s\n", why.c_str());
    auto each = std::chrono::milliseconds(std::atoi(argv[2]) * 1000 / int(engines.size()));
    for (auto& e : engines) stress(dir / e, e, each);
}
