"""CUDA copy engine: asynchronous copies between arena slots and KV blocks on two side streams.

The worker's main thread only validates, records one event on the compute stream and hands the job
to host threads; everything that can block (READY, hashing, the driver, end events) happens there:

    begin thread   waits for the compute event of each job; from then on the job's time counts, and
                   a load's items are there for the load threads
    store thread   store stream waits for the compute event; copies blocks -> slot; end event
    hash threads   wait for the end event, fill the leaf table, ``rank_done``
    load threads   wait for READY, verify the leaves; copies slot -> blocks; end event
    finish thread  waits for the end event, re-checks the slot's generation

How an item's bytes move is picked per item (mover_set): plain copies at first and wherever its part
of the arena is not pinned, what the calibration found fastest else. A mover that computes checksums
does so on the device: the hash threads then only move them to the leaf table, and a load is not
verified before its copy but by it, the finish thread looks at the count of bad leaves.

So bytes of a corrupt slot may reach the blocks of a load. That is right for one reason: such an
item ends as CORRUPT, its attempt is answered as failed, and vLLM recomputes every block of it
before anything reads them. Whoever answers an attempt before its finish stage breaks this.

A load is submitted right behind the launch of a forward, and what the compute stream holds by then
may zero its blocks. The host waits for that, not the load stream: a forward may take longer than
the load is given, its time would be taken for that of the copies, and copies queued on the device
could not be called back. A store waits on the device: nobody waits for it, and its blocks are the
sooner free.

Host threads may enqueue because a stream takes work from any thread and each item carries its own
order: its wait and its copies are enqueued by one thread, and its end event is recorded by that
thread after them. What another thread enqueues in between only makes the event later. Nothing
synchronises the device.

The memory of a slot whose store was enqueued must not be given to another rank's shard before this
rank's job is reported: a copy that is out cannot be called back.
"""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from kvoffload.copy.base import LOAD, STORE, Copies, Fragment
from kvoffload.copy.cuda_job import Job, Reason, SlotArena
from kvoffload.copy.cuda_runtime import PIECE_BYTES, ArenaPinner, CudaRuntime, Runtime
from kvoffload.copy.cuda_table import JobTable
from kvoffload.copy.cuda_threads import HostThreads, close_all
from kvoffload.copy.leaf_seats import Seat, SeatPools
from kvoffload.copy.mover import LeafCheck, Mover
from kvoffload.copy.mover_set import MoverSet
from kvoffload.copy.movers import PlainMover
from kvoffload.copy.runs import BlockGroup, Run
from kvoffload.types import LEAF_BYTES, SlotState

logger = logging.getLogger("vllm.kvoffload")

CLOSE_S = 5.0
_MAX_DEADLINE_MS = 86_400_000

_ABANDONED: list[CudaCopyEngine] = []
"""Engines whose device did not finish: their memory must outlive the copies that are out."""


@dataclass(slots=True)
class _Flight:
    """One item on its way over the device."""

    runs: list[Run]
    mover: Mover
    seat: Seat | None = None  # where its checksums are; None: the host computes them
    end: Any = None  # end event
    over: bool = False  # nothing of it is on the device


class CudaCopyEngine:
    """CopyEngine for one rank's device. Made, used and closed on the worker's main thread.

    ``runtime``: the CUDA calls, replaced in tests. ``movers``: plain copies only unless given; the
    engine closes them. Raises UnsupportedError where torch has no CUDA, RuntimeError when the
    device refuses.
    """

    def __init__(
        self,
        arena: SlotArena,
        rank: int,
        *,
        runtime: Runtime | None = None,
        movers: MoverSet | None = None,
        load_threads: int = 2,
        hash_threads: int = 2,
        piece_bytes: int = PIECE_BYTES,
    ) -> None:
        self._arena, self._rank, self._piece = arena, rank, piece_bytes
        self._runtime = runtime if runtime is not None else CudaRuntime()
        self._load_stream = self._runtime.stream(high_priority=True)
        self._store_stream = self._runtime.stream(high_priority=False)
        self.movers = movers if movers is not None else MoverSet(PlainMover(self._runtime))
        self._seats = SeatPools(self._runtime)
        # Device-made hashes need a way into the leaf table; without one the host hashes stores.
        self._put_leaves: Callable[[int, Any], None] | None = getattr(
            arena, "set_leaf_hashes", None
        )
        self._groups: list[BlockGroup] = []
        self._table = JobTable(arena)
        self._error_lock = threading.Lock()
        self.errors = 0
        """Exceptions caught on host threads; each failed an item."""
        self._to_begin: queue.SimpleQueue[Job | None] = queue.SimpleQueue()
        self._to_store: queue.SimpleQueue[Job | None] = queue.SimpleQueue()
        self._to_hash: queue.SimpleQueue[tuple[Job, int, _Flight] | None] = queue.SimpleQueue()
        self._to_finish: queue.SimpleQueue[tuple[Job, int, _Flight] | None] = queue.SimpleQueue()
        self._pinner = ArenaPinner(self._runtime, arena.data_ptr, arena.data_bytes, piece_bytes)
        self._threads = threads = HostThreads(self._runtime.enter_thread)
        threads.add("load", self._run_loads, count=load_threads)
        threads.add("store", self._run_stores, self._to_store)
        threads.add("hash", self._run_hashes, self._to_hash, count=hash_threads)
        threads.add("finish", self._run_finishes, self._to_finish)
        # A forward may still run when the engine is closed; all that waited for it is dropped.
        threads.add("begin", self._run_begins, self._to_begin, may_linger=True)
        refused = threads.refusal()
        if refused is not None:
            self.close()
            raise refused

    # ---------------------------------------------------------------- the worker's calls

    def add_group(self, fragments: Sequence[Fragment], num_blocks: int, shard_bytes: int) -> int:
        """See CopyEngine."""
        if shard_bytes > self._arena.data_bytes:
            raise ValueError(f"shard_bytes {shard_bytes} exceeds the arena")
        self._groups.append(BlockGroup.build(fragments, num_blocks, shard_bytes))
        return len(self._groups) - 1

    def submit_store(self, job: int, group: int, copies: Copies, shard_offset: int) -> None:
        """See CopyEngine. Raises ValueError on anything out of range, before anything is queued."""
        new = self._job(job, STORE, group, copies, shard_offset)
        new.after = self._runtime.mark()
        self._table.enter(new)
        self._to_begin.put(new)
        self._to_store.put(new)

    def submit_load(
        self, job: int, group: int, copies: Copies, shard_offset: int, deadline_ms: int
    ) -> None:
        """See CopyEngine. Raises ValueError like submit_store."""
        if deadline_ms < 0:
            raise ValueError(f"deadline_ms {deadline_ms}")
        new = self._job(job, LOAD, group, copies, shard_offset)
        new.allowed_ns = min(deadline_ms, _MAX_DEADLINE_MS) * 1_000_000
        new.after = self._runtime.mark()
        self._table.enter(new)
        self._to_begin.put(new)

    def cancel(self, job: int) -> None:
        """See CopyEngine. Items already enqueued on the device finish first."""
        self._table.cancel(job)

    def poll(self) -> list[Any]:
        """See CopyEngine."""
        return list(self._table.take_done())

    def wait(self, job: int, timeout_ms: int) -> bool:
        """See CopyEngine."""
        return self._table.wait(job, max(timeout_ms, 0) / 1e3)

    def wait_begun(self, job: int, timeout_ms: int) -> bool:
        """See CopyEngine."""
        return self._table.wait_begun(job, max(timeout_ms, 0) / 1e3)

    def pending(self) -> int:
        """Jobs not finished."""
        return self._table.pending()

    def pinned_bytes(self) -> int:
        """Bytes of the arena that are pinned so far."""
        return self._pinner.pinned_bytes()

    def close(self) -> None:
        """See CopyEngine. Drops what is not enqueued, waits CLOSE_S for what is. Idempotent."""
        if not self._table.close():
            return
        end = time.monotonic() + CLOSE_S
        self._pinner.stop()
        alive = self._threads.stop(end)
        if alive:
            held = f"copies did not finish in {CLOSE_S:.0f} s: {', '.join(alive)}"
        else:
            held = self._let_go(end)
        if held:
            _ABANDONED.append(self)
            logger.error(
                "kvoffload: rank %d: the device was not let go in order (%s); what is pinned "
                "stays so until the process ends.", self._rank, held,
            )  # fmt: skip

    def _let_go(self, end: float) -> str:
        """Close what copies used, after the last of them. What did not stop or raised, if any."""
        return close_all(
            {
                "calibration": lambda: self.movers.close(max(end - time.monotonic(), 0)),
                "checksum memory": self._seats.close,
                "pinning": lambda: self._pinner.close(max(end - time.monotonic(), 0)),
            }
        )

    def check(self) -> None:
        """Raise AssertionError on a broken invariant."""
        self._pinner.check()
        self._table.check()
        self.movers.check()
        self._seats.check()

    # ---------------------------------------------------------------- one item

    def _job(self, number: int, kind: int, group: int, copies: Copies, shard_offset: int) -> Job:
        if not 0 <= group < len(self._groups):
            raise ValueError(f"group {group} of {len(self._groups)}")
        job = Job(number, kind, self._groups[group], copies, shard_offset)
        job.validate(self._arena.max_slots, self._arena.data_bytes)
        return job

    def _state(self, job: Job, item: int) -> int:
        one = slice(item, item + 1)
        return int(self._arena.states(job.slots[one], job.generations[one])[0])

    def _note_error(self, exc: Exception) -> None:
        with self._error_lock:
            self.errors += 1
            first = self.errors == 1
        if first:
            logger.error(
                "kvoffload: rank %d: a device copy failed (%s: %s); what it belongs to is dropped. "
                "Further failures are only counted.",
                self._rank, type(exc).__name__, exc, exc_info=exc,
            )  # fmt: skip

    def _guarded(
        self, body: Callable[[Job, int, _Flight], Reason], job: Job, item: int, flight: _Flight
    ) -> None:
        try:
            reason = body(job, item, flight)
        except Exception as exc:
            self._note_error(exc)
            reason = Reason.DEVICE
        if flight.seat is not None and flight.over:
            self._seats.give(flight.seat)
        self._table.end(job, item, reason)

    def _plan(self, job: Job, item: int) -> _Flight:
        store, shard = job.kind == STORE, job.group.shard_bytes
        offset = int(job.offsets[item])
        runs = job.group.runs(job.ids[item], offset, self._piece)
        checked = not store or self._put_leaves is not None
        pinned = self._pinner.covers(offset, shard)
        flight = _Flight(runs, self.movers.pick(runs, not store, pinned, checked))
        if checked and flight.mover.checks:
            flight.seat = self._seats.take(shard // LEAF_BYTES)
        return flight

    def _enqueue(self, job: Job, item: int, flight: _Flight) -> None:
        """Copies of one item and its end event; the next stage gets the item, whatever happens."""
        store, stream = job.kind == STORE, self._stream(job)
        try:
            try:
                if store:
                    self._runtime.wait_event(stream, job.after)
                self._copy(job, item, flight, stream)
            except Exception as exc:
                self._note_error(exc)
                job.broken.add(item)
            flight.end = self._runtime.record(stream)  # after a failure it covers what is out
        except Exception as exc:
            self._note_error(exc)
            job.broken.add(item)
        (self._to_hash if store else self._to_finish).put((job, item, flight))

    def _copy(self, job: Job, item: int, flight: _Flight, stream: Any) -> None:
        mover, runs, seat = flight.mover, flight.runs, flight.seat
        load, arena = job.kind == LOAD, self._arena.data_ptr
        if seat is None:
            self.movers.copy(mover, runs, arena, load, stream)
            return
        offset, shard = int(job.offsets[item]), job.group.shard_bytes
        whole = LeafCheck(job.seed(item), offset, shard, seat.leaves_at, seat.bad_at, 0, len(
            seat.leaves))  # fmt: skip
        if not load:
            self.movers.copy(mover, runs, arena, False, stream, whole)
            return
        for at, nbytes in job.group.wanted(job.ids[item]):  # leaves of no wanted block: not read
            low, high = offset + at, offset + at + nbytes
            part = [run for run in runs if low <= run.offset < high]
            check = replace(whole, first=at // LEAF_BYTES, count=nbytes // LEAF_BYTES)
            self.movers.copy(mover, part, arena, True, stream, check)

    def _landed(self, job: Job, item: int, flight: _Flight) -> bool:
        """Wait for the item's end event. False when its copies are not all there."""
        if flight.end is not None:
            self._runtime.synchronize(flight.end)
        else:  # no event could be recorded, yet copies may be out
            self._runtime.drain(self._stream(job))
        flight.over = True
        return item not in job.broken

    def _stream(self, job: Job) -> Any:
        return self._store_stream if job.kind == STORE else self._load_stream

    # ---------------------------------------------------------------- the compute before a job

    def _run_begins(self) -> None:
        while (job := self._to_begin.get()) is not None:
            try:
                self._runtime.synchronize(job.after)
            except Exception as exc:
                self._note_error(exc)
                self._table.refuse(job)
            else:
                self._table.begin(job)

    # ---------------------------------------------------------------- stores

    def _run_stores(self) -> None:
        while (job := self._to_store.get()) is not None:
            for item in range(len(job.state)):
                if not self._table.start(job, item):
                    break  # cancelled: all that was left is dropped
                self._store(job, item)

    def _store(self, job: Job, item: int) -> None:
        reason = Reason.NONE
        try:
            if self._state(job, item) == SlotState.FILLING:
                self._enqueue(job, item, self._plan(job, item))
                return
            reason = Reason.SLOT_LOST
        except Exception as exc:
            self._note_error(exc)
            reason = Reason.DEVICE
        self._table.end(job, item, reason)

    def _run_hashes(self) -> None:
        while (task := self._to_hash.get()) is not None:
            self._guarded(self._hash, *task)

    def _hash(self, job: Job, item: int, flight: _Flight) -> Reason:
        if not self._landed(job, item, flight):
            return Reason.DEVICE
        # Looked at again before the leaf table is touched: it may belong to someone else by now.
        if self._state(job, item) != SlotState.FILLING:
            return Reason.SLOT_LOST
        offset, shard = int(job.offsets[item]), job.group.shard_bytes
        if flight.seat is not None and self._put_leaves is not None:
            self._put_leaves(offset, flight.seat.leaves)
        else:
            used = job.ids.shape[1] * job.group.block_bytes
            if used < shard:
                self._arena.view(offset + used, shard - used)[:] = bytes(shard - used)
            self._arena.hash_leaves(offset, shard, job.key(item))
        slot, generation = int(job.slots[item]), int(job.generations[item])
        done = self._arena.rank_done(slot, generation, self._rank)
        return Reason.NONE if done else Reason.SLOT_LOST

    # ---------------------------------------------------------------- loads

    def _run_loads(self) -> None:
        while (task := self._table.next_load()) is not None:
            self._load(*task)

    def _load(self, job: Job, item: int) -> None:
        flight: _Flight | None = None
        try:
            flight = self._plan(job, item)
            if flight.seat is None:
                reason = self._verify(job, item)
            else:
                reason = self._expect(job, item, flight.seat)
        except Exception as exc:
            self._note_error(exc)
            reason = Reason.DEVICE
        reason = reason or self._table.may_enqueue(job)
        if reason is Reason.NONE and flight is not None:
            self._enqueue(job, item, flight)
            return
        if flight is not None and flight.seat is not None:
            self._seats.give(flight.seat)
        self._table.end(job, item, reason)

    def _expect(self, job: Job, item: int, seat: Seat) -> Reason:
        """Give the device the hashes to compare with. Those of a slot that is reused meanwhile
        may be a mixture: the finish stage sees that."""
        if self._state(job, item) != SlotState.READY:
            return Reason.SLOT_LOST
        seat.leaves[:] = self._arena.leaf_hashes(int(job.offsets[item]), job.group.shard_bytes)
        return Reason.NONE

    def _verify(self, job: Job, item: int) -> Reason:
        if self._state(job, item) != SlotState.READY:
            return Reason.SLOT_LOST
        offset, key = int(job.offsets[item]), job.key(item)
        for at, nbytes in job.group.wanted(job.ids[item]):
            if not self._arena.verify_leaves(offset + at, nbytes, key):
                same = self._state(job, item) == SlotState.READY
                return Reason.CORRUPT if same else Reason.SLOT_LOST
        return Reason.NONE

    def _run_finishes(self) -> None:
        while (task := self._to_finish.get()) is not None:
            self._guarded(self._finish, *task)

    def _finish(self, job: Job, item: int, flight: _Flight) -> Reason:
        if not self._landed(job, item, flight):
            return Reason.DEVICE
        # The copy read the slot after it was seen READY: whoever reused it meanwhile shows here.
        if self._state(job, item) != SlotState.READY:
            return Reason.SLOT_LOST
        bad = flight.seat is not None and int(flight.seat.bad[0]) != 0
        return Reason.CORRUPT if bad else Reason.NONE
