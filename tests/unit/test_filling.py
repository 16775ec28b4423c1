"""How many slots a tick asks the slot table about, and that what it does not see yet is right."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice

import numpy as np
import numpy.typing as npt
import pytest

from kvoffload.core.filling import READS_LOOKED
from kvoffload.core.hashchain import Chain
from kvoffload.core.layout import CacheLayout
from kvoffload.core.watch import LOOK_S, STALL_S, SURE_S
from kvoffload.types import LoadFailure, SlotState, StoreResult, Tier
from tests.support.fakes import UNIT, chain_of
from tests.unit.test_manager import ONE, TOK, Rig, make

N = 3 * READS_LOOKED


def numbered(layout: CacheLayout, n: int) -> Chain:
    return chain_of(layout, "".join(chr(0x4E00 + i) for i in range(n)))


def on_disk(rig: Rig, n: int = N) -> Chain:
    """A prompt of ``n`` different chunks that NVMe holds."""
    chain = numbered(rig.layout, n)
    rig.store.held.update({key: key for key in chain.keys(0)})
    return chain


def reading(n: int = N, slots: int = 4 * N) -> tuple[Rig, Chain]:
    rig = make(slots=slots, load="always")
    chain = on_disk(rig, n)
    assert rig.manager.acquire("r", chain, 0, chain.tokens) is not None
    return rig, chain


def asked(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many slots each call of ``states`` is about."""
    counts: list[int] = []
    states = rig.arena.states

    def count(
        slots: npt.NDArray[np.uint32], generations: npt.NDArray[np.uint64]
    ) -> npt.NDArray[np.uint8]:
        counts.append(len(slots))
        return states(slots, generations)

    monkeypatch.setattr(rig.arena, "states", count)
    return counts


def read_one(rig: Rig, chain: Chain, chunk: int) -> None:
    """The disk reads this one first."""
    entry = rig.manager._pool.index.get(chain.key(0, chunk))
    assert entry is not None
    rig.arena.bytes_at[entry.ref.offset] = entry.key
    assert rig.arena.fill_done(entry.ref.slot, entry.ref.generation)


def state_of(rig: Rig, chain: Chain, chunk: int) -> SlotState:
    entry = rig.manager._pool.index.get(chain.key(0, chunk))
    assert entry is not None
    return entry.state


def test_a_tick_asks_about_a_few_of_many_reads_and_about_every_store(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    rig, _ = reading(20_000, 40_000)
    fresh = chain_of(ONE, "stored")
    items = rig.manager.begin_store(fresh, 0, fresh.tokens)
    for item in items:
        rig.arena.worker_store(item)
    counts = asked(rig, monkeypatch)
    rig.manager.tick(True)
    assert READS_LOOKED // 2 + len(items) < counts[0] <= READS_LOOKED + len(items)
    assert len(counts) == 1
    assert rig.manager.store_inflight() == 0 and rig.manager.counters.stored == len(items)


def test_reads_that_come_up_in_order_are_seen_as_they_do() -> None:
    rig, chain = reading()
    for n in range(0, N, READS_LOOKED // 2):
        for _ in range(READS_LOOKED // 2):
            rig.store.step_one_key()
        rig.manager.tick(True)
        assert state_of(rig, chain, n) is SlotState.READY
    rig.manager.check()
    assert all(e.state is SlotState.READY and not e.io for e in rig.manager._pool.index)


def test_a_chunk_that_came_up_far_behind_counts_as_being_read_and_can_be_leased() -> None:
    rig, chain = reading()
    read_one(rig, chain, N - 1)
    rig.manager.tick(True)
    assert state_of(rig, chain, N - 1) is SlotState.FILLING
    hit = rig.manager.lookup(chain, 0, chain.tokens)
    assert hit.end == chain.tokens and hit.by_tier == {Tier.NVME: chain.tokens}
    start = chain.tokens - TOK
    lease = rig.manager.acquire("s", chain, start, chain.tokens)
    assert lease is not None and lease.items[0].tier is Tier.NVME and rig.bytes_right(lease)
    rig.manager.check()


def test_what_a_returned_job_read_is_known_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    rig, chain = reading()
    tail = numbered(ONE, N + 4)
    rig.store.held.update({key: key for key in tail.keys(0)})
    assert rig.manager.acquire("s", tail, chain.tokens, tail.tokens) is not None
    rig.store.queue.rotate(1)  # the short job goes first
    rig.store.step(1)
    counts = asked(rig, monkeypatch)
    rig.manager.tick(True)
    assert len(counts) == 1 and counts[0] <= READS_LOOKED + 4
    for chunk in range(N, N + 4):
        assert state_of(rig, tail, chunk) is SlotState.READY
    rig.manager.check()


@pytest.mark.parametrize("ok", [True, False])
def test_a_job_that_returns_settles_all_it_read(ok: bool) -> None:
    rig, _ = reading()
    rig.store.read_result = None if ok else StoreResult.IO_ERROR
    rig.store.step()
    rig.manager.tick(True)
    rig.manager.check()
    index = rig.manager._pool.index
    assert len(index) == (N if ok else 0)
    assert not any(e.io for e in rig.manager._pool.limbo.values())
    assert all(e.state is SlotState.READY for e in index)


def test_after_a_failed_load_everything_bad_is_known() -> None:
    """Else the chunk that is computed anew would not be stored: it still counts as being read."""
    rig, chain = reading()
    entry = rig.manager._pool.index.get(chain.key(0, N - 1))
    assert entry is not None
    rig.arena.fail(entry.ref.slot, entry.ref.generation)
    rig.manager.tick(True)
    assert entry.key in rig.manager._pool.index
    rig.manager.poll()
    assert entry.key not in rig.manager._pool.index
    rig.manager.check()


def disk_order(rig: Rig, chain: Chain, n: int) -> Iterator[float]:
    """The disk has the last chunks first, ``n`` in each tick; what plans are told at each."""
    for end in range(chain.n_chunks(0), n, -n):
        for chunk in range(end - n, end):
            read_one(rig, chain, chunk)
        rig.clock.advance(0.05)
        rig.manager.tick(True)
        yield rig.manager._loader.standstill_s()


@pytest.mark.parametrize("many", [6_000, 20_000])
def test_reads_get_on_wherever_the_disk_begins(many: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Write-behind puts the tail of a prompt on disk first, and a store reads in disk order."""
    rig, chain = reading(many, many)
    counts = asked(rig, monkeypatch)
    told = list(islice(disk_order(rig, chain, many // 100), 80))
    assert told == [0.0] * 80, "no wait for a disk that gets on"
    looks_at_all = sum(n > READS_LOOKED for n in counts)
    assert looks_at_all <= 80 * 0.05 / SURE_S, "and hardly ever a look at all"
    rig.manager.check()


def test_every_read_has_its_turn() -> None:
    rig, chain = reading(20_000, 20_000)
    for chunk in range(10_000, 20_000):
        read_one(rig, chain, chunk)
    for _ in range(3 * 20_000 // (READS_LOOKED // 2)):  # some change places when others go
        rig.manager.tick(True)
    assert sum(e.state is SlotState.READY for e in rig.manager._pool.index) > 9_900
    rig.manager.check()


def test_what_is_only_found_late_does_not_hide_that_the_tier_hangs() -> None:
    """Half of it came up at once, then the disk hung: each look at some finds more of that."""
    rig, chain = reading(20_000, 20_000)
    for chunk in range(10_000, 20_000):
        read_one(rig, chain, chunk)
    took = 0.0
    while not rig.manager.counters.nvme_stalled and took < 10.0:
        rig.clock.advance(0.05)
        took += 0.05
        rig.manager.tick(True)
    assert took <= SURE_S + STALL_S + 0.2
    rig.manager.check()


def test_a_standstill_is_told_once_all_were_looked_at() -> None:
    rig, _ = reading()
    told = []
    for _ in range(9):
        rig.clock.advance(0.05)
        rig.manager.tick(True)
        told.append(rig.manager._loader.standstill_s())
    assert told[:2] == [0.0, 0.0] and 0.45 - LOOK_S - 0.05 < told[-1] <= 0.45
    rig.manager.check()


def failing(rig: Rig, chain: Chain, chunk: int) -> None:
    """Its bytes turn out to be damaged: its slot fails, and the store lets it go."""
    entry = rig.manager._pool.index.get(chain.key(0, chunk))
    assert entry is not None
    rig.store.corrupt.add(entry.key)
    rig.store.lose(entry.key)
    assert rig.arena.fail(entry.ref.slot, entry.ref.generation)


def test_a_read_that_failed_unseen_is_not_leased() -> None:
    rig, chain = reading()
    failing(rig, chain, N - 8)
    rig.manager.tick(True)
    assert rig.manager.lookup(chain, 0, chain.tokens).end == chain.tokens, "not seen yet"
    assert rig.manager.acquire("s", chain, 0, chain.tokens) is None
    assert rig.manager.counters.lease_lost == 1
    hit = rig.manager.lookup(chain, 0, chain.tokens)
    assert hit.end == (N - 8) * TOK
    lease = rig.manager.acquire("s", chain, 0, hit.end)
    assert lease is not None
    assert all(rig.arena.state(i.ref.slot) != SlotState.FAILED for i in lease.items)
    rig.manager.check()
    rig.store.step()
    rig.manager.tick(True)
    rig.manager.check()


def test_a_read_that_failed_unseen_is_read_again_where_nvme_still_has_it() -> None:
    rig, chain = reading()
    entry = rig.manager._pool.index.get(chain.key(0, N - 8))
    assert entry is not None and rig.arena.fail(entry.ref.slot, entry.ref.generation)
    rig.manager.tick(True)
    lease = rig.manager.acquire("s", chain, chain.tokens - 16 * TOK, chain.tokens)
    assert lease is not None and len(lease.items) == 16
    assert [i.chunk for i in lease.items] == list(range(N - 16, N))
    assert all(rig.arena.state(i.ref.slot) != SlotState.FAILED for i in lease.items)
    rig.manager.check()
    rig.store.step()
    rig.manager.tick(True)
    assert rig.bytes_right(lease)
    rig.manager.check()


def test_one_hanging_drive_does_not_make_the_others_look_still() -> None:
    """The first reads hang, others come up: nothing is given up, and no wait is foreseen."""
    rig, chain = reading()
    for n in range(40):
        rig.clock.advance(STALL_S / 10)
        read_one(rig, chain, N - 1 - n)
        rig.manager.tick(True)
        nvme = rig.manager._nvme
        assert nvme is not None and nvme.standstill_s() <= LOOK_S + STALL_S / 10
    assert rig.manager.counters.nvme_stalled == 0


def test_all_are_looked_at_before_reads_are_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    rig, chain = reading()
    counts = asked(rig, monkeypatch)
    read_one(rig, chain, N - 1)
    rig.clock.advance(STALL_S * 1.1)  # no tick for so long
    rig.manager.tick(True)
    assert counts == [N] and rig.manager.counters.nvme_stalled == 0
    rig.clock.advance(STALL_S * 0.95)
    rig.manager.tick(True)
    assert counts == [N, N - 1]
    read_one(rig, chain, N - 2)
    rig.clock.advance(STALL_S * 0.1)
    rig.manager.tick(True)
    assert rig.manager.counters.nvme_stalled == 0, "a look at all was just before"
    rig.clock.advance(STALL_S * 1.1)
    rig.manager.tick(True)
    assert rig.manager.counters.nvme_stalled == 1
    del counts[:]
    rig.clock.advance(1.0)
    rig.manager.tick(True)
    assert counts in ([], [1]), "what was given up is looked at when its job returns"
    rig.manager.check()


def test_a_read_dropped_under_a_lease_ends_well_for_who_waits() -> None:
    rig, chain = reading()
    lease = rig.manager.acquire("s", chain, chain.tokens - TOK, chain.tokens)
    assert lease is not None
    rig.manager.reset()
    rig.manager.tick(True)
    rig.manager.check()
    rig.store.step()
    rig.manager.tick(True)
    rig.manager.check()
    assert rig.bytes_right(lease), "a reset does not take the bytes from under a lease"
    rig.manager.release(lease.id)
    rig.manager.release(1)
    assert rig.manager.occupancy().slots_used == 0
    rig.manager.check()


def test_bytes_being_read_are_known_without_counting() -> None:
    rig, chain = reading()
    nvme = rig.manager._nvme
    assert nvme is not None and rig.manager.levels().reading_bytes == N * UNIT
    other = chain_of(ONE, "xy")
    rig.store.held.update({key: key for key in other.keys(0)})
    loader = rig.manager._loader
    assert loader.ahead(other, 0, other.tokens) == N * UNIT
    assert loader.ahead(chain, 0, chain.tokens) == 0
    for entry in list(rig.manager._pool.index):
        rig.manager.slot_failed(entry.ref, LoadFailure.CORRUPT)
    assert not rig.manager.reading() and loader.ahead(other, 0, other.tokens) == 0
    rig.manager.check()
    rig.store.step()
    rig.manager.tick(True)
    assert rig.manager.levels().reading_bytes == 0
    rig.manager.check()


def test_a_reset_does_not_offer_each_chunk_before_it_goes(monkeypatch: pytest.MonkeyPatch) -> None:
    """From the leaves on, each parent would become a leaf: half as much work again, and the engine
    stands still meanwhile."""
    rig = make(slots=256)
    for text in ("a" * 60, "a" * 30 + "b" * 30, "c" * 60):
        rig.put(text)
    lease = rig.load("a" * 10)
    assert lease is not None
    offered: list[bytes] = []
    policy = rig.manager._pool.index._policies[0]
    monkeypatch.setattr(policy, "offer", offered.append)
    rig.manager.reset()
    rig.manager.check()
    assert not offered and rig.manager.occupancy().slots_used == 10 and rig.bytes_right(lease)
    rig.manager.release(lease.id)
    assert rig.manager.occupancy().slots_used == 0
    rig.manager.check()
