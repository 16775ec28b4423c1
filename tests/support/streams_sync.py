"""``threading``, ``queue`` and ``time`` as a ``World`` offers them: same meaning, its schedule.

Only what the code under test uses is here; anything else falls through to the real module, except what
would block or race outside of the world, which raises.
"""

from __future__ import annotations

import queue
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import Any

from tests.support.streams_world import Clock, HostThread, World, join

REFUSED = {"RLock", "Semaphore", "BoundedSemaphore", "Barrier", "Timer", "Queue", "LifoQueue"}


def ns(timeout: float | None) -> int | None:
    return None if timeout is None or timeout < 0 else int(timeout * 1e9)


class Lock:
    def __init__(self, world: World) -> None:
        self._world = world
        self._held = False
        self._clock: Clock = {}

    def acquire(self, blocking: bool = True, timeout: float = -1) -> bool:
        self._world.maybe_yield()
        if self._held and not (blocking and self._world.pause(lambda: not self._held, ns(timeout))):
            return False
        self._held = True
        self._world.acquire(self._clock)
        return True

    def release(self) -> None:
        if not self._world.dead:
            assert self._held
            join(self._clock, self._world.release())
        self._held = False

    def locked(self) -> bool:
        return self._held

    def __enter__(self) -> bool:
        return self.acquire()

    def __exit__(self, *exc: object) -> None:
        self.release()


class Condition:
    """Waiters wake in the order in which they came, as in CPython."""

    def __init__(self, world: World, lock: Lock | None = None) -> None:
        self._world = world
        self._lock = lock if lock is not None else Lock(world)
        self._waiters: deque[list[bool]] = deque()
        self.acquire, self.release = self._lock.acquire, self._lock.release

    def __enter__(self) -> bool:
        return self._lock.acquire()

    def __exit__(self, *exc: object) -> None:
        self._lock.release()

    def wait(self, timeout: float | None = None) -> bool:
        token = [False]
        self._waiters.append(token)
        self._lock.release()
        woken = self._world.pause(lambda: token[0], ns(timeout))
        if not woken:
            self._waiters.remove(token)
        self._lock.acquire()
        return woken

    def wait_for(self, predicate: Callable[[], Any], timeout: float | None = None) -> Any:
        end = None if timeout is None else self._world.now + int(timeout * 1e9)
        while not (result := predicate()):
            left = None if end is None else (end - self._world.now) / 1e9
            if left is not None and left <= 0:
                break
            self.wait(left)
        return result

    def notify(self, n: int = 1) -> None:
        for _ in range(min(n, len(self._waiters))):
            self._waiters.popleft()[0] = True

    def notify_all(self) -> None:
        self.notify(len(self._waiters))


class Event:
    def __init__(self, world: World) -> None:
        self._world = world
        self._set = False
        self._clock: Clock = {}

    def is_set(self) -> bool:
        if self._set:
            self._world.acquire(self._clock)
        return self._set

    def set(self) -> None:
        join(self._clock, self._world.release())
        self._set = True

    def clear(self) -> None:
        self._set = False

    def wait(self, timeout: float | None = None) -> bool:
        self._world.pause(lambda: self._set, ns(timeout))
        return self.is_set()


class SimpleQueue:
    def __init__(self, world: World) -> None:
        self._world = world
        self._items: deque[tuple[Any, Clock]] = deque()

    def put(self, item: Any, block: bool = True, timeout: float | None = None) -> None:
        self._world.maybe_yield()
        self._items.append((item, self._world.release()))

    def put_nowait(self, item: Any) -> None:
        self.put(item)

    def get(self, block: bool = True, timeout: float | None = None) -> Any:
        self._world.maybe_yield()
        if not self._items and not (
            block and self._world.pause(lambda: bool(self._items), ns(timeout))
        ):
            raise queue.Empty
        item, clock = self._items.popleft()
        self._world.acquire(clock)
        return item

    def get_nowait(self) -> Any:
        return self.get(block=False)

    def empty(self) -> bool:
        return not self._items

    def qsize(self) -> int:
        return len(self._items)


class Thread:
    def __init__(
        self,
        world: World,
        target: Callable[..., object],
        name: str = "thread",
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
        daemon: bool | None = None,
    ) -> None:
        self._world = world
        self._body = lambda: target(*args, **(kwargs or {}))
        self._host: HostThread | None = None
        self.name, self.daemon = name, daemon

    def start(self) -> None:
        assert self._host is None, "started twice"
        self._host = self._world.spawn(self.name, lambda: (self._body(), None)[1])

    def is_alive(self) -> bool:
        return self._host is not None and not self._host.ended

    def join(self, timeout: float | None = None) -> None:
        host = self._host
        assert host is not None, "joining a thread that was not started"
        if self._world.pause(lambda: host.ended, ns(timeout)):
            self._world.acquire(host.actor.clock)


class _Module:
    """The real module with some of its names replaced."""

    def __init__(self, real: Any, **names: Any) -> None:
        self._real = real
        self.__dict__.update(names)

    def __getattr__(self, name: str) -> Any:
        if name in REFUSED:
            raise NotImplementedError(f"streams_sync has no {self._real.__name__}.{name} yet")
        return getattr(self._real, name)


def shims(world: World) -> dict[str, Any]:
    """Stand-ins by module name."""

    def bind(cls: Any) -> Callable[..., Any]:
        return lambda *args, **kwargs: cls(world, *args, **kwargs)

    def condition(lock: Lock | None = None) -> Condition:
        return Condition(world, lock)

    def sleep(seconds: float) -> None:
        world.pause(lambda: False, int(seconds * 1e9))

    def seconds() -> float:
        return world.now / 1e9

    return {
        "threading": _Module(
            threading,
            Thread=bind(Thread),
            Lock=bind(Lock),
            Condition=condition,
            Event=bind(Event),
        ),
        "queue": _Module(queue, SimpleQueue=bind(SimpleQueue)),
        "time": _Module(
            time,
            monotonic=seconds,
            monotonic_ns=lambda: world.now,
            perf_counter=seconds,
            perf_counter_ns=lambda: world.now,
            sleep=sleep,
        ),
    }
