"""Random lives of random engines, shrunk by Hypothesis. About 30 s here; ``stress`` runs longer."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.support.steps import Options
from tests.support.steps_blocks import GroupSpec
from tests.support.steps_random import drive

GROUPS = {
    "full": (GroupSpec(),),
    "long chunks": (GroupSpec(blocks_per_chunk=3),),
    "hybrid": (GroupSpec(), GroupSpec(window=9)),
}
Script = Sequence[tuple[int, int]]
SCRIPT = st.lists(st.tuples(st.integers(0, 99), st.integers(0, 4095)), min_size=5, max_size=60)


@st.composite
def engines(draw: st.DrawFn) -> Options:
    groups = GROUPS[draw(st.sampled_from(sorted(GROUPS)))]
    tight = draw(st.booleans())  # slots so big that the arena holds a handful: evictions
    ranks = draw(st.sampled_from([1, 2]))
    return Options(
        groups=groups,
        ranks=ranks,
        in_flight=draw(st.sampled_from([2, 1])),
        blocks=draw(st.sampled_from([20, 32, 48])) * len(groups),  # small: preemptions, reuse
        budget=draw(st.sampled_from([8, 32])),
        caching=draw(st.booleans()),
        spec_tokens=draw(st.sampled_from([0, 2])),
        defer_alloc=draw(st.booleans()),
        token_bytes=4096 if tight else 64,
        layers=4 if tight else 2,
        kv_layout=draw(st.sampled_from(["LBHNC", "BLHNC"])),
        pad=draw(st.sampled_from([0, 64])),
        replicated=ranks == 2 and draw(st.booleans()),
        store_lag=draw(st.sampled_from([0, 3, -1])),
        load_lag=draw(st.sampled_from([0, 3, -1])),
        random_lag=draw(st.sampled_from([0, 4])),
        late_ranks=draw(st.booleans()),
        pickled=ranks > 1 or draw(st.booleans()),
        drives=draw(st.sampled_from([1, 2, 3])),
        follow=draw(st.booleans()),
        verify=draw(st.sampled_from([0.0, 0.5])),
        seed=draw(st.integers(0, 1000)),
    )


@pytest.fixture(autouse=True)
def quiet(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.CRITICAL, "vllm.kvoffload")


def bounded(examples: int) -> settings:
    return settings(
        max_examples=examples,
        deadline=None,
        suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
    )


@bounded(400)
@given(engines(), SCRIPT, st.booleans())
def test_any_life_without_faults(options: Options, script: Script, nvme: bool) -> None:
    """Also: nothing is ever corrupt or lost when nobody breaks anything."""
    drive(options, script, nvme=nvme)


@bounded(400)
@given(engines(), SCRIPT, st.booleans())
def test_any_life_with_faults(options: Options, script: Script, nvme: bool) -> None:
    """Flipped bytes, failing copies, refused submissions, disk errors, deadlines."""
    drive(options, script, faults=True, nvme=nvme)


@pytest.mark.stress
@settings(bounded(3000))
@given(engines(), SCRIPT, st.booleans(), st.booleans())
def test_any_life_for_long(options: Options, script: Script, faults: bool, nvme: bool) -> None:
    drive(options, script, faults=faults, nvme=nvme)


def test_a_life_is_not_empty() -> None:
    """The generator above reaches loads, failures, evictions, preemptions (seeded, so it stays so)."""
    import random

    total = dict.fromkeys(("parked", "failed", "preempted", "evicted"), 0)
    for seed in range(50):
        rng = random.Random(seed)
        options = Options(
            in_flight=2,
            blocks=20,
            token_bytes=4096,
            layers=4,
            load_lag=3,
            random_lag=2,
            seed=seed,
            follow=seed % 4 < 2,
        )
        script = [(rng.randrange(100), rng.randrange(4096)) for _ in range(60)]
        engine = drive(replace(options, caching=seed % 2 == 0), script, faults=True)
        total["parked"] += engine.scheduler.parked
        total["failed"] += engine.scheduler.failed_loads
        total["preempted"] += engine.scheduler.preemptions
        total["evicted"] += engine.manager.counters.evicted
    assert min(total.values()) > 5, total
