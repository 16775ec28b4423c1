"""Slot sizes of a layout, and what an arena of so many bytes holds of them."""

from __future__ import annotations

from kvoffload.core.alloc import SlotAllocator
from kvoffload.core.layout import check_layout
from kvoffload.errors import ConfigError
from kvoffload.types import CacheLayout, GroupKind


def slot_classes(layout: CacheLayout) -> tuple[int, ...]:
    """Distinct slot sizes of the served groups, in bytes, ascending."""
    served = (g for g in layout.groups if g.kind is not GroupKind.NONE)
    return tuple(sorted({g.slot_bytes for g in served}))


def slots_needed(layout: CacheLayout, data_bytes: int) -> int:
    """``max_slots`` for an arena of ``data_bytes``. Raises ConfigError when that is too small."""
    check_layout(layout)
    sizes = slot_classes(layout)
    return SlotAllocator(data_bytes, sizes).max_slots if sizes else 1


def holds_one_each(layout: CacheLayout, data_bytes: int) -> bool:
    """Whether an arena of ``data_bytes`` has room for one chunk of every served group at once."""
    sizes = slot_classes(layout)
    try:
        slots = SlotAllocator(data_bytes, sizes)
    except ConfigError:
        return not sizes
    served = (g for g in layout.groups if g.kind is not GroupKind.NONE)
    return all(slots.alloc(sizes.index(g.slot_bytes)) is not None for g in served)
