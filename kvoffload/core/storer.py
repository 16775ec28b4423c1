"""Storing: slots for the chunks that a request has computed and that no tier holds."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from kvoffload.core.hashchain import Chain
from kvoffload.core.lease import StoreItem
from kvoffload.core.nvme import NvmeTier
from kvoffload.core.pool import Pool
from kvoffload.core.stats import Counters
from kvoffload.core.why import Gone, KeyMemory
from kvoffload.types import CacheLayout, GroupKind, SlotState, Tier


class Storer:
    """The store half of the Manager. Not thread safe: the Manager's lock guards it."""

    def __init__(
        self,
        layout: CacheLayout,
        pool: Pool,
        nvme: NvmeTier | None,
        memory: KeyMemory,
        counters: Counters,
    ) -> None:
        self._layout = layout
        self._pool = pool
        self._nvme = nvme
        self._memory = memory
        self._counters = counters

    def begin(
        self,
        chain: Chain,
        start: int,
        end: int,
        need: Callable[[int, int], bool] | None,
        now: float,
    ) -> list[StoreItem]:
        """See Manager.begin_store. What an exception leaves half begun is taken back."""
        out: list[StoreItem] = []
        try:
            self._begin(out, chain, start, end, need, now)
        except Exception:
            self.abort(out, now)  # the caller has no items that it could give back
            raise
        return out

    def _begin(
        self,
        out: list[StoreItem],
        chain: Chain,
        start: int,
        end: int,
        need: Callable[[int, int], bool] | None,
        now: float,
    ) -> None:
        for g in self._layout.groups:
            stop = min(end // g.chunk_tokens, chain.n_chunks(g.group))
            filtered = need if g.kind is GroupKind.SLIDING else None
            chunks = range(start // g.chunk_tokens, stop)
            wanted = [i for i in chunks if filtered is None or filtered(g.group, i)]
            self._group(out, chain, g.group, wanted, now)

    def _group(
        self, out: list[StoreItem], chain: Chain, group: int, chunks: Sequence[int], now: float
    ) -> None:
        index, keys = self._pool.index, chain.keys(group)
        entries = index.find([keys[i] for i in chunks])
        index.touch(self._pool.class_of(group), [e.key for e in entries if e is not None])
        absent = [i for i, e in zip(chunks, entries, strict=True) if e is None]
        if self._nvme is not None:
            held = self._nvme.held([keys[i] for i in absent], now)
            absent = [i for i, there in zip(absent, held, strict=True) if not there]
        for at, i in enumerate(absent):
            entry = self._pool.take(chain, group, i, Tier.DRAM, now)
            if entry is None:
                self._counters.store_skipped_full += len(absent) - at
                for left in absent[at:]:
                    self._memory.note(keys[left], Gone.NO_ROOM, now)
                break
            out.append(StoreItem(group, i, entry.key, entry.ref))
            if self._nvme is not None:
                self._nvme.stored(entry, now)

    def abort(self, items: Sequence[StoreItem], now: float) -> None:
        """See Manager.abort_store."""
        for item in reversed(items):
            entry = self._pool.index.get(item.key)
            if entry is None or entry.ref != item.ref or entry.state is SlotState.READY:
                continue
            self._counters.store_aborted += 1
            self._pool.undo(entry, now)
