"""Mover that gathers and scatters with Triton kernels, checksums included.

The kernels read and write the arena themselves: it is pinned host memory mapped into the device's
address space, and an address is an integer in a work table (kernels_table). A few programs work
through an item, so the copies take a few SMs and leave the others to the model. Checksums are
XXH3-64 per leaf, computed from the very registers that are stored: a store hashes what it wrote,
and a load writes no byte of a leaf whose hash is not the expected one.

Triton and torch are imported when a mover is made, never by importing this module.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from kvoffload.copy.kernels_table import (
    SPECS,
    UNITS_AT,
    Launch,
    Spec,
    Work,
    checked_work,
    plain_work,
)
from kvoffload.copy.mover import LeafCheck
from kvoffload.copy.runs import I64, Run
from kvoffload.errors import UnsupportedError

PROGRAMS = 16
"""Default most programs of a launch. A program holds up to 16 KiB in flight."""

RING = 16
"""Tables that may be in use on the device at a time."""


class Tables(Protocol):
    """Brings work tables to the device and keeps them until they were used."""

    def staged(self, words: I64, stream: Any) -> AbstractContextManager[Any]:
        """Tensor whose first ``len(words)`` int64 are ``words`` for what is enqueued on ``stream``
        inside the context; inside, ``stream`` is the current stream of the calling thread."""

    def close(self) -> None:
        """Wait until no table is in use. Nothing is staged afterwards."""

    def check(self) -> None:
        """Raise AssertionError on a broken invariant."""


class KernelMover:
    """Mover with Triton kernels; see the module. Runs may have any alignment and size.

    Safe from any host thread that has the device current; calls are serialised. The work table of
    an item is kept by the mover until the device is past it, so nothing of an item's arguments must
    outlive the call but the memory they name. ``copy`` blocks while RING earlier items have not
    ended on the device: give each stream its own mover, or stores that wait for compute would hold
    back loads. The arena and all a LeafCheck names must be device-visible: pinned before the copy,
    ``bad`` best in device memory.

    ``programs``: most programs of a launch. Raises UnsupportedError where triton cannot be
    imported, ValueError on no programs.
    """

    name = "triton"
    checks = True

    def __init__(self, *, programs: int = PROGRAMS, tables: Tables | None = None) -> None:
        if programs < 1:
            raise ValueError(f"programs {programs}")
        self._source: Any = _source()
        self._programs = programs
        self._tables: Tables = tables if tables is not None else DeviceTables()
        self._lock = threading.Lock()

    def copy(
        self,
        runs: Sequence[Run],
        arena: int,
        to_device: bool,
        stream: Any,
        check: LeafCheck | None = None,
    ) -> None:
        """See Mover. Bytes of the shard that no run covers are zeroed by a checked store.

        Raises ValueError, before anything is enqueued, on runs or a check that do not fit: a
        checked load refuses runs outside the leaves it checks.
        """
        if check is None:
            work = plain_work(runs, arena, to_device)
        else:
            work = checked_work(runs, arena, to_device, check)
        if work.launches:
            self._enqueue(work, stream)

    def warm(self, stream: Any, specs: Sequence[Spec] = SPECS) -> None:
        """Compile ``specs`` (seconds where triton's cache does not hold them) and launch each over
        nothing, so that no copy waits for a compiler. Raises like ``copy``."""
        launches = tuple(Launch(spec, 0, 0) for spec in specs)
        self._enqueue(Work(np.zeros(UNITS_AT, np.int64), launches), stream)

    def close(self) -> None:
        """Wait for the copies enqueued so far. Nothing may be copied afterwards."""
        with self._lock:
            self._tables.close()

    def check(self) -> None:
        """Raise AssertionError on a broken invariant."""
        with self._lock:
            self._tables.check()

    def _enqueue(self, work: Work, stream: Any) -> None:
        with self._lock, self._tables.staged(work.table, stream) as table:
            for launch in work.launches:
                try:
                    self._launch(table, launch)
                except (RuntimeError, OSError):
                    raise
                except Exception as exc:  # triton has exceptions of its own
                    raise RuntimeError(f"triton: {launch.spec}: {exc}") from exc

    def _launch(self, table: Any, launch: Launch) -> None:
        spec, first, last = launch
        count = -(-(last - first) // max(spec.rows, 1))
        kernel = getattr(self._source, spec.kernel)
        grid = (min(max(count, 1), self._programs),)
        kernel[grid](table, first, last, **constants(self._source.tl, spec), num_warps=spec.warps)


def _source() -> Any:
    try:
        from kvoffload.copy import kernels_jit
    except ImportError as exc:
        raise UnsupportedError(f"triton cannot be used: {exc}") from exc
    return kernels_jit


def precompile(specs: Sequence[Spec] = SPECS) -> None:
    """Compile ``specs`` for the current device, so that no mover of this process has to.

    Seconds where triton's cache does not hold them, else milliseconds. Nothing is launched, loaded
    or allocated on the device: at any time, also while a graph is captured. Raises UnsupportedError
    where triton cannot be imported, and what triton raises.
    """
    import torch

    source = _source()
    for spec in specs:
        kernel = getattr(source, spec.kernel)
        # The data type stands for an aligned tensor of it, as DeviceTables' tables are.
        fixed = constants(source.tl, spec)
        kernel.warmup(torch.int64, 0, 0, grid=(1,), num_warps=spec.warps, **fixed)


def constants(tl: Any, spec: Spec) -> dict[str, Any]:
    """Compile-time arguments of a specialisation; ``tl``: triton.language."""
    dtype = {8: tl.uint64, 4: tl.uint32, 1: tl.uint8}[spec.element]
    out = {"ELEM": spec.element, "DTYPE": dtype, "ALIGN": spec.align}
    if spec.kernel == "copy_pieces":
        out.update(ROWS=spec.rows, WIDTH=spec.width)
    return out


@dataclass(slots=True)
class _Slot:
    """One table's buffers and what to wait for before they are used again."""

    host: Any = None
    device: Any = None
    busy: Any = None  # the event after the last use; the stream while none is recorded


class DeviceTables:
    """Tables on the current CUDA device: a ring of pinned buffers and their device copies.

    Not thread-safe; KernelMover serialises. A slot grows to the largest table it has seen.
    """

    def __init__(self, ring: int = RING, words: int = 1 << 13) -> None:
        self._words = words
        self._ring = [_Slot() for _ in range(ring)]
        self._next = 0
        self._closed = False

    @contextmanager
    def staged(self, words: I64, stream: Any) -> Iterator[Any]:
        """See Tables. Waits, on the host, for the use of this slot RING tables ago."""
        if self._closed:
            raise RuntimeError("the work tables are closed")
        slot = self._ring[self._next]
        self._next = (self._next + 1) % len(self._ring)
        if slot.busy is not None:
            slot.busy.synchronize()
            slot.busy = None
        with self._current(stream):
            size = len(words)
            if slot.host is None or slot.host.numel() < size:
                slot.host, slot.device = self._buffers(
                    max(self._words, 1 << (size - 1).bit_length())
                )
            slot.host.numpy()[:size] = words
            slot.busy = stream  # should recording fail, the slot waits for all of the stream
            slot.device[:size].copy_(slot.host[:size], non_blocking=True)
            try:
                yield slot.device
            finally:
                slot.busy = self._record(stream)

    def close(self) -> None:
        """See Tables. Idempotent."""
        self._closed = True
        for slot in self._ring:
            if slot.busy is not None:
                slot.busy.synchronize()
            slot.host = slot.device = slot.busy = None

    def check(self) -> None:
        """See Tables."""
        assert 0 <= self._next < len(self._ring), "the ring's position is outside of it"
        for i, slot in enumerate(self._ring):
            assert (slot.host is None) == (slot.device is None), f"slot {i} has half of its buffers"
            assert slot.busy is None or slot.host is not None, f"slot {i} is busy without buffers"

    def _current(self, stream: Any) -> AbstractContextManager[Any]:
        import torch

        # Device memory is allocated under the stream that uses it first: the allocator orders it.
        context: AbstractContextManager[Any] = torch.cuda.stream(stream)
        return context

    def _buffers(self, words: int) -> tuple[Any, Any]:
        import torch

        pinned = torch.empty(words, dtype=torch.int64, pin_memory=True)
        return pinned, torch.empty(words, dtype=torch.int64, device="cuda")

    def _record(self, stream: Any) -> Any:
        import torch

        event = torch.cuda.Event(blocking=True)
        event.record(stream)
        return event
