"""Support for the CUDA copy engine's tests: a recording fake of CUDA, an arena, random KV layouts.

``FakeRuntime`` is a fake: its "device" is host memory and its streams are lists of operations that a
thread carries out in a random order that respects streams and events. It shows that the engine's
ordering, bytes and bookkeeping are right under every such order. It cannot show that a driver accepts
the calls (pinning, addresses, capture), what they cost, or that real streams order as modelled.
"""

from __future__ import annotations

import ctypes
import random
import threading
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np

from kvoffload import _core
from kvoffload.copy.base import Fragment
from kvoffload.copy.runs import Run

LEAF = _core.LEAF_BYTES
HANDLES = {"load": 0x10AD, "store": 0x5704E, "scratch": 0x5C4A7C}


class FakeStream(str):
    """A stream's name, with the handle that C calls take."""

    __slots__ = ()

    @property
    def cuda_stream(self) -> int:
        return HANDLES[self]


class FakeEvent:
    """Complete once the device has passed it."""

    def __init__(self, stream: str) -> None:
        self.stream = stream
        self.complete = False


@dataclass
class Op:
    kind: str  # "copy", "wait", "event", "call"
    event: FakeEvent | None = None
    fn: Callable[[], None] | None = None
    gate: threading.Event | None = None

    def runnable(self) -> bool:
        if self.kind == "wait":
            assert self.event is not None
            return self.event.complete
        return self.gate is None or self.gate.is_set()


@dataclass
class FakeRuntime:
    """Runtime whose streams run in a random, order-respecting schedule on one thread."""

    seed: int = 0
    refuse_from: int = -1  # host_register fails from this call on
    fail_copy: int = -1  # the n-th copy call fails after half of its runs
    fail_record: int = -1  # the n-th record on a side stream fails
    fail_enter: bool = False
    driver: threading.Event | None = None  # copy() blocks the host until it is set
    piece_bytes: int = 1 << 30
    registered: dict[int, int] = field(default_factory=dict)
    runs: list[tuple[str, Run]] = field(default_factory=list)
    enqueued_by: set[str] = field(default_factory=set)

    def __post_init__(self) -> None:
        self._rng = random.Random(self.seed)
        self._cv = threading.Condition()
        self._streams: dict[str, deque[Op]] = {s: deque() for s in ("compute", *HANDLES)}
        self._copies = self._records = self._registers = 0
        self._paused: set[str] = set()
        self._end = False
        self.violations: list[str] = []
        self._thread = threading.Thread(target=self._device, daemon=True)
        self._thread.start()

    # -- what tests do to the device

    def compute(self, fn: Callable[[], None], gate: threading.Event | None = None) -> None:
        """A kernel on the compute stream, which runs once ``gate`` is set (see ``poke``)."""
        self._push("compute", Op("call", fn=fn, gate=gate))

    def poke(self) -> None:
        """Let the device look at gates again."""
        with self._cv:
            self._cv.notify_all()

    def pause(self, stream: str) -> None:
        """Stop a side stream ("load" or "store")."""
        with self._cv:
            self._paused.add(stream)

    def resume(self, stream: str) -> None:
        with self._cv:
            self._paused.discard(stream)
            self._cv.notify_all()

    def queued(self, stream: str, kind: str = "copy") -> int:
        with self._cv:
            return sum(op.kind == kind for op in self._streams[stream])

    def stop(self) -> None:
        with self._cv:
            self._end = True
            self._cv.notify_all()
        self._thread.join()

    # -- Runtime

    def enter_thread(self) -> None:
        if self.fail_enter:
            raise RuntimeError("no device")

    def stream(self, high_priority: bool) -> FakeStream:
        return FakeStream("load" if high_priority else "store")

    def mark(self) -> FakeEvent:
        return self.record("compute")

    def record(self, stream: str) -> FakeEvent:
        if stream != "compute":
            self._records += 1
            if self._records - 1 == self.fail_record:
                raise RuntimeError("planted: cudaEventRecord")
        event = FakeEvent(stream)
        self._push(stream, Op("event", event))
        return event

    def wait_event(self, stream: str, event: FakeEvent) -> None:
        self._push(stream, Op("wait", event))

    def synchronize(self, event: FakeEvent) -> None:
        with self._cv:
            self._cv.wait_for(lambda: event.complete or self._end)

    def drain(self, stream: str) -> None:
        with self._cv:
            self._cv.wait_for(lambda: not self._streams[stream] or self._end)

    def copy(self, runs: Sequence[Run], arena: int, to_device: bool, stream: str) -> None:
        self.enqueued_by.add(threading.current_thread().name)
        if self.driver is not None:
            self.driver.wait()
        self.note_direction(to_device, stream)
        fail = self._copies == self.fail_copy
        self._copies += 1
        for i, run in enumerate(runs):
            if fail and i >= len(runs) // 2:
                raise RuntimeError("planted: cudaMemcpyAsync")
            if run.offset // self.piece_bytes != (run.offset + run.nbytes - 1) // self.piece_bytes:
                self.violations.append(f"{run} straddles pinned pieces")
            self.runs.append((stream, run))
            host = arena + run.offset
            ends = (run.address, host) if to_device else (host, run.address)
            self._push(stream, Op("copy", fn=partial(ctypes.memmove, *ends, run.nbytes)))

    def note_direction(self, to_device: bool, stream: str) -> None:
        if stream != "scratch" and to_device != (stream == "load"):
            self.violations.append(f"direction {to_device} on {stream}")

    def push_copy(self, stream: str, fn: Callable[[], None]) -> None:
        """A device operation of a mover that does not go through ``copy``."""
        self._push(stream, Op("copy", fn=fn))

    def host_register(self, address: int, nbytes: int) -> None:
        self._registers += 1
        if 0 <= self.refuse_from < self._registers:
            raise RuntimeError("cudaHostRegister: out of memory (2)")
        self.registered[address] = nbytes

    def host_unregister(self, address: int) -> None:
        if any(self.queued(s) for s in list(self._streams)):
            self.violations.append("unpinned while copies are out")
        del self.registered[address]

    # -- the device

    def _push(self, stream: str, op: Op) -> None:
        with self._cv:
            self._streams[stream].append(op)
            self._cv.notify_all()

    def _device(self) -> None:
        while True:
            with self._cv:
                ready = [
                    s
                    for s, ops in self._streams.items()
                    if ops and s not in self._paused and ops[0].runnable()
                ]
                if self._end:
                    return
                if not ready:
                    self._cv.wait()
                    continue
                ops = self._streams[self._rng.choice(ready)]
                op = ops[0]
                if op.fn is not None:
                    op.fn()
                if op.kind == "event" and op.event is not None:
                    op.event.complete = True
                ops.popleft()
                self._cv.notify_all()


class LeafArena:
    """A real ``_core.Arena`` whose leaf table is in Python, ``set_leaf_hashes`` included."""

    def __init__(self, data_bytes: int, max_slots: int, n_ranks: int) -> None:
        self._arena = _core.Arena.create(data_bytes, max_slots, n_ranks, False)
        self.leaves: dict[int, int] = {}

    def __getattr__(self, name: str) -> Any:
        return getattr(self._arena, name)

    def _hashes(self, offset: int, nbytes: int, key: bytes) -> dict[int, int]:
        assert offset % LEAF == 0
        hashes = _core.leaf_checksums(self._arena.view(offset, nbytes), key).tolist()
        return {offset + i * LEAF: h for i, h in enumerate(hashes)}

    def hash_leaves(self, offset: int, nbytes: int, key: bytes) -> None:
        self.leaves |= self._hashes(offset, nbytes, key)

    def verify_leaves(self, offset: int, nbytes: int, key: bytes) -> bool:
        return all(self.leaves.get(at) == h for at, h in self._hashes(offset, nbytes, key).items())

    def leaf_hashes(self, offset: int, nbytes: int) -> Any:
        span = range(offset, offset + nbytes, LEAF)
        return np.array([self.leaves.get(at, 0) for at in span], np.uint64)

    def set_leaf_hashes(self, offset: int, hashes: Any) -> None:
        assert offset % LEAF == 0
        self.leaves |= {offset + i * LEAF: h for i, h in enumerate(hashes.tolist())}


def make_arena(
    data_bytes: int, max_slots: int = 64, n_ranks: int = 1, *, leaf_table: bool = False
) -> Any:
    """The native arena. ``leaf_table``: one that takes leaf hashes, its table in Python where the
    native one does not."""
    if leaf_table and not hasattr(_core.Arena, "set_leaf_hashes"):
        return LeafArena(data_bytes, max_slots, n_ranks)
    return _core.Arena.create(data_bytes, max_slots, n_ranks, False)


@dataclass
class Chunks:
    """Shape of engines' ChunkCopies."""

    slots: Any
    generations: Any
    offsets: Any
    keys: bytes
    block_ids: Any


def chunks(
    slots: Sequence[int], generations: Sequence[int], offsets: Sequence[int], ids: Any
) -> Chunks:
    """One row of ``ids`` per slot; the key is derived from the slot number."""
    return Chunks(
        np.asarray(slots, np.uint32),
        np.asarray(generations, np.uint64),
        np.asarray(offsets, np.uint64),
        b"".join(int(s + 1).to_bytes(16, "little") for s in slots),
        np.asarray(ids, np.int32),
    )


@dataclass
class Layout:
    """Fragments over a "device" buffer of bytes: (offset in the buffer, stride, nbytes)."""

    parts: list[tuple[int, int, int]]
    num_blocks: int
    blocks_per_chunk: int
    total: int

    @property
    def block_bytes(self) -> int:
        return sum(n for _, _, n in self.parts)

    @property
    def shard_bytes(self) -> int:
        return -(-self.block_bytes * self.blocks_per_chunk // LEAF) * LEAF

    def fragments(self, base: int) -> list[Fragment]:
        return [Fragment(base + at, stride, n) for at, stride, n in self.parts]

    def block(self, memory: np.ndarray, b: int) -> bytes:
        """The block's bytes, gathered the slow and obvious way."""
        return b"".join(
            bytes(memory[at + b * stride : at + b * stride + n]) for at, stride, n in self.parts
        )


def make_layout(sizes: list[int], interleaved: bool, gap: int, num_blocks: int, bpc: int) -> Layout:
    """``interleaved``: all layers of a block together (strides equal); else one array per layer."""
    parts, at = [], 0
    if interleaved:
        stride = sum(sizes) + gap
        for n in sizes:
            parts.append((at, stride, n))
            at += n
        return Layout(parts, num_blocks, bpc, stride * num_blocks)
    for n in sizes:
        parts.append((at, n + gap, n))
        at += (n + gap) * num_blocks
    return Layout(parts, num_blocks, bpc, at)
