"""One drive of a striped store: its native store, its breakers, and what it was asked to do."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, TypeVar

from kvoffload.tiers.nvme.breaker import Breaker
from kvoffload.tiers.nvme.requests import GET, PUT

if TYPE_CHECKING:
    from kvoffload._core import SegmentStore

T = TypeVar("T")

STALL_S = {PUT: 30.0, GET: 5.0}
"""Seconds a job is out, and the drive has moved not a byte, after which it counts as hung."""
_MOVED = {PUT: "bytes_written", GET: "bytes_read"}


@dataclass(frozen=True, slots=True)
class DriveLevel:
    """What one drive holds and how it does; ``error`` says why it could not be opened."""

    path: str
    up: bool  # read from and written to
    reads: str  # state of the breaker: closed, open, trial
    writes: str
    trips: int
    io_errors: int
    entries: int
    bytes_used: int
    bytes_max: int
    error: str = ""


@dataclass(slots=True, eq=False)
class Drive:
    """A path and its open store, or why it could not be opened. The StripedStore's lock guards it.

    ``out``: per kind of job, when each job that has not returned was sent, oldest first.
    ``moved``: per kind, bytes moved when last looked at, and since when it is no more than that.
    """

    path: str
    store: SegmentStore | None
    error: str = ""
    reads: Breaker = field(default_factory=Breaker)
    writes: Breaker = field(default_factory=Breaker)
    out: tuple[dict[int, float], dict[int, float]] = field(default_factory=lambda: ({}, {}))
    moved: dict[int, tuple[int, float]] = field(default_factory=dict)
    probe_key: bytes = b""  # the last key that could not be read
    suspect: bool = False  # damaged chunks turned reads off, and none was right since
    weight: float = 1.0
    credit: float = 0.0

    def __post_init__(self) -> None:
        if self.store is not None:
            self.weight = float(self.store.stats()["bytes_max"])

    @property
    def readable(self) -> bool:
        """Whether its chunks count as held."""
        return self.store is not None and self.reads.closed

    def writable(self, now: float) -> bool:
        """Whether it may be given a put; that put is a trial where the breaker is not closed. One
        with damaged chunks may: what is put takes their place."""
        usable = self.readable or self.suspect
        return usable and (self.writes.closed or self.writes.trial_due(now))

    def breaker(self, kind: int) -> Breaker:
        """The breaker of PUT or GET."""
        return self.reads if kind == GET else self.writes

    def sent(self, kind: int, job: int, now: float) -> None:
        """The drive has the job."""
        if not self.out[kind]:
            self.moved[kind] = (self._moved(kind), now)
        self.out[kind][job] = now

    def _moved(self, kind: int) -> int:
        return int(self.store.stats()[_MOVED[kind]]) if self.store is not None else 0

    def stalled(self, kind: int, now: float) -> Iterator[int]:
        """Jobs that count as hung from now on; each is told once. A large job on a slow drive, or
        one behind many, is not hung: bytes move."""
        out = self.out[kind]
        while out:
            job = next(iter(out))
            if now - out[job] < STALL_S[kind]:
                return
            bytes_now, (before, since) = self._moved(kind), self.moved[kind]
            if bytes_now != before:
                self.moved[kind] = (bytes_now, now)
                return
            if now - since < STALL_S[kind]:
                return
            del out[job]
            self.breaker(kind).stalled(job, now)
            yield job

    def level(self) -> DriveLevel:
        """See DriveLevel."""
        stats = self.store.stats() if self.store is not None else {}
        return DriveLevel(
            path=self.path,
            up=self.readable and self.writes.closed,
            reads=self.reads.state.value if self.store is not None else "open",
            writes=self.writes.state.value if self.store is not None else "open",
            trips=self.reads.trips + self.writes.trips,
            io_errors=int(stats.get("io_errors", 0)),
            entries=int(stats.get("entries", 0)),
            bytes_used=int(stats.get("bytes_used", 0)),
            bytes_max=int(stats.get("bytes_max", 0)),
            error=self.error,
        )


def choose(drives: Sequence[Drive], now: float) -> Drive | None:
    """The drive for a put: one that is due for a trial, else the least queued bytes, then in turn.

    In turn: a drive gets puts in proportion to its byte bound.
    """
    able = [(d, d.store) for d in drives if d.store is not None and d.writable(now)]
    for drive, _ in able:
        if not drive.writes.closed:
            return drive
    if not able:
        return None
    queued = [store.queued_bytes() for _, store in able]
    least = [d for (d, _), q in zip(able, queued, strict=True) if q == min(queued)]
    for drive in least:
        drive.credit += drive.weight
    best = max(least, key=lambda d: d.credit)
    best.credit -= sum(d.weight for d in least)
    return best


def on_each(drives: Sequence[Drive], do: Callable[[SegmentStore], T]) -> list[T]:
    """``do`` with every open store at the same time; a slow drive does not hold up the others.

    For calls that release the GIL. Raises the first exception once all have returned. One after the
    other where the interpreter is ending (``atexit``): it starts no threads then.
    """
    stores = [d.store for d in drives if d.store is not None]
    with ThreadPoolExecutor(max(1, len(stores)), thread_name_prefix="kvo-drive") as pool:
        results = [_start(pool, do, store) for store in stores]
    return [result() for result in results]


def _start(
    pool: ThreadPoolExecutor, do: Callable[[SegmentStore], T], store: SegmentStore
) -> Callable[[], T]:
    """Its result, once the pool has ended. Here and now where the pool takes nothing any more."""
    done: Future[T]
    try:
        done = pool.submit(do, store)
    except RuntimeError:
        done = Future()
        try:
            done.set_result(do(store))
        except Exception as error:  # the other stores have their turn first
            done.set_exception(error)
    return done.result
