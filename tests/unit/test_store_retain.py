"""What hints keep outlives its segments in the chunk store, within its bound, and until it ends."""

from __future__ import annotations

import time
from collections.abc import Iterable
from pathlib import Path

import pytest

from kvoffload.store import Store
from tests.support.store_engines import io_engine  # noqa: F401  (every test runs on both engines)
from tests.unit.test_store_life import CHUNK, SEGMENT, fill, key_of, make, payload_of, settle

IN_SEGMENT = 15  # chunks
PIN = 4


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "store"


def retain(
    store: Store, which: Iterable[int], seconds: float = 600.0, level: int = 0, owner: int = 0
) -> bytes:
    assert store._native is not None
    return store._native.retain(b"".join(map(key_of, which)), seconds, level, owner)


def retained(store: Store, which: Iterable[int], owner: int = 0) -> bytes:
    assert store._native is not None
    return store._native.retained(b"".join(map(key_of, which)), owner)


def there(store: Store, which: Iterable[int]) -> list[int]:
    """Those that are held, with the right bytes."""
    out = []
    for i in which:
        found = store.get(key_of(i))
        if found is not None:
            assert found == payload_of(i)
            out.append(i)
    return out


def most(store: Store) -> int:
    """Chunks that may be kept."""
    return int(store.stats()["retained_max"]) // CHUNK


@pytest.mark.parametrize("segments", [2, 3, 4, 12])
@pytest.mark.parametrize("keeps_up", [True, False])
def test_retained_chunks_outlive_traffic(path: Path, segments: int, keeps_up: bool) -> None:
    """Six times the bound goes through it, with and without a disk that keeps up."""
    with make(path, segments) as store:
        mine = list(range(0, 3 * most(store), 3))[: most(store)]
        for first in range(0, mine[-1] + 1, 8):
            fill(store, first, min(first + 8, mine[-1] + 1))
            retain(store, [i for i in mine if first <= i < first + 8])
        last = mine[-1] + 1
        for i in range(last, last + IN_SEGMENT * segments * 6):
            fill(store, i, i + 1)
            if keeps_up:
                settle(store)
        stats = store.stats()
        assert stats["retained_cut"] == stats["no_space"] == stats["dropped"] == 0
        assert stats["retained_bytes"] == len(mine) * CHUNK <= stats["bytes_max"] / 2
        assert there(store, mine) == mine
        assert not there(store, range(1, last, 3)), "the others went"
        # What is written for a chunk that comes, where half is kept: at most about two.
        put = stats["bytes_written"] - stats["reinserted_bytes"]
        assert stats["reinserted_bytes"] < 1.3 * put
        store.check()
    with make(path, segments) as store:  # in memory only: it is a chunk like any other now
        assert not any(retained(store, mine)) and there(store, mine) == mine
        fill(store, 100_000, 100_000 + IN_SEGMENT * segments * 3)
        assert len(there(store, mine)) < len(mine)
        store.check()


@pytest.mark.parametrize("segments", [2, 4, 12])
def test_a_burst_loses_nothing_that_is_retained(path: Path, segments: int) -> None:
    """Puts faster than the disk: they wait for what is kept to move, not the other way round."""
    with make(path, segments) as store:
        half = most(store)
        fill(store, 0, half)
        retain(store, range(half), level=1)
        assert store._native is not None
        store._native.inject("slow_read_ms", 1)
        for first in range(1000, 1000 + IN_SEGMENT * segments * 4, 60):
            rows = [(key_of(i), payload_of(i)) for i in range(first, first + 60)]
            assert set(store.put_many(rows)) == {0}
        assert store.stats()["retained_cut"] == 0
        assert there(store, range(half)) == list(range(half))
        store.check()


def test_what_is_read_all_the_time_hides_nothing(path: Path) -> None:
    """Segments in use by gets cannot be recycled: not a reason to take one with kept chunks."""
    with make(path, 3) as store:
        native = store._native
        assert native is not None
        half = most(store)
        fill(store, 0, half)
        retain(store, range(half))
        native.inject("slow_read_ms", 3)
        for i in range(1000, 1000 + IN_SEGMENT * 15):
            bufs = [bytearray(CHUNK) for _ in range(4)]
            names = [key_of(k) for k in (0, half - 1, i - 3, i - 20)]
            native.get(i, b"".join(names), bufs)
            fill(store, i, i + 1)
            assert native.wait(i - 8, 5000)
        native.inject("slow_read_ms", 0)
        assert store.stats()["retained_cut"] == 0
        assert there(store, range(half)) == list(range(half))


def test_the_strongest_stay_when_it_is_too_much(path: Path) -> None:
    with make(path, 12) as store:
        half = most(store)
        fill(store, 0, half + 20)
        retain(store, range(10), 600, level=2)
        retain(store, range(10, 20), 30)  # what ends first goes first
        retain(store, range(20, half), 600)
        assert store.stats()["retained_cut"] == 0
        retain(store, range(half, half + 10), 600)
        assert store.stats()["retained_cut"] == 10
        assert retained(store, range(half + 10)) == b"\1" * 10 + bytes(10) + b"\1" * (half - 10)
        retain(store, range(half + 10, half + 20), 1e9, level=PIN)
        assert retained(store, range(10)) == b"\1" * 10, "a higher level outlives a later end"
        assert store.stats()["retained_bytes"] == half * CHUNK
        for i in range(5000, 5000 + IN_SEGMENT * 40):
            fill(store, i, i + 1)
            settle(store)
        assert there(store, range(10)) == list(range(10))
        assert len(there(store, range(half, half + 20))) == 20
        assert not there(store, range(10, 20))
        store.check()


def test_it_ends(path: Path) -> None:
    with make(path, 4) as store:
        fill(store, 0, 9)
        retain(store, range(3), 0.3)
        retain(store, range(3, 6), 600)
        retain(store, range(6, 9), 600, level=PIN)
        retain(store, range(6, 9), 0.3)  # the pin holds on
        assert retained(store, range(9)) == b"\1" * 9
        time.sleep(0.35)
        assert retained(store, range(9)) == bytes(3) + b"\1" * 6
        retain(store, range(3, 6), 0)
        retain(store, range(6, 7), 0, level=PIN)
        assert retained(store, range(9)) == bytes(7) + b"\1" * 2
        retain(store, range(6, 9), 0)  # ends no pin
        assert retained(store, range(6, 9)) == b"\0\1\1"
        fill(store, 100, 100 + IN_SEGMENT * 12)
        assert there(store, range(9)) == [7, 8]
        assert store.stats()["retained_chunks"] == 2 and store.stats()["retained_cut"] == 0
        assert store._native is not None
        store._native.retain_none()
        assert store.stats()["retained_bytes"] == 0
        store.check()
        fill(store, 1000, 1000 + IN_SEGMENT * 12)
        assert not there(store, range(9))


def test_strength_is_the_strongest_askers(path: Path) -> None:
    with make(path, 4) as store:
        fill(store, 0, 4)
        assert retain(store, range(4), 10, owner=7) == bytes(4), "nothing before"
        assert retain(store, range(4), 10, owner=7) == bytes(4), "no news"
        assert retain(store, range(2), 20, owner=7) == b"\1\1", "longer"
        assert retain(store, range(2), 5, level=1, owner=7) == b"\1\1", "higher"
        assert retain(store, range(4, 9), 5) == bytes(5), "not held"
        assert retained(store, range(5), owner=7) == bytes(5)
        assert retained(store, range(5), owner=8) == b"\1\1\1\1\0"
        retain(store, [0], 1, owner=8)
        assert retained(store, range(5), owner=7) == b"\1\0\0\0\0", "several ask"
        retain(store, [1], 1, level=PIN, owner=7)
        assert retained(store, range(5), owner=7) == b"\1\1\0\0\0", "a pin is everybody's"
        store.check()


def test_deleted_and_put_again_it_is_not_retained(path: Path) -> None:
    with make(path, 4) as store:
        fill(store, 0, 2)
        retain(store, range(2))
        store.delete(key_of(0))
        fill(store, 0, 1)
        assert retained(store, range(2)) == b"\0\1"
        assert store.stats()["retained_bytes"] == CHUNK
        store.check()


@pytest.mark.parametrize("fault", ["hang_read", "read_eio", "write_eio"])
def test_a_failing_disk_is_a_miss_and_a_count(path: Path, fault: str) -> None:
    """A rescue that hangs or fails costs what was retained, and a moment: puts go on."""
    with make(path, 3, timeout_s=20.0) as store:
        half = most(store)
        fill(store, 0, half)
        retain(store, range(half))
        fill(store, 100, 100 + 2 * IN_SEGMENT - half)
        assert store._native is not None
        store._native.inject(fault, 1 if fault != "write_eio" else 5)
        begun = time.monotonic()
        for i in range(200, 200 + IN_SEGMENT * 4):
            store.put(key_of(i), payload_of(i))
        assert time.monotonic() - begun < 15
        store._native.inject(fault, 0)
        fill(store, 500, 510)
        assert there(store, range(500, 510)) == list(range(500, 510))
        stats = store.stats()
        lost = half - len(there(store, range(half)))
        assert lost <= stats["retained_cut"]
        assert lost or fault == "hang_read", "while one hangs there may be others to recycle"
        store.check()


def test_retained_late_in_a_full_store(path: Path) -> None:
    """Asked for when everything is written already: what can be saved is."""
    with make(path, 4) as store:
        fill(store, 0, 3 * IN_SEGMENT + 2)
        half = most(store)
        retain(store, range(half))
        fill(store, 1000, 1000 + IN_SEGMENT * 16)
        assert there(store, range(half)) == list(range(half))
        assert store.stats()["retained_cut"] == 0


def test_bad_arguments(path: Path) -> None:
    with make(path, 3) as store:
        for seconds, level in ((-1.0, 0), (float("nan"), 0), (1.0, 5)):
            with pytest.raises(ValueError, match=r"seconds|level"):
                retain(store, [1], seconds, level)
    with make(path, 3, read_only=True) as store:
        assert retain(store, [1]) == b"\0"
    assert SEGMENT // CHUNK == IN_SEGMENT + 1
