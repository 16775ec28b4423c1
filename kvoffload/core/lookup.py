"""Which chunks a boundary needs, and the longest boundary that all KV groups can serve. Pure."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from kvoffload.core.hashchain import Chain
from kvoffload.core.layout import boundary_tokens
from kvoffload.core.planner import Step
from kvoffload.types import CacheLayout, ChunkKey, GroupKind, GroupLayout, Tier

Probe = Callable[[Sequence[ChunkKey]], Sequence[Tier | None]]
"""Where each key is held now, None where it is not."""

_MAX_STEPS = 64  # boundaries a planner chooses from; more would cost more than they are worth
_DRAM_ONLY = {Tier.DRAM, None}
BATCH = 128  # chunks asked for at once: a cold prompt should not cost a probe of its whole length


@dataclass(frozen=True, slots=True)
class Hit:
    """Tokens [start, end) can be served, ``end == start`` when none can.

    ``chunks`` counts what a load would move. ``by_tier`` splits ``end - start`` by where the first
    FULL group's chunks are (the first group's without one); tokens that no chunk need serve count
    as DRAM.
    """

    end: int
    chunks: int
    by_tier: dict[Tier, int]


def span(group: GroupLayout, start: int, end: int) -> range:
    """Chunks of ``group`` that must be present to continue at ``end`` when HBM holds [0, start).

    FULL: all that overlap [start, end). SLIDING: those of them that overlap the last ``window``
    tokens.
    """
    if end <= start or group.kind is GroupKind.NONE:
        return range(0)
    size = group.chunk_tokens
    first = start
    if group.kind is GroupKind.SLIDING:
        first = max(start, end - group.window)
    return range(first // size, -(-end // size))


def primary(layout: CacheLayout) -> GroupLayout:
    """The group by whose chunks tokens are attributed to tiers."""
    full = [g for g in layout.groups if g.kind is GroupKind.FULL]
    return full[0] if full else layout.groups[0]


class Search:
    """One lookup of one chain; remembers what it probed."""

    def __init__(self, layout: CacheLayout, chain: Chain, probe: Probe) -> None:
        self._layout = layout
        self._chain = chain
        self._probe = probe
        self._tiers: list[dict[int, Tier | None]] = [{} for _ in layout.groups]
        self._grid = boundary_tokens(layout)

    def _ask(self, group: int, chunks: range) -> None:
        known = self._tiers[group]
        todo = [i for i in chunks if i not in known]
        if todo:
            keys = self._chain.keys(group)
            known.update(zip(todo, self._probe([keys[i] for i in todo]), strict=True))

    def _first_missing(self, group: int, chunks: range) -> int | None:
        known = self._tiers[group]
        for low in range(chunks.start, chunks.stop, BATCH):
            part = range(low, min(low + BATCH, chunks.stop))
            self._ask(group, part)
            for i in part:
                if known[i] is None:
                    return i
        return None

    def _last_missing(self, group: int, chunks: range) -> int | None:
        self._ask(group, chunks)
        known = self._tiers[group]
        return next((i for i in reversed(chunks) if known[i] is None), None)

    def longest(self, start: int, limit: int) -> int:
        """The greatest servable boundary in (start, limit]; ``start`` when there is none."""
        groups = self._layout.groups
        if any(g.kind is GroupKind.NONE for g in groups):
            return start
        end = min([limit, *(self._chain.n_chunks(g.group) * g.chunk_tokens for g in groups)])
        end -= end % self._grid
        for g in groups:
            if g.kind is GroupKind.FULL and end > start:
                missing = self._first_missing(g.group, span(g, start, end))
                if missing is not None:
                    end = missing * g.chunk_tokens
                    end -= end % self._grid
        sliding = [g for g in groups if g.kind is GroupKind.SLIDING]
        return self._shrink(sliding, start, end)

    def _shrink(self, sliding: Sequence[GroupLayout], start: int, end: int) -> int:
        # A chunk missing from the window of ``end`` is in the window of every boundary between it
        # and ``end`` too, so the next candidate ends at or before that chunk: each chunk is probed
        # once.
        settled = False
        while end > start and not settled:
            settled = True
            for g in sliding:
                missing = self._last_missing(g.group, span(g, start, end))
                if missing is not None:
                    end = missing * g.chunk_tokens
                    end -= end % self._grid
                    settled = False
                    break
        return max(start, end)

    def hit(self, start: int, end: int) -> Hit:
        """Describe the boundary ``end`` that ``longest`` found (or a shorter servable one)."""
        if end <= start:
            return Hit(start, 0, {})
        chunks = sum(len(span(g, start, end)) for g in self._layout.groups)
        main = primary(self._layout)
        by_tier: dict[Tier, int] = {}
        left = end - start
        known, size, dram = self._tiers[main.group], main.chunk_tokens, Tier.DRAM
        for i in span(main, start, end):
            tier = known.get(i)
            if tier is not None and tier is not dram:
                tokens = min(end, (i + 1) * size) - max(start, i * size)
                by_tier[tier] = by_tier.get(tier, 0) + tokens
                left -= tokens
        if left:
            by_tier[Tier.DRAM] = left
        return Hit(end, chunks, by_tier)

    def whole(self, start: int, end: int) -> bool:
        """Whether all that a load of [start, end) needs lies in DRAM."""
        dram = Tier.DRAM
        for g in self._layout.groups:
            known = self._tiers[g.group]
            if [True for i in span(g, start, end) if known.get(i) is not dram]:
                return False
        return True

    def steps(self, start: int, end: int) -> list[Step]:
        """The boundaries a planner may choose up to ``end``, with the bytes each needs per tier.

        With SLIDING groups only ``end`` itself: shorter boundaries need other windows.
        """
        if end <= start:
            return []
        groups = self._layout.groups
        if any(g.kind is GroupKind.SLIDING for g in groups):
            ends = [end]
        else:
            first = start - start % self._grid + self._grid
            stride = self._grid * max(1, (end - first) // (self._grid * _MAX_STEPS))
            ends = [*range(first, end, stride), end]
        if len(groups) == 1 and set(self._tiers[0].values()) <= _DRAM_ONLY:
            size, slot_bytes = groups[0].chunk_tokens, groups[0].slot_bytes
            low = span(groups[0], start, ends[0]).start
            return [Step(b, {Tier.DRAM: (-(-b // size) - low) * slot_bytes}) for b in ends]
        out: list[Step] = []
        at = [span(g, start, ends[0]).start for g in groups]  # chunks below this are counted
        sizes = [(g.group, g.chunk_tokens, g.slot_bytes, self._tiers[g.group]) for g in groups]
        nbytes: dict[Tier, int] = {}
        for boundary in ends:
            for group, size, slot_bytes, known in sizes:
                stop = -(-boundary // size)
                for i in range(at[group], stop):
                    tier = known.get(i)
                    if tier is not None:
                        nbytes[tier] = nbytes.get(tier, 0) + slot_bytes
                at[group] = stop
            out.append(Step(boundary, nbytes.copy()))
        return out
