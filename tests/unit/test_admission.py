"""What is written to NVMe: the judge by itself, and victims, idle time and budget in the Manager."""

from __future__ import annotations

import random

import pytest

from kvoffload.core import admission, idle
from kvoffload.core.admission import FREE_BYTES, SHARE, WORTH, Admission, Ghost, budget
from kvoffload.core.breaker import COOL_S
from kvoffload.core.hashchain import Chain
from kvoffload.core.idle import IDLE_S
from kvoffload.core.index import Entry, Index
from kvoffload.core.kinds import FADE, KINDS, Kinds, Origin
from kvoffload.core.manager import Manager
from kvoffload.core.policy import make_policy
from kvoffload.core.sizes import slots_needed
from kvoffload.core.stats import Counters
from kvoffload.core.writebehind import MAX_ATTEMPTS
from kvoffload.errors import ConfigError
from kvoffload.types import ChunkKey, LoadFailure, SlotRef, SlotState, StoreResult, Tier
from tests.support.fakes import (
    UNIT,
    FakeArena,
    FakeClock,
    FakeStore,
    chain_of,
    full_group,
    layout_of,
)

ONE = layout_of(full_group())
HOUR = 3600.0


# -- the budget


@pytest.mark.parametrize("chunk", [1 << 20, 16 << 20, 300 << 20])
@pytest.mark.parametrize("tb_per_day", [0.05, 1.0, 40.0])
def test_no_hour_writes_more_than_5_percent_above_the_budget(tb_per_day: float, chunk: int) -> None:
    hourly = tb_per_day * 1e12 / 24
    rng = random.Random(f"{tb_per_day} {chunk}")
    bucket = budget(tb_per_day, 1 << 40, 0.0)
    now = 0.0
    written: list[tuple[float, int]] = []  # when, how many bytes
    while now < 3 * HOUR:
        now += rng.choice([0.01, 1.0, 30.0, 150.0])
        chunks = 0
        while bucket.take(chunk, now):  # bursts after pauses: the worst for a bucket
            chunks += 1
        written.append((now, chunks * chunk))
    for i, (begin, _) in enumerate(written):
        inside = sum(nbytes for t, nbytes in written[i:] if t < begin + HOUR)
        # A chunk larger than the burst is let through whole.
        assert inside <= 1.05 * hourly + chunk, begin
    assert sum(n for _, n in written) >= 0.95 * 3 * hourly - 2 * chunk, "the budget can be used"


def test_the_default_budget_is_per_day_with_a_burst() -> None:
    bucket = budget(None, 240 << 30, 0.0)
    assert bucket.take(24 << 30, 0.0) and not bucket.take(1 << 30, 0.0)
    assert bucket.take(1 << 30, 360.0) and not bucket.take(1 << 30, 360.0)
    assert budget(None, 1 << 30, 0.0).take(1 << 30, 0.0), "at least 1 GiB"
    none = budget(0.0, 1 << 40, 0.0)
    assert not none.take(1, 0.0) and none.full(1e9) == 0.0
    half = budget(1.0, 0, 0.0)
    assert half.full(0.0) == 1.0
    assert half.take(int(1e12 / 24 / 40), 0.0) and half.full(0.0) == pytest.approx(0.5, abs=0.01)


# -- the judge

ARENA = 64 * UNIT


def key(n: int) -> ChunkKey:
    return ChunkKey(random.Random(n).randbytes(16))


class Judge:
    def __init__(self, arena: int = ARENA) -> None:
        self.index = Index([make_policy("lru", iter(range(1, 1 << 30)))])
        self.counters = Counters()
        self.it = Admission(self.index, self.counters, budget(1e3, 0, 0.0), arena, 1 << 12)
        self._n = 0

    def entry(self, n: int, parent: int | None = None) -> Entry:
        """A new chunk in DRAM."""
        self._n += 1
        before = None if parent is None else self.index.get(key(parent))
        entry = Entry(
            key(n),
            0,
            0 if before is None else before.chunk + 1,
            0,
            UNIT,
            SlotRef(self._n, 1, 0),
            Tier.DRAM,
            None if parent is None else key(parent),
            0,
            0.0,
            SlotState.READY,
        )
        self.index.add(entry)
        self.it.stored(entry)
        return entry

    def request(self, n: int, chunks: int) -> list[Entry]:
        """What a request stored: numbers from ``n`` on, root first."""
        return [self.entry(n + i, n + i - 1 if i else None) for i in range(chunks)]

    def leave(self, entry: Entry) -> bool:
        """``entry`` is judged and leaves, whether or not it was written."""
        written = self.it.decide(entry, 0.0)
        self.index.remove(entry)
        entry.dirty = not written
        self.it.gone(entry)
        self.it.check()
        return written


def test_nothing_is_written_while_what_left_is_not_asked_for() -> None:
    judge = Judge()
    written = 0
    for n in range(2000):
        entry = judge.entry(n)
        entry.uses = 3
        written += judge.leave(entry)
    assert judge.it.value() < WORTH and judge.it.probability(0.0) == 0.0
    assert written <= ARENA // UNIT // admission.TRUST_PART + 1, "only what is let go on trust"
    assert judge.counters.nvme_refused_value == 2000 - written


def test_what_was_refused_and_asked_for_again_opens_the_gate() -> None:
    judge = Judge()
    for n in range(500):
        judge.leave(judge.entry(n))
    assert judge.it.value() < WORTH
    for n in range(480, 500):  # its memory is as long as the tier
        again = judge.entry(n)
        assert again.uses == 1, "used twice, though not while it was in DRAM"
        judge.index.remove(again)
    assert judge.counters.nvme_ghost_hits == 20
    assert judge.it.value() >= WORTH and judge.it.probability(0.0) > 0
    assert judge.entry(1000).uses == 0
    back = judge.entry(400)
    assert judge.leave(back) and judge.counters.nvme_admitted_twice == 1


def test_nvme_hits_keep_the_gate_open_and_silence_closes_it() -> None:
    judge = Judge()
    for n in range(1000):
        judge.leave(judge.entry(n))
        judge.it.asked(UNIT // 8)
    assert judge.it.value() == pytest.approx(1 / 8, rel=0.2)
    for n in range(1000, 1600):
        judge.leave(judge.entry(n))
    assert judge.it.value() < WORTH


def test_the_share_written_is_kept() -> None:
    judge = Judge()
    written = 0
    for n in range(4000):
        entry = judge.entry(n)
        entry.uses = int(n % 4 == 0)  # a quarter is used twice
        written += judge.leave(entry)
        judge.it.asked(UNIT // 4)
    assert written / 4000 == pytest.approx(SHARE, abs=0.03)
    assert judge.counters.nvme_admitted_twice >= 990, "whatever the coin says"
    assert judge.counters.nvme_admitted_coin > 1000


def test_an_empty_budget_takes_the_coin_out() -> None:
    judge = Judge()
    judge.it.asked(100 * UNIT)
    judge.entry(0)
    before = judge.it.probability(0.0)
    assert before > 0
    while judge.it.bucket.take(1 << 30, 0.0):
        pass
    assert judge.it.probability(0.0) < before / 10
    assert judge.it.probability(HOUR) == pytest.approx(before)


def test_one_coin_per_request_and_a_written_chunk_keeps_those_before_it() -> None:
    judge = Judge()
    root = judge.entry(1)
    second, third = judge.entry(2, 1), judge.entry(3, 2)
    assert root.origin is second.origin is third.origin is not None
    judge.index.touch(0, [key(1), key(2)])  # another request comes by and goes on elsewhere
    other = judge.entry(4, 2)
    assert other.origin is not None and other.origin.draw != root.origin.draw
    assert (root.uses, second.uses, third.uses) == (1, 1, 0)
    judge.it.asked(100 * UNIT)
    third.uses, root.uses, second.uses = 1, 0, 0
    root.origin.draw = 1.0  # no coin would take them
    assert judge.it.decide(third, 0.0)
    judge.index.remove(third)
    assert judge.it.decide(second, 0.0)
    judge.index.remove(other)
    judge.index.remove(second)
    assert judge.it.decide(root, 0.0)


def test_a_use_reopens_the_question() -> None:
    judge = Judge()
    judge.it.asked(100 * UNIT)
    entry = judge.entry(1)
    assert entry.origin is not None
    entry.origin.draw = 1.0
    assert not judge.it.decide(entry, 0.0) and not judge.it.decide(entry, 0.0)
    assert judge.counters.nvme_refused_coin == 1, "judged once"
    judge.index.touch(0, [key(1)])
    assert judge.it.decide(entry, 0.0)


def test_ghost_remembers_the_latest_and_forgets_what_it_gave() -> None:
    ghost = Ghost(1 << 30)
    assert len(ghost._tags) == 1 << 21, "bounded"
    small = Ghost(10)
    for n in range(3000):
        small.add(key(n), n % 64)
    found = [n for n in range(2000, 3000) if small.take(key(n)) == n % 64]
    assert len(found) > 800
    assert all(small.take(key(n)) is None for n in range(2000, 3000))
    assert all(small.take(key(n)) is None for n in range(5000, 6000))


def test_a_request_is_of_a_kind_by_what_was_new_and_what_was_known() -> None:
    powers = [1 << n for n in range(16)]
    kinds = {Origin(0.0, known, new).kind() for known in range(600) for new in powers}
    assert kinds == set(range(KINDS))
    assert Origin(0.0, 1, 200).kind() == Origin(0.0, 0, 255).kind() != Origin(0.0, 2, 200).kind()
    assert Origin(0.0, 0, 3).kind() != Origin(0.0, 0, 4).kind()
    judge = Judge()
    first = judge.request(0, 5)
    judge.index.touch(0, [key(n) for n in range(5)])
    second = [judge.entry(5, 4), judge.entry(6, 5)]
    for chunks, known in ((first, 0), (second, 5)):
        assert len({id(e.origin) for e in chunks}) == 1
        origin = chunks[0].origin
        assert origin is not None and (origin.known, origin.chunks) == (known, len(chunks))


def test_nothing_is_known_of_a_kind_at_first_and_one_request_proves_little() -> None:
    kinds, small, large = Kinds(), Origin(0.0, 0, 1).kind(), Origin(0.0, 0, 64).kind()
    assert kinds.odds(small) == kinds.odds(large) == 1.0
    for _ in range(300):
        kinds.left(small)
    for _ in range(100):
        kinds.asked(small)
    for _ in range(64):
        kinds.left(large)  # one request, not asked for again: still about average
    assert 0.2 < kinds.odds(large) < 1.0 < kinds.odds(small) < 2.5
    for n in range(64 * 60):
        kinds.left(large)
        kinds.left(small)
        if n % 3 == 0:
            kinds.asked(small)
    assert kinds.odds(large) < 0.05 < 1.0 < kinds.odds(small)
    for _ in range(99):
        kinds.fade()
        kinds.check()
    assert 0.9 < kinds.odds(large) < kinds.odds(small) < 1.3, "long ago"


@pytest.mark.parametrize("dear", [1, 8])
def test_the_kind_that_is_asked_for_again_is_what_is_written(dear: int) -> None:
    judge = Judge(16 * ARENA)  # a request is little of it
    came, written = {1: 0, 8: 0}, {1: 0, 8: 0}
    for turn in range(400):
        for size in (1,) * 8 + (8,):
            chunks = judge.request((turn * 9 + came[1] + came[8]) * 10, size)
            kept = [judge.leave(e) for e in reversed(chunks)]
            came[size] += size
            written[size] += sum(kept) if turn >= 200 else 0
            if size == dear and turn % 4 == 0:
                judge.it.read(chunks)  # a quarter of this kind is wanted again
    assert 0.4 < written[dear] / 3200 < SHARE + 0.05, "of all that came since it was known"
    assert written[9 - dear] < 0.2 * written[dear], written


def test_what_was_refused_tells_what_its_kind_is_worth_and_is_forgotten_slowly() -> None:
    judge = Judge()
    kinds, kind = judge.it._kinds, Origin(0.0, 0, 1).kind()
    for n in range(640):
        judge.leave(judge.entry(n))
    assert judge.counters.nvme_refused_value > 500
    fades = 640 * UNIT // ARENA  # arenas that left
    left = sum(64 * FADE**n for n in range(1, fades + 1))
    assert kinds._left[kind] == pytest.approx(left, rel=0.05) and not sum(kinds._asked)
    for n in range(600, 640):
        judge.index.remove(judge.entry(n))
    assert kinds._asked[kind] == judge.counters.nvme_ghost_hits == sum(kinds._asked) == 40
    used = judge.entry(1000)
    used.uses = 1  # not what the coin is about
    judge.leave(used)
    judge.entry(1000)
    assert sum(kinds._asked) == 40


def test_what_was_asked_for_long_ago_is_no_judge_of_kinds() -> None:
    """Faded for thousands of arenas full it is still above 0, and its mean is not."""
    kinds, once = Kinds(), Origin(0.0, 0, 1).kind()
    kinds.left(once)
    kinds.asked(once)
    for _ in range(8000):
        for _ in range(10):
            kinds.left(once)
        kinds.fade()
        kinds.check()
        assert kinds.odds(once) == pytest.approx(1.0)
    assert kinds.odds(once) == kinds.odds(KINDS - 1) == 1.0
    for _ in range(10):
        kinds.asked(once + 1)
    assert kinds.odds(once + 1) > 1.0 > kinds.odds(once), "it learns again"


# -- in the Manager


class Rig:
    def __init__(
        self, slots: int = 64, tb: float | None = 1e4, mode: str = "auto", slot_bytes: int = UNIT
    ) -> None:
        layout = layout_of(full_group(slot_bytes=slot_bytes))
        data = slots * slot_bytes
        self.clock = FakeClock()
        self.arena = FakeArena(data, slots_needed(layout, data))
        self.store = FakeStore(clock=self.clock)
        self.manager = Manager(
            layout,
            self.arena,
            self.store,
            write_tb_per_day=tb,
            nvme_bytes=1 << 40,
            nvme_admission=mode,
            clock=self.clock,
        )
        self.c = self.manager.counters

    @property
    def judge(self) -> Admission:
        assert self.manager._nvme is not None and self.manager._nvme.admission is not None
        return self.manager._nvme.admission

    def chain(self, text: str) -> Chain:
        return chain_of(ONE, text)

    def put(self, text: str) -> None:
        chain = self.chain(text)
        for item in self.manager.begin_store(chain, 0, chain.tokens):
            self.arena.worker_store(item)
        self.manager.poll()
        self.manager.check()

    def tick(self, busy: bool = True) -> None:
        self.manager.tick(busy)
        self.store.step()
        self.manager.poll()
        self.manager.check()

    def idle(self, ticks: int = 8) -> None:
        self.clock.advance(IDLE_S)
        for _ in range(ticks):
            self.tick(False)

    def hit(self, text: str) -> int:
        chain = self.chain(text)
        return self.manager.lookup(chain, 0, chain.tokens).end // 16

    def worth_it(self) -> None:
        """As if NVMe had given much: every victim is worth writing."""
        self.judge.asked(1 << 34)
        self.judge._pay(-(1 << 34))


def test_nothing_is_written_before_it_has_to_go() -> None:
    rig = Rig()
    rig.put("a" * 60)
    for _ in range(5):
        rig.tick()
    assert rig.c.nvme_written == 0 and not rig.store.queue


def test_an_idle_engine_writes_a_small_cache_out_and_a_restart_finds_it() -> None:
    rig = Rig()
    rig.put("abcdef")
    rig.idle()
    assert rig.c.nvme_written == rig.c.nvme_admitted_idle == 6
    assert rig.manager.occupancy().dirty_chunks == 0
    rig.manager.reset()
    assert rig.hit("abcdef") == 6


def test_idle_means_that_nothing_moved_for_a_while() -> None:
    rig = Rig()
    rig.put("ab")
    rig.clock.advance(IDLE_S - 0.1)
    rig.tick(False)
    lease = rig.manager.acquire("r", rig.chain("ab"), 0, 32)
    assert lease is not None
    rig.manager.release(lease.id)
    rig.clock.advance(IDLE_S - 0.1)
    rig.tick(True)  # a step that moves no KV
    assert rig.c.nvme_written == 0
    rig.clock.advance(0.2)
    rig.tick(False)
    assert rig.c.nvme_written == 2


def test_idle_writing_is_bounded_until_nvme_was_of_use(monkeypatch: pytest.MonkeyPatch) -> None:
    assert FREE_BYTES >= 1 << 30
    monkeypatch.setattr(admission, "FREE_BYTES", 4 * UNIT)
    rig = Rig(slots=64)
    rig.put("a" * 60)
    rig.idle()
    assert rig.c.nvme_written == 8, "an eighth of the arena"
    assert [k for _, k in rig.store.order] == list(rig.chain("a" * 60).keys(0)[:8]), "hottest first"
    rig.worth_it()
    rig.idle()
    assert rig.c.nvme_written == 8 + int(SHARE * 64)


def test_drain_writes_hottest_first_within_the_same_bounds(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(admission, "FREE_BYTES", 4 * UNIT)
    rig = Rig(slots=64)
    rig.put("xyz")
    rig.put("a" * 10)
    assert rig.hit("xyz") == 3
    assert rig.manager.acquire("r", rig.chain("xyz"), 0, 48) is not None
    assert rig.manager.drain(5.0)
    written = [k for _, k in rig.store.order]
    assert written == [*rig.chain("xyz").keys(0), *rig.chain("a" * 10).keys(0)[:5]]


def test_nothing_is_written_for_a_next_process_that_could_not_read_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """After a reset or a change of weights keys end with this process: only what DRAM has no room
    for goes to NVMe."""
    rig = Rig(slots=64)
    rig.put("a" * 60)
    rig.manager.end_idle_writes()
    rig.worth_it()
    rig.idle()
    assert rig.manager.drain(5.0) and not rig.store.order
    for n in range(16):  # victims are written as before
        rig.put(chr(97 + n) * 16)
        rig.tick()
    assert rig.store.order and not rig.c.nvme_admitted_idle


def test_victims_are_written_before_their_turn_and_then_evicted() -> None:
    rig = Rig(slots=256)
    rig.worth_it()
    for n in range(32):
        rig.put(chr(97 + n) * 8)
    rig.tick()
    for n in range(32):
        rig.put(chr(200 + n) * 4)
        rig.tick()
    c = rig.c
    assert c.evicted == 128 and c.nvme_outrun == 0
    assert c.nvme_admitted_coin == c.nvme_written > 128
    assert c.evicted_unwritten <= 4, "at most those before the first look ahead"
    assert [rig.hit(chr(97 + n) * 8) for n in range(15)] == [8] * 15, "whole chains"


@pytest.mark.parametrize("slot_bytes", [UNIT, 9 * UNIT // 4, 5 * UNIT])
def test_victims_are_judged_ahead_of_their_turn_whatever_the_slot_size(slot_bytes: int) -> None:
    """2.25 and 5 MiB (8B and 70B models): nearly a sixteenth of the arena fits no slot, so that the
    bytes held never come within a thirty-second of it."""
    rig = Rig(slots=512, slot_bytes=slot_bytes)
    rig.worth_it()
    alloc = rig.manager._pool.alloc
    for n in range(alloc.capacity(0) // 8):
        rig.put(chr(200 + n) * 8)
    left = alloc.slots_free(0)
    assert left < 8 and (slot_bytes == UNIT or alloc.capacity(0) < 512 * 31 // 32)
    rig.manager.tick(True)
    assert rig.c.evicted == 0 and rig.c.nvme_admitted_coin > 0
    rig.manager.check()


def test_a_victim_that_is_being_written_is_passed_over() -> None:
    rig = Rig(slots=64)
    rig.worth_it()
    rig.put("a" * 32)
    rig.put("b" * 32)
    rig.put("cdef")  # four leave: the coldest are reserved, and others go in their place
    waiting = [e for e in rig.manager._pool.index if e.reserved]
    assert waiting and all(rig.manager._pool.index.get(e.key) is e for e in waiting)
    assert rig.c.evicted == 4
    rig.tick()
    assert all(not e.reserved and not e.dirty for e in waiting)


def test_a_disk_that_is_outrun_costs_chunks_not_time() -> None:
    rig = Rig(slots=64)
    rig.worth_it()
    rig.store.hung = True
    rig.put("a" * 64)
    for text in ("b" * 40, "c" * 40, "d" * 40):
        rig.put(text)
        rig.manager.tick(True)
    c = rig.c
    assert c.nvme_outrun > 0 and c.evicted_unwritten == c.evicted and c.store_skipped_full == 0
    occupied = rig.manager.occupancy()
    assert occupied.nvme_inflight_write_bytes <= 16 * UNIT
    assert rig.hit("d" * 40) == 40


def test_without_other_victims_what_waits_gives_way() -> None:
    rig = Rig(slots=8)
    rig.worth_it()
    rig.store.raising = {"put_slots"}
    rig.put("abcdefgh")
    lease = rig.manager.acquire("r", rig.chain("abcdefg"), 0, 7 * 16)
    assert lease is not None
    rig.put("z")  # its only victim is h: reserved, then given up
    assert rig.hit("z") == 1 and rig.c.nvme_outrun == 1 and rig.hit("abcdefgh") == 7


def test_a_spent_budget_refuses_and_says_so() -> None:
    rig = Rig(slots=64, tb=1e-5)  # 10 MB a day
    rig.worth_it()
    rig.judge.bucket.take(1, rig.clock.now)
    for n in range(8):
        rig.put(chr(97 + n) * 32)
        for _ in range(4):
            rig.manager.prefetch("x", rig.chain(chr(97 + n)), 0, 16)
        rig.tick()
    c = rig.c
    assert c.nvme_written <= 2
    assert c.nvme_refused_budget + c.nvme_refused_coin >= 180


def test_a_disk_without_room_does_not_hold_slots_for_ever() -> None:
    rig = Rig(slots=64)
    rig.worth_it()
    rig.store.write_result = StoreResult.NO_SPACE
    for n in range(8):
        rig.put(chr(97 + n) * 32)
        rig.tick()
    assert rig.c.nvme_no_space > 0 and rig.c.nvme_written == 0
    assert all(e.attempts <= MAX_ATTEMPTS for e in rig.manager._pool.index)
    assert rig.c.evicted >= 8 * 32 - 64 - 8


@pytest.mark.parametrize(
    "why", ["dropped", "reserved", "being written", "retired", "clean", "tried too often"]
)
def test_what_became_unfit_since_it_was_ranked_is_not_written(
    why: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(admission, "FREE_BYTES", 0)
    monkeypatch.setattr(admission, "FREE_PART", 1 << 30)
    rig = Rig(slots=64)
    rig.put("abcd")
    rig.idle(1)  # ranked, and nothing may be written yet
    assert rig.c.nvme_written == 0
    entry = rig.manager._pool.index.get(rig.chain("abcd").key(0, 3))
    nvme = rig.manager._nvme
    assert entry is not None and nvme is not None
    if why == "dropped":
        rig.manager.slot_failed(entry.ref, LoadFailure.CORRUPT)
    elif why == "reserved":
        nvme.writes.reserve(entry)
        monkeypatch.setattr(nvme.writes, "submit", lambda now, limit: 0)
    elif why == "being written":
        nvme.writes._put([entry], rig.clock.now)
        rig.store.hung = True
    elif why == "retired":
        chain = rig.chain("abcd")
        rig.manager.keep.release(chain, 48, 64)
    elif why == "clean":
        entry.dirty = False
    else:
        entry.attempts = MAX_ATTEMPTS
    rig.worth_it()
    rig.manager.tick(False)
    assert rig.c.nvme_admitted_idle == 3
    rig.manager.check()


def test_idle_looks_at_a_part_of_what_is_held_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(idle, "LOOK", 16)
    rig = Rig(slots=64)
    rig.put("a" * 30)
    rig.put("b" * 30)
    rig.idle(3)
    assert rig.c.nvme_written == 0
    rig.idle(6)  # the last part, then as many a tick as it looks at
    assert rig.c.nvme_written == 60
    first = {k for _, k in rig.store.order[:32]}
    assert first > set(rig.chain("b" * 30).keys(0)), "the hottest, whichever part they were in"


def test_an_idle_engine_waits_for_a_disk_that_fails() -> None:
    rig = Rig(slots=64)
    rig.put("a" * 60)
    rig.clock.advance(IDLE_S)
    rig.store.write_result = StoreResult.IO_ERROR
    for _ in range(10):
        rig.tick(True)
    assert rig.c.nvme_io_errors == 16 and rig.c.nvme_outrun == 0
    rig.clock.advance(COOL_S)
    rig.tick(True)
    assert rig.c.nvme_io_errors == 17, "one chunk finds out"
    rig.store.write_result = None
    rig.clock.advance(COOL_S)
    for _ in range(6):
        rig.tick(True)
    assert rig.c.nvme_written == 60 - 17 and rig.c.nvme_outrun == 0


def with_chunks_waiting() -> tuple[Rig, list[Entry]]:
    """A rig some of whose chunks, those returned, are evicted once they are written."""
    rig = Rig(slots=64)
    rig.worth_it()
    for text in ("a" * 32, "b" * 32, "cdef"):
        rig.put(text)
    waiting = [e for e in rig.manager._pool.index if e.reserved]
    assert waiting
    return rig, waiting


def test_what_waits_to_be_written_may_go_when_the_tier_is_taken_out_of_use() -> None:
    rig, _ = with_chunks_waiting()
    index = rig.manager._pool.index
    rig.manager.quarantine(Tier.NVME)
    rig.tick()
    assert not any(e.reserved for e in index) and not rig.store.order
    assert rig.manager.drain(5.0)


def test_what_waits_to_be_written_when_its_session_ends_is_not() -> None:
    rig, waiting = with_chunks_waiting()
    purse = rig.judge._purse
    chain = rig.chain("a" * 32)
    rig.manager.keep.release(chain, 0, chain.tokens)
    rig.manager.check()
    assert not any(e.reserved for e in rig.manager._pool.index)
    assert rig.judge._purse == min(SHARE * 64 * UNIT, purse + len(waiting) * UNIT)
    rig.tick()
    assert not rig.store.order


def test_an_unknown_mode_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"nvme_admission='some'.*auto, all"):
        Rig(mode="some")


def test_what_nvme_gave_counts_as_value() -> None:
    rig = Rig(slots=64)
    rig.put("abcd")
    rig.idle()
    rig.manager.reset()
    before = rig.judge.value()
    chain = rig.chain("abcd")
    assert rig.manager.acquire("r", chain, 0, chain.tokens) is not None
    assert rig.judge.value() > before
