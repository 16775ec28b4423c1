"""``kvoffload store``: look into a chunk store, also while an engine uses it; export and import.

Exit status of every command: 0 fine, 1 damage found (or not all chunks moved), 2 cannot open.
"""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kvoffload.cli.units import size
from kvoffload.errors import OffloadError

if TYPE_CHECKING:
    from kvoffload.cli.wear import LifeWear
    from kvoffload.store import Chunk, Progress, Store
    from kvoffload.tiers.nvme import DriveLevel

app = typer.Typer(
    name="store",
    help="Look into an NVMe chunk store; export and import chunks.",
    no_args_is_help=True,
    add_completion=False,
)

PathsArg = Annotated[
    list[Path], typer.Argument(help="The store's directory (nvme_path); several: one per drive.")
]
JsonOpt = Annotated[bool, typer.Option("--json", help="One JSON object on stdout.")]
KeysOpt = Annotated[list[str] | None, typer.Option("--key", help="32 hex digits; repeat it.")]
ChainOpt = Annotated[
    list[str] | None,
    typer.Option("--chain", help="A prompt's keys, root first: up to the first one not held."),
]
FileArg = Annotated[Path, typer.Argument(help="The safetensors file.")]
NewestOpt = Annotated[int, typer.Option(min=0, help="Only the newest so many; 0: all.")]
SpaceOpt = Annotated[
    str | None, typer.Option("--namespace", help="Only this one, as ls shows it (hex).")
]

_BYTES = {
    "bytes_used",
    "bytes_max",
    "payload_bytes",
    "index_bytes",
    "segment_bytes",
    "journal_bytes",
}
# Counters start at 0 with every open: for a store opened a moment ago they say nothing.
_SHOWN = (
    "entries payload_bytes index_bytes bytes_used bytes_max segments writers segment_bytes "
    "corrupt io_errors recover_ms"
).split()


def _fail(error: Exception) -> typer.Exit:
    text = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    typer.echo(text, err=True)
    return typer.Exit(2)


def _open(paths: list[Path], *, read_only: bool = True) -> Store:
    """The store; exit status 2 with one line per path where any of them cannot be opened."""
    from kvoffload.store import open_store

    try:
        store = open_store(paths, read_only=read_only)
    except (OffloadError, ValueError) as error:
        raise _fail(error) from error
    broken = [drive.error for drive in store.drives() if drive.error]
    if broken:
        store.close()
        typer.echo("\n".join(broken), err=True)
        raise typer.Exit(2)
    return store


def _print_json(value: Any) -> None:
    json.dump(value, sys.stdout, indent=2)
    sys.stdout.write("\n")


@app.command()
def stats(
    paths: PathsArg,
    url: Annotated[
        str | None, typer.Option(help="The engine's /metrics: what it wrote, and drive wear.")
    ] = None,
    tbw: Annotated[
        float | None, typer.Option(help="TB (10^12 bytes) that each path's drive endures.")
    ] = None,
    as_json: JsonOpt = False,
) -> None:
    """What the store holds, how full it is, and how its drives wear. Reads metadata only."""
    from kvoffload.cli.top import ScrapeError
    from kvoffload.cli.wear import life_rows, lives, read, rows

    if tbw is not None and not (math.isfinite(tbw) and tbw > 0):
        raise _fail(ValueError(f"--tbw: {tbw:g} is no endurance: give a number of TB above 0"))
    with _open(paths) as store:
        numbers, drives = store.stats(), store.drives()
    try:
        wear = read(url) if url is not None else None
    except (ScrapeError, ValueError) as error:
        raise _fail(error) from error
    life, each = lives(paths, tbw, time.time())
    if as_json:
        worn = {"wear": asdict(wear)} if wear is not None else {}
        told = [None if one is None else asdict(one) for one in (life, *each)]
        shown_drives = [
            asdict(d) | {"lifetime": one} for d, one in zip(drives, told[1:], strict=True)
        ]
        numbers_of_all = {"path": store.path, **numbers, "lifetime": told[0]}
        _print_json({**numbers_of_all, **worn, "per_drive": shown_drives})
        return
    from rich.console import Console
    from rich.table import Table

    table = Table("what", "value", title=store.path)
    for name in _SHOWN:
        value = numbers[name]
        shown = size(value) if name in _BYTES else f"{value:,.1f}".removesuffix(".0")
        table.add_row(name, shown)
    for name, shown in (*life_rows(life), *(rows(wear) if wear is not None else ())):
        table.add_row(name, shown)
    Console().print(table)
    if len(drives) > 1:
        _print_drives(drives, each)


def _print_drives(drives: Sequence[DriveLevel], lives: Sequence[LifeWear | None]) -> None:
    from rich.console import Console
    from rich.table import Column, Table

    from kvoffload.cli.wear import lasts

    path = Column("drive", overflow="fold")
    table = Table(path, "entries", "used", "of", "written to it", "lasts")
    for d, life in zip(drives, lives, strict=True):
        table.add_row(
            d.path,
            f"{d.entries:,}",
            size(d.bytes_used),
            size(d.bytes_max),
            size(life.device_bytes) if life is not None else "-",
            lasts(life),
        )
    Console().print(table)


@app.command()
def ls(
    paths: PathsArg,
    limit: Annotated[int, typer.Option(min=0, help="Newest so many; 0: all.")] = 50,
    as_json: JsonOpt = False,
) -> None:
    """Stored chunks, newest first."""
    with _open(paths) as store:
        chunks = store.ls(limit)
        total = len(store)
    if as_json:
        rows = [asdict(chunk) | {"key": chunk.key.hex()} for chunk in chunks]
        _print_json({"path": store.path, "entries": total, "chunks": rows})
        return
    _print_chunks(chunks, total)


def _print_chunks(chunks: list[Chunk], total: int) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title=f"{len(chunks):,} of {total:,} chunks, newest first")
    table.add_column("key", no_wrap=True)
    for name in ("namespace", "depth", "size", "segment", "seq"):
        table.add_column(name, justify="right")
    for chunk in chunks:
        table.add_row(
            chunk.key.hex(),
            f"{chunk.namespace:08x}",
            str(chunk.depth),
            size(chunk.nbytes),
            str(chunk.segment),
            str(chunk.seq),
        )
    Console().print(table)


@app.command()
def verify(
    paths: PathsArg,
    repair: Annotated[bool, typer.Option(help="Drop what is damaged.")] = False,
    as_json: JsonOpt = False,
) -> None:
    """Read every payload and check it. Exit status 1 when something damaged is left."""
    with _open(paths, read_only=not repair) as store:
        with _bar("verifying") as progress:
            report = store.verify(repair=repair, progress=progress)
        numbers = store.stats()
        if repair and report.dropped and not store.flush():
            typer.echo("the deletions could not be written; verify again", err=True)
            raise typer.Exit(1)
    left = report.bad - report.dropped
    if as_json:
        _print_json({"path": store.path, **asdict(report), "io_errors": numbers["io_errors"]})
    else:
        rate = report.nbytes / max(report.seconds, 1e-9) / 1e9
        typer.echo(
            f"{report.checked:,} chunks, {size(report.nbytes)} in {report.seconds:.1f} s "
            f"({rate:.2f} GB/s): {report.bad} bad, {report.dropped} dropped"
        )
    if left:
        raise typer.Exit(1)


@contextmanager
def _bar(what: str) -> Iterator[Progress]:
    """A progress bar on stderr."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, TimeRemainingColumn
    from rich.progress import Progress as Bar

    console = Console(stderr=True)
    bar = Bar(
        "[progress.description]{task.description}",
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        console=console,
        transient=True,
        disable=not console.is_terminal,
    )
    with bar:
        task = bar.add_task(what, total=None)
        yield lambda done, total, _nbytes: bar.update(task, completed=done, total=total)


def _keys(given: list[str] | None, option: str) -> list[bytes] | None:
    if not given:
        return None
    out = []
    for text in ",".join(given).split(","):
        try:
            key = bytes.fromhex(text)
        except ValueError:
            key = b""
        if len(key) != 16:
            raise _fail(ValueError(f"{option}: {text[:40]!r} is not a key: give 32 hex digits"))
        out.append(key)
    return out


def _key(file: Path | None) -> bytes | None:
    from kvoffload.signing import read_key

    with _refused():
        return None if file is None else read_key(file)


def _namespace(text: str | None) -> int | None:
    if text is None:
        return None
    try:
        return int(text, 16)
    except ValueError as error:
        line = f"--namespace: {text[:40]!r} is not hex: give it as ls shows it"
        raise _fail(ValueError(line)) from error


@app.command("export")
def export_(
    paths: PathsArg,
    file: FileArg,
    key: KeysOpt = None,
    chain: ChainOpt = None,
    newest: NewestOpt = 0,
    namespace: SpaceOpt = None,
    force: Annotated[bool, typer.Option("--force", help="Replace the file.")] = False,
    sign_key: Annotated[
        Path | None, typer.Option("--sign-key", help="Sign it with the key in this 0600 file.")
    ] = None,
    as_json: JsonOpt = False,
) -> None:
    """Write chunks to a safetensors file: all, or those chosen. KV bytes: keep it as private."""
    keys, links = _keys(key, "--key"), _keys(chain, "--chain")
    space = _namespace(namespace)
    secret = _key(sign_key)
    with _open(paths) as store, _refused(), _bar("exporting") as progress:
        report = store.export(
            file,
            keys=keys,
            chain=links,
            newest=newest,
            namespace=space,
            overwrite=force,
            sign_key=secret,
            progress=progress,
        )
    if as_json:
        _print_json({"file": str(file), **asdict(report)})
    else:
        typer.echo(
            f"{report.chunks:,} chunks, {size(report.nbytes)} in {report.seconds:.1f} s "
            f"to {file}: {report.missing} not held, {report.lost} lost meanwhile"
        )
    if report.missing or report.lost:
        raise typer.Exit(1)


@app.command("import")
def import_(
    paths: PathsArg,
    file: FileArg,
    verify_key: Annotated[
        Path | None,
        typer.Option("--verify-key", help="Only if signed with the key in this 0600 file."),
    ] = None,
    as_json: JsonOpt = False,
) -> None:
    """Put the chunks of an exported file, each once verified. Only from files that you trust."""
    secret = _key(verify_key)
    with _open(paths, read_only=False) as store, _refused():
        with _bar("importing") as progress:
            report = store.import_(file, verify_key=secret, progress=progress)
        flushed = store.flush()
    if as_json:
        _print_json({"file": str(file), **asdict(report), "flushed": flushed})
    else:
        typer.echo(
            f"{report.imported:,} of {report.chunks:,} chunks imported, {size(report.nbytes)} in "
            f"{report.seconds:.1f} s: {report.held} held before, {report.bad} bad, "
            f"{report.refused} refused by the store"
        )
    if report.bad or report.refused or not flushed:
        raise typer.Exit(1)


@contextmanager
def _refused() -> Iterator[None]:
    """One line and exit status 2 for what cannot be opened or makes no sense."""
    try:
        yield
    except (OffloadError, ValueError) as error:
        raise _fail(error) from error
