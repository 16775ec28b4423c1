"""How long hints retain chunks, and which of those goes first when that is too much."""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterator
from typing import NamedTuple

from kvoffload.core.hints import MAX_PRIORITY
from kvoffload.types import ChunkKey

_Row = tuple[float, int, ChunkKey]
"""(until, -place in the chain, key): weakest first."""


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


class _Queue:
    """Rows of one level in order, stale ones among them. Stale rows are swept out a few at a time:
    from the end of one heap, which leaves a heap, into another."""

    def __init__(self) -> None:
        self._heap: list[_Row] = []
        self._unswept: list[_Row] = []

    def __len__(self) -> int:
        return len(self._heap) + len(self._unswept)

    def __iter__(self) -> Iterator[_Row]:
        yield from self._heap
        yield from self._unswept

    def push(self, row: _Row) -> None:
        heapq.heappush(self._heap, row)

    def first(self) -> _Row:
        return self._of_first()[0]

    def pop(self) -> _Row:
        return heapq.heappop(self._of_first())

    def _of_first(self) -> list[_Row]:
        if not self._heap or (self._unswept and self._unswept[0] < self._heap[0]):
            return self._unswept
        return self._heap

    def sweep(self, live: Callable[[_Row], bool], most: int, live_rows: int) -> None:
        """Look at ``most`` rows, where many more are held than ``live_rows``."""
        if not self._unswept and len(self._heap) > 2 * live_rows + 64:
            self._unswept, self._heap = self._heap, []
        for _ in range(min(most, len(self._unswept))):
            row = self._unswept.pop()
            if live(row):
                heapq.heappush(self._heap, row)


class Holds:
    """Holds by chunk, and their order. Not thread safe: the Manager's lock guards it."""

    def __init__(self) -> None:
        self._holds: dict[ChunkKey, Hold] = {}
        self._rows: dict[ChunkKey, _Row] = {}  # of the holds; all others in a queue are stale
        self._queues = [_Queue() for _ in range(MAX_PRIORITY + 1)]
        self._pushed = 0  # rows since stale ones were last swept out

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
            row = self._rows[key] = (hold.until, -chunk, key)
            self._queues[hold.level].push(row)
            self._pushed += 1
        return True

    def compact(self) -> None:
        """Forget stale rows where they are many; call after ``add``. O(rows added since): all at
        once would be 70 ms under the lock with 100,000 chunks."""
        most, self._pushed = 2 * self._pushed + 2, 0
        for queue in self._queues:
            queue.sweep(self._live, most, len(self._holds))

    def drop(self, key: ChunkKey) -> None:
        """End the hold on ``key``, if there is one."""
        self._holds.pop(key, None)
        self._rows.pop(key, None)

    def end(self, now: float) -> Iterator[ChunkKey]:
        """End the holds whose time has come; yields their keys, leaf first."""
        for queue in self._queues:
            while queue and queue.first()[0] <= now:
                yield from self._pop(queue)

    def weakest(self) -> ChunkKey | None:
        """End the weakest hold: lowest level, then the earliest end."""
        for queue in self._queues:
            while queue:
                for key in self._pop(queue):
                    return key
        return None

    def weakest_of(self, fits: Callable[[ChunkKey], bool], tries: int) -> ChunkKey | None:
        """As ``weakest``, the first of the ``tries`` weakest that ``fits``."""
        for queue in self._queues:
            passed: list[_Row] = []
            found: ChunkKey | None = None
            while queue and tries and found is None:
                row = queue.pop()
                if not self._live(row):
                    continue
                tries -= 1
                if fits(row[2]):
                    found = row[2]
                else:
                    passed.append(row)
            for row in passed:
                queue.push(row)
            if found is not None:
                self.drop(found)
                return found
        return None

    def _pop(self, queue: _Queue) -> Iterator[ChunkKey]:
        row = queue.pop()
        if self._live(row):
            self.drop(row[2])
            yield row[2]

    def _live(self, row: _Row) -> bool:
        return self._rows.get(row[2]) is row  # an equal one may be left from an earlier hold

    def check(self) -> None:
        """Raise AssertionError naming the first broken invariant."""
        queued = [(lv, row) for lv, queue in enumerate(self._queues) for row in queue]
        rows = {(lv, row[2], row[0]) for lv, row in queued if self._live(row)}
        live = {(h.level, key, h.until) for key, h in self._holds.items()}
        assert live == rows, "a hold that cannot end"
        assert self._rows.keys() == self._holds.keys(), "rows of what is held"
