// Deterministic fuzzer of everything the chunk store reads from its directory, meant for ASan/UBSan
// builds (run_fuzz.sh).
//   fuzz_store DIRECTORY [cases] [first case] [seconds per case]
//
// Half of the mutations (fuzz_mutations.cpp) are blind (bits, blocks, lengths, names), half know
// the format: they set one field to an awkward value and put the CRCs right again, so that the
// value is really looked at. Every case: no crash, no sanitizer report, no growth of the files past
// the bound, an end in time, and every byte served is what was put under the key. A case number
// gives the same mutations again.
#include <sys/stat.h>
#include <unistd.h>

#include <csignal>
#include <filesystem>
#include <fstream>

#include "../errors.h"
#include "../store_io.h"
#include "fuzz_store.h"

namespace fs = std::filesystem;
using namespace kvo::store;
using namespace store_test;

std::mt19937_64 fuzz_rng;

namespace {

std::string engine = "threads";  // of every store that is opened
constexpr uint64_t kBound = 1 << 20, kSegment = 64 << 10, kMostPayload = 12000;

void too_slow(int) {
    const char text[] = "too slow\n";
    if (::write(2, failing_in.data(), failing_in.size()) < 0) ::_exit(3);
    if (::write(2, text, sizeof text - 1) < 0) ::_exit(3);
    ::_exit(2);
}

const Bytes& payload_of(uint64_t i) {
    static std::map<uint64_t, Bytes> made;
    Bytes& v = made[i];
    if (v.empty()) v = store_test::payload_of(i, kMostPayload);
    return v;
}

StoreOptions options(const fs::path& p) {
    StoreOptions o = store_test::options(p.string(), kBound, kSegment, 2);
    o.io_engine = engine;
    return o;
}

// ---- files

Files read_files(const fs::path& p) {
    Files out;
    for (auto& e : fs::recursive_directory_iterator(p)) {
        if (!e.is_regular_file()) continue;
        std::ifstream f(e.path(), std::ios::binary);
        out[fs::relative(e.path(), p).string()] =
            Bytes(std::istreambuf_iterator<char>(f), std::istreambuf_iterator<char>());
    }
    return out;
}

void write_files(const Files& files, const fs::path& p) {
    fs::remove_all(p);
    for (auto& [name, data] : files) {
        fs::path parent = (p / name).parent_path();
        if (fs::is_regular_file(parent)) fs::remove(parent);  // a directory with a segment's name
        fs::create_directories(parent);
        std::ofstream f(p / name, std::ios::binary);
        // Long tails of zeros are holes: a file may claim to be large at no cost.
        size_t n = data.size();
        while (n && !data[n - 1]) --n;
        f.write(reinterpret_cast<const char*>(data.data()), std::streamsize(n));
        f.close();
        if (n < data.size()) fs::resize_file(p / name, data.size());
        ::chmod((p / name).c_str(), 0600);
    }
    ::chmod(p.c_str(), 0700);
    for (auto& e : fs::recursive_directory_iterator(p))
        if (e.is_directory()) ::chmod(e.path().c_str(), 0700);
}

// ---- one case

void put(SegmentStore& s, uint64_t from, uint64_t to) {
    store_test::put(s, from, to, kMostPayload);
}

// Hits. Asks for whatever length the store claims to hold.
uint64_t get(SegmentStore& s, uint64_t n) {
    std::vector<Bytes> got;
    std::vector<StoreItem> items;
    for (uint64_t i = 0; i < n; ++i) {
        int64_t len = s.length(key_of(i));
        MUST(len < int64_t(kBound * 128));
        got.emplace_back(size_t(std::max<int64_t>(len, 0)), uint8_t(0xEE));
        items.push_back({key_of(i), got.back().data(), got.back().size()});
    }
    s.get(2, nullptr, items);
    auto res = finish(s, 2);
    uint64_t hits = 0;
    for (uint64_t i = 0; i < n; ++i) {
        if (res[i] == kOk)
            MUST(got[i] == payload_of(i));
        else
            for (uint8_t b : got[i]) MUST(b == 0xEE);
        hits += res[i] == kOk;
    }
    return hits;
}

// Forged records may claim the same extent twice. All else must hold whatever the files say.
void check(SegmentStore& s) {
    try {
        s.check();
    } catch (const kvo::CheckError& e) {
        MUST(std::string(e.what()).find("overlap") != std::string::npos);
    }
}

struct Sum {
    uint64_t hits = 0, refused = 0, lost = 0;
};

void open_case(const fs::path& p, Sum& sum, bool records_only) {
    uint64_t before = 0;
    for (auto& e : fs::recursive_directory_iterator(p))
        if (e.is_regular_file()) before += e.file_size();
    try {
        StoreOptions o = options(p);
        o.read_only = one_in(4);
        SegmentStore s(o);
        check(s);
        uint64_t hits = get(s, kKeys);
        sum.hits += hits;
        sum.lost += !hits;
        MUST(!records_only || hits > kKeys / 3);
        check(s);
        if (!o.read_only && one_in(2)) {
            put(s, kKeys, kKeys + 12);
            Key k = key_of(below(kKeys));
            s.remove(std::span(&k, 1));
            auto rep = s.verify(true, {});
            MUST(rep.dropped <= rep.bad);
            check(s);
            MUST(s.flush(20000) || s.stats()["io_errors"] > 0);
            get(s, kKeys + 12);
        }
        s.close(20000);
    } catch (const kvo::OsError& e) {
        ++sum.refused;
        MUST(std::string(e.what()).find(p.string()) != std::string::npos);
        MUST(std::string(e.what()).find('\n') == std::string::npos);
    }
    uint64_t after = 0;
    for (auto& e : fs::recursive_directory_iterator(p))
        if (e.is_regular_file()) after += e.file_size();
    MUST(after <= std::max(before, kBound) + 4 * kBlock);
}

Files master(const fs::path& p) {
    {
        SegmentStore s(options(p));
        put(s, 0, 30);
        s.close(5000);
    }
    SegmentStore s(options(p));  // the second life's last segment stays open: a journal stands
    put(s, 30, kKeys);
    Key k[2] = {key_of(3), key_of(50)};
    s.remove(k);
    MUST(s.flush(5000) && get(s, kKeys) == kKeys - 2);
    s.abandon();
    Files files = read_files(p);
    MUST(files.size() > 8);
    bool journal = false;
    for (auto& [n, d] : files) journal |= is_journal(n);
    MUST(journal);
    return files;
}

}  // namespace

int main(int argc, char** argv) {
    MUST(argc >= 2);
    fs::path dir = argv[1];
    uint64_t cases = argc > 2 ? std::strtoull(argv[2], nullptr, 10) : 2000;
    uint64_t first = argc > 3 ? std::strtoull(argv[3], nullptr, 10) : 0;
    unsigned limit = argc > 4 ? unsigned(std::atoi(argv[4])) : 5;
    fs::create_directories(dir);
    std::string why = uring_problem();
    bool uring = why.empty();
    if (!uring) std::printf("fuzz_store: uring not fuzzed: %s\n", why.c_str());
    Files files = master(dir / "master");
    std::signal(SIGALRM, too_slow);
    Sum sum;
    for (uint64_t current = first; current < first + cases; ++current) {
        failing_in = "case " + std::to_string(current) + ": ";
        fuzz_rng.seed(current * 7919 + 1);
        engine = uring && current % 2 ? "uring" : "threads";
        Files copy = files;
        bool records_only = true;
        for (uint64_t n = 1 + below(3); n; --n) records_only &= mutate(copy);
        fs::path p = dir / "case";
        write_files(copy, p);
        ::alarm(limit);
        open_case(p, sum, records_only);
        ::alarm(0);
    }
    std::printf("fuzz_store: %llu cases, %llu chunks served, %llu refused, %llu lost all\n",
                (unsigned long long)cases, (unsigned long long)sum.hits,
                (unsigned long long)sum.refused, (unsigned long long)sum.lost);
    MUST(sum.hits > cases * 20 && sum.refused > 0);
}
