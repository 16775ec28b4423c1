"""Memory that this process may use: the machine's, or less where a cgroup (a container) limits it.

A leaf module (standard library only).
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class HostMemory:
    """Bytes of memory this process may use: the machine's, or less inside a limited cgroup."""

    total: int
    available: int


def host_memory(root: str = "/") -> HostMemory:
    """Read /proc/meminfo and the cgroup limits (v2 and v1); 0 and 0 where neither can be read.

    Page cache counts as available, active or not, but for what has yet to be written: the kernel
    takes it back before it kills, and MemAvailable counts it so. Weight files that were read twice
    are active.
    """
    values: dict[str, int] = {}
    try:
        for line in Path(root, "proc/meminfo").read_text().splitlines():
            name, _, rest = line.partition(":")
            values[name] = int(rest.split()[0]) * 1024
    except (OSError, ValueError, IndexError):
        return HostMemory(0, 0)
    total = values.get("MemTotal", 0)
    available = values.get("MemAvailable", total)
    for limit, used in _cgroup_limits(root):
        total = min(total, limit)
        available = min(available, max(0, limit - used))
    return HostMemory(total, available)


@dataclass(frozen=True, slots=True)
class _Cgroups:
    """Where a version of cgroups has the memory controller, and what its files are called."""

    base: str
    limit: str
    usage: str
    cache: tuple[str, str]  # keys of memory.stat: page cache
    unwritten: tuple[str, str]  # of it: dirty, being written


_V2 = _Cgroups(
    "sys/fs/cgroup",
    "memory.max",
    "memory.current",
    ("inactive_file", "active_file"),
    ("file_dirty", "file_writeback"),
)
_V1 = _Cgroups(
    "sys/fs/cgroup/memory",
    "memory.limit_in_bytes",
    "memory.usage_in_bytes",
    ("total_inactive_file", "total_active_file"),
    ("total_dirty", "total_writeback"),
)


def _cgroup_limits(root: str) -> list[tuple[int, int]]:
    """(limit, used without clean page cache) of our cgroups and their parents that have a limit."""
    try:
        lines = Path(root, "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return []
    found = []
    for line in lines:  # "0::/path" of v2, "9:memory:/path" of v1; hybrid hosts have both
        number, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if number == "0" and not controllers:
            found += _limits(root, path, _V2)
        elif "memory" in controllers.split(","):
            found += _limits(root, path, _V1)
    return found


def _limits(root: str, path: str, kind: _Cgroups) -> list[tuple[int, int]]:
    """Of one cgroup and its parents. A container sees its own as the base, whatever ``path``."""
    base = Path(root, kind.base)
    own = base / path.strip("/")
    found = []
    for folder in (own, *own.parents):
        try:
            limit = int((folder / kind.limit).read_text())
            used = int((folder / kind.usage).read_text())
            stat = dict(s.split() for s in (folder / "memory.stat").read_text().splitlines())
            cache = sum(int(stat.get(key, 0)) for key in kind.cache)
            unwritten = sum(int(stat.get(key, 0)) for key in kind.unwritten)
            found.append((limit, max(0, used - max(0, cache - unwritten))))
        except (OSError, ValueError):
            pass  # no limit at this level ("max"), or no such controller here
        if folder == base:
            break
    return found
