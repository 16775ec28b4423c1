"""What the scheduler half tells the workers each step, and what they answer. Plain picklable data.

Block ids and slots travel as numpy arrays: metadata is broadcast to every rank each step.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from kvoffload.types import CacheLayout, LoadFailure

U32 = npt.NDArray[np.uint32]
U64 = npt.NDArray[np.uint64]
I32 = npt.NDArray[np.int32]


@dataclass(slots=True)
class ChunkCopies:
    """Chunks of one KV group to copy: row i of ``block_ids`` is slot i; -1 leaves a block alone."""

    group: int
    slots: U32
    generations: U64
    offsets: U64
    keys: bytes
    block_ids: I32  # (n, blocks_per_chunk)

    def __len__(self) -> int:
        return len(self.slots)

    def __reduce__(self) -> tuple[Callable[..., ChunkCopies], tuple[int | bytes, ...]]:
        # As bytes: a request waits for these, and an array costs ten times as much to pickle.
        arrays = (self.slots, self.generations, self.offsets, self.block_ids)
        return _unpickled, (self.group, self.keys, *(a.tobytes() for a in arrays))


def _unpickled(
    group: int, keys: bytes, slots: bytes, generations: bytes, offsets: bytes, block_ids: bytes
) -> ChunkCopies:
    """The arrays are read-only views."""
    chunks = len(slots) // 4
    blocks = len(block_ids) // (4 * chunks) if chunks else 0
    return ChunkCopies(
        group,
        np.frombuffer(slots, np.uint32),
        np.frombuffer(generations, np.uint64),
        np.frombuffer(offsets, np.uint64),
        keys,
        np.frombuffer(block_ids, np.int32).reshape(chunks, blocks),
    )


@dataclass(slots=True)
class LoadOrder:
    """Arena -> KV blocks for one request. ``deadline_ms`` counts from when the worker sees it."""

    attempt: int
    request_id: str
    deadline_ms: int
    copies: list[ChunkCopies]


@dataclass(slots=True)
class StoreOrder:
    """KV blocks -> arena, after this step's forward."""

    store: int
    copies: list[ChunkCopies]


@dataclass(slots=True)
class FailOrder:
    """Answer this attempt as failed. ``block_ids`` are all blocks it was to fill.

    ``void``: now, however it went: what it brings must not be used. Else once it has had its time,
    unless it has ended well by then.
    """

    attempt: int
    request_id: str
    block_ids: list[int]
    void: bool = False


@dataclass(slots=True)
class ArenaAddress:
    """Where the Manager's arena can be attached, and what the scheduler half takes its slots to
    hold: each role works that out from what vLLM gives it."""

    path: str
    inode: int
    layout: CacheLayout


@dataclass(slots=True)
class StepOrders:
    """All of one step. ``idle``: the step runs no forward. ``low_water``: see LoadTable."""

    arena: ArenaAddress | None = None
    idle: bool = False
    low_water: int = 0
    fence: list[int] = field(default_factory=list)
    loads: list[LoadOrder] = field(default_factory=list)
    stores: list[StoreOrder] = field(default_factory=list)
    fails: list[FailOrder] = field(default_factory=list)

    def __reduce__(self) -> str | tuple[Any, ...]:
        # By name: most steps are calm, and every one of them waits for this.
        if self is CALM:
            return "CALM"
        rest = (self.arena, self.idle, self.low_water, self.fence)
        return StepOrders, (*rest, self.loads, self.stores, self.fails)


CALM = StepOrders()
"""Of every step that has a forward and nothing to do for us. The workers know it by identity."""


@dataclass(slots=True)
class BadChunk:
    """A slot whose bytes could not be used."""

    attempt: int
    slot: int
    generation: int
    offset: int
    reason: LoadFailure


@dataclass(slots=True)
class WorkerReport:
    """One or more ranks' account of a step."""

    bad: list[BadChunk] = field(default_factory=list)
    failed_attempts: dict[int, LoadFailure] = field(default_factory=dict)
    load_bytes: int = 0
    load_copy_s: list[float] = field(default_factory=list)
    rate_bytes: int = 0  # of loads that succeeded and never waited: what the planner learns from
    rate_s: float = 0.0
    load_wait_s: list[float] = field(default_factory=list)
    store_bytes: int = 0
    store_copy_s: list[float] = field(default_factory=list)
    hook_errors: dict[str, int] = field(default_factory=dict)
    attach_error: str = ""

    def is_empty(self) -> bool:
        """Nothing worth sending. Asked every step: jobs leave times, so bytes need no look."""
        return not (
            self.load_copy_s
            or self.store_copy_s
            or self.bad
            or self.failed_attempts
            or self.hook_errors
            or self.attach_error
        )

    def merge(self, other: WorkerReport) -> WorkerReport:
        """Fold another rank's account into this one."""
        self.bad += other.bad
        for attempt, reason in other.failed_attempts.items():
            self.failed_attempts.setdefault(attempt, reason)
        self.load_bytes += other.load_bytes
        self.load_copy_s += other.load_copy_s
        self.rate_bytes += other.rate_bytes
        self.rate_s += other.rate_s
        self.load_wait_s += other.load_wait_s
        self.store_bytes += other.store_bytes
        self.store_copy_s += other.store_copy_s
        for hook, count in other.hook_errors.items():
            self.hook_errors[hook] = self.hook_errors.get(hook, 0) + count
        self.attach_error = self.attach_error or other.attach_error
        return self
