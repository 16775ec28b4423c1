// Deterministic fuzzer of everything the chunk store reads from its directory, meant for ASan/UBSan
// builds (run_fuzz.sh).
//   fuzz_store DIRECTORY [cases] [first case] [seconds per case]
//
// Half of the mutations are blind (bits, blocks, lengths, names), half know the format: they set
// one field to an awkward value and put the CRCs right again, so that the value is really looked
// at. Every case: no crash, no sanitizer report, no growth of the files past the bound, an end in
// time, and every byte served is what was put under the key. A case number gives the same
// mutations again.
#include <sys/stat.h>
#include <unistd.h>

#include <csignal>
#include <cstdio>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <map>
#include <random>
#include <set>

#include "../checksum.h"
#include "../errors.h"
#include "../store.h"
#include "../store_format.h"

namespace fs = std::filesystem;
using namespace kvo::store;
using Bytes = std::vector<uint8_t>;
using Files = std::map<std::string, Bytes>;  // path below the store -> content

namespace {

constexpr uint64_t kBound = 1 << 20, kSegment = 64 << 10, kKeys = 70;
uint64_t current = 0;
std::mt19937_64 rng;
uint64_t below(uint64_t n) {
    return n ? rng() % n : 0;
}
bool one_in(uint64_t n) {
    return below(n) == 0;
}

#define MUST(cond)                                                                              \
    do {                                                                                        \
        if (!(cond)) {                                                                          \
            std::fprintf(stderr, "case %llu: %s:%d: failed: %s\n", (unsigned long long)current, \
                         __FILE__, __LINE__, #cond);                                            \
            std::exit(1);                                                                       \
        }                                                                                       \
    } while (0)

void too_slow(int) {
    char text[64];
    int n = std::snprintf(text, sizeof text, "case %llu: too slow\n", (unsigned long long)current);
    if (::write(2, text, size_t(n)) < 0) ::_exit(3);
    ::_exit(2);
}

Key key_of(uint64_t i) {
    Key k;
    uint64_t a = i * 0x9E3779B97F4A7C15ull, b = ~i * 0xC2B2AE3D27D4EB4Full;
    std::memcpy(k.b, &a, 8);
    std::memcpy(k.b + 8, &b, 8);
    return k;
}

const Bytes& payload_of(uint64_t i) {
    static std::map<uint64_t, Bytes> made;
    Bytes& v = made[i];
    if (v.empty()) {
        std::mt19937_64 r(i + 1);
        v.resize(1 + r() % 12000);
        for (auto& b : v) b = uint8_t(r());
    }
    return v;
}

StoreOptions options(const fs::path& p) {
    StoreOptions o;
    o.path = p.string();
    o.max_bytes = kBound;
    o.segment_bytes = kSegment;
    o.threads = 2;
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

bool is_segment(const std::string& n) {
    return n.find("/seg-") != n.npos;
}
bool is_journal(const std::string& n) {
    return n.find("/journal-") != n.npos;
}

const std::string& pick(const Files& files) {
    return std::next(files.begin(), ptrdiff_t(below(files.size())))->first;
}
// A file for which `is` holds, or null.
template <class F>
Bytes* pick_if(Files& files, F is, std::string* name = nullptr) {
    std::vector<std::string> fit;
    for (auto& [n, d] : files)
        if (is(n)) fit.push_back(n);
    if (fit.empty()) return nullptr;
    const std::string& n = fit[below(fit.size())];
    if (name) *name = n;
    return &files[n];
}

// ---- what a field may be

uint64_t awkward(uint64_t was, uint64_t file_bytes) {
    const uint64_t edge[] = {0,
                             1,
                             2,
                             63,
                             64,
                             4095,
                             4096,
                             4097,
                             0x7FFFFFFF,
                             0x80000000,
                             0xF0000000,
                             0xFFFEFFFF,
                             0xFFFF0000,
                             0xFFFFFFFF,
                             0x100000000,
                             1ull << 40,
                             0x7FFFFFFFFFFFFFFF,
                             0x8000000000000000,
                             ~0ull - 4095,
                             ~0ull,
                             file_bytes,
                             file_bytes / 64,
                             file_bytes / kBlock,
                             file_bytes + 4096};
    switch (below(4)) {
        case 0:
            return was + below(5) - 2;
        case 1:
            return was ^ (1ull << below(64));
        case 2:
            return rng() >> below(64);
        default:
            return edge[below(std::size(edge))];
    }
}

template <class T>
void set_field(void* base, size_t at, uint64_t file_bytes) {
    T v;
    std::memcpy(&v, static_cast<char*>(base) + at, sizeof v);
    v = T(awkward(v, file_bytes));
    std::memcpy(static_cast<char*>(base) + at, &v, sizeof v);
}

void mutate_record(Record& r, const Uuid& uuid, uint64_t file_bytes) {
    switch (below(9)) {
        case 0:
            set_field<uint8_t>(&r, offsetof(Record, type), file_bytes);
            break;
        case 1:
            r.type = r.type == kPut ? kDelete : kPut;
            break;  // with the extent it had
        case 2:
            set_field<uint64_t>(&r, offsetof(Record, seq), file_bytes);
            break;
        case 3:
            r.key = key_of(below(kKeys + 5));
            break;
        case 4:
            set_field<uint32_t>(&r, offsetof(Record, seg), file_bytes);
            break;
        case 5:
            set_field<uint32_t>(&r, offsetof(Record, gen), file_bytes);
            break;
        case 6:
            set_field<uint32_t>(&r, offsetof(Record, off4k), file_bytes);
            break;
        case 7:
            set_field<uint32_t>(&r, offsetof(Record, len), file_bytes);
            break;
        default:
            r.type = kDelete;
            set_field<uint32_t>(&r, offsetof(Record, off4k), file_bytes);
            set_field<uint32_t>(&r, offsetof(Record, len), file_bytes);
    }
    seal_record(r, uuid);
}

// ---- mutations that know the format

Uuid uuid_of(const Files& files) {
    Manifest m;
    unsigned version;
    auto it = files.find("MANIFEST");
    if (it != files.end())
        parse_manifest(std::string(it->second.begin(), it->second.end()), m, version);
    return m.uuid;
}

void forge_header(Files& files) {
    Bytes* d = pick_if(files, is_segment);
    if (!d || d->size() < kBlock) return;
    const size_t u32[] = {8, 12, 32, 36}, u64[] = {40, 48, 56};
    if (one_in(2))
        set_field<uint32_t>(d->data(), u32[below(4)], d->size());
    else
        set_field<uint64_t>(d->data(), u64[below(3)], d->size());
    SegmentHeader h;
    std::memcpy(&h, d->data(), sizeof h);
    h.crc = page_crc(h);
    std::memcpy(d->data(), &h, sizeof h);
}

void forge_trailer(Files& files) {
    Bytes* d = pick_if(files, is_segment);
    if (!d || d->size() < 2 * kBlock) return;
    uint8_t* at = d->data() + d->size() / kBlock * kBlock - kBlock;
    SegmentTrailer t;
    std::memcpy(&t, at, sizeof t);
    if (std::memcmp(t.magic, kTrailerMagic, 8) != 0) {  // unsealed: a footer of our making
        SegmentHeader h;
        std::memcpy(&h, d->data(), sizeof h);
        t = make_trailer(h.uuid, h.seg, h.gen, below(d->size() / kBlock + 2) * kBlock, below(400),
                         0);
    }
    const size_t u32[] = {8, 12, 56}, u64[] = {32, 40, 48};
    if (one_in(3))
        set_field<uint32_t>(&t, u32[below(3)], d->size());
    else
        set_field<uint64_t>(&t, u64[below(3)], d->size());
    if (one_in(2) && t.records_off <= d->size() && t.count <= (d->size() - t.records_off) / 64)
        t.records_crc = crc32c(d->data() + t.records_off, t.count * 64);
    t.crc = page_crc(t);
    std::memcpy(at, &t, sizeof t);
}

// The records of a footer (with their trailer) or of a journal.
void forge_records(Files& files) {
    Uuid uuid = uuid_of(files);
    std::string name;
    Bytes* d = one_in(2) ? pick_if(files, is_journal, &name) : pick_if(files, is_segment, &name);
    if (!d || d->size() < 2 * kBlock - kBlock * is_journal(name)) return;
    uint64_t off = 0, count = d->size() / 64;
    SegmentTrailer t{};
    uint8_t* page = nullptr;
    if (is_segment(name)) {
        page = d->data() + d->size() / kBlock * kBlock - kBlock;
        std::memcpy(&t, page, sizeof t);
        off = t.records_off, count = t.count;
        if (off > d->size() || count > (d->size() - off) / 64 || !count) return;
    }
    std::vector<Record> recs(count);
    std::memcpy(recs.data(), d->data() + off, count * 64);
    uint64_t used = 0;
    while (used < count && recs[used].magic == kRecordMagic) ++used;
    if (!used) return;
    for (uint64_t n = 1 + below(4); n; --n) {
        Record& r = recs[below(used)];
        if (one_in(5))
            std::swap(r, recs[below(used)]);
        else if (one_in(5))
            r = recs[below(used)];
        else
            mutate_record(r, uuid, d->size());
    }
    std::memcpy(d->data() + off, recs.data(), count * 64);
    if (!page) return;
    t.records_crc = crc32c(recs.data(), count * 64);
    t.crc = page_crc(t);
    std::memcpy(page, &t, sizeof t);
}

void forge_manifest(Files& files) {
    auto it = files.find("MANIFEST");
    if (it == files.end()) return;
    std::string text(it->second.begin(), it->second.end());
    const char* values[] = {"0",
                            "-1",
                            "1",
                            "4096",
                            "18446744073709551615",
                            "18446744073709551616",
                            "99999999999999999999999999",
                            "0x10",
                            "",
                            "65537",
                            " 1",
                            "1 1",
                            "%s%n"};
    const char* names[] = {"format ", "uuid ", "segment_bytes ", "max_bytes "};
    size_t at = text.find(names[below(4)]), end = text.find('\n', at);
    if (at == text.npos || end == text.npos) return;
    at = text.find(' ', at) + 1;
    text.replace(at, end - at,
                 one_in(4) ? std::string(below(6000), char('0' + below(10))) : values[below(13)]);
    size_t tail = text.rfind("crc32c ");
    if (tail == text.npos) return;
    text.resize(tail);
    char crc[24];
    std::snprintf(crc, sizeof crc, "crc32c %08x\n", crc32c(text.data(), text.size()));
    text += crc;
    it->second.assign(text.begin(), text.end());
}

// ---- blind mutations

void flip(Bytes& d) {
    for (uint64_t n = 1 + below(20); n && !d.empty(); --n) {
        // Metadata sits at the ends; flips anywhere would mostly find payload.
        uint64_t at = one_in(3)   ? below(d.size())
                      : one_in(2) ? below(std::min<uint64_t>(d.size(), 4096))
                                  : d.size() - 1 - below(std::min<uint64_t>(d.size(), 12288));
        d[at] ^= uint8_t(1u << below(8));
    }
}

void resize(Bytes& d) {
    switch (below(5)) {
        case 0:
            d.resize(below(d.size() + 1));
            break;
        case 1:
            d.resize(below(d.size() / kBlock + 1) * kBlock);
            break;
        case 2:
            d.resize(d.size() + 1 + below(3 * kBlock), uint8_t(rng()));
            break;
        case 3:
            d.resize(d.size() + (1 + below(4)) * kBlock);
            break;
        default:
            if (one_in(8)) d.resize(below(64) << 20);
    }
}

void blocks(Files& files) {
    Bytes &a = files[pick(files)], &b = files[pick(files)];
    if (a.size() < kBlock || b.size() < kBlock) return;
    uint8_t* x = a.data() + below(a.size() / kBlock) * kBlock;
    uint8_t* y = b.data() + below(b.size() / kBlock) * kBlock;
    switch (below(4)) {
        case 0:
            if (x != y) std::swap_ranges(x, x + kBlock, y);
            break;
        case 1:
            std::memmove(x, y, kBlock);
            break;
        case 2:
            for (size_t i = 0; i < kBlock; ++i) x[i] = uint8_t(rng());
            break;
        default:
            std::memset(x, one_in(2) ? 0 : 0xFF, kBlock);
    }
}

void names(Files& files) {
    std::string a = pick(files), b = pick(files);
    const char* odd[] = {"w0/seg-00000.kv",     "w0/seg-4294967295.kv",  "w0/seg-99999.kv",
                         "w0/journal-1",        "w0/journal-4294967295", "w0/seg-1.kv",
                         "w0/seg-00001.kv.bak", "w1/seg-00001.kv",       "w0/seg-00002.kv/x",
                         "w255/LOCK",           "w0/journal-4026531840", "w256/seg-00001.kv"};
    std::string to = odd[below(std::size(odd))];
    switch (below(4)) {
        case 0:
            std::swap(files[a], files[b]);
            break;
        case 1:
            files[to] = files[a];
            break;
        case 2:
            files[to] = files[a];
            if (a != "MANIFEST" && a != to) files.erase(a);
            break;
        default:
            if (a != "MANIFEST" || one_in(10)) files.erase(a);
    }
}

// True where only records were forged: most of the store must still be served.
bool mutate(Files& files) {
    uint64_t how = below(10);
    switch (how) {
        case 0:
        case 1:
            forge_header(files);
            break;
        case 2:
            forge_trailer(files);
            break;
        case 3:
        case 4:
            forge_records(files);
            break;
        case 5:
            one_in(3) ? forge_manifest(files) : forge_trailer(files);
            break;
        case 6:
            flip(files[pick(files)]);
            break;
        case 7:
            resize(files[pick(files)]);
            break;
        case 8:
            blocks(files);
            break;
        default:
            names(files);
    }
    return how == 3 || how == 4;
}

// ---- one case

std::vector<uint8_t> finish(SegmentStore& s, int64_t job) {
    MUST(s.wait(job, 20000));
    for (auto& d : s.poll())
        if (d.job == job) return d.results;
    MUST(!"job not polled");
    return {};
}

void put(SegmentStore& s, uint64_t from, uint64_t to) {
    std::vector<StoreItem> items;
    for (uint64_t i = from; i < to; ++i) {
        const Bytes& data = payload_of(i);  // puts only read
        items.push_back({key_of(i), const_cast<uint8_t*>(data.data()), data.size()});
    }
    s.put(1, nullptr, items, 7);
    finish(s, 1);
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
    Files files = master(dir / "master");
    std::signal(SIGALRM, too_slow);
    Sum sum;
    for (current = first; current < first + cases; ++current) {
        rng.seed(current * 7919 + 1);
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
