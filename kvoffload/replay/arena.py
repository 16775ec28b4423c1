"""A slot table without an arena behind it: what is begun is READY at once."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from kvoffload.types import SlotState

_FREE, _READY, _FAILED = int(SlotState.FREE), int(SlotState.READY), int(SlotState.FAILED)


class InstantArena:
    """An ``ArenaLike`` of ``data_bytes`` that holds no bytes. Single thread.

    Filling takes no time, so a slot is READY from ``begin_fill`` on; the Manager learns of it at
    its next ``poll``, as it does of real fills.
    """

    def __init__(self, data_bytes: int, max_slots: int) -> None:
        self.data_bytes = data_bytes
        self.max_slots = max_slots
        self._state = [_FREE] * max_slots
        self._generation = [0] * max_slots

    def begin_fill(self, slot: int, need_mask: int) -> int:
        """Any state -> READY; returns the new generation."""
        self._state[slot] = _READY
        self._generation[slot] += 1
        return self._generation[slot]

    def fail(self, slot: int, generation: int) -> bool:
        """READY of that generation -> FAILED."""
        if self._generation[slot] != generation or self._state[slot] != _READY:
            return False
        self._state[slot] = _FAILED
        return True

    def set_free(self, slot: int) -> None:
        """Any state -> FREE."""
        self._state[slot] = _FREE

    def states(
        self, slots: npt.NDArray[np.uint32], generations: npt.NDArray[np.uint64]
    ) -> npt.NDArray[np.uint8]:
        """State per slot; FREE where the generation differs."""
        state, now = self._state, self._generation
        pairs = zip(slots.tolist(), generations.tolist(), strict=True)
        out = [state[s] if now[s] == g else _FREE for s, g in pairs]
        return np.array(out, np.uint8)

    def generation(self, slot: int) -> int:
        """The slot's current generation."""
        return self._generation[slot]
