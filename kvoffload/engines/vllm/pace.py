"""When the scheduler half does what nobody waits for: ticks of the Manager, and exports.

Pure decisions over the caller's clock (seconds). Scheduler thread only.
"""

from __future__ import annotations

from enum import Enum

TICK_S, TICK_LATEST_S = 0.05, 0.25
"""The Manager takes in what ended this often, and at least so often where every step has loads."""
STATS_S = 1.0
"""While requests run, levels and totals leave this long after the first unreported change: they
cost 1 to 2 ms of the scheduler's thread, and somebody may be waiting for a token."""
REPORT_WITHIN_S = 0.05
"""An engine without requests takes steps for at most this long to get its metrics exported."""


class TickPace:
    """Which steps take in what has ended."""

    def __init__(self) -> None:
        self._last = float("-inf")

    def due(self, now: float, *, loads: bool, reading: bool, stores: bool, fails: bool) -> bool:
        """Whether the step that is being built ticks. What it has: ``loads`` to begin, ``reading``
        while NVMe is read for any, ``stores``, and loads that ``fails``.

        Somebody waits for a step with loads, and what lies in DRAM needs no tick. Reads from NVMe
        do: whether they get on is what the next request's plan rests on.
        """
        since = now - self._last
        put_off = loads and not reading and since < TICK_LATEST_S
        due = fails or reading or ((stores or since >= TICK_S) and not put_off)
        if due and since >= TICK_S:
            self._last = now
        return due

    def rests(self, now: float) -> bool:
        """Whether a step with none of these needs no tick."""
        return now - self._last < TICK_S


class Export(Enum):
    """What of the metrics leaves with a step."""

    NOTHING = 0
    COUNTS = 1  # what was counted so far: cheap
    ALL = 2  # levels and totals too


class ExportPace:
    """The step that ends a request takes along its counts. Levels and totals wait (STATS_S), where
    no request is left for an empty step once the stores are over: tokens go out first."""

    def __init__(self) -> None:
        self._unreported: float | None = None  # since when there is something to export
        self._until = float("-inf")  # until then an idle engine steps to export
        self.ended = False  # a request ended since the last step

    def request_ended(self, now: float) -> None:
        """In this step, or before it."""
        self.ended = True
        self._until = now + REPORT_WITHIN_S

    def wants_step(self, now: float, storing: bool) -> bool:
        """Whether an engine without requests must take another step, ``storing`` while copies are
        out."""
        if storing:
            self._until = now + REPORT_WITHIN_S
        return now < self._until

    def rests(self, now: float) -> bool:
        """Whether ``next`` would say NOTHING for an engine with requests."""
        began = self._unreported
        return not self.ended and began is not None and now - began < STATS_S

    def next(self, now: float, running: bool, storing: bool) -> Export:
        """What leaves with this step; asked once a step. ``running``: there are requests; then
        ``storing`` does not matter."""
        if self._unreported is None:
            self._unreported = now
        ended, self.ended = self.ended, False
        # Owed since the last request's end.
        owed = not (running or ended or storing) and self._until > float("-inf")
        if owed or now - self._unreported >= STATS_S:
            self._unreported, self._until = None, float("-inf")
            return Export.ALL
        return Export.COUNTS if ended else Export.NOTHING
