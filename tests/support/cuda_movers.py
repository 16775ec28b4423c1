"""Fakes below and beside the movers, over ``FakeRuntime`` (tests/support/cuda.py).

``FakeDriver`` is a libcuda made of real C function pointers: ctypes calls it with the very layouts it
would hand the driver, and it decodes them from memory. ``FakeKernels`` stands for KernelMover: it does in
Python, when the fake device comes to it, what the contract in copy/mover.py asks, with the bytes of
corrupt leaves written too, as the contract allows. Neither shows that a device does the same.
"""

from __future__ import annotations

import ctypes
import random
import struct
import threading
from collections.abc import Sequence
from functools import partial
from types import SimpleNamespace
from typing import Any

import numpy as np

from kvoffload import _core
from kvoffload.copy.cuda_driver import find_batch_copy
from kvoffload.copy.mover import LeafCheck
from kvoffload.copy.mover_set import MoverSet, Prepared
from kvoffload.copy.movers import BatchMover, PlainMover, StagedMover
from kvoffload.copy.runs import Run
from kvoffload.copy.trials import SCRATCH_BYTES
from tests.support.cuda import HANDLES, LEAF, FakeRuntime, FakeStream

_P, _N, _I = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int
_OLD = ctypes.CFUNCTYPE(_I, _P, _P, _P, _N, _P, _P, _N, _P, _P)
_NEW = ctypes.CFUNCTYPE(_I, _P, _P, _P, _N, _P, _P, _N, _P)
_LOOK = ctypes.CFUNCTYPE(_I, ctypes.c_char_p, _P, _I, ctypes.c_uint64, _P)
_NAME = ctypes.CFUNCTYPE(_I, _I, _P)
INVALID_VALUE, NOT_FOUND = 1, 500


class FakeDriver:
    """``versions``: the cudaVersion values cuGetProcAddress knows the batch call for."""

    def __init__(
        self,
        fake: FakeRuntime,
        versions: Sequence[int] = (12080, 13000),
        *,
        fail_call: int = -1,
    ) -> None:
        self._fake, self._versions, self._fail = fake, versions, fail_call
        self._names = ctypes.create_string_buffer(b"CUDA_ERROR_INVALID_VALUE")
        self.calls: list[int] = []  # copies of each call
        self.old, self.new = _OLD(self._old), _NEW(self._new)
        self.lib = SimpleNamespace(
            cuGetProcAddress_v2=_LOOK(self._look), cuGetErrorName=_NAME(self._name)
        )

    def _look(self, symbol: bytes, out: int, version: int, flags: int, found: int) -> int:
        known = symbol == b"cuMemcpyBatchAsync" and version in self._versions and flags == 0
        ctypes.c_int.from_address(found).value = 0 if known else 1
        entry = {12080: self.old, 13000: self.new}.get(version) if known else None
        address = ctypes.cast(entry, _P).value if entry is not None else 0
        ctypes.c_uint64.from_address(out).value = address or 0
        return 0 if known else NOT_FOUND

    def _name(self, status: int, out: int) -> int:
        if status != INVALID_VALUE:
            return INVALID_VALUE
        ctypes.c_uint64.from_address(out).value = ctypes.addressof(self._names)
        return 0

    def _old(self, dsts: int, srcs: int, sizes: int, count: int, *rest: Any) -> int:
        attributes, indices, sets, failed, stream = rest
        status = self._batch(dsts, srcs, sizes, count, attributes, indices, sets, stream)
        if status:
            ctypes.c_uint64.from_address(failed).value = 3
        return status

    def _new(self, dsts: int, srcs: int, sizes: int, count: int, *rest: Any) -> int:
        return self._batch(dsts, srcs, sizes, count, *rest)

    def _batch(
        self, dsts: int, srcs: int, sizes: int, count: int, attrs: int, idx: int, sets: int,
        stream: int | None,
    ) -> int:  # fmt: skip
        """Checks what cuda.h demands; then the copies, in any order among themselves."""
        self.calls.append(count)
        name = {v: k for k, v in HANDLES.items()}.get(stream or 0)
        order, *hints, flags = struct.unpack("<6I", ctypes.string_at(attrs, 24))
        first = ctypes.c_uint64.from_address(idx).value
        if name is None or order != 1 or any(hints) or flags > 1 or first or sets != 1:
            return INVALID_VALUE
        if not count or len(self.calls) - 1 == self._fail:
            return INVALID_VALUE
        table = [np.frombuffer(ctypes.string_at(a, 8 * count), np.uint64).tolist() for a in
                 (dsts, srcs, sizes)]  # fmt: skip
        copies = list(zip(*table, strict=True))
        random.Random(len(self.calls)).shuffle(copies)
        for target, source, nbytes in copies:
            self._fake.push_copy(name, partial(ctypes.memmove, target, source, nbytes))
        return 0


class FakeKernels:
    """KernelMover's contract in Python. ``wrong``: plants a fault, see the code."""

    name = "triton"
    checks = True

    def __init__(self, fake: FakeRuntime, wrong: str = "") -> None:
        self._fake, self.wrong = fake, wrong
        self._busy = threading.Lock()
        self.closed = False

    def copy(
        self,
        runs: Sequence[Run],
        arena: int,
        to_device: bool,
        stream: FakeStream,
        check: LeafCheck | None = None,
    ) -> None:
        if not self._busy.acquire(blocking=False):
            self._fake.violations.append("two threads in one kernel mover")
            return
        try:
            if self.wrong == "raises":
                raise RuntimeError("planted: launch failure")
            self._fake.note_direction(to_device, stream)
            if check is not None and to_device:
                low = check.shard + check.first * LEAF
                high = low + check.count * LEAF
                if not all(low <= r.offset and r.offset + r.nbytes <= high for r in runs):
                    self._fake.violations.append("a checked load moves unchecked bytes")
            self._fake.push_copy(stream, partial(self._run, list(runs), arena, to_device, check))
        finally:
            self._busy.release()

    def _run(self, runs: list[Run], arena: int, up: bool, check: LeafCheck | None) -> None:
        if check is not None and not up:
            ctypes.memset(arena + check.shard, 0, check.shard_bytes)
        if check is not None and up:
            self._compare(arena, check)
        for address, offset, nbytes in runs[1:] if self.wrong == "skips" else runs:
            extra = 1 if self.wrong == "spills" else 0
            ends = (address, arena + offset) if up else (arena + offset, address)
            ctypes.memmove(*ends, nbytes + extra)
        if check is not None and not up:
            hashes = _leaves(arena + check.shard, check.shard_bytes, check.seed)
            if self.wrong == "hash":
                hashes[-1] ^= np.uint64(1)
            ctypes.memmove(check.leaves, hashes.ctypes.data, 8 * len(hashes))

    def _compare(self, arena: int, check: LeafCheck) -> None:
        at = arena + check.shard + check.first * LEAF
        found = _leaves(at, check.count * LEAF, check.seed)
        want = np.frombuffer(
            ctypes.string_at(check.leaves + 8 * check.first, 8 * check.count), np.uint64
        )
        counter = ctypes.c_int32.from_address(check.bad)
        if self.wrong != "blind":
            counter.value += int((found != want).sum())

    def close(self) -> None:
        self.closed = True


def _leaves(address: int, nbytes: int, seed: int) -> Any:
    key = seed.to_bytes(8, "little") + bytes(8)
    return _core.leaf_checksums(ctypes.string_at(address, nbytes), key).copy()


class HostBuffer:
    """ "Device" memory of StagedMover."""

    def __init__(self, nbytes: int, stream: Any) -> None:
        self._bytes = np.full(nbytes + 256, 0xAB, np.uint8)
        self._at = -self._bytes.ctypes.data % 256
        self._nbytes = nbytes

    def data_ptr(self) -> int:
        return self._bytes.ctypes.data + self._at

    def numel(self) -> int:
        return self._nbytes


def every_mover(fake: FakeRuntime, piece_bytes: int, **driver: Any) -> list[Any]:
    """A set for one direction, over the fakes."""
    batch = find_batch_copy(FakeDriver(fake, **driver).lib)
    assert batch is not None
    kernels = FakeKernels(fake)
    staged = StagedMover(kernels, fake, HostBuffer, piece_bytes)
    return [PlainMover(fake), BatchMover(batch), staged, kernels]


def mover_set(fake: FakeRuntime, only: str = "", **driver: Any) -> MoverSet:
    """All movers from the start; ``only``: the one to use."""
    load, store = (every_mover(fake, fake.piece_bytes, **driver) for _ in range(2))
    return MoverSet(PlainMover(fake), Prepared(load, store), only=only)


class FakeScratch:
    """trials.Scratch over a FakeRuntime. ``model(mover name)``: seconds it says a copy took."""

    def __init__(self, fake: FakeRuntime) -> None:
        self._fake = fake
        self._device = np.zeros(SCRATCH_BYTES, np.uint8)
        self.host_bytes = np.zeros(SCRATCH_BYTES, np.uint8)
        self.device, self.host = self._device.ctypes.data, self.host_bytes.ctypes.data
        self.stream = FakeStream("scratch")
        self.took = 1e-3

    def put(self, data: Any) -> None:
        self._device[: len(data)] = data

    def get(self, nbytes: int) -> Any:
        return self._device[:nbytes].copy()

    def elapsed(self, enqueue: Any) -> float:
        try:
            enqueue()
        finally:
            self._fake.drain(self.stream)
        return self.took
