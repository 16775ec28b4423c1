"""How a report looks on a terminal, and its cells as text (the HTML page shows the same).

Imported by the command only: rich is not light. Losses are red.
"""

from __future__ import annotations

from collections.abc import Callable

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from kvoffload.cli.report_model import Line, Rates, Report, worth
from kvoffload.cli.units import count, seconds, share, size

SHOWN = 20
"""Rows of a table; what is beyond is summed up in a last line of text."""
Cell = tuple[str, bool]
"""Text, and whether it is a loss."""


def word(text: str) -> str:
    """A label value of the server without what a terminal would obey."""
    return text if text.isprintable() and text else repr(text)


def use_table(lines: list[Line], label: str) -> tuple[list[str], list[list[Cell]]]:
    """Header and rows: what was asked for and where it came from."""
    head = [label, "requests", "prompt tokens", "hbm", "dram", "nvme", "computed"]
    rows = []
    for line in lines[:SHOWN]:
        parts = (line.hbm, line.loaded.get("dram", 0.0), line.loaded.get("nvme", 0.0), line.missed)
        shares = [share(p / line.asked) if line.asked else "-" for p in parts]
        texts = [word(line.name), count(line.requests), count(line.asked), *shares]
        rows.append([(text, False) for text in texts])
    return head, rows


def worth_table(lines: list[Line], label: str, rates: Rates) -> tuple[list[str], list[list[Cell]]]:
    """Header and rows: GPU time saved, lost and net, and what the net is worth."""
    head = [label, "loaded", "stored", "saved", "lost", "net"]
    columns: list[tuple[str, Callable[[Line], Cell]]] = []
    if rates.per_gpu_hour is not None:
        columns.append(
            (rates.currency, lambda n: _amount(worth(n.net_s, rates).money, rates.currency))
        )
    if rates.kwh_per_gpu_hour is not None:
        columns.append(("kWh", lambda n: _amount(worth(n.net_s, rates).kwh)))
    if rates.kwh_per_gpu_hour is not None and rates.price_per_kwh is not None:
        columns.append(("energy", lambda n: _amount(worth(n.net_s, rates).energy_cost)))
    if rates.kwh_per_gpu_hour is not None and rates.kg_co2_per_kwh is not None:
        columns.append(("kg CO2", lambda n: _amount(worth(n.net_s, rates).kg_co2)))
    rows: list[list[Cell]] = []
    for line in lines[:SHOWN]:
        rows.append(
            [
                (word(line.name), False),
                (size(line.load_bytes), False),
                (size(line.store_bytes), False),
                (seconds(line.saved_s), False),
                (seconds(line.lost_s), line.lost_s > 0),
                (seconds(line.net_s), line.net_s < 0),
                *(cell(line) for _, cell in columns),
            ]
        )
    return head + [name for name, _ in columns], rows


def _amount(value: float | None, currency: str = "") -> Cell:
    if value is None:
        return "-", False
    digits = 2 if abs(value) >= 10 or not value else 4
    return f"{value:,.{digits}f}", value < 0


def sections(report: Report) -> list[tuple[str, list[str], list[list[Cell]]]]:
    """(title, header, rows) of every table."""
    lines = [report.total]
    out = [
        ("Prompt tokens", *use_table(lines + report.models, "model")),
        ("GPU time by model", *worth_table(lines + report.models, "model", report.rates)),
        ("Prompt tokens by tenant", *use_table(report.tenants, "tenant")),
        ("GPU time by tenant", *worth_table(report.tenants, "tenant", report.rates)),
    ]
    if report.tiers:
        out.append(("GPU time by tier", *worth_table(report.tiers, "tier", report.rates)))
    if report.curves:
        factors = sorted({f for curve in report.curves for f in curve.ratios})
        rows: list[list[Cell]] = []
        for curve in report.curves:
            at = [curve.ratios.get(f) for f in factors]
            own = size(curve.size_bytes) if curve.size_bytes else "-"
            cells = [word(curve.tier), own, *("-" if r is None else share(r) for r in at)]
            rows.append([(text, False) for text in cells])
        head = ["tier", "size", *(f"{f:g}x" for f in factors)]
        out.append(("Expected hits by size, of all prompt tokens", head, rows))
    return out


def notes(report: Report) -> list[str]:
    """Sentences below the tables."""
    hidden = max(len(report.models) + 1, len(report.tenants)) - SHOWN
    out = [word(line) for line in report.advice]
    if report.total.lookup_s:
        spent = seconds(report.total.lookup_s)
        out.append(f"Lookups for requests that then loaded nothing took {spent} of the scheduler.")
    if hidden > 0:
        out.append(f"Tables show {SHOWN} rows; --json has all.")
    return out


def screen(report: Report, where: str) -> RenderableType:
    """The whole report of the server (or file) at ``where``."""
    parts: list[RenderableType] = [Text.assemble(("kvoffload report", "bold"), f"  {word(where)}")]
    for title, head, rows in sections(report):
        table = Table(box=None, pad_edge=False, padding=(0, 1, 0, 0), header_style="bold")
        for number, name in enumerate(head):
            table.add_column(
                Text(name),
                justify="right" if number else "left",
                overflow="fold",
                min_width=0 if number else 12,
                no_wrap=bool(number),
            )
        for row in rows:
            table.add_row(*(Text(text, style="bold red" if loss else "") for text, loss in row))
        parts += [Text(), Text(title, style="bold underline"), table]
    parts.append(Text())
    parts += [Text(f"- {line}") for line in notes(report)]
    return Group(*parts)
