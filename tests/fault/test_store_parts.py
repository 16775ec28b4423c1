"""The chunk store where a part of it fails: one segment, one journal, one directory, one descriptor."""

from __future__ import annotations

import hashlib
import os
import time
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
    assert store._native is not None
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


def full(path: Path) -> Store:
    """A store that was filled, closed and opened again: no file of a segment is open."""
    with opened(path) as store:
        fill(store, 0, 260)
        assert store.stats()["recycled_segments"] > 0
    return opened(path)


def generations(path: Path) -> dict[Path, int]:
    """Segments of the first writer, oldest first."""
    found = {
        file: int.from_bytes(file.read_bytes()[40:48], "little")
        for file in (path / "w0").glob("seg-*.kv")
    }
    return dict(sorted(found.items(), key=lambda item: item[1]))


class TestRecycling:
    def test_a_segment_that_cannot_be_recycled(self, tmp_path: Path) -> None:
        """It costs the puts that waited for it, and itself."""
        path = tmp_path / "s"
        with full(path) as store:
            segments = store.stats()["segments"]
            list(generations(path))[2].unlink()  # stands for a file whose blocks are bad
            results = fill(store, 1000, 1260)
            assert results.count(StoreResult.IO_ERROR) <= 2
            assert set(results[-200:]) == {StoreResult.OK}
            assert store.stats()["segments"] == segments
            assert held(store, range(1230, 1260)) == list(range(1230, 1260))
            store.check()
        with opened(path) as store:
            assert held(store, range(1230, 1260)) == list(range(1230, 1260))

    def test_one_that_cannot_be_written(self, tmp_path: Path) -> None:
        path = tmp_path / "s"
        with full(path) as store:
            bad = list(generations(path))[2]
            bad.unlink()
            bad.mkdir()
            results = fill(store, 1000, 1260)
            assert results.count(StoreResult.IO_ERROR) <= 2
            assert set(results[-200:]) == {StoreResult.OK}
            assert held(store, range(1230, 1260)) == list(range(1230, 1260))
            assert store.stats()["bytes_used"] <= 8 * MIB
            store.check()
        with opened(path) as store:  # nor does it matter to the next life
            assert held(store, range(1230, 1260)) == list(range(1230, 1260))
            assert set(fill(store, 2000, 2260)) == {StoreResult.OK}
            store.check()

    def test_a_disk_that_fails_as_a_whole_costs_nothing(self, tmp_path: Path) -> None:
        with full(tmp_path / "s") as store:
            before, segments = held(store, range(260)), store.stats()["segments"]
            native_of(store).inject("write_eio", 1)
            assert set(fill(store, 1000, 1100)) == {StoreResult.IO_ERROR}
            assert store.stats()["segments"] == segments
            assert held(store, range(260)) == before
            store.check()
            native_of(store).inject("write_eio", 0)
            assert StoreResult.OK in fill(store, 1100, 1102)
            assert set(fill(store, 1102, 1400)) == {StoreResult.OK}
            store.check()

    def test_files_that_are_away_for_a_while(self, tmp_path: Path) -> None:
        """Neither recycled nor removed can they be: what is there is served on."""
        path = tmp_path / "s"
        with full(path) as store:
            before = held(store, range(260))
        with opened(path) as store:
            for file in generations(path):
                file.rename(f"{file}.away")
                file.mkdir()
            # One more segment fits, and is used over and over once all others have failed.
            assert fill(store, 1000, 1060).count(StoreResult.IO_ERROR) >= 10
            for file in (path / "w0").glob("*.away"):
                file.with_suffix("").rmdir()
                file.rename(file.with_suffix(""))
            assert held(store, range(260)) == before
            assert StoreResult.OK in fill(store, 1100, 1102)
            assert set(fill(store, 1102, 1400)) == {StoreResult.OK}
            store.check()


class TestDeletes:
    def test_a_flushed_delete_outlasts_what_it_hides(self, tmp_path: Path) -> None:
        """A reader keeps the segment of a deleted chunk; the one that says so must not go first."""
        path = tmp_path / "s"
        bound = 4 * SEGMENT - (64 << 10)  # three segments
        with opened(path, bound) as store:
            fill(store, 0, PER_SEGMENT)
            fill(store, 100, 101)  # the second one is open
            assert store.delete(key_of(0)) == 1
            assert store.put(key_of(0), payload_of(0, 1)) is StoreResult.OK
            assert store.flush()
            native = native_of(store)
            native.inject("slow_read_ms", 3000)
            native.get(1 << 40, key_of(5), [bytearray(CHUNK)])
            time.sleep(0.2)
            native.inject("slow_read_ms", 0)
            fill(store, 101, 101 + 3 * PER_SEGMENT)
            assert store.flush()
            assert native.wait(1 << 40, 20_000)
            assert set(fill(store, 200, 200 + 2)) == {StoreResult.OK}
            store.check()
        with opened(path, bound) as store:
            assert store.get(key_of(0)) in (None, payload_of(0, 1))

    def test_flush_is_honest_about_deletes(self, tmp_path: Path) -> None:
        path = tmp_path / "s"
        with opened(path) as store:
            fill(store, 0, 3)
        with opened(path) as store:
            native_of(store).inject("write_eio", 1)
            assert store.delete(key_of(0)) == 1
            time.sleep(0.2)  # by then no segment was found for it
            started = time.monotonic()
            assert not store.flush()
            assert time.monotonic() - started < 3, "it waits for what has failed"
            assert key_of(0) not in store
            native_of(store).inject("write_eio", 0)
            assert store.delete(key_of(1)) == 1
            assert store.flush()
            store.check()
        with opened(path) as store:
            assert held(store, range(3)) == [2]
            native_of(store).inject("write_eio", 1)
            assert store.delete(key_of(2)) == 1
            started = time.monotonic()
        assert time.monotonic() - started < 3, "nor does close"

    def test_flush_tries_again(self, tmp_path: Path) -> None:
        path = tmp_path / "s"
        with opened(path) as store:
            fill(store, 0, 3)
        with opened(path) as store:
            native_of(store).inject("write_eio", 1)
            assert store.delete(key_of(0)) == 1
            time.sleep(0.2)
            native_of(store).inject("write_eio", 0)
            assert store.flush()
        with opened(path) as store:
            assert held(store, range(3)) == [1, 2]
