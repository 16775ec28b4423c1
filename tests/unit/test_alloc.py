"""The extent allocator: no overlap, no leak, extents change class, waste is bounded."""

from __future__ import annotations

import random
from collections.abc import Iterator
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvoffload.core.alloc import SlotAllocator, extent_bytes
from kvoffload.errors import ConfigError
from kvoffload.types import LEAF_BYTES

MIB = 1 << 20


@pytest.mark.parametrize(
    ("sizes", "want"),
    [
        ([MIB], 4 * MIB),
        ([MIB, 16384], 4 * MIB),
        ([3 * MIB], 12 * MIB),
        ([3 * MIB, 2 * MIB], 12 * MIB),
        ([300 * MIB], 300 * MIB),
    ],
)
def test_smallest_extent_with_little_waste(sizes: list[int], want: int) -> None:
    assert extent_bytes(1 << 36, sizes) == want


@given(sizes=st.lists(st.integers(1, 6000), min_size=1, max_size=3, unique=True))
def test_waste_is_at_most_a_sixteenth_where_the_spec_says_so(sizes: list[int]) -> None:
    slot = [s * LEAF_BYTES for s in sizes]
    extent = extent_bytes(1 << 40, slot)
    candidates = [
        e
        for e in range(4 * MIB, 65 * 4 * MIB, 4 * MIB)
        if all(e >= s and (e % s) * 16 <= e for s in slot)
    ]
    if candidates:
        assert extent == candidates[0]
    assert extent % (4 * MIB) == 0 and extent >= max(slot)


def test_one_class_uses_the_whole_arena() -> None:
    alloc = SlotAllocator(64 * MIB, [MIB])
    got = [alloc.alloc(0) for _ in range(64)]
    assert alloc.alloc(0) is None and alloc.slots_free(0) == 0
    assert sorted(o for _, o in got) == [i * MIB for i in range(64)]  # type: ignore[misc]
    assert all(s < alloc.max_slots == 64 for s, _ in got)  # type: ignore[misc]
    alloc.check()


def test_an_empty_extent_changes_class() -> None:
    alloc = SlotAllocator(8 * MIB, [MIB, 2 * MIB])
    big = [alloc.alloc(1) for _ in range(4)]
    assert None not in big and alloc.alloc(0) is None
    alloc.free(big[0][0])  # type: ignore[index]
    assert alloc.alloc(0) is None, "half an extent cannot be lent"
    alloc.free(big[1][0])  # type: ignore[index]
    assert alloc.slots_free(0) == 4 and alloc.alloc(0) is not None
    assert alloc.slots_free(1) == 0
    alloc.check()


def test_misuse_and_small_arenas() -> None:
    alloc = SlotAllocator(4 * MIB, [MIB])
    slot, _ = alloc.alloc(0)  # type: ignore[misc]
    alloc.free(slot)
    with pytest.raises(ValueError, match="not in use"):
        alloc.free(slot)
    with pytest.raises(ConfigError, match="dram_gib"):
        SlotAllocator(4 * MIB, [5 * MIB])
    for bad in ([], [0], [1000]):
        with pytest.raises(ConfigError):
            SlotAllocator(4 * MIB, bad)


def test_max_slots_is_the_same_before_and_after_the_arena_rounds_down() -> None:
    for extra in (0, 1, 4096, 2 * MIB - 1):
        sizes = [MIB, 3 * MIB]
        asked = SlotAllocator(100 * MIB + extra, sizes)
        assert asked.max_slots == SlotAllocator(100 * MIB, sizes).max_slots


def test_check_sees_a_double_use() -> None:
    alloc = SlotAllocator(8 * MIB, [MIB, 2 * MIB])
    slot, _ = alloc.alloc(0)  # type: ignore[misc]
    alloc._free[0].append(slot)
    with pytest.raises(AssertionError):
        alloc.check()


@settings(max_examples=60)
@given(
    sizes=st.lists(st.integers(1, 200), min_size=1, max_size=3),
    ops=st.lists(st.tuples(st.booleans(), st.integers(0, 1000)), max_size=120),
)
def test_random_use_never_overlaps(sizes: list[int], ops: list[tuple[bool, int]]) -> None:
    slot_bytes = [s * LEAF_BYTES for s in sizes]
    alloc = SlotAllocator(16 * MIB, slot_bytes)
    live: dict[int, tuple[int, int]] = {}
    for take, pick in ops:
        if take or not live:
            cls = pick % len(sizes)
            free = alloc.slots_free(cls)
            got = alloc.alloc(cls)
            assert (got is None) == (free == 0)
            if got is not None:
                assert got[0] not in live and got[0] < alloc.max_slots
                assert got[1] % LEAF_BYTES == 0 and alloc.offset(got[0]) == got[1]
                live[got[0]] = (got[1], got[1] + slot_bytes[cls])
        else:
            slot = sorted(live)[pick % len(live)]
            alloc.free(slot)
            del live[slot]
        spans = sorted(live.values())
        assert all(a[1] <= b[0] for a, b in pairwise(spans))
        assert not spans or spans[-1][1] <= 16 * MIB
        alloc.check()
    for slot in list(live):
        alloc.free(slot)
    assert all(alloc.slots_free(c) == alloc.capacity(c) for c in range(len(sizes)))


def test_check_sees_a_double_use_of_the_only_class() -> None:
    alloc = SlotAllocator(8 * MIB, [MIB])
    slot, _ = alloc.alloc(0)  # type: ignore[misc]
    assert alloc._flat is not None
    alloc._flat.append(slot)
    with pytest.raises(AssertionError, match="used and free"):
        alloc.check()
    alloc._flat.pop()
    alloc._used.remove(slot)
    with pytest.raises(AssertionError, match="lost"):
        alloc.check()


class _Counting(list[int]):
    """Counts what goes through all of it."""

    walks = 0

    def remove(self, value: int) -> None:
        self.walks += 1
        super().remove(value)

    def __iter__(self) -> Iterator[int]:
        self.walks += 1
        return super().__iter__()


def test_giving_extents_back_does_not_go_through_the_others() -> None:
    """A tier of two slot sizes that is emptied in any order: each extent used to cost all others."""
    alloc = SlotAllocator(16384 * 4 * MIB, [MIB, 2 * MIB])
    slots = [alloc.alloc(n % 2) for n in range(16384) for _ in range(4 if n % 2 == 0 else 2)]
    live = [got[0] for got in slots if got is not None]
    assert alloc.n_extents == 16384 and len(live) == len(slots)
    random.Random(1).shuffle(live)
    heaps = [_Counting(heap) for heap in alloc._open]
    alloc._open = list(heaps)
    for slot in live:
        alloc.free(slot)
    assert [heap.walks for heap in heaps] == [0, 0]
    alloc.check()
    assert alloc.slots_free(0) == alloc.capacity(0) and alloc.slots_free(1) == alloc.capacity(1)
    rows = sum(map(len, alloc._open))
    assert rows <= 2 * alloc.n_extents, "stale rows do not pile up"


def test_an_extent_that_comes_back_to_a_class_is_offered_once() -> None:
    alloc = SlotAllocator(4 * MIB, [MIB, 2 * MIB])
    for _ in range(3):
        for cls in (0, 1):
            got = [alloc.alloc(cls) for _ in range(alloc.per_extent[cls])]
            assert None not in got and alloc.alloc(1 - cls) is None
            for slot in got:
                alloc.free(slot[0])  # type: ignore[index]
            alloc.check()
    assert sum(map(len, alloc._open)) <= 2
