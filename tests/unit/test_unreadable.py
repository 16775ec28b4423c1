"""Chunks that NVMe holds and cannot read: they go, the tier stays."""

from __future__ import annotations

import pytest

from kvoffload.core import reads
from kvoffload.core.breaker import COOL_S
from kvoffload.core.reads import TRIES, FailedReads
from kvoffload.types import ChunkKey, LoadFailure, SlotState, StoreResult
from tests.support.fakes import run_until_idle
from tests.unit.test_manager import TOK, Rig, make

PROMPT = "abcdefgh"


def rig_with(*texts: str) -> Rig:
    rig = make(slots=64)
    for text in texts:
        rig.to_nvme(text)
    return rig


def ask(rig: Rig, text: str, store: bool = True) -> str:
    """Load it; what is missing then is computed, stored and written."""
    lease = rig.load(text)
    went = "miss"
    if lease is not None:
        rig.store.step()
        rig.manager.tick(False)
        went = "hit" if rig.bytes_right(lease) else "failed"
        rig.manager.release(lease.id)
    if store:
        rig.put(text)
    run_until_idle(lambda: rig.manager.tick(False), rig.store)
    rig.manager.reset()  # DRAM forgets it, NVMe does not
    rig.manager.check()
    return went


def key_of(rig: Rig, text: str, chunk: int) -> ChunkKey:
    return rig.chain(text).key(0, chunk)


def test_a_chunk_on_a_bad_sector_costs_three_loads_and_is_written_elsewhere() -> None:
    rig = rig_with(PROMPT, "xy")
    bad = key_of(rig, PROMPT, 3)
    rig.store.unreadable = {bad}
    for again in (False, True):  # written to a bad place once more, it is tried as often as before
        rig.store.unreadable = {bad}
        for _ in range(TRIES):
            assert bad in rig.store.held and rig.manager.counters.nvme_unreadable == again
            assert (ask(rig, PROMPT), ask(rig, "xy")) == ("failed", "hit")
    assert not rig.store.unreadable, "it was written anew"
    assert ask(rig, PROMPT) == "hit"
    c = rig.manager.counters
    assert (c.nvme_io_errors, c.nvme_unreadable, c.nvme_breaker_trips) == (2 * TRIES, 2, 0)


def test_a_bad_region_does_not_turn_the_tier_off_for_good() -> None:
    """Nobody asks meanwhile, so that one of its chunks is all there is to probe with."""
    rig = rig_with("0123456789abcdef", "xy")
    rig.store.unreadable = set(rig.chain("0123456789abcdef").keys(0)[4:])
    assert ask(rig, "0123456789abcdef", store=False) == "failed"
    assert rig.manager.counters.nvme_breaker_trips == 1 and rig.hit("xy") == 0
    for _ in range(30):
        rig.clock.advance(COOL_S / 2)
        rig.manager.tick(False)
        rig.store.step()
        rig.manager.tick(False)
    assert rig.manager.counters.nvme_probes == TRIES - 1
    assert ask(rig, "xy") == "hit"
    went = [ask(rig, "0123456789abcdef") for _ in range(2)]
    rig.clock.advance(COOL_S)
    assert [ask(rig, "xy"), *went] == ["hit", "failed", "miss"]
    assert [ask(rig, "0123456789abcdef") for _ in range(2)] == ["failed", "hit"]
    assert rig.manager.counters.nvme_unreadable == 12


def test_a_disk_that_fails_altogether_loses_nothing() -> None:
    rig = rig_with(PROMPT, "ijklmnop", "xy")
    held = dict(rig.store.held)
    rig.store.read_result = StoreResult.IO_ERROR
    for _ in range(10 * TRIES):
        for text in (PROMPT, "ijklmnop", "xy"):
            assert ask(rig, text, store=False) != "hit"
            rig.clock.advance(COOL_S)
            rig.manager.tick(False)
    assert rig.store.held == held and rig.manager.counters.nvme_unreadable == 0
    rig.store.read_result = None
    for _ in range(2):
        rig.clock.advance(COOL_S)
        rig.manager.tick(False)
        rig.store.step()
        rig.manager.tick(False)
    assert [ask(rig, text) for text in (PROMPT, "ijklmnop", "xy")] == ["hit"] * 3


def test_what_the_store_says_it_holds_and_does_not_give_goes_too() -> None:
    rig = rig_with("a", "xy")
    for _ in range(TRIES):
        rig.store.read_result = StoreResult.MISS
        assert ask(rig, "a", store=False) == "failed"
        rig.store.read_result = None
        assert ask(rig, "xy") == "hit"
    assert rig.manager.counters.nvme_unreadable == 1
    assert key_of(rig, "a", 0) not in rig.store.held
    assert ask(rig, "a") == "miss" and ask(rig, "a") == "hit"
    rig.store.read_result = StoreResult.CORRUPT  # that the store sees to itself
    for _ in range(TRIES):
        assert ask(rig, "a") == "failed"
    assert rig.manager.counters.nvme_unreadable == 1


def test_a_miss_of_what_is_gone_is_no_failure() -> None:
    rig = rig_with("a", "xy")
    for _ in range(TRIES + 1):
        lease = rig.load("a")
        assert lease is not None
        rig.store.lose(key_of(rig, "a", 0))
        rig.store.step()
        rig.manager.tick(False)
        rig.manager.release(lease.id)
        rig.to_nvme("a")
        assert ask(rig, "xy") == "hit"
    assert rig.manager.counters.nvme_unreadable == 0


def test_trouble_that_passes_is_forgotten() -> None:
    rig = rig_with("a", "xy")
    for _ in range(3):
        for _ in range(TRIES - 1):
            rig.store.unreadable = {key_of(rig, "a", 0)}
            assert (ask(rig, "a", store=False), ask(rig, "xy")) == ("failed", "hit")
        rig.store.unreadable = set()
        assert ask(rig, "a") == "hit"
    assert rig.manager.counters.nvme_unreadable == 0


def test_reads_that_were_not_made_say_nothing_about_the_chunk() -> None:
    rig = rig_with("a", "xy")
    for _ in range(TRIES + 1):
        rig.store.read_result = StoreResult.DROPPED
        assert ask(rig, "a", store=False) == "failed"
        rig.store.read_result = None
        assert ask(rig, "xy") == "hit"
    c = rig.manager.counters
    assert c.nvme_unreadable == c.nvme_io_errors == 0 and c.nvme_dropped == TRIES + 1
    assert ask(rig, "a") == "hit"


def test_what_dram_holds_by_then_is_written_again() -> None:
    """Its last read hung, it was computed anew, found on NVMe, and so not written."""
    rig = rig_with("a", "xy")
    bad = key_of(rig, "a", 0)
    rig.store.unreadable = {bad}
    for _ in range(TRIES - 1):
        assert (ask(rig, "a", store=False), ask(rig, "xy")) == ("failed", "hit")
    lease = rig.load("a")
    assert lease is not None
    stuck = rig.store.queue.popleft()
    rig.manager.slot_failed(lease.items[0].ref, LoadFailure.DEADLINE)
    rig.manager.release(lease.id)
    nvme = rig.manager._nvme
    assert nvme is not None
    nvme.breaker.trip(rig.clock.now)
    rig.put("a")
    run_until_idle(lambda: rig.manager.tick(False), rig.store)
    here = rig.manager._pool.index.get(bad)
    assert here is not None and not here.dirty and here.state is SlotState.READY
    rig.store.queue.append(stuck)
    run_until_idle(lambda: rig.manager.tick(False), rig.store)
    rig.manager.check()
    assert rig.manager.counters.nvme_unreadable == 1
    assert bad in rig.store.held and bad not in rig.store.unreadable and not here.dirty
    assert rig.hit("a") == TOK


def test_a_store_that_cannot_tell_or_delete_costs_a_count() -> None:
    rig = rig_with("a", "xy")
    bad = key_of(rig, "a", 0)
    rig.store.unreadable = {bad}
    for _ in range(TRIES - 1):
        assert (ask(rig, "a", store=False), ask(rig, "xy")) == ("failed", "hit")
    rig.store.raising = {"delete"}
    assert ask(rig, "a", store=False) == "failed"
    assert rig.manager.counters.tier_errors == 1 and bad in rig.store.held
    lease = rig.load("a")
    assert lease is not None
    rig.store.raising, rig.store.unreadable = {"contains"}, set()
    rig.store.read_result = StoreResult.MISS
    rig.store.step()
    rig.manager.tick(False)
    assert rig.manager.counters.tier_errors == 2


def test_failures_in_a_row_are_counted_for_the_latest_chunks(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(reads, "REMEMBERED", 3)
    failed = FailedReads()
    keys = [ChunkKey(bytes([n]) * 16) for n in range(5)]
    assert [failed.failed(keys[0]) for _ in range(2)] == [1, 2]
    assert not failed.others_read(keys[0]) and not failed.others_read(keys[1])
    failed.read(keys[1])
    assert failed.others_read(keys[0]) and failed.failed(keys[0]) == 3
    for key in keys[1:4]:
        failed.failed(key)
    assert [failed.failed(key) for key in (keys[3], keys[0])] == [2, 1], "the oldest is forgotten"
    failed.forget(keys[0])
    assert failed.failed(keys[0]) == 1
