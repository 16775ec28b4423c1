"""kill -9 at random moments: afterwards every chunk is identical or a miss, and none was invented."""

from __future__ import annotations

import hashlib
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

from kvoffload.store import open_store
from kvoffload.types import StoreResult
from tests.support.store_engines import io_engine  # noqa: F401  (every test runs on both engines)

MIB = 1 << 20
BOUND = 6 * MIB

# Puts numbered chunks as fast as it can, deletes every 10th, reports what a flush has made sure.
CHILD = """
import hashlib, os, sys
from kvoffload.store import open_store
from kvoffload.types import StoreResult

def key_of(i): return hashlib.sha256(b"crash %d" % i).digest()[:16]
def payload_of(i):
    nbytes = 1 + i * 7919 % 40000
    return (hashlib.sha256(b"bytes %d" % i).digest() * (nbytes // 32 + 1))[:nbytes]

path, first = sys.argv[1], int(sys.argv[2])
store = open_store(path, max_bytes=int(sys.argv[3]), segment_bytes=512 << 10, threads=2, io_engine=sys.argv[4])
os.write(1, b"open\\n")
i = first
while True:
    batch = range(i, i + 8)
    os.write(1, b"try %d\\n" % (i + 8))  # before: what is not announced must never be found
    results = set(store.put_many((key_of(j), payload_of(j)) for j in batch))
    # With a live neighbour the bound may be used up before we have a segment of our own to recycle.
    allowed = {StoreResult.OK, StoreResult.NO_SPACE} if sys.argv[5:] else {StoreResult.OK}
    assert results <= allowed, results
    os.write(1, b"put %d\\n" % (i + 8))
    if i % 5 == 0:
        gone = [j for j in batch if j % 10 == 0]
        store.delete(*map(key_of, gone))
        assert store.flush()
        os.write(1, b"sure %d\\n" % (i + 8))
    i += 8
"""


def key_of(i: int) -> bytes:
    return hashlib.sha256(b"crash %d" % i).digest()[:16]


def payload_of(i: int) -> bytes:
    nbytes = 1 + i * 7919 % 40000
    return (hashlib.sha256(b"bytes %d" % i).digest() * (nbytes // 32 + 1))[:nbytes]


def spawn(path: Path, first: int, engine: str, *, shared: bool = False) -> subprocess.Popen[bytes]:
    env = os.environ | {"PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    args = [sys.executable, "-c", CHILD, str(path), str(first), str(BOUND), engine]
    args += ["shared"] * shared
    return subprocess.Popen(args, stdout=subprocess.PIPE, env=env)


def kill_after(child: subprocess.Popen[bytes], seconds: float) -> dict[str, int]:
    """Last number of each kind of line the child got out."""
    assert child.stdout is not None
    assert child.stdout.readline() == b"open\n"
    time.sleep(seconds)
    child.send_signal(signal.SIGKILL)
    said = {}
    for line in child.stdout.read().decode().splitlines():
        word, _, number = line.partition(" ")
        if number:
            said[word] = int(number)
    assert child.wait() == -signal.SIGKILL
    return said


def test_kill_loop(tmp_path: Path, io_engine: str) -> None:  # noqa: F811
    rng = random.Random(11)
    path = tmp_path / "s"
    first = tried = 0
    checked = 0
    for _ in range(20):
        said = kill_after(spawn(path, first, io_engine), rng.uniform(0.0, 0.12))
        tried = said.get("try", tried)
        with open_store(path, max_bytes=BOUND, segment_bytes=512 << 10) as store:
            store.check()
            held = {row.key for row in store.ls()}
            known = {key_of(i): i for i in range(tried)}
            assert held <= known.keys(), "phantom: a key nobody put"
            numbers = sorted(known[k] for k in held)
            for i, found in zip(numbers, store.get_many([key_of(i) for i in numbers]), strict=True):
                assert found == payload_of(i), "a held chunk is not identical"
            checked += len(numbers)
            assert store.stats()["corrupt"] == 0
            if "sure" in said:
                # Flushed before the kill: held, unless so old that it made room.
                recent = range(max(first, said["sure"] - 8), said["sure"])
                gone = {i for i in recent if i % 10 == 0 and (said["sure"] - 8) % 5 == 0}
                assert all(key_of(i) in held for i in recent if i not in gone), said
            size = sum(p.lstat().st_size for p in path.rglob("*"))
            assert size <= BOUND
        first = tried
    assert checked > 200 and tried > 200


def test_two_processes_and_a_kill(tmp_path: Path, io_engine: str) -> None:  # noqa: F811
    """Two writers share the path; one dies, the other goes on, a third adopts the dead one's part."""
    path = tmp_path / "s"
    a = spawn(path, 0, io_engine, shared=True)
    b = spawn(path, 1_000_000, io_engine, shared=True)
    assert b.stdout is not None and b.stdout.readline() == b"open\n"
    try:
        said = kill_after(a, 0.5)
        with open_store(path, max_bytes=BOUND, segment_bytes=512 << 10) as store:
            assert {w.name for w in path.glob("w*")} == {"w0", "w1"}
            assert b.poll() is None  # still writing
            store.check()
            known = {key_of(i): i for i in range(said["try"])}
            # b is some way past what it has said; it cannot have put a million chunks.
            known |= {key_of(i): i for i in range(1_000_000, 1_100_000)}
            for row in store.ls():
                assert row.key in known
                found = store.get(row.key)
                assert found is None or found == payload_of(known[row.key])
            assert store.put(key_of(5_000_000), b"here too") in (
                StoreResult.OK,
                StoreResult.NO_SPACE,
            )
            assert store.stats()["corrupt"] == 0
    finally:
        b.kill()
        b.wait()
        b.stdout.close()
    with open_store(path, max_bytes=BOUND, segment_bytes=512 << 10) as store:
        assert len(store) > 0
        assert store.verify().bad == 0
