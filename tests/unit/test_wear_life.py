"""Lifetime totals of the NVMe store: the file, who keeps it, what is hostile about it, who reads it."""

from __future__ import annotations

import json
import logging
import os
import signal
import stat
import subprocess
import sys
import threading
import time
import zlib
from collections.abc import Callable
from datetime import UTC, date, datetime
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from kvoffload._core import Arena
from kvoffload.cli.store import app
from kvoffload.config import Config
from kvoffload.core.manager import Manager
from kvoffload.core.sizes import slots_needed
from kvoffload.core.wear import LifeWear, Wear
from kvoffload.engines.vllm.telemetry import report_levels
from kvoffload.errors import StoreError
from kvoffload.metrics import Recorder
from kvoffload.store import Store, open_store
from kvoffload.tiers.base import device_bytes
from kvoffload.tiers.nvme import counted, open_drives
from kvoffload.tiers.nvme.lifetime import DAYS_KEPT, MAX_BYTES, Lifetime, parse, read_path
from kvoffload.types import StoreResult
from tests.support.fakes import full_group, layout_of

MIB = 1 << 20
DAY = 86400
NOW = datetime(2026, 3, 10, 6, tzinfo=UTC).timestamp()


def small(path: Any, **kw: Any) -> Store:
    return open_store(path, **{"max_bytes": 32 * MIB, "segment_bytes": 1 * MIB} | kw)


def fill(store: Store, seed: int, chunks: int = 3) -> None:
    for i in range(chunks):
        assert store.put(bytes([seed, i] * 8), bytes(100_000)) is StoreResult.OK


def life_of(path: Path, writer: int = 0) -> Lifetime:
    return parse((path / f"w{writer}" / "lifetime").read_bytes())


def until(ready: Callable[[], Any], seconds: float = 10.0) -> Any:
    end = time.monotonic() + seconds
    while not (found := ready()):
        assert time.monotonic() < end, "did not come about"
        time.sleep(0.01)
    return found


def signed(body: str) -> bytes:
    return f"{body}crc32 {zlib.crc32(body.encode()):08x}\n".encode()


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "s"


class TestNumbers:
    def test_days_and_the_rate_of_the_last_week(self) -> None:
        life = Lifetime(since=int(NOW) - 100 * DAY, at=0)
        for ago in range(40, -1, -1):
            life = life.plus(50, 100, NOW - ago * DAY)
        assert len(life.days) == DAYS_KEPT and life.days[-1] == (date(2026, 3, 10), 100)
        assert (life.device_bytes, life.payload_bytes, life.at) == (4100, 2050, int(NOW))
        # Today is six hours old: 7 days' entries, 6.25 days.
        assert life.bytes_per_day(NOW) == pytest.approx(700 / 6.25)
        assert life.amplification() == 2.0
        assert life.days_left(NOW) is None
        assert life.days_left(NOW, 4100 + 1120) == pytest.approx(10.0)
        assert life.days_left(NOW, 1.0) == 0.0, "used up, and not less than that"
        assert life.bytes_per_day(NOW + 30 * DAY) == 0.0
        assert life.days_left(NOW + 30 * DAY, 5e3) == float("inf")

    def test_a_burst_at_the_start_is_no_rate(self) -> None:
        life = Lifetime(since=int(NOW) - 60, at=0).plus(10, 10, NOW)
        assert life.bytes_per_day(NOW) == 10.0
        assert life.bytes_per_day(NOW + 1.5 * DAY) == pytest.approx(10 / 1.5, rel=0.01)

    def test_a_clock_that_jumps_gives_no_absurd_rate(self) -> None:
        life = Lifetime(since=int(NOW), at=0).plus(10, 10, NOW)
        assert life.bytes_per_day(NOW - 400 * DAY) == 0.0, "of days to come nothing is said"
        late = life.plus(10, 10, 0.0)
        assert 0 <= late.bytes_per_day(NOW) <= 20 and late.device_bytes == 20
        assert parse(late.text().encode()) == late

    def test_merged(self) -> None:
        one = Lifetime(100, 900, 1, 10, 7, ((date(2026, 1, 1), 10),))
        two = Lifetime(50, 200, 2, 20, 5, ((date(2026, 1, 1), 5), (date(2026, 1, 2), 15)))
        both = Lifetime(50, 900, 3, 30, 7, ((date(2026, 1, 1), 15), (date(2026, 1, 2), 15)))
        assert one.merged(two) == two.merged(one) == both
        assert one.merged(Lifetime(1, 2000)).endurance_bytes == 7, "a later one that knows nothing"


class TestTheFile:
    LIFE = Lifetime(1, 2, 300, 400, 5, ((date(2026, 3, 9), 150), (date(2026, 3, 10), 250)))

    def test_what_is_written_is_what_is_read(self) -> None:
        assert parse(self.LIFE.text().encode()) == self.LIFE
        full = Lifetime(0, 0)
        for day in range(400):
            full = full.plus(1 << 45, 1 << 45, NOW + day * DAY)
        assert parse(full.text().encode()) == full and len(full.text()) < 4096

    def test_no_damaged_byte_passes(self) -> None:
        raw = self.LIFE.text().encode()
        for at in range(len(raw)):
            for wrong in (raw[at] ^ 1, raw[at] ^ 0x80, 0x20):
                if wrong != raw[at]:
                    with pytest.raises(ValueError, match=r"damaged|cannot be"):
                        parse(raw[:at] + bytes([wrong]) + raw[at + 1 :])
            with pytest.raises(ValueError, match=r"damaged|cannot be"):
                parse(raw[:at])
        with pytest.raises(ValueError, match="damaged"):
            parse(raw + b"\n")

    @pytest.mark.parametrize(
        ("old", "new"),
        [
            ("lifetime 1", "lifetime 2"),
            ("since 1", "since -1"),
            ("since 1", f"since {1 << 33}"),
            ("payload_bytes 300", "payload_bytes 401"),
            ("payload_bytes 300", "payload_bytes -3"),
            ("device_bytes 400", f"device_bytes {MAX_BYTES}"),
            ("device_bytes 400", "device_bytes 399"),
            ("device_bytes 400", "device_bytes 0400"),
            ("device_bytes 400", "device_bytes 4_00"),
            ("device_bytes 400", "device_bytes " + "9" * 3000),
            ("device_bytes 400", "device_bytes 4e9"),
            ("endurance_bytes 5", f"endurance_bytes {MAX_BYTES}"),
            ("day 2026-03-09 150", "day 2026-03-09 -1"),
            ("day 2026-03-09", "day 2026-03-10"),
            ("day 2026-03-09", "day 2026-03-11"),
            ("day 2026-03-09", "day 20260309"),
            ("day 2026-03-09", "day 2026-02-30"),
            ("day 2026-03-09 150", "\n".join(["day 2026-03-09 1"] * 40)),
            ("endurance_bytes 5\n", ""),
        ],
    )
    def test_what_cannot_be_does_not_pass_with_a_right_crc(self, old: str, new: str) -> None:
        body = self.LIFE.text().rpartition("crc32")[0]
        assert parse(signed(body)) == self.LIFE and body.count(old) == 1
        with pytest.raises(ValueError, match=r"damaged|cannot be"):
            parse(signed(body.replace(old, new)))


class TestAWritersFile:
    def test_totals_go_on(self, path: Path) -> None:
        payload = written = 0
        since = int(time.time())
        for seed in range(3):
            with small(path) as store:
                assert store.stats()["lifetime_device_bytes"] == written
                fill(store, seed)
                native = store._native
            stats = native.native_stats()  # closed: these are final
            payload, written = payload + 300_000, written + device_bytes(stats)
            assert stats["accepted_bytes"] == 300_000 < device_bytes(stats)
            life = life_of(path)
            assert (life.payload_bytes, life.device_bytes) == (payload, written)
            assert sum(n for _, n in life.days) == written
            assert since <= life.since <= life.at <= time.time()
        info = (path / "w0" / "lifetime").lstat()
        assert stat.S_IMODE(info.st_mode) == 0o600
        assert sorted(p.name for p in (path / "w0").glob("lifetime*")) == ["lifetime"]

    def test_only_chunks_count_as_payload(self, path: Path) -> None:
        with small(path) as store:
            fill(store, 1, chunks=1)
            fill(store, 1, chunks=1)  # held
            assert store.put(b"k" * 16, b"tiny") is StoreResult.OK
            store.flush()
            stats = store.stats()
        assert stats["lifetime_payload_bytes"] == stats["accepted_bytes"] == 100_004
        assert stats["bytes_written"] == 25 * 4096 + 4096

    def test_nothing_written_no_file(self, path: Path) -> None:
        small(path).close()
        small(path, read_only=True).close()
        assert not list(path.rglob("lifetime*"))
        assert "lifetime_device_bytes" not in small(path, read_only=True).stats()

    def test_an_unchanged_file_is_left_alone(
        self, path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        with small(path) as store:
            fill(store, 1)
        before = (path / "w0" / "lifetime").lstat()
        monkeypatch.setattr(counted, "EVERY_S", 0.01)
        with small(path):
            time.sleep(0.2)
        assert (path / "w0" / "lifetime").lstat().st_ino == before.st_ino

    def test_two_writers_of_one_path(self, path: Path) -> None:
        with small(path) as one:
            fill(one, 1)
            with small(path) as two:
                fill(two, 2)
            with small(path) as two:
                mine = life_of(path, 1)
                stats = two.stats()
                assert stats["lifetime_device_bytes"] == mine.device_bytes
                assert one.stats()["lifetime_payload_bytes"] == 300_000, "as of a minute ago"
        with small(path) as one:
            assert one.stats()["lifetime_payload_bytes"] == 600_000
        both = read_path(path, pytest.fail)
        assert both == life_of(path, 0).merged(life_of(path, 1))

    def test_others_are_read_again(self, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(counted, "EVERY_S", 0.02)
        with small(path) as one, small(path) as two:
            fill(two, 2)
            until(lambda: one.stats()["lifetime_payload_bytes"] == 300_000)
            until(lambda: one.stats()["lifetime_per_day"] > 300_000)

    def test_what_another_writer_counted_meanwhile_stays(self, path: Path) -> None:
        store = small(path)
        fill(store, 1)
        native = store._native
        native._tally.pause()
        super(counted.CountedStore, native).close(5000)  # gives the directory up, the file not yet
        with small(path) as other:
            assert other.writer_dir == str(path / "w0")
            fill(other, 2, chunks=1)
        native._tally.end(5.0)
        assert life_of(path).payload_bytes == 100_000

    def test_nothing_is_written_while_another_writer_has_it(self, path: Path) -> None:
        store = small(path)
        fill(store, 1)
        native = store._native
        native._tally.pause()
        super(counted.CountedStore, native).close(5000)
        with small(path):
            native._tally.end(5.0)
            assert not (path / "w0" / "lifetime").exists()

    def test_a_store_that_is_let_go_of_leaves_no_thread(self, path: Path) -> None:
        def threads() -> int:
            return sum(t.name == "kvo-lifetime" for t in threading.enumerate())

        before = threads()
        store = small(path)
        assert threads() == before + 1
        del store
        until(lambda: threads() == before)
        native = small(path)._native
        native._abandon()
        until(lambda: threads() == before)

    def test_close_does_not_wait_for_a_file_that_hangs(
        self, path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        free = threading.Event()
        monkeypatch.setattr(counted, "save", lambda *_: free.wait(30))
        store = small(path)
        fill(store, 1)
        began = time.monotonic()
        store.close(timeout_s=0.5)
        assert time.monotonic() - began < 3.0
        free.set()

    def test_a_disk_that_refuses_the_file(
        self, path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
    ) -> None:
        def refuse(*_: object) -> None:
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(counted, "save", refuse)
        monkeypatch.setattr(counted, "EVERY_S", 0.02)
        with caplog.at_level(logging.WARNING), small(path) as store:
            fill(store, 1)
            until(lambda: store.stats()["lifetime_errors"] >= 3)
            assert store.get(bytes([1, 0] * 8)) == bytes(100_000)
        assert [r.message.count("No space left") for r in caplog.records] == [1]

    def test_removed_under_an_open_store(self, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(counted, "EVERY_S", 0.02)
        with small(path) as store:
            fill(store, 1)
            until((path / "w0" / "lifetime").exists)
            path.rename(path.with_name("gone"))
            fill(store, 2)
            until(lambda: life_of(path.with_name("gone")).payload_bytes == 600_000)
        assert not path.exists(), "nothing is made where the store was"

    def test_the_bound_counts_it(self, path: Path) -> None:
        def used() -> int:
            found = [path, *path.rglob("*")]
            return sum(max(p.lstat().st_size, p.lstat().st_blocks * 512) for p in found)

        bound = 4 * MIB
        for seed in range(3):
            with small(path, max_bytes=bound) as one, small(path, max_bytes=bound) as two:
                for i in range(60):
                    one.put(bytes([seed, i] * 8), bytes(100_000))
                    two.put(bytes([i, seed + 100] * 8), bytes(100_000))
            assert (path / "w1" / "lifetime").exists() and used() <= bound

    def test_the_least_bound_is_enough(self, tmp_path: Path) -> None:
        def opens(bound: int) -> bool:
            try:
                small(tmp_path / str(bound), max_bytes=bound, segment_bytes=64 << 10).close()
            except StoreError:
                return False
            return True

        least = next(bound for bound in range(64 << 10, 1 << 20, 4096) if opens(bound))
        for seed in range(4):
            with small(tmp_path / str(least), max_bytes=least, segment_bytes=64 << 10) as store:
                for i in range(3):
                    assert store.put(bytes([seed, i] * 8), bytes(20_000)) is StoreResult.OK


class TestHostile:
    def lay(self, folder: Path, what: str) -> None:
        """Something that is no file of ours where the file should be."""
        file = folder / "lifetime"
        good = Lifetime(1, 2, 1 << 50, 1 << 51).text()
        if what == "symlink":
            (folder.parent.parent / "target").write_text(good)
            (folder.parent.parent / "target").chmod(0o600)
            file.symlink_to(folder.parent.parent / "target")
        elif what == "fifo":
            os.mkfifo(file, 0o600)
        elif what == "folder":
            file.mkdir(0o700)
        elif what == "next is a folder":
            (folder / "lifetime.next").mkdir(0o700)
        else:
            data = {
                "empty": b"",
                "garbage": os.urandom(700),
                "huge": good.encode() + b"\0" * (64 * MIB),
                "negative": signed(
                    Lifetime(1, 2, -(1 << 50), -(1 << 49)).text().rpartition("c")[0]
                ),
            }.get(what, good.encode())
            file.write_bytes(data)
            file.chmod(0o644 if what == "others may read it" else 0o600)
            if what == "foreign":
                os.chown(file, 4242, 4242)

    @pytest.mark.parametrize(
        "what",
        "symlink,fifo,folder,next is a folder,empty,garbage,huge,negative,others may read it,foreign".split(
            ","
        ),
    )
    def test_counting_starts_anew_with_one_line(
        self, path: Path, what: str, caplog: pytest.LogCaptureFixture
    ) -> None:
        if what == "foreign" and os.geteuid():
            pytest.skip("needs root")
        with small(path, max_bytes=256 * MIB) as store:
            fill(store, 1)
        (path / "w0" / "lifetime").unlink()
        self.lay(path / "w0", what)
        with caplog.at_level(logging.WARNING), small(path, max_bytes=256 * MIB) as store:
            assert store.writer_dir == str(path / "w0") and len(store) == 3
            assert store.verify().bad == 0 and store.stats()["io_errors"] == 0
            assert store.stats()["lifetime_device_bytes"] == 0
            fill(store, 2)
            assert 300_000 <= store.stats()["lifetime_device_bytes"] < 1 * MIB
        stuck = what in ("folder", "next is a folder")
        assert len([r for r in caplog.records if "lifetime" in r.message]) == 1, caplog.text
        if stuck:
            assert read_path(path, lambda line: None) is None
        else:
            assert life_of(path).payload_bytes == 300_000
        if what == "symlink":
            assert parse((path.parent / "target").read_bytes()).payload_bytes == 1 << 50
        with small(path) as store:
            assert len(store) == 6

    def test_names_that_are_no_writers_are_not_read(self, path: Path) -> None:
        with small(path) as store:
            fill(store, 1)
        text = Lifetime(1, 2, 10, 20).text()
        for name in ("w00", "w256", "w-1", "w1.bak", "x"):
            (path / name).mkdir(0o700)
            (path / name / "lifetime").write_text(text)
            (path / name / "lifetime").chmod(0o600)
        (path / "w7").symlink_to(path / "w00")
        (path / "w8").mkdir(0o755)
        (path / "w9").write_text("no directory")
        lines: list[str] = []
        both = read_path(path, lines.append)
        assert both == life_of(path) and len(lines) == 2, lines


CHILD = """
import sys, time
from kvoffload.store import open_store
from kvoffload.tiers.nvme import counted
counted.EVERY_S = float(sys.argv[2])
store = open_store(sys.argv[1], max_bytes=32 << 20, segment_bytes=1 << 20)
for i in range(250):
    store.put(bytes([9, i, int(sys.argv[3]), 0] * 4), bytes(20_000))
    store.flush()
    print(i + 1, flush=True)
    if i == 40: time.sleep(60)
"""


class TestKilled:
    def child(self, path: Path, every: float, seed: int = 0) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, "-c", CHILD, str(path), str(every), str(seed)],
            stdout=subprocess.PIPE,
            text=True,
        )

    @pytest.mark.parametrize("every", [0.05, 60.0])
    def test_a_kill_loses_what_came_since_the_last_write(self, path: Path, every: float) -> None:
        with small(path) as store:
            fill(store, 1)
        before = life_of(path)
        child = self.child(path, every)
        assert child.stdout is not None
        for line in child.stdout:
            if line == "41\n":
                break
        if every < 1:
            until(lambda: life_of(path).payload_bytes == before.payload_bytes + 41 * 20_000)
        child.send_signal(signal.SIGKILL)
        child.wait(10)
        life = life_of(path)
        assert life == before if every > 1 else life.payload_bytes == 300_000 + 41 * 20_000
        with small(path) as store:
            assert len(store) == 44 and store.verify().bad == 0
            assert store.stats()["lifetime_payload_bytes"] == life.payload_bytes
            fill(store, 2)
        assert life_of(path).payload_bytes == life.payload_bytes + 300_000
        assert life_of(path).since == before.since

    def test_killed_while_the_file_is_replaced(self, path: Path) -> None:
        """Now and then in the middle of it: there is always one file that counts."""
        with small(path) as store:
            fill(store, 1)
        for seed in range(5):
            before = life_of(path)
            child = self.child(path, 0.0, seed)
            until(lambda had=before: life_of(path).payload_bytes > had.payload_bytes + 100_000)
            child.send_signal(signal.SIGKILL)
            child.communicate(timeout=10)
            after = life_of(path)
            assert after.payload_bytes > before.payload_bytes and after.since == before.since
        with small(path) as store:
            assert store.stats()["lifetime_errors"] == 0
        assert sorted(p.name for p in (path / "w0").glob("lifetime*"))[0] == "lifetime"


class TestDrives:
    def test_each_drive_has_its_own(self, tmp_path: Path) -> None:
        paths = [tmp_path / "a", tmp_path / "b"]
        for seed in range(2):
            store = open_drives(paths, max_bytes=64 * MIB, endurance_bytes=2_000_000)
            with Store(store) as both:
                fill(both, seed, chunks=8)
                stats = both.stats()
                assert stats["lifetime_payload_bytes"] == (seed + 1) * 800_000
        lives = [life_of(path) for path in paths]
        assert all(life.endurance_bytes == 1_000_000 for life in lives)
        assert min(life.payload_bytes for life in lives) > 0
        assert sum(life.payload_bytes for life in lives) == 1_600_000
        with open_store(paths) as both:
            stats = both.stats()
            now = time.time()
            assert stats["lifetime_since"] == min(life.since for life in lives)
            left = min(life.days_left(now) for life in lives)
            assert stats["lifetime_days_left"] == pytest.approx(left)
            rates = sum(life.bytes_per_day(now) for life in lives)
            assert stats["lifetime_per_day"] == pytest.approx(rates)

    def test_what_a_drive_endures_is_remembered_and_may_change(self, path: Path) -> None:
        for given, kept in ((None, 0), (10**15, 10**15), (None, 10**15), (5, 5)):
            store = open_drives([path], max_bytes=32 * MIB, endurance_bytes=given)
            left = store.stats().get("lifetime_days_left")
            assert left == (float("inf") if kept else None), "nothing was written yet"
            store.close()
            if kept:
                assert life_of(path).endurance_bytes == kept
        open_drives([path], endurance_bytes=10**24).close()
        assert life_of(path).endurance_bytes == MAX_BYTES - 1


class TestMetrics:
    def test_gauges(self, path: Path) -> None:
        for _ in range(2):
            store = open_drives([path], max_bytes=32 * MIB, endurance_bytes=10**9)
            with Store(store) as opened:
                fill(opened, 1)
                stats = opened.stats()
        metrics = Recorder()
        metrics.wear(Wear(0, 0, 0.0, 1.0, 0.0, LifeWear.of(stats)))
        gauges = metrics.take()["g"]
        device = stats["lifetime_device_bytes"]
        assert gauges["kvoffload_nvme_lifetime_device_bytes"] == device > 300_000
        assert gauges["kvoffload_nvme_lifetime_payload_bytes"] == 300_000
        assert gauges["kvoffload_nvme_lifetime_per_day_bytes"] > 300_000
        left = gauges["kvoffload_nvme_days_left|week"]
        assert left == pytest.approx((1e9 - device) / device, rel=0.1)

    def test_what_an_engine_exports(self, path: Path) -> None:
        with Store(open_drives([path], max_bytes=32 * MIB, endurance_bytes=10**9)) as store:
            fill(store, 1)
        native = open_drives([path])
        layout = layout_of(full_group())
        arena = Arena.create(16 * MIB, slots_needed(layout, 16 * MIB), 1)
        metrics = Recorder()
        report_levels(Manager(layout, arena, native), metrics)
        gauges = metrics.take()["g"]
        assert gauges["kvoffload_nvme_lifetime_payload_bytes"] == 300_000
        assert gauges["kvoffload_nvme_lifetime_device_bytes"] == life_of(path).device_bytes
        assert gauges["kvoffload_nvme_days_left|week"] > 1
        native.close()

    def test_the_engine_hands_down_what_drives_endure(self, tmp_path: Path) -> None:
        pytest.importorskip("vllm")
        from kvoffload.engines.vllm.build import _open_store

        paths = [str(tmp_path / name) for name in "ab"]
        config = Config(nvme_path=tuple(paths), nvme_gib=0.1, nvme_tbw=7)
        _open_store(config).close()
        assert [life_of(Path(p)).endurance_bytes for p in paths] == [35 * 10**11] * 2

    def test_unknown_is_no_zero(self) -> None:
        assert LifeWear.of({"entries": 1}) == LifeWear()
        metrics = Recorder()
        metrics.wear(Wear(0, 0, 0.0, 1.0, 0.0))
        assert not [s for s in metrics.take()["g"] if s.startswith("kvoffload_nvme_days_left")]


def shown(*args: str) -> Any:
    got = CliRunner().invoke(app, ["stats", *args, "--json"])
    assert got.exit_code == 0, got.output
    return json.loads(got.stdout)


class TestStats:
    def write(self, path: Path, days: int = 7, per_day: int = 10**12, **kw: int) -> None:
        """A store whose file says so much a day."""
        small(path).close()
        now = time.time()
        life = Lifetime(since=int(now) - 365 * DAY, at=int(now), **kw)
        for ago in range(days - 1, -1, -1):
            life = life.plus(per_day // 2, per_day, now - ago * DAY)
        (path / "w0" / "lifetime").write_text(life.text())
        (path / "w0" / "lifetime").chmod(0o600)

    def test_one_drive(self, path: Path) -> None:
        self.write(path)
        got = shown(str(path))["lifetime"]
        assert (got["payload_bytes"], got["device_bytes"]) == (35 * 10**11, 7 * 10**12)
        assert got["amplification"] == 2.0 and 1.0 <= got["tb_per_day"] <= 7 / 6
        assert got["days_left"] is None and got["endurance_tb"] is None and len(got["days"]) == 7
        got = shown(str(path), "--tbw", "107")["lifetime"]
        assert got["days_left"] == pytest.approx(100 / got["tb_per_day"])
        text = CliRunner().invoke(app, ["stats", str(path), "--tbw", "107"], env={"COLUMNS": "120"})
        since = datetime.fromtimestamp(got["since"], UTC).date()
        for part in (f"written since {since}", "6.37 TiB", "2.00", "TB per day", " days"):
            assert part in text.output, part
        text = CliRunner().invoke(app, ["stats", str(path)], env={"COLUMNS": "120"})
        assert "needs --tbw, or nvme_tbw" in text.output

    def test_what_the_engine_was_configured_with(self, path: Path) -> None:
        self.write(path, endurance_bytes=107 * 10**12)
        got = shown(str(path))["lifetime"]
        assert got["days_left"] == pytest.approx(100 / got["tb_per_day"])
        assert got["endurance_tb"] == 107
        used_up = shown(str(path), "--tbw", "3")["lifetime"]
        assert used_up["days_left"] == 0.0 and used_up["endurance_tb"] == 3

    def test_two_drives(self, tmp_path: Path) -> None:
        a, b = tmp_path / "a", tmp_path / "b"
        self.write(a)
        self.write(b, per_day=2 * 10**12)
        got = shown(str(a), str(b), "--tbw", "114")
        one, two = (drive["lifetime"] for drive in got["per_drive"])
        assert got["lifetime"]["device_bytes"] == 21 * 10**12
        assert two["days_left"] == pytest.approx(100 / two["tb_per_day"])
        assert two["days_left"] < one["days_left"]
        assert got["lifetime"]["days_left"] == two["days_left"], "the first one that goes"
        assert got["lifetime"]["endurance_tb"] == 228
        text = CliRunner().invoke(app, ["stats", str(a), str(b)], env={"COLUMNS": "160"}).output
        assert "12.73 TiB" in text and "written to it" in text

    def test_nothing_counted_nothing_recent(self, path: Path) -> None:
        small(path).close()
        assert shown(str(path))["lifetime"] is None
        got = CliRunner().invoke(app, ["stats", str(path)], env={"COLUMNS": "120"})
        assert got.exit_code == 0 and "nothing counted yet" in got.output
        life = Lifetime(0, 0, endurance_bytes=10**12).plus(5, 10, 30.5 * DAY)
        (path / "w0" / "lifetime").write_text(life.text())
        (path / "w0" / "lifetime").chmod(0o600)
        got = shown(str(path))["lifetime"]
        assert (got["tb_per_day"], got["days_left"], got["device_bytes"]) == (0.0, None, 10)
        text = CliRunner().invoke(app, ["stats", str(path)], env={"COLUMNS": "120"}).output
        assert "nothing is written" in text

    @pytest.mark.parametrize("tbw", ["0", "-1", "nan", "inf"])
    def test_no_endurance(self, path: Path, tbw: str) -> None:
        small(path).close()
        got = CliRunner().invoke(app, ["stats", str(path), "--tbw", tbw])
        assert got.exit_code == 2 and "--tbw" in got.output and got.output.count("\n") == 1

    def test_a_damaged_file_is_one_line(self, path: Path, caplog: pytest.LogCaptureFixture) -> None:
        self.write(path)
        (path / "w0" / "lifetime").write_bytes(b"\xff" * 99)
        with caplog.at_level(logging.WARNING):
            assert shown(str(path))["lifetime"] is None
        assert len(caplog.records) == 1 and str(path) in caplog.text

    def test_while_a_writer_runs(self, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(counted, "EVERY_S", 0.005)
        with small(path) as store:
            fill(store, 1)
            until((path / "w0" / "lifetime").exists)
            seen = [0]
            for i in range(30):
                assert store.put(bytes([i, 77] * 8), bytes(50_000)) is StoreResult.OK
                seen.append(shown(str(path))["lifetime"]["device_bytes"])
            assert seen == sorted(seen) and seen[-1] > seen[1]
            # A lock held, or the path lock: neither is asked for.
            fd = os.open(path, os.O_RDONLY)
            counted.fcntl.flock(fd, counted.fcntl.LOCK_EX)
            began = time.monotonic()
            read_path(path, pytest.fail)
            assert time.monotonic() - began < 1.0
            os.close(fd)
