"""The movers of one engine: which serves a copy, what happens when one refuses, when they come.

The plain mover is there from the start. The others are compiled, verified and timed on a background
thread (``prepare``) and join when that has ended.
"""

from __future__ import annotations

import logging
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from kvoffload.copy.calibrate import Table
from kvoffload.copy.mover import LeafCheck, Mover
from kvoffload.copy.movers import PLAIN
from kvoffload.copy.runs import Run

logger = logging.getLogger("vllm.kvoffload")


@dataclass(frozen=True, slots=True)
class Prepared:
    """What ``prepare`` brings: verified movers of each direction besides the plain one."""

    load: Sequence[Mover] = ()
    store: Sequence[Mover] = ()
    table: Table = field(default_factory=Table)


class _Serving:
    """The movers of one direction, the plain one first. Immutable."""

    def __init__(self, movers: Iterable[Mover]) -> None:
        self.by_name: Mapping[str, Mover] = {m.name: m for m in movers}
        self.names = tuple(self.by_name)

    def without(self, mover: Mover) -> _Serving:
        return _Serving(m for m in self.by_name.values() if m is not mover)


class MoverSet:
    """Any thread. A mover but the plain one is called by one thread at a time."""

    def __init__(self, plain: Mover, prepared: Prepared | None = None, *, only: str = "") -> None:
        """``only``: the name of the mover to use wherever it can be, whatever the table says."""
        assert plain.name == PLAIN and not plain.checks
        self._plain, self._only = plain, only
        self._mu = threading.Lock()
        self._locks: dict[int, threading.Lock] = {}
        # By to_device. Each is replaced, never changed: pick takes it without the lock.
        self._serving: dict[bool, _Serving] = {True: _Serving([plain]), False: _Serving([plain])}
        self._retired: list[Mover] = []
        self._table = Table()
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None
        self.served: Counter[str] = Counter()
        """Copies enqueued, by mover."""
        self.dropped: dict[str, str] = {}
        """Movers that failed a copy, and why."""
        self.refused: Counter[str] = Counter()
        """Copies with arguments that the mover does not take: our error, not the device's."""
        if prepared is not None:
            self._install(prepared)

    def prepare(
        self, enter: Callable[[], None], body: Callable[[Callable[[], bool]], Prepared]
    ) -> None:
        """Run ``body(stopped)`` on a background thread; its movers serve from when it returns.

        ``stopped()`` tells it to give up. A body that raises costs speed only: logged once.
        """

        def run() -> None:
            try:
                enter()
                self._install(body(self._stop.is_set))
            except Exception as exc:
                logger.error(
                    "kvoffload: the copy kernels could not be prepared (%s: %s); plain copies "
                    "are used.", type(exc).__name__, exc, exc_info=exc,
                )  # fmt: skip

        self._thread = threading.Thread(target=run, name="kvo-cuda-calibrate", daemon=True)
        self._thread.start()

    def _install(self, prepared: Prepared) -> None:
        with self._mu:
            for to_device, movers in ((True, prepared.load), (False, prepared.store)):
                found = [m for m in movers if m.name != PLAIN]
                self._locks |= {id(m): threading.Lock() for m in found}
                self._serving[to_device] = _Serving([self._plain, *found])
            self._table = prepared.table

    def wait(self, timeout_s: float) -> bool:
        """True when nothing is being prepared (any more)."""
        if self._thread is None:
            return True
        self._thread.join(timeout_s)
        return not self._thread.is_alive()

    def names(self, to_device: bool) -> list[str]:
        """Movers of a direction that serve now."""
        return list(self._serving[to_device].names)

    def pick(self, runs: Sequence[Run], to_device: bool, pinned: bool, checked: bool) -> Mover:
        """The mover for an item. ``pinned``: its arena bytes are; ``checked``: its checksums can
        be the device's work."""
        serving = self._serving[to_device]
        if not pinned or not runs or len(serving.names) == 1:
            return self._plain
        if self._only:
            return serving.by_name.get(self._only, self._plain)
        mean = sum(run.nbytes for run in runs) // len(runs)
        name = self._table.pick(mean, len(runs), to_device, serving.names, checked)
        return serving.by_name[name]

    def copy(
        self,
        mover: Mover,
        runs: Sequence[Run],
        arena: int,
        to_device: bool,
        stream: Any,
        check: LeafCheck | None = None,
    ) -> None:
        """``mover.copy``. Raises what it raises; then that mover is not picked again, except the
        plain one. A ValueError is about the arguments: it is counted and the mover stays."""
        with self._mu:
            self.served[mover.name] += 1
        if mover is self._plain:
            mover.copy(runs, arena, to_device, stream, check)
            return
        try:
            with self._locks[id(mover)]:
                mover.copy(runs, arena, to_device, stream, check)
        except ValueError as exc:
            self._refused(mover, exc)
            raise
        except Exception as exc:
            self._drop(mover, to_device, exc)
            raise

    def _refused(self, mover: Mover, exc: ValueError) -> None:
        with self._mu:
            self.refused[mover.name] += 1
            first = self.refused.total() == 1
        if first:
            logger.error(
                "kvoffload: mover %r was given what it does not take (%s); this is an error of "
                "kvoffload, please report it. Further ones are only counted.", mover.name, exc,
            )  # fmt: skip

    def _drop(self, mover: Mover, to_device: bool, exc: Exception) -> None:
        with self._mu:
            serving = self._serving[to_device]
            if serving.by_name.get(mover.name) is not mover:
                return
            # The lock object stays, and so does the mover: copies of it may still be out.
            self._serving[to_device] = serving.without(mover)
            self._retired.append(mover)
            self.dropped[mover.name] = f"{type(exc).__name__}: {exc}"
        logger.error(
            "kvoffload: %s copies by mover %r failed (%s); it is not used again.",
            "load" if to_device else "store", mover.name, self.dropped[mover.name],
        )  # fmt: skip

    def close(self, timeout_s: float) -> bool:
        """Stop preparing and close the movers; after the last copy has ended. False when preparing
        does not end: then nothing is closed."""
        self._stop.set()
        if not self.wait(timeout_s):
            return False
        with self._mu:
            movers = [m for s in self._serving.values() for m in s.by_name.values()]
            movers = [m for m in movers if m is not self._plain] + self._retired
            self._serving = {up: _Serving([self._plain]) for up in (True, False)}
            self._retired = []
        for mover in movers:
            close = getattr(mover, "close", None)
            if close is not None:
                close()
        return True

    def check(self) -> None:
        """Raise AssertionError on a broken invariant."""
        with self._mu:
            for serving in self._serving.values():
                assert serving.names[0] == PLAIN and serving.by_name[PLAIN] is self._plain
                for name, mover in serving.by_name.items():
                    assert mover.name == name, f"mover {mover.name} is filed as {name}"
                    assert name == PLAIN or id(mover) in self._locks, f"mover {name} has no lock"
