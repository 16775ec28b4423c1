"""Under MultiConnector, beside vLLM's ExampleConnector (files, loads within the step): both orders."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.e2e.asks import Growth, ask
from tests.e2e.prompts import connector, prompt
from tests.support import models
from tests.support.engine import EngineLife, Output, assert_same

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(400)]

# ExampleConnector saves a whole prompt in its first step: no chunked prefill here.
ARGS: dict[str, Any] = {"max_num_batched_tokens": 4096, "max_model_len": 4096}


def _multi(folder: Path, ours_first: bool) -> dict[str, Any]:
    example = {
        "kv_connector": "ExampleConnector",
        "kv_role": "kv_both",
        "kv_connector_extra_config": {"shared_storage_path": str(folder)},
    }
    children = [connector(), example] if ours_first else [example, connector()]
    return {
        "kv_connector": "MultiConnector",
        "kv_role": "kv_both",
        "kv_connector_extra_config": {"connectors": children},
    }


def _found_by_example(life: EngineLife) -> int:
    return life.log_path.read_text(errors="replace").count("External Cache Hit!")


TOKENS = prompt(1, 1024 + 30)
LONGER = TOKENS + prompt(2, 200)
TOGETHER = [prompt(1, 1024) + prompt(10 + i, 300) for i in range(4)]


@pytest.fixture(scope="module")
def reference() -> list[Output]:
    """TOKENS, LONGER and TOGETHER, from an engine without a connector."""
    with EngineLife(models.llama(), None, ARGS) as plain:
        return [ask(plain, p) for p in (TOKENS, LONGER, *TOGETHER)]


@pytest.mark.parametrize("ours_first", [True, False])
def test_reload(tmp_path: Path, reference: list[Output], ours_first: bool) -> None:
    config = _multi(tmp_path, ours_first)
    with EngineLife(models.llama(), config, ARGS) as life:
        cold = ask(life, TOKENS)
        assert cold.num_cached_tokens == 0
        assert_same(reference[0], cold)
        assert any(tmp_path.iterdir())  # the other connector saved it too

        # The same prompt: both have it, the first one is asked to load it.
        grew = Growth(life)
        assert life.reset_prefix_cache()
        same = ask(life, TOKENS)
        assert same.num_cached_tokens == 1024
        assert_same(reference[0], same)
        assert grew("kvoffload_loaded_tokens_total") == (1024 if ours_first else 0)
        if not ours_first:
            assert _found_by_example(life) > 0

        # A longer prompt: ExampleConnector knows whole prompts only, so the load is ours.
        grew = Growth(life)
        assert life.reset_prefix_cache()
        longer = ask(life, LONGER)
        assert longer.num_cached_tokens == 1024
        assert_same(reference[1], longer)
        assert grew("kvoffload_loaded_tokens_total") == 1024

        assert life.reset_prefix_cache()
        outputs = life.generate(TOGETHER, max_tokens=8, logprobs=1)
        for expected, got in zip(reference[2:], outputs, strict=True):
            assert_same(expected, got)
        assert grew("kvoffload_loaded_tokens_total") >= 2048
        assert grew("kvoffload_failures_total") == 0
