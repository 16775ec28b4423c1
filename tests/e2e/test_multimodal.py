"""A multimodal model: what was heard is part of a prefix, and comes back from DRAM.

vLLM builds such a model's parts from copies of its configuration, so starting it is a test as well.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.e2e.asks import ask
from tests.e2e.prompts import connector, prompt, total
from tests.support import models_audio
from tests.support.engine import EngineLife, assert_same, max_dlogprob

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(400)]

HEARD = [models_audio.BEGIN, models_audio.AUDIO, models_audio.END]


def with_audio(seed: int) -> list[int]:
    """An audio between 100 tokens and 600."""
    text = [token % 3900 for token in prompt(seed, 700)]
    return text[:100] + HEARD + text[100:]


@pytest.fixture(scope="module")
def life() -> Iterator[EngineLife]:
    args = {
        "skip_tokenizer_init": False,
        "max_num_batched_tokens": 2048,
        "max_model_len": 4096,
        "limit_mm_per_prompt": {"audio": 1},
    }
    with EngineLife(models_audio.qwen2_audio(), connector(), args) as engine:
        yield engine


def test_audios_are_kept_apart_and_come_back(life: EngineLife) -> None:
    tokens = with_audio(1)
    cold = {}
    for audio in (1, 2):
        assert life.reset_prefix_cache()
        cold[audio] = ask(life, tokens, audio=audio)
        assert cold[audio].num_cached_tokens == 0, "the other audio is not the same prefix"
    assert max_dlogprob(cold[1], cold[2]) > 0.28 or cold[1].token_ids != cold[2].token_ids
    for audio in (2, 1):
        assert life.reset_prefix_cache()
        warm = ask(life, tokens, audio=audio)
        assert warm.num_cached_tokens == 768
        assert_same(cold[audio], warm)
    assert total(life.metrics(), "kvoffload_failures_total") == 0


def test_embeddings_are_taken_no_more_than_without_us(life: EngineLife) -> None:
    """vLLM takes kv_both for the decode side of a split deployment, whose front end lets images
    without embeddings through: with a cache in that place they end the engine."""
    assert life.info["takes_embeddings"] is False
