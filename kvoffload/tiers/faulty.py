"""A chunk store with faults that are switched on and off while it is used.

For proving what a broken tier costs, never for serving. ``FaultyStore`` stands around the real
store; the fault is chosen by ``set`` or by a small JSON file that another process writes:
``{"fault": "slow", "factor": 10}``. Beside that file it keeps ``<file>.status``: which fault holds
since when, and after how many seconds reads and writes worked again.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from kvoffload.tiers.base import ChunkStoreLike, StoreDoneLike
from kvoffload.tiers.fault_control import ControlFile, Fault, FaultOrder
from kvoffload.tiers.fault_jobs import GET, PUT, FaultDone, Job, Lane, Pace
from kvoffload.tiers.nvme.requests import left_ms, until
from kvoffload.types import StoreResult

__all__ = ["Fault", "FaultOrder", "FaultyStore"]

_KEY_BYTES = 16
_WATCH_S = 0.05
_HOLDING = (Fault.SLOW, Fault.HUNG)
_ANSWERS: Mapping[tuple[Fault, int], StoreResult] = {
    (Fault.FULL, PUT): StoreResult.NO_SPACE,
    (Fault.READ_ONLY, PUT): StoreResult.IO_ERROR,
    (Fault.GONE, PUT): StoreResult.IO_ERROR,
    (Fault.GONE, GET): StoreResult.IO_ERROR,
}

logger = logging.getLogger("kvoffload.tiers.faulty")


class ClosableStore(ChunkStoreLike, Protocol):
    """What is wrapped: a chunk store that can be checked and closed."""

    def check(self) -> None:
        """Raise where an invariant is broken."""

    def close(self, timeout_ms: int = 5000) -> None:
        """Idempotent, bounded."""


class FaultyStore:
    """A store of ``ChunkStoreLike`` around another one, broken on demand. Thread safe.

    A held-back job has not been submitted: its slots stay as they are until it is. The native store
    is asked for real faults where it has them (flipped bits, reads that hang in flight); around
    another store a read that was in flight when the tier hung may still fill its slots, it is only
    not answered. Whatever is not a method here (``path``, ``ls``, ...) is the inner store's own.
    One daemon thread paces held jobs and reads ``control`` every 50 ms; ``close`` ends it.
    """

    def __init__(self, inner: ClosableStore, control: Path | None = None) -> None:
        self._inner = inner
        self._inject: Callable[[str, int], None] | None = getattr(inner, "inject", None)
        self._control = ControlFile(control) if control is not None else None
        self._cond = threading.Condition()
        self._order = FaultOrder()
        self._since = time.monotonic()
        self._last_hang = (0.0, 0.0)
        self._held: dict[int, Job] = {}
        self._sent: dict[int, Job] = {}
        self._done: list[FaultDone] = []
        self._pace = (Pace(), Pace())
        self._lane = Lane()
        self._worked: list[float | None] = [None, None]  # seconds from _since to the first OK
        self._count = {"ok_puts": 0, "bad_puts": 0, "ok_gets": 0, "bad_gets": 0}
        self._closed = False
        self._thread = threading.Thread(target=self._run, name="kvoffload-fault", daemon=True)
        self._thread.start()

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        return getattr(self._inner, name)

    # ------------------------------------------------------------------------------ the fault

    @property
    def order(self) -> FaultOrder:
        """The fault that holds now."""
        return self._order

    def set(self, fault: Fault, factor: float = 10.0) -> None:
        """Switch to ``fault``. Raises ConfigError on a factor below 1. No effect once closed."""
        self._switch(FaultOrder(fault, factor))

    def _switch(self, order: FaultOrder) -> None:
        with self._cond:
            if self._closed:
                return
            now = time.monotonic()
            if self._order.fault is Fault.HUNG:
                self._last_hang = (self._since, now)
            self._order, self._since, self._worked = order, now, [None, None]
            self._lane = Lane()
            self._native_faults(order.fault)
            for job in self._held.values():
                job.wait_left = self._extra_s(job)
            if order.fault not in _HOLDING:
                for job in list(self._held.values()):
                    self._send_held(job)
            self._cond.notify_all()

    def _native_faults(self, fault: Fault) -> None:
        if self._inject is not None:
            self._inject("hang_read", int(fault is Fault.HUNG))
            self._inject("flip_read", int(fault is Fault.CORRUPT))

    def _extra_s(self, job: Job) -> float:
        return (self._order.factor - 1) * self._pace[job.kind].seconds(job.nbytes)

    # ------------------------------------------------------------------------------ submitting

    def put_slots(
        self,
        job: int,
        arena: Any,
        keys: bytes,
        slots: npt.NDArray[np.uint32],
        generations: npt.NDArray[np.uint64],
        offsets: npt.NDArray[np.uint64],
        nbytes: int,
        namespace: int,
        depths: npt.NDArray[np.uint32],
        deadline_ms: int = 0,
    ) -> None:
        """See ChunkStoreLike."""
        arrays = (slots.copy(), generations.copy(), offsets.copy())
        at, late = depths.copy(), until(deadline_ms)

        def submit() -> None:
            left = left_ms(late)
            self._inner.put_slots(job, arena, keys, *arrays, nbytes, namespace, at, left)

        n = len(keys) // _KEY_BYTES
        self._take(Job(job, PUT, n, n * nbytes, submit, lambda: None))

    def get_slots(
        self,
        job: int,
        arena: Any,
        keys: bytes,
        slots: npt.NDArray[np.uint32],
        generations: npt.NDArray[np.uint64],
        offsets: npt.NDArray[np.uint64],
        nbytes: int,
        deadline_ms: int = 0,
    ) -> None:
        """See ChunkStoreLike."""
        arrays, late = (slots.copy(), generations.copy(), offsets.copy()), until(deadline_ms)

        def submit() -> None:
            self._inner.get_slots(job, arena, keys, *arrays, nbytes, left_ms(late))

        def fail() -> None:
            for slot, generation in zip(arrays[0], arrays[1], strict=True):
                arena.fail(int(slot), int(generation))

        n = len(keys) // _KEY_BYTES
        self._take(Job(job, GET, n, n * nbytes, submit, fail))

    def cancel(self, job: int) -> int:
        """See ChunkStoreLike. What is held has not started."""
        with self._cond:
            held = self._held.pop(job, None)
            if held is not None:
                self._answer(held, StoreResult.DROPPED)
                return held.keys
            return self._inner.cancel(job)

    def _take(self, job: Job) -> None:
        with self._cond:
            if job.job in self._held or job.job in self._sent:
                raise ValueError("job id is in use")
            job.came = time.monotonic()
            if self._order.fault not in _HOLDING:
                self._dispatch(job)
                return
            job.wait_left = self._extra_s(job)
            self._held[job.job] = job
            self._cond.notify_all()

    def _dispatch(self, job: Job) -> None:
        """To the inner store, or answered as the fault wants. Raises what the inner store does."""
        answer = _ANSWERS.get((self._order.fault, job.kind))
        if self._order.fault is Fault.CORRUPT and job.kind == GET and self._inject is None:
            answer = StoreResult.CORRUPT
        if answer is not None:
            self._answer(job, answer)
            return
        job.sent = time.monotonic()
        job.submit()
        self._sent[job.job] = job

    def _answer(self, job: Job, result: StoreResult) -> None:
        job.fail_slots()
        ns = int((time.monotonic() - job.came) * 1e9)
        self._done.append(FaultDone(job.job, job.kind, bytes([result]) * job.keys, 0, ns))

    def _send_held(self, job: Job) -> None:
        del self._held[job.job]
        try:
            self._dispatch(job)
        except Exception as error:  # whoever submitted it is long gone: an answer, not silence
            logger.warning("kvoffload: a held job was refused: %s", error)
            self._answer(job, StoreResult.IO_ERROR)

    # ------------------------------------------------------------------------------ answering

    def poll(self) -> Sequence[StoreDoneLike]:
        """Each finished job exactly once; nothing while the tier hangs."""
        with self._cond:
            if self._order.fault is Fault.HUNG:
                return []
            out: list[StoreDoneLike] = list(self._done)
            self._done = []
            for done in out:
                self._note(done, 0.0)
            for done in self._inner.poll():
                job = self._sent.pop(done.job, None)
                self._note(done, job.came if job is not None else 0.0)
                out.append(done if job is None else self._arrived(job, done))
            return out

    def _arrived(self, job: Job, done: StoreDoneLike) -> StoreDoneLike:
        end = job.sent + done.ns / 1e9
        began, over = self._last_hang
        withheld = began <= end < over
        if withheld:
            end = over
        elif job.sent >= over:  # a hang in flight says nothing about the device's rate
            self._pace[job.kind].add(job.sent, end, done.nbytes)
        if not withheld and job.sent - job.came < 1e-3:
            return done
        ns = int((end - job.came) * 1e9)
        return FaultDone(done.job, done.kind, done.results, done.nbytes, ns)

    def _note(self, done: StoreDoneLike, came: float) -> None:
        ok, what = done.results.count(StoreResult.OK), "gets" if done.kind == GET else "puts"
        self._count[f"ok_{what}"] += ok
        self._count[f"bad_{what}"] += len(done.results) - ok
        if ok and came >= self._since and self._worked[done.kind] is None:
            self._worked[done.kind] = time.monotonic() - self._since

    def wait(self, job: int, timeout_ms: int) -> bool:
        """Block until the job is done; True also when it is unknown."""
        deadline = time.monotonic() + timeout_ms / 1000
        while True:
            with self._cond:
                left = deadline - time.monotonic()
                if self._stuck(job):
                    if left <= 0:
                        return False
                    self._cond.wait(left)
                    continue
                if job not in self._sent:
                    return True
            if not self._inner.wait(job, max(0, int(left * 1000))):
                return False
            with self._cond:
                if not self._stuck(job):
                    return True

    def _stuck(self, job: int) -> bool:
        hung = self._order.fault is Fault.HUNG
        mine = job in self._sent or any(d.job == job for d in self._done)
        return job in self._held or (hung and mine)

    def flush(self, timeout_ms: int) -> bool:
        """Block until all puts so far are durable; False while they are held."""
        deadline = time.monotonic() + timeout_ms / 1000
        with self._cond:
            while self._order.fault is Fault.HUNG or any(
                j.kind == PUT for j in self._held.values()
            ):
                left = deadline - time.monotonic()
                if left <= 0:
                    return False
                self._cond.wait(left)
        return self._inner.flush(max(0, int((deadline - time.monotonic()) * 1000)))

    def contains(self, keys: bytes) -> bytes:
        """The inner store's index, which is in memory and answers whatever the disk does."""
        return self._inner.contains(keys)

    def delete(self, keys: bytes) -> int:
        """The inner store's, as ``contains``."""
        return self._inner.delete(keys)

    def retain(self, keys: bytes, seconds: float, level: int = 0, owner: int = 0) -> bytes:
        """The inner store's, as ``contains``."""
        return self._inner.retain(keys, seconds, level, owner)

    def retained(self, keys: bytes, owner: int = 0) -> bytes:
        """The inner store's, as ``contains``."""
        return self._inner.retained(keys, owner)

    def retain_none(self) -> None:
        """The inner store's, as ``contains``."""
        self._inner.retain_none()

    def stats(self) -> dict[str, int | float]:
        """The inner store's."""
        return self._inner.stats()

    def check(self) -> None:
        """Raise AssertionError naming the first broken invariant."""
        with self._cond:
            answered = {d.job for d in self._done}
            assert len(answered) == len(self._done), "a job was answered twice"
            assert not self._held.keys() & self._sent.keys(), "held and sent"
            assert not answered & (self._held.keys() | self._sent.keys()), "answered and open"
            assert not self._held or self._order.fault in _HOLDING, "held without a reason"
            assert not (self._closed and self._held), "held by a closed store"
        self._inner.check()

    def close(self, timeout_ms: int = 5000) -> None:
        """End the fault, drop what is held (answered DROPPED), close the inner store. Idempotent.

        Takes at most a second more than the inner store.
        """
        with self._cond:
            if not self._closed:
                self._switch(FaultOrder(Fault.HUNG))  # nothing held may be sent any more
                for job in self._held.values():
                    self._answer(job, StoreResult.DROPPED)
                self._held.clear()
                self._switch(FaultOrder())
                self._closed = True
                self._cond.notify_all()
        if threading.current_thread() is not self._thread:
            self._thread.join(1.0)
        self._inner.close(timeout_ms)

    # ------------------------------------------------------------------------------ the thread

    def _run(self) -> None:
        look_at, said = 0.0, ""
        while True:
            if self._control is not None and time.monotonic() >= look_at:
                look_at = time.monotonic() + _WATCH_S
                order = self._control.changed()
                if order is not None:
                    self._switch(order)  # the same again: begins anew
                said = self._say(said)
            with self._cond:
                if self._closed:
                    return
                due = self._serve()
                limit = None if self._control is None else max(0.0, look_at - time.monotonic())
                waits = [t for t in (due, limit) if t is not None]
                self._cond.wait(min(waits) if waits else None)

    def _serve(self) -> float | None:
        """SLOW: send on what has waited long enough. Seconds until there is more to do."""
        while self._order.fault is Fault.SLOW and self._held:
            job, left = self._lane.front(self._held.values(), time.monotonic())
            if left > 0:
                return left
            self._lane.leaves(job, self._pace[job.kind].seconds(job.nbytes), time.monotonic())
            self._send_held(job)
            self._cond.notify_all()
        return None

    def _say(self, said: str) -> str:
        """Write the status file if something in it changed; returns what it says now."""
        assert self._control is not None
        with self._cond:
            status = {
                "fault": self._order.fault.value,
                "factor": self._order.factor,
                "since": self._since,
                "get_worked_s": self._worked[GET],
                "put_worked_s": self._worked[PUT],
                "held": len(self._held),
                **self._count,
            }
        if repr(status) != said:
            try:
                self._control.report(status)
            except OSError as error:
                logger.warning("kvoffload: fault status: %s", error)
        return repr(status)
