"""What is written to NVMe and how long the drives last: by a running engine, from its metrics, and
in the whole life of a store's directories, from their files."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import reduce
from pathlib import Path
from typing import TYPE_CHECKING

from kvoffload.cli.top_samples import Sample
from kvoffload.cli.units import size
from kvoffload.core.wear import days_left

if TYPE_CHECKING:
    from kvoffload.tiers.nvme.lifetime import Lifetime

log = logging.getLogger("kvoffload.cli")

_EVENTS = "kvoffload_events_total"
REASONS = {
    "used_twice": "nvme_admitted_twice",
    "coin": "nvme_admitted_coin",
    "idle": "nvme_admitted_idle",
    "hint": "nvme_admitted_hint",
    "not_coin": "nvme_refused_coin",
    "no_value": "nvme_refused_value",
    "no_budget": "nvme_refused_budget",
    "outrun": "nvme_outrun",
}
"""Why a chunk was written (the first four) or not, and the event that counts it."""


@dataclass(frozen=True, slots=True)
class DriveWear:
    """Since the engine started; engines that share the path add up. Bytes and chunks."""

    payload_bytes: float
    device_bytes: float
    amplification: float | None  # device bytes per payload byte
    tb_per_day: float  # to the device, by the last hour, in 10^12 bytes
    days_left: float | None  # None: no nvme_tbw, or nothing is written
    probability: float  # of writing a chunk used once
    value: float  # bytes asked for again per byte that left DRAM
    chunks: dict[str, float]  # by reason


def of(sample: Sample) -> DriveWear:
    """From one scrape."""

    def total(name: str) -> float:
        return sum(sample.values.get(name, {}).values())

    def event(name: str) -> float:
        wanted = ("event", name)
        return sum(v for labels, v in sample.values.get(_EVENTS, {}).items() if wanted in labels)

    def least(name: str) -> float:
        return min(sample.values.get(name, {}).values(), default=0.0)

    payload = total("kvoffload_nvme_payload_bytes_total")
    device = total("kvoffload_nvme_device_bytes_total")
    daily = total("kvoffload_nvme_written_per_day_bytes")
    endurance = least("kvoffload_nvme_endurance_bytes")
    return DriveWear(
        payload_bytes=payload,
        device_bytes=device,
        amplification=device / payload if payload else None,
        tb_per_day=daily / 1e12,
        days_left=days_left(endurance, daily) if endurance else None,
        probability=least("kvoffload_nvme_admission_probability"),
        value=least("kvoffload_nvme_value"),
        chunks={reason: event(name) for reason, name in REASONS.items()},
    )


def read(url: str) -> DriveWear:
    """From a server's metrics. Raises ScrapeError (one line)."""
    from kvoffload.cli.top import metrics_url, scrape

    return of(scrape(metrics_url(url)))


def rows(wear: DriveWear) -> list[tuple[str, str]]:
    """What people read."""
    factor = f"{wear.amplification:.2f}" if wear.amplification is not None else "-"
    out = [
        ("written by the engine", size(wear.payload_bytes)),
        ("  to the device", size(wear.device_bytes)),
        ("  write amplification", factor),
        ("  TB per day", f"{wear.tb_per_day:.3f}"),
        ("  drives last", _age(wear.days_left)),
        ("admission: probability", f"{wear.probability:.2f}"),
        ("  value", f"{wear.value:.3f}"),
    ]
    return out + [(f"  chunks {reason}", f"{n:,.0f}") for reason, n in wear.chunks.items()]


def _age(days: float | None) -> str:
    if days is None:
        return "- (needs nvme_tbw, and writes)"
    return f"{days:,.0f} days" if days < 3650 else "over 10 years"


@dataclass(frozen=True, slots=True)
class LifeWear:
    """In the life of one store's directory, or of several together; by all writers."""

    since: int  # unix time of the first count
    at: int  # and of the last
    payload_bytes: int
    device_bytes: int
    amplification: float | None  # device bytes per payload byte
    tb_per_day: float  # to the device, by the last 7 days, in 10^12 bytes
    endurance_tb: float | None  # of all drives; None: not known
    days_left: float | None  # of the drive that goes first; None: not known, or nothing is written
    days: Mapping[str, int]  # device bytes by UTC day, the last 30


def lives(
    paths: Sequence[Path], tbw: float | None, now: float
) -> tuple[LifeWear | None, list[LifeWear | None]]:
    """All paths together, and each. None: nothing was counted there. ``tbw``: TB that each drive
    endures; None: as the engine was last configured. A file that makes no sense is one log line.
    """
    from kvoffload.tiers.nvme.lifetime import read_path

    endures = None if tbw is None else tbw * 1e12
    found: list[Lifetime | None] = []
    for path in paths:
        try:
            found.append(read_path(path, lambda line: log.warning("%s", line)))
        except OSError as error:
            log.warning("%s: lifetime totals: %s", path, error)
            found.append(None)
    known = [life for life in found if life is not None]
    each = [None if life is None else _life([life], endures, now) for life in found]
    if not known:
        return None, each
    return _life(known, endures, now), each


def _life(drives: Sequence[Lifetime], endures: float | None, now: float) -> LifeWear:
    both = reduce(lambda a, b: a.merged(b), drives)
    left = [days for d in drives if (days := d.days_left(now, endures)) is not None]
    first = min(left, default=math.inf)
    told = [endures if endures is not None else d.endurance_bytes for d in drives]
    return LifeWear(
        since=both.since,
        at=both.at,
        payload_bytes=both.payload_bytes,
        device_bytes=both.device_bytes,
        amplification=both.amplification(),
        tb_per_day=both.bytes_per_day(now) / 1e12,
        endurance_tb=sum(told) / 1e12 if all(told) else None,
        days_left=first if math.isfinite(first) else None,
        days={str(day): n for day, n in both.days},
    )


def life_rows(life: LifeWear | None) -> list[tuple[str, str]]:
    """What people read."""
    if life is None:
        return [("written in its life", "nothing counted yet")]
    factor = f"{life.amplification:.2f}" if life.amplification is not None else "-"
    return [
        (f"written since {_date(life.since)}", size(life.payload_bytes)),
        ("  to the device", size(life.device_bytes)),
        ("  write amplification", factor),
        ("  TB per day, last 7 days", f"{life.tb_per_day:.3f}"),
        ("  drives last", lasts(life)),
    ]


def lasts(life: LifeWear | None) -> str:
    """How long the drives last at the rate of the last 7 days."""
    if life is None:
        return "-"
    if life.endurance_tb is None and life.days_left is None:
        return "- (needs --tbw, or nvme_tbw)"
    return "- (nothing is written)" if life.days_left is None else _age(life.days_left)


def _date(unix: int) -> str:
    return datetime.fromtimestamp(unix, UTC).date().isoformat()
