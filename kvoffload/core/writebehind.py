"""Write-behind: filled chunks go to NVMe in order of arrival, under a write budget."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from kvoffload.core.breaker import Breaker
from kvoffload.core.index import Entry
from kvoffload.core.pool import Pool
from kvoffload.core.reads import outcomes, slot_arrays
from kvoffload.core.stats import Counters, Guard
from kvoffload.tiers.base import ArenaLike, ChunkStoreLike
from kvoffload.types import ChunkKey, StoreResult

INFLIGHT_BYTES = 64 << 20
INFLIGHT_BUSY_BYTES = 16 << 20  # while the engine runs steps
INFLIGHT_FLOOR_BYTES = 4 << 20  # while loads are being read
JOB_BYTES = 16 << 20
MAX_ATTEMPTS = 3
_DAY_S = 86400.0
_MIN_BURST = 1 << 30


class TokenBucket:
    """``rate`` bytes per second, up to ``burst`` saved up; starts full."""

    def __init__(self, rate: float, burst: float, now: float) -> None:
        self._rate = rate
        self._burst = burst
        self._level = burst
        self._last = now

    def take(self, nbytes: int, now: float) -> bool:
        """Spend ``nbytes`` if they are there. A chunk over the burst passes when it is full."""
        self._level = min(self._burst, self._level + max(0.0, now - self._last) * self._rate)
        self._last = max(self._last, now)
        if self._rate <= 0 or self._level < min(nbytes, self._burst):
            return False
        self._level -= nbytes
        return True

    def refund(self, nbytes: int) -> None:
        """Bytes that were not written after all."""
        self._level = min(self._burst, self._level + nbytes)


def budget(write_tb_per_day: float | None, nvme_bytes: int, now: float) -> TokenBucket:
    """The write budget: 10^12 bytes per day times ``write_tb_per_day``, by default ``nvme_bytes``
    once a day; the burst is a tenth of ``nvme_bytes``, at least 1 GiB. Zero per day writes
    nothing."""
    per_day = nvme_bytes if write_tb_per_day is None else write_tb_per_day * 1e12
    return TokenBucket(per_day / _DAY_S, max(nvme_bytes / 10, _MIN_BURST), now)


class WriteBehind:
    """Queue of READY dirty chunks and the put jobs in flight. The Manager's lock guards it."""

    def __init__(
        self,
        store: ChunkStoreLike,
        arena: ArenaLike,
        pool: Pool,
        counters: Counters,
        guard: Guard,
        breaker: Breaker,
        job_ids: Iterator[int],
        bucket: TokenBucket,
    ) -> None:
        self._store = store
        self._arena = arena
        self._pool = pool
        self._counters = counters
        self._guard = guard
        self._breaker = breaker
        self._job_ids = job_ids
        self._bucket = bucket
        self._queue: dict[ChunkKey, Entry] = {}
        self.inflight: dict[int, list[Entry]] = {}
        self.inflight_bytes = 0
        self.limited = False  # the write budget, not the disk, holds the queue back

    def __len__(self) -> int:
        return len(self._queue)

    def push(self, entry: Entry) -> None:
        """A chunk became READY and no tier below holds it."""
        entry.dirty = True
        self._queue[entry.key] = entry

    def forget(self, entry: Entry) -> None:
        """The chunk leaves DRAM."""
        if self._queue.get(entry.key) is entry:
            del self._queue[entry.key]

    def reorder(self, hottest_first: Sequence[Entry]) -> None:
        """Queue in this order (used at shutdown)."""
        queue = self._queue
        self._queue = {e.key: e for e in hottest_first if queue.get(e.key) is e and not e.retired}

    def submit(self, now: float, limit_bytes: int) -> int:
        """Start puts until ``limit_bytes`` are in flight, the queue or the budget ends. Returns
        chunks.

        One chunk may exceed the limit when nothing else is in flight.
        """
        started = 0
        while self._queue and self._breaker.closed(now):
            batch = self._batch(now, limit_bytes - self.inflight_bytes)
            if not batch:
                break
            fresh = self._not_held(batch)
            if fresh and not self._put(fresh, now):
                break
            started += len(fresh)
        return started

    def _batch(self, now: float, room: int) -> list[Entry]:
        """Head of the queue: one group and namespace, within room and budget; leaves the queue."""
        batch: list[Entry] = []
        for entry in self._queue.values():
            if entry.retired:
                continue
            if batch and (entry.group, entry.namespace_id) != (
                batch[0].group,
                batch[0].namespace_id,
            ):
                break
            size = (len(batch) + 1) * entry.nbytes
            alone = not batch and not self.inflight_bytes
            if not alone and size > min(room, max(JOB_BYTES, entry.nbytes)):
                break
            self.limited = not self._bucket.take(entry.nbytes, now)
            if self.limited:
                break
            batch.append(entry)
        for entry in batch:
            del self._queue[entry.key]
        return batch

    def _not_held(self, batch: Sequence[Entry]) -> list[Entry]:
        try:
            held = self._store.contains(b"".join(e.key for e in batch))
        except Exception as error:  # writing twice is harmless
            self._guard.failed("store.contains", error)
            return list(batch)
        for entry, there in zip(batch, held, strict=True):
            if there:
                entry.dirty = False
                self._bucket.refund(entry.nbytes)
        return [e for e, there in zip(batch, held, strict=True) if not there]

    def _put(self, part: list[Entry], now: float) -> bool:
        job = next(self._job_ids)
        keys, slots, generations, offsets = slot_arrays(part)
        depths = np.fromiter((e.chunk for e in part), np.uint32, len(part))
        first = part[0]
        try:
            self._store.put_slots(
                job,
                self._arena,
                keys,
                slots,
                generations,
                offsets,
                first.nbytes,
                first.namespace_id,
                depths,
            )
        except Exception as error:
            self._guard.failed("store.put_slots", error)
            self._breaker.failure(now)
            for entry in part:
                self._again(entry)
            return False
        for entry in part:
            entry.io += 1
            self._pool.index.refresh(entry)
        self.inflight[job] = part
        self.inflight_bytes += sum(e.nbytes for e in part)
        return True

    def _again(self, entry: Entry) -> None:
        self._bucket.refund(entry.nbytes)
        entry.attempts += 1
        if entry.dirty and not entry.dropped and entry.attempts < MAX_ATTEMPTS:
            self._queue[entry.key] = entry

    def finish(self, job: int, results: bytes, now: float) -> None:
        """A put job has returned."""
        for entry, result in outcomes(self.inflight.pop(job), results):
            self.inflight_bytes -= entry.nbytes
            if result == StoreResult.OK:
                entry.dirty = False
                self._counters.nvme_written += 1
                self._counters.nvme_written_bytes += entry.nbytes
                self._breaker.success()
            elif result == StoreResult.DROPPED:
                self._counters.nvme_dropped += 1
                self._again(entry)
            elif result == StoreResult.NO_SPACE:
                self._counters.nvme_no_space += 1  # the bound holds; trying again would not help
                self._bucket.refund(entry.nbytes)
            else:
                self._counters.nvme_io_errors += 1
                self._breaker.failure(now)
                self._again(entry)
            self._pool.write_over(entry, now)

    def check(self) -> None:
        """Raise AssertionError naming the first broken invariant."""
        for key, entry in self._queue.items():
            assert entry.key == key and entry.dirty and not entry.dropped, "queued but not dirty"
            assert self._pool.index.get(key) is entry, "queued but not resident"
        writing = [e for part in self.inflight.values() for e in part]
        assert self.inflight_bytes == sum(e.nbytes for e in writing), "bytes in flight"
        assert not any(self._queue.get(e.key) is e for e in writing), "queued and being written"
