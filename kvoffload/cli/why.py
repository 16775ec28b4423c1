"""``kvoffload why``: for each of the last requests, what it missed and what to do about it."""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

from kvoffload.cli import why_words
from kvoffload.linefile import live_files, read_lines

if TYPE_CHECKING:
    from rich.console import Console, RenderableType

FOLLOW_S = 1.0
_PREFIXES = ("chatcmpl-", "cmpl-")

app = typer.Typer(help="Why requests missed.", add_completion=False)
_sleep = time.sleep


@dataclass
class Engine:
    """What one engine's file says. ``requests``: oldest first."""

    path: Path
    head: dict[str, Any]
    requests: list[dict[str, Any]] = field(default_factory=list)
    totals: dict[str, Any] = field(default_factory=dict)

    @property
    def pid(self) -> int:
        """Process id, as that process saw it."""
        return int(self.head.get("pid", 0))

    @classmethod
    def read(cls, path: Path) -> Engine:
        """Raises OSError; lines that are no records are skipped."""
        lines = read_lines(path)
        head = lines[0] if lines and lines[0].get("kind") == "engine" else {}
        requests = [r for r in lines if r.get("kind") == "request" and _sound(r)]
        totals = [t for t in lines if t.get("kind") == "totals"]
        return cls(path, head, requests, totals[-1] if totals else {})


def _sound(record: dict[str, Any]) -> bool:
    numbers = ("time", "prompt", "hbm", "missed", "token", "chunk")
    return (
        isinstance(record.get("id"), str)
        and all(isinstance(record.get(n), int | float) for n in numbers)
        and isinstance(record.get("loaded"), dict)
        and isinstance(record.get("details"), dict)
    )


def engines(folder: Path) -> list[Engine]:
    """Live engines that keep reports in ``folder``, as far as these can be read.

    Raises OSError where none can, though there are some.
    """
    out, problem = [], None
    for path in live_files(folder):
        try:
            out.append(Engine.read(path))
        except FileNotFoundError:
            continue  # it has just ended
        except OSError as exc:  # another user's, where several share a home
            problem = exc
    if problem is not None and not out:
        raise problem
    return out


def _engines() -> list[Engine]:
    try:
        return engines(_folder())
    except OSError as exc:
        _fail(f"{exc.filename or _folder()} cannot be read: {exc.strerror}")


def bare(request_id: str) -> str:
    """The id without what vLLM's HTTP server puts before it."""
    for prefix in _PREFIXES:
        if request_id.startswith(prefix):
            return request_id[len(prefix) :]
    return request_id


def matching(requests: Iterable[dict[str, Any]], wanted: str) -> list[dict[str, Any]]:
    """Those whose id begins with ``wanted``, vLLM's own prefixes aside."""
    return [r for r in requests if bare(r["id"]).startswith(bare(wanted))]


@app.command()
def why(
    request_id: Annotated[
        str | None, typer.Argument(help="Only requests whose id begins so; vLLM's cmpl- aside.")
    ] = None,
    last: Annotated[int, typer.Option(min=1, help="So many requests, the newest.")] = 20,
    pid: Annotated[int | None, typer.Option(help="The engine, where several run.")] = None,
    misses: Annotated[bool, typer.Option("--misses", help="Without those that missed nothing.")] = (
        False
    ),
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object on stdout.")] = False,
    follow: Annotated[bool, typer.Option("--follow", help="Go on, until Ctrl-C.")] = False,
) -> None:
    """For each of the last requests: what was loaded, the first chunk that was not, and why.

    Reads what engines of this user on this machine write down (once a second). Exit status 2 when
    there is no such engine, or no such request.
    """
    if follow and as_json:
        _fail("--follow and --json: choose one")
    found = _choose(_engines(), pid, request_id)
    if follow:
        try:
            _follow(found, request_id, last, misses)
        except KeyboardInterrupt:
            return
        return
    shown = [_select(e, request_id, last, misses) for e in found]
    named = [e for e in found if request_id is None or matching(e.requests, request_id)]
    if not named:
        known = max(len(e.requests) for e in found)
        _fail(f"no request {request_id!r} among the last {known} (why_requests keeps more)")
    if as_json:
        typer.echo(json.dumps(_as_json(found, shown), indent=2))
        return
    for engine, records in zip(found, shown, strict=True):
        if engine in named:
            _console().print(_screen(engine, records, detailed=request_id is not None))


def _folder() -> Path:
    from kvoffload.files import user_cache_file

    return user_cache_file("why")


def _fail(text: str) -> NoReturn:
    typer.echo(text, err=True)
    raise typer.Exit(2)


def _choose(found: Sequence[Engine], pid: int | None, request_id: str | None) -> list[Engine]:
    """The engine to show; all of them where a request is looked for."""
    if not found:
        _fail(
            f"no running engine keeps reports in {_folder()}: is it this user's, with the same "
            "HOME and XDG_CACHE_HOME, and is why_requests above 0?"
        )
    if pid is not None:
        chosen = [e for e in found if e.pid == pid]
        if not chosen:
            _fail(f"--pid {pid}: no such engine; running: {', '.join(str(e.pid) for e in found)}")
        return chosen
    if len(found) > 1 and request_id is None:
        lines = [f"  --pid {e.pid}  {_plain(str(e.head.get('model', '')))}" for e in found]
        _fail("several engines run, choose one:\n" + "\n".join(lines))
    return list(found)


def _select(
    engine: Engine, request_id: str | None, last: int, misses: bool
) -> list[dict[str, Any]]:
    records = engine.requests
    if request_id is not None:
        records = matching(records, request_id)
    if misses:
        records = [r for r in records if r.get("cause")]
    return records[-last:]


def _as_json(found: Sequence[Engine], shown: Sequence[Sequence[dict[str, Any]]]) -> Any:
    out = []
    for engine, records in zip(found, shown, strict=True):
        requests = [
            {
                **{k: v for k, v in r.items() if k != "kind"},
                "why": why_words.why(r),
                "advice": why_words.advice(why_words.cause_of(r), engine.head),
            }
            for r in records
        ]
        out.append(
            {
                **{k: v for k, v in engine.head.items() if k != "kind"},
                "total_requests": engine.totals.get("requests", 0),
                "causes": engine.totals.get("causes", {}),
                "requests": requests,
            }
        )
    return {"engines": out}


# -- screens


def _console() -> Console:
    from rich.console import Console

    return Console(highlight=False, markup=False)


def _plain(text: str, most: int = 200) -> str:
    """Ids come from clients: nothing that a terminal would act on."""
    return "".join(c if c.isprintable() else "?" for c in text)[:most]


def _loaded(record: dict[str, Any]) -> str:
    parts = [f"{n} {_plain(str(tier), 8)}" for tier, n in record["loaded"].items() if n]
    return " + ".join(parts) or "0"


def _row(record: dict[str, Any]) -> list[str]:
    return [
        time.strftime("%H:%M:%S", time.localtime(record["time"])),
        _plain(record["id"], 64),
        str(record["prompt"]),
        str(record["hbm"]),
        _loaded(record),
        str(record["missed"]),
        str(record["token"]) if record["missed"] else "-",
        _plain(why_words.why(record)) or "-",
    ]


_COLUMNS = ("time", "request", "prompt", "hbm", "loaded", "missed", "from", "why")


def _screen(engine: Engine, records: Sequence[dict[str, Any]], detailed: bool) -> RenderableType:
    from rich.console import Group

    head = engine.head
    title = f"engine {engine.pid}  {_plain(str(head.get('model', '')))}"
    if detailed and len(records) == 1:
        return Group(title, "", *_details(engine, records[0]))
    if not records:
        none = "nothing was missed" if engine.requests else "no requests yet"
        return Group(title, "", none)
    return Group(title, _requests(records), "", *_causes(engine))


def _requests(records: Sequence[dict[str, Any]]) -> RenderableType:
    from rich.table import Column, Table
    from rich.text import Text

    columns = [Column(n, justify="right" if n in _COLUMNS[2:7] else "left") for n in _COLUMNS]
    columns[1].overflow = columns[7].overflow = "fold"
    table = Table(*columns, box=None, pad_edge=False)
    for record in records:
        table.add_row(*map(Text, _row(record)))
    return table


def _causes(engine: Engine) -> list[RenderableType]:
    """Totals since the engine started, the most frequent cause first."""
    from rich.table import Table
    from rich.text import Text

    causes = {str(c): int(n) for c, n in engine.totals.get("causes", {}).items()}
    total = int(engine.totals.get("requests", 0))
    line = f"{total:,} requests since the engine started, {sum(causes.values()):,} of them missed"
    table = Table("cause", "requests", "meaning", "what to do", box=None, pad_edge=False)
    for name, n in sorted(causes.items(), key=lambda item: -item[1]):
        cause = why_words.cause_of({"cause": name})
        meaning = why_words.MEANING[cause] if cause else why_words.UNKNOWN
        row = [_plain(name, 32), f"{n:,}", meaning, why_words.advice(cause, engine.head)]
        table.add_row(*map(Text, row))
    return [line + ":", table] if causes else [line]


def _details(engine: Engine, record: dict[str, Any]) -> list[RenderableType]:
    cause = why_words.cause_of(record)
    rows = [
        ("request", _plain(record["id"], 128)),
        ("arrived", time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(record["time"]))),
        ("prompt", f"{record['prompt']} tokens"),
        ("in HBM", f"{record['hbm']} tokens"),
        ("loaded", _loaded(record)),
        ("computed", f"{record['missed']} tokens that could have been held"),
    ]
    if record["missed"]:
        chunk = f"token {record['token']}, chunk {record['chunk']}"
        key = _plain(str(record.get("key") or ""), 16)
        rows.append(("first missing", f"{chunk}, key {key}..." if key else chunk))
        rows.append(("why", _plain(why_words.why(record))))
        rows.append(("what to do", why_words.advice(cause, engine.head)))
    from rich.text import Text

    return [Text(f"{name:<14}{value}") for name, value in rows]


def _follow(found: Sequence[Engine], wanted: str | None, last: int, misses: bool) -> None:
    """New requests as they come, until the engines have ended."""
    console = _console()
    console.print("  ".join(_COLUMNS))
    seen: dict[Path, dict[tuple[str, float], None]] = {e.path: {} for e in found}
    first = True
    while found:
        for engine in found:
            known = seen[engine.path]
            new = [r for r in engine.requests if (r["id"], r["time"]) not in known]
            seen[engine.path] = {(r["id"], r["time"]): None for r in engine.requests}
            picked = _select(Engine(engine.path, engine.head, new), wanted, len(new) or 1, misses)
            for record in picked[-last:] if first else picked:
                console.print("  ".join(_row(record)), soft_wrap=True)
        first = False
        _sleep(FOLLOW_S)
        found = [e for e in _engines() if e.path in seen]
    console.print("the engine has ended")


__all__ = ["Engine", "app", "bare", "engines", "matching", "why"]
