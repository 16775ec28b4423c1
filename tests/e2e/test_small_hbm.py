"""HBM far below the working set: requests are preempted, resume from DRAM, and say the same.

The reference is an engine without kvoffload and with room for everything.
"""

from __future__ import annotations

from typing import Any

import pytest

from tests.e2e.asks import Growth
from tests.e2e.prompts import connector, prompt
from tests.support import models
from tests.support.engine import EngineLife, Output, assert_same

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(600)]

ARGS: dict[str, Any] = {"max_num_batched_tokens": 1024, "max_model_len": 4096}
BLOCKS = 40  # of 128 tokens; the 16 requests that may run at once would need about 160
ASK: dict[str, Any] = {"max_tokens": 140, "logprobs": 1}  # every request grows into another block

PROMPTS = [prompt(i % 4, 768) + prompt(100 + i, 60 + 23 * i) for i in range(24)]


@pytest.fixture(scope="module")
def reference() -> list[Output]:
    with EngineLife(models.llama(), None, ARGS) as plain:
        outputs = plain.generate(PROMPTS, **ASK)
        # Batching alone must not move the oracle: a few of them again, alone.
        for i in (0, 7, 23):
            assert plain.reset_prefix_cache()
            assert_same(outputs[i], plain.generate([PROMPTS[i]], **ASK)[0])
    return outputs


@pytest.mark.parametrize("prefix_caching", [False, True])
def test_preempted_requests_say_the_same(reference: list[Output], prefix_caching: bool) -> None:
    args = ARGS | {"num_gpu_blocks_override": BLOCKS, "enable_prefix_caching": prefix_caching}
    with EngineLife(models.llama(), connector(load="always"), args) as life:
        grew = Growth(life)
        for _ in range(2):  # the second round starts with everything in DRAM
            outputs = life.generate(PROMPTS, **ASK)
            for expected, got in zip(reference, outputs, strict=True):
                assert_same(expected, got)
        assert grew("vllm:num_preemptions_total") > 0
        assert grew("kvoffload_failed_loads_total") == 0
        assert grew("kvoffload_failures_total") == 0
        assert all((o.num_cached_tokens or 0) >= 768 for o in outputs)
        loaded = grew("kvoffload_loaded_tokens_total")
        assert loaded > 0
        if not prefix_caching:  # every cached token came from DRAM
            assert loaded >= 768 * len(PROMPTS)
        assert life.reset_prefix_cache()  # no block is still held by anybody
