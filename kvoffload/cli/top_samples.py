"""Samples of a server's metrics and how two of them are read: increases, rates, quantiles.

Pure: no I/O, no clock. Counters are per process: after a restart the server counts from 0, and what
was added in the window is the new value itself.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

Labels = frozenset[tuple[str, str]]

OURS = "kvoffload_"
START = "process_start_time_seconds"
_VLLM = (
    "vllm:num_requests_running",
    "vllm:num_requests_waiting",
    "vllm:num_requests_kv_fetch_by_stage",
    "vllm:prefix_cache_queries_total",
    "vllm:prefix_cache_hits_total",
)
_CUMULATIVE = ("_total", "_count", "_sum", "_bucket")


@dataclass(frozen=True, slots=True)
class Sample:
    """One scrape: metric name -> labels -> value. ``at`` is a monotonic clock's seconds.

    ``broken`` names the series whose value was not finite: they are there, but say nothing.
    """

    at: float
    values: Mapping[str, Mapping[Labels, float]]
    broken: frozenset[tuple[str, Labels]] = frozenset()

    @classmethod
    def of(cls, at: float, rows: Iterable[tuple[str, Mapping[str, str], float]]) -> Sample:
        """Keep what a frame needs of (name, labels, value) rows."""
        values: dict[str, dict[Labels, float]] = {}
        broken: set[tuple[str, Labels]] = set()
        for name, labels, value in rows:
            if not (name.startswith(OURS) or name in _VLLM or name == START):
                continue
            key = frozenset(labels.items())
            if math.isfinite(value):
                values.setdefault(name, {})[key] = float(value)
            else:
                broken.add((name, key))
        return cls(at, values, frozenset(broken))

    @property
    def has_ours(self) -> bool:
        """Whether the server exports any metric of kvoffload."""
        return any(name.startswith(OURS) for name in self.values)


@dataclass(frozen=True, slots=True)
class Flow:
    """A counter. ``added`` and ``per_s`` are of the window; None: no window, or not known."""

    total: float
    added: float | None = None
    per_s: float | None = None


@dataclass(frozen=True, slots=True)
class Spread:
    """Observations of a duration. A quantile in the open last bucket is that bucket's start."""

    count: float
    mean_s: float
    p50_s: float
    p99_s: float


@dataclass(frozen=True, slots=True)
class Times:
    """A histogram of seconds: in the window and since the server's start; None: no observation.

    ``bound_s`` is its largest finite bucket bound: a quantile that reaches it may be larger.
    """

    now: Spread | None
    total: Spread | None
    bound_s: float


class Window:
    """Two samples and how to read them. Immutable once made."""

    def __init__(self, before: Sample | None, after: Sample) -> None:
        self.after = after
        self.seconds: float | None = None
        self.restarted = False
        self._before = Sample(0.0, {})
        if before is not None and after.at > before.at:
            self.seconds = after.at - before.at
            self.restarted = _restarted(before, after)
            if not self.restarted:
                self._before = before

    def levels(self, name: str, **labels: str) -> list[float]:
        """Values of a gauge, one per engine."""
        wanted = labels.items()
        return [v for have, v in self.after.values.get(name, {}).items() if wanted <= have]

    def flow(self, name: str, **labels: str) -> Flow | None:
        """A counter over all engines and all labels not given."""
        wanted = labels.items()
        keys = [have for have in self.after.values.get(name, {}) if wanted <= have]
        return self._flow(name, keys) if keys else None

    def by(self, name: str, label: str) -> dict[str, Flow]:
        """A counter per value of ``label``, in alphabetical order."""
        keys: dict[str, list[Labels]] = {}
        for have in self.after.values.get(name, {}):
            keys.setdefault(dict(have).get(label, ""), []).append(have)
        return {value: self._flow(name, keys[value]) for value in sorted(keys)}

    def _flow(self, name: str, keys: Iterable[Labels]) -> Flow:
        after, before = self.after.values[name], self._before.values.get(name, {})
        total = added = 0.0
        known = self.seconds is not None
        for key in keys:
            total += after[key]
            # A series that was not there before (a new event) counted from 0.
            added += after[key] - before.get(key, 0.0)
            known = known and (name, key) not in self._before.broken
        if self.seconds is None or not known:
            return Flow(total)
        return Flow(total, added, added / self.seconds)

    def times(self, name: str) -> Times | None:
        """A histogram over all engines."""
        buckets = self.by(f"{name}_bucket", "le")
        spent = self.flow(f"{name}_sum")
        bounds = {float(le): flow for le, flow in buckets.items()}
        finite = [bound for bound in bounds if bound < math.inf]
        if spent is None or not finite or math.inf not in bounds:
            return None
        counts = {bound: flow.total for bound, flow in bounds.items()}
        added = {b: flow.added for b, flow in bounds.items() if flow.added is not None}
        now = None
        if spent.added is not None and len(added) == len(bounds):
            now = _spread(added, spent.added)
        return Times(now, _spread(counts, spent.total), max(finite))


def _restarted(before: Sample, after: Sample) -> bool:
    """Another process answers, or a counter of ours fell or vanished."""
    starts = [sample.values.get(START) for sample in (before, after)]
    if all(starts) and starts[0] != starts[1]:
        return True
    for name, held in before.values.items():
        if name.startswith(OURS) and name.endswith(_CUMULATIVE):
            now = after.values.get(name, {})
            for key, value in held.items():
                if value > now.get(key, -1.0) and (name, key) not in after.broken:
                    return True
    return False


def _spread(cumulative: Mapping[float, float], spent_s: float) -> Spread | None:
    """Mean and quantiles of cumulative bucket counts by upper bound; None without observations."""
    bounds = sorted(cumulative)
    count = cumulative[bounds[-1]]
    if count <= 0:
        return None
    p50, p99 = (_quantile(q, bounds, [cumulative[b] for b in bounds]) for q in (0.5, 0.99))
    return Spread(count, spent_s / count, p50, p99)


def _quantile(q: float, bounds: list[float], counts: list[float]) -> float:
    """As Prometheus does: linear inside a bucket, the last finite bound for the open one."""
    rank = q * counts[-1]
    low, below = 0.0, 0.0
    for bound, count in zip(bounds, counts, strict=True):
        if count >= rank and count > below:
            if bound == math.inf:
                return low
            # Rounding must not carry it into the next bucket.
            return min(bound, low + (bound - low) * (rank - below) / (count - below))
        low, below = bound, count
    return low
