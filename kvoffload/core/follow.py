"""Single flight: a request whose prefix another one is loading waits for that, then hits HBM.

Its own load would fill other blocks with the same bytes, later. It waits only while the other load
is expected to end sooner than its own would, and never longer than its own would take. Pure
bookkeeping; used by the scheduler thread only.
"""

from __future__ import annotations

from dataclasses import dataclass

from kvoffload.core.loads import Attempt
from kvoffload.core.planner import Plan
from kvoffload.types import ChunkKey

UNKNOWN_WAIT_S = 0.1
"""The longest wait while nothing is known of how long loads take."""


@dataclass(frozen=True, slots=True)
class Waiting:
    """A follower: what it waits for, and until when (seconds of the caller's clock)."""

    end: int  # tokens from the root that the leader's load covers and this request wants
    until: float


class Leaders:
    """Outstanding loads by the chunks they bring. A chunk's latest load counts."""

    def __init__(self) -> None:
        self._by_key: dict[ChunkKey, Attempt] = {}

    def add(self, attempt: Attempt) -> None:
        """A load was ordered."""
        for item in attempt.lease.items:
            self._by_key[item.key] = attempt

    def remove(self, attempt: Attempt) -> None:
        """It was answered."""
        for item in attempt.lease.items:
            if self._by_key.get(item.key) is attempt:
                del self._by_key[item.key]

    def of(self, last: ChunkKey) -> Attempt | None:
        """The load that brings a chunk, and with it everything before."""
        attempt = self._by_key.get(last)
        return None if attempt is None or attempt.failed else attempt

    def __len__(self) -> int:
        return len(self._by_key)


def wait_for(leader: Attempt, end: int, own: Plan, now: float) -> Waiting | None:
    """Whether to wait for ``leader`` instead of loading up to ``end`` as ``own`` says."""
    if own.load_s is None:
        return Waiting(end, now + UNKNOWN_WAIT_S)
    expected = leader.planned.load_s if leader.planned is not None else None
    left = own.load_s if expected is None else leader.opened + expected - now
    return Waiting(end, now + own.load_s) if left <= own.load_s else None
