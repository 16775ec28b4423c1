"""Several drives as one chunk store: the protocol of the native SegmentStore over one per path."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import count
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from kvoffload._core import StoreDone
from kvoffload.tiers.nvme.drive import Drive, DriveLevel, choose, on_each
from kvoffload.tiers.nvme.requests import (
    GET,
    PUT,
    BufferRequest,
    Places,
    Request,
    SlotRequest,
    count_keys,
    pick_keys,
)
from kvoffload.types import StoreResult

if TYPE_CHECKING:
    from kvoffload._core import Arena, SegmentStore

_WAIT_SLICE_MS = 50
_GREATEST = frozenset({"recover_ms", "segment_bytes", "uring"})


@dataclass(slots=True)
class _Part:
    """The keys of a job that one drive has; ``job`` None: a trial read of our own."""

    job: _Job | None
    drive: Drive
    kind: int
    at: Places


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


class StripedStore:
    """A chunk store over several drives; every method may be called from any thread.

    A put goes whole to one drive (``drive.choose``), and to the next one where that fails. A get
    is split by who holds each key. A drive that fails is left alone and tried now and then: its
    chunks are misses meanwhile, the others go on. IO_ERROR comes back only when no drive is left.
    Methods are those of ``_core.SegmentStore``, with ``drives()`` beside them.
    """

    def __init__(
        self, drives: Sequence[Drive], clock: Callable[[], float] = time.monotonic
    ) -> None:
        """``drives``: in any order, at least one open. Takes them over."""
        self._drives = tuple(drives)
        self._clock = clock
        self._lock = threading.Lock()
        self._ids = count(1)
        self._jobs: dict[int, _Job] = {}
        self._parts: dict[int, _Part] = {}
        self._finished: deque[_Job] = deque()
        self._closed = False
        self._own_gets = 0  # keys that no drive was asked for
        stores = [d.store for d in drives if d.store is not None]
        self.path = ", ".join(d.path for d in drives)
        self.writer_dir = ", ".join(s.writer_dir for s in stores if s.writer_dir)
        self.io_engine = ", ".join(dict.fromkeys(s.io_engine for s in stores))
        self.io_engine_note = next((s.io_engine_note for s in stores if s.io_engine_note), "")

    # -- submitting

    def put_slots(
        self,
        job: int,
        arena: Arena,
        keys: bytes,
        slots: npt.NDArray[np.uint32],
        generations: npt.NDArray[np.uint64],
        offsets: npt.NDArray[np.uint64],
        nbytes: int,
        namespace: int,
        depths: npt.NDArray[np.uint32],
    ) -> None:
        """See SegmentStore."""
        self._submit(
            job,
            SlotRequest(
                PUT, arena, keys, slots, generations, offsets, nbytes, namespace, depths=depths
            ),
        )

    def get_slots(
        self,
        job: int,
        arena: Arena,
        keys: bytes,
        slots: npt.NDArray[np.uint32],
        generations: npt.NDArray[np.uint64],
        offsets: npt.NDArray[np.uint64],
        nbytes: int,
    ) -> None:
        """See SegmentStore."""
        self._submit(job, SlotRequest(GET, arena, keys, slots, generations, offsets, nbytes))

    def put(self, job: int, keys: bytes, buffers: Sequence[Any], namespace: int = 0) -> None:
        """See SegmentStore."""
        self._submit(job, BufferRequest(PUT, keys, buffers, namespace))

    def get(self, job: int, keys: bytes, buffers: Sequence[Any]) -> None:
        """See SegmentStore."""
        self._submit(job, BufferRequest(GET, keys, buffers))

    def _submit(self, job: int, request: Request) -> None:
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
            job.request.send(drive.store, inner, at)
        except Exception:
            if first:
                raise
            job.tried.append(drive)
            drive.breaker(kind).failure(inner, now)
            return False
        job.tried.append(drive)
        self._parts[inner] = job.parts[inner] = _Part(job, drive, kind, at)
        drive.out[kind][inner] = now
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
        answered = (results == StoreResult.OK) | (results == StoreResult.CORRUPT)
        if answered.any():
            breaker.success(inner)
        elif failed.any():
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
            if drive.store is not None and drive.reads.trial_due(now):
                self._try_reading(drive, drive.store, now)

    def _overtake(self, inner: int, now: float) -> None:
        """A put hangs: its slots are free to go, for a write names no slot that has moved on.

        Plain buffers wait: what their owner changes now might still be written. So does a get,
        which may still land in its slot.
        """
        part = self._parts[inner]
        job = part.job
        if job is None or not isinstance(job.request, SlotRequest):
            return
        del self._parts[inner], job.parts[inner]
        self._place(job, part.at, StoreResult.DROPPED, now)
        self._settle(job)

    def _try_reading(self, drive: Drive, store: SegmentStore, now: float) -> None:
        nbytes = store.length(drive.probe_key) if drive.probe_key else -1
        if nbytes < 0:
            drive.reads.close_on_trust()
            return
        inner = next(self._ids)
        self._parts[inner] = _Part(None, drive, GET, np.zeros(0, np.intp))
        drive.out[GET][inner] = now
        drive.reads.begin_trial(inner)
        try:
            store.get(inner, drive.probe_key, [bytearray(nbytes)])
        except Exception:
            del self._parts[inner], drive.out[GET][inner]
            drive.reads.failure(inner, now)

    # -- what is there

    def contains(self, keys: bytes) -> bytes:
        """See SegmentStore. What a drive that is left alone holds is not held."""
        with self._lock:
            self._tend(self._clock())
            return (self._owners(keys) >= 0).astype(np.uint8).tobytes()

    def length(self, key: bytes) -> int:
        """See SegmentStore."""
        with self._lock:
            found = [d.store.length(key) for d in self._drives if d.store and d.readable]
        return max(found, default=-1)

    def delete(self, keys: bytes) -> int:
        """See SegmentStore. From every drive, those left alone included."""
        count_keys(keys)
        unique = list(dict.fromkeys(keys[i : i + 16] for i in range(0, len(keys), 16)))
        keys = b"".join(unique)
        held = np.zeros(len(unique), np.uint8)
        for store in self._stores():
            held |= np.frombuffer(store.contains(keys), np.uint8)
            store.delete(keys)
        return int(held.sum())

    def queued_bytes(self) -> int:
        """See SegmentStore."""
        return sum(store.queued_bytes() for store in self._stores())

    def stats(self) -> dict[str, int | float]:
        """See SegmentStore: sums over the drives, and ``drives``, ``drives_up``, ``drive_trips``.

        ``recover_ms`` and ``segment_bytes`` are the greatest, as drives recover at the same time.
        """
        out: dict[str, int | float] = {}
        for stats in [store.stats() for store in self._stores()]:
            for name, value in stats.items():
                had = out.get(name, 0)
                out[name] = max(had, value) if name in _GREATEST else had + value
        with self._lock:
            out["gets"] += self._own_gets
            out["misses"] += self._own_gets
            out["drives"] = len(self._drives)
            out["drives_up"] = sum(d.readable and d.writes.closed for d in self._drives)
            out["drive_trips"] = sum(d.reads.trips + d.writes.trips for d in self._drives)
        return out

    def drives(self) -> list[DriveLevel]:
        """Every drive as it is now, in the order given. No I/O."""
        with self._lock:
            return [drive.level() for drive in self._drives]

    def ls(self, limit: int = 0) -> list[tuple[bytes, int, int, int, int, int]]:
        """See SegmentStore. Segment numbers are each drive's own."""
        rows = [row for store in self._stores() for row in store.ls(limit)]
        rows.sort(key=lambda row: -row[5])
        return rows[:limit] if limit else rows

    def verify(
        self, repair: bool = False, progress: Callable[[int, int, int], object] | None = None
    ) -> dict[str, int | float]:
        """See SegmentStore; one drive after the other."""
        out: dict[str, int | float] = {}
        total = [int(store.stats()["entries"]) for store in self._stores()]
        for i, store in enumerate(self._stores()):
            done, nbytes = sum(total[:i]), int(out.get("bytes", 0))

            def shown(at: int, n: int, read: int, done: int = done, before: int = nbytes) -> object:
                return progress(done + at, sum(total), before + read) if progress else None

            for name, value in store.verify(repair, shown).items():
                out[name] = out.get(name, 0) + value
        return out

    def check(self) -> None:
        """Raise AssertionError naming the first broken invariant."""
        for store in self._stores():
            store.check()
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

    # -- life

    def flush(self, timeout_ms: int) -> bool:
        """See SegmentStore; all drives at the same time."""
        return all(on_each(self._drives, lambda store: store.flush(timeout_ms)))

    def close(self, timeout_ms: int = 5000) -> None:
        """See SegmentStore; all drives at the same time."""
        with self._lock:
            self._closed = True
        on_each(self._drives, lambda store: store.close(timeout_ms))

    def _stores(self) -> list[SegmentStore]:
        return [d.store for d in self._drives if d.store is not None]
