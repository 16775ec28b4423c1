"""A chunk store on a ``World``'s threads.

It stands for the native chunk store, which runs on threads of its own that could not be stepped, and
keeps the rules of ``SegmentStore.put_slots`` and ``get_slots`` about slots.
"""

from __future__ import annotations

from typing import Any

from kvoffload.tiers.null import NullDone
from kvoffload.types import StoreResult
from tests.support.streams_device import StreamArena
from tests.support.streams_world import Clock, World


class Disk:
    """A chunk store that keeps whole slots by key. ``threads`` jobs go on at a time."""

    def __init__(self, world: World, arena: StreamArena, threads: int = 2) -> None:
        self._world, self._arena = world, arena
        self._held: dict[bytes, bytes] = {}
        self._jobs: list[tuple[Clock, int, int, Any]] = []
        self._done: list[tuple[Clock, NullDone]] = []
        self._open = 0
        self._closed = False
        self.gets = self.puts = 0
        for _ in range(threads):
            world.spawn("disk", self._work)

    def put_slots(self, job: int, arena: Any, keys: bytes, *arrays: Any) -> None:
        slots, generations, offsets, nbytes, _namespace, _depths = arrays
        self._enter(0, job, keys, slots, generations, offsets, nbytes)

    def get_slots(self, job: int, arena: Any, keys: bytes, *arrays: Any) -> None:
        self._enter(1, job, keys, *arrays)

    def _enter(self, kind: int, job: int, keys: bytes, s: Any, g: Any, o: Any, n: int) -> None:
        parts = [keys[i : i + 16] for i in range(0, len(keys), 16)]
        items = list(zip(parts, s.tolist(), g.tolist(), o.tolist(), strict=True))
        self._open += 1
        self._jobs.append((self._world.release(), kind, job, (items, n)))

    def check(self) -> None:
        """Raise AssertionError where a job was answered that was never submitted."""
        assert self._open >= 0, "more answers than jobs"

    def _work(self) -> None:
        while True:
            self._world.pause(lambda: bool(self._jobs) or self._closed)
            if not self._jobs:
                return
            clock, kind, job, (items, nbytes) = self._jobs.pop(0)
            self._world.acquire(clock)
            results = bytearray()
            for item in items:
                self._world.pause()
                results.append((self._get if kind else self._put)(*item, nbytes))
            done = NullDone(job, kind, bytes(results), results.count(0) * nbytes, 1_000_000)
            self._done.append((self._world.release(), done))
            self._open -= 1

    def _put(self, key: bytes, slot: int, generation: int, offset: int, nbytes: int) -> int:
        self.puts += 1
        self._arena.touch(offset, nbytes, "disk", False, f"put slot {slot}")
        self._held[key] = bytes(self._arena.real.view(offset, nbytes))
        return int(StoreResult.OK)

    def _get(self, key: bytes, slot: int, generation: int, offset: int, nbytes: int) -> int:
        self.gets += 1
        arena = self._arena
        arena.touch(offset, nbytes, "disk", True, f"get slot {slot}")
        arena.real.view(offset, nbytes)[:] = self._held[key]
        self._world.pause()
        arena.hash_leaves(offset, nbytes, key, kind="disk")
        arena.fill_done(slot, generation)
        return int(StoreResult.OK)

    def poll(self) -> list[NullDone]:
        done, self._done = self._done, []
        for clock, _ in done:
            self._world.acquire(clock)
        return [d for _, d in done]

    def wait(self, job: int, timeout_ms: int) -> bool:
        return self._world.pause(lambda: not self._open, timeout_ms * 1_000_000)

    def busy(self) -> bool:
        return bool(self._open)

    def contains(self, keys: bytes) -> bytes:
        return bytes(keys[i : i + 16] in self._held for i in range(0, len(keys), 16))

    def delete(self, keys: bytes) -> int:
        parts = [keys[i : i + 16] for i in range(0, len(keys), 16)]
        return sum(self._held.pop(key, None) is not None for key in parts)

    def flush(self, timeout_ms: int) -> bool:
        return not self._open

    def stats(self) -> dict[str, int | float]:
        return {"entries": len(self._held), "bytes_used": 0, "bytes_max": 1 << 40}

    def close(self) -> None:
        self._closed = True
