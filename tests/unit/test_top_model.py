"""``kvoffload top``'s arithmetic: two samples in, numbers out."""

from __future__ import annotations

import math
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from kvoffload.cli import units
from kvoffload.cli.top_model import Frame, frame
from kvoffload.cli.top_samples import Sample

ENGINE = {"model_name": "m", "engine": "0"}
OTHER = {"model_name": "m", "engine": "1"}


def sample(at: float, *rows: tuple[Any, ...]) -> Sample:
    """Rows: (name, value[, labels]); without an ``engine`` label they are of engine 0."""
    full = []
    for name, value, *labels in rows:
        full.append((name, ENGINE | (labels[0] if labels else {}), value))
    return Sample.of(at, full)


def two(before: list[tuple[Any, ...]], after: list[tuple[Any, ...]], seconds: float = 2.0) -> Frame:
    return frame(sample(10.0, *before), sample(10.0 + seconds, *after))


def tokens(tier: str, value: float) -> tuple[Any, ...]:
    return ("kvoffload_hit_tokens_total", value, {"tier": tier})


QUERIED = "kvoffload_queried_tokens_total"
LOOKUPS = "kvoffload_lookups_total"
PREFILL = "kvoffload_prefill_tokens_per_second"


def buckets(name: str, counts: dict[str, float], spent: float, **labels: str) -> list[tuple]:
    rows = [(f"{name}_bucket", n, {"le": le, **labels}) for le, n in counts.items()]
    return [*rows, (f"{name}_sum", spent, labels), (f"{name}_count", counts["+Inf"], labels)]


def test_hit_rates_now_and_since_start() -> None:
    shown = two(
        [(QUERIED, 1000), tokens("dram", 100), tokens("nvme", 0)],
        [(QUERIED, 1400), tokens("dram", 300), tokens("nvme", 100)],
    )
    assert shown.tiers["dram"].hit_rate_now == 0.5
    assert shown.tiers["dram"].hit_rate_total == pytest.approx(300 / 1400)
    assert shown.tiers["nvme"].hit_rate_now == 0.25
    assert shown.hit_rate_now == 0.75
    assert shown.hit_rate_total == pytest.approx(400 / 1400)
    assert shown.queried_tokens is not None
    assert (shown.queried_tokens.added, shown.queried_tokens.per_s) == (400, 200)


def test_a_load_ordered_after_its_lookups_window() -> None:
    shown = two([(QUERIED, 90), tokens("dram", 0)], [(QUERIED, 100), tokens("dram", 80)])
    assert shown.hit_rate_now == 1.0 and shown.hit_rate_total == 0.8
    quiet = two([(QUERIED, 100), tokens("dram", 0)], [(QUERIED, 100), tokens("dram", 80)])
    assert quiet.hit_rate_now is None


def test_missing_series_are_none_and_not_zero() -> None:
    shown = two([(LOOKUPS, 1)], [(LOOKUPS, 2)])
    assert shown.lookups is not None and shown.lookups.per_s == 0.5
    assert shown.hit_rate_now is shown.hit_rate_total is shown.saved is None
    assert shown.prefill_tokens_per_s is shown.hbm_hit_rate_now is shown.failed_loads is None
    assert shown.plans == shown.misses == shown.failures == shown.times == shown.requests == {}
    nvme = shown.tiers["nvme"]
    assert nvme.used_bytes is nvme.size_bytes is nvme.load_bytes is None
    assert nvme.breakers == nvme.inflight_bytes == {} and not nvme.active


def test_the_first_sample_has_totals_only() -> None:
    shown = frame(None, sample(5.0, (LOOKUPS, 7), (QUERIED, 10), tokens("dram", 5)))
    assert shown.window_s is None and not shown.restarted
    assert shown.lookups is not None
    assert (shown.lookups.total, shown.lookups.added, shown.lookups.per_s) == (7, None, None)
    assert shown.hit_rate_now is None and shown.hit_rate_total == 0.5


def test_no_time_between_samples_gives_no_rates() -> None:
    shown = two([(LOOKUPS, 1)], [(LOOKUPS, 2)], seconds=0.0)
    assert shown.window_s is None and shown.lookups is not None and shown.lookups.per_s is None


RESTARTS = {
    "a counter fell": ([(LOOKUPS, 50), (QUERIED, 10)], [(LOOKUPS, 4), (QUERIED, 60)]),
    "a series vanished": (
        [(QUERIED, 10), ("kvoffload_events_total", 0, {"event": "evicted"})],
        [(QUERIED, 60)],
    ),
    "another process": (
        [("process_start_time_seconds", 100.5), (QUERIED, 10)],
        [("process_start_time_seconds", 200.5), (QUERIED, 60)],
    ),
}


@pytest.mark.parametrize("case", RESTARTS)
def test_a_restarted_server_counts_from_zero(case: str) -> None:
    shown = two(*RESTARTS[case])
    assert shown.restarted
    # Everything since, also of counters that have already passed their old value.
    assert shown.queried_tokens is not None
    assert (shown.queried_tokens.added, shown.queried_tokens.per_s) == (60, 30)


def test_what_is_no_restart() -> None:
    start = ("process_start_time_seconds", 100.5)
    falling_gauge = ("kvoffload_dram_used_bytes", 9)
    rows = [start, falling_gauge, (QUERIED, 10), ("kvoffload_lookups_created", 9.0)]
    shown = two(rows, [start, ("kvoffload_dram_used_bytes", 1), (QUERIED, 10)])
    assert not shown.restarted and shown.queried_tokens is not None
    assert shown.queried_tokens.added == 0


def test_a_series_that_appears_counted_from_zero() -> None:
    event = ("kvoffload_events_total", 6, {"event": "evicted"})
    shown = two([(LOOKUPS, 1)], [(LOOKUPS, 1), event])
    assert not shown.restarted and shown.events["evicted"].added == 6


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_values_that_are_not_finite(bad: float) -> None:
    good = [(QUERIED, 10), tokens("dram", 5)]
    after = two(good, [(QUERIED, bad), tokens("dram", 6), ("kvoffload_dram_used_bytes", bad)])
    assert not after.restarted
    assert after.queried_tokens is after.hit_rate_total is after.tiers["dram"].used_bytes is None
    # Before: the total stands, the increase is not known (and not the whole total).
    before = two([(QUERIED, bad), tokens("dram", 5)], [(QUERIED, 20), tokens("dram", 5)])
    assert before.queried_tokens is not None
    assert (before.queried_tokens.total, before.queried_tokens.added) == (20, None)
    assert before.hit_rate_now is None and before.hit_rate_total == 0.25


def test_quantiles_are_of_the_window() -> None:
    name = "kvoffload_load_seconds"
    old = buckets(name, {"0.001": 100, "0.01": 100, "0.1": 100, "+Inf": 100}, 0.05)
    new = buckets(name, {"0.001": 100, "0.01": 200, "0.1": 200, "+Inf": 200}, 0.55)
    times = two(old, new).times["load"]
    assert times.now is not None and times.total is not None
    assert times.now.count == 100 and times.now.mean_s == pytest.approx(0.005)
    assert times.now.p50_s == pytest.approx(0.001 + 0.009 * 0.5)
    assert times.now.p99_s == pytest.approx(0.001 + 0.009 * 0.99)
    assert times.total.p50_s == pytest.approx(0.001)
    quiet = two(new, new).times["load"]
    assert quiet.now is None and quiet.total is not None


def test_a_quantile_beyond_the_last_bound_is_that_bound() -> None:
    name = "kvoffload_load_seconds"
    times = two([], buckets(name, {"0.1": 9, "10.0": 9, "+Inf": 10}, 60.0)).times["load"]
    assert times.now is not None and times.now.p99_s == 10.0 == times.bound_s
    assert times.now.p50_s < 0.1


def test_quantiles_add_up_over_engines() -> None:
    name = "kvoffload_load_seconds"
    fast = buckets(name, {"0.1": 10, "1.0": 10, "+Inf": 10}, 0.5)
    slow = buckets(name, {"0.1": 0, "1.0": 10, "+Inf": 10}, 5.0, engine="1")
    now = two([], [*fast, *slow]).times["load"].now
    assert now is not None and now.count == 20
    assert now.p50_s == pytest.approx(0.1) and now.p99_s > 0.9


@given(st.lists(st.floats(0, 20), min_size=1, max_size=60))
@example([1.0, 0.0078125])  # rounds to just above the bound
def test_quantiles_lie_in_the_right_bucket(values: list[float]) -> None:
    bounds = [0.001, 0.01, 0.1, 1.0, 10.0]
    counts = {str(b): sum(v <= b for v in values) for b in bounds} | {"+Inf": len(values)}
    times = two([], buckets("kvoffload_load_seconds", counts, sum(values))).times["load"]
    assert times.now is not None
    for q, found in ((0.5, times.now.p50_s), (0.99, times.now.p99_s)):
        exact = sorted(values)[math.ceil(q * len(values)) - 1]
        above = next((b for b in bounds if exact <= b), bounds[-1])
        below = max((b for b in bounds if b < above), default=0.0)
        if exact > bounds[-1]:
            assert found == bounds[-1]
        else:
            assert below <= found <= above


def test_time_saved_may_be_negative() -> None:
    saved, cost = "kvoffload_saved_seconds_total", "kvoffload_cost_seconds_total"
    shown = two([(saved, 1.0), (cost, 1.0)], [(saved, 1.5), (cost, 4.0)])
    assert shown.saved is not None
    assert (shown.saved.total_s, shown.saved.now_s) == (-2.5, -2.5)
    first = frame(None, sample(0.0, (saved, 1.5), (cost, 1.0)))
    assert first.saved is not None
    assert (first.saved.total_s, first.saved.now_s) == (0.5, None)
    assert two([], [(saved, 1.0)]).saved is None


def test_a_rate_nobody_has_learned_is_not_zero() -> None:
    rate = ("kvoffload_tier_bytes_per_second", 0, {"tier": "nvme"})
    shown = two([], [(PREFILL, 0), rate])
    assert shown.prefill_tokens_per_s is None
    assert shown.tiers["nvme"].learned_bytes_per_s is None


def test_engines_of_one_server() -> None:
    """Arenas add up; the one NVMe path is reported whole by each engine."""
    rows: list[tuple[Any, ...]] = []
    for labels in (ENGINE, OTHER):
        rows += [
            (LOOKUPS, 3, labels),
            ("kvoffload_dram_used_bytes", 10, labels),
            ("kvoffload_dram_total_bytes", 40, labels),
            ("kvoffload_nvme_used_bytes", 70, labels),
            ("kvoffload_nvme_max_bytes", 100, labels),
            ("kvoffload_entries", 5, {**labels, "tier": "nvme"}),
            ("kvoffload_entries", 5, {**labels, "tier": "dram"}),
            ("vllm:num_requests_waiting", 2, labels),
            (PREFILL, 10 if labels is ENGINE else 100, labels),
        ]
    shown = two([], rows)
    assert shown.prefill_tokens_per_s == 55  # each engine learns its own
    assert shown.engines == 2 and shown.lookups is not None and shown.lookups.total == 6
    dram, nvme = shown.tiers["dram"], shown.tiers["nvme"]
    assert (dram.used_bytes, dram.size_bytes, dram.chunks) == (20, 80, 10)
    assert (nvme.used_bytes, nvme.size_bytes, nvme.chunks) == (70, 100, 5)
    assert shown.requests == {"waiting": 4}


@pytest.mark.parametrize(
    ("levels", "state"),
    [([0], "closed"), ([1], "open"), ([0.5], "half-open"), ([0, 0.5], "half-open")],
)
def test_breakers(levels: list[float], state: str) -> None:
    rows: list[tuple[Any, ...]] = [
        ("kvoffload_breaker_open", level, {"tier": "nvme", "direction": "load", "engine": str(i)})
        for i, level in enumerate(levels)
    ]
    rows.append(("kvoffload_breaker_open", 0, {"tier": "nvme", "direction": "store"}))
    tiers = two([], rows).tiers
    assert tiers["nvme"].breakers == {"load": state, "store": "closed"}
    assert tiers["dram"].breakers == {}


def test_bytes_queues_and_decisions() -> None:
    def moved(way: str, value: float) -> tuple[Any, ...]:
        return ("kvoffload_bytes_total", value, {"tier": "nvme", "direction": way})

    def plan(decision: str, value: float) -> tuple[Any, ...]:
        return ("kvoffload_plans_total", value, {"decision": decision})

    shown = two(
        [moved("load", 100), moved("store", 10), plan("whole", 1), plan("follow", 0)],
        [
            *(moved("load", 300), moved("store", 30), plan("whole", 5), plan("follow", 2)),
            ("kvoffload_followers_total", 3, {"outcome": "hit_hbm"}),
            ("kvoffload_inflight_bytes", 7, {"tier": "nvme", "direction": "load"}),
            ("kvoffload_inflight_bytes", 5, {"tier": "dram", "direction": "store"}),
            ("vllm:num_requests_running", 4),
            ("vllm:num_requests_kv_fetch_by_stage", 2, {"stage": "in_progress"}),
            ("vllm:prefix_cache_queries_total", 100),
            ("vllm:prefix_cache_hits_total", 25),
            ("vllm:generation_tokens_total", 5),
        ],
    )
    nvme = shown.tiers["nvme"]
    assert nvme.load_bytes is not None and nvme.load_bytes.per_s == 100
    assert nvme.store_bytes is not None and nvme.store_bytes.per_s == 10
    assert nvme.active and nvme.inflight_bytes == {"load": 7}
    assert shown.tiers["dram"].inflight_bytes == {"store": 5}
    assert shown.plans["whole"].added == 4
    assert shown.plans["follow"].total == 2
    assert {name: flow.total for name, flow in shown.followers.items()} == {"hit_hbm": 3}
    assert shown.requests == {"running": 4, "load_in_progress": 2}
    assert shown.hbm_hit_rate_now == shown.hbm_hit_rate_total == 0.25


def test_a_server_without_our_metrics() -> None:
    assert not sample(0.0, ("vllm:num_requests_running", 1), ("other_total", 1)).has_ours
    assert sample(0.0, (LOOKUPS, 0)).has_ours


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        (units.size(0), "0 B"),
        (units.size(1536), "1.5 KiB"),
        (units.size(3 << 40), "3.00 TiB"),
        (units.seconds(0), "0 s"),
        (units.seconds(0.0000421), "42.1 us"),
        (units.seconds(0.0031), "3.10 ms"),
        (units.seconds(-1.2), "-1.20 s"),
        (units.seconds(2100), "35 min"),
        (units.seconds(9000), "2.5 h"),
        (units.count(1234), "1,234"),
        (units.count(0.5), "0.5"),
        (units.count(123400), "123.4k"),
        (units.count(4.56e6), "4.56M"),
        (units.share(0), "0 %"),
        (units.share(0.042), "4.2 %"),
        (units.share(1), "100 %"),
    ],
)
def test_units(text: str, shown: str) -> None:
    assert text == shown
