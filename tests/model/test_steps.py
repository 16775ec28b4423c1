"""Both halves of the connector, step by step, over real bytes: every case that has a name.

The oracle is in tests/support/steps.py: every forward checks the bytes it attends to, every test ends
with ``finish``, which checks that nothing is left over and that all that is kept is filed rightly.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from kvoffload import _core
from kvoffload.core.hashchain import Chain
from kvoffload.engines.vllm.meta import BadChunk, WorkerReport
from kvoffload.types import LoadFailure
from tests.support.steps import LOAD, MiniEngine, Options, tokens
from tests.support.steps_blocks import GroupSpec, MiniRequest, Status
from tests.support.steps_rank import Geometry, KVMemory, Rank

FULL = (GroupSpec(),)  # chunks of 8 tokens, blocks of 4
HYBRID = (GroupSpec(), GroupSpec(window=9))
ENGINES = {
    "one step": Options(),
    "two in flight": Options(in_flight=2),
    "two in flight, eager": Options(in_flight=2, late_ranks=False, random_lag=3),
    "same process": Options(in_flight=2, pickled=False),
    "two ranks": Options(ranks=2, in_flight=2, late_ranks=False, random_lag=3),
    "replicated KV": Options(ranks=2, replicated=True),
    "block outermost": Options(kv_layout="BLHNC"),
    "strided pages": Options(pad=64, layers=3),
    "chunks of two leaves": Options(groups=(GroupSpec(blocks_per_chunk=3),), token_bytes=1024),
    "hybrid": Options(groups=HYBRID, in_flight=2, blocks=128),
    "hybrid, two ranks": Options(groups=HYBRID, ranks=2, blocks=128, random_lag=2),
    "drafts": Options(spec_tokens=3, in_flight=2),
    "drafts, one step": Options(spec_tokens=2),
    "EAGLE": Options(spec_tokens=2, eagle=True, in_flight=2),
    "no prefix caching": Options(caching=False, in_flight=2),
    "vLLM 0.33": Options(defer_alloc=True, in_flight=2),
    "small steps": Options(budget=8, in_flight=2),
    "followers": Options(follow=True, in_flight=2),
    "followers, hybrid": Options(groups=HYBRID, follow=True, in_flight=2, blocks=128),
    "followers, vLLM 0.33": Options(follow=True, defer_alloc=True, in_flight=2, random_lag=3),
    "real threads": Options(in_flight=2, ranks=2, store_lag=-1, load_lag=-1),
}


@pytest.fixture(params=ENGINES.values(), ids=ENGINES.keys())
def engine(request: pytest.FixtureRequest) -> Iterator[MiniEngine]:
    made = MiniEngine(request.param)
    yield made
    made.close()


def test_a_prompt_comes_back(engine: MiniEngine) -> None:
    """Store, forget HBM, load: same tokens, loaded and not computed."""
    prompt = tokens(37)
    first = engine.ask(prompt, 6)
    assert engine.stores_done() and not engine.loads_done()
    engine.forget_hbm()
    again = engine.ask(prompt, 6)
    assert again.chain.tokens == first.chain.tokens
    assert again.loads == 1 and engine.loads_done()
    assert engine.computed(again) <= engine.computed(first) - 24
    engine.finish()


def test_generated_tokens_are_stored_and_shared_prefixes_found(engine: MiniEngine) -> None:
    """A second turn loads the first turn's answer too; another tenant's salt finds nothing."""
    first = engine.ask(tokens(30), 20)
    engine.forget_hbm()
    turn = list(first.chain.tokens[:-1]) + tokens(5, 9)
    second = engine.ask(turn, 4)
    assert second.loads == 1 and engine.computed(second) < 30
    engine.forget_hbm()
    other = engine.ask(turn, 4, salt=b"other tenant")
    assert other.loads == 0
    engine.finish()


def test_many_at_once(engine: MiniEngine) -> None:
    """Shared prefixes, all in one batch, twice over, with HBM too small for everybody."""
    for _ in range(3):
        asked = [engine.add(tokens(40)[: 8 + 4 * i] + tokens(i, i), 3 + i) for i in range(7)]
        engine.run()
        assert all(r.is_finished() for r in asked)
        engine.settle()
        engine.forget_hbm()
    assert engine.scheduler.parked >= 7
    engine.finish()


# -- single flight


@pytest.mark.parametrize("groups", [FULL, HYBRID], ids=["full", "hybrid"])
@pytest.mark.parametrize("follow", [True, False])
def test_followers_wait_for_the_first_load_and_hit_hbm(groups: Any, follow: bool) -> None:
    """Four requests, one prefix: one load, and one copy of it in HBM."""
    engine = MiniEngine(
        Options(groups=groups, follow=follow, in_flight=2, blocks=256, load_lag=4, budget=256)
    )
    prompt = tokens(40)
    want = engine.ask([*prompt, 1], 3)
    engine.forget_hbm()
    asked = [engine.add([*prompt, i], 3) for i in range(1, 5)]
    engine.until_loading(asked[0])
    in_use = engine.options.blocks - engine.pool.free_blocks
    engine.run()
    assert asked[0].chain.tokens == want.chain.tokens
    assert [r.loads for r in asked] == ([1, 0, 0, 0] if follow else [1, 1, 1, 1])
    assert bool(engine.scheduler.asked_again) == follow
    alone = in_use if follow else in_use / 4
    assert alone <= -(-40 // engine.kv.block_tokens) * len(groups) + len(groups)
    engine.finish()


@pytest.mark.parametrize("how", ["deadline", "abort"])
def test_followers_go_on_when_the_leader_does_not(how: str) -> None:
    engine = MiniEngine(Options(follow=True, in_flight=2, blocks=256, load_lag=10**6, budget=256))
    engine.ask(tokens(40))
    engine.forget_hbm()
    leader, follower = engine.add(tokens(40), 2), engine.add(tokens(44), 2)
    engine.until_loading(leader)
    assert follower.status is Status.WAITING and engine.scheduler.asked_again
    if how == "abort":
        engine.abort(leader)
    for _ in range(150):  # the wait is bounded, here by 0.1 s: then it loads itself
        engine.step()
    assert follower.status is Status.REMOTE
    engine.clock.now += 5.0
    engine.run()
    assert follower.is_finished() and follower.loads == 1
    engine.finish()


def test_no_waiting_without_hbms_prefix_cache() -> None:
    engine = MiniEngine(Options(follow=True, caching=False, in_flight=2, blocks=256, budget=256))
    engine.ask(tokens(40))
    asked = [engine.add(tokens(40), 2) for _ in range(3)]
    engine.run()
    assert [r.loads for r in asked] == [1, 1, 1] and not engine.scheduler.asked_again
    engine.finish()


# -- what exactly is loaded


@pytest.mark.parametrize("room", [True, False])
def test_a_load_for_part_of_which_there_was_room_teaches_nothing(
    room: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It ends much sooner than the plan of the whole hit said."""
    engine = MiniEngine()
    prompt = tokens(40)
    engine.ask(prompt)
    engine.forget_hbm()
    manager, learned = engine.manager, []
    acquire, plan = manager.acquire, manager.plan
    monkeypatch.setattr(
        manager, "observe_load_time", lambda took, expected: learned.append(expected)
    )
    monkeypatch.setattr(manager, "plan", lambda *a: replace(plan(*a), load_s=2.5))

    def fits(owner: str, chain: Any, start: int, end: int, **more: Any) -> Any:
        return acquire(owner, chain, start, end, **more) if room or end < 40 else None

    monkeypatch.setattr(manager, "acquire", fits)
    again = engine.ask(prompt)
    assert again.loads == 1 and engine.loads_done() == (5 if room else 2)
    assert learned == ([2.5] if room else [])
    monkeypatch.undo()
    engine.finish()


def test_full_prompt_hit_is_returned_whole() -> None:
    """vLLM recomputes one token itself."""
    engine = MiniEngine()
    prompt = tokens(32)
    engine.ask(prompt)
    engine.forget_hbm()
    again = engine.ask(prompt)
    assert engine.loads_done() == 4 and engine.computed(again) == 1
    engine.finish()


def test_hbm_hit_that_ends_inside_a_chunk() -> None:
    """The chunk's other half is loaded; the blocks that HBM has are not written."""
    engine = MiniEngine(Options(in_flight=2))
    prompt = tokens(32)
    engine.ask(prompt)
    engine.forget_hbm()
    engine.ask(prompt[:13])  # leaves 12 tokens in HBM: one chunk and a half
    before = engine.loads_done()
    request = engine.add(prompt)
    engine.until_loading(request)
    order = engine.queue[-1].metadata.loads[0]
    assert order.copies[0].block_ids[0, 0] == -1, "a block that HBM has is left alone"
    assert (order.copies[0].block_ids.ravel()[1:] > 0).all()
    engine.run()
    assert engine.loads_done() - before == 3 and engine.computed(request) == 1
    engine.finish()


def test_chunked_prefill_above_a_load() -> None:
    """A load, then a prefill of several steps; the tail is stored as it completes."""
    engine = MiniEngine(Options(budget=8, in_flight=2))
    engine.ask(tokens(24))
    engine.forget_hbm()
    request = engine.ask(tokens(24) + tokens(40, 5), 3)
    assert request.loads == 1 and engine.computed(request) == 40 + 2
    engine.forget_hbm()
    assert engine.ask(tokens(24) + tokens(40, 5), 3).loads == 1
    engine.finish()


def test_skip_reading_prefix_cache_never_loads() -> None:
    engine = MiniEngine()
    engine.ask(tokens(32))
    engine.forget_hbm()
    request = engine.add(tokens(32), skip=True)
    engine.run()
    assert request.loads == 0 and engine.computed(request) == 32
    engine.finish()


def test_sliding_window_loads_only_its_window() -> None:
    """The window's blocks come back, the ones before are null and never written."""
    engine = MiniEngine(Options(groups=HYBRID, blocks=128))
    engine.ask(tokens(41))
    engine.forget_hbm()
    request = engine.add(tokens(41))
    engine.until_loading(request)
    by_group = (
        {c.group: c for c in engine.queue[-1].metadata.loads[0].copies} if engine.queue else {}
    )
    if by_group:
        assert by_group[0].block_ids.size == 10 and by_group[1].block_ids.size == 2
    engine.run()
    assert engine.computed(request) == 1
    engine.finish()


# -- preemption and aborts


@pytest.mark.parametrize("groups", [FULL, HYBRID], ids=["full", "hybrid"])
@pytest.mark.parametrize("in_flight", [1, 2])
def test_preempted_requests_resume_from_the_tier(groups: Any, in_flight: int) -> None:
    blocks = 22 if groups is FULL else 44
    engine = MiniEngine(Options(groups=groups, in_flight=in_flight, blocks=blocks, caching=False))
    asked = [engine.add(tokens(16, i), 36) for i in range(3)]
    engine.run()
    assert engine.scheduler.preemptions and any(r.num_preemptions and r.loads for r in asked)
    engine.finish()


@pytest.mark.parametrize("ranks", [1, 2])
def test_abort_while_loading_keeps_the_blocks_until_the_answer(ranks: int) -> None:
    """Nobody gets the aborted request's blocks while a copy may still write them."""
    engine = MiniEngine(Options(ranks=ranks, in_flight=2, blocks=24, load_lag=8, late_ranks=False))
    engine.ask(tokens(40))
    engine.forget_hbm()
    request = engine.add(tokens(40))
    engine.until_loading(request)
    held = {b for ids in engine.kv.block_ids(request.request_id) for b in ids}
    engine.abort(request)
    others = [engine.add(tokens(30, 50 + i), 8) for i in range(3)]
    for _ in range(4):
        engine.step()
        for other in others:
            assert held.isdisjoint(*engine.kv.block_ids(other.request_id))
    assert request.is_finished()
    engine.run()
    engine.settle()
    engine.forget_hbm()
    assert engine.ask(tokens(40)).loads == 1
    engine.finish()


@pytest.mark.parametrize("steps", range(6))
def test_abort_at_every_step(steps: int) -> None:
    engine = MiniEngine(Options(in_flight=2, load_lag=2, store_lag=2, spec_tokens=1))
    engine.ask(tokens(40))
    engine.forget_hbm()
    request = engine.add(tokens(40) + tokens(9, 3), 6)
    for _ in range(steps):
        engine.step()
    engine.abort(request)
    if not engine.queue:
        engine._take_aborts()
    engine.add(tokens(44, 4), 5)
    engine.finish()


def test_abort_between_parking_and_a_deferred_alloc() -> None:
    """0.33: update_state_after_alloc may never come; the provisional lease goes with the request."""
    engine = MiniEngine(Options(defer_alloc=True))
    engine.ask(tokens(32))
    engine.forget_hbm()
    request = engine.add(tokens(32))
    engine.until_loading(request)
    assert engine.scheduler.owed == [request] and engine.manager.occupancy().bytes_pinned
    engine.scheduler.abort(request.request_id)
    engine.known[request.request_id].aborted = True
    assert not engine.manager.occupancy().bytes_pinned
    engine.finish()


# -- the fence


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("in_flight", [1, 2])
def test_blocks_are_reused_while_their_store_is_out(ranks: int, in_flight: int) -> None:
    """Stores that only start when someone waits for them: only the fence gets them right bytes."""
    options = Options(ranks=ranks, in_flight=in_flight, blocks=14, store_lag=10_000, caching=False)
    engine = MiniEngine(options)
    for i in range(6):
        engine.add(tokens(40, i), 2)
    for _ in range(60):
        engine.step()
    assert engine.manager.counters.stored >= 5 * 5, "the fence made the stores happen"
    for lazy in engine.engines:
        lazy.flush()
    engine.run()
    engine.settle()
    assert engine.audit_dram() == 6 * 5
    engine.finish()


def test_a_load_into_blocks_whose_store_is_out() -> None:
    """The reuse is by a load, not by a forward."""
    engine = MiniEngine(Options(blocks=14, store_lag=3, in_flight=2))
    engine.ask(tokens(40))
    engine.options = replace(engine.options, store_lag=10_000)
    engine.forget_hbm()
    engine.add(tokens(40, 1), 1)
    engine.until(lambda: not engine.scheduler.running and not engine.scheduler.waiting)
    engine.drain_queue()
    request = engine.add(tokens(40))
    engine.until_loading(request)
    for _ in range(10):
        engine.step()
    for lazy in engine.engines:
        lazy.flush()
    engine.run()
    engine.settle()
    assert engine.audit_dram() == 10
    engine.finish()


# -- failures


@pytest.mark.parametrize("groups", [FULL, HYBRID], ids=["full", "hybrid"])
@pytest.mark.parametrize("caching", [True, False])
def test_corrupt_slot_is_recomputed_and_dropped(groups: Any, caching: bool) -> None:
    """Never used, never offered to the same request again, gone for the next one."""
    engine = MiniEngine(Options(groups=groups, in_flight=2, blocks=128, caching=caching))
    engine.expect_bad = True
    prompt = tokens(40)
    first = engine.ask(prompt, 3)
    engine.forget_hbm()
    known = engine.known[first.request_id]
    chain = engine.chain_of(known)
    lease = engine.manager.acquire("test", chain, 0, 40)
    assert lease is not None
    victim = next(i for i in lease.items if i.group == 0 and i.chunk == 2)
    engine.manager.release(lease.id)
    engine.arena.view(victim.ref.offset, 64)[5] ^= 1
    second = engine.ask(prompt, 3)
    assert second.chain.tokens == first.chain.tokens
    assert second.loads == 1 and engine.scheduler.failed_loads == 1
    assert engine.manager.counters.slot_failed == 1 and engine.bad_chunks == 1
    engine.forget_hbm()
    third = engine.ask(prompt, 3)
    assert third.loads == 1 and engine.scheduler.failed_loads == 1, "stored again, loads again"
    engine.finish()


@pytest.mark.parametrize("groups", [FULL, HYBRID], ids=["full", "hybrid"])
def test_one_rank_of_two_fails(groups: Any) -> None:
    """One rank's load fails, the other's does not and comes later: recomputed on both."""
    engine = MiniEngine(Options(groups=groups, ranks=2, in_flight=2, blocks=128))
    engine.ask(tokens(40))
    for bad in range(2):
        engine.forget_hbm()
        engine.engines[bad].inject(1)
        engine.engines[1 - bad].lag = lambda kind: 4 if kind == LOAD else 0
        request = engine.ask(tokens(40))
        assert request.loads == 1 and engine.scheduler.failed_loads == bad + 1
        for lazy in engine.engines:
            lazy.inject(0)
            lazy.lag = lambda kind: 0
    assert engine.manager.counters.slot_failed == 0, "the chunks are good"
    engine.forget_hbm()
    request = engine.ask(tokens(40))
    assert request.loads == 1 and engine.scheduler.failed_loads == 2
    engine.finish()


def _counts(engine: MiniEngine) -> dict[str, float]:
    """What was counted since the last call."""
    counts: dict[str, float] = engine.exported()["c"]
    return counts


def test_a_load_that_fails_is_no_hit_and_costs_its_time() -> None:
    """What `top` shows while every load fails: no hits, and time lost."""
    engine = MiniEngine(Options(load_lag=2))
    engine.ask(tokens(40))
    engine.forget_hbm()
    _counts(engine)
    engine.engines[0].inject(1)
    request = engine.ask(tokens(40))
    assert request.loads == 1 and engine.scheduler.failed_loads == 1
    failed = _counts(engine)
    assert failed["kvoffload_failed_loads_total"] == 1
    assert not any(s.startswith("kvoffload_hit_") for s in failed), failed
    assert failed["kvoffload_cost_seconds_total"] > 0
    assert "kvoffload_saved_seconds_total" not in failed
    engine.engines[0].inject(0)
    engine.forget_hbm()
    assert engine.ask(tokens(40)).loads == 1
    loaded = _counts(engine)
    assert loaded["kvoffload_hit_tokens_total|dram"] == loaded["kvoffload_loaded_tokens_total"] > 0
    assert loaded["kvoffload_hit_requests_total|dram"] == 1
    engine.finish()


@pytest.mark.parametrize("apart", [False, True], ids=["in one step", "in two steps"])
def test_one_damaged_chunk_that_all_ranks_share_is_counted_once(apart: bool) -> None:
    engine = MiniEngine(Options(ranks=2, replicated=True, in_flight=2, blocks=128))
    engine.expect_bad = True
    first = engine.ask(tokens(40))
    engine.forget_hbm()
    _counts(engine)
    chain = engine.chain_of(engine.known[first.request_id])
    lease = engine.manager.acquire("test", chain, 0, 40)
    assert lease is not None
    engine.manager.release(lease.id)
    engine.arena.view(lease.items[2].ref.offset, 64)[5] ^= 1
    if apart:
        engine.engines[1].lag = lambda kind: 4 if kind == LOAD else 0
    assert engine.ask(tokens(40)).loads == 1
    counts = _counts(engine)
    assert engine.bad_chunks == 2, "both ranks met it"
    kinds = {s: v for s, v in counts.items() if s.startswith("kvoffload_failures_total")}
    assert kinds == {"kvoffload_failures_total|corrupt": 1}
    assert counts["kvoffload_failed_loads_total"] == 1
    engine.finish()


@pytest.mark.parametrize("groups", [FULL, HYBRID], ids=["full", "hybrid"])
@pytest.mark.parametrize("apart", [False, True], ids=["in one step", "in two steps"])
def test_a_load_that_all_ranks_fail_is_one_failure(groups: Any, apart: bool) -> None:
    engine = MiniEngine(Options(groups=groups, ranks=2, in_flight=2, blocks=128))
    engine.ask(tokens(40))
    engine.forget_hbm()
    _counts(engine)
    for lazy in engine.engines:
        lazy.inject(1)
    if apart:
        engine.engines[1].lag = lambda kind: 4 if kind == LOAD else 0
    assert engine.ask(tokens(40)).loads == 1
    kinds = {s: v for s, v in _counts(engine).items() if s.startswith("kvoffload_failures_total")}
    assert list(kinds.values()) == [1], kinds
    engine.finish()


def test_valid_prefix_of_a_failed_load_is_kept() -> None:
    """One KV group: only from the first bad block on is recomputed."""
    engine = MiniEngine()
    engine.ask(tokens(40))
    engine.forget_hbm()
    engine.engines[0].inject(4)  # the fourth chunk
    request = engine.ask(tokens(40))
    assert engine.scheduler.failed_loads == 1 and 8 <= engine.computed(request) <= 24
    engine.finish()


@pytest.mark.parametrize("groups", [FULL, HYBRID], ids=["full", "hybrid"])
@pytest.mark.parametrize("ranks", [1, 2])
def test_a_load_that_never_ends_is_failed_at_its_deadline(groups: Any, ranks: int) -> None:
    """The scheduler's own deadline: the ranks cancel, answer, and the prompt is recomputed."""
    engine = MiniEngine(
        Options(groups=groups, ranks=ranks, in_flight=2, blocks=128, load_lag=10**6)
    )
    engine.ask(tokens(40))
    engine.forget_hbm()
    request = engine.add(tokens(40), 2)
    engine.until_loading(request)
    for _ in range(20):
        engine.step()
    assert request.status is Status.REMOTE
    engine.clock.now += 5.0
    engine.run()
    assert request.is_finished() and request.loads == 1 and engine.scheduler.failed_loads == 1
    engine.finish()


def test_the_deadline_of_a_load_behind_a_forward_counts_from_its_end() -> None:
    """On CUDA a load is submitted behind the launch of a forward that may take longer than it is given.
    Not failed before it has begun, however often the scheduler half asks; failed once it is late."""
    engine = MiniEngine(Options(in_flight=2, blocks=128, load_lag=10**6))
    engine.ask(tokens(40))
    engine.forget_hbm()
    forward = [True]
    engine.engines[0].behind_compute = lambda: forward[0]
    request = engine.add(tokens(40), 2)
    engine.until_loading(request)
    for _ in range(30):
        engine.clock.now += 1.0
        engine.step()
    assert request.status is Status.REMOTE and not engine.scheduler.failed_loads
    forward[0] = False
    for _ in range(20):
        engine.clock.now += 0.2
        engine.step()
    assert request.status is Status.REMOTE and not engine.scheduler.failed_loads
    engine.clock.now += 5.0
    engine.run()
    assert request.is_finished() and request.loads == 1 and engine.scheduler.failed_loads == 1
    engine.finish()


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("in_flight", [1, 2])
def test_long_steps_of_others_fail_no_load(in_flight: int, ranks: int) -> None:
    """A load begins after a forward and is seen to have ended after another: when each takes longer
    than the deadline, the scheduler half's fail order meets a load that is fine."""
    engine = MiniEngine(
        Options(ranks=ranks, in_flight=in_flight, deadline_ms=60, load_lag=2, blocks=256, budget=8)
    )
    engine.ask(tokens(40))
    engine.forget_hbm()
    engine.add(tokens(160, seed=1), 2)  # a long prefill: 20 steps
    request = engine.add(tokens(40), 2)
    for _ in range(40):
        engine.clock.now += 0.2
        engine.step()
    engine.run()
    assert request.loads == 1 and engine.scheduler.failed_loads == 0
    assert engine.computed(request) < 8
    engine.finish()


@pytest.mark.parametrize("in_flight", [1, 2])
def test_a_load_that_has_ended_is_failed_by_a_reset(in_flight: int) -> None:
    """Not so where what it brought must not be used."""
    engine = MiniEngine(Options(in_flight=in_flight, load_lag=2, blocks=256, budget=8))
    engine.ask(tokens(40))
    engine.forget_hbm()
    engine.add(tokens(160, seed=1), 2)
    request = engine.add(tokens(40), 2)
    engine.until_loading(request)
    engine.scheduler_half.reset_cache()
    engine.run()
    assert request.loads == 1 and engine.scheduler.failed_loads == 1
    engine.finish()


def test_abort_and_deadline_together() -> None:
    """An aborted load is failed at its deadline too, and its blocks come back."""
    engine = MiniEngine(Options(in_flight=2, load_lag=10**6))
    engine.ask(tokens(40))
    engine.forget_hbm()
    request = engine.add(tokens(40), 2)
    engine.until_loading(request)
    engine.abort(request)
    for _ in range(5):
        engine.step()
    assert request.request_id in engine.scheduler.requests
    engine.clock.now += 5.0
    engine.finish()


def test_refused_submissions() -> None:
    """A device that refuses a copy: a failed attempt, a skipped store, and both recover."""
    engine = MiniEngine(Options(in_flight=2))
    refused: list[int] = []
    engine.ask(tokens(8))
    engine.engines[0].fail_submit = lambda kind: not refused.append(kind)  # type: ignore[func-returns-value]
    engine.forget_hbm()
    request = engine.ask(tokens(8) + tokens(16, 2))
    assert request.loads == 1 and engine.scheduler.failed_loads == 1 and len(refused) >= 2
    assert engine.manager.counters.store_failed
    engine.engines[0].fail_submit = lambda kind: False
    engine.forget_hbm()
    assert engine.ask(tokens(24, 7)).loads == 0
    engine.forget_hbm()
    assert engine.ask(tokens(24, 7)).loads == 1
    engine.finish()


def test_a_rank_that_cannot_attach_means_no_cache() -> None:
    """Neither loads nor stores, and the idle engine stops stepping after a while."""

    def attach(path: str, inode: int) -> Any:
        calls.append(path)
        if len(calls) > 1:
            raise OSError("planted: not readable here")
        return _core.Arena.attach(path, inode)

    calls: list[str] = []
    engine = MiniEngine(Options(ranks=2), attach=attach)
    engine.add(tokens(40), 3)
    engine.until(lambda: not engine.scheduler.requests)
    assert engine.scheduler.has_requests(), "steps on so that late workers can attach"
    engine.clock.now += 31.0
    engine.run()
    engine.add(tokens(40), 3)
    engine.run()
    assert not engine.stores_done() and not engine.loads_done()
    engine.finish()


def test_two_engines_in_one_process(caplog: pytest.LogCaptureFixture) -> None:
    """vLLM hands the second one's blocks to the first one's rank: whose they are is not known any
    more, unless the rank was at work before."""
    others = KVMemory(Geometry(64), Options().groups, 0)

    class TwoAtOnce(MiniEngine):
        def _rank(self, rank: int) -> Rank:
            made = super()._rank(rank)
            made.half.register_group(0, others.fragments(), 64)
            return made

    def ends(engine: MiniEngine) -> bool:
        """Whether what was computed came back."""
        engine.clock.now += 31.0  # a rank that never attaches is not waited for any longer
        for _ in range(2):
            engine.ask(tokens(40))
            engine.forget_hbm()
        engine.finish()
        return bool(engine.loads_done())

    assert not ends(TwoAtOnce()) and "two engines of one process" in caplog.text
    caplog.clear()
    engine = MiniEngine()
    engine.ranks[0].half.register_group(0, others.fragments(), 64)
    assert ends(engine) and not caplog.text


def test_namespace_not_known_yet() -> None:
    """While the weights are being digested nothing is stored or loaded; afterwards both."""
    engine = MiniEngine()
    engine.namespaces.known = False
    engine.ask(tokens(40))
    assert not engine.stores_done()
    engine.namespaces.known = True
    engine.forget_hbm()
    engine.ask(tokens(40))
    engine.forget_hbm()
    assert engine.ask(tokens(40)).loads == 1
    engine.finish()


# -- resets


def test_reset_hides_what_was_stored(tmp_path: Path) -> None:
    engine = MiniEngine(Options(in_flight=2, nvme=str(tmp_path)))
    engine.ask(tokens(40))
    assert engine.reset(connector=True)
    assert engine.manager._nvme is not None and not engine.manager._nvme.idle.enabled
    request = engine.ask(tokens(40))
    assert request.loads == 0 and engine.computed(request) == 40
    engine.forget_hbm()
    assert engine.ask(tokens(40)).loads == 1
    engine.finish()


def test_reset_of_hbm_alone_keeps_the_tiers(tmp_path: Path) -> None:
    engine = MiniEngine(Options(nvme=str(tmp_path)))
    engine.ask(tokens(40))
    assert engine.reset(connector=False)
    assert engine.manager._nvme is not None and engine.manager._nvme.idle.enabled
    assert engine.ask(tokens(40)).loads == 1
    engine.finish()


@pytest.mark.parametrize("groups", [FULL, HYBRID], ids=["full", "hybrid"])
def test_reset_while_loading_fails_the_load(groups: Any) -> None:
    engine = MiniEngine(Options(groups=groups, in_flight=2, blocks=128, load_lag=6))
    engine.ask(tokens(40))
    engine.forget_hbm()
    request = engine.add(tokens(40), 2)
    engine.until_loading(request)
    engine.reset(connector=True)
    engine.run()
    assert request.loads == 1 and engine.scheduler.failed_loads == 1
    engine.finish()


def adapted(engine: MiniEngine, path: str = "/a", name: str = "a") -> MiniRequest:
    """A request of 40 tokens with an adapter, answered."""
    lora = SimpleNamespace(lora_int_id=7, lora_name=name, lora_path=path)
    request = engine.add(tokens(40), 1, lora=lora)
    engine.run()
    engine.settle()
    return request


def test_hbm_blocks_of_an_adapter_are_not_stored_under_the_next_one_of_its_name() -> None:
    """VLLM finds a prompt's blocks by the adapter's name and path, whatever bytes it has now."""
    engine = MiniEngine(Options(blocks=128))
    bytes_of = {"/a": b"old", "/b": b"b"}

    def adapter(request: Any) -> bytes:
        return bytes_of[request.lora_request.lora_path]

    def held(request: MiniRequest, name: bytes) -> int:
        chain = Chain(engine.namespaces.namespace(), name, engine.layout)
        chain.extend(request.block_hashes)
        return engine.manager.lookup(chain, 0, 40).end

    engine.namespaces.adapter = adapter  # type: ignore[method-assign]
    one, other = adapted(engine), adapted(engine, "/b")  # two of a name: nothing is stale
    assert held(one, b"old") == 40 and held(other, b"b") == 40
    bytes_of["/a"] = b"new"
    request = adapted(engine)
    assert engine.computed(request) < 40 and held(request, b"new") == 0, "old blocks, new name"
    engine.forget_hbm()
    request = adapted(engine)
    assert request.loads == 0 and held(request, b"new") == 40
    engine.forget_hbm()
    assert adapted(engine).loads == 1 and adapted(engine, "/b").loads == 1
    engine.finish()


def test_a_request_of_a_removed_adapter_does_not_ask_for_its_name_again() -> None:
    """It would be that of the files of this moment, and the next adapter's until they are looked at
    again."""
    engine = MiniEngine(Options(in_flight=2, blocks=128))
    asked: list[Any] = []
    lora = SimpleNamespace(lora_int_id=7, lora_name="a", lora_path="/a")

    def adapter(request: Any) -> bytes:
        asked.append(request)
        return b"a"

    engine.namespaces.adapter = adapter  # type: ignore[method-assign]
    engine.add(tokens(40), 20, hints={"retain_s": 60}, lora=lora)
    for _ in range(6):
        engine.step()
    assert asked
    asked.clear()
    engine.scheduler_half.adapter_removed(7)
    engine.run()
    assert not asked
    engine.finish()


def test_a_damaged_chunk_is_counted_though_a_rank_waited_too_long_for_it() -> None:
    engine = MiniEngine(Options(ranks=2, load_lag=6, blocks=128))
    engine.ask(tokens(40))
    engine.forget_hbm()
    _counts(engine)
    request = engine.add(tokens(40))
    engine.until_loading(request)
    engine.expect_bad = True
    loads = engine.scheduler_half._loads
    attempt = next(iter(loads._table))
    ref = attempt.lease.items[0].ref
    for reason in (LoadFailure.DEADLINE, LoadFailure.CORRUPT, LoadFailure.CORRUPT):
        bad = BadChunk(attempt.attempt, ref.slot, ref.generation, ref.offset, reason)
        loads.take_report(WorkerReport(bad=[bad], failed_attempts={attempt.attempt: reason}))
    engine.run()
    counts = _counts(engine)
    kinds = {s: v for s, v in counts.items() if s.startswith("kvoffload_failures_total")}
    assert kinds == {"kvoffload_failures_total|deadline": 1, "kvoffload_failures_total|corrupt": 1}


@pytest.mark.parametrize("groups", [FULL, HYBRID], ids=["full", "hybrid"])
def test_an_adapter_that_is_removed_takes_its_loads_along(groups: Any) -> None:
    """What loads with it is failed, what runs with it is not stored; nobody else is touched."""
    engine = MiniEngine(Options(groups=groups, in_flight=2, blocks=128, load_lag=6))
    engine.ask(tokens(40))
    engine.forget_hbm()
    theirs, other = engine.add(tokens(40), 2), engine.add(tokens(24, 1), 20)
    theirs.lora_request = SimpleNamespace(lora_int_id=7, lora_name="a", lora_path="/a")
    engine.until_loading(theirs)
    engine.scheduler_half.adapter_removed(8)
    engine.step()
    assert not engine.scheduler.failed_loads
    engine.scheduler_half.adapter_removed(7)
    assert engine.namespaces.forgotten == [8, 7]
    engine.run()
    assert theirs.loads == 1 and engine.scheduler.failed_loads == 1
    state_stored = engine.stores_done()
    engine.forget_hbm()
    assert engine.ask(tokens(24, 1)).loads == 1 and other.is_finished()
    assert state_stored  # the other one's
    engine.finish()


def test_reset_between_parking_and_a_deferred_alloc() -> None:
    """0.33: the lease is gone when the blocks come. Failed at once, and nobody else is touched."""
    engine = MiniEngine(Options(defer_alloc=True, in_flight=2, budget=48))
    engine.ask(tokens(40), 1)
    engine.forget_hbm()
    runner = engine.add(tokens(17), 200)  # holds the first chunks in HBM and goes on running
    engine.until(lambda: runner.num_output_tokens > 2)
    request = engine.add(tokens(40), 2)
    engine.until_loading(request)
    assert engine.scheduler.owed
    engine.reset(connector=True)
    engine.until(request.is_finished)
    assert not runner.is_finished() and request.loads == 1
    engine.finish()


@pytest.mark.parametrize("connector", [True, False])
@pytest.mark.parametrize("ranks", [1, 2])
def test_weights_changed_in_place(connector: bool, ranks: int) -> None:
    """Old bytes are hidden by the shared epoch even when nobody resets the connector."""
    engine = MiniEngine(Options(ranks=ranks, in_flight=2, store_lag=3))
    engine.ask(tokens(40))
    running = engine.add(tokens(24, 1), 12)
    engine.until(lambda: running.num_output_tokens > 3)
    engine.change_weights()
    assert engine.reset(connector=connector, running=True)
    request = engine.ask(tokens(40))
    assert request.loads == 0, "the old weights' KV is not offered"
    engine.forget_hbm()
    assert engine.ask(tokens(40)).loads == 1
    engine.finish()


def test_weights_changed_while_requests_run_on_their_old_kv() -> None:
    """Without a reset vLLM goes on with what is in HBM; such KV must never be stored."""
    engine = MiniEngine()
    request = engine.add(tokens(12), 30)
    engine.until(lambda: request.num_output_tokens > 2)
    stored = engine.stores_done()
    engine.arena.bump_epoch()
    engine.run()
    engine.settle()
    assert request.is_finished() and engine.stores_done() == stored > 0
    assert engine.audit_dram() == 0
    engine.finish()


def test_weights_changed_and_hbm_kept() -> None:
    """vLLM's HBM cache still holds KV of the old weights: who hits it is neither stored nor loaded."""
    engine = MiniEngine()
    engine.ask(tokens(24))
    engine.arena.bump_epoch()
    stored = engine.stores_done()
    hit = engine.ask(tokens(24) + tokens(16, 1))
    assert engine.computed(hit) <= 17, "the old blocks in HBM were used (vLLM's own doing)"
    engine.settle()
    assert engine.stores_done() == stored, "nothing that attends to old KV is stored"
    engine.forget_hbm()
    engine.ask(tokens(24))
    engine.settle()
    assert engine.stores_done() > stored, "an empty HBM ends it"
    engine.finish()


# -- NVMe


@pytest.mark.parametrize("drives", [1, 3])
def test_restart_finds_what_was_written(tmp_path: Path, drives: int) -> None:
    """DRAM -> NVMe, a new process, NVMe -> DRAM -> HBM."""
    options = Options(nvme=str(tmp_path), in_flight=2, drives=drives)
    engine = MiniEngine(options)
    engine.ask(tokens(40), 9)
    engine.finish()
    engine = MiniEngine(options)
    request = engine.ask(tokens(40), 9)
    assert request.loads == 1 and engine.computed(request) == 1 + 8
    assert engine.manager.counters.nvme_read == 5
    engine.finish()


def test_a_drive_that_fails_costs_its_chunks_only(tmp_path: Path) -> None:
    """Not the tier: its breaker stays closed, and what the other drive holds is loaded."""
    options = Options(nvme=str(tmp_path), in_flight=2, drives=2)
    engine = MiniEngine(options)
    for part in range(8):  # one by one: each prompt's chunks are a run, and runs go round
        engine.ask(tokens(16, part))
        engine.settle()
        assert engine.manager.drain(5.0)
    held = [int(disk.stats()["entries"]) for disk in engine.disks]
    assert min(held) > 0
    engine.finish()
    engine = MiniEngine(options)
    engine.disks[0].inject("read_eio", 1)
    engine.disks[0].inject("write_eio", 1)
    engine.expect_bad = True
    for round_ in range(3):
        for part in range(8):
            engine.ask(tokens(16, part))
        engine.settle()
        assert engine.manager.drain(5.0), f"round {round_}: the other drive takes the writes"
        engine.manager.reset()
        engine.forget_hbm()
    assert engine.manager.counters.nvme_breaker_trips == 0
    assert engine.manager.counters.nvme_read > held[1]
    assert [d.up for d in engine.store.drives()] == [False, True]
    assert engine.disks[1].stats()["entries"] == sum(held)
    engine.finish()


def test_nvme_that_does_not_answer_costs_one_deadline(tmp_path: Path) -> None:
    """The worker's own deadline, in real time: failed, recomputed, slot kept until the read is back."""
    options = Options(nvme=str(tmp_path), in_flight=2)
    engine = MiniEngine(options)
    engine.ask(tokens(40), 2)
    engine.finish()
    engine = MiniEngine(replace(options, deadline_ms=50))
    engine.expect_bad = True  # the slot that nobody filled in time is reported
    engine.store.inject("hang_read", 1)
    request = engine.add(tokens(40), 2)
    engine.run()
    assert request.is_finished() and request.loads == 1 and engine.scheduler.failed_loads == 1
    engine.store.inject("hang_read", 0)
    engine.expect_bad = True
    engine.finish()


@pytest.mark.parametrize("what", ["read_eio", "short_read"])
def test_nvme_read_errors_are_misses(tmp_path: Path, what: str) -> None:
    options = Options(nvme=str(tmp_path), groups=HYBRID, blocks=128)
    engine = MiniEngine(options)
    engine.ask(tokens(40), 2)
    engine.finish()
    engine = MiniEngine(options)
    engine.expect_bad = True
    engine.store.inject(what, 1)
    request = engine.add(tokens(40), 2)
    engine.run()
    assert request.is_finished() and request.loads <= 1
    engine.store.inject(what, 0)
    engine.finish()
