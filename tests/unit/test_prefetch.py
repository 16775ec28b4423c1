"""Prefetches of long prompts: a bounded number of chunks at a time, and when they end."""

from __future__ import annotations

import pytest

from kvoffload.core import prefetch
from kvoffload.core.breaker import COOL_S
from kvoffload.core.hashchain import Chain
from kvoffload.core.prefetch import STEP_CHUNKS
from kvoffload.core.watch import STALL_S
from kvoffload.types import ChunkKey, SlotState, StoreResult, Tier
from tests.support.fakes import UNIT, full_group, layout_of, sliding_group
from tests.unit.test_filling import numbered, on_disk
from tests.unit.test_manager import ONE, TOK, Rig, make

N = 5000
STEPS = -(-N // STEP_CHUNKS)


def begun(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Slots that were set FILLING."""
    slots: list[int] = []
    begin_fill = rig.arena.begin_fill

    def count(slot: int, need_mask: int) -> int:
        slots.append(slot)
        return begin_fill(slot, need_mask)

    monkeypatch.setattr(rig.arena, "begin_fill", count)
    return slots


def moved(rig: Rig, chain: Chain) -> list[bool]:
    return [key in rig.manager._pool.index for key in chain.keys(0)]


def step(rig: Rig) -> None:
    rig.manager.tick(True)
    rig.store.step()
    rig.manager.check()


@pytest.fixture
def few(monkeypatch: pytest.MonkeyPatch) -> int:
    """Steps of four chunks."""
    monkeypatch.setattr(prefetch, "STEP_CHUNKS", 4)
    return 4


def test_a_long_prompt_moves_a_part_at_a_time_from_the_root(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    rig = make(slots=4 * N, load="always")
    chain = on_disk(rig, N)
    slots = begun(rig, monkeypatch)
    assert rig.manager.prefetch("r", chain, 0, chain.tokens) == STEP_CHUNKS == len(slots)
    for n in range(1, STEPS + 1):
        got = min(N, n * STEP_CHUNKS)
        assert moved(rig, chain) == [True] * got + [False] * (N - got)
        before = len(slots)
        step(rig)
        assert len(slots) - before <= STEP_CHUNKS
    rig.manager.tick(True)
    assert len(slots) == N == rig.manager.counters.prefetched
    assert rig.manager.occupancy().prefetch_bytes == N * UNIT
    assert rig.manager.lookup(chain, 0, chain.tokens).by_tier == {Tier.DRAM: chain.tokens}
    assert rig.manager.cancel_prefetch("r") == N
    rig.manager.check()


def test_a_prompt_within_the_bound_moves_at_once() -> None:
    rig = make(slots=4 * STEP_CHUNKS, load="always")
    chain = on_disk(rig, STEP_CHUNKS)
    assert rig.manager.prefetch("r", chain, 0, chain.tokens) == STEP_CHUNKS
    assert not rig.manager._prefetcher._rests
    rig.manager.check()


@pytest.mark.parametrize(
    "how", ["cancel", "acquire", "reset", "breaker", "drop_nvme", "quarantine"]
)
def test_what_ends_it(few: int, how: str) -> None:
    rig = make(slots=256, load="always")
    chain = on_disk(rig, 40)
    assert rig.manager.prefetch("r", chain, 0, chain.tokens) == few
    assert rig.manager.prefetch("s", chain, 20 * TOK, chain.tokens) == few
    step(rig)
    assert sum(moved(rig, chain)) == 3 * few
    if how == "cancel":
        assert rig.manager.cancel_prefetch("r") == 2 * few
    elif how == "acquire":
        assert rig.manager.acquire("r", chain, 0, TOK) is not None
    elif how == "reset":
        rig.manager.reset()
    elif how == "breaker":
        rig.manager.tick(True)
        rig.store.hung = True
        rig.clock.advance(STALL_S * 1.1)
        rig.manager.tick(True)
        assert rig.manager.counters.nvme_stalled == 1
    elif how == "drop_nvme":
        rig.manager.drop_nvme()
    else:
        rig.manager.quarantine(Tier.NVME)
    rig.manager.check()
    before = sum(moved(rig, chain))
    for _ in range(12):
        step(rig)
    left = {"cancel": 8, "acquire": 8}.get(how, 0)  # of r: what s does not move
    after = sum(moved(rig, chain))
    assert after - before == (20 - few if left else 0), "the other one's goes on"
    assert not rig.manager._prefetcher._rests


def test_what_is_wished_for_goes_on_after_the_request_took_what_it_needs(few: int) -> None:
    """HBM may hold the head of a pinned prompt: its request loads the tail only."""
    rig = make(slots=256, load="always")
    chain = on_disk(rig, 40)
    assert rig.manager.prefetch("r", chain, 0, chain.tokens, True) == few
    assert rig.manager.acquire("r", chain, 38 * TOK, chain.tokens) is not None
    for _ in range(4):
        step(rig)
    assert sum(moved(rig, chain)) == 5 * few + 2
    assert rig.manager.cancel_prefetch("r") == 5 * few
    for _ in range(4):
        step(rig)
    assert all(moved(rig, chain)[: 9 * few]), "also when the request is over"


def test_what_is_wished_for_comes_up_though_its_request_is_over(few: int) -> None:
    """HBM had the prompt, and one token was asked for: over within a tick."""
    rig = make(slots=256, load="always")
    chain, other = on_disk(rig, 40), numbered(ONE, 60)
    assert rig.manager.keep.pin(chain, chain.tokens)
    rig.manager.prefetch("r", chain, 0, chain.tokens, True)
    rig.manager.cancel_prefetch("r")
    rig.store.held.update({key: key for key in other.keys(0)})
    rig.manager.prefetch("s", other, 40 * TOK, other.tokens)
    for _ in range(4):
        step(rig)
    assert sum(moved(rig, chain)) == few and all(moved(rig, other)[40:]), "who waits goes first"
    before = rig.manager.occupancy().prefetch_bytes
    for _ in range(9):
        step(rig)
    assert all(moved(rig, chain)) and not rig.manager._prefetcher._wishes
    assert rig.manager.occupancy().prefetch_bytes == before, "no request's budget"


def test_what_is_moved_for_nobody_is_bounded(few: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prefetch, "WISHES_KEPT", 3)
    rig = make(slots=64, load="always")
    chain = on_disk(rig, 60)
    rig.manager.prefetch("r", chain, 0, chain.tokens, True)
    rig.manager.cancel_prefetch("r")
    for _ in range(20):
        step(rig)
    assert sum(moved(rig, chain)) == few + 16, "a quarter of the arena"
    for n in range(5):
        rig.manager.prefetch(f"r{n}", chain, 0, chain.tokens, True)
        rig.manager.cancel_prefetch(f"r{n}")
        rig.manager.check()
    assert len(rig.manager._prefetcher._wishes) == 3
    rig.manager.reset()
    assert not rig.manager._prefetcher._wishes


@pytest.mark.parametrize("over", [False, True])
def test_a_tier_that_may_hang_is_not_tried_with_a_whole_step(few: int, over: bool) -> None:
    """The chunk that a probe would read is in DRAM again: a request is to find another one. What
    was still to be moved was read as the probe, all of it."""
    rig = make(slots=256, load="always")
    chain = on_disk(rig, 40)
    rig.manager.prefetch("r", chain, 0, chain.tokens, over)
    if over:
        rig.manager.cancel_prefetch("r")
    nvme = rig.manager._nvme
    assert nvme is not None
    rig.store.step()
    rig.manager.poll()
    nvme.breaker.trip(rig.clock())
    rig.clock.advance(COOL_S)
    assert nvme.probe_due(rig.clock())
    before = sum(moved(rig, chain))
    rig.manager.tick(True)
    assert sum(moved(rig, chain)) == before and nvme.probe_due(rig.clock())
    prefetcher = rig.manager._prefetcher
    assert not prefetcher._rests and not prefetcher._wishes
    rig.manager.check()


def test_what_others_have_moved_takes_no_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Many requests of one long prompt: once it is up, another prompt's turn comes at once."""
    monkeypatch.setattr(prefetch, "STEP_CHUNKS", 64)
    rig = make(slots=8192, load="always")
    chain = on_disk(rig, 800)
    other = numbered(ONE, 1000)
    rig.store.held.update({key: key for key in other.keys(0)})
    for n in range(8):
        rig.manager.prefetch(f"r{n}", chain, 0, 800 * TOK)
    rig.manager.prefetch("s", other, 800 * TOK, other.tokens)
    turns = 0
    while not all(moved(rig, other)):
        before = rig.manager.counters.prefetched
        step(rig)
        turns += 1
        assert rig.manager.counters.prefetched > before, "a turn for nothing"
    assert turns <= (800 + 200) / 64 + 2


def test_a_step_passes_over_no_more_than_some(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prefetch, "STEP_CHUNKS", 4)
    monkeypatch.setattr(prefetch, "STEP_PLACES", 16)
    rig = make(slots=256, load="always")
    chain = on_disk(rig, 44)
    rig.manager.prefetch("r", chain, 0, chain.tokens)
    assert rig.manager.acquire("s", chain, 4 * TOK, 40 * TOK) is not None
    for at in (20, 36):
        step(rig)
        assert rig.manager._prefetcher._rests["r"].at == at
    step(rig)
    assert all(moved(rig, chain))


@pytest.mark.parametrize("how", ["prefetch", "tick", "acquire"])
def test_an_error_before_the_reads_begin_gives_the_slots_back(
    few: int, how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    rig = make(slots=256, load="always")
    chain = on_disk(rig, 40)
    if how == "tick":
        rig.manager.prefetch("r", chain, 0, chain.tokens)
    before = rig.manager.occupancy().slots_used
    nvme = rig.manager._nvme
    assert nvme is not None
    monkeypatch.setattr(nvme, "read_up", lambda entries, now: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        if how == "tick":
            rig.manager.tick(True)
        elif how == "acquire":
            rig.manager.acquire("r", chain, 0, chain.tokens)
        else:
            rig.manager.prefetch("r", chain, 0, chain.tokens)
    assert rig.manager.occupancy().slots_used == before
    rig.manager.check()


def test_the_budget_holds_over_all_steps(few: int) -> None:
    rig = make(slots=64)
    chain = on_disk(rig, 40)
    assert rig.manager.prefetch("r", chain, 0, chain.tokens) == few
    for _ in range(12):
        step(rig)
        assert rig.manager.occupancy().prefetch_bytes <= 16 * UNIT
    assert sum(moved(rig, chain)) == 16
    rig.manager.cancel_prefetch("r")
    step(rig)
    assert sum(moved(rig, chain)) == 16


def test_what_others_moved_or_store_is_passed_over(few: int) -> None:
    rig = make(slots=256, load="always")
    chain = on_disk(rig, 40)
    assert rig.manager.prefetch("r", chain, 0, chain.tokens) == few
    assert rig.manager.acquire("s", chain, 8 * TOK, 12 * TOK) is not None
    rig.store.lose(chain.key(0, 13))
    assert len(rig.manager.begin_store(chain, 13 * TOK, 14 * TOK)) == 1
    for _ in range(12):
        step(rig)
    assert all(moved(rig, chain))
    entry = rig.manager._pool.index.get(chain.key(0, 13))
    assert entry is not None and entry.state is SlotState.FILLING and entry.uses == 0
    assert rig.manager.counters.prefetched == 35


def test_it_ends_where_a_chunk_has_gone(few: int) -> None:
    rig = make(slots=256)
    chain = on_disk(rig, 40)
    rig.manager.prefetch("r", chain, 0, chain.tokens)
    rig.store.lose(chain.key(0, 17))
    for _ in range(12):
        step(rig)
    assert moved(rig, chain) == [True] * 17 + [False] * 23, "what is behind it is of no use"


def test_a_chain_that_grows_does_not_matter_and_is_not_looked_at(few: int) -> None:
    rig = make(slots=256)
    chain = on_disk(rig, 40)
    rig.manager.prefetch("r", chain, 0, 20 * TOK)
    keys = list(chain.keys(0))
    live = chain.keys(0)
    assert isinstance(live, list)
    live[:] = [ChunkKey(bytes(16))] * 60
    for _ in range(12):
        step(rig)
    assert {e.key for e in rig.manager._pool.index} == set(keys[:20])
    parents = {e.key: e.parent for e in rig.manager._pool.index}
    assert [parents[k] for k in keys[:20]] == [None, *keys[:19]]


def test_first_come_first_and_a_second_call_begins_anew(few: int) -> None:
    rig = make(slots=256)
    a, b = on_disk(rig, 12), numbered(ONE, 30)
    rig.store.held.update({key: key for key in b.keys(0)})
    rig.manager.prefetch("a", a, 0, a.tokens)
    rig.manager.prefetch("b", b, 20 * TOK, b.tokens)
    step(rig)
    assert moved(rig, b) == [True] * 8 + [False] * 12 + [True] * 4 + [False] * 6
    rig.manager.prefetch("a", a, 0, a.tokens)
    for _ in range(4):
        step(rig)
    assert all(moved(rig, a)) and sum(moved(rig, b)) == 22


def test_several_groups_move_all_that_the_boundary_needs(few: int) -> None:
    layout = layout_of(full_group(0), sliding_group(1, window=6 * TOK))
    rig = make(slots=256, layout=layout)
    chain = numbered(layout, 20)
    for g in (0, 1):
        rig.store.held.update({key: key for key in chain.keys(g)})
    rig.manager.prefetch("r", chain, 0, chain.tokens)
    for _ in range(12):
        step(rig)
    assert all(moved(rig, chain))
    window = [key in rig.manager._pool.index for key in chain.keys(1)]
    assert window == [False] * 14 + [True] * 6
    orphans = [e for e in rig.manager._pool.index if e.group == 1 and e.parent is not None]
    assert not orphans, "what slides has no parents"


def test_faults_end_it_and_leave_nothing_behind(few: int) -> None:
    rig = make(slots=256)
    chain = on_disk(rig, 40)
    rig.manager.prefetch("r", chain, 0, chain.tokens)
    rig.store.raising.add("get_slots")
    step(rig)
    assert not rig.manager._prefetcher._rests and sum(moved(rig, chain)) == few
    rig.store.raising.clear()
    rig.manager.prefetch("r", chain, 0, chain.tokens)
    rig.store.read_result = StoreResult.IO_ERROR
    for _ in range(12):
        step(rig)
    assert not rig.manager._prefetcher._rests
    assert not any(e.io or e.pins for e in rig.manager._pool.index)


def test_an_error_on_the_way_pins_nothing_and_ends_it(
    few: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    rig = make(slots=256)
    chain = on_disk(rig, 40)
    rig.manager.prefetch("r", chain, 0, chain.tokens)
    rig.manager.acquire("s", chain, 11 * TOK, 12 * TOK)
    third = chain.key(0, 10)
    monkeypatch.setattr(rig.manager._pool, "on_add", lambda entry: 1 / (entry.key != third))
    step(rig)
    assert sum(moved(rig, chain)) == 2 * few + 1
    with pytest.raises(ZeroDivisionError):
        rig.manager.tick(True)
    assert not rig.manager._prefetcher._rests
    assert sum(moved(rig, chain)) == 2 * few + 1
    rig.manager.check()
    assert all(e.state is SlotState.READY or e.io for e in rig.manager._pool.index)
