"""A small crash campaign passes, and stores with a known hole do not: on both I/O engines."""

from __future__ import annotations

import importlib
import json
import os
import random
import shutil
import struct
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from kvoffload.store import open_store
from tests.support.store_engines import ENGINES, skip_without
from tests.support.store_format import forge_checksums, forget_generations

ROOT = Path(__file__).resolve().parents[2]
Bug = Callable[[dict[str, bytes]], dict[str, bytes]]

pytestmark = pytest.mark.skipif(
    not (shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")),
    reason="no C compiler for the recorder",
)


@pytest.fixture(params=ENGINES)
def engine(request: pytest.FixtureRequest) -> str:
    skip_without(request.param)
    return str(request.param)


@pytest.fixture
def crash(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return importlib.import_module("routines.crash")


@pytest.fixture
def memory(tmp_path: Path) -> Iterator[Path]:
    """A directory without a disk under it where there is one: crash points are small and many."""
    if not os.access("/dev/shm", os.W_OK):
        yield tmp_path
        return
    with tempfile.TemporaryDirectory(dir="/dev/shm", prefix="kvoffload-test-") as folder:
        yield Path(folder)


def campaign(crash: Any, path: Path, points: int, engine: str, bug: Bug | None = None) -> Any:
    tally = crash.Tally(engine)
    run = crash.Campaign(crash.build_recorder(path), path, 7, tally, bug)
    run.run(points, lambda line: None)
    assert tally.points == points and run.recordings == -(-points // crash.CUTS)
    return run


def test_everything_served_is_right(crash: Any, memory: Path, engine: str) -> None:
    run = campaign(crash, memory, 600, engine)
    tally = run.tally
    assert tally.clean, tally
    # The campaign saw what it is for: torn chunks were found out, and plenty still came back.
    assert tally.corrupt > 50 and run.lost_sectors > 2000
    assert tally.checked > 10 * tally.points and tally.misses > tally.points
    assert run.losses.keys() == {loss.value for loss in crash.Loss}
    assert run.under_way > 0 if engine == "uring" else run.ring_writes == 0


def test_kills(crash: Any, tmp_path: Path, engine: str) -> None:
    tally = crash.Tally(engine)
    crash.kill_loop(tmp_path, 8, 3, tally)
    assert tally.clean and tally.points == 8 and tally.checked > 100


def test_a_store_without_checksums_is_caught(crash: Any, memory: Path, engine: str) -> None:
    assert campaign(crash, memory, 60, engine, forge_checksums).tally.wrong > 0


def test_a_store_without_generation_bump_is_caught(crash: Any, memory: Path, engine: str) -> None:
    tally = campaign(crash, memory, 200, engine, forget_generations).tally
    assert tally.stale > 0 and tally.wrong == 0  # the checksum stands behind it


def test_a_store_without_both_serves_overwritten_chunks(
    crash: Any, memory: Path, engine: str
) -> None:
    def both(image: dict[str, bytes]) -> dict[str, bytes]:
        return forge_checksums(forget_generations(image))

    assert campaign(crash, memory, 60, engine, both).tally.wrong > 0


ORDERLY = """
import os, sys
from kvoffload.store import open_store
with open_store(sys.argv[1], max_bytes=4 << 20, segment_bytes=256 << 10, io_engine=sys.argv[2]) as s:
    for i in range(40):
        assert s.put(i.to_bytes(16, "little"), i.to_bytes(4, "little") * 3000) == 0
    s.delete(bytes(16))
os._exit(0)
"""


def test_an_orderly_end_outlasts_a_power_cut(crash: Any, memory: Path, engine: str) -> None:
    """Everything not flushed by the end of close() is lost; nothing that was put is."""
    shim, path, log = crash.build_recorder(memory), memory / "s", memory / "trace"
    path.mkdir(mode=0o700)
    extra = {"LD_PRELOAD": str(shim), "KVO_TRACE": str(log), "KVO_TRACE_ROOT": str(path)}
    extra["PYTHONPATH"] = os.pathsep.join([str(ROOT), *filter(None, sys.path)])
    if engine == "uring":
        extra["KVO_TRACE_RINGS"] = "1"
    command = [sys.executable, "-c", ORDERLY, str(path), engine]
    subprocess.run(command, check=True, env=os.environ | extra, timeout=60)
    disk = crash.Disk()
    for entry in crash.read_trace(log):
        disk.apply(entry)
    for seed in range(20):
        cut = memory / f"cut{seed}"
        crash.write_image(disk.cut(random.Random(seed), crash.Loss.ALL).image, cut)
        with open_store(cut, io_engine="threads") as store:
            assert store.get(bytes(16)) is None
            for i in range(1, 40):
                assert store.get(i.to_bytes(16, "little")) == i.to_bytes(4, "little") * 3000, i


def test_a_phantom_is_caught(crash: Any, tmp_path: Path, engine: str) -> None:
    truth, tally = crash.Truth(), crash.Tally(engine)
    for seed in range(1, 40):  # a busy machine may not get far in one life
        crash.kill_once(tmp_path / "s", seed, 0.05, truth, engine)
        if len(truth.values) > 40:
            break
    for key in sorted(truth.values)[::2]:
        del truth.values[key]
    crash.audit(tmp_path / "s", truth, tally, True)
    assert tally.phantoms > 0 and not tally.clean


@pytest.mark.parametrize(
    ("routine", "keys"),
    [
        ("crash", {"crash_points", "chunks_checked", "wrong_bytes", "phantoms", "reopen_ms"}),
        ("recover", {"chunks", "open_ms", "rss_mib"}),
    ],
)
def test_routines(routine: str, keys: set[str], tmp_path: Path) -> None:
    command = [sys.executable, "benchmarks/run.py", routine, "--quick", "--json", "-"]
    command += ["--dir", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-3000:]
    result = json.loads(done.stdout)
    assert keys <= result.keys()
    if routine == "crash":
        assert result["wrong_bytes"] == result["phantoms"] == 0
        ran = [e for e in result["engines"].values() if "skipped" not in e]
        assert ran and all(e["crash_points"] == 200 for e in ran)
        assert result["crash_points"] == 200 * len(ran)
        assert {"p50", "p99"} <= result["reopen_ms"].keys()
    else:
        assert result["chunks"] == 20_000 and result["open_ms"] > 0
    assert not list(tmp_path.iterdir()), "the temp dir was left behind"


class TestDisk:
    """The model of the disk itself."""

    def disk(self, crash: Any) -> Any:
        from powercut.disk import Entry, What

        disk = crash.Disk()
        for entry in (
            Entry(What.MKDIR, -1, 0, "w0", b""),
            Entry(What.OPEN, 5, 0, "w0", b""),
            Entry(What.OPEN, 4, 0, "w0/f", b""),
            Entry(What.WRITE, 4, 0, "", b"a" * 2048),
            Entry(What.SYNC, 4, 0, "", b""),
            Entry(What.SYNC, 5, 0, "", b""),
            Entry(What.WRITE, 4, 512, "", b"b" * 512),
            Entry(What.WRITE, 4, 512, "", b"c" * 1024),
            Entry(What.OPEN, 6, 0, "w0/g", b""),
        ):
            disk.apply(entry)
        return disk

    def test_kill_keeps_everything(self, crash: Any) -> None:
        cut = self.disk(crash).cut(random.Random(0), crash.Loss.NONE)
        assert cut.image == {"w0/f": b"a" * 512 + b"c" * 1024 + b"a" * 512, "w0/g": b""}
        assert cut.lost == 0

    def test_what_was_flushed_stays(self, crash: Any) -> None:
        seen, disk = set(), self.disk(crash)
        for seed in range(300):
            image = disk.cut(random.Random(seed)).image
            data = image["w0/f"]
            assert len(data) == 2048 and data[:512] == data[1536:] == b"a" * 512
            seen.add((data[512:1024], data[1024:1536], "w0/g" in image))
        pure = [(x[:1], y[:1]) for x, y, _ in seen if len(set(x)) == len(set(y)) == 1]
        wanted = {(x, y) for x in (b"a", b"b", b"c") for y in (b"a", b"c")}
        assert wanted <= set(pure)  # lost, older and reordered versions
        assert any(len(set(x)) == 2 for x, _, _ in seen)  # torn inside a sector
        assert {held for _, _, held in seen} == {True, False}  # the name was not flushed

    def test_a_log_that_is_cut_off_is_refused(self, crash: Any, tmp_path: Path) -> None:
        from powercut.disk import Entry, What, read_trace

        log = struct.pack("<IiQQII", 2, 4, 512, 0, 0, 3) + b"xyz"
        (tmp_path / "trace").write_bytes(log)
        assert read_trace(tmp_path / "trace") == [Entry(What.WRITE, 4, 512, "", b"xyz")]
        for end in (len(log) - 1, 20):
            (tmp_path / "trace").write_bytes(log[:end])
            with pytest.raises(ValueError, match="cut off"):
                read_trace(tmp_path / "trace")

    def flying(self, crash: Any) -> Any:
        """A write through io_uring that is submitted, over one that is durable."""
        from powercut.disk import Entry, What

        disk = crash.Disk({"f": b"a" * 1024})
        disk.apply(Entry(What.OPEN, 4, 0, "f", b""))
        disk.apply(Entry(What.SUBMIT, 4, 0, "", b"b" * 1024, 9))
        return disk

    def test_a_kill_amid_a_ring_write(self, crash: Any) -> None:
        disk = self.flying(crash)
        seen = {disk.cut(random.Random(s), crash.Loss.NONE).image["f"] for s in range(60)}
        a, b = b"a" * 512, b"b" * 512
        assert seen == {a + a, b + b, a + b, b + a}  # not at all, whole, torn

    def test_a_flush_does_not_cover_a_ring_write_under_way(self, crash: Any) -> None:
        from powercut.disk import Entry, What

        disk, a, b = self.flying(crash), b"a" * 512, b"b" * 512
        sync = Entry(What.SYNC, 4, 0, "", b"")
        disk.apply(sync)
        assert disk.cut(random.Random(0), crash.Loss.ALL).image["f"] == a + a
        disk.apply(Entry(What.DONE, -1, 512, "", b"", 9))  # came back short
        assert disk.flying == 0
        assert disk.cut(random.Random(0), crash.Loss.NONE).image["f"] == b + a
        assert disk.cut(random.Random(0), crash.Loss.ALL).image["f"] == a + a
        disk.apply(sync)
        assert disk.cut(random.Random(0), crash.Loss.ALL).image["f"] == b + a

    def test_an_unseen_write_is_refused(
        self, crash: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, engine: str
    ) -> None:
        whole = crash.read_trace
        monkeypatch.setattr(crash, "read_trace", lambda path: whole(path)[:-1])
        with pytest.raises(RuntimeError, match="not complete"):
            crash.record(crash.build_recorder(tmp_path), tmp_path, 2, {}, engine, 40)

    def test_a_recording_of_another_engine_is_refused(self, crash: Any, tmp_path: Path) -> None:
        """A store that says io_uring and does something else would prove nothing."""
        skip_without("uring")
        shim = crash.build_recorder(tmp_path)
        whole = crash._child
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(
                crash,
                "_child",
                lambda mode, path, seed, ops, engine, extra: whole(
                    mode, path, seed, ops, "threads", extra
                ),
            )
            with pytest.raises(RuntimeError, match="0 writes through io_uring"):
                crash.record(shim, tmp_path, 2, {}, "uring", 40)
