"""``store``: the chunk store alone, beside raw O_DIRECT I/O and vLLM's file-system tier.

``kvoffload`` takes the I/O engine that ``io_engine=auto`` picks, ``kvoffload_threads`` its
pread/pwrite threads. Per size and depth every engine writes the same incompressible chunks, then
reads them back in random order after the page cache was dropped; engines alternate within each
repeat. ``restore`` is one request asking for many chunks at once. All bytes read are checked.
"""

from __future__ import annotations

import argparse
import functools
import hashlib
import importlib.util
import mmap
import random
import shutil
import time
from collections import defaultdict
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from common import DirectFile, Json, Skip, cpu_seconds, drop_page_cache, quantile, summary
from context import Context

NAME = "store"
MIB = 1 << 20
RESTORE_CHUNKS = 256
WAIT_MS = 60_000


def add_options(parser: argparse.ArgumentParser) -> None:
    """Options of this routine."""
    parser.add_argument("--sizes-kib", default="64,1024,4096")
    parser.add_argument("--depths", default="1,16")
    parser.add_argument("--total-mib", type=int, default=512, help="bytes per case, at least")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=4, help="I/O threads of each engine")


class Engine(Protocol):
    """One way to keep chunks. Buffers are page-aligned and of the chunk's size."""

    def start(self, job: int, chunks: list[int], rows: list[int], write: bool) -> None: ...
    def next_done(self) -> tuple[int, bool]: ...
    def close(self) -> None: ...


class Ring:
    """Page-aligned buffers; row i holds the bytes of chunk ``stamp`` after ``fill``."""

    def __init__(self, rows: int, size: int) -> None:
        self._map = mmap.mmap(-1, rows * size)
        self.data = np.frombuffer(self._map, dtype=np.uint8).reshape(rows, size)
        rng = np.random.default_rng(0)
        self._noise = rng.integers(0, 256, size, dtype=np.uint8)
        self.data[:] = self._noise
        self.view = memoryview(self._map)
        self.size = size

    def fill(self, row: int, chunk: int) -> None:
        """Noise plus the chunk's number at both ends: cheap to write, cheap to check."""
        words = self.data[row].view(np.uint64)
        words[0] = words[-1] = chunk

    def check(self, row: int, chunk: int) -> None:
        """Raise AssertionError when the row does not hold that chunk."""
        words = self.data[row].view(np.uint64)
        middle = self.size // 2
        same = np.array_equal(
            self.data[row, middle : middle + 512], self._noise[middle : middle + 512]
        )
        assert words[0] == chunk and words[-1] == chunk and same, f"wrong bytes for chunk {chunk}"

    def clear(self, row: int) -> None:
        self.data[row, :8] = 0
        self.data[row, -8:] = 0
        middle = self.size // 2
        self.data[row, middle : middle + 512] = 0


class KvoffloadEngine:
    """``SegmentStore`` through its buffer interface; checksums on."""

    def __init__(
        self, where: Path, ring: Ring, total: int, threads: int, io_engine: str = "auto"
    ) -> None:
        from kvoffload import _core

        self._ring = ring
        self._store = _core.SegmentStore(
            str(where), max_bytes=4 * total + 64 * MIB, threads=threads, io_engine=io_engine
        )
        self._done: list[tuple[int, bool]] = []
        self._open: list[int] = []

    @staticmethod
    def key(chunk: int) -> bytes:
        return hashlib.blake2b(chunk.to_bytes(8, "little"), digest_size=16).digest()

    def start(self, job: int, chunks: list[int], rows: list[int], write: bool) -> None:
        keys = b"".join(self.key(c) for c in chunks)
        buffers = [self._ring.data[r] for r in rows]
        self._open.append(job)
        (self._store.put if write else self._store.get)(job, keys, buffers)

    def next_done(self) -> tuple[int, bool]:
        while not self._done:
            self._store.wait(self._open[0], WAIT_MS)
            finished = self._store.poll()
            if not finished:
                raise TimeoutError("the store finished no job in a minute")
            for item in finished:
                self._open.remove(item.job)
                self._done.append((item.job, not any(item.results)))
        return self._done.pop()

    def close(self) -> None:
        self._store.close()


class VllmFsEngine:
    """vLLM's fs tier at its own data path: its thread pool, its file layout, its batch calls."""

    def __init__(self, where: Path, ring: Ring, total: int, threads: int) -> None:
        from vllm.v1.kv_offload.tiering.fs import io
        from vllm.v1.kv_offload.tiering.fs.thread_pool import DualQueueThreadPool

        where.mkdir(parents=True)
        self._io, self._where, self._ring = io, where, ring
        self._direct = io.probe_o_direct(str(where))
        self._pool = DualQueueThreadPool(threads, threads)
        self._done: list[tuple[int, bool]] = []

    def _path(self, chunk: int) -> str:
        name = hashlib.sha256(chunk.to_bytes(8, "little")).hexdigest()
        return f"{self._where}/kv_r0/{name[:3]}/{name[3:5]}_g0/{name}.bin"

    def start(self, job: int, chunks: list[int], rows: list[int], write: bool) -> None:
        # One job is one task on one thread: that is what the tier does with a request.
        call = self._io.batch_store_block if write else self._io.batch_load_block
        offsets = [row * self._ring.size for row in rows]
        paths = [self._path(chunk) for chunk in chunks]
        task = functools.partial(
            call, paths, self._ring.view, offsets, self._ring.size, self._direct
        )
        (self._pool.enqueue_store if write else self._pool.enqueue_load)(job, 1, [task])

    def next_done(self) -> tuple[int, bool]:
        deadline = time.monotonic() + WAIT_MS / 1e3
        while not self._done:
            self._done += [(job, ok) for job, ok, _ in self._pool.get_finished()]
            if not self._done:
                if time.monotonic() > deadline:
                    raise TimeoutError("vLLM's fs tier finished no job in a minute")
                time.sleep(50e-6)
        return self._done.pop()

    def close(self) -> None:
        self._pool.shutdown()


def _engines() -> tuple[dict[str, Any], dict[str, str]]:
    found: dict[str, Any] = {}
    skipped = {"lmcache": "its disk adapters are not driven by this routine yet"}
    for name, module, engine in (
        ("kvoffload", "kvoffload._core", KvoffloadEngine),
        (
            "kvoffload_threads",
            "kvoffload._core",
            functools.partial(KvoffloadEngine, io_engine="threads"),
        ),
        ("vllm_fs", "vllm", VllmFsEngine),
    ):
        if importlib.util.find_spec(module) is None:
            skipped[name] = f"{module} is not installed"
        else:
            found[name] = engine
    return found, skipped


def _drive(
    engine: Engine, ring: Ring, order: list[int], depth: int, write: bool
) -> tuple[float, list[float], float]:
    """All chunks of ``order``, one per job, ``depth`` jobs in flight: (GB/s, ms each, CPU s/GB)."""
    free, started = list(range(depth)), {}
    latencies: list[float] = []
    begin, cpu, at = time.perf_counter(), cpu_seconds(), 0
    while len(latencies) < len(order):
        while free and at < len(order):
            row = free.pop()
            (ring.fill if write else lambda r, _c: ring.clear(r))(row, order[at])
            started[at] = (row, time.perf_counter())
            engine.start(at, [order[at]], [row], write)
            at += 1
        job, ok = engine.next_done()
        row, since = started.pop(job)
        latencies.append((time.perf_counter() - since) * 1e3)
        assert ok, f"{'put' if write else 'get'} of chunk {order[job]} failed"
        if not write:
            ring.check(row, order[job])
        free.append(row)
    seconds, gb = time.perf_counter() - begin, len(order) * ring.size / 1e9
    return gb / seconds, latencies, (cpu_seconds() - cpu) / gb


def _restore(engine: Engine, ring: Ring, chunks: list[int]) -> float:
    """One job for all ``chunks``: GB/s."""
    for row in range(len(chunks)):
        ring.clear(row)
    begin = time.perf_counter()
    engine.start(0, chunks, list(range(len(chunks))), False)
    _, ok = engine.next_done()
    seconds = time.perf_counter() - begin
    assert ok, "restore failed"
    for row, chunk in enumerate(chunks):
        ring.check(row, chunk)
    return len(chunks) * ring.size / seconds / 1e9


class Case:
    """One (size, depth): samples of every engine over all repeats."""

    def __init__(self, size: int, depth: int, total: int, threads: int) -> None:
        self.size, self.depth, self.threads = size, depth, threads
        self.chunks = max(total // size, depth)
        self.rates: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
        self.restored = min(RESTORE_CHUNKS, self.chunks)
        self.ring = Ring(max(depth, self.restored), size)

    def limit(self, where: Path) -> None:
        """Raw O_DIRECT of the same sizes and depth."""
        file = DirectFile(where / "limit.bin", self.chunks * self.size, self.size)
        order = list(range(file.pieces))
        try:
            self.rates["limit"]["put_gbps"].append(file.transfer(True, self.depth, order)[0])
            drop_page_cache(file.path)
            random.Random(1).shuffle(order)
            self.rates["limit"]["get_gbps"].append(file.transfer(False, self.depth, order)[0])
        finally:
            file.close()

    def engine(self, name: str, make: Any, where: Path) -> None:
        """One repeat of one engine on a fresh store."""
        folder, rates = where / name, self.rates[name]
        order = list(range(self.chunks))
        engine: Engine = make(folder, self.ring, self.chunks * self.size, self.threads)
        try:
            for op, write in (("put", True), ("get", False)):
                gbps, ms, cpu = _drive(engine, self.ring, order, self.depth, write)
                rates[f"{op}_gbps"].append(gbps)
                rates[f"{op}_ms"] += ms
                rates[f"{op}_cpu_s_per_gb"].append(cpu)
                drop_page_cache(folder)
                random.Random(1).shuffle(order)
            rates["restore_gbps"].append(_restore(engine, self.ring, order[: self.restored]))
        finally:
            engine.close()
            shutil.rmtree(folder, ignore_errors=True)

    def report(self, name: str) -> Json:
        """Medians and spreads of one engine."""
        rates = self.rates[name]
        out: Json = {"size": self.size, "depth": self.depth, "engine": name}
        out |= {"chunks": self.chunks, "restore_chunks": self.restored}
        for key, values in rates.items():
            if key.endswith("_ms"):
                out[key] = {f"p{p}": round(quantile(values, p / 100), 3) for p in (50, 99)}
            else:
                out[key] = round(quantile(values, 0.5), 4)
                out[key + "_spread"] = summary(values, 4)
        return out


def run(context: Context, options: argparse.Namespace) -> Json:
    """All cases; the 1 MiB, depth 16 one is what ``systems`` quotes."""
    if options.quick:
        options.sizes_kib, options.total_mib, options.repeats = "1024", 16, 1
    engines, skipped = _engines()
    cases: list[Case] = []
    for size in (int(s) << 10 for s in options.sizes_kib.split(",")):
        for depth in map(int, options.depths.split(",")):
            case = Case(size, depth, options.total_mib * MIB, options.threads)
            for repeat in range(options.repeats):
                context.progress(f"{size >> 10} KiB, depth {depth}, repeat {repeat + 1}")
                case.limit(context.scratch)
                for name, make in engines.items():
                    case.engine(name, make, context.scratch)
            cases.append(case)
    reports = [case.report(name) for case in cases for name in ("limit", *engines)]
    quoted = {r["engine"]: r for r in reports if r["size"] == MIB and r["depth"] == 16}
    systems: Json = {name: {"skipped": why} for name, why in skipped.items()}
    systems |= {name: quoted[name] for name in engines if name in quoted}
    out: Json = {"systems": systems, "cases": reports}
    raw = [r for r in reports if r["engine"] == "limit" and r["size"] == MIB]
    if raw and quoted:
        # The best depth: plain threads at depth 16 can be slower than at depth 1 on few cores.
        out["limit"] = {
            "read_gbps": max(r["get_gbps"] for r in raw),
            "write_gbps": max(r["put_gbps"] for r in raw),
        }
        for name in engines:
            for op, base in (("put", "write"), ("get", "read"), ("restore", "read")):
                rate = systems[name][f"{op}_gbps"] / out["limit"][f"{base}_gbps"]
                systems[name][f"{op}_vs_limit"] = round(rate, 3)
            systems[name]["checksum_cpu_s_per_gb"] = (
                _checksum_cost() if name.startswith("kvoffload") else None
            )
    return out


def _checksum_cost() -> float:
    """CPU seconds per GB of the store's checksum alone, on cold-cache data."""
    from kvoffload import _core

    data = np.random.default_rng(0).integers(0, 256, 64 * MIB, dtype=np.uint8)
    if not hasattr(_core, "checksum"):
        raise Skip("no checksum in the native core")
    start = cpu_seconds()
    for at in range(0, data.size, MIB):
        _core.checksum(data[at : at + MIB], KvoffloadEngine.key(at))
    return round((cpu_seconds() - start) / (data.size / 1e9), 5)


def table(result: Json) -> tuple[list[str], list[list[str]]]:
    """Header and rows of the final table."""
    rows = []
    for r in result["cases"]:
        cells = [str(r["size"] >> 10), str(r["depth"]), r["engine"]]
        cells += [
            f"{r[k]:.2f}" if k in r else "-" for k in ("put_gbps", "get_gbps", "restore_gbps")
        ]
        for op in ("put", "get"):
            ms = r.get(f"{op}_ms")
            cells.append(f"{ms['p50']:.1f}/{ms['p99']:.1f}" if ms else "-")
            cpu = r.get(f"{op}_cpu_s_per_gb")
            cells.append("-" if cpu is None else f"{cpu:.3f}")
        rows.append(cells)
    head = ["KiB", "depth", "engine", "put GB/s", "get GB/s", "restore GB/s"]
    return [*head, "put ms", "put CPU s/GB", "get ms", "get CPU s/GB"], rows
