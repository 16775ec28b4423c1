"""Which load item is taken next, and what it costs to find that there is none."""

from __future__ import annotations

import random
import time

import numpy as np
import numpy.typing as npt
import pytest

from kvoffload.copy.base import LOAD, Fragment
from kvoffload.copy.cuda_job import UNSTARTED, Job, Reason
from kvoffload.copy.cuda_table import JobTable
from kvoffload.copy.runs import BlockGroup
from kvoffload.engines.vllm.meta import ChunkCopies
from kvoffload.types import SlotState

WINDOW = 64


class Slots:
    """The slot states, and how often they were asked for."""

    def __init__(self, slots: int) -> None:
        self.state = np.full(slots, int(SlotState.FILLING), np.uint8)
        self.calls = 0

    def states(
        self, slots: npt.NDArray[np.uint32], generations: npt.NDArray[np.uint64]
    ) -> npt.NDArray[np.uint8]:
        self.calls += 1
        return self.state[slots]


def load(number: int, slots: list[int]) -> Job:
    n = len(slots)
    copies = ChunkCopies(
        group=0,
        slots=np.array(slots, np.uint32),
        generations=np.ones(n, np.uint64),
        offsets=np.zeros(n, np.uint64),
        keys=bytes(16 * n),
        block_ids=np.zeros((n, 1), np.int32),
    )
    group = BlockGroup.build([Fragment(16384, 16384, 16384)], 1, 16384)
    job = Job(number, LOAD, group, copies, 0)
    job.allowed_ns = 1 << 60
    return job


class Rig:
    def __init__(self, loads: int, items: int) -> None:
        self.arena = Slots(loads * items)
        self.table = JobTable(self.arena)  # type: ignore[arg-type]
        self.jobs = [load(j, list(range(j * items, (j + 1) * items))) for j in range(loads)]
        for job in self.jobs:
            self.table.enter(job)
            self.table.begin(job)

    def pick(self) -> tuple[int, int] | None:
        with self.table._mu:
            task = self.table._pick()
        return None if task is None else (task[0].number, task[1])

    def want(self) -> tuple[int, int] | None:
        """What is taken next, the slow way."""
        for job in self.jobs:
            left = np.flatnonzero(job.state == UNSTARTED)
            for item in left[left < left[0] + WINDOW] if len(left) else ():
                if self.arena.state[job.slots[item]] != SlotState.FILLING:
                    return job.number, int(item)
        return None

    def ready(self, job: int, item: int) -> None:
        self.arena.state[self.jobs[job].slots[item]] = int(SlotState.READY)


def test_64_loads_that_wait_cost_one_call() -> None:
    rig = Rig(64, 100)
    assert rig.pick() is None
    for _ in range(10):
        rig.arena.calls = 0
        assert rig.pick() is None
        assert rig.arena.calls == 1
    rig.ready(50, 3)
    rig.arena.calls = 0
    assert rig.pick() == (50, 3) and rig.arena.calls == 1
    assert rig.pick() is None
    rig.arena.calls = 0
    assert rig.pick() is None and rig.arena.calls == 1


def test_the_oldest_load_costs_one_call_an_item() -> None:
    rig = Rig(64, 100)
    for item in range(100):
        rig.ready(0, item)
    assert rig.pick() == (0, 0)
    rig.arena.calls = 0
    assert [rig.pick() for _ in range(99)] == [(0, item) for item in range(1, 100)]
    assert rig.arena.calls == 99


@pytest.mark.parametrize("seed", range(6))
def test_the_same_item_is_taken_as_by_looking_at_each(seed: int) -> None:
    rng = random.Random(seed)
    rig = Rig(9, 150)
    taken = set()
    for _ in range(600):
        want = rig.want()
        assert rig.pick() == want
        if want is not None:
            taken.add(want)
        for _ in range(rng.choice([0, 0, 1, 3])):
            rig.ready(rng.randrange(9), min(149, int(rng.expovariate(1 / 40))))
        if rng.random() < 0.005:
            rig.table.cancel(rng.randrange(9))
        if rng.random() < 0.01:
            job = rng.choice(rig.jobs)
            running = [item for number, item in taken if number == job.number]
            if running:
                item = rng.choice(running)
                taken.discard((job.number, item))
                rig.table.end(job, item, rng.choice([Reason.NONE, Reason.CORRUPT]))
        if rng.random() < 0.05:
            rig.table.check()
    assert taken


@pytest.mark.parametrize("place", [0, 20])
def test_how_long_an_item_waited_is_told(place: int) -> None:
    rig = Rig(24, 3)
    for job in range(24):
        rig.ready(job, 1)
    assert [rig.pick() for _ in range(24)] == [(job, 1) for job in range(24)]
    assert rig.pick() is None
    time.sleep(0.02)
    rig.ready(place, 2)
    assert rig.pick() == (place, 2)
    assert rig.jobs[place].wait_ns >= 20_000_000
    rig.table.cancel(place)
    rig.table.end(rig.jobs[place], 1, Reason.NONE)
    rig.table.end(rig.jobs[place], 2, Reason.NONE)
    assert [d.wait_ns >= 20_000_000 for d in rig.table.take_done()] == [True]
