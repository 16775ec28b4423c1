"""Stream-order proof: both connector halves and the real CUDA copy engine over a stepped device.

``StreamEngine`` is the step harness (steps.py) on a ``World``: forwards, zeroing and copies are operations
of streams that run when a seeded schedule says so, the engine's host threads are stepped with them, and
every access to KV pages and arena bytes goes through the race checker. It turns red on an access that
nothing orders after an earlier conflicting one, besides everything that the step harness turns red on.

What it shows: whatever the timing, the connector asks for enough order. What it cannot show: that a
driver's streams and events order as modelled here, which tests/gpu looks at on a device.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any

from kvoffload import _core
from kvoffload.copy.cuda import CudaCopyEngine
from kvoffload.engines.vllm import worker as worker_module
from kvoffload.engines.vllm.worker import WorkerHalf
from kvoffload.types import CacheLayout
from tests.support import steps
from tests.support.steps import MiniEngine, Options
from tests.support.steps_blocks import TokenChain
from tests.support.steps_random import Driver
from tests.support.steps_rank import Geometry, KVMemory
from tests.support.streams_device import StreamArena, StreamRuntime
from tests.support.streams_disk import Disk
from tests.support.streams_memory import Shadow
from tests.support.streams_movers import NotedSeats, movers
from tests.support.streams_rank import Pages, StreamRank
from tests.support.streams_world import World, install

FENCE_MS = 50


@dataclass(frozen=True)
class StreamOptions(Options):
    """``zero``: "" (vLLM's default for uniform caches), "before" or "after" handle_preemptions, as model
    runners V2 and V1 do. ``runtime``: a StreamRuntime, or one with a bug in it."""

    zero: str = ""
    disk: bool = False
    runtime: type[StreamRuntime] = StreamRuntime
    mover: str = ""  # the one used besides plain copies: "staged" or "triton"
    fail_chance: float = 0.0  # of each CUDA call on a side stream
    trace: bool = False


class NotedEngine(CudaCopyEngine):
    """The real engine; the arena is told which bytes a store is to fill."""

    def __init__(
        self,
        arena: StreamArena,
        rank: int,
        runtime: StreamRuntime,
        layout: CacheLayout,
        mover: str,
    ) -> None:
        super().__init__(arena, rank, runtime=runtime, movers=movers(runtime, mover))
        self._seats = NotedSeats(runtime)
        self._noted, self._layout, self._of_rank = arena, layout, rank
        self._world = runtime.world
        self.loads = self.stores = 0

    def submit_store(self, job: int, group: int, copies: Any, shard_offset: int) -> None:
        g = self._layout.groups[copies.group]
        used = copies.block_ids.shape[1] * g.block_bytes
        for slot, offset in zip(copies.slots.tolist(), copies.offsets.tolist(), strict=True):
            start = offset + shard_offset
            self._noted.expect(slot, self._of_rank, range(start, start + used))
        self.stores += len(copies)
        super().submit_store(job, group, copies, shard_offset)

    def submit_load(self, job: int, group: int, copies: Any, shard: int, deadline_ms: int) -> None:
        self.loads += len(copies)
        super().submit_load(job, group, copies, shard, deadline_ms)

    def inject(self, every: int) -> None:
        """No faults here."""

    def flush(self) -> None:
        """Let the device finish what it was given."""
        while self.pending():
            self._world.relax(8)


class _Half:
    """The scheduler half, given the step's zeroing list as vLLM fills it in."""

    def __init__(self, half: Any, engine: StreamEngine) -> None:
        self._half, self._engine = half, engine

    def __getattr__(self, name: str) -> Any:
        return getattr(self._half, name)

    def build_connector_meta(self, out: Any) -> Any:
        taken = self._engine.taken_blocks()
        if self._engine.stream_options.zero:
            out.new_block_ids_to_zero = taken
        orders = self._half.build_connector_meta(out)
        self._engine.fenced += len(orders.fence)
        return orders


class StreamEngine(MiniEngine):
    """Make it inside ``stepped``, which ends its world whatever happens."""

    def __init__(self, options: StreamOptions, world: World) -> None:
        self.stream_options = options
        self.world, self.shadow = world, Shadow(world)
        self._rng = world.rng
        self._taken: list[int] = []
        self.disk: Disk | None = None
        self.fenced = 0  # stores that a step had to wait for
        self.aborted_loads = 0
        world.trace = [] if options.trace else None
        nvme = tempfile.gettempdir() if options.disk else None  # a folder that is there: unused
        arenas = SimpleNamespace(create=self._create)
        core = SimpleNamespace(Arena=arenas, SegmentStore=self._open_disk)
        before, steps._core = steps._core, core  # type: ignore[assignment]
        try:
            super().__init__(replace(options, nvme=nvme), attach=lambda path, inode: self.arena)
        finally:
            steps._core = before
        self.arena.where = self._slot_bytes
        self.scheduler.half = _Half(self.scheduler_half, self)
        take = self.pool.take
        self.pool.take = lambda n: self._note_taken(take(n))  # type: ignore[method-assign]

    def _create(self, *args: Any) -> StreamArena:
        return StreamArena(self.world, self.shadow, _core.Arena.create(*args))

    def _open_disk(self, *args: Any, **kwargs: Any) -> Disk:
        self.disk = Disk(self.world, self.arena)
        return self.disk

    def _slot_bytes(self, slot: int) -> range:
        alloc = self.manager._pool.alloc
        start = alloc.offset(slot)
        return range(start, start + alloc.slot_bytes[alloc._class_of[alloc.extent_of(slot)]])

    def _note_taken(self, blocks: list[int]) -> list[int]:
        self._taken += blocks
        return blocks

    def taken_blocks(self) -> list[int]:
        """Blocks allocated since the last step was built."""
        out, self._taken = self._taken, []
        return out

    def _rank(self, rank: int) -> StreamRank:
        o = self.stream_options
        geometry = Geometry(o.blocks, o.layers, o.token_bytes, o.kv_layout, o.pad)
        memory = KVMemory(geometry, o.groups, 0 if o.replicated else rank)
        pages = Pages(memory)
        if o.replicated:  # same bytes, not the same memory
            pages._rank = rank
        runtime = o.runtime(self.world, self.shadow, self.arena, rank, pages.region())
        runtime.fail_chance = o.fail_chance

        def make(arena: Any) -> NotedEngine:
            engine = NotedEngine(arena, rank, runtime, self.layout, o.mover)
            self.engines.append(engine)  # type: ignore[arg-type]
            return engine

        half = WorkerHalf(self.layout, rank, attach=self.attach, make_engine=make)
        for group in self.layout.groups:
            half.register_group(group.group, memory.fragments(), o.blocks)
        return StreamRank(
            runtime,
            pages,
            o.zero,
            half,
            memory,
            salt_root=lambda rid: TokenChain([], self.known[rid].salt, 1).last(),
            spec_tokens=o.spec_tokens,
            pickled=o.pickled,
        )

    # -- stepping

    def step(self) -> bool:
        self.world.log(f"-- step {self.steps + 1}")
        more = super().step()
        self.world.relax(self._rng.choice((0, 0, 2, 8, 30)))
        self.shadow.raise_first()
        if self.world.wrong:
            raise self.world.wrong[0]
        return more

    def _book(self) -> None:
        for rank in self.ranks:
            if not rank.outputs:
                rank.run_next()
            rank.await_output()  # type: ignore[attr-defined]
        super()._book()

    def idle_tick(self) -> None:
        """What the connector's tick thread does between steps."""
        self.world.relax(4)
        self.manager.tick(False)

    def settle(self, rounds: int = 2000) -> None:
        for _ in range(rounds):
            self.run()
            self.clock.now += 0.05
            self.idle_tick()
            if not self.manager.store_inflight():
                return
        raise AssertionError("stores do not settle")

    def _compute_is_over(self) -> None:
        for rank in self.ranks:
            rank.runtime.drain(rank.runtime.compute_stream)  # type: ignore[attr-defined]

    def audit_hbm(self) -> int:
        self._compute_is_over()
        return super().audit_hbm()

    def audit_dram(self) -> int:
        for engine in self.engines:
            engine.flush()
        self.clock.now += 120.0  # slots kept from reuse for a while leave no room for a look
        return super().audit_dram()

    def _acquire(self, *args: Any) -> Any:
        while self.disk is not None and self.disk.busy():
            self.world.relax(8)
        self.manager.tick(False)  # slots of reads that nobody waited for are free now
        return super()._acquire(*args)

    def finish(self) -> None:
        super().finish()
        self.shadow.raise_first()
        assert not self.world.wrong, self.world.wrong
        errors = sum(e.errors for e in self.engines)  # type: ignore[attr-defined]
        planted = sum(r.runtime.failed for r in self.ranks)  # type: ignore[attr-defined]
        assert errors <= planted, f"{errors} exceptions on the engine's threads, {planted} planted"


class StreamDriver(Driver):
    """The step harness's random life, plus moments in which only the device goes on."""

    def __init__(self, engine: StreamEngine) -> None:
        self.engine, self.faults = engine, False
        self.live = []
        self.actions = [
            self.add, self.add, self.add, self.steps, self.steps, self.steps, self.abort, self.wait,
            self.reset_hbm, self.reset_all, self.weights, self.tick, self.late,
        ]  # fmt: skip

    def abort(self, how: int) -> None:
        engine = self.engine
        assert isinstance(engine, StreamEngine)
        loading = engine.loading()
        super().abort(how)
        engine.aborted_loads += any(engine.known[r.request_id].aborted for r in loading)

    def tick(self, how: int) -> None:
        engine = self.engine
        assert isinstance(engine, StreamEngine)
        engine.world.relax(how % 40)
        engine.idle_tick()

    def late(self, how: int) -> None:
        if how % 4 == 0:
            super().late(how)


@contextmanager
def stepped(options: StreamOptions) -> Iterator[StreamEngine]:
    """An engine in a world of its own."""
    world = World(options.seed)
    fence, worker_module.FENCE_MS = worker_module.FENCE_MS, FENCE_MS
    try:
        with install(world, "kvoffload.copy.", steps):
            try:
                yield StreamEngine(options, world)
            finally:
                world.abandon()
    finally:
        worker_module.FENCE_MS = fence


def drive(options: StreamOptions, script: Sequence[tuple[int, int]]) -> StreamEngine:
    """Run a script to its end with every check there is. Raises RaceFound, AssertionError."""
    with stepped(options) as engine:
        StreamDriver(engine).run(script)
        engine.close()
    return engine
