"""The worker half by itself: attaching, and waiting for stores at the fence."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from kvoffload.copy.base import Fragment
from kvoffload.engines.vllm import worker as worker_module
from kvoffload.engines.vllm.meta import (
    CALM,
    ArenaAddress,
    ChunkCopies,
    LoadOrder,
    StepOrders,
    StoreOrder,
)
from kvoffload.engines.vllm.running import LONG_ROUNDS, ROUND_MS
from kvoffload.engines.vllm.worker import IDLE_WAIT_MS, SHARED_WAIT_MS, WorkerHalf
from kvoffload.types import CacheLayout, GroupKind, GroupLayout

LAYOUT = CacheLayout((GroupLayout(0, GroupKind.FULL, 16, 2, 4096, 1),), 16, 16, 1)
FRAGMENTS = [Fragment(4096, 4096, 4096)]


class Arena:
    attached = False

    def set_attached(self, rank: int) -> None:
        self.attached = True


class Engine:
    """Remembers what was done to it. In its own time a store's forward ends at ``begins_ms``, its copy
    ``copy_ms`` later; of a store that is cancelled nothing is left, unless it is ``stuck``."""

    def __init__(self, begins_ms: int = 0, copy_ms: int = 0, stuck_ms: int = 0) -> None:
        self.closed = self.now_ms = 0
        self.begins_ms, self.ends_ms = begins_ms, begins_ms + copy_ms
        self.stuck_ms = stuck_ms
        self.cancelled_ms: int | None = None
        self.refuses: Exception | None = None

    def submit_store(self, *args: Any) -> None:
        """It takes its time."""

    def submit_load(self, *args: Any) -> None:
        """So does this."""

    def poll(self) -> list[Any]:
        return []

    def wait(self, job: int, timeout_ms: int) -> bool:
        return self._until(self.ends_ms, timeout_ms)

    def wait_begun(self, job: int, timeout_ms: int) -> bool:
        return self._until(self.begins_ms, timeout_ms)

    def _until(self, at_ms: int, timeout_ms: int) -> bool:
        self.now_ms = max(self.now_ms, min(at_ms, self.now_ms + timeout_ms))
        return self.now_ms >= at_ms

    def cancel(self, job: int) -> None:
        self.cancelled_ms = self.now_ms
        self.ends_ms = self.now_ms + self.stuck_ms

    def add_group(self, *args: Any) -> int:
        if self.refuses is not None:
            raise self.refuses
        return 0

    def close(self) -> None:
        self.closed += 1


def half(engine: Any, arena: Any) -> WorkerHalf:
    return WorkerHalf(LAYOUT, 0, attach=lambda *_: arena, make_engine=lambda _: engine)


def bind(worker: WorkerHalf) -> None:
    worker.bind(StepOrders(arena=ArenaAddress("/proc/1/fd/1", 1, LAYOUT)))
    worker.clear()


def test_an_engine_that_is_made_is_used() -> None:
    engine, arena = Engine(), Arena()
    worker = half(engine, arena)
    worker.register_group(0, FRAGMENTS, 4)
    bind(worker)
    assert arena.attached and not engine.closed
    worker.shutdown()
    assert engine.closed == 1


@pytest.mark.parametrize("how", ["a group without blocks", "a group that does not fit"])
def test_an_engine_that_cannot_be_used_is_closed(how: str) -> None:
    """Its threads and its pinned memory would go on for as long as the process."""
    engine, arena = Engine(), Arena()
    worker = half(engine, arena)
    if how == "a group that does not fit":
        worker.register_group(0, FRAGMENTS, 4)
        engine.refuses = ValueError("shard_bytes")
    bind(worker)
    assert engine.closed == 1 and not arena.attached
    report = worker.take_report()
    assert report is not None and report.attach_error
    bind(worker)
    worker.shutdown()
    assert engine.closed == 1


@pytest.mark.parametrize("wait_ms", [IDLE_WAIT_MS, SHARED_WAIT_MS])
def test_a_step_without_a_forward_waits_for_a_load(wait_ms: int) -> None:
    """Not for long where the other ranks of a group wait for this one's step."""
    engine, arena = Engine(0, 10_000), Arena()
    worker = WorkerHalf(
        LAYOUT, 0, attach=lambda *_: arena, make_engine=lambda _: engine, idle_wait_ms=wait_ms
    )
    worker.register_group(0, FRAGMENTS, 4)
    bind(worker)
    one = [np.array([0], t) for t in (np.uint32, np.uint64, np.uint64)]
    copies = ChunkCopies(0, *one, bytes(16), np.array([[0, 1]], np.int32))
    worker.bind(StepOrders(loads=[LoadOrder(1, "r", 60_000, [copies])], idle=True))
    worker.start_load_kv()
    worker.transfer_results()
    assert engine.now_ms == wait_ms and not worker.guard.errors


# -------------------------------------------------------------------- a forward that raises


class Slots(Arena):
    """Notes the slots that are given up."""

    def __init__(self) -> None:
        self.failed: list[tuple[int, int]] = []

    def fail(self, slot: int, generation: int) -> None:
        self.failed.append((slot, generation))


class Stores(Engine):
    """Counts what is to be stored."""

    stored = 0

    def submit_store(self, *args: Any) -> None:
        self.stored += 1


def storing(arena: Any, engine: Engine) -> tuple[WorkerHalf, StepOrders]:
    """A rank that is attached, and a step that stores one chunk in slot 3."""
    worker = half(engine, arena)
    worker.register_group(0, FRAGMENTS, 4)
    bind(worker)
    slot, generation = np.array([3], np.uint32), np.array([7], np.uint64)
    blocks = np.array([[0, 1]], np.int32)
    copies = ChunkCopies(0, slot, generation, np.array([0], np.uint64), bytes(16), blocks)
    return worker, StepOrders(stores=[StoreOrder(1, [copies])])


def step(worker: WorkerHalf, orders: StepOrders, error: BaseException | None) -> None:
    """As vLLM's ``_get_kv_connector_output``: its hooks are in a ``finally``."""
    worker.bind(orders)
    try:
        if error is not None:
            raise error
    finally:
        worker.start_load_kv()
        worker.wait_for_save()
        worker.clear()


@pytest.mark.parametrize("error", [MemoryError(), SystemExit(1)])
def test_what_a_forward_that_raised_left_is_not_stored(error: BaseException) -> None:
    """Its layers from there on hold whatever was in the blocks before, and the flush at shutdown
    would write that down for the next start."""
    arena, engine = Slots(), Stores()
    worker, orders = storing(arena, engine)
    with pytest.raises(type(error)):
        step(worker, orders, error)
    assert arena.failed == [(3, 7)] and engine.stored == 0 and not worker.guard.errors
    later, orders = storing(arena, engine)
    step(later, orders, None)
    assert engine.stored == 1


@pytest.mark.parametrize("calm", [False, True])
def test_what_comes_after_a_forward_that_raised_is_not_stored_either(calm: bool) -> None:
    """vLLM's worker answers FAILURE and takes the next step, which was sent before that: it computes
    over the garbage. A step without orders that raises counts, too."""
    arena, engine = Slots(), Stores()
    worker, orders = storing(arena, engine)
    with pytest.raises(MemoryError):
        step(worker, CALM if calm else StepOrders(), MemoryError())
    step(worker, orders, None)
    assert arena.failed == [(3, 7)] and engine.stored == 0


def test_a_step_that_raised_where_vllm_has_no_finally() -> None:
    """Its runner V2, and what it defers to after the drafter: no hook comes after ``bind``."""
    arena, engine = Slots(), Stores()
    worker, orders = storing(arena, engine)
    worker.bind(orders)
    worker.bind(StepOrders())
    assert arena.failed == [(3, 7)]  # nobody waits for it
    worker.wait_for_save()
    worker.clear()
    again = storing(arena, engine)[1]
    step(worker, again, None)
    assert arena.failed == [(3, 7)] * 2 and engine.stored == 0


def test_an_engine_that_runs_while_an_exception_is_handled_stores() -> None:
    """An LLM that is used inside somebody's ``except`` block."""
    arena, engine = Slots(), Stores()
    worker, orders = storing(arena, engine)
    try:
        raise KeyError("of the caller")
    except KeyError:
        step(worker, orders, None)
    assert engine.stored == 1 and not arena.failed


def test_vllms_own_order_of_the_hooks_after_a_forward_that_raised(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The same through vLLM's context manager and our connector."""
    mixin = pytest.importorskip("vllm.v1.worker.kv_connector_model_runner_mixin")
    from kvoffload.engines.vllm import compat
    from kvoffload.engines.vllm.connector import KVOffloadConnector, StepMetadata

    arena, engine = Slots(), Stores()
    worker, orders = storing(arena, engine)
    connector = KVOffloadConnector.__new__(KVOffloadConnector)
    connector._scheduler = connector._worker = connector._half = None
    connector._connector_metadata = None
    connector._rank, connector._idle, connector._bridge = worker, False, compat.Bridge()
    monkeypatch.setattr(mixin, "get_kv_transfer_group", lambda: connector)
    monkeypatch.setattr(mixin, "get_forward_context", lambda: None)
    output = SimpleNamespace(
        has_sync_kv_loads=False, finished_req_ids=set(), kv_connector_metadata=StepMetadata(orders)
    )
    hooks = mixin.KVConnectorModelRunnerMixin._get_kv_connector_output
    with pytest.raises(MemoryError), hooks(output):
        raise MemoryError
    assert arena.failed == [(3, 7)] and engine.stored == 0 and not worker.guard.errors


# -------------------------------------------------------------------- the fence


@pytest.fixture(autouse=True)
def fence_ms(monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr(worker_module, "FENCE_MS", 50)  # the step harness sets its own
    return 50


def preempt(engine: Engine) -> None:
    """A store, and then a step that hands its blocks on."""
    worker = half(engine, Arena())
    worker.register_group(0, FRAGMENTS, 4)
    bind(worker)
    ids = np.array([[0, 1]], np.int32)
    one = [np.array([0], t) for t in (np.uint32, np.uint64, np.uint64)]
    worker.bind(StepOrders(stores=[StoreOrder(7, [ChunkCopies(0, *one, bytes(16), ids)])]))
    worker.wait_for_save()
    worker.clear()
    worker.handle_preemptions(StepOrders(fence=[7]))
    assert not worker.guard.errors
    worker.check()


@pytest.mark.parametrize("begins_ms", [0, 40, 700, 2500])
def test_a_store_at_the_fence_is_given_its_time_after_the_forward(
    begins_ms: int, fence_ms: int, caplog: pytest.LogCaptureFixture
) -> None:
    engine = Engine(begins_ms, fence_ms - 1)
    preempt(engine)
    assert engine.cancelled_ms is None and engine.now_ms == begins_ms + fence_ms - 1
    slow = Engine(begins_ms, 10_000)
    preempt(slow)
    assert slow.cancelled_ms == slow.now_ms == begins_ms + fence_ms
    assert not caplog.messages


@pytest.mark.parametrize("what", ["forward", "copy"])
def test_a_long_wait_at_the_fence_is_told_once(what: str, caplog: pytest.LogCaptureFixture) -> None:
    long_ms = 10 * LONG_ROUNDS * ROUND_MS
    engine = Engine(long_ms) if what == "forward" else Engine(0, 10_000, stuck_ms=long_ms)
    preempt(engine)
    assert engine.now_ms >= long_ms
    (line,) = caplog.messages
    assert "goes on waiting" in line and ("compute" in line) == (what == "forward")
