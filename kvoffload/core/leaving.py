"""Chunks that wait to be written, as the eviction policy sees them: who is next behind them, and
which of them give way. Without going through them all: an eighth of the arena may wait."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import chain, islice

from kvoffload.core.index import Entry, Index, Kept
from kvoffload.types import ChunkKey

LOOKED_YOUNG, LOOKED_OLD = 256, 1024
"""Queued chunks looked at for some that can give way: some 0.1 us each, under the lock. A chain is
queued leaf first, so what of a long one can go is near the old end."""


class Fringe:
    """Of the reserved chunks those whose parent is not reserved: only such a parent may be a victim
    once they are gone. Roots have none. The Manager's lock guards it."""

    def __init__(self, index: Index) -> None:
        self._index = index
        self._parent: dict[ChunkKey, ChunkKey] = {}  # by the key of the chunk

    def add(self, entry: Entry) -> None:
        """``entry`` is reserved now. O(its children)."""
        for child in self._index.below(entry.key):
            self._parent.pop(child, None)
        if entry.parent is not None:
            above = self._index.get(entry.parent)
            if above is None or not above.reserved:
                self._parent[entry.key] = entry.parent

    def remove(self, entry: Entry) -> None:
        """``entry`` is not reserved any more. O(its children)."""
        self._parent.pop(entry.key, None)
        for key in self._index.below(entry.key):
            child = self._index.get(key)
            if child is not None and child.reserved:
                self._parent[key] = entry.key

    def going(self, writing: Iterable[Entry]) -> dict[ChunkKey, ChunkKey]:
        """Parents of these and of what is being written, as ``Index.coming`` takes them."""
        going = dict(self._parent)
        going.update((e.key, e.parent) for e in writing if e.parent is not None and not e.dropped)
        return going

    def check(self, reserved: Iterable[Entry]) -> None:
        """Raise AssertionError unless these are all that is reserved."""
        want: dict[ChunkKey, ChunkKey] = {}
        for entry in reserved:
            above = self._index.get(entry.parent) if entry.parent is not None else None
            if entry.parent is not None and (above is None or not above.reserved):
                want[entry.key] = entry.parent
        assert self._parent == want, "fringe of what is reserved"


def giving_way(
    queue: dict[ChunkKey, Entry],
    index: Index,
    classes: set[int],
    level: Kept,
    most: int,
    near: bool = True,
) -> list[Entry]:
    """Up to ``most`` reserved chunks of ``classes``, kept by hints no more than by ``level``, that
    can be evicted one after the other once they are neither reserved nor kept: the youngest that
    have no resident child, with the reserved ones before them. Empty where there is none, or none
    ``near`` either end of the queue."""
    taken: dict[ChunkKey, Entry] = {}
    young: Iterable[Entry] = reversed(queue.values())
    if near:
        young = chain(islice(young, LOOKED_YOUNG), islice(queue.values(), LOOKED_OLD))
    for entry in young:
        fits = _may_go(entry, level) and entry.cls in classes and entry.key not in taken
        if fits and not index.below(entry.key):
            for one in islice(_line(entry, index, level), most - len(taken)):
                taken[one.key] = one
        if len(taken) >= most:
            break
    return list(taken.values())


def _may_go(entry: Entry, level: Kept) -> bool:
    """Whether nothing keeps its slot but that it waits to be written, and hints up to ``level``."""
    return entry.reserved and not entry.pins and not entry.io and entry.kept <= level


def _line(leaf: Entry, index: Index, level: Kept) -> Iterator[Entry]:
    """``leaf`` and the chunks before it that may go and have no other child, leaf first."""
    at: Entry | None = leaf
    while at is not None and _may_go(at, level) and len(index.below(at.key)) <= 1:
        yield at
        at = index.get(at.parent) if at.parent is not None else None
