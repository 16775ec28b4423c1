"""The crash campaign's workload: a stream of operations that its seed decides, and its child.

    python load.py record|kill DIRECTORY SEED OPS threads|uring

The parent generates the same stream, so it knows every value ever put without being told. Payloads
are a function of key, seed and version; the version of a key grows with each delete, so one key has
several right answers and a foreign chunk, an older life or a torn one is none of them.
"""

from __future__ import annotations

import hashlib
import os
import random
import struct
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path

from kvoffload._core import SegmentStore
from kvoffload.store import Store
from kvoffload.types import StoreResult

MAX_BYTES = 1 << 20
SEGMENT_BYTES = 128 << 10  # small: every recording recycles
KEYS = 160  # more than the bound holds


@dataclass(frozen=True, slots=True)
class Op:
    """One step. ``chunks``: (key number, version) pairs; a get or delete names keys only."""

    kind: str  # put, delete, get, flush, pause, kill, close
    chunks: tuple[tuple[int, int], ...] = ()


def key_of(number: int) -> bytes:
    return hashlib.sha256(b"chunk %d" % number).digest()[:16]


def payload_of(number: int, seed: int, version: int) -> bytes:
    """1 byte to 40 KiB without repetition: any misplaced sector shows."""
    name = hashlib.shake_128(b"%d %d %d" % (number, seed, version))
    pick = int.from_bytes(name.digest(8), "little")
    most = (3 << 10, 12 << 10, 12 << 10, 40 << 10)[pick & 3]
    return name.digest(8 + 1 + (pick >> 2) % most)[8:]


def ops(seed: int) -> Iterator[Op]:
    """The endless stream of ``seed``."""
    rng = random.Random(seed)
    versions = [0] * KEYS
    while True:
        chosen = [rng.randrange(KEYS) for _ in range(rng.randint(1, 6))]
        dice = rng.random()
        if dice < 0.62:
            yield Op("put", tuple((n, versions[n]) for n in dict.fromkeys(chosen)))
        elif dice < 0.77:
            for number in (gone := dict.fromkeys(chosen[:3])):
                versions[number] += 1
            yield Op("delete", tuple((n, versions[n]) for n in gone))
        elif dice < 0.89:
            yield Op("get", tuple((n, versions[n]) for n in chosen))
        elif dice < 0.93:
            yield Op("flush")
        elif dice < 0.985:
            yield Op("pause")
        else:
            yield Op(rng.choice(("kill", "kill", "close")))


@dataclass
class Truth:
    """Every value ever put under every key."""

    values: dict[bytes, set[bytes]] = field(default_factory=dict)

    def add(self, seed: int, count: int) -> None:
        """All puts among the first ``count`` operations of ``seed``."""
        for op in islice(ops(seed), count):
            if op.kind != "put":
                continue
            for number, version in op.chunks:
                values = self.values.setdefault(key_of(number), set())
                values.add(payload_of(number, seed, version))


def open_small(path: Path, engine: str) -> Store:
    """The store under test, with ``engine`` and no other."""
    native = SegmentStore(str(path), MAX_BYTES, SEGMENT_BYTES, threads=2, io_engine=engine)
    return Store(native)


def run(path: Path, seed: int, count: int, engine: str, announce: bool) -> None:
    """The first ``count`` operations (0: without end); each is announced before it starts."""
    store = open_small(path, engine)
    if announce:
        os.write(1, struct.pack("<I", 0))
    for index, op in enumerate(islice(ops(seed), count or None)):
        if announce:
            os.write(1, struct.pack("<I", index + 1))
        keys = [key_of(number) for number, _ in op.chunks]
        if op.kind == "put":
            payloads = [payload_of(n, seed, v) for n, v in op.chunks]
            results = store.put_many(zip(keys, payloads, strict=True))
            if set(results) != {StoreResult.OK}:
                raise RuntimeError(f"operation {index}: put gave {results}")
        elif op.kind == "delete":
            store.delete(*keys)
        elif op.kind == "get":
            store.get_many(keys)
        elif op.kind == "flush":
            if not store.flush():
                raise RuntimeError(f"operation {index}: flush timed out")
        elif op.kind == "pause":
            time.sleep(0.012)  # longer than the journal waits
        else:
            native = store._native
            if op.kind == "kill" and native is not None:
                native._abandon()
            store.close()
            store = open_small(path, engine)
    if random.Random(seed).random() < 0.5:
        store.close()
    os._exit(0)  # else as a kill would


if __name__ == "__main__":
    _, mode, folder, number, steps, io_engine = sys.argv
    run(Path(folder), int(number), int(steps), io_engine, mode == "kill")
