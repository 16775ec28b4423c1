"""Geometry of device copies: joined runs, piece boundaries, leaf ranges, overlap."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from kvoffload.copy.base import Fragment
from kvoffload.copy.runs import BlockGroup, Run
from kvoffload.types import LEAF_BYTES as LEAF


@settings(max_examples=400, deadline=None)
@given(
    st.lists(
        st.tuples(st.integers(1, 120), st.integers(1, 40), st.integers(1, 25)),
        min_size=2, max_size=3,
    ),
    st.integers(1, 6),
    st.booleans(),
)  # fmt: skip
@example([(1, 10, 5), (6, 10, 5)], 4, False)
@example([(1, 10, 5), (5, 10, 5)], 4, False)
@example([(1, 10, 5), (36, 10, 6)], 4, True)
def test_overlap_is_found_as_by_brute_force(
    parts: list[tuple[int, int, int]], blocks: int, same_stride: bool
) -> None:
    if same_stride:
        parts = [(base, parts[0][1], n) for base, _, n in parts]
    fragments = [Fragment(*p) for p in parts]
    taken: list[int] = []
    for f in fragments:
        for b in range(blocks):
            taken += range(f.base + b * f.stride, f.base + b * f.stride + f.nbytes)
    clean = len(taken) == len(set(taken))
    try:
        BlockGroup.build(fragments, blocks, LEAF)
        assert clean
    except ValueError as exc:
        assert not clean, exc


@pytest.mark.parametrize(
    ("fragments", "blocks", "shard"),
    [
        ([], 4, LEAF),
        ([Fragment(4096, 64, 64)], 0, LEAF),
        ([Fragment(4096, 64, 64)], 4, 1000),
        ([Fragment(4096, 64, 0)], 4, LEAF),
        ([Fragment(0, 64, 64)], 4, LEAF),
        ([Fragment(4096, 32, 64)], 4, LEAF),
        ([Fragment(4096, 1 << 56, 64)], 4, LEAF),
        ([Fragment(4096, 2 * LEAF, LEAF + 1)], 4, LEAF),
    ],
)
def test_bad_groups(fragments: list[Fragment], blocks: int, shard: int) -> None:
    with pytest.raises(ValueError):
        BlockGroup.build(fragments, blocks, shard)


def test_runs_are_joined_where_both_sides_touch() -> None:
    one = BlockGroup.build([Fragment(1 << 20, 4096, 4096)], 64, LEAF)
    ids = np.array([5, 6, -1, 8], np.int32)
    assert one.runs(ids, 3 * LEAF, 1 << 30) == [
        Run((1 << 20) + 5 * 4096, 3 * LEAF, 8192),
        Run((1 << 20) + 8 * 4096, 3 * LEAF + 3 * 4096, 4096),
    ]
    # Consecutive in the chunk but not in memory, and the other way round.
    assert len(one.runs(np.array([6, 5], np.int32), 0, 1 << 30)) == 2
    assert len(one.runs(np.array([5, -1, 6], np.int32), 0, 1 << 30)) == 2
    assert one.runs(np.array([-1, -1], np.int32), 0, 1 << 30) == []
    # Fragments that touch may be different allocations: never one copy.
    two = BlockGroup.build([Fragment(4096, 4096, 2048), Fragment(6144, 4096, 2048)], 8, LEAF)
    assert len(two.runs(np.array([0, 1], np.int32), 0, 1 << 30)) == 4


def test_runs_are_cut_at_pinned_pieces() -> None:
    g = BlockGroup.build([Fragment(1 << 20, 10_000, 10_000)], 64, 3 * LEAF)
    runs = g.runs(np.array([0, 1, 2, 3], np.int32), 2 * LEAF, LEAF)
    assert [r.nbytes for r in runs] == [LEAF, LEAF, 40_000 - 2 * LEAF]
    assert all(b.offset == a.offset + a.nbytes for a, b in pairwise(runs))
    assert all(b.address == a.address + a.nbytes for a, b in pairwise(runs))


def test_arithmetic_is_64_bit() -> None:
    base, stride = 0x7F00_0000_0000, 2 << 20
    g = BlockGroup.build([Fragment(base, stride, stride)], 200_000, stride)
    (run,) = g.runs(np.array([199_999], np.int32), 200 << 30, 1 << 30)
    assert run == Run(base + 199_999 * stride, 200 << 30, stride)


def test_wanted_leaves() -> None:
    g = BlockGroup.build([Fragment(4096, LEAF // 2, LEAF // 2)], 64, 4 * LEAF)
    ids = np.array([0, -1, -1, -1, 4, 5, 6, -1], np.int32)
    assert g.wanted(ids) == [(0, LEAF), (2 * LEAF, 2 * LEAF)]
