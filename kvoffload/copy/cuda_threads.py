"""Start and end of the CUDA copy engine: host threads, stage by stage, and what else to close."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

LINGER_S = 0.1
"""How long ``stop`` waits for a thread that may linger."""


@dataclass(frozen=True, slots=True)
class _Stage:
    threads: list[threading.Thread]
    inbox: Any  # where it gets its work; None: somebody else tells it to end
    may_linger: bool


class HostThreads:
    """Made, used and stopped on the worker's main thread. ``enter``: called first in each thread.

    Daemons: a hung device must not keep the process from ending.
    """

    def __init__(self, enter: Callable[[], None]) -> None:
        self._enter = enter
        self._up: queue.SimpleQueue[Exception | None] = queue.SimpleQueue()
        self._stages: list[_Stage] = []

    def add(
        self,
        name: str,
        body: Callable[[], None],
        inbox: Any = None,
        *,
        count: int = 1,
        may_linger: bool = False,
    ) -> None:
        """Start ``count`` threads that run ``body``. ``inbox``: a queue on which None ends one.

        ``may_linger``: when stopped it may still wait for the device, and touches nothing then.
        """
        threads = [self._start(name, body) for _ in range(count)]
        self._stages.append(_Stage(threads, inbox, may_linger))

    def _start(self, name: str, body: Callable[[], None]) -> threading.Thread:
        def run() -> None:
            try:
                self._enter()
            except Exception as exc:
                self._up.put(exc)
                return
            self._up.put(None)
            body()

        thread = threading.Thread(target=run, name=f"kvo-cuda-{name}", daemon=True)
        thread.start()
        return thread

    def refusal(self) -> Exception | None:
        """Wait until all have entered; the first exception, None where there was none."""
        count = sum(len(stage.threads) for stage in self._stages)
        failed = [exc for _ in range(count) if (exc := self._up.get()) is not None]
        return failed[0] if failed else None

    def stop(self, end: float) -> list[str]:
        """End them in the order in which they were added, until ``end`` (time.monotonic).

        The names of those that are still at it; a thread that may linger is not among them.
        """
        alive = []
        for stage in self._stages:
            for _ in stage.threads if stage.inbox is not None else ():
                stage.inbox.put(None)
            for thread in stage.threads:
                left = max(end - time.monotonic(), 0)
                thread.join(min(left, LINGER_S) if stage.may_linger else left)
            if not stage.may_linger:
                alive += [t.name for t in stage.threads if t.is_alive()]
        return alive


def close_all(parts: Mapping[str, Callable[[], bool | None]]) -> str:
    """Close each, in order, whatever becomes of the others.

    A line about those that answered False (they do not end) or raised, empty if none did.
    """
    wrong = []
    for name, close in parts.items():
        try:
            if close() is False:
                wrong.append(f"{name} does not end")
        except Exception as exc:  # a device that is lost refuses everything
            wrong.append(f"{name}: {type(exc).__name__}: {exc}")
    return "; ".join(wrong)
