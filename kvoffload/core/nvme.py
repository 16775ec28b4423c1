"""The NVMe tier as the Manager sees it: membership, reads, write-behind, and a breaker."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import count

from kvoffload.core.index import Entry
from kvoffload.core.pool import Pool
from kvoffload.core.reads import Reads
from kvoffload.core.stats import Breaker, Counters, Guard
from kvoffload.core.writebehind import (
    INFLIGHT_BUSY_BYTES,
    INFLIGHT_BYTES,
    INFLIGHT_FLOOR_BYTES,
    TokenBucket,
    WriteBehind,
)
from kvoffload.tiers.base import ArenaLike, ChunkStoreLike, StoreDoneLike
from kvoffload.types import ChunkKey

_WAIT_MS = 50


class NvmeTier:
    """A chunk store behind the DRAM pool. The Manager's lock guards all but ``wait`` and ``flush``.

    No exception of the store leaves this class: it is a miss or a skipped write, and a count.
    """

    def __init__(
        self,
        store: ChunkStoreLike,
        arena: ArenaLike,
        pool: Pool,
        counters: Counters,
        guard: Guard,
        bucket: TokenBucket,
        observe_read: Callable[[int, float], None],
    ) -> None:
        self._store = store
        self._guard = guard
        self._observe_read = observe_read
        self.breaker = Breaker(counters)
        self.enabled = True
        jobs = count(1)
        self.reads = Reads(store, arena, pool, counters, guard, self.breaker, jobs)
        self.writes = WriteBehind(store, arena, pool, counters, guard, self.breaker, jobs, bucket)

    def held(self, keys: Sequence[ChunkKey], now: float) -> Sequence[int]:
        """Per key whether the store holds it; all false while the breaker is open."""
        if not keys or not self.enabled or not self.breaker.closed(now):
            return bytes(len(keys))
        try:
            return self._store.contains(b"".join(keys))
        except Exception as error:
            self._guard.failed("store.contains", error)
            self.breaker.failure(now)
            return bytes(len(keys))

    def poll(self) -> Sequence[StoreDoneLike]:
        """Jobs that have returned; hand them to ``finish`` after reading the slot table again."""
        try:
            return self._store.poll()
        except Exception as error:
            self._guard.failed("store.poll", error)
            return ()

    def finish(self, done: Sequence[StoreDoneLike], now: float) -> None:
        """Apply returned jobs. Jobs of other users of the store are not ours to handle."""
        for job in done:
            if job.job in self.reads.inflight:
                self.reads.finish(job.job, job.results, now)
                if job.nbytes:
                    self._observe_read(job.nbytes, job.ns / 1e9)
            elif job.job in self.writes.inflight:
                self.writes.finish(job.job, job.results, now)

    def write_behind(self, now: float, busy: bool) -> None:
        """Start writes; only a trickle while loads are being read, which go first."""
        if self.enabled:
            limit = INFLIGHT_BUSY_BYTES if busy else INFLIGHT_BYTES
            self.writes.submit(now, INFLIGHT_FLOOR_BYTES if self.reads.inflight else limit)

    def push_out(self, now: float) -> int | None:
        """Start writes whatever is being read; returns a job to wait for, None when all is out."""
        if self.enabled:
            self.writes.submit(now, INFLIGHT_BYTES)
        return next(iter(self.writes.inflight), None)

    def wait(self, job: int, timeout_s: float) -> None:
        """Block for at most 50 ms. Not under the lock."""
        try:
            self._store.wait(job, max(1, min(_WAIT_MS, int(timeout_s * 1000))))
        except Exception as error:
            self._guard.failed("store.wait", error)

    def flush(self, timeout_s: float) -> bool:
        """Block until written chunks are durable. Not under the lock."""
        try:
            return self._store.flush(max(0, int(timeout_s * 1000)))
        except Exception as error:
            self._guard.failed("store.flush", error)
            return False

    def stats(self) -> dict[str, int | float]:
        """The store's own counts; empty when it cannot answer."""
        try:
            return self._store.stats()
        except Exception as error:
            self._guard.failed("store.stats", error)
            return {}

    def io_entries(self) -> list[Entry]:
        """Entries of all jobs in flight, once per job."""
        jobs = [*self.reads.inflight.values(), *self.writes.inflight.values()]
        return [e for part in jobs for e in part]
