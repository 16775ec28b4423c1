"""The copy kernel, staging buffers and checksum seats of the CUDA engine on a ``StreamRuntime``.

The kernel is the stand-in of cuda_movers.FakeKernels (bytes and checksums as mover.py demands), run when
the world gives its stream a turn and with every access recorded. StagedMover, MoverSet and SeatPools are
the real ones.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from kvoffload.copy.leaf_seats import Seat, SeatPools
from kvoffload.copy.mover import LeafCheck
from kvoffload.copy.mover_set import MoverSet, Prepared
from kvoffload.copy.movers import PlainMover, StagedMover
from kvoffload.copy.runs import Run
from tests.support.cuda_movers import FakeKernels, HostBuffer
from tests.support.streams_device import StreamRuntime
from tests.support.streams_memory import Region, SinkMap
from tests.support.streams_world import Stream

PIECE = 1 << 30
LEAF = 16384


class StreamKernels(FakeKernels):
    """One operation per call: a kernel."""

    def __init__(self, runtime: StreamRuntime) -> None:
        super().__init__(runtime)  # type: ignore[arg-type]
        self._runtime = runtime

    def copy(
        self,
        runs: Sequence[Run],
        arena: int,
        to_device: bool,
        stream: Any,
        check: LeafCheck | None = None,
    ) -> None:
        assert self._busy.acquire(blocking=False), "two threads in one kernel mover"
        assert isinstance(stream, Stream)
        mine = list(runs)
        try:
            self._runtime._may_fail("launch")
            kind = "load" if to_device else "store"
            self._runtime.world.push(
                stream, f"kernel, {kind}", lambda: self._kernel(mine, arena, to_device, check)
            )
        finally:
            self._busy.release()

    def _kernel(self, runs: list[Run], arena: int, up: bool, check: LeafCheck | None) -> None:
        runtime, kind = self._runtime, "load" if up else "store"
        if check is not None:
            first = 0 if not up else check.first * LEAF
            nbytes = check.shard_bytes if not up else check.count * LEAF
            where = arena + check.shard + first
            runtime.touch(where, nbytes, kind, not up, "checked shard")
            runtime.shadow.touch([("seat", check.leaves)], kind, not up, "leaf hashes")
            if up:
                runtime.shadow.touch([("bad", check.bad)], kind, True, "count of bad leaves")
        self._run(runs, arena, up, check)  # bytes and checksums
        for address, offset, nbytes in runs:  # the same bytes once more: for the record
            ends = (address, arena + offset) if up else (arena + offset, address)
            runtime.move(*ends, nbytes, kind, f"kernel, slot bytes near {offset}")


class StreamBuffer(HostBuffer):
    """A staging buffer in device memory that the runtime knows."""

    def __init__(self, runtime: StreamRuntime, nbytes: int, stream: Any) -> None:
        super().__init__(nbytes, stream)
        name = ("buffer", self.data_ptr())
        runtime.regions.append(Region(self.data_ptr(), nbytes, lambda at, n: [name], SinkMap()))
        runtime.kept.append(self)  # its address is its name: never a second buffer at the same


class NotedSeats(SeatPools):
    """Taking a seat and giving it back are accesses: no kernel may be at it still."""

    def __init__(self, runtime: StreamRuntime) -> None:
        super().__init__(runtime)
        self._shadow = runtime.shadow

    def take(self, leaves: int) -> Seat | None:
        seat = super().take(leaves)
        if seat is not None:
            self._note(seat, "seat taken")
        return seat

    def give(self, seat: Seat) -> None:
        self._note(seat, "seat given back")
        super().give(seat)

    def _note(self, seat: Seat, what: str) -> None:
        cells = [("seat", seat.leaves_at), ("bad", seat.bad_at)]
        self._shadow.touch(cells, "host", True, what)


def movers(runtime: StreamRuntime, only: str) -> MoverSet:
    """``only``: the mover for every item, "" for plain copies."""

    def some() -> list[Any]:
        kernels = StreamKernels(runtime)

        def allocate(nbytes: int, stream: Any) -> StreamBuffer:
            return StreamBuffer(runtime, nbytes, stream)

        return [StagedMover(kernels, runtime, allocate, PIECE), kernels]

    plain = PlainMover(runtime)
    return MoverSet(plain, Prepared(some(), some()), only=only) if only else MoverSet(plain)
