"""CPU copy engine: native threads, verification fused with the copy. See csrc/copy.cpp.

Two pools, as a GPU has two streams: loads, for which a request waits, run at the worker's priority;
stores, for which nobody waits, give way to the model.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from typing import Any

import numpy as np

from kvoffload import _core
from kvoffload.copy.base import Copies, Fragment

logger = logging.getLogger("vllm.kvoffload")

STORE_NICE = 10
"""A tenth of the model's weight where both want one core (sched_prio_to_weight: 110 to 1024)."""


def _cores(arena: _core.Arena) -> tuple[list[int], list[int]]:
    """(the model's cores, the others that the arena's process may use).

    vLLM binds a CPU worker's main thread to its compute cores and new threads inherit that: copies
    would share those with the model. The arena's creator (EngineCore) is not bound, but keeps what
    the user allowed (taskset, cgroup). docs/decisions/0005 has the measurement.
    """
    mine = os.sched_getaffinity(0)
    try:
        theirs = os.sched_getaffinity(int(arena.path.split("/")[2]))
    except (OSError, ValueError, IndexError):
        logger.debug("copy threads stay on the cores of this thread", exc_info=True)
        theirs = mine
    return sorted(mine), sorted(theirs - mine)


class CpuCopyEngine:
    """CopyEngine over two ``_core.CpuCopyPool``. 2 threads reach a small host's memory limit.

    Loads take one thread on the model's cores, idle while it waits for them, and one beside them:
    left to the scheduler, both wake on the model's core when EngineCore polls on the other one.
    """

    def __init__(self, arena: _core.Arena, rank: int, threads: int = 2) -> None:
        mine, others = _cores(arena)
        sides = [mine, others] if others else [mine]
        self._loads = _core.CpuCopyPool(arena, rank, threads, cores=sides)
        self._stores = _core.CpuCopyPool(arena, rank, threads, nice=STORE_NICE, cores=sides[-1:])

    def add_group(self, fragments: Sequence[Fragment], num_blocks: int, shard_bytes: int) -> int:
        """See CopyEngine."""
        runs = [(f.base, f.stride, f.nbytes) for f in fragments]
        group = self._loads.add_group(runs, num_blocks, shard_bytes)
        assert self._stores.add_group(runs, num_blocks, shard_bytes) == group
        return group

    def submit_store(self, job: int, group: int, copies: Copies, shard_offset: int) -> None:
        """See CopyEngine. The forward is synchronous on CPU: the bytes are there."""
        self._stores.submit_store(
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
        self._loads.submit_load(
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
        self._loads.cancel(job)
        self._stores.cancel(job)

    def poll(self) -> list[Any]:
        """See CopyEngine."""
        return [*self._loads.poll(), *self._stores.poll()]

    def wait(self, job: int, timeout_ms: int) -> bool:
        """See CopyEngine. A pool that does not know the job answers at once."""
        return self._loads.wait(job, timeout_ms) and self._stores.wait(job, timeout_ms)

    def wait_begun(self, job: int, timeout_ms: int) -> bool:
        """See CopyEngine. The forward is synchronous on CPU: every job has begun."""
        return True

    def inject(self, fail_every: int) -> None:
        """Test hook: every n-th load item fails; 0 turns it off."""
        self._loads.inject(fail_every)

    def close(self) -> None:
        """See CopyEngine."""
        self._loads.close()
        self._stores.close()
