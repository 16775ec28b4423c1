// Where a part fails: descriptors run out, directories cannot be listed, one file cannot be read.
#include <fcntl.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <filesystem>
#include <memory>

#include "../store_impl.h"
#include "test_store.h"

namespace fs = std::filesystem;
using namespace kvo::store;
using namespace store_test;

namespace {

constexpr uint64_t kBound = 2 << 20, kSegment = 64 << 10, kMost = 12000;

StoreOptions options(const fs::path& p, bool read_only = false) {
    StoreOptions o = store_test::options(p.string(), kBound, kSegment, 2);
    o.io_engine = "threads";
    o.read_only = read_only;
    return o;
}

// With no more than `spare` descriptors left to this process, as long as it lives.
class FewDescriptors {
  public:
    explicit FewDescriptors(int spare) {
        MUST(::getrlimit(RLIMIT_NOFILE, &was_) == 0);
        rlimit low = was_;
        low.rlim_cur = 256;
        MUST(::setrlimit(RLIMIT_NOFILE, &low) == 0);
        for (int fd; (fd = ::open("/dev/null", O_RDONLY | O_CLOEXEC)) >= 0;) held_.push_back(fd);
        for (; spare && !held_.empty(); --spare) {
            ::close(held_.back());
            held_.pop_back();
        }
    }
    ~FewDescriptors() {
        for (int fd : held_) ::close(fd);
        ::setrlimit(RLIMIT_NOFILE, &was_);
    }

  private:
    rlimit was_;
    std::vector<int> held_;
};

uint64_t bytes_below(const fs::path& p) {
    uint64_t sum = 0;
    for (auto& e : fs::recursive_directory_iterator(p)) {
        struct stat st;
        if (::lstat(e.path().c_str(), &st) == 0)
            sum += std::max(uint64_t(st.st_size), uint64_t(st.st_blocks) * 512);
    }
    return sum;
}

// What cannot be counted is not taken for nothing: the bound holds whatever is left to open.
void bound_holds(const fs::path& p) {
    auto store = std::make_unique<SegmentStore>(options(p));
    SegmentStore& s = *store;
    uint64_t next = 0;
    auto some = [&](uint64_t n) {
        put(s, next, next + n, kMost);
        next += n;
    };
    while (s.stats()["recycled_segments"] < 2) some(20);
    for (int spare = 0; spare <= 6; ++spare)
        for (int round = 0; round < 4; ++round) {
            {
                FewDescriptors few(spare);
                some(20);
            }
            MUST(bytes_below(p) <= kBound);
        }
    some(20);
    s.check();
    uint64_t segments = uint64_t(s.stats()["segments"]);
    MUST(segments > kBound / kSegment / 2);
    store.reset();  // its threads close files whenever they like
    StoreDir dir(options(p, true));
    uint64_t all = 0, part = 0;
    MUST(dir.charged_bytes(all) == 0 && all > kBound / 2 && all <= kBound);
    for (int spare = 0; spare < 3; ++spare) {
        FewDescriptors few(spare);
        MUST(dir.charged_bytes(part) == EMFILE);
    }
    MUST(dir.charged_bytes(part) == 0 && part == all);
}

// Another writer's directory that cannot be read now: what is known of it stays known.
void others_stay_known(const fs::path& p) {
    SegmentStore writer(options(p));
    put(writer, 0, 60, kMost);
    MUST(writer.flush(5000));
    auto reader = std::make_shared<StoreImpl>(options(p, true));
    reader->start();
    auto known = [&] {
        std::lock_guard lk(reader->mu);
        return reader->index.size();
    };
    MUST(known() == 60);
    for (int spare = 0; spare <= 3; ++spare) {
        FewDescriptors few(spare);
        std::unique_lock lk(reader->mu);
        reader->refresh(lk);
        MUST(reader->index.size() == 60);
    }
    put(writer, 60, 80, kMost);
    MUST(writer.flush(5000));
    {
        std::unique_lock lk(reader->mu);
        reader->refresh(lk);
    }
    MUST(known() == 80);
    reader->check();
    MUST(reader->close(5000, false));
}

uint64_t inode_of(const fs::path& p) {
    struct stat st;
    MUST(::stat(p.c_str(), &st) == 0);
    return st.st_ino;
}

// All reads of one file fail until it is open, or the one of that number.
std::shared_ptr<StoreImpl> opened(const fs::path& p, uint64_t bad_inode = 0, int eio_at = 0) {
    constexpr int kOnce = 1 << 20;
    auto s = std::make_shared<StoreImpl>(options(p));
    s->faults->bad_inode = bad_inode;
    s->faults->reads = uint64_t(kOnce - eio_at);
    s->faults->read_eio = eio_at ? kOnce : 0;
    s->start();
    s->check();
    s->faults->bad_inode = 0;
    s->faults->read_eio = 0;
    return s;
}

uint64_t held(StoreImpl& s) {
    std::lock_guard lk(s.mu);
    return s.index.size();
}

void put_one(StoreImpl& s, uint64_t i, bool ok = true) {
    Bytes data = payload_of(i, kMost);
    std::vector<StoreItem> one{{key_of(i), data.data(), data.size()}};
    s.submit_put(int64_t(i), nullptr, one, 7, 0);
    MUST(s.wait(int64_t(i), 20000));
    std::lock_guard lk(s.mu);
    MUST(!ok || s.finished.back()->results[0] == kOk);
    s.finished.clear();
    s.jobs.clear();
}

// 40 chunks, flushed and closed: sealed segments and an open one with its journal. The names.
std::vector<fs::path> filled(const fs::path& p) {
    fs::remove_all(p);
    {
        SegmentStore s(options(p));
        MUST(put(s, 0, 40, kMost) == Bytes(40, kOk) && s.flush(5000) && s.close(5000));
    }
    std::vector<fs::path> out;
    for (auto& e : fs::directory_iterator(p / "w0")) {
        std::string name = e.path().filename();
        if (name.rfind("seg-", 0) == 0 || name.rfind("journal-", 0) == 0) out.push_back(e.path());
    }
    std::sort(out.begin(), out.end());
    MUST(out.size() > 4);
    return out;
}

// One read at open fails, whichever: nothing is lost, nor missed.
void one_failed_read(const fs::path& p) {
    filled(p);
    auto clean = opened(p);
    int reads = int(clean->faults->reads - (1 << 20));
    MUST(reads > 8 && held(*clean) == 40 && clean->close(5000, false));
    uint64_t failed = 0;
    for (int at = 1; at <= reads; ++at) {  // some fills make one segment more than others
        filled(p);
        auto s = opened(p, 0, at);
        MUST(held(*s) == 40 && s->n.io_errors <= 1);
        failed += s->n.io_errors;
        MUST(s->close(5000, false));
    }
    MUST(failed > 8);
}

// A file that cannot be read in this life is there in the next one, whatever was put meanwhile.
void unread_file(const fs::path& p) {
    size_t hidden = 0;
    for (size_t i = 0;; ++i) {
        std::vector<fs::path> names = filled(p);
        if (i >= names.size()) break;
        auto s = opened(p, inode_of(names[i]));
        uint64_t seen = held(*s);
        hidden += seen < 40;
        for (uint64_t k = 1000; k < 1010; ++k) put_one(*s, k);
        s->check();
        MUST(s->flush(5000) && s->close(5000, false));
        MUST(seen == 40 || fs::exists(names[i]));
        s = opened(p);
        MUST(held(*s) == 50);
        MUST(s->close(5000, false));
        auto left = std::count_if(
            fs::directory_iterator(p / "w0"), fs::directory_iterator(),
            [](auto& e) { return e.path().filename().string().rfind("journal-", 0) == 0; });
        MUST(left == 0);  // nothing was put in that life
    }
    MUST(hidden > 2);
}

// The bound holds, and writing goes on: what cannot be read goes when nothing else can.
void unread_and_full(const fs::path& p) {
    std::vector<fs::path> names = filled(p);
    fs::path bad = p / "w0" / "seg-00001.kv";
    auto s = opened(p, inode_of(bad));
    for (uint64_t k = 1000; k < 1600; ++k) {
        put_one(*s, k);
        if (k % 50 == 0) MUST(bytes_below(p) <= kBound);
    }
    MUST(s->n.recycled_segments > 10 && fs::exists(bad));
    // Until every segment has deletes, which may hide something in it.
    auto unread = [&] {
        std::lock_guard lk(s->mu);
        return std::ranges::any_of(s->segments, [](auto& seg) { return seg->unread; });
    };
    MUST(unread());
    for (uint64_t k = 2000; k < 3000 && unread(); ++k) {
        put_one(*s, k, false);
        Key key = key_of(k);
        std::lock_guard lk(s->mu);
        s->remove(std::span(&key, 1));
    }
    put_one(*s, 3000);
    MUST(!unread() && bytes_below(p) <= kBound);
    s->check();
    MUST(s->close(5000, false));
}

// A segment whose header cannot be written costs the puts that waited for it and no others, also
// where every segment has deletes.
void bad_place(const fs::path& p, bool deletes) {
    filled(p);
    auto s = opened(p);
    auto some = [&](uint64_t from, uint64_t n) {
        uint64_t lost = 0;
        for (uint64_t k = from; k < from + n; ++k) {
            put_one(*s, k, false);
            std::lock_guard lk(s->mu);
            lost += !s->find_live(key_of(k));
            Key key = key_of(k - 2);
            if (deletes && k > from + 2 && k % 3) s->remove(std::span(&key, 1));
        }
        return lost;
    };
    while (s->n.recycled_segments < 40) some(1000 + s->n.puts, 20);
    StoreSegment* bad;
    {
        std::lock_guard lk(s->mu);
        bad = s->next_victim(true);
    }
    s->faults->bad_inode = inode_of(p / "w0" / segment_name(bad->id));
    MUST(some(100000, 800) <= 2 && some(200000, 300) == 0);
    s->check();
    MUST(bad->failed && bytes_below(p) <= kBound);
    s->faults->bad_inode = 0;
    MUST(some(300000, 300) == 0 && s->close(5000, false));
    s = opened(p);
    s->check();
    MUST(s->close(5000, false));
}

// Some time during which no header can be written: all segments come back into use afterwards.
void outage(const fs::path& p, int err) {
    filled(p);
    auto s = opened(p);
    uint64_t next = 1000;
    auto put = [&](uint64_t n) {
        for (uint64_t i = 0; i < n; ++i) put_one(*s, next++, false);
    };
    auto in_store = [&](uint64_t from) {
        std::lock_guard lk(s->mu);
        uint64_t found = 0;
        for (uint64_t k = from; k < next; ++k) found += s->find_live(key_of(k)) != nullptr;
        return found;
    };
    put(600);
    const uint64_t before = in_store(1000);  // as many as fit
    std::atomic<int>& fault = err == EIO ? s->faults->write_eio : s->faults->enospc;
    auto in_turn = [&] {
        std::lock_guard lk(s->mu);
        return std::count_if(s->segments.begin(), s->segments.end(), [](auto& seg) {
            return seg->own && seg->state == SegState::kSealed && !seg->failed;
        });
    };
    fault = 1;
    for (int i = 0; i < 60 && in_turn() > 3; ++i) put(1);  // a few stay: there is always a victim
    fault = 0;
    s->check();
    const uint64_t after = next;
    put(600);
    MUST(in_store(after) * 10 >= before * 9);
    MUST(bytes_below(p) <= kBound && s->close(5000, false));
}

// Smaller than what is there, and nothing can be read: as much goes as must.
void unread_and_smaller(const fs::path& p) {
    filled(p);
    StoreOptions o = options(p);
    o.max_bytes = 400 << 10;
    auto s = std::make_shared<StoreImpl>(o);
    s->faults->read_eio = 1;
    s->start();
    MUST(held(*s) == 0 && bytes_below(p) <= o.max_bytes);
    s->faults->read_eio = 0;
    MUST(s->close(5000, false));
    s = std::make_shared<StoreImpl>(o);
    s->start();
    MUST(held(*s) > 0 && s->close(5000, false));
}

// The same of another writer's: what is known stays, and is looked at again.
void unread_of_others(const fs::path& p) {
    SegmentStore writer(options(p));
    put(writer, 0, 60, kMost);
    MUST(writer.flush(5000));
    auto reader = std::make_shared<StoreImpl>(options(p, true));
    reader->start();
    MUST(held(*reader) == 60);
    reader->faults->read_eio = 1;
    {
        std::unique_lock lk(reader->mu);
        reader->refresh(lk);
    }
    MUST(held(*reader) == 60);
    reader->faults->read_eio = 0;
    reader->check();
    MUST(reader->close(5000, false));
}

// A read of another writer's segment is under way when that is found to be gone: nothing of it
// stays open.
void removed_under_a_read(const fs::path& p) {
    SegmentStore writer(options(p));
    put(writer, 0, 20, kMost);
    MUST(writer.flush(5000));
    auto reader = std::make_shared<StoreImpl>(options(p, true));
    reader->start();
    Bytes out(payload_of(0, kMost).size());
    std::vector<StoreItem> one{{key_of(0), out.data(), out.size()}};
    uint64_t before = reader->faults->reads;  // of the open
    reader->faults->hang_read = 1;
    reader->submit_get(1, nullptr, one, 0);
    while (reader->faults->reads == before)
        std::this_thread::sleep_for(std::chrono::milliseconds(1));
    {
        std::unique_lock lk(reader->mu);
        for (size_t i = 0; i < reader->segments.size(); ++i)
            reader->drop_segment(*reader->segments[i], lk);
    }
    reader->faults->hang_read = 0;
    MUST(reader->wait(1, 20000));
    {
        std::lock_guard fl(reader->files_mu);
        for (auto& s : reader->segments) MUST(!s->file && !s->header_file);
        MUST(reader->open_files.empty());
    }
    MUST(reader->close(5000, false));
}

// Of the open segment nothing stays promised to a rescue once another one is clean.
void promise(const fs::path& p) {
    auto s = opened(p);
    put_one(*s, 1);
    {
        std::unique_lock lk(s->mu);
        s->promised = 1;
        MUST(s->take_segment(lk) == 0 && !s->clean.empty() && !s->promised);
    }
    s->check();
    MUST(s->close(5000, false));
}

}  // namespace

void test_parts(const std::string& dir) {
    fs::path p = dir;
    fs::create_directories(p);
    bound_holds(p / "bound");
    others_stay_known(p / "others");
    one_failed_read(p / "one");
    unread_file(p / "unread");
    unread_and_full(p / "full");
    bad_place(p / "place", false);
    bad_place(p / "place", true);
    outage(p / "outage", EIO);
    outage(p / "outage", ENOSPC);
    unread_and_smaller(p / "smaller");
    unread_of_others(p / "foreign");
    removed_under_a_read(p / "removed");
    promise(p / "promise");
    std::printf("parts: ok\n");
}
