"""Proof that the step harness sees what it is for: break one rule at a time and it turns red.

Each mutation takes one safety rule out of the real code; its scenario is green without it (checked
first) and must raise an AssertionError with it.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest

from kvoffload import _core
from kvoffload.copy.cpu import CpuCopyEngine
from kvoffload.core.loads import LoadTable
from kvoffload.engines.vllm import loads, lookups, orders, scheduler, stores, worker
from kvoffload.types import LoadFailure, SlotRef
from tests.support.steps import MiniEngine, Options, tokens
from tests.support.steps_blocks import GroupSpec, Status
from tests.support.steps_lazy import LazyEngine

HYBRID = (GroupSpec(), GroupSpec(window=9))
Patch = pytest.MonkeyPatch


# -- scenarios


def reuse_under_stores() -> None:
    """Stores start only when waited for; HBM is so small that their blocks are reused at once."""
    engine = MiniEngine(Options(blocks=14, store_lag=10_000, caching=False, in_flight=2))
    for i in range(4):
        engine.add(tokens(40, i), 2)
    for _ in range(40):
        engine.step()
    for lazy in engine.engines:
        lazy.flush()
    engine.finish()


def load_and_resume() -> None:
    engine = MiniEngine(Options(ranks=2, in_flight=2, random_lag=2))
    engine.ask(tokens(40), 9)
    engine.forget_hbm()
    engine.ask(tokens(40), 9)
    engine.finish()


def load_beside_a_decode() -> None:
    engine = MiniEngine(Options(in_flight=2, load_lag=3))
    engine.ask(tokens(40, 1), 9)
    engine.forget_hbm()
    engine.add(tokens(9, 2), 60)
    engine.add(tokens(40, 1), 9)
    engine.finish()


def loads_that_always_fail() -> None:
    engine = MiniEngine(Options(in_flight=2))
    engine.ask(tokens(40))
    engine.forget_hbm()
    engine.engines[0].inject(1)
    engine.ask(tokens(40))
    engine.finish()


def load_that_never_ends() -> None:
    engine = MiniEngine(Options(in_flight=2, load_lag=10**6))
    engine.ask(tokens(40))
    engine.forget_hbm()
    request = engine.add(tokens(40), 2)
    engine.until_loading(request)
    for _ in range(5):  # it has begun: its time counts from there
        engine.step()
    engine.clock.now += 6.0
    engine.finish()


def abort_then_late_load() -> None:
    """The load's copies would start long after its blocks went to somebody else."""
    engine = MiniEngine(Options(in_flight=2, load_lag=30, blocks=14, caching=False))
    engine.ask(tokens(40))
    request = engine.add(tokens(40), 2)
    engine.until_loading(request)
    engine.abort(request)
    engine.step()
    engine.clock.now += 6.0
    engine.options = replace(engine.options, load_lag=0)
    engine.add(tokens(20, 1), 30)
    engine.add(tokens(16, 2), 30)
    engine.finish()


def pressure_on_the_arena() -> None:
    """Slots of 256 KiB, eight of them, wanted by everybody while a load is out."""
    big = Options(token_bytes=8192, layers=4, in_flight=2, load_lag=100, budget=64)
    engine = MiniEngine(big)
    engine.ask(tokens(24))
    engine.forget_hbm()
    request = engine.add(tokens(24), 2)
    engine.until_loading(request)
    for i in range(1, 4):
        other = engine.add(tokens(24, i), 2)
        engine.until(other.is_finished)
    assert request.status is Status.REMOTE, "the load is still out"
    evicted = engine.manager.counters.evicted
    engine.finish()
    assert evicted, "nothing was evicted: this scenario proves nothing"


def chunked_prefill() -> None:
    engine = MiniEngine(Options(budget=7))
    engine.add(tokens(15), 1)
    engine.finish()


def sliding_full_prompt() -> None:
    engine = MiniEngine(Options(groups=HYBRID, blocks=96))
    engine.ask(tokens(40), 2)
    engine.forget_hbm()
    engine.ask(tokens(40), 2)
    engine.finish()


def hbm_hit_inside_a_chunk() -> None:
    """Somebody computes with the chunk's first half while its second half is loaded."""
    engine = MiniEngine(Options(in_flight=2, load_lag=3, budget=64))
    engine.ask(tokens(32))
    engine.forget_hbm()
    runner = engine.add(tokens(13), 40)
    engine.until(lambda: runner.num_output_tokens > 2)
    engine.ask(tokens(32))
    engine.finish()


def old_weights_running() -> None:
    engine = MiniEngine()
    request = engine.add(tokens(12), 30)
    engine.until(lambda: request.num_output_tokens > 2)
    stored = engine.stores_done()
    engine.arena.bump_epoch()
    engine.run()
    assert engine.stores_done() == stored, "KV of the old weights was stored"
    engine.finish()


def weights_and_hbm_reset() -> None:
    engine = MiniEngine()
    engine.ask(tokens(40))
    engine.change_weights()
    engine.reset(connector=False, running=True)
    engine.ask(tokens(40))
    engine.finish()


def slot_lost_under_a_load() -> None:
    """A slot is refilled with another chunk while a load of the old one is on its way."""
    engine = MiniEngine(Options(load_lag=3))
    engine.ask(tokens(40))
    engine.ask(tokens(8, 1))
    engine.forget_hbm()
    request = engine.add(tokens(40), 2)
    engine.until_loading(request)
    order = engine.queue[0].metadata.loads[0] if engine.queue else _running(engine)
    slot, offset = int(order.copies[0].slots[2]), int(order.copies[0].offsets[2])
    generation = engine.arena.begin_fill(slot, 1)
    np.frombuffer(engine.arena.view(offset, 512), np.uint8)[:] = 7
    engine.arena.fill_done(slot, generation)
    engine.expect_bad = True
    reasons: list[LoadFailure] = []
    real = engine.manager.slot_failed

    def slot_failed(ref: SlotRef, reason: LoadFailure) -> bool:
        reasons.append(reason)
        return real(ref, reason)

    engine.manager.slot_failed = slot_failed  # type: ignore[method-assign, assignment]
    engine.scheduler_half.check = lambda: None  # type: ignore[method-assign]
    engine.until(lambda: request.is_finished())
    engine.audit_hbm()
    assert reasons == [LoadFailure.SLOT_LOST], reasons
    engine.close()


def _running(engine: MiniEngine) -> Any:
    (load,) = engine.ranks[0].half._running.values()
    return load.order


def two_ranks() -> None:
    engine = MiniEngine(Options(ranks=2))
    engine.ask(tokens(40))
    engine.finish()


# -- mutations


def no_fence(patch: Patch) -> None:
    patch.setattr(orders.Fence, "due", lambda self, output, loads: [])


def fence_is_always_clear(patch: Patch) -> None:
    patch.setattr(orders.Fence, "is_clear", lambda self, output: True)


def looks_a_step_late(patch: Patch) -> None:
    real = stores.StorePlanner._put_off
    patch.setattr(
        stores.StorePlanner, "_put_off", lambda self, name, left: real(self, name, left + 1)
    )


def fence_forgets_early(patch: Patch) -> None:
    patch.setattr(orders.Fence, "_prune", lambda self: self._pending.clear())


def answers_twice(patch: Patch) -> None:
    real = worker.WorkerHalf._answer
    said: dict[int, set[str]] = {}

    def again(self: Any) -> Any:
        answers = real(self)
        answers.finished |= said.get(id(self), set())
        said[id(self)] = set(answers.finished) - said.get(id(self), set())
        return answers

    patch.setattr(worker.WorkerHalf, "_answer", again)


def never_answers(patch: Patch) -> None:
    patch.setattr(worker.WorkerHalf, "_answer", lambda self: worker.StepAnswers())


def forgets_the_ban(patch: Patch) -> None:
    patch.setattr(LoadTable, "is_banned", lambda self, request_id: False)


def no_deadline(patch: Patch) -> None:
    patch.setattr(LoadTable, "due", lambda self, now: [])


def answers_before_the_copy_ended(patch: Patch) -> None:
    real = worker.WorkerHalf._fail_load

    def fail(self: Any, load: Any, reason: Any) -> None:
        load.jobs.clear()
        real(self, load, reason)

    patch.setattr(worker.WorkerHalf, "_fail_load", fail)


def releases_the_lease_early(patch: Patch) -> None:
    real = scheduler.SchedulerHalf._commit

    def commit(self: Any, request: Any, block_ids: Any, num_external: int) -> None:
        held = self._state(request).provisional
        real(self, request, block_ids, num_external)
        if held is not None:
            self.manager.release(held.lease.id)

    patch.setattr(scheduler.SchedulerHalf, "_commit", commit)


def stores_what_is_not_computed(patch: Patch) -> None:
    """Rounds up to the chunk instead of down."""
    real = stores.StorePlanner.storable
    patch.setattr(
        stores.StorePlanner,
        "storable",
        lambda self, state, n: -(-real(self, state, n) // self._grid) * self._grid,
    )


def sliding_prompt_whole(patch: Patch) -> None:
    real = lookups.Lookups._plan

    def plan(self: Any, *args: Any) -> Any:
        self._sliding = False
        return real(self, *args)

    patch.setattr(lookups.Lookups, "_plan", plan)


def writes_hbm_hits(patch: Patch) -> None:
    real = orders.load_copies

    def copies(layout: Any, lease: Any, tables: Any, start: int, end: int) -> Any:
        return real(layout, lease, tables, start - start % layout.groups[0].chunk_tokens, end)

    patch.setattr(loads, "load_copies", copies)


def one_shard_for_all(patch: Patch) -> None:
    patch.setattr(worker.WorkerHalf, "_shard_offset", lambda self, group: 0)


def no_taint(patch: Patch) -> None:
    real = scheduler.SchedulerHalf._reset

    def reset(self: Any, why: str) -> None:
        real(self, why)
        for state in self._states.values():
            state.tainted = False

    patch.setattr(scheduler.SchedulerHalf, "_reset", reset)


def epoch_not_seen(patch: Patch) -> None:
    patch.setattr(scheduler.SchedulerHalf, "_check_epoch", lambda self: None)


def no_generation_check(patch: Patch) -> None:
    """Copies take whatever generation the slot has by now. The checksum still catches it."""
    real = LazyEngine._start

    def start(self: Any, kind: int, job: int, args: Any) -> None:
        group, copies, *rest = args
        arena = self.inner._arena
        now = np.asarray([arena.generation(int(s)) for s in copies.slots], np.uint64)
        real(self, kind, job, (group, replace(copies, generations=now), *rest))

    _keep_arena(patch)
    patch.setattr(LazyEngine, "_start", start)


def no_generation_check_and_no_checksum(patch: Patch) -> None:
    no_generation_check(patch)

    def submit_load(
        self: Any, job: int, group: int, copies: Any, shard_offset: int, deadline_ms: int
    ) -> None:
        self._loads.submit_load(
            job, group, copies.slots, copies.generations,
            copies.offsets + np.uint64(shard_offset), copies.keys, copies.block_ids,
            deadline_ms, False,
        )  # fmt: skip

    patch.setattr(CpuCopyEngine, "submit_load", submit_load)


def _keep_arena(patch: Patch) -> None:
    real = CpuCopyEngine.__init__

    def init(self: Any, arena: _core.Arena, rank: int, threads: int = 2) -> None:
        real(self, arena, rank, threads)
        self._arena = arena

    patch.setattr(CpuCopyEngine, "__init__", init)


@dataclass(frozen=True)
class Case:
    mutate: Callable[[Patch], None]
    scenario: Callable[[], None]
    says: str  # what the failure is about


CASES = [
    Case(no_fence, reuse_under_stores, "in DRAM"),
    Case(fence_is_always_clear, reuse_under_stores, "in DRAM"),
    Case(looks_a_step_late, load_beside_a_decode, "complete chunk is not stored"),
    Case(fence_forgets_early, reuse_under_stores, "in DRAM"),
    Case(answers_twice, load_and_resume, "twice|unknown request|while"),
    Case(never_answers, load_and_resume, "not idle"),
    Case(forgets_the_ban, loads_that_always_fail, "not idle"),
    Case(no_deadline, load_that_never_ends, "not idle"),
    Case(answers_before_the_copy_ended, abort_then_late_load, "foreign bytes|garbage|does not end"),
    Case(releases_the_lease_early, pressure_on_the_arena, "corrupt or lost"),
    Case(stores_what_is_not_computed, chunked_prefill, "in DRAM"),
    Case(sliding_prompt_whole, sliding_full_prompt, "not there|garbage"),
    Case(writes_hbm_hits, hbm_hit_inside_a_chunk, "garbage"),
    Case(one_shard_for_all, two_ranks, "in DRAM"),
    Case(no_taint, old_weights_running, "old weights"),
    Case(epoch_not_seen, weights_and_hbm_reset, "foreign bytes"),
    Case(no_generation_check, slot_lost_under_a_load, "corrupt"),
    Case(no_generation_check_and_no_checksum, slot_lost_under_a_load, "foreign bytes"),
]


@pytest.fixture(autouse=True)
def quiet(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.CRITICAL, "vllm.kvoffload")


@pytest.mark.parametrize("scenario", {c.scenario: None for c in CASES}, ids=lambda s: s.__name__)
def test_scenario_is_green(scenario: Callable[[], None]) -> None:
    scenario()


@pytest.mark.parametrize("case", CASES, ids=lambda c: c.mutate.__name__)
def test_mutation_is_seen(case: Case, monkeypatch: Patch) -> None:
    case.mutate(monkeypatch)
    with pytest.raises(AssertionError, match=case.says):
        case.scenario()
