"""CpuCopyPool against numpy: random geometry, corruption, stale slots, waiting, deadline, cancel."""

from __future__ import annotations

import multiprocessing
import os
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvoffload import _core
from kvoffload._core import FAILED, FILLING, READY, Arena, CopyDone, CpuCopyPool

MIB = 1 << 20
LEAF = _core.LEAF_BYTES
Bytes = npt.NDArray[np.uint8]


@dataclass
class Kv:
    """KV memory of one rank: ``layers`` buffers, each with one fragment per block at a stride."""

    buffers: list[Bytes]
    starts: list[int]
    strides: list[int]
    sizes: list[int]
    blocks: int

    @staticmethod
    def random(rng: np.random.Generator, sizes: list[int], gaps: list[int], blocks: int) -> Kv:
        strides = [s + g for s, g in zip(sizes, gaps, strict=True)]
        starts = [int(rng.integers(0, 65)) for _ in sizes]
        buffers = [
            rng.integers(0, 256, start + blocks * stride + 64, dtype=np.uint8)
            for start, stride in zip(starts, strides, strict=True)
        ]
        return Kv(buffers, starts, strides, sizes, blocks)

    @property
    def fragments(self) -> list[tuple[int, int, int]]:
        return [
            (b.ctypes.data + start, stride, size)
            for b, start, stride, size in zip(
                self.buffers, self.starts, self.strides, self.sizes, strict=True
            )
        ]

    def block(self, b: int) -> bytes:
        return b"".join(
            buf[start + b * stride :][:size].tobytes()
            for buf, start, stride, size in zip(
                self.buffers, self.starts, self.strides, self.sizes, strict=True
            )
        )

    def put(self, b: int, data: bytes) -> None:
        at = 0
        for buf, start, stride, size in zip(
            self.buffers, self.starts, self.strides, self.sizes, strict=True
        ):
            buf[start + b * stride :][:size] = np.frombuffer(data[at : at + size], np.uint8)
            at += size

    def copy(self) -> Kv:
        return Kv(
            [b.copy() for b in self.buffers], self.starts, self.strides, self.sizes, self.blocks
        )

    def same(self, other: Kv) -> bool:
        return all(np.array_equal(a, b) for a, b in zip(self.buffers, other.buffers, strict=True))


class Rig:
    """An arena, a pool and one group of ``items`` slots over some KV memory."""

    def __init__(
        self, kv: Kv, per_chunk: int, items: int, threads: int = 2, nt: bool = True, seed: int = 0
    ) -> None:
        self.kv, self.per_chunk, self.items = kv, per_chunk, items
        self.shard = -(-sum(kv.sizes) * per_chunk // LEAF) * LEAF
        self.arena = Arena.create(2 * MIB + items * self.shard, items, 1)
        self.pool = CpuCopyPool(self.arena, 0, threads, nt)
        self.group = self.pool.add_group(kv.fragments, kv.blocks, self.shard)
        self.slots = np.arange(items, dtype=np.uint32)
        self.offsets = np.arange(items, dtype=np.uint64) * np.uint64(self.shard)
        self.keys = np.random.default_rng(seed).bytes(16 * items)
        self.gens = np.zeros(items, np.uint64)

    def fill_all(self) -> None:
        self.gens[:] = [self.arena.begin_fill(i, 1) for i in range(self.items)]

    def store(self, job: int, ids: npt.NDArray[np.int32]) -> None:
        self.pool.submit_store(job, self.group, self.slots, self.gens, self.offsets, self.keys, ids)

    def load(
        self, job: int, ids: npt.NDArray[np.int32], deadline_ms: int = 20_000, verify: bool = True
    ) -> None:
        self.pool.submit_load(
            job,
            self.group,
            self.slots,
            self.gens,
            self.offsets,
            self.keys,
            ids,
            deadline_ms,
            verify,
        )

    def finish(self, job: int) -> CopyDone:
        assert self.pool.wait(job, 20_000)
        self.pool.check()
        done = self.pool.poll()
        assert [d.job for d in done] == [job], "each finished job exactly once"
        return done[0]

    def stored(self) -> npt.NDArray[np.int32]:
        """Store blocks 0.. in order and wait; returns the block ids."""
        self.fill_all()
        ids = np.arange(self.items * self.per_chunk, dtype=np.int32).reshape(self.items, -1)
        self.store(1, ids)
        done = self.finish(1)
        assert (done.kind, done.status, done.failed_item, done.reason) == (0, 0, -1, 0)
        return ids

    def close(self) -> None:
        self.pool.check()
        self.arena.check()
        self.pool.close()
        self.arena.close()


def small_rig(items: int = 4, threads: int = 2, extra_blocks: int = 0) -> Rig:
    """Chunks of 4 blocks x 2 layers x 4 KiB: two leaves of two blocks each."""
    rng = np.random.default_rng(5)
    return Rig(Kv.random(rng, [4096, 4096], [64, 0], items * 4 + extra_blocks), 4, items, threads)


@pytest.fixture
def rig() -> Iterator[Rig]:
    r = small_rig()
    yield r
    r.close()


# -- bytes -------------------------------------------------------------------------------------


@st.composite
def geometries(draw: st.DrawFn) -> tuple[list[int], list[int], int, int]:
    layers = draw(st.integers(1, 5))
    size = st.one_of(
        st.integers(1, 700), st.integers(1, 40_000), st.sampled_from([512, 4096, LEAF])
    )
    sizes = draw(st.lists(size, min_size=layers, max_size=layers))
    gaps = draw(st.lists(st.integers(0, 300), min_size=layers, max_size=layers))
    return sizes, gaps, draw(st.integers(1, 6)), draw(st.integers(1, 5))


@settings(max_examples=80, deadline=None)
@given(
    geometry=geometries(),
    data=st.data(),
    nt=st.booleans(),
    verify=st.booleans(),
    threads=st.integers(1, 3),
    seed=st.integers(0, 2**32 - 1),
)
def test_gather_then_scatter_is_numpy(
    geometry: tuple[list[int], list[int], int, int],
    data: st.DataObject,
    nt: bool,
    verify: bool,
    threads: int,
    seed: int,
) -> None:
    sizes, gaps, per_chunk, items = geometry
    rng = np.random.default_rng(seed)
    kv = Kv.random(rng, sizes, gaps, items * per_chunk + 3)
    rig = Rig(kv, per_chunk, items, threads, nt, seed)
    try:
        rig.fill_all()
        before = kv.copy()
        source = rng.permutation(kv.blocks)[: items * per_chunk].astype(np.int32)
        source = source.reshape(items, per_chunk)
        rig.store(1, source)
        done = rig.finish(1)
        assert (done.status, done.nbytes) == (0, items * per_chunk * sum(sizes))
        assert kv.same(before), "a store only reads"
        for i in range(items):
            want = b"".join(kv.block(int(b)) for b in source[i]).ljust(rig.shard, b"\0")
            assert bytes(rig.arena.view(i * rig.shard, rig.shard)) == want
            key = rig.keys[16 * i : 16 * i + 16]
            leaves = rig.arena.leaf_hashes(i * rig.shard, rig.shard)
            assert leaves.tolist() == _core.leaf_checksums(want, key).tolist()
            assert rig.arena.state(i) == READY
        # Load a random part into other blocks; -1 leaves a block alone.
        target = rng.permutation(kv.blocks)[: items * per_chunk].astype(np.int32)
        target = target.reshape(items, per_chunk)
        mask = data.draw(st.lists(st.booleans(), min_size=target.size, max_size=target.size))
        target[~np.array(mask).reshape(target.shape)] = -1
        want_kv = before.copy()
        for s, t in zip(source.ravel(), target.ravel(), strict=True):
            if t >= 0:
                want_kv.put(int(t), before.block(int(s)))
        rig.load(2, target, verify=verify)
        done = rig.finish(2)
        assert (done.kind, done.status, done.failed_item) == (1, 0, -1)
        assert done.nbytes == int((target >= 0).sum()) * sum(sizes)
        assert kv.same(want_kv), "exactly the wanted blocks, gaps included"
    finally:
        rig.close()


def test_chunk_with_fewer_blocks_is_zero_padded(rig: Rig) -> None:
    rig.arena.view(0, rig.shard)[:] = b"\xff" * rig.shard
    rig.fill_all()
    rig.store(1, np.arange(rig.items, dtype=np.int32).reshape(-1, 1))
    assert rig.finish(1).status == 0
    assert bytes(rig.arena.view(0, rig.shard)) == rig.kv.block(0).ljust(rig.shard, b"\0")


# -- what must never reach a block -------------------------------------------------------------


@pytest.mark.parametrize("leaf", [0, 1])
def test_corrupt_byte_is_a_mismatch_and_never_copied(rig: Rig, leaf: int) -> None:
    ids = rig.stored()
    before = rig.kv.copy()
    for b in range(rig.kv.blocks):
        rig.kv.put(b, b"\xee" * 8192)
    rig.arena.view(2 * rig.shard + leaf * LEAF + 4097, 1)[0] ^= 0x10
    rig.load(2, ids)
    done = rig.finish(2)
    assert (done.status, done.reason, done.failed_item) == (1, 2, 2)
    bad = [8 + 2 * leaf, 9 + 2 * leaf]  # the blocks of item 2 in that leaf
    assert all(rig.kv.block(b) == b"\xee" * 8192 for b in bad)
    assert all(rig.kv.block(b) == before.block(b) for b in range(8)), "items below completed"


def test_leaf_that_no_wanted_block_touches_is_not_read(rig: Rig) -> None:
    ids = rig.stored()
    rig.arena.view(LEAF + 1, 1)[0] ^= 1  # second leaf of item 0: its blocks 2 and 3
    ids[0, 2:] = -1
    rig.load(2, ids)
    assert rig.finish(2).status == 0


def test_wrong_key_is_a_mismatch(rig: Rig) -> None:
    ids = rig.stored()
    rig.keys = bytes(16) + rig.keys[16:]
    rig.load(2, ids)
    done = rig.finish(2)
    assert (done.status, done.reason, done.failed_item) == (1, 2, 0)


def test_stale_generation_fails_a_load(rig: Rig) -> None:
    ids = rig.stored()
    g = rig.arena.begin_fill(1, 1)
    assert rig.arena.fill_done(1, g)
    before = rig.kv.copy()
    rig.kv.put(4, b"\xee" * 8192)
    rig.load(2, ids)
    done = rig.finish(2)
    assert (done.status, done.reason, done.failed_item) == (1, 1, 1)
    assert rig.kv.block(4) == b"\xee" * 8192
    assert rig.kv.block(0) == before.block(0)


def test_stale_generation_fails_a_store_without_touching_the_slot(rig: Rig) -> None:
    rig.fill_all()
    new = rig.arena.begin_fill(2, 1)
    rig.store(1, np.arange(rig.items * 4, dtype=np.int32).reshape(rig.items, 4))
    done = rig.finish(1)
    assert (done.kind, done.status, done.reason, done.failed_item) == (0, 1, 1, 2)
    assert bytes(rig.arena.view(2 * rig.shard, rig.shard)) == bytes(rig.shard)
    assert rig.arena.state(2) == FILLING and rig.arena.generation(2) == new
    assert [rig.arena.state(i) for i in (0, 1, 3)] == [READY] * 3, "the others are kept"


def test_slot_failed_while_waiting(rig: Rig) -> None:
    ids = rig.stored()
    rig.gens[3] = rig.arena.begin_fill(3, 1)
    threading.Timer(0.03, rig.arena.fail, (3, int(rig.gens[3]))).start()
    rig.load(2, ids)
    done = rig.finish(2)
    assert (done.status, done.reason, done.failed_item) == (1, 1, 3)


def test_a_bad_item_does_not_blame_the_one_before_it(rig: Rig) -> None:
    """Item 0 is still being filled when item 1 turns out corrupt: 0 goes on, 1 is named."""
    ids = rig.stored()
    before = rig.kv.copy()
    rig.kv.put(0, bytes(8192))
    rig.gens[0] = rig.arena.begin_fill(0, 1)
    rig.arena.view(rig.shard + 5, 1)[0] ^= 1
    rig.load(2, ids)
    assert not rig.pool.wait(2, 50), "item 0 is not ready"
    rig.pool.check()
    assert rig.arena.fill_done(0, int(rig.gens[0]))
    done = rig.finish(2)
    assert (done.status, done.reason, done.failed_item) == (1, 2, 1)
    assert rig.kv.block(0) == before.block(0)


def test_hash_and_verify_leaves(rig: Rig) -> None:
    rig.stored()
    for i in range(rig.items):
        key, at = rig.keys[16 * i : 16 * i + 16], i * rig.shard
        assert rig.arena.verify_leaves(at, rig.shard, key)
        rig.arena.view(at + 3, 1)[0] ^= 1
        assert not rig.arena.verify_leaves(at, rig.shard, key)
        rig.arena.hash_leaves(at, rig.shard, key)
        assert rig.arena.verify_leaves(at, rig.shard, key)


# -- waiting for READY -------------------------------------------------------------------------


def _refill(rig: Rig) -> None:
    """New generations with the old bytes and leaf hashes still in place."""
    rig.gens[:] = [rig.arena.begin_fill(i, 1) for i in range(rig.items)]


def test_load_follows_slots_that_become_ready_one_by_one(rig: Rig) -> None:
    ids = rig.stored()
    before = rig.kv.copy()
    for b in range(rig.kv.blocks):
        rig.kv.put(b, bytes(8192))
    _refill(rig)
    rig.load(2, ids)
    for i in (2, 0, 3, 1):
        assert not rig.pool.wait(2, 15)
        rig.pool.check()
        assert rig.arena.fill_done(i, int(rig.gens[i]))
    done = rig.finish(2)
    assert done.status == 0 and done.wait_ns > 40_000_000
    assert rig.kv.same(before)


@pytest.mark.parametrize("threads", [1, 2])
def test_a_waiting_job_does_not_hold_up_another(threads: int) -> None:
    rig = small_rig(threads=threads)
    try:
        ids = rig.stored()
        rig.gens[0] = rig.arena.begin_fill(0, 1)
        rig.load(2, ids)
        begin = time.monotonic()
        one = slice(1, 2)
        rig.pool.submit_load(
            3,
            rig.group,
            rig.slots[one],
            rig.gens[one],
            rig.offsets[one],
            rig.keys[16:32],
            ids[one],
            9000,
        )
        assert rig.pool.wait(3, 5000) and time.monotonic() - begin < 2
        rig.pool.submit_store(
            4, rig.group, rig.slots[:1], rig.gens[:1], rig.offsets[:1], rig.keys[:16], ids[:1]
        )
        assert rig.pool.wait(4, 5000), "the store runs although a load waits"
        assert rig.pool.wait(2, 5000), "and makes ready what the load waited for"
        assert sorted((d.job, d.status) for d in rig.pool.poll()) == [(2, 0), (3, 0), (4, 0)]
    finally:
        rig.close()


def _filler(path: str, inode: int, gens: list[int]) -> None:
    a = Arena.attach(path, inode)
    for slot, gen in enumerate(gens):
        time.sleep(0.02)
        a.fill_done(slot, gen)


def test_slots_made_ready_by_another_process(rig: Rig) -> None:
    ids = rig.stored()
    before = rig.kv.copy()
    for b in range(rig.kv.blocks):
        rig.kv.put(b, bytes(8192))
    _refill(rig)
    child = multiprocessing.get_context("spawn").Process(
        target=_filler, args=(rig.arena.path, rig.arena.inode, [int(g) for g in rig.gens])
    )
    rig.load(2, ids, deadline_ms=60_000)
    child.start()
    assert rig.pool.wait(2, 60_000)
    assert rig.finish(2).status == 0 and rig.kv.same(before)
    child.join(20)


def test_deadline_fails_what_is_not_ready(rig: Rig) -> None:
    ids = rig.stored()
    rig.gens[2] = rig.arena.begin_fill(2, 1)
    begin = time.monotonic()
    rig.load(2, ids, deadline_ms=60)
    done = rig.finish(2)
    assert 0.05 < time.monotonic() - begin < 2
    assert (done.status, done.reason, done.failed_item) == (3, 3, 2)
    rig.kv.put(8, b"\xee" * 8192)
    rig.arena.fill_done(2, int(rig.gens[2]))
    time.sleep(0.01)
    assert rig.kv.block(8) == b"\xee" * 8192, "a late slot is not copied any more"


def test_cancel_drops_what_waits(rig: Rig) -> None:
    ids = rig.stored()
    rig.gens[1] = rig.arena.begin_fill(1, 1)
    rig.load(2, ids)
    assert not rig.pool.wait(2, 20)
    rig.pool.cancel(2)
    rig.pool.cancel(77)
    done = rig.finish(2)
    assert (done.status, done.reason, done.failed_item) == (2, 4, 1)
    assert rig.pool.pending() == 0


def test_cancelled_store_fails_its_slots() -> None:
    rig = small_rig(items=512, threads=1)
    try:
        rig.fill_all()
        rig.store(1, np.arange(512 * 4, dtype=np.int32).reshape(512, 4))
        rig.pool.cancel(1)
        done = rig.finish(1)
        states = [rig.arena.state(i) for i in range(512)]
        assert set(states) <= {READY, FAILED}, "nobody is left waiting on FILLING"
        if done.status == 2:
            assert states[done.failed_item] == FAILED
            assert all(s == READY for s in states[: done.failed_item])
        else:
            assert done.status == 0 and FAILED not in states
    finally:
        rig.close()


def test_injected_failure(rig: Rig) -> None:
    ids = rig.stored()
    rig.pool.inject(3)
    rig.load(2, ids)
    done = rig.finish(2)
    assert (done.status, done.reason) == (1, 5) and done.failed_item >= 0
    rig.pool.inject(0)
    rig.load(3, ids)
    assert rig.finish(3).status == 0


# -- life and arguments ------------------------------------------------------------------------


def test_close_reports_everything_and_refuses_more() -> None:
    rig = small_rig()
    ids = rig.stored()
    _refill(rig)
    rig.load(2, ids)
    rig.pool.close()
    rig.pool.close()
    assert [(d.job, d.status) for d in rig.pool.poll()] == [(2, 2)]
    with pytest.raises(ValueError, match="closed"):
        rig.load(3, ids)
    rig.arena.close()


def test_pool_keeps_the_mapping_when_the_arena_is_closed() -> None:
    rig = small_rig()
    ids = rig.stored()
    rig.arena.close()
    rig.load(2, ids)
    assert rig.finish(2).status == 0
    rig.pool.close()


def test_threads_are_named_block_signals_and_end() -> None:
    def names() -> list[str]:
        out = []
        for tid in os.listdir("/proc/self/task"):
            try:
                with (
                    open(f"/proc/self/task/{tid}/comm") as f,
                    open(f"/proc/self/task/{tid}/status") as s,
                ):
                    name = f.read().strip()
                    if name.startswith("kvo-copy"):
                        blocked = next(x for x in s if x.startswith("SigBlk"))
                        assert int(blocked.split()[1], 16) & 1 << 1, "SIGINT is blocked"
                        out.append(name)
            except FileNotFoundError:
                continue
        return sorted(out)

    rig = small_rig(threads=3)
    end = time.monotonic() + 5
    while len(names()) < 3 and time.monotonic() < end:
        time.sleep(0.01)
    assert names() == ["kvo-copy-0", "kvo-copy-1", "kvo-copy-2"]
    rig.close()
    assert names() == []


def test_empty_job_and_unknown_job(rig: Rig) -> None:
    none = np.zeros(0, np.uint32), np.zeros(0, np.uint64), np.zeros(0, np.uint64), b""
    rig.pool.submit_load(9, rig.group, *none, np.zeros((0, 4), np.int32), 100)
    assert rig.finish(9).status == 0
    assert rig.pool.wait(12345, 0) and rig.pool.poll() == []


def test_bad_submissions_are_refused_before_anything_moves(rig: Rig) -> None:
    ids = rig.stored()
    for bad in (ids - 1, ids + 1):
        with pytest.raises(ValueError, match="block id"):
            rig.store(2, bad)
    with pytest.raises(ValueError, match="block id"):
        rig.load(2, ids - 2)
    with pytest.raises(ValueError):
        rig.load(2, np.zeros((rig.items, 5), np.int32))
    with pytest.raises(ValueError):
        rig.load(2, ids[:2])
    rig.offsets += np.uint64(16)
    with pytest.raises(ValueError, match="leaf-aligned"):
        rig.load(2, ids)
    rig.offsets += np.uint64(rig.arena.data_bytes - 16)
    with pytest.raises(ValueError):
        rig.load(2, ids)
    assert rig.pool.pending() == 0 and rig.pool.poll() == []


def test_job_number_is_free_again_once_done(rig: Rig) -> None:
    ids = rig.stored()
    rig.gens[0] = rig.arena.begin_fill(0, 1)
    rig.load(5, ids)
    with pytest.raises(ValueError, match="pending"):
        rig.load(5, ids)
    rig.pool.cancel(5)
    rig.finish(5)
    rig.gens[0] = rig.arena.begin_fill(0, 1)
    rig.arena.fill_done(0, int(rig.gens[0]))
    rig.load(5, ids)
    assert rig.finish(5).status == 0


@settings(max_examples=150, deadline=None)
@given(
    fragments=st.lists(
        st.tuples(st.integers(1, 60), st.integers(1, 30), st.integers(1, 20)),
        min_size=1,
        max_size=3,
    ),
    blocks=st.integers(1, 6),
)
def test_overlap_check_is_exact(fragments: list[tuple[int, int, int]], blocks: int) -> None:
    arena = Arena.create(2 * MIB, 1, 1)
    pool = CpuCopyPool(arena, 0, 1)
    taken: list[int] = []
    for base, stride, size in fragments:
        for b in range(blocks):
            taken += range(base + b * stride, base + b * stride + size)
    clean = len(taken) == len(set(taken))
    try:  # addresses are made up; nothing is copied
        pool.add_group(fragments, blocks, LEAF)
        assert clean
    except ValueError:
        assert not clean
    pool.close()


def test_groups_that_do_not_fit_are_refused(rig: Rig) -> None:
    for fragments, blocks, shard in (
        ([], 4, LEAF),
        ([(4096, 64, 64)], 0, LEAF),
        ([(4096, 64, 64)], 4, LEAF + 1),
        ([(4096, LEAF + 1, LEAF + 1)], 4, LEAF),
        ([(1 << 60, 64, 64)], 4, LEAF),
        ([(0, 64, 64)], 4, LEAF),
    ):
        with pytest.raises(ValueError):
            rig.pool.add_group(fragments, blocks, shard)


def test_many_jobs_from_many_threads() -> None:
    rig = small_rig(items=8, threads=2)
    try:
        ids = rig.stored()
        before = rig.kv.copy()

        def submit(first: int) -> None:
            for job in range(first, first + 50):
                i = job % rig.items
                rig.pool.submit_load(
                    job,
                    rig.group,
                    rig.slots[i : i + 1],
                    rig.gens[i : i + 1],
                    rig.offsets[i : i + 1],
                    rig.keys[16 * i : 16 * i + 16],
                    ids[i : i + 1],
                    20_000,
                )

        workers = [threading.Thread(target=submit, args=(100 * n,)) for n in range(1, 5)]
        for w in workers:
            w.start()
        for w in workers:
            w.join()
        for n in range(1, 5):
            for job in range(100 * n, 100 * n + 50):
                assert rig.pool.wait(job, 20_000)
        done = rig.pool.poll()
        assert len({d.job for d in done}) == 200 and all(d.status == 0 for d in done)
        assert rig.kv.same(before)
    finally:
        rig.close()


def _copy_threads() -> dict[int, str]:
    """Task id and name of this process's copy threads."""
    found = {}
    for task in os.listdir("/proc/self/task"):
        with open(f"/proc/self/task/{task}/comm") as file:
            name = file.read().strip()
        if name.startswith("kvo-copy"):
            found[int(task)] = name
    return found


def test_threads_have_their_cores_and_priority() -> None:
    allowed = sorted(os.sched_getaffinity(0))
    cores = [[allowed[0]], [allowed[-1]]]
    arena = Arena.create(4 << 20, 4, 1)
    before = set(_copy_threads())
    pool = CpuCopyPool(arena, 0, 2, nice=3, cores=cores)

    def settled() -> bool:
        mine = {t: n for t, n in _copy_threads().items() if t not in before}
        return len(mine) == 2 and all(
            os.sched_getaffinity(t) == set(cores[int(n[-1])])
            and os.getpriority(os.PRIO_PROCESS, t) == os.getpriority(os.PRIO_PROCESS, 0) + 3
            for t, n in mine.items()
        )

    end = time.monotonic() + 5
    while not settled() and time.monotonic() < end:
        time.sleep(0.01)
    assert settled()
    pool.close()


def test_a_core_that_is_not_there_leaves_the_thread_where_it_may_run() -> None:
    arena = Arena.create(4 << 20, 4, 1)
    before = set(_copy_threads())
    pool = CpuCopyPool(arena, 0, 1, cores=[[100_000]])
    time.sleep(0.05)
    mine = set(_copy_threads()) - before
    assert [os.sched_getaffinity(t) for t in mine] == [os.sched_getaffinity(0)]
    pool.close()
