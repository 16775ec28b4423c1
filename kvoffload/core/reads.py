"""Chunk-store reads in flight: slots that an NVMe job fills."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from kvoffload.core.breaker import Breaker, BreakerState
from kvoffload.core.index import ChunkId, Entry
from kvoffload.core.pool import Pool
from kvoffload.core.stats import Counters, Guard
from kvoffload.core.why import Gone
from kvoffload.tiers.base import ArenaLike, ChunkStoreLike
from kvoffload.types import ChunkKey, StoreResult

TRIES = 3
"""A chunk that could not be read so often in a row is deleted where others can be: a disk's trouble
may pass, a bad place on it does not, and what NVMe holds is not stored anew."""
REMEMBERED = 4096  # chunks that could not be read


def slot_arrays(
    entries: Sequence[Entry],
) -> tuple[bytes, npt.NDArray[np.uint32], npt.NDArray[np.uint64], npt.NDArray[np.uint64]]:
    """(keys, slots, generations, offsets) of one native call."""
    n = len(entries)
    return (
        b"".join(e.key for e in entries),
        np.fromiter((e.ref.slot for e in entries), np.uint32, n),
        np.fromiter((e.ref.generation for e in entries), np.uint64, n),
        np.fromiter((e.ref.offset for e in entries), np.uint64, n),
    )


def outcomes(entries: Sequence[Entry], results: bytes) -> list[tuple[Entry, int]]:
    """Entries with their StoreResult; a reply of the wrong length is an I/O error for all."""
    if len(results) != len(entries):
        results = bytes([StoreResult.IO_ERROR]) * len(entries)
    return list(zip(entries, results, strict=True))


class FailedReads:
    """Which chunks could not be read, and how often in a row; the latest 4096. O(1)."""

    def __init__(self) -> None:
        self._failed: dict[ChunkKey, tuple[int, int]] = {}  # how often; chunks read before that
        self._read = 0

    def read(self, key: ChunkKey) -> None:
        """It could be read."""
        self._read += 1
        if self._failed:
            self._failed.pop(key, None)

    def failed(self, key: ChunkKey) -> int:
        """It could not; how often in a row."""
        times, before = self._failed.pop(key, (0, self._read))
        self._failed[key] = times + 1, before
        if len(self._failed) > REMEMBERED:
            del self._failed[next(iter(self._failed))]
        return times + 1

    def others_read(self, key: ChunkKey) -> bool:
        """Whether others could be read since this one could not: it is not the whole disk."""
        known = self._failed.get(key)
        return known is not None and known[1] < self._read

    def forget(self, key: ChunkKey) -> None:
        """It is gone."""
        self._failed.pop(key, None)


@dataclass(slots=True, eq=False)
class ReadJob:
    """A job in flight: its chunks, when it was submitted (clock), and their slots' bytes."""

    entries: list[Entry]
    began: float
    nbytes: int
    _dropped: int = 0  # so many of the first are known to be

    def wanted(self) -> bool:
        """Whether anybody still waits for any of it. O(1) amortised: what is dropped stays so."""
        at, entries = self._dropped, self.entries
        while at < len(entries) and entries[at].dropped:
            at += 1
        self._dropped = at
        return at < len(entries)


class Reads:
    """NVMe -> DRAM jobs. Not thread safe: the Manager's lock guards it."""

    def __init__(
        self,
        store: ChunkStoreLike,
        arena: ArenaLike,
        pool: Pool,
        counters: Counters,
        guard: Guard,
        breaker: Breaker,
        job_ids: Iterator[int],
    ) -> None:
        self._store = store
        self._arena = arena
        self._pool = pool
        self._counters = counters
        self._guard = guard
        self._breaker = breaker
        self._job_ids = job_ids
        self.inflight: dict[int, ReadJob] = {}
        self.inflight_bytes = 0  # slot bytes being read
        self.last_failed: ChunkId | None = None  # what the next probe reads
        self.on_unreadable: Callable[[ChunkKey], None] = lambda key: None  # delete it
        self.holds: Callable[[ChunkKey], bool] = lambda key: False  # says the store
        self._failed = FailedReads()
        self.suspect = False
        """Damaged chunks turned the tier off, and none was right since: what is computed anew is
        worth more than what the tier holds of it."""

    def submit(self, entries: Sequence[Entry], now: float) -> bool:
        """Read FILLING entries, one job per group. False when a group was refused: its entries are
        dropped; those of other groups go on."""
        ok = True
        for group in dict.fromkeys(e.group for e in entries):
            part = [e for e in entries if e.group == group]
            job = next(self._job_ids)
            keys, slots, generations, offsets = slot_arrays(part)
            try:
                self._store.get_slots(
                    job, self._arena, keys, slots, generations, offsets, part[0].nbytes
                )
            except Exception as error:  # not submitted: nothing will write to the slots
                self._guard.failed("store.get_slots", error)
                for entry in reversed(part):
                    self._pool.undo(entry, now)
                ok = False
                continue
            for entry in part:
                entry.io += 1
            nbytes = sum([e.nbytes for e in part])
            self.inflight[job] = ReadJob(part, now, nbytes)
            self.inflight_bytes += nbytes
        return ok

    def began(self, job: int) -> float:
        """When a job in flight was submitted."""
        return self.inflight[job].began

    def finish(self, job: int, results: bytes, now: float) -> None:
        """A read job has returned; call after ``Pool.settle`` was given its entries."""
        over = self.inflight.pop(job)
        self.inflight_bytes -= over.nbytes
        for entry, result in outcomes(over.entries, results):
            if result == StoreResult.OK:
                self._counters.nvme_read += 1
                self._counters.nvme_read_bytes += entry.nbytes
                self._failed.read(entry.key)
                self._breaker.success()
                self.suspect = False
            elif result == StoreResult.CORRUPT:
                self._counters.nvme_corrupt += 1
                self._pool.note(entry, Gone.BAD_BYTES)
                self._gone(entry)
                # A damaged chunk is deleted and over; where one follows another the tier itself
                # is broken, each load of it is paid in vain, and it must not lose all it holds.
                self._breaker.failure(now)
                self.suspect = self._breaker.state(now) is not BreakerState.CLOSED
            elif result == StoreResult.MISS:
                self._counters.nvme_miss += 1
                self._pool.note(entry, Gone.WRITTEN)
                if self.holds(entry.key):  # it says that it has it, and does not give it
                    self._unreadable(entry)
                self._gone(entry)
            elif result == StoreResult.DROPPED:
                self._counters.nvme_dropped += 1  # its slot was given up meanwhile: no failure
            else:
                self._counters.nvme_io_errors += 1
                self.last_failed = entry.chunk_id()
                if not self._unreadable(entry):
                    self._breaker.failure(now)
            self._pool.read_over(entry, result == StoreResult.OK, now)

    def _unreadable(self, entry: Entry) -> bool:
        """``entry`` could not be read. Whether that is due to its place on the disk: then it is
        deleted, so that it is stored anew, and says nothing about the tier."""
        if self._failed.failed(entry.key) < TRIES:
            return False
        self._gone(entry)  # no probe any more: what can never be read would keep the tier off
        if not self._failed.others_read(entry.key):
            return False
        self._failed.forget(entry.key)
        self._counters.nvme_unreadable += 1
        self.on_unreadable(entry.key)
        return True

    def _gone(self, entry: Entry) -> None:
        """The store holds ``entry`` no more, or cannot read it: as a probe it would say nothing."""
        if self.last_failed == entry.chunk_id():
            self.last_failed = None

    def wanted(self) -> Iterator[ReadJob]:
        """The jobs that anybody still waits for: one that hangs and was given up is no queue for
        others, even if it never returns. O(jobs)."""
        return (job for job in self.inflight.values() if job.wanted())

    def entries(self) -> Iterator[Entry]:
        """The chunks of all jobs."""
        return (entry for job in self.inflight.values() for entry in job.entries)

    def check(self) -> None:
        """Raise AssertionError naming the first broken invariant."""
        for job in self.inflight.values():
            assert job.nbytes == sum(e.nbytes for e in job.entries), "bytes of a read"
            some = any(not e.dropped for e in job.entries)
            assert job.wanted() == some, "whether a read is waited for"
        total = sum(job.nbytes for job in self.inflight.values())
        assert self.inflight_bytes == total, "bytes being read"
