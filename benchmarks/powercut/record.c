// LD_PRELOAD shim: logs every change a process makes to files below $KVO_TRACE_ROOT to $KVO_TRACE.
//
// One mutex is held over the real call and its log entry, so the log is a true order of the calls.
// Entry: {u32 op, i32 fd, u64 a, u64 b, u32 name bytes, u32 data bytes}, name, data. disk.py reads it.
// Only calls that succeed are logged, with the bytes that went through. io_uring: record_ring.c.
#define _GNU_SOURCE
#include <dirent.h>
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <pthread.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/uio.h>
#include <unistd.h>

enum { OPEN = 1, WRITE, TRUNCATE, EXTEND, SYNC, UNLINK, RENAME, MKDIR, SUBMIT, DONE };
enum { MAX_FD = 4096 };
struct entry {
    uint32_t op;
    int32_t fd;
    uint64_t a, b;
    uint32_t name, data;
};

static pthread_mutex_t mu = PTHREAD_MUTEX_INITIALIZER;
static char traced[MAX_FD];
static int log_fd = -2;
static char root[PATH_MAX];
static size_t root_len;

#define REAL(name) ((__typeof__(&name))dlsym(RTLD_NEXT, #name))

static void die(const char* what) {
    fprintf(stderr, "record: %s: %s\n", what, strerror(errno));
    REAL(_exit)(97);
    __builtin_unreachable();
}

static int active(void) {
    if (log_fd != -2) return log_fd >= 0;
    const char *log = getenv("KVO_TRACE"), *dir = getenv("KVO_TRACE_ROOT");
    log_fd = -1;
    if (!log || !dir) return 0;
    if (!realpath(dir, root)) die("KVO_TRACE_ROOT");
    root_len = strlen(root);
    log_fd = REAL(open)(log, O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0600);
    if (log_fd < 0) die("KVO_TRACE");
    return 1;
}

static void put_all(const struct iovec* iov, int n, size_t most) {
    for (int i = 0; i < n && most; ++i) {
        const char* p = iov[i].iov_base;
        size_t left = iov[i].iov_len < most ? iov[i].iov_len : most;
        most -= left;
        while (left) {
            ssize_t got = REAL(write)(log_fd, p, left);
            if (got < 0 && errno != EINTR) die("log");
            if (got > 0) p += got, left -= (size_t)got;
        }
    }
}

static void note(uint32_t op, int fd, uint64_t a, uint64_t b, const char* name,
                 const struct iovec* iov, int n, size_t bytes) {
    int saved = errno;
    struct entry e = {op, fd, a, b, name ? (uint32_t)strlen(name) : 0, (uint32_t)bytes};
    struct iovec head[2] = {{&e, sizeof e}, {(void*)name, e.name}};
    put_all(head, 2, SIZE_MAX);
    put_all(iov, n, bytes);
    errno = saved;
}

static int is_traced(int fd) {
    return active() && fd >= 0 && fd < MAX_FD && traced[fd];
}

// Path relative to the root of what `fd` has open; 0 where it is not below the root.
static int below(int fd, char* out) {
    char link[64], path[PATH_MAX];
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    ssize_t n = readlink(link, path, sizeof path - 1);
    if (n < 0) return 0;
    path[n] = 0;
    if (strncmp(path, root, root_len) != 0 || (path[root_len] && path[root_len] != '/')) return 0;
    strcpy(out, path[root_len] ? path + root_len + 1 : "");
    return 1;
}

static int named(int dirfd, const char* name, char* out) {
    char dir[PATH_MAX];
    if (!is_traced(dirfd) || !below(dirfd, dir)) return 0;
    return snprintf(out, PATH_MAX, "%s%s%s", dir, *dir ? "/" : "", name) < PATH_MAX;
}

static int opened(int fd, int flags) {
    char path[PATH_MAX];
    if (fd < 0 || fd >= MAX_FD) return fd;
    int saved = errno;
    traced[fd] = (char)below(fd, path);
    if (traced[fd]) note(OPEN, fd, (uint64_t)flags, 0, path, NULL, 0, 0);
    errno = saved;
    return fd;
}

#define LOCKED(type, call, then)                \
    if (!active()) return call;                 \
    pthread_mutex_lock(&mu);                    \
    type r = call;                              \
    then;                                       \
    pthread_mutex_unlock(&mu);                  \
    return r

#define MODE                                                \
    mode_t mode = 0;                                        \
    if (flags & (O_CREAT | __O_TMPFILE)) {                  \
        va_list ap;                                         \
        va_start(ap, flags);                                \
        mode = va_arg(ap, mode_t);                          \
        va_end(ap);                                         \
    }

int open(const char* path, int flags, ...) {
    MODE LOCKED(int, REAL(open)(path, flags, mode), opened(r, flags));
}
int openat(int dirfd, const char* path, int flags, ...) {
    MODE LOCKED(int, REAL(openat)(dirfd, path, flags, mode), opened(r, flags));
}
int open64(const char* path, int flags, ...) {
    MODE LOCKED(int, REAL(open)(path, flags, mode), opened(r, flags));
}
int openat64(int dirfd, const char* path, int flags, ...) {
    MODE LOCKED(int, REAL(openat)(dirfd, path, flags, mode), opened(r, flags));
}
int __openat_2(int dirfd, const char* path, int flags) {
    LOCKED(int, REAL(openat)(dirfd, path, flags), opened(r, flags));
}
int __open_2(const char* path, int flags) {
    LOCKED(int, REAL(open)(path, flags), opened(r, flags));
}
int close(int fd) {
    LOCKED(int, REAL(close)(fd), if (fd >= 0 && fd < MAX_FD) traced[fd] = 0);
}
int closedir(DIR* d) {  // closes its descriptor without calling close()
    int fd = dirfd(d);
    LOCKED(int, REAL(closedir)(d), if (fd >= 0 && fd < MAX_FD) traced[fd] = 0);
}

ssize_t pwritev(int fd, const struct iovec* iov, int n, off_t off) {
    LOCKED(ssize_t, REAL(pwritev)(fd, iov, n, off),
           if (r > 0 && is_traced(fd)) note(WRITE, fd, (uint64_t)off, 0, NULL, iov, n, (size_t)r));
}
ssize_t pwrite(int fd, const void* p, size_t bytes, off_t off) {
    struct iovec v = {(void*)p, bytes};
    LOCKED(ssize_t, REAL(pwrite)(fd, p, bytes, off),
           if (r > 0 && is_traced(fd)) note(WRITE, fd, (uint64_t)off, 0, NULL, &v, 1, (size_t)r));
}
ssize_t write(int fd, const void* p, size_t bytes) {
    if (!is_traced(fd)) return REAL(write)(fd, p, bytes);
    struct iovec v = {(void*)p, bytes};
    LOCKED(ssize_t, REAL(write)(fd, p, bytes), if (r > 0) {
        off_t end = lseek(fd, 0, SEEK_CUR);
        note(WRITE, fd, (uint64_t)(end - r), 0, NULL, &v, 1, (size_t)r);
    });
}

int ftruncate(int fd, off_t bytes) {
    LOCKED(int, REAL(ftruncate)(fd, bytes),
           if (!r && is_traced(fd)) note(TRUNCATE, fd, (uint64_t)bytes, 0, NULL, NULL, 0, 0));
}
int fallocate(int fd, int mode, off_t off, off_t bytes) {
    LOCKED(int, REAL(fallocate)(fd, mode, off, bytes), if (!r && is_traced(fd)) {
        if (mode) die("fallocate with a mode is not modelled");
        note(EXTEND, fd, (uint64_t)(off + bytes), 0, NULL, NULL, 0, 0);
    });
}
int fsync(int fd) {
    LOCKED(int, REAL(fsync)(fd),
           if (!r && is_traced(fd)) note(SYNC, fd, 0, 0, NULL, NULL, 0, 0));
}
int fdatasync(int fd) {
    LOCKED(int, REAL(fdatasync)(fd),
           if (!r && is_traced(fd)) note(SYNC, fd, 1, 0, NULL, NULL, 0, 0));
}

int unlinkat(int dirfd, const char* name, int flags) {
    char path[PATH_MAX];
    LOCKED(int, REAL(unlinkat)(dirfd, name, flags),
           if (!r && named(dirfd, name, path)) note(UNLINK, -1, 0, 0, path, NULL, 0, 0));
}
int mkdirat(int dirfd, const char* name, mode_t mode) {
    char path[PATH_MAX];
    LOCKED(int, REAL(mkdirat)(dirfd, name, mode),
           if (!r && named(dirfd, name, path)) note(MKDIR, -1, 0, 0, path, NULL, 0, 0));
}
static void note_rename(const char* from, char* to) {
    struct iovec v = {to, strlen(to)};
    note(RENAME, -1, 0, 0, from, &v, 1, v.iov_len);
}
int renameat(int from, const char* old, int to, const char* fresh) {
    char path[PATH_MAX], target[PATH_MAX];
    LOCKED(int, REAL(renameat)(from, old, to, fresh),
           if (!r && named(from, old, path) && named(to, fresh, target))
               note_rename(path, target));
}

// Not between a call and its entry: what is on the disk then would not be in the log.
void _exit(int status) {
    if (active()) pthread_mutex_lock(&mu);
    REAL(_exit)(status);
    __builtin_unreachable();
}

#include "record_ring.c"
