"""A segment's life in the chunk store: hot chunks outlive it, clean ones are there ahead of need."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kvoffload.store import Store, open_store
from kvoffload.types import StoreResult
from tests.support.store_engines import io_engine  # noqa: F401  (every test runs on both engines)

KIB = 1 << 10
MIB = 1 << 20
CHUNK = 32 * KIB
SEGMENT = 512 * KIB  # 15 chunks


def key_of(i: int) -> bytes:
    return hashlib.sha256(b"life %d" % i).digest()[:16]


def payload_of(i: int, nbytes: int = CHUNK) -> bytes:
    return np.random.default_rng(i).bytes(nbytes)


def make(path: Path, segments: int, **kw: Any) -> Store:
    """A store that ``segments`` segments and their journals fit into."""
    bound = (segments + 1) * SEGMENT - 64 * KIB
    return open_store(path, **{"max_bytes": bound, "segment_bytes": SEGMENT} | kw)


def fill(store: Store, first: int, last: int) -> None:
    for i in range(first, last):
        assert store.put(key_of(i), payload_of(i)) is StoreResult.OK


def until(true: Callable[[], bool], seconds: float = 10.0) -> bool:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if true():
            return True
        time.sleep(0.005)
    return true()


def settle(store: Store) -> None:
    """Wait until nothing is left to do ahead of need."""
    assert until(lambda: not store.stats()["tidy_pending"])


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "store"


class TestRescue:
    @pytest.mark.parametrize("segments", [3, 12])
    def test_what_is_read_outlives_its_segment(self, path: Path, segments: int) -> None:
        """Five times the bound goes through it; four chunks are read now and then, others never."""
        hot = range(4)
        with make(path, segments) as store:
            fill(store, 0, 12)
            for i in range(12, 15 * segments * 5):
                fill(store, i, i + 1)
                if i % 5 == 0:
                    for j in hot:
                        assert store.get(key_of(j)) == payload_of(j), (j, i)
                settle(store)  # a disk that keeps up
            stats = store.stats()
            assert all(key_of(j) in store for j in hot)
            assert not any(key_of(i) in store for i in range(4, 12))
            assert stats["recycled_segments"] > 2 * segments
            assert stats["reinserted_chunks"] >= 4
            assert stats["reinserted_bytes"] == stats["reinserted_chunks"] * CHUNK
            assert stats["corrupt"] == stats["io_errors"] == 0
            store.check()
        with make(path, segments) as store:  # the new places are in footers and journals
            assert [store.get(key_of(j)) for j in hot] == [payload_of(j) for j in hot]

    def test_at_most_a_quarter_is_written_again(self, path: Path) -> None:
        with make(path, 4) as store:
            for i in range(300):
                fill(store, i, i + 1)
                store.get_many([key_of(j) for j in range(i + 1)])  # everything is hot
                stats = store.stats()
                assert stats["reinserted_bytes"] * 4 <= stats["bytes_written"]
            assert stats["reinserted_bytes"] * 10 > stats["bytes_written"]
            assert stats["recycled_segments"] > 10
            store.check()

    def test_nothing_is_written_again_while_there_is_room(self, path: Path) -> None:
        with make(path, 12) as store:
            for i in range(15 * 9):
                fill(store, i, i + 1)
                assert store.get(key_of(i)) == payload_of(i)
            time.sleep(0.1)
            assert store.stats()["reinserted_chunks"] == 0

    def test_what_is_deleted_meanwhile_stays_deleted(self, path: Path) -> None:
        with make(path, 3) as store:
            for i in range(400):
                fill(store, i, i + 1)
                store.get(key_of(i))
                if i >= 20:
                    store.delete(key_of(i - 20))
            assert not any(key_of(i) in store for i in range(380))
            assert store.flush()
            store.check()
        with make(path, 3) as store:
            assert not any(key_of(i) in store for i in range(380))

    def test_deleted_under_the_rescue(self, path: Path) -> None:
        with make(path, 3) as store:
            native = store._native
            assert native is not None
            fill(store, 0, 45)
            store.get(key_of(0))
            native.inject("slow_read_ms", 300)
            fill(store, 45, 54)  # past half of the segment that comes instead of the oldest
            store.delete(key_of(0))
            native.inject("slow_read_ms", 0)
            settle(store)
            assert key_of(0) not in store and store.stats()["reinserted_chunks"] == 0
            store.check()

    def test_a_victim_that_cannot_be_read(self, path: Path) -> None:
        """Its chunks are misses then; nothing stops."""
        with make(path, 3) as store:
            fill(store, 0, 40)
            store.get_many([key_of(j) for j in range(40)])
            assert store._native is not None
            store._native.inject("read_eio", 1)
            settle(store)
            before = store.stats()["reinserted_chunks"]  # what was read first may have gone
            fill(store, 40, 200)
            store._native.inject("read_eio", 0)
            assert store.stats()["reinserted_chunks"] == before
            assert [store.get(key_of(i)) for i in range(190, 200)] == [
                payload_of(i) for i in range(190, 200)
            ]
            store.check()

    def test_a_hung_read_stops_nobody(self, path: Path) -> None:
        store = make(path, 3, timeout_s=0.3)
        fill(store, 0, 30)
        store.get_many([key_of(j) for j in range(30)])
        assert store._native is not None
        store._native.inject("hang_read", 1)
        fill(store, 40, 200)
        store._native.inject("hang_read", 0)
        assert store.get(key_of(199)) == payload_of(199)
        store.check()
        store.close()


class TestAhead:
    def test_a_put_never_waits_for_a_segment(self, path: Path) -> None:
        with make(path, 12) as store:
            for i in range(15 * 12 * 2):
                fill(store, i, i + 1)
                settle(store)  # a disk that keeps up
            stats = store.stats()
            assert stats["recycled_segments"] > 10
            assert stats["segment_waits"] == 1  # the very first
            assert stats["clean_segments"] == 2
            assert len(store) > 15 * 8
            store.check()

    def test_a_small_store_keeps_none_to_itself(self, path: Path) -> None:
        with make(path, 3) as store:
            fill(store, 0, 100)
            settle(store)
            assert store.stats()["clean_segments"] == 0
            assert store.stats()["segments"] == 3

    def test_new_segments_are_written_once_ahead(self, path: Path) -> None:
        with make(path, 12) as store:
            for i in range(15 * 6):
                fill(store, i, i + 1)
                settle(store)
            stats = store.stats()
            ahead = stats["segments"] - 1  # all but the very first
            assert stats["zeroed_bytes"] == ahead * (SEGMENT - 4096)
            assert [store.get(key_of(i)) for i in range(90)] == [payload_of(i) for i in range(90)]
            for i in range(90, 15 * 40):
                fill(store, i, i + 1)
            settle(store)
            assert store.stats()["zeroed_bytes"] <= 12 * SEGMENT  # recycled ones are not
            store.check()
        with make(path, 12) as store:
            assert store.get(key_of(599)) == payload_of(599)

    def test_zeros_wait_for_loads(self, path: Path) -> None:
        with make(path, 12) as store:
            native = store._native
            assert native is not None
            fill(store, 0, 11)
            settle(store)
            zeroed = store.stats()["zeroed_bytes"]
            native.inject("slow_read_ms", 300)
            native.get(1, key_of(0), [bytearray(CHUNK)])
            fill(store, 11, 14)  # the last quarter of the first segment: the next is made
            assert until(lambda: store.stats()["clean_segments"] == 1)
            assert not native.wait(1, 20) and store.stats()["zeroed_bytes"] == zeroed
            native.inject("slow_read_ms", 0)
            assert native.wait(1, 5000)
            assert until(lambda: store.stats()["zeroed_bytes"] > zeroed)

    def test_zeros_that_cannot_be_written(self, path: Path) -> None:
        """The segment is used as it is, and nothing but a counter says so."""
        with make(path, 12) as store:
            native = store._native
            assert native is not None
            for i in range(15 * 12):
                native.inject("write_eio", 0)
                store.put(key_of(i), payload_of(i))
                native.inject("write_eio", 1 if i % 2 else 0)
                settle(store)
            native.inject("write_eio", 0)
            fill(store, 500, 540)
            assert [store.get(key_of(i)) for i in range(500, 540)] == [
                payload_of(i) for i in range(500, 540)
            ]
            store.check()
