// What the fuzzer does to a store's files: one mutation at a time, blind or knowing the format.
#include <iterator>

#include "../checksum.h"
#include "fuzz_store.h"

using namespace kvo::store;
using namespace store_test;

namespace {

bool is_segment(const std::string& n) {
    return n.find("/seg-") != n.npos;
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
            return fuzz_rng() >> below(64);
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
            d.resize(d.size() + 1 + below(3 * kBlock), uint8_t(fuzz_rng()));
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
            for (size_t i = 0; i < kBlock; ++i) x[i] = uint8_t(fuzz_rng());
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

}  // namespace

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
