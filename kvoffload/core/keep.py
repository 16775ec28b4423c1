"""What hints keep in DRAM or let go of: retention with priorities, pins, ended sessions.

A kept chunk is not offered to the eviction policy at all, so this holds with every policy. Two
rules make the bounds exact. A resident chunk keeps its resident ancestors from eviction, so what
keeps a chunk keeps them too, at least as strongly. And what ends, ends leaf first.

Retained: at most half of the arena. Beyond it the weakest goes: lowest priority, then the earliest
end. The same happens where nothing else could make room. Pinned: at most a quarter of the arena, by
the prompts' chunks, resident or not; a pin that does not fit is refused.
"""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from itertools import chain as concat
from threading import Lock
from typing import NamedTuple

from kvoffload.core.hashchain import Chain
from kvoffload.core.hints import MAX_PRIORITY
from kvoffload.core.index import Entry, Kept
from kvoffload.core.layout import boundary_tokens
from kvoffload.core.lookup import primary, span
from kvoffload.core.nvme import NvmeTier
from kvoffload.core.pool import Pool
from kvoffload.core.stats import Counters
from kvoffload.types import CacheLayout, ChunkKey, GroupKind

_TRIES = 64
"""Candidates looked at when room must come from what is retained."""


class Hold(NamedTuple):
    """How strongly and until when (clock) a chunk is retained. Merged by element."""

    level: int
    until: float


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
        self.max_pinned = data_bytes // 4
        self.nbytes: dict[Kept, int] = dict.fromkeys(Kept, 0)
        """Bytes of resident chunks that are retained, or pinned (and not counted as retained)."""
        self._layout = layout
        self._pool = pool
        self._nvme = nvme
        self._counters = counters
        self._lock = lock
        self._clock = clock
        self._holds: dict[ChunkKey, Hold] = {}
        # Per level, weakest first: (until, -place in the chain, key). Stale rows are skipped.
        self._queues: list[list[tuple[float, int, ChunkKey]]] = [
            [] for _ in range(MAX_PRIORITY + 1)
        ]
        self._pins: dict[ChunkKey, list[tuple[ChunkKey, int]]] = {}  # by tip: (key, bytes)
        self._pinned: Counter[ChunkKey] = Counter()
        self._reserved = 0  # bytes of the pinned keys
        pool.on_add = self.added
        pool.make_room = self.make_room

    # -- what hints ask for

    def retain(self, chain: Chain, end: int, seconds: float, level: int = 0) -> None:
        """The resident chunks of [0, end) were used: keep them so long, by priority ``level``."""
        with self._lock:
            hold = Hold(level, self._clock() + seconds)
            get = self._pool.index.get
            for g in self._layout.groups:
                served = g.kind is not GroupKind.NONE
                keys = chain.keys(g.group)[: end // g.chunk_tokens] if served else ()
                for key in reversed(keys):
                    entry = get(key)
                    if entry is not None:
                        self._hold(entry, hold)
            self._cut()

    def pin(self, chain: Chain, end: int) -> bool:
        """Keep what a hit on [0, end) needs, also what of it comes later. False: it does not fit.

        Idempotent. Ends with ``unpin`` of the same prompt, or with ``reset``.
        """
        with self._lock:
            tip, wanted = self._prompt(chain, end)
            if tip is None or tip in self._pins:
                return tip is not None
            more = sum(size for key, size in wanted if key not in self._pinned)
            if self._reserved + more > self.max_pinned:
                self._counters.hint_pin_refused += 1
                return False
            self._reserved += more
            self._pins[tip] = wanted
            self._pinned.update(key for key, _ in wanted)
            self._settle_all(key for key, _ in wanted)
            return True

    def unpin(self, chain: Chain, end: int) -> bool:
        """End the pin of this prompt. False when there is none."""
        with self._lock:
            tip, _ = self._prompt(chain, end)
            if tip is None or tip not in self._pins:
                return False
            wanted = self._pins.pop(tip)
            for key, size in wanted:
                self._pinned[key] -= 1
                if not self._pinned[key]:
                    del self._pinned[key]
                    self._reserved -= size
            self._settle_all(key for key, _ in reversed(wanted))
            self._cut()
            return True

    def release(self, chain: Chain, start: int, end: int) -> int:
        """A session is over: the chunks in [start, end) that nobody else built on go first.

        They lose their retention, are not written to NVMe and are deleted from it. Pinned chunks,
        and those with resident children of others, stay as they are, with all before them. Returns
        the chunks let go of in DRAM.
        """
        with self._lock:
            gone: list[Entry] = []
            names: list[ChunkKey] = []
            stop = start
            groups = sorted(self._layout.groups, key=lambda g: g.kind is not GroupKind.FULL)
            for g in groups:
                if g.kind is not GroupKind.NONE:
                    keys = chain.keys(g.group)[: end // g.chunk_tokens]
                    first = -(-stop // g.chunk_tokens)
                    mine = self._unshared(keys[first:])
                    if g.kind is GroupKind.FULL and len(mine) < len(keys) - first:
                        stop = max(stop, (len(keys) - len(mine)) * g.chunk_tokens)
                    names += mine
            for key in names:
                entry = self._pool.index.get(key)
                if entry is not None:
                    self._holds.pop(key, None)
                    self._settle(entry)
                    gone.append(entry)
            self._pool.index.let_go(gone)
            self._forget_below(names)
            self._counters.hint_released += len(gone)
            return len(gone)

    def _unshared(self, keys: Sequence[ChunkKey]) -> list[ChunkKey]:
        """From the leaf on: those that are not pinned and have no other resident children, ended
        sessions' excepted."""
        mine: list[ChunkKey] = []
        for key in reversed(keys):
            others = self._pool.index.children(key).difference(mine[-1:])
            if key in self._pinned or any(not self._retired(k) for k in others):
                break
            mine.append(key)
        return mine

    def _retired(self, key: ChunkKey) -> bool:
        entry = self._pool.index.get(key)
        return entry is not None and entry.retired

    def _forget_below(self, keys: list[ChunkKey]) -> None:
        if self._nvme is None or not keys:
            return
        get = self._pool.index.get
        reading = {k for k in keys if (e := get(k)) is not None and (e.pins or e.io)}
        self._counters.hint_deleted += self._nvme.delete([k for k in keys if k not in reading])

    def _prompt(self, chain: Chain, end: int) -> tuple[ChunkKey | None, list[tuple[ChunkKey, int]]]:
        """(name, chunks with bytes) of the longest boundary in [0, end]; no name: no chunk."""
        groups = self._layout.groups
        if any(g.kind is GroupKind.NONE for g in groups):
            return None, []
        grid = boundary_tokens(self._layout)
        held = min(chain.n_chunks(g.group) * g.chunk_tokens for g in groups)
        end = min(end, held) // grid * grid
        # The same prompt alone is served one boundary short where a window is involved.
        places = dict.fromkeys(
            (g, i) for g in groups for to in (end, end - grid) for i in span(g, 0, to)
        )
        wanted = [(chain.key(g.group, i), g.slot_bytes) for g, i in places]
        main = primary(self._layout)
        return (chain.key(main.group, end // main.chunk_tokens - 1) if wanted else None), wanted

    # -- retention

    def _hold(self, entry: Entry, hold: Hold) -> None:
        """Retain ``entry`` and its resident ancestors at least so strongly."""
        index = self._pool.index
        at: Entry | None = entry
        while at is not None:
            old = self._holds.get(at.key, hold)
            new = Hold(max(old.level, hold.level), max(old.until, hold.until))
            if self._holds.get(at.key) == new:
                break  # so are its ancestors
            self._holds[at.key] = new
            heapq.heappush(self._queues[new.level], (new.until, -at.chunk, at.key))
            self._settle(at)
            at = index.get(at.parent) if at.parent is not None else None
        self._compact()

    def _compact(self) -> None:
        for level, queue in enumerate(self._queues):
            if len(queue) > 2 * len(self._holds) + 64:
                queue[:] = [row for row in queue if self._live(level, row)]
                queue[:] = dict.fromkeys(queue)
                heapq.heapify(queue)

    def _live(self, level: int, row: tuple[float, int, ChunkKey]) -> bool:
        return self._holds.get(row[2]) == (level, row[0])

    def _unhold(self, key: ChunkKey) -> None:
        del self._holds[key]
        entry = self._pool.index.get(key)
        if entry is not None:
            self._settle(entry)

    def _settle_all(self, keys: Iterable[ChunkKey]) -> None:
        for key in keys:
            entry = self._pool.index.get(key)
            if entry is not None:
                self._settle(entry)

    def _settle(self, entry: Entry) -> None:
        """Bring an entry's mark up to what is known of its key."""
        kept = Kept.NO
        if entry.key in self._pinned:
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
        for level, queue in enumerate(self._queues):
            while queue and self.nbytes[Kept.RETAINED] > self.max_retained:
                row = heapq.heappop(queue)
                if self._live(level, row):
                    self._unhold(row[2])
                    self._counters.hint_retain_cut += 1

    # -- under the lock, by Manager and Pool

    def added(self, entry: Entry) -> None:
        """``entry`` became resident: its pin holds again, its retained children keep it too."""
        if not self._holds and not self._pinned:
            return  # the common case: nobody hints
        for key in self._pool.index.children(entry.key):
            hold = self._holds.get(key)
            if hold is not None:
                self._hold(entry, hold)
        self._settle(entry)
        self._cut()

    def dropped(self, entry: Entry) -> None:
        """``entry`` is about to leave."""
        self._holds.pop(entry.key, None)
        self.nbytes[entry.kept] -= entry.nbytes if entry.kept else 0
        entry.kept = Kept.NO

    def expire(self, now: float) -> None:
        """Retention that has ended."""
        for level, queue in enumerate(self._queues):
            while queue and queue[0][0] <= now:
                row = heapq.heappop(queue)
                if self._live(level, row):
                    self._unhold(row[2])

    def make_room(self) -> bool:
        """Nothing else may be evicted: give up the weakest retention that stands in the way alone.

        False when there is none near the front. Pins stay.
        """
        index = self._pool.index
        tries = _TRIES
        for level, queue in enumerate(self._queues):
            passed: list[tuple[float, int, ChunkKey]] = []
            found: ChunkKey | None = None
            while queue and tries and found is None:
                row = heapq.heappop(queue)
                if not self._live(level, row):
                    continue
                tries -= 1
                entry = index.get(row[2])
                alone = entry is not None and entry.unused() and not index.children(entry.key)
                if alone and entry is not None and entry.kept is Kept.RETAINED:
                    found = entry.key
                else:
                    passed.append(row)
            for row in passed:
                heapq.heappush(queue, row)
            if found is not None:
                self._unhold(found)
                self._counters.hint_retain_cut += 1
                return True
        return False

    def reset(self) -> None:
        """Keys of before mean nothing any more: no pins. Entries are dropped one by one."""
        keys = list(self._pinned)
        self._pins.clear()
        self._pinned.clear()
        self._reserved = 0
        self._settle_all(keys)
        self._cut()

    def check(self) -> None:
        """Raise AssertionError naming the first broken invariant. Under the lock."""
        index = self._pool.index
        sums: dict[Kept, int] = dict.fromkeys(Kept, 0)
        for entry in index:
            want = Kept.NO
            if entry.key in self._pinned:
                want = Kept.PINNED
            elif entry.key in self._holds:
                want = Kept.RETAINED
            assert entry.kept is want, f"kept of {entry.key.hex()}"
            sums[want] += entry.nbytes if want else 0
            hold = self._holds.get(entry.key)
            parent = index.get(entry.parent) if entry.parent is not None else None
            if parent is not None and want:
                assert parent.kept, "a kept chunk's parent is not kept"
            if parent is not None and hold is not None:
                above = self._holds.get(parent.key, Hold(-1, 0.0))
                assert above.level >= hold.level and above.until >= hold.until, "weaker parent"
        assert sums == self.nbytes, f"kept bytes {self.nbytes}, found {sums}"
        assert sums[Kept.RETAINED] <= self.max_retained, "more is retained than may be"
        assert sums[Kept.PINNED] <= self._reserved <= self.max_pinned, "more is pinned than may be"
        assert all(index.get(key) is not None for key in self._holds), "a hold without a chunk"
        rows = {(lv, row[2], row[0]) for lv, queue in enumerate(self._queues) for row in queue}
        live = {(h.level, key, h.until) for key, h in self._holds.items()}
        assert live <= rows, "a hold that cannot end"
        sizes = dict(concat.from_iterable(self._pins.values()))
        assert sizes.keys() == self._pinned.keys(), "pins"
        assert sum(sizes.values()) == self._reserved, "reserved bytes"
