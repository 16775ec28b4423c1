"""Stops using a tier that fails, and finds out by itself when it works again.

::

    CLOSED --- threshold failures in a row, or trip() ---> OPEN --- cool_s later ---> HALF_OPEN
       ^                                                     |  ^                        |   |
       +------------------ a success ------------------------+--|------------------------+   |
                                                                +--------- a failure --------+

While OPEN or HALF_OPEN the tier is a miss for every request. HALF_OPEN is for a probe that no
request waits for; until one is under way ``closed`` says yes, so that somebody finds one. ``retry``
ends a pause early.
"""

from __future__ import annotations

from enum import Enum

from kvoffload.core.stats import Counters

COOL_S = 2.0
"""Pause before a probe: a tier that is back is used again within 10 s, with room to spare for a
probe that was sent just before and hangs."""


class BreakerState(str, Enum):
    """See the module's picture."""

    CLOSED = "closed"
    OPEN = "open"
    HALF_OPEN = "half_open"

    @property
    def level(self) -> float:
        """As exported: 0 closed, 1 open, 0.5 half-open."""
        return {"closed": 0.0, "open": 1.0, "half_open": 0.5}[self.value]


class Breaker:
    """One per tier and direction. Not thread safe: the Manager's lock guards it."""

    def __init__(self, counters: Counters, threshold: int = 8, cool_s: float = COOL_S) -> None:
        self._counters = counters
        self._threshold = threshold
        self._cool_s = cool_s
        self._failures = 0
        self._open_until: float | None = None
        self._probing = False

    def state(self, now: float) -> BreakerState:
        """Where it stands."""
        if self._open_until is None:
            return BreakerState.CLOSED
        return BreakerState.HALF_OPEN if now >= self._open_until else BreakerState.OPEN

    def closed(self, now: float) -> bool:
        """Whether requests may use the tier; HALF_OPEN without a probe under way counts."""
        state = self.state(now)
        return state is BreakerState.CLOSED or (
            state is BreakerState.HALF_OPEN and not self._probing
        )

    def probe_due(self, now: float) -> bool:
        """Whether a probe should start now; the caller says so with ``probing``."""
        return self.state(now) is BreakerState.HALF_OPEN and not self._probing

    def probing(self) -> None:
        """A probe is under way: requests stay away until it succeeds or fails."""
        self._probing = True

    def success(self) -> None:
        """The tier did its work: whatever was wrong is over."""
        self._failures = 0
        self._open_until = None
        self._probing = False

    def inconclusive(self) -> None:
        """What was read as a probe is gone or was given up: another is due."""
        self._probing = False

    def failure(self, now: float) -> None:
        """The tier failed, did not answer in time or brought damaged bytes."""
        self._failures += 1
        half_open = self.state(now) is BreakerState.HALF_OPEN
        if half_open or (self._open_until is None and self._failures >= self._threshold):
            self.trip(now)

    def trip(self, now: float, pause_s: float | None = None) -> None:
        """Open, or stay open for another ``pause_s`` (``cool_s`` where None)."""
        self._counters.nvme_breaker_trips += self.state(now) is not BreakerState.OPEN
        self._open_until = now + (self._cool_s if pause_s is None else pause_s)
        self._probing = False

    def retry(self, now: float) -> None:
        """There are signs that the tier works again: no more pause before a probe."""
        if self.state(now) is BreakerState.OPEN:
            self._open_until = now

    def check(self) -> None:
        """Raise AssertionError on a broken invariant."""
        assert self._open_until is not None or not self._probing, "probing while closed"
