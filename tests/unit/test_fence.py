"""The block-reuse fence: which stores a step must wait for, and which it must give up."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from kvoffload._core import FAILED, FILLING, READY, Arena
from kvoffload.engines.vllm.meta import ChunkCopies, StoreOrder
from kvoffload.engines.vllm.orders import Fence
from kvoffload.types import CacheLayout, GroupKind, GroupLayout

LAYOUT = CacheLayout((GroupLayout(0, GroupKind.FULL, 16, 2, 4096, 1),), 16, 16, 1)


def output(
    new: list[tuple[list[int], int]] | None = None, **more: Any
) -> SimpleNamespace:  # [(block ids, computed tokens)]
    requests = [SimpleNamespace(block_ids=(ids,), num_computed_tokens=n) for ids, n in new or ()]
    cached = SimpleNamespace(new_block_ids=more.pop("grown", []))
    return SimpleNamespace(scheduled_new_reqs=requests, scheduled_cached_reqs=cached, **more)


@pytest.fixture
def rig() -> tuple[Arena, Fence, int]:
    """A store of blocks 4 and 5 into slot 1 that is still being copied."""
    arena = Arena.create(2 << 20, 4, 1)
    generation = arena.begin_fill(1, 1)
    fence = Fence(arena, LAYOUT)
    copies = ChunkCopies(
        0,
        np.array([1], np.uint32),
        np.array([generation], np.uint64),
        np.array([0], np.uint64),
        bytes(16),
        np.array([[4, 5]], np.int32),
    )
    fence.add(StoreOrder(7, [copies]))
    return arena, fence, generation


def test_blocks_handed_on_are_waited_for(rig: tuple[Arena, Fence, int]) -> None:
    _, fence, _ = rig
    assert fence.due(output(new=[([2, 5], 0)]), []) == [7]
    assert fence.due(output(grown=[([4],), None]), []) == [7]
    assert fence.due(output(new=[([1, 2, 3], 0)]), []) == []


def test_a_prefix_hit_only_reads(rig: tuple[Arena, Fence, int]) -> None:
    _, fence, _ = rig
    assert fence.due(output(new=[([4, 5, 9], 32)]), []) == []
    assert fence.due(output(new=[([4, 5, 9], 16)]), []) == [7]


def test_blocks_of_another_connectors_load(rig: tuple[Arena, Fence, int]) -> None:
    _, fence, _ = rig
    fence.note(SimpleNamespace(get_block_ids=lambda: [[5, 8]]))
    assert fence.due(output(), []) == [7]
    assert fence.due(output(), []) == [], "once"


def test_ended_stores_are_forgotten(rig: tuple[Arena, Fence, int]) -> None:
    arena, fence, generation = rig
    assert arena.rank_done(1, generation, 0)
    assert fence.due(output(new=[([4], 0)]), []) == []
    assert fence.all_pending() == []


@pytest.mark.parametrize(
    "more",
    [
        {"new_block_ids_to_zero": [3, 4]},
        {"kv_cache_block_copies": [SimpleNamespace(src_block_id=1, dst_block_id=5)]},
    ],
)
def test_zeroed_or_copied_over_is_given_up(
    rig: tuple[Arena, Fence, int], more: dict[str, Any]
) -> None:
    arena, fence, generation = rig
    assert arena.state(1) == FILLING
    assert fence.spoil(output(**more), arena.fail) == 1
    assert arena.state(1) == FAILED
    assert not arena.rank_done(1, generation, 0), "a late copy cannot make it READY"


def test_nothing_else_is_given_up(rig: tuple[Arena, Fence, int]) -> None:
    arena, fence, generation = rig
    assert fence.spoil(output(new_block_ids_to_zero=[9]), arena.fail) == 0
    assert arena.rank_done(1, generation, 0)
    assert fence.spoil(output(new_block_ids_to_zero=[4]), arena.fail) == 0, "it had ended"
    assert arena.state(1) == READY


class Slots:
    """An arena's slot table that counts how often it is asked."""

    def __init__(self) -> None:
        self.asked = 0
        self.ended: set[int] = set()

    def states(self, slots: Any, generations: Any) -> Any:
        self.asked += 1
        return np.array([READY if s in self.ended else FILLING for s in slots.tolist()], np.uint8)


def store(number: int, slots: int) -> StoreOrder:
    """One of so many chunks, into slots 10 * number and those after it."""
    ids = np.arange(slots, dtype=np.uint32) + 10 * number
    blocks = np.full((slots, 2), number + 1, np.int32)
    generations, offsets = np.ones(slots, np.uint64), np.zeros(slots, np.uint64)
    return StoreOrder(number, [ChunkCopies(0, ids, generations, offsets, bytes(16), blocks)])


def test_many_stores_of_a_step_are_not_looked_at_again_and_again() -> None:
    slots = Slots()
    fence = Fence(slots, LAYOUT)
    for number in range(256):
        fence.add(store(number, 1))
    assert slots.asked <= 12
    assert fence.all_pending() == list(range(256)), "all are still being copied"
    slots.ended = set(range(0, 2560, 10))
    for number in range(256, 600):
        fence.add(store(number, 1))
    assert not set(fence.all_pending()) & set(range(256)), "what has ended goes"
    assert fence.all_pending()[-1] == 599


def test_a_store_is_pending_while_one_of_its_slots_is() -> None:
    slots = Slots()
    fence = Fence(slots, LAYOUT)
    sizes = {1: 1, 2: 3, 3: 2, 4: 1, 5: 3}
    for number, size in sizes.items():
        fence.add(store(number, size))
    slots.ended = {10, 20, 21, 30, 31, 51, 52}
    asked = slots.asked
    everything = output(new=[(list(range(20)), 0)])
    assert fence.due(everything, []) == [2, 4, 5]
    assert fence.all_pending() == [2, 4, 5] and slots.asked == asked + 1
    slots.ended |= {22, 40, 50}
    assert fence.due(everything, []) == [] and fence.all_pending() == []
