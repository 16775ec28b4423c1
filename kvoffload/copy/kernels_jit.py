"""Triton source of the copy kernels. Imports triton: only kernels.py imports this, when it must.

Every address is a plain 64-bit integer read from an int64 work table on the device (kernels_table
writes it); the table is the only pointer argument. A program works through the units ``first + its
number, + the number of programs, ...`` below ``last``, so a launch takes as few programs as wanted.

The element (``DTYPE``, ``ELEM`` bytes) and ``ALIGN`` are those all addresses, offsets and sizes of
the launch are multiples of. ALIGN 16 makes the compiler access 16 bytes at a time; below it, ALIGN
is ELEM. Masks are exact: no byte outside a piece is read or written.

A leaf is hashed as [16 blocks of 1024 bytes, 16 stripes, 4 pairs of lanes, 2 lanes] of 64-bit
words: within a block contributions only add up, so they are a parallel sum; between blocks the
eight lanes are scrambled, a chain of 15 steps that every thread runs in registers. With 64 threads
of 16 bytes each the block number is a register number and no step of the chain leaves the thread.

Annotations name what triton lets a kernel see: ``tl.tensor`` stands for any run-time value.
"""

# triton's decorators are untyped and its functions are compiled, not called.
# mypy: disable-error-code="untyped-decorator"

from __future__ import annotations

import triton
import triton.language as tl

LEAF_WORDS = tl.constexpr(2048)
KEYS = tl.constexpr(4)  # words of the table's header, see kernels_table
PRIME32_1 = tl.constexpr(0x9E3779B1)
LENGTH_TERM = tl.constexpr(16384 * 0x9E3779B185EBCA87 & (1 << 64) - 1)
AVALANCHE = tl.constexpr(0x165667919E3779F9)


@triton.jit
def _row(rows: tl.tensor, number: tl.constexpr) -> tl.tensor:
    """Row ``number`` of a [16, 4] tensor."""
    return tl.sum(tl.where(tl.arange(0, 16)[:, None] == number, rows, 0), axis=0)


@triton.jit
def _leaf_hash(words: tl.tensor, table: tl.tensor) -> tl.tensor:
    """XXH3-64 of 2048 words, with the 48 words of kernels_table.hash_keys in the table."""
    keys = (table + KEYS).to(tl.pointer_type(tl.uint64))
    stripe, lane = tl.arange(0, 16)[:, None], tl.arange(0, 8)[None, :]
    usual = tl.load(keys + stripe + lane)[None, :, :]
    # The leaf's last stripe takes its keys from another place of the secret.
    final = tl.load(keys + 24 + stripe * 0 + lane)[None, :, :]
    block = tl.arange(0, 16)[:, None, None]
    is_final = (block == 15) & (tl.arange(0, 16)[None, :, None] == 15)
    words = tl.reshape(words, [16, 16, 8])
    mixed = words ^ tl.where(is_final, final, usual)
    product = (mixed & 0xFFFFFFFF) * (mixed >> 32)
    word0, word1 = tl.split(tl.reshape(words, [16, 16, 4, 2]))
    product0, product1 = tl.split(tl.reshape(product, [16, 16, 4, 2]))
    rows0 = tl.sum(product0 + word1, axis=1)  # a lane's word counts for its neighbour
    rows1 = tl.sum(product1 + word0, axis=1)
    pair = tl.arange(0, 4) * 2
    acc0, acc1 = tl.load(keys + 40 + pair), tl.load(keys + 41 + pair)
    scramble0, scramble1 = tl.load(keys + 16 + pair), tl.load(keys + 17 + pair)
    for number in tl.static_range(15):
        acc0 += _row(rows0, number)
        acc1 += _row(rows1, number)
        acc0 = ((acc0 ^ (acc0 >> 47)) ^ scramble0) * PRIME32_1
        acc1 = ((acc1 ^ (acc1 >> 47)) ^ scramble1) * PRIME32_1
    acc0 = (acc0 + _row(rows0, 15)) ^ tl.load(keys + 32 + pair)
    acc1 = (acc1 + _row(rows1, 15)) ^ tl.load(keys + 33 + pair)
    result = tl.sum((acc0 * acc1) ^ tl.umulhi(acc0, acc1), axis=0) + LENGTH_TERM
    result = (result ^ (result >> 37)) * AVALANCHE
    return result ^ (result >> 32)


@triton.jit
def _piece(
    table: tl.tensor, at: tl.tensor, ELEM: tl.constexpr, DTYPE: tl.constexpr, ALIGN: tl.constexpr
) -> tl.tensor:
    """Pointer and mask for each element of a leaf, of the piece whose entry is at ``table[at]``."""
    index = tl.arange(0, 8 * LEAF_WORDS // ELEM)
    low = tl.multiple_of(tl.load(table + at + 1).to(tl.int32), ALIGN)
    size = tl.multiple_of(tl.load(table + at + 2).to(tl.int32), ALIGN)
    # May point below the piece's allocation: only elements inside the piece are accessed.
    start = tl.multiple_of((tl.load(table + at) - low).to(tl.pointer_type(DTYPE)), ALIGN)
    first, last = low // ELEM, (low + size) // ELEM
    return start + index, (index >= first) & (index < last)


@triton.jit
def _words_at(table: tl.tensor, leaf: tl.tensor) -> tl.tensor:
    """Pointers to a leaf's words in the arena."""
    arena = (tl.load(table) + leaf * (8 * LEAF_WORDS)).to(tl.pointer_type(tl.uint64))
    return tl.multiple_of(arena, 16) + tl.arange(0, LEAF_WORDS)


@triton.jit
def _hash_at(table: tl.tensor, leaf: tl.tensor) -> tl.tensor:
    """Pointer to a leaf's hash. Asked for late: until then it would take registers."""
    return tl.load(table + 1).to(tl.pointer_type(tl.uint64)) + leaf


@triton.jit(do_not_specialize=["first", "last"])
def copy_pieces(
    table: tl.tensor,
    first: tl.tensor,
    last: tl.tensor,
    ELEM: tl.constexpr,
    DTYPE: tl.constexpr,
    ALIGN: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
) -> None:
    """Copy pieces: ``table`` holds (source, destination, bytes <= WIDTH) each; ROWS at a time."""
    row, index = tl.arange(0, ROWS), tl.arange(0, WIDTH // ELEM)[None, :]
    for at in range(first + tl.program_id(0) * ROWS, last, tl.num_programs(0) * ROWS):
        entry, live = table + (at + row) * 3, at + row < last
        source = tl.load(entry, mask=live, other=0).to(tl.pointer_type(DTYPE))
        target = tl.load(entry + 1, mask=live, other=0).to(tl.pointer_type(DTYPE))
        size = tl.multiple_of(tl.load(entry + 2, mask=live, other=0).to(tl.int32), ALIGN)
        mask = index < (size // ELEM)[:, None]
        values = tl.load(tl.multiple_of(source, ALIGN)[:, None] + index, mask=mask)
        tl.store(tl.multiple_of(target, ALIGN)[:, None] + index, values, mask=mask)


@triton.jit(do_not_specialize=["first", "last"])
def store_leaves(
    table: tl.tensor,
    first: tl.tensor,
    last: tl.tensor,
    ELEM: tl.constexpr,
    DTYPE: tl.constexpr,
    ALIGN: tl.constexpr,
) -> None:
    """Gather leaves into the arena, zero what no piece covers, write each leaf's hash."""
    PARTS: tl.constexpr = 8 // ELEM
    for unit in range(first + tl.program_id(0), last, tl.num_programs(0)):
        entry = table + unit * 4
        leaf = tl.load(entry)
        values = tl.zeros([8 * LEAF_WORDS // ELEM], DTYPE)
        for at in range(tl.load(entry + 1).to(tl.int32), tl.load(entry + 2).to(tl.int32), 3):
            pointer, mask = _piece(table, at, ELEM, DTYPE, ALIGN)
            values = tl.load(pointer, mask=mask, other=values)
        if PARTS == 1:
            words = values
        else:
            shift = (tl.arange(0, PARTS) * (8 * ELEM)).to(tl.uint64)
            parts = tl.reshape(values, [LEAF_WORDS, PARTS]).to(tl.uint64)
            words = tl.sum(parts << shift[None, :], axis=1)
        tl.store(_words_at(table, leaf), words)
        tl.store(_hash_at(table, leaf), _leaf_hash(words, table))


@triton.jit(do_not_specialize=["first", "last"])
def load_leaves(
    table: tl.tensor,
    first: tl.tensor,
    last: tl.tensor,
    ELEM: tl.constexpr,
    DTYPE: tl.constexpr,
    ALIGN: tl.constexpr,
) -> None:
    """Read whole leaves from the arena; scatter the pieces of those whose hash is as expected."""
    PARTS: tl.constexpr = 8 // ELEM
    for unit in range(first + tl.program_id(0), last, tl.num_programs(0)):
        entry = table + unit * 4
        leaf = tl.load(entry)
        words = tl.load(_words_at(table, leaf))
        found = _leaf_hash(words, table)
        if found == tl.load(_hash_at(table, leaf)):
            if PARTS == 1:
                values = words
            else:
                shift = (tl.arange(0, PARTS) * (8 * ELEM)).to(tl.uint64)
                values = tl.reshape(
                    (words[:, None] >> shift[None, :]).to(DTYPE), [8 * LEAF_WORDS // ELEM]
                )
            for at in range(tl.load(entry + 1).to(tl.int32), tl.load(entry + 2).to(tl.int32), 3):
                pointer, mask = _piece(table, at, ELEM, DTYPE, ALIGN)
                tl.store(pointer, values, mask=mask)
        else:
            bad = tl.load(table + 2).to(tl.pointer_type(tl.int32))
            tl.atomic_add(bad, 1, sem="relaxed")
