"""Plots a result file as SVG beside it: ``python benchmarks/plot.py FILE.json [--out DIR]``.

``ttft``: bars of median TTFT per prompt length, system and place, min and max as whiskers.
``serve``: TTFT percentiles per workload and system. ``faults``: the same per fault. ``store``: GB/s
of puts and restores, what a put waits for beside a load, and the disk's limit. ``replay``: hit rate
over DRAM size, one line per policy; several files of one trace may be given. Standard library only.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any
from xml.sax.saxutils import escape

Json = dict[str, Any]
COLOURS = {"none": "#8c8c8c", "native": "#d98b2b", "lmcache": "#6a4fa3", "kvoffload": "#1f77b4"}
COLOURS |= {"limit": "#8c8c8c", "vllm_fs": "#d98b2b"}
SPARE = ("#2ca02c", "#d62728", "#8c564b", "#17becf", "#bcbd22")
WIDTH, HEIGHT, LEFT, TOP, BOTTOM = 760, 340, 64, 40, 56


def _colour(name: str, index: int) -> str:
    return COLOURS.get(name, SPARE[index % len(SPARE)])


class Chart:
    """An SVG with a log10 or linear y axis; x is in units of slots."""

    def __init__(self, title: str, unit: str, low: float, high: float, log: bool) -> None:
        self._log, self._parts = log, [_text(WIDTH / 2, 20, title, "middle", 14)]
        self._low, self._high = (math.log10(low), math.log10(high)) if log else (low, high)
        self._parts.append(_text(LEFT - 8, TOP - 8, unit, "end"))
        for tick in self._ticks(low, high):
            y = self.y(tick)
            self._parts.append(_line(LEFT, y, WIDTH - 16, y, "#e3e3e3"))
            self._parts.append(_text(LEFT - 8, y + 4, f"{tick:g}", "end"))

    def _ticks(self, low: float, high: float) -> list[float]:
        if self._log:
            powers = range(math.floor(self._low), math.ceil(self._high) + 1)
            ticks = [m * 10.0**p for p in powers for m in (1, 2, 5)]
            return [t for t in ticks if low <= t <= high]
        return [low + (high - low) * i / 5 for i in range(6)]

    def y(self, value: float) -> float:
        at = math.log10(max(value, 1e-9)) if self._log else value
        share = (at - self._low) / ((self._high - self._low) or 1.0)
        return HEIGHT - BOTTOM - share * (HEIGHT - BOTTOM - TOP)

    def bar(self, x: float, width: float, value: float, colour: str, tip: str) -> None:
        """A bar with its value above and a tooltip."""
        y = self.y(value)
        size = f'width="{width:.1f}" height="{max(HEIGHT - BOTTOM - y, 0.5):.1f}"'
        box = f'<rect x="{x:.1f}" y="{y:.1f}" {size} fill="{colour}">'
        self._parts.append(f"{box}<title>{escape(tip)}</title></rect>")
        self._parts.append(_text(x + width / 2, y - 4, f"{value:.3g}", "middle", 9))

    def whisker(self, x: float, low: float, high: float) -> None:
        self._parts.append(_line(x, self.y(low), x, self.y(high), "#222"))

    def line(self, points: list[tuple[float, float]], colour: str) -> None:
        path = " ".join(f"{x:.1f},{self.y(v):.1f}" for x, v in points)
        self._parts.append(
            f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="2"/>'
        )

    def label(self, x: float, text: str) -> None:
        self._parts.append(_text(x, HEIGHT - BOTTOM + 16, text, "middle"))

    def legend(self, names: list[str]) -> None:
        step = min(130, (WIDTH - LEFT) / len(names))
        for i, name in enumerate(names):
            x, y = LEFT + step * i, HEIGHT - 16
            square = (
                f'<rect x="{x:.0f}" y="{y - 9}" width="10" height="10" fill="{_colour(name, i)}"/>'
            )
            self._parts += [square, _text(x + 16, y, name, "start")]

    def svg(self) -> str:
        body = "\n".join(self._parts)
        size = f'width="{WIDTH}" height="{HEIGHT}" viewBox="0 0 {WIDTH} {HEIGHT}"'
        return (
            f'<svg xmlns="http://www.w3.org/2000/svg" {size} font-family="sans-serif">\n'
            f'<rect width="100%" height="100%" fill="white"/>\n{body}\n</svg>\n'
        )


def _text(x: float, y: float, text: str, anchor: str, size: int = 11) -> str:
    place = f'x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" font-size="{size}"'
    return f"<text {place}>{escape(text)}</text>"


def _line(x1: float, y1: float, x2: float, y2: float, colour: str) -> str:
    ends = f'x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}"'
    return f'<line {ends} stroke="{colour}"/>'


def _bars(
    title: str, groups: dict[str, dict[str, Json]], unit: str = "ms", log: bool = True
) -> str:
    """Grouped bars of ``{min, median, max}``: log scale, or linear from 0."""
    if not groups:
        raise ValueError("the result holds no figure to plot")
    values = [v[k] for g in groups.values() for v in g.values() for k in ("min", "max")]
    names = list(dict.fromkeys(name for g in groups.values() for name in g))
    if log:
        chart = Chart(title, f"{unit} (log)", min(values) * 0.5, max(values) * 1.6, True)
    else:
        chart = Chart(title, unit, 0.0, max(values) * 1.1, False)
    slot = (WIDTH - LEFT - 24) / len(groups)
    width = slot * 0.8 / len(names)
    for i, (label, group) in enumerate(groups.items()):
        start = LEFT + 8 + i * slot
        for j, name in enumerate(names):
            if name in group:
                v, x = group[name], start + j * width
                tip = f"{name}, {label}: median {v['median']} {unit}, {v['min']} to {v['max']}"
                chart.bar(x, width * 0.9, v["median"], _colour(name, j), tip)
                chart.whisker(x + width * 0.45, v["min"], v["max"])
        chart.label(start + slot * 0.4, label)
    chart.legend(names)
    return chart.svg()


def plot_ttft(result: Json) -> dict[str, str]:
    """One chart per prompt length."""
    out = {}
    phases = {"cold_ms": "cold", "hbm_ms": "HBM", "dram_ms": "DRAM", "nvme_restart_ms": "NVMe"}
    for case in result["cases"]:
        groups: dict[str, dict[str, Json]] = defaultdict(dict)
        for system, figures in case["systems"].items():
            for key, label in phases.items():
                # `none` keeps nothing: its later phases are recomputation, shown once as cold.
                if figures.get(key) and not (system == "none" and key in ("dram_ms",)):
                    groups[label][system] = figures[key]
        title = f"TTFT, {case['prompt_tokens']} prompt tokens"
        out[f"ttft-{case['prompt_tokens']}"] = _bars(title, dict(groups))
    return out


def plot_serve(result: Json) -> dict[str, str]:
    """TTFT percentiles; whiskers are bootstrap intervals."""
    out = {}
    for name, workload in result["workloads"].items():
        groups: dict[str, dict[str, Json]] = defaultdict(dict)
        for system, figures in workload["systems"].items():
            for p in ("p50", "p95", "p99"):
                ttft = figures.get("ttft_ms") or {}
                if p in ttft:
                    ends = {"min": ttft[f"{p}_lo"], "max": ttft[f"{p}_hi"]}
                    groups[p][system] = {"median": ttft[p]} | ends
        out[f"serve-{name}"] = _bars(f"TTFT, {name.replace('_', ' ')}", dict(groups))
    return out


def plot_store(result: Json) -> dict[str, str]:
    """GB/s at 1 MiB and 64 KiB (whiskers: slowest and fastest round); puts beside a load."""
    out = {}
    large = {"limit": result["limit"]} | result["systems"]
    phases = {"put": "put", "restore": "restore", "scattered": "restore, scattered"}
    for size, systems in (("1 MiB", large), ("64 KiB", result["small"])):
        rates: dict[str, dict[str, Json]] = defaultdict(dict)
        for system, figures in systems.items():
            for key, label in phases.items():
                if spread := figures.get(f"{key}_gbps_spread"):
                    rates[label][system] = spread
        name = f"store-{size.replace(' ', '').lower()}"
        out[name] = _bars(f"Chunk store, {size} chunks", dict(rates), "GB/s", False)
    waits: dict[str, dict[str, Json]] = defaultdict(dict)
    for system, figures in large.items():
        ms = figures.get("put_beside_load_ms") or {}
        for p in ("p50", "p99"):
            if p in ms:
                ends = {"min": ms[f"{p}_lo"], "max": ms[f"{p}_hi"]}
                waits[p][system] = {"median": ms[p]} | ends
    out["store-put-beside-load"] = _bars("One put beside 16 gets in flight", dict(waits))
    return out


def plot_faults(result: Json) -> dict[str, str]:
    """TTFT per fault beside recomputing, one chart per percentile; whiskers are intervals."""
    out = {}
    sides = {"recompute_ttft_ms": "none", "ttft_ms": "kvoffload"}
    for p in ("p50", "p95", "p99"):
        groups: dict[str, dict[str, Json]] = defaultdict(dict)
        for fault, figures in result["faults"].items():
            for key, system in sides.items():
                ttft = figures.get(key) or {}
                if p in ttft:
                    ends = {"min": ttft[f"{p}_lo"], "max": ttft[f"{p}_hi"]}
                    groups[fault][system] = {"median": ttft[p]} | ends
        if groups:
            out[f"faults-{p}"] = _bars(f"TTFT {p} while the NVMe tier is ...", dict(groups))
    return out


def plot_replay(results: list[Json]) -> dict[str, str]:
    """Token hit rate over DRAM size."""
    lines: dict[str, list[tuple[float, float]]] = defaultdict(list)
    for result in results:
        lines[result["policy"]].append((result["dram_frac"], result["token_hit"]))
    sizes = sorted({x for points in lines.values() for x, _ in points})
    chart = Chart(f"Token hit rate, {results[0]['trace']}", "hit rate", 0.0, 1.0, False)
    span = (WIDTH - LEFT - 40) / (max(sizes) or 1.0)
    for i, (policy, points) in enumerate(lines.items()):
        chart.line([(LEFT + x * span, y) for x, y in sorted(points)], _colour(policy, i))
    for x in sizes:
        chart.label(LEFT + x * span, f"{x:g}")
    chart.legend(list(lines))
    return {f"replay-{results[0]['trace']}": chart.svg()}


def plots(results: list[Json]) -> dict[str, str]:
    """SVG texts by name. Raises ValueError for a routine without a plot."""
    routine = results[0]["routine"]
    if routine == "replay":
        return plot_replay(results)
    made = {"store": plot_store, "ttft": plot_ttft, "serve": plot_serve, "faults": plot_faults}
    if routine in made:
        return made[routine](results[0])
    raise ValueError(f"no plot for routine {routine!r}")


def main() -> int:
    """Write the SVGs beside the first file, or into --out."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("files", nargs="+", type=Path)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    results = [json.loads(f.read_text()) for f in options.files]
    where = options.out or options.files[0].parent
    where.mkdir(parents=True, exist_ok=True)
    try:
        made = plots(results)
    except ValueError as error:
        print(f"plot.py: {error}", file=sys.stderr)
        return 1
    for name, svg in made.items():
        target = where / f"{options.files[0].stem}-{name}.svg"
        target.write_text(svg)
        print(target)
    return 0


if __name__ == "__main__":
    sys.exit(main())
