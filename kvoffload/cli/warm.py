"""``kvoffload warm``: send a file's prompts once through a running server, and pin them there."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

from kvoffload.cli.units import count, seconds

if TYPE_CHECKING:
    from kvoffload.cli.warm_client import Done, Progress, Prompt, Server

DEFAULT_URL = "http://127.0.0.1:8000"
SHOWN_ERRORS = 20

app = typer.Typer(help="Send prompts once and pin them.", add_completion=False)


def _fail(text: object) -> NoReturn:
    typer.echo(str(text), err=True)
    raise typer.Exit(2)


@app.command()
def warm(
    file: Annotated[
        Path,
        typer.Argument(help='Prompts, one a line: text, {"prompt": ...} or {"messages": [...]}.'),
    ],
    url: Annotated[str, typer.Option(help="The server.")] = DEFAULT_URL,
    model: Annotated[str | None, typer.Option(help="Where it serves several.")] = None,
    pin: Annotated[
        bool, typer.Option("--pin/--no-pin", help="Keep the prompts in DRAM; a quarter of it.")
    ] = True,
    unpin: Annotated[bool, typer.Option("--unpin", help="End the pins of these prompts.")] = False,
    retain: Annotated[
        float | None, typer.Option(help="Keep them so many seconds instead, at most 604800.")
    ] = None,
    concurrency: Annotated[int, typer.Option(min=1, max=256, help="Requests at a time.")] = 4,
    retries: Annotated[int, typer.Option(min=0, max=20, help="Of each, where that may help.")] = 3,
    timeout: Annotated[float, typer.Option(help="Seconds to wait for an answer.")] = 600.0,
    api_key: Annotated[
        str | None,
        typer.Option(
            envvar=["VLLM_API_KEY", "OPENAI_API_KEY"], show_envvar=True, help="Of the server."
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object on stdout.")] = False,
) -> None:
    """Send every prompt of FILE once, for one token, so that its KV is there when it is asked for.

    Pins last until the server ends, its cache is reset, or --unpin. Exit status 0: all done; 1: a
    prompt failed, or was not (or not known to be) pinned; 2: nothing was sent.
    """
    from kvoffload.cli.warm_client import Server, Warmer, WarmError, read_prompts

    hints = _hints(pin, unpin, retain)
    try:
        prompts = read_prompts(file)
        server = Server.at(url, api_key, timeout)
        warmer = Warmer(server, server.model(model), {"prefetch": True, **hints}, retries)
    except WarmError as error:
        _fail(error)
    before = _pins_not_made(server)
    began = time.monotonic()
    done: list[Done] = []
    try:
        with _bar(len(prompts)) as progress:
            for one in warmer.run(prompts, concurrency):
                done.append(one)
                progress(one)
    except KeyboardInterrupt:
        typer.echo(f"stopped: {len(done)} of {len(prompts)} prompts were sent", err=True)
        raise typer.Exit(130) from None
    took = time.monotonic() - began
    counts = _grown(before, _pins_not_made(server))
    summary = _summary(file, warmer.server.url, warmer.model, hints, prompts, done, took, counts)
    if as_json:
        json.dump(summary, sys.stdout, indent=2)
        sys.stdout.write("\n")
    else:
        _print(file, summary)
    pinned = not hints.get("pin") or summary["pins_refused"] == 0
    if summary["failed"] or not pinned:
        raise typer.Exit(1)


def _hints(pin: bool, unpin: bool, retain: float | None) -> dict[str, Any]:
    """What the options ask for; they end the command where the server would refuse them."""
    from kvoffload.core.hints import MAX_RETAIN_S

    hints: dict[str, Any] = {}
    if retain is not None:
        if not 0 < retain <= MAX_RETAIN_S:
            _fail(f"--retain {retain:g}: give seconds above 0, at most {MAX_RETAIN_S:.0f}")
        hints["retain_s"] = retain
    if unpin or (pin and retain is None):
        hints["pin"] = not unpin
    return hints


_NOT_MADE = ("pin_refused", "pin_too_short")


def _pins_not_made(server: Server) -> dict[str, float] | None:
    """Pins that the server has not made so far, by reason; None where it does not say."""
    from kvoffload.cli.top import ScrapeError, scrape

    try:
        rows = scrape(f"{server.url}/metrics").values.get("kvoffload_hints_refused_total", {})
    except ScrapeError:
        return None
    return {
        reason: sum(v for labels, v in rows.items() if ("reason", reason) in labels)
        for reason in _NOT_MADE
    }


def _grown(
    before: dict[str, float] | None, after: dict[str, float] | None
) -> dict[str, int] | None:
    """What came to it; None where that is not known, or the server was restarted in between."""
    if before is None or after is None:
        return None
    grown = {reason: int(after[reason] - before[reason]) for reason in _NOT_MADE}
    return grown if min(grown.values()) >= 0 else None


def _summary(
    file: Path,
    url: str,
    model: str,
    hints: dict[str, Any],
    prompts: Sequence[Prompt],
    done: Sequence[Done],
    took: float,
    not_made: dict[str, int] | None,
) -> dict[str, Any]:
    good = [d for d in done if d.error is None]
    told = [d.cached for d in good if d.cached is not None]
    return {
        "file": str(file),
        "url": url,
        "model": model,
        "hints": hints,
        "prompts": len(prompts),
        "sent": len(good),
        "failed": len(done) - len(good),
        "retried": sum(d.tries > 1 for d in done),
        "prompt_tokens": sum(d.tokens for d in good),
        "cached_tokens": sum(told) if told else None,
        "pins_refused": None if not_made is None else not_made["pin_refused"],
        "pins_too_short": None if not_made is None else not_made["pin_too_short"],
        "seconds": round(took, 3),
        "slowest_s": round(max((d.seconds for d in good), default=0.0), 3),
        "errors": [
            {"line": d.line, "error": d.error}
            for d in sorted(done, key=lambda d: d.line)
            if d.error is not None
        ],
    }


def _print(file: Path, summary: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table("what", "value", title=f"{file} through {summary['url']}")
    for name in ("model", "prompts", "sent", "failed", "retried"):
        table.add_row(name, str(summary[name]))
    table.add_row("prompt tokens", count(summary["prompt_tokens"]))
    if summary["cached_tokens"] is not None:
        table.add_row("of them cached before", count(summary["cached_tokens"]))
    table.add_row("pinned", _pinned(summary))
    table.add_row("time", seconds(summary["seconds"]))
    table.add_row("slowest prompt", seconds(summary["slowest_s"]))
    Console().print(table)
    for row in summary["errors"][:SHOWN_ERRORS]:
        typer.echo(f"{file}:{row['line']}: {row['error']}", err=True)
    more = len(summary["errors"]) - SHOWN_ERRORS
    if more > 0:
        typer.echo(f"and {more} more (--json has all)", err=True)


def _pinned(summary: dict[str, Any]) -> str:
    pin = summary["hints"].get("pin")
    if not pin:
        return "no" if pin is None else "ended"
    refused, short = summary["pins_refused"], summary["pins_too_short"]
    if refused is None:
        return "not known: no kvoffload metrics there, or it was restarted"
    words = []
    if refused:
        words.append(f"{refused} refused: the server's log says why (docs/hints.md)")
    if short:
        words.append(f"{short} too short: less than one chunk, nothing to pin")
    return "; ".join(words) or "yes"


@contextmanager
def _bar(total: int) -> Iterator[Progress]:
    """A progress bar on stderr, where that is a terminal."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, TimeRemainingColumn
    from rich.progress import Progress as Bar

    console = Console(stderr=True)
    columns = ("warming", BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Bar(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("warming", total=total)
        yield lambda _: bar.advance(task)
