"""Orders name for each chunk the blocks that it fills, or is copied from, and no other."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvoffload.core.manager import Lease, LeaseItem, StoreItem
from kvoffload.engines.vllm.orders import load_copies, store_copies
from kvoffload.types import CacheLayout, ChunkKey, GroupKind, GroupLayout, SlotRef, Tier

BLOCK, PER_CHUNK = 16, 4
LAYOUT = CacheLayout(
    tuple(GroupLayout(g, GroupKind.FULL, BLOCK, PER_CHUNK, 4096, 1) for g in range(2)),
    BLOCK * PER_CHUNK,
    BLOCK,
    1,
)


def item(group: int, chunk: int) -> LeaseItem:
    key = ChunkKey(bytes([group, chunk]) * 8)
    return LeaseItem(group, chunk, key, SlotRef(chunk, group + 1, chunk << 12), Tier.DRAM)


blocks = st.one_of(
    st.just(list(range(1, 17))),
    st.lists(st.integers(0, 9), min_size=16, max_size=16),  # 0: vLLM's null block
)
chunks = st.one_of(
    st.tuples(st.integers(0, 3), st.integers(0, 4)).map(lambda p: list(range(p[0], p[1]))),
    st.lists(st.integers(0, 3), unique=True),
)


spans = st.one_of(
    st.just((0, 256)), st.tuples(st.integers(0, 256), st.integers(0, 256)).map(sorted).map(tuple)
)


@given(st.tuples(chunks, chunks), st.tuples(blocks, blocks), spans)
def test_every_wanted_block_once_and_no_other(
    held: tuple[list[int], list[int]],
    tables: tuple[list[int], list[int]],
    span: tuple[int, int],
) -> None:
    start, end = span
    items = tuple(item(g, c) for g, some in enumerate(held) for c in some)
    found = {
        (copies.group, slot): row
        for copies in load_copies(LAYOUT, Lease(1, "r", items, {}), tables, start, end)
        for slot, row in zip(copies.slots.tolist(), copies.block_ids.tolist(), strict=True)
    }
    want = {}
    for i in items:
        row = []
        for at in range(i.chunk * PER_CHUNK, (i.chunk + 1) * PER_CHUNK):
            inside = start <= at * BLOCK and (at + 1) * BLOCK <= end
            row.append(tables[i.group][at] or -1 if inside else -1)
        if max(row) > 0:
            want[i.group, i.chunk] = row
    assert found == want


def store_item(group: int, chunk: int) -> StoreItem:
    some = item(group, chunk)
    return StoreItem(group, chunk, some.key, some.ref)


table = st.lists(st.integers(0, 9), min_size=16, max_size=16)


@given(st.tuples(chunks, chunks), st.tuples(table, table))
def test_all_blocks_of_what_is_stored(
    stored: tuple[list[int], list[int]], tables: tuple[list[int], list[int]]
) -> None:
    items = [store_item(g, c) for g, some in enumerate(stored) for c in some]
    found = {
        (copies.group, slot): row
        for copies in store_copies(LAYOUT, items, tables)
        for slot, row in zip(copies.slots.tolist(), copies.block_ids.tolist(), strict=True)
    }
    want = {
        (i.group, i.chunk): tables[i.group][i.chunk * PER_CHUNK : (i.chunk + 1) * PER_CHUNK]
        for i in items
    }
    assert found == want


@pytest.mark.parametrize("chunk", [3, 4, 9])
def test_a_store_beyond_the_table_is_refused(chunk: int) -> None:
    with pytest.raises(IndexError):
        store_copies(LAYOUT, [store_item(0, 1), store_item(0, chunk)], [list(range(15)), []])
    with pytest.raises(IndexError):
        store_copies(LAYOUT, [store_item(0, chunk)], [list(range(12)), []])


class LongTable(Sequence[int]):
    """A block table that counts the ids it gives."""

    given = 0

    def __len__(self) -> int:
        return 62500

    def __getitem__(self, at: Any) -> Any:
        some = range(len(self))[at]
        self.given += len(some) if isinstance(at, slice) else 1
        return list(some) if isinstance(at, slice) else some


def test_a_long_prompts_table_is_not_walked_for_one_chunk() -> None:
    long = LongTable()
    store = store_copies(LAYOUT, [store_item(0, 200)], [long, long])
    assert store[0].block_ids.tolist() == [[800, 801, 802, 803]] and long.given == PER_CHUNK
