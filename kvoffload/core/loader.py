"""Finding and loading: lookups, leases and prefetches over the DRAM pool and the NVMe tier."""

from __future__ import annotations

from collections.abc import Sequence
from operator import attrgetter
from typing import NamedTuple

from kvoffload.core.hashchain import Chain
from kvoffload.core.index import Entry
from kvoffload.core.layout import boundary_tokens
from kvoffload.core.lease import Lease, Leases, Prefetches
from kvoffload.core.lookup import BATCH, Search, primary, span
from kvoffload.core.nvme import NvmeTier
from kvoffload.core.pool import Pool
from kvoffload.core.stats import Counters
from kvoffload.types import CacheLayout, ChunkKey, GroupKind, SlotState, Tier

Place = tuple[int, int]
"""(group, chunk)."""
PLACE = attrgetter("group", "chunk")
"""Sorts entries so."""


class Near(NamedTuple):
    """A hit in DRAM: its boundary (where it began, for none), and what a load of it moves."""

    end: int
    chunks: int
    nbytes: int


class Loader:
    """The load half of the Manager. Not thread safe: the Manager's lock guards it."""

    def __init__(
        self,
        layout: CacheLayout,
        pool: Pool,
        nvme: NvmeTier | None,
        prefetches: Prefetches,
        counters: Counters,
    ) -> None:
        self.leases = Leases()
        self._layout = layout
        one = len(layout.groups) == 1 and layout.groups[0].kind is GroupKind.FULL
        self._only = layout.groups[0] if one else None
        self._grid = boundary_tokens(layout)
        self._pool = pool
        self._nvme = nvme
        self._prefetches = prefetches
        self._counters = counters

    def search(self, chain: Chain, start: int, limit: int, now: float) -> tuple[Search, int]:
        """The longest servable boundary in (start, limit], and the search that found it."""
        search = Search(self._layout, chain, lambda keys: self._probe(keys, now))
        return search, search.longest(start, limit)

    def in_dram(self, chain: Chain, start: int, limit: int, now: float) -> Near | None:
        """What a search would find where all of the hit lies in DRAM, which is most of the time.

        None where only a search can tell: a chunk is being filled or lies on NVMe, or there are
        several groups.
        """
        group = self._only
        if group is None:
            return None
        keys, size, ready = chain.keys(group.group), group.chunk_tokens, SlotState.READY
        end = min(limit, len(keys) * size)
        end -= end % self._grid
        at, stop = start // size, -(-end // size)
        missing: Entry | None = None
        while at < stop:
            low = at
            for entry in self._pool.index.find(keys[low : min(low + BATCH, stop)]):
                if entry is None or entry.state is not ready:
                    missing, stop = entry, at
                    break
                at += 1
        if missing is not None:
            return None
        if stop * size < end:  # in DRAM there is no more
            if self._nvme is not None and self._nvme.held([keys[stop]], now)[0]:
                return None
            end = stop * size
            end -= end % self._grid
        chunks = max(0, -(-end // size) - start // size)
        return Near(max(end, start), chunks, chunks * group.slot_bytes)

    def ahead(self, chain: Chain, start: int, end: int) -> int:
        """Bytes being read from NVMe for others than a load of [start, end): they go first."""
        if self._nvme is None or not self._nvme.reads.inflight:
            return 0
        get = self._pool.index.get
        mine = 0
        for group, chunk in self.wanted(chain, start, end) or ():
            entry = get(chain.key(group, chunk))
            if entry is not None and entry.io and entry.state is SlotState.FILLING:
                mine += entry.nbytes
        queued = sum([job.nbytes for job in self._nvme.reads.wanted()])
        return max(0, queued - mine)

    def standstill_s(self) -> float:
        """For how long reads from NVMe have been under way without any getting on."""
        return self._nvme.standstill_s() if self._nvme is not None else 0.0

    def _probe(self, keys: Sequence[ChunkKey], now: float) -> list[Tier | None]:
        # The scheduler pays for this per chunk of every prompt, and an enum's member costs as much
        # to look up as its key.
        ready, dram, nvme = SlotState.READY, Tier.DRAM, Tier.NVME
        entries = self._pool.index.find(keys)
        absent = [key for key, entry in zip(keys, entries, strict=True) if entry is None]
        held = iter(bytes(len(absent)) if self._nvme is None else self._nvme.held(absent, now))
        usable = self._nvme is not None and self._nvme.usable(now)
        out: list[Tier | None] = []
        for entry in entries:
            if entry is None:
                out.append(nvme if next(held) else None)
            elif entry.state is ready:
                out.append(dram)
            else:
                out.append(nvme if entry.source is nvme and usable else None)
        return out

    def wanted(self, chain: Chain, start: int, end: int) -> list[Place] | None:
        """The chunks that a load of [start, end) needs, ascending; None: there are none, or not all
        have a key."""
        spans = [(g.group, span(g, start, end)) for g in self._layout.groups]
        if any(chunks.stop > chain.n_chunks(group) for group, chunks in spans):
            return None
        return [(group, i) for group, chunks in spans for i in chunks] or None

    def gather(
        self, chain: Chain, wanted: Sequence[Place], now: float
    ) -> tuple[list[Entry], list[Place]] | None:
        """Pin what is resident; also returns what has to come from NVMe. None: a store fills it.

        What is being read is asked about first: a tick may not have seen yet that it failed, and
        whoever were given it would wait, and fail, in vain.
        """
        get = self._pool.index.get
        ready, nvme = SlotState.READY, Tier.NVME
        keys = [chain.keys(g.group) for g in self._layout.groups]
        here: list[Entry] = []
        missing: list[Place] = []
        for group, chunk in wanted:
            entry = get(keys[group][chunk])
            if entry is None:
                missing.append((group, chunk))
            elif entry.state is ready or entry.source is nvme:
                here.append(entry)
            else:
                return None
        if self._pool.settle_failed([e for e in here if e.state is not ready], now):
            missing += [PLACE(e) for e in here if e.dropped]
            missing.sort()
            here = [e for e in here if not e.dropped]
        self._pool.index.pin_all(here)
        return here, missing

    def unpin(self, entries: Sequence[Entry], now: float) -> None:
        """Undo one pin of each."""
        self._pool.unpin_all(entries, now)

    def acquire(self, owner: str, chain: Chain, start: int, end: int, now: float) -> Lease | None:
        """See Manager.acquire."""
        entries = self._hold_ready(chain, start, end)
        if entries is None:
            wanted = self.wanted(chain, start, end)
            if wanted is None:
                self._counters.lease_lost += 1
                return None
            entries = self.hold(chain, wanted, now)
        if self._nvme is not None:
            self._nvme.idle.active(now)
        return self._lease(owner, entries, start, end) if entries is not None else None

    def _hold_ready(self, chain: Chain, start: int, end: int) -> list[Entry] | None:
        """Pin the chunks of [start, end) where all are READY in DRAM; None where that is not so."""
        group = self._only
        if group is None:
            return None
        chunks, keys = span(group, start, end), chain.keys(group.group)
        if not chunks or chunks.stop > len(keys):
            return None
        ready = SlotState.READY
        found = self._pool.index.find(keys[chunks.start : chunks.stop])
        entries = [e for e in found if e is not None and e.state is ready]
        if len(entries) < len(found):
            return None
        self._pool.index.pin_all(entries)
        return entries

    def hold(self, chain: Chain, wanted: Sequence[Place], now: float) -> list[Entry] | None:
        """Pin all of these chunks, reading up what is on NVMe; None, and nothing pinned, when one
        has gone or there is no room. In the order of their places."""
        got = self.gather(chain, wanted, now)
        if got is None:
            self._counters.lease_lost += 1
            return None
        pinned, missing = got
        if not missing:
            return pinned
        fresh = self._read_up(chain, missing, now)
        if fresh is None:
            self.unpin(pinned, now)
            return None
        return sorted(pinned + fresh, key=PLACE)

    def _read_up(self, chain: Chain, missing: Sequence[Place], now: float) -> list[Entry] | None:
        """Pinned slots with their reads under way, for all or for none."""
        c = self._counters
        keys = [chain.key(g, i) for g, i in missing]
        if self._nvme is None or not all(self._nvme.held(keys, now)):
            c.lease_lost += 1
            return None
        fresh: list[Entry] = []
        for group, chunk in missing:
            entry = self._pool.take(chain, group, chunk, Tier.NVME, now)
            if entry is None:
                self.unpin(fresh, now)
                for taken in reversed(fresh):
                    self._pool.undo(taken, now)
                c.lease_no_room += 1
                return None
            self._pool.index.pin(entry)
            fresh.append(entry)
        try:
            ok = self._nvme.read_up(fresh, now)
        except Exception:  # nobody would ever fill them
            self.unpin(fresh, now)
            for taken in reversed(fresh):
                self._pool.undo(taken, now)
            raise
        if not ok:
            self.unpin(fresh, now)  # what was refused is dropped; the rest is read for the next
            c.lease_lost += 1
            return None
        return fresh

    def _lease(self, owner: str, entries: list[Entry], start: int, end: int) -> Lease:
        dram, nvme, ready = Tier.DRAM, Tier.NVME, SlotState.READY
        tiers = [dram if e.state is ready else nvme for e in entries]
        main = primary(self._layout)
        size = main.chunk_tokens
        below = 0  # tokens that still have to come up from NVMe
        c = self._counters
        for e in entries:
            if e.owner is not None:
                self._prefetches.settle(e)
        slow = [e for e, tier in zip(entries, tiers, strict=True) if tier is nvme]
        slow_bytes = sum([e.nbytes for e in slow])
        c.load_chunks_nvme += len(slow)
        c.load_bytes_nvme += slow_bytes
        c.load_chunks_dram += len(entries) - len(slow)
        c.load_bytes_dram += sum([e.nbytes for e in entries]) - slow_bytes
        for e in slow:
            if e.group == main.group:
                below += min(end, (e.chunk + 1) * size) - max(start, e.chunk * size)
        tokens = {Tier.NVME: below, Tier.DRAM: end - start - below}
        self.used(entries)
        c.leases += 1
        return self.leases.open(owner, entries, tiers, {t: n for t, n in tokens.items() if n})

    def used(self, entries: Sequence[Entry]) -> None:
        """Chunks of one prompt, in the order of their places, were used: they go last."""
        for g in self._layout.groups:
            mine = entries if self._only else [e for e in entries if e.group == g.group]
            if mine:
                self._pool.index.touch(mine[0].cls, [e.key for e in mine])

    def touch(self, chain: Chain, start: int, end: int) -> None:
        """A load of [start, end) will come: what it needs and DRAM holds goes last."""
        for g in self._layout.groups:
            chunks = span(g, start, end)
            keys = chain.keys(g.group)[chunks.start : chunks.stop]
            here = [key for key in keys if key in self._pool.index]
            if here:
                self._pool.index.touch(self._pool.class_of(g.group), here)

    def release(self, lease_id: int, now: float) -> None:
        """See Manager.release."""
        self.unpin(self.leases.close(lease_id), now)
