"""The chunk store that accepts everything and keeps nothing: upper bounds, and tests."""

from __future__ import annotations

from collections.abc import Sequence
from threading import Lock
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from kvoffload.types import StoreResult

_KEY_BYTES = 16


class NullDone(NamedTuple):
    """A finished job of the null store; fields as in ``StoreDoneLike``."""

    job: int
    kind: int
    results: bytes
    nbytes: int
    ns: int


class NullStore:
    """Puts succeed at once and are dropped; gets miss. Thread safe."""

    def __init__(self) -> None:
        self._lock = Lock()
        self._done: list[NullDone] = []
        self._puts = 0
        self._gets = 0

    def put_slots(
        self,
        job: int,
        arena: Any,
        keys: bytes,
        slots: npt.NDArray[np.uint32],
        generations: npt.NDArray[np.uint64],
        offsets: npt.NDArray[np.uint64],
        nbytes: int,
        namespace: int,
        depths: npt.NDArray[np.uint32],
        deadline_ms: int = 0,
    ) -> None:
        """Accept and forget."""
        count = len(keys) // _KEY_BYTES
        with self._lock:
            self._puts += count
            self._done.append(NullDone(job, 0, bytes([StoreResult.OK]) * count, count * nbytes, 0))

    def get_slots(
        self,
        job: int,
        arena: Any,
        keys: bytes,
        slots: npt.NDArray[np.uint32],
        generations: npt.NDArray[np.uint64],
        offsets: npt.NDArray[np.uint64],
        nbytes: int,
        deadline_ms: int = 0,
    ) -> None:
        """Fail every slot: nothing is held."""
        for slot, generation in zip(slots, generations, strict=True):
            arena.fail(int(slot), int(generation))
        count = len(keys) // _KEY_BYTES
        with self._lock:
            self._gets += count
            self._done.append(NullDone(job, 1, bytes([StoreResult.MISS]) * count, 0, 0))

    def cancel(self, job: int) -> int:
        """Jobs are done when they are submitted."""
        return 0

    def poll(self) -> Sequence[NullDone]:
        """Each finished job exactly once."""
        with self._lock:
            done, self._done = self._done, []
        return done

    def wait(self, job: int, timeout_ms: int) -> bool:
        """Jobs are done when they are submitted."""
        return True

    def contains(self, keys: bytes) -> bytes:
        """Nothing is ever held."""
        return bytes(len(keys) // _KEY_BYTES)

    def delete(self, keys: bytes) -> int:
        """Nothing is ever held."""
        return 0

    def retain(self, keys: bytes, seconds: float, level: int = 0, owner: int = 0) -> bytes:
        """Nothing is ever held."""
        return bytes(len(keys) // _KEY_BYTES)

    def retained(self, keys: bytes, owner: int = 0) -> bytes:
        """Nothing is ever held."""
        return bytes(len(keys) // _KEY_BYTES)

    def retain_none(self) -> None:
        """Nothing is ever held."""

    def flush(self, timeout_ms: int) -> bool:
        """Nothing to flush."""
        return True

    def stats(self) -> dict[str, int | float]:
        """Counts of what was asked; nothing is held."""
        with self._lock:
            return {
                "entries": 0,
                "bytes_used": 0,
                "bytes_max": 0,
                "puts": self._puts,
                "gets": self._gets,
            }

    def check(self) -> None:
        """There is no state that could be inconsistent."""
        assert self._puts >= 0 and self._gets >= 0

    def close(self, timeout_ms: int = 5000) -> None:
        """Nothing to close."""
