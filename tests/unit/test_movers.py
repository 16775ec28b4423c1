"""The movers below the CUDA engine, over a fake device and a libcuda of real C function pointers.

What they do with a real driver is shown by tests/gpu only.
"""

from __future__ import annotations

import ctypes
import logging
import shutil
import subprocess
import threading
import time
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("torch")
pytest.importorskip("kvoffload._core")

from kvoffload import _core
from kvoffload.copy import cuda_driver
from kvoffload.copy.calibrate import Cell, Table
from kvoffload.copy.cuda_driver import MemcpyAttributes, MemLocation, find_batch_copy
from kvoffload.copy.leaf_seats import SeatPools
from kvoffload.copy.mover import LeafCheck
from kvoffload.copy.mover_set import MoverSet, Prepared
from kvoffload.copy.movers import BatchMover, PlainMover, StagedMover
from kvoffload.copy.runs import Run
from tests.support.cuda import LEAF, FakeRuntime, FakeStream
from tests.support.cuda_movers import FakeDriver, FakeKernels, HostBuffer, mover_set

STORE, LOAD = FakeStream("store"), FakeStream("load")
HEADERS = [Path("/usr/local/cuda/include"), Path("/usr/include")]


@pytest.fixture
def fake() -> Iterator[FakeRuntime]:
    runtime = FakeRuntime()
    yield runtime
    runtime.stop()
    assert runtime.violations == []


class Sides:
    """Device and arena bytes, and a random set of runs between them."""

    def __init__(self, seed: int, count: int, gap: int = 7) -> None:
        rng = np.random.default_rng(seed)
        sizes = rng.integers(1, 40_000, count).tolist()
        self.device = rng.integers(0, 256, sum(sizes) + gap * (count + 1), np.uint8)
        self.arena = rng.integers(0, 256, sum(sizes) + 3 * LEAF, np.uint8)
        self.before = self.device.copy(), self.arena.copy()
        self.base = self.arena.ctypes.data
        self.runs, at, offset = [], gap, LEAF + 5
        for i, n in enumerate(sizes):
            self.runs.append(Run(self.device.ctypes.data + at, offset, n))
            at, offset = at + n + gap, offset + n + (0 if i % 3 else 11)

    def assert_moved(self, to_device: bool) -> None:
        device, arena = (side.copy() for side in self.before)
        for address, offset, n in self.runs:
            at = address - self.device.ctypes.data
            if to_device:
                device[at : at + n] = arena[offset : offset + n]
            else:
                arena[offset : offset + n] = device[at : at + n]
        assert np.array_equal(self.device, device) and np.array_equal(self.arena, arena)


def batch_mover(fake: FakeRuntime, **driver: Any) -> tuple[BatchMover, FakeDriver]:
    fakes = FakeDriver(fake, **driver)
    call = find_batch_copy(fakes.lib)
    assert call is not None
    return BatchMover(call), fakes


# -------------------------------------------------------------------- the driver's structs


def test_struct_layouts() -> None:
    assert ctypes.sizeof(MemLocation) == 8 and ctypes.sizeof(MemcpyAttributes) == 24
    offsets = [getattr(MemcpyAttributes, f).offset for f, _ in MemcpyAttributes._fields_]
    assert offsets == [0, 4, 12, 20]
    assert ctypes.sizeof(ctypes.c_size_t) == 8


@pytest.mark.skipif(
    not any((h / "cuda.h").exists() for h in HEADERS) or shutil.which("cc") is None,
    reason="no CUDA headers or no C compiler",
)
def test_struct_layouts_and_values_are_those_of_cuda_h(tmp_path: Path) -> None:
    """The compiler compares what ctypes says with NVIDIA's header, the signatures included."""
    offsets = "".join(
        f"_Static_assert(offsetof(CUmemcpyAttributes, {name}) == "
        f'{getattr(MemcpyAttributes, name).offset}, "{name}");\n'
        for name, _ in MemcpyAttributes._fields_
    )
    (tmp_path / "layout.c").write_text(
        f"""
#include <stddef.h>
#include <cuda.h>
#include <cudaTypedefs.h>
_Static_assert(sizeof(CUmemcpyAttributes) == {ctypes.sizeof(MemcpyAttributes)}, "size");
_Static_assert(sizeof(CUmemLocation) == {ctypes.sizeof(MemLocation)}, "location");
_Static_assert(offsetof(CUmemLocation, id) == {MemLocation.id.offset}, "id");
_Static_assert(sizeof(CUdeviceptr) == 8 && sizeof(size_t) == 8, "pointers");
_Static_assert(CU_MEMCPY_SRC_ACCESS_ORDER_STREAM == {cuda_driver._SRC_ORDER_STREAM}, "order");
_Static_assert(CU_GET_PROC_ADDRESS_SUCCESS == 0 && CUDA_SUCCESS == 0, "success");
{offsets}
#if CUDA_VERSION >= 13000
int old_call(PFN_cuMemcpyBatchAsync_v12080 f) {{ return f(0, 0, 0, 0, 0, 0, 0, (size_t *)0, 0); }}
int new_call(PFN_cuMemcpyBatchAsync_v13000 f) {{ return f(0, 0, 0, 0, 0, 0, 0, (CUstream)0); }}
#endif
"""
    )
    include = next(h for h in HEADERS if (h / "cuda.h").exists())
    run = subprocess.run(
        ["cc", "-fsyntax-only", "-I", str(include), "layout.c"],
        cwd=tmp_path, capture_output=True, text=True,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr


# -------------------------------------------------------------------- batch


@pytest.mark.parametrize("versions", [(12080, 13000), (12080,), (13000,)])
@pytest.mark.parametrize("to_device", [False, True])
def test_batch_moves_the_bytes_with_either_abi(
    fake: FakeRuntime, versions: tuple[int, ...], to_device: bool
) -> None:
    mover, driver = batch_mover(fake, versions=versions)
    sides = Sides(1, 40)
    stream = LOAD if to_device else STORE
    mover.copy(sides.runs, sides.base, to_device, stream)
    fake.drain(stream)
    sides.assert_moved(to_device)
    assert driver.calls == [40]
    assert mover._batch.fail_index == (12080 in versions)


def test_batches_are_cut(fake: FakeRuntime, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda_driver, "MAX_BATCH", 16)
    mover, driver = batch_mover(fake)
    sides = Sides(2, 40)
    mover.copy(sides.runs, sides.base, False, STORE)
    fake.drain(STORE)
    sides.assert_moved(False)
    assert driver.calls == [16, 16, 8]
    mover.copy([], sides.base, False, STORE)
    assert len(driver.calls) == 3  # the driver takes no empty batch


@pytest.mark.parametrize(("version", "text"), [(12080, "at copy 19: "), (13000, "Async: ")])
def test_a_refused_batch_names_the_error_and_the_copy(
    fake: FakeRuntime, version: int, text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cuda_driver, "MAX_BATCH", 16)
    mover, _ = batch_mover(fake, versions=(version,), fail_call=1)
    sides = Sides(3, 40)
    with pytest.raises(RuntimeError, match=text + r"CUDA_ERROR_INVALID_VALUE \(1\)"):
        mover.copy(sides.runs, sides.base, False, STORE)
    fake.drain(STORE)  # the first batch is out: its memory must outlive it


@pytest.mark.parametrize("handle", [0, 1])
def test_the_legacy_stream_is_refused_before_the_driver_is_asked(
    fake: FakeRuntime, handle: int
) -> None:
    mover, driver = batch_mover(fake)
    with pytest.raises(ValueError, match="legacy"):
        mover.copy(Sides(1, 2).runs, 0, False, SimpleNamespace(cuda_stream=handle))
    assert driver.calls == []


@pytest.mark.parametrize("how", ["no symbol", "old driver", "no lookup", "no library"])
def test_an_old_driver_has_no_batch_mover(
    fake: FakeRuntime, how: str, caplog: pytest.LogCaptureFixture, monkeypatch: Any
) -> None:
    caplog.set_level(logging.DEBUG, "vllm.kvoffload")
    lib: Any = FakeDriver(fake, versions=()).lib
    if how == "no lookup":  # CUDA 11
        del lib.cuGetProcAddress_v2
    elif how == "old driver":  # refuses versions it does not know, finds nothing
        lib = FakeDriver(fake, versions=(99,)).lib
    elif how == "no library":
        monkeypatch.setattr(cuda_driver.ctypes, "CDLL", no_library)
        lib = None
    assert find_batch_copy(lib) is None
    assert len([r for r in caplog.records if r.levelno == logging.DEBUG]) == 1
    assert not [r for r in caplog.records if r.levelno > logging.DEBUG]


def no_library(name: str) -> Any:
    raise OSError(f"{name}: cannot open shared object file")


def test_movers_without_checksums_take_no_check(fake: FakeRuntime) -> None:
    check = LeafCheck(0, 0, LEAF, 1, 1, 0, 1)
    for mover in (PlainMover(fake), batch_mover(fake)[0]):
        with pytest.raises(ValueError, match="LeafCheck"):
            mover.copy([Run(4096, 0, 1)], 4096, False, STORE, check)


# -------------------------------------------------------------------- staged


def staged(fake: FakeRuntime, piece_bytes: int = 1 << 30, ring: int = 2) -> StagedMover:
    fake.piece_bytes = piece_bytes
    return StagedMover(FakeKernels(fake), fake, HostBuffer, piece_bytes, ring)


@settings(max_examples=40, deadline=None)
@given(
    st.integers(0, 1 << 20), st.integers(1, 30), st.booleans(), st.sampled_from([1 << 30, 3 * LEAF])
)
def test_staged_moves_the_bytes(seed: int, count: int, to_device: bool, piece: int) -> None:
    fake = FakeRuntime()
    mover, sides = staged(fake, piece), Sides(seed, count)
    stream = LOAD if to_device else STORE
    mover.copy(sides.runs, sides.base, to_device, stream)
    fake.drain(stream)
    sides.assert_moved(to_device)
    mover.check()
    mover.close()
    fake.stop()
    assert fake.violations == []  # no DMA straddles a piece


def test_staged_uses_one_dma_for_what_is_dense_in_the_arena(fake: FakeRuntime) -> None:
    device = np.zeros(64 * 8192, np.uint8)
    arena = np.zeros(64 * 4096 + LEAF, np.uint8)
    runs = [Run(device.ctypes.data + i * 8192, i * 4096, 4096) for i in range(64)]
    mover = staged(fake)
    mover.copy(runs, arena.ctypes.data, False, STORE)
    fake.drain(STORE)
    mover.close()  # its buffer, plain memory here, must outlive the copies
    assert [(run.offset, run.nbytes) for _, run in fake.runs] == [(0, 64 * 4096)]


@pytest.mark.parametrize("first", [0, 1])
def test_staged_checks_in_the_buffer(fake: FakeRuntime, first: int) -> None:
    """Store: padding and hashes as if stored directly. Load: whole leaves are read."""
    rng = np.random.default_rng(4)
    device = rng.integers(0, 256, 3 * LEAF, np.uint8)
    arena = np.full(8 * LEAF, 0xEE, np.uint8)
    seats = np.zeros(9, np.uint64)
    check = LeafCheck(77, 2 * LEAF, 4 * LEAF, seats.ctypes.data, seats[8:].ctypes.data, 0, 4)
    mover = staged(fake, 3 * LEAF)
    n = 2 * LEAF + 100
    mover.copy([Run(device.ctypes.data, 2 * LEAF, n)], arena.ctypes.data, False, STORE, check)
    fake.drain(STORE)
    shard = arena[2 * LEAF : 6 * LEAF]
    assert np.array_equal(shard[:n], device[:n]) and not shard[n:].any()
    assert set(arena[6 * LEAF :].tolist()) == {0xEE}
    want = _core.leaf_checksums(shard, (77).to_bytes(16, "little"))
    assert np.array_equal(seats[:4], want) and not seats[4:].any()
    part = LeafCheck(77, 2 * LEAF, 4 * LEAF, check.leaves, check.bad, first, 1)
    target = np.zeros(LEAF, np.uint8)
    arena[2 * LEAF + 5] ^= 1  # in leaf 0
    run = Run(target.ctypes.data, (2 + first) * LEAF, LEAF)
    mover.copy([run], arena.ctypes.data, True, LOAD, part)
    fake.drain(LOAD)
    assert int(seats[8]) == (1 if first == 0 else 0)


def test_a_staging_buffer_is_used_again_after_the_event_of_its_last_use(fake: FakeRuntime) -> None:
    mover, sides = staged(fake, ring=1), Sides(1, 3)
    fake.pause("store")
    for _ in range(2):
        mover.copy(sides.runs, sides.base, False, STORE)
    with fake._cv:
        kinds = [op.kind for op in fake._streams["store"]]
        events = [op.event for op in fake._streams["store"] if op.event is not None]
    first = kinds.index("event")
    assert kinds[first + 1] == "wait" and events[0] is events[1]
    fake.resume("store")
    fake.drain(STORE)


def test_a_buffer_that_must_grow_is_let_go_after_its_last_use(fake: FakeRuntime) -> None:
    mover, made = staged(fake, ring=1), []
    allocate = mover._allocate

    def noted(nbytes: int, stream: Any) -> Any:
        made.append((nbytes, fake.queued("store")))
        return allocate(nbytes, stream)

    mover._allocate = noted
    small, large = Sides(1, 1), Sides(2, 60)
    fake.pause("store")
    mover.copy(small.runs, small.base, False, STORE)
    other = threading.Thread(target=mover.copy, args=(large.runs, large.base, False, STORE))
    other.start()
    time.sleep(0.05)
    assert len(made) == 1 and other.is_alive()  # waits for the first use
    fake.resume("store")
    other.join(5)
    fake.drain(STORE)
    large.assert_moved(False)
    assert len(made) == 2 and made[1][0] > made[0][0] and made[1][1] == 0


def test_a_staging_failure_leaves_the_buffer_guarded(fake: FakeRuntime) -> None:
    mover, sides = staged(fake, ring=1), Sides(1, 3)
    kernels: Any = mover._kernel
    fake.pause("load")
    kernels.wrong = "raises"
    with pytest.raises(RuntimeError, match="planted"):
        mover.copy(sides.runs, sides.base, True, LOAD)  # its DMA is out
    assert mover._ring[0].event is not None
    fake.fail_record = fake._records
    with pytest.raises(RuntimeError, match="cudaEventRecord"):
        mover.copy(sides.runs, sides.base, True, LOAD)
    assert (mover._ring[0].event, mover._ring[0].stream) == (None, LOAD)
    kernels.wrong, done = "", threading.Event()
    again = threading.Thread(
        target=lambda: (mover.copy(sides.runs, sides.base, True, LOAD), done.set())
    )
    again.start()
    assert not done.wait(0.05)  # no event: all of the stream is waited for
    fake.resume("load")
    assert done.wait(5)
    again.join()
    fake.drain(LOAD)
    sides.assert_moved(True)


# -------------------------------------------------------------------- which mover


def cells(**seconds: float) -> tuple[Cell, ...]:
    return tuple(
        Cell(name, up, 4096, 64, s, name == "triton") for name, s in seconds.items()
        for up in (False, True)
    )  # fmt: skip


def test_pick_follows_the_table(fake: FakeRuntime) -> None:
    runs = [Run(4096 * i, 4096 * i, 4096) for i in range(1, 65)]
    movers = mover_set(fake)
    pick = movers.pick
    assert pick(runs, True, True, True).name == "plain"  # nothing was measured
    movers._table = Table(cells(plain=9e-3, batch=1e-3, triton=5e-3), 0.0)
    assert pick(runs, True, True, True).name == "batch"
    assert pick(runs, True, False, True).name == "plain"
    assert pick([], True, True, True).name == "plain"
    movers._table = Table(cells(plain=9e-3, batch=1e-3, triton=5e-3), 1e-6)  # slow host hashing
    assert pick(runs, True, True, True).name == "triton"
    assert pick(runs, True, True, False).name == "plain"  # hashed by the host whoever copies
    movers.check()


def test_only_and_names(fake: FakeRuntime) -> None:
    runs = [Run(4096, 4096, 4096)]
    assert mover_set(fake, "staged").pick(runs, True, True, True).name == "staged"
    assert mover_set(fake, "absent").pick(runs, True, True, True).name == "plain"
    assert mover_set(fake).names(True) == ["plain", "batch", "staged", "triton"]
    one = MoverSet(PlainMover(fake), Prepared(load=[FakeKernels(fake)]), only="triton")
    assert one.pick(runs, False, True, True).name == "plain"  # for loads only
    assert one.names(False) == ["plain"]


def test_a_mover_is_called_by_one_thread_at_a_time(fake: FakeRuntime) -> None:
    class Slow(FakeKernels):
        def copy(self, *args: Any) -> None:
            assert self._busy.acquire(blocking=False), "two threads"
            time.sleep(0.01)
            self._busy.release()

    movers = MoverSet(PlainMover(fake), Prepared(load=[Slow(fake)]), only="triton")
    mover = movers.pick([Run(1, 1, 1)], True, True, True)
    failed: list[BaseException] = []

    def go() -> None:
        try:
            movers.copy(mover, [Run(1, 1, 1)], 0, True, LOAD)
        except BaseException as exc:
            failed.append(exc)

    threads = [threading.Thread(target=go) for _ in range(4)]
    for t in threads:
        t.start()
    for t in threads:
        t.join(5)
    assert failed == [] and movers.served["triton"] == 4


def test_the_plain_mover_is_never_dropped(fake: FakeRuntime) -> None:
    movers, runs = mover_set(fake), [Run(1, 1, 1)]
    fake.fail_copy = 0
    plain = movers.pick(runs, True, False, True)
    with pytest.raises(RuntimeError, match="cudaMemcpyAsync"):
        movers.copy(plain, runs, 0, True, LOAD)
    assert movers.names(True)[0] == "plain" and movers.dropped == {}


def test_an_argument_that_does_not_fit_is_no_broken_mover(
    fake: FakeRuntime, caplog: pytest.LogCaptureFixture
) -> None:
    movers, runs = mover_set(fake, "batch"), [Run(1, 1, 1)]
    mover = movers.pick(runs, True, True, True)
    check = LeafCheck(seed=0, shard=0, shard_bytes=LEAF, leaves=1, bad=1, first=0, count=1)
    for _ in range(2):
        with pytest.raises(ValueError, match="takes no LeafCheck"):
            movers.copy(mover, runs, 0, True, LOAD, check)
    assert movers.dropped == {} and "batch" in movers.names(True)
    assert movers.refused == {"batch": 2} and caplog.text.count("please report") == 1
    movers.check()


# -------------------------------------------------------------------- seats


def test_seats_are_pinned_distinct_and_bounded(fake: FakeRuntime) -> None:
    pools = SeatPools(fake)
    seats = []
    while (seat := pools.take(64)) is not None:
        seats.append(seat)
    assert len(seats) == 512 and pools.missed == 1
    ((start, size),) = fake.registered.items()
    spans = sorted((s.leaves_at, s.leaves_at + 8 * 64) for s in seats)
    spans += [(s.bad_at, s.bad_at + 4) for s in seats]
    spans.sort()
    assert all(a[1] <= b[0] for a, b in pairwise(spans))
    assert start <= spans[0][0] and spans[-1][1] <= start + size
    seat = seats[7]
    seat.leaves[:] = 5
    seat.bad[0] = 3
    assert ctypes.c_uint64.from_address(seat.leaves_at + 8).value == 5
    assert ctypes.c_int32.from_address(seat.bad_at).value == 3
    pools.give(seat)
    again = pools.take(64)
    assert again is seat and again.bad[0] == 0
    pools.check()
    huge = pools.take(1 << 17)  # a shard of 2 GiB: few seats
    assert huge is not None and len(fake.registered) == 2
    pools.give(huge)
    pools.give(huge)
    with pytest.raises(AssertionError, match="twice free"):
        pools.check()
    pools.close()
    pools.close()
    assert fake.registered == {}
