"""No schedule of streams and threads lets two conflicting accesses go unordered; planted bugs do.

The real connector halves and the real CUDA copy engine run on a stepped device (tests/support/streams.py)
through random lives: prefills, decodes, preemptions, block reuse, aborts while loading, loads, stores,
resets, NVMe, one or two steps in flight. Each life must pass the race checker and every check of the
step harness. Then one rule at a time is taken out, and the checker must name the race that follows.
"""

from __future__ import annotations

import logging
import random
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import pytest

pytest.importorskip("torch")
pytest.importorskip("kvoffload._core")

from kvoffload.core.index import Entry
from kvoffload.core.manager import Manager
from kvoffload.engines.vllm.orders import Fence
from kvoffload.engines.vllm.worker import WorkerHalf
from kvoffload.types import Tier
from tests.support.steps import tokens
from tests.support.steps_blocks import GroupSpec
from tests.support.streams import StreamEngine, StreamOptions, drive, stepped
from tests.support.streams_device import CudaEvent, StreamRuntime
from tests.support.streams_memory import RaceFound, Shadow, Sink
from tests.support.streams_world import Stream, Stuck, World, install

Patch = pytest.MonkeyPatch
FULL = (GroupSpec(),)
HYBRID = (GroupSpec(), GroupSpec(window=9))


def life(seed: int, **fixed: Any) -> tuple[StreamOptions, list[tuple[int, int]]]:
    """Options and script of one random life."""
    rng = random.Random(f"life {seed}")
    ranks = rng.choice([1, 1, 2])
    groups = rng.choice([FULL, FULL, (GroupSpec(blocks_per_chunk=3),), HYBRID])
    tight = rng.random() < 0.5 and groups is not HYBRID  # slots so big that a handful fits
    options = StreamOptions(
        seed=seed,
        groups=groups,
        ranks=ranks,
        in_flight=rng.choice([2, 2, 1]),
        blocks=rng.choice([20, 32]) * len(groups),  # small: preemptions, reuse
        budget=rng.choice([8, 32]),
        caching=rng.random() < 0.6,
        spec_tokens=rng.choice([0, 0, 2]),
        defer_alloc=rng.random() < 0.3,
        token_bytes=4096 if tight else 64,
        layers=4 if tight else 2,
        kv_layout=rng.choice(["LBHNC", "BLHNC"]),
        pad=rng.choice([0, 64]),
        replicated=ranks == 2 and rng.random() < 0.3,
        late_ranks=rng.random() < 0.5,
        disk=rng.random() < 0.5,
        mover=rng.choice(["", "staged", "triton"]),
    )
    script = [(rng.randrange(100), rng.randrange(4096)) for _ in range(40)]
    return replace(options, **fixed), script


@pytest.fixture(autouse=True)
def quiet(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.CRITICAL, "vllm.kvoffload")


# -- the real code


def tally(engine: StreamEngine) -> Counter[str]:
    counters = engine.manager.counters
    return Counter(
        loads=engine.loads_done(),
        stores=engine.stores_done(),
        preempted=engine.scheduler.preemptions,
        evicted=counters.evicted,
        fenced=engine.fenced,
        aborted_loads=engine.aborted_loads,
        resets=counters.resets,
        nvme_reads=counters.nvme_read,
        nvme_writes=counters.nvme_written,
        conflicts=engine.shadow.conflicts,
        **{
            m: sum(e.movers.served[m] for e in engine.engines)
            for m in ("plain", "staged", "triton")
        },
    )


def test_every_schedule_is_ordered() -> None:
    """Silent over many seeds, and the lives reach what they are for."""
    total: Counter[str] = Counter()
    for seed in range(60):
        total += tally(drive(*life(seed)))
    assert len(total) == 13 and min(total.values()) >= 3, total
    assert total["conflicts"] > 50_000, total


def test_failing_device_calls_leave_no_race() -> None:
    """Copies enqueued in part, events that could not be recorded."""
    refused = loads = 0
    for seed in range(1000, 1015):
        engine = drive(*life(seed, fail_chance=0.03))
        refused += sum(e.errors for e in engine.engines)  # type: ignore[attr-defined]
        loads += engine.scheduler.failed_loads
    assert refused > 30 and loads > 3


@pytest.mark.parametrize("zero", ["before", "after"])
def test_every_schedule_is_ordered_where_new_blocks_are_zeroed(zero: str) -> None:
    """Zeroing before (model runner V2) or after (V1) the hook that waits at the fence."""
    for seed in range(40):
        drive(*life(seed, zero=zero))


def test_a_seed_is_a_schedule() -> None:
    options, script = life(3, trace=True)
    traces = [drive(options, script).world.trace for _ in range(2)]
    assert traces[0] and traces[0] == traces[1]
    other = drive(replace(options, seed=4), script).world.trace
    assert other != traces[0]


# -- planted bugs


class StoreWithoutComputeEvent(StreamRuntime):
    def wait_event(self, stream: Stream, event: CudaEvent) -> None:
        if "store" not in stream.actor.name:
            super().wait_event(stream, event)


class LoadWithoutComputeEvent(StreamRuntime):
    """The thread that lets loads begin waits for nothing."""

    def synchronize(self, event: CudaEvent) -> None:
        if "kvo-cuda-begin" not in self.world.actor.name:
            super().synchronize(event)


class NobodyWaitsForCopies(StreamRuntime):
    """``synchronize`` on an end event of the side stream ``which`` returns at once."""

    which = ""

    def record(self, stream: Stream) -> CudaEvent:
        event = super().record(stream)
        event.early = self.which in stream.actor.name  # type: ignore[attr-defined]
        return event

    def synchronize(self, event: CudaEvent) -> None:
        if not event.early:  # type: ignore[attr-defined]
            super().synchronize(event)


class EarlyLoads(NobodyWaitsForCopies):
    which = "load stream"


class EarlyStores(NobodyWaitsForCopies):
    which = "store stream"


def lease_pins_nothing(patch: Patch) -> None:
    acquire = Manager.acquire

    def careless(self: Manager, *args: Any, **kwargs: Any) -> Any:
        lease = acquire(self, *args, **kwargs)
        if lease is not None:
            self.release(lease.id)
        return lease

    patch.setattr(Manager, "acquire", careless)


def filling_slots_are_free(patch: Patch) -> None:
    """A dropped store's slot goes back at once."""
    busy = Entry.busy

    def careless(self: Entry, now: float) -> bool:
        return busy(self, now) and not (
            self.source is Tier.DRAM and not self.pins and not self.io and self.hold_until <= now
        )

    patch.setattr(Entry, "busy", careless)


def no_fence(patch: Patch) -> None:
    patch.setattr(Fence, "due", lambda self, output, loads: [])


def no_fence_for_loads(patch: Patch) -> None:
    due = Fence.due
    patch.setattr(Fence, "due", lambda self, output, loads: due(self, output, ()))


def answered_while_copies_run(patch: Patch) -> None:
    answer = WorkerHalf._answer

    def early(self: Any) -> Any:
        for load in self._running.values():
            load.jobs.clear()
        return answer(self)

    patch.setattr(WorkerHalf, "_answer", early)


def compute_or_load(*pairs: str) -> list[tuple[str, frozenset[str]]]:
    """What may overwrite a block whose old bytes ``pairs`` are about."""
    return [("kv", frozenset({p, w})) for p in pairs for w in ("compute write", "load write")]


# -- where they show


def any_life(seed: int, fixed: dict[str, Any]) -> None:
    drive(*life(seed, **fixed))


def life_without_pressure(seed: int, fixed: dict[str, Any]) -> None:
    """Nothing is reused in a hurry: zeroing meets only the loads."""
    drive(*life(seed, blocks=128, groups=FULL, **fixed))


def pressure_on_the_arena(seed: int, fixed: dict[str, Any]) -> None:
    """Slots of 256 KiB, eight of them, wanted by everybody while a slow load is out."""
    options = StreamOptions(seed=seed, token_bytes=8192, layers=4, in_flight=2, budget=64, **fixed)
    with stepped(options) as engine:
        engine.ask(tokens(24))
        engine.forget_hbm()
        engine.world.slow("load stream")
        engine.add(tokens(4, 9), 60)  # the engine never waits for the load
        loaded = engine.add(tokens(24), 2)
        for i in range(1, 5):
            engine.until(engine.add(tokens(24, i), 2).is_finished)
            engine.world.relax(300)  # its stores end, the load does not
        assert loaded.loads == 1
        engine.world.slow()
        assert engine.manager.counters.evicted, "nothing was evicted"
        engine.finish()


def load_into_blocks_being_stored(seed: int, fixed: dict[str, Any]) -> None:
    options = StreamOptions(seed=seed, blocks=12, caching=False, in_flight=2, **fixed)
    with stepped(options) as engine:
        engine.ask(tokens(24))
        engine.world.slow("store stream")
        engine.until(engine.add(tokens(32, 1)).is_finished)
        again = engine.add(tokens(24), 2)
        engine.until(again.is_finished)
        assert again.loads == 1
        engine.world.slow()
        engine.finish()


@dataclass(frozen=True)
class Bug:
    """``races``: any of these (place, {kind of access, kind of access}) tells it."""

    races: list[tuple[str, frozenset[str]]]
    runtime: type[StreamRuntime] = StreamRuntime
    plant: Callable[[Patch], None] = lambda patch: None
    zero: str = ""
    mover: str = ""
    scenario: Callable[[int, Any], None] = any_life


BUGS = {
    "store without compute event": Bug(
        [("kv", frozenset({"compute write", "store read"}))], StoreWithoutComputeEvent
    ),
    "load before the zeroing of its blocks": Bug(
        [("kv", frozenset({"zero write", "load write"}))],
        LoadWithoutComputeEvent,
        zero="after",
        scenario=life_without_pressure,
    ),
    "slot reused while a load reads it": Bug(
        [("arena", frozenset({"load read", w})) for w in ("reuse write", "store write")],
        plant=lease_pins_nothing,
        scenario=pressure_on_the_arena,
    ),
    "slot reused while a store fills it": Bug(
        [("arena", frozenset({"store write", "reuse write"}))], plant=filling_slots_are_free
    ),
    "block reused before its store read it": Bug(compute_or_load("store read"), plant=no_fence),
    "block loaded into before its store read it": Bug(
        [("kv", frozenset({"store read", "load write"}))],
        plant=no_fence_for_loads,
        scenario=load_into_blocks_being_stored,
    ),
    "load reported before its end event": Bug(
        [("kv", frozenset({"load write", f"compute {how}"})) for how in ("read", "write")],
        EarlyLoads,
    ),
    "checksum seat given back before its kernel ended": Bug(
        [("seat", frozenset({"load read", "host write"}))], EarlyLoads, mover="triton"
    ),
    "load answered while its copies run": Bug(
        [("kv", frozenset({"load write", f"compute {how}"})) for how in ("read", "write")],
        plant=answered_while_copies_run,
    ),
    "store reported before its end event": Bug(
        [("arena", frozenset({"store write", w})) for w in ("hash read", "host write")],
        EarlyStores,
    ),
}


@pytest.mark.parametrize("name", BUGS)
def test_a_planted_bug_is_found(name: str, monkeypatch: Patch) -> None:
    bug = BUGS[name]
    bug.plant(monkeypatch)
    others = []
    for seed in range(30):
        try:
            bug.scenario(seed, {"runtime": bug.runtime, "zero": bug.zero, "mover": bug.mover})
        except RaceFound as found:
            if found.race.pair in bug.races:
                return
            others.append(str(found))
        except AssertionError as other:  # the step harness saw its consequence first
            others.append(f"{type(other).__name__}: {other}")
    raise AssertionError(f"{name}: not found; instead: " + "\n".join(others))


@pytest.mark.parametrize("scenario", sorted({b.scenario for b in BUGS.values()}, key=repr))
def test_a_scenario_is_silent_without_its_bug(scenario: Callable[[int, Any], None]) -> None:
    zero = "after" if scenario is life_without_pressure else ""
    for seed in range(5):
        scenario(seed, {"zero": zero})


# -- the checker itself


@pytest.fixture
def world() -> Iterator[World]:
    made = World(1, hiccups=0.0)
    yield made
    made.abandon()


CELLS = [("kv", 0, 0)]


def test_stream_order_and_events_order(world: World) -> None:
    shadow = Shadow(world)
    runtime = StreamRuntime(world, shadow, None, 0, None)
    side = runtime.stream(high_priority=True)
    runtime.compute("a", lambda: shadow.touch(CELLS, "compute", True, "a"))
    runtime.wait_event(side, runtime.mark())
    world.push(side, "b", lambda: shadow.touch(CELLS, "load", True, "b"))
    runtime.synchronize(runtime.record(side))
    shadow.touch(CELLS, "host", True, "c")
    assert shadow.races == [] and shadow.conflicts == 2


def test_what_nothing_orders_is_a_race_in_either_order() -> None:
    seen = set()
    for seed in range(12):
        world = World(seed)
        shadow = Shadow(world)
        for name in "xy":
            stream = world.stream(name)
            world.push(stream, name, partial(shadow.touch, CELLS, "compute", True, ""))
        while any(s.ops for s in world.streams):
            world.pause()
        (race,) = shadow.races
        seen.add((race.first.actor, race.second.actor))
    assert seen == {("x", "y"), ("y", "x")}


def test_an_event_covers_only_what_was_before_it(world: World) -> None:
    shadow = Shadow(world)
    runtime = StreamRuntime(world, shadow, None, 0, None)
    event = runtime.mark()
    runtime.compute("later", lambda: shadow.touch(CELLS, "compute", False, ""))
    runtime.synchronize(event)
    world.pause(lambda: not runtime.compute_stream.ops)
    shadow.touch(CELLS, "host", True, "")
    assert [r.pair for r in shadow.races] == [("kv", frozenset({"compute read", "host write"}))]


def test_reads_do_not_conflict_and_unpublished_stores_are_forgiven(world: World) -> None:
    shadow, sink = Shadow(world), Sink()
    one, two = world.new_actor("one"), world.new_actor("two")
    with world.acting(one):
        shadow.touch(CELLS, "compute", False, "")
        shadow.touch(CELLS, "store", False, "", sink)
    with world.acting(two):
        shadow.touch([("kv", 0, 0), ("kv", 0, 1)], "compute", False, "")
    assert shadow.conflicts == 0
    with world.acting(two):
        shadow.touch(CELLS, "zero", True, "")
    assert shadow.forgiven == 1 and shadow.races == []
    shadow.publish(sink)
    with pytest.raises(RaceFound, match="not ordered"):
        shadow.raise_first()


def test_queues_locks_and_joins_order_host_threads(world: World) -> None:
    import tests.support.streams_sync as sync

    shims, shadow = sync.shims(world), Shadow(world)
    box, lock = shims["queue"].SimpleQueue(), shims["threading"].Lock()

    def body() -> None:
        shadow.touch(CELLS, "host", True, "")
        box.put(1)
        with lock:
            shadow.touch([("kv", 0, 1)], "host", True, "")
        shadow.touch([("kv", 0, 2)], "host", True, "")

    thread = shims["threading"].Thread(target=body)
    thread.start()
    box.get()
    shadow.touch(CELLS, "host", True, "")
    world.pause(lambda: thread._host.ended)
    assert shadow.races == []
    with lock:
        shadow.touch([("kv", 0, 1)], "host", True, "")
    assert shadow.races == []
    shadow.touch([("kv", 0, 2)], "host", True, "")  # ended, but nobody joined it
    assert len(shadow.races) == 1
    thread.join()
    shadow.touch([("kv", 0, 2)], "host", True, "")
    assert len(shadow.races) == 1


def test_a_deadlock_is_told(world: World) -> None:
    with pytest.raises(Stuck, match="deadlock"):
        world.pause(lambda: False)


def test_the_engine_runs_on_the_worlds_threads() -> None:
    """Nothing of the copy modules is left on real threads, queues or clocks."""
    options, _ = life(0, ranks=1)
    with stepped(options) as engine:
        names = {t.actor.name.partition("#")[0] for t in engine.world.threads}
        assert {f"kvo-cuda-{n}" for n in ("begin", "load", "store", "hash", "finish")} <= names
        engine.close()


def test_install_is_undone() -> None:
    import threading

    import kvoffload.copy.cuda as cuda

    with install(World(0), "kvoffload.copy."):
        assert cuda.threading is not threading
    assert cuda.threading is threading
