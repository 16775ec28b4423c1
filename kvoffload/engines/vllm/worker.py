"""Worker half: moves bytes between arena slots and KV blocks. Runs on the worker's main thread.

It decides nothing: what to copy comes from StepOrders. Every load attempt it has been told of is
answered exactly once, whatever breaks (docs/request-lifecycle.md, "exactly once").
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from typing import Any

from kvoffload.copy.base import DEADLINE, LOAD, OK, CopyEngine, Fragment
from kvoffload.engines.vllm.forward import ForwardWatch
from kvoffload.engines.vllm.guard import HookGuard, guarded
from kvoffload.engines.vllm.meta import (
    CALM,
    ArenaAddress,
    BadChunk,
    ChunkCopies,
    FailOrder,
    LoadOrder,
    StepOrders,
    StoreOrder,
    WorkerReport,
)
from kvoffload.engines.vllm.running import REASONS, RunningLoad, StepAnswers, settle
from kvoffload.errors import UnsupportedError
from kvoffload.types import CacheLayout, GroupKind, LoadFailure, SlotState

logger = logging.getLogger("vllm.kvoffload")

IDLE_WAIT_MS = 10
"""A step without a forward waits this long for a load, so that it is reported by the same step."""
SHARED_WAIT_MS = 1
"""Where other engines wait for this one's step (data parallel over experts): as long as vLLM itself
sleeps after such a step."""
FENCE_MS = 50
"""A store holds its source blocks for milliseconds; what of it has not started this long after the
compute that fills them is cancelled instead."""


class WorkerHalf:
    """One per rank. ``attach`` opens the arena, ``make_engine`` builds the device's copy engine.

    ``clock``: seconds, for loads that the scheduler half waits for no longer.
    """

    def __init__(
        self,
        layout: CacheLayout,
        rank: int,
        *,
        attach: Callable[[str, int], Any],
        make_engine: Callable[[Any], CopyEngine],
        idle_wait_ms: int = IDLE_WAIT_MS,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.guard = HookGuard("worker")
        self.layout = layout
        self.rank = rank
        self._attach = attach
        self._make_engine = make_engine
        self._idle_wait_ms = idle_wait_ms
        self._clock = clock
        self._single_group = len(layout.groups) == 1
        self._fragments: dict[int, tuple[Sequence[Fragment], int]] = {}
        self._engine: CopyEngine | None = None
        self._arena: Any = None
        self._attach_failed = ""
        self._engine_group: dict[int, int] = {}
        self._orders: StepOrders | None = None
        self._forward = ForwardWatch()
        self._running: dict[int, RunningLoad] = {}
        self._answered: set[int] = set()
        self._store_jobs: dict[int, list[int]] = {}
        self._job_store: dict[int, int] = {}
        self._job_no = 0
        self._report = WorkerReport()
        self._invalid: set[int] = set()
        self._weight_bumps = 0

    # ---------------------------------------------------------------- start

    def register_group(self, group: int, fragments: Sequence[Fragment], num_blocks: int) -> None:
        """Blocks of one KV group as byte fragments; called once per group before the first step.

        vLLM has one worker connector per process: a second engine in it (without multiprocessing)
        gives its blocks to the first one's. Whose they are cannot be told apart later, and wrong
        ones would be stored under right names, so that neither engine is served.
        """
        blocks = (fragments, num_blocks)
        if self._fragments.setdefault(group, blocks) != blocks:
            self.refuse("two engines of one process gave the KV blocks: start each in its own")

    def _ensure_engine(self, address: ArenaAddress | None) -> None:
        if self._engine is not None or address is None or self._attach_failed:
            return
        engine: CopyEngine | None = None
        try:
            if address.layout != self.layout:
                raise UnsupportedError(
                    f"vLLM's scheduler sees {address.layout}, this rank {self.layout}"
                )
            arena = self._attach(address.path, address.inode)
            engine = self._make_engine(arena)
            self._plant_copy_faults(engine)
            for g in self.layout.groups:
                if g.kind is GroupKind.NONE:
                    continue
                fragments, num_blocks = self._fragments[g.group]
                self._engine_group[g.group] = engine.add_group(fragments, num_blocks, g.shard_bytes)
        except Exception as exc:
            why = f"the DRAM arena {address.path} cannot be used: {type(exc).__name__}: {exc}"
            self.refuse(why, exc)
            if engine is not None:  # its threads, its pinned memory
                engine.close()
            return
        self._arena, self._engine = arena, engine
        for _ in range(self._weight_bumps):
            arena.bump_epoch()
        arena.set_attached(self.rank)

    def refuse(self, why: str, exc: Exception | None = None) -> None:
        """Never attach, unless that was done before: 0 hits."""
        if self._engine is None and not self._attach_failed:
            self._attach_failed = self._report.attach_error = why
            text = "kvoffload: this engine runs without the cache, as of rank %d %s"
            logger.error(text, self.rank, why, exc_info=exc)

    def _plant_copy_faults(self, engine: Any) -> None:
        every = self.guard.planted("copy_fail_every")
        if every and self.guard.planted("copy_fail_rank", self.rank) == self.rank:
            engine.inject(every)

    def _plant_corruption(self, order: LoadOrder) -> None:
        """Test fault: flip a byte of a chunk about to be loaded, of each group in turn."""
        every = self.guard.planted("corrupt_every")
        if every and order.attempt % every == 0:
            copies = order.copies[order.attempt // every % len(order.copies)]
            at = int(copies.offsets[-1]) + self._shard_offset(copies.group)
            byte = self._arena.view(at, 1)
            byte[0] ^= 0xFF

    def weights_changed(self) -> None:
        """The model's weights were changed in place (or an attempt was made)."""
        if self._arena is not None:
            self._arena.bump_epoch()
        else:
            self._weight_bumps += 1

    # ---------------------------------------------------------------- step hooks, in call order

    @guarded(lambda self, orders: self._drain_stores())
    def handle_preemptions(self, orders: StepOrders) -> None:
        """Before anything is overwritten: finish the stores whose source blocks are reused."""
        for number in orders.fence:
            for job in self._store_jobs.get(number, ()):
                self._settle(job)

    def _settle(self, job: int) -> None:
        if self._engine is not None:
            settle(self._engine, job, FENCE_MS, self.rank)

    def _drain_stores(self) -> None:
        for jobs in list(self._store_jobs.values()):
            for job in jobs:
                self._settle(job)

    def bind(self, orders: StepOrders) -> bool:
        """Take this step's orders. Entering the loads cannot fail; attaching is guarded.

        Whether there is nothing to do in this step: then only ``wait_for_save`` and ``clear`` need
        be called.
        """
        self._fail_stores()  # of a step that raised before they were submitted
        self._orders = orders
        self._forward.begins()
        if orders is CALM and self._is_idle():
            return True
        if self._answered:
            self._answered = {a for a in self._answered if a >= orders.low_water}
        for order in orders.loads:
            if order.attempt not in self._answered:
                self._running.setdefault(order.attempt, RunningLoad(order))
        if self._engine is None:
            self._bind(orders)
        return False

    def _is_idle(self) -> bool:
        """Nothing of ours is out, and nothing to be said."""
        return (
            not (self._running or self._job_store or self._invalid or self.guard.errors)
            and self._report.is_empty()
        )

    @guarded(lambda self, orders: None)
    def _bind(self, orders: StepOrders) -> None:
        self._ensure_engine(orders.arena)

    @guarded(lambda self: self._fail_unstarted())
    def start_load_kv(self) -> None:
        """Submit this step's loads; carry out fail orders."""
        orders = self._orders
        if orders is None or not (self._running or orders.fails):
            return
        for load in list(self._running.values()):
            if not load.started:
                self._start(load)
        for fail in orders.fails:
            self._fail(fail)
        self._fail_overdue()

    def _start(self, load: RunningLoad) -> None:
        load.started = True
        engine = self._engine
        if engine is None:
            self._fail_load(load, LoadFailure.WORKER_LOST)
            return
        job = 0
        try:
            self._plant_corruption(load.order)
            for copies in load.order.copies:
                job = self._next_job()
                load.jobs[job] = copies
                engine.submit_load(
                    job,
                    self._engine_group[copies.group],
                    copies,
                    self._shard_offset(copies.group),
                    load.order.deadline_ms,
                )
        except Exception as exc:
            self.guard.record("submit_load", exc)
            load.jobs.pop(job, None)
            self._fail_load(load, LoadFailure.EXCEPTION)

    def _fail_unstarted(self) -> None:
        for load in self._running.values():
            if not load.started:
                load.started = True
                self._fail_load(load, LoadFailure.EXCEPTION)
        if self._orders is not None:
            for fail in self._orders.fails:
                self._fail(fail)

    def _fail(self, fail: FailOrder) -> None:
        """A fail order: cancel what runs; an attempt never heard of is answered as failed."""
        if fail.attempt in self._answered:
            return
        load = self._running.get(fail.attempt)
        if load is None:
            load = RunningLoad(LoadOrder(fail.attempt, fail.request_id, 0, []), started=True)
            load.bad_blocks = set(fail.block_ids)
            self._running[fail.attempt] = load
        elif load.started and not fail.void:
            load.overdue = True
            return
        load.started = True
        self._fail_load(load, LoadFailure.DEADLINE)

    def _fail_overdue(self) -> None:
        """The scheduler half counts from before a forward, which may take longer than a load is
        given: one that has ended well meanwhile is not failed, and none before its own deadline,
        which counts from the end of the compute that the engine lets it wait for."""
        if self._engine is None:
            return
        now = self._clock()
        for load in self._running.values():
            load.note_begun(self._engine, now)
        if not any(load.overdue for load in self._running.values()):
            return
        self._collect()
        for load in self._running.values():
            if load.overdue and load.jobs and load.is_past(now):
                self._fail_load(load, LoadFailure.DEADLINE)

    def _fail_load(self, load: RunningLoad, reason: LoadFailure) -> None:
        """Mark failed and cancel; it is answered once no job of it can write a block any more."""
        load.failure = load.failure or reason
        load.bad_blocks |= load.all_blocks()
        for job in load.jobs:
            if self._engine is not None:
                self._engine.cancel(job)

    @guarded(lambda self: self._fail_stores())
    def wait_for_save(self) -> None:
        """After the forward: submit this step's stores. They never wait here.

        Never of blocks that hold what was in them before: whoever comes after the crash would find
        it on NVMe under a right name.
        """
        if self._forward.look():
            self._fail_stores()
            return
        orders = self._orders
        while orders is not None and orders.stores:
            self._submit_store(orders.stores[-1])
            orders.stores.pop()

    def _submit_store(self, order: StoreOrder) -> None:
        if self._engine is None:
            return
        while order.copies:
            copies = order.copies[-1]
            if not self._stores_nothing(copies.group):
                job = self._next_job()
                self._engine.submit_store(
                    job, self._engine_group[copies.group], copies, self._shard_offset(copies.group)
                )
                self._store_jobs.setdefault(order.store, []).append(job)
                self._job_store[job] = order.store
            order.copies.pop()

    def _fail_stores(self) -> None:
        """Stores that could not be submitted: their slots must not stay FILLING."""
        orders, arena = self._orders, self._arena
        if orders is None or arena is None:
            return
        for order in orders.stores:
            for copies in order.copies:
                for slot, generation in zip(copies.slots, copies.generations, strict=True):
                    arena.fail(int(slot), int(generation))
        orders.stores.clear()

    def _stores_nothing(self, group: int) -> bool:
        """Replicated KV is stored once, by rank 0."""
        return self._group(group).shards == 1 and self.rank != 0

    # ---------------------------------------------------------------- answers

    @guarded(lambda self: self._answer_all_failed())
    def transfer_results(self) -> StepAnswers:
        """Requests whose loads ended in this step, failed ones included. Each exactly once."""
        if self._orders is not None and self._orders.idle and self._engine is not None:
            if len(self._running) > 1 or self._job_store:
                self._collect()  # to wait for one that has not ended
            first = next((j for load in self._running.values() for j in load.jobs), None)
            if first is not None:
                self._engine.wait(first, self._idle_wait_ms)
        self._collect()
        return self._answer()

    def _collect(self) -> None:
        if self._engine is None or not (self._running or self._job_store):
            return  # a plain decode step: nothing of ours is out
        for done in self._engine.poll():
            if done.kind == LOAD:
                self._load_done(done)
            else:
                self._store_done(done)

    def _store_done(self, done: Any) -> None:
        number = self._job_store.pop(done.job, None)
        if number is not None:
            jobs = self._store_jobs.get(number, [])
            if done.job in jobs:
                jobs.remove(done.job)
            if not jobs:
                self._store_jobs.pop(number, None)
        self._report.store_bytes += done.nbytes
        self._report.store_copy_s.append(done.copy_ns / 1e9)

    def _load_done(self, done: Any) -> None:
        for load in self._running.values():
            copies = load.jobs.pop(done.job, None)
            if copies is None:
                continue
            self._report.load_bytes += done.nbytes
            self._report.load_copy_s.append(done.copy_ns / 1e9)
            self._report.load_wait_s.append(done.wait_ns / 1e9)
            if done.status == OK and not done.wait_ns:
                self._report.rate_bytes += done.nbytes
                self._report.rate_s += done.copy_ns / 1e9
            if done.status != OK:
                self._note_failure(load, copies, done)
            return

    def _note_failure(self, load: RunningLoad, copies: ChunkCopies, done: Any) -> None:
        reason = REASONS.get(done.reason, LoadFailure.EXCEPTION)
        if done.status == DEADLINE:
            reason = LoadFailure.DEADLINE
        load.failure = load.failure or reason
        item = max(done.failed_item, 0)
        load.bad_blocks |= {int(b) for b in copies.block_ids[item:].ravel() if b >= 0}
        blame = reason in (LoadFailure.CORRUPT, LoadFailure.SLOT_LOST)
        if reason is LoadFailure.DEADLINE and self._arena is not None:
            # Only a slot that nobody filled in time tells something about its tier.
            slot = int(copies.slots[item])
            blame = self._arena.state(slot) == SlotState.FILLING
        if done.failed_item >= 0 and blame:
            self._report.bad.append(
                BadChunk(
                    load.order.attempt,
                    int(copies.slots[item]),
                    int(copies.generations[item]),
                    int(copies.offsets[item]),
                    reason,
                )
            )

    def _answer(self) -> StepAnswers:
        answers = StepAnswers()
        for attempt, load in list(self._running.items()):
            if not load.started or load.jobs:
                continue
            del self._running[attempt]
            self._answered.add(attempt)
            answers.finished.add(load.order.request_id)
            if load.failure is not None:
                self._report.failed_attempts[attempt] = load.failure
                if self._single_group and load.bad_blocks:
                    answers.invalid_blocks |= load.bad_blocks
                else:
                    answers.failed.add(load.order.request_id)
        self._invalid |= answers.invalid_blocks
        return answers

    def _answer_all_failed(self) -> StepAnswers:
        """Fallback: something of ours broke. End every job, answer every attempt failed."""
        for load in self._running.values():
            load.started = True
            self._fail_load(load, LoadFailure.EXCEPTION)
            for job in load.jobs:
                self._settle(job)
            load.jobs.clear()
        return self._answer()

    def take_invalid_blocks(self) -> set[int]:
        """Blocks that hold no valid KV after failed loads (single KV group engines)."""
        invalid, self._invalid = self._invalid, set()
        return invalid

    def take_report(self) -> WorkerReport | None:
        """This step's account for the scheduler half, None when there is nothing to say."""
        if self.guard.errors:
            self._report.hook_errors = self.guard.take_errors()
        if self._report.is_empty():
            return None
        report, self._report = self._report, WorkerReport()
        return report

    def clear(self) -> None:
        """End of step."""
        self._orders = None
        self._forward.ended()

    def shutdown(self) -> None:
        """Stop copying; slots half filled stay FILLING and are never served."""
        if self._engine is not None:
            self._engine.close()
            self._engine = None
        self._arena = None  # an engine that ends inside a living process gives the memory back

    def check(self) -> None:
        """Raise AssertionError on a broken invariant."""
        assert not (self._running.keys() & self._answered), "attempt both running and answered"
        for number, jobs in self._store_jobs.items():
            assert all(self._job_store.get(j) == number for j in jobs), "store job misfiled"

    # ---------------------------------------------------------------- small helpers

    def _next_job(self) -> int:
        self._job_no += 1
        return self._job_no

    def _group(self, group: int) -> Any:
        return next(g for g in self.layout.groups if g.group == group)

    def _shard_offset(self, group: int) -> int:
        g = self._group(group)
        return 0 if g.shards == 1 else self.rank * g.shard_bytes
