"""CPU copy engine: native threads, verification fused with the copy. See csrc/copy.cpp."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from kvoffload import _core
from kvoffload.copy.base import Copies, Fragment


class CpuCopyEngine:
    """CopyEngine over ``_core.CpuCopyPool``. 2 threads reach a small host's memory limit."""

    def __init__(self, arena: _core.Arena, rank: int, threads: int = 2) -> None:
        self._pool = _core.CpuCopyPool(arena, rank, threads)

    def add_group(self, fragments: Sequence[Fragment], num_blocks: int, shard_bytes: int) -> int:
        """See CopyEngine."""
        return self._pool.add_group(
            [(f.base, f.stride, f.nbytes) for f in fragments], num_blocks, shard_bytes
        )

    def submit_store(self, job: int, group: int, copies: Copies, shard_offset: int) -> None:
        """See CopyEngine. The forward is synchronous on CPU: the bytes are there."""
        self._pool.submit_store(
            job,
            group,
            copies.slots,
            copies.generations,
            copies.offsets + np.uint64(shard_offset),
            copies.keys,
            copies.block_ids,
        )

    def submit_load(
        self, job: int, group: int, copies: Copies, shard_offset: int, deadline_ms: int
    ) -> None:
        """See CopyEngine."""
        self._pool.submit_load(
            job,
            group,
            copies.slots,
            copies.generations,
            copies.offsets + np.uint64(shard_offset),
            copies.keys,
            copies.block_ids,
            deadline_ms,
        )

    def cancel(self, job: int) -> None:
        """See CopyEngine."""
        self._pool.cancel(job)

    def poll(self) -> list[Any]:
        """See CopyEngine."""
        return list(self._pool.poll())

    def wait(self, job: int, timeout_ms: int) -> bool:
        """See CopyEngine."""
        return self._pool.wait(job, timeout_ms)

    def inject(self, fail_every: int) -> None:
        """Test hook: every n-th load item fails; 0 turns it off."""
        self._pool.inject(fail_every)

    def close(self) -> None:
        """See CopyEngine."""
        self._pool.close()
