"""FaultyStore around the real chunk store and a real arena: every fault, switched while in use."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kvoffload._core import Arena, SegmentStore
from kvoffload.errors import ConfigError
from kvoffload.tiers.fault_jobs import GET, PUT, Job, Lane, Pace
from kvoffload.tiers.faulty import Fault, FaultOrder, FaultyStore
from kvoffload.tiers.null import NullStore
from kvoffload.types import SlotState, StoreResult
from tests.support.store_engines import io_engine  # noqa: F401  (every test runs on both engines)

NBYTES = 64 << 10
SLOTS = 32
OK = StoreResult.OK


def key_of(i: int) -> bytes:
    return hashlib.sha256(b"faulty %d" % i).digest()[:16]


class Rig:
    """A store under faults, an arena, and the bytes each key must have. Keys 0..7 are on disk."""

    def __init__(self, path: Path, control: Path | None = None) -> None:
        self.arena = Arena.create(SLOTS * NBYTES, SLOTS, 1, False)
        self.native = SegmentStore(str(path), 64 << 20)
        self.want = {i: np.random.default_rng(i).bytes(NBYTES) for i in range(SLOTS)}
        keys = b"".join(key_of(i) for i in range(8))
        self.native.put(1, keys, [self.want[i] for i in range(8)])
        assert self.native.wait(1, 5000)
        self.native.poll()
        self.store = FaultyStore(self.native, control)
        self.answers: dict[int, bytes] = {}
        self.ns: dict[int, int] = {}
        self._job = 1

    def args(self, slots: list[int], generations: list[int]) -> dict[str, Any]:
        return {
            "slots": np.array(slots, np.uint32),
            "generations": np.array(generations, np.uint64),
            "offsets": np.array(slots, np.uint64) * np.uint64(NBYTES),
            "nbytes": NBYTES,
        }

    def get(self, *keys: int) -> tuple[int, list[int]]:
        """Job and generations; key i is read into slot i."""
        self._job += 1
        generations = [self.arena.begin_fill(i, 1) for i in keys]
        args = self.args(list(keys), generations)
        self.store.get_slots(self._job, self.arena, b"".join(map(key_of, keys)), **args)
        return self._job, generations

    def put(self, *keys: int) -> int:
        """Write slots that a read has made READY."""
        self._job += 1
        args = self.args(list(keys), [self.arena.generation(i) for i in keys])
        depths = np.zeros(len(keys), np.uint32)
        joined = b"".join(map(key_of, keys))
        self.store.put_slots(self._job, self.arena, joined, namespace=1, depths=depths, **args)
        return self._job

    def poll(self) -> None:
        for done in self.store.poll():
            assert done.job not in self.answers, "answered twice"
            self.answers[done.job] = done.results
            self.ns[done.job] = done.ns
            if done.kind == GET and done.results[0] == OK:
                assert done.nbytes > 0

    def answer(self, job: int, timeout_s: float = 5.0) -> bytes:
        """The job's results, polled as the Manager does."""
        deadline = time.monotonic() + timeout_s
        while job not in self.answers:
            assert time.monotonic() < deadline, f"job {job} was not answered"
            self.store.wait(job, 20)
            self.poll()
            self.store.check()
        return self.answers[job]

    def right(self, *keys: int) -> bool:
        """READY slots have the right bytes; whether all of them are READY."""
        ready = [i for i in keys if self.arena.state(i) == SlotState.READY]
        for i in ready:
            assert bytes(self.arena.view(i * NBYTES, NBYTES)) == self.want[i]
        return ready == list(keys)


@pytest.fixture
def rig(tmp_path: Path) -> Iterator[Rig]:
    made = Rig(tmp_path / "s")
    yield made
    made.store.close()


def ready_and_new(rig: Rig) -> None:
    """Slot 0 holds key 0's bytes, and the store does not hold them."""
    assert rig.answer(rig.get(0)[0]) == bytes([OK])
    rig.native.delete(key_of(0))


class TestModes:
    def test_none_is_the_store_itself(self, rig: Rig) -> None:
        job, _ = rig.get(0, 1, 2)
        assert rig.answer(job) == bytes(3) and rig.right(0, 1, 2)
        rig.native.delete(key_of(1))
        assert rig.answer(rig.put(1)) == bytes([OK])
        assert rig.store.contains(key_of(1)) == b"\x01"
        assert rig.store.flush(5000) and rig.store.stats()["entries"] == 8
        assert rig.store.path == rig.native.path  # what is no method of ours is the store's own

    def test_slow_takes_the_factor(self, rig: Rig) -> None:
        for _ in range(20):
            assert rig.answer(rig.get(0, 1, 2, 3)[0]) == bytes(4)
        own = rig.store._pace[GET].seconds(4 * NBYTES)
        assert 0 < own < 0.2
        factor = max(20.0, 0.2 / own)  # well above the scheduler's noise
        rig.store.set(Fault.SLOW, factor)
        began = time.monotonic()
        first, (generation, *_) = rig.get(0, 1, 2, 3)
        second, _ = rig.get(4, 5, 6, 7)
        assert rig.arena.state(0) == SlotState.FILLING and rig.arena.generation(0) == generation
        assert rig.answer(first, 30) == bytes(4)
        once = time.monotonic() - began
        assert rig.answer(second, 30) == bytes(4) and rig.right(*range(8))
        twice = time.monotonic() - began
        assert once >= 0.9 * (factor - 1) * own
        assert twice >= 1.8 * (factor - 1) * own
        # What the planner learns is the slow rate.
        assert rig.ns[first] >= 0.9e9 * (factor - 1) * own

    def test_hung_holds_and_then_returns_all(self, rig: Rig) -> None:
        ready_and_new(rig)
        rig.store.set(Fault.HUNG)
        put, (get, generations) = rig.put(0), rig.get(1, 2)
        began = time.monotonic()
        assert not rig.store.wait(get, 60) and not rig.store.flush(60)
        assert time.monotonic() - began < 2
        assert not rig.store.poll()
        assert rig.arena.state(1) == SlotState.FILLING
        assert rig.store.contains(key_of(0)) == b"\x00"
        rig.store.check()
        rig.store.set(Fault.NONE)
        assert rig.answer(get) == bytes(2) and rig.answer(put) == bytes([OK])
        assert rig.right(1, 2) and rig.arena.generation(1) == generations[0]
        assert rig.ns[get] > 1e8  # the hang counts as its time

    def test_hung_withholds_what_was_in_flight(self, rig: Rig) -> None:
        rig.native.inject("slow_read_ms", 60)
        job, _ = rig.get(0)
        rig.store.set(Fault.HUNG)
        rig.native.inject("slow_read_ms", 0)
        assert not rig.store.wait(job, 150) and not rig.store.poll()
        rig.store.set(Fault.NONE)
        assert rig.answer(job) == bytes([OK]) and rig.right(0)

    def test_native_reads_hang_in_flight(self, rig: Rig) -> None:
        """Reads queued natively behind the ones on the disk do not fill their slots either."""
        rig.native.inject("hang_read", 1)  # the disk stands still, the wrapper does not know yet
        job, _ = rig.get(0, 1)
        rig.store.set(Fault.HUNG)
        time.sleep(0.1)
        assert rig.arena.state(0) == rig.arena.state(1) == SlotState.FILLING
        rig.store.set(Fault.NONE)
        assert rig.answer(job) == bytes(2) and rig.right(0, 1)

    def test_corrupt_bytes_are_seen(self, rig: Rig) -> None:
        rig.store.set(Fault.CORRUPT)
        job, _ = rig.get(0, 1, 2)
        assert rig.answer(job) == bytes([StoreResult.CORRUPT]) * 3
        assert [rig.arena.state(i) for i in range(3)] == [SlotState.FAILED] * 3
        assert rig.native.stats()["corrupt"] == 3  # found by the checksum, not said by us
        rig.store.set(Fault.NONE)
        assert rig.answer(rig.get(4)[0]) == bytes([OK]) and rig.right(4)

    @pytest.mark.parametrize(
        ("fault", "put", "get"),
        [
            (Fault.FULL, StoreResult.NO_SPACE, OK),
            (Fault.READ_ONLY, StoreResult.IO_ERROR, OK),
            (Fault.GONE, StoreResult.IO_ERROR, StoreResult.IO_ERROR),
        ],
    )
    def test_answers(self, rig: Rig, fault: Fault, put: StoreResult, get: StoreResult) -> None:
        ready_and_new(rig)
        rig.store.set(fault)
        assert rig.answer(rig.put(0)) == bytes([put])
        assert rig.store.contains(key_of(0)) == b"\x00"
        assert rig.arena.state(0) == SlotState.READY  # a put leaves its slot alone
        assert rig.answer(rig.get(1)[0]) == bytes([get])
        assert rig.arena.state(1) == (SlotState.READY if get is OK else SlotState.FAILED)
        rig.store.set(Fault.NONE)
        assert rig.answer(rig.put(0)) == bytes([OK])
        assert rig.answer(rig.get(1)[0]) == bytes([OK]) and rig.right(1)

    def test_what_hung_meets_the_next_fault(self, rig: Rig) -> None:
        rig.store.set(Fault.HUNG)
        job, _ = rig.get(1)
        rig.store.set(Fault.GONE)
        assert rig.answer(job) == bytes([StoreResult.IO_ERROR])
        assert rig.arena.state(1) == SlotState.FAILED

    def test_a_store_without_faults_of_its_own(self) -> None:
        store, arena = FaultyStore(NullStore()), Arena.create(SLOTS * NBYTES, SLOTS, 1, False)
        store.set(Fault.CORRUPT)
        generation = np.array([arena.begin_fill(0, 1)], np.uint64)
        zero = np.zeros(1, np.uint32)
        store.get_slots(1, arena, key_of(0), zero, generation, zero.astype(np.uint64), NBYTES)
        assert [d.results for d in store.poll()] == [bytes([StoreResult.CORRUPT])]
        assert arena.state(0) == SlotState.FAILED
        store.close()


class TestClose:
    @pytest.mark.parametrize("fault", list(Fault))
    def test_is_bounded_and_answers_what_was_held(self, rig: Rig, fault: Fault) -> None:
        inflight, _ = rig.get(0)
        rig.store.set(fault, 1e6)
        held, _ = rig.get(1)
        began = time.monotonic()
        rig.store.close(2000)
        assert time.monotonic() - began < 4
        rig.store.close()
        rig.poll()
        assert {inflight, held} <= rig.answers.keys()
        if fault in (Fault.SLOW, Fault.HUNG):
            assert rig.answers[held] == bytes([StoreResult.DROPPED])
            assert rig.arena.state(1) == SlotState.FAILED
        rig.store.set(Fault.HUNG)  # a closed store has no faults
        assert rig.store.order.fault is Fault.NONE
        assert not rig.store._thread.is_alive()

    def test_a_held_job_that_is_refused_is_answered(self, rig: Rig) -> None:
        rig.store.set(Fault.HUNG)
        job, _ = rig.get(1)
        rig.native.close()
        rig.store.set(Fault.NONE)
        assert rig.answer(job) == bytes([StoreResult.IO_ERROR])
        assert rig.arena.state(1) == SlotState.FAILED


def eventually(true: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 5
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.01)


class TestControl:
    def test_the_file_rules_and_the_status_answers(
        self, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        control = tmp_path / "fault"
        rig = Rig(tmp_path / "s", control)

        def status() -> dict[str, Any]:
            made = tmp_path / "fault.status"
            return json.loads(made.read_text()) if made.exists() else {}

        def write(text: str) -> None:
            part = tmp_path / "part"
            part.write_text(text)
            part.replace(control)

        eventually(lambda: status().get("fault") == "none")
        write('{"fault": "gone"}')
        eventually(lambda: status()["fault"] == "gone")
        assert rig.answer(rig.get(0)[0]) == bytes([StoreResult.IO_ERROR])
        eventually(lambda: status()["bad_gets"] == 1)
        assert status()["get_worked_s"] is None
        with caplog.at_level(logging.WARNING):
            write("{")
            time.sleep(0.2)
            write('{"fault": "on fire"}')
            time.sleep(0.2)
        assert len(caplog.records) == 1 and rig.store.order.fault is Fault.GONE
        write('{"fault": "slow", "factor": 2}')
        eventually(lambda: rig.store.order == FaultOrder(Fault.SLOW, 2.0))
        os.unlink(control)
        eventually(lambda: status()["fault"] == "none")
        assert rig.answer(rig.get(0)[0]) == bytes([OK])
        eventually(lambda: status()["get_worked_s"] is not None)
        assert 0 <= status()["get_worked_s"] < 5 and status()["put_worked_s"] is None
        since = status()["since"]
        write('{"fault": "none"}')  # written again: the clock of "worked" starts anew
        eventually(lambda: status()["since"] > since)
        assert status()["get_worked_s"] is None
        rig.store.close()

    @pytest.mark.parametrize(
        ("text", "named"),
        [
            ("x", "not JSON"),
            ("[]", "give"),
            ('{"slow": 1}', "give"),
            ('{"fault": "odd"}', "fault='odd'"),
            ('{"fault": "slow", "factor": 0.5}', "factor=0.5"),
            ('{"fault": "slow", "factor": "x"}', "factor='x'"),
            ('{"fault": "slow", "factor": Infinity}', "factor=inf"),
        ],
    )
    def test_bad_orders_are_named(self, text: str, named: str) -> None:
        with pytest.raises(ConfigError, match=named):
            FaultOrder.parse(text)


class TestPacing:
    def test_reads_overtake_writes_which_keep_what_they_waited(self) -> None:
        def job(number: int, kind: int) -> Job:
            return Job(number, kind, 1, 1, lambda: None, lambda: None, wait_left=10.0)

        lane, write, read = Lane(), job(1, PUT), job(2, GET)
        assert lane.front([write], 100.0) == (write, 10.0)
        assert lane.front([write, read], 104.0) == (read, 10.0)
        assert lane.front([write, read], 114.0) == (read, 0.0)
        lane.leaves(read, 1.0, 114.0)
        assert lane.front([write], 114.0) == (write, 7.0)  # 6 left, after the read's own second

    def test_jobs_side_by_side_count_their_time_once(self) -> None:
        pace = Pace()
        assert pace.seconds(10**9) == 1.0  # a guess
        for begin in (10.0, 10.0, 11.0):
            pace.add(begin, begin + 1.0, 100)
        assert pace.seconds(100) == pytest.approx(2 / 3, rel=0.2)


@pytest.mark.parametrize("seed", range(2))
def test_no_job_is_lost_or_answered_twice(tmp_path: Path, seed: int) -> None:
    """Random faults, reads and writes from one thread, switches from another; the model is a dict."""
    rng = np.random.default_rng(seed)
    rig = Rig(tmp_path / "s")
    stop = threading.Event()

    def switch() -> None:
        other = np.random.default_rng(seed + 100)
        while not stop.is_set():
            rig.store.set(list(Fault)[other.integers(len(Fault))], 3.0)
            time.sleep(0.01 * other.random())

    switcher = threading.Thread(target=switch)
    switcher.start()
    free, reading, writing = set(range(8)), dict[int, int](), dict[int, int]()
    opened = 0
    deadline = time.monotonic() + 2
    while time.monotonic() < deadline:
        if free and rng.random() < 0.5:
            at = free.pop()
            opened += 1
            if rig.arena.state(at) == SlotState.READY and rng.random() < 0.7:
                writing[rig.put(at)] = at
            else:
                reading[rig.get(at)[0]] = at
        rig.poll()
        rig.store.check()
        for jobs in (reading, writing):
            for job in [j for j in jobs if j in rig.answers]:
                at = jobs.pop(job)
                free.add(at)
                if jobs is reading:  # a slot is READY exactly where the answer says so
                    assert (rig.answers[job][0] == OK) == rig.right(at)
                    assert rig.arena.state(at) != SlotState.FILLING
        time.sleep(0.001)
    stop.set()
    switcher.join()
    rig.store.set(Fault.NONE)
    for job in [*reading, *writing]:
        rig.answer(job)
    rig.poll()
    assert opened == len(rig.answers) and opened > 50
    assert {r for a in rig.answers.values() for r in a} > {OK, StoreResult.IO_ERROR}
    assert not rig.store._held and not rig.store._sent
    assert rig.native.verify()["bad"] == 0
    rig.store.close()
