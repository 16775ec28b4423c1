"""The recorder, the payload's arithmetic, and vLLM's stats hooks over it."""

from __future__ import annotations

import pickle
import threading
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvoffload.metric_table import METRICS, Kind
from kvoffload.metrics import (
    AGAIN_S,
    Recorder,
    empty_payload,
    is_empty,
    merge,
    series_key,
    split_series,
)
from kvoffload.types import LoadFailure, Tier


def report(**changes: Any) -> SimpleNamespace:
    base: dict[str, Any] = {
        "load_bytes": 0,
        "store_bytes": 0,
        "load_copy_s": [],
        "load_wait_s": [],
        "store_copy_s": [],
        "bad": [],
        "hook_errors": {},
        "attach_error": "",
    }
    return SimpleNamespace(**(base | changes))


def test_names_are_prefixed_and_counters_end_in_total() -> None:
    for metric in METRICS.values():
        assert metric.name.startswith("kvoffload_") and metric.help
        assert (metric.kind is Kind.COUNTER) == metric.name.endswith("_total")
        assert (metric.kind is Kind.HISTOGRAM) == bool(metric.buckets)
        assert list(metric.buckets) == sorted(metric.buckets)
        assert all(len(s) == len(metric.labels) for s in metric.series)


def test_take_gives_each_change_once() -> None:
    rec = Recorder()
    rec.lookup(queried=100, hit=64)
    rec.hit({Tier.DRAM: 48, Tier.NVME: 16, Tier.REMOTE: 0})
    rec.lookup(queried=10, hit=0)
    rec.check()
    taken = rec.take()
    assert taken["c"] == {
        "kvoffload_lookups_total": 2,
        "kvoffload_queried_tokens_total": 110,
        "kvoffload_offered_tokens_total": 64,
        "kvoffload_hit_requests_total|dram": 1,
        "kvoffload_hit_requests_total|nvme": 1,
        "kvoffload_hit_tokens_total|dram": 48,
        "kvoffload_hit_tokens_total|nvme": 16,
        "kvoffload_miss_requests_total|no_hit": 1,
    }
    assert is_empty(rec.take())


def test_histogram_buckets_by_upper_bound() -> None:
    rec = Recorder()
    buckets = METRICS["kvoffload_load_seconds"].buckets
    rec.load_done(buckets[2], 16)  # on the bound: belongs to it (le)
    rec.load_done(99.0, 0)
    counts, sums = rec.take()["h"]["kvoffload_load_seconds"]
    assert counts[2] == 1 and counts[-1] == 1 and sum(counts) == 2
    assert sums[2] == buckets[2] and sums[-1] == 99.0


def test_gauges_ship_only_changes() -> None:
    rec = Recorder()
    rec.dram(1, 2, 0, 1)
    assert rec.take()["g"]["kvoffload_dram_total_bytes"] == 2
    rec.dram(5, 2, 0, 1)
    assert rec.take()["g"] == {"kvoffload_dram_used_bytes": 5}


def test_all_gauges_are_shipped_again_now_and_then() -> None:
    """vLLM makes new exporters where an engine is added: their gauges start at 0."""
    rec = Recorder()
    rec.set("kvoffload_nvme_endurance_bytes", 7)  # set once in an engine's life
    rec.dram(1, 2, 0, 1)
    rec.ship_again(100.0)
    everything = rec.take()["g"]
    rec.dram(3, 2, 0, 1)
    rec.ship_again(100.0 + AGAIN_S - 1)
    assert rec.take()["g"] == {"kvoffload_dram_used_bytes": 3}
    rec.ship_again(100.0 + AGAIN_S)
    assert rec.take()["g"] == everything | {"kvoffload_dram_used_bytes": 3}
    rec.ship_again(101.0 + AGAIN_S)
    assert is_empty(rec.take())
    rec.check()


def test_running_totals_become_increases() -> None:
    rec = Recorder()
    stats = {"bytes_read": 10, "bytes_written": 4, "bytes_used": 3, "bytes_max": 9, "entries": 1}
    rec.manager({"evicted": 3}, stats)
    first = rec.take()
    assert first["c"]["kvoffload_events_total|evicted"] == 3
    assert first["c"]["kvoffload_bytes_total|nvme|load"] == 10
    assert first["g"]["kvoffload_entries|nvme"] == 1
    rec.manager({"evicted": 5}, stats)
    assert rec.take()["c"] == {"kvoffload_events_total|evicted": 2}
    rec.manager({"evicted": 1}, stats)  # the source was reset
    assert rec.take()["c"] == {"kvoffload_events_total|evicted": 1}


def test_worker_report() -> None:
    rec = Recorder()
    bad = SimpleNamespace(reason=LoadFailure.CORRUPT)
    rec.worker(
        report(load_bytes=7, store_copy_s=[0.1], bad=[bad], hook_errors={"x": 2}, attach_error="e")
    )
    taken = rec.take()
    assert taken["c"] == {
        "kvoffload_bytes_total|dram|load": 7,
        "kvoffload_failures_total|corrupt": 1,
        "kvoffload_failures_total|hook_x": 2,
        "kvoffload_failures_total|attach": 1,
    }
    assert sum(taken["h"]["kvoffload_store_seconds"][0]) == 1


def test_mistakes_are_loud() -> None:
    rec = Recorder()
    with pytest.raises(KeyError):
        rec.inc("kvoffload_nothing_total")
    with pytest.raises(ValueError, match="labels"):
        rec.inc("kvoffload_bytes_total", 1, "dram")
    with pytest.raises(ValueError, match="fall"):
        rec.inc("kvoffload_lookups_total", -1)
    with pytest.raises(ValueError, match="COUNTER"):
        rec.set("kvoffload_lookups_total", 1)


def test_label_values_cannot_break_the_key() -> None:
    assert split_series(series_key("kvoffload_failures_total", ["a|b"])) == (
        "kvoffload_failures_total",
        ("a_b",),
    )


def test_no_count_is_lost_between_threads() -> None:
    rec, total, stop = Recorder(), [0], threading.Event()

    def taker() -> None:
        while not stop.is_set():
            total[0] += rec.take()["c"].get("kvoffload_lookups_total", 0)

    thread = threading.Thread(target=taker)
    thread.start()
    writers = [
        threading.Thread(target=lambda: [rec.inc("kvoffload_lookups_total") for _ in range(5000)])
        for _ in range(3)
    ]
    for w in writers:
        w.start()
    for w in writers:
        w.join()
    stop.set()
    thread.join()
    assert total[0] + rec.take()["c"].get("kvoffload_lookups_total", 0) == 15000


payloads = st.lists(
    st.tuples(
        st.sampled_from(["c", "h", "g"]), st.integers(0, 100), st.sampled_from(["dram", "nvme"])
    )
).map(lambda steps: _payload(steps))


def _payload(steps: list[tuple[str, int, str]]) -> dict[str, dict[str, Any]]:
    rec = Recorder()
    for kind, value, tier in steps:
        if kind == "c":
            rec.inc("kvoffload_hit_tokens_total", value, tier)
        elif kind == "h":
            rec.observe("kvoffload_load_seconds", value / 8)
        else:
            rec.set("kvoffload_entries", value, tier)
    return rec.take()


@given(payloads, payloads, payloads)
def test_merge_is_associative_and_changes_nothing(a: Any, b: Any, c: Any) -> None:
    kept = pickle.dumps((a, b, c))
    assert merge(merge(a, b), c) == merge(a, merge(b, c))
    assert merge(a, empty_payload()) == a
    assert pickle.dumps((a, b, c)) == kept


# -- vLLM's hooks ------------------------------------------------------------------------------------


@pytest.fixture
def stats_module() -> Any:
    pytest.importorskip("vllm")
    import kvoffload.engines.vllm.stats as stats

    return stats


def _sample() -> dict[str, dict[str, Any]]:
    rec = Recorder()
    rec.lookup(queried=200, hit=100)
    rec.hit({Tier.DRAM: 80, Tier.NVME: 20})
    rec.load_done(0.002, 100)
    rec.load_done(0.0025, 0)
    rec.load_done(4.0, 0)
    rec.worker(report(load_bytes=3 << 20))
    rec.dram(1 << 30, 2 << 30, 0, 5)
    rec.failure("corrupt")
    return rec.take()


def test_stats_survive_msgpack_and_pickle(stats_module: Any) -> None:
    import msgspec

    data = _sample()
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(data)) == data
    again = pickle.loads(pickle.dumps(stats_module.KVOffloadStats(data=data)))
    assert again.data == data and not again.is_empty()
    assert stats_module.KVOffloadStats().is_empty()


def test_the_log_lines_hit_share_is_a_share(stats_module: Any) -> None:
    """The lookup was counted in the window before, or the request was preempted and loads again."""
    rec = Recorder()
    rec.lookup(queried=100, hit=64)
    for _ in range(2):
        rec.hit({Tier.DRAM: 64})
    line = stats_module.KVOffloadStats(data=rec.take()).reduce()
    assert line["hit %"] == 100.0 and line["dram hit tokens"] == 128


def test_aggregate_leaves_the_payloads_alone(stats_module: Any) -> None:
    first, second = _sample(), _sample()
    a = stats_module.KVOffloadStats(data=first)
    assert a.aggregate(stats_module.KVOffloadStats(data=second)) is a
    assert a.data["c"]["kvoffload_lookups_total"] == 2
    assert first["c"]["kvoffload_lookups_total"] == 1 == second["c"]["kvoffload_lookups_total"]
    a.reset()
    assert a.is_empty()


def test_reduce_is_readable(stats_module: Any) -> None:
    line = stats_module.KVOffloadStats(data=_sample()).reduce()
    assert line == {
        "lookup tokens": 200,
        "hit %": 50.0,
        "dram hit tokens": 80,
        "dram load MiB": 3.0,
        "nvme hit tokens": 20,
        "load ms (mean)": 1334.8,
        "failures": 1,
        "dram used GiB": 1.0,
        "dram size GiB": 2.0,
    }
    assert stats_module.KVOffloadStats().reduce() == {}


def _exporter(stats: Any, engines: int = 2) -> Any:
    from prometheus_client import Counter, Gauge, Histogram

    config = SimpleNamespace(kv_transfer_config=None)
    types = {Counter: Counter, Gauge: Gauge, Histogram: Histogram}
    values: dict[int, list[object]] = {i: ["m", str(i)] for i in range(engines)}
    return stats.KVOffloadPromMetrics(config, types, ["model_name", "engine"], values)


def test_prometheus_per_engine(stats_module: Any) -> None:
    from prometheus_client import REGISTRY, generate_latest

    prom = _exporter(stats_module)
    prom.observe(_sample(), engine_idx=1)
    prom.observe(_sample(), engine_idx=1)
    prom.observe({"c": {"kvoffload_from_the_future_total": 1}}, engine_idx=1)
    one = {"model_name": "m", "engine": "1"}
    value = REGISTRY.get_sample_value
    assert value("kvoffload_hit_tokens_total", one | {"tier": "nvme"}) == 40
    assert value("kvoffload_hit_tokens_total", {**one, "engine": "0", "tier": "nvme"}) == 0
    assert value("kvoffload_load_seconds_count", one) == 6
    assert value("kvoffload_load_seconds_sum", one) == pytest.approx(2 * 4.0045)
    assert value("kvoffload_load_seconds_bucket", one | {"le": "0.003"}) == 4
    assert value("kvoffload_load_seconds_bucket", one | {"le": "0.001"}) == 0
    assert value("kvoffload_dram_used_bytes", one) == 1 << 30
    assert b"kvoffload_from_the_future" not in generate_latest(REGISTRY)


def test_a_second_engine_in_the_process_may_register_again(stats_module: Any) -> None:
    from prometheus_client import REGISTRY

    _exporter(stats_module).observe(_sample())
    _exporter(stats_module)
    labels = {"model_name": "m", "engine": "0"}
    assert REGISTRY.get_sample_value("kvoffload_lookups_total", labels) == 0


def test_multi_connector_wraps_us(stats_module: Any) -> None:
    from vllm.distributed.kv_transfer.kv_connector.v1.multi_connector import (
        MultiKVConnectorPromMetrics,
        MultiKVConnectorStats,
    )

    both = MultiKVConnectorStats(
        data={"KVOffloadConnector": stats_module.KVOffloadStats(data=_sample())}
    )
    both.aggregate(
        MultiKVConnectorStats(
            data={"KVOffloadConnector": stats_module.KVOffloadStats(data=_sample())}
        )
    )
    assert "hit %" in both.reduce()["KVOffloadConnector"]
    payload = both.to_dict() if hasattr(both, "to_dict") else both.data
    prom = MultiKVConnectorPromMetrics(
        SimpleNamespace(kv_transfer_config=None),
        _types(),
        ["model_name", "engine"],
        {0: ["m", "0"]},
        {"KVOffloadConnector": _exporter(stats_module)},
    )
    prom.observe(payload, 0)
    from prometheus_client import REGISTRY

    labels = {"model_name": "m", "engine": "0"}
    assert REGISTRY.get_sample_value("kvoffload_lookups_total", labels) == 2


def _types() -> dict[Any, Any]:
    from prometheus_client import Counter, Gauge, Histogram

    return {Counter: Counter, Gauge: Gauge, Histogram: Histogram}
