"""The chunk store through its Python surface, the native contract, and the command line."""

from __future__ import annotations

import hashlib
import json
import os
import stat
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from kvoffload._core import Arena, SegmentStore, checksum
from kvoffload.cli.store import app
from kvoffload.errors import ClosedError, StoreError
from kvoffload.store import Store, open_store
from kvoffload.types import SlotState, StoreResult
from tests.support.store_engines import io_engine  # noqa: F401  (every test runs on both engines)

MIB = 1 << 20


def key_of(i: int) -> bytes:
    return hashlib.sha256(b"key %d" % i).digest()[:16]


def payload_of(i: int, nbytes: int | None = None) -> bytes:
    rng = np.random.default_rng(i)
    return rng.bytes(nbytes or int(rng.integers(1, 60_000)))


def disk_bytes(path: Path) -> int:
    """Everything under the path, as `du` counts it or as files say, whichever is more."""
    total = 0
    for entry in [path, *path.rglob("*")]:
        try:
            info = entry.lstat()
        except FileNotFoundError:  # a journal whose segment was sealed just now
            continue
        total += max(info.st_size, info.st_blocks * 512)
    return total


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "store"


def small(path: Path, **kw: Any) -> Store:
    return open_store(path, **{"max_bytes": 8 * MIB, "segment_bytes": 512 << 10} | kw)


class TestPayloads:
    def test_round_trip_of_every_size(self, path: Path) -> None:
        sizes = [1, 15, 4095, 4096, 4097, 16383, 16384, 16385, 262144, 500_000]
        want = {key_of(n): payload_of(n, n) for n in sizes}
        with small(path) as store:
            assert set(store.put_many(want.items())) == {StoreResult.OK}
            assert {k: store.get(k) for k in want} == want
            assert store.get_many(list(want)) == list(want.values())
            assert [store.length(k) for k in want] == sizes
            assert len(store) == len(sizes) and store.stats()["payload_bytes"] == sum(sizes)
            store.check()

    def test_bytes_like_and_get_into(self, path: Path) -> None:
        with small(path) as store:
            store.put(key_of(1), np.arange(5000, dtype=np.uint32))
            store.put(key_of(2), bytearray(b"abc"))
            out = np.zeros(5000, dtype=np.uint32)
            assert store.get_into(key_of(1), out) is StoreResult.OK
            assert (out == np.arange(5000)).all()
            wrong = bytearray(4)
            assert store.get_into(key_of(2), wrong) is StoreResult.MISS
            assert wrong == bytes(4)

    def test_longest_prefix(self, path: Path) -> None:
        keys = [key_of(i) for i in range(100)]
        with small(path) as store:
            assert store.longest_prefix(keys) == store.longest_prefix([]) == 0
            store.put_many((k, b"x") for k in keys)
            assert store.longest_prefix(keys) == 100
            for gone in (70, 36, 35, 4, 3, 0):
                store.delete(keys[gone])
                assert store.longest_prefix(keys) == gone
            store.check()
            with pytest.raises(ValueError, match="16 bytes"):
                store.longest_prefix([keys[1], b"short"])
        with pytest.raises(ClosedError):
            store.longest_prefix(keys)

    def test_misses_and_what_is_no_key(self, path: Path) -> None:
        with small(path) as store:
            assert store.get(key_of(9)) is None
            assert store.length(key_of(9)) is None
            assert store.get_many([]) == [] and store.put_many([]) == []
            for bad in (b"", b"short", bytes(17)):
                with pytest.raises(ValueError, match="16 bytes"):
                    store.get(bad)
            with pytest.raises(ValueError, match="payload"):
                store.put(key_of(1), b"")

    def test_a_held_key_is_not_written_again(self, path: Path) -> None:
        with small(path) as store:
            store.put(key_of(1), payload_of(1))
            before = store.stats()["bytes_written"]
            assert store.put(key_of(1), payload_of(1)) is StoreResult.OK
            assert store.put_many([(key_of(2), b"x" * 9000)] * 3) == [StoreResult.OK] * 3
            assert store.stats()["bytes_written"] == before + 12288
            assert store.get(key_of(2)) == b"x" * 9000

    def test_too_long_for_a_segment(self, path: Path) -> None:
        with small(path) as store:
            most = (512 << 10) - 4096 * 3
            assert store.put(key_of(1), bytes(most + 1)) is StoreResult.NO_SPACE
            assert store.put(key_of(2), bytes(most)) is StoreResult.OK
            assert store.get(key_of(2)) == bytes(most)

    def test_delete_survives_reopen(self, path: Path) -> None:
        with small(path) as store:
            store.put_many((key_of(i), payload_of(i)) for i in range(10))
            assert store.delete(key_of(3), key_of(4), key_of(99)) == 2
            assert key_of(3) not in store and store.get(key_of(4)) is None
            store.put(key_of(4), payload_of(4))
        with small(path) as store:
            assert key_of(3) not in store
            assert store.get(key_of(4)) == payload_of(4)
            assert len(store) == 9

    def test_closed_and_read_only(self, path: Path) -> None:
        with pytest.raises(StoreError, match="cannot be opened"):
            open_store(path, read_only=True)
        assert not path.exists()
        store = small(path)
        store.put(key_of(1), b"one")
        assert store.flush()
        reader = open_store(path, read_only=True)
        assert reader.get(key_of(1)) == b"one" and reader.writer_dir == ""
        with pytest.raises(StoreError, match="read only"):
            reader.put(key_of(2), b"two")
        with pytest.raises(StoreError, match="read only"):
            reader.delete(key_of(1))
        reader.close()
        store.close()
        store.close()
        with pytest.raises(ClosedError):
            store.get(key_of(1))

    def test_ls_newest_first(self, path: Path) -> None:
        with small(path) as store:
            for i in range(5):
                store.put(key_of(i), payload_of(i), namespace=0x1_0000_0007)
            rows = store.ls()
            assert [r.key for r in rows] == [key_of(i) for i in reversed(range(5))]
            assert rows[0].namespace == 7 and rows[0].nbytes == len(payload_of(4))
            assert [r.key for r in store.ls(2)] == [key_of(4), key_of(3)]

    def test_works_without_torch_and_vllm(self, path: Path) -> None:
        code = (
            "import sys; sys.modules['torch'] = sys.modules['vllm'] = None\n"
            "from kvoffload.store import open_store\n"
            f"with open_store({str(path)!r}, max_bytes=1 << 23) as s: s.put(bytes(16), b'x')\n"
            f"with open_store({str(path)!r}, direct=False) as s: assert s.get(bytes(16)) == b'x'\n"
        )
        env = os.environ | {"PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
        subprocess.run([sys.executable, "-c", code], check=True, timeout=60, env=env)


class TestBound:
    def test_everything_stays_below_max_bytes(self, path: Path) -> None:
        bound = 4 * MIB
        with small(path, max_bytes=bound) as store:
            for i in range(0, 400, 10):
                assert set(
                    store.put_many((key_of(j), payload_of(j)) for j in range(i, i + 10))
                ) == {StoreResult.OK}
                assert disk_bytes(path) <= bound
            assert store.stats()["recycled_segments"] > 10
            assert store.get(key_of(399)) == payload_of(399)
            assert store.get(key_of(0)) is None
            held = [i for i in range(400) if key_of(i) in store]
            assert held == list(range(held[0], 400))  # first in, first out
            assert sum(len(payload_of(i)) for i in held) > bound // 2
            store.check()
        assert disk_bytes(path) <= bound

    def test_shrunk_and_grown_between_opens(self, path: Path) -> None:
        with small(path) as store:
            store.put_many((key_of(i), payload_of(i, 50_000)) for i in range(120))
        with small(path, max_bytes=3 * MIB) as store:
            assert disk_bytes(path) <= 3 * MIB
            held = [i for i in range(120) if key_of(i) in store]
            assert held and held == list(range(held[0], 120))
            assert store.get(key_of(119)) == payload_of(119, 50_000)
            store.put_many((key_of(i), payload_of(i, 50_000)) for i in range(200, 260))
            assert disk_bytes(path) <= 3 * MIB
        with small(path, max_bytes=16 * MIB, segment_bytes=1 << 20) as store:
            store.put_many((key_of(i), payload_of(i, 50_000)) for i in range(300, 400))
            assert all(key_of(i) in store for i in range(300, 400))
            assert key_of(259) in store
            store.check()

    def test_no_max_bytes_means_as_created(self, path: Path) -> None:
        small(path).close()
        with open_store(path) as store:
            assert store.stats()["bytes_max"] == 8 * MIB

    @pytest.mark.parametrize("drives", [1, 2])
    def test_no_max_bytes_removes_nothing(self, path: Path, drives: int) -> None:
        """The MANIFEST has the bound of the creation; others were given more since."""
        paths = [path / str(i) for i in range(drives)] if drives > 1 else [path]
        size = {"segment_bytes": 512 << 10, "timeout_s": 20.0}
        open_store(paths, max_bytes=4 * MIB * drives, **size).close()
        with open_store(paths, max_bytes=16 * MIB * drives, **size) as store:
            for i in range(150 * drives):
                store.put(key_of(i), payload_of(i, 50_000))
        used = [disk_bytes(p) for p in paths]
        assert min(used) > 7 * MIB
        for _ in range(3):  # it does not grow by being opened
            with open_store(paths) as store:
                assert all(key_of(i) in store for i in range(150 * drives))
                levels = store.drives()
                for level, was in zip(levels, used, strict=True):
                    assert 7 * MIB < level.bytes_used <= level.bytes_max <= was + MIB
        assert all(disk_bytes(p) <= was for p, was in zip(paths, used, strict=True))
        with open_store(paths, **size) as store:  # for what is put later the oldest go
            most = [level.bytes_max for level in store.drives()]
            for i in range(1000, 1000 + 40 * drives):
                assert store.put(key_of(i), payload_of(i, 50_000)) is StoreResult.OK
            assert [level.bytes_max for level in store.drives()] == most
            held = sum(key_of(i) in store for i in range(150 * drives))
            assert 95 * drives < held < 150 * drives
            store.check()
        assert all(disk_bytes(p) <= m for p, m in zip(paths, most, strict=True))

    def test_no_max_bytes_beside_one_that_grows(self, path: Path) -> None:
        """An engine with a larger bound fills the path while a script puts: nothing of dead
        writers goes for what the engine takes."""
        bound = {"max_bytes": 24 * MIB}
        small(path, max_bytes=4 * MIB).close()
        with small(path, **bound) as engine:
            with small(path, **bound) as one, small(path, **bound) as dead:
                assert dead.writer_dir.endswith("w2")
                one.put(key_of(1), payload_of(1))
                for i in range(100, 180):
                    dead.put(key_of(i), payload_of(i, 50_000))
            with open_store(path, segment_bytes=512 << 10) as script:
                assert script.writer_dir.endswith("w1")
                before = script.stats()["bytes_max"]
                assert all(key_of(i) in script for i in range(100, 180))
                for i in range(200, 320):
                    engine.put(key_of(i), payload_of(i, 50_000))
                for i in range(400, 420):
                    script.put(key_of(i), payload_of(i, 50_000))
                assert script.stats()["bytes_max"] > before + 4 * MIB
                script.check()
        with open_store(path, read_only=True) as reader:  # three segments of its own, one ahead
            assert sum(key_of(i) in reader for i in range(100, 180)) >= 80 - 4 * 10
            assert all(key_of(i) in reader for i in range(200, 320))

    def test_many_short_lives_do_not_waste_segments(self, path: Path) -> None:
        for i in range(30):
            with small(path, max_bytes=4 * MIB) as store:
                store.put(key_of(i), payload_of(i, 20_000))
        with small(path, max_bytes=4 * MIB) as store:
            assert len(store) == 30
            assert disk_bytes(path) < 3 * MIB

    def test_bound_too_small(self, path: Path) -> None:
        with pytest.raises(StoreError, match="does not hold one segment"):
            open_store(path, max_bytes=100_000)
        with pytest.raises(ValueError, match="segment_bytes"):
            open_store(path, max_bytes=8 * MIB, segment_bytes=100_000)
        assert not list(path.glob("*"))

    def test_the_default_follows_the_bound(self, tmp_path: Path) -> None:
        for bound in (256 << 10, 1 * MIB, 20 * MIB, 100 * MIB):
            with open_store(tmp_path / str(bound), max_bytes=bound) as store:
                assert 3 * store.stats()["segment_bytes"] < bound
                assert store.put(key_of(1), b"x") is StoreResult.OK
                assert disk_bytes(tmp_path / str(bound)) <= bound


class TestDirectory:
    def test_modes_under_any_umask(self, path: Path) -> None:
        old = os.umask(0)
        try:
            with small(path) as store:
                store.put(key_of(1), b"x")
        finally:
            os.umask(old)
        for entry in [path, *path.rglob("*")]:
            want = 0o700 if entry.is_dir() else 0o600
            assert stat.S_IMODE(entry.lstat().st_mode) == want, entry

    @pytest.mark.parametrize("mode", [0o755, 0o770, 0o777])
    def test_mode_refused(self, path: Path, mode: int) -> None:
        small(path).close()
        path.chmod(mode)
        with pytest.raises(StoreError, match=f"mode is 0{mode:o}.*chmod 700"):
            small(path)
        path.chmod(0o700)
        (path / "MANIFEST").chmod(0o644)
        with pytest.raises(StoreError, match="MANIFEST: mode is 0644"):
            small(path)

    def test_symlink_foreign_directory_and_file_refused(self, tmp_path: Path) -> None:
        real = tmp_path / "real"
        small(real).close()
        link = tmp_path / "link"
        link.symlink_to(real)
        for shown in (link, f"{link}/"):
            with pytest.raises(StoreError, match="symbolic link"):
                small(Path(shown) if shown is link else shown)  # type: ignore[arg-type]
        other = tmp_path / "other"
        other.mkdir(mode=0o700)
        (other / "photos.tar").write_bytes(b"precious")
        with pytest.raises(StoreError, match="not a kvoffload chunk store"):
            small(other)
        assert [p.name for p in other.iterdir()] == ["photos.tar"]
        with pytest.raises(StoreError, match="not a directory"):
            small(other / "photos.tar")

    @pytest.mark.skipif(os.geteuid() != 0, reason="giving files away needs root")
    def test_other_owner_refused(self, path: Path) -> None:
        small(path).close()
        os.chown(path, 12345, 12345)
        with pytest.raises(StoreError, match="owned by uid 12345"):
            small(path)

    def test_manifest_newer_foreign_damaged(self, path: Path) -> None:
        small(path).close()
        manifest = path / "MANIFEST"
        good = manifest.read_text()
        before = {p: p.stat().st_mtime_ns for p in path.rglob("*")}
        for text, message in (
            (good.replace("format 1", "format 2"), "format 2 is newer"),
            ("something else\n", "not kvoffload's"),
            (good.replace("segment_bytes 5", "segment_bytes 6"), "damaged"),
            (good[:-3], "damaged"),
            (good + "more\n", "damaged"),
            ("", "not kvoffload's"),
        ):
            manifest.write_text(text)
            with pytest.raises(StoreError, match=message) as caught:
                small(path)
            assert str(path) in str(caught.value) and "\n" not in str(caught.value)
        del before[manifest]
        assert {p: p.stat().st_mtime_ns for p in before} == before
        manifest.write_text(good)
        small(path).close()

    def test_a_writer_directory_that_is_a_link_is_left_alone(
        self, path: Path, tmp_path: Path
    ) -> None:
        small(path).close()
        elsewhere = tmp_path / "elsewhere"
        (path / "w0").rename(elsewhere)
        (path / "w0").symlink_to(elsewhere)
        with small(path) as store:
            assert store.writer_dir.endswith("/w1")
        (path / "w2").mkdir()
        (path / "w2").chmod(0o755)
        with small(path) as a, small(path) as b:
            assert (a.writer_dir[-2:], b.writer_dir[-2:]) == ("w1", "w3")

    def test_segment_names_that_are_not_segments(self, path: Path, tmp_path: Path) -> None:
        with small(path) as store:
            store.put(key_of(1), b"one")
        target = tmp_path / "target"
        target.write_bytes(b"precious")
        w0 = path / "w0"
        (w0 / "seg-00007.kv").symlink_to(target)
        os.mkfifo(w0 / "seg-00008.kv", 0o600)
        (w0 / "seg-00009.kv").mkdir()
        (w0 / "seg-00010.kv").write_bytes(b"")
        (w0 / "notes.txt").write_text("mine")
        with small(path, max_bytes=4 * MIB) as store:
            assert store.get(key_of(1)) == b"one"
            for i in range(100, 300):
                assert store.put(key_of(i), payload_of(i)) is StoreResult.OK
            store.check()
        assert target.read_bytes() == b"precious"
        assert (w0 / "notes.txt").read_text() == "mine"


def slots_of(arena: Arena, n: int, nbytes: int) -> dict[str, Any]:
    slots = np.arange(n, dtype=np.uint32)
    return {
        "slots": slots,
        "generations": np.array([arena.begin_fill(int(s), 1) for s in slots], dtype=np.uint64),
        "offsets": np.arange(n, dtype=np.uint64)[::-1].copy() * np.uint64(nbytes),
        "nbytes": nbytes,
    }


class TestSlots:
    def test_put_and_get_slots(self, path: Path) -> None:
        nbytes, n = 64 << 10, 8
        arena = Arena.create(2 * MIB, n, 1, False)
        store = SegmentStore(str(path), 8 * MIB)
        keys = [key_of(i) for i in range(n)]
        want = [payload_of(i, nbytes) for i in range(n)]
        # The leaf hashes in the arena are what a worker's copy would have left there.
        store.put(1, b"".join(keys), want)
        assert store.wait(1, 5000) and store.poll()[0].results == bytes(n)
        args = slots_of(arena, n, nbytes)
        store.get_slots(2, arena, b"".join(keys), **args)
        assert store.wait(2, 5000)
        (done,) = store.poll()
        assert (done.job, done.kind, done.results, done.nbytes) == (2, 1, bytes(n), n * nbytes)
        for i in range(n):
            assert arena.state(i) == SlotState.READY
            assert bytes(arena.view(int(args["offsets"][i]), nbytes)) == want[i]
        store.delete(b"".join(keys))
        store.put_slots(
            3, arena, b"".join(keys), namespace=5, depths=np.arange(n, dtype=np.uint32), **args
        )
        assert store.wait(3, 5000) and store.poll()[0].results == bytes(n)
        assert sorted(row[2] for row in store.ls()) == list(range(n))
        assert store.verify()["bad"] == 0
        store.check()
        store.close()

    def test_stale_leaf_hashes_show_at_read(self, path: Path) -> None:
        arena = Arena.create(2 * MIB, 4, 1, False)
        store = SegmentStore(str(path), 8 * MIB)
        args = slots_of(arena, 1, 64 << 10)
        arena.view(0, 64 << 10)[:] = payload_of(1, 64 << 10)  # without writing the leaf hashes
        arena.fill_done(0, int(args["generations"][0]))
        store.put_slots(
            1, arena, key_of(1), namespace=0, depths=np.zeros(1, dtype=np.uint32), **args
        )
        assert store.wait(1, 5000) and store.poll()[0].results == b"\x00"
        args = slots_of(arena, 1, 64 << 10)
        store.get_slots(2, arena, key_of(1), **args)
        assert store.wait(2, 5000) and store.poll()[0].results == bytes([StoreResult.CORRUPT])
        assert arena.state(0) == SlotState.FAILED
        assert store.contains(key_of(1)) == b"\x00" and store.stats()["corrupt"] == 1
        store.close()

    def test_arguments_are_checked(self, path: Path) -> None:
        arena = Arena.create(2 * MIB, 4, 1, False)
        store = SegmentStore(str(path), 8 * MIB)
        good = slots_of(arena, 1, 64 << 10)
        for change in (
            {"slots": np.array([4], dtype=np.uint32)},
            {"slots": np.array([0, 1], dtype=np.uint32)},
            {"offsets": np.array([2 * MIB], dtype=np.uint64)},
            {"offsets": np.array([4096], dtype=np.uint64)},
            {"nbytes": 1000},
            {"nbytes": 0},
        ):
            with pytest.raises(ValueError):
                store.get_slots(1, arena, key_of(1), **(good | change))
        with pytest.raises(ValueError):
            store.get_slots(1, arena, b"short", **good)
        with pytest.raises(ValueError):
            store.inject("nonsense", 1)
        store.inject("slow_read_ms", 200)
        store.put(7, key_of(1), [b"x"])
        store.get(8, key_of(1), [bytearray(1)])
        with pytest.raises(ValueError, match="in use"):
            store.get(8, key_of(1), [bytearray(1)])
        store.close()

    def test_checksum_is_the_documented_one(self, path: Path) -> None:
        """A record read straight from the journal has the root that _core.checksum gives."""
        with small(path) as store:
            store.put(key_of(1), payload_of(1, 40_000))
        (journal,) = (path / "w0").glob("journal-*")
        record = journal.read_bytes()[:64]
        assert record[:3] == b"KR\x01" and record[16:32] == key_of(1)
        assert int.from_bytes(record[44:48], "little") == 40_000
        want = checksum(payload_of(1, 40_000), key_of(1))
        assert int.from_bytes(record[48:56], "little") == want
        offset = int.from_bytes(record[40:44], "little") * 4096
        (segment,) = (path / "w0").glob("seg-*.kv")
        assert segment.read_bytes()[offset : offset + 40_000] == payload_of(1, 40_000)


class TestOrder:
    def test_queue_bound_drops(self, path: Path) -> None:
        store = SegmentStore(str(path), 64 * MIB, queue_bytes=1 * MIB, threads=1)
        keys = [key_of(i) for i in range(8)]
        store.put(1, b"".join(keys), [payload_of(i, 400_000) for i in range(8)])
        assert store.wait(1, 10_000)
        results = store.poll()[0].results
        assert results[:2] == b"\x00\x00"
        assert set(results[2:]) == {StoreResult.DROPPED}
        assert store.queued_bytes() == 0 and store.stats()["dropped"] == 6
        store.close()

    def test_gets_go_before_puts(self, path: Path) -> None:
        store = SegmentStore(str(path), 512 * MIB, threads=1)
        store.put(1, key_of(0), [payload_of(0, MIB)])
        assert store.wait(1, 10_000)
        one = payload_of(1, MIB)
        store.put(3, b"".join(key_of(i) for i in range(1, 201)), [one] * 200)
        store.get(4, key_of(0), [bytearray(MIB)])
        assert store.wait(4, 20_000) and not store.wait(3, 0)
        assert store.wait(3, 20_000)
        store.close()

    def test_flush_means_journalled(self, path: Path) -> None:
        store = SegmentStore(str(path), 8 * MIB)
        for i in range(5):
            store.put(i, key_of(i), [payload_of(i)])
        assert store.flush(5000)
        store._abandon()
        store = SegmentStore(str(path), 8 * MIB)
        assert store.contains(b"".join(key_of(i) for i in range(5))) == b"\x01" * 5
        store.close()


class TestWriters:
    def test_two_openers_share_and_the_dead_are_adopted(self, path: Path) -> None:
        a, b = small(path), small(path)
        assert (a.writer_dir[-2:], b.writer_dir[-2:]) == ("w0", "w1")
        a.put(key_of(1), b"from a")
        a.flush()
        assert key_of(1) not in b
        deadline = time.monotonic() + 5
        while key_of(1) not in b and time.monotonic() < deadline:
            time.sleep(0.02)
        assert b.get(key_of(1)) == b"from a"
        b.put(key_of(2), b"from b")
        a.close()
        c = small(path)
        assert c.writer_dir.endswith("w0")
        b.close()
        assert c.get(key_of(2)) == b"from b" or key_of(2) not in c
        d = small(path)
        assert d.writer_dir.endswith("w1")
        assert d.get(key_of(1)) == b"from a" and d.get(key_of(2)) == b"from b"
        d.delete(key_of(1))
        for store in (c, d):
            store.close()
        with small(path) as store:
            assert key_of(1) not in store

    def test_both_under_one_bound(self, path: Path) -> None:
        bound = 4 * MIB
        with small(path, max_bytes=bound) as a, small(path, max_bytes=bound) as b:
            for i in range(0, 200, 5):
                for store, base in ((a, 0), (b, 1000)):
                    store.put_many((key_of(base + j), payload_of(j)) for j in range(i, i + 5))
                assert disk_bytes(path) <= bound
            for store, base in ((a, 0), (b, 1000)):
                store.check()
                assert store.get(key_of(base + 199)) in (payload_of(199), None)
            assert b.stats()["io_errors"] == a.stats()["io_errors"] == 0
            assert a.get(key_of(199)) == payload_of(199)

    def test_without_a_segment_of_ones_own(self, path: Path) -> None:
        """The path is full of a live writer's segments: puts are refused, reads work."""
        bound = 3 * MIB
        with small(path, max_bytes=bound) as a:
            a.put_many((key_of(i), payload_of(i, 100_000)) for i in range(40))
            assert a.flush()
            with small(path, max_bytes=bound) as b:
                assert b.put(key_of(100), b"x") is StoreResult.NO_SPACE
                assert b.stats()["no_space"] == 1
                got = {i: b.get(key_of(i)) for i in range(40)}
                # Now: its writer may just have taken the oldest segment for its next one.
                held = [i for i in range(40) if key_of(i) in a]
                assert [got[i] for i in held] == [payload_of(i, 100_000) for i in held]
            assert disk_bytes(path) <= bound

    def test_room_is_taken_from_the_dead(self, path: Path) -> None:
        bound = 3 * MIB
        keeper = small(path, max_bytes=bound)
        with small(path, max_bytes=bound) as b:
            b.put_many((key_of(i), payload_of(i, 100_000)) for i in range(40))
        assert keeper.put(key_of(100), payload_of(100)) is StoreResult.OK
        for i in range(101, 200):
            assert keeper.put(key_of(i), payload_of(i)) is StoreResult.OK
        assert keeper.get(key_of(199)) == payload_of(199)
        assert disk_bytes(path) <= bound
        keeper.check()
        keeper.close()

    def test_a_read_under_a_recycle_is_a_miss(self, path: Path) -> None:
        with small(path, max_bytes=3 * MIB) as a:
            a.put_many((key_of(i), payload_of(i)) for i in range(20))
            a.flush()
            reader = open_store(path, read_only=True)
            assert reader.get(key_of(0)) == payload_of(0)
            for i in range(100, 400):
                a.put(key_of(i), payload_of(i))
            assert [reader.get(key_of(i)) for i in range(20)] == [None] * 20
            assert reader.stats()["corrupt"] == 0
            reader.close()


class TestCli:
    def run(self, *args: str) -> Any:
        return CliRunner().invoke(app, list(args))

    def test_stats_ls_verify(self, path: Path) -> None:
        with small(path) as store:
            for i in range(6):  # one by one: put together they may be published in any order
                store.put(key_of(i), payload_of(i))
            out = self.run("stats", str(path), "--json")  # while the writer lives
            assert out.exit_code == 0 and json.loads(out.stdout)["entries"] in range(7)
        out = self.run("stats", str(path), "--json")
        assert json.loads(out.stdout)["entries"] == 6
        assert "entries" in self.run("stats", str(path)).stdout
        out = json.loads(self.run("ls", str(path), "--limit", "2", "--json").stdout)
        assert out["entries"] == 6
        assert [c["key"] for c in out["chunks"]] == [key_of(5).hex(), key_of(4).hex()]
        assert key_of(5).hex()[:16] in self.run("ls", str(path)).stdout
        out = self.run("verify", str(path), "--json")
        assert out.exit_code == 0
        assert json.loads(out.stdout)["checked"] == 6

    def test_verify_finds_and_repairs(self, path: Path) -> None:
        with small(path) as store:
            store.put_many((key_of(i), payload_of(i)) for i in range(6))
        (segment,) = (path / "w0").glob("seg-*.kv")
        with segment.open("r+b") as file:
            file.seek(4096)
            byte = file.read(1)
            file.seek(4096)
            file.write(bytes([byte[0] ^ 1]))
        out = self.run("verify", str(path), "--json")
        assert out.exit_code == 1 and json.loads(out.stdout)["bad"] == 1
        out = self.run("verify", str(path), "--repair", "--json")
        assert out.exit_code == 0 and json.loads(out.stdout)["dropped"] == 1
        out = self.run("verify", str(path))
        assert out.exit_code == 0 and "5 chunks" in out.stdout

    @pytest.mark.parametrize("engine_runs", [False, True])
    def test_what_writes_removes_nothing(
        self, path: Path, tmp_path: Path, engine_runs: bool
    ) -> None:
        """nvme_gib was raised since the store was created."""
        small(path, max_bytes=4 * MIB).close()
        with small(path, max_bytes=16 * MIB) as engine:
            with small(path, max_bytes=16 * MIB) as other:
                for store, base in ((engine, 0), (other, 1000)):
                    for i in range(base, base + 70):
                        store.put(key_of(i), payload_of(i, 50_000))
                assert other.flush() and engine.flush()
            if not engine_runs:
                engine.close()
            keys = [key_of(i) for base in (0, 1000) for i in range(base, base + 70)]
            with open_store(path, read_only=True) as store:
                assert store.export(tmp_path / "f", keys=keys[:5]).missing == 0
            for command in (["verify", path, "--repair"], ["import", path, tmp_path / "f"]):
                out = self.run(*map(str, command))
                assert out.exit_code == 0, out.output
                with open_store(path, read_only=True) as store:
                    assert all(key in store for key in keys), command[0]

    def test_errors_are_one_line(self, tmp_path: Path) -> None:
        for command in ("stats", "ls", "verify"):
            out = self.run(command, str(tmp_path / "none"))
            assert out.exit_code == 2
            assert str(tmp_path / "none") in out.stderr and out.stderr.count("\n") == 1
