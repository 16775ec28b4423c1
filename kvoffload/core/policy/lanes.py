"""Policies made of queues that are simple policies of their own: S3-FIFO and ARC."""

from __future__ import annotations

from abc import abstractmethod
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Sequence

from kvoffload.core.policy.base import OrderedPolicy, Policy
from kvoffload.core.policy.fifo import FifoPolicy
from kvoffload.core.policy.lru import LruPolicy
from kvoffload.types import ChunkKey


class LanePolicy(Policy):
    """A lane for new chunks, one for chunks that proved themselves, one for retired ones.

    Each lane orders what is offered in it. Subclasses say which lane gives the victim and what is
    remembered of chunks that left; retired chunks go before all others.
    """

    def __init__(self, young: OrderedPolicy, proven: OrderedPolicy, retired: OrderedPolicy) -> None:
        self._young, self._proven, self._retired = young, proven, retired
        self._lane: dict[ChunkKey, OrderedPolicy] = {}
        self._parent: dict[ChunkKey, ChunkKey] = {}
        self._offered: set[ChunkKey] = set()

    def _enter(self, lane: OrderedPolicy, key: ChunkKey, parent: ChunkKey | None) -> None:
        self._lane[key] = lane
        if parent is not None:
            self._parent[key] = parent
        lane.insert(key, parent)

    def _move(self, key: ChunkKey, lane: OrderedPolicy) -> None:
        """To the young end of ``lane``."""
        self._lane[key].remove(key)
        self._lane[key] = lane
        lane.insert(key, self._parent.get(key))
        if key in self._offered:
            lane.offer(key)

    def retire(self, keys: Iterable[ChunkKey]) -> None:
        """See Policy."""
        for key in keys:
            if self._lane.get(key, self._retired) is not self._retired:
                self._move(key, self._retired)

    def remove(self, key: ChunkKey) -> None:
        """See Policy."""
        lane = self._lane.pop(key)
        lane.remove(key)
        self._offered.discard(key)
        self._parent.pop(key, None)
        self._left(key, lane)

    def offer(self, key: ChunkKey) -> None:
        """See Policy."""
        self._offered.add(key)
        self._lane[key].offer(key)

    def withhold(self, key: ChunkKey) -> None:
        """See Policy."""
        self._offered.discard(key)
        self._lane[key].withhold(key)

    def victim(self) -> ChunkKey | None:
        """See Policy."""
        retired = self._retired.victim()
        return self._choose() if retired is None else retired

    def heat(self, key: ChunkKey) -> int:
        """See Policy."""
        heat = self._lane[key].heat(key)
        return -heat if self._lane[key] is self._retired else heat

    def check(self, offered: set[ChunkKey], resident: set[ChunkKey]) -> None:
        """See Policy."""
        assert self._offered == offered, "offered chunks differ from evictable chunks"
        assert set(self._lane) == resident, "policy and index know different chunks"
        assert set(self._parent) <= resident, "parent link of a chunk that left"
        for lane in (self._young, self._proven, self._retired):
            mine = {k for k, v in self._lane.items() if v is lane}
            lane.check(offered & mine, mine)

    @abstractmethod
    def _choose(self) -> ChunkKey | None:
        """The victim when no retired chunk is offered."""

    @abstractmethod
    def _left(self, key: ChunkKey, lane: OrderedPolicy) -> None:
        """``key`` has left ``lane`` and the cache."""


_Past = OrderedDict[ChunkKey, None]


def _trim(past: _Past, most: int) -> None:
    """Forget the oldest of ``past`` until ``most`` are left."""
    while len(past) > max(0, most):
        past.popitem(last=False)


class S3FifoPolicy(LanePolicy):
    """S3-FIFO: a new chunk that is not used again leaves through a small queue.

    New chunks wait in a queue of a tenth of the cache. Those used meanwhile, and those that come
    back soon after they left it, enter the main queue, where a use is worth another round (three
    at most). They enter it when they are used and not, as in the paper, when they reach the end of
    the small queue: a chunk with a resident child never gets there.
    """

    _MOST_USES = 3

    def __init__(self, ticks: Iterator[int]) -> None:
        super().__init__(FifoPolicy(ticks), FifoPolicy(ticks), FifoPolicy(ticks))
        self._uses: dict[ChunkKey, int] = {}
        self._past: _Past = OrderedDict()  # left the small queue, the longest gone first

    def insert(self, key: ChunkKey, parent: ChunkKey | None, value: float | None = None) -> None:
        """See Policy."""
        known = key in self._past
        self._past.pop(key, None)
        self._uses[key] = 0
        self._enter(self._proven if known else self._young, key, parent)

    def touch(self, chain: Sequence[ChunkKey]) -> None:
        """See Policy."""
        for key in reversed(chain):
            if self._lane[key] is self._proven:
                self._uses[key] = min(self._uses[key] + 1, self._MOST_USES)
            else:
                self._move(key, self._proven)

    def _choose(self) -> ChunkKey | None:
        small = len(self._young) * 10 > len(self._lane)
        key = self._young.victim() if small else None
        while key is None:
            key = self._proven.victim()
            if key is None:
                return self._young.victim()
            if self._uses[key]:
                self._uses[key] -= 1
                self._move(key, self._proven)
                key = None
        return key

    def _left(self, key: ChunkKey, lane: OrderedPolicy) -> None:
        del self._uses[key]
        if lane is self._young:
            self._past[key] = None
            _trim(self._past, len(self._lane))


class ArcPolicy(LanePolicy):
    """ARC: recency and frequency share the cache; what comes back shows which deserves more."""

    def __init__(self, ticks: Iterator[int]) -> None:
        super().__init__(LruPolicy(ticks), LruPolicy(ticks), FifoPolicy(ticks))
        self._past_young: _Past = OrderedDict()  # evicted from a lane, the longest gone first
        self._past_proven: _Past = OrderedDict()
        self._target = 0.0  # chunks that the young lane should hold

    def insert(self, key: ChunkKey, parent: ChunkKey | None, value: float | None = None) -> None:
        """See Policy."""
        young, proven = self._past_young, self._past_proven
        lane = self._proven
        if key in young:
            self._target += max(1.0, len(proven) / len(young))
            self._target = min(self._target, float(len(self._lane) + 1))
            del young[key]
        elif key in proven:
            self._target = max(0.0, self._target - max(1.0, len(young) / len(proven)))
            del proven[key]
        else:
            lane = self._young
        self._enter(lane, key, parent)

    def touch(self, chain: Sequence[ChunkKey]) -> None:
        """See Policy."""
        for key in reversed(chain):
            if self._lane[key] is self._proven:
                self._proven.touch((key,))
            else:
                self._move(key, self._proven)

    def _choose(self) -> ChunkKey | None:
        order = (self._young, self._proven)
        if len(self._young) <= self._target:
            order = (self._proven, self._young)
        key = order[0].victim()
        return order[1].victim() if key is None else key

    def _left(self, key: ChunkKey, lane: OrderedPolicy) -> None:
        room = len(self._lane) + 1
        (self._past_proven if lane is self._proven else self._past_young)[key] = None
        _trim(self._past_young, room - len(self._young))
        _trim(self._past_proven, room - len(self._past_young))
