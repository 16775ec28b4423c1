"""Benchmark driver: ``python benchmarks/run.py ROUTINE [options] --json FILE``.

Progress and the final table go to stderr; with ``--json -`` the JSON object is the last thing on
stdout. Systems and limits run in the same call; what cannot run here is ``{"skipped": why}``.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import os
import re
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

sys.path.insert(0, str(Path(__file__).resolve().parent))

from common import BENCH, Json, commit, emit, machine, scratch_dir
from context import Context
from systems import SYSTEMS

ROUTINES = tuple(sorted(p.stem for p in (BENCH / "routines").glob("[a-z]*.py")))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="run.py", description=__doc__)
    routines = parser.add_subparsers(dest="routine", required=True, metavar="ROUTINE")
    for name in ROUTINES:
        module = importlib.import_module(f"routines.{name}")
        sub = routines.add_parser(name, help=(module.__doc__ or "").splitlines()[0])
        sub.set_defaults(module=module)
        _common_options(sub)
        module.add_options(sub)
    return parser


def _common_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", metavar="FILE", help="result file, - for stdout")
    parser.add_argument("--save", action="store_true", help="also keep it in benchmarks/results/")
    parser.add_argument("--quick", action="store_true", help="tiny sizes, for tests")
    parser.add_argument("--systems", help=f"comma-separated, of {','.join(SYSTEMS)}")
    parser.add_argument("--dir", type=Path, help="where to make the temp dir (picks the disk)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--keep-logs", type=Path, help="keep the engines' logs in this folder")
    parser.add_argument(
        "--lock",
        default=os.environ.get("KVBENCH_LOCK"),
        help="lock file held during each engine life (default: $KVBENCH_LOCK)",
    )


@contextlib.contextmanager
def _display() -> Iterator[object]:
    """A rich status line on stderr; plain lines where stderr is no terminal."""
    from rich.console import Console

    console = Console(stderr=True)
    start = time.monotonic()
    with console.status("starting") as status:

        def progress(line: str) -> None:
            status.update(line)
            if not console.is_terminal:
                console.print(f"[{time.monotonic() - start:6.1f} s] {line}", markup=False)

        yield progress


def _show(module: ModuleType, result: Json) -> None:
    from rich.console import Console
    from rich.table import Table

    head, rows = module.table(result)
    shown = Table(title=f"{result['routine']} at {result['commit'] or 'no commit'}")
    for column in head:
        shown.add_column(column)
    for row in rows:
        shown.add_row(*row)
    Console(stderr=True, width=None if sys.stderr.isatty() else 160).print(shown)


def _save(result: Json) -> Path:
    slug = re.sub(r"[^a-z0-9]+", "-", str(result["machine"]["cpu"]).lower()).strip("-")[:32]
    gpu = result["machine"]["gpu"]
    if gpu:
        slug = re.sub(r"[^a-z0-9]+", "-", gpu.split(",")[0].lower()).strip("-")[:32]
    slug += f"-{result['machine']['cores']}c"
    target = BENCH / "results" / f"{time.strftime('%Y-%m-%d')}-{result['routine']}-{slug}.json"
    emit(result, str(target))
    return target


def main(argv: list[str] | None = None) -> int:
    """Run one routine. Exit status 0 also where systems were skipped: the result says so."""
    options = _parser().parse_args(argv)
    # A terminated driver must still unwind: it owns engines and a temp dir.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    chosen = options.systems.split(",") if options.systems else None
    default = getattr(options.module, "QUICK_SYSTEMS", SYSTEMS) if options.quick else SYSTEMS
    systems = chosen or list(default)
    if unknown := sorted(set(systems) - set(SYSTEMS)):
        print(
            f"run.py: unknown system {unknown[0]!r}; known: {', '.join(SYSTEMS)}", file=sys.stderr
        )
        return 2
    started = time.time()
    with scratch_dir(options.dir) as scratch, _display() as progress:
        facts = machine(scratch)
        context = Context(
            scratch, systems, progress, options.quick, options.lock, options.keep_logs
        )
        body = options.module.run(context, options)
    shown = {
        k: v
        for k, v in vars(options).items()
        if k not in ("module", "json", "save", "dir", "lock", "keep_logs")
    }
    result: Json = {"routine": options.routine, "machine": facts, "commit": commit()}
    result["started"] = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(started))
    result["wall_s"] = round(time.time() - started, 1)
    config = shown | {"systems": systems, "page_cache": context.page_cache} | body.pop("config", {})
    result |= {"config": config} | body
    _show(options.module, result)
    if options.save:
        print(f"saved {_save(result).name}", file=sys.stderr)
    emit(result, options.json)
    return 0


if __name__ == "__main__":
    sys.exit(main())
