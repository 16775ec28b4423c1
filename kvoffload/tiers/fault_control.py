"""What a ``FaultyStore`` is told: which fault, and the file that says so."""

from __future__ import annotations

import json
import logging
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from pathlib import Path

from kvoffload.errors import ConfigError

logger = logging.getLogger("kvoffload.tiers.fault_control")


class Fault(str, Enum):
    """What is wrong with the tier."""

    NONE = "none"
    SLOW = "slow"  # jobs wait until the device's rate is the real one / factor
    HUNG = "hung"  # no job returns before the fault ends; then all do
    CORRUPT = "corrupt"  # reads bring wrong bytes
    FULL = "full"  # puts find no space
    READ_ONLY = "read_only"  # puts end in an I/O error
    GONE = "gone"  # every job ends in an I/O error


@dataclass(frozen=True, slots=True)
class FaultOrder:
    """A fault and, for ``SLOW``, by how much. Raises ConfigError on a factor below 1."""

    fault: Fault = Fault.NONE
    factor: float = 10.0

    def __post_init__(self) -> None:
        if not (math.isfinite(self.factor) and self.factor >= 1):
            raise ConfigError(f"fault file: factor={self.factor!r}: give a number of at least 1")

    @classmethod
    def parse(cls, text: str) -> FaultOrder:
        """From JSON such as ``{"fault": "slow", "factor": 10}``. Raises ConfigError (one line)."""
        try:
            given = json.loads(text)
        except ValueError as error:
            raise ConfigError(f"fault file: not JSON: {error}") from error
        if not isinstance(given, dict) or not given.keys() <= {"fault", "factor"}:
            raise ConfigError('fault file: give {"fault": NAME} and, if wanted, "factor"')
        names = [f.value for f in Fault]
        name, factor = given.get("fault", "none"), given.get("factor", 10.0)
        if name not in names:
            raise ConfigError(f"fault file: fault={name!r}: choose one of {', '.join(names)}")
        if isinstance(factor, bool) or not isinstance(factor, int | float):
            raise ConfigError(f"fault file: factor={factor!r}: give a number of at least 1")
        return cls(Fault(name), float(factor))


class ControlFile:
    """The file another process writes, and ``<file>.status`` that answers it. One thread only."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._status = path.with_name(path.name + ".status")
        self._seen: tuple[int, int, int] | None = None
        self._complained = False

    def changed(self) -> FaultOrder | None:
        """The order, if the file was written since the last call; no file is no fault. What cannot
        be read or parsed changes nothing and is said once."""
        try:
            info = os.stat(self._path)
            seen = (info.st_mtime_ns, info.st_size, info.st_ino)
        except FileNotFoundError:
            seen = (0, 0, 0)
        if seen == self._seen:
            return None
        self._seen = seen
        if seen == (0, 0, 0):
            return FaultOrder()
        try:
            return FaultOrder.parse(self._path.read_text())
        except (OSError, ConfigError) as error:
            if not self._complained:
                self._complained = True
                logger.warning("kvoffload: %s; the fault stays as it is", error)
            return None

    def report(self, status: Mapping[str, object]) -> None:
        """Replace the status file, atomically. Raises OSError."""
        part = self._status.with_name(self._status.name + ".part")
        part.write_text(json.dumps(status))
        part.replace(self._status)
