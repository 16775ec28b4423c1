"""What kvoffload's side of ``copy`` needs on any device: an arena, a chunk of blocks per slot."""

from __future__ import annotations

import hashlib
import time
from typing import Any

import numpy as np
import numpy.typing as npt

LEAF = 16384
WAIT_MS = 60_000
Ids = npt.NDArray[np.int32]


class ArenaChunks:
    """Chunks of about 1 MiB, their pages faulted in. One job at a time."""

    def __init__(self, block_bytes: int, blocks: int, hugepages: bool = True) -> None:
        from kvoffload import _core

        per_chunk = max(1, (1 << 20) // block_bytes)
        self._shape = (blocks // per_chunk, per_chunk)
        chunks = self._shape[0]
        self.shard = -(-block_bytes * per_chunk // LEAF) * LEAF
        total = chunks * self.shard
        size = max(4 << 20, total + (2 << 20))
        self.arena = _core.Arena.create(size, chunks, 1, hugepages)
        self.arena.set_attached(0)
        self.arena.prefault_start()
        while self.arena.prefaulted_bytes() < self.arena.data_bytes:
            time.sleep(0.01)
        self.slots = np.arange(chunks, dtype=np.uint32)
        self.offsets = np.arange(chunks, dtype=np.uint64) * self.shard
        self.keys = b"".join(
            hashlib.blake2b(b"%d" % i, digest_size=16).digest() for i in range(chunks)
        )
        self.generations = np.zeros(chunks, np.uint64)

    def begin_fill(self) -> None:
        """New generations for a store into every slot."""
        for slot in self.slots.tolist():
            self.generations[slot] = self.arena.begin_fill(slot, 1)

    def chosen(self, ids: Ids) -> Ids:
        """Blocks by chunk and place in it, those that make whole chunks."""
        return np.ascontiguousarray(ids[: self.slots.size * self._shape[1]].reshape(self._shape))


def finish(engine: Any, job: int) -> None:
    """Wait for a job of a copy engine. Raises RuntimeError unless all of it succeeded."""
    engine.wait(job, WAIT_MS)
    done = [d for d in engine.poll() if d.job == job]
    if not done or done[0].status != 0:
        raise RuntimeError(f"copy job did not succeed: {done}")
