"""How the ``store`` routine puts and gets chunks: the same code for every system.

Runs in two processes (LMCache has its own), so it needs numpy and the standard library only.
"""

from __future__ import annotations

import contextlib
import random
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np

LOAD_S = 5.0  # a load that puts are measured beside lasts no longer


class Engine(Protocol):
    """One way to keep chunks in a ring's rows. Jobs end in any order; one thread calls."""

    def prepare(self, chunks: list[int], rows: list[int], write: bool) -> None:
        """Untimed: what a caller of the system has done before (hashing, claiming slots)."""

    def start(self, job: int, chunks: list[int], rows: list[int], write: bool) -> None: ...
    def next_done(self) -> tuple[int, bool]:
        """(job, all of it worked). Blocks; raises TimeoutError."""

    def forget(self, chunks: list[int]) -> None:
        """Untimed: room for as many new ones, where the system makes none by itself."""

    def close(self) -> None: ...


class Ring:
    """Page-aligned memory, ``rows`` buffers; a row holds the bytes of one chunk after ``fill``."""

    def __init__(self, memory: Any, rows: int, size: int) -> None:
        self.data = np.frombuffer(memory, dtype=np.uint8)[: rows * size].reshape(rows, size)
        self.view = memoryview(memory)
        self.size = size
        # Nothing for a device to compress.
        self._noise = np.random.default_rng(0).integers(0, 256, size, dtype=np.uint8)
        self.data[:] = self._noise

    def fill(self, row: int, chunk: int) -> None:
        """Noise plus the chunk's number at both ends: cheap to write, cheap to check."""
        words = self.data[row].view(np.uint64)
        words[0] = words[-1] = chunk
        middle = self.size // 2
        self.data[row, middle : middle + 512] = self._noise[middle : middle + 512]

    def check(self, row: int, chunk: int) -> None:
        """Raise RuntimeError when the row does not hold that chunk."""
        words = self.data[row].view(np.uint64)
        middle = slice(self.size // 2, self.size // 2 + 512)
        same = np.array_equal(self.data[row, middle], self._noise[middle])
        if not (words[0] == chunk and words[-1] == chunk and same):
            raise RuntimeError(f"wrong bytes for chunk {chunk}")

    def clear(self, row: int) -> None:
        self.data[row, :8] = self.data[row, -8:] = 0
        middle = self.size // 2
        self.data[row, middle : middle + 512] = 0


@dataclass
class Sample:
    """One measurement: bytes moved, wall and CPU seconds, and each job's time."""

    nbytes: int
    seconds: float
    cpu_s: float
    ms: list[float] = field(default_factory=list)
    own_cpu_s: float = 0.0  # of the store's own threads: without the caller that submits and polls

    @property
    def gbps(self) -> float:
        return self.nbytes / self.seconds / 1e9

    @property
    def cpu_s_per_gb(self) -> float:
        return self.cpu_s / (self.nbytes / 1e9)


def native_threads_cpu_s() -> float:
    """CPU seconds so far of this process's threads named ``kvo-...``: the chunk store's own."""
    total = 0
    for task in Path("/proc/self/task").iterdir():
        with contextlib.suppress(OSError):
            if (task / "comm").read_text().startswith("kvo-"):
                total += int((task / "schedstat").read_text().split()[0])
    return total / 1e9


class Driver:
    """Measures one engine. Every byte that is read is checked, outside of the timing."""

    def __init__(self, engine: Engine, ring: Ring) -> None:
        self.engine, self.ring = engine, ring
        self._job = 0

    def _begin(self, chunks: list[int], rows: list[int], write: bool) -> int:
        self._job += 1
        self.engine.start(self._job, chunks, rows, write)
        return self._job

    def _ready(self, chunks: list[int], rows: list[int], write: bool) -> None:
        for chunk, row in zip(chunks, rows, strict=True):
            if write:
                self.ring.fill(row, chunk)
            else:
                self.ring.clear(row)
        self.engine.prepare(chunks, rows, write)

    def _verify(self, chunks: list[int], rows: list[int]) -> None:
        for chunk, row in zip(chunks, rows, strict=True):
            self.ring.check(row, chunk)

    def _wait(self) -> int:
        job, ok = self.engine.next_done()
        if not ok:
            raise RuntimeError("a put or get failed")
        return job

    def batch(self, chunks: list[int], write: bool, per_job: int) -> Sample:
        """All chunks at once, ``per_job`` to a job."""
        rows = list(range(len(chunks)))
        self._ready(chunks, rows, write)
        jobs = [slice(i, i + per_job) for i in range(0, len(chunks), per_job)]
        own = native_threads_cpu_s()
        start, cpu = time.perf_counter(), time.process_time()
        for part in jobs:
            self._begin(chunks[part], rows[part], write)
        for _ in jobs:
            self._wait()
        seconds, cpu_s = time.perf_counter() - start, time.process_time() - cpu
        own = native_threads_cpu_s() - own
        if not write:
            self._verify(chunks, rows)
        return Sample(len(chunks) * self.ring.size, seconds, cpu_s, own_cpu_s=own)

    def age(self, count: int) -> None:
        """Untimed: as many puts, of chunks that nobody asks for."""
        rows, first = len(self.ring.data), 1 << 40
        for at in range(0, count, rows):
            self.batch(list(range(first + at, first + at + min(rows, count - at))), True, 16)

    def singles(self, chunks: list[int], write: bool, depth: int) -> Sample:
        """One chunk per job, ``depth`` jobs in flight."""
        free, flying, at = list(range(depth)), {}, 0
        ms: list[float] = []
        start, cpu = time.perf_counter(), time.process_time()
        while len(ms) < len(chunks):
            while free and at < len(chunks):
                row, chunk = free.pop(), chunks[at]
                self._ready([chunk], [row], write)
                since = time.perf_counter()
                flying[self._begin([chunk], [row], write)] = (row, chunk, since)
                at += 1
            row, chunk, since = flying.pop(self._wait())
            ms.append((time.perf_counter() - since) * 1e3)
            if not write:
                self._verify([chunk], [row])
            free.append(row)
        seconds, cpu_s = time.perf_counter() - start, time.process_time() - cpu
        return Sample(len(chunks) * self.ring.size, seconds, cpu_s, ms)

    def beside_load(self, puts: list[int], held: list[int], depth: int) -> Sample:
        """One put at a time while ``depth`` gets of ``held`` chunks are in flight: the puts' times.

        Ends after LOAD_S: a system may let puts wait for as long as there are gets. The put that
        waits then is counted with the time it has taken once the gets are over.
        """
        rng, free = random.Random(1), list(range(1, depth + 1))
        reading: dict[int, tuple[int, int]] = {}
        ms: list[float] = []
        start, cpu, read, put, since = time.perf_counter(), time.process_time(), 0, None, 0.0
        over = False
        while not over or reading or put is not None:
            over = len(ms) == len(puts) or time.perf_counter() - start > LOAD_S
            while free and not over:
                row, chunk = free.pop(), rng.choice(held)
                self._ready([chunk], [row], False)
                reading[self._begin([chunk], [row], False)] = (row, chunk)
            if put is None and not over:
                chunk = puts[len(ms)]
                self._ready([chunk], [0], True)
                since = time.perf_counter()
                put = self._begin([chunk], [0], True)
            job = self._wait()
            if job == put:
                ms.append((time.perf_counter() - since) * 1e3)
                put = None
                continue
            row, chunk = reading.pop(job)
            self._verify([chunk], [row])
            free.append(row)
            read += 1
        seconds, cpu_s = time.perf_counter() - start, time.process_time() - cpu
        return Sample((read + len(ms)) * self.ring.size, seconds, cpu_s, ms)

    def forget(self, chunks: list[int]) -> None:
        self.engine.forget(chunks)

    def close(self) -> None:
        self.engine.close()
