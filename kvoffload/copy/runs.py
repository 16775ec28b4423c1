"""Geometry of a copy: which bytes of a slot go to which device addresses. Pure arithmetic.

All arithmetic is 64-bit: block ids arrive as int32 and are widened before they meet a stride.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from kvoffload.copy.base import Fragment
from kvoffload.types import LEAF_BYTES

I64 = npt.NDArray[np.int64]
_ADDRESS_SPACE = 1 << 57


class Run(NamedTuple):
    """``nbytes`` contiguous bytes at a device address and at an offset in the arena's data."""

    address: int
    offset: int
    nbytes: int


@dataclass(frozen=True, slots=True, eq=False)
class BlockGroup:
    """A KV group's blocks: arrays have one entry per fragment, all in bytes."""

    base: I64
    stride: I64
    nbytes: I64
    at: I64  # offset in the block's bytes
    block_bytes: int
    num_blocks: int
    shard_bytes: int

    @classmethod
    def build(cls, fragments: Sequence[Fragment], num_blocks: int, shard_bytes: int) -> BlockGroup:
        """Raises ValueError on fragments that overlap, leave the address space or do not fit."""
        if not fragments or not 0 < num_blocks < 1 << 31:
            raise ValueError(f"a group needs fragments and blocks, not {num_blocks} blocks")
        if shard_bytes <= 0 or shard_bytes % LEAF_BYTES:
            raise ValueError(f"shard_bytes {shard_bytes} is not a multiple of {LEAF_BYTES}")
        for i, f in enumerate(fragments):
            _check_fragment(i, f, num_blocks)
        total = sum(f.nbytes for f in fragments)
        if total > shard_bytes:
            raise ValueError(f"a block of {total} bytes does not fit shard_bytes {shard_bytes}")
        for a, b in combinations(fragments, 2):
            if _overlap(a, b, num_blocks):
                raise ValueError(f"fragments {a} and {b} overlap")
        nbytes = np.array([f.nbytes for f in fragments], np.int64)
        return cls(
            np.array([f.base for f in fragments], np.int64),
            np.array([f.stride for f in fragments], np.int64),
            nbytes,
            np.cumsum(nbytes) - nbytes,
            total,
            num_blocks,
            shard_bytes,
        )

    def runs(self, ids: npt.NDArray[np.int32], offset: int, piece_bytes: int) -> list[Run]:
        """Copies of one item, in slot order: blocks ``ids`` (-1: left out), shard at ``offset``.

        Consecutive blocks of a one-fragment group are joined where the device addresses touch; runs
        of different fragments never are, they may lie in allocations that only happen to be
        neighbours. No run crosses a multiple of ``piece_bytes`` in the arena: a copy must not
        straddle two separately pinned pieces.
        """
        index = np.flatnonzero(ids >= 0).astype(np.int64)
        if not len(index):
            return []
        block = ids[index].astype(np.int64)
        address = (self.base + block[:, None] * self.stride).ravel()
        at = (offset + index[:, None] * self.block_bytes + self.at).ravel()
        nbytes = np.tile(self.nbytes, len(index))
        if len(self.nbytes) == 1:
            touch = (address[:-1] + nbytes[:-1] == address[1:]) & (at[:-1] + nbytes[:-1] == at[1:])
            first = np.flatnonzero(np.concatenate(([True], ~touch)))
            nbytes = np.add.reduceat(nbytes, first)
            address, at = address[first], at[first]
        out = list(map(Run, address.tolist(), at.tolist(), nbytes.tolist()))
        if (at // piece_bytes != (at + nbytes - 1) // piece_bytes).any():
            out = [part for run in out for part in _split(run, piece_bytes)]
        return out

    def wanted(self, ids: npt.NDArray[np.int32]) -> list[tuple[int, int]]:
        """Leaf-aligned (offset in the shard, bytes) ranges that cover the blocks with id >= 0."""
        out: list[tuple[int, int]] = []
        for block in np.flatnonzero(ids >= 0).tolist():
            low = block * self.block_bytes // LEAF_BYTES * LEAF_BYTES
            high = -(-(block + 1) * self.block_bytes // LEAF_BYTES) * LEAF_BYTES
            if out and low <= out[-1][0] + out[-1][1]:
                out[-1] = (out[-1][0], high - out[-1][0])
            else:
                out.append((low, high - low))
        return out


def _split(run: Run, piece_bytes: int) -> list[Run]:
    out = []
    address, offset, left = run
    while left:
        n = min(left, piece_bytes - offset % piece_bytes)
        out.append(Run(address, offset, n))
        address, offset, left = address + n, offset + n, left - n
    return out


def _check_fragment(i: int, f: Fragment, num_blocks: int) -> None:
    if not 0 < f.base < _ADDRESS_SPACE or f.nbytes <= 0:
        raise ValueError(f"fragment {i} has a bad address or size: {f}")
    if num_blocks > 1 and f.stride < f.nbytes:
        raise ValueError(f"fragment {i} overlaps itself, stride below its size: {f}")
    if f.stride < 0 or f.base + f.stride * num_blocks > _ADDRESS_SPACE:
        raise ValueError(f"fragment {i} leaves the address space: {f}")


def _overlap(a: Fragment, b: Fragment, blocks: int) -> bool:
    """Does some block of ``a`` share bytes with some block of ``b``?"""
    last = blocks - 1
    if a.base + last * a.stride + a.nbytes <= b.base:
        return False
    if b.base + last * b.stride + b.nbytes <= a.base:
        return False
    if blocks == 1:
        return True
    if a.stride == b.stride:
        # The picture repeats: block k of b starts ``rest`` after block k - turns of a.
        turns, rest = divmod(b.base - a.base, a.stride)
        return (abs(turns) < blocks and rest < a.nbytes) or (
            abs(turns + 1) < blocks and a.stride - rest < b.nbytes
        )
    low = a.base + np.arange(blocks, dtype=np.int64) * a.stride
    for shift in (0, 1):  # the block of b that starts at or before, and the next one
        k = np.clip((low - b.base) // b.stride + shift, 0, last)
        start = b.base + k * b.stride
        if ((start < low + a.nbytes) & (low < start + b.nbytes)).any():
            return True
    return False
