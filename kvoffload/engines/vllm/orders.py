"""Pure helpers that turn leases and store items into copy orders, and the block-reuse fence."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from kvoffload.core.manager import Lease, LeaseItem, StoreItem
from kvoffload.engines.vllm.meta import I32, ChunkCopies, LoadOrder, StoreOrder
from kvoffload.types import CacheLayout, GroupLayout, SlotState

BlockTables = Sequence[Sequence[int]]

PRUNE_ABOVE = 64
"""The fence remembers so many stores before it looks which of them have ended."""


def _copies(
    group: GroupLayout, items: Sequence[LeaseItem] | Sequence[StoreItem], ids: I32
) -> ChunkCopies:
    return ChunkCopies(
        group=group.group,
        slots=np.array([i.ref.slot for i in items], np.uint32),
        generations=np.array([i.ref.generation for i in items], np.uint64),
        offsets=np.array([i.ref.offset for i in items], np.uint64),
        keys=b"".join([i.key for i in items]),
        block_ids=ids,
    )


def _block_index(
    group: GroupLayout, items: Sequence[LeaseItem] | Sequence[StoreItem]
) -> npt.NDArray[np.int64]:
    """Position in the block table of every block of the items' chunks: (items, blocks)."""
    n = group.blocks_per_chunk
    return np.asarray([i.chunk for i in items], np.int64)[:, None] * n + np.arange(n)


def load_copies(
    layout: CacheLayout, lease: Lease, tables: BlockTables, start: int, end: int
) -> list[ChunkCopies]:
    """Blocks of [start, end) by group. A block that HBM already has (below ``start``), that
    lies beyond ``end`` or that left the window (null block 0) is -1: never written."""
    out = []
    for group in layout.groups:
        table, size, n = tables[group.group], group.block_tokens, group.blocks_per_chunk
        first, stop = -(-start // size), min(end // size, len(table))
        some: Sequence[LeaseItem] = [i for i in lease.items if i.group == group.group]
        ids = _run_of(some, table, n, first, stop)
        if ids is None:
            some, ids = _rows_of(some, table, n, first, stop)
        if some:
            out.append(_copies(group, some, np.array(ids, np.int32).reshape(-1, n)))
    return out


def _run_of(
    items: Sequence[LeaseItem], table: Sequence[int], n: int, first: int, stop: int
) -> Sequence[int] | None:
    """The blocks of most loads: all of consecutive chunks. None where it is not so simple."""
    if not items:
        return None
    chunk, after = items[0].chunk, items[0].chunk + len(items)
    if chunk * n < first or after * n > stop:
        return None
    if [i.chunk for i in items] != list(range(chunk, after)):
        return None
    ids = table[chunk * n : after * n]
    return ids if min(ids) > 0 else None


def _rows_of(
    items: Sequence[LeaseItem], table: Sequence[int], n: int, first: int, stop: int
) -> tuple[list[LeaseItem], list[int]]:
    """The items of which any block is wanted, and their blocks."""
    # Plain lists: an array's overhead is more than a chunk's few blocks cost.
    some: list[LeaseItem] = []
    ids: list[int] = []
    for item in items:
        at = item.chunk * n
        row = [table[i] if first <= i < stop else -1 for i in range(at, at + n)]
        row = [block if block > 0 else -1 for block in row]
        if max(row) < 0:
            continue
        some.append(item)
        ids += row
    return some, ids


def store_copies(
    layout: CacheLayout, items: Sequence[StoreItem], tables: BlockTables
) -> list[ChunkCopies]:
    """All blocks of the given complete chunks, by group. IndexError where the table is shorter."""
    out = []
    for group in layout.groups:
        mine = [i for i in items if i.group == group.group]
        if mine:
            # Of a long prompt's table only the stretch that is stored becomes an array.
            index = _block_index(group, mine)
            low, high = int(index.min()), int(index.max()) + 1
            stretch = np.asarray(tables[group.group][low:high], np.int32)
            out.append(_copies(group, mine, stretch[index - low]))
    return out


class Fence:
    """Remembers which blocks are the source of a store still being copied.

    A block that vLLM hands to somebody else while its copy is out must not be overwritten before
    the copy is done: the step that reuses it carries the store's number, and the worker waits for
    that store (milliseconds at most) before anything of the step runs. Nothing is held back from
    vLLM.
    """

    def __init__(self, arena: Any, layout: CacheLayout) -> None:
        self._arena = arena
        self._block_tokens = {g.group: g.block_tokens for g in layout.groups}
        self._noted: set[int] = set()
        self._pending: dict[int, tuple[frozenset[int], Any, Any]] = {}
        self._left = 0  # stores that the last look at their states left

    def add(self, order: StoreOrder) -> None:
        """Enter a store that the workers will run in this step."""
        blocks = frozenset(b for c in order.copies for b in c.block_ids.ravel().tolist())
        slots = np.concatenate([c.slots for c in order.copies])
        generations = np.concatenate([c.generations for c in order.copies])
        self._pending[order.store] = (blocks, slots, generations)
        # Those of this step and of the steps in flight cannot have ended: looking again before
        # their number has doubled would make a step of many stores quadratic.
        if len(self._pending) > max(PRUNE_ABOVE, 2 * self._left):
            self._prune()

    def note(self, blocks: Any) -> None:
        """Blocks given to a request for somebody else's load (MultiConnector): they are written
        outside of any step's forward. Not to be called without one: of a prefix hit, which is only
        read, the store would be waited for and given up. The table of a long prompt is made only
        where it matters."""
        if self._pending:
            for ids in blocks.get_block_ids():
                self._noted.update(ids)

    def is_clear(self, output: Any) -> bool:
        """Whether the step certainly writes no source of a store. Asked every step: a running
        request that gets no new block is most of them."""
        if not self._pending:
            return True
        return not (
            self._noted
            or output.scheduled_new_reqs
            or any(output.scheduled_cached_reqs.new_block_ids)
            or getattr(output, "new_block_ids_to_zero", None)
            or getattr(output, "kv_cache_block_copies", None)
        )

    def spoil(self, output: Any, give_up: Callable[[int, int], bool]) -> int:
        """Fail stores whose source blocks this step zeroes or copies over. Returns slots failed.

        ``give_up(slot, generation)`` is Manager.spoil_store: False where the store has ended.

        Some model runners do both before they call ``handle_preemptions``, so waiting there comes
        too late; a store that has not ended is given up instead.
        """
        if not self._pending:
            return 0
        written = set(getattr(output, "new_block_ids_to_zero", None) or ())
        for copy in getattr(output, "kv_cache_block_copies", None) or ():
            written.add(int(copy.dst_block_id))
        spoiled = 0
        for blocks, slots, generations in self._pending.values() if written else ():
            if blocks.isdisjoint(written):
                continue
            states = self._arena.states(slots, generations)
            for slot, generation, state in zip(slots, generations, states, strict=True):
                if state == int(SlotState.FILLING):
                    spoiled += bool(give_up(int(slot), int(generation)))
        return spoiled

    def due(self, output: Any, loads: Iterable[LoadOrder]) -> list[int]:
        """Stores whose source blocks are written by this step (new allocations and loads)."""
        if not self._pending:
            return []
        fresh = new_blocks(output, self._block_tokens) | self._noted
        self._noted = set()
        for order in loads:
            for copies in order.copies:
                fresh.update(copies.block_ids[copies.block_ids >= 0].tolist())
        if not fresh:
            return []
        self._prune()
        return [n for n, (blocks, _, _) in self._pending.items() if not blocks.isdisjoint(fresh)]

    def all_pending(self) -> list[int]:
        """Every store that may still be copying."""
        return list(self._pending)

    def _prune(self) -> None:
        """Forget the stores that have ended. One call into the arena."""
        if self._pending:
            _, slots, generations = zip(*self._pending.values(), strict=True)
            states = self._arena.states(np.concatenate(slots), np.concatenate(generations))
            first = np.cumsum([0, *map(len, slots[:-1])])  # of each store; none is without a slot
            filling = np.logical_or.reduceat(states == int(SlotState.FILLING), first)
            for number, copying in zip(list(self._pending), filling.tolist(), strict=True):
                if not copying:
                    del self._pending[number]
        self._left = len(self._pending)


def new_blocks(output: Any, block_tokens: dict[int, int]) -> set[int]:
    """Block ids that this step may write: those of new requests beyond what is already computed (a
    prefix hit is only read), and all that running or resumed requests were given."""
    fresh: set[int] = set()
    for new in output.scheduled_new_reqs:
        for group, ids in enumerate(new.block_ids):
            computed = int(getattr(new, "num_computed_tokens", 0))
            fresh.update(ids[computed // block_tokens.get(group, 1 << 62) :])
    for tables in output.scheduled_cached_reqs.new_block_ids:
        for ids in tables or ():
            fresh.update(ids)
    return fresh
