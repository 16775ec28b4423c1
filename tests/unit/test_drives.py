"""Several drives as one store: where chunks go, who reads them, and what a drive that fails costs."""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from kvoffload._core import Arena, SegmentStore, StoreDone
from kvoffload.errors import ConfigError, StoreError
from kvoffload.store import Store, open_store
from kvoffload.tiers.nvme import StripedStore, open_drives
from kvoffload.tiers.nvme.breaker import MAX_PAUSE_S, PAUSE_S, THRESHOLD, Breaker, State
from kvoffload.tiers.nvme.drive import STALL_S, Drive, on_each
from kvoffload.tiers.nvme.requests import GET, PUT
from kvoffload.tiers.nvme.shares import drive_bounds, split_bound
from kvoffload.types import SlotState, StoreResult
from tests.support.disks import tiny_disk  # noqa: F401  (fixture)

MIB = 1 << 20
CHUNK = 64 << 10


def key_of(i: int) -> bytes:
    return hashlib.sha256(b"drive %d" % i).digest()[:16]


def payload_of(i: int) -> bytes:
    return key_of(i) * (CHUNK // 16)


class Clock:
    """Seconds for the breakers, moved by hand."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def paths_of(tmp_path: Path, n: int) -> list[Path]:
    return [tmp_path / f"d{i}" for i in range(n)]


def opened(paths: list[Path], clock: Clock | None = None, bound: int = 8 * MIB) -> Store:
    """Stores of 8 MiB each on the given paths, with a clock of our own."""
    drives = [
        Drive(str(p), SegmentStore(str(p), bound, 512 << 10, io_engine="threads")) for p in paths
    ]
    return Store(StripedStore(drives, clock or Clock()), 20.0)  # type: ignore[arg-type]


def striped(store: Store) -> StripedStore:
    assert isinstance(store._native, StripedStore)
    return store._native


def on(store: Store, i: int) -> SegmentStore:
    native = striped(store)._drives[i].store
    assert native is not None
    return native


def fill(store: Store, start: int, stop: int) -> list[StoreResult]:
    """One request per chunk, so that they go round."""
    return [store.put(key_of(i), payload_of(i)) for i in range(start, stop)]


def held(store: Store, keys: range) -> list[int]:
    """Which are held; what comes back is right."""
    out = []
    for i, found in zip(keys, store.get_many([key_of(i) for i in keys]), strict=True):
        assert found is None or found == payload_of(i)
        if found is not None:
            out.append(i)
    return out


@pytest.fixture
def clock() -> Clock:
    return Clock()


class TestPlacement:
    def test_a_single_path_is_the_native_store(self, tmp_path: Path) -> None:
        for given in (tmp_path / "s", str(tmp_path / "s"), [tmp_path / "s"]):
            with open_store(given, max_bytes=8 * MIB) as store:
                assert isinstance(store._native, SegmentStore)
                assert [d.path for d in store.drives()] == [str(tmp_path / "s")]
                assert store.drives()[0].up

    def test_a_request_stays_together_and_requests_go_round(self, tmp_path: Path) -> None:
        paths = paths_of(tmp_path, 3)
        with opened(paths) as store:
            for run in range(6):
                ids = range(run * 5, run * 5 + 5)
                assert set(store.put_many((key_of(i), payload_of(i)) for i in ids)) == {
                    StoreResult.OK
                }
                holders = {d for i in ids for d in range(3) if on(store, d).length(key_of(i)) >= 0}
                assert len(holders) == 1
            assert [d.entries for d in store.drives()] == [10, 10, 10]
            assert held(store, range(30)) == list(range(30))
            assert all(on(store, d).stats()["hits"] == 10 for d in range(3))  # all drives read
            stats = store.stats()
            assert stats["entries"] == stats["hits"] == 30 and stats["bytes_max"] == 24 * MIB
            assert (stats["drives"], stats["drives_up"]) == (3, 3)
            store.check()
        assert all(len(list(p.rglob("seg-*.kv"))) for p in paths)

    def test_the_least_queued_bytes_first(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        with opened(paths_of(tmp_path, 2)) as store:
            busy = striped(store)._drives[0]

            class Busy:
                def __getattr__(self, name: str) -> object:
                    return (lambda: 1 << 20) if name == "queued_bytes" else getattr(native, name)

            native, busy.store = busy.store, Busy()  # type: ignore[assignment]
            fill(store, 0, 4)
            busy.store = native
            assert [d.entries for d in store.drives()] == [0, 4]

    def test_larger_drives_get_more(self, tmp_path: Path) -> None:
        drives = [
            Drive(str(p), SegmentStore(str(p), size * MIB, 512 << 10))
            for p, size in zip(paths_of(tmp_path, 2), (24, 8), strict=True)
        ]
        with Store(StripedStore(drives)) as store:  # type: ignore[arg-type]
            fill(store, 0, 40)
            assert [d.entries for d in store.drives()] == [30, 10]

    def test_a_held_key_is_not_written_to_another_drive(self, tmp_path: Path) -> None:
        with opened(paths_of(tmp_path, 2)) as store:
            fill(store, 0, 4)
            before = store.stats()["bytes_written"]
            assert set(store.put_many((key_of(i), payload_of(i)) for i in range(6))) == {
                StoreResult.OK
            }
            assert store.stats()["bytes_written"] == before + 2 * CHUNK
            assert len(store) == 6

    def test_misses_lengths_deletes_ls(self, tmp_path: Path) -> None:
        with opened(paths_of(tmp_path, 2)) as store:
            fill(store, 0, 4)
            assert store.get(key_of(9)) is None and store.length(key_of(9)) is None
            assert store.length(key_of(1)) == CHUNK and store.stats()["misses"] == 1
            assert store.get_many([]) == [] and store.put_many([]) == []
            assert [c.key for c in store.ls(3)] == [key_of(3), key_of(2), key_of(1)]
            assert store.delete(key_of(0), key_of(1), key_of(1), key_of(9)) == 2
            assert held(store, range(5)) == [2, 3]
            report = store.verify()
            assert (report.checked, report.bad) == (2, 0)
            assert store.flush()
            native = striped(store)
        with pytest.raises(ValueError, match="closed"):
            native.get(1, bytes(16), [bytearray(1)])

    def test_a_key_that_two_drives_hold_is_listed_once(self, tmp_path: Path) -> None:
        """Written again while one drive was away. The newest row counts, whatever the limit."""
        with opened(paths_of(tmp_path, 2)) as store:
            for i, drive in ((0, 0), (1, 0), (2, 1), (1, 1), (3, 1), (0, 1)):
                native = on(store, drive)
                native.put(100 + i, key_of(i), [payload_of(i)])
                assert native.wait(100 + i, 5000)
                native.poll()
            rows = [(c.key, c.seq) for c in store.ls()]
            newest = {row[0]: row[5] for row in on(store, 1).ls()}
            assert rows == [(key_of(i), newest[key_of(i)]) for i in (0, 3, 1, 2)]
            for limit in range(1, 6):
                assert [(c.key, c.seq) for c in store.ls(limit)] == rows[:limit]
            for newest_n, count in ((0, 4), (2, 2)):
                report = store.export(tmp_path / "f", newest=newest_n, overwrite=True)
                assert (report.chunks, report.lost) == (count, 0)
                with opened([tmp_path / f"to{newest_n}"]) as target:
                    done = target.import_(tmp_path / "f")
                    assert (done.chunks, done.imported) == (count, count)
                    assert held(target, range(4)) == sorted((0, 3, 1, 2)[:count])

    def test_arguments_that_make_no_sense_are_refused_as_a_whole(self, tmp_path: Path) -> None:
        with opened(paths_of(tmp_path, 2)) as store:
            native = striped(store)
            for bad in (b"short", bytes(17)):
                with pytest.raises(ValueError, match="16"):
                    native.contains(bad)
            with pytest.raises(ValueError, match="one buffer per key"):
                native.put(1, bytes(16), [])
            with pytest.raises(ValueError, match="payload"):
                native.put(1, bytes(16), [b""])
            native.put(1, bytes(16), [b"x"])
            with pytest.raises(ValueError, match="in use"):
                native.put(1, bytes(16), [b"x"])
            assert native.wait(1, 5000) and native.wait(2, 0)
            assert [d.job for d in native.poll()] == [1] and native.poll() == []
            native.check()

    def test_slots(self, tmp_path: Path) -> None:
        """The connector's way: put from and get into an arena, some keys held by nobody."""
        n = 8
        arena = Arena.create(4 * MIB, n, 1, False)
        slots = np.arange(n, dtype=np.uint32)
        offsets = slots.astype(np.uint64) * np.uint64(CHUNK)
        depths = np.arange(n, dtype=np.uint32)
        keys = [key_of(i) for i in range(n)]
        with opened(paths_of(tmp_path, 2)) as store:
            native = striped(store)
            generations = np.array([arena.begin_fill(i, 1) for i in range(n)], np.uint64)
            for i in range(n):
                arena.view(i * CHUNK, CHUNK)[:] = payload_of(i)
                arena.hash_leaves(i * CHUNK, CHUNK, keys[i])
                arena.fill_done(i, int(generations[i]))
            for job, part in ((1, slice(0, 4)), (2, slice(4, 7))):  # key 7 is never put
                native.put_slots(
                    job, arena, b"".join(keys[part]), slots[part], generations[part],
                    offsets[part], CHUNK, 7, depths[part],
                )  # fmt: skip
                assert native.wait(job, 5000)
            assert [d.results for d in native.poll()] == [bytes(4), bytes(3)]
            assert [d.entries for d in store.drives()] == [4, 3]
            assert {c.key: (c.namespace, c.depth) for c in store.ls()} == {
                keys[i]: (7, i) for i in range(7)
            }
            arena.view(0, n * CHUNK)[:] = bytes(n * CHUNK)
            generations = np.array([arena.begin_fill(i, 1) for i in range(n)], np.uint64)
            native.get_slots(3, arena, b"".join(keys), slots, generations, offsets, CHUNK)
            assert native.wait(3, 5000)
            (done,) = native.poll()
            assert done.results == bytes(7) + bytes([StoreResult.MISS])
            assert done.nbytes == 7 * CHUNK and done.ns > 0
            assert [arena.state(i) for i in range(n)] == [SlotState.READY] * 7 + [SlotState.FAILED]
            assert all(bytes(arena.view(i * CHUNK, CHUNK)) == payload_of(i) for i in range(7))
            store.check()

    def test_waiting_for_any_job(self, tmp_path: Path) -> None:
        store = opened(paths_of(tmp_path, 2))
        native = striped(store)
        assert not native.wait_any(10_000), "no job is out"
        for i in range(8):
            native.put(i, key_of(i), [payload_of(i)])
        done = 0
        while done < 8:
            assert native.wait_any(10_000)
            done += len(native.poll())
        assert not native.wait_any(10_000)
        # How many each has depends on how quickly it answered; the second one was the other's.
        here, there = (int(on(store, i).stats()["entries"]) for i in (0, 1))
        assert here + there == 8 and min(here, there) > 0
        on(store, 1).inject("hang_read", 1)
        for i in range(8):
            native.get(i, key_of(i), [bytearray(CHUNK)])
        done = 0
        while done < here:
            assert native.wait_any(10_000)
            done += len(native.poll())
        assert done == here and not native.wait_any(20), "the rest hangs"
        on(store, 1).inject("hang_read", 0)
        while done < 8:
            assert native.wait_any(10_000)
            done += len(native.poll())
        native.close()

    def test_many_threads(self, tmp_path: Path) -> None:
        with opened(paths_of(tmp_path, 3)) as store:
            failed: list[BaseException] = []

            def work(base: int) -> None:
                try:
                    for i in range(base, base + 20):
                        assert store.put(key_of(i), payload_of(i)) is StoreResult.OK
                        assert store.get(key_of(i)) == payload_of(i)
                except BaseException as error:
                    failed.append(error)

            threads = [threading.Thread(target=work, args=(100 * t,)) for t in range(6)]
            for t in threads:
                t.start()
            for t in threads:
                t.join()
            assert not failed
            store.check()


class TestRestart:
    def test_another_order_one_removed_one_added(self, tmp_path: Path) -> None:
        a, b, c = paths_of(tmp_path, 3)
        with open_store([a, b], max_bytes=16 * MIB) as store:
            fill(store, 0, 10)
        with open_store([b, a], max_bytes=16 * MIB) as store:
            assert held(store, range(10)) == list(range(10))
        with open_store([b], max_bytes=8 * MIB) as store:
            mine = held(store, range(10))
            assert len(mine) == 5
        with open_store([c, a, b], max_bytes=24 * MIB) as store:
            assert held(store, range(10)) == list(range(10))
            fill(store, 10, 16)
            assert [d.entries for d in store.drives()] == [2, 7, 7]
        with open_store([a, c], max_bytes=16 * MIB) as store:
            assert set(held(store, range(10))) == set(range(10)) - set(mine)

    def test_the_same_directory_or_nested(self, tmp_path: Path) -> None:
        (tmp_path / "link").symlink_to(tmp_path)
        for other in (tmp_path / "d", tmp_path / "d" / "x", tmp_path / "link" / "d"):
            with pytest.raises(ConfigError, match="nvme_path") as caught:
                open_store([tmp_path / "d", other])
            assert "\n" not in str(caught.value)
        assert not (tmp_path / "d").exists()

    def test_a_drive_that_cannot_be_opened(self, tmp_path: Path) -> None:
        a, b = paths_of(tmp_path, 2)
        b.write_text("a file")
        with open_store([a, b], max_bytes=16 * MIB) as store:
            assert set(fill(store, 0, 4)) == {StoreResult.OK}
            assert held(store, range(4)) == [0, 1, 2, 3]
            stats = store.stats()
            assert (stats["drives"], stats["drives_up"]) == (2, 1)
            # Its share is kept for it: the other drive does not grow and shrink with it.
            assert stats["bytes_max"] == 8 * MIB
            up, down = store.drives()
            assert up.up and not down.up and "not a directory" in down.error
            store.check()
        b.unlink()
        a.chmod(0o755)
        with open_store([a, b], max_bytes=16 * MIB) as store:
            assert held(store, range(4)) == []
        b.chmod(0o777)
        with pytest.raises(StoreError) as caught:
            open_store([a, b], max_bytes=16 * MIB)
        assert str(a) in str(caught.value) and str(b) in str(caught.value)


class TestAtExit:
    """No threads can be started once the interpreter is ending."""

    def test_a_store_that_is_closed_then(self, tmp_path: Path) -> None:
        paths = list(map(str, paths_of(tmp_path, 3)))
        script = (
            "import atexit, sys\n"
            "from kvoffload.store import open_store\n"
            "store = open_store(sys.argv[1:], max_bytes=24 << 20)\n"
            "atexit.register(store.close)\n"
            "for i in range(6):\n"
            "    store.put(bytes([i]) * 16, b'x' * 5000)\n"
        )
        done = subprocess.run(
            [sys.executable, "-c", script, *paths], capture_output=True, text=True, timeout=60
        )
        assert (done.returncode, done.stderr) == (0, "")
        for path in paths:  # written by an orderly close, and not by a kill
            assert (Path(path) / "w0" / "lifetime").exists()
        with open_store(paths, max_bytes=24 * MIB) as store:
            assert all(store.get(bytes([i]) * 16) == b"x" * 5000 for i in range(6))

    def test_the_others_are_closed_where_one_fails(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def refuse(*_: object) -> None:
            raise RuntimeError("cannot schedule new futures after interpreter shutdown")

        drives = [Drive(str(p), SegmentStore(str(p), 8 * MIB)) for p in paths_of(tmp_path, 3)]
        monkeypatch.setattr(ThreadPoolExecutor, "submit", refuse)
        seen: list[SegmentStore] = []

        def close(store: SegmentStore) -> int:
            seen.append(store)
            store.close(5000)
            if len(seen) == 1:
                raise OSError("this one")
            return len(seen)

        with pytest.raises(OSError, match="this one"):
            on_each(drives, close)
        assert seen == [d.store for d in drives]
        assert on_each(drives, close) == [4, 5, 6]


class TestShares:
    def test_split(self) -> None:
        assert split_bound(90, [100, 100, 100]) == [30, 30, 30]
        assert split_bound(90, [10, 100, 100]) == [10, 40, 40]
        assert split_bound(90, [100, 5, 20]) == [65, 5, 20]
        assert split_bound(90, [10, 20, -5]) == [10, 20, 0]

    def test_of_real_paths(self, tmp_path: Path, tiny_disk: Path) -> None:  # noqa: F811
        here, there = str(tmp_path / "x" / "y"), str(tiny_disk / "s")
        big, small = drive_bounds([here, there], 64 * MIB)
        assert small <= 6 * MIB and big + small == 64 * MIB
        with open_store([here, there], max_bytes=64 * MIB) as store:
            fill(store, 0, 60)
            # What it wrote is its own: the share stays as it was.
            assert abs(drive_bounds([here, there], 64 * MIB)[1] - small) < MIB
        assert drive_bounds([here, there], None) == [0, 0]

    def test_two_new_stores_on_one_drive_take_half_of_it_together(self, tmp_path: Path) -> None:
        a, b = map(str, paths_of(tmp_path, 2))
        one, two = drive_bounds([a, b], None)
        free = shutil.disk_usage(tmp_path).free
        assert one == two and abs(one - free / 4) < free / 50
        open_store(a, max_bytes=8 * MIB).close()
        assert drive_bounds([a, b], None)[0] == 0  # as it was created


class TestFailingDrive:
    @pytest.fixture
    def store(self, tmp_path: Path, clock: Clock) -> Iterator[Store]:
        store = opened(paths_of(tmp_path, 2), clock)
        fill(store, 0, 12)
        yield store
        store.check()
        store.close()

    def on_drive(self, store: Store, i: int, keys: range) -> list[int]:
        return [k for k in keys if on(store, i).length(key_of(k)) >= 0]

    def test_reads_that_fail_cost_that_drive_only(self, store: Store, clock: Clock) -> None:
        bad = self.on_drive(store, 0, range(12))
        good = [i for i in range(12) if i not in bad]
        on(store, 0).inject("read_eio", 1)
        for _ in range(THRESHOLD):
            assert store.drives()[0].up
            assert held(store, range(12)) == good
        level = store.drives()[0]
        assert (level.up, level.reads, level.trips) == (False, "open", 1)
        assert store.stats()["drives_up"] == 1 and store.stats()["io_errors"] >= THRESHOLD
        assert not any(store.contains(key_of(i)) for i in bad)
        # It is left alone: nothing is read from it or written to it.
        gets = on(store, 0).stats()["gets"]
        assert held(store, range(12)) == good and on(store, 0).stats()["gets"] == gets
        assert set(fill(store, 20, 24)) == {StoreResult.OK}
        assert self.on_drive(store, 1, range(20, 24)) == [20, 21, 22, 23]
        # A trial that fails costs nobody anything and doubles the pause.
        clock.now += PAUSE_S
        store.contains(key_of(0))
        assert on(store, 0).stats()["gets"] == gets + 1
        assert self.settled(store, "open")
        clock.now += PAUSE_S
        assert not store.contains(key_of(bad[0]))
        assert on(store, 0).stats()["gets"] == gets + 1
        # One that works brings all of it back.
        on(store, 0).inject("read_eio", 0)
        clock.now += PAUSE_S
        store.contains(key_of(0))
        assert self.settled(store, "closed")
        assert held(store, range(12)) == list(range(12)) and store.drives()[0].up

    def test_damaged_bytes_only_cost_that_drive_only(self, store: Store, clock: Clock) -> None:
        """Each chunk read so is lost: what a drive loses is bounded by the pauses."""
        bad = self.on_drive(store, 0, range(12))
        good = [i for i in range(12) if i not in bad]
        on(store, 0).inject("flip_read", 1)
        for n in range(THRESHOLD):
            assert store.drives()[0].up
            assert store.get(key_of(bad.pop())) is None
            assert store.get(key_of(good[n])) == payload_of(good[n])
        assert (store.drives()[0].reads, store.drives()[0].trips) == ("open", 1)
        assert held(store, range(12)) == good and store.drives()[1].up
        pause = PAUSE_S
        for trips in (2, 3):  # one request each finds out; nobody asks in between
            clock.now += pause - 1
            assert not store.contains(key_of(bad[-1]))
            clock.now += 1
            assert store.contains(key_of(bad[-1]))
            assert store.get(key_of(bad.pop())) is None
            assert (store.drives()[0].reads, store.drives()[0].trips) == ("open", trips)
            pause *= 2
        assert store.stats()["corrupt"] == THRESHOLD + 2
        on(store, 0).inject("flip_read", 0)
        clock.now += pause
        assert store.contains(key_of(bad[0])), "some outlived it"
        assert held(store, range(12)) == sorted(good + bad) and store.drives()[0].up

    def test_a_trial_that_brings_damaged_bytes(self, store: Store, clock: Clock) -> None:
        bad = self.on_drive(store, 0, range(12))
        on(store, 0).inject("read_eio", 1)
        for _ in range(THRESHOLD):
            store.get(key_of(bad[0]))
        on(store, 0).inject("read_eio", 0)
        on(store, 0).inject("flip_read", 1)
        clock.now += PAUSE_S
        store.contains(key_of(0))
        assert self.settled(store, "open") and store.drives()[0].trips == 2
        clock.now += 2 * PAUSE_S - 1
        assert not store.contains(key_of(bad[1]))
        on(store, 0).inject("flip_read", 0)
        clock.now += 1
        assert store.contains(key_of(bad[1]))
        assert held(store, range(12)) == [i for i in range(12) if i != bad[0]]

    def test_a_damaged_chunk_among_others_is_no_failure(self, store: Store) -> None:
        bad = self.on_drive(store, 0, range(12))
        ask = b"".join(key_of(i) for i in bad[:2])
        native = striped(store)
        drive = native._drives[0]
        judged = []
        for results in (b"\0\2", b"\2\0", b"\2\1", b"\1\1", b"\2\2", b"\2\5", b"\2\3"):
            drive.reads.close()
            native.get(1, ask, [bytearray(CHUNK), bytearray(CHUNK)])
            ((inner, part),) = native._parts.items()
            assert drive.store is not None and drive.store.wait(inner, 5000)
            drive.store.poll()
            drive.out[GET].clear()
            del native._parts[inner]
            native._returned(StoreDone(inner, GET, results, 0, 0), part, 0.0)
            assert [d.job for d in native.poll()] == [1]
            judged.append(drive.reads._failures)
        assert judged == [0, 0, 1, 0, 1, 1, 1]

    def settled(self, store: Store, state: str) -> bool:
        """The trial under way ends in this state."""
        for inner in list(striped(store)._drives[0].out[GET]):
            on(store, 0).wait(inner, 5000)
        striped(store).poll()
        return store.drives()[0].reads == state

    @pytest.mark.parametrize("what", ["write_eio", "enospc"])
    def test_writes_that_fail_go_to_the_next_drive(
        self, store: Store, clock: Clock, what: str
    ) -> None:
        on(store, 0).inject(what, 1)
        assert set(fill(store, 100, 120)) == {StoreResult.OK}
        level = store.drives()[0]
        assert level.writes == "open" and level.reads == "closed" and not level.up
        # Reads go on. (A drive that is full makes room among its own chunks first.)
        assert held(store, range(12)) == list(range(12)) or what == "enospc"
        assert self.on_drive(store, 0, range(100, 120)) == []
        puts = on(store, 0).stats()["puts"]
        fill(store, 120, 124)
        assert on(store, 0).stats()["puts"] == puts
        clock.now += PAUSE_S
        assert fill(store, 130, 131) == [StoreResult.OK]  # the trial; it fails over
        assert on(store, 0).stats()["puts"] == puts + 1
        assert store.drives()[0].writes == "open"
        on(store, 0).inject(what, 0)
        clock.now += 2 * PAUSE_S
        fill(store, 140, 141)
        assert store.drives()[0].writes == "closed"
        assert self.on_drive(store, 0, range(140, 141)) == [140]

    def test_all_drives_fail(self, store: Store) -> None:
        for i in (0, 1):
            on(store, i).inject("write_eio", 1)
            on(store, i).inject("read_eio", 1)
        assert store.put(key_of(50), payload_of(50)) is StoreResult.IO_ERROR
        one, other = (self.on_drive(store, i, range(12))[0] for i in (0, 1))
        for i in (one, other) * THRESHOLD:
            store.get(key_of(i))
        assert store.stats()["drives_up"] == 0
        assert held(store, range(12)) == []
        assert store.put(key_of(51), payload_of(51)) is StoreResult.IO_ERROR
        buffer = bytearray(CHUNK)
        assert store.get_into(key_of(0), buffer) is StoreResult.MISS and buffer == bytes(CHUNK)

    def test_the_last_drive_says_what_is_wrong(self, store: Store) -> None:
        for i in (0, 1):
            on(store, i).inject("read_eio", 1)
        first = self.on_drive(store, 0, range(12))[0]
        second = self.on_drive(store, 1, range(12))[0]
        buffer = bytearray(CHUNK)
        for _ in range(THRESHOLD):
            assert store.get_into(key_of(first), buffer) is StoreResult.MISS
        assert store.get_into(key_of(second), buffer) is StoreResult.IO_ERROR

    def test_too_long_for_a_segment_is_no_fault_of_the_drive(self, store: Store) -> None:
        for i in range(2 * THRESHOLD):
            assert store.put(key_of(200 + i), bytes(600 << 10)) is StoreResult.NO_SPACE
        assert store.stats()["drives_up"] == 2 and store.stats()["drive_trips"] == 0
        # Each key gets its own answer, also where some are held by another drive.
        items = [(key_of(0), payload_of(0)), (key_of(300), bytes(600 << 10))]
        items += [(key_of(i), payload_of(i)) for i in (1, 301, 302)]
        assert [r.name for r in store.put_many(items)] == ["OK", "NO_SPACE", "OK", "OK", "OK"]

    def test_a_hung_read(self, store: Store, clock: Clock) -> None:
        bad = self.on_drive(store, 0, range(12))
        native = striped(store)
        on(store, 0).inject("hang_read", 1)
        buffers = [bytearray(CHUNK) for _ in range(12)]
        native.get(7000, b"".join(key_of(i) for i in range(12)), buffers)
        assert not native.wait(7000, 50) and store.contains(key_of(bad[0]))
        clock.now += STALL_S[GET]
        assert not store.contains(key_of(bad[0]))
        good = [i for i in range(12) if i not in bad]
        assert native.wait(7000, 5000), "it is not waited for any longer"
        (done,) = native.poll()
        ended = [StoreResult.DROPPED if i in bad else StoreResult.OK for i in range(12)]
        assert list(done.results) == ended and done.job == 7000
        assert held(store, range(12)) == good  # at once: the hung drive is not asked
        assert set(fill(store, 60, 64)) == {StoreResult.OK}
        clock.now += PAUSE_S  # the trial hangs as well
        store.contains(key_of(0))
        clock.now += STALL_S[GET]
        store.contains(key_of(0))
        assert store.drives()[0].reads == "open" and store.drives()[0].trips == 2
        native.check()
        on(store, 0).inject("hang_read", 0)
        time.sleep(0.2)  # the reads end, and their bytes go nowhere
        for i, buffer in enumerate(buffers):
            assert bytes(buffer) == (bytes(CHUNK) if i in bad else payload_of(i))
        clock.now += 2 * PAUSE_S
        store.contains(key_of(0))
        assert self.settled(store, "closed") and held(store, range(12)) == list(range(12))

    @pytest.mark.parametrize("busy", [0, 4])
    def test_trials_of_a_drive_that_hangs_for_good(
        self, store: Store, clock: Clock, busy: int
    ) -> None:
        """They do not pile up, whether they hang themselves or behind others."""
        native = striped(store)
        keys = self.on_drive(store, 0, range(12))
        on(store, 0).inject("hang_read", 1)
        for n in range(max(busy, 1)):  # as many as there are threads
            native.get(7000 + n, key_of(keys[n]), [bytearray(CHUNK)])
        time.sleep(0.1)
        clock.now += STALL_S[GET]
        trips = 0
        for _ in range(12):
            store.contains(key_of(0))
            clock.now += MAX_PAUSE_S
            store.contains(key_of(0))
            clock.now += STALL_S[GET]
            native.poll()
            native.poll()  # what the first one has cancelled
            trials = sum(part.job is None for part in native._parts.values())
            assert trials <= (0 if busy else 2)
            trips = store.drives()[0].trips
        assert trips > (10 if busy else 2)
        on(store, 0).inject("hang_read", 0)
        assert all(native.wait(7000 + n, 5000) for n in range(max(busy, 1)))
        while any(part.job is None for part in native._parts.values()):
            native.poll()
        clock.now += MAX_PAUSE_S
        store.contains(key_of(0))
        assert self.settled(store, "closed") and held(store, range(12)) == list(range(12))
        native.check()

    def test_slow_is_not_hung(self, store: Store, clock: Clock) -> None:
        """A job that waits longer than that behind others whose bytes move."""
        native, first = striped(store), self.on_drive(store, 0, range(12))[0]
        on(store, 0).inject("hang_read", 1)
        native.get(7000, key_of(first), [bytearray(CHUNK)])
        for step in range(3):
            clock.now += STALL_S[GET] - 1
            native._drives[0].moved[GET] = (-1 - step, clock.now - 1)  # as if bytes had moved
            assert store.contains(key_of(first))
        clock.now += STALL_S[GET]
        assert not store.contains(key_of(first))
        on(store, 0).inject("hang_read", 0)
        assert native.wait(7000, 5000)

    def test_a_hung_write_from_slots_goes_to_the_next_drive(
        self, store: Store, clock: Clock
    ) -> None:
        """Its job must not hold the write-behind's room for ever."""
        native = striped(store)
        arena = Arena.create(2 * MIB, 1, 1, False)
        generation = arena.begin_fill(0, 1)
        arena.view(0, CHUNK)[:] = payload_of(300)
        arena.hash_leaves(0, CHUNK, key_of(300))
        arena.fill_done(0, generation)
        drive = striped(store)._drives[0]

        class Hung:
            """Takes puts and never answers."""

            def __getattr__(self, name: str) -> object:
                return (lambda *a: None) if name == "put_slots" else getattr(real, name)

        real, drive.store = drive.store, Hung()  # type: ignore[assignment]
        native._drives[1].credit = -1e18
        one = np.zeros(1, np.uint64)
        native.put_slots(
            8000, arena, key_of(300), one.astype(np.uint32), one + np.uint64(generation), one,
            CHUNK, 0, one.astype(np.uint32),
        )  # fmt: skip
        assert list(drive.out[PUT]) and not native.wait(8000, 20)
        clock.now += STALL_S[PUT]
        assert native.wait(8000, 5000)
        drive.store = real
        (done,) = [d for d in native.poll() if d.job == 8000]
        assert done.results == b"\0" and store.get(key_of(300)) == payload_of(300)
        assert store.drives()[0].writes == "open"

    def test_a_directory_that_vanishes(self, store: Store, tmp_path: Path) -> None:
        good = self.on_drive(store, 1, range(12))
        while (tmp_path / "d0").exists():
            shutil.rmtree(tmp_path / "d0", ignore_errors=True)
        for i in range(500, 560):
            assert store.put(key_of(i), payload_of(i)) is StoreResult.OK
            assert store.get(key_of(i)) == payload_of(i)
        assert set(good) <= set(held(store, range(12)))
        assert store.drives()[0].writes == "open" and store.drives()[1].up

    def test_a_full_drive(self, tmp_path: Path, tiny_disk: Path, clock: Clock) -> None:  # noqa: F811
        with opened([tmp_path / "x", tiny_disk / "s"], clock, bound=64 * MIB) as store:
            with (tiny_disk / "hog").open("wb") as hog, pytest.raises(OSError):
                while True:
                    hog.write(bytes(1 << 16))
                    hog.flush()
            assert set(fill(store, 0, 20)) == {StoreResult.OK}
            assert held(store, range(20)) == list(range(20))
            assert [d.writes for d in store.drives()] == ["closed", "open"]
            (tiny_disk / "hog").unlink()
            clock.now += PAUSE_S
            assert set(fill(store, 20, 30)) == {StoreResult.OK}
            assert store.drives()[1].entries > 0 and store.drives()[1].up
            store.check()


class TestBreaker:
    def test_life(self) -> None:
        b = Breaker()
        for job in range(1, THRESHOLD):
            b.failure(job, 0)
        b.success(9)
        for job in range(THRESHOLD):
            assert b.closed
            b.failure(job + 1, 0)
        assert b.state is State.OPEN and not b.trial_due(PAUSE_S - 1) and b.trial_due(PAUSE_S)
        b.begin_trial(50)
        b.success(1)  # sent before it opened
        b.failure(2, PAUSE_S)
        assert b.state is State.TRIAL
        b.undecided(50)
        assert b.trial_due(PAUSE_S)
        b.begin_trial(51)
        b.failure(51, PAUSE_S)
        assert not b.trial_due(3 * PAUSE_S - 1) and b.trial_due(3 * PAUSE_S)
        b.begin_trial(52)
        b.success(52)
        assert b.closed and b.trips == 2
        b.stalled(60, 0)
        assert not b.closed
        b.close_on_trust()
        b.failure(61, 0)
        assert not b.closed
        b.check()

    def test_the_pause_ends(self) -> None:
        b, now = Breaker(), 0.0
        b.stalled(1, now)
        for job in range(2, 20):
            now += MAX_PAUSE_S
            assert b.trial_due(now)
            b.begin_trial(job)
            b.failure(job, now)
            b.check()
        assert not b.trial_due(now + MAX_PAUSE_S - 1)


def test_opened_as_the_engine_does(tmp_path: Path) -> None:
    """Configuration to store; without nvme_gib a store keeps the bound it was created with."""
    a, b = map(str, paths_of(tmp_path, 2))
    with_bound = open_drives([a, b], max_bytes=16 * MIB)
    assert isinstance(with_bound, StripedStore) and with_bound.stats()["bytes_max"] == 16 * MIB
    with_bound.close()
    again = open_drives([b, a])
    assert again.stats()["bytes_max"] == 16 * MIB
    again.close()
