"""The shadow check's bookkeeping: held chunks beside twins computed anew from the same tokens.

A sampled request is offered nothing, so that the engine computes its prefix. Some of the chunks
that it would have loaded stay pinned; when the request completes one of them, its KV is stored once
more, into a twin: a slot under a key that nobody looks up, that never goes to NVMe and is dropped
after the comparison.

    begin -> held --begin_twins--> twin filling --both READY--> due -> settled
               |                        |
               +-- request over, HBM had it, no room, reset, slot failed, 60 s --> given up
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from itertools import count
from threading import Lock
from typing import NamedTuple

from kvoffload.core.hashchain import KEY_BYTES, Chain
from kvoffload.core.index import ChunkId, Entry
from kvoffload.core.lease import StoreItem
from kvoffload.core.loader import Loader, Place
from kvoffload.core.pool import Pool
from kvoffload.core.stats import Counters
from kvoffload.types import CacheLayout, ChunkKey, GroupKind, SlotRef, SlotState, Tier

MAX_CHUNKS = 8
"""Chunks of one hit that are compared."""
GIVE_UP_S = 60.0
"""A sample pins its chunks for at most this long."""
SHARE = 8
"""Samples hold at most one part in this many of the arena, twins included."""


class Check(NamedTuple):
    """Two READY pinned slots to be compared; give the answer to ``settle``."""

    id: int
    group: int
    chunk: int
    start: int  # tokens [start, end) of the prompt
    end: int
    nbytes: int  # of either slot, all shards
    tier: Tier  # who filled the held slot
    key: ChunkKey
    ref: SlotRef
    twin_key: ChunkKey
    twin_ref: SlotRef
    stamp: int  # as given to ``begin``


@dataclass(slots=True, eq=False)
class _Pair:
    owner: str
    entry: Entry
    start: int
    end: int
    stamp: int
    until: float
    leases: list[int]
    twin: Entry | None = None
    out: bool = False  # handed out by ``due``: somebody reads the slots
    void: bool = False  # the answer does not count any more

    def gone(self) -> bool:
        return self.entry.dropped or (self.twin is not None and self.twin.dropped)


def twin_key(key: ChunkKey) -> ChunkKey:
    """The key of a chunk's twin."""
    return ChunkKey(hashlib.sha256(key + b"verify").digest()[:KEY_BYTES])


class Shadow:
    """All samples of a Manager, which owns the lock.

    Public methods down to ``settle`` take the lock: any thread, O(samples), no I/O. The others are
    called by the Manager under it.
    """

    def __init__(
        self,
        layout: CacheLayout,
        pool: Pool,
        loader: Loader,
        counters: Counters,
        data_bytes: int,
        lock: Lock,
        clock: Callable[[], float],
    ) -> None:
        self.enabled = True
        """False: nothing new is sampled or handed out. Set by the Manager."""
        self._layout = layout
        self._pool = pool
        self._loader = loader
        self._counters = counters
        self._room = data_bytes // SHARE
        self._lock = lock
        self._clock = clock
        self._ids = count(1)
        self._pairs: dict[int, _Pair] = {}

    def begin(self, owner: str, chain: Chain, start: int, end: int, stamp: int = 0) -> int:
        """Pin some chunks of the hit [start, end) to be compared with what ``owner`` computes.

        Returns their number, at most 8, spread evenly; 0 when there is no room for samples.
        ``stamp`` comes back in the checks.
        """
        with self._lock:
            if not self.enabled:
                return 0
            now = self._clock()
            wanted = self._spread(chain, start, end)
            entries = self._loader.hold(chain, wanted, now) if wanted else None
            for entry in entries or ():
                size = self._layout.groups[entry.group].chunk_tokens
                lease = self._loader.leases.open(owner, [entry], [entry.source], {})
                at = entry.chunk * size
                pair = _Pair(owner, entry, at, at + size, stamp, now + GIVE_UP_S, [lease.id])
                self._pairs[next(self._ids)] = pair
                self._room -= 2 * entry.nbytes
                self._counters.verify_sampled += 1
            return len(entries or ())

    def computes_from(self, owner: str, start: int) -> None:
        """``owner`` found [0, start) in HBM after all: its sample shrinks to what it computes."""
        with self._lock:
            now = self._clock()
            for at, pair in self._of(owner):
                if pair.twin is None and pair.start < start:
                    self._give_up(at, pair, now)

    def begin_twins(self, owner: str, end: int) -> list[StoreItem]:
        """As ``Manager.begin_store``: slots for the sampled chunks that are complete at ``end``
        and have none yet."""
        out: list[StoreItem] = []
        with self._lock:
            now = self._clock()
            for at, pair in self._of(owner) if self.enabled else ():
                if pair.twin is not None or pair.end > end:
                    continue
                twin = self._take_twin(pair.entry, now)
                if twin is None:
                    self._give_up(at, pair, now)
                    continue
                pair.leases.append(self._loader.leases.open(owner, [twin], [Tier.DRAM], {}).id)
                pair.twin = twin
                out.append(StoreItem(twin.group, twin.chunk, twin.key, twin.ref))
        return out

    def _take_twin(self, held: Entry, now: float) -> Entry | None:
        """A FILLING pinned slot for what ``held`` is compared with; None: gone, or no room."""
        if held.dropped:
            return None
        what = ChunkId(twin_key(held.key), held.group, held.chunk, None, held.namespace_id)
        if what.key in self._pool.index:  # two samples may share a chunk
            return None
        twin = self._pool.take_as(what, Tier.DRAM, now)
        if twin is not None:
            twin.twin = True
            self._pool.index.pin(twin)
        return twin

    def request_over(self, owner: str) -> None:
        """``owner`` computes no more."""
        with self._lock:
            now = self._clock()
            for at, pair in self._of(owner):
                if pair.twin is None:
                    self._give_up(at, pair, now)

    def due(self) -> Check | None:
        """Two slots to be compared now; they stay as they are until ``settle``."""
        with self._lock:
            if not self.enabled:
                return None
            now = self._clock()
            for at, pair in list(self._pairs.items()):
                e, twin = pair.entry, pair.twin
                if pair.out:
                    continue
                if pair.gone() or now > pair.until:
                    self._give_up(at, pair, now)
                elif twin is not None and e.state is twin.state is SlotState.READY:
                    pair.out = True
                    return Check(
                        at, e.group, e.chunk, pair.start, pair.end, e.nbytes, e.source,
                        e.key, e.ref, twin.key, twin.ref, pair.stamp,
                    )  # fmt: skip
            return None

    def settle(self, check: Check, same: bool | None) -> bool:
        """The comparison's answer, None for none. False when it came too late to count."""
        with self._lock:
            pair = self._pairs[check.id]
            counts = same is not None and not pair.void and not pair.gone()
            if counts:
                self._counters.verify_ok += bool(same)
                self._counters.verify_mismatch += not same
            else:
                self._counters.verify_given_up += 1
            self._end(check.id, pair, self._clock())
            return counts

    # -- under the lock, by Manager

    def clear(self, now: float) -> None:
        """Give up all samples; slots that are being compared stay until ``settle``."""
        for at, pair in list(self._pairs.items()):
            pair.void = True
            if not pair.out:
                self._give_up(at, pair, now)

    def _spread(self, chain: Chain, start: int, end: int) -> list[Place]:
        places: list[tuple[int, Place]] = []
        for g in self._layout.groups:
            if g.kind is GroupKind.FULL:
                stop = min(end // g.chunk_tokens, chain.n_chunks(g.group))
                chunks = range(-(-start // g.chunk_tokens), stop)
                places += [(i * g.chunk_tokens, (g.group, i)) for i in chunks]
        places.sort()
        most = max((g.slot_bytes for g in self._layout.groups), default=1)
        n = min(len(places), MAX_CHUNKS, max(0, self._room) // (2 * most))
        return [places[(i + 1) * len(places) // n - 1][1] for i in range(n)]

    def _of(self, owner: str) -> list[tuple[int, _Pair]]:
        return [(at, p) for at, p in self._pairs.items() if p.owner == owner]

    def _give_up(self, at: int, pair: _Pair, now: float) -> None:
        self._counters.verify_given_up += 1
        self._end(at, pair, now)

    def _end(self, at: int, pair: _Pair, now: float) -> None:
        del self._pairs[at]
        self._room += 2 * pair.entry.nbytes
        if pair.twin is not None:
            self._pool.drop(pair.twin, now)
        for lease in pair.leases:
            self._loader.release(lease, now)

    def check(self) -> None:
        """Raise AssertionError naming the first broken invariant."""
        c = self._counters
        ended = c.verify_ok + c.verify_mismatch + c.verify_given_up
        assert c.verify_sampled == ended + len(self._pairs), "a sample was lost"
        twins = [p.twin for p in self._pairs.values() if p.twin is not None]
        assert len({id(t) for t in twins}) == len(twins), "a twin is shared"
        resident = [e for e in self._pool.index if e.twin]
        assert {id(e) for e in resident} <= {id(t) for t in twins}, "a twin outlives its sample"
        assert not any(e.dirty for e in resident), "a twin would be written to NVMe"
        assert all(p.entry.pins for p in self._pairs.values()), "a sampled chunk is not pinned"
