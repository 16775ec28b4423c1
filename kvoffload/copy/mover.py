"""How bytes get from HBM blocks to arena bytes on a device stream: the seam below the CUDA engine.

A mover only enqueues. The engine orders: it makes the stream wait before ``copy`` and records an
event after it. Which mover serves a copy is picked per (fragment bytes, count, direction) by
``calibrate``; all of them move the same bytes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from kvoffload.copy.runs import Run


@dataclass(frozen=True, slots=True)
class LeafCheck:
    """Checksums of one item's shard, computed or compared on the device while it is copied.

    Leaf ``i`` covers the shard's bytes [i * LEAF_BYTES, (i + 1) * LEAF_BYTES): XXH3-64 seeded with
    ``seed``, bit for bit what ``_core`` computes. A store writes every leaf's hash to
    ``leaves + 8 * i``, zero padding of the shard included. A load compares the leaves in
    [``first``, ``first + count``), all of whose bytes it reads, and adds 1 to the int32 at ``bad``
    for each that differs.
    """

    seed: int
    shard: int  # offset of the shard in the arena's data
    shard_bytes: int
    leaves: int  # device-visible address of the shard's uint64 leaf hashes
    bad: int  # device-visible address of an int32
    first: int
    count: int


class Mover(Protocol):
    """Copies runs between device addresses and the arena. Any host thread, one at a time."""

    name: str
    checks: bool
    """Whether ``copy`` takes a LeafCheck; where not, the host hashes and verifies."""

    def copy(
        self,
        runs: Sequence[Run],
        arena: int,
        to_device: bool,
        stream: Any,
        check: LeafCheck | None = None,
    ) -> None:
        """Enqueue the copies of one item; ``arena`` is the device-visible address of its data.

        Raises RuntimeError or OSError when the device refuses, ValueError on runs or a check that
        it does not take; then some of the copies may have been enqueued.
        """
