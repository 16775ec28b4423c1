"""CudaCopyEngine over a fake CUDA (tests/support/cuda.py): ordering, bytes, outcomes.

The fake's device is host memory and its streams run in a random, order-respecting schedule. These
tests show that the engine asks for the right order and keeps the right books under every such
schedule. They do not show that a real driver takes the calls, nor speed: tests/gpu has the same byte
checks for a real device.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

# ruff: noqa: E402
torch = pytest.importorskip("torch")
pytest.importorskip("kvoffload._core")

from kvoffload import _core
from kvoffload.copy.base import CANCELLED, DEADLINE, FAILED, LOAD, OK, STORE, Fragment
from kvoffload.copy.cpu import CpuCopyEngine
from kvoffload.copy.cuda import _ABANDONED, CudaCopyEngine
from kvoffload.copy.cuda_job import Reason
from kvoffload.copy.cuda_runtime import ArenaPinner
from kvoffload.copy.mover_set import MoverSet, Prepared
from kvoffload.copy.movers import PlainMover
from kvoffload.errors import ClosedError, UnsupportedError
from tests.support.cuda import LEAF, FakeRuntime, Layout, chunks, make_arena, make_layout
from tests.support.cuda_movers import every_mover
from tests.support.cuda_rig import MIB, SMALL, Rig, soon

MOVERS = ["plain", "batch", "staged", "triton"]
CHECKING = ["staged", "triton"]


@pytest.fixture
def rig() -> Iterator[Callable[..., Rig]]:
    made: list[Rig] = []

    def make(layout: Layout = SMALL, **kwargs: Any) -> Rig:
        made.append(Rig(layout, **kwargs))
        return made[-1]

    yield make
    for r in made:
        r.close()


# -------------------------------------------------------------------- bytes

LAYOUTS = st.builds(
    make_layout,
    st.lists(st.integers(1, 9000), min_size=1, max_size=4),
    st.booleans(),
    st.sampled_from([0, 1, 512]),
    st.integers(8, 24),
    st.integers(1, 4),
)


@settings(max_examples=100, deadline=None)
@given(LAYOUTS, st.sampled_from(["", *MOVERS]), st.integers(0, 1 << 30), st.data())
def test_round_trip_over_random_layouts(
    layout: Layout, mover: str, seed: int, data: st.DataObject
) -> None:
    n, bpc = data.draw(st.integers(1, 3)), layout.blocks_per_chunk
    rig = Rig(layout, movers=mover, seed=seed, piece_bytes=5 * LEAF)
    try:
        before = rig.fill(seed)
        order = data.draw(st.permutations(range(layout.num_blocks)))
        if n * bpc > layout.num_blocks:
            return
        source = np.array(order[: n * bpc]).reshape(n, bpc)
        slots = list(range(n))
        generations = rig.stored(slots, source)
        raw = layout.block_bytes * bpc
        for slot, row in zip(slots, source, strict=True):
            want = b"".join(layout.block(before, b) for b in row)
            assert rig.slot_bytes(slot) == want + bytes(layout.shard_bytes - raw)
            assert rig.arena.state(slot) == _core.READY
        target = np.array(data.draw(st.permutations(order))[: n * bpc]).reshape(n, bpc)
        skip = np.array(data.draw(st.lists(st.booleans(), min_size=n * bpc, max_size=n * bpc)))
        target[skip.reshape(n, bpc)] = -1
        expected = rig.fill(seed + 1)
        done = rig.done(rig.load(slots, generations, target))
        assert (done.kind, done.status, done.failed_item) == (LOAD, OK, -1)
        assert done.nbytes == int((target >= 0).sum()) * layout.block_bytes
        for to, frm in zip(target.ravel().tolist(), source.ravel().tolist(), strict=True):
            if to >= 0:
                for at, stride, nbytes in layout.parts:
                    new = before[at + frm * stride : at + frm * stride + nbytes]
                    expected[at + to * stride : at + to * stride + nbytes] = new
        assert np.array_equal(rig.memory, expected)  # the gaps and other blocks too
        served = set(rig.engine.movers.served)
        assert (mover or "plain") in served <= {mover, "plain"}  # plain: a load of no block
    finally:
        rig.close()


@pytest.mark.parametrize("mover", MOVERS)
def test_slots_are_the_same_as_the_cpu_engines(rig: Any, mover: str) -> None:
    r = rig(movers=mover)
    r.fill()
    ids = [[3, 4, 5, 9]]
    r.stored([0], ids)
    cpu = CpuCopyEngine(getattr(r.arena, "_arena", r.arena), 0)
    try:
        group = cpu.add_group(r.layout.fragments(r.memory.ctypes.data), 32, r.layout.shard_bytes)
        c = chunks([1], r.begin([1]), [r.offset(1)], ids)
        c.keys = chunks([0], [0], [0], ids).keys
        cpu.submit_store(1, group, c, 0)
        assert cpu.wait(1, 5000)
        assert [d.status for d in cpu.poll()] == [OK]
        assert r.slot_bytes(0) == r.slot_bytes(1)
        native = getattr(r.arena, "_arena", r.arena)
        theirs = native.leaf_hashes(r.offset(1), r.layout.shard_bytes)
        assert r.leaves(0) == theirs.tolist()
    finally:
        cpu.close()


def test_two_ranks_fill_one_slot() -> None:
    layout, arena = make_layout([6000], True, 0, 16, 4), make_arena(4 * MIB, n_ranks=2)
    fakes = [FakeRuntime(seed=i) for i in range(2)]
    engines = [CudaCopyEngine(arena, i, runtime=f) for i, f in enumerate(fakes)]
    memory = [np.full(layout.total, i + 1, np.uint8) for i in range(2)]
    generation = arena.begin_fill(0, 0b11)
    for rank, e in enumerate(engines):
        g = e.add_group(layout.fragments(memory[rank].ctypes.data), 16, layout.shard_bytes)
        assert arena.state(0) == _core.FILLING
        e.submit_store(
            1, g, chunks([0], [generation], [0], [[0, 1, 2, 3]]), rank * layout.shard_bytes
        )
        assert e.wait(1, 5000) and e.poll()[0].status == OK
    assert arena.state(0) == _core.READY
    for rank in range(2):
        assert arena.view(rank * layout.shard_bytes, 1)[0] == rank + 1
        engines[rank].close()
        fakes[rank].stop()


# -------------------------------------------------------------------- order on the device


def test_store_waits_for_the_compute_event(rig: Any) -> None:
    r, gate = rig(), threading.Event()
    r.fake.compute(lambda: r.memory.fill(7), gate)  # the forward that writes the KV
    generations = r.begin([0])
    job = r.store([0], generations, [[0, 1, 2, 3]])
    soon(lambda: r.fake.queued("store", "event") == 1)  # everything is enqueued
    assert not r.engine.wait(job, 30)
    assert r.fake.queued("store") == 12 and r.arena.state(0) == _core.FILLING
    gate.set()
    r.fake.poke()
    assert r.done(job).status == OK
    assert set(r.slot_bytes(0)[: 4 * 8700]) == {7}


def test_store_does_not_wait_for_later_compute(rig: Any) -> None:
    r, gate = rig(), threading.Event()
    generations = r.begin([0])
    job = r.store([0], generations, [[0, 1, 2, 3]])
    r.fake.compute(lambda: None, gate)
    assert r.done(job).status == OK
    gate.set()
    r.fake.poke()


def test_load_waits_for_zeroing(rig: Any) -> None:
    r, gate = rig(), threading.Event()
    before = r.fill()
    generations = r.stored([0], [[0, 1, 2, 3]])
    r.memory[:] = 9
    r.fake.compute(lambda: r.memory.fill(0), gate)
    job = r.load([0], generations, [[4, 5, 6, 7]])
    assert not r.engine.wait(job, 30)
    assert r.fake.queued("load") == r.fake.queued("load", "wait") == 0  # nothing to call back
    assert set(r.memory.tolist()) == {9}
    gate.set()
    r.fake.poke()
    assert r.done(job).status == OK
    for i in range(4):
        assert r.layout.block(r.memory, 4 + i) == r.layout.block(before, i)


@pytest.mark.parametrize("kind", ["store", "load"])
def test_nothing_is_reported_before_the_end_event(rig: Any, kind: str) -> None:
    r = rig()
    ids = [[0, 1, 2, 3]]
    generations = r.stored([0], ids) if kind == "load" else r.begin([0])
    r.fake.pause(kind)
    job = (r.load if kind == "load" else r.store)([0], generations, ids)
    soon(lambda: r.fake.queued(kind, "event") == 1)
    assert not r.engine.wait(job, 30)
    r.engine.cancel(job)  # does not make it end sooner: the copies still write
    assert not r.engine.wait(job, 30)
    assert r.engine.poll() == [] and r.engine.pending() == 1
    assert kind == "load" or r.arena.state(0) == _core.FILLING
    r.fake.resume(kind)
    assert r.done(job).status == OK  # the cancel came too late to drop anything


def test_main_thread_never_enqueues_copies(rig: Any) -> None:
    r = rig()
    generations = r.stored([0], [[0, 1, 2, 3]])
    r.done(r.load([0], generations, [[0, 1, 2, 3]]))
    assert r.fake.enqueued_by == {"kvo-cuda-store", "kvo-cuda-load"}


def test_chunks_are_loaded_as_they_become_ready(rig: Any) -> None:
    r = rig()
    before = r.fill()
    generations = r.begin([0, 1])
    loading = r.load([0, 1], generations, [[8, 9, 10, 11], [12, 13, 14, 15]])
    assert r.done(r.store([1], generations[1:], [[4, 5, 6, 7]])).status == OK
    soon(lambda: r.layout.block(r.memory, 12) == r.layout.block(before, 4))
    assert not r.engine.wait(loading, 20)
    store = r.store([0], generations[:1], [[0, 1, 2, 3]])
    assert r.engine.wait(store, 5000) and r.engine.wait(loading, 5000)
    by_job = {d.job: d for d in r.engine.poll()}
    assert by_job[loading].status == OK and by_job[loading].wait_ns > 0
    assert r.layout.block(r.memory, 8) == r.layout.block(before, 0)


# -------------------------------------------------------------------- outcomes


def test_cancel_drops_items_that_wait(rig: Any) -> None:
    r = rig()
    before = r.fill()
    generations = r.stored([0], [[0, 1, 2, 3]]) + r.begin([1])
    job = r.load([0, 1], generations, [[8, 9, 10, 11], [12, 13, 14, 15]])
    soon(lambda: r.layout.block(r.memory, 11) == r.layout.block(before, 3))
    r.engine.cancel(job)
    done = r.done(job)
    assert (done.status, done.failed_item, done.reason) == (CANCELLED, 1, Reason.CANCELLED)
    r.arena.fill_done(1, generations[1])
    time.sleep(0.01)
    assert r.layout.block(r.memory, 12) == r.layout.block(before, 12)
    assert r.engine.poll() == []
    r.engine.cancel(job)  # unknown by now


def test_cancelled_store_fails_the_slots_it_drops(rig: Any) -> None:
    driver = threading.Event()
    r = rig(driver=driver)
    generations = r.begin([0, 1, 2])
    job = r.store([0, 1, 2], generations, np.arange(12).reshape(3, 4))
    soon(lambda: bool(r.fake.enqueued_by))  # item 0 is in the driver
    r.engine.cancel(job)
    assert [r.arena.state(s) for s in range(3)] == [_core.FILLING, _core.FAILED, _core.FAILED]
    assert not r.engine.wait(job, 20)
    driver.set()
    done = r.done(job)
    assert (done.kind, done.status, done.failed_item) == (STORE, CANCELLED, 1)
    assert r.arena.state(0) == _core.READY


@pytest.mark.parametrize("how", ["cancel", "deadline"])
def test_a_verified_item_is_dropped_if_not_enqueued(rig: Any, how: str) -> None:
    r, go, inside = rig(), threading.Event(), threading.Event()
    generations = r.stored([0], [[0, 1, 2, 3]])
    before, verify = r.fill(3), r.engine._verify

    def slow(*args: Any) -> Any:
        inside.set()
        go.wait()
        return verify(*args)

    r.engine._verify = slow
    job = r.load([0], generations, [[4, 5, 6, 7]], 40 if how == "deadline" else 20_000)
    assert inside.wait(5)
    if how == "cancel":
        r.engine.cancel(job)
    else:
        time.sleep(0.05)
    assert not r.engine.wait(job, 10) and r.engine.poll() == []
    go.set()
    done = r.done(job)
    assert (done.status, done.failed_item) == (CANCELLED if how == "cancel" else DEADLINE, 0)
    assert np.array_equal(r.memory, before)


def test_the_prefix_before_a_bad_chunk_is_still_loaded(rig: Any) -> None:
    r = rig()
    before = r.fill()
    late = r.begin([0])
    generations = late + r.stored([1], [[4, 5, 6, 7]]) + r.begin([2])
    r.arena.view(r.offset(1), 1)[0] ^= 1
    job = r.load([0, 1, 2], generations, np.arange(16, 28).reshape(3, 4))
    assert not r.engine.wait(job, 30)  # item 1 is known to be bad, item 0 is not there yet
    store = r.store([0], late, [[0, 1, 2, 3]])
    assert r.engine.wait(store, 5000) and r.engine.wait(job, 5000)
    (done,) = [d for d in r.engine.poll() if d.job == job]
    assert (done.status, done.failed_item, done.reason) == (FAILED, 1, Reason.CORRUPT)
    for b in range(4):
        assert r.layout.block(r.memory, 16 + b) == r.layout.block(before, b)


def test_deadline(rig: Any) -> None:
    r = rig()
    generations = r.stored([0], [[0, 1, 2, 3]]) + r.begin([1])
    start = time.monotonic()
    done = r.done(r.load([0, 1], generations, np.arange(8).reshape(2, 4), deadline_ms=60))
    assert time.monotonic() - start >= 0.06
    assert (done.status, done.failed_item, done.reason) == (DEADLINE, 1, Reason.DEADLINE)
    done = r.done(r.load([0], generations[:1], [[0, 1, 2, 3]], deadline_ms=0))
    assert (done.status, done.failed_item) == (DEADLINE, 0)


def test_deadline_is_reported_while_all_load_threads_are_stuck(rig: Any) -> None:
    driver = threading.Event()
    r = rig()
    generations = r.stored([0, 1], np.arange(8).reshape(2, 4))
    r.fake.driver = driver
    r.fake.enqueued_by.clear()
    stuck = r.load([0, 1], generations, np.arange(8).reshape(2, 4))
    soon(lambda: r.fake.enqueued_by == {"kvo-cuda-load"})
    late = r.load([0], generations[:1], [[8, 9, 10, 11]], deadline_ms=20)
    ended: list[Any] = []
    soon(lambda: bool(ended.extend(r.engine.poll()) or ended))
    assert [(d.job, d.status) for d in ended] == [(late, DEADLINE)]
    assert r.engine.pending() == 1
    driver.set()
    assert r.done(stuck).status == OK


def test_corrupt_bytes_never_reach_a_block(rig: Any) -> None:
    r = rig()
    before = r.fill()
    generations = r.stored([0, 1, 2], np.arange(12).reshape(3, 4))
    r.arena.view(r.offset(1) + 20_000, 1)[0] ^= 1
    done = r.done(r.load([0, 1, 2], generations, np.arange(16, 28).reshape(3, 4)))
    assert (done.status, done.failed_item, done.reason) == (FAILED, 1, Reason.CORRUPT)
    for b in range(4):
        assert r.layout.block(r.memory, 16 + b) == r.layout.block(before, b)
        assert r.layout.block(r.memory, 20 + b) == r.layout.block(before, 20 + b)


def test_a_bad_leaf_that_no_wanted_block_touches_is_not_read(rig: Any) -> None:
    r = rig(make_layout([LEAF], True, 0, 16, 4))
    generations = r.stored([0], [[0, 1, 2, 3]])
    r.arena.view(r.offset(0) + 2 * LEAF, 1)[0] ^= 1
    assert r.done(r.load([0], generations, [[4, 5, -1, 7]])).status == OK
    assert r.done(r.load([0], generations, [[4, 5, 6, 7]])).reason == Reason.CORRUPT


def test_wrong_key_is_corrupt(rig: Any) -> None:
    r = rig()
    generations = r.stored([0], [[0, 1, 2, 3]])
    c = chunks([0], generations, [r.offset(0)], [[4, 5, 6, 7]])
    c.keys = b"k" * 16
    r.engine.submit_load(900_001, r.group, c, 0, 5000)
    assert r.done(900_001).reason == Reason.CORRUPT


@pytest.mark.parametrize("how", ["reused", "failed", "freed"])
def test_lost_slots(rig: Any, how: str) -> None:
    r = rig()
    generations = r.stored([0], [[0, 1, 2, 3]])
    before = r.fill(5)
    if how == "reused":
        r.begin([0])
    elif how == "failed":
        r.arena.fail(0, generations[0])
    else:
        r.arena.set_free(0)
    done = r.done(r.load([0], generations, [[4, 5, 6, 7]]))
    assert (done.status, done.failed_item, done.reason) == (FAILED, 0, Reason.SLOT_LOST)
    assert np.array_equal(r.memory, before)
    done = r.done(r.store([0], generations, [[4, 5, 6, 7]]))
    assert (done.status, done.failed_item, done.reason) == (FAILED, 0, Reason.SLOT_LOST)
    assert how != "reused" or r.arena.state(0) == _core.FILLING  # the new owner's, not failed by us


def test_slot_reused_while_the_load_is_on_the_device(rig: Any) -> None:
    r = rig()
    generations = r.stored([0], [[0, 1, 2, 3]])
    r.fake.pause("load")
    job = r.load([0], generations, [[4, 5, 6, 7]])
    soon(lambda: r.fake.queued("load", "event") == 1)
    r.begin([0])
    r.arena.view(r.offset(0), 100)[:] = b"x" * 100
    r.fake.resume("load")
    done = r.done(job)
    assert (done.status, done.failed_item, done.reason) == (FAILED, 0, Reason.SLOT_LOST)


def test_slot_reused_while_the_store_is_on_the_device(rig: Any) -> None:
    r = rig()
    generations = r.begin([0, 1])
    r.fake.pause("store")
    job = r.store([0, 1], generations, np.arange(8).reshape(2, 4))
    soon(lambda: r.fake.queued("store", "event") == 2)
    again, leaves = r.begin([0]), r.leaves(0)
    r.fake.resume("store")
    done = r.done(job)
    assert r.leaves(0) == leaves != r.leaves(1)
    assert (done.status, done.failed_item, done.reason) == (FAILED, 0, Reason.SLOT_LOST)
    assert (r.arena.generation(0), r.arena.state(0)) == (again[0], _core.FILLING)
    assert r.arena.done_mask(0) == 0
    assert r.arena.state(1) == _core.READY  # other chunks of a store are worth keeping


# -------------------------------------------------------------------- every mover


@pytest.mark.parametrize("mover", MOVERS)
@pytest.mark.parametrize("kind", ["store", "load"])
def test_every_mover_waits_for_compute_and_reports_after_its_end(
    rig: Any, mover: str, kind: str
) -> None:
    r, gate, ids = rig(movers=mover), threading.Event(), [[0, 1, 2, 3]]
    before = r.fill()
    generations = r.stored([0], ids) if kind == "load" else r.begin([0])
    r.fake.compute(lambda: r.memory.fill(7), gate)  # the forward, or the zeroing
    job = r.store([0], generations, ids) if kind == "store" else r.load([0], generations, ids)
    if kind == "store":
        soon(lambda: r.fake.queued(kind, "event") >= 1)
    assert not r.engine.wait(job, 30)
    gate.set()
    r.fake.poke()
    assert r.done(job).status == OK
    if kind == "store":
        assert set(r.slot_bytes(0)[: 4 * 8700]) == {7}
    else:
        assert all(r.layout.block(r.memory, b) == r.layout.block(before, b) for b in range(4))
    assert r.only_served(mover)


@pytest.mark.parametrize("mover", CHECKING)
def test_checksums_are_the_devices_work(rig: Any, mover: str, monkeypatch: Any) -> None:
    r = rig(movers=mover)
    before = r.fill()

    def host(*args: Any) -> Any:
        raise AssertionError("hashed by the host")

    proxy = Proxy(r.arena, hash_leaves=host, verify_leaves=host)
    monkeypatch.setattr(r.engine, "_arena", proxy)
    generations = r.stored([0, 1], np.arange(8).reshape(2, 4))
    target = np.array([[16, 17, 18, 19], [-1, 21, -1, 23]])
    assert r.done(r.load([0, 1], generations, target)).status == OK
    assert r.layout.block(r.memory, 23) == r.layout.block(before, 7)
    for slot in (0, 1):
        key = chunks([slot], [1], [0], [[0]]).keys
        assert r.leaves(slot) == _core.leaf_checksums(r.slot_bytes(slot), key).tolist()


class Proxy:
    def __init__(self, real: Any, **replaced: Any) -> None:
        self._real = real
        self.__dict__ |= replaced

    def __getattr__(self, name: str) -> Any:
        return getattr(self._real, name)


@pytest.mark.parametrize("mover", CHECKING)
def test_corruption_seen_by_the_device_fails_the_item(rig: Any, mover: str) -> None:
    r = rig(movers=mover)
    before = r.fill()
    generations = r.stored([0, 1, 2], np.arange(12).reshape(3, 4))
    r.arena.view(r.offset(1) + 20_000, 1)[0] ^= 1
    done = r.done(r.load([0, 1, 2], generations, np.arange(16, 28).reshape(3, 4)))
    assert (done.status, done.failed_item, done.reason) == (FAILED, 1, Reason.CORRUPT)
    for b in range(4):  # what lies before the bad chunk is good and stays
        assert r.layout.block(r.memory, 16 + b) == r.layout.block(before, b)
    assert r.done(r.load([0], generations[:1], [[28, 29, 30, 31]])).status == OK  # counter is reset
    assert r.only_served(mover)


@pytest.mark.parametrize("mover", CHECKING)
def test_the_device_reads_no_leaf_that_no_wanted_block_touches(rig: Any, mover: str) -> None:
    r = rig(make_layout([LEAF], True, 0, 16, 4), movers=mover)
    generations = r.stored([0], [[0, 1, 2, 3]])
    r.arena.view(r.offset(0) + 2 * LEAF, 1)[0] ^= 1
    assert r.done(r.load([0], generations, [[4, 5, -1, 7]])).status == OK
    assert r.done(r.load([0], generations, [[4, 5, 6, 7]])).reason == Reason.CORRUPT


@pytest.mark.parametrize("mover", CHECKING)
@pytest.mark.parametrize("kind", ["store", "load"])
def test_slot_reused_while_a_checking_mover_is_at_it(rig: Any, mover: str, kind: str) -> None:
    r, ids = rig(movers=mover), [[0, 1, 2, 3]]
    generations = r.stored([0], ids) if kind == "load" else r.begin([0])
    r.fake.pause(kind)
    job = (r.load if kind == "load" else r.store)([0], generations, ids)
    soon(lambda: r.fake.queued(kind, "event") >= 1)
    again, leaves = r.begin([0]), r.leaves(0)
    r.arena.view(r.offset(0), 100)[:] = b"x" * 100
    r.fake.resume(kind)
    done = r.done(job)
    assert (done.status, done.failed_item, done.reason) == (FAILED, 0, Reason.SLOT_LOST)
    assert r.leaves(0) == leaves  # the new owner's
    assert (r.arena.generation(0), r.arena.state(0)) == (again[0], _core.FILLING)


@pytest.mark.parametrize("mover", MOVERS)
def test_many_jobs_of_every_mover(rig: Any, mover: str) -> None:
    r = rig(make_layout([2000, 300], False, 0, 256, 4), movers=mover, seed=5)
    before, slots = r.fill(), list(range(24))
    generations, ids = r.begin(slots), np.arange(96).reshape(24, 4)
    loads = [
        r.load(slots[i : i + 4], generations[i : i + 4], ids[i : i + 4] + 128)
        for i in range(0, 24, 4)
    ]
    stores = [r.store([s], [generations[s]], ids[s : s + 1]) for s in slots]
    for job in loads + stores:
        assert r.engine.wait(job, 10_000)
    assert {d.job: d.status for d in r.engine.poll()} == dict.fromkeys(loads + stores, OK)
    assert all(r.layout.block(r.memory, b + 128) == r.layout.block(before, b) for b in range(96))
    r.engine.check()


def test_a_mover_that_refuses_is_not_used_again(rig: Any, caplog: Any) -> None:
    r = rig(movers="triton")
    kernels = r.engine.movers._serving[False].by_name["triton"]
    kernels.wrong = "raises"
    generations = r.begin([0])
    done = r.done(r.store([0], generations, [[0, 1, 2, 3]]))
    assert (done.status, done.reason) == (FAILED, Reason.DEVICE)
    assert r.arena.state(0) == _core.FAILED
    assert "triton" not in r.engine.movers.names(False)
    assert "triton" in r.engine.movers.names(True)  # the other direction's is another one
    assert len([m for m in caplog.messages if "not used again" in m]) == 1
    fresh = r.stored([1], [[0, 1, 2, 3]])
    assert r.done(r.load([1], fresh, [[4, 5, 6, 7]])).status == OK
    assert r.engine.movers.served == {"triton": 2, "plain": 1}
    r.engine.close()
    assert kernels.closed


@pytest.mark.parametrize("mover", MOVERS)
def test_what_is_not_pinned_is_copied_plainly(rig: Any, mover: str) -> None:
    r = rig(movers=mover, piece_bytes=MIB, refuse_from=0)
    before = r.fill()
    generations = r.stored([0], [[0, 1, 2, 3]])
    assert r.done(r.load([0], generations, [[8, 9, 10, 11]])).status == OK
    assert r.layout.block(r.memory, 8) == r.layout.block(before, 0)
    assert r.engine.pinned_bytes() == 0 and r.only_served("plain")


def test_only_what_lies_in_pinned_pieces_is_given_to_other_movers(rig: Any) -> None:
    r = rig(
        make_layout([LEAF], True, 0, 16, 4), movers="batch", piece_bytes=6 * LEAF, refuse_from=1
    )
    assert r.engine.pinned_bytes() == 6 * LEAF  # slot 0, half of slot 1
    r.stored([0, 1, 2], np.arange(12).reshape(3, 4))
    assert r.engine.movers.served == {"batch": 1, "plain": 2}


@pytest.mark.parametrize("how", ["none free", "refused"])
def test_without_a_seat_the_host_does_the_checksums(rig: Any, how: str, caplog: Any) -> None:
    r = rig(movers="triton", refuse_from=1 if how == "refused" else -1)
    assert r.engine.pinned_bytes() == 8 * MIB
    if how == "none free":
        r.engine._seats.take = lambda leaves: None
    before = r.fill()
    generations = r.stored([0, 1], np.arange(8).reshape(2, 4))
    r.arena.view(r.offset(1) + 9, 1)[0] ^= 1
    done = r.done(r.load([0, 1], generations, np.arange(16, 24).reshape(2, 4)))
    assert (done.failed_item, done.reason) == (1, Reason.CORRUPT)
    assert r.layout.block(r.memory, 16) == r.layout.block(before, 0)
    assert r.only_served("triton")
    assert len([m for m in caplog.messages if "the host computes" in m]) == (how == "refused")


def test_seats_come_back_once_nothing_uses_them(rig: Any) -> None:
    r = rig(movers="triton")
    generations = r.stored([0, 1], np.arange(8).reshape(2, 4))
    (pool,) = r.engine._seats._pools.values()

    def out() -> int:
        return pool.total - len(pool.free)

    r.arena.view(r.offset(1), 1)[0] ^= 1
    r.done(r.load([0, 1], generations, np.arange(8).reshape(2, 4)))  # one good, one corrupt
    r.done(r.load([0], [generations[0] + 9], [[0, 1, 2, 3]]))  # not enqueued: the slot is lost
    assert out() == 0
    r.fake.pause("load")
    job = r.load([0], generations[:1], [[0, 1, 2, 3]])
    soon(lambda: r.fake.queued("load", "event") == 1)
    assert out() == 1
    r.fake.resume("load")
    r.done(job)
    assert out() == 0
    synchronize = r.fake.synchronize

    def lost(event: Any) -> None:
        synchronize(event)
        if event.stream == "load":
            raise RuntimeError("planted: device lost")

    r.fake.synchronize = lost
    assert r.done(r.load([0], generations[:1], [[0, 1, 2, 3]])).reason == Reason.DEVICE
    assert out() == 1  # the copies may still be writing there


def test_an_arena_that_takes_no_hashes_has_its_stores_hashed_by_the_host(rig: Any) -> None:
    r = rig(movers="triton")
    r.engine._put_leaves = None  # as with a native core that lacks set_leaf_hashes
    generations = r.stored([0], [[0, 1, 2, 3]])
    assert r.arena.verify_leaves(0, r.layout.shard_bytes, chunks([0], [1], [0], [[0]]).keys)
    assert r.done(r.load([0], generations, [[4, 5, 6, 7]])).status == OK


def test_movers_join_when_they_are_prepared(rig: Any) -> None:
    go, made = threading.Event(), []

    def prepared(fake: FakeRuntime) -> MoverSet:
        movers = MoverSet(PlainMover(fake), only="batch")

        def body(stopped: Any) -> Prepared:
            made.append(threading.current_thread().name)
            go.wait(10)
            both = [every_mover(fake, fake.piece_bytes) for _ in range(2)]
            return Prepared(*both)

        movers.prepare(fake.enter_thread, body)
        return movers

    r = rig(movers=prepared)
    r.stored([0], [[0, 1, 2, 3]])
    assert r.only_served("plain") and made == ["kvo-cuda-calibrate"]
    go.set()
    assert r.engine.movers.wait(10)
    r.stored([1], [[0, 1, 2, 3]])
    assert r.engine.movers.served == {"plain": 1, "batch": 1}


def test_preparation_that_fails_costs_only_speed(rig: Any, caplog: Any) -> None:
    def broken(fake: FakeRuntime) -> MoverSet:
        movers = MoverSet(PlainMover(fake))
        movers.prepare(fake.enter_thread, lambda stopped: 1 / 0)  # type: ignore[arg-type,return-value]
        return movers

    r = rig(movers=broken)
    assert r.engine.movers.wait(5) and "ZeroDivisionError" in caplog.text
    r.stored([0], [[0, 1, 2, 3]])
    assert r.only_served("plain")


def test_close_stops_the_preparation(rig: Any) -> None:
    def slow(fake: FakeRuntime) -> MoverSet:
        movers = MoverSet(PlainMover(fake))

        def body(stopped: Any) -> Prepared:
            while not stopped():
                time.sleep(0.001)
            return Prepared()

        movers.prepare(fake.enter_thread, body)
        return movers

    r = rig(movers=slow)
    start = time.monotonic()
    r.engine.close()
    assert time.monotonic() - start < 3
    assert not [t for t in threading.enumerate() if t.name.startswith("kvo-cuda")]


# -------------------------------------------------------------------- driver failures


@pytest.mark.parametrize("kind", ["store", "load"])
def test_failed_copy_fails_its_item_after_what_was_enqueued(rig: Any, kind: str) -> None:
    r = rig()
    before = r.fill()
    ids = np.arange(12).reshape(3, 4)
    generations = r.stored([0, 1, 2], ids) if kind == "load" else r.begin([0, 1, 2])
    r.fake.fail_copy = r.fake._copies + 1
    r.fake.pause(kind)
    job = (r.load if kind == "load" else r.store)([0, 1, 2], generations, ids + 16)
    soon(lambda: r.engine.errors == 1)
    assert not r.engine.wait(job, 20)  # half of the item's copies are out
    r.fake.resume(kind)
    done = r.done(job)
    assert (done.status, done.reason) == (FAILED, Reason.DEVICE)
    if kind == "store":
        states = [r.arena.state(s) for s in range(3)]
        assert states == [_core.READY, _core.FAILED, _core.READY] and done.failed_item == 1
    else:  # two load threads: either of the first two items met the fault
        assert done.failed_item in (0, 1, 2)
        for b in range(16, 16 + 4 * done.failed_item):
            assert r.layout.block(r.memory, b) == r.layout.block(before, b - 16)
    fresh = r.stored([3], [[0, 1, 2, 3]])
    assert r.done(r.load([3], fresh, [[0, 1, 2, 3]])).status == OK


def test_failed_event_drains_the_stream_before_the_report(rig: Any) -> None:
    r = rig()
    generations = r.begin([0])
    r.fake.fail_record = r.fake._records
    r.fake.pause("store")
    job = r.store([0], generations, [[0, 1, 2, 3]])
    soon(lambda: r.engine.errors == 1)
    assert not r.engine.wait(job, 20)
    r.fake.resume("store")
    assert r.done(job).reason == Reason.DEVICE
    assert r.fake.queued("store") == 0


def test_pinning_in_pieces(rig: Any) -> None:
    r = rig(piece_bytes=3 * MIB)
    assert r.engine._pinner.wait(5)
    sizes = [3 * MIB, 3 * MIB, 2 * MIB]
    start = r.arena.data_ptr
    assert r.fake.registered == {start + i * 3 * MIB: n for i, n in enumerate(sizes)}
    assert r.engine.pinned_bytes() == 8 * MIB
    r.engine.check()


def test_refused_pinning_falls_back_and_says_so_once(
    rig: Any, caplog: pytest.LogCaptureFixture
) -> None:
    r = rig(piece_bytes=MIB, refuse_from=2)
    assert r.engine._pinner.wait(5)
    assert r.engine.pinned_bytes() == 2 * MIB and r.fake._registers == 3
    lines = [m for m in caplog.messages if "pinned only" in m]
    assert len(lines) == 1 and "2 of 8 MiB" in lines[0] and "out of memory" in lines[0]
    before = r.fill()
    generations = r.stored([60], [[0, 1, 2, 3]])
    assert r.done(r.load([60], generations, [[8, 9, 10, 11]])).status == OK
    assert r.layout.block(r.memory, 8) == r.layout.block(before, 0)


def test_pinner_that_does_not_end_unpins_nothing() -> None:
    class Slow(FakeRuntime):
        def host_register(self, address: int, nbytes: int) -> None:
            hold.wait()
            super().host_register(address, nbytes)

    hold, fake = threading.Event(), Slow()
    pinner = ArenaPinner(fake, 1 << 30, MIB, MIB)
    assert not pinner.close(0.02)
    hold.set()
    assert pinner.close(5) and fake.registered == {}
    fake.stop()


def test_device_that_refuses_is_an_error_at_once() -> None:
    fake, arena = FakeRuntime(fail_enter=True), make_arena(2 * MIB)
    with pytest.raises(RuntimeError, match="no device"):
        CudaCopyEngine(arena, 0, runtime=fake)
    fake.stop()


@pytest.mark.skipif(torch.version.cuda is not None, reason="torch is a CUDA build")
def test_torch_without_cuda_is_refused_with_a_line() -> None:
    with pytest.raises(UnsupportedError, match="not a CUDA build"):
        CudaCopyEngine(make_arena(2 * MIB), 0)


# -------------------------------------------------------------------- close, validation


def test_close_ends_every_job_and_writes_nothing_later() -> None:
    r = Rig(SMALL)
    generations = r.stored([0], [[0, 1, 2, 3]]) + r.begin([1, 2])
    r.fake.pause("load")
    out = r.load([0], generations[:1], [[4, 5, 6, 7]])
    soon(lambda: r.fake.queued("load", "event") == 1)
    waiting = r.load([1, 2], generations[1:], np.arange(8, 16).reshape(2, 4))
    threading.Timer(0.05, r.fake.resume, ["load"]).start()
    r.engine.close()
    r.engine.close()
    ended = {d.job: d.status for d in r.engine.poll()}
    assert ended == {out: OK, waiting: CANCELLED}
    with pytest.raises(ClosedError):
        r.load([0], generations[:1], [[4, 5, 6, 7]])
    with pytest.raises(ClosedError):
        r.store([1], generations[1:2], [[4, 5, 6, 7]])
    after = r.memory.copy()
    r.arena.fill_done(1, generations[1])
    time.sleep(0.01)
    assert np.array_equal(r.memory, after)
    assert not [t for t in threading.enumerate() if t.name.startswith("kvo-cuda")]
    r.close()


def test_close_gives_up_on_a_hung_device(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kvoffload.copy.cuda.CLOSE_S", 0.1)
    r = Rig(SMALL)
    generations = r.begin([0])
    r.fake.pause("store")
    job = r.store([0], generations, [[0, 1, 2, 3]])
    soon(lambda: r.fake.queued("store", "event") == 1)
    r.engine.close()
    assert "kvo-cuda-hash" in caplog.text and r.fake.registered  # still pinned: copies are out
    assert r.engine.poll() == []
    assert r.engine in _ABANDONED  # else its buffers would go while copies use them
    r.fake.resume("store")
    assert r.engine.wait(job, 5000)
    _ABANDONED.remove(r.engine)
    r.fake.stop()


@pytest.mark.parametrize("which", ["first piece", "seats", "movers"])
def test_what_cannot_be_unpinned_keeps_nothing_else_pinned(
    which: str, caplog: pytest.LogCaptureFixture
) -> None:
    r = Rig(SMALL, movers="triton", piece_bytes=3 * MIB)
    r.stored([0], [[0, 1, 2, 3]])
    pieces = [r.arena.data_ptr + i * 3 * MIB for i in range(3)]
    (seats,) = r.fake.registered.keys() - set(pieces)
    refused = {"first piece": pieces[-1], "seats": seats, "movers": 0}[which]
    unregister = r.fake.host_unregister

    def refuse(address: int) -> None:
        if address == refused:
            raise RuntimeError("planted: cudaHostUnregister")
        unregister(address)

    r.fake.host_unregister = refuse  # type: ignore[method-assign]
    if which == "movers":
        r.engine.movers.close = lambda timeout_s: 1 / 0  # type: ignore[assignment,method-assign,return-value]
    r.engine.close()
    assert r.fake.registered.keys() == ({refused} if refused else set())
    (line,) = [m for m in caplog.messages if "let go" in m]
    assert "ZeroDivisionError" in line if which == "movers" else "planted" in line
    _ABANDONED.remove(r.engine)
    r.fake.stop()
    r.arena.close()


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"slots": [64]}, "slot 64"),
        ({"offsets": [100]}, "multiple"),
        ({"offsets": [8 * MIB]}, "leaves the arena"),
        ({"offsets": [1 << 62]}, "leaves the arena"),
        ({"ids": [[0, 1, 2, 32]]}, "32 of 32"),
        ({"ids": [[0, 1, 2, -2]]}, "-2"),
        ({"ids": [list(range(8))]}, "do not make a shard"),
        ({"generations": [1, 2]}, "length"),
    ],
)
def test_out_of_range_is_refused_before_anything_is_queued(
    rig: Any, change: dict[str, Any], text: str
) -> None:
    r = rig()
    args = {"slots": [0], "generations": [1], "offsets": [0], "ids": [[0, 1, 2, 3]]} | change
    ids = args.pop("ids")
    with pytest.raises(ValueError, match=text):
        r.engine.submit_load(1, r.group, chunks(ids=ids, **args), 0, 1000)
    with pytest.raises(ValueError, match=text):
        r.engine.submit_store(1, r.group, chunks(ids=ids, **args), 0)
    assert r.engine.pending() == 0


def test_more_refusals(rig: Any) -> None:
    r = rig()
    one = chunks([0], r.begin([0]), [0], [[0, 1, 2, 3]])
    with pytest.raises(ValueError, match="group 1"):
        r.engine.submit_store(1, 1, one, 0)
    with pytest.raises(ValueError, match="deadline"):
        r.engine.submit_load(1, r.group, one, 0, -1)
    r.engine.submit_load(1, r.group, one, 0, 5000)
    with pytest.raises(ValueError, match="pending"):
        r.engine.submit_load(1, r.group, one, 0, 5000)
    with pytest.raises(ValueError, match="block ids"):
        r.engine.submit_store(2, r.group, chunks([0], [1], [0], [[0, 1, 2, -1]]), 0)
    with pytest.raises(ValueError, match="exceeds the arena"):
        r.engine.add_group([Fragment(4096, 4096, 4096)], 4, 16 * MIB)
    r.engine.submit_load(3, r.group, chunks([], [], [], np.empty((0, 4))), 0, 5000)
    assert r.done(3).status == OK
    r.engine.cancel(1)
    assert r.engine.wait(1, 0) and r.engine.wait(12345, 0)


# -------------------------------------------------------------------- many jobs


def test_many_jobs_interleaved(rig: Any) -> None:
    """Loads are submitted before their stores; every block ends with the bytes of its chunk."""
    layout = make_layout([2000, 300], False, 0, 256, 4)
    r = rig(layout, seed=3)
    before = r.fill()
    slots = list(range(24))
    generations = r.begin(slots)
    ids = np.arange(96).reshape(24, 4)
    rng = np.random.default_rng(0)
    loads = [
        r.load(slots[i : i + 4], generations[i : i + 4], ids[i : i + 4] + 128)
        for i in range(0, 24, 4)
    ]
    stores = [r.store([s], [generations[s]], ids[s : s + 1]) for s in rng.permutation(24).tolist()]
    for job in loads + stores:
        assert r.engine.wait(job, 10_000)
    assert {d.job: d.status for d in r.engine.poll()} == dict.fromkeys(loads + stores, OK)
    for b in range(96):
        assert layout.block(r.memory, b + 128) == layout.block(before, b)
