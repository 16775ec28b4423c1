"""A report as one HTML file: tables and inline SVG, no script, nothing fetched, text escaped."""

from __future__ import annotations

import math
from html import escape

from kvoffload.cli.report_model import Curve, Line, Report
from kvoffload.cli.report_view import SHOWN, Cell, notes, sections, word
from kvoffload.cli.units import seconds

_STYLE = """
body { font: 14px/1.4 system-ui, sans-serif; margin: 2em auto; max-width: 60em; color: #222; }
table { border-collapse: collapse; margin: .5em 0 1.5em; }
th, td { padding: .2em .8em .2em 0; text-align: right; border-bottom: 1px solid #ddd; }
th:first-child, td:first-child { text-align: left; overflow-wrap: anywhere; }
.loss { color: #c00; font-weight: bold; }
h2 { font-size: 1.1em; margin: 1.5em 0 .3em; }
svg { max-width: 100%; height: auto; }
svg text { font: 12px system-ui, sans-serif; }
"""
_POLICY = "default-src 'none'; style-src 'unsafe-inline'"
_COLOURS = {"hbm": "#2ca02c", "dram": "#1f77b4", "nvme": "#6a4fa3", "miss": "#cccccc"}
_SPARE = "#d98b2b"
_WIDTH, _LEFT, _RIGHT, _ROW = 760, 180, 90, 24


def page(report: Report, where: str, when: str) -> str:
    """The whole page. ``where``: the server or file; ``when``: the time, as text."""
    body = [f"<h1>kvoffload report</h1><p>{_text(where)}, {_text(when)}</p>"]
    body.append("<ul>" + "".join(f"<li>{_text(line)}</li>" for line in notes(report)) + "</ul>")
    body.append(_titled("Net GPU time saved, by tenant", _savings(report.tenants)))
    body.append(_titled("Where prompt tokens came from, by tenant", _sources(report.tenants)))
    if report.curves:
        body.append(_titled("Expected hits by size", _curve_plot(report.curves)))
    for title, head, rows in sections(report):
        body.append(_titled(title, _table(head, rows)))
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">'
        f"<title>kvoffload report</title><style>{_STYLE}</style></head>\n<body>\n"
        + "\n".join(body)
        + "\n</body></html>\n"
    )


def _text(value: str) -> str:
    return escape(word(value), quote=True)


def _titled(title: str, inner: str) -> str:
    return f"<h2>{escape(title)}</h2>\n{inner}"


def _table(head: list[str], rows: list[list[Cell]]) -> str:
    cells = "".join(f'<th scope="col">{_text(name)}</th>' for name in head)
    out = [f"<table><thead><tr>{cells}</tr></thead><tbody>"]
    for row in rows:
        tds = "".join(
            f'<td class="loss">{escape(text)}</td>' if loss else f"<td>{escape(text)}</td>"
            for text, loss in row
        )
        out.append(f"<tr>{tds}</tr>")
    return "".join(out) + "</tbody></table>"


# -- plots


def _svg(height: float, parts: list[str], label: str) -> str:
    return (
        f'<svg viewBox="0 0 {_WIDTH} {height:.0f}" width="{_WIDTH}" height="{height:.0f}" '
        f'role="img" aria-label="{escape(label)}" xmlns="http://www.w3.org/2000/svg">'
        + "".join(parts)
        + "</svg>"
    )


def _label(x: float, y: float, text: str, anchor: str = "start") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>'


def _bar(x: float, y: float, width: float, colour: str, tip: str) -> str:
    return (
        f'<rect x="{x:.1f}" y="{y:.1f}" width="{max(width, 0.5):.1f}" height="{_ROW - 8}" '
        f'fill="{colour}"><title>{escape(tip)}</title></rect>'
    )


def _short(name: str) -> str:
    text = word(name)
    return text if len(text) <= 24 else text[:23] + "…"


def _savings(lines: list[Line]) -> str:
    """Horizontal bars from a common zero; losses go left and are red."""
    shown = lines[:SHOWN]
    low = min(0.0, *(line.net_s for line in shown), 0.0)
    high = max(0.0, *(line.net_s for line in shown), 0.0)
    scale = (_WIDTH - _LEFT - _RIGHT) / ((high - low) or 1.0)
    zero = _LEFT - low * scale
    parts = []
    for i, line in enumerate(shown):
        y = 4 + i * _ROW
        left = zero + min(0.0, line.net_s) * scale
        colour = "#c00" if line.net_s < 0 else "#1f77b4"
        said = seconds(line.net_s)
        parts.append(_label(_LEFT - 8, y + 13, _short(line.name), "end"))
        parts.append(_bar(left, y, abs(line.net_s) * scale, colour, f"{word(line.name)}: {said}"))
        parts.append(_label(max(zero, zero + line.net_s * scale) + 6, y + 13, said))
    bottom = 4 + len(shown) * _ROW
    parts.append(f'<path d="M{zero:.1f} 0V{bottom}" stroke="#222"/>')
    return _svg(bottom + 4, parts, "net GPU time saved by tenant")


def _sources(lines: list[Line]) -> str:
    """Stacked bars: the shares of HBM, each tier, and what was computed."""
    shown = lines[:SHOWN]
    names = ["hbm", *sorted({tier for line in shown for tier in line.loaded}), "miss"]
    parts = []
    for i, name in enumerate(names):
        said = "computed" if name == "miss" else word(name)
        parts.append(_bar(_LEFT + i * 110, 2, 12, _COLOURS.get(name, _SPARE), said))
        parts.append(_label(_LEFT + i * 110 + 18, 15, said))
    for i, line in enumerate(shown):
        x, y = float(_LEFT), 28 + i * _ROW
        parts.append(_label(_LEFT - 8, y + 13, _short(line.name), "end"))
        for name in names:
            held = {"hbm": line.hbm, "miss": line.missed}.get(name, line.loaded.get(name, 0.0))
            width = (_WIDTH - _LEFT - _RIGHT) * held / line.asked if line.asked else 0.0
            if held:
                tip = f"{word(name)}: {held:,.0f} tokens"
                parts.append(_bar(x, y, width, _COLOURS.get(name, _SPARE), tip))
            x += width
    return _svg(32 + len(shown) * _ROW, parts, "where prompt tokens came from")


def _curve_plot(curves: list[Curve]) -> str:
    """One line per tier over multiples of its size (log scale); 1x is what there is now."""
    factors = sorted({f for curve in curves for f in curve.ratios})
    first, last = math.log2(factors[0]), math.log2(factors[-1])
    right, top, bottom = _WIDTH - _RIGHT, 12.0, 232.0

    def at(factor: float) -> float:
        return 48 + (right - 48) * (math.log2(factor) - first) / ((last - first) or 1.0)

    def height(ratio: float) -> float:
        return bottom - (bottom - top) * ratio

    parts = []
    for percent in range(0, 101, 20):
        y = height(percent / 100)
        parts.append(f'<path d="M48 {y:.1f}H{right}" stroke="#e3e3e3"/>')
        parts.append(_label(42, y + 4, f"{percent} %", "end"))
    for factor in factors:
        parts.append(_label(at(factor), bottom + 18, f"{factor:g}x", "middle"))
    for curve in curves:
        colour = _COLOURS.get(curve.tier, _SPARE)
        points = [(at(f), height(r)) for f, r in sorted(curve.ratios.items())]
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
        parts.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="2"/>')
        for (x, y), (factor, ratio) in zip(points, sorted(curve.ratios.items()), strict=True):
            tip = f"{word(curve.tier)} {factor:g}x: {100 * ratio:.1f} %"
            dot = f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4" fill="{colour}">'
            parts.append(f"{dot}<title>{escape(tip)}</title></circle>")
        parts.append(_label(points[-1][0] + 8, points[-1][1] + 4, _short(curve.tier)))
    return _svg(256, parts, "expected hit ratio by size of the tier")
