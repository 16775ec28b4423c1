"""Which chunks are pinned: bounded in bytes, and in bookkeeping by the chunks that are pinned.

A pinned prompt is held by its last chunk alone, and each pinned chunk holds the one before it. So a
chat that pins its prompt at every turn adds the turn's chunks, not its whole history again, and
what two prompts share counts once and stays until both are gone.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

from kvoffload.core.hashchain import Chain
from kvoffload.core.layout import boundary_tokens
from kvoffload.core.lookup import primary, span
from kvoffload.core.stats import Counters
from kvoffload.types import CacheLayout, ChunkKey, GroupKind, GroupLayout


@dataclass(slots=True)
class _Pinned:
    holders: int  # pinned chunks behind it, and prompts that name it
    nbytes: int
    parent: ChunkKey | None  # held by it


class Pins:
    """Pinned prompts by name, and their chunks. Not thread safe: the Manager's lock guards it."""

    def __init__(self, layout: CacheLayout, max_bytes: int, counters: Counters) -> None:
        self.max_bytes = max_bytes
        self.nbytes = 0  # of pinned chunks, resident or not
        self._counters = counters
        self._layout = layout
        self._grid = boundary_tokens(layout)
        self._main = primary(layout)
        self._chunks: dict[ChunkKey, _Pinned] = {}
        self._prompts: dict[ChunkKey, tuple[ChunkKey, ...]] = {}  # the chunks each one names

    def __contains__(self, key: object) -> bool:
        return key in self._chunks

    def __len__(self) -> int:
        return len(self._chunks)

    def pin(self, chain: Chain, end: int) -> list[ChunkKey] | None:
        """Pin what a hit on [0, end) needs: the chunks that were not pinned before, root first.
        None: there is no whole chunk, or no room (counted). O(those, and the windows)."""
        end, name = self._prompt(chain, end)
        if name is None:
            return None
        if name in self._prompts:
            return []
        tips = self._tips(end)
        lines = [self._line(chain, g, i) for g, i in tips]
        fresh = {key: (g, i) for line in lines for key, g, i in line}
        if self.nbytes + sum(g.slot_bytes for g, _ in fresh.values()) > self.max_bytes:
            self._counters.hint_pin_refused += 1
            return None
        for key, (g, i) in fresh.items():
            parent = chain.key(g.group, i - 1) if i and g.kind is GroupKind.FULL else None
            self._chunks[key] = _Pinned(0, g.slot_bytes, parent)
            self.nbytes += g.slot_bytes
            if parent is not None:
                self._chunks[parent].holders += 1
        self._prompts[name] = tuple(chain.key(g.group, i) for g, i in tips)
        for key in self._prompts[name]:
            self._chunks[key].holders += 1
        return list(fresh)

    def unpin(self, chain: Chain, end: int) -> list[ChunkKey] | None:
        """End the pin of this prompt: the chunks that are not pinned any more, leaf first. None
        when there is none."""
        _, name = self._prompt(chain, end)
        tips = self._prompts.pop(name, None) if name is not None else None
        if tips is None:
            return None
        out: list[ChunkKey] = []
        for tip in tips:
            at: ChunkKey | None = tip
            while at is not None:
                chunk = self._chunks[at]
                chunk.holders -= 1
                if chunk.holders:
                    break
                del self._chunks[at]
                self.nbytes -= chunk.nbytes
                out.append(at)
                at = chunk.parent
        return out

    def clear(self) -> list[ChunkKey]:
        """No pins any more: what was pinned."""
        out = list(self._chunks)
        self._chunks.clear()
        self._prompts.clear()
        self.nbytes = 0
        return out

    def _prompt(self, chain: Chain, end: int) -> tuple[int, ChunkKey | None]:
        """The longest boundary in [0, end], and its name; no name: no chunk."""
        groups = self._layout.groups
        if any(g.kind is GroupKind.NONE for g in groups):
            return 0, None
        held = min(chain.n_chunks(g.group) * g.chunk_tokens for g in groups)
        end = min(end, held) // self._grid * self._grid
        if not end:
            return 0, None
        return end, chain.key(self._main.group, end // self._main.chunk_tokens - 1)

    def _tips(self, end: int) -> list[tuple[GroupLayout, int]]:
        """What a hit on [0, end) needs; of FULL groups only the last chunk, which holds the rest.

        The same prompt alone is served one boundary short where a window is involved.
        """
        tips: dict[tuple[GroupLayout, int], None] = {}
        for g in self._layout.groups:
            if g.kind is GroupKind.FULL:
                tips[g, span(g, 0, end)[-1]] = None
                continue
            for to in (end, end - self._grid):
                tips.update(dict.fromkeys((g, i) for i in span(g, 0, to)))
        return list(tips)

    def _line(
        self, chain: Chain, g: GroupLayout, i: int
    ) -> Iterator[tuple[ChunkKey, GroupLayout, int]]:
        """Chunk ``i`` and those before it that it holds, as far as they are not pinned; root
        first."""
        keys = chain.keys(g.group)
        first = i
        if keys[i] in self._chunks:
            return
        while g.kind is GroupKind.FULL and first and keys[first - 1] not in self._chunks:
            first -= 1
        for at in range(first, i + 1):
            yield keys[at], g, at

    def check(self) -> None:
        """Raise AssertionError naming the first broken invariant."""
        holders = Counter(c.parent for c in self._chunks.values() if c.parent is not None)
        for tips in self._prompts.values():
            holders.update(tips)
        found = {key: chunk.holders for key, chunk in self._chunks.items()}
        assert found == dict(holders), "who holds pinned chunks"
        nbytes = sum(c.nbytes for c in self._chunks.values())
        assert self.nbytes == nbytes <= self.max_bytes, "bytes pinned"
