"""Questions to the kernel and the driver that ``doctor`` asks. No third-party imports."""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import resource
import tempfile
from pathlib import Path

_IO_URING_SETUP = 425  # the same number on x86_64, aarch64, riscv64, ppc64le and s390x


def shmem_hugepages(
    path: str = "/sys/kernel/mm/transparent_hugepage/shmem_enabled",
) -> str | None:
    """The word in brackets, or None where the kernel has no such setting."""
    try:
        text = Path(path).read_text()
    except OSError:
        return None
    return text.partition("[")[2].partition("]")[0] or None


def memlock_bytes() -> int | None:
    """The soft RLIMIT_MEMLOCK in bytes; None: unlimited."""
    soft, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    return None if soft == resource.RLIM_INFINITY else soft


def io_uring_problem() -> str | None:
    """None when an io_uring can be created here, else why not."""
    libc = ctypes.CDLL(None, use_errno=True)
    params = ctypes.create_string_buffer(120)
    fd = libc.syscall(_IO_URING_SETUP, 2, params)
    if fd >= 0:
        os.close(fd)
        return None
    code = ctypes.get_errno()
    if code == errno.ENOSYS:
        return "not in this kernel"
    if code == errno.EPERM:
        return "forbidden here (seccomp or kernel.io_uring_disabled)"
    return os.strerror(code)


def cuda_devices() -> int:
    """NVIDIA GPUs the driver shows to this process; 0 without a driver."""
    try:
        cuda = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return 0
    count = ctypes.c_int(0)
    if cuda.cuInit(0) != 0 or cuda.cuDeviceGetCount(ctypes.byref(count)) != 0:
        return 0
    return count.value


def direct_io_problem(folder: Path) -> str | None:
    """None when an aligned O_DIRECT write and read work in ``folder``, else why not."""
    buffer = mmap.mmap(-1, 4096)  # page aligned
    buffer.write(b"kvoffload doctor".ljust(4096, b"."))
    fd, name = tempfile.mkstemp(dir=folder, prefix=".kvoffload-doctor-")
    os.close(fd)
    try:
        fd = os.open(name, os.O_RDWR | os.O_DIRECT)
        try:
            if os.pwrite(fd, buffer, 0) != 4096 or os.preadv(fd, [buffer], 0) != 4096:
                return "short read or write"
        finally:
            os.close(fd)
    except OSError as exc:
        return exc.strerror or str(exc)
    finally:
        os.unlink(name)
        buffer.close()
    return None


def file_system(path: Path, mountinfo: str = "/proc/self/mountinfo") -> str:
    """Type of the file system that holds ``path``."""
    best, kind = "", "unknown"
    target = str(path.resolve())
    for line in Path(mountinfo).read_text().splitlines():
        left, _, right = line.partition(" - ")
        mount = left.split()[4].encode().decode("unicode_escape")  # spaces are \040
        inside = mount == "/" or target == mount or target.startswith(mount + "/")
        if inside and len(mount) >= len(best):
            best, kind = mount, right.split()[0]
    return kind
