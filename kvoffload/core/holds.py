"""How long hints retain chunks, and which of those goes first when that is too much."""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterator
from typing import NamedTuple

from kvoffload.core.hints import MAX_PRIORITY
from kvoffload.types import ChunkKey


class Hold(NamedTuple):
    """How strongly, until when (clock) and for whom a chunk is retained. Merged by element."""

    level: int
    until: float
    owner: str | None = ""  # None: several

    def covers(self, other: Hold) -> bool:
        """Whether ``other`` would add nothing."""
        strong = self.level >= other.level and self.until >= other.until
        return strong and (self.owner is None or self.owner == other.owner)

    def merged(self, other: Hold) -> Hold:
        """As strong as the stronger, for both."""
        owner = self.owner if self.owner == other.owner else None
        return Hold(max(self.level, other.level), max(self.until, other.until), owner)


class Holds:
    """Holds by chunk, and their order. Not thread safe: the Manager's lock guards it."""

    def __init__(self) -> None:
        self._holds: dict[ChunkKey, Hold] = {}
        # Per level, weakest first: (until, -place in the chain, key). Stale rows are skipped.
        self._queues: list[list[tuple[float, int, ChunkKey]]] = [
            [] for _ in range(MAX_PRIORITY + 1)
        ]

    def __contains__(self, key: object) -> bool:
        return key in self._holds

    def __len__(self) -> int:
        return len(self._holds)

    def __iter__(self) -> Iterator[ChunkKey]:
        return iter(self._holds)

    def get(self, key: ChunkKey) -> Hold | None:
        """The hold on ``key``."""
        return self._holds.get(key)

    def add(self, key: ChunkKey, chunk: int, hold: Hold) -> bool:
        """Hold ``key``, at place ``chunk`` of its chain, at least so. False: it was already."""
        old = self._holds.get(key)
        if old is not None:
            if old.covers(hold):
                return False
            hold = old.merged(hold)
        self._holds[key] = hold
        if old is None or (old.level, old.until) != (hold.level, hold.until):
            heapq.heappush(self._queues[hold.level], (hold.until, -chunk, key))
        return True

    def compact(self) -> None:
        """Forget stale rows where they are many; call after ``add``. O(1) amortised."""
        for level, queue in enumerate(self._queues):
            if len(queue) > 2 * len(self._holds) + 64:
                queue[:] = [row for row in queue if self._live(level, row)]
                queue[:] = dict.fromkeys(queue)
                heapq.heapify(queue)

    def drop(self, key: ChunkKey) -> None:
        """End the hold on ``key``, if there is one."""
        self._holds.pop(key, None)

    def end(self, now: float) -> Iterator[ChunkKey]:
        """End the holds whose time has come; yields their keys, leaf first."""
        for level, queue in enumerate(self._queues):
            while queue and queue[0][0] <= now:
                yield from self._pop(level)

    def weakest(self) -> ChunkKey | None:
        """End the weakest hold: lowest level, then the earliest end."""
        for level, queue in enumerate(self._queues):
            while queue:
                for key in self._pop(level):
                    return key
        return None

    def weakest_of(self, fits: Callable[[ChunkKey], bool], tries: int) -> ChunkKey | None:
        """As ``weakest``, the first of the ``tries`` weakest that ``fits``."""
        for level, queue in enumerate(self._queues):
            passed: list[tuple[float, int, ChunkKey]] = []
            found: ChunkKey | None = None
            while queue and tries and found is None:
                row = heapq.heappop(queue)
                if not self._live(level, row):
                    continue
                tries -= 1
                if fits(row[2]):
                    found = row[2]
                else:
                    passed.append(row)
            for row in passed:
                heapq.heappush(queue, row)
            if found is not None:
                del self._holds[found]
                return found
        return None

    def _pop(self, level: int) -> Iterator[ChunkKey]:
        row = heapq.heappop(self._queues[level])
        if self._live(level, row):
            del self._holds[row[2]]
            yield row[2]

    def _live(self, level: int, row: tuple[float, int, ChunkKey]) -> bool:
        hold = self._holds.get(row[2])
        return hold is not None and hold.level == level and hold.until == row[0]

    def check(self) -> None:
        """Raise AssertionError naming the first broken invariant."""
        rows = {(lv, row[2], row[0]) for lv, queue in enumerate(self._queues) for row in queue}
        live = {(h.level, key, h.until) for key, h in self._holds.items()}
        assert live <= rows, "a hold that cannot end"
