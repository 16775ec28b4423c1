"""Geometry from strides, against real strided arrays: every byte of a block, once, in a stable order."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvoffload.core.layout import (
    Run,
    TensorSpec,
    block_runs,
    boundary_tokens,
    check_layout,
    choose_blocks_per_chunk,
    fingerprint,
    fragments,
    merge,
    writer_mask,
)
from kvoffload.errors import ConfigError
from kvoffload.types import GroupKind
from tests.support.fakes import full_group, layout_of, sliding_group


def runs_of(array: np.ndarray, num_blocks: int | None = None) -> list[Run]:
    return fragments(
        array.shape,
        [s // array.itemsize for s in array.strides],
        array.itemsize,
        array.__array_interface__["data"][0],
        num_blocks,
    )


def spec(array: np.ndarray) -> TensorSpec:
    return TensorSpec(
        array.shape,
        tuple(s // array.itemsize for s in array.strides),
        array.itemsize,
        array.__array_interface__["data"][0],
    )


def covered(runs: list[Run], block: int) -> list[int]:
    return [r.base + block * r.stride + i for r in runs for i in range(r.nbytes)]


def addresses(array: np.ndarray) -> set[int]:
    """Every byte address of an array, the slow and certain way."""
    base = array.__array_interface__["data"][0]
    out = set()
    for index in np.ndindex(array.shape):
        at = base + sum(i * s for i, s in zip(index, array.strides, strict=True))
        out.update(range(at, at + array.itemsize))
    return out


@given(data=st.data())
def test_runs_cover_exactly_the_bytes_of_each_block(data: st.DataObject) -> None:
    rank = data.draw(st.integers(1, 4))
    shape = data.draw(st.lists(st.integers(1, 4), min_size=rank, max_size=rank))
    pad = data.draw(st.lists(st.integers(0, 2), min_size=rank, max_size=rank))
    order = data.draw(st.permutations(range(rank)))
    big = np.zeros([n + p for n, p in zip(shape, pad, strict=True)], np.uint16)
    array = big[tuple(slice(0, n) for n in shape)].transpose(order)
    runs = runs_of(array)
    for block in range(array.shape[0]):
        got = covered(runs, block)
        assert len(got) == len(set(got)) and set(got) == addresses(array[block : block + 1])


@pytest.mark.parametrize(
    ("array", "count"),
    [
        (np.zeros((4, 2, 3, 8), np.float32), 1),  # dense
        (np.zeros((4, 3, 2, 8), np.float32).transpose(0, 2, 1, 3), 1),  # permuted inside a block
        (np.zeros((2, 4, 3, 8), np.float32).transpose(1, 0, 2, 3), 2),  # K of all blocks, then V
        (np.zeros((4, 3, 16), np.float32)[:, :, :8], 3),  # holes
        (np.zeros((4, 1, 3, 8), np.float32), 1),
    ],
)
def test_dense_memory_is_one_run(array: np.ndarray, count: int) -> None:
    assert len(runs_of(array)) == count


def test_size_one_dims_ignore_their_stride_and_stride_zero_repeats() -> None:
    assert fragments((4, 1, 8), (8, 999, 1), 2, 0) == [Run(0, 16, 16)]
    assert fragments((4, 5, 8), (8, 0, 1), 2, 0) == [Run(0, 16, 16)]


def test_kernel_blocks_are_regrouped() -> None:
    array = np.zeros((12, 2, 8), np.uint8)
    assert runs_of(array, 4) == [Run(array.__array_interface__["data"][0], 48, 48)]
    split = np.zeros((2, 12, 8), np.uint8).transpose(1, 0, 2)  # K/V apart, 3 kernel blocks each
    assert [(r.stride, r.nbytes) for r in runs_of(split, 4)] == [(24, 24), (24, 24)]
    with pytest.raises(ValueError, match="not a multiple"):
        runs_of(array, 5)


@pytest.mark.parametrize(
    ("shape", "strides"),
    [((), ()), ((4, 0), (1, 1)), ((4, 2), (-2, 1)), ((4, 4, 4), (8, 2, 1)), ((4, 4), (2, 1))],
)
def test_impossible_tensors_are_refused(shape: tuple[int, ...], strides: tuple[int, ...]) -> None:
    with pytest.raises(ValueError):
        fragments(shape, strides, 1, 0)


def test_layers_inside_one_block_merge_whatever_their_order() -> None:
    """Block-outermost layout: 3 layers interleaved in one buffer make one run per block."""
    big = np.zeros((4, 3, 32), np.uint8)
    layers = [big[:, i] for i in (2, 0, 1)]
    runs = block_runs([spec(a) for a in layers], 4)
    assert runs == [Run(big.__array_interface__["data"][0], 96, 96)]


def test_separate_layers_keep_their_order_not_their_addresses() -> None:
    big = np.zeros((3, 4, 32), np.uint8)
    base = big.__array_interface__["data"][0]
    runs = block_runs([spec(big[i]) for i in (2, 0, 1)], 4)
    assert [r.base - base for r in runs] == [256, 0, 128]


def test_aliases_are_dropped_and_conflicts_refused() -> None:
    a = Run(0, 64, 32)
    assert merge([a, Run(32, 64, 32), a]) == [Run(0, 64, 64)]
    with pytest.raises(ValueError, match="different lengths"):
        merge([a, Run(0, 64, 16)])


def test_fingerprint_sees_geometry_and_not_addresses_or_block_counts() -> None:
    def two(blocks: int, heads_first: bool = False, swap: bool = False) -> bytes:
        out = []
        for _ in range(2):
            a = np.zeros((blocks, 2, 8, 4), np.float16)
            if heads_first:
                a = np.zeros((blocks, 8, 2, 4), np.float16).transpose(0, 2, 1, 3)
            out.append(spec(a))
        return fingerprint(out[::-1] if swap else out, blocks)

    assert two(4) == two(4) == two(7) == two(4, swap=True)
    assert two(4) != two(4, heads_first=True)
    big = np.zeros((4, 2, 2, 8, 4), np.float16)
    inside = [spec(big[:, 0]), spec(big[:, 1])]
    assert fingerprint(inside, 4) == two(4)  # the same bytes in the same places of the slot
    assert fingerprint(inside[::-1], 4) != two(4)  # layers the other way round in the slot


@pytest.mark.parametrize(
    ("block_bytes", "tokens", "kind", "chunk_tokens", "want"),
    [
        (1 << 20, 16, GroupKind.FULL, None, 1),
        ((1 << 20) - 1, 16, GroupKind.FULL, None, 2),
        (1 << 18, 16, GroupKind.FULL, None, 4),
        (1 << 10, 16, GroupKind.FULL, None, 8),  # 128 tokens
        (1 << 10, 64, GroupKind.FULL, None, 2),
        (1 << 10, 512, GroupKind.FULL, None, 1),
        (1 << 10, 16, GroupKind.FULL, 64, 4),
        (1 << 10, 16, GroupKind.SLIDING, None, 1),
        (1 << 10, 16, GroupKind.SLIDING, 64, 1),
    ],
)
def test_chunk_size(
    block_bytes: int, tokens: int, kind: GroupKind, chunk_tokens: int | None, want: int
) -> None:
    assert choose_blocks_per_chunk(block_bytes, tokens, kind, chunk_tokens) == want


@pytest.mark.parametrize("bad", [0, -16, 24])
def test_bad_chunk_tokens_name_the_key(bad: int) -> None:
    with pytest.raises(ConfigError, match=f"chunk_tokens={bad}"):
        choose_blocks_per_chunk(1, 16, GroupKind.FULL, bad)


def test_writers_and_boundaries() -> None:
    group = replace(full_group(), shards=4)
    assert writer_mask(group, 4) == 0b1111
    assert writer_mask(replace(group, shards=2), 8) == 0b10001
    assert writer_mask(replace(group, shards=1), 4) == 0b1
    layout = layout_of(full_group(0, blocks=4), sliding_group(1, window=64, block_tokens=48))
    assert boundary_tokens(layout) == 192


@pytest.mark.parametrize(
    "layout",
    [
        layout_of(full_group(1)),
        layout_of(full_group(block_tokens=24)),
        layout_of(sliding_group(0, window=0)),
        layout_of(replace(full_group(), shards=3), world_size=4),
        layout_of(replace(full_group(), block_bytes=0)),
    ],
)
def test_layouts_that_cannot_be_served_are_refused(layout) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(ConfigError):
        check_layout(layout)
