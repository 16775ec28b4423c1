"""Jobs a ``FaultyStore`` holds back, and the slow device they pretend to wait for."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import NamedTuple

PUT, GET = 0, 1
_GUESS_BYTES_PER_S = 1e9  # of a device nobody has measured yet
_KEEP = 0.9


class FaultDone(NamedTuple):
    """A finished job; fields as in ``StoreDoneLike``. ``ns`` includes the time it was held."""

    job: int
    kind: int
    results: bytes
    nbytes: int
    ns: int


@dataclass(slots=True, eq=False)
class Job:
    """One submitted job until it is answered. Times are ``time.monotonic()`` seconds."""

    job: int
    kind: int
    keys: int
    nbytes: int  # all keys together
    submit: Callable[[], None]
    fail_slots: Callable[[], None]
    came: float = 0.0
    sent: float = 0.0
    wait_left: float = 0.0  # device time that has to pass before it is sent on


class Pace:
    """How fast the real device is: bytes over the time in which it had something to do."""

    def __init__(self) -> None:
        self._bytes = 0.0
        self._seconds = 0.0
        self._covered = 0.0  # end of the busy time counted so far

    def add(self, begin: float, end: float, nbytes: int) -> None:
        """A job of ``nbytes`` ran from ``begin`` to ``end`` (seconds), perhaps beside others."""
        busy = max(0.0, end - max(begin, self._covered))
        self._covered = max(self._covered, end)
        if nbytes:
            self._bytes = self._bytes * _KEEP + nbytes
            self._seconds = self._seconds * _KEEP + busy

    def seconds(self, nbytes: int) -> float:
        """What a job of that size takes by itself."""
        if not self._bytes or not self._seconds:
            return nbytes / _GUESS_BYTES_PER_S
        return nbytes * self._seconds / self._bytes


class Lane:
    """One device: jobs pass one after the other, reads before writes as in the native engine.

    A write that is overtaken keeps the time it has waited. Times are ``time.monotonic()`` seconds.
    """

    def __init__(self) -> None:
        self._serving: Job | None = None
        self._until = self._free_at = 0.0

    def front(self, held: Iterable[Job], now: float) -> tuple[Job, float]:
        """Who is served now, and the seconds it has to wait yet. ``held`` is not empty."""
        job = min(held, key=lambda j: j.kind != GET)
        if job is not self._serving:
            if self._serving is not None:
                self._serving.wait_left = max(0.0, self._until - now)
            self._serving, self._until = job, max(now, self._free_at) + job.wait_left
        return job, self._until - now

    def leaves(self, job: Job, own_s: float, now: float) -> None:
        """The job goes to the real device, which takes ``own_s`` for it."""
        assert job is self._serving
        self._serving, self._free_at = None, now + own_s
