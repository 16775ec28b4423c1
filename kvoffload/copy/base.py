"""Copy engines move chunks between arena slots and paged KV blocks. They only enqueue.

One engine per worker process, used from the worker's main thread; bytes move on native threads
(CPU) or device streams (CUDA). A job's outcome is collected once with ``poll``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt


class Copies(Protocol):
    """Chunks of one group; engines/vllm/meta.ChunkCopies has this shape."""

    slots: npt.NDArray[np.uint32]
    generations: npt.NDArray[np.uint64]
    offsets: npt.NDArray[np.uint64]
    keys: bytes
    block_ids: npt.NDArray[np.int32]


class Fragment(NamedTuple):
    """Block ``b`` has ``nbytes`` at address ``base + b * stride``."""

    base: int
    stride: int
    nbytes: int


class JobDone(NamedTuple):
    """Outcome of a job; fields as in _core.CopyDone."""

    job: int
    kind: int
    status: int
    failed_item: int
    reason: int
    nbytes: int
    wait_ns: int
    copy_ns: int


STORE, LOAD = 0, 1
OK, FAILED, CANCELLED, DEADLINE = 0, 1, 2, 3


class CopyEngine(Protocol):
    """What the worker half needs of a device."""

    def add_group(self, fragments: Sequence[Fragment], num_blocks: int, shard_bytes: int) -> int:
        """Register a group's blocks; returns its number. Raises ValueError when they do not fit."""

    def submit_store(self, job: int, group: int, copies: Copies, shard_offset: int) -> None:
        """Blocks -> slots, after the compute already enqueued; marks this rank done per slot."""

    def submit_load(
        self, job: int, group: int, copies: Copies, shard_offset: int, deadline_ms: int
    ) -> None:
        """Slots -> blocks with id >= 0: waits for READY, verifies, copies, re-checks.

        ``deadline_ms`` counts from when the job begins (``wait_begun``); what has not started by
        then is dropped.
        """

    def cancel(self, job: int) -> None:
        """Drop what has not started. The job is still reported."""

    def poll(self) -> list[Any]:
        """Finished jobs (JobDone or the like), each exactly once."""

    def wait(self, job: int, timeout_ms: int) -> bool:
        """True when the job is finished or unknown. Releases the GIL."""

    def wait_begun(self, job: int, timeout_ms: int) -> bool:
        """True when the compute enqueued before the job has ended, or the job is finished or
        unknown. Releases the GIL while it waits."""

    def close(self) -> None:
        """Stop. Nothing is written to a block or slot afterwards."""
