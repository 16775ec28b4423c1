"""The chunk store where a part of it fails: one segment, one journal, one directory, one descriptor."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import numpy as np

from kvoffload._core import SegmentStore
from kvoffload.store import Store, open_store
from kvoffload.types import StoreResult
from tests.support.store_engines import io_engine  # noqa: F401  (every test runs on both engines)

MIB = 1 << 20
SEGMENT = 512 << 10
CHUNK = 32 << 10
PER_SEGMENT = 15  # chunks of CHUNK bytes


def key_of(i: int) -> bytes:
    return hashlib.sha256(b"part %d" % i).digest()[:16]


def payload_of(i: int, version: int = 0) -> bytes:
    return np.random.default_rng([i, version]).bytes(CHUNK)


def opened(path: Path, max_bytes: int = 8 * MIB, segment_bytes: int = SEGMENT) -> Store:
    return open_store(path, max_bytes=max_bytes, segment_bytes=segment_bytes)


def native_of(store: Store) -> SegmentStore:
    assert isinstance(store._native, SegmentStore)
    return store._native


def fill(store: Store, start: int, stop: int) -> list[StoreResult]:
    """One request per chunk."""
    return [store.put(key_of(i), payload_of(i)) for i in range(start, stop)]


def held(store: Store, keys: range) -> list[int]:
    """Which are held; what comes back is right."""
    out = []
    for i, found in zip(keys, store.get_many([key_of(i) for i in keys]), strict=True):
        assert found is None or found == payload_of(i)
        out += [i] if found is not None else []
    return out


def descriptors(path: Path) -> int:
    """How many this process has below the path."""
    count = 0
    for name in os.listdir("/proc/self/fd"):
        try:
            count += os.readlink(f"/proc/self/fd/{name}").startswith(f"{path}/")
        except FileNotFoundError:
            continue
    return count


class TestDescriptors:
    def test_a_growing_store_keeps_a_bounded_number_of_files_open(self, tmp_path: Path) -> None:
        path = tmp_path / "s"
        with opened(path, 64 * MIB, 64 << 10) as store:
            assert set(fill(store, 0, 300)) == {StoreResult.OK}
            assert store.stats()["segments"] >= 300
            # 256 segments, journals, directories, the lock.
            assert descriptors(path) < 270
            assert held(store, range(300)) == list(range(300))
            assert descriptors(path) < 270
            store.check()
