"""Questions to the kernel and the driver that ``doctor`` asks. No third-party imports."""

from __future__ import annotations

import ctypes
import importlib
import mmap
import os
import re
import resource
import tempfile
from pathlib import Path


def shmem_hugepages(
    path: str = "/sys/kernel/mm/transparent_hugepage/shmem_enabled",
) -> str | None:
    """The word in brackets, or None where the kernel has no such setting."""
    try:
        text = Path(path).read_text()
    except OSError:
        return None
    return text.partition("[")[2].partition("]")[0] or None


def arena_hugepages() -> bool:
    """Whether the arena gets huge pages here, tried on one of 2 MiB."""
    try:
        core = importlib.import_module("kvoffload._core")
        arena = core.Arena.create(2 << 20, 1, 1)
    except (ImportError, OSError):
        return False
    with_them = bool(arena.hugepages)
    arena.close()
    return with_them


def memlock_bytes() -> int | None:
    """The soft RLIMIT_MEMLOCK in bytes; None: unlimited."""
    soft, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    return None if soft == resource.RLIM_INFINITY else soft


def io_uring_problem() -> str | None:
    """None when the NVMe tier can use io_uring in this process, else why not, in a few words."""
    try:
        core = importlib.import_module("kvoffload._core")
    except ImportError:
        return "unknown: the native core does not load"
    problem: str | None = core.io_uring_problem()
    return problem


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
    # As bytes: names need not be text, and only the kernel's own line breaks end a line.
    for raw in Path(mountinfo).read_bytes().split(b"\n"):
        left, _, right = os.fsdecode(raw).partition(" - ")
        if not right:
            continue
        mount = _unescaped(left.split(" ")[4])
        inside = mount == "/" or target == mount or target.startswith(mount + "/")
        if inside and len(mount) >= len(best):
            best, kind = mount, right.split()[0]
    return kind


def _unescaped(name: str) -> str:
    """A name as the kernel writes it: blanks and backslashes are \\ and three octal digits."""
    return re.sub(r"\\([0-7]{3})", lambda found: chr(int(found[1], 8)), name)
