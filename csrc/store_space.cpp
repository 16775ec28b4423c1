// The bytes under the store's path: counting them, and taking back what dead writers left.
#include <fcntl.h>
#include <sys/file.h>
#include <unistd.h>

#include <algorithm>

#include "store_dir.h"

namespace kvo::store {

namespace {
// Follows no link. ENOENT, of what went since it was listed, is no error: `there` is false then.
int stat_entry(int dirfd, const std::string& name, struct stat& st, bool& there) {
    there = ::fstatat(dirfd, name.c_str(), &st, AT_SYMLINK_NOFOLLOW) == 0;
    return there || errno == ENOENT ? 0 : errno;
}

uint64_t size_of(const struct stat& st) {
    return std::max(round_up(uint64_t(st.st_size)), uint64_t(st.st_blocks) * 512);
}
}  // namespace

// Of one writer's directory, room for its journals included, added to `total`.
int StoreDir::charge_writer(const std::string& name, uint64_t& total) const {
    Fd dir(::openat(root_.get(), name.c_str(), O_RDONLY | O_DIRECTORY | O_NOFOLLOW | O_CLOEXEC));
    if (!dir) return errno == ENOENT ? 0 : errno;
    uint64_t journals = 0, largest = 0;
    int bad = 0;
    int err = each_entry(dir.get(), [&](const std::string& entry) {
        struct stat st;
        bool there;
        if (int e = stat_entry(dir.get(), entry, st, there)) bad = e;
        if (!there) return;
        (number_in(entry, "journal-", "", 1) ? journals : total) += size_of(st);
        if (number_in(entry, "seg-", ".kv", 5)) largest = std::max(largest, uint64_t(st.st_size));
    });
    if (largest) largest = 2 * journal_reserve(std::max(largest, segment_bytes_));
    total += std::max(journals, largest);
    return err ? err : bad;
}

int StoreDir::charged_bytes(uint64_t& total) const {
    total = kBlock;  // the path itself
    int bad = 0;
    int err = each_entry(root_.get(), [&](const std::string& name) {
        struct stat st;
        bool there;
        if (int e = stat_entry(root_.get(), name, st, there)) bad = e;
        if (!there) return;
        total += size_of(st);
        if (S_ISDIR(st.st_mode) && number_in(name, "w", "", 1))
            if (int e = charge_writer(name, total)) bad = e;
    });
    return err ? err : bad;
}

bool StoreDir::reclaim_dead(int64_t than_ns, uint32_t& writer, uint32_t& seg) const {
    int64_t best = than_ns;
    bool found = false;
    std::vector<uint32_t> ids;
    if (writers(ids)) return false;  // which is the oldest cannot be told
    for (uint32_t id : ids) {
        if (int(id) == writer_) continue;
        Fd dir = open_writer(id);
        if (!dir) continue;
        Fd lock(::openat(dir.get(), "LOCK", O_RDWR | O_NOFOLLOW | O_CLOEXEC | O_NONBLOCK));
        if (!lock || ::flock(lock.get(), LOCK_EX | LOCK_NB) != 0) continue;
        each_entry(dir.get(), [&](const std::string& name) {
            auto n = number_in(name, "seg-", ".kv", 5);
            struct stat st;
            if (!n || ::fstatat(dir.get(), name.c_str(), &st, AT_SYMLINK_NOFOLLOW) != 0) return;
            if (mtime_of(st) < best)
                best = mtime_of(st), writer = id, seg = uint32_t(*n), found = true;
        });
    }
    if (!found) return false;
    // Nobody can have become its writer meanwhile: that needs the path lock the caller holds.
    Fd dir = open_writer(writer);
    if (!dir || ::unlinkat(dir.get(), segment_name(seg).c_str(), 0) != 0) return false;
    sync_names(dir.get());  // failing, a power cut brings it back: more bytes, no wrong ones
    return true;
}

}  // namespace kvo::store
