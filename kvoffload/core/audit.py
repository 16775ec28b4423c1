"""Reading a Manager as a whole: occupancy, and the invariants that span its parts."""

from __future__ import annotations

from typing import NamedTuple

from kvoffload.core.lease import Leases, Prefetches
from kvoffload.core.nvme import NvmeTier
from kvoffload.core.pool import Pool
from kvoffload.core.prefetch import Prefetcher
from kvoffload.core.rates import Rates
from kvoffload.core.shadow import Shadow
from kvoffload.core.stats import Levels, Occupancy
from kvoffload.types import SlotState

_PREFILL_SHOWN = 1024  # tokens of the prompt whose prefill rate is exported


class Parts(NamedTuple):
    """What a Manager consists of; read under its lock."""

    pool: Pool
    nvme: NvmeTier | None
    leases: Leases
    prefetches: Prefetches
    prefetcher: Prefetcher
    shadow: Shadow
    data_bytes: int


def occupancy(parts: Parts, nvme_bytes: int) -> Occupancy:
    """What is held now; ``nvme_bytes`` stands in where the store does not know its bound."""
    pool, nvme = parts.pool, parts.nvme
    stats = nvme.stats() if nvme is not None else {}
    limbo = list(pool.limbo.values())
    held = [*pool.index, *limbo]
    pinned = [e for e in held if e.pins]
    return Occupancy(
        slots_used=len(held),
        slots_pinned=len(pinned),
        slots_filling=sum(e.state is SlotState.FILLING for e in held),
        slots_quarantined=len(limbo),
        bytes_used=sum(e.nbytes for e in held),
        bytes_pinned=sum(e.nbytes for e in pinned),
        bytes_quarantined=sum(e.nbytes for e in limbo),
        bytes_total=parts.data_bytes,
        dirty_chunks=sum(e.dirty for e in held),
        leases=len(parts.leases),
        prefetch_bytes=parts.prefetches.nbytes,
        nvme_entries=int(stats.get("entries", 0)),
        nvme_bytes=int(stats.get("bytes_used", 0)),
        nvme_max=int(stats.get("bytes_max", nvme_bytes)),
        nvme_inflight_read_bytes=nvme.reads.inflight_bytes if nvme is not None else 0,
        nvme_inflight_write_bytes=nvme.writes.inflight_bytes if nvme is not None else 0,
    )


def levels(parts: Parts, rates: Rates, now: float) -> Levels:
    """The part of it that is known without looking at every entry. O(1)."""
    pool, nvme = parts.pool, parts.nvme
    stats = nvme.stats() if nvme is not None else {}
    seconds = rates.prefill.seconds(0, _PREFILL_SHOWN)
    return Levels(
        bytes_used=pool.held_bytes,
        bytes_pinned=pool.index.pinned_bytes,
        bytes_total=parts.data_bytes,
        slots_used=pool.held_slots,
        nvme_entries=int(stats.get("entries", 0)),
        nvme_bytes=int(stats.get("bytes_used", 0)),
        nvme_max=int(stats.get("bytes_max", 0)),
        reading_bytes=nvme.reads.inflight_bytes if nvme else 0,
        writing_bytes=nvme.writes.inflight_bytes if nvme else 0,
        read_breaker=nvme.breaker.state(now).level if nvme else 0.0,
        write_breaker=nvme.write_breaker.state(now).level if nvme else 0.0,
        nvme_retained_bytes=int(stats.get("retained_bytes", 0)),
        nvme_retain_cut=int(stats.get("retained_cut", 0)),
        wear=nvme.wear(stats, now) if nvme is not None and stats else None,
        bytes_per_s={t: r.bytes_per_s for t, r in rates.tiers().items()},
        prefill_tokens_per_s=_PREFILL_SHOWN / seconds if seconds else 0.0,
    )


def check(parts: Parts) -> None:
    """Raise AssertionError naming the first broken invariant."""
    pool, nvme = parts.pool, parts.nvme
    pool.check()
    parts.prefetches.check()
    parts.prefetcher.check()
    parts.shadow.check()
    pins: dict[int, int] = {}
    for entries in parts.leases:
        for e in entries:
            pins[id(e)] = pins.get(id(e), 0) + 1
    io: dict[int, int] = {}
    if nvme is not None:
        nvme.reads.check()
        nvme.writes.check()
        nvme.breaker.check()
        nvme.write_breaker.check()
        for e in nvme.io_entries():
            io[id(e)] = io.get(id(e), 0) + 1
    used = 0
    for e in (*pool.index, *pool.limbo.values()):
        assert e.pins == pins.pop(id(e), 0), f"pins of {e.key.hex()}"
        assert e.io == io.pop(id(e), 0), f"io of {e.key.hex()}"
        used += e.nbytes
    assert not pins and not io, "a lease or a job uses a freed slot"
    assert used <= parts.data_bytes, "capacity exceeded"
