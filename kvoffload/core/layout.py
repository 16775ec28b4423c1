"""Pure geometry: KV tensors as byte runs per block, chunk sizes, and the group layout's rules.

Everything follows from strides and addresses, never from what a tensor's dimensions mean. The order
of runs is the order of bytes in a slot, which outlives the process on NVMe: it depends on the order
in which tensors are given and on relative offsets, never on where the allocator put a tensor.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import product
from math import lcm
from typing import NamedTuple

from kvoffload.errors import ConfigError
from kvoffload.types import CacheLayout, GroupKind, GroupLayout

CHUNK_TARGET_BYTES = 1 << 20
CHUNK_MAX_TOKENS = 128
MAX_RUNS_PER_BLOCK = 65536


class Run(NamedTuple):
    """Block ``b`` has ``nbytes`` bytes at address ``base + b * stride``. All in bytes."""

    base: int
    stride: int
    nbytes: int


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """A registered KV tensor as plain integers; dim 0 is the block. Strides count elements."""

    shape: tuple[int, ...]
    strides: tuple[int, ...]
    itemsize: int
    base: int  # data_ptr of element 0, storage offset included


def _block_dims(
    shape: Sequence[int], strides: Sequence[int], itemsize: int, num_blocks: int | None
) -> tuple[int, list[tuple[int, int]]]:
    """(block stride in bytes, inner dims as (size, stride bytes) in ascending stride order)."""
    if not shape or len(shape) != len(strides) or itemsize <= 0:
        raise ValueError(f"not a KV tensor: shape {tuple(shape)}, strides {tuple(strides)}")
    if min(shape) <= 0:
        raise ValueError(f"empty KV tensor: shape {tuple(shape)}")
    if any(s < 0 for n, s in zip(shape, strides, strict=True) if n > 1):
        raise ValueError(f"negative stride: {tuple(strides)}")
    dims = list(zip(shape, strides, strict=True))
    blocks, stride = dims[0]
    inner = dims[1:]
    if num_blocks is not None and blocks != num_blocks:
        # Kernel blocks: the attention backend splits each manager block into k smaller ones.
        if num_blocks <= 0 or blocks % num_blocks:
            raise ValueError(f"dim 0 is {blocks}, not a multiple of the {num_blocks} blocks")
        k = blocks // num_blocks
        inner = [(k, stride), *inner]
        stride *= k
    # A dim of size 1 has no meaningful stride; stride 0 repeats the same bytes.
    kept = sorted((s * itemsize, n) for n, s in inner if n > 1 and s > 0)
    return stride * itemsize, [(n, s) for s, n in kept]


def fragments(
    shape: Sequence[int],
    strides: Sequence[int],
    itemsize: int,
    base: int,
    num_blocks: int | None = None,
) -> list[Run]:
    """Runs of one tensor's block, ascending by offset; dense inner dims give one run.

    ``strides`` count elements, ``base`` is the address of element 0. ``num_blocks`` is the number
    of the manager's blocks: where dim 0 is k times that, k kernel blocks make up one block. Raises
    ValueError on tensors that are empty, overlap themselves, or fall into too many pieces.
    """
    block_stride, dims = _block_dims(shape, strides, itemsize, num_blocks)
    run = itemsize
    dense = 0
    for size, stride in dims:
        if stride != run:
            break
        run *= size
        dense += 1
    outer = dims[dense:]
    pieces = 1
    for size, _ in outer:
        pieces *= size
    if pieces > MAX_RUNS_PER_BLOCK:
        raise ValueError(f"a block falls into {pieces} pieces (shape {tuple(shape)})")
    offsets = sorted(
        sum(i * s for i, (_, s) in zip(index, outer, strict=True))
        for index in product(*(range(n) for n, _ in outer))
    )
    out: list[Run] = []
    for offset in offsets:
        if out and out[-1].base + out[-1].nbytes > base + offset:
            raise ValueError(f"tensor overlaps itself: {tuple(shape)}, strides {tuple(strides)}")
        if out and out[-1].base + out[-1].nbytes == base + offset:
            out[-1] = out[-1]._replace(nbytes=out[-1].nbytes + run)
        else:
            out.append(Run(base + offset, block_stride, run))
    blocks = shape[0] if num_blocks is None else num_blocks
    if blocks > 1 and any(r.nbytes > r.stride for r in out):
        raise ValueError(f"blocks overlap: {tuple(shape)}, strides {tuple(strides)}")
    return out


def merge(runs: Iterable[Run]) -> list[Run]:
    """Drop runs given twice (aliased tensors) and join runs that touch inside a block.

    Only runs of one block stride are joined, and never beyond the stride. With two blocks or more
    that cannot join separate allocations that happen to be neighbours: the first one's later blocks
    lie in between. A joined run stands where its first member stood, so order is free of addresses.
    """
    unique = list(dict.fromkeys(runs))
    by_start = {(r.stride, r.base): r for r in unique}
    if len(by_start) != len(unique):
        raise ValueError("two tensors start at one address with different lengths")
    starts_after = {(r.stride, r.base + r.nbytes) for r in unique}
    head_of: dict[Run, Run] = {}
    joined: dict[Run, Run] = {}
    for head in unique:
        if (head.stride, head.base) in starts_after:
            continue
        _walk(head, by_start, head_of, joined)
    for run in unique:  # pieces cut off by the stride limit start runs of their own
        if run not in head_of:
            _walk(run, by_start, head_of, joined)
    return list(dict.fromkeys(joined[head_of[r]] for r in unique))


def _walk(
    head: Run,
    by_start: dict[tuple[int, int], Run],
    head_of: dict[Run, Run],
    joined: dict[Run, Run],
) -> None:
    total = head
    piece: Run | None = head
    while piece is not None:
        head_of[piece] = head
        after = by_start.get((head.stride, total.base + total.nbytes))
        if after is None or after in head_of or total.nbytes + after.nbytes > head.stride:
            break
        total = total._replace(nbytes=total.nbytes + after.nbytes)
        piece = after
    joined[head] = total


def block_runs(tensors: Iterable[TensorSpec], num_blocks: int) -> list[Run]:
    """All runs of one block of a KV group, in slot order: fragments of every tensor, merged."""
    runs: list[Run] = []
    for t in tensors:
        runs += fragments(t.shape, t.strides, t.itemsize, t.base, num_blocks)
    return merge(runs)


def fingerprint(tensors: Sequence[TensorSpec], num_blocks: int) -> bytes:
    """32-byte digest of how elements map to a slot's bytes; part of the namespace.

    Equal for two engines exactly when a slot written by one can be read by the other: it covers
    inner shapes, dim order and each piece's place in the slot, and not addresses or block counts.
    """
    merged = block_runs(tensors, num_blocks)
    places: list[tuple[Run, int]] = []
    at = 0
    for run in merged:
        places.append((run, at))
        at += run.nbytes
    digest = hashlib.sha256(b"kvoffload/geometry/v1")
    for t in tensors:
        _, dims = _block_dims(t.shape, t.strides, t.itemsize, num_blocks)
        inner = list(zip(t.shape, t.strides, strict=True))[1:]
        order = sorted(range(len(inner)), key=lambda d: (inner[d][0] > 1, inner[d][1]))
        order = [d for d in order if inner[d][0] > 1]
        digest.update(repr((t.itemsize, t.shape[1:], order, [n for n, _ in dims])).encode())
        for piece in fragments(t.shape, t.strides, t.itemsize, t.base, num_blocks):
            for run, place in places:
                inside = piece.base - run.base
                if run.stride == piece.stride and 0 <= inside < run.nbytes:
                    digest.update(repr((place + inside, piece.nbytes)).encode())
    return digest.digest()


def choose_blocks_per_chunk(
    block_bytes_all_shards: int, block_tokens: int, kind: GroupKind, chunk_tokens: int | None = None
) -> int:
    """Blocks per chunk: the fewest that make 1 MiB, at most 128 tokens, at least one block.

    SLIDING groups always use one block, because their blocks leave the window one by one. An
    explicit ``chunk_tokens`` wins elsewhere; ConfigError when it is not a positive multiple of the
    block.
    """
    if kind is not GroupKind.FULL:
        return 1
    if chunk_tokens is not None:
        if chunk_tokens <= 0 or chunk_tokens % block_tokens:
            raise ConfigError(
                f"chunk_tokens={chunk_tokens}: must be a positive multiple of the KV block "
                f"({block_tokens} tokens)"
            )
        return chunk_tokens // block_tokens
    wanted = -(-CHUNK_TARGET_BYTES // max(1, block_bytes_all_shards))
    return max(1, min(wanted, CHUNK_MAX_TOKENS // block_tokens))


def boundary_tokens(layout: CacheLayout) -> int:
    """A hit may end only on multiples of this: the engine's grid and every group's chunk end."""
    served = [g.chunk_tokens for g in layout.groups if g.kind is not GroupKind.NONE]
    return lcm(max(1, layout.align_tokens), *served)


def writer_mask(group: GroupLayout, world_size: int) -> int:
    """Ranks that must fill a slot of ``group``: bit r for rank r.

    With fewer shards than ranks (MLA, replicated KV heads) neighbouring ranks hold the same bytes
    and the first rank of each run of ``world_size / shards`` ranks writes.
    """
    step = world_size // group.shards
    return sum(1 << r for r in range(0, step * group.shards, step))


def check_layout(layout: CacheLayout) -> None:
    """Raise ConfigError naming the first thing about ``layout`` that cannot be served."""
    if not layout.groups or layout.hash_tokens <= 0 or layout.world_size <= 0:
        raise ConfigError("layout: needs a KV group, hash_tokens > 0 and world_size > 0")
    for n, g in enumerate(layout.groups):
        if g.group != n:
            raise ConfigError(f"layout: KV group number {g.group} stands at place {n}")
        if g.kind is GroupKind.NONE:
            continue
        if g.chunk_tokens <= 0 or g.block_bytes <= 0:
            raise ConfigError(f"layout: KV group {n} has empty blocks")
        if g.chunk_tokens % layout.hash_tokens:
            raise ConfigError(
                f"chunk_tokens={g.chunk_tokens} of KV group {n} is not a multiple of the hash "
                f"block ({layout.hash_tokens} tokens)"
            )
        if g.shards <= 0 or layout.world_size % g.shards:
            raise ConfigError(f"layout: {g.shards} shards do not divide {layout.world_size} ranks")
        if g.kind is GroupKind.SLIDING and g.window <= 0:
            raise ConfigError(f"layout: sliding KV group {n} has no window")
