"""Deadlines and cancellation of the chunk store's jobs, on a disk that hangs."""

from __future__ import annotations

import hashlib
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from kvoffload._core import Arena, SegmentStore
from kvoffload.types import SlotState, StoreResult
from tests.support.store_engines import io_engine  # noqa: F401  (every test runs on both engines)

KIB = 1 << 10
MIB = 1 << 20
CHUNK = 16 * KIB
GETS = 60  # more than an engine starts at once
OK, DROPPED = bytes([StoreResult.OK]), bytes([StoreResult.DROPPED])


def key_of(i: int) -> bytes:
    return hashlib.sha256(b"cancel %d" % i).digest()[:16]


def payload_of(i: int) -> bytes:
    return np.random.default_rng(i).bytes(CHUNK)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "store"


@pytest.fixture
def store(path: Path) -> Iterator[SegmentStore]:
    """Holds ``GETS`` chunks; no segment is open."""
    first = SegmentStore(str(path), 32 * MIB, 2 * MIB, threads=2)
    for i in range(GETS):  # one by one: their reads are requests of their own
        put(first, 1, i)
        assert first.wait(1, 10_000) and first.poll()[0].results == OK
    first.close()
    store = SegmentStore(str(path), 32 * MIB, 2 * MIB, threads=2)
    yield store
    store.inject("hang_read", 0)
    store.inject("slow_read_ms", 0)
    store.close()


def put(store: SegmentStore, job: int, *numbers: int, deadline_ms: int = 0) -> None:
    keys = b"".join(map(key_of, numbers))
    store.put(job, keys, [payload_of(i) for i in numbers], 0, deadline_ms)


def hang(store: SegmentStore, deadline_ms: int = 0) -> list[bytearray]:
    """Jobs 0 to GETS-1 read one chunk each and get nowhere; more wait than have started."""
    store.inject("hang_read", 1)
    buffers = [bytearray(CHUNK) for _ in range(GETS)]
    for i in range(GETS):
        store.get(i, key_of(i), [buffers[i]], deadline_ms)
    if not deadline_ms:
        time.sleep(0.3)  # until both threads hang: a put that has started goes on
    return buffers


def results(store: SegmentStore, jobs: range | list[int]) -> dict[int, bytes]:
    """Of the jobs, once all of them are done."""
    for job in jobs:
        assert store.wait(job, 10_000), job
    return {done.job: done.results for done in store.poll()}


class TestDeadline:
    def test_what_has_not_started_ends_in_time(self, store: SegmentStore) -> None:
        begin = time.monotonic()
        buffers = hang(store, deadline_ms=100)
        assert store.wait(GETS - 1, 10_000)
        assert 0.09 < time.monotonic() - begin < 3
        ended = {done.job: done.results for done in store.poll()}
        assert set(ended.values()) == {DROPPED} and len(ended) >= GETS // 3
        assert len(ended) < GETS, "what has started goes on"
        store.check()
        store.inject("hang_read", 0)
        rest = results(store, [i for i in range(GETS) if i not in ended])
        assert set(rest.values()) == {OK}
        for i in range(GETS):
            assert buffers[i] == (payload_of(i) if i in rest else bytes(CHUNK))
        assert store.stats()["bytes_read"] == len(rest) * CHUNK  # the others: no I/O at all
        assert store.stats()["dropped"] == len(ended)
        store.check()

    def test_polling_is_enough(self, store: SegmentStore) -> None:
        hang(store, deadline_ms=50)
        time.sleep(0.1)
        assert len(store.poll()) >= GETS // 3

    def test_waiting_for_any_ends_with_the_first_deadline(self, store: SegmentStore) -> None:
        hang(store)
        store.get(GETS, key_of(1), [bytearray(CHUNK)], 80)
        begin = time.monotonic()
        assert store.wait_any(10_000) and 0.07 < time.monotonic() - begin < 3
        assert [(done.job, done.results) for done in store.poll()] == [(GETS, DROPPED)]

    def test_a_deadline_that_is_kept(self, store: SegmentStore) -> None:
        store.get(1, key_of(1), [buffer := bytearray(CHUNK)], 5000)
        assert results(store, [1]) == {1: OK} and buffer == payload_of(1)
        put(store, 2, 100, deadline_ms=5000)
        assert results(store, [2]) == {2: OK} and store.contains(key_of(100)) == b"\x01"

    def test_puts(self, store: SegmentStore) -> None:
        hang(store)
        put(store, 100, 100, 101, deadline_ms=80)
        assert store.wait(100, 10_000)
        assert [d.results for d in store.poll() if d.job == 100] == [DROPPED * 2]
        assert store.queued_bytes() == 0
        store.inject("hang_read", 0)
        results(store, range(GETS))
        assert store.contains(key_of(100) + key_of(101)) == bytes(2)
        put(store, 101, 100)
        assert results(store, [101]) == {101: OK}
        store.check()

    @pytest.mark.parametrize("bad", [-1, 86_400_001])
    def test_bad_values(self, store: SegmentStore, bad: int) -> None:
        with pytest.raises(ValueError, match="deadline_ms must be 0"):
            store.get(1, key_of(1), [bytearray(CHUNK)], bad)
        with pytest.raises(ValueError, match="deadline_ms must be 0"):
            put(store, 1, 100, deadline_ms=bad)


class TestCancel:
    def test_ends_what_has_not_started(self, store: SegmentStore) -> None:
        buffers = hang(store)
        ended = [i for i in range(GETS) if store.cancel(i) == 1]
        assert GETS // 3 <= len(ended) < GETS
        assert results(store, ended) == dict.fromkeys(ended, DROPPED)
        assert store.cancel(ended[0]) == 0 and store.cancel(12345) == 0
        for i in ended:  # theirs again
            buffers[i][:] = b"\xee" * CHUNK
        store.inject("hang_read", 0)
        rest = [i for i in range(GETS) if i not in ended]
        assert set(results(store, rest).values()) == {OK}
        assert all(buffers[i] == b"\xee" * CHUNK for i in ended)
        store.check()

    def test_slots_fail_at_once(self, store: SegmentStore) -> None:
        hang(store)
        arena = Arena.create(2 * MIB, 4, 1, False)
        slots = np.arange(4, dtype=np.uint32)
        generations = np.array([arena.begin_fill(i, 1) for i in range(4)], dtype=np.uint64)
        offsets = np.arange(4, dtype=np.uint64) * CHUNK
        keys = b"".join(map(key_of, range(4)))
        store.get_slots(100, arena, keys, slots, generations, offsets, CHUNK, deadline_ms=60_000)
        assert store.cancel(100) == 4
        assert [arena.state(i) for i in range(4)] == [SlotState.FAILED] * 4
        assert results(store, [100]) == {100: DROPPED * 4}
        again = arena.begin_fill(2, 1)  # somebody else's now
        store.inject("hang_read", 0)
        results(store, range(GETS))
        assert arena.state(2) == SlotState.FILLING and arena.generation(2) == again
        assert bytes(arena.view(0, 4 * CHUNK)) == bytes(4 * CHUNK)
        store.check()

    def test_a_put_others_wait_for(self, store: SegmentStore) -> None:
        """The next one that wants the key written takes its place; what was cancelled is not."""
        hang(store)
        put(store, 100, 100, 101, 102)
        put(store, 101, 102, 101)
        put(store, 102, 102)
        assert store.cancel(102) == 1 and store.cancel(100) == 3
        assert results(store, [100, 102]) == {100: DROPPED * 3, 102: DROPPED}
        assert not store.wait(101, 50)
        store.check()
        store.inject("hang_read", 0)
        results(store, range(GETS))
        assert store.wait(101, 10_000) and store.contains(
            b"".join(map(key_of, (100, 101, 102)))
        ) == bytes([0, 1, 1])
        out = [bytearray(CHUNK), bytearray(CHUNK)]
        store.get(200, key_of(101) + key_of(102), out)
        results(store, [200])
        assert out == [payload_of(101), payload_of(102)]
        store.check()

    def test_one_of_two_in_a_request(self, store: SegmentStore) -> None:
        """Puts that wait for a first segment go to the disk together."""
        hang(store)
        keep = [payload_of(100 + i) for i in range(20)]
        for i in range(20):
            store.put(100 + i, key_of(100 + i), [keep[i]])
        time.sleep(0.2)  # they have their places
        gone = range(100, 120, 3)
        assert sum(store.cancel(i) for i in gone) == len(gone)
        store.inject("hang_read", 0)
        out = results(store, range(120))
        for i in range(100, 120):
            assert out[i] == (DROPPED if i in gone else OK)
            assert store.length(key_of(i)) == (-1 if i in gone else CHUNK)
        store.check()
        assert store.verify()["bad"] == 0

    def test_from_many_threads(self, store: SegmentStore) -> None:
        """Each job ends once, whoever cancels it when; what was OK is there."""
        store.inject("slow_read_ms", 1)
        done: dict[int, bytes] = {}
        jobs = range(1000, 1200)

        def cancel() -> None:
            for job in jobs:
                store.cancel(job)
                time.sleep(0.0003)

        threads = [threading.Thread(target=cancel) for _ in range(2)]
        for thread in threads:
            thread.start()
        for job in jobs:
            if job % 2:
                store.get(job, key_of(job % GETS), [bytearray(CHUNK)], job % 5)
            else:
                put(store, job, job, job + 1, deadline_ms=job % 5)
            if job % 8 == 0:
                done |= {d.job: d.results for d in store.poll()}
        for thread in threads:
            thread.join()
        for job in jobs:
            assert store.wait(job, 10_000)
        done |= {d.job: d.results for d in store.poll()}
        assert sorted(done) == list(jobs)
        for job, found in done.items():
            assert set(found) <= {StoreResult.OK, StoreResult.DROPPED}
            if job % 2 == 0 and found[0] == StoreResult.OK:
                assert store.length(key_of(job)) == CHUNK
        store.check()


class TestWaitAny:
    def test_any_job_wakes_it(self, store: SegmentStore) -> None:
        assert not store.wait_any(10_000), "no job is out"
        hang(store)
        assert not store.wait_any(20), "none is done"
        free = threading.Timer(0.1, store.inject, ("hang_read", 0))
        free.start()
        done = 0
        while done < GETS:
            assert store.wait_any(10_000)
            done += len(store.poll())
        free.join()
        assert not store.wait_any(10_000)

    def test_a_job_that_ended_before(self, store: SegmentStore) -> None:
        store.get(1, key_of(1), [bytearray(CHUNK)])
        assert store.wait(1, 10_000)
        assert store.wait_any(0) and store.wait_any(0), "until it is polled"
        assert len(store.poll()) == 1 and not store.wait_any(0)

    def test_close_ends_it(self, store: SegmentStore) -> None:
        hang(store)
        woken: list[bool] = []
        waiter = threading.Thread(target=lambda: woken.append(store.wait_any(60_000)))
        waiter.start()
        store.close(200)
        waiter.join(10)
        assert woken == [True]
