"""Configuration: the keys of ``kv_connector_extra_config``, checked once, typed exactly.

A leaf module (standard library, errors and memory only). A ``Config`` cannot be built with a value
that is not allowed, so nothing downstream re-checks. All sizes ``*_gib`` are GiB (2**30 bytes).
"""

from __future__ import annotations

import difflib
import json
import os
import tomllib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal, get_args

from kvoffload.errors import ConfigError
from kvoffload.memory import HostMemory, host_memory

GIB = 1 << 30
DAY_S = 86400

IoEngine = Literal["auto", "uring", "threads"]
LoadMode = Literal["auto", "always", "never"]
AdmissionMode = Literal["auto", "all"]
PolicyName = Literal["lru", "fifo", "s3fifo", "arc", "adaptive"]

MAX_DRIVES = 16
ARENA_LEAST = 2 << 20
"""Bytes: the arena is made of pages of 2 MiB."""
_MAX_GIB = float(1 << 20)
_MAX_CHUNK_TOKENS = 8192


def _fail(key: str, value: object, allowed: str) -> ConfigError:
    try:
        shown = repr(value)
    except ValueError:  # Python refuses to write out whole numbers of thousands of digits
        shown = "(a number of thousands of digits)"
    if len(shown) > 80:
        shown = shown[:77] + "..."
    return ConfigError(f"kvoffload: {key}={shown} is not allowed: {allowed}")


def _gib(key: str, value: Any) -> float:
    allowed = f"give a number of GiB above 0 and at most {_MAX_GIB:.0f}"
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise _fail(key, value, allowed)
    if not 0 < value <= _MAX_GIB:  # false of NaN
        raise _fail(key, value, allowed)
    return float(value)


def _dram_gib(key: str, value: Any) -> float:
    gib = _gib(key, value)
    if gib * GIB < ARENA_LEAST:
        raise _fail(key, value, f"give at least {ARENA_LEAST / GIB:.3f} GiB, and more than a chunk")
    return gib


def _terabytes(key: str, value: Any) -> float:
    allowed = "give a number of TB (10**12 bytes) per day above 0"
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise _fail(key, value, allowed)
    if not 0 < value <= 1e6:  # false of NaN; math.isfinite raises for whole numbers above 1e308
        raise _fail(key, value, allowed)
    return float(value)


def _endurance(key: str, value: Any) -> float:
    allowed = "give the drives' endurance, a number of TB (10**12 bytes) written, above 0"
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise _fail(key, value, allowed)
    if not 0 < value <= 1e9:
        raise _fail(key, value, allowed)
    return float(value)


def _whole(low: int, high: int, unit: str) -> Callable[[str, Any], int]:
    def rule(key: str, value: Any) -> int:
        ok = isinstance(value, int) and not isinstance(value, bool) and low <= value <= high
        if not ok:
            raise _fail(key, value, f"give a whole number of {unit} from {low} to {high}")
        return int(value)

    return rule


def _one_of(names: tuple[str, ...]) -> Callable[[str, Any], str]:
    def rule(key: str, value: Any) -> str:
        if not isinstance(value, str) or value not in names:
            raise _fail(key, value, "choose one of " + ", ".join(names))
        return value

    return rule


def _expanded(path: Any) -> str | None:
    """A path with ``~`` replaced; None for what cannot be one: no text, empty, not UTF-8."""
    if not isinstance(path, str) or not path or "\0" in path:
        return None
    try:
        path.encode()  # half a surrogate pair, which JSON can hold
        expanded = os.path.expanduser(path)
        expanded.encode()  # the native store takes UTF-8
    except UnicodeEncodeError:
        return None
    return expanded


def _directories(key: str, value: Any) -> tuple[str, ...]:
    """One absolute directory or a list of them, normalised; no two the same or one in another."""
    allowed = "give one absolute directory path (UTF-8) or a list of them"
    given = list(value) if isinstance(value, list | tuple) else [value]
    if not given or len(given) > MAX_DRIVES:
        raise _fail(key, value, f"{allowed}, at most {MAX_DRIVES}")
    out = []
    for path in given:
        expanded = _expanded(path)
        if expanded is None or not os.path.isabs(expanded):
            raise _fail(key, value, allowed)
        out.append(os.path.normpath(expanded))
    refuse_overlap(out, given)
    return tuple(out)


def refuse_overlap(paths: Sequence[str], shown: Sequence[str] | None = None) -> None:
    """Raise ConfigError (one line naming nvme_path) where two paths are one directory or nested.

    Symbolic links are resolved; paths need not exist. ``shown``: the paths as the user wrote them.
    """
    key, named = "nvme_path", list(shown or paths)
    real = [os.path.realpath(path) for path in paths]
    for i, one in enumerate(real):
        for j, other in enumerate(real):
            if i < j and one == other:
                raise _fail(key, named, f"{named[i]} and {named[j]} are the same directory")
            if i != j and other.startswith(one.rstrip("/") + "/"):
                raise _fail(key, named, f"{named[j]} lies inside {named[i]}")


def _unavailable(key: str, value: Any) -> Any:
    if value is False and key == "server_autostart":
        return False
    raise _fail(key, value, "not available in this version; leave it out")


def _share(key: str, value: Any) -> float:
    ok = isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value <= 1
    if not ok:
        raise _fail(key, value, "give a share of the hits from 0 (off) to 1, such as 0.001")
    return float(value)


def _file(key: str, value: Any) -> str:
    allowed = "give the absolute path of a file"
    expanded = _expanded(value)
    if expanded is None or not os.path.isabs(expanded) or os.path.isdir(expanded):
        raise _fail(key, value, allowed)
    return expanded


def _text(key: str, value: Any) -> str:
    expanded = _expanded(value)
    if expanded is None:
        raise _fail(key, value, "give the path of a .json or .toml file")
    return expanded


_RULES: dict[str, Callable[[str, Any], Any]] = {
    "dram_gib": _dram_gib,
    "nvme_path": _directories,
    "nvme_gib": _gib,
    "nvme_write_tb_per_day": _terabytes,
    "nvme_admission": _one_of(get_args(AdmissionMode)),
    "nvme_tbw": _endurance,
    "io_engine": _one_of(get_args(IoEngine)),
    "remote": _unavailable,
    "server": _unavailable,
    "server_autostart": _unavailable,
    "chunk_tokens": _whole(1, _MAX_CHUNK_TOKENS, "tokens"),
    "load": _one_of(get_args(LoadMode)),
    "load_deadline_ms": _whole(10, 600_000, "milliseconds"),
    "policy": _one_of(get_args(PolicyName)),
    "verify_sample": _share,
    "why_requests": _whole(0, 100_000, "requests, 0 for none,"),
    "record_path": _file,
    "config_file": _text,
}
_NONE_MEANS_DEFAULT = frozenset(
    {
        "dram_gib",
        "nvme_path",
        "nvme_gib",
        "nvme_write_tb_per_day",
        "nvme_tbw",
        "remote",
        "server",
        "server_autostart",
        "chunk_tokens",
        "load_deadline_ms",
        "record_path",
        "config_file",
    }
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Config:
    """All settings, checked on construction; raises ConfigError with one line naming the key.

    ``None`` means the default that depends on the machine, the path or the model; see
    ``dram_bytes``, ``nvme_bytes`` and ``nvme_write_bytes_per_s``.
    """

    dram_gib: float | None = None
    nvme_path: tuple[str, ...] | None = None  # given as one path or a list
    nvme_gib: float | None = None
    nvme_write_tb_per_day: float | None = None
    nvme_admission: AdmissionMode = "auto"  # which chunks are written: judged, or all
    nvme_tbw: float | None = None  # TB (10**12 bytes) all drives endure, as their makers say
    io_engine: IoEngine = "auto"
    remote: None = None
    server: None = None
    server_autostart: Literal[False] | None = None
    chunk_tokens: int | None = None
    load: LoadMode = "auto"
    load_deadline_ms: int | None = None
    policy: PolicyName = "lru"
    verify_sample: float = 0.0
    why_requests: int = 1000
    record_path: str | None = None
    config_file: str | None = None

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if value is None and field.name in _NONE_MEANS_DEFAULT:
                continue
            object.__setattr__(self, field.name, _RULES[field.name](field.name, value))
        if self.nvme_path is None:
            for key in ("nvme_gib", "nvme_write_tb_per_day", "nvme_tbw"):
                if getattr(self, key) is not None:
                    raise _fail(key, getattr(self, key), "it needs nvme_path as well")

    @classmethod
    def from_extra_config(cls, extra: Mapping[str, Any]) -> Config:
        """Build from ``kv_connector_extra_config``; keys given inline win over ``config_file``.

        Raises ConfigError (one line: key, value, what is allowed) on an unknown key, a wrong type,
        a value out of range, or a config file that cannot be read.
        """
        if not isinstance(extra, Mapping):
            raise _fail("kv_connector_extra_config", extra, "give an object of keys and values")
        _refuse_unknown(extra, "")
        merged: dict[str, Any] = {}
        if extra.get("config_file") is not None:
            path = _text("config_file", extra["config_file"])
            merged = _read_file(path)
            _refuse_unknown(merged, f" in config_file {path!r}")
            if "config_file" in merged:
                raise _fail("config_file", merged["config_file"], f"{path!r} names another file")
        merged.update(extra)
        return cls(**merged)

    def dram_bytes(self, engines: int = 1) -> int:
        """Bytes of one engine's DRAM tier: ``dram_gib``, or the default for this machine right now,
        of which each of its ``engines`` takes a part."""
        gib = self.dram_gib if self.dram_gib is not None else default_dram_gib() / engines
        return int(gib * GIB)

    def nvme_bytes(self) -> int | None:
        """Bound of all NVMe paths together: ``nvme_gib``; None: each store's own."""
        return int(self.nvme_gib * GIB) if self.nvme_gib is not None else None

    def nvme_write_bytes_per_s(self, nvme_bytes: int) -> float:
        """Write budget in bytes per second; by default ``nvme_bytes`` once a day."""
        if self.nvme_write_tb_per_day is not None:
            return self.nvme_write_tb_per_day * 1e12 / DAY_S
        return nvme_bytes / DAY_S

    def check_host(self, engines: int = 1) -> None:
        """Refuse what this machine cannot hold with so many engines. Raises ConfigError (one
        line)."""
        total = host_memory().total
        wanted = (self.dram_gib or 0) * engines
        if total and wanted * GIB > total:
            limit = f"this machine (or container) has {total / GIB:.1f} GiB of memory"
            if engines > 1:
                limit = (
                    f"each of the {engines} data parallel engines of this machine takes it, "
                    f"{wanted:.1f} GiB in all, and {limit}"
                )
            raise _fail("dram_gib", self.dram_gib, limit)


def _refuse_unknown(keys: Mapping[str, Any], where: str) -> None:
    for key in keys:
        if key in _RULES:
            continue
        close = difflib.get_close_matches(str(key), _RULES, n=1, cutoff=0.5)
        hint = f"did you mean {close[0]}?" if close else "known keys: " + ", ".join(_RULES)
        raise ConfigError(f"kvoffload: unknown key {str(key)!r}{where}: {hint}")


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    out: dict[str, Any] = {}
    for key, value in pairs:
        if key in out:
            raise ValueError(f"key {key!r} is given twice")
        out[key] = value
    return out


def _read_file(path: str) -> dict[str, Any]:
    suffix = Path(path).suffix
    if suffix not in (".json", ".toml"):
        raise _fail("config_file", path, "give the path of a .json or .toml file")
    try:
        text = Path(path).read_text(encoding="utf-8")
        if suffix == ".toml":
            data: Any = tomllib.loads(text)
        else:
            data = json.loads(text, object_pairs_hook=_no_duplicates)
    except (OSError, ValueError) as exc:
        why = exc.strerror if isinstance(exc, OSError) else str(exc)
        raise _fail("config_file", path, " ".join(f"cannot be read: {why}".split())) from exc
    if not isinstance(data, dict):
        raise _fail("config_file", path, "the file must hold one object of keys and values")
    return data


def default_dram_gib(memory: HostMemory | None = None) -> float:
    """min(25 % of the available memory, 64), in GiB."""
    available = (memory or host_memory()).available
    return min(available * 0.25 / GIB, 64.0)
