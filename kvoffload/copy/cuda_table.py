"""All jobs of a CUDA copy engine: who may take which item, and when. No CUDA in here."""

from __future__ import annotations

import threading
import time

import numpy as np

from kvoffload.copy.base import LOAD, STORE, JobDone
from kvoffload.copy.cuda_job import UNSTARTED, Job, Reason, SlotArena
from kvoffload.copy.cuda_scan import LoadScan
from kvoffload.errors import ClosedError

_POLL_MS = 1  # an idle load thread sleeps on the first slot that is being filled at most this long
_NEAR = 4  # loads looked at one by one before all are: the oldest are likely to be ready


class JobTable:
    """All jobs of an engine. Any thread may call any method; one lock, nothing slow under it."""

    def __init__(self, arena: SlotArena) -> None:
        self._arena = arena
        self._mu = threading.Lock()
        self._work = threading.Condition(self._mu)
        self._moved = threading.Condition(self._mu)  # a job began or ended
        self._active: dict[int, Job] = {}
        self._loads: list[Job] = []  # begun, with items not started, oldest first
        self._scan = LoadScan()
        self._calm = False  # nothing was ready when that was last looked at
        self._loaded_ns = 0  # when the last item of a load ended well
        self._done: list[JobDone] = []
        self._poller = False  # a thread sleeps on a slot
        self._closed = False

    def enter(self, job: Job) -> None:
        """Raises ClosedError, and ValueError on a number that is pending."""
        with self._mu:
            if self._closed:
                raise ClosedError("the copy engine is closed")
            if job.number in self._active:
                raise ValueError(f"job {job.number} is pending")
            self._active[job.number] = job
            self._complete(job)

    def begin(self, job: Job) -> None:
        """The compute before the job has ended. Once per job, in the order of the submits."""
        with self._mu:
            job.begin(time.monotonic_ns())
            if job.kind == LOAD and job.left:  # else it was cancelled meanwhile
                self._loads.append(job)
                self._work.notify()
            self._moved.notify_all()

    def refuse(self, job: Job) -> None:
        """Nobody can tell whether the compute before the job has ended: nothing more of it is
        enqueued."""
        with self._mu:
            job.begin(time.monotonic_ns())
            self._stop(job, Reason.DEVICE)
            self._moved.notify_all()

    def cancel(self, number: int) -> None:
        """Drop the items not started."""
        with self._mu:
            job = self._active.get(number)
            if job is not None:
                self._stop(job, Reason.CANCELLED)

    def close(self) -> bool:
        """Cancel everything, let next_load return None. False when it was closed before."""
        with self._mu:
            if self._closed:
                return False
            self._closed = True
            for job in list(self._active.values()):
                self._stop(job, Reason.CANCELLED)
            self._work.notify_all()
            return True

    def take_done(self) -> list[JobDone]:
        """Each ended job exactly once. Late jobs end here even while every host thread is stuck."""
        with self._mu:
            self._expire(time.monotonic_ns())
            done, self._done = self._done, []
        return done

    def wait(self, number: int, timeout_s: float) -> bool:
        """True when the job has ended or is unknown."""
        with self._mu:
            return self._moved.wait_for(lambda: number not in self._active, timeout_s)

    def wait_begun(self, number: int, timeout_s: float) -> bool:
        """True when the job has begun, has ended or is unknown."""

        def begun() -> bool:
            job = self._active.get(number)
            return job is None or job.begun_ns > 0

        with self._mu:
            return self._moved.wait_for(begun, timeout_s)

    def pending(self) -> int:
        """Jobs not ended."""
        with self._mu:
            return len(self._active)

    def start(self, job: Job, item: int) -> bool:
        """Take an item. False when it was dropped."""
        with self._mu:
            return job.start(item, time.monotonic_ns())

    def next_load(self) -> tuple[Job, int] | None:
        """Take the next load item whose slot has left FILLING; blocks. None after close."""
        while True:
            with self._mu:
                task = self._pick()
                if task is not None:
                    self._work.notify()  # whoever takes an item wakes the next one
                    return task
                if self._closed:
                    return None
                if self._poller or not self._loads:
                    self._work.wait()
                    continue
                job, self._poller = self._loads[0], True
                item = int(np.argmax(job.state == UNSTARTED))
            try:
                slot, generation = int(job.slots[item]), int(job.generations[item])
                self._arena.wait_ready(slot, generation, _POLL_MS)
            finally:
                with self._mu:
                    self._poller = False

    def may_enqueue(self, job: Job) -> Reason:
        """NONE, or why a running item that is not on the device yet must be dropped."""
        with self._mu:
            if time.monotonic_ns() >= job.deadline_ns:
                self._stop(job, Reason.DEADLINE)
            return job.dropped

    def end(self, job: Job, item: int, reason: Reason) -> None:
        """Outcome of a running item of which nothing is on the device any more."""
        with self._mu:
            if reason is not Reason.NONE and job.kind == STORE:
                self._fail_slot(job, item)
            now = time.monotonic_ns()
            if job.kind == LOAD and reason is Reason.NONE:
                if not job.last_ns:
                    # Loads queue on one stream: until now it was busy with those before this one.
                    job.first_ns = max(job.first_ns, self._loaded_ns)
                self._loaded_ns = now
            job.end(item, reason, now)
            if reason is not Reason.NONE and job.kind == LOAD:
                # What lies beyond a hole in a prefix is of no use, what lies before it is. That
                # also makes the job's first lost item the one its reason is about.
                self._stop(job, reason, beyond=item)
            self._complete(job)

    def check(self) -> None:
        """Raise AssertionError on a broken invariant."""
        with self._mu:
            for number, job in self._active.items():
                assert job.number == number, f"job {number} is filed wrong"
                job.check()
            for job in self._loads:
                assert job.kind == LOAD and job.left, f"job {job.number}: queued, nothing to start"
                assert job.begun_ns, f"job {job.number}: queued before it began"
                assert self._active.get(job.number) is job, f"job {job.number}: queued, ended"

    # ---------------------------------------------------------------- _mu is held

    def _pick(self) -> tuple[Job, int] | None:
        now = time.monotonic_ns()
        self._expire(now)
        for job in () if self._calm else self._loads[:_NEAR]:
            item = job.first_ready(self._arena.states, now)
            if item >= 0:
                return self._take(job, item, now)
        found = self._scan.first_ready(self._loads, self._arena.states, now)
        self._calm = found is None
        return self._take(*found, now) if found is not None else None

    def _take(self, job: Job, item: int, now: int) -> tuple[Job, int]:
        job.start(item, now)
        if not job.left:
            self._loads.remove(job)
        return job, item

    def _expire(self, now: int) -> None:
        for job in list(self._loads):
            if now >= job.deadline_ns:
                self._stop(job, Reason.DEADLINE)

    def _stop(self, job: Job, reason: Reason, beyond: int = -1) -> None:
        for item in job.stop(reason, beyond):
            if job.kind == STORE:
                self._fail_slot(job, item)
        if not job.left and job in self._loads:
            self._loads.remove(job)
        self._complete(job)

    def _fail_slot(self, job: Job, item: int) -> None:
        # Nobody else will fill this rank's part: let those who wait for the slot know.
        self._arena.fail(int(job.slots[item]), int(job.generations[item]))

    def _complete(self, job: Job) -> None:
        if job.number in self._active and not job.left and not job.running:
            del self._active[job.number]
            self._done.append(job.outcome())
            self._moved.notify_all()
