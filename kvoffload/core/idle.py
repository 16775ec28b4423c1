"""What is written to NVMe because there is time: the hottest, in idle time and at shutdown."""

from __future__ import annotations

import sys

from kvoffload.core.admission import Admission, TokenBucket
from kvoffload.core.breaker import Breaker, BreakerState
from kvoffload.core.hottest import Hottest
from kvoffload.core.index import Entry, Index
from kvoffload.core.stats import Counters
from kvoffload.core.writebehind import MAX_ATTEMPTS, WriteBehind

IDLE_S = 5.0
"""Nothing was stored or loaded for so long: the engine is idle. Longer than pauses between bursts
of requests, when writing what is hot (and stays) would cost what is cold its budget."""
LOOK, LOOK_BUSY = 2048, 512
"""Chunks looked at in one go to find the hottest: some 0.5 us each, under the lock."""


class IdleWrites:
    """Hands what is hottest to write-behind. The Manager's lock guards it."""

    def __init__(
        self,
        index: Index,
        writes: WriteBehind,
        counters: Counters,
        breaker: Breaker,
        admission: Admission | None,
        bucket: TokenBucket,
    ) -> None:
        self._index = index
        self._writes = writes
        self._counters = counters
        self._breaker = breaker
        self._admission = admission  # None: all is queued as it arrives
        self._bucket = bucket
        self._active = float("-inf")  # when something was last stored or loaded
        self._hot: Hottest | None = None  # begun when the engine became idle
        self.enabled = True
        """False: what is held now will mean nothing to the next process, so only what DRAM has no
        room for is written."""

    def active(self, now: float) -> None:
        """Something was stored or loaded."""
        self._active = now
        self._hot = None

    def look(self, now: float, limit_bytes: int, busy: bool) -> None:
        """Queue what is hottest, up to ``limit_bytes`` waiting, if the engine is idle. A part at a
        time: O(LOOK).

        ``busy`` while the engine runs steps (that move no KV). While the breaker is not closed one
        chunk at a time, to find out whether writes work again.
        """
        if not self.enabled or not self._breaker.closed(now):
            return  # what waits for a tier that fails is given up (WriteBehind.look_ahead)
        if self._breaker.state(now) is not BreakerState.CLOSED:
            limit_bytes = 1
        if self._admission is not None and now - self._active >= IDLE_S:
            self._hot = self._hot or Hottest(self._index)
            if self._hot.look(LOOK_BUSY if busy else LOOK):
                self._queue(self._admission, self._hot, now, limit_bytes, LOOK)

    def begin_drain(self) -> None:
        """Rank what is to be written. O(n log n) of all that is held: at shutdown."""
        hot = Hottest(self._index)
        hot.look()
        if self._admission is not None:
            self._hot = hot
            return
        order: list[Entry] = []
        while (entry := hot.peek()) is not None:
            order.append(entry)
            hot.pop()
        self._writes.reorder(order)

    def drain(self, now: float, limit_bytes: int) -> None:
        """As ``look``, whether or not the engine is idle. After ``begin_drain``."""
        if self._admission is not None:
            if self._hot is None:  # something was stored or loaded all the same
                self.begin_drain()
            assert self._hot is not None
            self._queue(self._admission, self._hot, now, limit_bytes, sys.maxsize)

    def _queue(
        self, admission: Admission, hot: Hottest, now: float, limit_bytes: int, most: int
    ) -> None:
        writes = self._writes
        left = admission.idle_bytes(self._counters.nvme_written_bytes + writes.waiting_bytes())
        for _ in range(most):
            entry = hot.peek() if writes.waiting_bytes() < limit_bytes else None
            if entry is None:
                return
            if self._fit(entry):
                if not entry.hinted(now):
                    left -= entry.nbytes
                if left < 0 or not self._bucket.take(entry.nbytes, now):
                    return
                admission.idle(entry)
                writes.reserve(entry)
            hot.pop()

    @staticmethod
    def _fit(entry: Entry) -> bool:
        free = not (entry.reserved or entry.io or entry.retired)
        return free and entry.dirty and entry.attempts < MAX_ATTEMPTS
