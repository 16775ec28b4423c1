"""Leaf-first least recently used: the default policy."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from kvoffload.core.policy.base import OrderedPolicy
from kvoffload.types import ChunkKey


class LruPolicy(OrderedPolicy):
    """A chain is touched leaf to root, so a parent is younger than its children and leaves age
    first.

    Callers may touch just the part of a chain they used: when a chunk leaves, its parent inherits
    its age if that is younger, which gives the same order as touching every ancestor each time.
    """

    def __init__(self, ticks: Iterator[int]) -> None:
        super().__init__(ticks)
        self._parent: dict[ChunkKey, ChunkKey] = {}

    def insert(self, key: ChunkKey, parent: ChunkKey | None, value: float | None = None) -> None:
        """See Policy."""
        self._stamp[key] = next(self._ticks)
        if parent is not None:
            self._parent[key] = parent

    def touch(self, chain: Sequence[ChunkKey]) -> None:
        """See Policy."""
        stamp, ticks = self._stamp, self._ticks
        for key in reversed(chain):
            stamp[key] = next(ticks)

    def remove(self, key: ChunkKey) -> None:
        """See Policy."""
        stamp = self._stamp.pop(key)
        self._offered.discard(key)
        parent = self._parent.pop(key, None)
        if parent is not None and 0 <= self._stamp.get(parent, -1) < stamp:  # retired stays retired
            self._stamp[parent] = stamp

    def check(self, offered: set[ChunkKey], resident: set[ChunkKey]) -> None:
        """See Policy."""
        super().check(offered, resident)
        assert set(self._parent) <= resident, "parent link of a chunk that left"
