"""Payloads of metrics, and the recorder that counts them. Which there are: metric_table.py.

A leaf as far as engines go: no vLLM, no Prometheus client. An engine adapter asks the ``Recorder``
for what changed since last time (``take``) and ships that plain dict to its own exporter.

Payload, safe for pickle and msgpack (keys are text, values numbers and lists of numbers)::

    {"c": {series: increase}, "g": {series: value}, "h": {series: [[count, ...], [sum, ...]]}}

A *series* is the metric's name and its label values joined by "|". A histogram has one count and
one sum per bucket (the last bucket is +Inf): both add up across ranks and steps exactly.
"""

from __future__ import annotations

import threading
from bisect import bisect_left
from collections.abc import Iterable, Mapping
from typing import Any

from kvoffload.metric_table import METRICS, STEP_TIMES, Kind
from kvoffload.types import LoadFailure, MissCause, Tier

Payload = dict[str, dict[str, Any]]

AGAIN_S = 60.0
"""Gauges are shipped this often whether they changed or not: whoever exports them may be new."""


def series_key(name: str, labels: Iterable[str] = ()) -> str:
    """The payload key of a series."""
    return "|".join((name, *(str(v).replace("|", "_") for v in labels)))


def split_series(series: str) -> tuple[str, tuple[str, ...]]:
    """(metric name, label values) of a payload key."""
    name, *labels = series.split("|")
    return name, tuple(labels)


def empty_payload() -> Payload:
    """A payload with nothing in it."""
    return {"c": {}, "g": {}, "h": {}}


def is_empty(payload: Mapping[str, Any]) -> bool:
    """True when a payload holds no series."""
    return not any(payload.get(kind) for kind in ("c", "g", "h"))


def merge(first: Mapping[str, Any], second: Mapping[str, Any]) -> Payload:
    """A new payload: counters and histograms add up, gauges keep ``second``'s value."""
    out = empty_payload()
    for payload in (first, second):
        for series, value in payload.get("c", {}).items():
            out["c"][series] = out["c"].get(series, 0) + value
        out["g"].update(payload.get("g", {}))
        for series, (counts, sums) in payload.get("h", {}).items():
            held = out["h"].get(series)
            if held is None:
                out["h"][series] = [list(counts), list(sums)]
            else:
                held[0] = [a + b for a, b in zip(held[0], counts, strict=True)]
                held[1] = [a + b for a, b in zip(held[1], sums, strict=True)]
    return out


class Recorder:
    """Counts what one connector role does. Any thread; a call takes about a microsecond.

    Raises KeyError for a name that is not in METRICS and ValueError for a wrong number of labels:
    both are mistakes in our own code, found by the first test that reaches them.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._now = empty_payload()
        self._totals: dict[str, float] = {}
        self._levels: dict[str, float] = {}
        self._shipped_all: float | None = None  # when
        self._events: dict[str, float] = {}  # totals as last seen; one thread reports them

    # -- primitives

    def inc(self, name: str, amount: float = 1, *labels: str) -> None:
        """Add to a counter. Raises ValueError on a negative amount."""
        if amount < 0:
            raise ValueError(f"{name}: a counter cannot fall ({amount})")
        if amount:
            series = self._series(name, Kind.COUNTER, labels)
            with self._lock:
                self._now["c"][series] = self._now["c"].get(series, 0) + amount

    def set(self, name: str, value: float, *labels: str) -> None:
        """Set a gauge; only a changed value is shipped, and all of them now and then."""
        series = self._series(name, Kind.GAUGE, labels)
        with self._lock:
            if self._levels.get(series) != value:
                self._levels[series] = value
                self._now["g"][series] = value

    def ship_again(self, now: float) -> None:
        """Ship every gauge, if that is AGAIN_S ago (the caller's seconds). O(gauges) then.

        vLLM makes new exporters when an elastic engine grows, and theirs begin at 0.
        """
        if self._shipped_all is None:
            self._shipped_all = now
        elif now - self._shipped_all >= AGAIN_S:
            self._shipped_all = now
            with self._lock:
                self._now["g"].update(self._levels)

    def observe(self, name: str, value: float) -> None:
        """Add one observation to a histogram."""
        series = self._series(name, Kind.HISTOGRAM, ())
        buckets = METRICS[name].buckets
        at = bisect_left(buckets, value)
        with self._lock:
            held = self._now["h"].get(series)
            if held is None:
                held = [[0] * (len(buckets) + 1), [0.0] * (len(buckets) + 1)]
                self._now["h"][series] = held
            held[0][at] += 1
            held[1][at] += value

    def total(self, name: str, value: float, *labels: str) -> None:
        """Bring a counter to a running total kept elsewhere; a total that fell starts anew."""
        series = self._series(name, Kind.COUNTER, labels)
        with self._lock:
            before = self._totals.get(series, 0)
            grown = value - before if value >= before else value
            self._totals[series] = value
            if grown:
                self._now["c"][series] = self._now["c"].get(series, 0) + grown

    def changed(self) -> bool:
        """Whether anything but the scheduler's step times waits to be taken."""
        with self._lock:
            now = self._now
            return bool(now["c"] or now["g"] or now["h"].keys() - {STEP_TIMES})

    def take(self) -> Payload:
        """What changed since the last call; the caller owns it."""
        with self._lock:
            taken, self._now = self._now, empty_payload()
        return taken

    @staticmethod
    def _series(name: str, kind: Kind, labels: tuple[str, ...]) -> str:
        metric = METRICS[name]
        if metric.kind is not kind or len(labels) != len(metric.labels):
            raise ValueError(f"{name} is a {metric.kind.name} with labels {metric.labels}")
        return series_key(name, labels) if labels else name

    # -- what the scheduler half reports

    def lookup(self, queried: int, hit: int) -> None:
        """The first lookup of a request: tokens asked for, tokens offered."""
        self.inc("kvoffload_lookups_total")
        self.inc("kvoffload_queried_tokens_total", queried)
        self.inc("kvoffload_offered_tokens_total", hit)
        if not hit:
            self.miss("no_hit")

    def miss(self, reason: str) -> None:
        """A lookup that loads nothing."""
        self.inc("kvoffload_miss_requests_total", 1, reason)

    def miss_cause(self, cause: MissCause) -> None:
        """A request computed tokens that a tier might have held."""
        self.inc("kvoffload_miss_cause_total", 1, cause.value)

    def hit(self, tokens_by_tier: Mapping[Tier, int]) -> None:
        """A load succeeded: tokens by the tier they came from."""
        for tier, tokens in tokens_by_tier.items():
            if tokens:
                self.inc("kvoffload_hit_requests_total", 1, Tier(tier).value)
                self.inc("kvoffload_hit_tokens_total", tokens, Tier(tier).value)

    def load_done(self, seconds: float, tokens: int) -> None:
        """All ranks answered a load and it succeeded."""
        self.observe("kvoffload_load_seconds", seconds)
        self.inc("kvoffload_loaded_tokens_total", tokens)

    def plan(self, decision: str) -> None:
        """What became of a request's hit (core/planner.Decision); counted when it changes."""
        self.inc("kvoffload_plans_total", 1, decision)

    def follower(self, outcome: str, shared_blocks: int = 0) -> None:
        """A request that waited for another one's load stopped waiting; it now shares blocks."""
        self.inc("kvoffload_followers_total", 1, outcome)
        self.inc("kvoffload_shared_blocks_total", shared_blocks)

    def saved(self, seconds: float) -> None:
        """Prefill time that a load saved beyond its own; negative: what it cost, or failing did."""
        if seconds >= 0:
            self.inc("kvoffload_saved_seconds_total", seconds)
        else:
            self.inc("kvoffload_cost_seconds_total", -seconds)

    def planner(self, bytes_per_s: Mapping[Tier, float], prefill_tokens_per_s: float) -> None:
        """What the planner believes."""
        for tier, rate in bytes_per_s.items():
            self.set("kvoffload_tier_bytes_per_second", rate, tier.value)
        self.set("kvoffload_prefill_tokens_per_second", prefill_tokens_per_s)

    def queue(self, reading: int, writing: int, reads: float, writes: float) -> None:
        """NVMe: bytes under way, and the two breakers (0 closed, 0.5 half-open, 1 open)."""
        self.set("kvoffload_inflight_bytes", reading, "nvme", "load")
        self.set("kvoffload_inflight_bytes", writing, "nvme", "store")
        self.set("kvoffload_breaker_open", reads, "nvme", "load")
        self.set("kvoffload_breaker_open", writes, "nvme", "store")

    def wear(self, wear: Any) -> None:
        """What was written to the NVMe drives, and how likely more is (core/wear.Wear)."""
        self.total("kvoffload_nvme_payload_bytes_total", wear.payload_bytes)
        self.total("kvoffload_nvme_device_bytes_total", wear.device_bytes)
        self.set("kvoffload_nvme_written_per_day_bytes", wear.bytes_per_day)
        self.set("kvoffload_nvme_admission_probability", wear.probability)
        self.set("kvoffload_nvme_value", wear.value)
        self.set("kvoffload_nvme_lifetime_payload_bytes", wear.life.payload_bytes)
        self.set("kvoffload_nvme_lifetime_device_bytes", wear.life.device_bytes)
        self.set("kvoffload_nvme_lifetime_per_day_bytes", wear.life.bytes_per_day)
        if wear.life.days_left is not None:  # unknown is no 0: no series then
            self.set("kvoffload_nvme_days_left", wear.life.days_left, "week")

    def load_failed_request(self) -> None:
        """All ranks answered a load and it failed; vLLM recomputes."""
        self.inc("kvoffload_failed_loads_total")

    def failure(self, kind: str, count: int = 1) -> None:
        """Something of ours or of a tier failed."""
        self.inc("kvoffload_failures_total", count, kind)

    def scheduler_step(self, seconds: float) -> None:
        """Our share of one scheduler step."""
        self.observe("kvoffload_scheduler_step_seconds", seconds)

    def reset_epoch(self) -> None:
        """Everything stored so far was hidden."""
        self.inc("kvoffload_resets_total")

    def hint(self, kind: str) -> None:
        """A request came with a good hint."""
        self.inc("kvoffload_hints_total", 1, kind)

    def hint_refused(self, reason: str) -> None:
        """A hint was ignored."""
        self.inc("kvoffload_hints_refused_total", 1, reason)

    def kept(self, retained: int, pinned: int, nvme: int) -> None:
        """Bytes that hints keep: of DRAM from eviction, of NVMe from being recycled."""
        self.set("kvoffload_hint_bytes", retained, "retained")
        self.set("kvoffload_hint_bytes", pinned, "pinned")
        self.set("kvoffload_hint_bytes", nvme, "nvme")

    def worker(self, report: Any) -> None:
        """Fold in a worker's account of a step (engines/vllm/meta.WorkerReport)."""
        self.inc("kvoffload_bytes_total", report.load_bytes, "dram", "load")
        self.inc("kvoffload_bytes_total", report.store_bytes, "dram", "store")
        for name, values in (
            ("kvoffload_load_copy_seconds", report.load_copy_s),
            ("kvoffload_load_wait_seconds", report.load_wait_s),
            ("kvoffload_store_seconds", report.store_copy_s),
        ):
            for seconds in values:
                self.observe(name, seconds)
        for bad in report.bad:
            self.failure(LoadFailure(bad.reason).value)
        for hook, count in report.hook_errors.items():
            self.failure(f"hook_{hook}", count)
        if report.attach_error:
            self.failure("attach")

    def manager(
        self, counters: Mapping[str, float], nvme: Mapping[str, float] | None = None
    ) -> None:
        """Running totals of the Manager (each becomes an event) and of the NVMe store's stats()."""
        before = self._events
        for event, value in counters.items():  # dozens, of which a step changes a few
            if before.get(event, 0) != value:
                before[event] = value
                self.total("kvoffload_events_total", value, event)
        if nvme is not None:
            self.total("kvoffload_bytes_total", nvme.get("bytes_read", 0), "nvme", "load")
            self.total("kvoffload_bytes_total", nvme.get("bytes_written", 0), "nvme", "store")
            self.set("kvoffload_nvme_used_bytes", nvme.get("bytes_used", 0))
            self.set("kvoffload_nvme_max_bytes", nvme.get("bytes_max", 0))
            self.set("kvoffload_entries", nvme.get("entries", 0), "nvme")

    def dram(self, used: int, total: int, pinned: int, entries: int) -> None:
        """Occupancy of the arena, in bytes and chunks."""
        self.set("kvoffload_dram_used_bytes", used)
        self.set("kvoffload_dram_total_bytes", total)
        self.set("kvoffload_dram_pinned_bytes", pinned)
        self.set("kvoffload_entries", entries, "dram")

    def drive(self, path: str, up: bool, used: int, errors: int, trips: int) -> None:
        """One of several drives of the NVMe tier; errors and trips are running totals."""
        self.set("kvoffload_drive_up", int(up), path)
        self.set("kvoffload_drive_used_bytes", used, path)
        self.total("kvoffload_drive_errors_total", errors, path)
        self.total("kvoffload_drive_trips_total", trips, path)

    def check(self) -> None:
        """Raise AssertionError when a series has no metric or a histogram lost its shape."""
        with self._lock:
            for kind, held in self._now.items():
                for series, value in held.items():
                    name, labels = split_series(series)
                    metric = METRICS[name]
                    assert metric.kind.value == kind, series
                    assert len(labels) == len(metric.labels), series
                    if kind == "h":
                        assert [len(v) for v in value] == [len(metric.buckets) + 1] * 2, series
