"""Asking an engine the same thing twice: small helpers shared by the e2e modules."""

from __future__ import annotations

import json
from typing import Any

from tests.e2e.prompts import total
from tests.support.engine import EngineLife, Output, assert_same


def ask(life: EngineLife, tokens: list[int], **options: Any) -> Output:
    """One request alone: 8 tokens with log-probabilities unless ``options`` say otherwise."""
    return life.generate([tokens], **({"max_tokens": 8, "logprobs": 1} | options))[0]


def cold_then_warm(life: EngineLife, tokens: list[int], **options: Any) -> tuple[Output, Output]:
    """The same request computed, then (HBM emptied) served from the tiers; both must be the same."""
    cold = ask(life, tokens, **options)
    assert cold.num_cached_tokens == 0
    assert life.reset_prefix_cache()
    warm = ask(life, tokens, **options)
    assert_same(cold, warm)
    return cold, warm


def faults(**planted: float) -> dict[str, str | None]:
    """Environment that plants faults; ``role__hook`` stands for "role.hook"."""
    plan = {name.replace("__", ".", 1): n for name, n in planted.items()}
    return {"KVOFFLOAD_TEST_FAULTS": json.dumps(plan)}


class Growth:
    """How much metrics grew since this object was made."""

    def __init__(self, life: EngineLife) -> None:
        self._life = life
        self._before = life.metrics()

    def __call__(self, name: str, **labels: str) -> float:
        return total(self._life.metrics(), name, **labels) - total(self._before, name, **labels)


def failed_loads(life: EngineLife) -> float:
    """Requests whose load failed and that were recomputed."""
    return total(life.metrics(), "kvoffload_failed_loads_total")
