"""LRU or frequency with ageing over leaves, whichever hits more at present."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import count

from kvoffload.core.policy.aged import AgedPolicy
from kvoffload.core.policy.duel import Duel
from kvoffload.core.policy.lru import LruPolicy
from kvoffload.types import ChunkKey


class AdaptivePolicy(AgedPolicy):
    """AgedPolicy whose ``worth`` is 1 or, while a simulated LRU clearly hits more, 0.

    A change of mind concerns uses from then on: O(1), and what is resident ages out as it was
    going to.
    """

    def __init__(self, ticks: Iterator[int]) -> None:
        super().__init__(ticks)
        self._duel = Duel(LruPolicy(count(1)), AgedPolicy(count(1)))
        self._followed: dict[ChunkKey, float | None] = {}  # value; resident and in the sample
        self._room = 1 << 62  # chunks resident when something was last to be evicted

    def insert(self, key: ChunkKey, parent: ChunkKey | None, value: float | None = None) -> None:
        """See Policy."""
        super().insert(key, parent, value)
        if self._duel.follows(key):
            self._followed[key] = value
            self._use(key)

    def touch(self, chain: Sequence[ChunkKey]) -> None:
        """See Policy."""
        super().touch(chain)
        followed = self._followed
        for key in reversed(chain):
            if key not in followed:
                continue
            if self._duel.follows(key):
                self._use(key)
            else:
                del followed[key]  # the sample became sparser since it was inserted

    def _use(self, key: ChunkKey) -> None:
        self._duel.use(key, self._room, self._followed[key])
        worth = 1.0 if self._duel.second_leads else 0.0
        if worth != self.worth:
            self.set_worth(worth)

    def victim(self) -> ChunkKey | None:
        """See Policy."""
        self._room = len(self)
        return super().victim()

    def remove(self, key: ChunkKey) -> None:
        """See Policy."""
        super().remove(key)
        self._followed.pop(key, None)

    def check(self, offered: set[ChunkKey], resident: set[ChunkKey]) -> None:
        """See Policy."""
        super().check(offered, resident)
        assert self._followed.keys() <= resident, "follows a chunk that left"
        self._duel.check()
