#include "store_dir.h"

#include <dirent.h>
#include <fcntl.h>
#include <sys/file.h>
#include <sys/random.h>
#include <sys/stat.h>
#include <sys/statvfs.h>
#include <time.h>
#include <unistd.h>

#include <algorithm>
#include <cstdio>
#include <filesystem>
#include <functional>
#include <optional>

#include "errors.h"

namespace kvo::store {
namespace {

constexpr const char* kManifest = "MANIFEST";
constexpr const char* kManifestTmp = "MANIFEST.tmp";
constexpr const char* kTitle = "kvoffload chunk store";
constexpr uint32_t kMaxWriters = 256;

bool parse_hex(const std::string& s, Uuid& out) {
    if (s.size() != 32) return false;
    for (size_t i = 0; i < 16; ++i) {
        unsigned v;
        if (std::sscanf(s.c_str() + 2 * i, "%2x", &v) != 1) return false;
        out[i] = uint8_t(v);
    }
    return true;
}

std::string octal(unsigned mode) {
    char buf[16];
    std::snprintf(buf, sizeof buf, "%04o", mode & 07777);
    return buf;
}

// "" or why a directory or file must not be used.
std::string bad_owner(int fd, const std::string& shown, bool dir) {
    struct stat st;
    if (::fstat(fd, &st) != 0) return "cannot be examined";
    if (!dir && !S_ISREG(st.st_mode)) return "not a regular file";
    if (st.st_uid != ::geteuid())
        return "owned by uid " + std::to_string(st.st_uid) + ", not by us (uid " +
               std::to_string(::geteuid()) + ")";
    if (st.st_mode & 077)
        return "mode is " + octal(st.st_mode) + ", others could reach it (chmod " +
               (dir ? "700 " : "600 ") + shown + ")";
    return "";
}

}  // namespace

// Strictly digits, so that "w01", "w-1" or "seg-1.kv.bak" are never ours.
std::optional<uint64_t> number_in(const std::string& name, const std::string& prefix,
                                  const std::string& suffix, size_t min_digits) {
    if (name.size() < prefix.size() + suffix.size() + 1 || name.rfind(prefix, 0) != 0) return {};
    if (name.compare(name.size() - suffix.size(), suffix.size(), suffix) != 0) return {};
    std::string d = name.substr(prefix.size(), name.size() - prefix.size() - suffix.size());
    if (d.size() < min_digits || d.size() > 10 || d.find_first_not_of("0123456789") != d.npos)
        return {};
    if (d.size() > min_digits && d[0] == '0') return {};
    uint64_t v = std::stoull(d);
    return v < (uint64_t{1} << 32) ? std::optional(v) : std::nullopt;
}

int each_entry(int dirfd, const std::function<void(const std::string&)>& fn) {
    int fd = ::openat(dirfd, ".", O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    if (fd < 0) return errno;
    DIR* d = ::fdopendir(fd);
    if (!d) {
        int err = errno;
        ::close(fd);
        return err;
    }
    struct Closer {
        DIR* d;
        ~Closer() { ::closedir(d); }
    } closer{d};  // `fn` may throw
    for (;;) {
        errno = 0;  // the end and an error look the same otherwise
        dirent* e = ::readdir(d);
        if (!e) return errno == ENOENT ? 0 : errno;  // ENOENT: the directory itself was removed
        std::string name = e->d_name;
        if (name != "." && name != "..") fn(name);
    }
}

int64_t mtime_of(const struct stat& st) {
    return int64_t(st.st_mtim.tv_sec) * 1000000000 + st.st_mtim.tv_nsec;
}

Fd::~Fd() {
    if (fd_ >= 0) ::close(fd_);
}

PathLock::PathLock(int dirfd, int timeout_ms) : fd_(dirfd) {
    for (int waited = 0;; waited += 2) {
        if (::flock(fd_, LOCK_EX | LOCK_NB) == 0) {
            held_ = true;
            return;
        }
        if (errno != EWOULDBLOCK && errno != EINTR) return;
        if (waited >= timeout_ms) return;
        ::usleep(2000);
    }
}
PathLock::~PathLock() {
    if (held_) ::flock(fd_, LOCK_UN);
}

std::string segment_name(uint32_t id) {
    char buf[32];
    std::snprintf(buf, sizeof buf, "seg-%05u.kv", id);
    return buf;
}
std::string journal_name(uint64_t epoch) {
    return "journal-" + std::to_string(epoch);
}

int sync_names(int dirfd) {
    return ::fsync(dirfd) == 0 ? 0 : errno;
}

int64_t unix_ns() {
    timespec ts;
    ::clock_gettime(CLOCK_REALTIME, &ts);
    return int64_t(ts.tv_sec) * 1000000000 + ts.tv_nsec;
}

uint64_t auto_segment_bytes(uint64_t max_bytes) {
    uint64_t s = 256 << 20;
    while (s > max_bytes / 8 && s > (8 << 20)) s /= 2;
    return std::min(s, max_bytes / 4 / kBlock * kBlock);
}

std::string manifest_text(const Manifest& m) {
    char hex[33];
    for (size_t i = 0; i < 16; ++i) std::snprintf(hex + 2 * i, 3, "%02x", m.uuid[i]);
    std::string t = std::string(kTitle) + "\nformat " + std::to_string(kFormatVersion) + "\nuuid " +
                    hex + "\nsegment_bytes " + std::to_string(m.segment_bytes) + "\nmax_bytes " +
                    std::to_string(m.max_bytes) + "\n";
    char crc[24];
    std::snprintf(crc, sizeof crc, "crc32c %08x\n", crc32c(t.data(), t.size()));
    return t + crc;
}

ManifestError parse_manifest(const std::string& text, Manifest& out, unsigned& version) {
    version = 0;
    std::string head = std::string(kTitle) + "\nformat ";
    if (text.rfind(head, 0) != 0) return ManifestError::kForeign;
    if (std::sscanf(text.c_str() + head.size(), "%u", &version) != 1)
        return ManifestError::kDamaged;
    if (version > kFormatVersion) return ManifestError::kNewer;
    char uuid[33] = {};
    unsigned long long seg = 0, max = 0;
    if (std::sscanf(text.c_str() + head.size(), "%*u uuid %32s segment_bytes %llu max_bytes %llu",
                    uuid, &seg, &max) != 3 ||
        !parse_hex(uuid, out.uuid))
        return ManifestError::kDamaged;
    out.segment_bytes = seg;
    out.max_bytes = max;
    // The text is canonical: what does not come out the same again is damaged.
    return manifest_text(out) == text ? ManifestError::kNone : ManifestError::kDamaged;
}

void StoreDir::refuse(int err, const std::string& why) const {
    throw OsError(err, "chunk store " + path_ + ": " + why);
}

StoreDir::StoreDir(const StoreOptions& opt) {
    if (opt.path.empty() || opt.path.find('\0') != opt.path.npos)
        throw std::invalid_argument("store path is empty or holds a NUL");
    path_ = std::filesystem::absolute(opt.path).lexically_normal().string();
    while (path_.size() > 1 && path_.back() == '/')
        path_.pop_back();  // "link/" would follow the link
    open_root(opt);
    PathLock lock(root_.get(), opt.read_only ? 0 : 10000);
    if (!opt.read_only && !lock.held()) refuse(EBUSY, "another process holds the path lock");
    open_manifest(opt);
    size_up(opt);
    if (!opt.read_only) pick_writer();
}

void StoreDir::open_root(const StoreOptions& opt) {
    struct stat st;
    if (::lstat(path_.c_str(), &st) != 0) {
        if (errno != ENOENT || opt.read_only) refuse(errno, "cannot be opened");
        // umask never widens 0700; parents that are missing are ours alone too.
        for (size_t at = path_.find('/', 1);; at = path_.find('/', at + 1)) {
            std::string part = path_.substr(0, at);
            if (::mkdir(part.c_str(), 0700) == 0) {
                size_t up = part.rfind('/');
                Fd parent(::open(up ? part.substr(0, up).c_str() : "/",
                                 O_RDONLY | O_DIRECTORY | O_CLOEXEC));
                if (parent) sync_names(parent.get());  // best effort: it may not be ours
            } else if (errno != EEXIST) {
                refuse(errno, "cannot be created");
            }
            if (at == path_.npos) break;
        }
    } else if (S_ISLNK(st.st_mode)) {
        refuse(ELOOP, "is a symbolic link");
    } else if (!S_ISDIR(st.st_mode)) {
        refuse(ENOTDIR, "is not a directory");
    }
    root_ = Fd(::open(path_.c_str(), O_RDONLY | O_DIRECTORY | O_NOFOLLOW | O_CLOEXEC));
    if (!root_) refuse(errno, "cannot be opened");
    std::string bad = bad_owner(root_.get(), path_, true);
    if (!bad.empty()) refuse(EPERM, bad);
}

void StoreDir::open_manifest(const StoreOptions& opt) {
    Fd f(::openat(root_.get(), kManifest, O_RDONLY | O_NOFOLLOW | O_CLOEXEC | O_NONBLOCK));
    if (!f) {
        if (errno != ENOENT) refuse(errno, "MANIFEST cannot be opened");
        if (opt.read_only) refuse(ENOENT, "holds no chunk store");
        int err = each_entry(root_.get(), [&](const std::string& name) {
            if (name != kManifestTmp && name != "lost+found")
                refuse(ENOTEMPTY, "not empty and not a kvoffload chunk store");
        });
        if (err) refuse(err, "cannot be listed");
        return create_manifest(opt);
    }
    std::string bad = bad_owner(f.get(), path_ + "/" + kManifest, false);
    if (!bad.empty()) refuse(EPERM, "MANIFEST: " + bad);
    char buf[4097];
    ssize_t n = ::pread(f.get(), buf, sizeof buf, 0);
    if (n < 0) refuse(errno, "MANIFEST cannot be read");
    unsigned version;
    switch (parse_manifest(std::string(buf, size_t(n)), manifest_, version)) {
        case ManifestError::kNone:
            return;
        case ManifestError::kForeign:
            refuse(EINVAL, "MANIFEST is not kvoffload's");
        case ManifestError::kNewer:
            refuse(EINVAL, "format " + std::to_string(version) +
                               " is newer than this kvoffload reads (" +
                               std::to_string(kFormatVersion) + ")");
        case ManifestError::kDamaged:
            refuse(
                EINVAL,
                "MANIFEST is damaged (the store is a cache: delete the directory to start anew)");
    }
}

void StoreDir::create_manifest(const StoreOptions& opt) {
    if (::getrandom(manifest_.uuid.data(), 16, 0) != 16) refuse(EIO, "no random bytes");
    struct statvfs vfs;
    manifest_.max_bytes = opt.max_bytes;
    if (!opt.max_bytes && ::fstatvfs(root_.get(), &vfs) == 0)
        manifest_.max_bytes = uint64_t(vfs.f_bavail) * vfs.f_frsize / 2;
    size_up(opt);  // a bad size must not leave a store behind
    manifest_.segment_bytes = segment_bytes_;
    std::string text = manifest_text(manifest_);
    Fd f(::openat(root_.get(), kManifestTmp,
                  O_WRONLY | O_CREAT | O_TRUNC | O_NOFOLLOW | O_CLOEXEC | O_NONBLOCK, 0600));
    if (!f) refuse(errno, "MANIFEST cannot be created");
    if (::fchmod(f.get(), 0600) != 0) refuse(errno, "MANIFEST cannot be created");
    errno = ENOSPC;
    bool ok = ::write(f.get(), text.data(), text.size()) == ssize_t(text.size()) &&
              ::fsync(f.get()) == 0 &&
              ::renameat(root_.get(), kManifestTmp, root_.get(), kManifest) == 0 &&
              ::fsync(root_.get()) == 0;
    if (!ok) refuse(errno, "MANIFEST cannot be written");
}

void StoreDir::size_up(const StoreOptions& opt) {
    bounded_ = opt.max_bytes || opt.read_only;
    max_bytes_ = opt.max_bytes ? opt.max_bytes : manifest_.max_bytes;
    segment_bytes_ = opt.segment_bytes ? opt.segment_bytes : auto_segment_bytes(max_bytes_);
    if (uint64_t used; !bounded_ && charged_bytes(used) == 0) {
        allow(used);
        if (!opt.segment_bytes) segment_bytes_ = auto_segment_bytes(max_bytes_);
    }
    if (opt.read_only)  // takes none: any store that there can be will do
        segment_bytes_ = std::max(segment_bytes_, kMinSegmentBytes);
    else if (opt.segment_bytes &&
             (opt.segment_bytes % kBlock || opt.segment_bytes < kMinSegmentBytes ||
              opt.segment_bytes > kMaxSegmentBytes))
        throw std::invalid_argument(
            "segment_bytes must be a multiple of 4096 from 64 KiB to 4 GiB");
    // One segment, and journals of the open and the closing one.
    uint64_t one = opt.read_only ? kMinSegmentBytes : segment_bytes_;
    uint64_t need = kSmallFiles + 2 * journal_reserve(one) + one;
    if (segment_bytes_ < kMinSegmentBytes || need > max_bytes_)
        refuse(EINVAL, "max_bytes " + std::to_string(max_bytes_) + " does not hold one segment");
}

void StoreDir::allow(uint64_t used) {
    if (!bounded_) max_bytes_ = std::max(max_bytes_, used);
}

void StoreDir::pick_writer() {
    for (uint32_t id = 0; id < kMaxWriters; ++id) {
        std::string name = "w" + std::to_string(id);
        bool made = ::mkdirat(root_.get(), name.c_str(), 0700) == 0;
        if (int err = made ? sync_names(root_.get()) : errno; err && err != EEXIST)
            refuse(err, name + " cannot be created");
        Fd dir = open_writer(id);
        if (!dir) continue;
        Fd lock(::openat(dir.get(), "LOCK", O_RDWR | O_CREAT | O_NOFOLLOW | O_CLOEXEC | O_NONBLOCK,
                         0600));
        if (!lock) {
            if (errno == EROFS || errno == ENOSPC) refuse(errno, name + "/LOCK cannot be created");
            continue;
        }
        if (!bad_owner(lock.get(), "", false).empty()) continue;
        if (::flock(lock.get(), LOCK_EX | LOCK_NB) != 0) continue;
        std::string pid =
            std::to_string(::getpid()) + "\n";  // for people only; the lock is the flock
        if (::ftruncate(lock.get(), 0) != 0 || ::pwrite(lock.get(), pid.data(), pid.size(), 0) < 0)
            refuse(errno, name + "/LOCK cannot be written");
        own_ = std::move(dir);
        lock_ = std::move(lock);
        writer_ = int(id);
        return;
    }
    refuse(EBUSY, "all " + std::to_string(kMaxWriters) + " writer directories are in use");
}

uint64_t StoreDir::segments_that_fit() const {
    uint64_t rest = kSmallFiles + 2 * journal_reserve(segment_bytes_);  // more, where read only
    return max_bytes_ > rest ? (max_bytes_ - rest) / segment_bytes_ : 0;
}

std::string StoreDir::writer_path() const {
    return writer_ < 0 ? "" : path_ + "/w" + std::to_string(writer_);
}

void StoreDir::release() {
    lock_ = Fd();
    own_ = Fd();
    root_ = Fd();
}

int StoreDir::writers(std::vector<uint32_t>& out) const {
    out.clear();
    int err = each_entry(root_.get(), [&](const std::string& name) {
        auto id = number_in(name, "w", "", 1);
        if (id && *id < kMaxWriters) out.push_back(uint32_t(*id));
    });
    std::sort(out.begin(), out.end());
    return err;
}

Fd StoreDir::open_writer(uint32_t id) const {
    Fd dir(::openat(root_.get(), ("w" + std::to_string(id)).c_str(),
                    O_RDONLY | O_DIRECTORY | O_NOFOLLOW | O_CLOEXEC));
    if (!dir || !bad_owner(dir.get(), "", true).empty()) return Fd();
    return dir;
}

}  // namespace kvo::store
