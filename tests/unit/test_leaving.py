"""What waits to be written and keeps its slot: who comes behind it, and how much of it gives way."""

from __future__ import annotations

import random
from itertools import count

import pytest

from kvoffload.core import leaving, writebehind
from kvoffload.core.hashchain import Chain
from kvoffload.core.index import Entry, Index
from kvoffload.core.leaving import Fringe
from kvoffload.core.manager import Manager
from kvoffload.core.policy import LruPolicy
from kvoffload.core.sizes import slots_needed
from kvoffload.core.writebehind import GIVE_WAY, WriteBehind
from kvoffload.types import ChunkKey, GroupLayout, SlotRef, SlotState, Tier
from tests.support.fakes import (
    UNIT,
    FakeArena,
    FakeClock,
    FakeStore,
    chain_of,
    full_group,
    layout_of,
)


def key(n: int) -> ChunkKey:
    return ChunkKey(n.to_bytes(16, "little"))


class Forest:
    """Chunks in an index, some of them reserved."""

    def __init__(self) -> None:
        self.index = Index([LruPolicy(count(1))])
        self.fringe = Fringe(self.index)

    def add(self, n: int, parent: int | None = None) -> Entry:
        above = self.index.get(key(parent)) if parent is not None else None
        place = above.chunk + 1 if above is not None else 0
        entry = Entry(
            key(n), 0, place, 0, 1, SlotRef(n, 1, n), Tier.DRAM,
            key(parent) if parent is not None else None, 0, 0.0, SlotState.READY,
        )  # fmt: skip
        self.index.add(entry)
        return entry

    def reserve(self, entry: Entry, on: bool = True) -> None:
        entry.reserved = on
        if on:
            self.fringe.add(entry)
        else:
            self.fringe.remove(entry)
        self.index.refresh(entry)

    def reserved(self) -> list[Entry]:
        return [e for e in self.index if e.reserved]


def test_only_the_first_of_a_run_is_looked_at() -> None:
    forest = Forest()
    chain = [forest.add(n, n - 1 if n else None) for n in range(1000)]
    for entry in reversed(chain[1:]):
        forest.reserve(entry)
    assert forest.fringe.going(()) == {key(1): key(0)}
    forest.reserve(chain[0])
    assert not forest.fringe.going(()), "nothing is behind a root"
    forest.reserve(chain[500], False)
    assert forest.fringe.going(()) == {key(501): key(500)}
    forest.fringe.check(forest.reserved())


@pytest.mark.parametrize("seed", range(60))
def test_the_same_chunks_come_as_if_all_were_looked_at(seed: int) -> None:
    rng = random.Random(seed)
    forest = Forest()
    entries: list[Entry] = []
    for n in range(80):
        parent = rng.choice([None, *range(max(0, n - 5), n)]) if rng.random() < 0.95 else None
        entries.append(forest.add(n, parent))
    for _ in range(120):
        entry = rng.choice(entries)
        forest.reserve(entry, not entry.reserved)
        forest.fringe.check(forest.reserved())
    pinned = rng.choice(entries)
    forest.index.pin(pinned)
    writing = [e for e in entries if not e.reserved and rng.random() < 0.1]
    for entry in writing:
        entry.io += 1
        forest.index.refresh(entry)
    everything = [*forest.reserved(), *writing]
    slow = {e.key: e.parent for e in everything if e.parent is not None}
    most = rng.choice([3, 80])
    want = forest.index.coming(0, most, slow)
    assert forest.index.coming(0, most, forest.fringe.going(writing)) == want
    forest.index.check()


def test_a_parent_shared_by_many_is_judged_once(monkeypatch: pytest.MonkeyPatch) -> None:
    forest = Forest()
    root = forest.add(0)
    chats = [forest.add(n, 0) for n in range(1, 1001)]
    for entry in chats:
        forest.reserve(entry)
    asked: list[ChunkKey] = []
    below = forest.index.below
    monkeypatch.setattr(forest.index, "below", lambda k: asked.append(k) or below(k))
    assert forest.index.coming(0, 4, forest.fringe.going(())) == [root]
    assert asked == [root.key]


# -- in the Manager


class Rig:
    """A full arena of chains whose every chunk was used twice: all are worth writing."""

    def __init__(self, groups: list[GroupLayout], slots: int) -> None:
        self.layout = layout_of(*groups)
        data = slots * UNIT
        self.arena = FakeArena(data, slots_needed(self.layout, data))
        clock = FakeClock()
        self.manager = Manager(
            self.layout,
            self.arena,
            FakeStore(clock=clock),
            write_tb_per_day=1e4,
            nvme_bytes=1 << 40,
            clock=clock,
        )
        self.c = self.manager.counters
        assert self.manager._nvme is not None and self.manager._nvme.admission is not None
        self.writes: WriteBehind = self.manager._nvme.writes
        self.manager._nvme.admission.asked(1 << 34)
        self.manager._nvme.admission._pay(-(1 << 34))

    def chain(self, text: str) -> Chain:
        return chain_of(self.layout, text)

    def put(self, text: str) -> int:
        """Chunks stored."""
        chain = self.chain(text)
        items = self.manager.begin_store(chain, 0, chain.tokens)
        for item in items:
            self.arena.worker_store(item)
        self.manager.poll()
        for item in items:
            entry = self.manager._pool.index.get(item.key)
            if entry is not None:
                entry.uses = 1
        self.manager.check()
        return len(items)

    def reserved(self) -> list[Entry]:
        return [e for e in self.manager._pool.index if e.reserved]


def test_a_few_give_way_and_not_all() -> None:
    """Every chain's leaf is worth writing, so that no victim is left: one chunk was stored, and
    all that waited used to be given up for it."""
    rig = Rig([full_group()], 512)
    for n in range(64):
        rig.put(chr(200 + n) * 8)
    assert rig.put("z") == 1
    assert 0 < rig.c.nvme_outrun <= GIVE_WAY
    assert len(rig.reserved()) >= 64 - GIVE_WAY
    assert rig.c.evicted == 1 and rig.c.store_skipped_full == 0


def test_the_youngest_give_way_leaf_first() -> None:
    rig = Rig([full_group()], 64)
    rig.put("a" * 32)
    rig.put("b" * 32)
    index = rig.manager._pool.index
    for text in "ab":
        keys = rig.chain(text * 32).keys(0)
        for entry in reversed([e for e in index.find(keys) if e is not None]):
            rig.writes.reserve(entry)
    assert rig.writes.give_way()
    first, second = (index.find(rig.chain(text * 32).keys(0)) for text in "ab")
    assert all(e is not None and e.reserved for e in first)
    assert [e is not None and e.reserved for e in second] == [True] * 16 + [False] * 16
    rig.manager.check()
    for _ in range(16):  # each makes room for one, and none that waits is asked for more
        victim = index.victim(0)
        assert victim is not None and victim in second
        rig.manager._pool._evict(victim)
    assert index.victim(0) is None
    rig.manager.check()


def test_a_long_queue_is_not_gone_through(monkeypatch: pytest.MonkeyPatch) -> None:
    """What can go of one long chain is what was queued first: near the old end."""
    monkeypatch.setattr(leaving, "LOOKED_YOUNG", 4)
    monkeypatch.setattr(leaving, "LOOKED_OLD", 4)
    rig = Rig([full_group()], 64)
    rig.put("a" * 64)
    index = rig.manager._pool.index
    entries = [e for e in index.find(rig.chain("a" * 64).keys(0)) if e is not None]
    for entry in reversed(entries):
        rig.writes.reserve(entry)
    asked: list[ChunkKey] = []
    below = index.below
    monkeypatch.setattr(index, "below", lambda k: asked.append(k) or below(k))
    assert rig.writes.give_way()
    assert [e.reserved for e in entries] == [True] * 48 + [False] * 16
    assert len(asked) <= 4 + 4 + 3 * GIVE_WAY


def test_nothing_is_given_up_where_that_makes_no_room() -> None:
    """A lease keeps the leaf: what waits before it could not go anyway."""
    rig = Rig([full_group()], 8)
    rig.put("abcdefgh")
    index = rig.manager._pool.index
    entries = [e for e in index.find(rig.chain("abcdefgh").keys(0)) if e is not None]
    for entry in entries[:-1]:
        rig.writes.reserve(entry)
    lease = rig.manager.acquire("r", rig.chain("abcdefgh"), 0, 8 * 16)
    assert lease is not None
    assert rig.put("z") == 0 and rig.c.nvme_outrun == 0 and len(rig.reserved()) == 7
    rig.manager.release(lease.id)
    assert rig.put("z") == 1
    rig.manager.check()


def test_what_waits_does_not_keep_an_extent_from_another_class() -> None:
    rig = Rig([full_group(0), full_group(1, slot_bytes=2 * UNIT)], 256)
    for n in range(64):
        rig.put(chr(200 + n) * 8)
    index = rig.manager._pool.index
    for entry in list(index):
        if entry.cls == 0:
            index.pin(entry)
        elif not entry.reserved and index.victim(1) is not entry:
            rig.writes.reserve(entry)
    assert index.victim(0) is None and index.victim(1) is not None
    chain = rig.chain("z")
    assert len(rig.manager.begin_store(chain, 0, chain.tokens)) == 2, "one of each"
    assert rig.c.reclaimed_extents == 1
    rig.writes.check()
    index.check()


def test_the_fringe_follows_what_is_written_and_dropped() -> None:
    rig = Rig([full_group()], 256)
    for n in range(32):
        rig.put(chr(97 + n) * 8)
    for n in range(24):
        rig.put(chr(200 + n) * 4)
        rig.manager.tick(True)
        rig.manager.poll()
        rig.manager.check()
    assert rig.c.nvme_written or rig.writes.inflight
    rig.manager.reset()
    rig.manager.check()
    assert not rig.writes._fringe.going(())


def waiting(rig: Rig, text: str, leaf: bool = True) -> list[Entry]:
    """A chain that waits to be written, leaf first; without its leaf that is leased."""
    rig.put(text)
    chain = rig.chain(text)
    entries = [e for e in rig.manager._pool.index.find(chain.keys(0)) if e is not None]
    for entry in reversed(entries if leaf else entries[:-1]):
        rig.writes.reserve(entry)
    if not leaf:
        end = len(entries) * 16
        assert rig.manager.acquire("r", chain, end - 16, end) is not None
    return entries


def test_what_a_lease_uses_keeps_its_place_in_the_queue() -> None:
    """No room would come of it: its write would be lost for nothing."""
    rig = Rig([full_group()], 64)
    for n in range(8):
        text = chr(200 + n) * 8
        waiting(rig, text)
        assert rig.manager.acquire(f"r{n}", rig.chain(text), 0, 8 * 16) is not None
    assert rig.put("z") == 0
    assert rig.c.nvme_outrun == 0 and len(rig.reserved()) == 64
    rig.manager.check()


def test_what_hints_keep_gives_way_last() -> None:
    rig = Rig([full_group()], 64)
    kept: list[Entry] = []
    for n in range(8):
        entries = waiting(rig, chr(200 + n) * 8)
        if n >= 4:  # the youngest
            chain = rig.chain(chr(200 + n) * 8)
            rig.manager.keep.retain(chain, chain.tokens, 1000.0, 1)
            kept += entries
    for n in range(32):
        assert rig.put(chr(400 + n)) == 1
        if n < 31:
            assert all(e.reserved for e in kept), "while others can go"
    assert rig.c.hint_retain_cut == 0
    rig.manager.check()


def test_what_hints_retain_goes_where_nothing_else_can() -> None:
    """All that DRAM holds waits to be written and is retained: a hint is no claim to all of it."""
    rig = Rig([full_group()], 64)
    for n in range(4):
        text = chr(200 + n) * 8
        waiting(rig, text)
        rig.manager.keep.retain(rig.chain(text), 8 * 16, 1000.0, 1)
    for n in range(4):
        text = chr(300 + n) * 8
        waiting(rig, text)
        assert rig.manager.acquire(f"r{n}", rig.chain(text), 0, 8 * 16) is not None
    assert rig.put("z") == 1
    assert rig.c.hint_retain_cut == 1 and 0 < rig.c.nvme_outrun <= GIVE_WAY
    rig.manager.check()


def test_what_can_go_is_found_in_the_middle_of_the_queue(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(leaving, "LOOKED_YOUNG", 4)
    monkeypatch.setattr(leaving, "LOOKED_OLD", 4)
    rig = Rig([full_group()], 64)
    waiting(rig, "a" * 24, leaf=False)
    middle = waiting(rig, "b" * 16)
    waiting(rig, "c" * 24, leaf=False)
    assert rig.put("z") == 1 and rig.c.store_skipped_full == 0
    assert rig.c.nvme_outrun == GIVE_WAY == sum(not e.reserved for e in middle)
    rig.manager.check()


def test_all_of_the_queue_is_looked_at_at_a_bounded_pace(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(leaving, "LOOKED_YOUNG", 4)
    monkeypatch.setattr(leaving, "LOOKED_OLD", 4)
    rig = Rig([full_group()], 1024)
    for n in range(4):
        waiting(rig, chr(200 + n) * 256, leaf=False)
    looked: list[int] = []

    def count(queue: object, index: object, *more: object, near: bool = True) -> list[Entry]:
        looked.append(not near)
        return []

    monkeypatch.setattr(writebehind, "giving_way", count)
    for n in range(64):
        assert rig.put(chr(300 + n)) == 0
    whole = sum(looked)
    assert 0 < whole <= 2 * (64 * 64 / 1000 + 2), "for each of them was it looked at 64"
    rig.manager.check()
