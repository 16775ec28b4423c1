"""What a running engine writes to NVMe and how long the drives last, from its metrics."""

from __future__ import annotations

from dataclasses import dataclass

from kvoffload.cli.top_samples import Sample
from kvoffload.cli.units import size
from kvoffload.core.wear import days_left

_EVENTS = "kvoffload_events_total"
REASONS = {
    "used_twice": "nvme_admitted_twice",
    "coin": "nvme_admitted_coin",
    "idle": "nvme_admitted_idle",
    "not_coin": "nvme_refused_coin",
    "no_value": "nvme_refused_value",
    "no_budget": "nvme_refused_budget",
    "outrun": "nvme_outrun",
}
"""Why a chunk was written (the first three) or not, and the event that counts it."""


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
