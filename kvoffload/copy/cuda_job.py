"""Bookkeeping of the CUDA copy engine: a job and its items. No CUDA in here.

An item is UNSTARTED, then RUNNING from when a host thread takes it until nothing of it is on the
device any more, then FINISHED or LOST. A job ends when no item is UNSTARTED or RUNNING.

A job begins when the compute before it has ended (``JobTable.begin``). A load's items are started
only then, and its deadline and its time count from then: a forward may take longer than any load.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import IntEnum
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from kvoffload.copy.base import (
    CANCELLED,
    DEADLINE,
    FAILED,
    OK,
    STORE,
    Copies,
    JobDone,
)
from kvoffload.copy.runs import BlockGroup
from kvoffload.types import LEAF_BYTES, SlotState

UNSTARTED, RUNNING, FINISHED, LOST = 0, 1, 2, 3
_WINDOW = 64  # a scan for ready items looks this far beyond the first one not started

U32 = npt.NDArray[np.uint32]
U64 = npt.NDArray[np.uint64]
States = Callable[[U32, U64], npt.NDArray[np.uint8]]


class SlotArena(Protocol):
    """What the engine uses of _core.Arena; calls that can take long release the GIL."""

    data_bytes: int
    max_slots: int
    data_ptr: int

    def view(self, offset: int, nbytes: int, /) -> memoryview: ...  # noqa: D102
    def rank_done(self, slot: int, generation: int, rank: int, /) -> bool: ...  # noqa: D102
    def fail(self, slot: int, generation: int, /) -> bool: ...  # noqa: D102
    def states(  # noqa: D102
        self, slots: U32, generations: U64, /
    ) -> npt.NDArray[np.uint8]: ...
    def wait_ready(self, slot: int, generation: int, timeout_ms: int, /) -> int: ...  # noqa: D102
    def hash_leaves(self, offset: int, nbytes: int, key: bytes, /) -> None: ...  # noqa: D102
    def verify_leaves(self, offset: int, nbytes: int, key: bytes, /) -> bool: ...  # noqa: D102
    def leaf_hashes(self, offset: int, nbytes: int, /) -> U64: ...  # noqa: D102


class Reason(IntEnum):
    """CopyDone.reason, plus DEVICE: a CUDA call failed."""

    NONE = 0
    SLOT_LOST = 1
    CORRUPT = 2
    DEADLINE = 3
    CANCELLED = 4
    DEVICE = 6


_STATUS = {Reason.NONE: OK, Reason.CANCELLED: CANCELLED, Reason.DEADLINE: DEADLINE}


@dataclass(slots=True, eq=False)
class Window:
    """The items of a job that may be started next, and their slots."""

    items: npt.NDArray[np.intp]
    slots: U32
    generations: U64
    seen: bool = False  # looked at once: which of them were FILLING is noted


class Job:
    """Items of one submit, in order. The JobTable's lock guards what changes after the submit."""

    def __init__(self, number: int, kind: int, group: BlockGroup, c: Copies, shard: int) -> None:
        self.number, self.kind, self.group = number, kind, group
        self.slots = np.ascontiguousarray(c.slots, np.uint32)
        self.generations = np.ascontiguousarray(c.generations, np.uint64)
        self.offsets = np.asarray(c.offsets, np.uint64) + np.uint64(shard)
        self.keys = c.keys
        self.ids = np.ascontiguousarray(c.block_ids, np.int32)
        self.after: Any = None  # event on the compute stream
        self.allowed_ns = 1 << 61  # a load's deadline, from when it begins
        self.begun_ns = 0  # time.monotonic_ns; 0: the compute before it has not ended
        self.deadline_ns = 1 << 62  # time.monotonic_ns, once it has begun
        n = len(self.slots)
        self.state = np.full(n, UNSTARTED, np.uint8)
        self.left, self.running = n, 0
        self.broken: set[int] = set()  # items whose copies could not all be enqueued
        self.dropped = Reason.NONE  # CANCELLED or DEADLINE: nothing more is enqueued
        self._reasons: dict[int, Reason] = {}  # of the items that are LOST
        self.nbytes = 0
        self.wait_ns = self.first_ns = self.last_ns = 0
        self._since = np.zeros(n, np.int64)  # when an item was first seen FILLING
        self._window: Window | None = None  # None: one was started or dropped since

    def key(self, item: int) -> bytes:
        """The item's chunk key."""
        return self.keys[16 * item : 16 * item + 16]

    def seed(self, item: int) -> int:
        """Seed of the item's checksums; see _core."""
        key = self.key(item)
        return int.from_bytes(key[:8], "little") ^ int.from_bytes(key[8:], "little")

    def validate(self, max_slots: int, data_bytes: int) -> None:
        """Raise ValueError on anything out of range."""
        n, g = len(self.slots), self.group
        lengths = {len(self.generations), len(self.offsets), len(self.ids)}
        if self.ids.ndim != 2 or lengths != {n} or len(self.keys) != 16 * n:
            raise ValueError("slots, generations, offsets, keys and block_ids differ in length")
        if not n:
            return
        blocks = self.ids.shape[1]
        if not 0 < blocks * g.block_bytes <= g.shard_bytes:
            raise ValueError(
                f"{blocks} blocks of {g.block_bytes} bytes do not make a shard of {g.shard_bytes}"
            )
        if int(self.slots.max()) >= max_slots:
            raise ValueError(f"slot {self.slots.max()} of {max_slots}")
        if (self.offsets % np.uint64(LEAF_BYTES)).any():
            raise ValueError(f"an offset is not a multiple of {LEAF_BYTES}")
        if int(self.offsets.max()) + g.shard_bytes > data_bytes:
            raise ValueError(f"offset {self.offsets.max()} leaves the arena")
        low, high = int(self.ids.min()), int(self.ids.max())
        if low < (0 if self.kind == STORE else -1) or high >= g.num_blocks:
            raise ValueError(f"block ids {low} to {high} of {g.num_blocks}")

    def begin(self, now: int) -> None:
        """The compute before the job has ended."""
        self.begun_ns = now
        self.deadline_ns = now + self.allowed_ns

    def start(self, item: int, now: int) -> bool:
        """Take an item. False when it was dropped."""
        if self.state[item] != UNSTARTED:
            return False
        self.state[item] = RUNNING
        self._window = None
        self.left -= 1
        self.running += 1
        self.first_ns = self.first_ns or now
        if self._since[item]:
            self.wait_ns = max(self.wait_ns, now - int(self._since[item]))
        return True

    def window(self) -> Window:
        """The items not started near the front. The same object until one is started or dropped."""
        if self._window is None:
            first = int(np.argmax(self.state == UNSTARTED))
            items = first + np.flatnonzero(self.state[first : first + _WINDOW] == UNSTARTED)
            self._window = Window(items, self.slots[items], self.generations[items])
        return self._window

    def first_ready(self, states: States, now: int) -> int:
        """First item not started whose slot is not FILLING, -1 if none (near the front)."""
        window = self.window()
        filling = states(window.slots, window.generations) == int(SlotState.FILLING)
        if not window.seen:
            self.saw(window, filling, now)
        at = int(np.argmin(filling))
        return -1 if filling[at] else int(window.items[at])

    def saw(self, window: Window, filling: npt.NDArray[np.bool_], now: int) -> None:
        """Note since when the items of ``window`` wait, seen for the first time: a slot of one
        generation does not become FILLING later."""
        window.seen = True
        seen = window.items[filling]
        self._since[seen[self._since[seen] == 0]] = now

    def stop(self, reason: Reason, beyond: int = -1) -> list[int]:
        """Drop the items after ``beyond`` that are not started, and return them."""
        if beyond < 0 and self.dropped is Reason.NONE:
            self.dropped = reason
        items: list[int] = (
            beyond + 1 + np.flatnonzero(self.state[beyond + 1 :] == UNSTARTED)
        ).tolist()
        self.state[items] = LOST
        self._window = None
        self._reasons |= dict.fromkeys(items, reason)
        self.left -= len(items)
        return items

    def end(self, item: int, reason: Reason, now: int) -> None:
        """Outcome of a started item."""
        self.running -= 1
        self.last_ns = now
        if reason is Reason.NONE:
            self.state[item] = FINISHED
            self.nbytes += int((self.ids[item] >= 0).sum()) * self.group.block_bytes
            return
        self.state[item] = LOST
        self._reasons[item] = reason

    def outcome(self) -> JobDone:
        """The job's account, told by its first lost item. A cancel that dropped nothing is OK."""
        failed = min(self._reasons, default=-1)
        reason = self._reasons.get(failed, Reason.NONE)
        return JobDone(
            self.number,
            self.kind,
            _STATUS.get(reason, FAILED),
            failed,
            int(reason),
            self.nbytes,
            self.wait_ns,
            self._copy_ns(),
        )

    def _copy_ns(self) -> int:
        # A store's items are started, to wait on the device, before it begins. 0 where it was over
        # before the host had seen it begin.
        if not self.last_ns or not self.begun_ns:
            return 0
        return max(self.last_ns - max(self.first_ns, self.begun_ns), 0)

    def check(self) -> None:
        """Raise AssertionError on a broken invariant."""
        assert self.left == int((self.state == UNSTARTED).sum()), f"job {self.number}: left"
        assert self.running == int((self.state == RUNNING).sum()), f"job {self.number}: running"
        assert self.left or self.running, f"job {self.number}: nothing left, not reported"
        assert not (self.dropped and self.left), f"job {self.number}: dropped with items left"
        assert self.begun_ns or self.kind == STORE or not self.first_ns, (
            f"job {self.number}: a load was started before it began"
        )
        lost = set(np.flatnonzero(self.state == LOST).tolist())
        assert lost == self._reasons.keys(), f"job {self.number}: lost without a reason"
