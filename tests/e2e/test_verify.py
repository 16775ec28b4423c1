"""The shadow check in a real engine: hits are computed, compare equal, and leave nothing behind."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.e2e.prompts import connector, prompt, total, until
from tests.support import models
from tests.support.engine import EngineLife, Output, assert_same

pytestmark = pytest.mark.e2e


@pytest.fixture(scope="module")
def life() -> Iterator[EngineLife]:
    args = {"max_num_batched_tokens": 1024, "max_model_len": 8192}
    with EngineLife(models.llama(), connector(verify_sample=1.0), args) as engine:
        yield engine


def ask(life: EngineLife, tokens: list[int], max_tokens: int = 8) -> Output:
    return life.generate([tokens], max_tokens=max_tokens, logprobs=1)[0]


def events(life: EngineLife, name: str) -> float:
    return total(life.metrics(), "kvoffload_events_total", event=name)


def test_sampled_hits_are_computed_and_compare_equal(life: EngineLife) -> None:
    tokens = prompt(1, 2048)
    cold = ask(life, tokens, 300)  # a chunk of generated tokens too: another batch shape
    turn = tokens + cold.token_ids + prompt(2, 50)
    assert life.reset_prefix_cache()
    first = ask(life, turn)
    assert first.num_cached_tokens == 0
    sampled = events(life, "verify_sampled")
    assert sampled == 8

    def compared() -> bool:
        ask(life, prompt(9, 20), 1)  # metrics travel with steps
        return events(life, "verify_ok") == sampled

    assert until(compared)
    metrics = life.metrics()
    assert total(metrics, "kvoffload_events_total", event="verify_mismatch") == 0
    assert total(metrics, "kvoffload_miss_requests_total", reason="verify_sample") == 1
    assert total(metrics, "kvoffload_failures_total") == 0
    assert total(metrics, "kvoffload_dram_pinned_bytes") == 0
    assert life.reset_prefix_cache(reset_connector=True)
    assert_same(ask(life, turn), first)
