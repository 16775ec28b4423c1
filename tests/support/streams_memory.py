"""Who touched which bytes last, and whether that was ordered: the race checker.

Shadow memory has a cell per KV page (a block of one layer of one rank) and per checksum leaf of the
arena (its data and its entry in the leaf table apart). A cell knows its last write and the reads since,
each with the accessor's vector clock. An access that conflicts with one of them and is not ordered after
it by happens-before is a race, in whatever order the two happened to run.

One kind of race is by design harmless: a store may read a block that is being overwritten if what it
read is never published, i.e. if the slot it filled is not marked done for that rank. Such a race is kept
with the copy (``Sink``) and counts from the moment the slot is published.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from tests.support.streams_world import World

Cell = tuple[object, ...]
"""E.g. ("kv", rank, page), ("arena", leaf), ("leaf", leaf), ("buffer", address), ("seat", address)."""


@dataclass
class Sink:
    """Where the bytes that a store read went."""

    published: bool = False
    races: list[Race] = field(default_factory=list)


@dataclass(frozen=True)
class Access:
    """``kind``: compute, zero, store, load, hash, verify, disk, host, reuse. ``what``: for the reader."""

    actor: str
    at: int  # the actor's own component of its clock
    turn: int
    kind: str
    write: bool
    what: str
    sink: Sink | None = None

    def __str__(self) -> str:
        verb = "writes" if self.write else "reads"
        return f"[turn {self.turn}] {self.actor} {verb} ({self.kind}: {self.what})"


@dataclass(frozen=True)
class Race:
    cell: Cell
    first: Access
    second: Access

    @property
    def pair(self) -> tuple[str, frozenset[str]]:
        """("kv", {"compute write", "store read"}), e.g."""
        kinds = (f"{a.kind} {'write' if a.write else 'read'}" for a in (self.first, self.second))
        return str(self.cell[0]), frozenset(kinds)

    def __str__(self) -> str:
        return f"race on {self.cell}:\n  {self.first}\n  {self.second}\n  are not ordered"


class RaceFound(AssertionError):
    def __init__(self, race: Race) -> None:
        super().__init__(str(race))
        self.race = race


@dataclass
class _Seen:
    write: Access | None = None
    reads: dict[str, Access] = field(default_factory=dict)


class Shadow:
    """Of all memory of a world."""

    def __init__(self, world: World) -> None:
        self.races: list[Race] = []
        self.accesses = 0
        self.conflicts = 0  # pairs that were compared
        self.forgiven = 0  # racy reads whose bytes have not been published (yet)
        self._world = world
        self._cells: dict[Cell, _Seen] = {}

    def touch(
        self, cells: Iterable[Cell], kind: str, write: bool, what: str, sink: Sink | None = None
    ) -> None:
        """The acting thread or stream accesses these cells now."""
        world, actor = self._world, self._world.actor
        new = Access(actor.name, actor.clock[actor.name], world.turns, kind, write, what, sink)
        for cell in cells:
            self.accesses += 1
            seen = self._cells.setdefault(cell, _Seen())
            if seen.write is not None:
                self._compare(cell, seen.write, new)
            if not write:
                seen.reads[new.actor] = new
                continue
            for read in seen.reads.values():
                self._compare(cell, read, new)
            seen.write = new
            seen.reads = {}

    def _compare(self, cell: Cell, old: Access, new: Access) -> None:
        self.conflicts += 1
        if self._world.actor.clock.get(old.actor, 0) >= old.at:
            return
        race = Race(cell, old, new)
        sinks = [a.sink for a in (old, new) if a.sink is not None]
        if any(not s.published for s in sinks):
            self.forgiven += 1
            for sink in sinks:
                sink.races.append(race)
            return
        self.races.append(race)

    def publish(self, sink: Sink) -> None:
        """The bytes of this copy may be used from now on."""
        sink.published = True
        self.races += sink.races
        sink.races = []

    def raise_first(self) -> None:
        if self.races:
            raise RaceFound(self.races[0])


class SinkMap:
    """Which stores' bytes lie where in a piece of memory."""

    def __init__(self) -> None:
        self._held: list[tuple[range, Sink]] = []

    def put(self, where: range, sinks: Iterable[tuple[range, Sink]]) -> None:
        """These bytes were written; what lay there before is gone."""
        kept = [s for s in self._held if s[0].stop <= where.start or s[0].start >= where.stop]
        self._held = [*kept, *sinks]

    def get(self, where: range, shift: int = 0) -> list[tuple[range, Sink]]:
        """What lies in these bytes, told as if they lay ``shift`` further on."""
        out = []
        for held, sink in self._held:
            low, high = max(held.start, where.start), min(held.stop, where.stop)
            if low < high:
                out.append((range(low + shift, high + shift), sink))
        return out


@dataclass(eq=False)
class Region:
    """Memory that copies move bytes in. ``cells(offset, nbytes)``; ``sinks``: None for KV blocks."""

    base: int
    nbytes: int
    cells: Callable[[int, int], Iterable[Cell]]
    sinks: SinkMap | None = None

    def __contains__(self, address: int) -> bool:
        return self.base <= address < self.base + self.nbytes
