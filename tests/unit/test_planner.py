"""Load or recompute: each decision against arithmetic done by hand."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvoffload.core.planner import (
    DEADLINE_FLOOR_S,
    DEADLINE_LEAST_S,
    LoadMode,
    Plan,
    Step,
    deadline_s,
    load_mode,
    load_seconds,
)
from kvoffload.core.planner import plan as make_plan
from kvoffload.core.prefill import PrefillModel, PrefillWork
from kvoffload.core.rates import Ewma, Rates, TierRate
from kvoffload.errors import ConfigError
from kvoffload.types import Decision, Tier

DRAM, NVME = Tier.DRAM, Tier.NVME
FAST = {DRAM: TierRate(1e9, 0.0), NVME: TierRate(1e8, 0.0)}


def plan(
    start: int,
    of: list[Step],
    tiers: dict[Tier, TierRate],
    tokens_per_s: float | None,
    mode: LoadMode = LoadMode.AUTO,
) -> int:
    """The boundary chosen with a prefill that takes as long for every token."""

    def prefill(a: int, b: int) -> float | None:
        return None if tokens_per_s is None else (b - a) / tokens_per_s

    return make_plan(start, of, tiers, prefill, mode).end


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
    assert plan(0, bad, {}, 1e9) == 0, "an unknown disk is taken for a slow one"
    assert plan(0, bad, {}, 1e3) == 100, "and even that pays here"
    large = steps(*[NVME] * 4, nbytes=100 << 20)
    assert plan(0, large, FAST, None) == 200, "LEARN_BYTES while the engine is not known"
    assert plan(7, [], FAST, 1000.0) == 7
    with pytest.raises(ConfigError, match="load='maybe'"):
        load_mode("maybe")


def test_hops_overlap_so_the_slowest_counts() -> None:
    both = {DRAM: 10_000_000, NVME: 10_000_000}
    assert load_seconds(both, FAST) == pytest.approx(0.1)
    slow_dram = {DRAM: TierRate(1e8, 0.0), NVME: TierRate(1e9, 0.0)}
    assert load_seconds(both, slow_dram) == pytest.approx(0.2), "all bytes cross DRAM"


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


def test_a_tier_that_has_changed_is_believed_soon() -> None:
    """A slow spell has long samples, which would outweigh many short ones after it."""
    ewma = Ewma()
    for _ in range(20):
        ewma.add(4, 10.0)
    for _ in range(5):
        ewma.add(4, 1.0)
    assert ewma.rate is not None and ewma.rate > 2
    for _ in range(20):
        ewma.add(4, 1.0 if _ % 2 else 1.5)
    assert ewma.rate == pytest.approx(3.2, rel=0.1), "noise is averaged over"


def test_a_standstill_is_waited_for() -> None:
    rates = Rates()
    for _ in range(5):
        rates.observe(NVME, 1_000_000, 0.002)
    usual = rates.tiers()[NVME].latency_s
    assert rates.tiers(None, {NVME: 0.3})[NVME].latency_s == pytest.approx(usual + 0.3)


def test_rates_subtract_the_fixed_cost() -> None:
    rates = Rates()
    assert rates.tiers() == {}
    for _ in range(5):
        rates.observe(NVME, 1_000_000, 0.002)
    assert rates.tiers()[NVME].bytes_per_s == pytest.approx(1e9)
    rates.check()


def test_what_goes_first_is_waited_for() -> None:
    rates = Rates()
    for _ in range(5):
        rates.observe(NVME, 1_000_000_000, 1.001)
    idle, queued = rates.tiers()[NVME], rates.tiers({NVME: 500_000_000})[NVME]
    assert queued.latency_s - idle.latency_s == pytest.approx(0.5)


def test_a_loads_error_corrects_the_step_time() -> None:
    rates = Rates()
    for _ in range(5):
        rates.observe(DRAM, 1_000_000_000, 1.0005)
    for _ in range(200):  # every load takes 30 ms beyond its bytes
        expected = load_seconds({DRAM: 1_000_000}, rates.tiers())
        rates.observe_load(0.0315, expected)
    assert load_seconds({DRAM: 1_000_000}, rates.tiers()) == pytest.approx(0.0315, rel=0.01)
    for _ in range(100):
        rates.observe_load(0.0, 5.0)
    assert rates.step_s == 0.0
    rates.check()


# -- prefill as a function of context


def test_prefill_grows_with_context() -> None:
    """10 us a token and 2 ns a token and token before it, learned from chunks of 1024."""
    model = PrefillModel()
    assert model.seconds(0, 100) is None

    def truth(a: int, b: int) -> float:
        return 1e-5 * (b - a) + 2e-9 * (b * b - a * a) / 2

    for a in range(0, 16384, 1024):
        model.add(PrefillWork.span(a, a + 1024), truth(a, a + 1024))
    for span in ((0, 4096), (8192, 9000), (0, 32768)):
        assert model.seconds(*span) == pytest.approx(truth(*span), rel=0.05)
    model.check()


def test_steps_at_one_context_say_nothing_about_others() -> None:
    model = PrefillModel()
    for i in range(20):
        model.add(PrefillWork.span(1000, 1256), 0.01 * (1 + 0.05 * (-1) ** i))
    assert model.seconds(8000, 8256) == pytest.approx(0.01, rel=0.1)


@given(
    samples=st.lists(
        st.tuples(st.integers(0, 30_000), st.integers(1, 8192), st.floats(0, 100)), max_size=40
    )
)
def test_prefill_is_never_negative(samples: list[tuple[int, int, float]]) -> None:
    model = PrefillModel()
    for start, tokens, seconds in samples:
        model.add(PrefillWork.span(start, start + tokens), seconds)
    model.check()
    for span in ((0, 1), (0, 100_000), (50_000, 50_001)):
        got = model.seconds(*span)
        assert got is None or got >= 0


def test_a_step_of_several_prompts_is_one_sample() -> None:
    both = PrefillWork.span(0, 100) + PrefillWork.span(1000, 1100)
    assert both == PrefillWork(200, 100 * 50 + 100 * 1050)


# -- decisions and deadlines


def test_decisions_say_what_happened() -> None:
    def decide(of: list[Step], rate: float | None, mode: LoadMode = LoadMode.AUTO) -> Plan:
        return make_plan(0, of, FAST, lambda a, b: rate and (b - a) / rate, mode)

    assert decide(steps(DRAM), 1000.0).decision is Decision.WHOLE
    assert decide(steps(DRAM, NVME, NVME), 2000.0).decision is Decision.PARTIAL
    assert decide(steps(NVME), 1e6).decision is Decision.REFUSED
    assert decide(steps(NVME), None).decision is Decision.UNKNOWN
    assert decide(steps(NVME), 1.0, LoadMode.NEVER).decision is Decision.FORCED
    whole = decide(steps(DRAM), 1000.0)
    assert whole.load_s == pytest.approx(0.01) and whole.recompute_s == pytest.approx(0.1)


@pytest.mark.parametrize(
    ("planned", "want"),
    [
        (Plan(1, Decision.UNKNOWN), 5.0),
        (Plan(1, Decision.WHOLE, 0.001, 0.5), DEADLINE_FLOOR_S),
        (Plan(1, Decision.WHOLE, 0.001, 0.1), 0.1),
        (Plan(1, Decision.WHOLE, 0.001, 0.01), DEADLINE_LEAST_S),
        (Plan(1, Decision.WHOLE, 0.001), DEADLINE_FLOOR_S),
        (Plan(1, Decision.WHOLE, 0.1, 1.0), 0.4),
        (Plan(1, Decision.WHOLE, 0.001, 20.0), 1.0),
        (Plan(1, Decision.WHOLE, 100.0, 200.0), 5.0),
        (Plan(1, Decision.WHOLE, 1.1, 1.0, queue_s=1.0), 1.4),
    ],
)
def test_deadlines_follow_the_plan(planned: Plan, want: float) -> None:
    assert deadline_s(planned, 5.0) == pytest.approx(want)
