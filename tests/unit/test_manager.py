"""The Manager over fake arena and store: every path of a slot's life, and every fault as a miss."""

from __future__ import annotations

import random
from dataclasses import dataclass, field, replace

import pytest

from kvoffload.core import weigh
from kvoffload.core.breaker import COOL_S
from kvoffload.core.hashchain import Chain
from kvoffload.core.lookup import Search, span
from kvoffload.core.manager import Lease, Manager
from kvoffload.core.planner import DEADLINE_FLOOR_S, DEADLINE_LEAST_S
from kvoffload.core.pool import STORE_TIMEOUT_S
from kvoffload.core.prefill import PrefillWork
from kvoffload.core.sizes import slots_needed
from kvoffload.core.watch import MAX_STALLS, STALL_S
from kvoffload.core.writebehind import INFLIGHT_BUSY_BYTES, INFLIGHT_FLOOR_BYTES
from kvoffload.errors import ConfigError
from kvoffload.tiers.null import NullStore
from kvoffload.types import (
    CacheLayout,
    Decision,
    GroupKind,
    LoadFailure,
    SlotState,
    StoreResult,
    Tier,
)
from tests.support.fakes import (
    UNIT,
    FakeArena,
    FakeClock,
    FakeStore,
    chain_of,
    full_group,
    layout_of,
    run_until_idle,
    sliding_group,
)

ONE = layout_of(full_group())  # chunk = block = 16 tokens = 1 MiB
TOK = 16


@dataclass
class Rig:
    layout: CacheLayout
    arena: FakeArena
    store: FakeStore
    manager: Manager
    clock: FakeClock
    seen: list[Lease] = field(default_factory=list)

    def chain(self, text: str) -> Chain:
        return chain_of(self.layout, text)

    def put(self, text: str, start: int = 0) -> None:
        """Store a whole prompt into DRAM."""
        chain = self.chain(text)
        for item in self.manager.begin_store(chain, start, chain.tokens):
            self.arena.worker_store(item)
        self.manager.poll()
        self.manager.check()

    def to_nvme(self, text: str) -> None:
        """Store, write behind, and forget DRAM."""
        self.put(text)
        run_until_idle(lambda: self.manager.tick(False), self.store)
        self.manager.reset()
        self.manager.check()

    def hit(self, text: str, start: int = 0) -> int:
        chain = self.chain(text)
        return self.manager.lookup(chain, start, chain.tokens).end

    def load(self, text: str, start: int = 0, owner: str = "r") -> Lease | None:
        chain = self.chain(text)
        lease = self.manager.acquire(owner, chain, start, self.hit(text, start))
        self.manager.check()
        return lease

    def bytes_right(self, lease: Lease) -> bool:
        return all(
            self.arena.state(i.ref.slot) == SlotState.READY
            and self.arena.bytes_at[i.ref.offset] == i.key
            for i in lease.items
        )


def make(
    slots: int = 16,
    layout: CacheLayout = ONE,
    policy: str = "lru",
    max_entries: int = 1 << 30,
    write_tb_per_day: float | None = 1000.0,
    load: str = "auto",
) -> Rig:
    clock = FakeClock()
    arena = FakeArena(slots * UNIT, slots_needed(layout, slots * UNIT))
    store = FakeStore(max_entries, clock)
    manager = Manager(
        layout,
        arena,
        store,
        policy=policy,
        load=load,
        write_tb_per_day=write_tb_per_day,
        nvme_bytes=1 << 40,
        nvme_admission="all",  # what is judged: test_admission.py
        clock=clock,
    )
    return Rig(layout, arena, store, manager, clock)


# -- store and hit


def test_store_then_hit_then_lease() -> None:
    rig = make()
    chain = rig.chain("abcd")
    items = rig.manager.begin_store(chain, 0, chain.tokens)
    assert [i.chunk for i in items] == [0, 1, 2, 3] and rig.manager.store_inflight() == 4
    assert rig.hit("abcd") == 0, "bytes that are not in yet are no hit"
    for item in items[:2]:
        rig.arena.worker_store(item)
    rig.manager.poll()
    assert rig.hit("abcd") == 2 * TOK and rig.manager.store_inflight() == 2
    for item in items[2:]:
        rig.arena.worker_store(item)
    rig.manager.poll()
    assert rig.manager.stores_settled() == [i.key for i in items]
    assert rig.manager.stores_settled() == []
    hit = rig.manager.lookup(chain, 0, chain.tokens)
    assert (hit.end, hit.chunks, hit.by_tier) == (64, 4, {Tier.DRAM: 64})
    lease = rig.load("abcd")
    assert lease is not None and rig.bytes_right(lease) and len(lease.items) == 4
    assert lease.tokens_by_tier == {Tier.DRAM: 64}
    assert rig.manager.begin_store(chain, 0, chain.tokens) == [], "held chunks are not stored again"


def test_hits_end_on_the_limit_and_share_prefixes() -> None:
    rig = make()
    rig.put("abcd")
    assert rig.hit("abxy") == 2 * TOK and rig.hit("xbcd") == 0
    chain = rig.chain("abcd")
    assert rig.manager.lookup(chain, 0, 3 * TOK + 5).end == 3 * TOK
    assert rig.manager.lookup(chain, 2 * TOK, 2 * TOK).end == 2 * TOK
    c = rig.manager.counters
    assert (c.lookups, c.lookup_hits, c.lookup_misses) == (4, 2, 2)


def test_only_chunks_above_the_local_hit_are_needed() -> None:
    layout = layout_of(full_group(blocks=2))
    rig = make(layout=layout)
    rig.put("aabbcc")
    first = rig.chain("aabbcc").key(0, 0)
    assert rig.manager.slot_failed(first, LoadFailure.CORRUPT)
    assert rig.hit("aabbcc") == 0 and rig.hit("aabbcc", 32) == 96
    # HBM ends inside chunk 1: it is needed, chunk 0 is not.
    lease = rig.load("aabbcc", start=48)
    assert lease is not None and [i.chunk for i in lease.items] == [1, 2]
    assert lease.tokens_by_tier == {Tier.DRAM: 48}
    assert rig.hit("aabbcc", start=16) == 16


def test_begin_store_takes_chunks_that_end_in_the_range() -> None:
    rig = make(layout=layout_of(full_group(blocks=2)))
    chain = rig.chain("aabbcc")
    items = rig.manager.begin_store(chain, 32, 80)
    assert [i.chunk for i in items] == [1]
    assert [i.chunk for i in rig.manager.begin_store(chain, 31, 96)] == [0, 2]


def test_failed_and_aborted_stores_leave_nothing() -> None:
    rig = make()
    chain = rig.chain("abc")
    items = rig.manager.begin_store(chain, 0, chain.tokens)
    rig.arena.worker_store(items[0])
    rig.arena.worker_store(items[1], ok=False)
    rig.manager.abort_store(items[2:])
    rig.manager.poll()
    rig.manager.abort_store(items)  # READY and gone ones are left alone
    rig.manager.check()
    assert rig.hit("abc") == TOK and rig.manager.occupancy().slots_used == 1
    c = rig.manager.counters
    assert (c.store_failed, c.store_aborted, c.stored) == (1, 1, 1)


@pytest.mark.parametrize("where", ["admission", "hints", "need"])
def test_a_store_that_breaks_half_begun_leaves_nothing(
    where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No worker hears of its slots, and the caller has no items to give back."""
    layout = layout_of(full_group(), sliding_group(1, window=32))
    rig = make(slots=32, layout=layout)
    rig.put("ab")
    pool, nvme, chain = rig.manager._pool, rig.manager._nvme, rig.chain("abcdef")
    assert nvme is not None
    calls = iter(range(100))

    def broken(*_: object) -> bool:
        if next(calls) == 2:
            raise ZeroDivisionError
        return True

    with monkeypatch.context() as patch:
        if where == "admission":
            patch.setattr(nvme, "stored", broken)
        elif where == "hints":
            patch.setattr(pool, "on_add", broken)
        with pytest.raises(ZeroDivisionError):
            rig.manager.begin_store(chain, 0, chain.tokens, broken if where == "need" else None)
    rig.manager.check()
    occupied = rig.manager.occupancy()
    assert (occupied.slots_used, occupied.slots_quarantined) == (4, 0)
    assert rig.manager.store_inflight() == 0 and rig.hit("abcdef") == 2 * TOK
    rig.put("abcdef")
    assert rig.hit("abcdef") == 6 * TOK


def test_a_store_without_an_answer_is_quarantined_until_it_settles() -> None:
    rig = make(slots=4)
    item = rig.manager.begin_store(rig.chain("a"), 0, 16)[0]
    rig.clock.advance(STORE_TIMEOUT_S + 1)
    rig.manager.tick(False)
    rig.manager.check()
    o = rig.manager.occupancy()
    assert rig.manager.counters.store_timeout == 1 and o.slots_quarantined == 1
    assert rig.manager.store_inflight() == 0
    again = rig.manager.begin_store(rig.chain("a"), 0, 16)[0]
    assert again.ref.slot != item.ref.slot
    for text in "bcdef":
        for other in rig.manager.begin_store(rig.chain(text), 0, 16):
            assert other.ref.slot != item.ref.slot
    rig.arena.worker_store(item)  # the late copy lands in its own slot
    rig.manager.tick(False)
    rig.manager.check()
    assert rig.manager.occupancy().slots_quarantined == 0


def test_all_writing_ranks_must_answer_and_a_failed_rank_delays_reuse() -> None:
    layout = layout_of(full_group(ranks=2), world_size=2)
    rig = make(slots=4, layout=layout)
    a, b = rig.manager.begin_store(rig.chain("ab"), 0, 32)
    rig.arena.worker_store(a, ranks=(0,))
    rig.manager.poll()
    assert rig.hit("ab") == 0
    rig.arena.worker_store(a, ranks=(1,))
    rig.arena.worker_store(b, ranks=(1,), ok=False)  # rank 0 may still be copying into b
    rig.manager.poll()
    rig.manager.check()
    assert rig.hit("ab") == 16 and rig.manager.occupancy().slots_quarantined == 1
    rig.clock.advance(STORE_TIMEOUT_S + 1)
    rig.manager.poll()
    rig.manager.check()
    assert rig.manager.occupancy().slots_quarantined == 0


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_spoiled_store_keeps_its_slot_out_of_use(ranks: int) -> None:
    """Its copy may still be running: what reuses the slot must not meet it."""
    layout = layout_of(full_group(ranks=ranks), world_size=ranks)
    rig = make(slots=4, layout=layout)
    (item,) = rig.manager.begin_store(rig.chain("a"), 0, 16)
    assert rig.manager.spoil_store(item.ref.slot, item.ref.generation)
    rig.manager.poll()
    rig.manager.check()
    assert rig.hit("a") == 0 and rig.manager.occupancy().slots_quarantined == 1
    for text in "bcdef":
        others = rig.manager.begin_store(rig.chain(text), 0, 16)
        assert all(other.ref.slot != item.ref.slot for other in others)
        rig.manager.abort_store(others)
    rig.clock.advance(STORE_TIMEOUT_S + 1)
    rig.manager.poll()
    rig.manager.check()
    assert rig.manager.occupancy().slots_quarantined == 0


# -- eviction


def test_leaves_go_first_and_leases_protect() -> None:
    rig = make(slots=4)
    rig.put("abcd")
    lease = rig.load("ab")
    assert lease is not None
    rig.put("xyz")
    assert rig.hit("abcd") == 32 and rig.hit("xyz") == 32, "c and d went, a and b are leased"
    assert rig.manager.counters.store_skipped_full == 1
    rig.manager.release(lease.id)
    rig.manager.release(lease.id)
    rig.put("xyz")
    assert rig.hit("abcd") == 16 and rig.hit("xyz") == 48


def test_a_prompt_longer_than_the_arena_never_evicts_itself() -> None:
    rig = make(slots=4)
    text = "abcdefgh"
    for n in range(1, 9):
        rig.put(text[:n])
    assert rig.hit(text) == 64 and rig.manager.counters.evicted == 0
    assert rig.manager.counters.store_skipped_full > 0


def test_evicting_what_nvme_lacks_is_counted() -> None:
    rig = make(slots=4)
    rig.put("abcd")
    rig.put("wxyz")
    c = rig.manager.counters
    assert (c.evicted, c.evicted_unwritten, c.evicted_bytes) == (4, 4, 4 * UNIT)
    run_until_idle(lambda: rig.manager.tick(False), rig.store)
    rig.put("abcd")
    assert (c.evicted, c.evicted_unwritten) == (8, 4) and c.nvme_written == 4


def test_fifo_policy_runs_the_same_manager() -> None:
    rig = make(slots=4, policy="fifo")
    rig.put("ab")
    rig.put("xy")
    assert rig.load("ab") is not None  # touching does not matter, the lease does
    rig.put("mn")
    assert rig.hit("ab") == 32 and rig.hit("xy") == 0 and rig.hit("mn") == 32


@pytest.mark.parametrize("policy", ["adaptive", "lru"])
def test_value_is_what_the_engine_takes_to_compute_a_chunk_at_its_depth(policy: str) -> None:
    """Nothing while that is not known; then a deep chunk that came back stays longer."""
    rig = make(policy=policy)

    def heat_of_deep_and_shallow(deep: str, shallow: str) -> tuple[int, int]:
        rig.put(deep)
        rig.put(shallow)
        for text in (deep, shallow):
            lease = rig.load(text)
            assert lease is not None
            rig.manager.release(lease.id)
        index = rig.manager._pool.index
        keys = rig.chain(deep).key(0, len(deep) - 1), rig.chain(shallow).key(0, 0)
        a, b = (index.get(k) for k in keys)
        assert a is not None and b is not None
        seconds = rig.manager.recompute_seconds(a.chunk * TOK, (a.chunk + 1) * TOK)
        assert index._value(a) == (None if seconds is None else seconds / UNIT)
        return index.heat(a), index.heat(b)

    old, young = heat_of_deep_and_shallow("abcdef", "g")
    assert old < young, "not known: the least recently used first"
    for end in (512, 4096, 32768):
        took = end * (1e-6 + 1e-6 * end / 2)  # hardly anything but attention
        rig.manager.observe_prefill(PrefillWork.span(0, end), took)
    old, young = heat_of_deep_and_shallow("klmnop", "q")
    assert (old > young) == (policy == "adaptive")
    rig.manager.check()


def test_an_extent_moves_to_the_class_that_needs_it() -> None:
    layout = layout_of(full_group(0), sliding_group(1, window=16, slot_bytes=2 * UNIT))
    rig = make(slots=8, layout=layout)  # two extents of 4 MiB
    chain = rig.chain("abcdefgh")
    small = rig.manager.begin_store(chain, 0, 128, need=lambda g, i: False)
    for item in small:
        rig.arena.worker_store(item)
    rig.manager.poll()
    assert len(small) == 8
    items = rig.manager.begin_store(chain, 0, 32)
    assert {i.group for i in items} == {1} and rig.manager.counters.reclaimed_extents >= 1
    rig.manager.check()


# -- NVMe


def test_write_behind_then_back_from_nvme() -> None:
    rig = make()
    rig.to_nvme("abcd")
    chain = rig.chain("abcd")
    hit = rig.manager.lookup(chain, 0, 64)
    assert (hit.end, hit.by_tier) == (64, {Tier.NVME: 64})
    lease = rig.load("abcd")
    assert lease is not None and {i.tier for i in lease.items} == {Tier.NVME}
    assert lease.tokens_by_tier == {Tier.NVME: 64}
    assert not rig.bytes_right(lease)
    rig.store.step()
    assert rig.bytes_right(lease), "the worker needs no poll to see READY"
    rig.manager.poll()
    rig.manager.release(lease.id)
    rig.manager.check()
    c = rig.manager.counters
    assert (c.nvme_read, c.nvme_read_bytes, c.nvme_written) == (4, 4 * UNIT, 4)
    assert rig.manager.lookup(chain, 0, 64).by_tier == {Tier.DRAM: 64}
    run_until_idle(lambda: rig.manager.tick(False), rig.store)
    assert c.nvme_written == 4, "what came from NVMe is not written again"
    assert rig.manager.begin_store(chain, 0, 64) == []


def test_a_read_is_shared() -> None:
    rig = make()
    rig.to_nvme("abcd")
    one, two = rig.load("abcd", owner="1"), rig.load("ab", owner="2")
    assert one is not None and two is not None and len(rig.store.queue) == 1
    assert [i.ref for i in one.items[:2]] == [i.ref for i in two.items]
    rig.manager.release(one.id)
    rig.store.step()
    rig.manager.poll()
    assert rig.bytes_right(two)


@pytest.mark.parametrize(
    ("spoil", "counter"),
    [("corrupt", "nvme_corrupt"), ("lose", "nvme_miss"), ("io", "nvme_io_errors")],
)
def test_bad_reads_are_misses(spoil: str, counter: str) -> None:
    rig = make()
    rig.to_nvme("abc")
    key = rig.chain("abc").key(0, 1)
    lease = rig.load("abc")
    assert lease is not None
    if spoil == "corrupt":
        rig.store.corrupt.add(key)
    elif spoil == "lose":
        rig.store.lose(key)
    else:
        rig.store.read_result = StoreResult.IO_ERROR
    rig.store.step()
    assert rig.arena.state(lease.items[1].ref.slot) == SlotState.FAILED
    rig.manager.poll()
    rig.manager.check()
    assert getattr(rig.manager.counters, counter) >= 1
    assert rig.manager.occupancy().slots_quarantined >= 1, "the lease still names the slot"
    rig.manager.release(lease.id)
    rig.manager.check()
    assert rig.manager.occupancy().slots_quarantined == 0
    if spoil != "io":
        assert rig.hit("abc") == TOK


def test_a_released_read_keeps_its_slot_until_it_returned() -> None:
    rig = make(slots=4)
    rig.to_nvme("abcd")
    lease = rig.load("abcd")
    assert lease is not None
    rig.manager.release(lease.id)
    rig.manager.reset()
    assert rig.manager.occupancy().slots_quarantined == 4
    assert rig.manager.begin_store(rig.chain("x"), 0, 16) == []
    rig.store.step()  # FakeStore asserts that the slots were not reused
    rig.manager.poll()
    rig.manager.check()
    assert rig.manager.occupancy().slots_used == 0


def test_partial_hit_mixes_tiers() -> None:
    rig = make()
    rig.to_nvme("abcd")
    lease = rig.load("ab")
    assert lease is not None
    rig.store.step()
    rig.manager.poll()
    hit = rig.manager.lookup(rig.chain("abcd"), 8, 64)
    assert hit.by_tier == {Tier.DRAM: 24, Tier.NVME: 32}


def test_no_room_and_vanished_chunks_give_no_lease_and_no_leak() -> None:
    rig = make(slots=4)
    rig.to_nvme("abcdef")
    assert rig.hit("abcd") == 64
    rig.put("x")
    held = rig.load("x")
    assert held is not None and rig.load("abcd") is None
    assert rig.manager.counters.lease_no_room == 1
    rig.manager.release(held.id)
    rig.store.lose(rig.chain("ab").key(0, 1))
    assert rig.manager.acquire("r", rig.chain("ab"), 0, 32) is None
    assert rig.manager.counters.lease_lost == 1
    assert rig.manager.acquire("r", rig.chain("ab"), 0, 48) is None, "beyond the chain"
    rig.manager.check()


def test_a_lease_that_fails_for_room_lets_go_of_what_it_had() -> None:
    rig = make(slots=4)
    chain = rig.chain("abcdef")
    rig.store.held = {k: k for k in chain.keys(0)}  # more than DRAM has room for
    first = rig.load("ab")
    assert first is not None
    rig.store.step()
    rig.manager.poll()
    rig.manager.release(first.id)
    assert rig.load("abcdef") is None and rig.manager.counters.lease_no_room == 1
    assert rig.manager.occupancy().slots_pinned == 0
    rig.put("wxyz")
    assert rig.hit("wxyz") == 64


def test_a_read_whose_slot_cannot_be_confirmed_is_a_miss() -> None:
    rig = make()
    rig.to_nvme("ab")
    lease = rig.load("ab")
    assert lease is not None
    rig.arena.raising.add("states")
    rig.store.step()
    rig.manager.poll()
    rig.manager.check()
    assert rig.manager.occupancy().slots_quarantined == 2
    rig.manager.release(lease.id)
    rig.arena.raising.clear()
    rig.manager.poll()
    rig.manager.check()
    assert rig.manager.occupancy().slots_used == 0 and rig.hit("ab") == 32


def test_write_behind_waits_for_loads_and_stays_within_its_bounds() -> None:
    rig = make(slots=128)
    rig.to_nvme("ab")
    chain = rig.chain("z" * 100)
    for item in rig.manager.begin_store(chain, 0, chain.tokens):
        rig.arena.worker_store(item)
    lease = rig.load("ab")
    assert lease is not None
    rig.manager.tick(False)
    o = rig.manager.occupancy()
    # Only a trickle while loads are being read, oldest first.
    assert o.nvme_inflight_write_bytes == INFLIGHT_FLOOR_BYTES
    assert o.nvme_inflight_read_bytes == 2 * UNIT
    assert rig.store.queue[-1].keys[0] == chain.key(0, 0)
    while rig.store.queue:
        rig.store.step()
    rig.manager.tick(True)
    assert rig.manager.occupancy().nvme_inflight_write_bytes == 16 * UNIT
    assert rig.store.queue[0].keys[0] == chain.key(0, INFLIGHT_FLOOR_BYTES // UNIT)
    rig.manager.tick(False)
    assert rig.manager.occupancy().nvme_inflight_write_bytes == 64 * UNIT
    rig.manager.check()


def test_the_write_budget_holds() -> None:
    rig = make(slots=16, write_tb_per_day=0.0)
    rig.put("abcd")
    rig.manager.tick(False)
    assert not rig.store.queue
    clock, arena = FakeClock(), FakeArena(2048 * UNIT, 2048)
    store = FakeStore(clock=clock)
    manager = Manager(
        ONE, arena, store, nvme_bytes=86400 * UNIT // 8, nvme_admission="all", clock=clock
    )
    chain = chain_of(ONE, "q" * 2000)
    for item in manager.begin_store(chain, 0, chain.tokens):
        arena.worker_store(item)
    run_until_idle(lambda: manager.tick(False), store, 500)
    burst = max(86400 // 80, 1024)
    assert manager.counters.nvme_written == burst
    clock.advance(80.0)
    run_until_idle(lambda: manager.tick(False), store, 500)
    assert manager.counters.nvme_written == burst + 10


def test_dropped_writes_are_tried_again_and_lost_ones_given_up() -> None:
    rig = make()
    rig.put("a")
    rig.store.write_result = StoreResult.DROPPED
    rig.manager.tick(False)
    rig.store.step()
    rig.store.write_result = None
    run_until_idle(lambda: rig.manager.tick(False), rig.store)
    assert rig.manager.counters.nvme_dropped == 1 and rig.manager.counters.nvme_written == 1
    rig.put("b")
    rig.store.write_result = StoreResult.NO_SPACE
    run_until_idle(lambda: rig.manager.tick(False), rig.store)
    assert rig.manager.counters.nvme_no_space == 1 and rig.manager.occupancy().dirty_chunks == 1
    assert rig.hit("b") == 16


def test_drain_writes_hottest_first_and_flushes() -> None:
    rig = make()
    for text in ("ab", "xy", "mn"):
        rig.put(text)
    lease = rig.load("ab")
    assert lease is not None
    assert rig.manager.drain(5.0)
    keys = [k for kind, k in rig.store.order if kind == 0]
    order = [rig.chain(t).key(0, i) for t in ("ab", "mn", "xy") for i in (0, 1)]
    assert keys == order and rig.manager.occupancy().dirty_chunks == 0
    rig.manager.close()
    rig.manager.close()
    assert rig.hit("ab") == 0 and rig.manager.begin_store(rig.chain("q"), 0, 16) == []
    assert rig.manager.acquire("r", rig.chain("ab"), 0, 32) is None
    assert rig.manager.prefetch("r", rig.chain("ab"), 0, 32) == 0


def test_drain_is_bounded_when_the_disk_hangs() -> None:
    rig = make()
    rig.put("ab")
    rig.store.hung = True
    before = rig.clock.now
    assert not rig.manager.drain(1.0)
    assert rig.clock.now - before < 2.0
    rig.manager.check()


# -- prefetch


def test_prefetch_moves_up_at_most_a_quarter_and_acquire_uses_it() -> None:
    rig = make(slots=16)
    rig.to_nvme("abcdefgh")
    chain = rig.chain("abcdefgh")
    assert rig.manager.prefetch("r", chain, 0, 128) == 4
    assert rig.manager.prefetch("s", chain, 0, 128) == 0
    assert rig.manager.occupancy().prefetch_bytes == 4 * UNIT
    rig.store.step()
    rig.manager.poll()
    rig.manager.check()
    lease = rig.load("abcdefgh")
    assert lease is not None and lease.tokens_by_tier == {Tier.DRAM: 64, Tier.NVME: 64}
    assert rig.manager.occupancy().prefetch_bytes == 0
    assert rig.manager.cancel_prefetch("r") == 0


def test_a_cancelled_prefetch_frees_its_budget_and_ends_as_residents() -> None:
    rig = make(slots=16)
    rig.to_nvme("abcd")
    chain = rig.chain("abcd")
    assert rig.manager.prefetch("r", chain, 16, 64) == 3
    assert rig.manager.cancel_prefetch("r") == 3
    assert rig.manager.occupancy().prefetch_bytes == 0
    rig.store.step()
    rig.manager.poll()
    rig.manager.check()
    assert rig.manager.lookup(chain, 16, 64).by_tier == {Tier.DRAM: 48}


def test_stores_may_push_prefetched_chunks_out() -> None:
    rig = make(slots=4)
    rig.to_nvme("ab")
    assert rig.manager.prefetch("r", rig.chain("ab"), 0, 32) == 1
    rig.store.step()
    rig.manager.poll()
    rig.put("wxyz")
    rig.manager.check()
    assert rig.manager.occupancy().prefetch_bytes == 0 and rig.hit("wxyz") == 64


# -- planner


def test_plan_refuses_what_costs_more_than_it_saves(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weigh, "EXPLORE_BYTES", 2 * UNIT)
    rig = make()
    rig.to_nvme("abcd")
    chain = rig.chain("abcd")
    assert rig.manager.plan(chain, 0, 64).end == 64, "unknown rates: load and learn"
    for _ in range(4):
        rig.manager.observe_load(Tier.NVME, UNIT, 1.0)
        rig.manager.observe_load(Tier.DRAM, UNIT, 0.001)
        rig.manager.observe_prefill(PrefillWork.span(0, 1000), 1.0)
    assert rig.manager.plan(chain, 0, 64).end == 0
    assert rig.manager.counters.planner_refused == 1
    assert rig.manager.lookup(chain, 0, 64).end == 64
    assert rig.manager.counters.prefetched == 2, "a refusal reads a little, to go on learning"
    assert rig.manager.occupancy().prefetch_bytes == 0, "at nobody's expense"
    rig.store.step()
    rig.manager.poll()
    planned = rig.manager.plan(chain, 0, 64)
    assert planned.end == 32, "the part in DRAM is worth it"
    assert planned.decision is Decision.PARTIAL
    assert rig.manager.counters.prefetched == 2, "once a second at the most"
    rig.manager.check()


@pytest.mark.parametrize("seed", range(20))
def test_a_hit_in_dram_is_planned_as_if_every_boundary_were_weighed(
    seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    rng = random.Random(seed)
    rig = make(slots=32)
    keys = "abcdefghijklmnop"
    rig.put(keys)
    chain = rig.chain(keys)
    for _ in range(4):
        rig.manager.observe_load(Tier.DRAM, UNIT, 10 ** rng.uniform(-4, -1))
        base = rng.randrange(4096)
        work = PrefillWork.span(base, base + 512)
        rig.manager.observe_prefill(work, 10 ** rng.uniform(-3, 0))
    ranges = [(TOK * i, TOK * rng.randint(i + 1, 16)) for i in (0, 3, 9)]
    quick = [rig.manager.plan(chain, *r).end for r in ranges]
    monkeypatch.setattr(Search, "whole", lambda self, start, end: None)
    assert quick == [rig.manager.plan(chain, *r).end for r in ranges]


def test_a_prompt_that_dram_holds_ages_like_a_used_one_at_arrival() -> None:
    rig = make(slots=4)
    rig.put("ab")
    rig.put("xy")
    assert rig.manager.prefetch("r", rig.chain("ab"), 0, 2 * TOK) == 0
    rig.put("p")
    assert rig.hit("ab") == 2 * TOK and rig.hit("xy") == TOK


def test_load_never() -> None:
    rig = make(load="never")
    rig.put("ab")
    chain = rig.chain("ab")
    assert rig.manager.plan(chain, 0, 32).end == 0 and rig.manager.lookup(chain, 0, 32).end == 32


# -- several groups

WINDOW = layout_of(full_group(0, blocks=2), sliding_group(1, window=32))


def test_sliding_groups_need_only_the_window() -> None:
    rig = make(slots=32, layout=WINDOW)
    chain = rig.chain("aabbccdd")
    items = rig.manager.begin_store(chain, 0, 128, need=lambda g, i: i >= 4)
    assert [i.chunk for i in items if i.group == 1] == [4, 5, 6, 7]
    for item in items:
        rig.arena.worker_store(item)
    rig.manager.poll()
    hit = rig.manager.lookup(chain, 0, 128)
    assert (hit.end, hit.chunks) == (128, 6)
    assert rig.manager.lookup(chain, 0, 127).end == 96
    assert rig.manager.lookup(chain, 0, 95).end == 0, "the window of 64 was never stored"
    assert rig.manager.slot_failed(chain.key(1, 6), LoadFailure.CORRUPT)
    assert rig.manager.lookup(chain, 0, 128).end == 96
    lease = rig.manager.acquire("r", chain, 0, 96)
    assert lease is not None
    assert [(i.group, i.chunk) for i in lease.items] == [(0, 0), (0, 1), (0, 2), (1, 4), (1, 5)]
    # HBM holds up to 80: the window's first chunk is below and not needed.
    assert rig.manager.slot_failed(chain.key(1, 4), LoadFailure.CORRUPT)
    assert rig.manager.lookup(chain, 80, 96).end == 96
    rig.manager.check()


@pytest.mark.parametrize(
    ("start", "end", "want"),
    [(0, 96, range(3, 6)), (0, 32, range(0, 2)), (70, 96, range(4, 6)), (96, 96, range(0))],
)
def test_a_window_may_begin_inside_a_chunk(start: int, end: int, want: range) -> None:
    assert span(sliding_group(0, window=40), start, end) == want


def test_a_group_that_cannot_be_served_means_no_hits_and_no_stores() -> None:
    none = replace(full_group(1), kind=GroupKind.NONE)
    rig = make(layout=layout_of(full_group(0), none))
    chain = rig.chain("ab")
    assert rig.manager.begin_store(chain, 0, 32) == []
    assert rig.manager.lookup(chain, 0, 32).end == 0
    assert rig.manager.acquire("r", chain, 0, 32) is None


# -- failures


def test_bad_bytes_are_dropped_and_their_slot_waits_for_the_leases() -> None:
    rig = make(slots=4)
    rig.put("ab")
    lease = rig.load("ab")
    assert lease is not None
    ref = lease.items[0].ref
    assert rig.manager.slot_failed(ref, LoadFailure.CORRUPT)
    assert not rig.manager.slot_failed(ref, LoadFailure.CORRUPT), "once"
    assert rig.arena.state(ref.slot) == SlotState.FAILED, "others who copy from it see it"
    assert rig.hit("ab") == 0 and rig.manager.occupancy().slots_quarantined == 1
    rig.manager.check()
    rig.manager.release(lease.id)
    rig.manager.check()
    assert rig.manager.occupancy().slots_quarantined == 0


def test_slot_failed_of_an_older_life_of_the_slot_is_ignored() -> None:
    rig = make(slots=4)
    rig.put("abcd")
    lease = rig.load("abcd")
    assert lease is not None
    rig.manager.release(lease.id)
    rig.put("wxyz")
    assert not rig.manager.slot_failed(lease.items[0].ref, LoadFailure.CORRUPT)
    assert rig.hit("wxyz") == 64


def test_reset_forgets_and_frees_when_unused() -> None:
    rig = make()
    rig.put("abcd")
    lease = rig.load("ab")
    item = rig.manager.begin_store(rig.chain("x"), 0, 16)[0]
    assert lease is not None
    rig.manager.reset()
    rig.manager.check()
    assert rig.hit("abcd") == 0 and rig.manager.occupancy().slots_used == 3
    rig.manager.release(lease.id)
    rig.arena.worker_store(item)
    rig.manager.tick(False)
    rig.manager.check()
    assert rig.manager.occupancy().slots_used == 0 and rig.manager.stores_settled() == []
    assert not rig.store.queue, "nothing of the old epoch is written"


@pytest.mark.parametrize("what", ["begin_fill", "fail", "set_free", "states"])
def test_arena_errors_are_misses(what: str) -> None:
    rig = make(slots=4)
    rig.put("ab")
    rig.arena.raising.add(what)
    rig.put("xyz")
    rig.manager.slot_failed(rig.chain("ab").key(0, 0), LoadFailure.CORRUPT)
    rig.manager.reset()
    assert rig.manager.counters.tier_errors > 0
    rig.arena.raising.clear()
    rig.clock.advance(STORE_TIMEOUT_S + 1)
    rig.manager.poll()
    rig.manager.check()
    rig.put("abcd")
    assert rig.hit("abcd") == 64


@pytest.mark.parametrize("what", ["contains", "get_slots", "put_slots", "poll", "flush", "stats"])
def test_store_errors_are_misses(what: str) -> None:
    rig = make()
    rig.to_nvme("ab")
    rig.put("xy")
    rig.store.raising.add(what)
    lease = rig.load("ab")
    assert (lease is None) == (what in ("contains", "get_slots"))
    rig.manager.tick(False)
    rig.manager.occupancy()
    drained = rig.manager.drain(0.0)
    assert rig.manager.counters.tier_errors > 0 and not drained
    rig.manager.check()
    assert rig.hit("xy") == 32, "DRAM goes on"
    rig.store.raising.clear()
    rig.store.step()
    run_until_idle(lambda: rig.manager.tick(False), rig.store)
    rig.manager.check()
    assert rig.hit("ab") == 32


def _tripped() -> Rig:
    """Every read of eight chunks failed, and the pause before a probe is over."""
    rig = make()
    rig.to_nvme("abcdefgh")
    lease = rig.load("abcdefgh")
    assert lease is not None
    rig.store.read_result = StoreResult.IO_ERROR
    rig.store.step()
    rig.manager.poll()
    rig.manager.release(lease.id)
    assert rig.manager.counters.nvme_breaker_trips == 1 and rig.hit("abcdefgh") == 0
    rig.clock.advance(COOL_S)
    return rig


def test_a_failing_disk_is_left_alone_for_a_while() -> None:
    rig = _tripped()
    rig.manager.tick(False)  # a probe that nobody waits for
    assert rig.manager.counters.nvme_probes == 1 and rig.hit("abcdefgh") == 0
    rig.store.step()
    rig.manager.tick(False)
    assert rig.hit("abcdefgh") == 0, "it failed as well"
    rig.store.read_result = None
    rig.clock.advance(COOL_S)
    rig.manager.tick(False)
    rig.store.step()
    rig.manager.tick(False)
    assert rig.manager.counters.nvme_probes == 2 and rig.hit("abcdefgh") == 128
    rig.manager.check()


@pytest.mark.parametrize("result", [StoreResult.MISS, StoreResult.CORRUPT])
def test_a_probe_of_what_is_gone_is_followed_by_another(result: StoreResult) -> None:
    """It was recycled, or damaged: the tier must not wait for that probe for good."""
    rig = _tripped()
    rig.manager.tick(False)
    assert rig.manager.counters.nvme_probes == 1
    rig.store.read_result = result
    rig.store.step()
    rig.manager.tick(False)
    if result is StoreResult.CORRUPT:
        assert rig.hit("abcdefgh") == 0, "a failure: there is another pause first"
        rig.clock.advance(COOL_S)
    rig.manager.tick(False)
    assert rig.manager.counters.nvme_probes == 1, "no other is known to have failed"
    assert rig.hit("abcdefgh") > 0, "so who asks next provides one"
    rig.manager.check()


def test_a_tier_that_brings_damaged_bytes_is_left_alone() -> None:
    """Each request would pay for a load in vain, and each chunk read is lost."""
    rig = make(slots=64)
    for text in ("abcdefgh", "ij", "kl", "mn", "op"):
        rig.to_nvme(text)
    rig.store.read_result = StoreResult.CORRUPT
    lease = rig.load("abcdefgh")
    assert lease is not None
    rig.store.step()
    rig.manager.tick(False)
    rig.manager.release(lease.id)
    assert rig.manager.counters.nvme_breaker_trips == 1 and len(rig.store.held) == 8
    for lost, text in enumerate(("ij", "kl", "mn")):
        assert rig.load(text) is None and len(rig.store.held) == 8 - lost
        rig.clock.advance(COOL_S)
        rig.manager.plan(rig.chain(text), 0, 2 * TOK)  # its first chunk is the probe
        assert rig.load(text) is None, "nobody waits for it"
        rig.store.step()
        rig.manager.tick(False)
    rig.store.read_result = None
    rig.clock.advance(COOL_S)
    rig.manager.plan(rig.chain("op"), 0, 2 * TOK)
    run_until_idle(lambda: rig.manager.tick(False), rig.store)
    assert rig.hit("op") == 2 * TOK and rig.manager.levels().read_breaker == 0.0
    rig.manager.check()


def test_what_is_computed_anew_replaces_what_may_be_damaged() -> None:
    """Or NVMe would say that it has it, and each prompt had to meet its damaged chunks first."""
    rig = make(slots=64)
    for text in ("abcdefgh", "ij", "kl"):
        rig.to_nvme(text)
    rig.store.corrupt = set(rig.store.held)
    lease = rig.load("abcdefgh")
    assert lease is not None
    rig.store.step()
    rig.manager.tick(False)
    rig.manager.release(lease.id)
    assert rig.manager.counters.nvme_breaker_trips == 1
    for text in ("abcdefgh", "ij"):
        rig.put(text)
    run_until_idle(lambda: rig.manager.tick(False), rig.store)
    rig.manager.reset()  # DRAM forgets them
    assert set(rig.store.corrupt) == set(rig.chain("kl").keys(0))
    rig.clock.advance(COOL_S)
    rig.manager.plan(rig.chain("ij"), 0, 2 * TOK)
    run_until_idle(lambda: rig.manager.tick(False), rig.store)
    assert rig.hit("abcdefgh") == 8 * TOK and rig.hit("ij") == 2 * TOK
    written = rig.manager.counters.nvme_written
    rig.put("kl")  # all is well again: what NVMe holds is not written twice
    run_until_idle(lambda: rig.manager.tick(False), rig.store)
    assert rig.manager.counters.nvme_written == written
    rig.manager.check()


def test_damaged_chunks_among_others_turn_nothing_off() -> None:
    rig = make(slots=64)
    rig.to_nvme("xyz")
    for text in "abcdefghijkl":
        rig.to_nvme(text)
        rig.store.read_result = StoreResult.CORRUPT
        for good in (False, True):
            lease = rig.load("xyz" if good else text)
            assert lease is not None
            rig.store.step()
            rig.manager.tick(False)
            rig.manager.release(lease.id)
            rig.manager.reset()
            rig.store.read_result = None
    c = rig.manager.counters
    assert (c.nvme_corrupt, c.nvme_breaker_trips) == (12, 0)


def test_a_full_or_read_only_disk_still_serves() -> None:
    rig = make(slots=32)
    rig.to_nvme("abcdefgh")
    rig.store.write_result = StoreResult.IO_ERROR
    rig.put("ijklmnop")
    run_until_idle(lambda: rig.manager.tick(False), rig.store)
    assert rig.manager.counters.nvme_breaker_trips == 1
    assert rig.manager.levels().write_breaker == 1.0 and rig.manager.levels().read_breaker == 0.0
    assert rig.hit("abcdefgh") == 128
    assert rig.load("abcdefgh") is not None


def test_reads_that_hang_are_given_up_before_any_deadline() -> None:
    """Prefetched or loaded: whoever waits is told, and nobody else begins to wait."""
    rig = make(slots=32)
    rig.to_nvme("abcdefgh")
    rig.store.hung = True
    lease = rig.load("abcd")
    assert lease is not None
    rig.clock.advance(STALL_S / 2)
    rig.manager.tick(False)
    assert rig.hit("abcdefgh") == 128
    rig.clock.advance(STALL_S)
    rig.manager.tick(False)
    rig.manager.check()
    assert rig.manager.counters.nvme_stalled == 1 and rig.hit("abcdefgh") == 0
    assert all(rig.arena.state(i.ref.slot) == SlotState.FAILED for i in lease.items)
    rig.manager.release(lease.id)
    assert rig.manager.occupancy().slots_quarantined == 4
    for _ in range(3 * MAX_STALLS):  # probes hang too, and are few
        rig.clock.advance(COOL_S)
        rig.manager.tick(False)
        rig.manager.check()
    assert rig.manager.counters.nvme_probes == MAX_STALLS - 1
    rig.store.hung = False
    for _ in range(2):  # what hung returns and nobody wants it; that calls for a probe
        rig.store.step()
        rig.manager.tick(False)
        rig.manager.check()
    assert rig.manager.counters.nvme_probes == MAX_STALLS
    assert rig.manager.counters.nvme_dropped == 4 + MAX_STALLS - 1
    assert rig.hit("abcdefgh") == 128, "one answer is enough"
    assert rig.manager.occupancy().slots_quarantined == 0
    assert rig.manager.counters.nvme_io_errors == 0


def _nvme_rate(rig: Rig, keys: str = "abcdefghijkl") -> float:
    """Learn it from a few reads: one chunk takes a millisecond beyond the fixed cost."""
    rig.to_nvme(keys)
    for i in range(4):
        lease = rig.load(keys[: i + 1], start=i * TOK)
        assert lease is not None
        rig.clock.advance(0.002)
        rig.store.job_ns = 2_000_000
        rig.store.step()
        rig.manager.poll()
        rig.manager.release(lease.id)
    rate = rig.manager.rates.tiers()[Tier.NVME].bytes_per_s
    assert rate == pytest.approx(UNIT * 1000, rel=0.01)
    return rate


def test_reads_that_hung_teach_no_rate() -> None:
    rig = make(slots=32)
    rate = _nvme_rate(rig)
    rig.store.hung = True
    assert rig.load("abcdefgh", start=4 * TOK) is not None
    rig.clock.advance(STALL_S * 1.1)
    rig.manager.tick(False)
    assert rig.manager.counters.nvme_stalled == 1
    rig.clock.advance(30.0)
    rig.store.hung = False
    rig.store.job_ns = 30_000_000_000
    rig.store.step()
    rig.manager.tick(False)
    assert rig.manager.rates.tiers()[Tier.NVME].bytes_per_s == pytest.approx(rate)
    rig.store.job_ns = 2_000_000
    rig.store.step()
    rig.manager.tick(False)
    assert rig.hit("abcdefghijkl") == 12 * TOK, "and it is used again"


def test_a_read_that_never_returns_does_not_keep_requests_away(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    rig = make(slots=32)
    _nvme_rate(rig)
    for _ in range(4):
        rig.manager.observe_load(Tier.DRAM, UNIT, 0.001)
        rig.manager.observe_prefill(PrefillWork.span(0, 1000), 1.0)
    rig.store.hung = True
    assert rig.load("abcdef", start=4 * TOK) is not None
    rig.clock.advance(STALL_S * 1.1)
    rig.manager.tick(True)
    tier = rig.manager._nvme
    assert tier is not None and tier.reads.inflight and rig.manager.counters.nvme_stalled == 1
    tier.breaker.success()  # others work again
    for _ in range(5):
        rig.clock.advance(STALL_S * 1.1)
        rig.manager.tick(True)
    assert rig.manager.counters.nvme_stalled == 1
    assert tier.reads.inflight and not rig.manager.reading()
    planned = rig.manager.plan(rig.chain("abcdefghijkl"), 8 * TOK, 12 * TOK)
    assert planned.end == 12 * TOK and planned.queue_s == 0.0, "nobody queues behind it"
    limits: list[int] = []
    monkeypatch.setattr(tier.writes, "submit", lambda now, limit: limits.append(limit))
    rig.manager.tick(True)
    assert limits == [INFLIGHT_BUSY_BYTES], "nor do writes give way to it"


def test_while_nothing_moves_nobody_else_begins_to_wait() -> None:
    """Long before the tier counts as hung: at 0.1 s only what saves more than that is loaded."""
    rig = make(slots=32)
    _nvme_rate(rig)
    chain = rig.chain("abcdefghijkl")
    for _ in range(4):
        rig.manager.observe_load(Tier.DRAM, UNIT, 0.001)
        rig.manager.observe_prefill(PrefillWork.span(0, 1000), 0.1)
    wanted = (4 * TOK, 12 * TOK)
    rig.manager.tick(True)
    assert rig.manager.plan(chain, *wanted).end == 12 * TOK
    rig.store.hung = True
    assert rig.load("abcdef", start=4 * TOK) is not None
    rig.clock.advance(0.1)
    rig.manager.tick(True)
    assert rig.manager.counters.nvme_stalled == 0
    assert rig.manager.plan(chain, *wanted).end == 4 * TOK
    rig.store.hung = False
    rig.store.step()
    rig.manager.tick(True)
    assert rig.manager.plan(chain, *wanted).end == 12 * TOK


def test_a_slow_disk_is_not_a_hung_one() -> None:
    rig = make(slots=32)
    rig.to_nvme("abcdefgh")
    for key in "abcdefgh":
        lease = rig.load("abcdefgh"[: "abcdefgh".index(key) + 1], start=TOK * "abcdefgh".index(key))
        assert lease is not None
        rig.clock.advance(STALL_S * 0.9)
        rig.store.step()
        rig.manager.tick(False)
        rig.manager.release(lease.id)
    assert rig.manager.counters.nvme_stalled == 0 and rig.manager.levels().read_breaker == 0.0


def test_overlapping_reads_are_learned_as_one() -> None:
    """Two jobs of 2 MiB side by side for a second are 4 MiB/s, not 2."""
    rig = make(slots=32)
    rig.to_nvme("abcdefghijkl")
    for low in range(0, 12, 4):
        first = rig.load("abcdefghijkl"[: low + 2], start=TOK * low)
        second = rig.load("abcdefghijkl"[: low + 4], start=TOK * (low + 2))
        assert first is not None and second is not None
        rig.store.job_ns = 1_000_000_000  # both, from the same instant
        rig.store.step()
        rig.manager.poll()
        rig.clock.advance(1.0)
    known = rig.manager.rates.tiers()[Tier.NVME].bytes_per_s
    assert known == pytest.approx(4 * UNIT, rel=0.01)


def test_hung_reads_cost_deadlines_then_nothing() -> None:
    rig = make(slots=32)
    rig.to_nvme("abcdefgh")
    rig.store.hung = True
    for i in range(8):
        lease = rig.load("abcdefgh"[: i + 1], start=i * TOK)
        assert lease is not None
        if not i:
            rig.clock.advance(DEADLINE_FLOOR_S)
        rig.manager.slot_failed(lease.items[-1].ref, LoadFailure.DEADLINE)
        rig.manager.release(lease.id)
        rig.manager.check()
    assert rig.hit("abcdefgh") == 0 and rig.manager.counters.nvme_breaker_trips == 1
    assert rig.manager.levels().read_breaker == 1.0
    assert rig.manager.occupancy().slots_quarantined == 8
    rig.store.hung = False
    rig.store.step()
    rig.manager.poll()
    rig.manager.check()
    assert rig.manager.occupancy().slots_quarantined == 0


def test_short_deadlines_do_not_stop_a_tier_that_got_on_lately() -> None:
    rig = make(slots=32)
    rig.to_nvme("abcdefgh")
    for i in range(8):
        lease = rig.load("abcdefgh"[: i + 1], start=i * TOK)
        assert lease is not None
        if not i:
            rig.clock.advance(DEADLINE_LEAST_S)
        rig.manager.slot_failed(lease.items[-1].ref, LoadFailure.DEADLINE)
        rig.manager.release(lease.id)
    assert rig.manager.counters.nvme_breaker_trips == 0 and rig.hit("abcdefgh") == 8 * TOK


# -- construction


def test_without_a_store_and_with_the_null_store() -> None:
    arena = FakeArena(4 * UNIT, 4)
    chain = chain_of(ONE, "ab")
    for store in (None, NullStore()):
        manager = Manager(ONE, arena, store, write_tb_per_day=1.0, nvme_admission="all")
        for item in manager.begin_store(chain, 0, 32):
            arena.worker_store(item)
        manager.tick(False)
        manager.tick(False)
        assert manager.lookup(chain, 0, 32).end == 32 and manager.drain(1.0)
        assert manager.counters.nvme_written == (2 if store else 0)
        manager.check()


def test_wrong_configuration_is_refused() -> None:
    arena = FakeArena(8 * UNIT, 4)
    with pytest.raises(ConfigError, match="slots"):
        Manager(ONE, arena, None)
    good = FakeArena(8 * UNIT, 8)
    for bad in ({"policy": "mru"}, {"load": "often"}):
        with pytest.raises(ConfigError):
            Manager(ONE, good, None, **bad)  # type: ignore[arg-type]
