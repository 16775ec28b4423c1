"""The end-to-end helpers measure what they claim, on plain vLLM without a connector."""

from __future__ import annotations

import random
from collections.abc import Iterator

import pytest

from tests.support import models
from tests.support.engine import EngineError, EngineLife, assert_same, max_dlogprob

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(400)]


@pytest.fixture(scope="module")
def life(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EngineLife]:
    with EngineLife(models.llama(), workdir=tmp_path_factory.mktemp("engine")) as life:
        yield life


def _prompt(seed: int, tokens: int = 640) -> list[int]:
    rng = random.Random(seed)
    return [rng.randrange(10, models.VOCAB) for _ in range(tokens)]


def test_cold_and_hit_agree_and_a_foreign_block_does_not(life: EngineLife) -> None:
    assert life.reset_prefix_cache()
    prompts = [_prompt(seed) for seed in range(3)]
    cold = life.generate(prompts, max_tokens=6, logprobs=20)
    hits = life.generate(prompts, max_tokens=6, logprobs=20)
    for before, after in zip(cold, hits, strict=True):
        assert (before.num_cached_tokens, after.num_cached_tokens) == (0, 512)
        assert_same(before, after, atol=1e-3)
    for prompt, before in zip(prompts, cold, strict=True):
        foreign = life.generate(
            [prompt[:256] + _prompt(99, 16) + prompt[272:]], max_tokens=6, logprobs=20
        )
        assert max_dlogprob(before, foreign[0]) > 0.28
        with pytest.raises(AssertionError):
            assert_same(before, foreign[0])


def test_reset_salt_and_metrics(life: EngineLife) -> None:
    assert life.reset_prefix_cache()
    prompt = _prompt(10)
    first = life.generate([prompt], max_tokens=2)[0]
    before = life.metrics()["vllm:prefix_cache_hits_total"]
    salted = life.generate([prompt], max_tokens=2, cache_salt="other")[0]
    again = life.generate([prompt], max_tokens=2)[0]
    assert (first.num_cached_tokens, salted.num_cached_tokens, again.num_cached_tokens) == (
        0,
        0,
        512,
    )
    assert life.metrics()["vllm:prefix_cache_hits_total"] - before == 512
    assert life.reset_prefix_cache()
    assert life.generate([prompt], max_tokens=2)[0].num_cached_tokens == 0


def test_abort_ends_one_request_only(life: EngineLife) -> None:
    for attempt in range(3):  # beside other engines its 3000 tokens may be done before we say so
        long = life.submit(_prompt(20), max_tokens=3000)
        assert long.wait_tokens(2)
        other = life.submit(_prompt(21 + attempt), max_tokens=4)
        long.abort()
        assert len(other.result().token_ids) == 4
        if long.result().finish_reason == "abort":
            break
    assert long.result().finish_reason == "abort"
    assert 2 <= len(long.result().token_ids) < 3000


def test_a_bad_request_is_an_error_and_the_engine_lives(life: EngineLife) -> None:
    with pytest.raises(EngineError):
        life.generate([_prompt(30, 5000)], max_tokens=1)
    assert len(life.generate([_prompt(31)], max_tokens=1)[0].token_ids) == 1


def test_kill9_is_noticed(life: EngineLife) -> None:
    """Last in this module: ends the engine."""
    # So many that the last one is not done before we look.
    pending = [life.submit(_prompt(40 + i), max_tokens=3000) for i in range(12)]
    assert pending[0].wait_tokens(1)
    life.kill9()
    with pytest.raises(EngineError, match="gone"):
        pending[-1].result(timeout=10)
    assert not life.alive
