"""Trials of movers on scratch memory: are the bytes right, and how long does a copy take.

The bytes are verified at every start, so that a driver or compiler that has gone wrong since is
found; only the times are cached.
"""

from __future__ import annotations

import logging
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from kvoffload import _core
from kvoffload.copy.calibrate import BUDGET_S, Cell, Table, load_table, save_table
from kvoffload.copy.mover import LeafCheck, Mover
from kvoffload.copy.runs import Run
from kvoffload.types import LEAF_BYTES

logger = logging.getLogger("vllm.kvoffload")

U8 = npt.NDArray[np.uint8]
KIB, MIB = 1 << 10, 1 << 20


class Point(NamedTuple):
    """A shape that is timed."""

    fragment_bytes: int
    fragments: int


GRID: tuple[Point, ...] = (
    Point(4 * KIB, 16), Point(4 * KIB, 256), Point(4 * KIB, 2048),
    Point(32 * KIB, 8), Point(32 * KIB, 64), Point(32 * KIB, 512),
    Point(256 * KIB, 2), Point(256 * KIB, 16), Point(256 * KIB, 64),
    Point(2 * MIB, 1), Point(2 * MIB, 8),
)  # fmt: skip

REPEATS = 5
SCRATCH_BYTES = 34 * MIB
"""Of each side. A point's fragments lie at twice their size on the device, dense in the arena."""

_SEATS = 64 * KIB  # the end of the host side: leaf hashes and the count of bad leaves
_LINE = 64
_VERIFY_BYTES = 2 * MIB
_SHARD = 2 * LEAF_BYTES
_KEY = bytes(range(1, 17))
SEED = int.from_bytes(_KEY[:8], "little") ^ int.from_bytes(_KEY[8:], "little")
_CANARY = 0xE5


Movers = Mapping[bool, Sequence[Mover]]
"""Movers by direction: True is to the device."""


class Scratch(Protocol):
    """SCRATCH_BYTES of device memory, the same of pinned host memory, a stream and a clock."""

    device: int
    host: int
    host_bytes: U8
    """The host side; valid to look at when nothing is enqueued."""
    stream: Any

    def put(self, data: U8) -> None:
        """Write the first bytes of the device side; done on return."""

    def get(self, nbytes: int) -> U8:
        """The first bytes of the device side, after all that was enqueued."""

    def elapsed(self, enqueue: Callable[[], None]) -> float:
        """Seconds on the device from before to after what is enqueued; waits for its end.

        Raises RuntimeError where the device reports an error.
        """


# -- bytes ----------------------------------------------------------------------------------------


def _cases(scratch: Scratch) -> list[list[Run]]:
    """Fragments on the device, dense in a shard: aligned, ragged, and larger than a leaf."""
    ragged = [1, 3, 77, 1000, 4097, 16385, 70001, 16, 12, 8]
    out = []
    for sizes, gap, lead in (
        ([4096] * 24, 4096, 0),
        (ragged, 13, 5),
        ([4 * LEAF_BYTES, 48], 64, 0),
    ):
        address, offset, runs = scratch.device + gap, _SHARD + lead, []
        for size in sizes:
            runs.append(Run(address, offset, size))
            address, offset = address + size + gap, offset + size
        out.append(runs)
    return out


def faults(mover: Mover, scratch: Scratch, to_device: bool) -> str:
    """What is wrong with the bytes or checksums the mover makes; "" if nothing is.

    Raises RuntimeError, OSError or whatever the mover raises where the device refuses.
    """
    rng = np.random.default_rng(1)
    for runs in _cases(scratch):
        for checked in (False, True) if mover.checks else (False,):
            trial = _trial_load if to_device else _trial_store
            wrong = trial(mover, scratch, runs, rng, checked)
            if wrong:
                return f"{wrong} ({len(runs)} runs{', checked' if checked else ''})"
    return ""


def _check_of(scratch: Scratch, runs: Sequence[Run], shard: int = _SHARD) -> LeafCheck:
    count = -(-(runs[-1].offset + runs[-1].nbytes - shard) // LEAF_BYTES)
    seats = scratch.host + SCRATCH_BYTES - _SEATS
    return LeafCheck(SEED, shard, count * LEAF_BYTES, seats, seats + _SEATS - _LINE, 0, count)


def _seats(scratch: Scratch, check: LeafCheck) -> tuple[npt.NDArray[np.uint64], npt.NDArray[Any]]:
    tail = scratch.host_bytes[SCRATCH_BYTES - _SEATS :]
    return tail[: 8 * check.count].view(np.uint64), tail[-_LINE : 4 - _LINE].view(np.int32)


def _run(
    mover: Mover, scratch: Scratch, runs: Sequence[Run], up: bool, c: LeafCheck | None
) -> None:
    scratch.elapsed(lambda: mover.copy(runs, scratch.host, up, scratch.stream, c))


def _trial_store(
    mover: Mover, scratch: Scratch, runs: list[Run], rng: np.random.Generator, checked: bool
) -> str:
    data = rng.integers(0, 256, _VERIFY_BYTES, np.uint8)
    scratch.put(data)
    host = scratch.host_bytes
    host[:_VERIFY_BYTES] = _CANARY
    expected = host[:_VERIFY_BYTES].copy()
    check = _check_of(scratch, runs) if checked else None
    if check is not None:
        expected[_SHARD : _SHARD + check.shard_bytes] = 0
        leaves, bad = _seats(scratch, check)
        leaves[:], bad[0] = 0, 0
    for address, offset, nbytes in runs:
        at = address - scratch.device
        expected[offset : offset + nbytes] = data[at : at + nbytes]
    _run(mover, scratch, runs, False, check)
    if not np.array_equal(host[:_VERIFY_BYTES], expected):
        return "stored bytes differ"
    if check is not None:
        want = _core.leaf_checksums(expected[_SHARD : _SHARD + check.shard_bytes], _KEY)
        if not np.array_equal(leaves, want):
            return "leaf hashes differ"
    return ""


def _trial_load(
    mover: Mover, scratch: Scratch, runs: list[Run], rng: np.random.Generator, checked: bool
) -> str:
    host = scratch.host_bytes
    host[:_VERIFY_BYTES] = rng.integers(0, 256, _VERIFY_BYTES, np.uint8)
    expected = np.full(_VERIFY_BYTES, _CANARY, np.uint8)
    for address, offset, nbytes in runs:
        at = address - scratch.device
        expected[at : at + nbytes] = host[offset : offset + nbytes]
    check = _check_of(scratch, runs) if checked else None
    if check is not None:
        leaves, bad = _seats(scratch, check)
        shard = host[_SHARD : _SHARD + check.shard_bytes]
        leaves[:], bad[0] = _core.leaf_checksums(shard, _KEY), 0
    scratch.put(np.full(_VERIFY_BYTES, _CANARY, np.uint8))
    _run(mover, scratch, runs, True, check)
    if not np.array_equal(scratch.get(_VERIFY_BYTES), expected):
        return "loaded bytes differ"
    if check is None:
        return ""
    if bad[0]:
        return "right bytes are called corrupt"
    host[_SHARD + 3] ^= 1
    _run(mover, scratch, runs, True, check)
    return "" if bad[0] == 1 else f"a flipped bit is counted {bad[0]} times"


# -- time -----------------------------------------------------------------------------------------


def point_runs(scratch: Scratch, point: Point) -> list[Run]:
    """Fragments at twice their size on the device, dense in the arena from offset 0."""
    n = point.fragment_bytes
    return [Run(scratch.device + 2 * i * n, i * n, n) for i in range(point.fragments)]


def time_movers(
    movers: Movers,
    scratch: Scratch,
    *,
    grid: Sequence[Point] = GRID,
    budget_s: float = BUDGET_S,
    clock: Callable[[], float] = time.monotonic,
    stopped: Callable[[], bool] = lambda: False,
) -> Table:
    """Medians over up to REPEATS rounds of all movers at all points; stops when time is up.

    A mover that checks is timed with its checksums, else they would count as free. At each point
    the loads come first: the stores after them bring back the very bytes, so that the hashes the
    next load compares stay right.
    """
    end = clock() + budget_s
    largest = max(p.fragment_bytes * p.fragments for p in grid)
    data = scratch.host_bytes[:largest]
    data.view(np.uint64)[:] = np.arange(len(data) // 8, dtype=np.uint64) * np.uint64(0x9E3779B9)
    good = _core.leaf_checksums(data, _KEY)
    hashing = _hash_time(scratch, clock)
    samples: dict[tuple[int, bool, Point], list[float]] = {}
    todo = [(p, up, i) for p in grid for up in (True, False) for i in range(len(movers[up]))]
    for _ in range(REPEATS):
        for point, up, i in todo:
            if clock() >= end or stopped():
                break
            took = _time_one(movers[up][i], scratch, point, up, good)
            samples.setdefault((i, up, point), []).append(took)
    cells = [
        Cell(movers[up][i].name, up, *point, max(statistics.median(t), 1e-9), movers[up][i].checks)
        for (i, up, point), t in samples.items()
    ]
    return Table(tuple(cells), hashing)


def _time_one(
    mover: Mover, scratch: Scratch, point: Point, up: bool, good: npt.NDArray[np.uint64]
) -> float:
    runs = point_runs(scratch, point)
    check = None
    if mover.checks:
        check = _check_of(scratch, runs, 0)
        _seats(scratch, check)[0][:] = good[: check.count]
    return scratch.elapsed(lambda: mover.copy(runs, scratch.host, up, scratch.stream, check))


def _hash_time(scratch: Scratch, clock: Callable[[], float]) -> float:
    data = scratch.host_bytes[:_VERIFY_BYTES]
    took = []
    for _ in range(3):
        start = clock()
        _core.leaf_checksums(data, _KEY)
        took.append(clock() - start)
    return max(statistics.median(took), 1e-9) / _VERIFY_BYTES


# -- both -----------------------------------------------------------------------------------------


def calibrate(
    movers: Movers,
    scratch: Scratch,
    key: Mapping[str, Any],
    path: Path,
    *,
    stopped: Callable[[], bool] = lambda: False,
    grid: Sequence[Point] = GRID,
    budget_s: float = BUDGET_S,
    clock: Callable[[], float] = time.monotonic,
) -> tuple[dict[bool, list[Mover]], Table]:
    """The movers whose bytes are right, and their times: cached under ``key``, else measured.

    Movers that fail are left out, with an error line each. Figures of a calibration that was cut
    short, or that lost a mover, are used but not kept.
    """
    good: dict[bool, list[Mover]] = {True: [], False: []}
    for to_device in (True, False):
        for mover in movers[to_device]:
            if stopped():
                return {True: [], False: []}, Table()
            if _passes(mover, scratch, to_device):
                good[to_device].append(mover)
    cached = load_table(path, key)
    if cached is not None:
        return good, cached
    table = time_movers(good, scratch, grid=grid, budget_s=budget_s, clock=clock, stopped=stopped)
    asked = {up: [m.name for m in some] for up, some in movers.items()}
    if table.complete(asked, len(grid)):
        save_table(path, key, table)
    return good, table


def _passes(mover: Mover, scratch: Scratch, to_device: bool) -> bool:
    try:
        wrong = faults(mover, scratch, to_device)
    except Exception as exc:  # the device's answer decides, whatever its type
        wrong = f"{type(exc).__name__}: {exc}"
    if wrong:
        logger.error(
            "kvoffload: mover %r is not used for %s on this device: %s",
            mover.name, "loads" if to_device else "stores", wrong,
        )  # fmt: skip
    return not wrong
