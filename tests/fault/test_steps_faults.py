"""An exception in any hook of either role, once and always: no request is harmed, nothing hangs.

Planted through KVOFFLOAD_TEST_FAULTS (every rank) or straight into one rank's guard.
"""

from __future__ import annotations

import json
import logging
import random
from dataclasses import replace
from typing import Any

import pytest

from kvoffload.engines.vllm.scheduler import SchedulerHalf
from kvoffload.engines.vllm.worker import WorkerHalf
from tests.support.steps import MiniEngine, Options, tokens
from tests.support.steps_blocks import GroupSpec, Status

HYBRID = (GroupSpec(), GroupSpec(window=9))
SCHEDULER_HOOKS = (
    "on_new_request",
    "get_num_new_matched_tokens",
    "update_state_after_alloc",
    "build_connector_meta",
    "update_connector_output",
    "step_ended",
    "request_finished",
    "has_pending_push_work",
    "reset_cache",
    "adapter_removed",
)
WORKER_HOOKS = (
    "handle_preemptions",
    "_bind",
    "start_load_kv",
    "wait_for_save",
    "transfer_results",
)
HOOKS = [f"scheduler.{h}" for h in SCHEDULER_HOOKS] + [f"worker.{h}" for h in WORKER_HOOKS]
ENGINES = {
    "one step": Options(blocks=48),
    "two in flight": Options(in_flight=2, blocks=48, load_lag=2, store_lag=2, random_lag=2),
    "two ranks": Options(in_flight=2, ranks=2, blocks=48, late_ranks=False, random_lag=3),
    "hybrid": Options(groups=HYBRID, in_flight=2, ranks=2, blocks=96, load_lag=1),
    "vLLM 0.33": Options(in_flight=2, defer_alloc=True, blocks=48),
    "drafts": Options(in_flight=2, spec_tokens=2, blocks=48),
}


@pytest.fixture(autouse=True)
def quiet(caplog: pytest.LogCaptureFixture) -> None:
    """Planted tracebacks are expected."""
    caplog.set_level(logging.CRITICAL, "vllm.kvoffload")


def life(engine: MiniEngine) -> int:
    """Stores, loads, aborts while loading, shares, resets, preempts. Returns parked requests."""
    for turn in range(3):
        asked = [engine.add(tokens(40)[: 16 + 8 * i] + tokens(3 * i, i), 6) for i in range(4)]
        for _ in range(2):
            engine.step()
        loading = engine.loading()
        if loading and turn == 1:
            engine.abort(loading[0])
        engine.run()
        assert all(r.is_finished() for r in asked)
        engine.settle()
        engine.forget_hbm()
    engine.reset(connector=True)
    for _ in range(2):
        engine.ask(tokens(40), 4)
        engine.scheduler_half.adapter_removed(7)
        engine.forget_hbm()
    return engine.scheduler.parked


def plant(monkeypatch: pytest.MonkeyPatch, faults: dict[str, int]) -> None:
    monkeypatch.setenv("KVOFFLOAD_TEST_FAULTS", json.dumps(faults))


def counted(engine: MiniEngine) -> int:
    """Planted faults that fired: the guards forget theirs when they report, the engine adds up."""
    return engine.hook_errors + sum(engine.scheduler_half.guard.errors.values())


def test_the_lists_above_are_complete() -> None:
    """A new guarded hook must be planted too."""

    def guarded(cls: type) -> set[str]:
        return {n for n, f in vars(cls).items() if hasattr(f, "__wrapped__")}

    only_stats = {"take_stats"}
    own_guard = {"update_state_after_alloc", "build_connector_meta"}
    assert guarded(SchedulerHalf) - only_stats == set(SCHEDULER_HOOKS) - own_guard
    assert guarded(WorkerHalf) == set(WORKER_HOOKS)


@pytest.mark.parametrize("times", [1, 3, -1], ids=["once", "thrice", "always"])
@pytest.mark.parametrize("hook", HOOKS)
@pytest.mark.parametrize("options", ENGINES.values(), ids=ENGINES.keys())
def test_planted_everywhere(
    options: Options, hook: str, times: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    plant(monkeypatch, {hook: times})
    always = times < 0
    if always and hook == "worker.transfer_results":  # nothing polls: copies must end by themselves
        options = replace(options, store_lag=0, random_lag=0)
    engine = MiniEngine(options)
    if always and hook == "worker._bind":
        engine.clock.now += 31.0  # an idle engine waits this long for its workers
    try:
        parked = life(engine)
        assert counted(engine) >= 1, "the fault never fired"
        hidden = always and hook in (
            "scheduler.get_num_new_matched_tokens",
            "scheduler.build_connector_meta",
            "worker._bind",
            "worker.wait_for_save",
        )
        assert hidden == (parked == 0), f"{parked} requests were offered a load"
        engine.finish()
    finally:
        engine.close()


@pytest.mark.parametrize("times", [1, -1], ids=["once", "always"])
@pytest.mark.parametrize("hook", WORKER_HOOKS)
@pytest.mark.parametrize("groups", [(GroupSpec(),), HYBRID], ids=["full", "hybrid"])
def test_planted_in_one_rank_of_two(groups: Any, hook: str, times: int) -> None:
    """The ranks disagree about what happened: the engine still gets each answer once."""
    engine = MiniEngine(Options(groups=groups, ranks=2, in_flight=2, blocks=96, random_lag=2))
    if hook == "transfer_results":
        engine.options = replace(engine.options, random_lag=0)
    try:
        engine.ask(tokens(40))
        engine.forget_hbm()
        engine.ranks[1].half.guard._faults[f"worker.{hook}"] = times
        life(engine)
        engine.finish()
    finally:
        engine.close()


@pytest.mark.parametrize("seed", range(12))
def test_several_at_once(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = random.Random(seed)
    plant(monkeypatch, {hook: rng.choice((1, 2, 5)) for hook in rng.sample(HOOKS, 6)})
    engine = MiniEngine(Options(ranks=2, in_flight=2, blocks=48, random_lag=3, seed=seed))
    try:
        life(engine)
        engine.finish()
    finally:
        engine.close()


@pytest.mark.parametrize(
    "method", ["begin_store", "tick", "plan", "acquire", "prefetch", "release"]
)
@pytest.mark.parametrize("nth", [1, 2, 4])
def test_the_manager_raises(method: str, nth: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Deep inside a hook, after part of its work is done."""
    engine = MiniEngine(Options(in_flight=2, blocks=48))
    real = getattr(engine.manager, method)
    calls = 0

    def raising(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == nth:
            raise RuntimeError(f"planted in Manager.{method}")
        return real(*args, **kwargs)

    try:
        engine.ask(tokens(40))
        engine.forget_hbm()
        monkeypatch.setattr(engine.manager, method, raising)
        first = engine.add(tokens(40), 3)
        second = engine.add(tokens(40, 1), 12)
        engine.until(lambda: first.is_finished() and second.is_finished(), 400)
        assert calls >= 1
    finally:
        monkeypatch.undo()
        engine.close()


def test_a_step_whose_orders_fail_fails_its_loads_at_once() -> None:
    """Not at the deadline: the request must not sit in its waiting state for seconds."""
    engine = MiniEngine(Options(in_flight=2))
    engine.ask(tokens(40))
    engine.forget_hbm()
    other = engine.add(tokens(16, 1), 60)
    engine.until(lambda: other.num_output_tokens > 1)
    real = engine.scheduler_half._fence.due

    def due(*args: Any) -> Any:
        engine.scheduler_half._fence.due = real  # type: ignore[method-assign]
        raise RuntimeError("planted in the fence")

    engine.scheduler_half._fence.due = due  # type: ignore[method-assign]
    request = engine.add(tokens(40), 2)
    engine.until_loading(request)
    began = engine.clock.now
    engine.until(lambda: request.status is not Status.REMOTE, 20)
    assert engine.clock.now - began < 1.0
    assert request.loads == 1 and engine.scheduler.failed_loads == 1
    engine.finish()
