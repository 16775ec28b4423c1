"""A job's request, kept so that parts of it can go to different drives or be sent again."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from kvoffload._core import Arena, SegmentStore

Places = npt.NDArray[np.intp]
"""Positions of keys in a request."""

PUT, GET = 0, 1


class Request(Protocol):
    """Keys and their memory. Immutable."""

    @property
    def keys(self) -> bytes:
        """16 bytes each."""

    @property
    def kind(self) -> int:
        """PUT or GET."""

    def send(self, store: SegmentStore, job: int, at: Places) -> None:
        """Submit the keys at these positions. Raises what the native store raises."""

    def give_up(self, at: Places) -> None:
        """Nothing will fill the memory at these positions."""

    def sizes(self, at: Places) -> list[int]:
        """Payload bytes per position."""


def until(deadline_ms: int) -> float | None:
    """When ``deadline_ms`` from now is (time.monotonic()); None for 0, no deadline."""
    if not 0 <= deadline_ms <= 86_400_000:
        raise ValueError("deadline_ms must be 0 (none) to 86400000")
    return time.monotonic() + deadline_ms / 1000 if deadline_ms else None


def left_ms(until: float | None) -> int:
    """What is left of a deadline, as the native store takes it."""
    return 0 if until is None else max(1, int((until - time.monotonic()) * 1000))


def pick_keys(keys: bytes, at: Places) -> bytes:
    """The 16-byte keys at these positions."""
    return bytes(np.frombuffer(keys, dtype="V16")[at].tobytes())


def count_keys(keys: bytes) -> int:
    """How many keys; ValueError when they are not 16 bytes each."""
    if len(keys) % 16:
        raise ValueError("keys must be a multiple of 16 bytes")
    return len(keys) // 16


@dataclass(frozen=True, slots=True)
class SlotRequest:
    """Arena slots, all of ``nbytes``."""

    kind: int
    arena: Arena
    keys: bytes
    slots: npt.NDArray[np.uint32]
    generations: npt.NDArray[np.uint64]
    offsets: npt.NDArray[np.uint64]
    nbytes: int
    namespace: int = 0
    depths: npt.NDArray[np.uint32] | None = None
    until: float | None = None  # deadline, time.monotonic()

    def __post_init__(self) -> None:
        n = count_keys(self.keys)
        arrays = (self.slots, self.generations, self.offsets, self.depths)
        if any(a is not None and len(a) != n for a in arrays):
            raise ValueError("keys, slots, generations and offsets differ in length")
        if not 0 < self.nbytes < 1 << 32 or self.nbytes % 4096:
            raise ValueError("nbytes of a slot must be a positive multiple of 4096 below 4 GiB")

    def send(self, store: SegmentStore, job: int, at: Places) -> None:
        """See Request."""
        keys = pick_keys(self.keys, at)
        slots, generations, offsets = self.slots[at], self.generations[at], self.offsets[at]
        if self.kind == GET:
            store.get_slots(
                job,
                self.arena,
                keys,
                slots,
                generations,
                offsets,
                self.nbytes,
                left_ms(self.until),
            )
            return
        depths = np.zeros(len(at), np.uint32) if self.depths is None else self.depths[at]
        store.put_slots(
            job,
            self.arena,
            keys,
            slots,
            generations,
            offsets,
            self.nbytes,
            self.namespace,
            depths,
            left_ms(self.until),
        )

    def give_up(self, at: Places) -> None:
        """See Request."""
        if self.kind == GET:
            for i in at.tolist():
                self.arena.fail(int(self.slots[i]), int(self.generations[i]))

    def sizes(self, at: Places) -> list[int]:
        """See Request."""
        return [self.nbytes] * len(at)


@dataclass(frozen=True, slots=True)
class BufferRequest:
    """Plain buffers of the caller's."""

    kind: int
    keys: bytes
    buffers: Sequence[Any]
    namespace: int = 0
    until: float | None = None

    def __post_init__(self) -> None:
        if len(self.buffers) != count_keys(self.keys):
            raise ValueError("one buffer per key")

    def send(self, store: SegmentStore, job: int, at: Places) -> None:
        """See Request."""
        keys = pick_keys(self.keys, at)
        buffers = [self.buffers[i] for i in at.tolist()]
        if self.kind == GET:
            store.get(job, keys, buffers, left_ms(self.until))
        else:
            store.put(job, keys, buffers, self.namespace, left_ms(self.until))

    def give_up(self, at: Places) -> None:
        """See Request. A buffer that is not filled stays as it is."""

    def sizes(self, at: Places) -> list[int]:
        """See Request."""
        return [memoryview(self.buffers[i]).nbytes for i in at.tolist()]
