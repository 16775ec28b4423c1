"""An exception of ours in any hook: requests get the right tokens, the engine lives, counters tell.

Each engine has its faults planted at start. A fraction: the first call and that
share of the others fail; -1: all.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from tests.e2e.asks import Growth, ask, faults
from tests.e2e.prompts import connector, prompt, total
from tests.support import models
from tests.support.engine import EngineLife, Output, assert_same

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(400)]

SCHEDULER = (
    "on_new_request",
    "get_num_new_matched_tokens",
    "update_state_after_alloc",
    "build_connector_meta",
    "update_connector_output",
    "step_ended",
    "request_finished",
    "has_pending_push_work",
    "reset_cache",
    "take_stats",
)
WORKER = ("handle_preemptions", "_bind", "start_load_kv", "wait_for_save", "transfer_results")
ARGS: dict[str, Any] = {"max_num_batched_tokens": 1024, "max_model_len": 4096}
PROMPTS = [prompt(1, 1024) + prompt(10 + i, 150 * i) for i in range(4)]


@contextmanager
def _engine(**planted: float) -> Iterator[EngineLife]:
    # No prefix caching in HBM: every request comes to the connector.
    args = ARGS | {"enable_prefix_caching": False}
    deadline = connector(load="always", load_deadline_ms=2000)
    with EngineLife(models.llama(), deadline, args, faults(**planted)) as life:
        yield life


def _work(life: EngineLife, rounds: int = 2) -> list[Output]:
    """Rounds of prompts alone and together, an abort among them; all right. Returns the last ones.

    The reference is each prompt under a salt of its own: computed, whatever is stored.
    """
    reference = [ask(life, p, cache_salt=f"computed {i}") for i, p in enumerate(PROMPTS)]
    assert [o.num_cached_tokens for o in reference] == [0] * len(PROMPTS)
    outputs: list[Output] = []
    for _ in range(rounds):
        outputs = [ask(life, p) for p in PROMPTS]
        aborted = life.submit(PROMPTS[3], max_tokens=64)
        outputs += life.generate(PROMPTS, max_tokens=8, logprobs=1)
        aborted.abort()
        assert aborted.result().finish_reason in ("abort", "length")
        for expected, got in zip(reference * 2, outputs, strict=True):
            assert_same(expected, got)
        life.reset_prefix_cache(reset_connector=True, timeout=2)  # False where that hook fails
    return outputs


def _failures(life: EngineLife, hook: str) -> float:
    return total(life.metrics(), "kvoffload_failures_total", kind=f"hook_{hook}")


def test_every_guarded_hook_is_in_these_lists() -> None:
    from kvoffload.engines.vllm.scheduler import SchedulerHalf
    from kvoffload.engines.vllm.worker import WorkerHalf

    def hooks(cls: type) -> set[str]:
        by_hand = set()
        for name, member in vars(cls).items():
            if inspect.isfunction(member):
                source = inspect.getsource(member)
                if "@guarded" in source or "maybe_fault" in source:
                    by_hand.add(name)
        return by_hand

    of_adapters = {"adapter_removed"}  # planted by tests/fault; this engine has none to remove
    assert hooks(SchedulerHalf) == set(SCHEDULER) | of_adapters
    assert hooks(WorkerHalf) == set(WORKER)


def test_each_hook_fails_now_and_then() -> None:
    plan = {f"scheduler__{h}": 0.2 for h in SCHEDULER} | {f"worker__{h}": 0.2 for h in WORKER}
    with _engine(**plan) as life:
        _work(life, rounds=4)
        assert not [h for h in (*SCHEDULER, *WORKER) if not _failures(life, h)]
        assert total(life.metrics(), "kvoffload_loaded_tokens_total") > 0
        assert total(life.metrics(), "kvoffload_failed_loads_total") > 0


def test_each_hook_fails_its_first_two_calls() -> None:
    plan = {f"scheduler__{h}": 2 for h in SCHEDULER} | {f"worker__{h}": 2 for h in WORKER}
    with _engine(**plan) as life:
        _work(life, rounds=3)
        grew = Growth(life)
        outputs = _work(life, rounds=1)
        # All of it is behind us: everything hits again, nothing fails.
        assert all((o.num_cached_tokens or 0) >= 1024 for o in outputs[1:])
        assert grew("kvoffload_failures_total") == 0
        assert grew("kvoffload_failed_loads_total") == 0
        for hook in (*SCHEDULER, *WORKER):
            assert _failures(life, hook) == 2, hook


def test_orders_always_fail() -> None:
    hooks = (
        "update_state_after_alloc",
        "request_finished",
        "has_pending_push_work",
        "reset_cache",
    )
    with _engine(**{f"scheduler__{h}": -1 for h in hooks}) as life:
        outputs = _work(life)
        assert [o.num_cached_tokens for o in outputs] == [0] * 8
        for hook in hooks:
            assert _failures(life, hook) > 0, hook
        # Offered, ordered without success, recomputed: once per request, never twice.
        failed = total(life.metrics(), "kvoffload_failed_loads_total")
        assert 0 < failed <= _failures(life, "update_state_after_alloc")


def test_the_worker_always_fails() -> None:
    hooks = ("start_load_kv", "handle_preemptions", "transfer_results")
    plan = {f"worker__{h}": -1 for h in hooks} | {"scheduler__update_connector_output": -1}
    with _engine(**plan) as life:
        outputs = _work(life)
        assert [o.num_cached_tokens for o in outputs] == [0] * 8
        assert total(life.metrics(), "kvoffload_hit_requests_total") == 0  # none succeeded
        assert total(life.metrics(), "kvoffload_failed_loads_total") > 0
        assert total(life.metrics(), "kvoffload_loaded_tokens_total") == 0
        assert total(life.metrics(), "kvoffload_failures_total", kind="exception") > 0
        assert _failures(life, "update_connector_output") > 0


def test_nothing_ever_gets_in() -> None:
    """Metrics fail too, so the log has to tell: once per hook."""
    scheduler = (
        "on_new_request",
        "get_num_new_matched_tokens",
        "build_connector_meta",
        "take_stats",
    )
    worker = ("_bind", "wait_for_save", "register_kv_caches")
    plan = {f"scheduler__{h}": -1 for h in scheduler} | {f"worker__{h}": -1 for h in worker}
    with _engine(**plan) as life:
        outputs = _work(life)
        assert [o.num_cached_tokens for o in outputs] == [0] * 8
        log = life.log_path.read_text(errors="replace")
        for role, hooks in (("scheduler", scheduler), ("worker", worker)):
            for hook in hooks:
                assert log.count(f"kvoffload: {role} hook {hook} failed") == 1, hook
