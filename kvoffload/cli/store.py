"""``kvoffload store``: look into a chunk store, also while an engine uses it."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kvoffload.errors import OffloadError

if TYPE_CHECKING:
    from kvoffload.store import Chunk, Store, VerifyReport

app = typer.Typer(
    name="store", help="Look into an NVMe chunk store.", no_args_is_help=True, add_completion=False
)

PathArg = Annotated[Path, typer.Argument(help="The store's directory (nvme_path).")]
JsonOpt = Annotated[bool, typer.Option("--json", help="One JSON object on stdout.")]

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


def _open(path: Path, *, read_only: bool = True) -> Store:
    from kvoffload.store import open_store

    try:
        return open_store(path, read_only=read_only)
    except (OffloadError, ValueError) as error:
        text = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        typer.echo(text, err=True)
        raise typer.Exit(2) from error


def _size(nbytes: float) -> str:
    for unit in ("B", "KiB", "MiB", "GiB"):
        if nbytes < 1024:
            return f"{nbytes:.0f} {unit}" if unit == "B" else f"{nbytes:.1f} {unit}"
        nbytes /= 1024
    return f"{nbytes:.2f} TiB"


def _print_json(value: Any) -> None:
    json.dump(value, sys.stdout, indent=2)
    sys.stdout.write("\n")


@app.command()
def stats(path: PathArg, as_json: JsonOpt = False) -> None:
    """What the store holds and how full it is. Reads metadata only."""
    with _open(path) as store:
        numbers = store.stats()
    if as_json:
        _print_json({"path": store.path, **numbers})
        return
    from rich.console import Console
    from rich.table import Table

    table = Table("what", "value", title=store.path)
    for name in _SHOWN:
        value = numbers[name]
        shown = _size(value) if name in _BYTES else f"{value:,.1f}".removesuffix(".0")
        table.add_row(name, shown)
    Console().print(table)


@app.command()
def ls(
    path: PathArg,
    limit: Annotated[int, typer.Option(min=0, help="Newest so many; 0: all.")] = 50,
    as_json: JsonOpt = False,
) -> None:
    """Stored chunks, newest first."""
    with _open(path) as store:
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
            _size(chunk.nbytes),
            str(chunk.segment),
            str(chunk.seq),
        )
    Console().print(table)


@app.command()
def verify(
    path: PathArg,
    repair: Annotated[bool, typer.Option(help="Drop what is damaged.")] = False,
    as_json: JsonOpt = False,
) -> None:
    """Read every payload and check it. Exit status 1 when something damaged is left."""
    with _open(path, read_only=not repair) as store:
        report = _verify_with_bar(store, repair)
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
            f"{report.checked:,} chunks, {_size(report.nbytes)} in {report.seconds:.1f} s "
            f"({rate:.2f} GB/s): {report.bad} bad, {report.dropped} dropped"
        )
    if left:
        raise typer.Exit(1)


def _verify_with_bar(store: Store, repair: bool) -> VerifyReport:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeRemainingColumn

    bar = Progress(
        "[progress.description]{task.description}",
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        console=Console(stderr=True),
        transient=True,
    )
    with bar:
        task = bar.add_task("verifying", total=None)

        def progress(done: int, total: int, _nbytes: int) -> None:
            bar.update(task, completed=done, total=total)

        return store.verify(repair=repair, progress=progress)
