// Part of record.c: sees what goes through io_uring, at the system call.
//
// A seccomp filter turns io_uring_setup and io_uring_enter into SIGSYS; the handler looks at the
// submission queue, makes the call itself, and looks at the completion queue before the caller can.
// So it does not matter how liburing was linked. A write is logged twice: SUBMIT {fd, offset, token,
// data} before the kernel knows of it, DONE {bytes written, token} before the caller knows of it.
// Between the two it may be on the disk or not. What could change a file in a way that is not
// modelled ends the process.
#ifdef __x86_64__
#include <linux/audit.h>
#include <linux/filter.h>
#include <linux/io_uring.h>
#include <linux/seccomp.h>
#include <signal.h>
#include <stddef.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/syscall.h>
#include <ucontext.h>

enum { OP_READV_FIXED = 60, OP_WRITEV_FIXED = 61, MAX_RINGS = 64, MAX_FLYING = 256 };

// The only place io_uring's calls may come from; the filter knows its address.
long kvo_syscall(long nr, long a, long b, long c, long d, long e, long f);
extern char kvo_after_syscall[];
__asm__(
    ".text\n.globl kvo_syscall\n.type kvo_syscall, @function\nkvo_syscall:\n"
    "mov %rdi, %rax\nmov %rsi, %rdi\nmov %rdx, %rsi\nmov %rcx, %rdx\nmov %r8, %r10\nmov %r9, %r8\n"
    "mov 8(%rsp), %r9\nsyscall\n.globl kvo_after_syscall\nkvo_after_syscall:\nret\n");

struct flying {
    uint64_t user_data, token;
    int used;
};
struct ring {
    int fd;
    char *sq, *cq;  // mapped once more: the same memory as the caller's
    struct io_uring_sqe* sqes;
    size_t sq_bytes, cq_bytes, sqe_bytes;
    struct io_uring_params p;
    uint32_t noted, seen;  // positions in the two queues
    struct flying writes[MAX_FLYING];
};
static struct ring rings[MAX_RINGS];
static uint64_t next_token = 1;

static uint32_t load32(const char* base, uint32_t off) {
    return __atomic_load_n((const uint32_t*)(base + off), __ATOMIC_ACQUIRE);
}

static char* map_ring(int fd, size_t bytes, off_t what) {
    void* p = mmap(NULL, bytes, PROT_READ, MAP_SHARED, fd, what);
    if (p == MAP_FAILED) die("mapping a ring");
    return p;
}

static struct ring* ring_of(int fd) {
    for (int i = 0; i < MAX_RINGS; ++i)
        if (rings[i].sq && rings[i].fd == fd) return &rings[i];
    return NULL;
}

static void ring_opened(int fd, const struct io_uring_params* p) {
    if (p->flags & (IORING_SETUP_SQPOLL | IORING_SETUP_SQE128 | IORING_SETUP_CQE32))
        die("a ring with these flags is not modelled");
    if (!(p->flags & IORING_SETUP_DEFER_TASKRUN))
        die("a ring whose completions come outside of calls is not modelled");
    struct ring* r = ring_of(fd);  // closed behind our back, the number is used again
    if (r) {
        munmap(r->sq, r->sq_bytes), munmap(r->cq, r->cq_bytes), munmap(r->sqes, r->sqe_bytes);
    } else {
        for (int i = 0; i < MAX_RINGS && !r; ++i)
            if (!rings[i].sq) r = &rings[i];
        if (!r) die("too many rings");
    }
    memset(r, 0, sizeof *r);
    r->fd = fd, r->p = *p;
    r->sq_bytes = p->sq_off.array + p->sq_entries * sizeof(uint32_t);
    r->cq_bytes = p->cq_off.cqes + p->cq_entries * sizeof(struct io_uring_cqe);
    r->sqe_bytes = p->sq_entries * sizeof(struct io_uring_sqe);
    r->sq = map_ring(fd, r->sq_bytes, IORING_OFF_SQ_RING);
    r->cq = map_ring(fd, r->cq_bytes, IORING_OFF_CQ_RING);
    r->sqes = (struct io_uring_sqe*)map_ring(fd, r->sqe_bytes, IORING_OFF_SQES);
}

static void note_submit(struct ring* r, const struct io_uring_sqe* s) {
    struct iovec one = {(void*)s->addr, s->len};
    const struct iovec* iov = &one;
    int n = 1;
    switch (s->opcode) {
        case IORING_OP_NOP:
        case IORING_OP_READ:
        case IORING_OP_READV:
        case IORING_OP_READ_FIXED:
        case OP_READV_FIXED:
            return;
        case IORING_OP_WRITE:
        case IORING_OP_WRITE_FIXED:
            break;
        case IORING_OP_WRITEV:
        case OP_WRITEV_FIXED:
            iov = (const struct iovec*)s->addr;
            n = (int)s->len;
            break;
        default:
            die("an io_uring operation that is not modelled");
    }
    if (s->flags & IOSQE_FIXED_FILE) die("registered files are not modelled");
    if (!is_traced(s->fd)) return;
    size_t bytes = 0;
    for (int i = 0; i < n; ++i) bytes += iov[i].iov_len;
    struct flying* f = r->writes;
    while (f < r->writes + MAX_FLYING && f->used) ++f;
    if (f == r->writes + MAX_FLYING) die("too many writes under way");
    *f = (struct flying){s->user_data, next_token++, 1};
    note(SUBMIT, s->fd, s->off, f->token, NULL, iov, n, bytes);
}

static void note_done(struct ring* r, const struct io_uring_cqe* c) {
    for (struct flying* f = r->writes; f < r->writes + MAX_FLYING; ++f) {
        if (!f->used || f->user_data != c->user_data) continue;
        note(DONE, -1, c->res > 0 ? (uint64_t)c->res : 0, f->token, NULL, NULL, 0, 0);
        f->used = 0;
        return;
    }
}

static long ring_enter(long fd, long submit, long c, long d, long e, long f) {
    pthread_mutex_lock(&mu);
    struct ring* r = ring_of((int)fd);
    if (!r) die("a ring that was not seen opening");
    uint32_t head = load32(r->sq, r->p.sq_off.head), end = head + (uint32_t)submit;
    if ((int32_t)(r->noted - head) < 0) r->noted = head;
    for (; (int32_t)(end - r->noted) > 0; ++r->noted) {  // the kernel may have left some last time
        uint32_t at = r->noted & (r->p.sq_entries - 1);
        uint32_t index = ((uint32_t*)(r->sq + r->p.sq_off.array))[at];
        note_submit(r, &r->sqes[index]);
    }
    pthread_mutex_unlock(&mu);
    long got = kvo_syscall(SYS_io_uring_enter, fd, submit, c, d, e, f);
    pthread_mutex_lock(&mu);
    uint32_t tail = load32(r->cq, r->p.cq_off.tail);
    struct io_uring_cqe* cqes = (struct io_uring_cqe*)(r->cq + r->p.cq_off.cqes);
    for (; r->seen != tail; ++r->seen) note_done(r, &cqes[r->seen & (r->p.cq_entries - 1)]);
    pthread_mutex_unlock(&mu);
    return got;
}

static void on_sigsys(int sig, siginfo_t* info, void* context) {
    (void)sig;
    int saved = errno;
    greg_t* g = ((ucontext_t*)context)->uc_mcontext.gregs;
    long got;
    if (info->si_syscall == SYS_io_uring_setup) {
        struct io_uring_params* p = (struct io_uring_params*)g[REG_RSI];
        got = kvo_syscall(SYS_io_uring_setup, g[REG_RDI], g[REG_RSI], 0, 0, 0, 0);
        pthread_mutex_lock(&mu);
        if (got >= 0) ring_opened((int)got, p);
        pthread_mutex_unlock(&mu);
    } else {
        got = ring_enter(g[REG_RDI], g[REG_RSI], g[REG_RDX], g[REG_R10], g[REG_R8], g[REG_R9]);
    }
    g[REG_RAX] = got;
    errno = saved;
}

// The filter's signal must reach every thread.
int pthread_sigmask(int how, const sigset_t* set, sigset_t* old) {
    sigset_t without;
    if (set && how != SIG_UNBLOCK && active()) {
        without = *set;
        sigdelset(&without, SIGSYS);
        set = &without;
    }
    return REAL(pthread_sigmask)(how, set, old);
}

#define AT(field) BPF_STMT(BPF_LD | BPF_W | BPF_ABS, offsetof(struct seccomp_data, field))
#define IF(value, yes, no) BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, (uint32_t)(value), yes, no)

__attribute__((constructor)) static void watch_rings(void) {
    if (!getenv("KVO_TRACE_RINGS") || !active()) return;
    struct sigaction act = {.sa_sigaction = on_sigsys, .sa_flags = SA_SIGINFO};
    if (sigaction(SIGSYS, &act, NULL)) die("sigaction");
    uint64_t ours = (uint64_t)(uintptr_t)kvo_after_syscall;
    struct sock_filter code[] = {
        AT(arch), IF(AUDIT_ARCH_X86_64, 0, 7),
        AT(nr), IF(SYS_io_uring_setup, 1, 0), IF(SYS_io_uring_enter, 0, 4),
        AT(instruction_pointer), IF(ours, 0, 3),
        BPF_STMT(BPF_LD | BPF_W | BPF_ABS, offsetof(struct seccomp_data, instruction_pointer) + 4),
        IF(ours >> 32, 0, 1),
        BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ALLOW),
        BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_TRAP),
    };
    struct sock_fprog filter = {sizeof code / sizeof *code, code};
    if (prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)) die("PR_SET_NO_NEW_PRIVS");
    if (prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, &filter)) die("seccomp");
}
#else
__attribute__((constructor)) static void watch_rings(void) {
    if (getenv("KVO_TRACE_RINGS")) die("io_uring is recorded on x86-64 only");
}
#endif
