"""StepClock: the prefill rate is right with one and with two steps in flight."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

from kvoffload.core.prefill import PrefillWork
from kvoffload.engines.vllm.telemetry import MAX_STEPS_OUT, StepClock, prefill_work, report_drives
from kvoffload.metrics import Recorder
from kvoffload.tiers.nvme import StripedStore, open_drives

WORK = PrefillWork.span(0, 2048)


class Steps(StepClock):
    """One whose clock is told."""

    def __init__(self) -> None:
        super().__init__(lambda: self.now)
        self.now = 0.0

    def ended_at(self, now: float) -> tuple[PrefillWork, float] | None:
        self.now = now
        return self.ended()


def test_one_step_in_flight() -> None:
    steps = Steps()
    steps.built(WORK, 10.0)
    assert steps.ended_at(10.1) == (WORK, 10.1 - 10.0)
    steps.built(None, 10.2)
    assert steps.ended_at(10.3) is None


def test_two_steps_in_flight() -> None:
    """The prefill is built while a decode step still runs; its time starts when that one ends."""
    steps = Steps()
    steps.built(None, 0.0)
    steps.built(WORK, 0.001)
    assert steps.ended_at(0.005) is None
    steps.built(WORK, 0.006)
    assert steps.ended_at(0.105) == (WORK, 0.105 - 0.005)
    assert steps.ended_at(0.205) == (WORK, 0.205 - 0.105)


def test_missing_outputs_are_not_paired_wrongly() -> None:
    steps = Steps()
    for i in range(MAX_STEPS_OUT + 3):
        steps.built(WORK, float(i))
    steps.ended_at(100.0)
    assert steps.ended_at(101.0) is None, "forgotten"
    steps.built(WORK, 102.0)
    assert steps.ended_at(103.0) == (WORK, 1.0), "and paired again"


def test_an_output_too_many_is_not_paired_wrongly() -> None:
    steps = Steps()
    steps.ended_at(1.0)
    steps.built(None, 2.0)
    steps.built(WORK, 2.1)
    assert steps.ended_at(3.0) is None
    assert steps.ended_at(4.0) == (WORK, 1.0)


class Running(dict[str, Any]):
    """Requests by id, (computed, prompt) tokens each; counts those that are asked for."""

    def __init__(self, some: dict[str, tuple[int, int]]) -> None:
        self.asked = 0
        for name, (done, prompt) in some.items():
            request = SimpleNamespace(num_computed_tokens=done, num_prompt_tokens=prompt)
            self[name] = SimpleNamespace(request=request)

    def get(self, name: str, default: Any = None) -> Any:
        self.asked += 1
        return super().get(name, default)


def test_prefill_of_a_step() -> None:
    running = Running(
        {"chunk": (1000, 8000), "last": (100, 300), "drafts": (700, 500), "decode": (9, 5)}
    )
    scheduled = {"chunk": 500, "last": 203, "drafts": 4, "decode": 1, "unknown": 7}
    step: Any = SimpleNamespace(num_scheduled_tokens=scheduled)
    want = PrefillWork.span(1000, 1500) + PrefillWork.span(100, 300)
    assert prefill_work(step, running) == want


def test_decoding_requests_cost_a_steps_prefill_nothing() -> None:
    names = [f"r{i}" for i in range(1000)]
    running = Running({**dict.fromkeys(names, (3000, 2000)), "prompt": (0, 9000)})
    step: Any = SimpleNamespace(num_scheduled_tokens=dict.fromkeys(names, 1))
    assert prefill_work(step, running) is None and not running.asked
    step.num_scheduled_tokens["prompt"] = 8192
    assert prefill_work(step, running) == PrefillWork.span(0, 8192) and running.asked == 1


def test_drives_of_a_store_over_several_paths(tmp_path: Path) -> None:
    a, b, c = (str(tmp_path / name) for name in "abc")
    Path(c).write_text("a file")
    store, metrics = open_drives([a, b, c], max_bytes=24 << 20), Recorder()
    assert isinstance(store, StripedStore)
    native = store._drives[1].store
    assert native is not None
    native.inject("write_eio", 1)
    for i in range(16):
        store.put(i, i.to_bytes(16, "big"), [b"x"])
        assert store.wait(i, 5000)
    store.poll()
    report_drives(store, metrics)
    metrics.check()
    payload = metrics.take()
    assert [payload["g"][f"kvoffload_drive_up|{p}"] for p in (a, b, c)] == [1, 0, 0]
    assert payload["g"][f"kvoffload_drive_used_bytes|{a}"] > 0
    assert payload["c"][f"kvoffload_drive_errors_total|{b}"] >= 3
    assert payload["c"][f"kvoffload_drive_trips_total|{b}"] == 1
    report_drives(store, metrics)
    assert not metrics.take()["c"]
    store.close()
    single = open_drives([str(tmp_path / "d")], max_bytes=8 << 20)
    report_drives(single, metrics)
    assert not metrics.changed()
    single.close()
