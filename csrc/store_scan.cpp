// Reading what a writer's directory holds: headers, footers, journals. Trusts nothing it reads.
#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <iterator>
#include <thread>

#include "store_dir.h"

namespace kvo::store {
namespace {

// What is asked of memory for a footer before its records have shown that they are some.
constexpr size_t kPieceRecords = (1 << 20) / sizeof(Record);
// Microseconds since 1970 do not get near these for 100,000 years: only a forged number does. One
// past the first does not count; one past the second is not followed, so that what we number after
// it stays below the first and never wraps.
constexpr uint64_t kSeqEnd = uint64_t{1} << 63, kSeqFollowed = uint64_t{1} << 62;

bool usable(const Record& r, const Uuid& uuid, const SegmentScan& s) {
    return record_ok(r, uuid, s.id, s.gen, s.bytes) && r.seq < kSeqEnd;
}

bool read_exact(const File& f, void* p, size_t n, uint64_t off, Faults& faults, uint64_t& errors) {
    size_t done = 0;
    int err = read_full(f, p, n, off, faults, done);
    if (err) ++errors;  // a short file is damage, not a failing disk
    return !err && done == n;
}

// A sealed segment's records, those that count. Piece by piece: a sparse file may claim billions,
// and a writer seals no record that does not count, so a piece without any ends it.
bool read_footer(const File& f, const SegmentTrailer& t, const Uuid& uuid, SegmentScan& s,
                 Faults& faults, uint64_t& errors) {
    // trailer_ok() has seen that they fit the file; here, that they end before the trailer.
    if (t.records_off + t.count * sizeof(Record) > s.bytes - kBlock) return false;
    std::vector<Record> piece(std::min<uint64_t>(t.count, kPieceRecords));
    uint32_t crc = 0;
    for (uint64_t at = 0, n; at < t.count; at += n) {
        n = std::min<uint64_t>(t.count - at, kPieceRecords);
        const size_t bytes = n * sizeof(Record), before = s.records.size();
        if (!read_exact(f, piece.data(), bytes, t.records_off + at * sizeof(Record), faults,
                        errors))
            return false;
        crc = crc32c(piece.data(), bytes, crc);
        std::copy_if(piece.begin(), piece.begin() + ptrdiff_t(n), std::back_inserter(s.records),
                     [&](const Record& r) { return usable(r, uuid, s); });
        if (n == kPieceRecords && s.records.size() == before) return false;
    }
    return crc == t.records_crc;
}

// Errors of open_file() that say nothing of a disk: there is no such file, or it is none of ours.
bool is_absent(int err) {
    return err == ENOENT || err == EPERM || err == ELOOP || err == EISDIR || err == ENXIO;
}

void read_segment(int dirfd, const Uuid& uuid, uint32_t writer, SegmentScan& s,
                  const SegmentScan* known, Faults& faults, uint64_t& errors) {
    int err;
    FilePtr f = open_file(dirfd, segment_name(s.id).c_str(), O_RDONLY, false, err);
    struct stat st;
    s.absent = !f && is_absent(err);
    if (!f || ::fstat(f->fd(), &st) != 0) {
        errors += !s.absent;
        return;
    }
    s.bytes = uint64_t(st.st_size) / kBlock * kBlock;
    s.mtime_ns = mtime_of(st);
    if (s.bytes < 2 * kBlock || s.bytes > 2 * kMaxSegmentBytes) return;
    auto page = std::make_unique<SegmentHeader>();
    if (!read_exact(*f, page.get(), kBlock, 0, faults, errors)) return;
    if (!header_ok(*page, uuid, writer, s.id)) return;
    s.gen = page->gen;
    if (known && known->sealed && known->gen == s.gen && known->bytes == s.bytes &&
        known->mtime_ns == s.mtime_ns) {
        s.sealed = true;
        return;
    }
    auto t = std::make_unique<SegmentTrailer>();
    if (!read_exact(*f, t.get(), kBlock, s.bytes - kBlock, faults, errors)) return;
    if (!trailer_ok(*t, uuid, s.id, s.gen, s.bytes)) return;
    s.sealed = read_footer(*f, *t, uuid, s, faults, errors);
    if (!s.sealed) s.records = {};
}

// Twice where the disk fails: that may pass, and what cannot be read counts as unknown.
void scan_segment(int dirfd, const Uuid& uuid, uint32_t writer, SegmentScan& s,
                  const SegmentScan* known, Faults& faults, uint64_t& errors) {
    for (int tries = 0; tries < 2; ++tries) {
        SegmentScan fresh;
        fresh.id = s.id;
        s = std::move(fresh);
        uint64_t failed = 0;
        read_segment(dirfd, uuid, writer, s, known, faults, failed);
        errors += failed;
        if (!(s.unread = failed > 0)) return;
    }
    s.records = {};
}

bool read_journal(int dirfd, uint64_t epoch, std::vector<Record>& recs, Faults& faults) {
    int err;
    FilePtr f = open_file(dirfd, journal_name(epoch).c_str(), O_RDONLY, false, err);
    recs.clear();
    if (!f) return is_absent(err);  // its segment was sealed meanwhile
    struct stat st;
    if (::fstat(f->fd(), &st) != 0) return false;
    uint64_t bytes = std::min<uint64_t>(uint64_t(st.st_size), journal_reserve(kMaxSegmentBytes));
    recs.resize(bytes / sizeof(Record));
    size_t done = 0;
    err = read_full(*f, recs.data(), recs.size() * sizeof(Record), 0, faults, done);
    recs.resize(done / sizeof(Record));
    return !err;
}

// Appends a journal's valid records to the unsealed segments they belong to. A damaged record is
// left out alone: the next ones stand for themselves. One that cannot be read (twice, as above)
// leaves its segment unknown.
void scan_journal(int dirfd, const Uuid& uuid, uint64_t epoch,
                  const std::map<uint32_t, SegmentScan*>& segs, Faults& faults, uint64_t& errors) {
    std::vector<Record> recs;
    for (int tries = 0; !read_journal(dirfd, epoch, recs, faults); ++tries) {
        ++errors;
        if (!tries) continue;
        for (auto& [id, s] : segs) s->unread |= s->gen == epoch && !s->sealed;
        return;
    }
    for (const Record& r : recs) {
        if (r.magic != kRecordMagic) continue;
        auto it = segs.find(r.seg);
        if (it == segs.end() || it->second->sealed || !it->second->gen) continue;
        if (usable(r, uuid, *it->second)) it->second->records.push_back(r);
    }
}

}  // namespace

bool WriterScan::needs(uint64_t epoch) const {
    bool unknown = false;
    for (auto& s : segments) {
        if (s.gen == epoch) return s.unread;
        unknown |= s.unread && !s.gen;
    }
    return unknown;
}

WriterScan StoreDir::scan(uint32_t id, Faults& faults,
                          const std::map<uint32_t, SegmentScan>* known) const {
    WriterScan out;
    Fd dir = open_writer(id);
    if (!dir) {
        ++out.read_errors;
        out.list_error = EIO;
        return out;
    }
    out.list_error = each_entry(dir.get(), [&](const std::string& name) {
        if (auto n = number_in(name, "seg-", ".kv", 5)) {
            out.segments.emplace_back().id = uint32_t(*n);
            out.max_id = std::max(out.max_id, uint32_t(*n));
        } else if (auto e = number_in(name, "journal-", "", 1)) {
            out.journals.push_back(*e);
            if (*e < 0xF0000000u)
                out.max_gen = std::max(out.max_gen, *e);  // a name alone proves little
        }
    });
    if (out.list_error) {
        ++out.read_errors;
        return out;
    }
    size_t n = out.segments.size(), workers = std::min<size_t>(8, n / 16 + 1);
    std::atomic<size_t> next{0};
    std::atomic<uint64_t> errors{0};
    auto work = [&] {
        uint64_t bad = 0;
        for (size_t i; (i = next.fetch_add(1)) < n;) {
            SegmentScan& s = out.segments[i];
            const SegmentScan* k = nullptr;
            if (known)
                if (auto it = known->find(s.id); it != known->end()) k = &it->second;
            scan_segment(dir.get(), manifest_.uuid, id, s, k, faults, bad);
        }
        errors += bad;
    };
    std::vector<std::thread> threads;
    for (size_t i = 1; i < workers; ++i) threads.emplace_back(work);
    work();
    for (auto& t : threads) t.join();
    out.read_errors += errors;
    std::map<uint32_t, SegmentScan*> by_id;
    for (auto& s : out.segments) by_id[s.id] = &s;
    for (uint64_t e : out.journals)
        scan_journal(dir.get(), manifest_.uuid, e, by_id, faults, out.read_errors);
    for (auto& s : out.segments) {
        if (s.unread) s.records = {};  // part of the truth is none: what hides them may be missing
        out.max_gen = std::max(out.max_gen, s.gen);
        for (auto& r : s.records)
            if (r.seq < kSeqFollowed) out.max_seq = std::max(out.max_seq, r.seq);
    }
    return out;
}

}  // namespace kvo::store
