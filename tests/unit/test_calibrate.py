"""Calibration: the table, its cache, and trials on a fake device that times as it is told."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch")
pytest.importorskip("kvoffload._core")

from kvoffload.copy import calibrate as module
from kvoffload.copy.calibrate import Cell, Table, cache_file, load_table, save_table
from kvoffload.copy.movers import PlainMover
from kvoffload.copy.trials import GRID, SCRATCH_BYTES, Point, calibrate, faults, point_runs
from kvoffload.types import LEAF_BYTES
from tests.support.cuda import FakeRuntime
from tests.support.cuda_movers import FakeKernels, FakeScratch, every_mover

KIB = 1 << 10
KEY = {"device": "fake", "driver": "1", "movers": [["plain"], ["plain"]]}
SMALL = (Point(4 * KIB, 16), Point(256 * KIB, 2))
NAMES = ("plain", "batch", "staged", "triton")


def cell(mover: str, fragment: int, count: int, ms: float, up: bool = True) -> Cell:
    return Cell(mover, up, fragment, count, ms / 1e3, mover in ("staged", "triton"))


TABLE = Table(
    (
        cell("plain", 4 * KIB, 1024, 5.0), cell("batch", 4 * KIB, 1024, 1.0),
        cell("triton", 4 * KIB, 1024, 0.5),
        cell("plain", 2048 * KIB, 1, 0.10), cell("batch", 2048 * KIB, 1, 0.099),
        cell("triton", 2048 * KIB, 1, 0.2),
        cell("plain", 4 * KIB, 1024, 1.0, False), cell("batch", 4 * KIB, 1024, 3.0, False),
    )
)  # fmt: skip


# -------------------------------------------------------------------- the table


@pytest.mark.parametrize(
    ("fragment", "count", "up", "movers", "want"),
    [
        (4 * KIB, 1024, True, NAMES, "triton"),
        (1, 8, True, NAMES, "triton"),  # nearest, however far
        (16 * KIB, 500, True, NAMES, "triton"),
        (4 * KIB, 1024, True, ("plain", "batch"), "batch"),  # kernels are missing or dropped
        (2048 * KIB, 1, True, NAMES, "plain"),  # 1 % is noise
        (1 << 40, 1, True, NAMES, "plain"),
        (4 * KIB, 1024, False, NAMES, "plain"),  # its own direction
        (4 * KIB, 1024, True, ("plain",), "plain"),
        (0, 0, True, NAMES, "plain"),
    ],
)
def test_pick(fragment: int, count: int, up: bool, movers: tuple[str, ...], want: str) -> None:
    assert TABLE.pick(fragment, count, up, movers) == want


def test_pick_without_figures_is_plain() -> None:
    assert Table().pick(4096, 10, True, NAMES) == "plain"
    assert TABLE.pick(4096, 10, True, ("staged",)) == "plain"
    only_loads = Table(tuple(c for c in TABLE.cells if c.to_device))
    assert only_loads.pick(4096, 10, False, NAMES) == "plain"


def test_host_hashing_counts_for_movers_without_checksums() -> None:
    cells = (cell("batch", 4 * KIB, 256, 0.1), cell("triton", 4 * KIB, 256, 0.2))
    free = Table(cells, 1e-12)
    assert free.pick(4 * KIB, 256, True, NAMES) == "batch"
    slow = Table(cells, 1e-9)  # 1 GB/s a thread: 0.5 ms of an item on two threads
    assert slow.pick(4 * KIB, 256, True, NAMES) == "triton"
    assert slow.pick(4 * KIB, 256, True, NAMES, checked=False) == "batch"


def test_a_shape_that_not_all_were_timed_at_does_not_decide() -> None:
    cells = (
        cell("plain", 4 * KIB, 16, 1.0), cell("batch", 4 * KIB, 16, 0.2),
        cell("plain", 256 * KIB, 16, 1.0),
    )  # fmt: skip
    assert Table(cells).pick(256 * KIB, 16, True, NAMES) == "batch"


# -------------------------------------------------------------------- cache


def test_cache_round_trip(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "c"))
    path = cache_file(KEY)
    assert path.parent == tmp_path / "c" / "kvoffload" and path != cache_file(KEY | {"driver": "2"})
    assert load_table(path, KEY) is None
    table = Table(TABLE.cells, 1e-10)
    save_table(path, KEY, table)
    assert load_table(path, KEY) == table
    assert path.stat().st_mode & 0o777 == 0o600
    assert [p.name for p in path.parent.iterdir()] == [path.name]  # nothing half-written stays
    assert load_table(path, KEY | {"driver": "2"}) is None  # a foreign file under our name


def broken(data: dict[str, Any]) -> list[Any]:
    row = data["cells"][0]
    return [
        b"", b"{", b"[]", b"\xff\xfe", json.dumps(data)[:-9].encode(),
        data | {"format": 2}, data | {"cells": []}, data | {"cells": 3},
        data | {"hash_s_per_byte": 0}, data | {"hash_s_per_byte": "x"},
        data | {"cells": [row[:-1]]}, data | {"cells": [["plain", True, 0, 1, 1.0, False]]},
        data | {"cells": [["plain", 1, 4, 1, 1.0, False]]},
        data | {"cells": [["plain", True, 4, 1, float("nan"), False]]},
        data | {"cells": [["plain", True, 4, 1, -1.0, False]]},
        {k: v for k, v in data.items() if k != "key"},
    ]  # fmt: skip


def test_a_broken_cache_is_no_cache(tmp_path: Path) -> None:
    path = tmp_path / "t.json"
    save_table(path, KEY, Table(TABLE.cells, 1e-10))
    good = json.loads(path.read_text())
    for bad in broken(good):
        path.write_bytes(bad if isinstance(bad, bytes) else json.dumps(bad).encode())
        assert load_table(path, KEY) is None, bad
    path.write_text(json.dumps(good))
    assert load_table(path, KEY) is not None
    path.chmod(0o622)
    assert load_table(path, KEY) is None  # others may write it


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root to own another user's file")
def test_a_cache_of_someone_else_is_no_cache(tmp_path: Path) -> None:
    path = tmp_path / "t.json"
    save_table(path, KEY, Table(TABLE.cells, 1e-10))
    os.chown(path, 12345, -1)
    assert load_table(path, KEY) is None


def test_a_cache_that_cannot_be_written_is_said(tmp_path: Path, caplog: Any) -> None:
    (tmp_path / "file").write_text("")
    save_table(tmp_path / "file" / "t.json", KEY, TABLE)
    assert "could not be kept" in caplog.text


# -------------------------------------------------------------------- trials


@pytest.fixture
def fake() -> Iterator[FakeRuntime]:
    runtime = FakeRuntime()
    yield runtime
    runtime.stop()
    assert runtime.violations == []


def test_every_mover_passes_its_trials(fake: FakeRuntime) -> None:
    scratch = FakeScratch(fake)
    for mover in every_mover(fake, 1 << 30):
        for to_device in (True, False):
            assert faults(mover, scratch, to_device) == "", mover.name


INTERPRETED = """
import ctypes, sys
import torch
from tests.support.cuda import FakeRuntime
from tests.support.cuda_movers import FakeScratch, HostBuffer
from tests.support.triton_cases import mover
from kvoffload.copy.movers import StagedMover
from kvoffload.copy.trials import faults

class AtOnce(FakeRuntime):
    def copy(self, runs, arena, to_device, stream):
        for run in runs:
            ends = (run.address, arena + run.offset)
            ctypes.memmove(*(ends if to_device else ends[::-1]), run.nbytes)

fake = AtOnce()
kernel = mover(programs=2)
assert kernel.name == "triton" and kernel.checks
for m in kernel, StagedMover(kernel, fake, HostBuffer, 1 << 30):
    for up in (True, False):
        assert faults(m, FakeScratch(fake), up) == "", (m.name, up)
fake.stop()
print("passed")
"""


def test_the_real_kernels_pass_the_trials_in_the_interpreter(repo_root: Path) -> None:
    """KernelMover as it is, direct and staged; the interpreter reads TRITON_INTERPRET at import."""
    pytest.importorskip("triton")
    pytest.importorskip("kvoffload.copy.kernels")
    env = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": str(repo_root)}
    run = subprocess.run(
        [sys.executable, "-c", INTERPRETED], cwd=repo_root, env=env, capture_output=True, text=True,
        timeout=240,
    )  # fmt: skip
    assert run.returncode == 0 and "passed" in run.stdout, run.stderr[-3000:]


@pytest.mark.parametrize(
    ("wrong", "up", "text"),
    [
        ("skips", True, "loaded bytes differ"),
        ("skips", False, "stored bytes differ"),
        ("spills", True, "loaded bytes differ"),  # a byte beyond a run
        ("spills", False, "stored bytes differ"),
        ("hash", False, "leaf hashes differ"),
        ("blind", True, "a flipped bit is counted 0 times"),
    ],
)
def test_faults_are_found(fake: FakeRuntime, wrong: str, up: bool, text: str) -> None:
    assert text in faults(FakeKernels(fake, wrong), FakeScratch(fake), up)


def test_a_mover_that_calls_right_bytes_corrupt(fake: FakeRuntime) -> None:
    class Alarmed(FakeKernels):
        def copy(self, runs: Any, arena: int, up: bool, stream: Any, check: Any = None) -> None:
            if check is not None:
                check = replace(check, seed=check.seed + 1)
            super().copy(runs, arena, up, stream, check)

    assert "called corrupt" in faults(Alarmed(fake), FakeScratch(fake), True)
    assert "leaf hashes differ" in faults(Alarmed(fake), FakeScratch(fake), False)


def run(
    fake: FakeRuntime, path: Path, movers: dict[bool, list[Any]], costs: dict[str, float], **kw: Any
) -> tuple[dict[bool, list[str]], Table, int]:
    """Names of good movers, the table, and how many timings were made."""

    class Clocked(FakeScratch):
        timed = 0

        def elapsed(self, enqueue: Any) -> float:
            super().elapsed(enqueue)
            self.timed += 1
            # The mover is a closure cell of the trial's lambda.
            held = [c.cell_contents for c in enqueue.__closure__]
            (mover,) = [m for m in held if hasattr(m, "checks")]
            return costs.get(mover.name, 1.0)

    scratch = Clocked(fake)
    kw = {"grid": SMALL, "budget_s": 60.0} | kw
    good, table = calibrate(movers, scratch, KEY, path, **kw)
    names = {up: [m.name for m in some] for up, some in good.items()}
    return names, table, scratch.timed


def both(fake: FakeRuntime) -> dict[bool, list[Any]]:
    return {True: every_mover(fake, 1 << 30), False: every_mover(fake, 1 << 30)}


def test_calibration_measures_once_and_keeps_it(fake: FakeRuntime, tmp_path: Path) -> None:
    path = tmp_path / "t.json"
    costs = {"plain": 4e-3, "batch": 1e-3, "staged": 2e-3, "triton": 3e-3}
    names, table, timed = run(fake, path, both(fake), costs)
    assert names == {True: list(NAMES), False: list(NAMES)}
    assert len(table.cells) == len(SMALL) * 2 * 4 and table.hash_s_per_byte > 0
    assert {c.seconds for c in table.cells if c.mover == "batch"} == {1e-3}
    assert replace(table, hash_s_per_byte=0.0).pick(4 * KIB, 16, True, NAMES) == "batch"
    _, again, fewer = run(fake, path, both(fake), {"plain": 1e-9})
    assert again == table  # cached: the bytes were tried again, the times were not
    assert fewer < timed


@pytest.mark.parametrize("wrong", ["skips", "hash", "raises"])
def test_wrong_movers_are_left_out_and_named(
    fake: FakeRuntime, tmp_path: Path, wrong: str, caplog: pytest.LogCaptureFixture
) -> None:
    movers = both(fake)
    movers[False] = [PlainMover(fake), FakeKernels(fake, wrong)]
    path = tmp_path / "t.json"
    names, table, _ = run(fake, path, movers, {"triton": 1e-9})
    assert names == {True: list(NAMES), False: ["plain"]}
    assert not [c for c in table.cells if c.mover == "triton" and not c.to_device]
    lines = [m for m in caplog.messages if "'triton' is not used for stores" in m]
    assert len(lines) == 1
    assert not path.exists()  # it may be well next time


def test_calibration_keeps_to_its_budget(fake: FakeRuntime, tmp_path: Path) -> None:
    now = iter(range(10_000))
    path = tmp_path / "t.json"
    _, table, _ = run(fake, path, both(fake), {}, budget_s=13.0, clock=lambda: float(next(now)))
    assert 0 < len(table.cells) < 16
    assert not path.exists()  # cut short: used, not kept


def test_calibration_stops_when_told(fake: FakeRuntime, tmp_path: Path) -> None:
    names, table, timed = run(fake, tmp_path / "t", both(fake), {}, stopped=lambda: True)
    assert (names, table, timed) == ({True: [], False: []}, Table(), 0)


def test_the_grid_fits_the_scratch_memory(fake: FakeRuntime) -> None:
    scratch = FakeScratch(fake)
    for point in GRID:
        runs = point_runs(scratch, point)
        assert runs[-1].address + runs[-1].nbytes <= scratch.device + SCRATCH_BYTES
        assert runs[-1].offset + runs[-1].nbytes <= SCRATCH_BYTES - 64 * KIB
        assert point.fragment_bytes * point.fragments % LEAF_BYTES == 0
        assert point.fragment_bytes * point.fragments // LEAF_BYTES * 8 < 64 * KIB - 64
    assert module.BUDGET_S < 2
