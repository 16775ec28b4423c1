"""StepClock: the prefill rate is right with one and with two steps in flight."""

from __future__ import annotations

from kvoffload.core.prefill import PrefillWork
from kvoffload.engines.vllm.telemetry import MAX_STEPS_OUT, StepClock

WORK = PrefillWork.span(0, 2048)


def test_one_step_in_flight() -> None:
    clock = StepClock()
    clock.built(WORK, 10.0)
    assert clock.ended(10.1) == (WORK, 10.1 - 10.0)
    clock.built(None, 10.2)
    assert clock.ended(10.3) is None


def test_two_steps_in_flight() -> None:
    """The prefill is built while a decode step still runs; its time starts when that one ends."""
    clock = StepClock()
    clock.built(None, 0.0)
    clock.built(WORK, 0.001)
    assert clock.ended(0.005) is None
    clock.built(None, 0.006)
    assert clock.ended(0.105) == (WORK, 0.105 - 0.005)


def test_missing_outputs_are_not_paired_wrongly() -> None:
    clock = StepClock()
    for i in range(MAX_STEPS_OUT + 3):
        clock.built(WORK, float(i))
    clock.ended(100.0)
    assert clock.ended(101.0) is None, "forgotten"
