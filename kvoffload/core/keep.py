"""What hints keep or let go of: retention with priorities, pins, ended sessions.

A kept chunk is not offered to the eviction policy at all, so this holds with every policy. Two
rules make the bounds exact. A resident chunk keeps its resident ancestors from eviction, so what
keeps a chunk keeps them too, at least as strongly. And what ends, ends leaf first.

Retained: at most half of the arena. Beyond it the weakest goes: lowest priority, then the earliest
end. The same happens where nothing else could make room. Pinned: at most a quarter of the arena, by
the prompts' chunks, resident or not; a pin that does not fit is refused.

The chunk store is told what to keep of what it holds (``tiers.base.ChunkStoreLike.retain``) and has
a bound of its own. What DRAM gives up early is still wished for: it is written to NVMe before it
goes (core/admission.py), and retained there until its end.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from threading import Lock

from kvoffload.core.hashchain import Chain
from kvoffload.core.holds import Hold, Holds
from kvoffload.core.index import Entry, Kept
from kvoffload.core.nvme import NvmeTier
from kvoffload.core.pins import Pins
from kvoffload.core.pool import Pool
from kvoffload.core.stats import Counters
from kvoffload.tiers.base import PIN_LEVEL
from kvoffload.types import CacheLayout, ChunkKey, GroupKind, SlotState

_MAX_GRAIN_S = 256.0  # rare enough: 12 ms for a chain of 6,000 chunks
_TRIES = 64
"""Candidates looked at when room must come from what is retained."""


class Keeper:
    """The hints' half of the Manager, which owns the lock.

    Public methods down to ``release`` take the lock: any thread, O(chunks of the prompt), no I/O.
    The others are called by the Manager under it.
    """

    def __init__(
        self,
        layout: CacheLayout,
        pool: Pool,
        nvme: NvmeTier | None,
        counters: Counters,
        data_bytes: int,
        lock: Lock,
        clock: Callable[[], float],
    ) -> None:
        self.max_retained = data_bytes // 2
        self.nbytes: dict[Kept, int] = dict.fromkeys(Kept, 0)
        """Bytes of resident chunks that are retained, or pinned (and not counted as retained)."""
        self._layout = layout
        self._pool = pool
        self._nvme = nvme
        self._counters = counters
        self._lock = lock
        self._clock = clock
        self._holds = Holds()
        self._pins = Pins(layout, data_bytes // 4, counters)
        pool.on_add = self.added
        pool.make_room = self.make_room
        if nvme is not None:
            nvme.writes.on_written = self.written

    # -- what hints ask for

    def retain(
        self,
        chain: Chain,
        end: int,
        seconds: float,
        level: int = 0,
        *,
        start: int = 0,
        owner: str = "",
    ) -> None:
        """The chunks of [start, end) that are held were used: keep them, and what they need, so
        long, by priority ``level``. ``owner``: whose ``release`` ends it.

        It ends on a grain of the clock (``_end``), up to a sixteenth later than asked for. So what
        a request adds within a grain does not outlive what is before it, which need not be gone
        through again: O(chunks of [start, end)), and once a grain O(chunks of [0, end)).
        """
        with self._lock:
            now = self._clock()
            self.expire(now)  # what has ended must not be merged with what begins
            hold = Hold(level, _end(now, seconds), owner)
            get = self._pool.index.get
            for g in self._layout.groups:
                served = g.kind is not GroupKind.NONE
                keys = chain.keys(g.group) if served else []
                first, stop = start // g.chunk_tokens, min(end // g.chunk_tokens, len(keys))
                above = get(keys[first - 1]) if 0 < first <= len(keys) else None
                before = above.wish if above is not None else None
                for i in range(stop - 1, first - 1, -1):
                    entry = get(keys[i])
                    if entry is not None:
                        self._hold(entry, hold, now)
                if self._nvme is not None and first < stop:
                    news = above is not None and above.wish is not before
                    whole = news and g.kind is GroupKind.FULL
                    self._hold_below(self._nvme, keys[:stop], first, hold, now, whole)
            self._holds.compact()
            self._cut()

    def pin(self, chain: Chain, end: int) -> bool:
        """Keep what a hit on [0, end) needs, also what of it comes later. False: it does not fit.

        Idempotent. Ends with ``unpin`` of the same prompt, or with ``reset``.
        """
        with self._lock:
            fresh = self._pins.pin(chain, end)
            self._settle_all(fresh or ())
            if self._nvme is not None and fresh:
                self._nvme.retain(fresh, math.inf, PIN_LEVEL)
            return fresh is not None

    def unpin(self, chain: Chain, end: int) -> bool:
        """End the pin of this prompt. False when there is none."""
        with self._lock:
            ended = self._pins.unpin(chain, end)
            if ended is None:
                return False
            self._settle_all(ended)
            if self._nvme is not None:
                self._nvme.retain(ended, 0, PIN_LEVEL)
            self._cut()
            return True

    def release(self, chain: Chain, start: int, end: int, *, owner: str = "") -> int:
        """A session is over: the chunks in [start, end) that nobody else built on go first.

        They lose their retention, are not written to NVMe and are deleted from it. Chunks that are
        pinned or retained for others than ``owner``, and those with resident children of others,
        stay as they are, with all before them. That nobody else uses [start, end) by way of HBM or
        NVMe is for the caller to know. Returns the chunks let go of in DRAM.
        """
        with self._lock:
            names: list[ChunkKey] = []
            stop = start
            groups = sorted(self._layout.groups, key=lambda g: g.kind is not GroupKind.FULL)
            for g in groups:
                if g.kind is not GroupKind.NONE:
                    keys = chain.keys(g.group)[: end // g.chunk_tokens]
                    first = -(-stop // g.chunk_tokens)
                    mine = self._unshared(keys[first:], owner)
                    if g.kind is GroupKind.FULL and len(mine) < len(keys) - first:
                        stop = max(stop, (len(keys) - len(mine)) * g.chunk_tokens)
                    names += mine
            gone = [e for e in self._pool.index.find(names) if e is not None]
            for entry in gone:
                self._holds.drop(entry.key)
                entry.wish = None
                self._settle(entry)
            if self._nvme is not None:
                self._nvme.retain(names, 0, 0)
                self._nvme.writes.recall(gone)
            self._pool.index.let_go(gone)
            self._forget_below(names)
            self._counters.hint_released += len(gone)
            return len(gone)

    def _unshared(self, keys: Sequence[ChunkKey], owner: str) -> list[ChunkKey]:
        """From the leaf on: those that nobody else keeps and that have no other resident children,
        ended sessions' excepted."""
        mine: list[ChunkKey] = []
        below = self._nvme.retained(keys, owner) if self._nvme is not None else bytes(len(keys))
        for key, kept in zip(reversed(keys), reversed(below), strict=True):
            entry = self._pool.index.get(key)
            wish = entry.wish if entry is not None else None
            others_wish = wish is not None and wish.until > self._clock() and wish.owner != owner
            if kept or others_wish or key in self._pins:
                break
            others = self._pool.index.children(key).difference(mine[-1:])
            if any(not self._retired(k) for k in others):
                break
            mine.append(key)
        return mine

    def _retired(self, key: ChunkKey) -> bool:
        """Let go of, and not kept again since: what is kept needs those before it."""
        entry = self._pool.index.get(key)
        return entry is not None and entry.retired and not entry.kept

    def _forget_below(self, keys: list[ChunkKey]) -> None:
        if self._nvme is None or not keys:
            return
        held = dict(zip(keys, self._pool.index.find(keys), strict=True))
        # What is being written is deleted when that returns (core/writebehind.py).
        going = [k for k, e in held.items() if e is None or not (e.pins or e.io)]
        self._counters.hint_deleted += self._nvme.delete(going)
        for entry in filter(None, map(held.get, going)):
            if entry.state is SlotState.READY:
                self._nvme.writes.push(entry)  # used again, it is to be written again

    # -- retention

    def _hold(self, entry: Entry, hold: Hold, now: float) -> None:
        """Retain ``entry`` and its resident ancestors at least so strongly."""
        get = self._pool.index.get
        at: Entry | None = entry
        while at is not None and self._holds.add(at.key, at.chunk, hold):
            _wish(at, hold, now)
            if not at.kept:
                self._settle(at)
            at = get(at.parent) if at.parent is not None else None

    def _hold_below(
        self,
        nvme: NvmeTier,
        keys: Sequence[ChunkKey],
        first: int,
        hold: Hold,
        now: float,
        whole: bool,
    ) -> None:
        """Retain on NVMe what it holds of the last of ``keys``, from ``first`` on. Those before as
        well where ``whole``, or where the chunk before ``first`` was retained for less."""
        seconds = hold.until - now
        news = nvme.retain(keys[max(0, first - 1) :], seconds, hold.level, hold.owner)
        if first > 1 and (whole or news[0]):
            nvme.retain(keys[: first - 1], seconds, hold.level, hold.owner)

    def _unheld(self, key: ChunkKey) -> None:
        entry = self._pool.index.get(key)
        if entry is not None:
            self._settle(entry)

    def _settle_all(self, keys: Iterable[ChunkKey]) -> None:
        for key in keys:
            self._unheld(key)

    def _settle(self, entry: Entry) -> None:
        """Bring an entry's mark up to what is known of its key."""
        kept = Kept.NO
        if entry.key in self._pins:
            kept = Kept.PINNED
        elif entry.key in self._holds:
            kept = Kept.RETAINED
        if kept is not entry.kept:
            self.nbytes[entry.kept] -= entry.nbytes if entry.kept else 0
            self.nbytes[kept] += entry.nbytes if kept else 0
            entry.kept = kept
            self._pool.index.refresh(entry)

    def _cut(self) -> None:
        """Within the bound again: the weakest retention ends early."""
        while self.nbytes[Kept.RETAINED] > self.max_retained:
            key = self._holds.weakest()
            if key is None:
                return
            self._unheld(key)
            self._counters.hint_retain_cut += 1

    # -- under the lock, by Manager and Pool

    def written(self, entries: Sequence[Entry]) -> None:
        """NVMe holds these now: what DRAM was asked to keep is to be kept there too."""
        if self._nvme is None or (not self._pins and all(e.wish is None for e in entries)):
            return  # the common case: nobody hints
        now = self._clock()
        same: dict[Hold, list[ChunkKey]] = {}
        for entry in entries:
            if entry.wish is not None and entry.wish.until > now and not entry.retired:
                same.setdefault(entry.wish, []).append(entry.key)
        for hold, keys in same.items():
            self._nvme.retain(keys, hold.until - now, hold.level, hold.owner)
        pinned = [e.key for e in entries if e.key in self._pins]
        self._nvme.retain(pinned, math.inf, PIN_LEVEL)

    def added(self, entry: Entry) -> None:
        """``entry`` became resident: its pin holds again, its retained children keep it too."""
        if not self._holds and not self._pins:
            return  # the common case: nobody hints
        now = self._clock()
        self.expire(now)
        for key in self._pool.index.children(entry.key):
            hold = self._holds.get(key)
            if hold is not None:
                self._hold(entry, hold, now)
        self._holds.compact()  # a chunk that keeps going and coming leaves a row each time
        self._settle(entry)
        self._cut()

    def dropped(self, entry: Entry) -> None:
        """``entry`` is about to leave."""
        self._holds.drop(entry.key)
        self.nbytes[entry.kept] -= entry.nbytes if entry.kept else 0
        entry.kept = Kept.NO

    def expire(self, now: float) -> None:
        """Retention that has ended."""
        self._settle_all(self._holds.end(now))

    def make_room(self) -> bool:
        """Nothing else may be evicted: give up the weakest retention that stands in the way alone.

        False when there is none near the front. Pins stay.
        """
        key = self._holds.weakest_of(self._alone, _TRIES)
        if key is None:
            return False
        self._unheld(key)
        self._counters.hint_retain_cut += 1
        return True

    def _alone(self, key: ChunkKey) -> bool:
        entry = self._pool.index.get(key)
        if entry is None or entry.kept is not Kept.RETAINED or not entry.unused():
            return False
        return not self._pool.index.children(key)

    def reset(self) -> None:
        """Keys of before mean nothing any more: no pins. Entries are dropped one by one."""
        self._settle_all(self._pins.clear())
        if self._nvme is not None:
            for entry in (*self._pool.index, *self._nvme.io_entries()):
                entry.wish = None  # else a write under way would be retained when it returns
            self._nvme.retain_none()
        self._cut()

    def check(self) -> None:
        """Raise AssertionError naming the first broken invariant. Under the lock."""
        index = self._pool.index
        sums: dict[Kept, int] = dict.fromkeys(Kept, 0)
        for entry in index:
            want = Kept.NO
            if entry.key in self._pins:
                want = Kept.PINNED
            elif entry.key in self._holds:
                want = Kept.RETAINED
            assert entry.kept is want, f"kept of {entry.key.hex()}"
            sums[want] += entry.nbytes if want else 0
            hold = self._holds.get(entry.key)
            if hold is not None:
                assert entry.wish is not None and entry.wish.covers(hold), "held beyond the wish"
            parent = index.get(entry.parent) if entry.parent is not None else None
            if parent is not None and want:
                assert parent.kept, "a kept chunk's parent is not kept"
            if parent is not None and hold is not None:
                above = self._holds.get(parent.key)
                assert above is not None and above.covers(hold), "weaker parent"
        assert sums == self.nbytes, f"kept bytes {self.nbytes}, found {sums}"
        assert sums[Kept.RETAINED] <= self.max_retained, "more is retained than may be"
        assert sums[Kept.PINNED] <= self._pins.nbytes, "more is pinned than is known"
        assert all(index.get(key) is not None for key in self._holds), "a hold without a chunk"
        self._holds.check()
        self._pins.check()


def _end(now: float, seconds: float) -> float:
    """When what is retained for ``seconds`` from now on ends: not before, and at a multiple of a
    grain, a sixteenth of them at most. Grains are powers of two, so that what was asked for longer
    does not end earlier."""
    part = min(max(seconds / 16, 1.0), _MAX_GRAIN_S)
    grain = 2.0 ** math.floor(math.log2(part))
    return math.ceil((now + seconds) / grain) * grain


def _wish(entry: Entry, hold: Hold, now: float) -> None:
    """``entry`` is to be kept so, on whatever tier. Its wish stays the same object where ``hold``
    adds nothing."""
    old = entry.wish if entry.wish is not None and entry.wish.until > now else None
    if old is not None and old.covers(hold):
        return
    entry.wish = old.merged(hold) if old is not None else hold
    if entry.fate is not None and not entry.fate.admitted:
        entry.fate = None  # judged before: again when its turn comes
