"""What of the scheduler half's metrics leaves with vLLM's stats. Scheduler thread only."""

from __future__ import annotations

from collections.abc import Callable, Sized

from kvoffload.core.manager import Manager
from kvoffload.engines.vllm.account import Accounts
from kvoffload.engines.vllm.guard import HookGuard
from kvoffload.engines.vllm.pace import Export, ExportPace
from kvoffload.engines.vllm.telemetry import report_levels
from kvoffload.metrics import Payload, Recorder, is_empty


class StatsExport:
    """Gathers at the pace of ExportPace. ``running``: has a length, the number of live requests."""

    def __init__(
        self,
        metrics: Recorder,
        manager: Manager,
        accounts: Accounts,
        guard: HookGuard,
        running: Sized,
        clock: Callable[[], float],
    ) -> None:
        self.pace = ExportPace()
        self._metrics = metrics
        self._manager = manager
        self._accounts = accounts
        self._guard = guard
        self._running = running
        self._clock = clock
        self._step_seconds: list[float] = []

    def step_took(self, seconds: float) -> None:
        """Building a step's orders took so long."""
        self._step_seconds.append(seconds)

    def request_ended(self) -> None:
        """In this step, or before it."""
        self.pace.request_ended(self._clock())

    def wants_step(self, storing: bool) -> bool:
        """Whether an engine without requests must step once more to export."""
        return self.pace.wants_step(self._clock(), storing) and not self._running

    def has_any(self) -> bool:
        """Whether ``take`` would find anything. Asked every step."""
        return not (self._running and self.pace.rests(self._clock()))

    def take(self) -> Payload | None:
        """What changed since the last call, None when nothing did or it can wait."""
        now = self._clock()
        running = bool(self._running)
        storing = not running and self._manager.store_inflight() > 0  # O(slots being filled)
        export = self.pace.next(now, running=running, storing=storing)
        if export is Export.NOTHING:
            return None
        times, self._step_seconds = self._step_seconds, []
        for seconds in times:
            self._metrics.scheduler_step(seconds)
        for hook, count in self._guard.take_errors().items():
            self._metrics.failure(f"hook_{hook}", count)
        if export is Export.ALL:
            report_levels(self._manager, self._metrics)
            self._accounts.report(now)
            self._metrics.ship_again(now)
        payload = self._metrics.take()
        return None if is_empty(payload) else payload
