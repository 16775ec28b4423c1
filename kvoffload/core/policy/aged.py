"""Leaf-first LRU in which chunks that came back keep their place longer: frequency with ageing."""

from __future__ import annotations

from bisect import bisect
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from math import log2

from kvoffload.core.policy.lru import LruPolicy
from kvoffload.types import ChunkKey

_USE_BITS = 5
_MOST = (1 << _USE_BITS) - 1  # most uses that count
_GRADES = 8  # of value: the mean and less, then powers of the square root of two above it
_BITS = 8  # of a grade and a count together
_WHAT = (1 << _BITS) - 1
_SHIFT = 44  # a stamp is sixteenths of a turnover above, ticks below
_RECENT = 32  # a use counts once in so many parts of the resident chunks' ticks
_VALUE_POWER = 0.25

_STEPS = [2 ** (grade / 2 - 0.25) for grade in range(1, _GRADES)]
"""Value over mean at which a grade begins."""
_BONUS = [
    2 ** (_VALUE_POWER * grade / 2) * log2(uses or 1)
    for grade in range(_GRADES)
    for uses in range(_MOST + 1)
]


class AgedPolicy(LruPolicy):
    """LFU with dynamic ageing (LFU-DA) over leaves, by the logarithm of the count.

    A chunk used n times stays for 1 + worth * weight * log2(n) turnovers of the cache after its
    latest use: its stamp lies that far above the highest stamp of a victim so far. Among equals the
    least recently used goes. With ``worth`` 0 this is LRU. The logarithm is there so that a long
    session that has ended does not outlive everything else. The counts of chunks that left are kept
    for twice as many as are resident: what comes back soon is known to be used again.

    ``weight`` is the fourth root of the chunk's value over the mean value of about as many chunks
    as are resident, at least 1: what proved itself and takes long to compute again stays a little
    longer. Value alone keeps nothing.
    """

    weighs = True

    def __init__(self, ticks: Iterator[int], worth: float = 1.0) -> None:
        super().__init__(ticks)
        # Tick of the latest use that counted, grade of the value, and the count.
        self._uses: dict[ChunkKey, int] = {}
        self._past: OrderedDict[ChunkKey, int] = OrderedDict()  # of those that left, oldest first
        self._floor = 0  # highest stamp of a victim, without its tick
        self._next: ChunkKey | None = None  # the latest answer of victim()
        self._mean = 0.0  # value of what came of late; 0 until one is known
        self.set_worth(worth)

    def set_worth(self, worth: float) -> None:
        """What repeated use is worth from now on; stamps given before stay."""
        self.worth = worth
        self._above = [round(16 * (1 + worth * bonus)) << _SHIFT for bonus in _BONUS]

    def insert(self, key: ChunkKey, parent: ChunkKey | None, value: float | None = None) -> None:
        """See Policy."""
        now = next(self._ticks)
        what = min(self._past.pop(key, 0) + 1, _MOST)
        if value:
            what |= self._grade(value) << _USE_BITS
        self._uses[key] = now << _BITS | what
        self._stamp[key] = self._floor + self._above[what] + now
        if parent is not None:
            self._parent[key] = parent

    def _grade(self, value: float) -> int:
        """Of a chunk that is coming in."""
        mean = self._mean or value
        self._mean = mean = mean + (value - mean) / (len(self._stamp) + 1)
        return bisect(_STEPS, value / mean)

    def touch(self, chain: Sequence[ChunkKey]) -> None:
        """See Policy. A use soon after another of the same chunk does not count: one request may
        touch a chunk when it loads and again when it stores."""
        stamp, ticks, counted = self._stamp, self._ticks, self._uses
        floor, above = self._floor, self._above
        recent = next(ticks) - len(stamp) // _RECENT << _BITS
        for key in reversed(chain):
            now = next(ticks)
            what = counted[key]
            if what < recent:
                what = (what & _WHAT) + (what & _MOST < _MOST)
                counted[key] = now << _BITS | what
            stamp[key] = floor + above[what & _WHAT] + now

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
        assert 0 <= self._mean < float("inf"), "mean value"
