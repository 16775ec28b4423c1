"""What should be on NVMe first when there is time: found a part at a time, since it is a long list.

Sorting a quarter of a million chunks takes a third of a second, under the Manager's lock and
without letting go of the interpreter: a request that arrives meanwhile would wait. So the chunks
are taken in a part at a time, each part is sorted by itself, and the parts are merged as chunks are
taken out.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator

from kvoffload.core.index import Entry, Index
from kvoffload.types import ChunkKey, SlotState

_Row = tuple[int, int, Entry]


class Hottest:
    """Chunks to be written, what hints keep first, then by descending heat, each after its resident
    ancestors. Only what was resident and unwritten at the time of ``look`` is in it; what became of
    it since is for the caller to see. Not thread safe: the Manager's lock guards it."""

    def __init__(self, index: Index) -> None:
        self._index = index
        self._unseen = list(index)
        self._parts: list[tuple[list[int], list[Entry]]] = []  # sorted: minus their heat, chunks
        self._rows: Iterator[_Row] | None = None
        self._next: list[Entry] = []  # a chunk behind its ancestors: the last comes first
        self._given: set[ChunkKey] = set()

    def look(self, most: int | None = None) -> bool:
        """Take in ``most`` more chunks (None: all). True when there are no more. O(most)."""
        if self._unseen:
            cut = 0 if most is None else max(0, len(self._unseen) - most)
            part = self._unseen[cut:]
            del self._unseen[cut:]
            part = [e for e in part if not e.dropped and (e.dirty or e.state is SlotState.FILLING)]
            cold = [-self._index.heat(e) for e in part]
            order = sorted(range(len(part)), key=cold.__getitem__)
            self._parts.append(([cold[i] for i in order], [part[i] for i in order]))
        return not self._unseen

    def peek(self) -> Entry | None:
        """The next one; None when there is none. Once ``look`` has seen all; O(ancestors)."""
        if self._rows is None:
            self._rows = heapq.merge(*(_rows(n, *part) for n, part in enumerate(self._parts)))
        while not self._next:
            row = next(self._rows, None)
            if row is None:
                return None
            at: Entry | None = row[2]
            while at is not None and at.key not in self._given:
                self._given.add(at.key)
                if at.dirty or at is row[2]:
                    self._next.append(at)
                at = self._index.get(at.parent) if at.parent is not None else None
        return self._next[-1]

    def pop(self) -> None:
        """Past what ``peek`` gave."""
        self._next.pop()


def _rows(number: int, cold: list[int], entries: list[Entry]) -> Iterator[_Row]:
    """Made as they are needed: a tuple for each chunk would set off full garbage collections."""
    for heat, entry in zip(cold, entries, strict=True):
        yield heat, number, entry
