"""The shared arena: slot table transitions, waits across threads and processes, attach, crash."""

from __future__ import annotations

import mmap
import multiprocessing
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from kvoffload import _core
from kvoffload._core import FAILED, FILLING, FREE, READY, Arena

MIB = 1 << 20


@pytest.fixture
def arena() -> Iterator[Arena]:
    a = Arena.create(4 * MIB, 16, 2)
    yield a
    a.check()
    a.close()


# -- geometry and memory -----------------------------------------------------------------------


def test_data_bytes_are_rounded_down_and_aligned() -> None:
    a = Arena.create(5 * MIB + 123, 3, 1)
    assert a.data_bytes == 4 * MIB
    assert a.data_ptr % (2 * MIB) == 0
    assert a.max_slots == 3 and a.n_ranks == 1
    assert a.path.startswith(f"/proc/{os.getpid()}/fd/") and os.stat(a.path).st_ino == a.inode


@pytest.mark.parametrize("args", [(MIB, 4, 1), (4 * MIB, 0, 1), (4 * MIB, 4, 0), (4 * MIB, 4, 65)])
def test_senseless_geometry_is_refused(args: tuple[int, int, int]) -> None:
    with pytest.raises(ValueError):
        Arena.create(*args)


def test_view_reads_and_writes_and_outlives_close(arena: Arena) -> None:
    view = arena.view(MIB, 100)
    assert bytes(view) == bytes(100) and not view.readonly
    view[3] = 7
    assert arena.view(MIB + 3, 1)[0] == 7
    with pytest.raises(ValueError):
        arena.view(4 * MIB - 1, 2)
    with pytest.raises(ValueError):
        arena.leaf_hashes(1, _core.LEAF_BYTES)
    other = Arena.create(2 * MIB, 1, 1)
    kept = other.view(0, 8)
    other.close()
    other.close()
    kept[0] = 1  # the mapping is still there
    with pytest.raises(ValueError, match="closed"):
        other.state(0)


def test_prefault_reaches_all_bytes() -> None:
    a = Arena.create(96 * MIB, 4, 1)
    a.view(MIB, 1)[0] = 9
    a.prefault_start(2)
    end = time.monotonic() + 20
    while a.prefaulted_bytes() < a.data_bytes and time.monotonic() < end:
        time.sleep(0.005)
    assert a.prefaulted_bytes() == a.data_bytes
    assert a.view(MIB, 1)[0] == 9
    assert os.stat(a.path).st_blocks * 512 >= a.data_bytes
    a.close()


def _pmd_mapped(address: int) -> int:
    """Bytes of the mapping at ``address`` that are on huge pages."""
    mine, found = False, 0
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if ranges := re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line):
            mine = int(ranges[1], 16) <= address < int(ranges[2], 16)
        elif mine and line.startswith("ShmemPmdMapped:"):
            found = int(line.split()[1]) << 10
    return found


def test_hugepages_are_there_where_it_says_so() -> None:
    """Also where shmem_enabled says never; and nobody who writes meanwhile loses a byte."""
    small = Arena.create(64 * MIB, 4, 1, hugepages=False)
    assert not small.hugepages
    a = Arena.create(64 * MIB, 4, 1)
    other = Arena.attach(a.path, a.inode)
    done = threading.Event()
    rounds = [0]

    def write() -> None:
        view = np.frombuffer(other.view(0, 64 * MIB), np.uint8)
        while not done.is_set():
            rounds[0] += 1
            view[5 :: 64 << 10] = rounds[0] % 251

    a.view(3 * MIB, 4)[:] = b"kept"
    writer = threading.Thread(target=write)
    writer.start()
    for each in (small, a):
        each.prefault_start(2)
    end = time.monotonic() + 20
    while min(small.prefaulted_bytes(), a.prefaulted_bytes()) < 64 * MIB:
        assert time.monotonic() < end
        time.sleep(0.005)
    done.set()
    writer.join()
    assert bytes(a.view(3 * MIB, 4)) == b"kept"
    last = np.frombuffer(a.view(0, 64 * MIB), np.uint8)[5 :: 64 << 10]
    assert set(last.tolist()) == {rounds[0] % 251}
    assert not _pmd_mapped(small.data_ptr)
    assert (_pmd_mapped(a.data_ptr) > 0) == a.hugepages


def test_a_prefault_holds_nobody_up() -> None:
    """Mapping memory takes the lock that a prefault holds, and the cores are busy with others."""
    hogs = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(2)]
    a = Arena.create(2048 * MIB, 4, 1, hugepages=False)
    took: list[float] = []
    try:
        a.prefault_start(1)
        end = time.monotonic() + 3
        while a.prefaulted_bytes() < a.data_bytes and time.monotonic() < end:
            begin = time.monotonic()
            mmap.mmap(-1, MIB).close()
            took.append(time.monotonic() - begin)
            time.sleep(0.001)
    finally:
        for hog in hogs:
            hog.kill()
            hog.wait()
        a.close()
    assert sorted(took)[len(took) // 2] < 0.02


def test_close_stops_a_running_prefault() -> None:
    a = Arena.create(1024 * MIB, 4, 1)
    a.prefault_start(1)
    begin = time.monotonic()
    a.close()
    assert time.monotonic() - begin < 2.0


# -- slot table --------------------------------------------------------------------------------


def test_ready_needs_all_ranks(arena: Arena) -> None:
    g = arena.begin_fill(3, 0b11)
    assert g == 1 and arena.state(3) == FILLING
    assert arena.rank_done(3, g, 1) and arena.state(3) == FILLING and arena.done_mask(3) == 0b10
    assert arena.rank_done(3, g, 1), "a second report of a rank does no harm"
    assert arena.rank_done(3, g, 0) and arena.state(3) == READY
    assert not arena.rank_done(3, g, 0), "not FILLING any more"


def test_old_generations_are_refused_everywhere(arena: Arena) -> None:
    old = arena.begin_fill(0, 0b01)
    new = arena.begin_fill(0, 0b01)
    assert new == old + 1
    assert not arena.rank_done(0, old, 0) and not arena.fill_done(0, old) and not arena.fail(0, old)
    assert arena.done_mask(0) == 0 and arena.state(0) == FILLING
    assert arena.wait_ready(0, old, 10) == FREE
    assert arena.fill_done(0, new) and arena.state(0) == READY and arena.done_mask(0) == 1


def test_fail_takes_filling_and_ready_but_not_free(arena: Arena) -> None:
    g = arena.begin_fill(1, 1)
    assert arena.fail(1, g) and arena.state(1) == FAILED
    assert not arena.fail(1, g) and not arena.rank_done(1, g, 0)
    g = arena.begin_fill(1, 1)
    assert arena.fill_done(1, g) and arena.fail(1, g)
    arena.set_free(1)
    assert arena.state(1) == FREE and arena.generation(1) == g and not arena.fail(1, g)


def test_a_rank_that_is_not_needed_cannot_complete_a_slot(arena: Arena) -> None:
    g = arena.begin_fill(2, 0b01)
    assert not arena.rank_done(2, g, 1)
    assert arena.state(2) == FILLING
    with pytest.raises(ValueError):
        arena.rank_done(2, g, 2)
    with pytest.raises(ValueError):
        arena.begin_fill(2, 0b100)
    with pytest.raises(ValueError):
        arena.state(16)


def test_64_ranks_use_both_mask_halves() -> None:
    a = Arena.create(2 * MIB, 2, 64)
    full = (1 << 64) - 1
    g = a.begin_fill(0, full)
    for rank in range(64):
        assert a.state(0) == FILLING
        assert a.rank_done(0, g, rank)
    assert a.state(0) == READY and a.done_mask(0) == full
    a.set_attached(63)
    assert a.attached_mask() == 1 << 63
    a.check()


def test_states_batch(arena: Arena) -> None:
    gens = [arena.begin_fill(s, 1) for s in range(4)]
    arena.fill_done(1, gens[1])
    arena.fail(2, gens[2])
    slots = np.array([0, 1, 2, 3, 5], np.uint32)
    wanted = np.array([gens[0], gens[1], gens[2], gens[3] + 1, 0], np.uint64)
    assert arena.states(slots, wanted).tolist() == [FILLING, READY, FAILED, FREE, FREE]
    with pytest.raises(ValueError):
        arena.states(slots, wanted[:2])
    with pytest.raises(ValueError):
        arena.states(np.array([16], np.uint32), np.array([1], np.uint64))


def test_attached_and_epoch_are_shared(arena: Arena) -> None:
    other = Arena.attach(arena.path, arena.inode)
    assert arena.attached_mask() == 0 and arena.epoch() == 0
    other.set_attached(1)
    assert arena.attached_mask() == 0b10
    assert other.bump_epoch() == 1 and arena.epoch() == 1
    with pytest.raises(ValueError):
        other.set_attached(2)


class SlotModel(RuleBasedStateMachine):
    """One slot against a model, seen through the creator's and an attacher's mapping."""

    def __init__(self) -> None:
        super().__init__()
        self.a = Arena.create(2 * MIB, 1, 3)
        self.b = Arena.attach(self.a.path, self.a.inode)
        self.state, self.gen, self.need, self.done = FREE, 0, 0, 0

    @rule(need=st.integers(0, 7))
    def begin_fill(self, need: int) -> None:
        self.gen += 1
        assert self.a.begin_fill(0, need) == self.gen
        self.state, self.need, self.done = FILLING, need, 0

    @rule(back=st.integers(0, 1), rank=st.integers(0, 2))
    def rank_done(self, back: int, rank: int) -> None:
        ok = back == 0 and self.state == FILLING and bool(self.need >> rank & 1)
        assert self.b.rank_done(0, max(self.gen - back, 0), rank) == ok
        if ok:
            self.done |= 1 << rank
            self.state = READY if self.done == self.need else FILLING

    @rule(back=st.integers(0, 1))
    def fill_done(self, back: int) -> None:
        ok = back == 0 and self.state == FILLING
        assert self.b.fill_done(0, max(self.gen - back, 0)) == ok
        if ok:
            self.state, self.done = READY, self.need

    @rule(back=st.integers(0, 1))
    def fail(self, back: int) -> None:
        ok = back == 0 and self.state in (FILLING, READY)
        assert self.b.fail(0, max(self.gen - back, 0)) == ok
        if ok:
            self.state = FAILED

    @rule()
    def set_free(self) -> None:
        self.a.set_free(0)
        self.state = FREE

    @invariant()
    def same(self) -> None:
        for m in (self.a, self.b):
            assert (m.state(0), m.generation(0), m.done_mask(0)) == (
                self.state,
                self.gen,
                self.done,
            )
            m.check()

    def teardown(self) -> None:
        self.a.close()
        self.b.close()


TestSlotModel = SlotModel.TestCase
TestSlotModel.settings = settings(max_examples=40, stateful_step_count=30, deadline=None)


# -- threads -----------------------------------------------------------------------------------


def test_wait_times_out_and_wakes_at_once(arena: Arena) -> None:
    g = arena.begin_fill(0, 1)
    begin = time.monotonic()
    assert arena.wait_ready(0, g, 50) == FILLING
    assert 0.04 < time.monotonic() - begin < 1.0
    threading.Timer(0.05, arena.fill_done, (0, g)).start()
    assert arena.wait_ready(0, g, 10_000) == READY
    assert arena.wait_ready(0, g, 0) == READY


@pytest.mark.parametrize(("end", "state"), [("fail", FAILED), ("refill", FREE), ("free", FREE)])
def test_wait_ends_however_filling_ends(arena: Arena, end: str, state: int) -> None:
    g = arena.begin_fill(0, 1)
    acts = {
        "fail": lambda: arena.fail(0, g),
        "refill": lambda: arena.begin_fill(0, 1),
        "free": lambda: arena.set_free(0),
    }
    threading.Timer(0.03, acts[end]).start()
    begin = time.monotonic()
    assert arena.wait_ready(0, g, 10_000) == state
    assert time.monotonic() - begin < 5


# -- processes ---------------------------------------------------------------------------------


def _rank(path: str, inode: int, pipe: Connection) -> None:
    """A worker: attach, say so, then wait for slot 0 and report slot 1 filled."""
    a = Arena.attach(path, inode)
    a.set_attached(1)
    pipe.send("attached")
    gen0, gen1 = pipe.recv()
    pipe.send((a.wait_ready(0, gen0, 20_000), bytes(a.view(0, 4))))
    a.view(2 * MIB, 4)[:] = b"back"
    pipe.send(a.rank_done(1, gen1, 1))


def test_wait_and_fill_across_processes(arena: Arena) -> None:
    ctx = multiprocessing.get_context("spawn")
    here, there = ctx.Pipe()
    child = ctx.Process(target=_rank, args=(arena.path, arena.inode, there))
    child.start()
    assert here.poll(60) and here.recv() == "attached"
    assert arena.attached_mask() == 0b10
    g0, g1 = arena.begin_fill(0, 1), arena.begin_fill(1, 0b10)
    here.send((g0, g1))
    time.sleep(0.05)  # so that the child waits in the kernel
    arena.view(0, 4)[:] = b"data"
    assert arena.rank_done(0, g0, 0)
    assert here.poll(20) and here.recv() == (READY, b"data")
    assert arena.wait_ready(1, g1, 20_000) == READY
    assert here.recv() is True and bytes(arena.view(2 * MIB, 4)) == b"back"
    child.join(20)
    assert child.exitcode == 0


CREATOR = """
import sys, time
from kvoffload._core import Arena
a = Arena.create(4 << 20, 4, 1)
g = a.begin_fill(0, 1)
a.view(0, 5)[:] = b"hello"
a.fill_done(0, g)
a.begin_fill(1, 1)
print(a.path, a.inode, flush=True)
time.sleep(60)
"""


def test_attachers_survive_a_killed_creator() -> None:
    child = subprocess.Popen([sys.executable, "-c", CREATOR], stdout=subprocess.PIPE, text=True)
    try:
        assert child.stdout is not None
        path, inode = child.stdout.readline().split()
        a = Arena.attach(path, int(inode))
        waited: list[int] = []
        waiter = threading.Thread(target=lambda: waited.append(a.wait_ready(1, 1, 400)))
        waiter.start()
        child.send_signal(signal.SIGKILL)
        child.wait(20)
        waiter.join(20)
        assert waited == [FILLING], "nobody is left to fill it, and nobody hangs"
        assert a.state(0) == READY and bytes(a.view(0, 5)) == b"hello"
        assert a.fill_done(0, a.begin_fill(0, 1)) and a.state(0) == READY
        a.view(3 * MIB, 1)[0] = 1
        a.check()
        with pytest.raises(OSError):
            Arena.attach(path, int(inode))
    finally:
        child.kill()
        child.wait(20)
        if child.stdout is not None:
            child.stdout.close()


def test_attach_refuses_what_is_not_this_arena(arena: Arena, tmp_path: os.PathLike[str]) -> None:
    with pytest.raises(OSError, match="inode"):
        Arena.attach(arena.path, arena.inode + 1)
    with pytest.raises(FileNotFoundError):
        Arena.attach("/proc/self/fd/99999", 1)
    plain = os.path.join(tmp_path, "plain")
    with open(plain, "wb") as f:
        f.write(bytes(8192))
    with pytest.raises(OSError, match="not an arena"):
        Arena.attach(plain, os.stat(plain).st_ino)
    with open(arena.path, "rb") as f:
        header = f.read(4096)
    with open(plain, "wb") as f:
        f.write(header)  # right magic, but the file is cut short
    with pytest.raises(OSError, match="disagree"):
        Arena.attach(plain, os.stat(plain).st_ino)
    version = bytearray(header)
    version[8] ^= 0x80
    with open(plain, "wb") as f:
        f.write(version)
    with pytest.raises(OSError, match="another version"):
        Arena.attach(plain, os.stat(plain).st_ino)


def test_nobody_can_shrink_the_arena(arena: Arena) -> None:
    with open(arena.path, "r+b") as f, pytest.raises(PermissionError):
        os.ftruncate(f.fileno(), 4096)


def test_check_sees_a_damaged_table() -> None:
    a = Arena.create(2 * MIB, 2, 1)
    a.begin_fill(1, 1)
    a.check()
    with open(a.path, "r+b") as f:
        f.seek(4096 + 64)
        word = int.from_bytes(f.read(8), "little")
        f.seek(4096 + 64)
        f.write((word & ~3 | READY).to_bytes(8, "little"))  # READY though no rank is done
    with pytest.raises(AssertionError, match="slot 1: READY with ranks missing"):
        a.check()
