"""When a job of the CUDA engine begins: not before the forward that it was submitted behind has ended.

Over the fake CUDA of tests/support/cuda.py; see test_cuda_engine.py for what that shows and does not.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("kvoffload._core")

from kvoffload import _core
from kvoffload.copy.base import CANCELLED, DEADLINE, FAILED, OK
from kvoffload.copy.cuda_job import Reason
from kvoffload.engines.vllm.running import settle
from tests.support.cuda_rig import SMALL, Rig, soon

IDS = [[0, 1, 2, 3]]
TO = [[4, 5, 6, 7]]
FORWARD_S = 0.5


@pytest.fixture
def rig() -> Iterator[Callable[..., Rig]]:
    made: list[Rig] = []

    def make(**kwargs: Any) -> Rig:
        made.append(Rig(SMALL, **kwargs))
        return made[-1]

    yield make
    for r in made:
        r.close()


class Forward:
    """Something long on the compute stream."""

    def __init__(self, r: Rig) -> None:
        self._fake, self._gate = r.fake, threading.Event()
        r.fake.compute(lambda: None, self._gate)

    def end(self) -> None:
        self._gate.set()
        self._fake.poke()


def test_a_loads_deadline_counts_from_the_end_of_the_forward(rig: Any) -> None:
    r = rig()
    before, generations = r.fill(), r.stored([0], IDS)
    forward = Forward(r)
    job = r.load([0], generations, TO, deadline_ms=200)
    time.sleep(0.25)
    assert r.engine.poll() == [] and not r.engine.wait_begun(job, 0)
    forward.end()
    assert r.done(job).status == OK
    assert r.layout.block(r.memory, 4) == r.layout.block(before, 0)
    assert r.engine.wait_begun(job, 0)  # unknown by now


def test_a_load_that_has_begun_is_given_its_deadline_and_no_more(rig: Any) -> None:
    r = rig()
    generations = r.begin([0])  # NVMe does not bring it
    forward = Forward(r)
    job = r.load([0], generations, TO, deadline_ms=80)
    time.sleep(0.1)
    forward.end()
    assert r.engine.wait_begun(job, 5000)
    start = time.monotonic()
    done = r.done(job)
    assert 0.04 <= time.monotonic() - start < 5
    assert (done.status, done.reason) == (DEADLINE, Reason.DEADLINE)


def test_the_time_of_a_copy_has_no_forward_in_it(rig: Any) -> None:
    """The planner learns DRAM's rate from it."""
    r = rig()
    generations = r.stored([0], IDS) + r.begin([1])
    forward = Forward(r)
    jobs = [r.load([0], generations[:1], TO), r.store([1], generations[1:], IDS)]
    time.sleep(FORWARD_S)
    assert not any(r.engine.wait_begun(job, 0) for job in jobs)
    forward.end()
    for job in jobs:
        assert r.engine.wait(job, 10_000)
    done = r.engine.poll()
    assert [d.status for d in done] == [OK, OK]
    assert all(0 <= d.copy_ns < 0.8 * FORWARD_S * 1e9 for d in done)
    assert all(d.wait_ns == 0 for d in done)


def test_a_load_does_not_count_the_queue_in_front_of_it(rig: Any) -> None:
    r = rig()
    generations = r.stored([0, 1], np.arange(8).reshape(2, 4))
    r.fake.pause("load")
    jobs = [r.load([s], generations[s : s + 1], TO) for s in (0, 1)]
    soon(lambda: r.fake.queued("load", "event") == 2)
    time.sleep(FORWARD_S)
    r.fake.resume("load")
    for job in jobs:
        assert r.engine.wait(job, 10_000)
    first, second = (d.copy_ns / 1e9 for d in r.engine.poll())
    assert second < FORWARD_S / 2 < FORWARD_S <= first


def test_loads_begin_in_the_order_in_which_they_came(rig: Any) -> None:
    r = rig()
    forward, generations = Forward(r), r.begin([0, 1, 2])
    jobs = [r.load([s], generations[s : s + 1], TO) for s in range(3)]
    forward.end()
    assert all(r.engine.wait_begun(job, 5000) for job in reversed(jobs))
    assert [job.number for job in r.engine._table._loads] == jobs
    for job in jobs:
        r.engine.cancel(job)


def test_a_load_that_waits_for_a_forward_is_cancelled_at_once(rig: Any) -> None:
    r = rig()
    generations = r.stored([0], IDS)
    before, forward = r.fill(3), Forward(r)
    job = r.load([0], generations, TO)
    time.sleep(0.02)
    r.engine.cancel(job)
    (done,) = r.engine.poll()
    assert (done.job, done.status, done.copy_ns) == (job, CANCELLED, 0)
    assert r.engine.wait_begun(job, 0) and r.engine.pending() == 0
    after = r.load([0], generations, [[8, 9, 10, 11]])
    forward.end()
    assert r.done(after).status == OK
    assert r.memory[4 * 3000 : 8 * 3000].tobytes() == before[4 * 3000 : 8 * 3000].tobytes()


def test_close_does_not_wait_for_the_forward_of_a_load() -> None:
    r = Rig(SMALL)
    generations = r.stored([0], IDS)
    forward = Forward(r)
    job = r.load([0], generations, TO)
    start = time.monotonic()
    r.engine.close()
    assert time.monotonic() - start < 3
    assert [(d.job, d.status) for d in r.engine.poll()] == [(job, CANCELLED)]
    before = r.memory.copy()
    forward.end()
    soon(lambda: not [t for t in threading.enumerate() if t.name.startswith("kvo-cuda")])
    assert np.array_equal(r.memory, before)
    r.close()


@pytest.mark.parametrize("kind", ["load", "store"])
def test_an_event_that_cannot_be_waited_for_fails_its_job_only(rig: Any, kind: str) -> None:
    r = rig()
    generations = r.stored([0], IDS) + r.begin([1])
    forward, synchronize = Forward(r), r.fake.synchronize

    def lost(event: Any) -> None:
        if event.stream == "compute" and not event.complete:  # not that of the store before
            raise RuntimeError("planted: device lost")
        synchronize(event)

    r.fake.synchronize = lost
    if kind == "load":
        job = r.load([0], generations[:1], TO)
        done = r.done(job)
        assert (done.status, done.failed_item, done.reason) == (FAILED, 0, Reason.DEVICE)
    else:  # what waits on the device goes on
        job = r.store([1], generations[1:], IDS)
        assert r.engine.wait_begun(job, 5000)
    assert r.engine.errors == 1
    r.fake.synchronize = synchronize
    forward.end()
    if kind == "store":
        r.done(job)
        assert r.arena.state(1) in (_core.READY, _core.FAILED)
    assert r.done(r.load([0], generations[:1], TO)).status == OK


def test_a_store_at_the_fence_loses_nothing_to_the_forward_it_waits_for(rig: Any) -> None:
    """Item 0 fills what the driver takes until the forward has ended; the others cannot be enqueued."""
    driver = threading.Event()
    r = rig(driver=driver)
    forward, generations = Forward(r), r.begin([0, 1, 2])
    job = r.store([0, 1, 2], generations, np.arange(12).reshape(3, 4))

    def end() -> None:
        forward.end()
        driver.set()

    threading.Timer(2 * FORWARD_S, end).start()
    settle(r.engine, job, int(FORWARD_S * 1000), 0)
    assert r.done(job).status == OK
    assert [r.arena.state(s) for s in range(3)] == [_core.READY] * 3
