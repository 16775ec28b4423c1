"""A CUDA device and a DRAM arena as a ``World`` runs them, every access recorded.

``StreamRuntime`` is the copy engine's ``Runtime``: real bytes move, when the world gives the stream its
turn. ``StreamArena`` is a real ``_core.Arena`` whose slot table orders threads as its atomics do.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from kvoffload.copy.runs import Run
from kvoffload.types import LEAF_BYTES, SlotState
from tests.support.streams_memory import Cell, Region, Shadow, Sink, SinkMap
from tests.support.streams_world import Clock, Stream, World, join


def leaves(offset: int, nbytes: int) -> range:
    return range(offset // LEAF_BYTES, (offset + nbytes - 1) // LEAF_BYTES + 1)


class StreamArena:
    """A ``_core.Arena``: everything that is not here is the real one's."""

    def __init__(self, world: World, shadow: Shadow, real: Any) -> None:
        self.world, self.shadow, self.real = world, shadow, real
        self._clocks: dict[int, Clock] = {}  # by slot; -1: the header
        self._shards: dict[tuple[int, int], range] = {}  # slot, rank -> bytes of the last store
        self.where: Callable[[int], range] | None = None  # a slot's bytes, as allocated now
        self.region = Region(
            real.data_ptr, real.data_bytes, lambda at, n: self._cells(at, n, "arena"), SinkMap()
        )
        self.where: Callable[[int], range] | None = None  # a slot's bytes, as allocated now
        self._sinks: dict[int, list[tuple[range, Sink]]] = {}  # by leaf: whose bytes lie there

    def __getattr__(self, name: str) -> Any:
        found = getattr(self.real, name)
        return partial(self._set_leaves, found) if name == "set_leaf_hashes" else found

    # -- data

    def _cells(self, offset: int, nbytes: int, *kinds: str) -> Iterable[Cell]:
        return [(k, leaf) for k in kinds for leaf in leaves(offset, nbytes)]

    def view(self, offset: int, nbytes: int) -> memoryview:
        """Threads of the engine ask for it to write, the harness to look."""
        looking = self.world.current is self.world.main
        self.touch(offset, nbytes, "host", not looking, "view")
        out: memoryview = self.real.view(offset, nbytes)
        return out

    def touch(self, offset: int, nbytes: int, kind: str, write: bool, what: str) -> None:
        self.shadow.touch(self._cells(offset, nbytes, "arena"), kind, write, what)

    def hash_leaves(self, offset: int, nbytes: int, key: bytes, *, kind: str = "hash") -> None:
        self.world.maybe_yield()
        self.touch(offset, nbytes, kind, False, f"data at {offset}")
        cells = self._cells(offset, nbytes, "leaf")
        self.shadow.touch(cells, kind, True, f"leaf table at {offset}")
        self.real.hash_leaves(offset, nbytes, key)

    def verify_leaves(self, offset: int, nbytes: int, key: bytes) -> bool:
        self.world.maybe_yield()
        cells = self._cells(offset, nbytes, "arena", "leaf")
        self.shadow.touch(cells, "verify", False, f"data at {offset}")
        return bool(self.real.verify_leaves(offset, nbytes, key))

    def leaf_hashes(self, offset: int, nbytes: int) -> Any:
        cells = self._cells(offset, nbytes, "leaf")
        self.shadow.touch(cells, "host", False, f"leaf table at {offset}")
        return self.real.leaf_hashes(offset, nbytes)

    def _set_leaves(self, real: Any, offset: int, hashes: Any) -> None:
        cells = self._cells(offset, len(hashes) * LEAF_BYTES, "leaf")
        self.shadow.touch(cells, "hash", True, f"leaf table at {offset}")
        self.shadow.touch([("seat", hashes.ctypes.data)], "hash", False, "device's hashes")
        real(offset, hashes)

    # -- stores under way (see Sink)

    def expect(self, slot: int, rank: int, shard: range) -> None:
        """A store of this rank's bytes into the slot was submitted."""
        self._shards[slot, rank] = shard

    # -- slot table: each entry is an atomic that orders those who change and see it

    def _sees(self, slot: int) -> None:
        self.world.maybe_yield()
        self.world.acquire(self._clocks.get(slot, {}))

    def _changes(self, slot: int, what: str, do: Callable[..., Any], *args: int) -> Any:
        """A change that is refused orders nobody after it."""
        self._sees(slot)
        out = do(*args)
        self.world.log(f"{what} slot {slot}: {out}")
        if out is not False:
            join(self._clocks.setdefault(slot, {}), self.world.release())
        return out

    def begin_fill(self, slot: int, need_mask: int) -> int:
        generation = self._changes(slot, "begin_fill", self.real.begin_fill, slot, need_mask)
        if self.where is not None:  # a new life: nobody may still be at these bytes
            span = self.where(slot)
            cells = self._cells(span.start, len(span), "arena", "leaf")
            self.shadow.touch(cells, "reuse", True, f"slot {slot} taken anew")
        return int(generation)

    def rank_done(self, slot: int, generation: int, rank: int) -> bool:
        done = self._changes(slot, "rank_done", self.real.rank_done, slot, generation, rank)
        sinks = self.region.sinks
        if done and sinks is not None:
            for _, sink in sinks.get(self._shards[slot, rank]):
                self.shadow.publish(sink)
        return bool(done)

    def fill_done(self, slot: int, generation: int) -> bool:
        return bool(self._changes(slot, "fill_done", self.real.fill_done, slot, generation))

    def fail(self, slot: int, generation: int) -> bool:
        return bool(self._changes(slot, "fail", self.real.fail, slot, generation))

    def set_free(self, slot: int) -> None:
        self._changes(slot, "set_free", self.real.set_free, slot)

    def state(self, slot: int) -> int:
        self._sees(slot)
        return int(self.real.state(slot))

    def generation(self, slot: int) -> int:
        self._sees(slot)
        return int(self.real.generation(slot))

    def done_mask(self, slot: int) -> int:
        self._sees(slot)
        return int(self.real.done_mask(slot))

    def states(self, slots: Any, generations: Any) -> Any:
        self.world.maybe_yield()
        for slot in slots.tolist():  # no turn in between: what is read now was ordered up to now
            self.world.acquire(self._clocks.get(slot, {}))
        return self.real.states(slots, generations)

    def wait_ready(self, slot: int, generation: int, timeout_ms: int) -> int:
        def left() -> bool:
            same = self.real.generation(slot) == generation
            return not same or self.real.state(slot) != SlotState.FILLING

        self.world.pause(left, timeout_ms * 1_000_000)
        self._sees(slot)
        return int(self.real.wait_ready(slot, generation, 0))

    def set_attached(self, rank: int) -> None:
        self._changes(-1, "attached", self.real.set_attached, rank)

    def attached_mask(self) -> int:
        self._sees(-1)
        return int(self.real.attached_mask())

    def bump_epoch(self) -> int:
        return int(self._changes(-1, "bump_epoch", self.real.bump_epoch))

    def epoch(self) -> int:
        self._sees(-1)
        return int(self.real.epoch())


@dataclass(eq=False)
class CudaEvent:
    clock: Clock | None = None  # None: the stream has not come to it yet

    def complete(self) -> bool:
        return self.clock is not None


class StreamRuntime:
    """Runtime of one rank. ``kv``: its KV memory."""

    def __init__(
        self, world: World, shadow: Shadow, arena: StreamArena | None, rank: int, kv: Region | None
    ) -> None:
        self.world, self.shadow, self.rank = world, shadow, rank
        self.kv = kv
        self.regions = [r for r in (kv, arena and arena.region) if r is not None]
        self.compute_stream = world.stream(f"r{rank} compute")
        self.side_streams: list[Stream] = []
        self.kept: list[Any] = []  # memory that must not be reused
        self.registered: dict[int, int] = {}
        self.fail_chance = 0.0  # of a copy or a record on a side stream
        self.failed = 0

    # -- the model runner's side

    def compute(self, what: str, run: Callable[[], None]) -> None:
        """A kernel on the compute stream."""
        self.world.push(self.compute_stream, what, run)

    # -- Runtime

    def enter_thread(self) -> None:
        pass

    def stream(self, high_priority: bool) -> Stream:
        kind = "load" if high_priority else "store"
        self.side_streams.append(self.world.stream(f"r{self.rank} {kind} stream"))
        return self.side_streams[-1]

    def mark(self) -> CudaEvent:
        return self.record(self.compute_stream)

    def _may_fail(self, call: str) -> None:
        if self.fail_chance and self.world.rng.random() < self.fail_chance:
            self.failed += 1
            raise RuntimeError(f"planted: {call}")

    def record(self, stream: Stream) -> CudaEvent:
        if stream is not self.compute_stream:
            self._may_fail("cudaEventRecord")
        event = CudaEvent()

        def reach() -> None:
            event.clock = self.world.release()

        self.world.push(stream, "event", reach)
        return event

    def wait_event(self, stream: Stream, event: CudaEvent) -> None:
        def pass_on() -> None:
            assert event.clock is not None
            self.world.acquire(event.clock)

        self.world.push(stream, "wait for event", pass_on, event.complete)

    def synchronize(self, event: CudaEvent) -> None:
        self.world.pause(event.complete)
        assert event.clock is not None
        self.world.acquire(event.clock)

    def drain(self, stream: Stream) -> None:
        self.world.pause(lambda: not stream.ops)
        self.world.acquire(stream.actor.release())

    def copy(self, runs: Sequence[Run], arena: int, to_device: bool, stream: Stream) -> None:
        for run in runs:
            self._may_fail("cudaMemcpyAsync")  # those before it are enqueued
            host = arena + run.offset
            ends = (run.address, host) if to_device else (host, run.address)
            kind = "load" if to_device else "store"
            what = f"{'from' if to_device else 'to'} slot bytes at {run.offset}"
            move = partial(self.move, *ends, run.nbytes, kind, what)
            self.world.push(stream, f"copy {what}", move)

    def region(self, address: int) -> Region:
        return next(r for r in self.regions if address in r)

    def move(self, target: int, source: int, nbytes: int, kind: str, what: str) -> None:
        """Bytes move now, on the acting stream."""
        to, frm = self.region(target), self.region(source)
        self.touch(source, nbytes, kind, False, what, sink := Sink() if frm is self.kv else None)
        self.touch(target, nbytes, kind, True, what)
        at, start = target - to.base, source - frm.base
        if to.sinks is not None:
            where = range(at, at + nbytes)
            moved = [(where, sink)] if sink is not None else []
            if frm.sinks is not None:
                moved = frm.sinks.get(range(start, start + nbytes), at - start)
            to.sinks.put(where, moved)
        ctypes.memmove(target, source, nbytes)

    def touch(
        self, address: int, nbytes: int, kind: str, write: bool, what: str, sink: Any = None
    ) -> None:
        region = self.region(address)
        self.shadow.touch(region.cells(address - region.base, nbytes), kind, write, what, sink)

    def host_register(self, address: int, nbytes: int) -> None:
        self.world.maybe_yield()
        self.registered[address] = nbytes

    def host_unregister(self, address: int) -> None:
        busy = [s.actor.name for s in self.side_streams if s.ops]
        assert not busy, f"unpinned while {busy} hold work"
        del self.registered[address]
