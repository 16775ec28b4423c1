// Files that somebody made on purpose: every CRC is right, what they claim is not.
#include <sys/resource.h>

#include <filesystem>
#include <fstream>

#include "test_store.h"

namespace fs = std::filesystem;
using namespace kvo::store;
using namespace store_test;

namespace {

constexpr uint64_t kKeys = 40, kMost = 12000;

StoreOptions options(const fs::path& p, bool read_only = false) {
    StoreOptions o = store_test::options(p.string(), 4 << 20, 64 << 10, 2);
    o.io_engine = "threads";
    o.read_only = read_only;
    return o;
}

uint64_t hits(SegmentStore& s, uint64_t from, uint64_t to) {
    uint64_t found = 0;
    for (uint64_t i = from; i < to; ++i) {
        const Bytes want = payload_of(i, kMost);
        Bytes got(want.size());
        s.get(2, nullptr, {{key_of(i), got.data(), got.size()}});
        if (finish(s, 2)[0] != kOk) continue;
        MUST(got == want);
        ++found;
    }
    return found;
}

template <class T>
T read_at(const fs::path& p, uint64_t off) {
    T v;
    std::ifstream f(p, std::ios::binary);
    f.seekg(std::streamoff(off));
    f.read(reinterpret_cast<char*>(&v), sizeof v);
    MUST(f.good());
    return v;
}

template <class T>
void write_at(const fs::path& p, uint64_t off, const T& v) {
    std::fstream f(p, std::ios::in | std::ios::out | std::ios::binary);
    f.seekp(std::streamoff(off));
    f.write(reinterpret_cast<const char*>(&v), sizeof v);
    MUST(f.good());
}

// A store of kKeys; the path of its first segment, which is sealed.
fs::path filled(const fs::path& p) {
    SegmentStore s(options(p));
    Bytes done = put(s, 0, kKeys, kMost);
    MUST(done == Bytes(kKeys, kOk) && s.close(5000));
    return p / "w0" / "seg-00001.kv";
}

uint64_t peak_bytes() {
    rusage u;
    MUST(::getrusage(RUSAGE_SELF, &u) == 0);
    return uint64_t(u.ru_maxrss) << 10;
}

// A file of holes whose trailer claims that all of it is records.
void many_records(const fs::path& p) {
    constexpr uint64_t size = 1 << 30;
    const fs::path seg = filled(p);
    const auto h = read_at<SegmentHeader>(seg, 0);
    fs::resize_file(seg, size);
    const uint64_t count = (size - 2 * kBlock) / sizeof(Record);
    write_at(seg, size - kBlock, make_trailer(h.uuid, h.seg, h.gen, kBlock, count, 0));
    const uint64_t before = peak_bytes();
    SegmentStore s(options(p, true));
    MUST(peak_bytes() - before < (128 << 20));
    s.check();
    const uint64_t found = hits(s, 0, kKeys);
    MUST(found > 0 && found < kKeys);  // all but what the segment held
}

// The number of the record of key 0, which is the first of its segment.
void set_seq(const fs::path& seg, uint64_t seq) {
    const uint64_t end = fs::file_size(seg) - kBlock;
    auto t = read_at<SegmentTrailer>(seg, end);
    MUST(t.count > 0);
    auto r = read_at<Record>(seg, t.records_off);
    MUST(r.key == key_of(0));
    r.seq = seq;
    seal_record(r, t.uuid);
    write_at(seg, t.records_off, r);
    Bytes all(t.count * sizeof(Record));
    std::ifstream f(seg, std::ios::binary);
    f.seekg(std::streamoff(t.records_off));
    f.read(reinterpret_cast<char*>(all.data()), std::streamsize(all.size()));
    MUST(f.good());
    write_at(
        seg, end,
        make_trailer(t.uuid, t.seg, t.gen, t.records_off, t.count, crc32c(all.data(), all.size())));
}

// What is stored and deleted after a record with the number `seq` stays so over a restart.
void last_number(const fs::path& p, uint64_t seq, bool counts) {
    set_seq(filled(p), seq);
    {
        SegmentStore s(options(p));
        MUST(hits(s, 0, 1) == counts && hits(s, 1, kKeys) == kKeys - 1);
        if (!counts) MUST(put(s, 0, 1, kMost)[0] == kOk);
        put(s, kKeys, kKeys + 5, kMost);
        const Key gone[2] = {key_of(1), key_of(0)};
        MUST(s.remove(std::span(gone, counts ? 1 : 2)) == (counts ? 1 : 2));
        MUST(s.close(5000));
    }
    SegmentStore s(options(p));
    s.check();
    MUST(hits(s, 0, 1) == counts && hits(s, 1, 2) == 0);
    MUST(hits(s, 2, kKeys + 5) == kKeys + 3);
}

}  // namespace

void test_forged(const std::string& dir) {
    const fs::path base = dir;
    many_records(base / "records");
    last_number(base / "seq-64", ~uint64_t{0}, false);
    last_number(base / "seq-63", uint64_t{1} << 63, false);
    last_number(base / "seq-below", (uint64_t{1} << 63) - 1, true);
}
