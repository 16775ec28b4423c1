"""Tests of the copy kernels' source on host memory, in Triton's interpreter.

Collected by test_kernels.py in a child process with TRITON_INTERPRET=1 (triton reads it when it is
imported). Addresses are raw host addresses: the interpreter follows them as a device would. It shows
that the arithmetic, masks and hashes are right; not that a compiler keeps them so (test_kernels_aot)
nor anything about a device.
"""

from __future__ import annotations

import ctypes
import mmap
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
import xxhash
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from kvoffload import _core
from kvoffload.copy.base import Fragment
from kvoffload.copy.kernels import KernelMover
from kvoffload.copy.kernels_table import ALIGNS, SPECS, UNITS_AT, Launch, Spec, Work
from kvoffload.copy.mover import LeafCheck
from kvoffload.copy.runs import BlockGroup, Run
from tests.support.cuda import Layout, make_layout

LEAF = _core.LEAF_BYTES
U8 = npt.NDArray[np.uint8]


def examples(count: int) -> settings:
    return settings(
        max_examples=count,
        deadline=None,
        derandomize=True,
        phases=(Phase.explicit, Phase.generate),  # shrinking takes minutes in the interpreter
        suppress_health_check=list(HealthCheck),
    )


pytestmark = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") != "1", reason="run by test_kernels.py in the interpreter"
)


class HostTables:
    """Tables for the interpreter: host memory is its device memory, its stream is the caller."""

    @contextmanager
    def staged(self, words: Any, stream: Any) -> Iterator[Any]:
        yield torch.from_numpy(words.copy())

    def close(self) -> None:
        pass

    def check(self) -> None:
        pass


def mover(programs: int = 3) -> KernelMover:
    return KernelMover(programs=programs, tables=HostTables())


def random_bytes(n: int, seed: int, misaligned: int = 0) -> U8:
    """Random bytes whose address is ``misaligned`` above a multiple of 64."""
    raw = np.random.default_rng(seed).integers(0, 256, n + 128, dtype=np.uint8)
    start = -raw.ctypes.data % 64 + misaligned
    return raw[start : start + n]


def copied(runs: list[Run], target: U8, base: int, source: U8, source_base: int, load: bool) -> U8:
    """What ``target`` must hold after the copies: the reference, one run at a time."""
    want = target.copy()
    for address, offset, n in runs:
        to, at = (address - base, offset) if load else (offset - base, address - source_base)
        want[to : to + n] = source[at : at + n]
    return want


class Case:
    """A group over random device memory, and an arena; everything next to a run is a canary."""

    def __init__(self, layout: Layout, seed: int, misaligned: int, leaves_before: int = 1) -> None:
        self.layout = layout
        self.memory = random_bytes(layout.total + 64, seed, misaligned)
        self.group = BlockGroup.build(
            layout.fragments(self.memory.ctypes.data), layout.num_blocks, layout.shard_bytes
        )
        self.shard = leaves_before * LEAF
        self.arena = random_bytes(self.shard + layout.shard_bytes + LEAF, seed + 1)
        self.leaves = random_bytes(8 * (layout.shard_bytes // LEAF), seed + 2).view(np.uint64)
        self.bad = np.full(3, 7, np.int32)
        self.seed = int(np.random.default_rng(seed + 3).integers(0, 1 << 64, dtype=np.uint64))

    def runs(self, ids: list[int], piece_bytes: int = 1 << 30) -> list[Run]:
        return self.group.runs(np.array(ids, np.int32), self.shard, piece_bytes)

    def check(self, first: int = 0, count: int | None = None) -> LeafCheck:
        total = self.layout.shard_bytes // LEAF
        return LeafCheck(
            self.seed,
            self.shard,
            self.layout.shard_bytes,
            self.leaves.ctypes.data,
            self.bad.ctypes.data + 4,
            first,
            total if count is None else count,
        )

    def hashes(self) -> list[int]:
        data = self.arena[self.shard : self.shard + self.layout.shard_bytes]
        return _core.leaf_checksums(data, seed_key(self.seed)).tolist()

    def copy(self, runs: list[Run], load: bool, check: LeafCheck | None, programs: int = 3) -> None:
        mover(programs).copy(runs, self.arena.ctypes.data, load, None, check)

    def expect_load(self, runs: list[Run]) -> U8:
        return copied(runs, self.memory, self.memory.ctypes.data, self.arena, 0, True)

    def expect_store(self, runs: list[Run]) -> U8:
        return copied(runs, self.arena, 0, self.memory, self.memory.ctypes.data, False)


def seed_key(seed: int) -> bytes:
    """A key with that seed: the seed is the xor of the key's halves."""
    other = 0x0123456789ABCDEF
    return (seed ^ other).to_bytes(8, "little") + other.to_bytes(8, "little")


@st.composite
def cases(draw: st.DrawFn) -> tuple[Case, list[int]]:
    """Any layout: sizes and strides that are multiples of 16, 8, 4 or 1, per layer or per block."""
    unit = draw(st.sampled_from(ALIGNS))
    count = draw(st.integers(1, 4))
    largest = draw(st.sampled_from([64, 2000, 9000, 20000])) // unit
    sizes = [unit * draw(st.integers(1, largest)) for _ in range(count)]
    blocks, bpc = draw(st.integers(2, 9)), draw(st.integers(1, 4))
    while bpc > 1 and bpc * sum(sizes) > 5 * LEAF:
        bpc -= 1
    layout = make_layout(sizes, draw(st.booleans()), unit * draw(st.integers(0, 40)), blocks, bpc)
    case = Case(layout, draw(st.integers(0, 1 << 30)), draw(st.sampled_from([0, 0, 8, 4, 5])))
    ids = draw(
        st.lists(st.integers(0, blocks - 1), min_size=bpc, max_size=bpc, unique=blocks >= bpc)
    )
    return case, ids


def with_holes(data: st.DataObject, ids: list[int]) -> list[int]:
    return [-1 if data.draw(st.booleans()) else b for b in dict.fromkeys(ids)]


# ------------------------------------------------------------------------------ hashes


@examples(12)
@given(st.integers(0, (1 << 64) - 1) | st.sampled_from([0, 1, (1 << 64) - 1]), st.integers(0, 99))
def test_leaf_hash_is_xxh3(seed: int, content: int) -> None:
    data = random_bytes(2 * LEAF, content)
    data[:LEAF] = {0: 0, 1: 255}.get(content, data[:LEAF])  # extremes too
    leaves, bad = np.zeros(2, np.uint64), np.zeros(1, np.int32)
    arena = random_bytes(2 * LEAF, content + 1)
    check = LeafCheck(seed, 0, 2 * LEAF, leaves.ctypes.data, bad.ctypes.data, 0, 2)
    mover().copy([Run(data.ctypes.data, 0, 2 * LEAF)], arena.ctypes.data, False, None, check)
    assert (arena == data).all()
    want = [xxhash.xxh3_64_intdigest(data[at : at + LEAF].tobytes(), seed=seed) for at in (0, LEAF)]
    assert leaves.tolist() == want == _core.leaf_checksums(data, seed_key(seed)).tolist()


# ------------------------------------------------------------------------------ copies


@examples(100)
@given(cases(), st.data())
def test_plain_copies_move_exactly_the_runs(case_ids: tuple[Case, list[int]], data: Any) -> None:
    case, ids = case_ids
    load = data.draw(st.booleans())
    runs = case.runs(
        with_holes(data, ids) if load else ids, data.draw(st.sampled_from([1000, 1 << 30]))
    )
    memory, arena = case.memory.copy(), case.arena.copy()
    if load:
        memory = case.expect_load(runs)
    else:
        arena = case.expect_store(runs)
    case.copy(runs, load, None, data.draw(st.integers(1, 9)))
    assert (case.memory == memory).all()
    assert (case.arena == arena).all()


@examples(30)
@given(cases(), st.integers(1, 9))
def test_checked_store_copies_pads_and_hashes(
    case_ids: tuple[Case, list[int]], programs: int
) -> None:
    case, ids = case_ids
    runs = case.runs(ids)
    memory, arena = case.memory.copy(), case.expect_store(runs)
    used = case.shard + len(ids) * case.layout.block_bytes
    arena[used : case.shard + case.layout.shard_bytes] = 0
    case.copy(runs, False, case.check(), programs)
    assert (case.arena == arena).all()
    assert (case.memory == memory).all()
    assert case.leaves.tolist() == case.hashes()
    assert case.bad.tolist() == [7, 7, 7]


@examples(60)
@given(cases(), st.data())
def test_checked_load_scatters_only_good_leaves(
    case_ids: tuple[Case, list[int]], data: Any
) -> None:
    case, ids = case_ids
    ids = with_holes(data, ids)
    ranges = case.group.wanted(np.array(ids, np.int32))
    if not ranges:
        return
    first, last = ranges[0][0] // LEAF, sum(ranges[-1]) // LEAF
    case.leaves[:] = case.hashes()
    flips = data.draw(st.lists(st.integers(0, 8 * case.layout.shard_bytes - 1), max_size=2))
    for bit in flips:
        case.arena[case.shard + bit // 8] ^= 1 << bit % 8
    spoiled = {
        i
        for i, (a, b) in enumerate(zip(case.leaves.tolist(), case.hashes(), strict=True))
        if a != b
    }
    runs = case.runs(ids)
    pieces = [
        Run(address + at - offset, at, min(LEAF - at % LEAF, offset + n - at))
        for address, offset, n in runs
        for at in [offset, *range(offset // LEAF * LEAF + LEAF, offset + n, LEAF)]
    ]
    good = [p for p in pieces if (p.offset - case.shard) // LEAF not in spoiled]
    memory, arena = case.expect_load(good), case.arena.copy()
    case.copy(runs, True, case.check(first, last - first), data.draw(st.integers(1, 9)))
    assert case.bad.tolist() == [7, 7 + len([i for i in spoiled if first <= i < last]), 7]
    assert (case.memory == memory).all()
    assert (case.arena == arena).all()
    assert len(spoiled) > 0 or case.memory.tobytes() == case.expect_load(runs).tobytes()


@pytest.mark.parametrize("where", [0, 63, 1023, 1024, 8200, 15360, LEAF - 65, LEAF - 64, LEAF - 1])
def test_one_flipped_bit_is_counted(where: int) -> None:
    case = Case(make_layout([LEAF], True, 0, 4, 3), where, 0)
    case.leaves[:] = case.hashes()
    case.copy(case.runs([1, 2, 3]), True, case.check())
    assert case.bad[1] == 7
    case.arena[case.shard + LEAF + where] ^= 0x10
    before = case.memory.copy()
    case.copy(case.runs([0, 1, 2]), True, case.check())
    assert case.bad[1] == 8
    assert (case.memory[LEAF : 2 * LEAF] == before[LEAF : 2 * LEAF]).all()
    assert (case.memory[:LEAF] == case.arena[case.shard : case.shard + LEAF]).all()


def test_leaves_out_of_the_range_are_neither_read_for_a_hash_nor_counted() -> None:
    case = Case(make_layout([LEAF], True, 0, 4, 4), 5, 0)
    case.leaves[:] = case.hashes()
    case.arena[case.shard] ^= 1
    case.arena[case.shard + 3 * LEAF] ^= 1
    case.copy(case.runs([-1, 0, 1, -1]), True, case.check(1, 2))
    assert case.bad.tolist() == [7, 7, 7]
    case.copy([], True, case.check(0, 4))  # hash only: nothing is wanted of these leaves
    assert case.bad.tolist() == [7, 9, 7]


def test_part_of_a_shard_in_a_buffer_of_its_own() -> None:
    """A staging buffer holds only the checked leaves: its shard starts before the buffer does."""
    case = Case(make_layout([LEAF + 16], True, 0, 3, 3), 8, 0, leaves_before=0)
    case.leaves[:] = case.hashes()
    case.arena[:LEAF] ^= 255  # the leaf before the buffer is not looked at
    runs = [r for r in case.runs([-1, 1, 2]) if r.offset >= LEAF]
    want = case.expect_load(runs)
    near = [Run(a, offset - LEAF, n) for a, offset, n in runs]
    check = replace(case.check(1, 3), shard=-LEAF)
    mover().copy(near, case.arena.ctypes.data + LEAF, True, None, check)
    assert (case.memory == want).all()
    assert case.bad.tolist() == [7, 7, 7]


def test_groups_over_the_same_memory() -> None:
    """Hybrid models alias: one group's pages are cut differently by another over the same bytes."""
    memory = random_bytes(96 * 1024, 1)
    base = memory.ctypes.data
    wide = BlockGroup.build([Fragment(base, 24576, 24576)], 4, 2 * LEAF)
    parts = [Fragment(base, 24576, 8192), Fragment(base + 8192, 24576, 16384)]
    fine = BlockGroup.build(parts, 4, 2 * LEAF)
    arena, leaves, bad = random_bytes(4 * LEAF, 2), np.zeros(4, np.uint64), np.zeros(1, np.int32)
    original = memory.copy()
    for i, (group, block) in enumerate([(wide, 1), (fine, 2)]):
        at = i * 2 * LEAF
        check = LeafCheck(9, at, 2 * LEAF, leaves.ctypes.data + 16 * i, bad.ctypes.data, 0, 2)
        runs = group.runs(np.array([block], np.int32), at, 1 << 30)
        mover().copy(runs, arena.ctypes.data, False, None, check)
        assert (arena[at : at + 24576] == memory[block * 24576 : (block + 1) * 24576]).all()
        # What one group stored, the other loads into a block of its own.
        other = fine if group is wide else wide
        runs = other.runs(np.array([3 * i], np.int32), at, 1 << 30)
        mover().copy(runs, arena.ctypes.data, True, None, check)
        original[3 * i * 24576 : (3 * i + 1) * 24576] = original[
            block * 24576 : (block + 1) * 24576
        ]
        assert (memory == original).all()
    assert bad[0] == 0


# ------------------------------------------------------------------------------ far addresses


@contextmanager
def sparse(nbytes: int) -> Iterator[U8]:
    """Zero bytes that cost memory only where they are touched."""
    no_reserve = getattr(mmap, "MAP_NORESERVE", 0x4000)  # in mmap since Python 3.12
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | no_reserve
    area = mmap.mmap(-1, nbytes, flags=flags)
    yield np.frombuffer(area, np.uint8)  # unmapped with the last array over it


@pytest.mark.parametrize("nbytes", [48, 40, 4092, 3 * LEAF - 3])
def test_offsets_past_four_gib(nbytes: int) -> None:
    """Arena offsets, block strides and leaf numbers that do not fit in 32 bits."""
    far = (1 << 32) + (1 << 31)
    with sparse(far + 8 * LEAF) as arena, sparse(far + 8 * LEAF) as memory:
        data = random_bytes(nbytes, nbytes)
        shard = far // LEAF * LEAF
        memory[far : far + nbytes] = data
        leaves, bad = np.zeros(4, np.uint64), np.zeros(1, np.int32)
        check = LeafCheck(3, shard, 4 * LEAF, leaves.ctypes.data, bad.ctypes.data, 0, 4)
        runs = [Run(memory.ctypes.data + far, shard + 16, nbytes)]
        for how in (None, check):
            arena[shard : shard + 4 * LEAF] = 1
            mover().copy(runs, arena.ctypes.data, False, None, how)
            assert (arena[shard + 16 : shard + 16 + nbytes] == data).all()
            assert arena[shard + 15] == arena[shard + 16 + nbytes] == (0 if how else 1)
            memory[far : far + nbytes] = 0
            mover().copy(runs, arena.ctypes.data, True, None, how)
            assert (memory[far : far + nbytes] == data).all()
        assert bad[0] == 0
        assert not memory[far - 4096 : far].any()
        assert not memory[far + nbytes : far + nbytes + 4096].any()
        low = far - (1 << 32)
        assert not memory[low : low + nbytes].any()
        assert not arena[low : low + LEAF].any()


def test_leaf_numbers_past_four_gib() -> None:
    """One shard over 4 GiB: the leaf's place is computed by the kernel, not by the host."""
    number = (1 << 32) // LEAF + 3
    with sparse((number + 3) * LEAF) as arena, sparse(8 * number + 4096) as raw:
        leaves, bad = raw.view(np.uint64), np.zeros(1, np.int32)
        data = random_bytes(LEAF, 4)
        arena[number * LEAF : (number + 1) * LEAF] = data
        leaves[number] = xxhash.xxh3_64_intdigest(data.tobytes(), seed=6)
        leaves[number + 1] = 1  # wrong
        got = random_bytes(LEAF, 5)
        check = LeafCheck(
            6, 0, (number + 3) * LEAF, leaves.ctypes.data, bad.ctypes.data, number, 2
        )  # fmt: skip
        mover().copy(
            [Run(got.ctypes.data, number * LEAF, LEAF)], arena.ctypes.data, True, None, check
        )
        assert bad[0] == 1
        assert (got == data).all()


# ------------------------------------------------------------------------------ exact ends


@contextmanager
def guarded(nbytes: int) -> Iterator[int]:
    """Address of ``nbytes`` (whole pages) between two pages that fault when touched."""
    page = mmap.PAGESIZE
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    with sparse(nbytes + 2 * page) as area:
        start = area.ctypes.data
        for fence in (start, start + page + nbytes):
            assert libc.mprotect(fence, page, 0) == 0, ctypes.get_errno()
        yield start + page
        for fence in (start, start + page + nbytes):
            assert libc.mprotect(fence, page, 3) == 0, ctypes.get_errno()


@pytest.mark.parametrize("tail", [16, 8, 4, 1])
@pytest.mark.parametrize("size", [4096, 2 * LEAF])
def test_no_access_beyond_a_run(tail: int, size: int) -> None:
    """Blocks at both ends of mapped memory: one byte further, read or written, is a fault."""
    n = size - 16 + tail
    with guarded(size) as low:
        at = ctypes.c_uint8 * size
        memory = np.frombuffer(at.from_address(low), np.uint8)
        memory[:] = np.random.default_rng(tail).integers(0, 256, size, dtype=np.uint8)
        arena = random_bytes(4 * LEAF, 1)
        leaves, bad = np.zeros(4, np.uint64), np.zeros(1, np.int32)
        check = LeafCheck(1, 0, 4 * LEAF, leaves.ctypes.data, bad.ctypes.data, 0, 4)
        for start in (0, size - n):  # flush with the lower, with the upper end
            for how in (None, check):
                run, want = [Run(low + start, 0, n)], memory[start : start + n].copy()
                mover().copy(run, arena.ctypes.data, False, None, how)
                assert (arena[:n] == want).all()
                memory[:] = 0
                mover().copy(run, arena.ctypes.data, True, None, how)
                assert (memory[start : start + n] == want).all()
                assert memory.sum() == want.sum()
        assert bad[0] == 0


class Recorder(KernelMover):
    """A mover that notes what it launched."""

    def __init__(self) -> None:
        super().__init__(programs=3, tables=HostTables())
        self.seen: list[Spec] = []

    def _launch(self, table: Any, launch: Launch) -> None:
        self.seen.append(launch.spec)
        super()._launch(table, launch)


def test_warm_launches_touch_nothing() -> None:
    case = Case(make_layout([64], True, 0, 2, 1), 1, 0)
    before = case.memory.copy(), case.arena.copy()
    one = Recorder()
    one.warm(None)
    assert tuple(one.seen) == SPECS
    assert (case.memory == before[0]).all() and (case.arena == before[1]).all()


def test_every_specialisation_copies() -> None:
    """Each of SPECS on data of its own alignment, so that none is only ever compiled."""
    one = Recorder()
    for align in ALIGNS:
        for n in (align, 1500 // align * align, 5000 // align * align):
            case = Case(make_layout([n, 2 * n], False, align, 3, 2), n, align % 16)
            runs, arena = case.runs([2, 0]), case.expect_store(case.runs([2, 0]))
            base = case.arena.ctypes.data
            one.copy(runs, base, False, None)
            assert (case.arena == arena).all()
            one.copy(runs, base, False, None, case.check())
            assert case.leaves.tolist() == case.hashes()
            for check in (None, case.check()):
                runs = case.runs([1, -1])
                want = case.expect_load(runs)
                one.copy(runs, base, True, None, check)
                assert (case.memory == want).all()
            assert case.bad.tolist() == [7, 7, 7]
    assert set(one.seen) == set(SPECS)


def test_mixed_alignments_are_separate_launches() -> None:
    """One odd fragment does not make its neighbours slow."""
    one = Recorder()
    memory, arena = random_bytes(4 * LEAF, 1), random_bytes(2 * LEAF, 2)
    base, before = memory.ctypes.data, arena.copy()
    runs = [Run(base, 0, 4096), Run(base + 4099, 4096, 77), Run(base + 8192, 4176, 4000)]
    one.copy(runs, arena.ctypes.data, False, None)
    assert [s.align for s in one.seen] == [16, 1]
    assert (arena == copied(runs, before, 0, memory, base, False)).all()


def test_launch_errors_are_runtime_errors() -> None:
    one = mover()
    spec = Spec("copy_pieces", 16, 3, 16)  # three rows: not a power of two
    with pytest.raises(RuntimeError, match="copy_pieces"):
        one._enqueue(Work(np.zeros(UNITS_AT, np.int64), (Launch(spec, 0, 1),)), None)
