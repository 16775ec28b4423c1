"""When metrics leave the engine: after the tokens, within a second, and all of them in the end."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise

import pytest

from kvoffload.engines.vllm.meta import LoadOrder
from kvoffload.engines.vllm.pace import REPORT_WITHIN_S, STATS_S, TICK_LATEST_S
from tests.support.steps import MiniEngine, tokens
from tests.support.steps_setup import Options
from tests.support.steps_types import StepOutput


@pytest.fixture
def engine() -> Iterator[MiniEngine]:
    made = MiniEngine(Options())
    yield made
    made.close()


def test_a_running_engine_exports_once_a_second(engine: MiniEngine) -> None:
    half = engine.scheduler_half
    engine.ask(tokens(40))
    engine.exported()
    engine.add(tokens(40), 40)
    exports = 0
    for _ in range(30):
        assert engine.step()
        engine.clock.now += STATS_S / 10
        exports += half.take_stats() is not None
    assert exports == 2  # after 11 steps each: the first unreported one starts the second
    engine.run()


def test_a_running_engine_ships_its_levels_again(engine: MiniEngine) -> None:
    """For exporters that vLLM made since: what has not changed would read 0 for ever."""
    half = engine.scheduler_half
    engine.ask(tokens(40))
    engine.exported()
    engine.add(tokens(40), 120)
    shipped = []
    for _ in range(110):
        assert engine.step()
        engine.clock.now += 1.0
        payload = half.take_stats()
        shipped.append(payload is not None and "kvoffload_dram_total_bytes" in payload["g"])
    assert shipped.count(True) == 2, shipped
    engine.run()


def test_the_last_token_goes_first_and_everything_is_exported(engine: MiniEngine) -> None:
    """Asked each step, as vLLM does: nothing while the request runs, its counts with its last token,
    all the rest once the engine rests."""
    half = engine.scheduler_half
    engine.add(tokens(40), 3)
    payloads = []
    while engine.step() or engine.scheduler.has_requests():
        live, ended = bool(half._states), half._stats.pace.ended
        payload = half.take_stats()
        if payload is not None:
            assert ended or not (live or engine.manager.store_inflight())
            payloads.append(payload)
        engine.clock.now += 0.001
    counted, rest = payloads
    assert counted["c"]["kvoffload_lookups_total"] == 1 and not counted["g"]
    assert rest["g"]["kvoffload_entries|dram"] == 5, "what was stored last is in it"
    booked = {k: v for k, v in rest["c"].items() if k.startswith("kvoffload_ledger_requests_total")}
    assert list(booked.values()) == [1]


def test_steps_of_requests_count_no_stores(
    engine: MiniEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It takes longer the more slots are being filled, and a decode step has nothing to do with it."""
    half, asked = engine.scheduler_half, []
    monkeypatch.setattr(engine.manager, "store_inflight", lambda: bool(asked.append(1)))
    engine.add(tokens(40), 20)
    for _ in range(10):
        assert engine.step() and half._states
        half.take_stats()
    assert not asked
    engine.run()
    half.take_stats()
    assert asked, "an engine at rest looks"


def test_an_idle_engine_does_not_step_for_ever(engine: MiniEngine) -> None:
    """Where nobody asks for metrics (a version of vLLM that logs none)."""
    half = engine.scheduler_half
    engine.add(tokens(40), 1)
    engine.run()
    while engine.manager.store_inflight():
        engine.clock.now += 0.001
        engine.manager.poll()
    ended = engine.clock.now
    while half.has_pending_push_work():
        engine.clock.now += 0.005
    assert engine.clock.now - ended <= REPORT_WITHIN_S + 0.005


def test_loads_in_every_step_put_a_tick_off_for_a_while_only(
    engine: MiniEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    half = engine.scheduler_half
    monkeypatch.setattr(half._loads, "orders", lambda now: ([LoadOrder(1, "r", 100, [])], []))
    ticks: list[float] = []
    monkeypatch.setattr(half, "_tick", lambda busy: ticks.append(engine.clock.now))
    began = engine.clock.now
    for _ in range(100):
        half._build(StepOutput(1))
        engine.clock.now += 0.01
    gaps = [b - a for a, b in pairwise([began, *ticks])]
    assert 3 <= len(ticks) <= 5 and max(gaps) <= TICK_LATEST_S + 0.011


def test_reads_from_nvme_are_looked_after_in_every_step(
    engine: MiniEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    half = engine.scheduler_half
    monkeypatch.setattr(half._loads, "orders", lambda now: ([LoadOrder(1, "r", 100, [])], []))
    monkeypatch.setattr(half.manager, "reading", lambda: True)
    ticks: list[float] = []
    monkeypatch.setattr(half, "_tick", lambda busy: ticks.append(engine.clock.now))
    for _ in range(100):
        half._build(StepOutput(1))
        engine.clock.now += 0.01
    assert len(ticks) == 100


def test_a_step_that_could_not_be_built_is_paired_with_its_output(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Else each later output counts as the next step's, for as long as two are in flight."""
    engine = MiniEngine(Options(in_flight=2))
    half = engine.scheduler_half
    engine.add(tokens(40), 20)
    engine.step()
    monkeypatch.setattr(half._fence, "due", lambda *_: 1 // 0)
    engine.step()
    monkeypatch.undo()
    for _ in range(6):
        engine.step()
        assert half._steps._built - half._steps._ended == len(engine.queue)
    engine.run()


def test_what_a_step_that_could_not_be_built_computes_is_stored_by_the_next(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The harness looks in every step whether a complete chunk was left out."""
    engine = MiniEngine(Options(budget=32))
    half = engine.scheduler_half
    engine.add(tokens(64), 20)
    engine.step()
    monkeypatch.setattr(half, "_is_calm", lambda *_: 1 // 0)
    engine.step()
    monkeypatch.undo()
    engine.step()
    assert half.guard.errors == {"build_connector_meta": 1}
    engine.run()
