"""Multi-head latent attention: one latent per token, stored once; a reload equals an HBM hit.

vLLM's CPU build serves prefixes of MLA models with AMX only, and in bfloat16. There a prefix hit
differs from a cold run by rounding, so the reference is an HBM hit of the same length: the same
computation on the same bytes.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.e2e.asks import Growth, ask
from tests.e2e.prompts import connector, prompt
from tests.support import models
from tests.support.engine import EngineLife, assert_same, max_dlogprob


def _has_amx() -> bool:
    text = Path("/proc/cpuinfo").read_text()
    return "amx_tile" in text and "amx_bf16" in text


pytestmark = [
    pytest.mark.e2e,
    pytest.mark.timeout(400),
    pytest.mark.skipif(
        not _has_amx(), reason="without AMX, vLLM on CPU cannot attend to a cached MLA prefix"
    ),
]


@pytest.fixture(scope="module")
def life() -> Iterator[EngineLife]:
    args = {"dtype": "bfloat16", "max_num_batched_tokens": 2048, "max_model_len": 8192}
    with EngineLife(models.mla(), connector(load="always"), args) as engine:
        yield engine


@pytest.mark.parametrize("tokens", [1100, 1536 + 40])
def test_reload_equals_an_hbm_hit(life: EngineLife, tokens: int) -> None:
    assert life.reset_prefix_cache(reset_connector=True)
    asked = prompt(tokens, tokens)
    assert ask(life, asked).num_cached_tokens == 0
    hbm = ask(life, asked)
    assert life.reset_prefix_cache()
    grew = Growth(life)
    reloaded = ask(life, asked)
    assert hbm.num_cached_tokens == reloaded.num_cached_tokens == tokens // 256 * 256
    assert grew("kvoffload_loaded_tokens_total") == reloaded.num_cached_tokens
    assert_same(hbm, reloaded, atol=1e-3)
    assert grew("kvoffload_failures_total") == 0


def test_the_oracle_sees_a_foreign_block(life: EngineLife) -> None:
    asked = prompt(1, 1100)
    right = ask(life, asked)
    foreign = ask(life, asked[:512] + prompt(2, 128) + asked[640:])
    assert max_dlogprob(right, foreign) > 0.28
