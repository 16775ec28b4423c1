"""vLLM's stats hooks over kvoffload's metrics: one object per step, and the Prometheus exporter.

``KVOffloadStats.data`` is a payload of kvoffload.metrics. Stats travel worker -> scheduler -> front
end; the last leg carries only ``data``.
"""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from prometheus_client import REGISTRY, Counter, Gauge, Histogram
from vllm.distributed.kv_transfer.kv_connector.v1.metrics import (
    KVConnectorPromMetrics,
    KVConnectorStats,
)

from kvoffload.metric_table import METRICS, Kind, Metric
from kvoffload.metrics import empty_payload, is_empty, merge, split_series

if TYPE_CHECKING:
    from vllm.config import VllmConfig

logger = logging.getLogger("vllm.kvoffload")

_CLASSES: dict[Kind, type] = {
    Kind.COUNTER: Counter,
    Kind.GAUGE: Gauge,
    Kind.HISTOGRAM: Histogram,
}


@dataclass
class KVOffloadStats(KVConnectorStats):
    """What happened since the last step. ``data`` is never changed in place: vLLM keeps it."""

    def __post_init__(self) -> None:
        if not self.data:
            self.data = empty_payload()

    def reset(self) -> None:
        """Forget everything."""
        self.data = empty_payload()

    def aggregate(self, other: KVConnectorStats) -> KVOffloadStats:
        """Fold ``other`` (later, or of another rank) into this one; returns self."""
        if not other.is_empty():
            self.data = merge(self.data, other.data)
        return self

    def is_empty(self) -> bool:
        """True when nothing happened."""
        return is_empty(self.data)

    def reduce(self) -> dict[str, int | float]:
        """One line for vLLM's periodic log: what a person asks first, zeros left out."""
        counters, gauges = self.data["c"], self.data["g"]
        out: dict[str, int | float] = {}
        queried = counters.get("kvoffload_queried_tokens_total", 0)
        hit = _sum(counters, "kvoffload_hit_tokens_total")
        if queried:
            out["lookup tokens"] = int(queried)
            # Of this line's window: a load may be answered in a later one than its lookup, and a
            # request that was preempted loads again but is looked up once.
            out["hit %"] = round(100 * min(1.0, hit / queried), 1)
        for tier in ("dram", "nvme", "remote"):
            tokens = counters.get(f"kvoffload_hit_tokens_total|{tier}", 0)
            if tokens:
                out[f"{tier} hit tokens"] = int(tokens)
            for way in ("load", "store"):
                moved = counters.get(f"kvoffload_bytes_total|{tier}|{way}", 0)
                if moved:
                    out[f"{tier} {way} MiB"] = round(moved / 2**20, 1)
        mean = _mean(self.data["h"].get("kvoffload_load_seconds"))
        if mean is not None:
            out["load ms (mean)"] = round(mean * 1e3, 1)
        failures = _sum(counters, "kvoffload_failures_total")
        failures += counters.get("kvoffload_failed_loads_total", 0)
        if failures:
            out["failures"] = int(failures)
        for tier, top in (("dram", "total"), ("nvme", "max")):
            used = gauges.get(f"kvoffload_{tier}_used_bytes")
            if used is not None:
                out[f"{tier} used GiB"] = round(used / 2**30, 2)
            size = gauges.get(f"kvoffload_{tier}_{top}_bytes")
            if size:
                out[f"{tier} size GiB"] = round(size / 2**30, 2)
        return out


def _sum(counters: dict[str, float], name: str) -> float:
    return sum(v for series, v in counters.items() if split_series(series)[0] == name)


def _mean(histogram: list[list[float]] | None) -> float | None:
    if histogram is None or not sum(histogram[0]):
        return None
    return sum(histogram[1]) / sum(histogram[0])


class KVOffloadPromMetrics(KVConnectorPromMetrics):
    """Feeds Prometheus in vLLM's front end: vLLM's labels (model, engine) plus ours."""

    def __init__(
        self,
        vllm_config: VllmConfig,
        metric_types: dict[Any, Any],
        labelnames: list[str],
        per_engine_labelvalues: dict[int, list[object]],
    ) -> None:
        super().__init__(vllm_config, metric_types, labelnames, per_engine_labelvalues)
        _unregister_ours()
        self._families = {m.name: self._family(m, metric_types) for m in METRICS.values()}
        self._series: dict[tuple[int, str], Any] = {}
        self._unknown: set[str] = set()
        for engine in per_engine_labelvalues:
            for metric in METRICS.values():
                known = metric.series if metric.labels else ((),)
                for labels in known:
                    self._child(engine, metric.name, labels)

    def _family(self, metric: Metric, metric_types: dict[Any, Any]) -> Any:
        kwargs: dict[str, Any] = {
            "name": metric.name,
            "documentation": metric.help,
            "labelnames": [*self._labelnames, *metric.labels],
        }
        if metric.kind is Kind.HISTOGRAM:
            kwargs["buckets"] = list(metric.buckets)
        if metric.kind is Kind.GAUGE:
            # Several API server processes: one value, the last one written.
            kwargs["multiprocess_mode"] = "mostrecent"
        return metric_types[_CLASSES[metric.kind]](**kwargs)

    def _child(self, engine: int, name: str, labels: tuple[str, ...]) -> Any:
        series = "|".join((name, *labels))
        child = self._series.get((engine, series))
        if child is None:
            values = [*self.per_engine_labelvalues[engine], *labels]
            child = self._series[engine, series] = self._families[name].labels(*values)
        return child

    def observe(self, transfer_stats_data: dict[str, Any], engine_idx: int = 0) -> None:
        """Add one step's payload. Series of an unknown metric are skipped and said once."""
        for kind in Kind:
            for series, value in transfer_stats_data.get(kind.value, {}).items():
                name, labels = split_series(series)
                metric = METRICS.get(name)
                if metric is None or metric.kind is not kind or len(labels) != len(metric.labels):
                    self._skip(series)
                    continue
                self._apply(metric, self._child(engine_idx, name, labels), value)

    @staticmethod
    def _apply(metric: Metric, child: Any, value: Any) -> None:
        if metric.kind is Kind.COUNTER:
            child.inc(value)
        elif metric.kind is Kind.GAUGE:
            child.set(value)
        else:
            # Clients only take observations: a bucket's mean lies in the bucket, so replaying it
            # keeps every bucket's count and the total sum (rounding could leave it by one bit).
            for count, total, bound in zip(*value, (*metric.buckets, math.inf), strict=True):
                for _ in range(int(count)):
                    child.observe(min(total / count, bound))

    def _skip(self, series: str) -> None:
        if series not in self._unknown:
            self._unknown.add(series)
            logger.warning("kvoffload: metric series %r is unknown here and not exported", series)


def _unregister_ours() -> None:
    """A second engine in this process registers the same names; vLLM does the same for its own."""
    for collector in list(getattr(REGISTRY, "_collector_to_names", ())):
        if str(getattr(collector, "_name", "")).startswith("kvoffload_"):
            REGISTRY.unregister(collector)
