// On-disk format of the chunk store, to the byte; docs/format.md says the same in words.
//
// Everything is little endian. Every structure names the store's uuid in its CRC (or as a field),
// so files of another store are never taken for ours. Pure functions only: no I/O, no state.
#pragma once
#include <array>
#include <bit>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <functional>
#include <string>

namespace kvo::store {

static_assert(std::endian::native == std::endian::little,
              "structures are stored as they lie in memory");

inline constexpr uint64_t kBlock = 4096;  // unit of offsets, lengths and atomic metadata
inline constexpr uint32_t kFormatVersion = 1;
inline constexpr uint64_t kMinSegmentBytes = 64 << 10;
inline constexpr uint64_t kMaxSegmentBytes = uint64_t{4} << 30;
inline constexpr uint32_t kRecordsPerPage = kBlock / 64;

inline constexpr uint64_t round_up(uint64_t n, uint64_t unit = kBlock) {
    return (n + unit - 1) / unit * unit;
}

using Uuid = std::array<uint8_t, 16>;

struct Key {
    uint8_t b[16];
    bool operator==(const Key& o) const { return std::memcmp(b, o.b, 16) == 0; }
    bool operator<(const Key& o) const { return std::memcmp(b, o.b, 16) < 0; }
};
struct KeyHash {
    size_t operator()(const Key& k) const {
        uint64_t lo, hi;
        std::memcpy(&lo, k.b, 8);
        std::memcpy(&hi, k.b + 8, 8);
        // Keys are usually hashes already, but the Python surface takes any 16 bytes.
        uint64_t x = (lo ^ std::rotl(hi, 32)) * 0x9E3779B97F4A7C15ull;
        return x ^ (x >> 29);
    }
};

// ---- CRC-32C (Castagnoli), slicing by 8: metadata only, so a table is fast enough everywhere.
namespace detail {
consteval std::array<std::array<uint32_t, 256>, 8> crc_tables() {
    std::array<std::array<uint32_t, 256>, 8> t{};
    for (uint32_t i = 0; i < 256; ++i) {
        uint32_t c = i;
        for (int k = 0; k < 8; ++k) c = (c >> 1) ^ (c & 1 ? 0x82F63B78u : 0);
        t[0][i] = c;
    }
    for (size_t s = 1; s < 8; ++s)
        for (size_t i = 0; i < 256; ++i) t[s][i] = (t[s - 1][i] >> 8) ^ t[0][t[s - 1][i] & 255];
    return t;
}
inline constexpr auto kCrc = crc_tables();
}  // namespace detail

// Chainable: crc32c(b, crc32c(a)) == crc32c(a + b).
inline uint32_t crc32c(const void* data, size_t n, uint32_t crc = 0) {
    const auto* p = static_cast<const uint8_t*>(data);
    const auto& t = detail::kCrc;
    uint32_t c = ~crc;
    for (; n >= 8; p += 8, n -= 8) {
        uint64_t w;
        std::memcpy(&w, p, 8);
        w ^= c;
        c = t[7][w & 255] ^ t[6][(w >> 8) & 255] ^ t[5][(w >> 16) & 255] ^ t[4][(w >> 24) & 255] ^
            t[3][(w >> 32) & 255] ^ t[2][(w >> 40) & 255] ^ t[1][(w >> 48) & 255] ^ t[0][w >> 56];
    }
    for (; n; ++p, --n) c = (c >> 8) ^ t[0][(c ^ *p) & 255];
    return ~c;
}

// ---- Record: one stored chunk (kPut) or a tombstone (kDelete). Journals and footers are arrays of
// it.
enum RecordType : uint8_t { kPut = 1, kDelete = 2 };

struct Record {
    uint16_t magic;  // 0x524B, "KR"
    uint8_t type;
    uint8_t flags;  // 0
    uint32_t crc;   // CRC-32C of uuid, then the record with crc = 0
    uint64_t seq;   // grows within a writer; unix microseconds or more
    Key key;
    uint32_t seg;
    uint32_t gen;
    uint32_t off4k;  // payload offset in the segment file / 4096; 0 for kDelete
    uint32_t len;    // payload bytes; 0 for kDelete
    uint64_t root;   // two-level XXH3-64 of the payload, seeded with the key
    uint32_t ns;     // low 32 bits of the caller's namespace number; informative
    uint32_t depth;  // position in the chain; informative
};
static_assert(sizeof(Record) == 64 && offsetof(Record, seg) == 32 && offsetof(Record, root) == 48);
inline constexpr uint16_t kRecordMagic = 0x524B;

inline uint32_t record_crc(Record r, const Uuid& uuid) {
    r.crc = 0;
    return crc32c(&r, sizeof r, crc32c(uuid.data(), uuid.size()));
}
inline void seal_record(Record& r, const Uuid& uuid) {
    r.magic = kRecordMagic;
    r.flags = 0;
    r.crc = record_crc(r, uuid);
}

// ---- Segment file: header block | payload extents | records | ... | trailer block (its last 4
// KiB).
struct SegmentHeader {
    char magic[8];  // "KVOSEG1\0"
    uint32_t version;
    uint32_t seg;
    Uuid uuid;
    uint32_t writer;
    uint32_t reserved;
    uint64_t gen;    // bumped before any payload byte of the file is overwritten; below 2^32
    uint64_t epoch;  // names the journal of this generation
    uint64_t bytes;  // file size when it was created
    uint8_t zero[4028];
    uint32_t crc;  // CRC-32C of the 4092 bytes before it
};
struct SegmentTrailer {
    char magic[8];  // "KVOFOOT1"
    uint32_t version;
    uint32_t seg;
    Uuid uuid;
    uint64_t gen;
    uint64_t records_off;  // multiple of 4096
    uint64_t count;
    uint32_t records_crc;  // CRC-32C of the count * 64 bytes at records_off
    uint8_t zero[4032];
    uint32_t crc;
};
static_assert(sizeof(SegmentHeader) == kBlock && sizeof(SegmentTrailer) == kBlock);
inline constexpr char kSegmentMagic[9] = "KVOSEG1\0";
inline constexpr char kTrailerMagic[9] = "KVOFOOT1";

template <class T>
inline uint32_t page_crc(const T& page) {
    return crc32c(&page, sizeof page - 4);
}

inline SegmentHeader make_header(const Uuid& uuid, uint32_t writer, uint32_t seg, uint64_t gen,
                                 uint64_t bytes) {
    SegmentHeader h{};
    std::memcpy(h.magic, kSegmentMagic, 8);
    h.version = kFormatVersion;
    h.seg = seg;
    h.uuid = uuid;
    h.writer = writer;
    h.gen = h.epoch = gen;
    h.bytes = bytes;
    h.crc = page_crc(h);
    return h;
}
inline bool header_ok(const SegmentHeader& h, const Uuid& uuid, uint32_t writer, uint32_t seg) {
    return std::memcmp(h.magic, kSegmentMagic, 8) == 0 && h.crc == page_crc(h) &&
           h.version == kFormatVersion && h.uuid == uuid && h.writer == writer && h.seg == seg &&
           h.gen > 0 && h.gen < (uint64_t{1} << 32);
}

inline SegmentTrailer make_trailer(const Uuid& uuid, uint32_t seg, uint64_t gen,
                                   uint64_t records_off, uint64_t count, uint32_t records_crc) {
    SegmentTrailer t{};
    std::memcpy(t.magic, kTrailerMagic, 8);
    t.version = kFormatVersion;
    t.seg = seg;
    t.uuid = uuid;
    t.gen = gen;
    t.records_off = records_off;
    t.count = count;
    t.records_crc = records_crc;
    t.crc = page_crc(t);
    return t;
}
inline bool trailer_ok(const SegmentTrailer& t, const Uuid& uuid, uint32_t seg, uint64_t gen,
                       uint64_t file_bytes) {
    if (std::memcmp(t.magic, kTrailerMagic, 8) != 0 || t.crc != page_crc(t)) return false;
    if (t.version != kFormatVersion || t.uuid != uuid || t.seg != seg || t.gen != gen) return false;
    if (t.records_off < kBlock || t.records_off % kBlock || t.records_off > file_bytes)
        return false;
    return t.count <= (file_bytes - t.records_off) / sizeof(Record);
}

// A record is usable only inside the file and generation it was written for.
inline bool record_ok(const Record& r, const Uuid& uuid, uint32_t seg, uint64_t gen,
                      uint64_t file_bytes) {
    if (r.magic != kRecordMagic || r.seg != seg || r.gen != gen || r.crc != record_crc(r, uuid))
        return false;
    if (r.type == kDelete) return r.off4k == 0 && r.len == 0;
    return r.type == kPut && r.len > 0 && r.off4k > 0 &&
           r.off4k * kBlock + round_up(r.len) <= file_bytes;
}

// Bytes at the end of a segment that n records need: the records and the trailer.
inline constexpr uint64_t footer_bytes(uint64_t n) {
    return round_up(n * sizeof(Record)) + kBlock;
}
// Most bytes one segment's journal can grow to: every extent has at least one block.
inline constexpr uint64_t journal_reserve(uint64_t segment_bytes) {
    return round_up(segment_bytes / (kBlock + sizeof(Record)) * sizeof(Record)) + kBlock;
}
inline constexpr uint64_t max_payload(uint64_t segment_bytes) {
    return segment_bytes - kBlock - footer_bytes(1);
}

// ---- MANIFEST: short text, last line a CRC-32C over all bytes before it.
struct Manifest {
    Uuid uuid{};
    uint64_t segment_bytes = 0;
    uint64_t max_bytes = 0;  // as of creation: the least for openers that name none
};
enum class ManifestError { kNone, kForeign, kNewer, kDamaged };
std::string manifest_text(const Manifest& m);
ManifestError parse_manifest(const std::string& text, Manifest& out, unsigned& version);

}  // namespace kvo::store
