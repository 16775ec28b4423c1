"""Every metric kvoffload exports: names, help, labels, buckets. No vLLM, no Prometheus client."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from enum import Enum

from kvoffload.types import Decision, LoadFailure, MissCause, Tier

SECONDS = (0.0001, 0.0003, 0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0)
STEP_SECONDS = (0.00001, 0.00003, 0.0001, 0.0003, 0.001, 0.003, 0.01, 0.03, 0.1)


class Kind(str, Enum):
    """What a number means: a running total, a level, or a distribution."""

    COUNTER = "c"
    GAUGE = "g"
    HISTOGRAM = "h"


@dataclass(frozen=True, slots=True)
class Metric:
    """One exported metric. ``series`` lists label values that exist from the start (as 0)."""

    name: str
    kind: Kind
    help: str
    labels: tuple[str, ...] = ()
    buckets: tuple[float, ...] = ()
    series: tuple[tuple[str, ...], ...] = ()


_TIERS = tuple((t.value,) for t in Tier)
_MISSES = ("no_hit", "namespace_unknown", "lease_refused", "verify_sample")
_DECISIONS = tuple(d.value for d in Decision)
_FAILURES = (*((f.value,) for f in LoadFailure), ("verify",))
_WHO = ("model", "tenant")
_MOVES = tuple((t.value, d) for t in Tier for d in ("load", "store"))


def _counter(name: str, text: str, *labels: str, series: Iterable[tuple[str, ...]] = ()) -> Metric:
    return Metric(name, Kind.COUNTER, text, labels, (), tuple(series))


def _gauge(name: str, text: str, *labels: str, series: Iterable[tuple[str, ...]] = ()) -> Metric:
    return Metric(name, Kind.GAUGE, text, labels, (), tuple(series))


def _histogram(name: str, text: str, buckets: tuple[float, ...] = SECONDS) -> Metric:
    return Metric(name, Kind.HISTOGRAM, text, (), buckets)


STEP_TIMES = "kvoffload_scheduler_step_seconds"

METRICS: dict[str, Metric] = {
    m.name: m
    for m in (
        _counter("kvoffload_lookups_total", "Requests looked up (once each)."),
        _counter("kvoffload_queried_tokens_total", "Tokens beyond HBM's own hit looked up."),
        _counter("kvoffload_offered_tokens_total", "Tokens held and worth loading."),
        _counter(
            "kvoffload_hit_requests_total",
            "Loads from a tier that succeeded (one load may count in several).",
            "tier",
            series=_TIERS,
        ),
        _counter(
            "kvoffload_hit_tokens_total",
            "Tokens whose load succeeded, by the tier they came from.",
            "tier",
            series=_TIERS,
        ),
        _counter(
            "kvoffload_miss_requests_total",
            "Lookups that load nothing, by reason.",
            "reason",
            series=((m,) for m in _MISSES),
        ),
        _counter(
            "kvoffload_miss_cause_total",
            "Requests that computed tokens which a tier might have held, by cause (docs/why.md).",
            "cause",
            series=((c.value,) for c in MissCause),
        ),
        _counter(
            "kvoffload_loaded_tokens_total",
            "Tokens whose load succeeded: not recomputed.",
        ),
        _counter(
            "kvoffload_bytes_total",
            "Bytes moved. dram: between HBM and the arena; nvme, remote: between arena and tier.",
            "tier",
            "direction",
            series=_MOVES,
        ),
        _counter(
            "kvoffload_failed_loads_total", "Requests whose load failed and that were recomputed."
        ),
        _counter(
            "kvoffload_failures_total",
            "Failures by kind: unusable or wrong (verify) chunks (once a load, however many ranks "
            "meet them), hooks that raised, failed tiers.",
            "kind",
            series=_FAILURES,
        ),
        _counter(
            "kvoffload_events_total",
            "Manager events: stored, evicted, dropped, quarantined, ...",
            "event",
        ),
        _counter(
            "kvoffload_plans_total",
            "What became of requests' hits: loaded whole, partly, to learn, refused, waited for.",
            "decision",
            series=((d,) for d in _DECISIONS),
        ),
        _counter(
            "kvoffload_followers_total",
            "Requests that waited for another one's load of the same prefix, by how that ended.",
            "outcome",
            series=(("hit_hbm",), ("gave_up",)),
        ),
        _counter(
            "kvoffload_shared_blocks_total",
            "HBM blocks (first KV group) that such requests share instead of filling others.",
        ),
        _counter("kvoffload_saved_seconds_total", "Prefill seconds saved by loads, net."),
        _counter(
            "kvoffload_cost_seconds_total",
            "Seconds by which loads were the slower way, and that requests waited for failed ones.",
        ),
        _counter("kvoffload_resets_total", "Times everything stored was hidden by a new epoch."),
        _counter("kvoffload_hints_total", "Hints of requests that were good.", "kind"),
        _counter("kvoffload_hints_refused_total", "Hints that were ignored.", "reason"),
        _gauge(
            "kvoffload_hint_bytes",
            "Bytes that hints keep: retained and pinned in DRAM, nvme on NVMe.",
            "kind",
        ),
        _histogram("kvoffload_load_seconds", "Load of one request, from allocation to answer."),
        _histogram("kvoffload_load_copy_seconds", "Copy of one load job on one rank."),
        _histogram("kvoffload_load_wait_seconds", "Longest wait of a load job for a slot's bytes."),
        _histogram("kvoffload_store_seconds", "Copy of one store job on one rank."),
        _histogram(
            STEP_TIMES,
            "kvoffload's part of building one step's metadata.",
            STEP_SECONDS,
        ),
        _gauge("kvoffload_dram_used_bytes", "Bytes of the arena that hold chunks."),
        _gauge("kvoffload_dram_total_bytes", "Bytes of the arena."),
        _gauge("kvoffload_dram_pinned_bytes", "Bytes of the arena held by leases."),
        _gauge(
            "kvoffload_nvme_used_bytes",
            "Disk space taken under nvme_path, by all engines that share it: whole segments, also "
            "where nothing is in them yet.",
        ),
        _gauge("kvoffload_nvme_max_bytes", "Bound of the NVMe path."),
        _counter("kvoffload_nvme_payload_bytes_total", "Chunk bytes accepted by NVMe."),
        _counter(
            "kvoffload_nvme_device_bytes_total",
            "Bytes written to the drives: payload, what is kept by writing it again, records.",
        ),
        _gauge("kvoffload_nvme_written_per_day_bytes", "Device bytes a day, by the last hour."),
        _gauge(
            "kvoffload_nvme_lifetime_payload_bytes",
            "Chunk bytes accepted under nvme_path in its life, by all engines that share it.",
        ),
        _gauge(
            "kvoffload_nvme_lifetime_device_bytes",
            "Bytes written to the drives for it, in the same time and by the same engines.",
        ),
        _gauge("kvoffload_nvme_lifetime_per_day_bytes", "Device bytes a day, by the last 7 days."),
        _gauge(
            "kvoffload_nvme_days_left",
            "Days until the first drive has taken what it endures; only where nvme_tbw is known.",
            "by",
        ),
        _gauge("kvoffload_nvme_endurance_bytes", "What the drives endure (nvme_tbw); 0: unknown."),
        _gauge(
            "kvoffload_nvme_admission_probability", "Of writing a chunk that was used once: 0 to 1."
        ),
        _gauge("kvoffload_nvme_value", "Bytes asked for again per byte that left DRAM, of late."),
        _gauge("kvoffload_inflight_bytes", "Bytes under way.", "tier", "direction"),
        _gauge(
            "kvoffload_breaker_open",
            "1: the tier is not used; 0.5: it is being tried; 0: in use.",
            "tier",
            "direction",
        ),
        _gauge("kvoffload_tier_bytes_per_second", "What the planner expects of a tier.", "tier"),
        _gauge(
            "kvoffload_prefill_tokens_per_second",
            "What the planner expects of the engine, for the first 1024 tokens of a prompt.",
        ),
        _gauge("kvoffload_entries", "Chunks held, by tier.", "tier", series=_TIERS),
        _gauge("kvoffload_drive_up", "With several nvme_path: 1 while the path is used.", "path"),
        _gauge("kvoffload_drive_used_bytes", "With several nvme_path: bytes under each.", "path"),
        _counter("kvoffload_drive_errors_total", "Failed transfers of a drive.", "path"),
        _counter("kvoffload_drive_trips_total", "Times a drive was left alone.", "path"),
        _counter("kvoffload_ledger_requests_total", "Requests that are over.", *_WHO),
        _counter(
            "kvoffload_ledger_tokens_total",
            "Prompt tokens of such requests: from HBM, loaded from a tier, or computed (miss).",
            *_WHO,
            "source",
        ),
        _counter("kvoffload_ledger_loads_total", "Loads that ended.", *_WHO, "tier"),
        _counter(
            "kvoffload_ledger_bytes_total", "Bytes moved for them.", *_WHO, "tier", "direction"
        ),
        _counter(
            "kvoffload_ledger_saved_gpu_seconds_total",
            "Prefill time that loads saved beyond their own, times the ranks.",
            *_WHO,
            "tier",
        ),
        _counter(
            "kvoffload_ledger_lost_gpu_seconds_total",
            "By how much loads were the slower way, and time of failed loads, times the ranks.",
            *_WHO,
            "tier",
        ),
        _counter("kvoffload_ledger_load_seconds_total", "Wall time of loads.", *_WHO, "tier"),
        _counter(
            "kvoffload_ledger_lookup_seconds_total",
            "Scheduler time of lookups for requests that loaded nothing.",
            *_WHO,
        ),
        _gauge(
            "kvoffload_curve_hit_ratio",
            "Expected hits of a tier of this many times its size, as a share of all prompt tokens; "
            "nvme: on top of DRAM as it is.",
            "tier",
            "factor",
        ),
        _gauge("kvoffload_curve_tokens", "Prompt tokens that these expectations rest on."),
    )
}
