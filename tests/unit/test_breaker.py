"""The breaker's states against its picture, and followers' rule by hand."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvoffload.core.breaker import COOL_S, Breaker, BreakerState
from kvoffload.core.follow import UNKNOWN_WAIT_S, Leaders, Waiting, wait_for
from kvoffload.core.lease import Lease, LeaseItem
from kvoffload.core.loads import Attempt, LoadTable
from kvoffload.core.planner import Plan
from kvoffload.core.stats import Counters
from kvoffload.types import ChunkKey, Decision, SlotRef, Tier


def test_opens_after_failures_in_a_row() -> None:
    breaker = Breaker(Counters(), threshold=3)
    for _ in range(5):
        breaker.failure(0.0)
        breaker.failure(0.0)
        breaker.success()
    assert breaker.closed(0.0)
    for _ in range(3):
        breaker.failure(0.0)
    assert breaker.state(0.0) is BreakerState.OPEN and not breaker.closed(COOL_S / 2)


def test_the_adapters_page_has_the_pause() -> None:
    page = Path(__file__).parents[2] / "docs" / "adapters.md"
    assert f"each for {COOL_S:g} s at a time" in " ".join(page.read_text().split())


def test_half_open_lets_one_probe_decide() -> None:
    counters = Counters()
    breaker = Breaker(counters, threshold=1)
    breaker.failure(0.0)
    assert not breaker.probe_due(COOL_S / 2) and breaker.probe_due(COOL_S)
    assert breaker.closed(COOL_S), "where no probe can be made, a request is it"
    breaker.probing()
    assert not breaker.closed(COOL_S) and not breaker.probe_due(COOL_S)
    breaker.failure(COOL_S)
    assert breaker.state(COOL_S) is BreakerState.OPEN and counters.nvme_breaker_trips == 2
    breaker.probing()
    breaker.inconclusive()
    assert breaker.closed(2 * COOL_S) and breaker.state(2 * COOL_S) is BreakerState.HALF_OPEN
    breaker.probing()
    breaker.success()
    assert breaker.closed(COOL_S) and breaker.state(COOL_S) is BreakerState.CLOSED


def test_a_pause_may_be_long_and_ends_early() -> None:
    breaker = Breaker(Counters())
    breaker.retry(0.0)
    assert breaker.state(0.0) is BreakerState.CLOSED
    breaker.trip(0.0, 100.0)
    assert breaker.state(99.0) is BreakerState.OPEN and breaker.probe_due(100.0)
    breaker.retry(50.0)
    assert breaker.probe_due(50.0)
    breaker.probing()
    breaker.retry(51.0)
    assert not breaker.closed(51.0), "a probe under way goes on"


@given(
    st.lists(
        st.tuples(st.sampled_from(["ok", "bad", "trip", "probe", "gone", "back"]), st.floats(0, 20))
    )
)
def test_always_recovers(events: list[tuple[str, float]]) -> None:
    breaker, now = Breaker(Counters(), threshold=2), 0.0
    for what, wait in events:
        now += wait
        if what == "ok":
            breaker.success()
        elif what == "bad":
            breaker.failure(now)
        elif what == "trip":
            breaker.trip(now)
        elif what == "gone":
            breaker.inconclusive()
        elif what == "back":
            breaker.retry(now)
        elif breaker.probe_due(now):
            breaker.probing()
        breaker.check()
        levels = {BreakerState.CLOSED: 0.0, BreakerState.HALF_OPEN: 0.5, BreakerState.OPEN: 1.0}
        assert breaker.state(now).level == levels[breaker.state(now)]
    breaker.success()
    assert breaker.closed(now)


# -- followers


def attempt(keys: str, load_s: float | None = 1.0, opened: float = 0.0) -> Attempt:
    items = tuple(
        LeaseItem(0, i, ChunkKey(k.encode() * 16), SlotRef(i, 1, 0), Tier.DRAM)
        for i, k in enumerate(keys)
    )
    plan = Plan(len(keys), Decision.WHOLE, load_s, 10.0)
    return LoadTable().open("r", Lease(1, "r", items, {}), 0, len(keys), opened, 5.0, plan)


@pytest.mark.parametrize(
    ("opened", "now", "own", "waits"),
    [
        (0.0, 0.0, 1.0, True),  # together: the other's is the same load, one step ahead
        (0.0, 0.5, 1.0, True),
        (0.0, 0.5, 0.4, False),  # half a second to go there, less here
        (0.0, 9.0, 1.0, True),  # overdue, bounded by what the own load takes
    ],
)
def test_waits_only_when_that_is_sooner(opened: float, now: float, own: float, waits: bool) -> None:
    planned = Plan(3, Decision.WHOLE, own, 10.0)
    got = wait_for(attempt("abc", 1.0, opened), 3, planned, now)
    assert got == (Waiting(3, now + own) if waits else None)


def test_waits_a_little_while_nothing_is_known() -> None:
    unknown = Plan(3, Decision.UNKNOWN)
    assert wait_for(attempt("abc"), 3, unknown, 7.0) == Waiting(3, 7.0 + UNKNOWN_WAIT_S)


def test_leaders_are_found_by_the_last_chunk() -> None:
    leaders = Leaders()
    first, second = attempt("abc"), attempt("bcd")
    leaders.add(first)
    leaders.add(second)
    assert leaders.of(ChunkKey(b"a" * 16)) is first and leaders.of(ChunkKey(b"c" * 16)) is second
    assert leaders.of(ChunkKey(b"x" * 16)) is None
    leaders.remove(first)
    assert leaders.of(ChunkKey(b"a" * 16)) is None and leaders.of(ChunkKey(b"b" * 16)) is second
    second.failed = True
    assert leaders.of(ChunkKey(b"d" * 16)) is None, "a failed load brings nothing"
    leaders.remove(second)
    assert not len(leaders)
