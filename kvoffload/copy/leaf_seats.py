"""Pinned seats for the checksums of items on the device: leaf hashes and a count of bad leaves.

A store's kernel writes the hashes into a seat, and the host moves them to the arena's leaf table
once it knows that the slot is still this store's. A load's expected hashes are put there before the
kernel reads them.
"""

from __future__ import annotations

import ctypes
import logging
import mmap
import threading
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from kvoffload.copy.cuda_runtime import Runtime, unregister_all

logger = logging.getLogger("vllm.kvoffload")

_POOL_BYTES = 4 << 20
_FEWEST, _MOST = 16, 512
_LINE = 64


@dataclass(frozen=True, slots=True, eq=False)
class Seat:
    """``leaves`` and ``bad`` are views of pinned memory at the device-visible addresses."""

    leaves: npt.NDArray[np.uint64]
    bad: npt.NDArray[np.int32]
    leaves_at: int
    bad_at: int


@dataclass(slots=True)
class _Pool:
    memory: mmap.mmap
    address: int
    total: int
    free: list[Seat] = field(default_factory=list)


class SeatPools:
    """One pool per shard size, made when first asked for. Any thread; close after the copies."""

    def __init__(self, runtime: Runtime) -> None:
        self._runtime = runtime
        self._mu = threading.Lock()
        self._pools: dict[int, _Pool | None] = {}  # by leaves of a shard; None: refused
        self.missed = 0
        """Times no seat was free: those items were hashed by the host."""

    def take(self, leaves: int) -> Seat | None:
        """A seat for a shard of so many leaves, ``bad`` 0. None when none is free or can be had."""
        with self._mu:
            if leaves not in self._pools:
                self._pools[leaves] = self._make(leaves)
            pool = self._pools[leaves]
            if pool is None or not pool.free:
                self.missed += 1
                return None
            seat = pool.free.pop()
        seat.bad[0] = 0
        return seat

    def give(self, seat: Seat) -> None:
        """Put a seat back that no copy on the device uses any more."""
        with self._mu:
            pool = self._pools[len(seat.leaves)]
            assert pool is not None
            pool.free.append(seat)

    def close(self) -> None:
        """Unpin. Idempotent. Seats that are out stay readable. Raises like unregister_all."""
        with self._mu:
            addresses = [pool.address for pool in self._pools.values() if pool is not None]
            self._pools.clear()
            unregister_all(self._runtime, addresses)

    def check(self) -> None:
        """Raise AssertionError on a broken invariant."""
        with self._mu:
            for leaves, pool in self._pools.items():
                if pool is not None:
                    at = {s.leaves_at for s in pool.free}
                    assert len(at) == len(pool.free) <= pool.total, f"seats of {leaves}: twice free"

    def _make(self, leaves: int) -> _Pool | None:
        stride = -(-8 * leaves // _LINE) * _LINE + _LINE
        count = min(_MOST, max(_FEWEST, _POOL_BYTES // stride))
        memory = mmap.mmap(-1, -(-count * stride // mmap.PAGESIZE) * mmap.PAGESIZE)
        address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
        try:
            self._runtime.host_register(address, len(memory))
        except Exception as exc:  # the driver's answer decides, whatever its type
            logger.warning(
                "kvoffload: no pinned memory for checksums (%s: %s); the host computes them.",
                type(exc).__name__, exc,
            )  # fmt: skip
            return None
        pool = _Pool(memory, address, count)
        for at in range(0, count * stride, stride):
            bad = at + stride - _LINE
            hashes = np.frombuffer(memory, np.uint64, leaves, at)
            counter = np.frombuffer(memory, np.int32, 1, bad)
            pool.free.append(Seat(hashes, counter, address + at, address + bad))
        return pool
