"""Table of outstanding load attempts: each is answered exactly once, a failure is never retried.

State of an attempt::

    open() ──> OPEN ──mark_sent()──> SENT ──answer()──> gone (lease released by the caller)
                 │                     │
                 └──── overdue() ──────┴──> order "fail" re-sent every ``RESEND_S`` until answered

An engine parks a request from ``open`` until all ranks answered; whatever breaks in between, the
attempt's deadline makes the scheduler half order the workers to fail it, so that the request leaves
its waiting state. A request whose attempt failed is banned: it is never offered a load again, since
vLLM asks again at once and would livelock.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from kvoffload.core.manager import Lease
from kvoffload.core.planner import Plan
from kvoffload.types import LoadFailure

RESEND_S = 1.0


@dataclass(slots=True)
class Attempt:
    """One load of one request. ``deadline`` and ``opened`` are in seconds of the table's clock."""

    attempt: int
    request_id: str
    lease: Lease
    start: int  # first token to load
    end: int  # one past the last token to load
    opened: float
    deadline: float
    planned: Plan | None = None
    alone: bool = False  # no other request was in the engine
    sent: bool = False
    failed: bool = False
    void: bool = False  # what it brings must not be used
    reason: LoadFailure | None = None  # the first that a rank gave
    next_order: float = field(default=0.0)


class LoadTable:
    """Outstanding attempts by request. Used by the scheduler thread only."""

    def __init__(self) -> None:
        self._by_request: dict[str, Attempt] = {}
        self._banned: set[str] = set()
        self._next = 1

    def open(
        self,
        request_id: str,
        lease: Lease,
        start: int,
        end: int,
        now: float,
        deadline_s: float,
        planned: Plan | None = None,
    ) -> Attempt:
        """Enter an attempt. A request has at most one; a second raises KeyError."""
        if request_id in self._by_request:
            raise KeyError(f"request {request_id} already has a load outstanding")
        attempt = Attempt(self._next, request_id, lease, start, end, now, now + deadline_s, planned)
        attempt.next_order = attempt.deadline
        self._next += 1
        self._by_request[request_id] = attempt
        return attempt

    def get(self, request_id: str) -> Attempt | None:
        """The outstanding attempt of a request."""
        return self._by_request.get(request_id)

    def find(self, attempt_id: int) -> Attempt | None:
        """The outstanding attempt with this number."""
        for attempt in self._by_request.values():
            if attempt.attempt == attempt_id:
                return attempt
        return None

    def answer(self, request_id: str, *, failed: bool) -> Attempt | None:
        """All ranks answered: remove and return the attempt; ban the request if it failed."""
        attempt = self._by_request.pop(request_id, None)
        if attempt is not None:
            attempt.failed |= failed
            if attempt.failed:
                self._banned.add(request_id)
        return attempt

    def fail_all(self, now: float) -> None:
        """Make every attempt due for a fail order now (cache reset, weights changed)."""
        for attempt in self._by_request.values():
            attempt.void = True
            attempt.next_order = min(attempt.next_order, now)

    def due(self, now: float) -> list[Attempt]:
        """Attempts whose fail order must be sent now; each again after ``RESEND_S``."""
        due = [a for a in self._by_request.values() if a.next_order <= now]
        for attempt in due:  # whether it failed is for the ranks to say: it may just have ended
            attempt.next_order = now + RESEND_S
        return due

    def low_water(self) -> int:
        """Every attempt below this number has been answered."""
        return min((a.attempt for a in self._by_request.values()), default=self._next)

    def ban(self, request_id: str) -> None:
        """Never offer this request a load again."""
        self._banned.add(request_id)

    def is_banned(self, request_id: str) -> bool:
        """Whether a load of this request failed before."""
        return request_id in self._banned

    def forget(self, request_id: str) -> None:
        """The request is finished; an outstanding attempt stays until answered."""
        self._banned.discard(request_id)

    def __len__(self) -> int:
        return len(self._by_request)

    def __iter__(self) -> Iterator[Attempt]:
        return iter(list(self._by_request.values()))

    def check(self) -> None:
        """Raise AssertionError on a broken invariant."""
        ids = [a.attempt for a in self._by_request.values()]
        assert len(ids) == len(set(ids)), "attempt numbers repeat"
        for request_id, attempt in self._by_request.items():
            assert attempt.request_id == request_id, "attempt filed under another request"
            assert attempt.attempt < self._next, "attempt number from the future"
            assert attempt.start < attempt.end, "empty load"
