"""The movers that use the copy engines of the device: one call per run, one call for all, staged.

``PlainMover`` is always there and takes any memory, pinned or not. The others need the arena's
bytes pinned and visible to the device at their host address.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any, Protocol

import numpy as np

from kvoffload.copy.cuda_driver import BatchCopy
from kvoffload.copy.cuda_runtime import Runtime
from kvoffload.copy.mover import LeafCheck, Mover
from kvoffload.copy.runs import Run
from kvoffload.types import LEAF_BYTES

PLAIN = "plain"

RING = 2
"""Staging buffers: one is filled while the other drains."""


def _no_check(name: str, check: LeafCheck | None) -> None:
    if check is not None:
        raise ValueError(f"mover {name} takes no LeafCheck")


class PlainMover:
    """One ``cudaMemcpyAsync`` per run. Stateless: several threads may copy at a time."""

    name = PLAIN
    checks = False

    def __init__(self, runtime: Runtime) -> None:
        self._runtime = runtime

    def copy(
        self,
        runs: Sequence[Run],
        arena: int,
        to_device: bool,
        stream: Any,
        check: LeafCheck | None = None,
    ) -> None:
        """See Mover. Blocks the host where the arena is not pinned: the driver stages it."""
        _no_check(self.name, check)
        self._runtime.copy(runs, arena, to_device, stream)


class BatchMover:
    """One ``cuMemcpyBatchAsync`` for all runs (cuda_driver). Stateless, like PlainMover.

    Runs must not overlap: the copies of a batch have no order among them.
    """

    name = "batch"
    checks = False

    def __init__(self, batch: BatchCopy) -> None:
        self._batch = batch

    def copy(
        self,
        runs: Sequence[Run],
        arena: int,
        to_device: bool,
        stream: Any,
        check: LeafCheck | None = None,
    ) -> None:
        """See Mover."""
        _no_check(self.name, check)
        if not runs:
            return
        table = np.array(runs, np.uint64)
        device, host = table[:, 0], table[:, 1] + np.uint64(arena)
        target, source = (device, host) if to_device else (host, device)
        self._batch.submit(target, source, table[:, 2], stream.cuda_stream)


class Buffer(Protocol):
    """Device memory, kept while referenced; a torch tensor has this shape."""

    def data_ptr(self) -> int:
        """Its address."""

    def numel(self) -> int:
        """Its bytes."""


@dataclass(slots=True)
class _Staging:
    buffer: Buffer | None = None
    event: Any = None  # after the last use
    stream: Any = None  # of a use after which no event could be recorded


class StagedMover:
    """A kernel gathers into a buffer in HBM, then one DMA; a load the other way round.

    ``kernel`` moves between blocks and the buffer as it would between blocks and the arena, with
    its checksums. A buffer is used again after the event of its last use. One thread at a time.
    ``allocate(nbytes, stream)``: device memory of at least that size for use on ``stream``, aligned
    to 256 bytes. All copies of a mover are on one stream.
    """

    name = "staged"

    def __init__(
        self,
        kernel: Mover,
        runtime: Runtime,
        allocate: Callable[[int, Any], Buffer],
        piece_bytes: int,
        ring: int = RING,
    ) -> None:
        self.checks = kernel.checks
        self._kernel, self._runtime, self._allocate = kernel, runtime, allocate
        self._piece = piece_bytes
        self._ring = [_Staging() for _ in range(ring)]
        self._next = 0

    def copy(
        self,
        runs: Sequence[Run],
        arena: int,
        to_device: bool,
        stream: Any,
        check: LeafCheck | None = None,
    ) -> None:
        """See Mover. A checked store also writes the shard's zero padding to the arena."""
        if not runs and check is None:
            return
        low, spans = self._spans(runs, to_device, check)
        slot = self._take(spans[-1][1] - low, stream)
        assert slot.buffer is not None
        base = slot.buffer.data_ptr()
        near = [Run(address, offset - low, nbytes) for address, offset, nbytes in runs]
        near_check = None if check is None else replace(check, shard=check.shard - low)
        dma = [Run(base + first - low, first, last - first) for first, last in spans]
        try:
            if to_device:
                self._runtime.copy(dma, arena, True, stream)
            self._kernel.copy(near, base, to_device, stream, near_check)
            if not to_device:
                self._runtime.copy(dma, arena, False, stream)
        finally:
            slot.event, slot.stream = None, stream
            slot.event = self._runtime.record(stream)

    def close(self) -> None:
        """Wait for the uses of the buffers and let them go."""
        for slot in self._ring:
            self._drain(slot)
            slot.buffer = None

    def check(self) -> None:
        """Raise AssertionError on a broken invariant."""
        assert 0 <= self._next < len(self._ring), "the ring's position is outside of it"
        for i, slot in enumerate(self._ring):
            used = slot.event is not None or slot.stream is not None
            assert slot.buffer is not None or not used, f"staging buffer {i} is used, not there"

    def _spans(
        self, runs: Sequence[Run], to_device: bool, check: LeafCheck | None
    ) -> tuple[int, list[tuple[int, int]]]:
        """Leaf-aligned start of the buffer and the arena ranges [first, last) of the DMAs."""
        if check is not None:
            first, count = check.first, check.count
            if not to_device:
                first, count = 0, check.shard_bytes // LEAF_BYTES
            low = check.shard + first * LEAF_BYTES
            ranges = [(low, low + count * LEAF_BYTES)]
        else:
            table = np.array(runs, np.int64)
            table = table[np.argsort(table[:, 1], kind="stable")]
            first_at, end = table[:, 1], table[:, 1] + table[:, 2]
            new = np.flatnonzero(np.concatenate(([True], end[:-1] != first_at[1:])))
            last = np.append(new[1:] - 1, len(end) - 1)
            ranges = list(zip(first_at[new].tolist(), end[last].tolist(), strict=True))
        out = []
        for first, last_at in ranges:  # no DMA straddles two separately pinned pieces
            cuts = range((first // self._piece + 1) * self._piece, last_at, self._piece)
            edges = [first, *cuts, last_at]
            out += list(pairwise(edges))
        return ranges[0][0] // LEAF_BYTES * LEAF_BYTES, out

    def _take(self, nbytes: int, stream: Any) -> _Staging:
        slot = self._ring[self._next]
        self._next = (self._next + 1) % len(self._ring)
        if slot.buffer is None or slot.buffer.numel() < nbytes:
            self._drain(slot)  # memory that copies still use must not go back to the allocator
            slot.buffer = None
            slot.buffer = self._allocate(max(nbytes, LEAF_BYTES), stream)
        elif slot.event is not None:
            self._runtime.wait_event(stream, slot.event)
        else:
            self._drain(slot)
        return slot

    def _drain(self, slot: _Staging) -> None:
        if slot.event is not None:
            self._runtime.synchronize(slot.event)
        elif slot.stream is not None:
            self._runtime.drain(slot.stream)
        slot.event = slot.stream = None
