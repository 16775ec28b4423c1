"""Which of two policies would hit more at present: two small simulations over sampled keys."""

from __future__ import annotations

from math import sqrt
from zlib import crc32

from kvoffload.core.policy.base import Policy
from kvoffload.types import ChunkKey

SAMPLE = 512  # most keys that each simulated cache holds
_FIRST_MASK = 7  # one key in eight to begin with
_FADE = 8  # score and weight halve every so many turnovers of a simulated cache
_CLEAR = 3.0  # standard deviations by which a lead must exceed chance to count


class Ghost:
    """A cache of keys without bytes; all it holds is evictable."""

    def __init__(self, policy: Policy) -> None:
        self._policy = policy
        self.held: set[ChunkKey] = set()

    def use(self, key: ChunkKey, room: int, value: float | None) -> bool:
        """One use of ``key`` in a cache of ``room`` keys. True when it was held."""
        policy, held = self._policy, self.held
        if key in held:
            policy.touch((key,))
            return True
        while len(held) >= room:
            victim = policy.victim()
            assert victim is not None, "all that is held is offered"
            self.drop(victim)
        policy.insert(key, None, value)
        policy.offer(key)
        held.add(key)
        return False

    def drop(self, key: ChunkKey) -> None:
        """``key``, which is held, leaves."""
        self.held.discard(key)
        self._policy.remove(key)


class Duel:
    """Two ghosts see the same sample of all uses; ``second_leads`` says who hits more.

    Keys are sampled by hash and the simulated caches are smaller by the same factor, so that their
    hit rates estimate those of the whole cache (spatial sampling). The factor doubles whenever a
    ghost outgrows ``SAMPLE``: memory is bounded whatever the cache. Only uses on which the two
    differ tell anything. The lead changes hands when it is beyond chance, because each change
    costs hits: what one policy kept is not what the other one needs.
    """

    def __init__(self, first: Policy, second: Policy) -> None:
        self.second_leads = True
        self._first, self._second = Ghost(first), Ghost(second)
        self._mask = _FIRST_MASK
        self._score = 0.0  # hits of second minus hits of first
        self._weight = 0.0  # uses on which they differed
        self._missed = 0  # by first, since the last halving

    def follows(self, key: ChunkKey) -> bool:
        """Whether ``key`` is in the sample."""
        return not crc32(key) & self._mask

    def use(self, key: ChunkKey, resident: int, value: float | None = None) -> None:
        """One use of a key in the sample, while the whole cache holds ``resident`` chunks.

        ``value`` as in ``Policy.insert``: for the two policies; here a hit is a hit.
        """
        room = max(1, resident // (self._mask + 1))
        first, second = self._first.use(key, room, value), self._second.use(key, room, value)
        if first != second:
            self._score += second - first
            self._weight += 1
            if abs(self._score) > 1 + _CLEAR * sqrt(self._weight):
                self.second_leads = self._score > 0
        if not first:
            self._missed += 1
            if self._missed >= _FADE * room:
                self._missed = 0
                self._score /= 2
                self._weight /= 2
        if len(self._first.held) > SAMPLE:
            self._thin()

    def _thin(self) -> None:
        self._mask = 2 * self._mask + 1
        for ghost in (self._first, self._second):
            for key in sorted(k for k in ghost.held if not self.follows(k)):
                ghost.drop(key)

    def check(self) -> None:
        """Raise AssertionError unless memory is bounded and the score possible."""
        for ghost in (self._first, self._second):
            assert len(ghost.held) <= SAMPLE, "a simulated cache outgrew its bound"
            assert all(self.follows(k) for k in ghost.held), "a ghost holds a key not sampled"
        assert abs(self._score) <= self._weight, "a lead larger than all differences"
