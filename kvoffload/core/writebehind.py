"""What goes to NVMe and when: victims of DRAM before their turn, the rest when core/idle.py says.

A chunk that will be evicted soon is judged (core/admission.py). Admitted, it waits in the queue and
keeps its slot until it is written, and others are evicted meanwhile; so many bytes may wait. Where
they are used up the disk is outrun, and chunks leave unwritten: nobody waits for a disk. With
``admission="all"`` every chunk is queued as it arrives.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import numpy as np

from kvoffload.core.admission import Admission, Fate, TokenBucket
from kvoffload.core.breaker import Breaker
from kvoffload.core.index import Entry, Kept
from kvoffload.core.leaving import Fringe, giving_way
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
HORIZON_PART = 32
"""The victims of this part of the arena are judged ahead of their turn: about 3 %, what a prompt of
a few ten thousand tokens takes, and hardly anything but the coldest."""
RESERVED_PART = 8
"""This part of the arena may wait to be written before it goes. Where more would, the disk is
outrun; a chunk lost that way also loses those behind it, so a burst of requests must fit."""
HORIZON_CHUNKS = 128  # judged in one go, at most: some 0.5 ms
GIVE_WAY = 16
"""Chunks given up in one go where nothing else can make room: each was worth its budget, and a
slot or a few are asked for."""
LOOKED_EACH = 64
"""Where none is near either end of the queue all of it is looked at. So many chunks give way then,
or so many calls pass before the next time, that each is worth no more looks than this."""


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
        admission: Admission | None,
        bucket: TokenBucket,
    ) -> None:
        self._store = store
        self._arena = arena
        self._pool = pool
        self._counters = counters
        self._guard = guard
        self._breaker = breaker
        self._job_ids = job_ids
        self._admission = admission  # None: all
        self._bucket = bucket
        self._horizon = arena.data_bytes // HORIZON_PART
        self._room = arena.data_bytes // RESERVED_PART
        self._looked = -(1 << 30)  # chunks evicted when the next victims were last looked at
        # Calls of ``give_way`` before all of the queue is looked at again.
        self._near_only = {Kept.NO: 0, Kept.RETAINED: 0}
        self.reserved_bytes = 0  # queued and keeping their slots
        self._fringe = Fringe(pool.index)
        self._queue: dict[ChunkKey, Entry] = {}
        self.inflight: dict[int, list[Entry]] = {}
        self.inflight_bytes = 0
        self.on_written: Callable[[Sequence[Entry]], None] = lambda entries: None
        self.limited = False  # the write budget, not the disk, holds the queue back

    def __len__(self) -> int:
        return len(self._queue)

    def push(self, entry: Entry) -> None:
        """A chunk became READY and no tier below holds it."""
        entry.dirty = True
        if self._admission is None:
            self._queue[entry.key] = entry

    def forget(self, entry: Entry) -> None:
        """The chunk leaves DRAM."""
        if self._queue.get(entry.key) is entry:
            del self._queue[entry.key]
        self._unreserve(entry, refund=True)

    def recall(self, entries: Sequence[Entry]) -> None:
        """Nobody wants these written any more: those that wait for it may go as they are."""
        for entry in entries:
            if entry.reserved:
                self._withdraw(entry, None)

    def reorder(self, order: Sequence[Entry]) -> None:
        """Write in this order; what is not in it, or nobody wants, not at all."""
        queue, self._queue = self._queue, {}
        for entry in order:
            if queue.get(entry.key) is entry and not entry.retired:
                self._queue[entry.key] = entry

    def reserve(self, entry: Entry) -> None:
        """Queue ``entry``, whose budget is spent: it keeps its slot until it is written."""
        entry.reserved = True
        self.reserved_bytes += entry.nbytes
        self._queue[entry.key] = entry
        self._fringe.add(entry)
        self._pool.index.refresh(entry)

    def waiting_bytes(self) -> int:
        """Slot bytes that keep their slots until they are written."""
        return self.inflight_bytes + self.reserved_bytes

    # -- victims

    def spare(self, entry: Entry, now: float) -> bool:
        """Whether ``entry``, whose turn it is, is to be written first: it is no victim then."""
        if self._admission is None or not entry.dirty or entry.attempts >= MAX_ATTEMPTS:
            return False
        if entry.retired:
            return False  # nobody wants it back
        if not self._admission.decide(entry, now):
            return False
        full = self.reserved_bytes and self.reserved_bytes + entry.nbytes > self._room
        if full or not self._breaker.closed(now):
            self._admission.withdraw(entry, Fate.OUTRUN)
        elif not self._bucket.take(entry.nbytes, now):
            self._admission.withdraw(entry, Fate.NO_BUDGET)
        else:
            self.reserve(entry)
        return entry.reserved

    def unspare(self) -> None:
        """Give up all that waits to be written. O(those)."""
        if self.reserved_bytes:
            for entry in [e for e in self._queue.values() if e.reserved]:
                self._withdraw(entry, Fate.OUTRUN)

    def give_way(self, kept: bool = False) -> bool:
        """A class of slots has no other victim left: give up a few of what waits to be written.
        False when that makes no room. ``kept``: also of what hints retain, which may be cut short
        then."""
        if not self.reserved_bytes:
            return False
        index = self._pool.index
        sizes = range(len(self._pool.alloc.slot_bytes))
        short = {cls for cls in sizes if index.victim(cls) is None}
        level = Kept.RETAINED if kept else Kept.NO
        few = giving_way(self._queue, index, short, level, GIVE_WAY)
        few = few or self._give_way_anywhere(short, level)
        if not few and len(sizes) > len(short):
            # Nor does it keep an extent that another class may give (Pool._reclaim).
            few = [e for e in self._queue.values() if e.reserved and e.cls not in short]
        for entry in few:
            self._withdraw(entry, Fate.OUTRUN)
        return bool(few)

    def _give_way_anywhere(self, classes: set[int], level: Kept) -> list[Entry]:
        """From all of the queue, at a bounded pace."""
        if self._near_only[level] > 0:
            self._near_only[level] -= 1
            return []
        pace = len(self._queue) // LOOKED_EACH
        most = max(GIVE_WAY, pace)
        few = giving_way(self._queue, self._pool.index, classes, level, most, near=False)
        self._near_only[level] = 0 if few else pace
        return few

    def _withdraw(self, entry: Entry, why: Fate | None) -> None:
        del self._queue[entry.key]
        self._unreserve(entry, refund=True)
        if self._admission is not None:
            self._admission.withdraw(entry, why)
        self._pool.index.refresh(entry)

    def evicted(self, entry: Entry) -> None:
        """``entry`` is being evicted."""
        if self._admission is not None:
            self._admission.gone(entry)

    def look_ahead(self, now: float) -> None:
        """Judge the next victims, so that those admitted are written when their turn comes."""
        if not self._breaker.closed(now):
            self.unspare()  # it may be long
            return
        evicted = self._counters.evicted
        sizes = self._pool.alloc.slot_bytes
        most = [min(HORIZON_CHUNKS, self._horizon // len(sizes) // size) for size in sizes]
        if not self._nearly_full() or evicted - self._looked <= min(most) // 2:
            return
        self._looked = evicted
        going = self._fringe.going(e for part in self.inflight.values() for e in part)
        for cls, count in enumerate(most):
            for entry in self._pool.index.coming(cls, count, going):
                self.spare(entry, now)

    def _nearly_full(self) -> bool:
        """Whether a class of slots has no more than the horizon free. By the allocator, not by the
        bytes held: up to a sixteenth of an extent fits no slot, twice the horizon."""
        alloc = self._pool.alloc
        sizes = enumerate(alloc.slot_bytes)
        return any(alloc.slots_free(cls) * size <= self._horizon for cls, size in sizes)

    def _unreserve(self, entry: Entry, refund: bool) -> None:
        if entry.reserved:
            entry.reserved = False
            self.reserved_bytes -= entry.nbytes
            self._fringe.remove(entry)
            if refund:
                self._bucket.refund(entry.nbytes)

    # -- writing

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
            self.limited = not entry.reserved and not self._bucket.take(entry.nbytes, now)
            if self.limited:
                break
            batch.append(entry)
        for entry in batch:
            del self._queue[entry.key]
            self._unreserve(entry, refund=False)
        if batch and batch[-1].chunk < batch[0].chunk:
            batch.reverse()  # victims go leaf first: on disk a chain lies root first
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
                self._pool.index.refresh(entry)
        self.on_written([e for e, there in zip(batch, held, strict=True) if there])
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
        if self._admission is not None:
            self._pool.index.refresh(entry)  # it is judged again when its turn comes again
        elif entry.dirty and not entry.dropped and entry.attempts < MAX_ATTEMPTS:
            self._queue[entry.key] = entry

    def finish(self, job: int, results: bytes, now: float) -> None:
        """A put job has returned."""
        over: list[Entry] = []  # written for sessions that have ended since
        written: list[Entry] = []
        for entry, result in outcomes(self.inflight.pop(job), results):
            self.inflight_bytes -= entry.nbytes
            if result == StoreResult.OK:
                entry.dirty = False
                written.append(entry)
                self._counters.nvme_written += 1
                self._counters.nvme_written_bytes += entry.nbytes
                self._breaker.success()
                if entry.retired and self._pool.index.get(entry.key) in (entry, None):
                    over.append(entry)
            elif result == StoreResult.DROPPED:
                self._counters.nvme_dropped += 1
                self._again(entry)
            elif result == StoreResult.NO_SPACE:
                self._counters.nvme_no_space += 1  # the bound holds; trying again would not help
                self._bucket.refund(entry.nbytes)
                entry.attempts = MAX_ATTEMPTS
            else:
                self._counters.nvme_io_errors += 1
                self._breaker.failure(now)
                self._again(entry)
            self._pool.write_over(entry, now)
        self.on_written(written)
        self._delete(over)

    def _delete(self, entries: Sequence[Entry]) -> None:
        if not entries:
            return
        try:
            self._counters.hint_deleted += self._store.delete(b"".join(e.key for e in entries))
        except Exception as error:  # it ages out as ever
            self._guard.failed("store.delete", error)
        for entry in entries:
            if not entry.dropped:
                self.push(entry)  # used again, it is to be written again

    def check(self) -> None:
        """Raise AssertionError naming the first broken invariant."""
        for key, entry in self._queue.items():
            assert entry.key == key and entry.dirty and not entry.dropped, "queued but not dirty"
            assert entry.reserved or self._admission is None, "queued without a budget"
            assert not (entry.reserved and entry.retired), "let go of and kept to be written"
            assert self._pool.index.get(key) is entry, "queued but not resident"
        reserved = sum(e.nbytes for e in self._queue.values() if e.reserved)
        assert self.reserved_bytes == reserved, "bytes reserved"
        self._fringe.check(e for e in self._queue.values() if e.reserved)
        if self._admission is not None:
            self._admission.check()
        writing = [e for part in self.inflight.values() for e in part]
        assert self.inflight_bytes == sum(e.nbytes for e in writing), "bytes in flight"
        assert not any(self._queue.get(e.key) is e for e in writing), "queued and being written"
