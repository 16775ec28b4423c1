"""The chunk store on a disk that fails: injected errors, damaged files, full disks, lost directories."""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import os
import random
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kvoffload._core import SegmentStore
from kvoffload.errors import StoreError
from kvoffload.store import Store, open_store
from kvoffload.types import StoreResult
from tests.support.disks import tiny_disk  # noqa: F401  (fixture)
from tests.support.store_engines import io_engine  # noqa: F401  (every test runs on both engines)

MIB = 1 << 20


def key_of(i: int) -> bytes:
    return hashlib.sha256(b"fault %d" % i).digest()[:16]


def payload_of(i: int) -> bytes:
    rng = np.random.default_rng(i)
    return rng.bytes(int(rng.integers(1, 40_000)))


def small(path: Path, **kw: int) -> Store:
    return open_store(path, **{"max_bytes": 8 * MIB, "segment_bytes": 512 << 10} | kw)  # type: ignore[arg-type]


def native_of(store: Store) -> SegmentStore:
    assert store._native is not None
    return store._native


def fill(store: Store, start: int, stop: int) -> list[StoreResult]:
    return store.put_many((key_of(i), payload_of(i)) for i in range(start, stop))


def right_or_miss(store: Store, keys: range) -> int:
    """How many are held; any that comes back is right."""
    hits = 0
    for i, found in zip(keys, store.get_many([key_of(i) for i in keys]), strict=True):
        assert found is None or found == payload_of(i)
        hits += found is not None
    return hits


class TestInjected:
    def test_read_eio_is_a_counted_miss_and_passes(self, tmp_path: Path) -> None:
        with small(tmp_path / "s") as store:
            fill(store, 0, 5)
            native_of(store).inject("read_eio", 1)
            buffer = bytearray(len(payload_of(1)))
            assert store.get_into(key_of(1), buffer) is StoreResult.IO_ERROR
            assert buffer == bytes(len(buffer))
            assert store.stats()["io_errors"] == 1
            native_of(store).inject("read_eio", 0)
            assert right_or_miss(store, range(5)) == 5
            store.check()

    def test_short_read(self, tmp_path: Path) -> None:
        with small(tmp_path / "s") as store:
            store.put(key_of(1), payload_of(1))
            native_of(store).inject("short_read", 1)
            buffer = bytearray(len(payload_of(1)))
            assert store.get_into(key_of(1), buffer) is StoreResult.IO_ERROR
            native_of(store).inject("short_read", 0)
            assert store.stats()["io_errors"] == 1
            assert key_of(1) not in store
            assert store.put(key_of(1), payload_of(1)) is StoreResult.OK
            assert store.get(key_of(1)) == payload_of(1)

    @pytest.mark.parametrize(
        ("what", "result"),
        [("write_eio", StoreResult.IO_ERROR), ("enospc", StoreResult.NO_SPACE)],
    )
    def test_writes_that_fail(self, tmp_path: Path, what: str, result: StoreResult) -> None:
        with small(tmp_path / "s") as store:
            fill(store, 0, 5)
            assert store.flush()
            native_of(store).inject(what, 1)
            assert set(fill(store, 10, 15)) == {result}
            assert right_or_miss(store, range(15)) == 5
            store.check()
            native_of(store).inject(what, 0)
            # The segment was given up; the next one takes over.
            assert set(fill(store, 20, 25)) == {StoreResult.OK}
            assert right_or_miss(store, range(25)) == 10
            store.check()
        with small(tmp_path / "s") as store:
            assert right_or_miss(store, range(25)) == 10

    def test_flipped_bits_are_a_counted_miss(self, tmp_path: Path) -> None:
        with small(tmp_path / "s") as store:
            fill(store, 0, 5)
            native_of(store).inject("flip_read", 1)
            buffer = bytearray(len(payload_of(1)))
            assert store.get_into(key_of(1), buffer) is StoreResult.CORRUPT
            assert buffer == bytes(len(buffer))
            native_of(store).inject("flip_read", 0)
            assert store.stats()["corrupt"] == 1
            assert key_of(1) not in store  # what lied once is not asked again
            assert right_or_miss(store, range(5)) == 4

    @pytest.mark.parametrize("what", ["read_eio", "write_eio", "enospc", "short_read", "flip_read"])
    def test_now_and_then(self, tmp_path: Path, what: str) -> None:
        """Every n-th transfer fails, journals, footers and headers included: nothing wrong, no end."""
        for every in (2, 3, 7):
            path = tmp_path / f"s{every}"
            with small(path, max_bytes=3 * MIB) as store:
                native_of(store).inject(what, every)
                for i in range(0, 300, 10):
                    assert set(fill(store, i, i + 10)) <= {
                        StoreResult.OK,
                        StoreResult.IO_ERROR,
                        StoreResult.NO_SPACE,
                    }
                    store.check()
                    right_or_miss(store, range(max(0, i - 20), i + 10))
                stats = store.stats()
                assert stats["io_errors"] + stats["no_space"] + stats["corrupt"] > 0
                native_of(store).inject(what, 0)
                fill(store, 1000, 1010)
                assert right_or_miss(store, range(1000, 1010)) == 10
            with small(path, max_bytes=3 * MIB) as store:
                assert right_or_miss(store, range(1000, 1010)) == 10
                right_or_miss(store, range(300))
                store.check()

    def test_flush_is_honest_when_journals_fail(self, tmp_path: Path) -> None:
        """Now and then a write fails: what flush vouches for is there after a kill."""
        for every in (3, 4, 5):
            path = tmp_path / f"s{every}"
            store = small(path)
            native_of(store).inject("write_eio", every)
            held = [i for i in range(30) if store.put(key_of(i), payload_of(i)) is StoreResult.OK]
            assert 0 < len(held) < 30
            sure = store.flush()
            before = store.stats()
            native_of(store)._abandon()
            with small(path) as again:
                found = right_or_miss(again, range(30))
                assert found <= len(held)
                assert not sure or found == len(held), (before, again.stats())
            store.close()

    def test_records_that_could_not_be_written(self, tmp_path: Path) -> None:
        with small(tmp_path / "s") as store:
            for i in range(200):  # until a put slips through and its journal page does not
                native_of(store).inject("write_eio", 0)
                assert store.put(key_of(i), payload_of(i)) is StoreResult.OK
                native_of(store).inject("write_eio", 1)
                if not store.flush():
                    break
            else:
                pytest.fail("no journal write was hit")
            assert store.stats()["io_errors"] > 0
            assert store.get(key_of(i)) == payload_of(i)  # still served
            assert not store.flush()
            native_of(store).inject("write_eio", 0)
            assert store.put(key_of(1000), payload_of(1000)) is StoreResult.OK
            store.check()
        with small(tmp_path / "s") as store:
            assert right_or_miss(store, range(i)) == i
            assert store.get(key_of(1000)) == payload_of(1000)

    def test_a_hung_disk_costs_its_timeout(self, tmp_path: Path) -> None:
        store = open_store(tmp_path / "s", max_bytes=8 * MIB, timeout_s=0.2)
        fill(store, 0, 3)
        native = native_of(store)
        native.inject("hang_read", 1)
        start = time.monotonic()
        assert store.get(key_of(1)) is None
        assert time.monotonic() - start < 3
        assert store.put(key_of(50), payload_of(50)) is StoreResult.OK  # other threads work on
        start = time.monotonic()
        store.close(timeout_s=0.3)
        assert time.monotonic() - start < 5
        # What hangs keeps its directory locked: nobody else may write where it still could.
        other = small(tmp_path / "s")
        assert other.writer_dir.endswith("w1")
        other.close()
        native.inject("hang_read", 0)
        del native, store
        deadline = time.monotonic() + 10
        while time.monotonic() < deadline:
            with small(tmp_path / "s") as again:
                if again.writer_dir.endswith("w0"):
                    break
            time.sleep(0.05)
        else:
            pytest.fail("the lock was not given up when the disk came back")


def flip(path: Path, rng: random.Random) -> None:
    size = path.stat().st_size
    if not size:
        return
    with path.open("r+b") as file:
        for _ in range(rng.randint(1, 20)):
            edge = rng.choice([size, min(size, 4096), min(size, 256)])
            at = rng.choice([rng.randrange(edge), size - 1 - rng.randrange(edge)])
            file.seek(at)
            byte = file.read(1)[0]
            file.seek(at)
            file.write(bytes([byte ^ (1 << rng.randrange(8))]))


def cut(path: Path, rng: random.Random) -> None:
    os.truncate(path, rng.randrange(path.stat().st_size + 1))


def zero(path: Path, rng: random.Random) -> None:
    size = path.stat().st_size
    at = rng.randrange(size // 4096 + 1) * 4096
    with path.open("r+b") as file:
        file.seek(at)
        file.write(bytes(min(4096, max(size - at, 0))))


def swap_tail(path: Path, rng: random.Random) -> None:
    """A page of the file shows up at another place of it."""
    size = path.stat().st_size
    if size < 8192:
        return
    source, target = (rng.randrange(size // 4096) * 4096 for _ in range(2))
    with path.open("r+b") as file:
        file.seek(source)
        page = file.read(4096)
        file.seek(target)
        file.write(page)


@pytest.fixture(scope="module")
def master(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A closed store to copy and damage: sealed segments, an open one with its journal."""
    path = tmp_path_factory.mktemp("master") / "s"
    with small(path, max_bytes=3 * MIB) as store:
        fill(store, 0, 60)
        store.delete(*(key_of(i) for i in range(5)))
    assert len(list((path / "w0").glob("seg-*.kv"))) > 1
    return path


class TestDamagedFiles:
    @pytest.mark.parametrize("damage", [flip, cut, zero, swap_tail])
    def test_never_wrong_never_down(
        self, master: Path, tmp_path: Path, damage: Callable[[Path, random.Random], None]
    ) -> None:
        rng = random.Random(damage.__name__)
        hits = 0
        for round_ in range(12):
            path = tmp_path / f"s{round_}"
            shutil.copytree(master, path)
            names = ["*.kv", "journal-*"]
            files = [f for name in names for f in path.rglob(name)]
            for file in rng.sample(files, rng.randint(1, 2)):
                damage(file, rng)
            with small(path, max_bytes=3 * MIB) as store:
                store.check()
                assert right_or_miss(store, range(5)) in range(6)
                hits += right_or_miss(store, range(5, 60))
                assert set(fill(store, 100, 110)) == {StoreResult.OK}
                assert right_or_miss(store, range(100, 110)) == 10
                store.verify(repair=True)
                assert store.verify().bad == 0
                store.check()
        assert hits > 12 * 20

    def test_manifest(self, master: Path, tmp_path: Path) -> None:
        rng = random.Random(4)
        for damage in (flip, cut):
            path = tmp_path / damage.__name__
            shutil.copytree(master, path)
            damage(path / "MANIFEST", rng)
            before = sorted((p.name, p.stat().st_size) for p in path.rglob("*"))
            with pytest.raises(StoreError, match=r"MANIFEST|format"):
                small(path)
            assert sorted((p.name, p.stat().st_size) for p in path.rglob("*")) == before

    def test_segments_of_another_store(self, master: Path, tmp_path: Path) -> None:
        with small(tmp_path / "s") as store:
            fill(store, 200, 230)
        for file in (master / "w0").iterdir():
            shutil.copy(file, tmp_path / "s" / "w0" / file.name)
        with small(tmp_path / "s") as store:
            assert right_or_miss(store, range(60)) == 0
            assert set(fill(store, 0, 60)) == {StoreResult.OK}
            store.check()

    def test_a_segment_under_another_name(self, master: Path, tmp_path: Path) -> None:
        path = tmp_path / "s"
        shutil.copytree(master, path)
        segments = sorted((path / "w0").glob("seg-*.kv"))
        shutil.copy(segments[0], segments[1])
        with small(path, max_bytes=3 * MIB) as store:
            right_or_miss(store, range(60))
            store.check()

    def test_damage_under_an_open_store(self, tmp_path: Path) -> None:
        with small(tmp_path / "s") as store:
            fill(store, 0, 60)
            for segment in (tmp_path / "s").rglob("seg-*.kv"):
                os.truncate(segment, segment.stat().st_size // 2)
            hits = right_or_miss(store, range(60))
            assert hits < 60 and store.stats()["io_errors"] > 0
            assert right_or_miss(store, range(60)) == hits  # the rest was dropped, not retried
            fill(store, 100, 130)
            right_or_miss(store, range(130))
            store.check()


class TestLostDirectory:
    def test_removed_under_an_open_store(self, tmp_path: Path) -> None:
        with small(tmp_path / "s", max_bytes=3 * MIB) as store:
            fill(store, 0, 20)
            while (tmp_path / "s").exists():  # a seal may take a journal away under rmtree
                shutil.rmtree(tmp_path / "s", ignore_errors=True)
            for i in range(100, 400, 20):
                assert set(fill(store, i, i + 20)) <= set(StoreResult)
                right_or_miss(store, range(i, i + 20))
            assert store.stats()["io_errors"] > 0
            assert StoreResult.OK not in fill(store, 500, 560)
            store.flush(0.5)
            store.check()


class TestFullDisk:
    def test_smaller_than_the_bound(self, tiny_disk: Path) -> None:  # noqa: F811
        with small(tiny_disk / "s", max_bytes=64 * MIB) as store:
            for i in range(0, 600, 10):
                assert set(fill(store, i, i + 10)) == {
                    StoreResult.OK
                }  # recycles instead of growing
            assert store.stats()["recycled_segments"] > 5
            assert right_or_miss(store, range(590, 600)) == 10
            store.check()
        with small(tiny_disk / "s", max_bytes=64 * MIB) as store:
            assert right_or_miss(store, range(590, 600)) == 10

    def test_filled_by_somebody_else(self, tiny_disk: Path) -> None:  # noqa: F811
        with small(tiny_disk / "s", max_bytes=64 * MIB) as store:
            with (tiny_disk / "hog").open("wb") as hog, pytest.raises(OSError):
                while True:
                    hog.write(bytes(1 << 16))
                    hog.flush()
            assert set(fill(store, 0, 5)) == {StoreResult.NO_SPACE}
            assert store.stats()["no_space"] == 5
            store.check()
            (tiny_disk / "hog").unlink()
            assert set(fill(store, 0, 5)) == {StoreResult.OK}
            assert right_or_miss(store, range(5)) == 5

    def test_no_room_to_open(self, tiny_disk: Path) -> None:  # noqa: F811
        with (tiny_disk / "hog").open("wb", buffering=0) as hog, pytest.raises(OSError):
            while True:
                hog.write(bytes(4096))
        with pytest.raises(StoreError, match=str(tiny_disk)):
            small(tiny_disk / "s")


@pytest.fixture
def own_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A disk below the process that can be throttled to nothing; this process is in its group."""
    monkeypatch.syspath_prepend(str(Path(__file__).resolve().parents[2] / "benchmarks"))
    common, loopdisk = importlib.import_module("common"), importlib.import_module("loopdisk")
    with contextlib.ExitStack() as stack:
        try:
            disk = stack.enter_context(loopdisk.loop_disk(tmp_path, 128 * MIB))
        except common.Skip as reason:
            pytest.skip(str(reason))
        disk.join([os.getpid()])
        stack.callback(disk.limit, 0)
        yield disk


class TestBelowTheProcess:
    """Real I/O that does not come back: the kernel holds it, nothing of ours does."""

    def test_a_disk_that_hangs_and_comes_back(self, own_disk: Any) -> None:
        store = small(own_disk.path / "s")
        fill(store, 0, 8)
        assert store.flush() and right_or_miss(store, range(8)) == 8
        native = native_of(store)
        own_disk.limit(1)
        buffers = [bytearray(len(payload_of(i))) for i in range(4)]
        native.get(10**6, b"".join(map(key_of, range(4))), buffers)
        native.put(10**6 + 1, key_of(20), [payload_of(20)])
        began = time.monotonic()
        assert not native.wait(10**6, 300) and not native.wait(10**6 + 1, 300)
        assert not store.flush(0.2)
        assert time.monotonic() - began < 3 and not native.poll()
        assert key_of(1) in store  # membership never waits for the disk
        store.check()
        own_disk.limit(0)
        assert native.wait(10**6, 5000) and native.wait(10**6 + 1, 5000)
        done = {d.job: d.results for d in native.poll()}
        assert done == {10**6: bytes(4), 10**6 + 1: bytes(1)}
        assert [bytes(b) for b in buffers] == [payload_of(i) for i in range(4)]
        assert right_or_miss(store, range(8)) == 8 and store.get(key_of(20)) == payload_of(20)
        store.check()
        store.close()

    def test_a_store_on_a_hung_disk_can_be_closed(self, own_disk: Any) -> None:
        store = small(own_disk.path / "s")
        fill(store, 0, 8)
        assert store.flush()
        own_disk.limit(1)
        buffer = bytearray(len(payload_of(0)))
        native_of(store).get(10**6, key_of(0), [buffer])
        began = time.monotonic()
        store.close(timeout_s=0.3)
        assert time.monotonic() - began < 5
        own_disk.limit(0)
        with small(own_disk.path / "s") as again:
            assert right_or_miss(again, range(8)) == 8
