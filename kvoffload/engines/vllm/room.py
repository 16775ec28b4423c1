"""The arena that an engine makes: its size, and whether it is enough to serve anything."""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace

from kvoffload.config import ARENA_LEAST, Config
from kvoffload.core.sizes import holds_one_each, slots_needed
from kvoffload.types import CacheLayout, GroupKind

logger = logging.getLogger("vllm.kvoffload")

IDLE_BYTES = 4 << 20
"""The arena of an engine that serves nothing."""


@dataclass(frozen=True, slots=True)
class Room:
    """``serve`` False: nothing is stored, and every group of the layout is of kind NONE."""

    layout: CacheLayout
    data_bytes: int
    slots: int
    serve: bool


def room_for(layout: CacheLayout, config: Config, engines: int, refused: str | None) -> Room:
    """Of one of ``engines`` that start on this machine. ``refused``: why its KV cannot be served.

    A default that is too small serves nothing, said in one line: without kvoffload the engine
    would run. Raises ConfigError where ``dram_gib`` was given and is too small.
    """
    if refused is not None:
        logger.warning(
            "kvoffload: this is %s, which cannot be served yet: 0 hits, nothing is stored.", refused
        )
        return _idle(layout)
    data_bytes = config.dram_bytes(engines)
    enough = data_bytes >= ARENA_LEAST and holds_one_each(layout, data_bytes)
    if config.dram_gib is None and not enough:
        logger.warning(
            "kvoffload: by default an engine would take %.1f MiB of the memory that is free here, "
            "which is too little for a chunk of each KV group (%.1f MiB): 0 hits, nothing is "
            "stored. Free some memory, or set dram_gib.",
            data_bytes / 2**20,
            sum(g.slot_bytes for g in layout.groups) / 2**20,
        )
        return _idle(layout)
    return Room(layout, data_bytes, slots_needed(layout, data_bytes), True)


def _idle(layout: CacheLayout) -> Room:
    groups = tuple(replace(g, kind=GroupKind.NONE) for g in layout.groups)
    return Room(replace(layout, groups=groups), IDLE_BYTES, 1, False)
