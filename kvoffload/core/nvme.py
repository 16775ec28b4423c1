"""The NVMe tier as the Manager sees it: membership, reads, write-behind, and a breaker."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import count

from kvoffload.core.admission import Admission, TokenBucket
from kvoffload.core.breaker import Breaker
from kvoffload.core.idle import IdleWrites
from kvoffload.core.index import Entry
from kvoffload.core.pool import Pool
from kvoffload.core.reads import Reads
from kvoffload.core.stats import Counters, Guard
from kvoffload.core.watch import Watch
from kvoffload.core.wear import HourOf, LifeWear, Wear
from kvoffload.core.writebehind import (
    INFLIGHT_BUSY_BYTES,
    INFLIGHT_BYTES,
    INFLIGHT_FLOOR_BYTES,
    WriteBehind,
)
from kvoffload.tiers.base import ArenaLike, ChunkStoreLike, StoreDoneLike, device_bytes
from kvoffload.types import ChunkKey, SlotState

_WAIT_MS = 50


class NvmeTier:
    """A chunk store behind the DRAM pool. The Manager's lock guards all but ``wait`` and ``flush``.

    No exception of the store leaves this class: it is a miss or a skipped write, and a count. Reads
    and writes have a breaker each: a full or read-only disk still serves.
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
        admission: Admission | None = None,
    ) -> None:
        self._store = store
        self._guard = guard
        self._observe_read = observe_read
        self._pool = pool
        self._counters = counters
        self.breaker = Breaker(counters)
        self.write_breaker = Breaker(counters)
        self.enabled = True
        self._unlearned = 0  # bytes read whose time went to a job that ended later
        self._learned_to = float("-inf")
        jobs = count(1)
        self.reads = Reads(store, arena, pool, counters, guard, self.breaker, jobs)
        self.reads.on_unreadable = self._unreadable
        self.reads.holds = self.holds
        self._watch = Watch(self.reads, pool, self.breaker, counters)
        self.writes = WriteBehind(
            store, arena, pool, counters, guard, self.write_breaker, jobs, admission, bucket
        )
        self.idle = IdleWrites(
            pool.index, self.writes, counters, self.write_breaker, admission, bucket
        )
        self.admission = admission
        self._hour = HourOf()
        pool.on_evict = self.writes.evicted
        pool.spare = lambda entry, now: self.enabled and self.writes.spare(entry, now)
        pool.unspare = self.writes.give_way

    def held(self, keys: Sequence[ChunkKey], now: float) -> Sequence[int]:
        """Per key whether the store holds it; all false while the breaker is open."""
        if not keys or not self.usable(now):
            return bytes(len(keys))
        try:
            return self._store.contains(b"".join(keys))
        except Exception as error:
            self._guard.failed("store.contains", error)
            self.breaker.failure(now)
            return bytes(len(keys))

    def holds(self, key: ChunkKey) -> bool:
        """Whether the store says that it has ``key``, in use or not."""
        try:
            return bool(self._store.contains(key)[0])
        except Exception as error:
            self._guard.failed("store.contains", error)
            return False

    def delete(self, keys: Sequence[ChunkKey]) -> int:
        """Forget keys; returns how many were held. What cannot be deleted ages out as ever."""
        if not keys or not self.enabled:
            return 0
        try:
            return self._store.delete(b"".join(keys))
        except Exception as error:
            self._guard.failed("store.delete", error)
            return 0

    def _unreadable(self, key: ChunkKey) -> None:
        """Delete it; what DRAM holds of it by now is to be written again."""
        self.delete([key])
        entry = self._pool.index.get(key)
        if entry is not None and entry.state is SlotState.READY and not entry.dirty:
            self.writes.push(entry)

    def retain(
        self, keys: Sequence[ChunkKey], seconds: float, level: int, owner: str | None = None
    ) -> bytes:
        """Keep those of ``keys`` that the store holds; see ``ChunkStoreLike.retain``.

        ``owner`` None: several.
        """
        if not keys or not self.enabled:
            return bytes(len(keys))
        try:
            return self._store.retain(b"".join(keys), seconds, level, _number(owner))
        except Exception as error:  # they age out as ever
            self._guard.failed("store.retain", error)
            return bytes(len(keys))

    def retained(self, keys: Sequence[ChunkKey], owner: str) -> bytes:
        """Per key whether the store keeps it for others than ``owner``."""
        if not keys or not self.enabled:
            return bytes(len(keys))
        try:
            return self._store.retained(b"".join(keys), _number(owner))
        except Exception as error:
            self._guard.failed("store.retained", error)
            return bytes(len(keys))

    def retain_none(self) -> None:
        """The store keeps nothing for hints any more."""
        try:
            self._store.retain_none()
        except Exception as error:
            self._guard.failed("store.retain_none", error)

    def poll(self) -> Sequence[StoreDoneLike]:
        """Jobs that have returned; hand them to ``finish`` after reading the slot table again."""
        try:
            return self._store.poll()
        except Exception as error:
            self._guard.failed("store.poll", error)
            return ()

    def returned(self, done: Sequence[StoreDoneLike]) -> list[Entry]:
        """The chunks of those jobs that are reads."""
        reads = self.reads.inflight
        return [e for job in done if job.job in reads for e in reads[job.job].entries]

    def seems_still(self, now: float) -> bool:
        """Whether all reads under way are to be looked at now; see ``Watch.seems_still``."""
        return self._watch.seems_still(now)

    def read_up(self, entries: Sequence[Entry], now: float) -> bool:
        """Start reading FILLING entries; see ``Reads.submit``."""
        self.idle.active(now)
        if self.admission is not None:
            self.admission.read(entries)
        return self._watch.read(entries, now)

    def stored(self, entry: Entry, now: float) -> None:
        """A chunk that no tier held, or none that is in use, got a slot."""
        if self.reads.suspect:
            self.delete([entry.key])  # or it would count as written
        self.idle.active(now)
        if self.admission is not None:
            self.admission.stored(entry)

    def usable(self, now: float) -> bool:
        """Whether requests may count on it now."""
        return self.enabled and self.breaker.closed(now)

    def probe_due(self, now: float) -> bool:
        """Whether it may work again, and what is read next finds out. It may hang just as well: one
        chunk is enough, for which nobody waits."""
        return self.enabled and self.breaker.probe_due(now)

    def progressed(self, now: float) -> None:
        """A chunk came up."""
        self._watch.progressed(now)

    def watch(self, now: float) -> None:
        """Trip the breaker when reads hang; probe a tier that may work again."""
        if self.enabled:
            self._watch.look(now)

    def standstill_s(self) -> float:
        """For how long no read under way had got on when that was last looked at."""
        return self._watch.standstill_s()

    def timed_out(self, entry: Entry, now: float) -> None:
        """A load's deadline passed while ``entry`` was still being read."""
        self._watch.timed_out(entry, now)

    def finish(self, done: Sequence[StoreDoneLike], now: float) -> None:
        """Apply returned jobs. Jobs of other users of the store are not ours to handle."""
        self._learn([job for job in done if job.job in self.reads.inflight])
        for job in done:
            if job.job in self.reads.inflight:
                self._watch.finish(job.job, job.results, now)
            elif job.job in self.writes.inflight:
                self.writes.finish(job.job, job.results, now)

    def _learn(self, done: Sequence[StoreDoneLike]) -> None:
        """The rate of reads that overlap is their bytes over the time that any was under way.

        Reads that hung do not count: a tier that is back is as fast as before, not bytes over the
        time it was away, which would keep requests from it for long after.
        """
        done = [j for j in done if not self._watch.given_up(j.job)]
        spans = sorted(
            (self.reads.began(j.job) + j.ns / 1e9, self.reads.began(j.job)) for j in done
        )
        seconds = 0.0
        for ended, began in spans:
            seconds += max(0.0, ended - max(began, self._learned_to))
            self._learned_to = max(ended, self._learned_to)
        self._unlearned += sum(j.nbytes for j in done)
        if self._unlearned and seconds > 0:
            self._observe_read(self._unlearned, seconds)
            self._unlearned = 0

    def write_behind(self, now: float, busy: bool) -> None:
        """Start writes; only a trickle while loads are being read, which go first."""
        if self.enabled:
            limit = INFLIGHT_BUSY_BYTES if busy else INFLIGHT_BYTES
            self.writes.look_ahead(now)
            self.idle.look(now, limit, busy)
            self.writes.submit(now, INFLIGHT_FLOOR_BYTES if any(self.reads.wanted()) else limit)
        else:
            self.writes.unspare()  # nothing is written any more: what waits for it may go

    def begin_push_out(self) -> None:
        """Before ``push_out``: what is hottest is looked up once."""
        if self.enabled and self.idle.enabled:
            self.idle.begin_drain()

    def push_out(self, now: float) -> int | None:
        """Start writes, hottest first, whatever is being read; returns a job to wait for, None when
        all is out."""
        if self.enabled and self.idle.enabled:
            self.idle.drain(now, INFLIGHT_BYTES)
            self.writes.submit(now, INFLIGHT_BYTES)
        else:
            self.writes.unspare()
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

    def wear(self, stats: Mapping[str, float], now: float) -> Wear:
        """What was written to the drives, by the store's ``stats``, and what admission makes of
        it."""
        written = device_bytes(stats)
        return Wear(
            payload_bytes=self._counters.nvme_written_bytes,
            device_bytes=written,
            bytes_per_day=self._hour.per_day(written, now),
            probability=self.admission.probability(now) if self.admission else 1.0,
            value=self.admission.value() if self.admission else 0.0,
            life=LifeWear.of(stats),
        )

    def io_entries(self, reads_only: bool = False) -> list[Entry]:
        """Entries of all jobs in flight, once per job."""
        entries = list(self.reads.entries())
        if not reads_only:
            entries += [e for part in self.writes.inflight.values() for e in part]
        return entries


def _number(owner: str | None) -> int:
    """An owner as the store knows it: not 0, which stands for several."""
    return 0 if owner is None else hash(owner) & (1 << 64) - 1 or 1
