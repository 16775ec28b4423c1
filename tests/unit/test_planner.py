"""Load or recompute: each decision against arithmetic done by hand."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvoffload.core.planner import (
    Ewma,
    LoadMode,
    Rates,
    Step,
    TierRate,
    load_mode,
    load_seconds,
    plan,
)
from kvoffload.errors import ConfigError
from kvoffload.types import Tier

DRAM, NVME = Tier.DRAM, Tier.NVME
FAST = {DRAM: TierRate(1e9, 0.0), NVME: TierRate(1e8, 0.0)}


def steps(*tiers: Tier, tokens: int = 100, nbytes: int = 10_000_000) -> list[Step]:
    out, total = [], {DRAM: 0, NVME: 0}
    for i, tier in enumerate(tiers):
        total[tier] += nbytes
        out.append(Step((i + 1) * tokens, dict(total)))
    return out


def test_loads_everything_when_that_is_faster() -> None:
    assert plan(0, steps(DRAM, DRAM, DRAM), FAST, 1000.0) == 300


def test_stops_where_the_slow_tier_loses() -> None:
    # A chunk of 100 tokens recomputes in 0.05 s; DRAM loads it in 0.01 s, NVMe in 0.1 s.
    assert plan(0, steps(DRAM, DRAM, NVME, NVME), FAST, 2000.0) == 200
    assert plan(0, steps(NVME, NVME), FAST, 2000.0) == 0


def test_equal_is_refused_and_among_equals_the_longest_wins() -> None:
    assert plan(0, steps(NVME), FAST, 1000.0) == 0  # 0.1 s either way: not worth it
    half_free = [Step(100, {DRAM: 0}), Step(200, {DRAM: 100_000_000})]
    assert plan(0, half_free, FAST, 1000.0) == 200


def test_fixed_latency_makes_short_loads_lose() -> None:
    slow_start = {DRAM: TierRate(1e9, 1.0)}
    assert plan(0, steps(*[DRAM] * 3), slow_start, 1000.0) == 0
    assert plan(0, steps(*[DRAM] * 30), slow_start, 1000.0) == 3000


def test_what_hbm_holds_saves_nothing() -> None:
    assert plan(95, steps(DRAM), FAST, 1000.0) == 95


def test_modes_and_unknown_rates() -> None:
    bad = steps(NVME)
    assert plan(0, bad, FAST, 1e9, LoadMode.ALWAYS) == 100
    assert plan(0, steps(DRAM), FAST, 1.0, LoadMode.NEVER) == 0
    assert plan(0, bad, FAST, None) == 100
    assert plan(0, bad, {}, 1e9) == 100
    assert plan(7, [], FAST, 1000.0) == 7
    with pytest.raises(ConfigError, match="load='maybe'"):
        load_mode("maybe")


def test_hops_overlap_so_the_slowest_counts() -> None:
    both = {DRAM: 10_000_000, NVME: 10_000_000}
    assert load_seconds(both, FAST) == pytest.approx(0.1)
    assert load_seconds(both, {DRAM: FAST[DRAM]}) == pytest.approx(0.02)


@given(
    tiers=st.lists(st.sampled_from([DRAM, NVME]), max_size=8),
    speed=st.floats(1, 1e7),
    start=st.integers(0, 99),
)
def test_a_plan_never_costs_more_than_it_saves(tiers: list[Tier], speed: float, start: int) -> None:
    offered = steps(*tiers)
    end = plan(start, offered, FAST, speed)
    assert end == start or end in {s.end for s in offered}
    gains = {s.end: (s.end - start) / speed - load_seconds(s.nbytes, FAST) for s in offered}
    if end == start:
        assert all(g <= 0 for g in gains.values())
    else:
        assert gains[end] > 0 and gains[end] == max(gains.values())


def test_estimates_follow_and_forget() -> None:
    ewma = Ewma()
    for _ in range(2):
        ewma.add(100, 1.0)
    assert ewma.rate is None
    ewma.add(100, 1.0)
    assert ewma.rate == pytest.approx(100)
    for _ in range(60):
        ewma.add(10, 1.0)
    assert ewma.rate == pytest.approx(10, rel=0.02)
    ewma.add(0, 5.0)
    ewma.add(5, 0.0)
    assert ewma.rate == pytest.approx(10, rel=0.02)


def test_rates_subtract_the_fixed_cost() -> None:
    rates = Rates()
    assert rates.tiers() == {} and rates.prefill_tokens_per_s is None
    for _ in range(5):
        rates.observe(NVME, 1_000_000, 0.002)
        rates.observe_prefill(1000, 0.5)
    assert rates.tiers()[NVME].bytes_per_s == pytest.approx(1e9)
    assert rates.prefill_tokens_per_s == pytest.approx(2000)
    rates.check()
