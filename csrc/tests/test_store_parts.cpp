// Where a part fails: descriptors run out, directories cannot be listed.
#include <fcntl.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <filesystem>

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
    SegmentStore s(options(p));
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

}  // namespace

void test_parts(const std::string& dir) {
    fs::path p = dir;
    fs::create_directories(p);
    bound_holds(p / "bound");
    others_stay_known(p / "others");
    std::printf("parts: ok\n");
}
