"""The jobs of a striped store: split over drives, sent again, put together."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import count
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from kvoffload._core import StoreDone
from kvoffload.tiers.nvme.drive import Drive, choose
from kvoffload.tiers.nvme.requests import (
    GET,
    PUT,
    Places,
    Request,
    SlotRequest,
    count_keys,
    pick_keys,
)
from kvoffload.types import StoreResult

if TYPE_CHECKING:
    from kvoffload._core import SegmentStore

_WAIT_SLICE_MS = 50
_MOST_TRIALS = 2
"""Trial reads of one drive that hang: each holds a buffer as long as a chunk until it returns."""


@dataclass(slots=True)
class _Part:
    """The keys of a job that one drive has; ``job`` None: a trial read of our own."""

    job: _Job | None
    drive: Drive
    kind: int
    at: Places
    hung: bool = False  # abandoned for that


def _only_damaged(results: npt.NDArray[np.uint8]) -> bool:
    """Whether bytes came and none were right: one damaged chunk among others says little."""
    damaged, right = (results == code for code in (StoreResult.CORRUPT, StoreResult.OK))
    return bool(damaged.any() and not right.any())


@dataclass(slots=True)
class _Job:
    """What the caller submitted."""

    id: int
    request: Request
    results: npt.NDArray[np.uint8]
    began_ns: int
    parts: dict[int, _Part] = field(default_factory=dict)
    tried: list[Drive] = field(default_factory=list)
    nbytes: int = 0
    done: bool = False


class StripedJobs:
    """What StripedStore does with puts and gets. Every method without an underscore takes the lock;
    the others are called with it held."""

    def __init__(self, drives: Sequence[Drive], clock: Callable[[], float]) -> None:
        self._drives = tuple(drives)
        self._clock = clock
        self._lock = threading.Lock()
        self._ids = count(1)
        self._jobs: dict[int, _Job] = {}
        self._parts: dict[int, _Part] = {}
        self._finished: deque[_Job] = deque()
        self._closed = False
        self._own_gets = 0  # keys that no drive was asked for

    def submit(self, job: int, request: Request) -> None:
        """Start a job. Raises ValueError on a job id in use and a closed store, and what the native
        store raises on arguments that make no sense."""
        n = count_keys(request.keys)
        now = self._clock()
        with self._lock:
            if self._closed:
                raise ValueError("store is closed")
            if job in self._jobs:
                raise ValueError("job id is in use")
            results = np.full(n, StoreResult.MISS, np.uint8)
            new = self._jobs[job] = _Job(job, request, results, time.monotonic_ns())
            try:
                self._tend(now)
                if request.kind == GET:
                    self._split(new, now)
                else:
                    at = np.flatnonzero(self._owners(request.keys) < 0)
                    new.results[:] = StoreResult.OK
                    if len(at):
                        self._place(new, at, StoreResult.IO_ERROR, now)
            except BaseException:  # refused as a whole: nothing was sent
                del self._jobs[job]
                raise
            self._settle(new)

    def cancel(self, job: int) -> int:
        """See SegmentStore."""
        with self._lock:
            found = self._jobs.get(job)
            parts = list(found.parts.items()) if found is not None else []
            return sum(p.drive.store.cancel(inner) for inner, p in parts if p.drive.store)

    def _owners(self, keys: bytes) -> npt.NDArray[np.int64]:
        """Per key the number of the drive that holds it and can be read, -1 for none."""
        owner = np.full(count_keys(keys), -1, np.int64)
        for i, drive in enumerate(self._drives):
            if drive.store is not None and drive.readable:
                held = np.frombuffer(drive.store.contains(keys), np.uint8) != 0
                owner[held & (owner < 0)] = i
        return owner

    def _split(self, job: _Job, now: float) -> None:
        owner = self._owners(job.request.keys)
        for i in np.unique(owner).tolist():
            at = np.flatnonzero(owner == i)
            if i < 0:
                self._own_gets += len(at)
            elif self._send(job, self._drives[i], at, now):
                continue
            job.request.give_up(at)

    def _place(self, job: _Job, at: Places, otherwise: StoreResult, now: float) -> None:
        """Send keys of a put to a drive not tried yet; ``otherwise`` is the result without one."""
        while True:
            drive = choose([d for d in self._drives if d not in job.tried], now)
            if drive is None:
                job.results[at] = otherwise
                return
            if self._send(job, drive, at, now):
                return

    def _send(self, job: _Job, drive: Drive, at: Places, now: float) -> bool:
        """False when the drive refused; raises that when nothing of the job was sent before."""
        assert drive.store is not None
        first = not job.tried
        kind = job.request.kind
        inner = next(self._ids)
        try:
            if kind == PUT and drive.suspect:  # or what it holds of them would count as written
                drive.store.delete(pick_keys(job.request.keys, at))
            job.request.send(drive.store, inner, at)
        except Exception:
            if first:
                raise
            job.tried.append(drive)
            drive.breaker(kind).failure(inner, now)
            return False
        job.tried.append(drive)
        self._parts[inner] = job.parts[inner] = _Part(job, drive, kind, at)
        drive.sent(kind, inner, now)
        if kind == PUT and not drive.writes.closed:
            drive.writes.begin_trial(inner)
        return True

    # -- results

    def poll(self) -> list[StoreDone]:
        """See SegmentStore."""
        with self._lock:
            self._pump()
            out = []
            while self._finished:
                job = self._finished.popleft()
                del self._jobs[job.id]
                ns = time.monotonic_ns() - job.began_ns
                kind = job.request.kind
                out.append(StoreDone(job.id, kind, job.results.tobytes(), job.nbytes, ns))
            return out

    def wait(self, job: int, timeout_ms: int) -> bool:
        """See SegmentStore."""
        until = time.monotonic() + timeout_ms / 1000
        while True:
            with self._lock:
                self._pump()
                found = self._jobs.get(job)
                if found is None or found.done:
                    return True
                inner, part = next(iter(found.parts.items()))
            left = int((until - time.monotonic()) * 1000)
            if left <= 0:
                return False
            assert part.drive.store is not None
            part.drive.store.wait(inner, min(left, _WAIT_SLICE_MS))

    def wait_any(self, timeout_ms: int) -> bool:
        """See SegmentStore; with jobs at several drives, up to a millisecond late."""
        until = time.monotonic() + timeout_ms / 1000
        while True:
            with self._lock:
                self._pump()
                if self._finished or not self._jobs:
                    return bool(self._finished)
                drives = list({id(p.drive): p.drive for p in self._parts.values()}.values())
            left = int((until - time.monotonic()) * 1000)
            if left <= 0:
                return False
            store = drives[0].store
            assert store is not None
            store.wait_any(min(left, _WAIT_SLICE_MS if len(drives) == 1 else 1))

    def _pump(self) -> None:
        now = self._clock()
        for drive in self._drives:
            for done in drive.store.poll() if drive.store is not None else ():
                drive.out[done.kind].pop(done.job, None)
                part = self._parts.pop(done.job, None)
                if part is not None:
                    self._returned(done, part, now)
        self._tend(now)

    def _returned(self, done: StoreDone, part: _Part, now: float) -> None:
        results = np.frombuffer(done.results, np.uint8).copy()
        failed = results == StoreResult.IO_ERROR
        if part.kind == PUT:
            failed |= (results == StoreResult.NO_SPACE) & self._fits(part)
            failed |= part.hung & (results == StoreResult.DROPPED)
        self._judge(done.job, part, results, failed, now)
        job = part.job
        if job is None:
            return
        del job.parts[done.job]
        job.nbytes += done.nbytes
        job.results[part.at] = results
        if part.kind == PUT:
            for code in np.unique(results[failed]).tolist():
                again = part.at[failed & (results == code)]
                self._place(job, again, StoreResult(code), now)
        elif failed.any():
            part.drive.probe_key = pick_keys(job.request.keys, part.at[failed][-1:])
            if any(d.readable for d in self._drives if d is not part.drive):
                job.results[part.at[failed]] = StoreResult.MISS
        elif _only_damaged(results):
            # The store has forgotten it, so that there is nothing to try the drive with: it is used
            # on trust after each pause, not judged by a chunk of another day that may be good.
            damaged = part.at[results == StoreResult.CORRUPT]
            part.drive.probe_key = pick_keys(job.request.keys, damaged[-1:])
            part.drive.suspect = not part.drive.reads.closed
        self._settle(job)

    def _fits(self, part: _Part) -> npt.NDArray[np.bool_]:
        """Whether each payload fits into a segment: NO_SPACE then says that the drive is full."""
        assert part.job is not None and part.drive.store is not None
        most = int(part.drive.store.stats()["segment_bytes"]) - (16 << 10)
        return np.array([n <= most for n in part.job.request.sizes(part.at)], np.bool_)

    def _judge(
        self,
        inner: int,
        part: _Part,
        results: npt.NDArray[np.uint8],
        failed: npt.NDArray[np.bool_],
        now: float,
    ) -> None:
        breaker = part.drive.breaker(part.kind)
        if (results == StoreResult.OK).any():
            breaker.success(inner)
            if part.kind == GET:
                part.drive.suspect = False
        elif failed.any() or _only_damaged(results):
            breaker.failure(inner, now)
        else:
            breaker.undecided(inner)

    def _settle(self, job: _Job) -> None:
        if not job.parts and not job.done:
            job.done = True
            self._finished.append(job)

    # -- drives that fail

    def _tend(self, now: float) -> None:
        """Find hung jobs; try drives whose pause is over."""
        for drive in self._drives:
            for inner in drive.stalled(PUT, now):
                self._overtake(inner, now)
            for inner in drive.stalled(GET, now):
                part = self._parts[inner]
                if part.job is not None:
                    drive.probe_key = pick_keys(part.job.request.keys, part.at[-1:])
                    self._abandon(inner, part, part.job)
                elif drive.store is not None:
                    drive.store.cancel(inner)  # where it only waits behind others that hang
            if drive.store is not None and drive.reads.trial_due(now):
                self._try_reading(drive, drive.store, now)

    def _overtake(self, inner: int, now: float) -> None:
        """A put hangs: its slots are free to go, for a write names no slot that has moved on.

        Plain buffers are once the drive's store has let go of them. A get of slots waits: it may
        still land there.
        """
        part = self._parts[inner]
        job = part.job
        if job is None:
            return
        if self._abandon(inner, part, job):
            return
        del self._parts[inner], job.parts[inner]
        self._place(job, part.at, StoreResult.DROPPED, now)
        self._settle(job)

    def _abandon(self, inner: int, part: _Part, job: _Job) -> bool:
        """Plain buffers: have the part end now, as dropped."""
        if isinstance(job.request, SlotRequest) or part.drive.store is None:
            return False
        part.hung = True
        part.drive.store.abandon(inner)
        return True

    def _try_reading(self, drive: Drive, store: SegmentStore, now: float) -> None:
        nbytes = store.length(drive.probe_key) if drive.probe_key else -1
        if nbytes < 0:
            drive.reads.close_on_trust()
            return
        out = sum(p.job is None and p.drive is drive for p in self._parts.values())
        if out >= _MOST_TRIALS:  # as hung as ever: one that returns makes room for the next
            return
        inner = next(self._ids)
        self._parts[inner] = _Part(None, drive, GET, np.zeros(0, np.intp))
        drive.sent(GET, inner, now)
        drive.reads.begin_trial(inner)
        try:
            store.get(inner, drive.probe_key, [bytearray(nbytes)])
        except Exception:
            del self._parts[inner], drive.out[GET][inner]
            drive.reads.failure(inner, now)

    def check_jobs(self) -> None:
        """Raise AssertionError naming the first broken invariant."""
        with self._lock:
            for drive in self._drives:
                drive.reads.check()
                drive.writes.check()
                for kind in (PUT, GET):
                    for inner in drive.out[kind]:
                        assert self._parts[inner].drive is drive, "a job at the wrong drive"
            for inner, part in self._parts.items():
                assert part.job is None or part.job.parts[inner] is part, "a part without its job"
            for job in self._jobs.values():
                placed = [i for part in job.parts.values() for i in part.at.tolist()]
                assert len(placed) == len(set(placed)), "a key at two drives at once"
                assert job.done == (not job.parts), "a job that is done and is not"
            assert all(self._jobs[j.id] is j for j in self._finished), "finished and forgotten"
