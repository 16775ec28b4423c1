"""The seams of the core: what the Manager needs of the arena and of a chunk store.

Signatures are those of ``kvoffload._core`` (see ``_core.pyi`` for the full contracts). Every method
is O(items passed), does no I/O and may be called from any thread, except ``wait`` and ``flush``,
which block and are never called under the Manager's lock.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from kvoffload import _core


PIN_LEVEL = 4
"""The level of what is pinned in a chunk store: above the priorities of retention."""


class ArenaLike(Protocol):
    """The slot table: states FREE, FILLING, READY, FAILED and a generation per slot."""

    @property
    def data_bytes(self) -> int:
        """Bytes of the data area."""

    @property
    def max_slots(self) -> int:
        """Slot numbers are below this."""

    def begin_fill(self, slot: int, need_mask: int) -> int:
        """Any state -> FILLING; returns the new generation."""

    def fail(self, slot: int, generation: int) -> bool:
        """FILLING or READY of that generation -> FAILED; waiters wake."""

    def set_free(self, slot: int) -> None:
        """Any state -> FREE."""

    def states(
        self, slots: npt.NDArray[np.uint32], generations: npt.NDArray[np.uint64]
    ) -> npt.NDArray[np.uint8]:
        """State per slot; FREE where the generation differs."""

    def generation(self, slot: int) -> int:
        """The slot's current generation."""


class StoreDoneLike(Protocol):
    """A finished chunk-store job."""

    @property
    def job(self) -> int:
        """The number the job was submitted under."""

    @property
    def kind(self) -> int:
        """0 put, 1 get."""

    @property
    def results(self) -> bytes:
        """One ``StoreResult`` per key."""

    @property
    def nbytes(self) -> int:
        """Payload bytes that made it."""

    @property
    def ns(self) -> int:
        """Submit to done, wall clock."""


class ChunkStoreLike(Protocol):
    """A keyed store of chunks that reads and writes arena slots in the background."""

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
        """Write READY slots; the caller keeps them as they are until the job is done.

        ``deadline_ms`` from now, 0 for none: what has not started by then is DROPPED.
        """

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
        """Fill FILLING slots: verified -> READY, anything else -> FAILED.

        ``deadline_ms`` as for ``put_slots``.
        """

    def cancel(self, job: int) -> int:
        """DROP what of the job has not started; the number of keys. The rest ends by itself."""

    def poll(self) -> Sequence[StoreDoneLike]:
        """Each finished job exactly once."""

    def wait(self, job: int, timeout_ms: int) -> bool:
        """Block until the job is done; True also when it is unknown."""

    def contains(self, keys: bytes) -> bytes:
        """One byte per key, 1 if held."""

    def delete(self, keys: bytes) -> int:
        """Forget keys, in memory at once; returns how many were held."""

    def retain(self, keys: bytes, seconds: float, level: int = 0, owner: int = 0) -> bytes:
        """Keep what of ``keys`` is held, for ``seconds`` from now, at ``level`` 0 to 3, or pin it
        (``PIN_LEVEL``); 0 seconds end that. ``owner``: who asks, 64 bits, 0 for several.

        One byte per key: 1 where it was retained before, and for less. The store bounds what it
        keeps and may give the weakest up; all of it ends with the process.
        """

    def retained(self, keys: bytes, owner: int = 0) -> bytes:
        """One byte per key, 1 if pinned, or retained for others than ``owner`` (0: for anybody)."""

    def retain_none(self) -> None:
        """End all retention and all pins."""

    def flush(self, timeout_ms: int) -> bool:
        """Block until all puts so far are durable against a process crash."""

    def stats(self) -> dict[str, int | float]:
        """At least entries, bytes_used, bytes_max."""


def device_bytes(stats: Mapping[str, float]) -> int:
    """All bytes a store wrote since it was opened, from its ``stats()``: payload with padding and
    what was written again to keep it, records, and segments made ahead of need."""
    parts = ("bytes_written", "journal_bytes", "zeroed_bytes")
    return int(sum(stats.get(part, 0) for part in parts))


if TYPE_CHECKING:

    def _native_core_conforms(
        arena: _core.Arena, store: _core.SegmentStore
    ) -> tuple[ArenaLike, ChunkStoreLike]:
        """Type-checked only: the native core satisfies the protocols."""
        return arena, store
