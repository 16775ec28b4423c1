"""What is resident in DRAM: chunk key -> Entry, with pins and parent links.

Not thread safe: the Manager's lock guards it. The index decides what may be evicted and keeps the
policies told; it never touches the arena.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import TYPE_CHECKING

from kvoffload.core.policy.base import Policy
from kvoffload.core.retire import first_retired
from kvoffload.types import ChunkKey, SlotRef, SlotState, Tier

if TYPE_CHECKING:
    from kvoffload.core.admission import Fate
    from kvoffload.core.holds import Hold
    from kvoffload.core.kinds import Origin


# A class attribute that is an enum's member costs more to look up than the rest of a test.
_READY, _FILLING = SlotState.READY, SlotState.FILLING
_KEPT_BITS = 128  # above every policy's heat


@dataclass(frozen=True, slots=True)
class ChunkId:
    """What a chunk is, wherever it lies. Fields as in ``Entry``."""

    key: ChunkKey
    group: int
    chunk: int
    parent: ChunkKey | None
    namespace_id: int


class Kept(IntEnum):
    """What hints do to a chunk (core/keep.py); anything but NO keeps it from eviction."""

    NO = 0
    RETAINED = 1
    PINNED = 2


@dataclass(slots=True, eq=False)
class Entry:
    """One chunk in one slot. Outlives the index while something still uses a dropped slot."""

    key: ChunkKey
    group: int
    chunk: int  # place in the chain, 0 at the root
    cls: int  # slot class of the allocator
    nbytes: int
    ref: SlotRef
    source: Tier  # who fills the slot: DRAM = the workers (a store), NVME = a read
    parent: ChunkKey | None  # FULL groups: the chunk before; None at the root and for SLIDING
    namespace_id: int
    started: float  # clock at begin_fill
    state: SlotState = SlotState.FILLING  # as last seen in the slot table
    pins: int = 0  # leases
    io: int = 0  # chunk-store jobs that read or write the slot
    dirty: bool = False  # READY and not known to be on NVMe
    dropped: bool = False  # no longer in the index
    uses: int = 0  # since it got its slot, its own store not counted
    fate: Fate | None = None  # what admission decided; None: nothing yet, or used since
    origin: Origin | None = None  # what the request was that stored it; None: read from NVMe
    carries: bool = False  # a chunk behind it is written, and of no use without it
    reserved: bool = False  # waits to be written, stays until it is; its budget is spent
    hold_until: float = 0.0  # no reuse before this clock value (a late writer may exist)
    attempts: int = 0  # failed write-behind attempts
    owner: str | None = None  # prefetched for this owner and not used yet
    kept: Kept = Kept.NO  # by hints
    wish: Hold | None = None  # the retention asked for, also where DRAM has given it up
    retired: bool = False  # not expected to be used again: goes first, is not written to NVMe
    twin: bool = False  # made to be compared (core/shadow.py): no hit, never written to NVMe

    def chunk_id(self) -> ChunkId:
        """What this entry holds."""
        return ChunkId(self.key, self.group, self.chunk, self.parent, self.namespace_id)

    def evictable_alone(self) -> bool:
        """Nothing but a resident child could stand in the way of evicting it."""
        out = self.pins or self.io or self.kept or self.reserved or self.dropped
        return not out and self.state is _READY

    def unused(self) -> bool:
        """Filled, and nobody reads, writes or is about to write it."""
        out = self.pins or self.io or self.reserved or self.dropped
        return not out and self.state is _READY

    def hinted(self, now: float) -> bool:
        """Whether somebody asked to keep it, and that has not ended."""
        wished = self.wish is not None and self.wish.until > now
        return wished or self.kept is Kept.PINNED

    def busy(self, now: float) -> bool:
        """Something may still read or write the slot, so it must not be reused."""
        if self.pins or self.io or self.hold_until > now:
            return True
        return self.state is _FILLING and self.source is Tier.DRAM


class Index:
    """Resident entries by key and by slot, their children, and one policy per slot class.

    ``value``: of an entry that comes in, as ``Policy.insert`` takes it.
    """

    def __init__(
        self,
        policies: Sequence[Policy],
        value: Callable[[Entry], float | None] = lambda entry: None,
    ) -> None:
        self._policies = tuple(policies)
        self._value = value
        self._entries: dict[ChunkKey, Entry] = {}
        self._by_slot: dict[int, Entry] = {}
        self.pinned_bytes = 0
        self._retired: set[ChunkKey] = set()  # keys of the entries marked so
        # Keyed by the parent's key, resident or not: a parent that comes back finds its children.
        # Nearly every parent has one child, and a set for it was 60 % of what a chunk costs each
        # full garbage collection, which stops the engine.
        self._children: dict[ChunkKey, ChunkKey] = {}  # the only one; stale where there are several
        self._several: dict[ChunkKey, set[ChunkKey]] = {}

    def __len__(self) -> int:
        return len(self._entries)

    def __contains__(self, key: object) -> bool:
        return key in self._entries

    def __iter__(self) -> Iterator[Entry]:
        return iter(self._entries.values())

    def get(self, key: ChunkKey) -> Entry | None:
        """The resident entry of ``key``."""
        return self._entries.get(key)

    def find(self, keys: Iterable[ChunkKey]) -> list[Entry | None]:
        """``get`` of each key."""
        return list(map(self._entries.get, keys))

    def at_slot(self, slot: int) -> Entry | None:
        """The resident entry in ``slot``."""
        return self._by_slot.get(slot)

    def children(self, key: ChunkKey) -> frozenset[ChunkKey]:
        """Resident children of ``key``."""
        return frozenset(self.below(key))

    def below(self, key: ChunkKey) -> Collection[ChunkKey]:
        """As ``children``, and no copy: not to be kept or changed."""
        only = self._children.get(key)
        if only is None:
            return ()
        return self._several.get(key) or (only,)

    def add(self, entry: Entry) -> None:
        """Make ``entry`` resident. Raises ValueError when its key or slot already is."""
        if entry.key in self._entries or entry.ref.slot in self._by_slot:
            raise ValueError(
                f"chunk {entry.key.hex()} or slot {entry.ref.slot} is resident already"
            )
        self._entries[entry.key] = entry
        self._by_slot[entry.ref.slot] = entry
        policy = self._policies[entry.cls]
        if policy.weighs:
            policy.insert(entry.key, entry.parent, self._value(entry))
        else:
            policy.insert(entry.key, entry.parent)
        if entry.parent is not None:
            sibling = self._children.get(entry.parent)
            if sibling is not None:
                self._several.setdefault(entry.parent, {sibling}).add(entry.key)
            else:
                self._children[entry.parent] = entry.key
                parent = self._entries.get(entry.parent)
                if parent is not None and not parent.dropped:
                    self._policies[parent.cls].withhold(parent.key)
        if entry.state is not _FILLING:  # else nobody has offered it
            self.refresh(entry)

    def remove(self, entry: Entry) -> None:
        """Take ``entry`` out; marks it dropped."""
        entry.dropped = True
        del self._entries[entry.key]
        del self._by_slot[entry.ref.slot]
        self._retired.discard(entry.key)
        self._policies[entry.cls].remove(entry.key)
        if entry.parent is not None:
            several = self._several.get(entry.parent)
            if several is not None:
                several.remove(entry.key)
                if len(several) == 1:
                    self._children[entry.parent] = several.pop()
                    del self._several[entry.parent]
            else:
                del self._children[entry.parent]
                parent = self._entries.get(entry.parent)
                if parent is not None:
                    self.refresh(parent)

    def evictable(self, entry: Entry) -> bool:
        """Resident, filled, unused, and without a resident child."""
        return entry.key not in self._children and entry.evictable_alone()

    def refresh(self, entry: Entry) -> None:
        """Tell the policy whether ``entry`` may be evicted; call after changing its state or io."""
        if entry.dropped or entry.key in self._children:  # a parent was withheld by its first child
            return
        policy = self._policies[entry.cls]
        if entry.evictable_alone():
            policy.offer(entry.key)
        else:
            policy.withhold(entry.key)

    def pin(self, entry: Entry) -> None:
        """Keep ``entry`` (and, through it, its resident ancestors) from eviction."""
        entry.pins += 1
        if entry.pins == 1:
            self.pinned_bytes += entry.nbytes
            if entry.key not in self._children:  # else it is withheld anyway
                self.refresh(entry)

    def unpin(self, entry: Entry) -> None:
        """Undo one pin. Raises ValueError when there is none."""
        if entry.pins <= 0:
            raise ValueError(f"chunk {entry.key.hex()} is not pinned")
        entry.pins -= 1
        if not entry.pins:
            self.pinned_bytes -= entry.nbytes
            if entry.key not in self._children:
                self.refresh(entry)

    def pin_all(self, entries: Iterable[Entry]) -> None:
        """``pin`` each: most have a resident child, and are out of the policy's sight for that."""
        children = self._children
        for entry in entries:
            entry.pins += 1
            if entry.pins == 1:
                self.pinned_bytes += entry.nbytes
                if entry.key not in children:
                    self.refresh(entry)

    def touch(self, cls: int, chain: Sequence[ChunkKey]) -> None:
        """Resident chunks of one chain, root first, were used."""
        self._policies[cls].touch(chain)
        for entry in map(self._entries.__getitem__, chain):
            entry.uses += 1
            entry.fate = None
        if self._retired:
            for key in self._retired.intersection(chain):
                self._entries[key].retired = False
                self._retired.discard(key)

    def let_go(self, entries: Sequence[Entry]) -> None:
        """Nobody needs these any more: they go first and are not written down, unless they are
        touched again."""
        for entry in entries:
            if not entry.dropped:
                entry.retired = True
                self._retired.add(entry.key)
                self._policies[entry.cls].retire([entry.key])

    def retire(self, keys: Sequence[ChunkKey]) -> None:
        """Evict these first, unless they are touched later; what is not resident is ignored.

        Give the keys of a chain in one call: hints that contradict each other along it are settled
        by ``first_retired``. O(length of the chains).
        """
        marked = {e.key: e for e in map(self._entries.get, keys) if e is not None}
        seen: set[ChunkKey] = set()
        for entry in sorted(marked.values(), key=lambda e: -e.chunk):
            if entry.key not in seen:
                path = self._line(entry, seen)
                tail = path[first_retired([e.key in marked for e in path]) :]
                self._policies[entry.cls].retire([e.key for e in tail])

    def _line(self, entry: Entry, seen: set[ChunkKey]) -> list[Entry]:
        """``entry`` with its resident ancestors and its line of only children, root first; less
        what was seen before."""
        path: list[Entry] = []
        at: Entry | None = entry
        while at is not None and at.key not in seen:
            seen.add(at.key)
            path.append(at)
            at = self._entries.get(at.parent) if at.parent is not None else None
        path.reverse()
        while len(below := self.below(path[-1].key)) == 1:
            path.append(self._entries[next(iter(below))])
            seen.add(path[-1].key)
        return path

    def victim(self, cls: int) -> Entry | None:
        """What the policy would evict next from class ``cls``."""
        key = self._policies[cls].victim()
        return None if key is None else self._entries[key]

    def coming(self, cls: int, most: int, going: Mapping[ChunkKey, ChunkKey]) -> list[Entry]:
        """The next ``most`` victims of ``cls`` as far as the policy knows now, in order.

        ``going`` will have gone by then: chunks that may not be evicted yet, with their parents.
        Those whose parent is among them may be left out. O(most + len(going)).
        """
        policy = self._policies[cls]
        out: list[Entry] = []
        gone = set(going)
        held: list[ChunkKey] = []  # out of the policy's sight while we look behind them
        bare: list[tuple[int, ChunkKey]] = []  # parents whose children are all gone: a heap

        def bared(key: ChunkKey) -> None:
            parent = self._entries.get(key)
            if parent is None or not parent.evictable_alone() or parent.cls != cls:
                return
            if gone.issuperset(self.below(key)):
                heapq.heappush(bare, (policy.heat(key), key))

        for parent in set(going.values()):  # once each: many chats may follow one system prompt
            bared(parent)
        while len(out) < most:
            key = policy.victim()
            if bare and (key is None or bare[0][0] <= policy.heat(key)):
                key = heapq.heappop(bare)[1]
            elif key is None:
                break
            else:
                policy.withhold(key)
                held.append(key)
            entry = self._entries[key]
            out.append(entry)
            gone.add(key)
            if entry.parent is not None:
                bared(entry.parent)
        for key in held:
            policy.offer(key)
        return out

    def family(self, roots: Sequence[Entry]) -> list[Entry] | None:
        """``roots`` and all their resident descendants, deepest first; None if any is in use."""
        seen: dict[ChunkKey, Entry] = {}
        stack = list(roots)
        while stack:
            entry = stack.pop()
            if entry.key in seen:
                continue
            if not entry.evictable_alone():
                return None
            seen[entry.key] = entry
            stack += [self._entries[k] for k in self.below(entry.key)]
        return sorted(seen.values(), key=lambda e: -e.chunk)

    def heat(self, entry: Entry) -> int:
        """Of a resident entry: what hints keep is hotter than anything, else as the policy says."""
        heat = self._policies[entry.cls].heat(entry.key)
        return heat + (entry.kept << _KEPT_BITS) if entry.kept else heat

    def check(self) -> None:
        """Raise AssertionError naming the first broken invariant."""
        children: dict[ChunkKey, set[ChunkKey]] = {}
        offered: list[set[ChunkKey]] = [set() for _ in self._policies]
        resident: list[set[ChunkKey]] = [set() for _ in self._policies]
        for key, entry in self._entries.items():
            assert entry.key == key and not entry.dropped, "a dropped entry is resident"
            assert self._by_slot.get(entry.ref.slot) is entry, f"slot map of {entry.ref.slot}"
            assert entry.pins >= 0 and entry.io >= 0, "negative pins or io"
            assert entry.state in (SlotState.FILLING, SlotState.READY), f"resident {entry.state!r}"
            assert not (entry.dirty and entry.state is not SlotState.READY), "dirty before READY"
            resident[entry.cls].add(key)
            assert entry.retired == (key in self._retired), "retired"
            if self.evictable(entry):
                offered[entry.cls].add(key)
            if entry.parent is not None:
                children.setdefault(entry.parent, set()).add(key)
        assert self._retired <= self._entries.keys(), "a retired chunk that left"
        assert len(self._by_slot) == len(self._entries), "two entries in one slot"
        assert children.keys() == self._children.keys(), "parents"
        assert all(children[key] == self.children(key) for key in children), "child links"
        assert all(len(keys) > 1 for keys in self._several.values()), "a set for one child"
        for cls, policy in enumerate(self._policies):
            policy.check(offered[cls], resident[cls])
