"""Leaf-first LRU in which chunks that came back keep their place longer: frequency with ageing."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Sequence
from math import log2

from kvoffload.core.policy.lru import LruPolicy
from kvoffload.types import ChunkKey

_BITS = 5
_MOST = (1 << _BITS) - 1  # most uses that count
_SHIFT = 44  # a stamp is sixteenths of a turnover above, ticks below
_RECENT = 32  # a use counts once in so many parts of the resident chunks' ticks


class AgedPolicy(LruPolicy):
    """LFU with dynamic ageing (LFU-DA) over leaves, by the logarithm of the count.

    A chunk used n times stays for 1 + worth * log2(n) turnovers of the cache after its latest use:
    its stamp lies that far above the highest stamp of a victim so far. Among equals the least
    recently used goes. With ``worth`` 0 this is LRU. The logarithm is there so that a long session
    that has ended does not outlive everything else. The counts of chunks that left are kept for
    twice as many as are resident: what comes back soon is known to be used again.
    """

    def __init__(self, ticks: Iterator[int], worth: float = 1.0) -> None:
        super().__init__(ticks)
        self._uses: dict[ChunkKey, int] = {}  # tick of the latest use that counted, and the count
        self._past: OrderedDict[ChunkKey, int] = OrderedDict()  # of those that left, oldest first
        self._floor = 0  # highest stamp of a victim, without its tick
        self._next: ChunkKey | None = None  # the latest answer of victim()
        self.set_worth(worth)

    def set_worth(self, worth: float) -> None:
        """What repeated use is worth from now on; stamps given before stay."""
        self.worth = worth
        self._above = [round(16 * (1 + worth * log2(n or 1))) << _SHIFT for n in range(_MOST + 1)]

    def insert(self, key: ChunkKey, parent: ChunkKey | None) -> None:
        """See Policy."""
        now = next(self._ticks)
        uses = min(self._past.pop(key, 0) + 1, _MOST)
        self._uses[key] = now << _BITS | uses
        self._stamp[key] = self._floor + self._above[uses] + now
        if parent is not None:
            self._parent[key] = parent

    def touch(self, chain: Sequence[ChunkKey]) -> None:
        """See Policy. A use soon after another of the same chunk does not count: one request may
        touch a chunk when it loads and again when it stores."""
        stamp, ticks, counted = self._stamp, self._ticks, self._uses
        floor, above = self._floor, self._above
        recent = next(ticks) - len(stamp) // _RECENT << _BITS
        for key in reversed(chain):
            now = next(ticks)
            uses = counted[key]
            if uses < recent:
                uses = min(uses & _MOST, _MOST - 1) + 1
                counted[key] = now << _BITS | uses
            stamp[key] = floor + above[uses & _MOST] + now

    def victim(self) -> ChunkKey | None:
        """See Policy."""
        self._next = super().victim()
        return self._next

    def remove(self, key: ChunkKey) -> None:
        """See Policy."""
        stamp = self._stamp[key]
        if key == self._next and stamp > self._floor:
            # Of a victim only: a hot chunk dropped because its bytes were bad says nothing of age.
            self._floor = stamp >> _SHIFT << _SHIFT
        self._past[key] = self._uses.pop(key) & _MOST
        super().remove(key)
        while len(self._past) > 2 * len(self._stamp) + 64:
            self._past.popitem(last=False)

    def heat(self, key: ChunkKey) -> int:
        """See Policy: turnovers still to live, then recency."""
        return self._stamp[key] - self._floor

    def check(self, offered: set[ChunkKey], resident: set[ChunkKey]) -> None:
        """See Policy."""
        super().check(offered, resident)
        assert self._uses.keys() == resident, "counts and index know different chunks"
        assert not self._past.keys() & resident, "a resident chunk is remembered as gone"
        assert len(self._past) <= 2 * len(resident) + 64, "counts of chunks that left pile up"
