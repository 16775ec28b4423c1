"""Chunk stores without bytes: what a bounded store would hold, and what it would write for it.

``SegmentModel`` recycles as the native store does (docs/format.md, Protocol): segments in log
order, of the oldest tenth the one with the fewest bytes that were read goes first, and what was
read is written again before. ``LruModel`` is what the log costs against: chunks go one by one.
Chunks of one size; headers, footers and journals (below 0.1 %) are left out, and so are the
threads: the tidy thread has always done its work. Single thread; jobs are done when submitted.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from itertools import islice
from typing import Any

import numpy as np
import numpy.typing as npt

from kvoffload.tiers.null import NullDone
from kvoffload.types import StoreResult

KEY_BYTES = 16
SEGMENT_BYTES = 256 << 20
LARGE_STORE = 8
"""Segments from which on the store keeps two of them clean ahead of need."""


def split_keys(keys: bytes) -> list[bytes]:
    """The keys of one call."""
    return [keys[i : i + KEY_BYTES] for i in range(0, len(keys), KEY_BYTES)]


class StoreModel(ABC):
    """A ``ChunkStoreLike`` of ``capacity`` chunks of ``chunk_bytes``; see the module.

    Reads take ``seconds(bytes)`` of ``clock`` one after another, so that the Manager learns the
    rate; they are answered at once all the same. Writes take no time.
    """

    def __init__(
        self,
        capacity: int,
        chunk_bytes: int,
        clock: Callable[[], float],
        seconds: Callable[[int], float],
    ) -> None:
        self.capacity = capacity
        self.chunk_bytes = chunk_bytes
        self.puts = 0  # chunks that callers wrote
        self.rewritten = 0  # chunks that the store wrote again by itself
        self.gets = 0
        self._clock = clock
        self._seconds = seconds
        self._reads_end = float("-inf")
        self._done: list[NullDone] = []

    @abstractmethod
    def holds(self, key: bytes) -> bool:
        """Whether the store holds it."""

    @abstractmethod
    def _put(self, key: bytes, depth: int) -> None:
        """Take a chunk that is not held."""

    @abstractmethod
    def _read(self, key: bytes) -> None:
        """A chunk that is held was read."""

    @abstractmethod
    def _forget(self, key: bytes) -> None:
        """Take a held chunk out."""

    @abstractmethod
    def __len__(self) -> int:
        """Chunks held."""

    @abstractmethod
    def check(self) -> None:
        """Raise AssertionError naming the first broken invariant."""

    def put_slots(
        self,
        job: int,
        arena: Any,
        keys: bytes,
        slots: npt.NDArray[np.uint32],
        generations: npt.NDArray[np.uint64],
        offsets: npt.NDArray[np.uint64],
        nbytes: int,
        namespace: int,
        depths: npt.NDArray[np.uint32],
        deadline_ms: int = 0,
    ) -> None:
        """See ChunkStoreLike."""
        parts = split_keys(keys)
        ok = StoreResult.OK if self.capacity else StoreResult.NO_SPACE
        if self.capacity:
            for key, depth in zip(parts, depths.tolist(), strict=True):
                if not self.holds(key):
                    self.puts += 1
                    self._put(key, depth)
        self._done.append(NullDone(job, 0, bytes([ok]) * len(parts), len(parts) * nbytes, 0))

    def get_slots(
        self,
        job: int,
        arena: Any,
        keys: bytes,
        slots: npt.NDArray[np.uint32],
        generations: npt.NDArray[np.uint64],
        offsets: npt.NDArray[np.uint64],
        nbytes: int,
        deadline_ms: int = 0,
    ) -> None:
        """See ChunkStoreLike."""
        results = bytearray()
        places = zip(split_keys(keys), slots.tolist(), generations.tolist(), strict=True)
        for key, slot, generation in places:
            if self.holds(key):
                self._read(key)
                results.append(StoreResult.OK)
            else:
                arena.fail(slot, generation)
                results.append(StoreResult.MISS)
        good = results.count(StoreResult.OK) * nbytes
        self.gets += good // nbytes
        now = self._clock()
        self._reads_end = max(now, self._reads_end) + self._seconds(good)
        ns = int((self._reads_end - now) * 1e9)
        self._done.append(NullDone(job, 1, bytes(results), good, ns))

    def cancel(self, job: int) -> int:
        """Jobs are done when they are submitted."""
        return 0

    def poll(self) -> Sequence[NullDone]:
        """Each finished job exactly once."""
        done, self._done = self._done, []
        return done

    def wait(self, job: int, timeout_ms: int) -> bool:
        """Jobs are done when they are submitted."""
        return True

    def contains(self, keys: bytes) -> bytes:
        """One byte per key, 1 if held."""
        holds = self.holds
        return bytes(holds(key) for key in split_keys(keys))

    def delete(self, keys: bytes) -> int:
        """Forget keys; how many were held."""
        held = [key for key in split_keys(keys) if self.holds(key)]
        for key in held:
            self._forget(key)
        return len(held)

    def retain(self, keys: bytes, seconds: float, level: int = 0, owner: int = 0) -> bytes:
        """Recorded requests have no hints."""
        return bytes(len(split_keys(keys)))

    def retained(self, keys: bytes, owner: int = 0) -> bytes:
        """Recorded requests have no hints."""
        return bytes(len(split_keys(keys)))

    def retain_none(self) -> None:  # noqa: B027  (nothing to end, in any model)
        """Recorded requests have no hints."""

    def flush(self, timeout_ms: int) -> bool:
        """Nothing to flush."""
        return True

    def stats(self) -> dict[str, int | float]:
        """What it holds, and what was asked of it."""
        return {
            "entries": len(self),
            "bytes_used": len(self) * self.chunk_bytes,
            "bytes_max": self.capacity * self.chunk_bytes,
            "puts": self.puts,
            "gets": self.gets,
        }


class LruModel(StoreModel):
    """The chunk that was written or read longest ago goes first."""

    def __init__(
        self,
        capacity: int,
        chunk_bytes: int,
        clock: Callable[[], float],
        seconds: Callable[[int], float],
    ) -> None:
        super().__init__(capacity, chunk_bytes, clock, seconds)
        self._held: dict[bytes, None] = {}

    def holds(self, key: bytes) -> bool:
        """See StoreModel."""
        return key in self._held

    def _put(self, key: bytes, depth: int) -> None:
        if len(self._held) >= self.capacity:
            del self._held[next(iter(self._held))]
        self._held[key] = None

    def _forget(self, key: bytes) -> None:
        del self._held[key]

    def _read(self, key: bytes) -> None:
        del self._held[key]
        self._held[key] = None

    def __len__(self) -> int:
        return len(self._held)

    def check(self) -> None:
        """See StoreModel."""
        assert len(self._held) <= self.capacity, "more chunks than fit"


class _Segment:
    __slots__ = ("hot", "keys", "left", "used")

    def __init__(self) -> None:
        self.keys: dict[bytes, int] = {}  # what it serves, with its depth
        self.used = 0  # places given out
        self.hot: set[bytes] = set()
        self.left = 0  # hot ones that the last rescue left behind


class SegmentModel(StoreModel):
    """Segments of ``per_segment`` chunks, the last one open; see the module."""

    def __init__(
        self,
        capacity: int,
        chunk_bytes: int,
        clock: Callable[[], float],
        seconds: Callable[[int], float],
        segment_bytes: int = SEGMENT_BYTES,
    ) -> None:
        # A store of few chunks has smaller segments, as a small path gets.
        per = max(1, min(segment_bytes // chunk_bytes, capacity // LARGE_STORE))
        super().__init__(capacity, chunk_bytes, clock, seconds)
        self.per_segment = per
        self.segments = capacity // per if capacity else 0
        self._made = 0
        self._clean = 0
        self._open: _Segment | None = None
        self._sealed: dict[int, _Segment] = {}  # by age
        self._where: dict[bytes, _Segment] = {}
        self._number = 0
        self._credit = 0.0  # chunks that may be written again

    def holds(self, key: bytes) -> bool:
        """See StoreModel."""
        return key in self._where

    def __len__(self) -> int:
        return len(self._where)

    def _forget(self, key: bytes) -> None:
        segment = self._where.pop(key)
        del segment.keys[key]
        segment.hot.discard(key)

    def _read(self, key: bytes) -> None:
        self._where[key].hot.add(key)

    def _put(self, key: bytes, depth: int) -> None:
        self._place(key, depth)
        # A third of what others write is a quarter of all that is written.
        self._credit = min(self._credit + 1 / 3, self.per_segment / 2)
        self._tidy()

    def _place(self, key: bytes, depth: int) -> None:
        segment = self._open
        if segment is None or segment.used == self.per_segment:
            segment = self._next()
        segment.keys[key] = depth
        segment.used += 1
        self._where[key] = segment

    def _next(self) -> _Segment:
        if self._open is not None:
            self._sealed[self._number] = self._open
            self._number += 1
            self._open = None
        if not self._clean:
            self._make_clean()
        self._clean -= 1
        self._open = _Segment()
        return self._open

    def _ahead(self) -> int:
        """Segments to be kept clean."""
        if self._open is None:
            return 0
        large, late = self.segments >= LARGE_STORE, self._open.used > self.per_segment / 4 * 3
        if self._made < 4:
            return int(large and late)
        return 2 if large else int(late)

    def _tidy(self) -> None:
        assert self._open is not None
        ahead = self._ahead()
        if self._made == self.segments:
            soon = self._clean < ahead if ahead else self._open.used > self.per_segment / 2
            if soon:
                self._rescue()
        if self._clean < ahead and (self._made < self.segments or self._sealed):
            self._make_clean()

    def _victim(self) -> int:
        tenth = islice(self._sealed.items(), max(1, len(self._sealed) // 10))
        return min(tenth, key=lambda item: len(item[1].hot))[0]

    def _make_clean(self) -> None:
        if self._made < self.segments:
            self._made += 1
        else:
            gone = self._sealed.pop(self._victim())
            for key in gone.keys:
                del self._where[key]
        self._clean += 1

    def _rescue(self) -> None:
        """What was read of the next victim is written again, the lowest depth first."""
        if self._credit < 1 or not self._sealed:
            return
        segment = self._sealed[self._victim()]
        if len(segment.hot) <= segment.left:
            return
        for key in sorted(segment.hot, key=segment.keys.__getitem__):
            assert self._open is not None
            full = self._open.used == self.per_segment
            if self._credit < 1 or (full and not self._clean):
                break
            depth = segment.keys.pop(key)
            segment.hot.discard(key)
            self._place(key, depth)
            self._credit -= 1
            self.rewritten += 1
        segment.left = len(segment.hot)

    def check(self) -> None:
        """See StoreModel."""
        live = [*self._sealed.values(), *([self._open] if self._open else [])]
        assert len(live) + self._clean == self._made <= self.segments, "segments"
        assert sum(len(s.keys) for s in live) == len(self._where), "chunks"
        assert all(s.used <= self.per_segment and s.hot <= s.keys.keys() for s in live), "segment"
        assert all(key in s.keys for key, s in self._where.items()), "place"
