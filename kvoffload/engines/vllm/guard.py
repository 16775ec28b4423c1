"""Guards around hook bodies: an exception of ours never reaches the engine.

vLLM turns any exception in a connector hook into EngineDeadError for all requests. Each hook body
therefore runs inside ``guarded``: the exception is logged once per hook and kind with its
traceback, counted always, and the hook's fallback answers instead. Fallbacks must be safe on their
own: see the table in docs/request-lifecycle.md.

Tests plant exceptions with the environment variable ``KVOFFLOAD_TEST_FAULTS`` (JSON:
``{"role.hook": n}`` raises on the first n calls of the hook, -1 on every call, a fraction below 1
on the first call and then on that share, the same calls in every run). The same variable carries
the worker's faults that are no hooks: ``worker.copy_fail_every`` and ``worker.copy_fail_rank``,
``worker.corrupt_every``.
"""

from __future__ import annotations

import functools
import json
import logging
import os
import random
import threading
from collections.abc import Callable
from typing import Any, TypeVar

logger = logging.getLogger("vllm.kvoffload")
T = TypeVar("T")


class InjectedFault(RuntimeError):
    """Raised on purpose by a test."""


class HookGuard:
    """Counts and logs hook failures of one connector role. ``record`` and ``take_errors``: any
    thread (background.py); the rest: the owning thread, or before there are others."""

    def __init__(self, role: str) -> None:
        self.role = role
        self.errors: dict[str, int] = {}
        self._logged: set[tuple[str, str]] = set()
        self._lock = threading.Lock()  # of both
        planted = os.environ.get("KVOFFLOAD_TEST_FAULTS")
        self._faults: dict[str, float] = json.loads(planted) if planted else {}
        self._draws: dict[str, random.Random] = {}

    def maybe_fault(self, hook: str) -> None:
        """Raise a planted fault, if one is due."""
        if not self._faults:
            return
        left = self._faults.get(f"{self.role}.{hook}", 0)
        if not left or (0 < left < 1 and not self._drawn(hook, left)):
            return
        if left >= 1:
            self._faults[f"{self.role}.{hook}"] = left - 1
        raise InjectedFault(f"planted in {self.role}.{hook}")

    def _drawn(self, hook: str, share: float) -> bool:
        # The first call always: some hooks run once or twice in an engine's life.
        draw = self._draws.get(hook)
        if draw is None:
            self._draws[hook] = random.Random(f"{self.role}.{hook}")
            return True
        return draw.random() < share

    def planted(self, fault: str, default: int = 0) -> int:
        """Value of a planted fault that is no hook."""
        return int(self._faults.get(f"{self.role}.{fault}", default))

    def record(self, hook: str, exc: BaseException) -> None:
        """Count an exception; log it the first time this hook fails with this kind."""
        mark = (hook, type(exc).__name__)
        with self._lock:
            self.errors[hook] = self.errors.get(hook, 0) + 1
            first = mark not in self._logged
            self._logged.add(mark)
        if first:
            logger.error(
                "kvoffload: %s hook %s failed and was skipped (%s: %s); requests go on without "
                "the cache. Further failures of this kind are only counted.",
                self.role, hook, type(exc).__name__, exc, exc_info=exc,
            )  # fmt: skip

    def take_errors(self) -> dict[str, int]:
        """Failures by hook since the last call."""
        with self._lock:
            errors, self.errors = self.errors, {}
        return errors


def guarded(fallback: Callable[..., Any]) -> Callable[[Callable[..., T]], Callable[..., T]]:
    """Run a method under ``self.guard``; on an exception answer ``fallback(self, *args)``."""

    def wrap(body: Callable[..., T]) -> Callable[..., T]:
        name = body.__name__

        @functools.wraps(body)
        def run(self: Any, *args: Any, **kwargs: Any) -> T:
            try:
                self.guard.maybe_fault(name)
                return body(self, *args, **kwargs)
            except Exception as exc:  # the engine must survive anything of ours
                self.guard.record(name, exc)
            try:
                return fallback(self, *args, **kwargs)  # type: ignore[no-any-return]
            except Exception as exc:
                self.guard.record(name + ".fallback", exc)
                raise

        return run

    return wrap
