"""What a store does with directories, bounds and clocks that changed between or during its lives."""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import stat
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from kvoffload.cli.store import app
from kvoffload.config import Config
from kvoffload.errors import StoreError
from kvoffload.store import Store, open_store
from kvoffload.types import StoreResult
from tests.support import store_format
from tests.unit import test_format_golden as golden
from tests.unit.test_store import disk_bytes

MIB = 1 << 20
YEAR_S = 365 * 86400


def key_of(i: int) -> bytes:
    return hashlib.sha256(b"safe %d" % i).digest()[:16]


def payload_of(i: int) -> bytes:
    return np.random.default_rng(i).bytes(50_000)


def small(path: Path, **kw: Any) -> Store:
    return open_store(path, **{"max_bytes": 8 * MIB, "segment_bytes": 512 << 10} | kw)


def fill(store: Store, start: int, stop: int) -> list[StoreResult]:
    """Ten per request, which lie together and may be published in any order."""
    out = []
    for at in range(start, stop, 10):
        ids = range(at, min(at + 10, stop))
        out += store.put_many((key_of(i), payload_of(i)) for i in ids)
    return out


def held(store: Store, keys: range) -> list[int]:
    """Which are held; what comes back is right."""
    out = []
    for i, found in zip(keys, store.get_many([key_of(i) for i in keys]), strict=True):
        assert found is None or found == payload_of(i)
        if found is not None:
            out.append(i)
    return out


class TestModes:
    @pytest.mark.parametrize("umask", [0, 0o022, 0o077, 0o177])
    def test_owner_only_under_any_umask(self, tmp_path: Path, umask: int) -> None:
        path = tmp_path / "new" / "parents" / "store"

        def modes() -> dict[str, int]:
            found = [tmp_path / "new", *(tmp_path / "new").rglob("*")]
            assert any("journal-" in p.name for p in found)
            wrong = {
                str(p): stat.S_IMODE(p.lstat().st_mode)
                for p in found
                if stat.S_IMODE(p.lstat().st_mode) & ~(0o700 if p.is_dir() else 0o600)
            }
            return wrong

        old = os.umask(umask)
        try:
            with small(path) as a, small(path) as b:
                fill(a, 0, 40)
                fill(b, 40, 60)
                a.delete(key_of(1))
                assert a.flush() and b.flush()
                assert modes() == {}
                fill(a, 100, 300)  # recycles
                assert a.flush() and modes() == {}
        finally:
            os.umask(old)
        if umask != 0o177:  # that one takes what we need from our own directories
            with small(path) as store:
                assert held(store, range(100, 300))

    def test_what_is_there_is_not_made_stricter_in_silence(self, tmp_path: Path) -> None:
        (tmp_path / "s").mkdir()
        (tmp_path / "s").chmod(0o755)
        with pytest.raises(StoreError, match="mode is 0755"):
            small(tmp_path / "s")
        assert stat.S_IMODE((tmp_path / "s").stat().st_mode) == 0o755
        assert list((tmp_path / "s").iterdir()) == []


class TestRefused:
    """By every command with exit status 2 and one line; nothing is touched."""

    @pytest.fixture
    def path(self, tmp_path: Path) -> Path:
        with small(tmp_path / "s") as store:
            fill(store, 0, 3)
        return tmp_path / "s"

    def break_(self, what: str, path: Path) -> Path:
        manifest = path / "MANIFEST"
        if what == "mode":
            path.chmod(0o750)
        elif what == "manifest mode":
            manifest.chmod(0o660)
        elif what == "newer":
            manifest.write_text(manifest.read_text().replace("format 1", "format 9"))
        elif what == "foreign":
            manifest.write_text("some other program's manifest\n")
        elif what == "manifest link":
            manifest.rename(path / "real")
            manifest.symlink_to(path / "real")
        elif what == "manifest fifo":
            manifest.unlink()
            os.mkfifo(manifest, 0o600)
        elif what == "link":
            (path.parent / "link").symlink_to(path)
            return path.parent / "link"
        elif what == "file":
            (path.parent / "file").write_text("x")
            return path.parent / "file"
        elif what == "gone":
            shutil.rmtree(path)
        return path

    @pytest.mark.parametrize(
        "what",
        "mode,manifest mode,newer,foreign,manifest link,manifest fifo,link,file,gone".split(","),
    )
    def test_one_line_and_hands_off(self, path: Path, what: str) -> None:
        file = path.parent / "chunks"
        with open_store(path, read_only=True) as store:
            store.export(file)
        given = self.break_(what, path)
        before = {p: p.lstat().st_mtime_ns for p in path.rglob("*")}
        commands = [["stats"], ["ls"], ["verify"], ["verify", "--repair"]]
        if what == "gone":  # writing makes a new store there
            commands = commands[:3]
        else:
            commands += [["import"]]
        for command in commands:
            args = [*command, str(given)] + ([str(file)] if command == ["import"] else [])
            done = CliRunner().invoke(app, args)
            assert done.exit_code == 2, (command, done.output)
            assert str(given) in done.stderr and done.stderr.count("\n") == 1
            assert done.stdout == ""
        assert {p: p.lstat().st_mtime_ns for p in path.rglob("*")} == before

    def test_a_link_above_the_path_is_fine(self, path: Path) -> None:
        (path.parent / "mount").symlink_to(path.parent)
        with small(path.parent / "mount" / "s") as store:
            assert held(store, range(3)) == [0, 1, 2]

    def test_the_path_becomes_a_link_while_open(self, path: Path) -> None:
        """An open store keeps to the directory that it opened."""
        elsewhere = path.parent / "elsewhere"
        elsewhere.mkdir(mode=0o700)
        with small(path) as store:
            path.rename(path.parent / "moved")
            path.symlink_to(elsewhere)
            assert set(fill(store, 10, 60)) == {StoreResult.OK}
            assert held(store, range(60)) == [0, 1, 2, *range(10, 60)]
        assert list(elsewhere.iterdir()) == []


class TestVanishing:
    def remove(self, path: Path) -> None:
        while path.exists():  # a seal may take a journal away under rmtree
            shutil.rmtree(path, ignore_errors=True)

    def test_under_a_reader(self, tmp_path: Path) -> None:
        with small(tmp_path / "s") as store:
            fill(store, 0, 20)
        with open_store(tmp_path / "s", read_only=True) as store:
            self.remove(tmp_path / "s")
            held(store, range(20))
            report = store.verify()
            assert report.bad == report.checked
            assert store.export(tmp_path / "f").chunks == 0
            store.check()
            assert store.stats()["misses"] > 0
        with pytest.raises(StoreError, match="cannot be opened"):
            open_store(tmp_path / "s", read_only=True)

    def test_only_the_writers_directory(self, tmp_path: Path) -> None:
        with small(tmp_path / "s") as store:
            fill(store, 0, 20)
            self.remove(tmp_path / "s" / "w0")
            for start in (100, 200, 300):
                assert set(fill(store, start, start + 30)) <= set(StoreResult)
                held(store, range(start, start + 30))
            store.flush(0.5)
            store.check()
        with small(tmp_path / "s") as store:  # a new life starts afresh
            held(store, range(400))
            assert set(fill(store, 500, 520)) == {StoreResult.OK}
            assert held(store, range(500, 520)) == list(range(500, 520))

    def test_and_made_anew_under_an_open_store(self, tmp_path: Path) -> None:
        with small(tmp_path / "s") as old:
            fill(old, 0, 10)
            self.remove(tmp_path / "s")
            with small(tmp_path / "s") as new:
                assert set(fill(new, 50, 90)) == {StoreResult.OK}
                fill(old, 100, 160)
                held(old, range(200))
                assert held(new, range(200)) == list(range(50, 90))
        with small(tmp_path / "s") as again:
            assert held(again, range(200)) == list(range(50, 90))


class TestBound:
    """nvme_gib changed between starts, as the engine opens its store."""

    @pytest.mark.parametrize("drives", [1, 2])
    def test_shrunk_below_what_is_used_and_grown(self, tmp_path: Path, drives: int) -> None:
        paths = [str(tmp_path / f"d{i}") for i in range(drives)]

        def life(gib: float | None) -> Store:
            config = Config(nvme_path=paths, nvme_gib=gib)  # type: ignore[arg-type]
            assert config.nvme_path is not None
            return open_store(config.nvme_path, max_bytes=config.nvme_bytes())

        def sizes() -> list[int]:
            return [disk_bytes(Path(p)) for p in paths]

        with life(drives * 48 / 1024) as store:
            assert set(fill(store, 0, drives * 500)) == {StoreResult.OK}
            assert len(held(store, range(drives * 500))) == drives * 500
            assert store.flush()
        with life(drives * 16 / 1024) as store:
            assert all(n <= 16 * MIB for n in sizes())
            left = held(store, range(drives * 500))
            # The newest are left: about a third.
            assert drives * 100 < len(left) < drives * 340
            if drives == 1:
                assert left == list(range(left[0], 500))
            assert store.verify().bad == 0
            assert set(fill(store, 2000, 2200)) == {StoreResult.OK}
            assert all(n <= 16 * MIB for n in sizes())
            newest = held(store, range(2000, 2200))
            # All of them; the last half where hot chunks of the oldest of so few segments were just
            # being written again, which keeps it: the next oldest went in its place.
            assert newest[-1] == 2199 and newest == list(range(newest[0], 2200))
            assert len(newest) > 100
            store.check()
        with life(drives * 32 / 1024) as store:
            assert held(store, range(2000, 2200)) == newest
            assert set(fill(store, 3000, 3000 + drives * 250)) == {StoreResult.OK}
            assert len(held(store, range(3000, 3000 + drives * 250))) == drives * 250
            assert all(n <= 32 * MIB for n in sizes())
            assert sum(sizes()) > drives * 16 * MIB
            store.check()
        with life(None) as store:  # as it was created
            assert store.stats()["bytes_max"] == drives * 48 * MIB

    @pytest.mark.parametrize("bound", [1, 4096, 10_000, 16_383, 100_000])
    def test_too_small_for_a_reader(self, tmp_path: Path, bound: int) -> None:
        """One line, whether the caller says so or the MANIFEST; in a process of its own, which such
        a bound once ended."""
        path = tmp_path / "s"
        with small(path) as store:
            fill(store, 0, 5)
        call = f"open_store({str(path)!r}, max_bytes={bound}, read_only=True)"
        given = f"from kvoffload.store import open_store; {call}"
        done = subprocess.run([sys.executable, "-c", given], capture_output=True, text=True)
        assert done.returncode == 1 and "does not hold one segment" in done.stderr
        manifest = path / "MANIFEST"
        uuid = store_format.manifest_uuid(manifest.read_bytes())
        manifest.write_bytes(store_format.manifest(uuid, 512 << 10, bound))
        command = "from kvoffload.cli.store import app; app()"
        done = subprocess.run(
            [sys.executable, "-c", command, "stats", str(path)], capture_output=True, text=True
        )
        assert done.returncode == 2 and done.stderr.count("\n") == 1
        assert str(path) in done.stderr and "does not hold one segment" in done.stderr

    def test_the_smallest_for_a_reader(self, tmp_path: Path) -> None:
        least = (16 + 4 + 16) * 4096  # small files, two journals, one segment
        with pytest.raises(StoreError, match="does not hold one segment"):
            small(tmp_path / "s", max_bytes=least - 1, segment_bytes=64 << 10)
        with small(tmp_path / "s", max_bytes=least, segment_bytes=64 << 10) as store:
            assert store.put(key_of(1), payload_of(1)) is StoreResult.OK
        for bound in (None, least):
            with open_store(tmp_path / "s", max_bytes=bound, read_only=True) as store:
                assert held(store, range(2)) == [1]
                store.check()

    def test_restarts_without_a_bound_do_not_shrink_it(self, tmp_path: Path) -> None:
        with open_store(tmp_path / "s") as store:
            first = store.stats()["bytes_max"]
            fill(store, 0, 20)
        with open_store(tmp_path / "s") as store:
            assert store.stats()["bytes_max"] == first


class TestClock:
    """File times and numbers made by a clock that was wrong, or is now."""

    @pytest.fixture(params=[0.0, 4e9, "mixed"])
    def stamp(self, request: pytest.FixtureRequest) -> Iterator[Any]:
        def set_times(path: Path) -> None:
            for n, p in enumerate(sorted(path.rglob("*"))):
                when = [0.0, 4e9, time.time() - 9][n % 3] if request.param == "mixed" else None
                at = request.param if when is None else when
                with contextlib.suppress(FileNotFoundError):  # a store at work drops old journals
                    os.utime(p, (at, at), follow_symlinks=False)

        yield set_times

    def test_file_times(self, tmp_path: Path, stamp: Any) -> None:
        path = tmp_path / "s"
        with small(path, max_bytes=4 * MIB) as store:
            fill(store, 0, 40)
        stamp(path)
        with small(path, max_bytes=4 * MIB) as store:
            assert held(store, range(40)) == list(range(40))
            for start in range(100, 400, 50):
                assert set(fill(store, start, start + 50)) == {StoreResult.OK}
                stamp(path)
                newest = range(start + 20, start + 50)  # hot ones take part of so little
                assert held(store, newest) == list(newest)
                assert disk_bytes(path) <= 4 * MIB
            store.check()
        stamp(path)
        with small(path, max_bytes=2 * MIB) as store:  # room is made at open
            assert disk_bytes(path) <= 2 * MIB
            left = held(store, range(400))
            assert left and left[-1] == 399
            store.check()

    def test_file_times_of_the_dead_and_the_living(self, tmp_path: Path, stamp: Any) -> None:
        path, bound = tmp_path / "s", 4 * MIB
        with small(path, max_bytes=bound) as a:
            fill(a, 0, 10)
            with small(path, max_bytes=bound) as b:
                fill(b, 50, 90)
            stamp(path)
            for i in range(100, 300):
                assert a.put(key_of(i), payload_of(i)) is StoreResult.OK
            assert held(a, range(295, 300)) == list(range(295, 300))
            held(a, range(300))
            assert disk_bytes(path) <= bound
            a.check()

    @pytest.mark.parametrize("ahead_s", [30 * YEAR_S, -40 * YEAR_S])
    def test_numbers_of_a_clock_that_was_wrong(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ahead_s: int
    ) -> None:
        """Generations and sequence numbers follow the clock; they must not rely on it."""
        now = int(time.time()) + ahead_s
        monkeypatch.setattr(golden, "GEN", now)
        monkeypatch.setattr(golden, "SEQ", now * 10**6)
        path = tmp_path / "s"
        for name, data in golden.golden().items():
            (path / name).parent.mkdir(parents=True, exist_ok=True)
            (path / name).write_bytes(data)
        for item in [path, *path.rglob("*")]:
            item.chmod(0o700 if item.is_dir() else 0o600)
        names = [name for name in golden.SIZES if name != "gone"]

        def right(store: Store) -> list[str]:
            out = []
            for name in golden.SIZES:
                found = store.get(golden.key(name))
                assert found in (None, golden.payload(name, int(name == "again")))
                out += [name] if found is not None else []
            return out

        with open_store(path, max_bytes=4 * MIB, segment_bytes=512 << 10) as store:
            assert sorted(right(store)) == sorted(names)
            assert store.delete(golden.key("one"), golden.key("leaf")) == 2
            assert set(fill(store, 0, 5)) == {StoreResult.OK}
            assert {c.key for c in store.ls(5)} == {key_of(i) for i in range(5)}  # newest first
            assert store.flush()
        with open_store(path, max_bytes=4 * MIB, segment_bytes=512 << 10) as store:
            assert sorted(right(store)) == sorted(set(names) - {"one", "leaf"})
            assert store.put(golden.key("one"), golden.payload("one")) is StoreResult.OK
            assert held(store, range(5)) == list(range(5))
        with open_store(path, max_bytes=4 * MIB, segment_bytes=512 << 10) as store:
            assert "one" in right(store)
            for i in range(100, 300):
                assert store.put(key_of(i), payload_of(i)) is StoreResult.OK
            assert held(store, range(290, 300)) == list(range(290, 300))
            right(store)
            store.check()
