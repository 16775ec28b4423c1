"""An arena, a fake device and a CUDA copy engine over them, for the engine's tests."""

from __future__ import annotations

import time
from collections.abc import Callable
from itertools import count
from typing import Any

import numpy as np

from kvoffload.copy.base import OK
from kvoffload.copy.cuda import CudaCopyEngine
from tests.support.cuda import FakeRuntime, Layout, chunks, make_arena, make_layout
from tests.support.cuda_movers import mover_set

MIB = 1 << 20
JOBS = count(1)


class Rig:
    """An arena, a fake device with KV memory, an engine; slot i lies at ``offset(i)``."""

    def __init__(self, layout: Layout, *, rank: int = 0, movers: Any = "", **fake: Any) -> None:
        """``movers``: the one of all movers to use, or a MoverSet of the fake runtime."""
        self.layout = layout
        self.arena = make_arena(8 * MIB, leaf_table=bool(movers))
        self.fake = FakeRuntime(**fake)
        if isinstance(movers, str):
            movers = mover_set(self.fake, movers) if movers else None
        elif movers is not None:
            movers = movers(self.fake)
        self.memory = np.zeros(layout.total, np.uint8)
        self.arena.view(0, 8 * MIB)[:] = b"\xee" * (8 * MIB)  # what a slot held before
        self.engine = CudaCopyEngine(
            self.arena, rank, runtime=self.fake, movers=movers, piece_bytes=self.fake.piece_bytes
        )
        if movers is not None:
            assert self.engine._pinner.wait(5)  # before that all copies are plain
        base = self.memory.ctypes.data
        self.group = self.engine.add_group(
            layout.fragments(base), layout.num_blocks, layout.shard_bytes
        )

    def offset(self, slot: int) -> int:
        return slot * self.layout.shard_bytes

    def fill(self, seed: int = 1) -> np.ndarray:
        self.memory[:] = np.random.default_rng(seed).integers(0, 256, len(self.memory), np.uint8)
        return self.memory.copy()

    def begin(self, slots: list[int]) -> list[int]:
        return [self.arena.begin_fill(s, 1) for s in slots]

    def store(self, slots: list[int], generations: list[int], ids: Any) -> int:
        job = next(JOBS)
        c = chunks(slots, generations, [self.offset(s) for s in slots], ids)
        self.engine.submit_store(job, self.group, c, 0)
        return job

    def load(self, slots: list[int], gens: list[int], ids: Any, deadline_ms: int = 20_000) -> int:
        job = next(JOBS)
        c = chunks(slots, gens, [self.offset(s) for s in slots], ids)
        self.engine.submit_load(job, self.group, c, 0, deadline_ms)
        return job

    def done(self, job: int) -> Any:
        assert self.engine.wait(job, 10_000), "job does not end"
        found = [d for d in self.engine.poll() if d.job == job]
        assert len(found) == 1
        self.engine.check()
        return found[0]

    def stored(self, slots: list[int], ids: Any) -> list[int]:
        """Slots filled from the memory as it is now."""
        generations = self.begin(slots)
        assert self.done(self.store(slots, generations, ids)).status == OK
        return generations

    def only_served(self, mover: str) -> bool:
        return set(self.engine.movers.served) == {mover}

    def slot_bytes(self, slot: int) -> bytes:
        return bytes(self.arena.view(self.offset(slot), self.layout.shard_bytes))

    def leaves(self, slot: int) -> list[int]:
        return self.arena.leaf_hashes(self.offset(slot), self.layout.shard_bytes).tolist()

    def close(self) -> None:
        self.engine.close()
        assert self.fake.violations == []
        assert self.fake.registered == {}
        assert self.engine.pending() == 0
        self.fake.stop()
        self.arena.close()


SMALL = make_layout([3000, 5000, 700], False, 0, 32, 4)


def soon(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < end, "does not happen"
        time.sleep(0.001)
