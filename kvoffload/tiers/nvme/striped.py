"""Several drives as one chunk store: the protocol of the native SegmentStore over one per path."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from kvoffload.tiers.nvme.drive import Drive, DriveLevel, on_each
from kvoffload.tiers.nvme.requests import GET, PUT, BufferRequest, SlotRequest, count_keys, until
from kvoffload.tiers.nvme.striped_jobs import StripedJobs

if TYPE_CHECKING:
    from kvoffload._core import Arena, SegmentStore

_GREATEST = frozenset({"recover_ms", "segment_bytes", "uring"})
_LEAST = frozenset({"lifetime_since", "lifetime_days_left"})


class StripedStore(StripedJobs):
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
        super().__init__(drives, clock)
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
        deadline_ms: int = 0,
    ) -> None:
        """See SegmentStore."""
        self.submit(
            job,
            SlotRequest(
                PUT,
                arena,
                keys,
                slots,
                generations,
                offsets,
                nbytes,
                namespace,
                depths,
                until(deadline_ms),
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
        deadline_ms: int = 0,
    ) -> None:
        """See SegmentStore."""
        late = until(deadline_ms)
        request = SlotRequest(GET, arena, keys, slots, generations, offsets, nbytes, until=late)
        self.submit(job, request)

    def put(
        self,
        job: int,
        keys: bytes,
        buffers: Sequence[Any],
        namespace: int = 0,
        deadline_ms: int = 0,
    ) -> None:
        """See SegmentStore."""
        self.submit(job, BufferRequest(PUT, keys, buffers, namespace, until(deadline_ms)))

    def get(self, job: int, keys: bytes, buffers: Sequence[Any], deadline_ms: int = 0) -> None:
        """See SegmentStore."""
        self.submit(job, BufferRequest(GET, keys, buffers, until=until(deadline_ms)))

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

    def retain(self, keys: bytes, seconds: float, level: int = 0, owner: int = 0) -> bytes:
        """See SegmentStore. On every drive that holds a key; each has its own bound."""
        out = np.zeros(count_keys(keys), np.uint8)
        for store in self._stores():
            out |= np.frombuffer(store.retain(keys, seconds, level, owner), np.uint8)
        return out.tobytes()

    def retained(self, keys: bytes, owner: int = 0) -> bytes:
        """See SegmentStore. On any drive."""
        out = np.zeros(count_keys(keys), np.uint8)
        for store in self._stores():
            out |= np.frombuffer(store.retained(keys, owner), np.uint8)
        return out.tobytes()

    def retain_none(self) -> None:
        """See SegmentStore."""
        for store in self._stores():
            store.retain_none()

    def queued_bytes(self) -> int:
        """See SegmentStore."""
        return sum(store.queued_bytes() for store in self._stores())

    def stats(self) -> dict[str, int | float]:
        """See SegmentStore: sums over the drives, and ``drives``, ``drives_up``, ``drive_trips``.

        ``recover_ms`` and ``segment_bytes`` are the greatest, as drives recover at the same time;
        ``lifetime_since`` and ``lifetime_days_left`` the least.
        """
        out: dict[str, int | float] = {}
        for stats in [store.stats() for store in self._stores()]:
            for name, value in stats.items():
                if name in _LEAST:
                    out[name] = min(out.get(name, value), value)
                    continue
                had = out.get(name, 0)
                out[name] = max(had, value) if name in _GREATEST else had + value
        with self._lock:
            out["gets"] += self._own_gets
            out["misses"] += self._own_gets
            out["drives"] = len(self._drives)
            out["drives_up"] = sum(d.readable and d.writes.closed for d in self._drives)
        out["drive_trips"] = self.trips()
        return out

    def trips(self) -> int:
        """How often a drive was found to fail or hang, since it was opened. O(drives)."""
        with self._lock:
            return sum(d.reads.trips + d.writes.trips for d in self._drives)

    def drives(self) -> list[DriveLevel]:
        """Every drive as it is now, in the order given. No I/O."""
        with self._lock:
            return [drive.level() for drive in self._drives]

    def ls(self, limit: int = 0) -> list[tuple[bytes, int, int, int, int, int]]:
        """See SegmentStore. Segment numbers are each drive's own.

        A key that two drives hold is there once, as its newest row says.
        """
        rows = [row for store in self._stores() for row in store.ls(limit)]
        rows.sort(key=lambda row: -row[5])
        newest: dict[bytes, tuple[bytes, int, int, int, int, int]] = {}
        for row in rows:
            newest.setdefault(row[0], row)
        return list(newest.values())[: limit or None]

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
        self.check_jobs()

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
