"""Kinds of requests, and what their chunks were worth: whose chunks are asked for again.

A long new text behind a long known one is hardly ever continued, a short turn often; which kinds
are worth writing differs by workload and is learned.
"""

from __future__ import annotations

from dataclasses import dataclass

POWER = 4
"""The odds go with this power of the worth. Best would be to write whole kinds, the best first; but
worth is known roughly, and kinds of like worth should share."""
PRIOR = 3
"""A kind counts as average until about so many of its requests were asked for again."""
FADE = 0.9
"""What is known keeps this part for each arena full that left: one shows a handful of requests of a
kind, too few to forget half of what was known before."""
LEAST = 1e-9
"""Asked for again per chunk that left, on average. Below, ``PRIOR`` outweighs whatever was seen;
and what was asked for long ago never fades to 0 (its last denormal times 0.9 is itself), but its
mean does."""
_NEW, _KNOWN = 12, 4
KINDS = _NEW * _KNOWN


@dataclass(slots=True, eq=False)
class Origin:
    """A request as its chunks know it: all that it stored share one. A chunk is of no use without
    those before it, so they share the coin."""

    draw: float  # the coin, in [0, 1)
    known: int  # chunks of its prompt that were there before
    chunks: int = 0  # that it stored so far

    def kind(self) -> int:
        """Below ``KINDS``: new chunks by powers of two, known ones by powers of eight."""
        new = max(0, min(self.chunks.bit_length(), _NEW) - 1)
        return new * _KNOWN + min((self.known.bit_length() + 1) // 3, _KNOWN - 1)


class Kinds:
    """How many chunks used once were asked for again, of those that left DRAM, by ``Origin.kind``,
    of late. Not thread safe: the Manager's lock guards it. Calls are O(1), ``fade`` O(kinds)."""

    def __init__(self) -> None:
        self._left = [0.0] * KINDS
        self._asked = [0.0] * KINDS
        self._all_left = self._all_asked = 0.0

    def left(self, kind: int) -> None:
        """One of that kind left DRAM."""
        self._left[kind] += 1
        self._all_left += 1

    def asked(self, kind: int) -> None:
        """One that had left is wanted again."""
        self._asked[kind] += 1
        self._all_asked += 1

    def fade(self) -> None:
        """An arena full left: what was seen so far counts less."""
        self._left = [FADE * n for n in self._left]
        self._asked = [FADE * n for n in self._asked]
        self._all_left, self._all_asked = sum(self._left), sum(self._asked)

    def odds(self, kind: int) -> float:
        """Of writing such a chunk; 1 for one of average worth, and while nothing is known."""
        mean = self._all_asked / self._all_left if self._all_left else 0.0
        if mean < LEAST:
            return 1.0
        prior = PRIOR << kind // _KNOWN  # a request is asked for as a whole: one observation
        worth = (self._asked[kind] + prior) / (self._left[kind] + prior / mean)
        return float((worth / mean) ** POWER)

    def check(self) -> None:
        """Raise AssertionError naming the first broken invariant."""
        assert min(self._left) >= 0 and min(self._asked) >= 0, "chunks seen of a kind"
        for total, parts in ((self._all_left, self._left), (self._all_asked, self._asked)):
            assert abs(total - sum(parts)) <= 1e-6 * max(1.0, total), "chunks seen of all kinds"
