"""A breaker per drive and direction: a drive that fails is left alone, then tried with one job."""

from __future__ import annotations

from enum import Enum

THRESHOLD = 3
PAUSE_S = 10.0
MAX_PAUSE_S = 300.0


class State(str, Enum):
    """closed: in use. open: left alone. trial: one job decides."""

    CLOSED = "closed"
    OPEN = "open"
    TRIAL = "trial"


class Breaker:
    """Opens after ``THRESHOLD`` failed jobs in a row; each failed trial doubles the pause.

    Not thread safe: the owner's lock guards it. Times are seconds of any one clock; jobs are
    numbers. Only the trial's own job counts while one runs: what was submitted before the breaker
    opened and returns late says nothing about now.
    """

    def __init__(self) -> None:
        self.state = State.CLOSED
        self.trips = 0
        self._failures = 0
        self._pause_s = PAUSE_S
        self._until = 0.0
        self._trial_job = 0

    @property
    def closed(self) -> bool:
        """Whether the drive may be used like any other."""
        return self.state is State.CLOSED

    def trial_due(self, now: float) -> bool:
        """Whether the pause is over and no trial runs."""
        return self.state is State.OPEN and now >= self._until

    def begin_trial(self, job: int) -> None:
        """``job`` decides."""
        self.state = State.TRIAL
        self._trial_job = job

    def success(self, job: int) -> None:
        """The job did what it should."""
        if self.state is State.TRIAL and job == self._trial_job:
            self.close()
        elif self.state is State.CLOSED:
            self._failures = 0

    def failure(self, job: int, now: float) -> None:
        """The job failed."""
        if self.state is State.TRIAL and job == self._trial_job:
            self._open(now)
        elif self.state is State.CLOSED:
            self._failures += 1
            if self._failures >= THRESHOLD:
                self._open(now)

    def stalled(self, job: int, now: float) -> None:
        """The job gives no answer: reason enough by itself."""
        if self.state is State.CLOSED or job == self._trial_job:
            self._open(now)

    def undecided(self, job: int) -> None:
        """The job returned and says nothing about the drive: another trial may begin."""
        if self.state is State.TRIAL and job == self._trial_job:
            self.state = State.OPEN
            self._trial_job = 0

    def close(self) -> None:
        """The drive works."""
        self.state = State.CLOSED
        self._trial_job = 0
        self._failures = 0
        self._pause_s = PAUSE_S

    def close_on_trust(self) -> None:
        """There is nothing to try it with: use it, and let one failure open it again."""
        self.state = State.CLOSED
        self._failures = THRESHOLD - 1

    def _open(self, now: float) -> None:
        self.state = State.OPEN
        self._trial_job = 0
        self._until = now + self._pause_s
        self._pause_s = min(2 * self._pause_s, MAX_PAUSE_S)
        self._failures = 0
        self.trips += 1

    def check(self) -> None:
        """Raise AssertionError naming the first broken invariant."""
        assert 0 <= self._failures < THRESHOLD, "breaker: failures"
        assert PAUSE_S <= self._pause_s <= MAX_PAUSE_S, "breaker: pause"
        assert (self.state is State.TRIAL) == (self._trial_job != 0), "breaker: trial and its job"
