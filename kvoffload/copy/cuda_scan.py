"""Which load of a CUDA copy engine can go on: one look at the slots that all of them wait for.

While NVMe is slow many loads wait, and the look is taken each millisecond under the table's lock
and the rank's GIL: one call for all of them, not some for each. No CUDA in here.
"""

from __future__ import annotations

from collections.abc import Sequence
from operator import is_

import numpy as np

from kvoffload.copy.cuda_job import U32, U64, Job, States, Window
from kvoffload.types import SlotState

_FILLING = int(SlotState.FILLING)


class LoadScan:
    """Remembers what the loads waited for when they were last looked at. The JobTable's lock guards
    it."""

    def __init__(self) -> None:
        self._windows: list[Window] = []
        self._slots: U32 = np.zeros(0, np.uint32)
        self._generations: U64 = np.zeros(0, np.uint64)
        self._ends = np.zeros(0, np.intp)  # of each load's part of the slots

    def first_ready(self, loads: Sequence[Job], states: States, now: int) -> tuple[Job, int] | None:
        """The first item of the oldest load that has one whose slot is not FILLING, within each
        load's window. One call of ``states``."""
        if not loads:
            return None
        self._gather([job.window() for job in loads])
        filling = states(self._slots, self._generations) == _FILLING
        for i, window in enumerate(self._windows):
            if not window.seen:
                end = int(self._ends[i])
                loads[i].saw(window, filling[end - len(window.items) : end], now)
        at = int(np.argmin(filling))
        if filling[at]:
            return None
        i = int(np.searchsorted(self._ends, at, "right"))
        window = self._windows[i]
        return loads[i], int(window.items[at - int(self._ends[i]) + len(window.items)])

    def _gather(self, windows: list[Window]) -> None:
        same = len(windows) == len(self._windows) and all(map(is_, windows, self._windows))
        if same:
            return
        self._windows = windows
        self._slots = np.concatenate([w.slots for w in windows])
        self._generations = np.concatenate([w.generations for w in windows])
        self._ends = np.cumsum([len(w.items) for w in windows])
