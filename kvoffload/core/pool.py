"""The DRAM tier's slots: allocator, index and slot table in step. See Manager for a slot's life."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from itertools import count

from kvoffload.core.alloc import ARENA_GRAIN, SlotAllocator
from kvoffload.core.filling import Filling
from kvoffload.core.hashchain import Chain
from kvoffload.core.index import ChunkId, Entry, Index
from kvoffload.core.layout import writer_mask
from kvoffload.core.policy import make_policy
from kvoffload.core.sizes import slot_classes
from kvoffload.core.stats import Counters, Guard
from kvoffload.core.why import FAILED_FILL, Gone
from kvoffload.errors import ConfigError
from kvoffload.tiers.base import ArenaLike
from kvoffload.types import (
    LEAF_BYTES,
    CacheLayout,
    ChunkKey,
    GroupKind,
    SlotRef,
    SlotState,
    Tier,
)

# Looked up per chunk; an enum's member is slow to come by through its class.
_FILLING, _READY, _FAILED = SlotState.FILLING, SlotState.READY, SlotState.FAILED

STORE_TIMEOUT_S = 60.0
"""A store still FILLING after this long counts as failed; also how long a slot that one of several
writing ranks failed is kept from reuse, since another rank may still be writing to it."""


def idle_slot(data_bytes: int) -> int:
    """Bytes of the one slot of an arena that serves nothing."""
    grain = ARENA_GRAIN if data_bytes >= ARENA_GRAIN else LEAF_BYTES
    return data_bytes // grain * grain


class Pool:
    """Takes, drops and settles slots. Not thread safe: the Manager's lock guards it.

    No exception of the arena leaves this class: it is a missing slot and a count.
    ``seconds(start, end)``: what computing these tokens of a prompt takes, None while not known.
    """

    def __init__(
        self,
        layout: CacheLayout,
        arena: ArenaLike,
        policy: str,
        counters: Counters,
        guard: Guard,
        writer_masks: Sequence[int] | None = None,
        seconds: Callable[[int, int], float | None] = lambda start, end: None,
    ) -> None:
        # Nothing to serve (a Mamba model, say): one slot that nobody asks for.
        sizes = slot_classes(layout) or (idle_slot(arena.data_bytes),)
        self.alloc = SlotAllocator(arena.data_bytes, sizes)
        if self.alloc.max_slots > arena.max_slots:
            raise ConfigError(
                f"arena has {arena.max_slots} slots, the layout needs {self.alloc.max_slots}"
            )
        ticks = count(1)
        self.index = Index([make_policy(policy, ticks) for _ in sizes], self._value)
        self.limbo: dict[int, Entry] = {}  # quarantine: dropped entries whose slot is still in use
        self.on_drop: Callable[[Entry], None] = lambda entry: None
        self.note: Callable[[Entry, Gone], None] = lambda entry, gone: None
        self.on_add: Callable[[Entry], None] = lambda entry: None
        self.make_room: Callable[[], bool] = lambda: False  # from what hints keep: the last resort
        self.on_evict: Callable[[Entry], None] = lambda entry: None
        self.spare: Callable[[Entry, float], bool] = lambda entry, now: False
        self.unspare: Callable[[bool], bool] = lambda kept: False  # also what hints retain
        self.held_bytes = 0  # of resident and quarantined slots
        self.held_slots = 0
        self.changes = 0  # chunks that came or went
        self._arena = arena
        self._layout = layout
        self._seconds = seconds
        self._counters = counters
        self._guard = guard
        self._class_of = [
            sizes.index(g.slot_bytes) if g.kind is not GroupKind.NONE else -1 for g in layout.groups
        ]
        self._full = [g.kind is GroupKind.FULL for g in layout.groups]
        self._chunk_tokens = [g.chunk_tokens for g in layout.groups]
        self._masks = tuple(
            writer_masks or (writer_mask(g, layout.world_size) for g in layout.groups)
        )
        self.filling = Filling(arena, guard)
        self._held: list[Entry] = []  # dropped entries that wait for their hold_until

    def class_of(self, group: int) -> int:
        """Slot class of a served group."""
        return self._class_of[group]

    def _value(self, entry: Entry) -> float | None:
        """Seconds that computing a chunk takes at its depth, per byte of it."""
        size = self._chunk_tokens[entry.group]
        start = entry.chunk * size
        seconds = self._seconds(start, start + size)
        return None if seconds is None else seconds / entry.nbytes

    # -- taking a slot

    def take(self, chain: Chain, group: int, chunk: int, source: Tier, now: float) -> Entry | None:
        """A FILLING slot for a chunk that is not resident, evicting as needed; None without room.

        The chunk's parent is never evicted to make room for it.
        """
        keys = chain.keys(group)
        parent = keys[chunk - 1] if chunk and self._full[group] else None
        return self._take(keys[chunk], group, chunk, parent, chain.namespace_id, source, now)

    def take_as(self, what: ChunkId, source: Tier, now: float) -> Entry | None:
        """``take`` for a chunk whose chain is not at hand."""
        return self._take(
            what.key, what.group, what.chunk, what.parent, what.namespace_id, source, now
        )

    def _take(
        self,
        key: ChunkKey,
        group: int,
        chunk: int,
        parent: ChunkKey | None,
        namespace_id: int,
        source: Tier,
        now: float,
    ) -> Entry | None:
        cls = self._class_of[group]
        anchor = self.index.get(parent) if parent is not None else None
        if anchor is not None and anchor.evictable_alone():
            self.index.pin(anchor)
            try:
                got = self._room(cls, now)
            finally:
                self.index.unpin(anchor)
        else:
            got = self._room(cls, now)
        if got is None:
            return None
        slot, offset = got
        try:
            generation = self._arena.begin_fill(slot, self._masks[group])
        except Exception as error:  # an arena error is a skipped chunk
            self._guard.failed("arena.begin_fill", error)
            self.alloc.free(slot)
            return None
        entry = Entry(
            key,
            group,
            chunk,
            cls,
            self.alloc.slot_bytes[cls],
            SlotRef(slot, generation, offset),
            source,
            parent,
            namespace_id,
            now,
        )
        self.index.add(entry)
        self.changes += 1
        self.held_bytes += entry.nbytes
        self.held_slots += 1
        self.filling.add(entry)
        try:
            self.on_add(entry)
        except Exception:  # nobody learns of the slot: without this nobody would ever give it back
            self.undo(entry, now)
            raise
        return entry

    def _room(self, cls: int, now: float) -> tuple[int, int] | None:
        while (got := self.alloc.alloc(cls)) is None:
            victim = self.index.victim(cls)
            if victim is not None:
                if not self.spare(victim, now):  # else it is written first: the next one goes
                    self._evict(victim)
            elif not (
                self.unspare(False)
                or self._reclaim(cls)
                or self.make_room()
                or self.unspare(True)  # so that ``make_room`` finds it
            ):
                return None
        return got

    def _reclaim(self, cls: int) -> bool:
        """Empty one extent of another class: the one with that class's next victim."""
        for other in range(len(self.alloc.slot_bytes)):
            victim = self.index.victim(other) if other != cls else None
            if victim is None:
                continue
            slots = self.alloc.used_in(self.alloc.extent_of(victim.ref.slot))
            residents = [e for e in map(self.index.at_slot, slots) if e is not None]
            if len(residents) < len(slots):
                continue  # a quarantined slot keeps the extent
            family = self.index.family(residents)
            if family is None:
                continue
            for entry in family:
                self._evict(entry)
            self._counters.reclaimed_extents += 1
            return True
        return False

    def _evict(self, entry: Entry) -> None:
        assert self.index.evictable(entry), "evicting a chunk that is in use or has a child"
        self._counters.evicted += 1
        self._counters.evicted_bytes += entry.nbytes
        self._counters.evicted_unwritten += entry.dirty
        self.on_evict(entry)
        self.drop(entry, 0.0, Gone.EVICTED)

    # -- giving slots back

    def drop(self, entry: Entry, now: float, gone: Gone = Gone.GIVEN_UP) -> None:
        """Take ``entry`` out of the index; its slot is free at once or when nothing uses it."""
        if entry.dropped:
            return
        self.note(entry, gone)
        self.on_drop(entry)
        self.changes += 1
        entry.dirty = False
        self.index.remove(entry)
        if entry.source is not Tier.DRAM:
            self.filling.discard(entry)  # nobody waits for it: its job's return is soon enough
        if entry.busy(now):
            self.limbo[entry.ref.slot] = entry
            self._counters.quarantined += 1
        else:
            self._free(entry)

    def drop_all(self, now: float, gone: Gone) -> None:
        """``drop`` of all that is resident: O(that), a few us each.

        About from the roots on, as it came: from the leaves on each parent would become a leaf, to
        be offered for eviction, before it goes itself.
        """
        for entry in list(self.index):
            self.drop(entry, now, gone)

    def undo(self, entry: Entry, now: float) -> None:
        """Drop a FILLING entry that was never handed to anyone who could write to its slot."""
        self.filling.discard(entry)
        entry.state = SlotState.FAILED
        self.fail(entry)
        self.drop(entry, now)

    def reap(self, entry: Entry, now: float) -> bool:
        """Free the slot of a dropped entry unless something still uses it. True when it is free."""
        if not entry.dropped or entry.busy(now):
            return False
        slot = entry.ref.slot
        if self.limbo.get(slot) is not entry:
            return True  # freed before; the slot may be someone else's by now
        del self.limbo[slot]
        self._free(entry)
        return True

    def _free(self, entry: Entry) -> None:
        slot = entry.ref.slot
        try:
            self._arena.set_free(slot)
        except Exception as error:  # harmless: begin_fill works from any state
            self._guard.failed("arena.set_free", error)
        self.alloc.free(slot)
        self.held_bytes -= entry.nbytes
        self.held_slots -= 1

    def unpin_all(self, entries: Sequence[Entry], now: float) -> None:
        """Undo one pin of each, the last first; a dropped entry may become free by it."""
        unpin = self.index.unpin
        for entry in reversed(entries):
            unpin(entry)
            if entry.dropped:
                self.reap(entry, now)

    def fail(self, entry: Entry) -> None:
        """Mark the slot FAILED for everybody who waits on it or copies from it."""
        try:
            self._arena.fail(entry.ref.slot, entry.ref.generation)
        except Exception as error:
            self._guard.failed("arena.fail", error)

    # -- what happened in the slot table

    def settle(
        self, now: float, returned: Iterable[Entry] = (), all_reads: bool = True
    ) -> list[Entry]:
        """Catch up with the slot table; returns entries that became READY and are resident.

        Of the reads only some and those of ``returned``, the entries of read jobs that have
        returned, unless ``all_reads``: see core/filling.py.
        """
        ready: list[Entry] = []
        for entry, state in self.filling.look(returned, all_reads):
            if state == _FILLING:
                self._expire(entry, now)
                continue
            self.filling.discard(entry)
            if state == _READY:
                entry.state = _READY
                self.changes += 1
                self.index.refresh(entry)
                if not entry.dropped:
                    ready.append(entry)
                    continue
            else:
                self._failed(entry, state, now)
            self.reap(entry, now)
        self._held = [e for e in self._held if not self.reap(e, now)]
        return ready

    def settle_failed(self, reads: Sequence[Entry], now: float) -> int:
        """Drop those of ``reads``, entries that are being read, that have failed; their number."""
        failed = 0
        states = self.filling.states(reads)
        for entry, state in zip(reads, states, strict=True):
            if state not in (_FILLING, _READY):
                self.filling.discard(entry)
                self._failed(entry, state, now)
                failed += 1
        return failed

    def _expire(self, entry: Entry, now: float) -> None:
        late = now - entry.started > STORE_TIMEOUT_S
        if late and entry.source is Tier.DRAM and not entry.dropped:
            self._counters.store_timeout += 1
            self.drop(entry, now, Gone.TIMED_OUT)

    def _failed(self, entry: Entry, state: int, now: float) -> None:
        entry.state = SlotState.FAILED
        if entry.source is Tier.DRAM:
            self._counters.store_failed += not entry.dropped
            several = self._masks[entry.group].bit_count() > 1
            if several and state == SlotState.FAILED and not entry.hold_until:
                entry.hold_until = now + STORE_TIMEOUT_S
                self._held.append(entry)
        self.drop(entry, now, FAILED_FILL[entry.source])

    def spoil(self, slot: int, generation: int, now: float) -> bool:
        """Give up a store whose copy may still be running: the slot is not reused for a while.

        False when the slot is not FILLING with that generation.
        """
        entry = self.filling.at(slot)
        if entry is None or entry.ref.generation != generation:
            return False
        if not self._arena.fail(slot, generation):
            return False
        if not entry.hold_until:
            entry.hold_until = now + STORE_TIMEOUT_S
            self._held.append(entry)
        return True

    def read_over(self, entry: Entry, ok: bool, now: float) -> None:
        """The NVMe read into ``entry``'s slot has returned; nothing writes to the slot any more.
        After a ``settle`` that was given ``entry``."""
        entry.io -= 1
        filling = entry.state is _FILLING
        self.filling.discard(entry)
        if not ok or filling:  # still FILLING after a read that claims success: do not believe it
            if entry.state is not SlotState.FAILED:
                self.fail(entry)
            entry.state = SlotState.FAILED
            self.drop(entry, now, Gone.READ_FAILED)
        self.index.refresh(entry)
        self.reap(entry, now)

    def write_over(self, entry: Entry, now: float) -> None:
        """The NVMe write from ``entry``'s slot has returned."""
        entry.io -= 1
        self.index.refresh(entry)
        self.reap(entry, now)

    def stores_filling(self) -> int:
        """Stores that workers are still expected to finish."""
        return sum(not e.dropped for e in self.filling.stores())

    def check(self) -> None:
        """Raise AssertionError naming the first broken invariant."""
        self.alloc.check()
        self.index.check()
        self.filling.check()
        used = self.alloc.used()
        resident = {e.ref.slot: e for e in self.index}
        assert not resident.keys() & self.limbo.keys(), "a slot is resident and quarantined"
        assert used == resident.keys() | self.limbo.keys(), "used slots differ from known slots"
        known = [*resident.values(), *self.limbo.values()]
        assert self.held_slots == len(known), "held_slots"
        assert self.held_bytes == sum(e.nbytes for e in known), "held_bytes"
        pinned = sum(e.nbytes for e in known if e.pins)
        assert self.index.pinned_bytes == pinned, "pinned_bytes"
        for slot, entry in (resident | self.limbo).items():
            assert self.alloc.offset(slot) == entry.ref.offset, f"offset of slot {slot}"
            assert entry.ref.offset + entry.nbytes <= self._arena.data_bytes, "capacity exceeded"
            assert self._arena.generation(slot) == entry.ref.generation, f"slot {slot} was reused"
            filling = entry.state is SlotState.FILLING
            unwatched = entry.dropped and entry.source is not Tier.DRAM
            assert (filling and not unwatched) == (slot in self.filling), f"slot {slot} filling"
            read = filling and not unwatched and entry.source is not Tier.DRAM
            assert entry.io or not read, f"slot {slot} would be FILLING for ever"
        for slot, entry in self.limbo.items():
            assert entry.dropped and entry.ref.slot == slot, f"limbo of slot {slot}"
            used_by = entry.pins or entry.io or entry.hold_until or slot in self.filling
            assert used_by, f"slot {slot} is leaked"
