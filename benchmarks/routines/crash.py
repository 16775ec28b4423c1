"""``crash``: kill -9 loops and replayed power cuts of the chunk store: right bytes or a miss.

One point of a hundred is a real kill: a child under a mixed load is killed, then the store is
opened. For the others a child's writes and flushes are recorded, cut off at a random place, random
512-byte sectors written since the last flush of their file go missing, and the store is opened on
what is left. Then every key ever put is asked for. All of it once per I/O engine.
"""

from __future__ import annotations

import argparse
import os
import random
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from common import BENCH, ROOT, Json, Skip, percentiles
from context import Context
from powercut.audit import Tally, audit, discard
from powercut.disk import Disk, Entry, Image, Loss, read_image, read_trace, write_image
from powercut.load import MAX_BYTES, SEGMENT_BYTES, Truth

from kvoffload._core import io_uring_problem

NAME = "crash"
OPS = 260  # per recording
CUTS = 400  # per recording
ENGINES = ("threads", "uring")
GO_ON = 20  # every n-th point the store is also used after it was reopened
Bug = Callable[[Image], Image]


def add_options(parser: argparse.ArgumentParser) -> None:
    """Options of this routine."""
    parser.add_argument("--points", type=int, default=10000, help="crash points per I/O engine")


def _child(
    mode: str, path: Path, seed: int, ops: int, engine: str, extra: dict[str, str]
) -> list[str]:
    extra["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(BENCH), *filter(None, sys.path)])
    script = BENCH / "powercut" / "load.py"
    return [sys.executable, str(script), mode, str(path), str(seed), str(ops), engine]


# -- kill -9 ---------------------------------------------------------------------------------


def kill_once(path: Path, seed: int, after_s: float, truth: Truth, engine: str) -> None:
    """Runs the load of ``seed`` on ``path`` and kills it ``after_s`` after the store is open."""
    env: dict[str, str] = {}
    command = _child("kill", path, seed, 0, engine, env)
    child = subprocess.Popen(command, stdout=subprocess.PIPE, env=os.environ | env)
    assert child.stdout is not None
    with child.stdout:
        if len(child.stdout.read(4)) != 4:
            raise RuntimeError(f"the load did not start: {child.wait()}")
        time.sleep(after_s)
        child.send_signal(signal.SIGKILL)
        said = child.stdout.read()
    if child.wait() != -signal.SIGKILL:
        raise RuntimeError(f"the load ended by itself: {child.returncode}")
    words = len(said) // 4
    truth.add(seed, struct.unpack(f"<{words}I", said[: words * 4])[-1] if words else 0)


def kill_loop(base: Path, points: int, seed: int, tally: Tally) -> None:
    """``points`` kills of successive lives of one store. Nothing is lost: none may be damaged."""
    rng, truth, path = random.Random(seed), Truth(), base / "killed"
    path.mkdir(mode=0o700)
    for number in range(points):
        kill_once(path, seed + number, rng.uniform(0.0, 0.15), truth, tally.engine)
        audit(path, truth, tally, lossless=True)


# -- power cuts ------------------------------------------------------------------------------


def build_recorder(base: Path) -> Path:
    """Compiles the shim. Raises Skip where there is no C compiler."""
    compiler = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if compiler is None:
        raise Skip("no C compiler to build the recorder with")
    out = base / "record.so"
    source = BENCH / "powercut" / "record.c"
    command = [compiler, "-shared", "-fPIC", "-O2", "-o", str(out), str(source), "-ldl"]
    subprocess.run(command, check=True, timeout=120)
    return out


def record(
    shim: Path, base: Path, seed: int, image: Image, engine: str, ops: int = OPS
) -> list[Entry]:
    """The log of the first ``ops`` operations of ``seed`` on a store that starts as ``image``.

    Raises RuntimeError where the log does not explain what is on the disk afterwards, or shows
    another engine than ``engine``.
    """
    path, log = base / "recorded", base / "trace"
    write_image(image, path)
    extra = {"LD_PRELOAD": str(shim), "KVO_TRACE": str(log), "KVO_TRACE_ROOT": str(path)}
    if engine == "uring":
        extra["KVO_TRACE_RINGS"] = "1"
    command = _child("record", path, seed, ops, engine, extra)
    subprocess.run(command, check=True, env=os.environ | extra, timeout=120)
    entries = read_trace(log)
    disk = Disk(image)
    for entry in entries:
        disk.apply(entry)
    if disk.cut(random.Random(0), Loss.NONE).image != read_image(path):
        raise RuntimeError("the recording is not complete: its replay differs from the directory")
    if bool(disk.ring_writes) != (engine == "uring"):
        raise RuntimeError(f"{disk.ring_writes} writes through io_uring with engine {engine}")
    discard(path)
    log.unlink()
    return entries


@dataclass
class Campaign:
    """Recordings and their cuts. ``bug`` spoils what a cut left: a campaign that must not pass."""

    shim: Path
    base: Path
    seed: int
    tally: Tally
    bug: Bug | None = None
    recordings: int = 0
    writes: int = 0
    ring_writes: int = 0
    flushes: int = 0
    under_way: int = 0  # cuts while a write through io_uring was submitted and not done
    lost_sectors: int = 0
    losses: Counter[str] = field(default_factory=Counter)

    def run(self, points: int, progress: Callable[[str], None]) -> None:
        """``points`` cuts. Every second recording goes on from what a cut of the last one left."""
        rng = random.Random(self.seed)
        truth, image = Truth(), Image()
        while points > 0:
            if self.recordings % 2 == 0:
                truth, image = Truth(), Image()
            cuts = min(points, CUTS)
            image = self._one(rng, truth, image, cuts)
            points -= cuts
            progress(f"{self.tally.points} points, {self.tally.wrong} wrong")

    def _one(self, rng: random.Random, truth: Truth, base: Image, cuts: int) -> Image:
        seed = self.seed * 1000 + self.recordings
        entries = record(self.shim, self.base, seed, base, self.tally.engine)
        truth.add(seed, OPS)
        disk, at, kept = Disk(base), 0, base
        places = sorted(rng.randrange(1, len(entries) + 1) for _ in range(cuts))
        for number, place in enumerate(places):
            while at < place:
                disk.apply(entries[at])
                at += 1
            kept = self._cut(rng, disk, truth, whole=not base, go_on=number % GO_ON == 0)
        self.recordings += 1
        self.writes += disk.writes
        self.ring_writes += disk.ring_writes
        self.flushes += disk.flushes
        return kept

    def _cut(
        self, rng: random.Random, disk: Disk, truth: Truth, *, whole: bool, go_on: bool
    ) -> Image:
        cut = disk.cut(rng)
        self.under_way += disk.flying > 0
        self.losses[cut.loss.value] += 1
        self.lost_sectors += cut.lost
        path = self.base / "cut"
        write_image(self.bug(cut.image) if self.bug else cut.image, path)
        lossless = whole and cut.loss is Loss.NONE
        audit(path, truth, self.tally, lossless, rng.randrange(1 << 30) if go_on else None)
        discard(path)
        return cut.image


def one_engine(context: Context, engine: str, points: int, seed: int) -> tuple[Json, Tally]:
    """The campaign on one I/O engine: kills on the disk of ``--dir``, replays in memory if any.

    Raises Skip where this machine does not have the engine.
    """
    problem = io_uring_problem() if engine == "uring" else None
    if problem is not None:
        raise Skip(problem)
    kills = max(3, points // 100)
    tally = Tally(engine)
    context.progress(f"{engine}: {kills} kills")
    (folder := context.scratch / engine).mkdir(mode=0o700)
    kill_loop(folder, kills, 900_000 + seed * 1000, tally)
    with tempfile.TemporaryDirectory(prefix="kvbench-", dir=_replay_folder(context)) as memory:
        campaign = Campaign(Path(), Path(memory), seed + 1, tally)
        skipped: Json = {}
        try:
            campaign.shim = build_recorder(Path(memory))
        except Skip as error:  # the kills still count
            skipped = {"power_cuts": {"skipped": str(error)}}
        else:
            campaign.run(points - kills, lambda line: context.progress(f"{engine}: {line}"))
    return skipped | _figures(tally) | {
        "kills": kills,
        "recordings": campaign.recordings,
        "recorded_writes": campaign.writes,
        "recorded_io_uring_writes": campaign.ring_writes,
        "cuts_amid_an_io_uring_write": campaign.under_way,
        "recorded_flushes": campaign.flushes,
        "lost_sectors": campaign.lost_sectors,
        "cuts": dict(sorted(campaign.losses.items())),
    }, tally


def _replay_folder(context: Context) -> Path:
    """Where crash points are laid out: they are small and many."""
    memory = Path("/dev/shm")
    return memory if os.access(memory, os.W_OK) else context.scratch


def _figures(*tallies: Tally) -> Json:
    """The sums of ``tallies``."""
    return {
        "crash_points": sum(t.points for t in tallies),
        "chunks_checked": sum(t.checked for t in tallies),
        "wrong_bytes": sum(t.wrong for t in tallies),
        "phantoms": sum(t.phantoms for t in tallies),
        "failed_reopens": sum(t.refused for t in tallies),
        "damaged_without_loss": sum(t.stale for t in tallies),
        "misses": sum(t.misses for t in tallies),
        "corrupt_found": sum(t.corrupt for t in tallies),
        "reopen_ms": percentiles([ms for t in tallies for ms in t.reopen_ms], (50, 99)),
    }


def run(context: Context, options: argparse.Namespace) -> Json:
    """The campaign on each I/O engine, and the sums."""
    if options.quick:
        options.points = min(options.points, 200)
    engines: Json = {}
    tallies: list[Tally] = []
    for engine in ENGINES:
        try:
            engines[engine], tally = one_engine(context, engine, options.points, options.seed)
        except Skip as error:
            engines[engine] = {"skipped": str(error)}
        else:
            tallies.append(tally)
    return _figures(*tallies) | {
        "engines": engines,
        "config": {
            "max_bytes": MAX_BYTES,
            "segment_bytes": SEGMENT_BYTES,
            "replayed_in": "scratch" if _replay_folder(context) == context.scratch else "memory",
        },
    }


def table(result: Json) -> tuple[list[str], list[list[str]]]:
    """Header and rows of the final table."""
    keys = ["crash_points", "chunks_checked", "wrong_bytes", "phantoms", "failed_reopens"]
    keys += ["damaged_without_loss", "lost_sectors", "corrupt_found"]
    rows = []
    for engine, found in result["engines"].items():
        if "skipped" in found:
            rows.append([engine, f"skipped: {found['skipped']}"])
            continue
        ms = found["reopen_ms"]
        row = [engine, *(str(found[key]) for key in keys)]
        rows.append([*row, f"{ms['p50']}/{ms.get('p99', '-')}"])
    return ["engine", *keys, "reopen ms p50/p99"], rows
