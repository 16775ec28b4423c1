"""Slots that are being filled, and which of them the slot table is asked about.

Stores are few and somebody waits for each: all are asked about at every tick. Reads may be a good
part of the arena after a restart. They come up about in the order in which they were asked for, so
the first ones are enough, and those of a job that has returned. A chunk that came up further down
counts as being read until its turn comes, which every load of it can wait for.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import islice

import numpy as np

from kvoffload.core.index import Entry
from kvoffload.core.stats import Guard
from kvoffload.tiers.base import ArenaLike
from kvoffload.types import SlotState, Tier

READS_LOOKED = 1024
"""Reads asked about in one go: some 0.2 ms."""


class Filling:
    """Not thread safe: the Manager's lock guards it. O(1), except ``look``."""

    def __init__(self, arena: ArenaLike, guard: Guard) -> None:
        self._arena = arena
        self._guard = guard
        self._stores: dict[int, Entry] = {}  # by slot, dropped ones included
        self._reads: dict[int, Entry] = {}  # by slot, in the order asked for

    def __contains__(self, slot: object) -> bool:
        return slot in self._stores or slot in self._reads

    def _of(self, entry: Entry) -> dict[int, Entry]:
        return self._stores if entry.source is Tier.DRAM else self._reads

    def add(self, entry: Entry) -> None:
        """Its slot was set FILLING."""
        self._of(entry)[entry.ref.slot] = entry

    def discard(self, entry: Entry) -> None:
        """It is filled or given up; or nobody waits for it, and its job's return will tell."""
        self._of(entry).pop(entry.ref.slot, None)

    def at(self, slot: int) -> Entry | None:
        """What fills ``slot``."""
        return self._stores.get(slot) or self._reads.get(slot)

    def stores(self) -> Iterator[Entry]:
        """What workers fill."""
        return iter(self._stores.values())

    def look(self, returned: Iterable[Entry], all_reads: bool) -> list[tuple[Entry, int]]:
        """Entries and their slots' states now: every store, the first reads or ``all_reads``, and
        those of ``returned`` (the entries of read jobs) whose state is not known yet."""
        most = None if all_reads else READS_LOOKED
        asked = {**self._stores, **dict(islice(self._reads.items(), most))}
        for entry in returned:
            if entry.state is SlotState.FILLING:
                asked[entry.ref.slot] = entry
        entries = list(asked.values())
        return list(zip(entries, self._states(entries), strict=True))

    def _states(self, entries: Sequence[Entry]) -> Sequence[int]:
        if not entries:
            return ()
        slots = np.fromiter((e.ref.slot for e in entries), np.uint32, len(entries))
        generations = np.fromiter((e.ref.generation for e in entries), np.uint64, len(entries))
        try:
            states: list[int] = self._arena.states(slots, generations).tolist()
        except Exception as error:  # nothing is known: nothing changes, time-outs still run
            self._guard.failed("arena.states", error)
            return [int(SlotState.FILLING)] * len(entries)
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
