"""Two tensor-parallel ranks: each holds its shard of a chunk; one failing rank fails the load for both."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.e2e.asks import Growth, ask, cold_then_warm, failed_loads, faults
from tests.e2e.prompts import connector, prompt
from tests.support import models
from tests.support.engine import EngineLife, assert_same

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(400)]

GOOD_ITEMS = 12  # chunks that rank 1 loads before its copies begin to fail


@pytest.fixture(scope="module")
def life() -> Iterator[EngineLife]:
    env = faults(worker__copy_fail_every=GOOD_ITEMS + 1, worker__copy_fail_rank=1)
    args = {
        "tensor_parallel_size": 2,
        "max_num_batched_tokens": 1024,
        "max_model_len": 8192,
    }
    with EngineLife(
        models.llama(), connector(), args, env | {"VLLM_CPU_OMP_THREADS_BIND": "0|1"}
    ) as engine:
        yield engine


def test_reloads_are_the_same_and_a_failing_rank_costs_one_request_its_load(
    life: EngineLife,
) -> None:
    """One test: the planted fault counts the chunks rank 1 loaded so far."""
    grew = Growth(life)
    for seed, chunks in ((1, 4), (2, 8)):  # GOOD_ITEMS in all
        _, warm = cold_then_warm(life, prompt(seed, 256 * chunks))
        assert warm.num_cached_tokens == 256 * chunks
    assert failed_loads(life) == 0
    assert grew("kvoffload_bytes_total", tier="dram", direction="load") > 0

    tokens = prompt(3, 1024 + 40)
    cold = ask(life, tokens)
    assert life.reset_prefix_cache()
    recomputed = ask(life, tokens)  # rank 0 loads all of it, rank 1 fails at its first chunk or so
    assert_same(cold, recomputed)
    assert failed_loads(life) == 1
    assert grew("kvoffload_failures_total", kind="injected") == 1


def test_failures_among_requests_that_run_together(life: EngineLife) -> None:
    prompts = [prompt(10 + i, 768 + 256 * (i % 3)) for i in range(6)]
    cold = [ask(life, p) for p in prompts]
    before = failed_loads(life)
    for _ in range(3):
        assert life.reset_prefix_cache()
        warm = life.generate(prompts, max_tokens=8, logprobs=1)
        for a, b in zip(cold, warm, strict=True):
            assert_same(a, b)
    assert failed_loads(life) > before
    assert sum(o.num_cached_tokens or 0 for o in warm) > 0


def test_a_failed_prefix_is_served_again(life: EngineLife) -> None:
    """An injected copy failure says nothing about the chunk: the next request loads it."""
    tokens = prompt(30, 512)
    cold = ask(life, tokens)
    hits = []
    for _ in range(3):
        assert life.reset_prefix_cache()
        warm = ask(life, tokens)
        assert_same(cold, warm)
        hits.append(warm.num_cached_tokens)
    assert hits.count(512) >= 2
