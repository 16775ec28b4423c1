"""A tier that hangs: what it costs while it hangs, and how it comes back."""

from __future__ import annotations

from itertools import pairwise

import pytest

from kvoffload.core.breaker import COOL_S, BreakerState
from kvoffload.core.hashchain import Chain
from kvoffload.core.planner import DEADLINE_FLOOR_S
from kvoffload.core.prefill import PrefillWork
from kvoffload.core.watch import LONG_PAUSE_S, MAX_STALLS, STALL_S
from kvoffload.types import LoadFailure, SlotState, Tier
from tests.support.fakes import UNIT
from tests.unit.test_manager import TOK, Rig, make

CHUNKS = 16
SLOTS = 512


class Server(Rig):
    """Half of DRAM is taken by prompts in use; others lie on NVMe, and loading them pays."""

    def on_disk(self, n: int) -> Chain:
        chain = self.chain(chr(1000 + n) * CHUNKS)
        for key in chain.keys(0):
            self.store.held[key] = key
        return chain

    def warm(self) -> int:
        """Prompts in use that DRAM holds whole."""
        texts = (chr(100 + n) * CHUNKS for n in range(CHUNKS))
        return sum(self.hit(text) == CHUNKS * TOK for text in texts)

    def recompute(self, chain: Chain) -> None:
        for item in self.manager.begin_store(chain, 0, chain.tokens):
            self.arena.worker_store(item)
        self.manager.poll()

    def load_in_vain(self, chain: Chain) -> None:
        """Its deadline passes; then it is computed, and DRAM holds it again."""
        lease = self.manager.acquire("r", chain, 0, chain.tokens)
        assert lease is not None
        self.seconds(DEADLINE_FLOOR_S + 0.05)
        for item in lease.items:
            self.manager.slot_failed(item.ref, LoadFailure.DEADLINE)
        self.manager.release(lease.id)
        self.recompute(chain)

    def ask(self, chain: Chain, prefetched: bool = True) -> int:
        """As the scheduler half does; the end of what it would load."""
        if prefetched:
            self.manager.prefetch("q", chain, 0, chain.tokens)
        end = self.manager.plan(chain, 0, chain.tokens).end
        self.manager.cancel_prefetch("q")
        return end

    def seconds(self, seconds: float) -> None:
        for _ in range(round(seconds / 0.05)):
            self.clock.advance(0.05)
            self.store.step()
            self.manager.tick(True)
        self.manager.check()

    @property
    def state(self) -> BreakerState:
        assert self.manager._nvme is not None
        return self.manager._nvme.breaker.state(self.clock.now)

    @property
    def hung(self) -> int:
        assert self.manager._nvme is not None
        return len(self.manager._nvme.reads.inflight)


def server() -> Server:
    made = make(slots=SLOTS)
    rig = Server(made.layout, made.arena, made.store, made.manager, made.clock)
    for n in range(CHUNKS):
        rig.put(chr(100 + n) * CHUNKS)
    rig.seconds(1.0)
    for _ in range(4):
        rig.manager.observe_prefill(PrefillWork.span(0, CHUNKS * TOK), 0.2)
        rig.manager.observe_load(Tier.DRAM, 16 * UNIT, 0.004)
        rig.manager.rates.observe(Tier.NVME, 16 * UNIT, 0.016)
    assert rig.warm() == CHUNKS and rig.ask(rig.on_disk(0), False) == CHUNKS * TOK
    return rig


@pytest.mark.parametrize("prefetched", [True, False])
def test_a_tier_that_hangs_for_long_leaves_dram_alone(prefetched: bool) -> None:
    """The chunk that failed last is in DRAM again, so that it is no probe: who asks provides one,
    but one at a time, of one chunk, and after a few of them rarely."""
    rig = server()
    rig.store.hung = True
    rig.load_in_vain(rig.on_disk(1))
    assert rig.manager.counters.nvme_breaker_trips == 1 and rig.manager.counters.nvme_stalled == 0
    offered = 0
    for n in range(60):
        chain = rig.on_disk(2 + n % 40)
        offered += rig.ask(chain, prefetched) > 0
        rig.seconds(1.0)
    assert offered == 0, "nobody waits for it"
    assert rig.hung == MAX_STALLS == rig.manager.counters.nvme_stalled
    # The load's chunks; then, of a job each, one chunk.
    assert rig.manager.occupancy().slots_quarantined == CHUNKS + MAX_STALLS - 1
    assert rig.warm() == CHUNKS
    rig.seconds(3600.0)
    for n in range(60):
        rig.ask(rig.on_disk(2 + n), prefetched)
        rig.seconds(1.0)
    assert rig.hung <= MAX_STALLS + 7 and rig.warm() == CHUNKS


@pytest.mark.parametrize("requests", [True, False])
@pytest.mark.parametrize("hung_s", [0.6, 2.0, 5.0, 30.0, 120.0, 600.0])
def test_it_is_used_again_within_10_seconds(hung_s: float, requests: bool) -> None:
    rig = server()
    rig.store.hung = True
    rig.load_in_vain(rig.on_disk(1))
    for n in range(max(1, int(hung_s)) if requests else 0):
        rig.ask(rig.on_disk(2 + n % 40))
        rig.seconds(min(1.0, hung_s))
    if not requests:
        rig.seconds(hung_s)
    rig.store.hung = False
    back = rig.clock.now
    wanted = rig.on_disk(100)
    while rig.ask(wanted, False) < CHUNKS * TOK:
        rig.seconds(0.1)
        assert rig.clock.now - back < 10.0
    assert rig.manager.occupancy().slots_quarantined == 0


def test_also_where_what_hung_never_returns() -> None:
    """Before the pauses get long. Then a read that returns ends them."""
    rig = server()
    rig.store.hung = True
    rig.load_in_vain(rig.on_disk(1))
    for n in range(10):
        rig.ask(rig.on_disk(2 + n))
        rig.seconds(1.0)
    rig.store.queue.clear()
    rig.store.hung = False
    rig.ask(rig.on_disk(100), False)
    rig.seconds(STALL_S + COOL_S + 0.1)
    rig.ask(rig.on_disk(100), False)
    rig.seconds(0.1)
    assert rig.ask(rig.on_disk(101), False) == CHUNKS * TOK
    assert rig.state is BreakerState.CLOSED and rig.warm() == CHUNKS


def test_the_pauses_get_longer_and_end_when_a_read_returns() -> None:
    rig = server()
    rig.store.hung = True
    rig.load_in_vain(rig.on_disk(1))
    probed = []
    for _ in range(round(40 * LONG_PAUSE_S)):
        stalls = rig.manager.counters.nvme_stalled
        rig.ask(rig.on_disk(2), False)
        rig.seconds(0.5)
        if rig.manager.counters.nvme_stalled > stalls:
            probed.append(rig.clock.now)
    gaps = [b - a for a, b in pairwise(probed)]
    assert max(gaps[: MAX_STALLS - 1]) < 2 * COOL_S
    for doubled, gap in enumerate(gaps[MAX_STALLS - 1 :]):
        assert gap == pytest.approx(LONG_PAUSE_S * 2**doubled, abs=3.0)
    assert rig.state is BreakerState.OPEN
    rig.store.hung = False
    rig.store.step(1)
    rig.manager.tick(True)
    assert rig.state is BreakerState.HALF_OPEN
    rig.ask(rig.on_disk(2), False)
    rig.seconds(0.1)
    assert rig.state is BreakerState.CLOSED
    rig.store.hung = True
    rig.load_in_vain(rig.on_disk(3))
    rig.seconds(STALL_S + COOL_S)
    assert rig.state is BreakerState.HALF_OPEN, "short again"


def test_who_waits_is_told_also_while_the_breaker_is_open() -> None:
    rig = server()
    rig.store.hung = True
    waits = rig.manager.acquire("w", rig.on_disk(2), 0, TOK)
    rig.load_in_vain(rig.on_disk(1))
    assert waits is not None and rig.state is BreakerState.OPEN
    assert rig.arena.state(waits.items[0].ref.slot) == SlotState.FILLING
    rig.seconds(STALL_S)
    assert rig.state is BreakerState.OPEN and rig.manager.counters.nvme_breaker_trips == 1
    assert rig.arena.state(waits.items[0].ref.slot) == SlotState.FAILED


def test_a_request_that_finds_a_probe_is_not_kept_waiting() -> None:
    rig = server()
    rig.store.hung = True
    rig.load_in_vain(rig.on_disk(1))
    rig.seconds(COOL_S + STALL_S + 0.1)
    rig.store.hung = False
    rig.store.queue.clear()
    assert rig.state is BreakerState.HALF_OPEN
    probes = rig.manager.counters.nvme_probes
    assert rig.ask(rig.on_disk(2), False) == 0
    assert rig.manager.counters.nvme_probes == probes + 1 and len(rig.store.queue) == 1
    assert rig.ask(rig.on_disk(3), False) == 0 and len(rig.store.queue) == 1, "one at a time"
    rig.seconds(0.05)
    assert rig.ask(rig.on_disk(2), False) == rig.ask(rig.on_disk(3), False) == CHUNKS * TOK


def test_a_probe_whose_slot_was_given_up_decides_nothing() -> None:
    rig = server()
    rig.store.hung = True
    rig.load_in_vain(rig.on_disk(1))
    rig.seconds(COOL_S + STALL_S + 0.1)
    rig.store.queue.clear()
    chain = rig.on_disk(2)
    assert rig.ask(chain, False) == 0
    errors = rig.manager.counters.nvme_io_errors
    assert rig.manager.slot_failed(chain.key(0, 0), LoadFailure.SLOT_LOST)
    rig.store.hung = False
    rig.seconds(0.05)
    assert rig.state is BreakerState.HALF_OPEN and rig.manager.counters.nvme_io_errors == errors
    assert rig.ask(rig.on_disk(3), False) == 0 and len(rig.store.queue) == 1, "the next probe"
    rig.seconds(0.05)
    assert rig.state is BreakerState.CLOSED


def test_reads_given_up_by_their_deadlines_are_no_failures_when_they_return() -> None:
    """A slow disk, which gets on: 16 chunks come too late."""
    rig = server()
    rig.store.hung = True
    lease = rig.manager.acquire("r", rig.on_disk(1), 0, CHUNKS * TOK)
    assert lease is not None
    for item in lease.items:
        rig.manager.slot_failed(item.ref, LoadFailure.DEADLINE)
    rig.manager.release(lease.id)
    rig.store.hung = False
    rig.seconds(0.05)
    assert rig.manager.counters.nvme_dropped == CHUNKS
    assert rig.manager.counters.nvme_breaker_trips == rig.manager.counters.nvme_io_errors == 0
