"""The eviction policy interface, and the ordered heap that the simple policies share."""

from __future__ import annotations

import heapq
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence

from kvoffload.types import ChunkKey

RETIRED = 1 << 120
"""Taken from a stamp when its chunk is retired: below every stamp of a chunk that is not."""


class Policy(ABC):
    """Orders the resident chunks of one slot class by what to evict next.

    The index decides what *may* go (unpinned, filled, no resident child) and offers exactly those;
    the policy only orders them. So no policy can evict a parent before its child. Keys are opaque.
    Deterministic; not thread safe (the Manager's lock guards it); every call O(log n) amortised.
    """

    weighs = False
    """Whether ``insert`` looks at the value; it need not be worked out for the others."""

    @abstractmethod
    def insert(self, key: ChunkKey, parent: ChunkKey | None, value: float | None = None) -> None:
        """A chunk became resident. It is not offered yet.

        ``value``: seconds that computing it takes, per byte of it; None while nobody knows. Only
        the proportions within one policy matter.
        """

    @abstractmethod
    def touch(self, chain: Sequence[ChunkKey]) -> None:
        """Chunks of one chain, root first, were used together."""

    @abstractmethod
    def retire(self, keys: Iterable[ChunkKey]) -> None:
        """These chunks are not expected to be used again: evict them first, unless touched later.

        Unknown keys are ignored. Retired chunks stay resident until their room is needed.
        """

    @abstractmethod
    def remove(self, key: ChunkKey) -> None:
        """A chunk left."""

    @abstractmethod
    def offer(self, key: ChunkKey) -> None:
        """The chunk may be evicted from now on."""

    @abstractmethod
    def withhold(self, key: ChunkKey) -> None:
        """The chunk may not be evicted any more."""

    @abstractmethod
    def victim(self) -> ChunkKey | None:
        """The offered chunk to evict next (it stays offered); None when nothing is offered."""

    @abstractmethod
    def heat(self, key: ChunkKey) -> int:
        """Higher is kept longer; comparable between policies made with one tick counter."""

    @abstractmethod
    def check(self, offered: set[ChunkKey], resident: set[ChunkKey]) -> None:
        """Raise AssertionError unless exactly these chunks are offered and known."""


class OrderedPolicy(Policy):
    """Evicts by ascending stamp: a lazy heap over offered keys. Subclasses say what a stamp is."""

    def __init__(self, ticks: Iterator[int]) -> None:
        self._ticks = ticks
        self._stamp: dict[ChunkKey, int] = {}
        self._offered: set[ChunkKey] = set()
        self._heap: list[tuple[int, ChunkKey]] = []

    def __len__(self) -> int:
        return len(self._stamp)

    def insert(self, key: ChunkKey, parent: ChunkKey | None, value: float | None = None) -> None:
        """See Policy."""
        self._stamp[key] = next(self._ticks)

    def retire(self, keys: Iterable[ChunkKey]) -> None:
        """See Policy. Retired chunks go in the order in which they would have gone."""
        for key in keys:
            stamp = self._stamp.get(key, -1)
            if stamp >= 0:
                self._stamp[key] = stamp - RETIRED
                if key in self._offered:  # the heap holds a higher stamp, which surfaces too late
                    heapq.heappush(self._heap, (stamp - RETIRED, key))
        if len(self._heap) > 2 * len(self._offered) + 64:
            self._compact()

    def remove(self, key: ChunkKey) -> None:
        """See Policy."""
        self._offered.discard(key)
        del self._stamp[key]

    def offer(self, key: ChunkKey) -> None:
        """See Policy."""
        if key not in self._offered:
            self._offered.add(key)
            heapq.heappush(self._heap, (self._stamp[key], key))
            if len(self._heap) > 2 * len(self._offered) + 64:
                self._compact()

    def withhold(self, key: ChunkKey) -> None:
        """See Policy."""
        self._offered.discard(key)

    def victim(self) -> ChunkKey | None:
        """See Policy."""
        heap = self._heap
        while heap:
            stamp, key = heap[0]
            if key not in self._offered:
                heapq.heappop(heap)  # withheld or gone; offered again means pushed again
            elif self._stamp[key] != stamp:
                heapq.heapreplace(heap, (self._stamp[key], key))  # touched since it was pushed
            else:
                return key
        return None

    def heat(self, key: ChunkKey) -> int:
        """See Policy."""
        return self._stamp[key]

    def _compact(self) -> None:
        self._heap = [(self._stamp[k], k) for k in self._offered]
        heapq.heapify(self._heap)

    def check(self, offered: set[ChunkKey], resident: set[ChunkKey]) -> None:
        """See Policy."""
        assert self._offered == offered, "offered chunks differ from evictable chunks"
        assert set(self._stamp) == resident, "policy and index know different chunks"
        # A heap entry may be older than the stamp (it is re-sorted when it surfaces), never
        # younger.
        low: dict[ChunkKey, int] = {}
        for stamp, key in self._heap:
            low[key] = min(stamp, low.get(key, stamp))
        for key in offered:
            assert low.get(key, 1 << 62) <= self._stamp[key], "an offered chunk cannot surface"
