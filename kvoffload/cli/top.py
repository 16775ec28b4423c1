"""``kvoffload top``: what a running server's cache does, from its /metrics."""

from __future__ import annotations

import json
import time
from dataclasses import asdict
from http import HTTPStatus
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

from kvoffload.cli.top_model import Frame, frame
from kvoffload.cli.top_samples import Sample

if TYPE_CHECKING:
    from rich.console import Console, RenderableType

DEFAULT_URL = "http://127.0.0.1:8000/metrics"
TIMEOUT_S = 5.0
MAX_BYTES = 64 << 20

app = typer.Typer(help="Watch a running server's cache.", add_completion=False)


class ScrapeError(Exception):
    """A server did not give kvoffload's metrics; the text is one line for a person."""


def metrics_url(text: str) -> str:
    """``text`` completed: http unless a scheme is given, /metrics unless a path is.

    Raises ValueError, one line, for what is not an http or https address.
    """
    from urllib.parse import urlsplit

    url = text if "://" in text else f"http://{text}"
    try:
        parts = urlsplit(url)
        good = parts.scheme in ("http", "https") and bool(parts.hostname)
        _ = parts.port  # raises on a bad number
    except ValueError:
        good = False
    if not good or any(c.isspace() or not c.isprintable() for c in url):
        raise ValueError(f"URL: {text!r} is not an address such as {DEFAULT_URL} (http or https)")
    if parts.path in ("", "/"):
        parts = parts._replace(path="/metrics")
    return parts.geturl()


def scrape(url: str, timeout_s: float = TIMEOUT_S) -> Sample:
    """One sample of the server at ``url``; waits at most ``timeout_s`` seconds for each answer.

    Proxies of the environment are not used: metrics are an internal address. Raises ScrapeError.
    """
    at, text = _fetch(url, timeout_s)
    return parse(at, text, url)


def parse(at: float, text: str, where: str) -> Sample:
    """Prometheus text as a sample; ``where`` it came from is named in ScrapeError."""
    from prometheus_client.parser import text_string_to_metric_families

    try:
        sample = Sample.of(
            at,
            (
                (row.name, row.labels, row.value)
                for family in text_string_to_metric_families(text)
                for row in family.samples
            ),
        )
    except (ValueError, IndexError) as error:
        raise ScrapeError(f"{where}: the answer is not Prometheus text") from error
    if not sample.has_ours:
        raise ScrapeError(
            f"{where}: no kvoffload metrics; was the server started with KVOffloadConnector?"
        )
    return sample


def _fetch(url: str, timeout_s: float) -> tuple[float, str]:
    """(monotonic seconds of the answer, its text). Raises ScrapeError."""
    from http.client import HTTPException
    from urllib.error import HTTPError, URLError
    from urllib.request import ProxyHandler, Request, build_opener

    request = Request(url, headers={"Accept": "text/plain"})
    try:
        with build_opener(ProxyHandler({})).open(request, timeout=timeout_s) as answer:
            at = _clock()
            body = answer.read(MAX_BYTES + 1)
    except HTTPError as error:
        error.close()
        raise ScrapeError(f"{url}: HTTP {error.code} {_phrase(error.code)}".rstrip()) from error
    except URLError as error:
        raise ScrapeError(f"{url}: {_reason(error.reason)}") from error
    except UnicodeError as error:  # a label of the host is empty or too long, the path no ASCII
        raise ScrapeError(f"{url}: not an address that can be asked") from error
    except (OSError, HTTPException) as error:
        raise ScrapeError(f"{url}: {_reason(error)}") from error
    if len(body) > MAX_BYTES:
        raise ScrapeError(f"{url}: more than {MAX_BYTES >> 20} MiB, not a metrics page")
    return at, body.decode("utf-8", "replace")


def _phrase(code: int) -> str:
    try:
        return HTTPStatus(code).phrase
    except ValueError:
        return ""


def _reason(error: object) -> str:
    if isinstance(error, TimeoutError):
        return f"no answer in {TIMEOUT_S:.0f} s"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    text = " ".join(str(error).split())
    return text or type(error).__name__


_clock = time.monotonic
_sleep = time.sleep


@app.command()
def top(
    url: Annotated[str, typer.Argument(help="The server's metrics.")] = DEFAULT_URL,
    interval: Annotated[
        float, typer.Option(min=0.1, max=3600, help="Seconds between samples; rates span them.")
    ] = 2.0,
    once: Annotated[bool, typer.Option("--once", help="One screen, then end.")] = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="One JSON object on stdout, then end.")
    ] = False,
) -> None:
    """Watch a running server's cache: hits, traffic, occupancy, times, decisions, failures.

    Ctrl-C ends it. With --once and --json, exit status 2 when there is nothing to show.
    """
    try:
        address = metrics_url(url)
    except ValueError as error:
        _fail(str(error))
    if once or as_json:
        shown = _one(address, interval)
        if as_json:
            typer.echo(json.dumps({"url": address, "time": time.time(), **asdict(shown)}, indent=2))
        else:
            _console().print(_screen(shown, address))
        return
    try:
        _watch(address, interval)
    except KeyboardInterrupt:
        return


def _fail(text: str) -> NoReturn:
    typer.echo(text, err=True)
    raise typer.Exit(2)


def _one(url: str, interval: float) -> Frame:
    """Two samples, ``interval`` seconds apart. Exit status 2 without them."""
    try:
        before = scrape(url)
        _sleep(interval)
        return frame(before, scrape(url))
    except ScrapeError as error:
        _fail(str(error))


def _console() -> Console:
    from rich.console import Console

    return Console(highlight=False)


def _screen(shown: Frame, url: str) -> RenderableType:
    from kvoffload.cli.top_view import screen

    return screen(shown, url, time.strftime("%H:%M:%S"))


def _watch(url: str, interval: float) -> None:
    """Screen after screen, for ever; a server that is away is waited for."""
    console = _console()
    show = _Live(console) if console.is_terminal else _Plain(console)
    before: Sample | None = None
    with show:
        while True:
            began = _clock()
            try:
                sample = scrape(url)
            except ScrapeError as error:
                show.waiting(f"{error}; trying again every {interval:g} s")
            else:
                # Kept across a gap: the old sample tells a restart from a pause.
                show.frame(_screen(frame(before, sample), url))
                before = sample
            _sleep(max(0.0, interval - (_clock() - began)))


class _Live:
    """A terminal: one screen, redrawn in place, gone at the end."""

    def __init__(self, console: Console) -> None:
        from rich.live import Live

        self._live = Live(console=console, screen=True, auto_refresh=False)

    def __enter__(self) -> None:
        self._live.__enter__()

    def __exit__(self, *error: Any) -> None:
        self._live.__exit__(*error)

    def frame(self, shown: RenderableType) -> None:
        self._live.update(shown, refresh=True)

    def waiting(self, line: str) -> None:
        from rich.text import Text

        self._live.update(Text(line), refresh=True)


class _Plain:
    """A file or pipe: screens one after another, a reason to wait once as long as it lasts."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._said = ""

    def __enter__(self) -> None:
        pass

    def __exit__(self, *error: Any) -> None:
        pass

    def frame(self, shown: RenderableType) -> None:
        self._said = ""
        self._console.print(shown)
        self._console.print()

    def waiting(self, line: str) -> None:
        if line != self._said:
            self._said = line
            self._console.print(line, markup=False, soft_wrap=True)
