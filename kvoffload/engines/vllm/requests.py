"""What the scheduler half remembers of each live request."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from kvoffload.core.follow import Waiting
from kvoffload.core.hashchain import Chain
from kvoffload.core.hints import NO_HINTS, Hints
from kvoffload.core.manager import Lease
from kvoffload.core.planner import Plan
from kvoffload.core.why import Asked
from kvoffload.types import Decision, Tier

LEASE_S = 5.0
"""A provisional lease (between lookup and allocation) lives this long, then its pins are dropped
and the next query looks up again: a request stuck behind a full HBM must not starve the arena."""


@dataclass(slots=True)
class ProvisionalLease:
    """A lease taken at lookup, waiting for vLLM to allocate blocks."""

    lease: Lease
    start: int
    end: int
    expires: float
    planned: Plan


@dataclass(frozen=True, slots=True)
class Refusal:
    """Nothing was offered; holds for a while, as long as HBM holds the same of the request, and,
    where more could be held below by now, as long as nothing came or went there (``changes``: of
    the Manager; None: whatever comes, what was refused is refused)."""

    start: int
    changes: int | None
    until: float

    def holds(self, start: int, changes: int, now: float) -> bool:
        """Whether asking again would give the same answer, or is not worth it yet."""
        same = self.start == start and self.changes in (None, changes)
        return same and now < self.until


@dataclass(slots=True)
class RequestState:
    """One live request. ``stored`` counts the leading tokens whose chunks have been planned."""

    request: Any
    chain: Chain | None = None
    hints: Hints = NO_HINTS
    pin_done: bool = False  # its pin hint has been answered
    born: int | None = None  # tokens that it did not compute itself, once it is scheduled
    found: int = 0  # tokens up to which what it computed was held before
    stored: int = 0
    arrived: float = 0.0  # on the engine's clock
    again: int = 0  # passes from the root still to make after a failed load
    provisional: ProvisionalLease | None = None
    hit_sources: dict[Tier, int] | None = None
    looked_up: bool = False
    decision: Decision | None = None  # as last counted
    missed: str | None = None  # the reason of a miss, as last counted
    refusal: Refusal | None = None
    waiting: Waiting | None = None  # for another request's load
    sampled: bool | None = None  # computed to be compared with what is held; None: not drawn yet
    follows: bool = True  # may (still) wait for another request's load
    why: Asked | None = None  # what `kvoffload why` will say of it
    tainted: bool = False  # its KV was (partly) computed before the last reset: never store it
    unsupported: bool = False  # resumable sessions rewrite their tokens: no load, no store

    def misses(self, reason: str) -> bool:
        """Note why it misses; whether that is to be counted: not each time that vLLM asks again."""
        new, self.missed = reason != self.missed, reason
        return new

    @property
    def request_id(self) -> str:
        """vLLM's request id."""
        return str(self.request.request_id)
