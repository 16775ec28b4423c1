"""``kvoffload replay``: what a cache of some size would have done for a trace of requests."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kvoffload.config import PolicyName
from kvoffload.errors import ConfigError

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID

    from kvoffload.replay.driver import Setup
    from kvoffload.replay.report import Result, Size
    from kvoffload.replay.trace import Facts, Trace

app = typer.Typer(help="Replay a request trace without moving bytes.", add_completion=False)

POLICIES: tuple[str, ...] = PolicyName.__args__  # type: ignore[attr-defined]


def _opt(flag: str, text: str, **more: Any) -> Any:
    return typer.Option(flag, help=text, **more)


def _sizes(text: str, key: str) -> list[Size]:
    from kvoffload.replay.report import parse_size

    return [parse_size(part, key) for part in text.split(",")]


def _policies(text: str) -> list[str]:
    names = text.split(",")
    for name in names:
        if name not in POLICIES:
            raise ConfigError(f"policy={name!r}: must be one of {', '.join(POLICIES)}")
    return names


def _checked(key: str, value: float | None, low: float, high: float) -> None:
    if value is not None and not low < value <= high:
        raise ConfigError(f"{key}={value:g}: must be above {low:g} and at most {high:g}")


@app.command()
def replay(
    trace: Annotated[Path, typer.Argument(help="Mooncake's or a recorded one (.gz, .xz).")],
    dram: Annotated[str, _opt("--dram", "GiB or % of the unique chunks; several: 5%,10%.")] = "10%",
    nvme: Annotated[str, _opt("--nvme", "As --dram; 0: none.")] = "0",
    policy: Annotated[str, _opt("--policy", f"Of {', '.join(POLICIES)}; several: a,b.")] = "lru",
    load: Annotated[str, _opt("--load", "auto, always or never.")] = "auto",
    block_tokens: Annotated[
        int | None, _opt("--block-tokens", "Tokens per hash id; default: as the trace says.")
    ] = None,
    chunk_blocks: Annotated[int, _opt("--chunk-blocks", "Hash ids per chunk.", min=1)] = 1,
    kv_bytes_per_token: Annotated[
        int, _opt("--kv-bytes-per-token", "Of all ranks; 131072: an 8B model in bf16.", min=1)
    ] = 131072,
    nvme_write_tb_per_day: Annotated[
        float | None, _opt("--nvme-write-tb-per-day", "Write budget; default: the size, daily.")
    ] = None,
    nvme_store: Annotated[
        str, _opt("--nvme-store", "fifo: segments, as the store is; lru: chunk by chunk.")
    ] = "fifo",
    nvme_admission: Annotated[
        str | None, _opt("--nvme-admission", "As in the configuration; default: its default.")
    ] = None,
    write_everything: Annotated[
        bool, _opt("--write-everything", "Reference: every chunk to NVMe at once, no budget.")
    ] = False,
    last_use_hints: Annotated[
        float | None,
        _opt("--last-use-hints", "Hint chunks not used again; right with this probability."),
    ] = None,
    seed: Annotated[int, _opt("--seed", "Of the wrong hints.")] = 0,
    reference_rules: Annotated[
        bool, _opt("--reference-rules", "Load every hit, whatever it costs (--load always).")
    ] = False,
    prefill_us: Annotated[
        float, _opt("--prefill-us", "Microseconds to compute one token, without attention.")
    ] = 29.5,
    attention_ns: Annotated[
        float, _opt("--attention-ns", "And nanoseconds per 1000 tokens before it.")
    ] = 1320.0,
    dram_gbps: Annotated[float, _opt("--dram-gbps", "GB/s from DRAM to the GPU.")] = 50.0,
    nvme_gbps: Annotated[float, _opt("--nvme-gbps", "GB/s from NVMe.")] = 7.0,
    json_file: Annotated[
        Path | None, _opt("--json", "Write all figures here; -: to stdout.", metavar="FILE")
    ] = None,
    plot: Annotated[
        Path | None, _opt("--plot", "Write an SVG: hit rate over DRAM size.", metavar="FILE")
    ] = None,
) -> None:
    """Run TRACE through the real index, policy, admission and planner, without bytes or a GPU.

    One run per combination of --dram, --nvme and --policy. Exit status 2: nothing could be run.
    """
    from kvoffload.replay.driver import Setup
    from kvoffload.replay.hardware import Hardware

    try:
        for key, value in (
            ("prefill_us", prefill_us),
            ("dram_gbps", dram_gbps),
            ("nvme_gbps", nvme_gbps),
            ("nvme_write_tb_per_day", nvme_write_tb_per_day),
        ):
            _checked(key, value, 0, 1e6)
        _checked("attention_ns", attention_ns, -1e-9, 1e9)
        _checked("last_use_hints", last_use_hints, -1e-9, 1)
        source = _trace(trace, block_tokens, chunk_blocks)
        setup = Setup(
            chunk_tokens=source.chunk_tokens,
            kv_bytes_per_token=kv_bytes_per_token,
            dram_chunks=1,
            load="always" if reference_rules else load,
            nvme_store=nvme_store,
            nvme_write_tb_per_day=nvme_write_tb_per_day,
            nvme_admission=nvme_admission,
            write_everything=write_everything,
            hardware=Hardware(
                prefill_us * 1e-6, attention_ns * 1e-12, dram_gbps * 1e9, nvme_gbps * 1e9
            ),
        )
        wanted = list(product(_policies(policy), _sizes(nvme, "nvme"), _sizes(dram, "dram")))
        facts, results = _run_all(source, setup, wanted, last_use_hints, seed)
    except ConfigError as error:
        typer.echo(f"kvoffload: {error}", err=True)
        raise typer.Exit(2) from error
    _show(source, facts, results, quiet=json_file == Path("-"))
    _write(source, facts, results, json_file, plot)


def _trace(path: Path, block_tokens: int | None, chunk_blocks: int) -> Trace:
    from kvoffload.replay.trace import Trace

    return Trace(path, block_tokens, chunk_blocks)


@contextmanager
def _bar() -> Iterator[Progress]:
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), TimeRemainingColumn())
    console = Console(stderr=True)
    with Progress(*columns, console=console, disable=not console.is_terminal) as bar:
        yield bar


def _advance(bar: Progress, task: TaskID, before: int, at: int) -> None:
    bar.update(task, completed=before + at)


def _run_all(
    trace: Trace,
    setup: Setup,
    wanted: list[tuple[str, Size, Size]],
    hints: float | None,
    seed: int,
) -> tuple[Facts, list[Result]]:
    from dataclasses import replace

    from kvoffload.replay.report import run

    with _bar() as bar:
        task = bar.add_task("reading", total=trace.bytes() * (1 + len(wanted)))
        facts = trace.facts(partial(_advance, bar, task, 0))
        results = []
        for n, (policy, nvme, dram) in enumerate(wanted, 1):
            bar.update(task, description=f"{policy}, DRAM {dram}", completed=n * trace.bytes())
            done = partial(_advance, bar, task, n * trace.bytes())
            chosen = replace(setup, policy=policy)
            results.append(
                run(trace, chosen, dram, nvme, facts, hint_accuracy=hints, seed=seed, progress=done)
            )
    return facts, results


def _show(trace: Trace, facts: Facts, results: list[Result], quiet: bool) -> None:
    from rich.console import Console

    from kvoffload.cli.replay_view import headline, table

    to = sys.stderr if quiet else sys.stdout
    console = Console(file=to, width=None if to.isatty() else 120)
    console.print(headline(trace, facts, results), highlight=False)
    console.print(table(results))


def _write(
    trace: Trace, facts: Facts, results: list[Result], json_file: Path | None, plot: Path | None
) -> None:
    from dataclasses import asdict

    from kvoffload.cli.replay_view import svg

    try:
        if json_file is not None:
            about = {"name": trace.name, "chunk_tokens": trace.chunk_tokens} | asdict(facts)
            text = json.dumps({"trace": about, "runs": [r.as_json() for r in results]}, indent=2)
            if json_file == Path("-"):
                sys.stdout.write(text + "\n")
            else:
                json_file.write_text(text + "\n")
        if plot is not None:
            plot.write_text(svg(trace.name, results))
    except OSError as error:
        typer.echo(f"kvoffload: {error.filename}: {error.strerror}", err=True)
        raise typer.Exit(2) from error
