"""Slots that are being filled, and which of them the slot table is asked about.

Stores are few and somebody waits for each: all are asked about at every tick. Reads may be a good
part of the arena after a restart, and come up in the order of the disk, not in that in which they
were asked for. So the first ones are asked about, whose load began first, some that are spread over
all, others each time, which see wherever reads get on, and those of a job that has returned. A
chunk that nobody has asked about yet counts as being read, which every load of it can wait for;
whether it has failed is asked when it is leased.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import chain, islice

import numpy as np

from kvoffload.core.index import Entry
from kvoffload.core.stats import Guard
from kvoffload.tiers.base import ArenaLike
from kvoffload.types import SlotState, Tier

_FILLING = int(SlotState.FILLING)

READS_LOOKED = 1024
"""Reads asked about in one go, half of them the first: some 0.2 ms."""


class Filling:
    """Not thread safe: the Manager's lock guards it. O(1), except ``look``."""

    def __init__(self, arena: ArenaLike, guard: Guard) -> None:
        self._arena = arena
        self._guard = guard
        self._stores: dict[int, Entry] = {}  # by slot, dropped ones included
        self._reads: dict[int, Entry] = {}  # by slot, in the order asked for
        self._spread: list[Entry] = []  # the same, so that any can be picked
        self._place: dict[int, int] = {}  # where in it, by slot
        self._turn = 0
        self.looked_at_all = True  # the last time
        self.first_came = False  # the last time, of the first reads

    def __contains__(self, slot: object) -> bool:
        return slot in self._stores or slot in self._reads

    def add(self, entry: Entry) -> None:
        """Its slot was set FILLING."""
        slot = entry.ref.slot
        if entry.source is Tier.DRAM:
            self._stores[slot] = entry
        else:
            self._reads[slot] = entry
            self._place[slot] = len(self._spread)
            self._spread.append(entry)

    def discard(self, entry: Entry) -> None:
        """It is filled or given up; or nobody waits for it, and its job's return will tell."""
        slot = entry.ref.slot
        if entry.source is Tier.DRAM:
            self._stores.pop(slot, None)
        elif self._reads.pop(slot, None) is not None:
            at, last = self._place.pop(slot), self._spread.pop()
            if last.ref.slot != slot:
                self._spread[at] = last
                self._place[last.ref.slot] = at

    def at(self, slot: int) -> Entry | None:
        """What fills ``slot``."""
        return self._stores.get(slot) or self._reads.get(slot)

    def stores(self) -> Iterator[Entry]:
        """What workers fill."""
        return iter(self._stores.values())

    def look(self, returned: Iterable[Entry], all_reads: bool) -> list[tuple[Entry, int]]:
        """Entries and their slots' states now: every store, some of the reads or ``all_reads``, and
        those of ``returned`` (the entries of read jobs) whose state is not known yet."""
        self.looked_at_all = all_reads or len(self._reads) <= READS_LOOKED
        first = None if self.looked_at_all else READS_LOOKED - READS_LOOKED // 2
        asked = dict(chain(islice(self._reads.items(), first), self._stores.items()))
        firsts = len(asked) - len(self._stores)
        waiting = (e for e in returned if e.state is SlotState.FILLING)
        for entry in chain(() if first is None else self._others(READS_LOOKED // 2), waiting):
            asked[entry.ref.slot] = entry
        entries = list(asked.values())
        states = self.states(entries)
        self.first_came = any(state != _FILLING for state in states[:firsts])
        return list(zip(entries, states, strict=True))

    def _others(self, most: int) -> list[Entry]:
        """Up to ``most`` reads at even distances, the next ones at each call: in as many calls as
        the distance is, all had their turn but for those that changed places when others went."""
        step = -(-len(self._spread) // most) if most else 0
        self._turn += 1
        return self._spread[self._turn % step :: step] if step else []

    def states(self, entries: Sequence[Entry]) -> Sequence[int]:
        """What the slot table says of these now; FILLING where it cannot be asked."""
        if not entries:
            return ()
        slots = np.fromiter((e.ref.slot for e in entries), np.uint32, len(entries))
        generations = np.fromiter((e.ref.generation for e in entries), np.uint64, len(entries))
        try:
            states: list[int] = self._arena.states(slots, generations).tolist()
        except Exception as error:  # nothing is known: nothing changes, time-outs still run
            self._guard.failed("arena.states", error)
            return [_FILLING] * len(entries)
        return states

    def check(self) -> None:
        """Raise AssertionError naming the first broken invariant."""
        for slot, entry in (*self._stores.items(), *self._reads.items()):
            assert entry.ref.slot == slot, f"slot {slot} is filled for another"
            assert entry.state is SlotState.FILLING, f"slot {slot} is looked at for nothing"
        assert all(e.source is Tier.DRAM for e in self._stores.values()), "a read among the stores"
        reads = self._reads.values()
        assert all(e.source is not Tier.DRAM for e in reads), "a store among the reads"
        assert not any(e.dropped for e in reads), "a read that nobody waits for is looked at"
        spread = {e.ref.slot: (at, e) for at, e in enumerate(self._spread)}
        assert len(spread) == len(self._spread), "a read twice"
        places = {slot: (self._place[slot], e) for slot, e in self._reads.items()}
        assert spread == places and len(self._place) == len(places), "places of the reads"
