"""Multi-head latent attention: one latent per token, stored once; reloads are right."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.e2e.asks import ask
from tests.e2e.prompts import connector, prompt, total
from tests.support import models
from tests.support.engine import EngineLife, assert_same

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(400)]


@pytest.fixture(scope="module")
def life() -> Iterator[EngineLife]:
    # float32 needs the plain backend on CPUs with AMX; vLLM then turns prefix caching off, so every
    # hit comes from kvoffload.
    args = {
        "max_num_batched_tokens": 1024,
        "max_model_len": 8192,
        "attention_config": {"backend": "CPU_MLA"},
    }
    with EngineLife(models.mla(), connector(load="always"), args) as engine:
        yield engine


def test_reload(life: EngineLife) -> None:
    tokens = prompt(9, 1600)
    cold = ask(life, tokens)
    warm = ask(life, tokens)
    assert cold.num_cached_tokens == 0
    assert warm.num_cached_tokens is not None and warm.num_cached_tokens >= 1280
    assert_same(cold, warm)
    assert total(life.metrics(), "kvoffload_failures_total") == 0


def test_prompts_together(life: EngineLife) -> None:
    shared = prompt(10, 1024)
    prompts = [shared + prompt(50 + i, 300) for i in range(4)]
    cold = [ask(life, p) for p in prompts]
    warm = life.generate(prompts, max_tokens=8, logprobs=1)
    for a, b in zip(cold, warm, strict=True):
        assert b.num_cached_tokens is not None and b.num_cached_tokens >= 1024
        assert_same(a, b)
