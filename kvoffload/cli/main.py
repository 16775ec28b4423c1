"""The ``kvoffload`` command. Subcommands are imported when they run, so that help is instant."""

from __future__ import annotations

import importlib
import io
import sys
from importlib.metadata import PackageNotFoundError, version
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

#: Subcommand -> (module whose ``app`` is its Typer, one line of help).
LAZY = {
    "doctor": ("kvoffload.cli.doctor", "Check this machine, vLLM and a configuration."),
    "store": ("kvoffload.cli.store", "NVMe chunk stores: stats, ls, verify, export, import."),
    "why": ("kvoffload.cli.why", "Why requests missed, of a running engine on this machine."),
    "report": ("kvoffload.cli.report", "What the cache saved or cost, for whom; sizing advice."),
    "replay": (
        "kvoffload.cli.replay",
        "What a cache of some size does for a request trace.",
    ),
    "top": ("kvoffload.cli.top", "Watch a running server: hits, traffic, occupancy, failures."),
    "warm": ("kvoffload.cli.warm", "Send prompts once through a running server and pin them."),
}


class LazyGroup(TyperGroup):
    """Lists subcommands without importing them; imports the one that is run."""

    def list_commands(self, ctx: Any) -> list[str]:
        """Names in the order of LAZY."""
        return list(LAZY)

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        """A stand-in that only knows its help line."""
        if cmd_name not in LAZY:
            return None
        stand_in = typer.Typer(help=LAZY[cmd_name][1], add_completion=False)
        stand_in.callback(invoke_without_command=True)(lambda: None)
        command = typer.main.get_command(stand_in)
        command.name = cmd_name
        return command

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        """The real command."""
        name, command, rest = super().resolve_command(ctx, args)
        if name in LAZY:
            module = importlib.import_module(LAZY[name][0])
            command = typer.main.get_command(module.app)
            command.name = name
        return name, command, rest


app = typer.Typer(
    cls=LazyGroup,
    help="kvoffload: a KV cache that outlives the GPU.",
    no_args_is_help=True,
    add_completion=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    pretty_exceptions_show_locals=False,  # they may be keys, prompts, or a whole store's listing
)


def own_version() -> str:
    """The installed version, or a word saying that it is run from a checkout."""
    try:
        return version("kvoffload")
    except PackageNotFoundError:
        return "unknown (not installed)"


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"kvoffload {own_version()}")
        raise typer.Exit


@app.callback()
def _root(
    _version: Annotated[
        bool,
        typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version."),
    ] = False,
) -> None:
    pass


def main() -> None:
    """Entry point of the ``kvoffload`` script."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # paths need not be text
    app(prog_name="kvoffload")
