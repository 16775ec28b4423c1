"""One rank on a stepped device: the step harness's Rank with forwards and zeroing as stream operations."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np

from tests.support.steps_rank import KVMemory, Rank, RankOutput
from tests.support.steps_types import StepOutput
from tests.support.streams_device import CudaEvent, StreamRuntime
from tests.support.streams_memory import Cell, Region
from tests.support.streams_world import Clock


class Pages:
    """Shadow cells of one rank's KV memory: one per page."""

    def __init__(self, memory: KVMemory) -> None:
        geometry = memory.geometry
        self._rank = memory.rank
        self._base = memory.pages.ctypes.data
        self._row = memory.pages.shape[2] + geometry.pad
        self._layers, self._blocks = geometry.layers, geometry.num_blocks
        self._block_outermost = geometry.layout == "BLHNC"

    def region(self) -> Region:
        return Region(self._base, self._row * self._layers * self._blocks, self._at)

    def _at(self, offset: int, nbytes: int) -> list[Cell]:
        first, last = offset // self._row, (offset + nbytes - 1) // self._row
        assert last < self._layers * self._blocks, "a copy beyond the KV cache"
        return [("kv", self._rank, self._name(row)) for row in range(first, last + 1)]

    def _name(self, row: int) -> tuple[int, int]:
        """(block, layer)"""
        if self._block_outermost:
            return divmod(row, self._layers)
        layer, block = divmod(row, self._blocks)
        return block, layer

    def of(self, blocks: Iterable[int]) -> list[Cell]:
        return [
            ("kv", self._rank, (b, layer)) for b in sorted(set(blocks)) for layer in range(self._layers)
        ]  # fmt: skip


@dataclass
class Work:
    """One request's part of a forward, as it was when the forward was launched."""

    what: str
    group: int
    table: list[int]
    first: int  # first token attended to
    start: int
    past: Any  # digests of [first, start)
    digests: Any  # of the tokens of this step


class StreamRank(Rank):
    """A worker whose forwards are launched, not run. Its hooks act as a thread of its own."""

    def __init__(
        self, runtime: StreamRuntime, pages: Pages, zero: str, *args: Any, **kw: Any
    ) -> None:
        super().__init__(*args, **kw)
        self.runtime, self.pages, self._zero_mode = runtime, pages, zero
        self.world, self.shadow = runtime.world, runtime.shadow
        self.actor = self.world.new_actor(f"r{runtime.rank} worker")
        self._mail: list[tuple[Clock, list[int]]] = []
        self._ends: list[tuple[CudaEvent | None, Clock]] = []

    def push(self, step: StepOutput) -> None:
        super().push(step)
        self._mail.append((self.world.release(), list(getattr(step, "new_block_ids_to_zero", ()))))

    def _run(self, step: StepOutput) -> Any:
        clock, zero = self._mail.pop(0)
        mode, half = self._zero_mode, self.half
        with self.world.acting(self.actor):
            self.world.acquire(clock)
            if mode == "before":
                self._zero(zero)
            half.handle_preemptions(step.metadata)
            if mode == "after":
                self._zero(zero)
            self._update_requests(step)
            idle = half.bind(step.metadata)
            sampled = self._forward(step)
            end = self.runtime.mark() if sampled else None
            out = self._after_forward(half, sampled, idle)
            self._ends.append((end, self.world.release()))
        return out

    def _after_forward(self, half: Any, sampled: dict[str, list[int]], idle: bool) -> Any:
        if idle:
            half.clear()
            return RankOutput(sampled, set(), set(), set())
        half.start_load_kv()
        if not self._spec:
            half.wait_for_save()
        answers = half.transfer_results()
        invalid = set(half.take_invalid_blocks())
        out = RankOutput(sampled, set(answers.finished), set(answers.failed), invalid)
        out.report = half.take_report()
        if self._spec:
            half.wait_for_save()
        half.clear()
        half.check()
        return out

    def await_output(self) -> None:
        """The engine process has the step's sampled tokens: its compute is over."""
        end, clock = self._ends.pop(0)
        if end is not None:
            self.runtime.synchronize(end)
        self.world.acquire(clock)

    def _zero(self, blocks: list[int]) -> None:
        if not blocks:
            return

        def run() -> None:
            self.shadow.touch(self.pages.of(blocks), "zero", True, f"blocks {blocks}")
            self.memory.poison(blocks)

        self.runtime.compute(f"zero {blocks}", run)

    def _forward(self, step: StepOutput) -> dict[str, list[int]]:
        works: list[Work] = []
        sampled = {}
        for rid, n in step.num_scheduled_tokens.items():
            start, digests = self._inputs(rid, n)
            works += self._works(rid, start, digests)
            sampled[rid] = self._sample(rid, n, start)
        if works:
            weights = self.weights
            names = " ".join(sampled)
            self.runtime.compute(f"forward {names}", lambda: self._launch(works, weights))
        return sampled

    def _works(self, rid: str, start: int, digests: Any) -> list[Work]:
        entry = self._requests[rid]
        out = []
        for group, spec in enumerate(self.memory.specs):
            first = max(0, start - spec.window + 1) if spec.window else 0
            past = np.frombuffer(b"".join(entry.digests[first:start]), np.uint8).reshape(-1, 32)
            table = list(entry.table[group])
            out.append(Work(rid, group, table, first, start, past, digests))
        return out

    def _launch(self, works: list[Work], weights: int) -> None:
        """Write this step's KV of all requests, then attend. On the compute stream."""
        size, memory = self.memory.block_tokens, self.memory
        for w in works:
            end = w.start + len(w.digests)
            written = w.table[w.start // size : (end - 1) // size + 1]
            self.shadow.touch(self.pages.of(written), "compute", True, w.what)
            memory.write(w.group, w.table, w.start, w.digests, weights)
        for w in works:
            read = w.table[w.first // size : -(-w.start // size)]
            self.shadow.touch(self.pages.of(read), "compute", False, w.what)
            memory.verify(f"{w.what}, past", w.group, w.table, w.first, w.past, weights)
            memory.verify(f"{w.what}, step", w.group, w.table, w.start, w.digests, weights)
