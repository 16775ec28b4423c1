"""What ``kvoffload report`` says: one sample of a server's metrics becomes accounts and advice.

Pure: no I/O, no clock, no terminal. Totals since the server's start; GPU-seconds are wall seconds
times the ranks of an engine. What the server does not export is None or absent and never 0.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

from kvoffload.cli.top_samples import Labels, Sample
from kvoffload.cli.units import share, size
from kvoffload.types import Tier

FEW_TOKENS = 100_000
"""Advice on sizes rests on at least so many prompt tokens."""
WORTH = 0.01
"""A change of the hit ratio below this is not worth memory."""
HOUR_S = 3600.0
_Pick = Callable[[Mapping[str, str]], str]


@dataclass(frozen=True, slots=True)
class Rates:
    """What a GPU-hour is worth; None: not given. ``currency`` is a word put before amounts."""

    currency: str = "EUR"
    per_gpu_hour: float | None = None
    kwh_per_gpu_hour: float | None = None
    price_per_kwh: float | None = None
    kg_co2_per_kwh: float | None = None


@dataclass(frozen=True, slots=True)
class Worth:
    """GPU-seconds in other units; negative where seconds are, None where a rate is missing."""

    gpu_hours: float
    money: float | None
    kwh: float | None
    energy_cost: float | None
    kg_co2: float | None


def worth(gpu_s: float, rates: Rates) -> Worth:
    """``gpu_s`` in the units that ``rates`` allow."""
    hours = gpu_s / HOUR_S
    kwh = _times(hours, rates.kwh_per_gpu_hour)
    return Worth(
        gpu_hours=hours,
        money=_times(hours, rates.per_gpu_hour),
        kwh=kwh,
        energy_cost=_times(kwh, rates.price_per_kwh),
        kg_co2=_times(kwh, rates.kg_co2_per_kwh),
    )


def _times(value: float | None, rate: float | None) -> float | None:
    return None if value is None or rate is None else value * rate


@dataclass(slots=True)
class Line:
    """One row: a model, a tenant, a tier, or all. Tokens are prompt tokens, seconds GPU-seconds.

    ``load_s`` and ``lookup_s`` are wall seconds. A tier's row has no requests, asked, hbm, missed.
    """

    name: str
    requests: float = 0.0
    hbm: float = 0.0
    missed: float = 0.0
    loaded: dict[str, float] = field(default_factory=dict)  # tokens by tier
    loads: float = 0.0
    saved_s: float = 0.0
    lost_s: float = 0.0
    load_s: float = 0.0
    lookup_s: float = 0.0
    load_bytes: float = 0.0
    store_bytes: float = 0.0

    @property
    def tokens(self) -> float:
        """Loaded from any tier."""
        return sum(self.loaded.values())

    @property
    def asked(self) -> float:
        """All prompt tokens."""
        return self.hbm + self.tokens + self.missed

    @property
    def net_s(self) -> float:
        """Saved less lost."""
        return self.saved_s - self.lost_s


@dataclass(frozen=True, slots=True)
class Curve:
    """Expected hit ratio of one tier by multiple of its size; ``size_bytes`` None: not exported."""

    tier: str
    size_bytes: float | None
    ratios: dict[float, float]


@dataclass(frozen=True, slots=True)
class Report:
    """Everything that is printed. ``curve_tokens``: prompt tokens that the curves rest on."""

    total: Line
    models: list[Line]
    tenants: list[Line]
    tiers: list[Line]
    curves: list[Curve]
    curve_tokens: float
    rates: Rates
    advice: list[str]


_FIELDS = {
    "requests_total": "requests",
    "loads_total": "loads",
    "saved_gpu_seconds_total": "saved_s",
    "lost_gpu_seconds_total": "lost_s",
    "load_seconds_total": "load_s",
    "lookup_seconds_total": "lookup_s",
}
_PREFIX = "kvoffload_ledger_"


def report(sample: Sample, rates: Rates) -> Report | None:
    """The report of a server; None when it exports no ledger (nothing was asked yet, or older)."""
    rows = list(_rows(sample))
    if not rows:
        return None
    total = _lines(rows, lambda labels: "all")[0]
    tiers = [line for line in _lines(rows, _tier_of) if line.name]
    curves = _curves(sample)
    tokens = sum(sample.values.get("kvoffload_curve_tokens", {}).values())
    lines = {label: _lines(rows, _picker(label)) for label in ("model", "tenant")}
    advice = [*_money_advice(total, lines), *size_advice(curves, tokens)]
    return Report(total, lines["model"], lines["tenant"], tiers, curves, tokens, rates, advice)


def _rows(sample: Sample) -> Iterable[tuple[str, Mapping[str, str], float]]:
    """(name without prefix, labels, value) of the ledger's counters."""
    for name, series in sample.values.items():
        if name.startswith(_PREFIX):
            for labels, value in series.items():
                yield name.removeprefix(_PREFIX), dict(labels), value


def _picker(label: str) -> _Pick:
    return lambda labels: labels.get(label, "")


def _tier_of(labels: Mapping[str, str]) -> str:
    tier = labels.get("tier") or labels.get("source", "")
    return tier if tier not in ("hbm", "miss") else ""


def _lines(rows: Iterable[tuple[str, Mapping[str, str], float]], pick: _Pick) -> list[Line]:
    """Sums by what ``pick`` makes of the labels, the one with the most tokens first."""
    found: dict[str, Line] = {}
    for name, labels, value in rows:
        key = pick(labels)
        line = found.setdefault(key, Line(key))
        if name == "tokens_total":
            source = labels.get("source", "")
            if source == "hbm":
                line.hbm += value
            elif source == "miss":
                line.missed += value
            else:
                line.loaded[source] = line.loaded.get(source, 0.0) + value
        elif name == "bytes_total":
            if labels.get("direction") == "load":
                line.load_bytes += value
            else:
                line.store_bytes += value
        elif name in _FIELDS:
            setattr(line, _FIELDS[name], getattr(line, _FIELDS[name]) + value)
    return sorted(found.values(), key=lambda line: (-line.asked, -abs(line.net_s), line.name))


def _curves(sample: Sample) -> list[Curve]:
    """By tier; over several engines the mean, weighted with the tokens behind each."""
    weights = sample.values.get("kvoffload_curve_tokens", {})
    sums: dict[str, dict[float, list[float]]] = {}
    for labels, value in sample.values.get("kvoffload_curve_hit_ratio", {}).items():
        have = dict(labels)
        tier, factor = have.pop("tier", ""), _number(have.pop("factor", ""))
        weight = weights.get(frozenset(have.items()), 0.0)
        if tier and factor and weight > 0:
            entry = sums.setdefault(tier, {}).setdefault(factor, [0.0, 0.0])
            entry[0] += value * weight
            entry[1] += weight
    return [
        Curve(tier, _size(sample, tier), {f: a / w for f, (a, w) in sorted(factors.items())})
        for tier, factors in sorted(sums.items())
    ]


def _number(text: str) -> float | None:
    try:
        value = float(text)
    except ValueError:
        return None
    return value if math.isfinite(value) and value > 0 else None


def _size(sample: Sample, tier: str) -> float | None:
    """Engines have an arena each, but share one NVMe path, of which each reports the whole."""
    dram = tier == Tier.DRAM.value
    held: Mapping[Labels, float] = sample.values.get(
        f"kvoffload_{tier}_{'total' if dram else 'max'}_bytes", {}
    )
    if not held:
        return None
    return sum(held.values()) if dram else max(held.values())


def _money_advice(total: Line, lines: Mapping[str, list[Line]]) -> list[str]:
    """What a person should look at first."""
    out = []
    if not total.loads:
        out.append("Nothing has been loaded yet: savings show once a prompt comes back.")
    elif total.net_s < 0:
        out.append(
            "Loads cost more GPU time than they saved: see the planner's decisions and failed "
            "loads in `kvoffload top`."
        )
    for label, of in lines.items():
        for line in of:
            if line.net_s < 0 <= total.net_s:
                out.append(f"For {label} {line.name} loads cost more than they saved.")
    return out


def size_advice(curves: Iterable[Curve], tokens: float) -> list[str]:
    """The curves in words; nothing but a reason where they rest on too few tokens."""
    held = list(curves)
    if not held:
        return ["No sizing advice: the server exports no hit-ratio curve yet."]
    if tokens < FEW_TOKENS:
        return [f"No sizing advice yet: {tokens:,.0f} prompt tokens seen, {FEW_TOKENS:,} needed."]
    out: list[str] = []
    for curve in held:
        out += _of_tier(curve)
    return out


def _of_tier(curve: Curve) -> list[str]:
    name = {"dram": "DRAM", "nvme": "NVMe"}.get(curve.tier, curve.tier)
    base = curve.ratios.get(1.0)
    if base is None:
        return []
    now = f"{name} as it is{_sized(curve, 1.0)}: {share(base)} of all prompt tokens are expected "
    out = [now + ("to hit." if curve.tier == "dram" else "to hit, DRAM's included.")]
    gains = {f: r - base for f, r in curve.ratios.items()}
    for factor in sorted(gains):
        change = gains[factor]
        if factor == 1.0:
            continue
        what = f"{factor:g}x {name}{_sized(curve, factor)}"
        if factor > 1:
            out.append(f"With {what} {_points(change)} more of all prompt tokens would hit.")
        else:
            out.append(f"With {what} {_points(-change)} fewer would.")
    more = [f for f, c in sorted(gains.items()) if f > 1 and c >= WORTH]
    less = [f for f, c in sorted(gains.items()) if f < 1 and -c < WORTH]
    fewer = f"{less[0]:g}x {name}{_sized(curve, less[0])}" if less else ""
    if more:  # growing goes first: a size below a cliff looks as good as half of it
        best = max(more, key=lambda f: gains[f] / (f - 1))
        out.append(f"Advice: {best:g}x {name}{_sized(curve, best)} brings most for its size.")
        if less:
            out.append(f"Without more {name}, {fewer} would do as well as what is there.")
    elif less:
        out.append(f"Advice: {fewer} would do as well.")
    else:
        out.append(f"Advice: leave {name} as it is.")
    return out


def _sized(curve: Curve, factor: float) -> str:
    return f" ({size(curve.size_bytes * factor)})" if curve.size_bytes else ""


def _points(change: float) -> str:
    return f"{100 * max(0.0, change):.1f} %"
