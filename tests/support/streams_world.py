"""A deterministic world of host threads and device streams, with a vector clock for each.

``World`` runs one thing at a time: a host thread up to its next blocking or synchronising call, or the
operation at the head of a stream. What comes next is drawn from a seeded generator, so a seed is a
schedule and a failure repeats. Host threads are real threads that hand a baton on; code under test gets
them by ``install``, which replaces ``threading``, ``queue`` and ``time`` in its modules. Time is virtual:
it creeps with every turn, jumps when nothing can run and, rarely, when something could (a machine that
stood still), so that time-outs happen in every place they can.

Each actor (thread, stream) has a vector clock. Locks, conditions, queues, events, thread start and end,
stream order and CUDA events carry clocks on; nothing else does. Two accesses are ordered only if one's
clock is contained in the other actor's clock (see streams_memory).
"""

from __future__ import annotations

import random
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

Clock = dict[str, int]
TURN_NS = 1_000
WEIGHTS = (1, 1, 8, 64)
MAX_TURNS = 3_000_000


class Abandoned(BaseException):
    """The world is being torn down: unwinds a host thread wherever it is."""


class Stuck(AssertionError):
    """Nothing can run any more, or nothing ends."""


def join(into: Clock, other: Clock) -> None:
    for name, at in other.items():
        if into.get(name, 0) < at:
            into[name] = at


@dataclass(eq=False)
class Actor:
    """Something with a clock of its own."""

    name: str
    clock: Clock = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.clock[self.name] = 1

    def release(self) -> Clock:
        """What whoever is ordered after this moment learns; later accesses are not covered."""
        out = dict(self.clock)
        self.clock[self.name] += 1
        return out


@dataclass(eq=False)
class Op:
    """One operation of a stream. ``sent``: the clock of the host thread that enqueued it."""

    what: str
    sent: Clock
    run: Callable[[], None]
    able: Callable[[], bool] | None = None


@dataclass(eq=False)
class Stream:
    actor: Actor
    world: World
    ops: deque[Op] = field(default_factory=deque)
    weight: float = 1

    def able(self, now: int) -> bool:
        return bool(self.ops) and (self.ops[0].able is None or self.ops[0].able())

    def turn(self) -> None:
        op = self.ops.popleft()
        join(self.actor.clock, op.sent)
        with self.world.acting(self.actor):
            self.world.log(op.what)
            op.run()


@dataclass(eq=False)
class HostThread:
    actor: Actor
    baton: Any = field(default_factory=threading.Lock)
    ready: Callable[[], bool] | None = None
    deadline: int | None = None
    ended: bool = False
    weight: float = 1

    def __post_init__(self) -> None:
        self.baton.acquire()  # whoever hands the turn over releases it

    def able(self, now: int) -> bool:
        if self.ended:
            return False
        late = self.deadline is not None and now >= self.deadline
        return late or self.ready is None or self.ready()


class World:
    """See the module. Made, used and ended on one thread, the actor "core"."""

    def __init__(self, seed: int, *, yields: float = 0.3, hiccups: float = 0.0005) -> None:
        self.rng = random.Random(f"world {seed}")
        self.now = 1_000_000_000
        self.turns = 0
        self.trace: list[str] | None = None
        self.wrong: list[BaseException] = []
        """What device operations and host threads raised."""
        self.dead = False
        self._yields, self._hiccups = yields, hiccups
        self._slow: tuple[str, ...] = ()
        self._names: dict[str, int] = {}
        self.main = HostThread(self.new_actor("core"))
        self.current = self.main
        self.threads = [self.main]
        self.streams: list[Stream] = []
        self._os_threads: list[threading.Thread] = []
        self._stuck = ""

    # -- actors and clocks

    def new_actor(self, name: str) -> Actor:
        n = self._names[name] = self._names.get(name, 0) + 1
        return Actor(name if n == 1 else f"{name}#{n}")

    @property
    def actor(self) -> Actor:
        return self.current.actor

    @contextmanager
    def acting(self, actor: Actor) -> Iterator[None]:
        """What follows on this thread is done by ``actor``."""
        thread = self.current
        before, thread.actor = thread.actor, actor
        try:
            yield
        finally:
            thread.actor = before

    def release(self) -> Clock:
        return self.actor.release()

    def acquire(self, clock: Clock) -> None:
        join(self.actor.clock, clock)

    def stream(self, name: str) -> Stream:
        self.streams.append(Stream(self.new_actor(name), self))
        return self.streams[-1]

    def push(self, stream: Stream, what: str, run: Callable[[], None], able: Any = None) -> None:
        """Enqueue. The host thread goes on."""
        self.maybe_yield()
        stream.ops.append(Op(what, self.release(), run, able))

    def log(self, what: str) -> None:
        if self.trace is not None:
            self.trace.append(f"{self.turns:6d} {self.actor.name:16s} {what}")

    # -- taking turns

    def maybe_yield(self) -> None:
        if self.rng.random() < self._yields:
            self.pause()

    def relax(self, turns: int) -> None:
        """Let the others go on for a while."""
        for _ in range(turns):
            self.pause()

    def pause(self, ready: Callable[[], bool] | None = None, timeout_ns: int | None = None) -> bool:
        """Let others run until ``ready``. False when the time-out came first."""
        me = self.current
        if self.dead:
            raise Abandoned
        me.ready = ready
        me.deadline = None if timeout_ns is None else self.now + timeout_ns
        self._hand_to(self._next(), me)
        if self.dead:
            raise Abandoned
        if self._stuck and me is self.main:
            raise Stuck(self._stuck)
        ok = ready is None or ready()
        me.ready = me.deadline = None
        return ok

    def _hand_to(self, chosen: HostThread, me: HostThread) -> None:
        if chosen is me:
            return
        self.current = chosen
        chosen.baton.release()
        if not me.ended:
            me.baton.acquire()

    def _next(self) -> HostThread:
        """Run stream operations until it is a host thread's turn."""
        while True:
            self.turns += 1
            self.now += TURN_NS
            if self.turns % 128 == 0:
                self._moods()
            if self.rng.random() < self._hiccups:
                self._jump()
            able: list[Any] = [a for a in (*self.threads, *self.streams) if a.able(self.now)]
            if not able:
                if self._jump():
                    continue
                self._stuck = "deadlock: " + ", ".join(
                    t.actor.name for t in self.threads if not t.ended
                )
            if self.turns > MAX_TURNS:
                self._stuck = "the schedule does not end"
            if self._stuck:
                return self.main
            chosen = self.rng.choices(able, [a.weight for a in able])[0]
            if isinstance(chosen, HostThread):
                return chosen
            try:
                chosen.turn()
            except Exception as exc:
                self.wrong.append(exc)

    def slow(self, *names: str) -> None:
        """Actors whose names hold one of these go on only when hardly anybody else can."""
        self._slow = names
        self._moods()

    def _moods(self) -> None:
        """Who is fast and who is slow for the next while."""
        for one in (*self.threads, *self.streams):
            one.weight = self.rng.choice(WEIGHTS)
            if any(name in one.actor.name for name in self._slow):
                one.weight = 1e-6

    def _jump(self) -> bool:
        """Time passes until the next time-out. False when nobody has one."""
        due = [t.deadline for t in self.threads if not t.ended and t.deadline is not None]
        if not due:
            return False
        self.now = max(self.now, min(due))
        return True

    # -- threads

    def spawn(self, name: str, body: Callable[[], None]) -> HostThread:
        thread = HostThread(self.new_actor(name))
        join(thread.actor.clock, self.release())

        def run() -> None:
            thread.baton.acquire()
            try:
                if not self.dead:
                    body()
            except Abandoned:
                pass
            except BaseException as exc:
                self.wrong.append(exc)
            thread.ended = True
            if not self.dead:
                self._hand_to(self._next(), thread)

        os_thread = threading.Thread(target=run, name=name, daemon=True)
        os_thread.start()
        self.threads.append(thread)
        self._os_threads.append(os_thread)
        return thread

    def abandon(self) -> None:
        """End every host thread wherever it is. Idempotent; from the main thread."""
        self.dead = True
        for thread, os_thread in zip(self.threads[1:], self._os_threads, strict=True):
            if not thread.ended:
                thread.baton.release()
            os_thread.join(10)
            assert not os_thread.is_alive(), f"{thread.actor.name} does not end"


@contextmanager
def install(world: World, prefix: str, *more: Any) -> Iterator[None]:
    """Give modules under ``prefix`` (and ``more``) the world's threads, queues and time."""
    from tests.support import streams_sync

    shims = streams_sync.shims(world)
    real = {"threading": threading, "time": time, "queue": sys.modules["queue"]}
    done: list[tuple[Any, str]] = []
    modules = [m for name, m in list(sys.modules.items()) if name.startswith(prefix)]
    try:
        for module in (*modules, *more):
            for name, original in real.items():
                if getattr(module, name, None) is original:
                    setattr(module, name, shims[name])
                    done.append((module, name))
        yield
    finally:
        for module, name in done:
            setattr(module, name, real[name])
