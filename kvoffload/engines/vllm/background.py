"""The scheduler half's threads: ticks while the engine takes no steps, and the files of why-miss.

Two, because files may hang: a home folder or an NVMe path that does not answer stops the reports
of ``kvoffload why``, and neither write-behind nor the watch over stalled reads nor the shadow
check.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable

from kvoffload.engines.vllm.pace import TICK_S
from kvoffload.engines.vllm.scheduler import SchedulerHalf

logger = logging.getLogger("vllm.kvoffload")

WHY_S = 0.1
JOIN_S = 2.0


class Periodic:
    """Calls ``work`` every ``every_s`` seconds on a daemon thread, and ``last`` once at its end.

    What they raise goes to ``failed``, on that thread, and ends nothing.
    """

    def __init__(
        self,
        name: str,
        every_s: float,
        work: Callable[[], None],
        failed: Callable[[Exception], None],
        last: Callable[[], None] = lambda: None,
    ) -> None:
        self._every_s = every_s
        self._work = work
        self._failed = failed
        self._last = last
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        while not self._stop.wait(self._every_s):
            self._try(self._work)
        self._try(self._last)

    def _try(self, call: Callable[[], None]) -> None:
        try:
            call()
        except Exception as exc:
            self._failed(exc)

    def stop(self) -> None:
        """The call under way is the last but ``last``; does not wait. Idempotent."""
        self._stop.set()

    def join(self, timeout_s: float) -> bool:
        """Whether the thread has ended, after at most ``timeout_s``."""
        self._thread.join(timeout_s)
        return not self._thread.is_alive()


class Background:
    """Both threads of a scheduler half, from construction until ``stop``."""

    def __init__(self, half: SchedulerHalf) -> None:
        self._half = half
        # A tick that fails costs write-behind, never the engine.
        self._tick = Periodic(
            "kvoffload-tick", TICK_S, self._ticks, lambda exc: half.guard.record("tick", exc)
        )
        self._why = Periodic(
            "kvoffload-why",
            WHY_S,
            lambda: half.why.work(time.monotonic()),
            lambda exc: half.guard.record("why", exc),
            last=half.why.close,
        )

    def _ticks(self) -> None:
        self._half.compare_sample()
        if not self._half.stepped_within(TICK_S):
            self._half.manager.tick(busy=False)

    def stop(self) -> None:
        """End both; returns when they have, after JOIN_S at most for each. Idempotent."""
        for thread in (self._tick, self._why):
            thread.stop()
        self._tick.join(JOIN_S)
        if not self._why.join(JOIN_S):
            logger.warning(
                "kvoffload: the files of `kvoffload why` hang; they are left as they are."
            )
