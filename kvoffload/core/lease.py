"""What the Manager hands out: leases on chunks to load, slots to store into, prefetch budgets."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import count
from typing import NamedTuple

from kvoffload.core.index import Entry
from kvoffload.types import ChunkKey, SlotRef, Tier


class LeaseItem(NamedTuple):
    """One pinned chunk of a lease. ``tier`` is NVME while its slot is still being read into."""

    group: int
    chunk: int
    key: ChunkKey
    ref: SlotRef
    tier: Tier


class StoreItem(NamedTuple):
    """One FILLING slot for the workers to copy a chunk into."""

    group: int
    chunk: int
    key: ChunkKey
    ref: SlotRef


@dataclass(frozen=True, slots=True)
class Lease:
    """Pins on every chunk that a load of [start, end) needs, by group and then from the root.

    ``tokens_by_tier`` splits ``end - start`` as ``Hit.by_tier`` does. Ends with
    ``Manager.release``.
    """

    id: int
    owner: str
    items: tuple[LeaseItem, ...]
    tokens_by_tier: dict[Tier, int]


class Leases:
    """Open leases and the entries they pin."""

    def __init__(self) -> None:
        self._ids = count(1)
        self._entries: dict[int, tuple[Entry, ...]] = {}

    def __len__(self) -> int:
        return len(self._entries)

    def __iter__(self) -> Iterator[tuple[Entry, ...]]:
        return iter(self._entries.values())

    def open(
        self,
        owner: str,
        entries: Sequence[Entry],
        tiers: Sequence[Tier],
        tokens_by_tier: dict[Tier, int],
    ) -> Lease:
        """A lease over entries that the caller has pinned."""
        items = tuple(
            [
                LeaseItem(e.group, e.chunk, e.key, e.ref, t)
                for e, t in zip(entries, tiers, strict=True)
            ]
        )
        lease = Lease(next(self._ids), owner, items, tokens_by_tier)
        self._entries[lease.id] = tuple(entries)
        return lease

    def close(self, lease_id: int) -> tuple[Entry, ...]:
        """The entries to unpin; empty when the lease is unknown or closed before."""
        return self._entries.pop(lease_id, ())


class Prefetches:
    """Chunks moved up ahead of need and not used yet, bounded in bytes.

    They are not pinned: being the youngest they go last, and under pressure they may go.
    """

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        self.nbytes = 0
        self._of: dict[str, dict[ChunkKey, Entry]] = {}

    def room(self) -> int:
        """Bytes that may still be prefetched."""
        return self.max_bytes - self.nbytes

    def add(self, owner: str, entry: Entry) -> None:
        """``entry`` is being moved up for ``owner``."""
        entry.owner = owner
        self._of.setdefault(owner, {})[entry.key] = entry
        self.nbytes += entry.nbytes

    def settle(self, entry: Entry) -> None:
        """``entry`` is used or gone: it no longer counts."""
        if entry.owner is None:
            return
        mine = self._of[entry.owner]
        del mine[entry.key]
        if not mine:
            del self._of[entry.owner]
        entry.owner = None
        self.nbytes -= entry.nbytes

    def cancel(self, owner: str) -> int:
        """Give up what ``owner`` has not used; returns the number of chunks. Reads under way end as
        ordinary resident chunks."""
        mine = list(self._of.get(owner, {}).values())
        for entry in mine:
            self.settle(entry)
        return len(mine)

    def check(self) -> None:
        """Raise AssertionError naming the first broken invariant."""
        entries = [(o, e) for o, mine in self._of.items() for e in mine.values()]
        assert self.nbytes == sum(e.nbytes for _, e in entries) <= self.max_bytes, "bytes"
        assert all(e.owner == o and not e.dropped for o, e in entries), "owner of a prefetch"
