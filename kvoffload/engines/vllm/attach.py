"""Knows when every rank has attached to the arena."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

logger = logging.getLogger("vllm.kvoffload")

ATTACH_S = 30.0
"""How long an idle engine keeps stepping for its workers to attach to the arena."""


class AttachWatch:
    """Watches the attached mask of an arena. Scheduler thread only."""

    def __init__(self, arena: Any, world_size: int, clock: Callable[[], float]) -> None:
        self._arena = arena
        self._world = world_size
        self._clock = clock
        self._started = clock()
        self._done = False
        self._warned = False

    def worth_waiting(self) -> bool:
        """Whether an idle engine should go on stepping for the missing ranks."""
        return self._clock() - self._started < ATTACH_S

    def done(self) -> bool:
        """Whether all ranks have attached; says once which have not when it takes too long."""
        if not self._done:
            mask = self._arena.attached_mask()
            missing = [r for r in range(self._world) if not mask >> r & 1]
            self._done = not missing
            if missing and not self._warned and not self.worth_waiting():
                self._warned = True
                logger.warning(
                    "kvoffload: ranks %s have not attached to the DRAM arena after %d s; nothing "
                    "is loaded or stored until they do. See their logs for the reason.",
                    missing,
                    int(ATTACH_S),
                )
        return self._done
