"""What ``kvoffload replay`` shows: a table, and a plot as SVG."""

from __future__ import annotations

from typing import TYPE_CHECKING
from xml.sax.saxutils import escape

from kvoffload.cli.units import count, seconds, size

if TYPE_CHECKING:
    from rich.table import Table

    from kvoffload.replay.report import Result
    from kvoffload.replay.trace import Facts, Trace

_COLOURS = ("#1f77b4", "#d98b2b", "#2ca02c", "#d62728", "#6a4fa3", "#8c564b", "#17becf")
_W, _H, _LEFT, _RIGHT, _TOP, _BOTTOM = 760, 360, 56, 24, 44, 64


def headline(trace: Trace, facts: Facts, results: list[Result]) -> str:
    """What was asked for, and what it takes without a cache."""
    return (
        f"{trace.name}: {facts.requests:,} requests, {count(facts.input_tokens)} prompt tokens, "
        f"{facts.unique_chunks:,} unique chunks of {trace.chunk_tokens} tokens\n"
        f"at most {100 * facts.ceiling:.2f} % can hit; computed, the first token takes "
        f"{seconds(results[0].recompute_ttft_s['mean'])} on average"
    )


def table(results: list[Result]) -> Table:
    """One row per run."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    tiers = any(r.nvme_bytes for r in results)
    out = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    names = ["policy", "DRAM", "NVMe"] if tiers else ["policy", "DRAM"]
    for name in names:
        out.add_column(name, justify="left" if name == "policy" else "right", no_wrap=True)
    names = ["hit %", "NVMe %", "written", "TB/day"] if tiers else ["hit %"]
    for name in (*names, "TTFT", "p95", "saved %"):
        out.add_column(name, justify="right")
    for r in results:
        out.add_row(*_row(r, tiers))
    return out


def _row(r: Result, tiers: bool) -> list[str]:
    saved = 1 - r.ttft_s["mean"] / r.recompute_ttft_s["mean"]
    times = [seconds(r.ttft_s["mean"]), seconds(r.ttft_s["p95"]), f"{100 * saved:.0f}"]
    row = [r.policy, _sized(r.dram, r.dram_bytes), f"{100 * r.token_hit:.2f}"]
    if tiers and not r.nvme_bytes:
        row = [*row[:2], "-", row[2], "-", "-", "-"]
    elif tiers:
        row.insert(2, _sized(r.nvme, r.nvme_bytes))
        row.append(f"{100 * r.token_hit_by_tier['nvme']:.2f}")
        row.append(size(r.nvme_bytes_written + r.nvme_bytes_rewritten))
        row.append(f"{r.nvme_write_tb_per_day or 0.0:,.1f}")
    return row + times


def _sized(asked: str, nbytes: int) -> str:
    return f"{asked.replace(' ', '')} {size(nbytes)}" if asked.endswith("%") else size(nbytes)


def _label(result: Result) -> str:
    return result.policy + (f", NVMe {result.nvme}" if result.nvme_bytes else "")


def svg(name: str, results: list[Result]) -> str:
    """Token hit rate over DRAM size, one line per policy and NVMe size."""
    lines: dict[str, list[tuple[float, float]]] = {}
    for r in results:
        lines.setdefault(_label(r), []).append((float(r.dram_bytes), r.token_hit))
    most = max(x for points in lines.values() for x, _ in points)
    parts = [_text(_W / 2, 22, f"Token hit rate, {name}", "middle", 14)]
    for tick in range(6):
        y = _y(tick / 5)
        parts.append(f'<line x1="{_LEFT}" y1="{y}" x2="{_W - _RIGHT}" y2="{y}" stroke="#e3e3e3"/>')
        parts.append(_text(_LEFT - 8, y + 4, f"{tick * 20} %", "end"))
    for n, (label, points) in enumerate(lines.items()):
        colour = _COLOURS[n % len(_COLOURS)]
        places = [(_x(x, most), _y(y), x, y) for x, y in sorted(points)]
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y, _, _ in places)
        parts.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="2"/>')
        for x, y, nbytes, rate in places:
            tip = escape(f"{label}, DRAM {size(nbytes)}: {100 * rate:.2f} %")
            dot = f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3.5" fill="{colour}">'
            parts.append(f"{dot}<title>{tip}</title></circle>")
        at = _LEFT + n * 150
        parts.append(f'<rect x="{at}" y="{_H - 22}" width="10" height="10" fill="{colour}"/>')
        parts.append(_text(at + 16, _H - 13, label, "start"))
    for nbytes in sorted({x for points in lines.values() for x, _ in points}):
        parts.append(_text(_x(nbytes, most), _H - _BOTTOM + 18, size(nbytes), "middle", 10))
    body = "\n".join(parts)
    box = f'width="{_W}" height="{_H}" viewBox="0 0 {_W} {_H}"'
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" {box} font-family="sans-serif">\n'
        f'<rect width="100%" height="100%" fill="white"/>\n{body}\n</svg>\n'
    )


def _x(nbytes: float, most: float) -> float:
    return _LEFT + nbytes / most * (_W - _LEFT - _RIGHT - 20)


def _y(rate: float) -> float:
    return round(_H - _BOTTOM - rate * (_H - _BOTTOM - _TOP), 1)


def _text(x: float, y: float, text: str, anchor: str, points: int = 11) -> str:
    place = f'x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" font-size="{points}"'
    return f"<text {place}>{escape(text)}</text>"
