"""``kvoffload report``: what a server's cache saved or cost, for whom, and which size would pay."""

from __future__ import annotations

import json
import math
import time
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer

from kvoffload.cli.report_model import Line, Rates, Report, report, worth
from kvoffload.cli.top import DEFAULT_URL, MAX_BYTES, ScrapeError, metrics_url, parse, scrape
from kvoffload.cli.top_samples import Sample

MAX_CURRENCY = 8

app = typer.Typer(help="What the cache saved or cost, and sizing advice.", add_completion=False)


@app.command("report")
def main(
    url: Annotated[
        str | None, typer.Option(help=f"The server's metrics (default {DEFAULT_URL}).")
    ] = None,
    file: Annotated[
        Path | None, typer.Option(help="Saved metrics instead of a server (Prometheus text).")
    ] = None,
    html: Annotated[Path | None, typer.Option(help="Write one HTML file as well.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object on stdout.")] = False,
    currency: Annotated[str, typer.Option(help="Word for amounts of money.")] = "EUR",
    per_gpu_hour: Annotated[float | None, typer.Option(help="Price of a GPU-hour.")] = None,
    kwh_per_gpu_hour: Annotated[
        float | None, typer.Option(help="Energy of a GPU-hour, in kWh.")
    ] = None,
    price_per_kwh: Annotated[float | None, typer.Option(help="Price of a kWh.")] = None,
    kg_co2_per_kwh: Annotated[float | None, typer.Option(help="kg of CO2 per kWh.")] = None,
) -> None:
    """What the cache saved or cost since the server's start, by model, tenant and tier.

    Negative savings are shown as such. Sizing advice comes from the live hit-ratio curve.
    Exit status 2 when there is nothing to report.
    """
    numbers = {
        "per_gpu_hour": per_gpu_hour,
        "kwh_per_gpu_hour": kwh_per_gpu_hour,
        "price_per_kwh": price_per_kwh,
        "kg_co2_per_kwh": kg_co2_per_kwh,
    }
    try:
        rates = _rates(currency, numbers)
        where, sample = _sample(url, file)
    except (ValueError, ScrapeError) as error:
        _fail(str(error))
    made = report(sample, rates)
    if made is None:
        _fail(f"{where}: no ledger in these metrics yet; has a request been served?")
    if html is not None:
        _write(html, made, where)
    if as_json:
        typer.echo(json.dumps(as_dict(made, where), indent=2))
    else:
        from rich.console import Console

        from kvoffload.cli.report_view import screen

        Console(highlight=False).print(screen(made, where))


def _fail(text: str) -> NoReturn:
    typer.echo(text, err=True)
    raise typer.Exit(2)


def _rates(currency: str, numbers: dict[str, float | None]) -> Rates:
    """Raises ValueError, one line naming the option and what is allowed."""
    if not currency or len(currency) > MAX_CURRENCY or not currency.isprintable():
        raise ValueError(f"--currency: give 1 to {MAX_CURRENCY} printable characters")
    for name, value in numbers.items():
        if value is not None and not (math.isfinite(value) and value >= 0):
            option = "--" + name.replace("_", "-")
            raise ValueError(f"{option}={value}: give a number of at least 0")
    for name in ("price_per_kwh", "kg_co2_per_kwh"):
        if numbers[name] is not None and numbers["kwh_per_gpu_hour"] is None:
            raise ValueError(f"--{name.replace('_', '-')} needs --kwh-per-gpu-hour as well")
    return Rates(currency=currency, **numbers)


def _sample(url: str | None, file: Path | None) -> tuple[str, Sample]:
    """(what was read, its sample). Raises ValueError or ScrapeError, one line."""
    if file is None:
        address = metrics_url(url or DEFAULT_URL)
        return address, scrape(address)
    if url is not None:
        raise ValueError("--file and --url: give one of them")
    try:
        with file.open("rb") as opened:
            body = opened.read(MAX_BYTES + 1)
    except OSError as error:
        raise ScrapeError(f"--file {file}: {error.strerror}") from error
    if len(body) > MAX_BYTES:
        raise ScrapeError(f"--file {file}: more than {MAX_BYTES >> 20} MiB, not a metrics page")
    return str(file), parse(0.0, body.decode("utf-8", "replace"), f"--file {file}")


def _write(html: Path, made: Report, where: str) -> None:
    from kvoffload.cli.report_html import page

    text = page(made, where, time.strftime("%Y-%m-%d %H:%M:%S %Z"))
    try:
        html.write_text(text, encoding="utf-8")
    except OSError as error:
        _fail(f"--html {html}: {error.strerror}")


def as_dict(made: Report, where: str) -> dict[str, Any]:
    """The report as plain data, each line with its worth."""

    def line(it: Line) -> dict[str, Any]:
        derived = {"asked": it.asked, "tokens": it.tokens, "net_s": it.net_s}
        return asdict(it) | derived | {"worth": asdict(worth(it.net_s, made.rates))}

    return {
        "source": where,
        "time": time.time(),
        "rates": asdict(made.rates),
        "total": line(made.total),
        "models": [line(it) for it in made.models],
        "tenants": [line(it) for it in made.tenants],
        "tiers": [line(it) for it in made.tiers],
        "curves": [asdict(curve) for curve in made.curves],
        "curve_tokens": made.curve_tokens,
        "advice": made.advice,
    }
