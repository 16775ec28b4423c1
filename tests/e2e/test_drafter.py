"""A draft model with other KV heads: one KV group whose layers have pages of different sizes.

vLLM's scheduler is told of the first layer only; see tests/unit/test_uneven_pages.py.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.e2e.asks import cold_then_warm
from tests.e2e.prompts import connector, prompt, total
from tests.support import models
from tests.support.engine import EngineLife

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(400)]


@pytest.fixture(scope="module")
def life() -> Iterator[EngineLife]:
    args = {
        "max_num_batched_tokens": 1024,
        "max_model_len": 4096,
        "speculative_config": {
            "method": "draft_model",
            "model": str(models.drafter()),
            "num_speculative_tokens": 2,
        },
    }
    with EngineLife(models.llama(), connector(), args) as engine:
        yield engine


def test_reload_from_dram(life: EngineLife) -> None:
    _, warm = cold_then_warm(life, prompt(1, 1100), max_tokens=24)
    assert warm.num_cached_tokens == 1024
    metrics = life.metrics()
    assert total(metrics, "vllm:spec_decode_num_draft_tokens_total") > 0
    assert total(metrics, "kvoffload_failures_total") == 0
