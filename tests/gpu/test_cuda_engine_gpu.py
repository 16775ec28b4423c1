"""The CUDA copy engine on a real device: the byte and order checks of tests/unit/test_cuda_engine.py.

Needs an NVIDIA GPU and a CUDA build of torch; skipped elsewhere.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

# ruff: noqa: E402
torch = pytest.importorskip("torch")
pytest.importorskip("kvoffload._core")
pytestmark = pytest.mark.gpu
if not torch.cuda.is_available():
    pytest.skip("no CUDA device", allow_module_level=True)

from kvoffload.copy.base import CANCELLED, FAILED, OK
from kvoffload.copy.cuda_job import Reason
from kvoffload.copy.cuda_movers import CudaScratch, build_movers, prepare
from kvoffload.copy.cuda_runtime import CudaRuntime
from kvoffload.copy.select import cuda_engine
from kvoffload.copy.trials import faults
from tests.gpu.devices import LAYOUTS, Device, available, round_trip
from tests.support.cuda import Layout, chunks, make_arena

MIB = 1 << 20


@pytest.fixture(params=[True, False], ids=["pinned", "unpinned"])
def pinned(request: pytest.FixtureRequest) -> Iterator[bool]:
    yield request.param


MOVERS = ["plain", "batch", "staged", "triton"]


def device(layout: Layout, mover: str) -> Device:
    """Skips where the mover cannot be had."""
    if mover not in available():
        pytest.skip(f"mover {mover} is not available here")
    return Device(layout, mover=mover)


@pytest.mark.parametrize("mover", MOVERS)
@pytest.mark.parametrize("layout", LAYOUTS, ids=range(len(LAYOUTS)))
def test_round_trip(layout: Layout, mover: str) -> None:
    with device(layout, mover) as d:
        for seed in range(3):
            round_trip(d, seed)
        d.assert_served(mover)


@pytest.mark.parametrize("layout", LAYOUTS, ids=range(len(LAYOUTS)))
def test_round_trip_unpinned(layout: Layout) -> None:
    with Device(layout, pinned=False) as d:
        round_trip(d)
        d.assert_served("plain")


@pytest.mark.parametrize("mover", MOVERS)
def test_every_mover_waits_for_compute(mover: str) -> None:
    with device(LAYOUTS[1], mover) as d:
        gens = [d.arena.begin_fill(0, 1)]
        d.kv.fill_(1)
        torch.cuda._sleep(100_000_000)
        d.kv.fill_(7)
        store = d.submit("store", [0], gens, [[0, 1, 2, 3]])
        assert not d.engine.wait(store, 5)
        assert d.done(store).status == OK
        used = 4 * d.layout.block_bytes
        assert set(bytes(d.arena.view(0, used))) == {7}
        torch.cuda._sleep(100_000_000)
        d.kv.zero_()
        assert d.done(d.submit("load", [0], gens, [[4, 5, 6, 7]])).status == OK
        host = d.host()
        assert set(d.layout.block(host, 4)) == {7} and set(d.layout.block(host, 3)) == {0}
        d.assert_served(mover)


@pytest.mark.parametrize("mover", MOVERS)
@pytest.mark.parametrize("layout", LAYOUTS[:3], ids=range(3))
def test_one_flipped_bit_is_seen(layout: Layout, mover: str) -> None:
    with device(layout, mover) as d:
        d.random(1)
        bpc = layout.blocks_per_chunk
        ids = np.arange(2 * bpc).reshape(2, bpc)
        gens = [d.arena.begin_fill(s, 1) for s in (0, 1)]
        assert d.done(d.submit("store", [0, 1], gens, ids)).status == OK
        rng = np.random.default_rng(0)
        for _ in range(8):
            at = layout.shard_bytes + int(rng.integers(0, layout.block_bytes * bpc))
            d.arena.view(at, 1)[0] ^= 1 << int(rng.integers(0, 8))
            done = d.done(d.submit("load", [0, 1], gens, ids + 2 * bpc))
            assert (done.status, done.failed_item, done.reason) == (FAILED, 1, Reason.CORRUPT)
            assert d.layout.block(d.host(), 2 * bpc) == d.layout.block(d.host(), 0)
            gens = [gens[0], d.arena.begin_fill(1, 1)]
            assert d.done(d.submit("store", [1], gens[1:], ids[1:])).status == OK
        d.assert_served(mover)


@pytest.mark.parametrize("mover", MOVERS)
def test_many_items_reuse_rings_tables_and_seats(mover: str) -> None:
    """More items in flight than any ring holds, both directions at once."""
    with device(LAYOUTS[1], mover) as d:
        before = d.random(3)
        slots = list(range(16))
        ids = np.arange(64).reshape(16, 4)
        gens = [d.arena.begin_fill(s, 1) for s in slots]
        assert d.done(d.submit("store", slots, gens, ids)).status == OK
        torch.cuda._sleep(50_000_000)
        jobs = [d.submit("load", slots, gens, ids) for _ in range(40)]
        more = [
            d.submit("store", [16 + i], [d.arena.begin_fill(16 + i, 1)], ids[i : i + 1])
            for i in range(16)
        ]
        for job in jobs + more:
            assert d.engine.wait(job, 20_000)
        assert {x.status for x in d.engine.poll()} == {OK}
        assert np.array_equal(d.host(), before)
        d.assert_served(mover)


@pytest.mark.parametrize("to_device", [True, False])
def test_trials_pass_for_all_movers(to_device: bool) -> None:
    runtime = CudaRuntime()
    scratch = CudaScratch(runtime)
    for mover in build_movers(runtime, scratch, 3 * MIB, lambda: False)[to_device]:
        assert faults(mover, scratch, to_device) == "", mover.name
    scratch.close()


def test_calibration_and_its_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    runtime = CudaRuntime()
    first = prepare(runtime, lambda: False)
    assert first.table.cells and not [r for r in caplog.records if r.levelname == "ERROR"]
    files = list((tmp_path / "kvoffload").iterdir())
    assert len(files) == 1
    for c in sorted(first.table.cells):
        print(c, f"{c.fragment_bytes * c.fragments / c.seconds / 1e9:.1f} GB/s")
    start = time.monotonic()
    assert prepare(runtime, lambda: False).table == first.table
    assert time.monotonic() - start < 5


def test_the_engine_as_it_is_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """select.cuda_engine: works at once, movers join, closes clean."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    arena = make_arena(64 * MIB)
    engine = cuda_engine(arena, 0)
    layout = LAYOUTS[1]
    kv = torch.randint(0, 256, (layout.total,), dtype=torch.uint8, device="cuda")
    engine.add_group(layout.fragments(kv.data_ptr()), layout.num_blocks, layout.shard_bytes)
    for job in (1, 2):
        gens = [arena.begin_fill(0, 1)]
        c = chunks([0], gens, [0], [[0, 1, 2, 3]])
        engine.submit_store(job, 0, c, 0)
        assert engine.wait(job, 20_000) and engine.poll()[0].status == OK
        assert engine.movers.wait(60)
    assert engine.movers.names(True)[0] == "plain" and engine.movers.dropped == {}
    engine.close()


def test_order_against_the_compute_stream(pinned: bool) -> None:
    """A slow forward before the store, a slow zeroing before the load: both are waited for."""
    d = Device(LAYOUTS[0], pinned=pinned)
    gens = [d.arena.begin_fill(0, 1)]
    d.kv.fill_(1)
    torch.cuda._sleep(100_000_000)
    d.kv.fill_(7)
    store = d.submit("store", [0], gens, [[0, 1, 2, 3]])
    assert not d.engine.wait(store, 5)  # submitting did not wait either
    assert d.done(store).status == OK
    assert set(bytes(d.arena.view(0, d.layout.shard_bytes))) == {7}
    torch.cuda._sleep(100_000_000)
    d.kv.zero_()
    assert d.done(d.submit("load", [0], gens, [[4, 5, 6, 7]])).status == OK
    host = d.host()
    assert set(d.layout.block(host, 4)) == {7} and set(d.layout.block(host, 3)) == {0}
    d.engine.close()


def test_corrupt_and_cancelled(pinned: bool) -> None:
    d = Device(LAYOUTS[1], pinned=pinned)
    d.random(1)
    gens = [d.arena.begin_fill(s, 1) for s in (0, 1)]
    assert d.done(d.submit("store", [0, 1], gens, np.arange(8).reshape(2, 4))).status == OK
    d.arena.view(d.layout.shard_bytes + 50, 1)[0] ^= 1
    before = d.host()
    done = d.done(d.submit("load", [0, 1], gens, np.arange(8, 16).reshape(2, 4)))
    assert (done.status, done.failed_item, done.reason) == (FAILED, 1, Reason.CORRUPT)
    assert d.layout.block(d.host(), 12) == d.layout.block(before, 12)
    job = d.submit("load", [2], [d.arena.begin_fill(2, 1)], [[0, 1, 2, 3]])
    d.engine.cancel(job)
    assert d.done(job).status == CANCELLED
    d.engine.close()


def test_copies_during_a_graph_capture() -> None:
    """A capture on the main thread neither breaks nor is broken by our threads' calls."""
    d = Device(LAYOUTS[0], pinned=True)
    d.random(1)
    gens = [d.arena.begin_fill(0, 1)]
    assert d.done(d.submit("store", [0], gens, [[0, 1, 2, 3]])).status == OK
    later = d.arena.begin_fill(1, 1)
    job = d.submit("load", [0, 1], [*gens, later], [[4, 5, 6, 7], [8, 9, 10, 11]])
    x = torch.zeros(16, device="cuda")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = x + 1
        d.arena.fail(1, later)
        assert d.engine.wait(job, 10_000)
    graph.replay()
    torch.cuda.synchronize()
    assert y.sum().item() == 16
    (done,) = d.engine.poll()
    assert (done.failed_item, done.reason) == (1, Reason.SLOT_LOST)
    d.engine.close()


def test_a_refused_pin_leaves_no_error_behind() -> None:
    runtime = CudaRuntime()
    with pytest.raises(RuntimeError, match="cudaHostRegister"):
        runtime.host_register(4096, 4096)  # not mapped
    assert torch.ones(4, device="cuda").sum().item() == 4
