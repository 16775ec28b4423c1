"""``store``: the chunk store alone, beside the disk's limit, vLLM's fs tier and LMCache.

Three parts, all systems interleaved in each:

pairs   one put of many chunks, one request that restores as many, cold: the chunks of one prompt
        as they were put, and chunks from anywhere. Space is written once before: puts are those of
        a store that is full. Ratios are per round, with a bootstrap interval.
load    single puts while 16 gets are in flight: what a put waits for.
cases   one chunk per job at several sizes and depths.

``kvoffload`` works on arena slots (as the connector does) with the engine ``io_engine=auto`` picks,
``kvoffload_threads`` with pread/pwrite threads, ``kvoffload_buffers`` on plain buffers (what
``open_store`` does: hashing and a copy are in its puts). The limit is O_DIRECT through io_uring, a
native loop at the depth of the store's ring. All bytes read are checked, outside of the timing.
"""

from __future__ import annotations

import argparse
import random
import shutil
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from common import Json, Skip, bootstrap, cpu_seconds, drop_page_cache, quantile, summary
from context import Context, portable
from stores.drive import Driver, Sample
from stores.engines import Kvoffload, VllmFs, key_of
from stores.peer_lmcache import Lmcache
from stores.raw import Raw, build
from systems import LMCACHE_PYTHON

NAME = "store"
MIB = 1 << 20
RESTORE_CHUNKS = 256
LOAD_DEPTH = 16
MOST_CHUNKS = 1024  # of a case: more of the small ones say nothing new
PER_PUT = 16  # chunks of one put: what a step of prefill completes
OURS = ("kvoffload", "kvoffload_threads", "kvoffload_buffers")
PEERS = ("vllm_fs", "lmcache")
QUICK_SYSTEMS = ("native", "kvoffload")  # LMCache takes half a minute to start
LIMIT = "limit"


def add_options(parser: argparse.ArgumentParser) -> None:
    """Options of this routine."""
    parser.add_argument("--sizes-kib", default="64,1024,4096", help="chunk sizes of the cases")
    parser.add_argument("--depths", default="1,16")
    parser.add_argument("--total-mib", type=int, default=256, help="bytes per case, at most")
    parser.add_argument("--repeats", type=int, default=3, help="of each case")
    parser.add_argument("--pairs", type=int, default=21, help="rounds of puts and restores")
    parser.add_argument("--single-puts", type=int, default=400, help="beside a load, per system")


# -- systems ---------------------------------------------------------------------------------


class Systems:
    """What can run here; ``skipped`` says why the others cannot."""

    def __init__(self, scratch: Path, asked: list[str]) -> None:
        self.scratch = scratch
        wanted = {"native": "vllm_fs", "lmcache": "lmcache"}
        self.skipped = {b: f"{a} is not in --systems" for a, b in wanted.items() if a not in asked}
        self.backend: dict[str, str] = {}  # what a system turned out to run on
        self._lmcache: Lmcache | None = None
        try:
            self._raw = build(scratch)
        except Skip as error:
            self.skipped[LIMIT] = portable(str(error))

    def _make(self, name: str, where: Path, rows: int, size: int, held: int) -> Any:
        if name == LIMIT:
            return Raw(self._raw, where, rows, size, held)
        if name == "lmcache":
            return self._open_lmcache(where, rows, size, held)
        if name == "vllm_fs":
            try:
                fs = VllmFs(where, rows, size)
            except ImportError as error:
                raise Skip(f"vllm: {error}") from error
            return Driver(fs, fs.ring)
        kind = "threads" if name == "kvoffload_threads" else "auto"
        ours = Kvoffload(where, rows, size, held, kind, name != "kvoffload_buffers")
        self.backend[name] = ours.io_engine
        driver = Driver(ours, ours.ring)
        driver.age(ours.room + rows)  # from here on puts take recycled segments
        return driver

    def _open_lmcache(self, where: Path, rows: int, size: int, held: int) -> Lmcache:
        if not LMCACHE_PYTHON.exists():
            raise Skip("no .venv-lmcache: run scripts/setup_lmcache.sh")
        if self._lmcache is None:
            self._lmcache = Lmcache(LMCACHE_PYTHON, self.scratch / "lmcache.log")
        try:
            opened = self._lmcache.open(where, rows, size, held)
        except RuntimeError as error:
            raise Skip(str(error)) from error
        self.backend["lmcache"] = opened.backend
        return opened

    def close(self) -> None:
        """Ends what outlives one part."""
        if self._lmcache is not None:
            self._lmcache.stop()

    @contextmanager
    def open(self, names: list[str], rows: int, size: int, held: int) -> Iterator[dict[str, Any]]:
        """Systems by name, each in a fresh folder or file, ``held`` chunks of room at least."""
        made: dict[str, Any] = {}
        try:
            for name in names:
                if name in self.skipped:
                    continue
                try:
                    made[name] = self._make(name, self.scratch / name, rows, size, held)
                except Skip as error:
                    self.skipped[name] = portable(str(error))
            yield made
        finally:
            for name, system in made.items():
                system.close()
                shutil.rmtree(self.scratch / name, ignore_errors=True)


class Window:
    """Chunk numbers: the last ``held`` put ones can be asked for."""

    def __init__(self, systems: dict[str, Any], held: int) -> None:
        self.systems, self.held, self.next = systems, held, 0

    def take(self, count: int) -> list[int]:
        """The next numbers to put; the oldest ones are forgotten."""
        chunks = list(range(self.next, self.next + count))
        self.next += count
        old = range(max(0, chunks[0] - self.held), max(0, self.next - self.held))
        for system in self.systems.values():
            system.forget(list(old))
        return chunks

    def any(self, rng: random.Random, count: int) -> list[int]:
        """Some that are held, in no order."""
        return rng.sample(range(max(0, self.next - self.held), self.next), count)

    def fill(self, rows: int) -> None:
        """As many chunks as are held, untimed."""
        goal = self.next + self.held
        while self.next < goal:
            chunks = self.take(min(rows, goal - self.next))
            for system in self.systems.values():
                system.batch(chunks, True, PER_PUT)


# -- parts -----------------------------------------------------------------------------------

Samples = dict[str, dict[str, list[Sample]]]


def pairs(
    systems: dict[str, Any], window: Window, count: int, rounds: int, say: Callable[[str], None]
) -> Samples:
    """Per system: samples of ``put``, ``restore`` (as put) and ``scattered``, one per round."""
    out: Samples = {name: defaultdict(list) for name in systems}
    rng, names = random.Random(2), list(systems)
    for turn in range(rounds):
        say(f"round {turn + 1} of {rounds}")
        names.append(names.pop(0))  # nobody always goes first
        chunks, anywhere = window.take(count), window.any(rng, count - count // 8)
        for name in names:
            out[name]["put"].append(systems[name].batch(chunks, True, PER_PUT))
        drop_page_cache()
        for what, asked in (("restore", chunks), ("scattered", anywhere)):
            for name in names:
                sample = systems[name].batch(asked, False, len(asked))
                out[name][what].append(sample)
    return out


def beside_load(
    systems: dict[str, Any], window: Window, puts: int, say: Callable[[str], None]
) -> dict[str, list[float]]:
    """Per system: milliseconds of single puts while 16 gets are in flight, 100 in a row."""
    out: dict[str, list[float]] = {name: [] for name in systems}
    # What is read stays held until the last put: a system that is slow puts fewer than it could.
    newest = range(window.next - (window.held - puts), window.next)
    held = random.Random(3).sample(newest, min(len(newest), 64))
    for at in range(0, puts, 100):
        say(f"{puts - at} single puts beside a load to go")
        chunks = window.take(min(100, puts - at))
        for name, system in systems.items():
            out[name] += system.beside_load(chunks, held, LOAD_DEPTH).ms
    return out


def one_case(systems: dict[str, Any], depth: int, window: Window, count: int, n: int) -> Samples:
    """Per system: samples of ``put``, ``get`` (one chunk per job) and ``restore``."""
    out: Samples = {name: defaultdict(list) for name in systems}
    names = list(systems)
    for _ in range(n):
        names.append(names.pop(0))
        chunks = window.take(count)
        for name in names:
            out[name]["put"].append(systems[name].singles(chunks, True, depth))
        drop_page_cache()
        shuffled = random.Random(1).sample(chunks, count)
        together = chunks[: min(RESTORE_CHUNKS, count)]
        for name in names:
            out[name]["get"].append(systems[name].singles(shuffled, False, depth))
            out[name]["restore"].append(systems[name].batch(together, False, len(together)))
    return out


# -- figures ---------------------------------------------------------------------------------


def _ms(values: list[float]) -> Json:
    out: Json = {f"p{p}": round(quantile(values, p / 100), 3) for p in (50, 99)}
    for p in (50, 99):
        ends = bootstrap(values, lambda v, p=p: quantile(v, p / 100))
        out |= {f"p{p}_lo": round(ends[0], 3), f"p{p}_hi": round(ends[1], 3)}
    return out | {"n": len(values)}


def _rates(samples: dict[str, list[Sample]]) -> Json:
    """Medians and spreads of GB/s and CPU, and the times of single jobs."""
    out: Json = {}
    for what, found in samples.items():
        rates = [s.gbps for s in found]
        out[f"{what}_gbps"] = round(quantile(rates, 0.5), 4)
        out[f"{what}_gbps_spread"] = summary(rates, 4)
        cpu = [s.cpu_s_per_gb for s in found]
        out[f"{what}_cpu_s_per_gb"] = round(quantile(cpu, 0.5), 4)
        own = [s.own_cpu_s / (s.nbytes / 1e9) for s in found]
        if any(own):
            out[f"{what}_own_cpu_s_per_gb"] = round(quantile(own, 0.5), 4)
        if found[0].ms:
            out[f"{what}_ms"] = _ms([ms for s in found for ms in s.ms])
    return out


def _ratio(key: str, ours: list[Sample], theirs: list[Sample]) -> Json:
    """Median over the rounds of ours over theirs, with its bootstrap interval."""
    ratios = [a.gbps / b.gbps for a, b in zip(ours, theirs, strict=True)]
    low, high = bootstrap(ratios, lambda v: quantile(v, 0.5))
    found = {key: quantile(ratios, 0.5), f"{key}_lo": low, f"{key}_hi": high}
    return {k: round(v, 3) for k, v in found.items()} | {f"{key}_n": len(ratios)}


def _compared(samples: Samples) -> Json:
    """Per system its rates, and per round ours over the limit and over each peer."""
    out: Json = {name: _rates(found) for name, found in samples.items()}
    for name in samples:
        for other in (LIMIT, *PEERS):
            if name == other or other not in samples or (name in PEERS and other in PEERS):
                continue
            for what in ("put", "restore", "scattered"):
                key = f"{what}_vs_{other}"
                out[name] |= _ratio(key, samples[name][what], samples[other][what])
    return out


def checksum_cost(size: int, rounds: int) -> float:
    """CPU seconds per GB of the store's checksum alone, on memory like that it reads into."""
    from kvoffload import _core

    nbytes = 1024 * MIB  # more than any cache holds
    # An arena's pages are those of a memfd, which may be small where others are huge.
    arena = _core.Arena.create(nbytes, 1, 1)
    data = np.frombuffer(arena.view(0, nbytes), dtype=np.uint8)
    data.reshape(-1, 4096)[:, 0] = 1  # every page is there
    costs = []
    for _ in range(rounds):
        start = cpu_seconds()
        for at in range(0, data.size, size):
            _core.checksum(data[at : at + size], key_of(at))
        costs.append((cpu_seconds() - start) / (data.size / 1e9))
    return round(quantile(costs, 0.5), 5)


def _systems(compared: Json, cases: list[Json], waits: dict[str, list[float]], sums: float) -> Json:
    """What others quote: 1 MiB, steady state, depth 16."""
    out: Json = {}
    single = {c["engine"]: c for c in cases if c["size"] == MIB and c["depth"] == LOAD_DEPTH}
    for name, figures in compared.items():
        out[name] = dict(figures)
        out[name]["get_cpu_s_per_gb"] = figures["restore_cpu_s_per_gb"]
        for key in ("get_gbps", "get_ms", "put_ms"):
            if name in single:
                out[name][key] = single[name][key]
        if name in waits:
            out[name]["put_beside_load_ms"] = _ms(waits[name])
        if name in OURS:
            out[name]["checksum_cpu_s_per_gb"] = sums
            hashed = {"get": True, "put": name == "kvoffload_buffers"}
            for what, with_sum in hashed.items():
                cost = out[name][f"{what}_cpu_s_per_gb"] - (sums if with_sum else 0.0)
                out[name][f"{what}_cpu_s_per_gb_without_checksum"] = round(max(cost, 0.0), 4)
                phase = "restore" if what == "get" else what
                own = out[name].get(f"{phase}_own_cpu_s_per_gb", 0.0)
                cost = own - (sums if with_sum else 0.0)
                out[name][f"{what}_own_cpu_s_per_gb_without_checksum"] = round(max(cost, 0.0), 4)
    if LIMIT in out:
        raw = out[LIMIT]
        for name, figures in out.items():
            if name == LIMIT:
                continue
            if "get_gbps" in figures and "get_gbps" in raw:
                figures["get_vs_limit"] = round(figures["get_gbps"] / raw["get_gbps"], 3)
            if name in waits:
                ends = (figures["put_beside_load_ms"]["p99"], raw["put_beside_load_ms"]["p99"])
                figures["put_beside_load_p99_vs_limit"] = round(ends[0] / ends[1], 3)
    return out


# -- the routine -----------------------------------------------------------------------------


def _pairs_of(
    systems: Systems, size: int, count: int, rounds: int, puts: int, context: Context
) -> tuple[Samples, dict[str, list[float]]]:
    """The pairs of one size, and single puts beside a load where ``puts`` is not 0."""
    held = 3 * count
    rows = max(count, LOAD_DEPTH + 1)
    say = partial(_say, context, f"{size >> 10} KiB")
    say("making room")
    with systems.open([LIMIT, *OURS, *PEERS], rows, size, held) as opened:
        window = Window(opened, held)
        window.fill(count)
        found = pairs(opened, window, count, rounds, say)
        waits = beside_load(opened, window, puts, say) if puts else {}
    return found, waits


def _say(context: Context, head: str, line: str) -> None:
    context.progress(f"{head}: {line}")


def _cases(systems: Systems, options: argparse.Namespace, context: Context) -> list[Json]:
    names, out = [LIMIT, "kvoffload", "kvoffload_threads", *PEERS], []
    for size in (int(s) << 10 for s in options.sizes_kib.split(",")):
        for depth in map(int, options.depths.split(",")):
            count = max(min((options.total_mib << 20) // size, MOST_CHUNKS), depth)
            restored = min(RESTORE_CHUNKS, count)
            rows = max(depth, restored)
            context.progress(f"{size >> 10} KiB, depth {depth}")
            with systems.open(names, rows, size, count + rows) as opened:
                window = Window(opened, count + rows)
                window.fill(rows)
                found = one_case(opened, depth, window, count, options.repeats)
            for name, samples in found.items():
                head = {"size": size, "depth": depth, "engine": name, "chunks": count}
                out.append(head | {"restore_chunks": restored} | _rates(samples))
    return out


def run(context: Context, options: argparse.Namespace) -> Json:
    """All parts; ``systems`` quotes 1 MiB, ``small`` 64 KiB."""
    count, small = RESTORE_CHUNKS, 1024
    if options.quick:
        options.sizes_kib, options.total_mib, options.repeats = "1024", 16, 1
        options.pairs, options.single_puts, count, small = 3, 24, 16, 64
    context.page_cache = drop_page_cache(context.scratch)
    systems = Systems(context.scratch, context.systems)
    with closing(systems):
        large, waits = _pairs_of(systems, MIB, count, options.pairs, options.single_puts, context)
        tiny, _ = _pairs_of(systems, 64 << 10, small, options.pairs, 0, context)
        cases = _cases(systems, options, context)
    sums = checksum_cost(MIB, 3 if options.quick else 15)
    figures = _systems(_compared(large), cases, waits, sums)
    limit = figures.pop(LIMIT, None)
    if limit is None:
        limit = {"skipped": systems.skipped[LIMIT]}
    else:
        limit |= {"read_gbps": limit["restore_gbps"], "write_gbps": limit["put_gbps"]}
    out: Json = {"limit": limit}
    why = {name: {"skipped": text} for name, text in systems.skipped.items() if name != LIMIT}
    out |= {"systems": figures | why, "small": _compared(tiny), "cases": cases}
    config = {"restore_chunks": count, "small_chunks": small, "load_depth": LOAD_DEPTH}
    return out | {"config": config | {"chunks_per_put": PER_PUT, "backend": systems.backend}}


def _row(name: str, size: int, what: str, figures: Json) -> list[str]:
    def cell(key: str, digits: int = 2) -> str:
        return f"{figures[key]:.{digits}f}" if key in figures else "-"

    def ratio(key: str) -> str:
        if f"{key}_lo" not in figures:
            return cell(key)
        return f"{cell(key)} [{cell(key + '_lo')}, {cell(key + '_hi')}]"

    def ms(key: str) -> str:
        return f"{figures[key]['p50']:.1f}/{figures[key]['p99']:.1f}" if key in figures else "-"

    return [
        str(size >> 10),
        what,
        name,
        cell("put_gbps"),
        ratio("put_vs_limit"),
        cell("get_gbps"),
        cell("restore_gbps"),
        ratio("restore_vs_limit"),
        cell("scattered_gbps"),
        f"{cell('put_cpu_s_per_gb', 3)} {cell('restore_cpu_s_per_gb', 3)}",
        f"{ms('put_ms')} {ms('get_ms')}",
        ms("put_beside_load_ms"),
    ]


def table(result: Json) -> tuple[list[str], list[list[str]]]:
    """Header and rows of the final table."""
    limit = {} if "skipped" in result["limit"] else {LIMIT: result["limit"]}
    rows = []
    for name, figures in (limit | result["systems"]).items():
        if "skipped" in figures:
            rows.append(["-", "-", name, f"skipped: {figures['skipped']}"])
        else:
            rows.append(_row(name, MIB, "batch", figures))
    rows += [_row(name, 64 << 10, "batch", found) for name, found in result["small"].items()]
    for found in result["cases"]:
        rows.append(_row(found["engine"], found["size"], f"depth {found['depth']}", found))
    head = ["KiB", "jobs", "system", "put GB/s", "of limit", "get GB/s", "restore GB/s"]
    head += ["of limit", "scattered", "CPU s/GB put, get", "ms p50/p99 put, get", "put at load ms"]
    return head, rows
