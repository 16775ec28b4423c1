"""The guard around hook bodies: what it counts is exact, whichever thread fails."""

from __future__ import annotations

import logging
import threading
import time
from typing import Any

import pytest

from kvoffload.engines.vllm.guard import HookGuard


class Slow(dict[str, int]):
    """Lets other threads run between looking a count up and putting it back."""

    def get(self, key: str, default: Any = None) -> Any:
        found = super().get(key, default)
        time.sleep(0.002)
        return found


def test_failures_of_several_threads_are_all_counted(caplog: pytest.LogCaptureFixture) -> None:
    """Ticks and why-miss record from threads of their own while the scheduler takes the counts."""
    caplog.set_level(logging.CRITICAL, "vllm.kvoffload")
    guard, each = HookGuard("scheduler"), 20

    def fail() -> None:
        for _ in range(each):
            guard.record("tick", ValueError("planted"))

    threads = [threading.Thread(target=fail) for _ in range(3)]
    guard.errors = Slow()
    for thread in threads:
        thread.start()
    time.sleep(0.01)
    taken = guard.take_errors()
    for thread in threads:
        thread.join()
    assert taken["tick"] + guard.take_errors()["tick"] == 3 * each
