"""Work of the copy kernels as tables of 64-bit integers, and the hash keys. numpy only.

A kernel gets one int64 table. Plain copies: rows of (source, destination, bytes). Checked copies:

    word 0   device-visible address of the shard
    word 1   device-visible address of the shard's uint64 leaf hashes
    word 2   device-visible address of the int32 that counts bad leaves
    word 4   48 words made from the seed (hash_keys)
    word 52  rows (leaf, begin, end, 0): the leaf's pieces are at table[begin:end]
    then     pieces (address, first byte in the leaf, bytes)

Runs are cut so that no piece crosses a leaf. Pieces, or leaves with all their pieces, are sorted by
the alignment their addresses, offsets and sizes share; each alignment present is one launch.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from kvoffload.copy.mover import LeafCheck
from kvoffload.copy.runs import I64, Run
from kvoffload.types import LEAF_BYTES

U64 = npt.NDArray[np.uint64]

ALIGNS = (16, 8, 4, 1)
NARROW_BYTES = 2048
"""A launch whose pieces are all this small takes several of them at a time."""

UNITS_AT = 52
UNIT_WORDS = 4
_SEED_LIMIT = 1 << 64

_SECRET = bytes.fromhex(
    "b8fe6c3923a44bbe7c01812cf721ad1cded46de9839097db7240a4a4b7b3671f"
    "cb79e64eccc0e578825ad07dccff7221b8084674f743248ee03590e6813a264c"
    "3c2852bb91c300cb88d0658b1b532ea371644897a20df94e3819ef46a9deacd8"
    "a8fa763fe39c343ff9dcbbc7c70b4f1d8a51e04bcdb45931c89f7ec9d9787364"
    "eac5ac8334d3ebc3c581a0fffa1363eb170ddd51b7f0da49d316552629d4689e"
    "2b16be587d47a1fc8ff8b8d17ad031ce45cb3a8f95160428afd7fbcabb4b407e"
)
"""XXH3's default secret, 192 bytes."""
_LAST_STRIPE_AT, _MERGE_AT = 192 - 64 - 7, 11
_FIRST_LANES = (
    0xC2B2AE3D,
    0x9E3779B185EBCA87,
    0xC2B2AE3D27D4EB4F,
    0x165667B19E3779F9,
    0x85EBCA77C2B2AE63,
    0x85EBCA77,
    0x27D4EB2F165667C5,
    0x9E3779B1,
)


class Spec(NamedTuple):
    """One specialisation of a kernel; launches differ in nothing else that is compiled in."""

    kernel: str  # "copy_pieces", "store_leaves", "load_leaves"
    align: int  # one of ALIGNS
    rows: int = 0  # copy_pieces: pieces taken at a time
    width: int = 0  # copy_pieces: most bytes of a piece

    @property
    def element(self) -> int:
        """Bytes of the element that is moved."""
        return min(self.align, 8)

    @property
    def warps(self) -> int:
        """Chosen for registers: a leaf is held in them; none of these spills (the golden table)."""
        if self.kernel == "copy_pieces":
            return 16 if self.align == 1 else 8
        return {16: 2, 8: 2, 4: 8, 1: 16}[self.align]


SPECS: tuple[Spec, ...] = tuple(
    spec
    for align in ALIGNS
    for spec in (
        Spec("copy_pieces", align, 1, LEAF_BYTES),
        Spec("copy_pieces", align, LEAF_BYTES // NARROW_BYTES, NARROW_BYTES),
        Spec("store_leaves", align),
        Spec("load_leaves", align),
    )
)
"""Every specialisation there is."""


class Launch(NamedTuple):
    """A kernel over the units [first, last) of the table."""

    spec: Spec
    first: int
    last: int


@dataclass(frozen=True, slots=True, eq=False)
class Work:
    """All of an item's copies. ``table`` must stay unchanged until the launches have run."""

    table: I64
    launches: tuple[Launch, ...]


class _Pieces(NamedTuple):
    address: I64
    offset: I64
    nbytes: I64


def hash_keys(seed: int) -> U64:
    """The words XXH3-64 of a leaf mixes in: secret 24, last stripe 8, merge 8, first lanes 8.

    Secret derivation as in XXH3's seeded variants; seed 0 gives the default secret.
    """
    if not 0 <= seed < _SEED_LIMIT:
        raise ValueError(f"seed {seed} is not 64 bits")
    secret = np.frombuffer(_SECRET, "<u8").astype(np.uint64)
    secret[0::2] += np.uint64(seed)
    secret[1::2] -= np.uint64(seed)
    raw = secret.astype("<u8").tobytes()
    return np.concatenate(
        [
            secret,
            np.frombuffer(raw, "<u8", 8, _LAST_STRIPE_AT),
            np.frombuffer(raw, "<u8", 8, _MERGE_AT),
            np.array(_FIRST_LANES, np.uint64),
        ]
    )


def plain_work(runs: Sequence[Run], arena: int, to_device: bool) -> Work:
    """Copies of ``runs`` without checksums. Raises ValueError on a run that is no run."""
    pieces = _cut(runs)
    if not len(pieces.nbytes):
        return Work(np.empty(0, np.int64), ())
    host = pieces.offset + arena
    align = _alignment(pieces.address | host | pieces.nbytes)
    order, ranges = _by_alignment(align)
    source, target = (host, pieces.address) if to_device else (pieces.address, host)
    table = np.stack([source, target, pieces.nbytes], axis=1)[order]
    launches = []
    for value, first, last in ranges:
        small = int(table[first:last, 2].max()) <= NARROW_BYTES
        rows, width = (LEAF_BYTES // NARROW_BYTES, NARROW_BYTES) if small else (1, LEAF_BYTES)
        launches.append(Launch(Spec("copy_pieces", value, rows, width), first, last))
    return Work(table.ravel(), tuple(launches))


def checked_work(runs: Sequence[Run], arena: int, to_device: bool, check: LeafCheck) -> Work:
    """Copies of ``runs`` with checksums.

    A store covers every leaf of the shard. A load covers the leaves of ``check`` and refuses runs
    outside of them: nothing goes to a block unchecked. Raises ValueError on what does not fit.
    """
    low, high = _checked_range(check, to_device)
    if (arena + check.shard) % 16:
        raise ValueError(f"shard at {arena + check.shard:#x} is not aligned to 16 bytes")
    pieces = _cut(runs)
    at = pieces.offset - check.shard
    leaf = at // LEAF_BYTES
    if len(leaf) and not (low <= leaf.min() and leaf.max() < high):
        raise ValueError(f"a run lies outside the leaves [{low}, {high}) that are checked")
    by_leaf = np.argsort(leaf, kind="stable")
    rows = np.stack([pieces.address, at - leaf * LEAF_BYTES, pieces.nbytes], axis=1)[by_leaf]
    leaves = np.arange(low, high, dtype=np.int64)
    begin = np.searchsorted(leaf[by_leaf], leaves).astype(np.int64)
    end = np.append(begin[1:], len(rows))
    bits = np.zeros(high - low, np.int64)
    np.bitwise_or.at(bits, leaf - low, pieces.address | (at % LEAF_BYTES) | pieces.nbytes)
    order, ranges = _by_alignment(_alignment(bits))
    pieces_at = UNITS_AT + UNIT_WORDS * len(leaves)
    units = np.zeros((len(leaves), UNIT_WORDS), np.int64)
    units[:, 0], units[:, 1], units[:, 2] = leaves, pieces_at + 3 * begin, pieces_at + 3 * end
    head = np.array([arena + check.shard, check.leaves, check.bad, 0], np.int64)
    keys = hash_keys(check.seed).view(np.int64)
    kernel, unit = ("load_leaves" if to_device else "store_leaves"), UNITS_AT // UNIT_WORDS
    return Work(
        np.concatenate([head, keys, units[order].ravel(), rows.ravel()]),
        tuple(Launch(Spec(kernel, a), unit + first, unit + last) for a, first, last in ranges),
    )


def _checked_range(check: LeafCheck, to_device: bool) -> tuple[int, int]:
    """First leaf and the one after the last that the kernel works on."""
    if check.shard % LEAF_BYTES or check.shard_bytes <= 0 or check.shard_bytes % LEAF_BYTES:
        raise ValueError(f"shard {check.shard}+{check.shard_bytes} is not made of leaves")
    leaves = check.shard_bytes // LEAF_BYTES
    if not to_device:
        return 0, leaves
    if check.first < 0 or check.count < 0 or check.first + check.count > leaves:
        raise ValueError(f"leaves {check.first}+{check.count} of a shard of {leaves}")
    return check.first, check.first + check.count


def _cut(runs: Sequence[Run]) -> _Pieces:
    """The runs as pieces of at most a leaf that cross no multiple of LEAF_BYTES in the arena."""
    flat = np.fromiter(chain.from_iterable(runs), np.int64, 3 * len(runs)).reshape(-1, 3)
    address, offset, nbytes = flat[:, 0], flat[:, 1], flat[:, 2]
    if (nbytes <= 0).any() or (offset < 0).any() or (address <= 0).any():
        raise ValueError("a run has no bytes or no address")
    first = offset // LEAF_BYTES
    count = (offset + nbytes - 1) // LEAF_BYTES - first + 1
    if (count == 1).all():
        return _Pieces(address, offset, nbytes)
    run = np.repeat(np.arange(len(runs)), count)
    leaf = first[run] + np.arange(len(run)) - np.repeat(np.cumsum(count) - count, count)
    low = np.maximum(offset[run], leaf * LEAF_BYTES)
    high = np.minimum((offset + nbytes)[run], (leaf + 1) * LEAF_BYTES)
    return _Pieces(address[run] + (low - offset[run]), low, high - low)


def _alignment(bits: I64) -> I64:
    """The largest of ALIGNS that divides each."""
    choices = [np.full(bits.shape, a, np.int64) for a in ALIGNS]
    return np.select([bits % a == 0 for a in ALIGNS], choices)


def _by_alignment(align: I64) -> tuple[I64, list[tuple[int, int, int]]]:
    """Order that sorts by falling alignment, and (alignment, first, last) of each part."""
    order = np.argsort(-align, kind="stable").astype(np.int64)
    ranges, first = [], 0
    for value in ALIGNS:
        count = int((align == value).sum())
        if count:
            ranges.append((value, first, first + count))
        first += count
    return order, ranges


if sys.byteorder != "little":  # the hash reads words as they lie in memory
    raise ImportError("kvoffload's copy kernels need a little-endian machine")
