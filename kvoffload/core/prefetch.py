"""Moving chunks from NVMe to DRAM ahead of need, a bounded number at a time.

A slot takes some 10 us, under the Manager's lock: the chunks of a long prompt at once would hold up
the engine's step for up to a second. The first go when it arrives, the others in later ticks.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import islice

from kvoffload.core.hashchain import Chain
from kvoffload.core.index import ChunkId, Entry
from kvoffload.core.lease import Prefetches
from kvoffload.core.loader import PLACE, Loader, Place
from kvoffload.core.nvme import NvmeTier
from kvoffload.core.pool import Pool
from kvoffload.core.stats import Counters
from kvoffload.types import CacheLayout, ChunkKey, GroupKind, SlotState, Tier

STEP_CHUNKS = 512
"""Chunks set moving in one go: 3 to 6 ms. A tick every 50 ms, 16 tokens of 0.5 MiB: 5 GB/s."""
STEP_PLACES = 8192
"""Chunks passed over in one go because others have moved them: 1 ms."""
WISHES_KEPT = 64
"""Prompts wished for whose requests are over before all has moved; the oldest are given up."""
_PROBER = ""  # no request: owner of a chunk that is only read to see whether that works


@dataclass(slots=True)
class _Rest:
    """What is still to be moved of one prompt, in this order. The keys are a copy: a chain belongs
    to the scheduler's thread."""

    namespace_id: int
    keys: dict[int, list[ChunkKey]]  # by group, from the root
    places: list[Place]
    at: int  # places below are done
    wished: bool  # by a hint: also what its request itself need not load
    budget: int  # slot bytes it may still move once its request is over


class Prefetcher:
    """Not thread safe: the Manager's lock guards it."""

    def __init__(
        self,
        layout: CacheLayout,
        pool: Pool,
        nvme: NvmeTier | None,
        prefetches: Prefetches,
        counters: Counters,
        loader: Loader,
    ) -> None:
        self._full = [g.kind is GroupKind.FULL for g in layout.groups]
        self._slot_bytes = [g.slot_bytes for g in layout.groups]
        self._pool = pool
        self._nvme = nvme
        self._prefetches = prefetches
        self._counters = counters
        self._loader = loader
        self._rests: dict[str, _Rest] = {}  # by owner, first come first
        self._wishes: deque[_Rest] = deque(maxlen=WISHES_KEPT)  # of requests that are over

    def prefetch(
        self,
        owner: str,
        chain: Chain,
        start: int,
        end: int,
        now: float,
        most_bytes: int | None = None,
        wished: bool = False,
    ) -> int:
        """Set a servable [start, end) moving, from the root: STEP_CHUNKS now, the rest in later
        calls of ``go_on``; or no more than ``most_bytes`` of it, and nothing later.

        Returns the chunks set moving now.
        """
        self._rests.pop(owner, None)
        wanted = self._loader.wanted(chain, start, end)
        got = self._loader.gather(chain, wanted, now) if wanted is not None else None
        if got is None or self._nvme is None:
            self._loader.unpin(got[0] if got is not None else [], now)
            return 0
        pinned, missing = got
        once = most_bytes is not None
        if self._nvme.probe_due(now):
            missing, once = missing[:1], True
        keys = {g: chain.keys(g) for g in {g for g, _ in missing}}
        first = self._ids(keys, missing[:STEP_CHUNKS], chain.namespace_id)
        room = self._prefetches.room()
        budget = room if most_bytes is None else min(room, most_bytes)
        moving, more = self._move(owner, pinned, first, now, budget)
        if more and not once and len(first) < len(missing):
            copies = {g: list(keys[g]) for g in keys}
            self._rests[owner] = _Rest(
                chain.namespace_id, copies, missing, len(first), wished, self._prefetches.max_bytes
            )
        return moving

    def _ids(
        self, keys: Mapping[int, Sequence[ChunkKey]], places: Sequence[Place], namespace_id: int
    ) -> list[ChunkId]:
        out: list[ChunkId] = []
        for group, chunk in places:
            mine = keys[group]
            parent = mine[chunk - 1] if chunk and self._full[group] else None
            out.append(ChunkId(mine[chunk], group, chunk, parent, namespace_id))
        return out

    def go_on(self, now: float) -> None:
        """The next STEP_CHUNKS of what is still to be moved. A prompt of which something has gone
        meanwhile, or that finds no room or budget, is not gone on with; none is while the tier is
        not in use, or only to be tried: with one chunk, not with these."""
        nvme = self._nvme
        if nvme is None or not nvme.usable(now) or nvme.probe_due(now):
            self.clear()
            return
        places = STEP_PLACES
        while places > 0 and (self._rests or self._wishes):
            owner = next(iter(self._rests), None)
            rest = self._wishes[0] if owner is None else self._rests[owner]
            before, more, moved = rest.at, False, 0
            try:
                moved, more = self._step(nvme, owner, rest, places, now)
            finally:
                if not more and owner is not None:
                    del self._rests[owner]
                elif not more:
                    self._wishes.popleft()
            if moved:
                return
            places -= rest.at - before  # others had moved it: the next one's turn

    def _step(
        self, nvme: NvmeTier, owner: str | None, rest: _Rest, most: int, now: float
    ) -> tuple[int, bool]:
        """The next STEP_CHUNKS, from the first that DRAM does not have among ``most``. The chunks
        set moving, and False when they were the last of it."""
        begin, rest.at = rest.at, self._first_absent(rest, most)
        if rest.at == min(begin + most, len(rest.places)):
            return 0, rest.at < len(rest.places)
        places = rest.places[rest.at : rest.at + STEP_CHUNKS]
        rest.at += len(places)
        step = self._ids(rest.keys, places, rest.namespace_id)
        found = self._pool.index.find([what.key for what in step])
        here = [e for e in found if e is not None]  # others moved or store them
        here = [e for e in here if e.state is SlotState.READY or e.source is Tier.NVME]
        absent = [what for what, e in zip(step, found, strict=True) if e is None]
        held = nvme.held([what.key for what in absent], now)
        whole = all(held)
        if not whole:
            absent = absent[: list(map(bool, held)).index(False)]
        self._pool.index.pin_all(here)
        budget = self._prefetches.room() if owner is not None else rest.budget
        moved, room = self._move(owner, here, absent, now, budget)
        if owner is None:
            rest.budget -= sum(self._slot_bytes[what.group] for what in absent[:moved])
        return moved, room and whole and rest.at < len(rest.places)

    def _first_absent(self, rest: _Rest, most: int) -> int:
        """Where the first is, of ``most`` places to be moved, that others have not moved; the end
        of these where there is none."""
        index = self._pool.index
        for at, (group, chunk) in enumerate(islice(rest.places, rest.at, rest.at + most), rest.at):
            if rest.keys[group][chunk] not in index:
                return at
        return min(rest.at + most, len(rest.places))

    def _move(
        self,
        owner: str | None,
        pinned: Sequence[Entry],
        missing: Sequence[ChunkId],
        now: float,
        left: int,
    ) -> tuple[int, bool]:
        """Read ``missing`` up, ``left`` bytes of it at most. ``pinned``, what DRAM has of the
        prompt around it, stays until then and is unpinned. The chunks set moving, and whether there
        was room for all."""
        fresh: list[Entry] = []
        try:
            for what in missing:
                left -= self._slot_bytes[what.group]
                entry = self._pool.take_as(what, Tier.NVME, now) if left >= 0 else None
                if entry is None:
                    break
                if owner is not None:
                    self._prefetches.add(owner, entry)
                fresh.append(entry)
            self._loader.used(sorted([*pinned, *fresh], key=PLACE))
            if fresh and self._nvme is not None:
                self._nvme.read_up(fresh, now)
        except Exception:  # nobody would ever fill them
            for entry in reversed(fresh):
                self._pool.undo(entry, now)
            raise
        finally:
            self._loader.unpin(pinned, now)
        moving = sum(not e.dropped for e in fresh)
        self._counters.prefetched += moving
        return moving, moving == len(missing)

    def came(self, owner: str) -> None:
        """``owner`` takes what it needs: only what is wished for all the same is still moved."""
        rest = self._rests.get(owner)
        if rest is not None and not rest.wished:
            del self._rests[owner]

    def give_up(self, owner: str) -> None:
        """``owner`` will not come, or is done: what is not moving yet stays where it is, unless it
        is wished for. That is moved for nobody, when no request has anything to be moved."""
        rest = self._rests.pop(owner, None)
        if rest is not None and rest.wished:
            self._wishes.append(rest)

    def clear(self) -> None:
        """Nothing that is not moving yet is moved any more."""
        self._rests.clear()
        self._wishes.clear()

    def probe(self, chain: Chain, start: int, end: int, now: float) -> bool:
        """Where the tier below may work again: try it with one chunk of a servable [start, end).

        False where there is nothing to try. Else the tier is not in use until that chunk is up, so
        that no request waits for a tier that may hang as before.
        """
        if self._nvme is None or not self._nvme.probe_due(now):
            return False
        tried = self.prefetch(_PROBER, chain, start, end, now)
        self._prefetches.cancel(_PROBER)
        self._counters.nvme_probes += tried
        return tried > 0

    def check(self) -> None:
        """Raise AssertionError naming the first broken invariant."""
        for rest in (*self._rests.values(), *self._wishes):
            assert 0 < rest.at < len(rest.places), "nothing is left to be moved"
            for group, chunk in rest.places[rest.at :]:
                assert chunk < len(rest.keys[group]), "a chunk to be moved has no key"
