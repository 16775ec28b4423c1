"""The worker half by itself: attaching, and waiting for stores at the fence."""

from __future__ import annotations

from typing import Any

import pytest

from kvoffload.copy.base import Fragment
from kvoffload.engines.vllm.meta import ArenaAddress, StepOrders
from kvoffload.engines.vllm.worker import WorkerHalf
from kvoffload.types import CacheLayout, GroupKind, GroupLayout

LAYOUT = CacheLayout((GroupLayout(0, GroupKind.FULL, 16, 2, 4096, 1),), 16, 16, 1)
FRAGMENTS = [Fragment(4096, 4096, 4096)]


class Arena:
    attached = False

    def set_attached(self, rank: int) -> None:
        self.attached = True


class Engine:
    """Remembers what was done to it."""

    def __init__(self) -> None:
        self.closed = 0
        self.refuses: Exception | None = None

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
