"""LoRA adapters have their own KV; speculative decoding stores only what became final."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.e2e.asks import ask, cold_then_warm
from tests.e2e.prompts import connector, prompt, total, until
from tests.support import models
from tests.support.engine import EngineLife, Output, assert_same, max_dlogprob

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(400)]

ARGS = {"max_num_batched_tokens": 1024, "max_model_len": 4096}


@pytest.fixture(scope="module")
def lora_life() -> Iterator[EngineLife]:
    args = ARGS | {"enable_lora": True, "max_loras": 2, "max_lora_rank": 8}
    with EngineLife(models.llama(), connector(), args) as engine:
        yield engine


def _digest_known(life: EngineLife, adapter: Path) -> None:
    """Use the adapter until its prefixes hit: its files are digested in the background."""
    tokens = prompt(900, 512)

    def hits() -> bool:
        assert life.reset_prefix_cache()
        return bool(ask(life, tokens, lora=adapter, max_tokens=1).num_cached_tokens)

    assert until(hits, every=0.05)


def test_adapters_are_kept_apart(lora_life: EngineLife) -> None:
    a, b = models.lora(models.llama())
    for adapter in (a, b):
        _digest_known(lora_life, adapter)
    tokens = prompt(1, 1024)
    cold: dict[Path | None, Output] = {}
    for who in (None, a, b):
        assert lora_life.reset_prefix_cache()
        cold[who] = ask(lora_life, tokens, lora=who)
        assert cold[who].num_cached_tokens == 0  # nothing of the others
    for who, other in ((None, a), (a, b), (b, None)):  # the oracle sees a wrong adapter
        assert (
            cold[who].token_ids != cold[other].token_ids
            or max_dlogprob(cold[who], cold[other]) > 0.28
        )
    for who in (b, None, a):
        assert lora_life.reset_prefix_cache()
        warm = ask(lora_life, tokens, lora=who)
        assert warm.num_cached_tokens == 1024
        assert_same(cold[who], warm)


def test_adapters_in_one_batch(lora_life: EngineLife) -> None:
    # Not with the base model among them: on CPU, vLLM 0.32 itself computes a request without an
    # adapter wrongly when it shares a batch with requests that have one.
    whos = models.lora(models.llama())
    tokens = prompt(2, 768)
    cold = []
    for who in whos:
        assert lora_life.reset_prefix_cache()
        cold.append(ask(lora_life, tokens, lora=who))
    assert lora_life.reset_prefix_cache()
    pending = [lora_life.submit(tokens, max_tokens=8, logprobs=1, lora=who) for who in whos]
    for before, p in zip(cold, pending, strict=True):
        warm = p.result()
        assert warm.num_cached_tokens == 768
        assert_same(before, warm)
    assert total(lora_life.metrics(), "kvoffload_failures_total") == 0


@pytest.fixture(scope="module")
def spec_life(lora_life: EngineLife) -> Iterator[EngineLife]:
    lora_life.stop()  # one engine at a time
    speculative = {
        "method": "ngram",
        "num_speculative_tokens": 4,
        "prompt_lookup_min": 1,
        "prompt_lookup_max": 3,
    }
    args = ARGS | {"speculative_config": speculative}
    with EngineLife(models.llama(), connector(), args) as engine:
        yield engine


def test_speculative_decoding_reload(spec_life: EngineLife) -> None:
    phrase = prompt(3, 64)
    tokens = phrase * 12  # repeats, so that the n-gram drafter has something to say
    _, warm = cold_then_warm(spec_life, tokens, max_tokens=48)
    assert warm.num_cached_tokens == 768
    assert total(spec_life.metrics(), "vllm:spec_decode_num_draft_tokens_total") > 0


def test_speculated_tokens_hit_in_the_next_turn(spec_life: EngineLife) -> None:
    tokens = prompt(4, 40) * 16
    first = ask(spec_life, tokens, max_tokens=420)
    turn = tokens + first.token_ids + prompt(5, 70)
    assert spec_life.reset_prefix_cache()
    warm = ask(spec_life, turn, max_tokens=24)
    assert warm.num_cached_tokens is not None and warm.num_cached_tokens >= 1024
    assert spec_life.reset_prefix_cache(reset_connector=True)
    assert_same(ask(spec_life, turn, max_tokens=24), warm)
    metrics = spec_life.metrics()
    drafted = total(metrics, "vllm:spec_decode_num_draft_tokens_total")
    accepted = total(metrics, "vllm:spec_decode_num_accepted_tokens_total")
    assert 0 < accepted < drafted  # some tokens were rejected: their KV must not have been stored
    assert total(metrics, "kvoffload_failures_total") == 0
