"""Which mover serves a copy: a table of times measured on this device, and its cache.

At start every mover's bytes are verified (trials.py) and, unless the cache has the figures of this
very device and software, each is timed over GRID in at most BUDGET_S. Nothing is tuned on someone
else's card.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

from kvoffload.files import replace_json, user_cache_file

logger = logging.getLogger("vllm.kvoffload")

BUDGET_S = 1.5
"""Time spent on timing, all movers together."""

HOST_THREADS = 2
"""Host threads that hash for movers without checksums, in each direction."""

MARGIN = 0.05
"""A mover is taken over one earlier in _ORDER only where it is faster by this part: below that it
is noise, and kernels take SMs from the model that DMA does not."""

_ORDER = ("plain", "batch", "staged", "triton")
_FORMAT = 1
_MAX_CACHE_BYTES = 1 << 20


class Cell(NamedTuple):
    """Median time of one mover for so many fragments of ``fragment_bytes``."""

    mover: str
    to_device: bool
    fragment_bytes: int
    fragments: int
    seconds: float
    checks: bool
    """The time includes the checksums; else the host computes them."""


@dataclass(frozen=True, slots=True)
class Table:
    """What was measured. ``hash_s_per_byte``: one host thread hashing."""

    cells: tuple[Cell, ...] = ()
    hash_s_per_byte: float = 0.0

    def pick(
        self,
        fragment_bytes: int,
        count: int,
        to_device: bool,
        movers: Sequence[str],
        checked: bool = True,
    ) -> str:
        """Name of the mover of ``movers`` that costs least near this shape; pure.

        The nearest measured shape decides, distances being factors. Cost is what an item adds to a
        busy pipeline: the copy, or the host's hashing where that takes longer and is needed (the
        mover has no checksums, or ``checked`` is false). "plain" where nothing was measured.
        """
        return _pick(self, max(fragment_bytes, 1), max(count, 1), to_device, tuple(movers), checked)

    def cost(self, cell: Cell, checked: bool) -> float:
        """Seconds; see pick."""
        if cell.checks and checked:
            return cell.seconds
        nbytes = cell.fragment_bytes * cell.fragments
        return max(cell.seconds, nbytes * self.hash_s_per_byte / HOST_THREADS)

    def complete(self, movers: Mapping[bool, Sequence[str]], points: int) -> bool:
        """Whether every mover has a figure at each of ``points`` shapes in each direction."""
        return len(self.cells) == points * sum(len(names) for names in movers.values())


@lru_cache(maxsize=1024)
def _pick(
    table: Table,
    fragment_bytes: int,
    count: int,
    to_device: bool,
    movers: tuple[str, ...],
    checked: bool,
) -> str:
    shapes: dict[tuple[int, int], dict[str, float]] = {}
    for cell in table.cells:
        if cell.to_device == to_device and cell.mover in movers:
            shape = shapes.setdefault((cell.fragment_bytes, cell.fragments), {})
            shape[cell.mover] = table.cost(cell, checked)
    # A shape at which a mover was not timed says nothing about that mover: the fullest ones count.
    most = max((len(costs) for costs in shapes.values()), default=0)
    near = [(_far(s, fragment_bytes, count), s) for s, c in shapes.items() if len(c) == most]
    if not near:
        return "plain"
    costs = shapes[min(near)[1]]
    best = ""
    for name in sorted(costs, key=lambda n: (_ORDER.index(n) if n in _ORDER else len(_ORDER), n)):
        if not best or costs[name] < costs[best] * (1 - MARGIN):
            best = name
    return best


def _far(shape: tuple[int, int], fragment_bytes: int, count: int) -> float:
    return abs(math.log2(shape[0] / fragment_bytes)) + abs(math.log2(shape[1] / count))


# -- cache ----------------------------------------------------------------------------------------


def cache_file(key: Mapping[str, Any]) -> Path:
    """$XDG_CACHE_HOME/kvoffload/copy-<digest of the key>.json."""
    digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()
    return user_cache_file(f"copy-{digest[:16]}.json")


def load_table(path: Path, key: Mapping[str, Any]) -> Table | None:
    """The cached table, None unless the file is ours, whole, and for this very ``key``."""
    try:
        with open(path, "rb") as f:
            st = os.fstat(f.fileno())
            if st.st_uid != os.geteuid() or st.st_mode & 0o022 or st.st_size > _MAX_CACHE_BYTES:
                logger.debug("kvoffload: %s is not ours alone, measuring anew", path)
                return None
            data = json.load(f)
        if data["format"] != _FORMAT or data["key"] != json.loads(json.dumps(key)):
            return None
        cells = tuple(_cell(row) for row in data["cells"])
        return Table(cells, _positive(data["hash_s_per_byte"])) if cells else None
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as exc:
        logger.debug("kvoffload: %s cannot be used (%s), measuring anew", path, exc)
        return None


def save_table(path: Path, key: Mapping[str, Any], table: Table) -> None:
    """Replace atomically (mode 0600). A failure is logged: only start-up time is lost."""
    data = {
        "format": _FORMAT,
        "key": dict(key),
        "hash_s_per_byte": table.hash_s_per_byte,
        "cells": [list(cell) for cell in table.cells],
    }
    try:
        replace_json(path, data)
    except OSError as exc:
        logger.warning("kvoffload: the copy calibration could not be kept: %s", exc)


def _cell(row: Any) -> Cell:
    mover, to_device, fragment_bytes, count, seconds, checks = row
    kinds = isinstance(mover, str) and isinstance(to_device, bool) and isinstance(checks, bool)
    whole = type(fragment_bytes) is int and type(count) is int
    if not kinds or not whole or fragment_bytes <= 0 or count <= 0:
        raise ValueError(f"bad cell {row!r}")
    return Cell(mover, to_device, fragment_bytes, count, _positive(seconds), checks)


def _positive(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError(f"{value!r} is no time")
    if not (math.isfinite(value) and value > 0):
        raise ValueError(f"{value!r} is no time")
    return float(value)
