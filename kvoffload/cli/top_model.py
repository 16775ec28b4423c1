"""What ``kvoffload top`` shows: two samples of a server's metrics become one frame of numbers.

Pure: no I/O, no clock, no terminal. A number that the server does not export, or that is not
finite, is None in the frame and never 0. Bytes, tokens and seconds as the names say.
"""

from __future__ import annotations

from dataclasses import dataclass

from kvoffload.cli.top_samples import Flow, Sample, Times, Window
from kvoffload.types import Tier

_TIMES = ("load", "load_wait", "load_copy", "store", "scheduler_step")


@dataclass(frozen=True, slots=True)
class TierFrame:
    """One tier. A hit rate is its tokens over all tokens looked up (beyond HBM's own hit), 0..1."""

    hit_rate_now: float | None
    hit_rate_total: float | None
    hit_tokens: Flow | None
    load_bytes: Flow | None
    store_bytes: Flow | None
    used_bytes: float | None
    size_bytes: float | None  # 0: the tier is off
    pinned_bytes: float | None
    chunks: float | None
    inflight_bytes: dict[str, float]  # by direction; empty: not exported
    breakers: dict[str, str]  # by direction: closed, half-open, open; of several engines the worst
    learned_bytes_per_s: float | None  # mean of the engines that know it

    @property
    def active(self) -> bool:
        """Whether the tier is there: it has a size, holds something, or has moved something."""
        flows = (self.hit_tokens, self.load_bytes, self.store_bytes)
        moved = any(flow is not None and flow.total for flow in flows)
        return moved or bool(self.size_bytes or self.chunks)


@dataclass(frozen=True, slots=True)
class Saved:
    """Prefill seconds that loads saved, less what they cost where they were the slower way."""

    total_s: float
    now_s: float | None


@dataclass(frozen=True, slots=True)
class Frame:
    """Everything on the screen. ``window_s`` is None for the first sample."""

    window_s: float | None
    restarted: bool
    engines: int
    hit_rate_now: float | None
    hit_rate_total: float | None
    hbm_hit_rate_now: float | None
    hbm_hit_rate_total: float | None
    tiers: dict[str, TierFrame]
    lookups: Flow | None
    queried_tokens: Flow | None
    offered_tokens: Flow | None
    loaded_tokens: Flow | None
    failed_loads: Flow | None
    resets: Flow | None
    times: dict[str, Times]
    saved: Saved | None
    prefill_tokens_per_s: float | None
    requests: dict[str, float]  # vLLM's queues: running, waiting, load_<stage>
    plans: dict[str, Flow]
    followers: dict[str, Flow]
    misses: dict[str, Flow]
    failures: dict[str, Flow]
    events: dict[str, Flow]


def frame(before: Sample | None, after: Sample) -> Frame:
    """The frame of ``after``; rates against ``before`` (None, or no time between: no rates)."""
    win = Window(before, after)
    queried = win.flow("kvoffload_queried_tokens_total")
    hit = win.flow("kvoffload_hit_tokens_total")
    hbm_hit = win.flow("vllm:prefix_cache_hits_total")
    hbm_all = win.flow("vllm:prefix_cache_queries_total")
    return Frame(
        window_s=win.seconds,
        restarted=win.restarted,
        engines=len(after.values.get("kvoffload_lookups_total", ())),
        hit_rate_now=_rate_now(hit, queried),
        hit_rate_total=_rate_total(hit, queried),
        hbm_hit_rate_now=_rate_now(hbm_hit, hbm_all),
        hbm_hit_rate_total=_rate_total(hbm_hit, hbm_all),
        tiers={tier.value: _tier(win, tier.value, queried) for tier in Tier},
        lookups=win.flow("kvoffload_lookups_total"),
        queried_tokens=queried,
        offered_tokens=win.flow("kvoffload_offered_tokens_total"),
        loaded_tokens=win.flow("kvoffload_loaded_tokens_total"),
        failed_loads=win.flow("kvoffload_failed_loads_total"),
        resets=win.flow("kvoffload_resets_total"),
        times={name: t for name in _TIMES if (t := win.times(f"kvoffload_{name}_seconds"))},
        saved=_saved(win),
        prefill_tokens_per_s=_learned(win, "kvoffload_prefill_tokens_per_second"),
        requests=_requests(win),
        plans=win.by("kvoffload_plans_total", "decision"),
        followers=win.by("kvoffload_followers_total", "outcome"),
        misses=win.by("kvoffload_miss_requests_total", "reason"),
        failures=win.by("kvoffload_failures_total", "kind"),
        events=win.by("kvoffload_events_total", "event"),
    )


def _rate_now(part: Flow | None, whole: Flow | None) -> float | None:
    if part is None or whole is None:
        return None
    return _ratio(part.added, whole.added)


def _rate_total(part: Flow | None, whole: Flow | None) -> float | None:
    return None if part is None or whole is None else _ratio(part.total, whole.total)


def _ratio(part: float | None, whole: float | None) -> float | None:
    """At most 1: a load may end a window after its lookup, and come again after a preemption."""
    return None if part is None or not whole else min(1.0, part / whole)


def _learned(win: Window, name: str, **labels: str) -> float | None:
    """Mean over the engines that have learned the rate; 0 is a gauge nobody has set yet."""
    rates = [rate for rate in win.levels(name, **labels) if rate > 0]
    return sum(rates) / len(rates) if rates else None


def _sum(values: list[float]) -> float | None:
    return sum(values) if values else None


def _most(values: list[float]) -> float | None:
    return max(values, default=None)


def _tier(win: Window, tier: str, queried: Flow | None) -> TierFrame:
    # Each engine has an arena of its own, but the engines of one server share one NVMe path, of
    # which each reports the whole.
    over_engines = _sum if tier == Tier.DRAM.value else _most
    limit = "total" if tier == Tier.DRAM.value else "max"
    hit = win.flow("kvoffload_hit_tokens_total", tier=tier)
    return TierFrame(
        hit_rate_now=_rate_now(hit, queried),
        hit_rate_total=_rate_total(hit, queried),
        hit_tokens=hit,
        load_bytes=win.flow("kvoffload_bytes_total", tier=tier, direction="load"),
        store_bytes=win.flow("kvoffload_bytes_total", tier=tier, direction="store"),
        used_bytes=over_engines(win.levels(f"kvoffload_{tier}_used_bytes")),
        size_bytes=over_engines(win.levels(f"kvoffload_{tier}_{limit}_bytes")),
        pinned_bytes=over_engines(win.levels(f"kvoffload_{tier}_pinned_bytes")),
        chunks=over_engines(win.levels("kvoffload_entries", tier=tier)),
        inflight_bytes=_inflight(win, tier),
        breakers=_breakers(win, tier),
        learned_bytes_per_s=_learned(win, "kvoffload_tier_bytes_per_second", tier=tier),
    )


def _inflight(win: Window, tier: str) -> dict[str, float]:
    found: dict[str, float] = {}
    for have, value in win.after.values.get("kvoffload_inflight_bytes", {}).items():
        labels = dict(have)
        if labels.get("tier") == tier:
            way = labels.get("direction", "")
            found[way] = found.get(way, 0.0) + value
    return dict(sorted(found.items()))


def _breakers(win: Window, tier: str) -> dict[str, str]:
    """State by direction, over the engines the worst."""
    worst: dict[str, float] = {}
    for have, level in win.after.values.get("kvoffload_breaker_open", {}).items():
        labels = dict(have)
        if labels.get("tier") == tier:
            way = labels.get("direction", "")
            worst[way] = max(level, worst.get(way, 0.0))
    return {
        way: "closed" if level <= 0 else "open" if level >= 1 else "half-open"
        for way, level in sorted(worst.items())
    }


def _requests(win: Window) -> dict[str, float]:
    found: dict[str, float] = {}
    for state in ("running", "waiting"):
        levels = win.levels(f"vllm:num_requests_{state}")
        if levels:
            found[state] = sum(levels)
    for have, value in win.after.values.get("vllm:num_requests_kv_fetch_by_stage", {}).items():
        stage = f"load_{dict(have).get('stage', '')}"
        found[stage] = found.get(stage, 0.0) + value
    return found


def _saved(win: Window) -> Saved | None:
    saved = win.flow("kvoffload_saved_seconds_total")
    cost = win.flow("kvoffload_cost_seconds_total")
    if saved is None or cost is None:
        return None
    known = saved.added is not None and cost.added is not None
    now = (saved.added or 0.0) - (cost.added or 0.0) if known else None
    return Saved(saved.total - cost.total, now)
