"""Slots of several sizes out of one arena: extents of one common size, lent to a class on demand.

    free extent --alloc(cls)--> extent of cls --its last slot freed--> free extent

Two groups that need slots of different sizes thus share the arena without a fixed split and without
fragmentation inside an extent. Pure bookkeeping: no arena is touched here.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence

from kvoffload.errors import ConfigError
from kvoffload.types import LEAF_BYTES

EXTENT_UNIT = 4 << 20
EXTENT_MAX_UNITS = 64
ARENA_GRAIN = 2 << 20  # Arena.create rounds its data area down to this
_WASTE = 16  # a class may lose 1/16 of an extent


def _floor(n: int, grain: int) -> int:
    return n - n % grain


def extent_bytes(data_bytes: int, sizes: Sequence[int]) -> int:
    """The common extent size: the smallest multiple of 4 MiB (at most 64 of them, or one slot if
    that is larger) of which no class wastes more than 1/16; else the one that wastes least.

    In a small arena the candidates stop where every class could still get four extents.
    """
    unit = max(LEAF_BYTES, min(EXTENT_UNIT, _floor(data_bytes, LEAF_BYTES)))
    largest = -(-max(sizes) // unit) * unit
    roomy = _floor(data_bytes // (4 * len(sizes)), unit)
    top = max(largest, min(EXTENT_MAX_UNITS * unit, roomy))

    def waste(extent: int) -> float:
        return max((extent % size) / extent for size in sizes)

    candidates = range(largest, top + 1, unit)
    for extent in candidates:
        if waste(extent) <= 1 / _WASTE:
            return extent
    return min(candidates, key=waste)


class SlotAllocator:
    """Hands out slot numbers and data offsets. Not thread safe: the Manager's lock guards it.

    ``slot_bytes_per_class`` are multiples of 16 KiB; offsets are multiples of 16 KiB from the start
    of the data area; slot numbers stay below ``max_slots``. Raises ConfigError when the arena is
    smaller than one extent.
    """

    def __init__(self, data_bytes: int, slot_bytes_per_class: Sequence[int]) -> None:
        sizes = tuple(slot_bytes_per_class)
        if not sizes or any(s <= 0 or s % LEAF_BYTES for s in sizes):
            raise ConfigError(f"slot sizes {sizes}: must be positive multiples of {LEAF_BYTES}")
        if data_bytes >= ARENA_GRAIN:
            data_bytes = _floor(data_bytes, ARENA_GRAIN)
        self.slot_bytes = sizes
        self.extent_bytes = extent_bytes(data_bytes, sizes)
        self.n_extents = data_bytes // self.extent_bytes
        if not self.n_extents:
            raise ConfigError(
                f"dram_gib: an arena of {data_bytes} bytes cannot hold one chunk of {max(sizes)}"
            )
        self.per_extent = tuple(self.extent_bytes // s for s in sizes)
        self._stripe = max(self.per_extent)
        self.max_slots = self.n_extents * self._stripe
        """Upper bound of slot numbers, for Arena.create."""
        self._class_of: list[int] = [-1] * self.n_extents
        self._free: list[list[int]] = [[] for _ in range(self.n_extents)]  # indexes in the extent
        self._spare = list(range(self.n_extents - 1, -1, -1))
        # Extents of a class with a free slot, lowest first: high extents drain and can be given
        # back. Stale rows, of extents that are full or of another class by now, are skipped.
        self._open: list[list[int]] = [[] for _ in sizes]
        self._queued: set[tuple[int, int]] = set()  # (class, extent) of all rows
        self._used: set[int] = set()
        self._free_in_class = [0] * len(sizes)
        # With one class nothing is ever lent to another: a plain list of free slots will do.
        self._flat: list[int] | None = None
        if len(sizes) == 1:
            self._flat = list(range(self.max_slots - 1, -1, -1))
            self._class_of, self._spare = [0] * self.n_extents, []

    def alloc(self, cls: int) -> tuple[int, int] | None:
        """(slot, offset) of a free slot of class ``cls``, None without one. O(log extents)."""
        if self._flat is not None:
            if not self._flat:
                return None
            slot = self._flat.pop()
            self._used.add(slot)
            at, index = divmod(slot, self._stripe)
            return slot, at * self.extent_bytes + index * self.slot_bytes[0]
        extent = self._pick(cls)
        if extent is None:
            return None
        index = self._free[extent].pop()
        self._free_in_class[cls] -= 1
        slot = extent * self._stripe + index
        self._used.add(slot)
        return slot, self._offset(cls, extent, index)

    def _pick(self, cls: int) -> int | None:
        heap = self._open[cls]
        while heap:
            extent = heap[0]
            if self._class_of[extent] == cls and self._free[extent]:
                return extent
            heapq.heappop(heap)
            self._queued.discard((cls, extent))
        if not self._spare:
            return None
        extent = self._spare.pop()
        self._class_of[extent] = cls
        self._free[extent] = list(range(self.per_extent[cls] - 1, -1, -1))
        self._free_in_class[cls] += self.per_extent[cls]
        self._enqueue(cls, extent)
        return extent

    def _enqueue(self, cls: int, extent: int) -> None:
        if (cls, extent) not in self._queued:
            self._queued.add((cls, extent))
            heapq.heappush(self._open[cls], extent)

    def free(self, slot: int) -> None:
        """Give a slot back; an extent without used slots is free for any class again.

        Raises ValueError on a slot that is not in use.
        """
        if slot not in self._used:
            raise ValueError(f"slot {slot} is not in use")
        self._used.remove(slot)
        if self._flat is not None:
            self._flat.append(slot)
            return
        extent, index = divmod(slot, self._stripe)
        cls = self._class_of[extent]
        self._free[extent].append(index)
        self._free_in_class[cls] += 1
        if len(self._free[extent]) == self.per_extent[cls]:
            self._give_back(cls, extent)
        else:
            self._enqueue(cls, extent)

    def _give_back(self, cls: int, extent: int) -> None:
        self._free_in_class[cls] -= self.per_extent[cls]
        self._class_of[extent] = -1
        self._free[extent] = []
        self._spare.append(extent)

    def _offset(self, cls: int, extent: int, index: int) -> int:
        return extent * self.extent_bytes + index * self.slot_bytes[cls]

    def slots_free(self, cls: int) -> int:
        """Slots of ``cls`` that alloc would give out now, counting free extents."""
        if self._flat is not None:
            return len(self._flat)
        return self._free_in_class[cls] + len(self._spare) * self.per_extent[cls]

    def capacity(self, cls: int) -> int:
        """Slots of ``cls`` if the whole arena were its own."""
        return self.n_extents * self.per_extent[cls]

    def extent_of(self, slot: int) -> int:
        """The extent that a slot lies in."""
        return slot // self._stripe

    def used_in(self, extent: int) -> list[int]:
        """Used slots of one extent, ascending."""
        first = extent * self._stripe
        return [s for s in range(first, first + self._stripe) if s in self._used]

    def used(self) -> frozenset[int]:
        """All slots in use (a copy)."""
        return frozenset(self._used)

    def offset(self, slot: int) -> int:
        """Data offset of a used slot. Raises ValueError when it is not in use."""
        if slot not in self._used:
            raise ValueError(f"slot {slot} is not in use")
        extent, index = divmod(slot, self._stripe)
        return self._offset(self._class_of[extent], extent, index)

    def check(self) -> None:
        """Raise AssertionError naming the first broken invariant."""
        if self._flat is not None:
            idle = set(self._flat)
            assert len(idle) == len(self._flat), "a slot is free twice"
            assert not idle & self._used, "a slot is used and free"
            assert idle | self._used == set(range(self.max_slots)), "a slot is lost"
            return
        spare = set(self._spare)
        assert len(spare) == len(self._spare), "an extent is free twice"
        rows = [(cls, extent) for cls, heap in enumerate(self._open) for extent in heap]
        assert len(set(rows)) == len(rows) and set(rows) == self._queued, "extents offered"
        free_in_class = [0] * len(self.slot_bytes)
        used = 0
        for extent, cls in enumerate(self._class_of):
            if cls < 0:
                assert extent in spare and not self._free[extent], f"extent {extent} is lost"
                continue
            assert extent not in spare, f"extent {extent} is free and of class {cls}"
            free = self._free[extent]
            assert len(set(free)) == len(free) < self.per_extent[cls], f"extent {extent} free list"
            assert not free or (cls, extent) in self._queued, f"extent {extent} is not offered"
            free_in_class[cls] += len(free)
            used += self.per_extent[cls] - len(free)
            for index in range(self.per_extent[cls]):
                slot = extent * self._stripe + index
                assert (slot in self._used) != (index in free), f"slot {slot} used and free"
            end = self._offset(cls, extent, self.per_extent[cls])
            assert end <= (extent + 1) * self.extent_bytes, f"extent {extent} overflows"
        assert used == len(self._used), "used slots outside extents"
        assert free_in_class == self._free_in_class, "free counts"
        assert all(s < self.max_slots for s in self._used), "slot number out of range"
