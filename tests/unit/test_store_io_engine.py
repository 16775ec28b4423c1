"""Which I/O engine a chunk store takes, what it says about it, and what io_uring's buffers do."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kvoffload._core import Arena, SegmentStore, io_uring_problem
from kvoffload.cli import doctor
from kvoffload.config import Config
from kvoffload.store import open_store
from kvoffload.tiers.nvme import open_segment_store
from kvoffload.types import StoreResult

MIB = 1 << 20
CHUNK = 256 << 10
needs_uring = pytest.mark.skipif(io_uring_problem() is not None, reason=str(io_uring_problem()))

# Does what containers' default seccomp profiles do to io_uring_setup, then opens stores.
FORBIDDEN = """
import ctypes, json, struct, sys
from kvoffload.errors import StoreError
LD, JEQ, RET = 0x20, 0x15, 0x06
program = struct.pack("<HBBI", LD, 0, 0, 0)             # the system call's number
program += struct.pack("<HBBI", JEQ, 0, 1, 425)         # io_uring_setup, on every architecture
program += struct.pack("<HBBI", RET, 0, 0, 0x00050001)  # EPERM
program += struct.pack("<HBBI", RET, 0, 0, 0x7FFF0000)  # allowed
buffer = ctypes.create_string_buffer(program, len(program))
class Prog(ctypes.Structure):
    _fields_ = [("n", ctypes.c_ushort), ("p", ctypes.c_void_p)]
libc = ctypes.CDLL(None, use_errno=True)
assert libc.prctl(38, 1, 0, 0, 0) == 0
assert libc.prctl(22, 2, ctypes.byref(Prog(4, ctypes.addressof(buffer))), 0, 0) == 0
from kvoffload._core import io_uring_problem
from kvoffload.cli import doctor
from kvoffload.store import open_store
out = {"problem": io_uring_problem(), "doctor": doctor.check_uring().found}
try:
    open_store(sys.argv[1] + "/refused", max_bytes=1 << 23, io_engine="uring")
except StoreError as error:
    out["refused"] = str(error)
with open_store(sys.argv[1] + "/s", max_bytes=1 << 23) as store:
    store.put(bytes(16), b"x")
    out |= {"engine": store.io_engine, "held": store.get(bytes(16)).decode()}
    out["note"] = store._native.io_engine_note
print(json.dumps(out))
"""


def test_forbidden_by_seccomp(tmp_path: Path) -> None:
    env = os.environ | {"PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    done = subprocess.run(
        [sys.executable, "-c", FORBIDDEN, str(tmp_path)],
        check=True,
        timeout=60,
        env=env,
        capture_output=True,
        text=True,
    )
    out = json.loads(done.stdout)
    assert out["engine"] == "threads" and out["held"] == "x"
    if "no liburing" not in out["problem"]:
        assert "forbidden" in out["problem"]
    assert out["note"] == out["problem"]
    assert out["doctor"] == f"{out['problem']}: the NVMe tier uses threads"
    assert str(tmp_path / "refused") in out["refused"] and "\n" not in out["refused"]
    assert out["problem"] in out["refused"] and "use auto or threads" in out["refused"]
    assert not (tmp_path / "refused").exists()


@pytest.mark.parametrize("asked", ["auto", "threads", "uring"])
def test_which_one_runs(tmp_path: Path, asked: Any) -> None:
    problem = io_uring_problem()
    if asked == "uring" and problem:
        pytest.skip(problem)
    want = "threads" if asked == "threads" or problem else "uring"
    with open_store(tmp_path / "s", max_bytes=8 * MIB, io_engine=asked) as store:
        assert store.put(bytes(16), b"payload") is StoreResult.OK
        assert store.get(bytes(16)) == b"payload"
        assert store.io_engine == want
        assert store.stats()["uring"] == (want == "uring")
        names = {
            Path(f"/proc/self/task/{t}/comm").read_text() for t in os.listdir("/proc/self/task")
        }
        assert ("kvo-ring\n" in names) == (want == "uring")
    # What one engine wrote the other reads.
    with open_store(tmp_path / "s", io_engine="threads") as store:
        assert store.get(bytes(16)) == b"payload"


def test_the_tier_opens_the_engine_it_is_told(tmp_path: Path) -> None:
    store = open_segment_store(tmp_path, max_bytes=64 << 20, io_engine="threads")
    assert store.io_engine == "threads"
    store.close()
    with pytest.raises(ValueError, match="io_engine"):
        open_segment_store(tmp_path, io_engine="aio")  # type: ignore[arg-type]


def test_unknown_engine(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="auto, uring or threads"):
        SegmentStore(str(tmp_path / "s"), 8 * MIB, io_engine="aio")
    assert not (tmp_path / "s").exists()


def test_config_and_doctor() -> None:
    assert Config.from_extra_config({"io_engine": "uring"}).io_engine == "uring"
    line = doctor.check_uring()
    assert line.status is doctor.Status.OK
    problem = io_uring_problem()
    assert "uses it" in line.found if problem is None else problem in line.found


def arena_of(chunks: int, *, prefault: bool = True) -> Arena:
    arena = Arena.create(chunks * CHUNK, chunks, 1, False)
    if prefault:
        arena.prefault_start()
        deadline = time.monotonic() + 20
        while arena.prefaulted_bytes() < arena.data_bytes and time.monotonic() < deadline:
            time.sleep(0.005)
        assert arena.prefaulted_bytes() == arena.data_bytes
    return arena


def move(store: SegmentStore, arena: Arena, job: int, keys: list[bytes], *, put: bool) -> bytes:
    """Slot i of the arena holds chunk ``keys[i]``; neighbours in the store are none in memory."""
    n = len(keys)
    slots = np.arange(n, dtype=np.uint32)
    offsets = np.array([(i * 3 % 8) * CHUNK for i in range(n)], dtype=np.uint64)
    generations = np.array([arena.begin_fill(int(s), 1) for s in slots], dtype=np.uint64)
    if put:
        for i, key in enumerate(keys):
            arena.view(int(offsets[i]), CHUNK)[:] = key * (CHUNK // 16)
            arena.hash_leaves(int(offsets[i]), CHUNK, key)
            assert arena.fill_done(i, int(generations[i]))
        depths = np.zeros(n, dtype=np.uint32)
        store.put_slots(job, arena, b"".join(keys), slots, generations, offsets, CHUNK, 0, depths)
    else:
        store.get_slots(job, arena, b"".join(keys), slots, generations, offsets, CHUNK)
    assert store.wait(job, 20_000)
    (done,) = store.poll()
    if not put:
        for i, key in enumerate(keys):
            assert bytes(arena.view(int(offsets[i]), CHUNK)) == key * (CHUNK // 16)
    return done.results


@needs_uring
class TestRegisteredBuffers:
    def open(self, path: Path) -> SegmentStore:
        return SegmentStore(str(path / "s"), 64 * MIB, io_engine="uring")

    def test_used_for_an_arena_and_given_back_with_it(self, tmp_path: Path) -> None:
        store = self.open(tmp_path)
        keys = [bytes([i]) * 16 for i in range(8)]
        moved = 0
        for round_ in range(3):  # a new arena often gets the address of the old one
            arena = arena_of(8)
            if round_ == 0:
                assert move(store, arena, 1, keys, put=True) == bytes(8)
            assert move(store, arena, 2, keys, put=False) == bytes(8)
            stats = store.stats()
            assert stats["registered_bytes"] == arena.data_bytes and stats["register_errors"] == 0
            assert stats["fixed_bytes"] > moved
            moved = stats["fixed_bytes"]
            arena.close()
            del arena
        out = bytearray(CHUNK)
        store.get(3, keys[0], [out])
        assert store.wait(3, 5000) and store.poll()[0].results == b"\x00"
        assert out == keys[0] * (CHUNK // 16)
        assert store.stats()["registered_bytes"] == 0
        store.close()

    def test_memory_that_is_not_there_yet_is_left_alone(self, tmp_path: Path) -> None:
        """Registering would fault in the whole arena and stop all I/O meanwhile."""
        store = self.open(tmp_path)
        arena = Arena.create(64 * MIB, 8, 1, False)
        keys = [bytes([i + 1]) * 16 for i in range(8)]
        assert move(store, arena, 1, keys, put=True) == bytes(8)
        assert move(store, arena, 2, keys, put=False) == bytes(8)
        assert store.stats()["registered_bytes"] == store.stats()["fixed_bytes"] == 0
        store.close()
