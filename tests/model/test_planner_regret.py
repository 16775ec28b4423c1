"""The planner that learns against the best fixed choice, in worlds where each of them is best."""

from __future__ import annotations

import math

import pytest

from tests.support.planner_sim import (
    World,
    oracle,
    run_learner,
    run_static,
    threshold,
    traffic,
)

KIB = 1024
NEVER = 1 << 30


def constant(rate: float):  # type: ignore[no-untyped-def]
    return lambda now: rate


def switching(now: float) -> float:
    """A shared disk: 4 GB/s, and 0.2 GB/s every other two minutes."""
    return 4e9 if int(now / 120) % 2 == 0 else 0.2e9


def drifting(now: float) -> float:
    """Between 0.4 and 4 GB/s, back and forth within ten minutes."""
    return 4e9 * 10 ** (-(1 + math.sin(now / 100)) / 2)


WORLDS = {
    "CPU: always is best": World(22 * KIB, constant(8e9), constant(1.5e9), 1e-3, 2e-8, 0.003),
    "GPU and a slow disk": World(128 * KIB, constant(2e10), constant(5e8), 2e-5, 5e-10, 0.005),
    "hits below a size lose": World(64 * KIB, constant(2e10), constant(6e9), 2e-5, 1e-10, 0.03),
    "only long contexts pay": World(128 * KIB, constant(2e10), constant(7e8), 1e-4, 2e-8, 0.005),
    "the disk switches": World(128 * KIB, constant(2e10), switching, 1e-4, 2e-9, 0.005),
    "the disk drifts": World(128 * KIB, constant(2e10), drifting, 1e-4, 2e-9, 0.005),
    "nothing pays": World(512 * KIB, constant(1e9), constant(2e8), 2e-5, 0.0, 0.01),
}
STATIC = (0, 256, 512, 1024, 2048, 4096, 8192, NEVER)


@pytest.mark.parametrize("world", WORLDS.values(), ids=WORLDS.keys())
@pytest.mark.parametrize("seed", [1, 2, 3])
def test_regret_against_the_best_static_choice(world: World, seed: int) -> None:
    asks = traffic(seed)
    best = min(run_static(world, asks, threshold(t)) for t in STATIC)
    mine = run_learner(world, asks, seed)
    perfect = run_static(world, asks, oracle(world))
    assert perfect <= best * 1.0001
    assert mine <= 1.05 * best, f"regret {mine / best - 1:.1%} (oracle {mine / perfect - 1:.1%})"


def test_each_static_choice_is_bad_somewhere() -> None:
    """Otherwise the worlds would prove nothing."""
    worst = dict.fromkeys(STATIC, 0.0)
    asks = traffic(1)
    for world in WORLDS.values():
        totals = {t: run_static(world, asks, threshold(t)) for t in STATIC}
        for t, total in totals.items():
            worst[t] = max(worst[t], total / min(totals.values()))
    assert min(worst.values()) > 1.2, worst
