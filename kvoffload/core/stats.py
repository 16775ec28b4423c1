"""What the core counts, and the one place where a tier's exceptions end."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace

from kvoffload.core.wear import Wear
from kvoffload.types import Tier

log = logging.getLogger("kvoffload.core")


@dataclass(slots=True)
class Counters:
    """Monotonic counts since the Manager was made. Tokens, chunks and bytes as the name says."""

    lookups: int = 0
    lookup_hits: int = 0
    lookup_misses: int = 0
    hit_tokens_dram: int = 0  # tokens that lookups offered
    hit_tokens_nvme: int = 0
    planner_refused: int = 0  # plans that load less than what is held
    leases: int = 0
    lease_lost: int = 0  # a chunk had gone since the lookup
    lease_no_room: int = 0
    load_chunks_dram: int = 0  # chunks leased, by where their bytes were
    load_chunks_nvme: int = 0
    load_bytes_dram: int = 0
    load_bytes_nvme: int = 0
    prefetched: int = 0
    prefetch_cancelled: int = 0
    stored: int = 0  # chunks whose bytes reached DRAM from the workers
    stored_bytes: int = 0
    store_failed: int = 0
    store_timeout: int = 0
    store_aborted: int = 0
    store_skipped_full: int = 0
    evicted: int = 0
    evicted_bytes: int = 0
    evicted_unwritten: int = 0
    reclaimed_extents: int = 0  # extents moved from one slot class to another
    slot_failed: int = 0  # chunks dropped because a worker could not use them
    quarantined: int = 0  # slots dropped while something still used them
    nvme_written: int = 0
    nvme_written_bytes: int = 0
    nvme_read: int = 0
    nvme_read_bytes: int = 0
    nvme_corrupt: int = 0
    nvme_miss: int = 0
    nvme_io_errors: int = 0
    nvme_unreadable: int = 0  # chunks deleted from NVMe because they could never be read
    nvme_no_space: int = 0
    nvme_dropped: int = 0
    nvme_admitted_twice: int = 0  # chunks to be written (core/admission.py), by reason
    nvme_admitted_coin: int = 0
    nvme_admitted_hint: int = 0
    nvme_admitted_idle: int = 0
    nvme_refused_coin: int = 0  # chunks not to be written, by reason
    nvme_refused_value: int = 0
    nvme_refused_budget: int = 0
    nvme_outrun: int = 0  # admitted, but evictions outran the disk
    nvme_ghost_hits: int = 0  # chunks asked for again that had left and were nowhere
    nvme_breaker_trips: int = 0
    nvme_stalled: int = 0  # times that reads under way made no progress
    nvme_probes: int = 0  # reads made only to see whether a tier works again
    tier_errors: int = 0  # exceptions from the arena or the store
    resets: int = 0
    hint_retain_cut: int = 0  # chunks DRAM let go of early: over the bound, or no other room
    hint_pin_refused: int = 0  # prompts that were not pinned for want of room
    hint_released: int = 0  # chunks let go of because their session ended
    hint_deleted: int = 0  # and deleted from NVMe
    verify_sampled: int = 0  # chunks that the shadow check set out to compare, and how that ended
    verify_ok: int = 0
    verify_mismatch: int = 0
    verify_given_up: int = 0

    def copy(self) -> Counters:
        """A snapshot."""
        return replace(self)

    def as_dict(self) -> dict[str, int]:
        """Name -> count."""
        return {name: getattr(self, name) for name in _COUNTS}


_COUNTS = tuple(f.name for f in fields(Counters))


@dataclass(frozen=True, slots=True)
class Occupancy:
    """What is held now. Bytes are slot bytes, all shards."""

    slots_used: int
    slots_pinned: int
    slots_filling: int
    slots_quarantined: int
    bytes_used: int
    bytes_pinned: int
    bytes_quarantined: int
    bytes_total: int
    dirty_chunks: int
    leases: int
    prefetch_bytes: int
    nvme_entries: int
    nvme_bytes: int
    nvme_max: int
    nvme_inflight_read_bytes: int
    nvme_inflight_write_bytes: int


@dataclass(frozen=True, slots=True)
class Levels:
    """The part of Occupancy that is known without looking at every entry, and live estimates.

    Breakers: 0 closed, 0.5 half-open, 1 open. Rates that are not known are left out, or 0.
    """

    bytes_used: int
    bytes_pinned: int
    bytes_total: int
    slots_used: int
    nvme_entries: int
    nvme_bytes: int
    nvme_max: int
    reading_bytes: int
    writing_bytes: int
    read_breaker: float
    write_breaker: float
    nvme_retained_bytes: int  # on NVMe, kept from being recycled by hints
    nvme_retain_cut: int  # chunks of which NVMe gave that up early, since it was opened
    wear: Wear | None  # of the NVMe tier
    bytes_per_s: Mapping[Tier, float]
    prefill_tokens_per_s: float


class Guard:
    """Turns an exception of a tier into a count and one log line per kind of call."""

    def __init__(self, counters: Counters) -> None:
        self._counters = counters
        self._said: set[str] = set()

    def failed(self, what: str, error: Exception) -> None:
        """Call in an except block: counts, and logs the first of each ``what`` with traceback."""
        self._counters.tier_errors += 1
        if what not in self._said:
            self._said.add(what)
            log.warning("%s failed (said once, counted on): %s", what, error, exc_info=error)
