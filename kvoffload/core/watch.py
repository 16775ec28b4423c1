"""Whether reads from NVMe get on: gives up those that hang, tries a tier that may work again.

::

    no read gets on for STALL_S --> all are given up, the breaker opens for a pause
    the pause is over ------------> one chunk is read, for which nobody waits
    it comes up ------------------> the tier is in use again
    a read given up returns ------> the pause is over

A read that was given up keeps its slots until the store lets go of them, maybe for good. So a probe
is one chunk, there is one at a time, and after a few that hang as well the pauses get long.
"""

from __future__ import annotations

from collections.abc import Sequence

from kvoffload.core.breaker import COOL_S, Breaker
from kvoffload.core.index import Entry
from kvoffload.core.planner import DEADLINE_FLOOR_S
from kvoffload.core.pool import Pool
from kvoffload.core.reads import Reads
from kvoffload.core.stats import Counters
from kvoffload.core.why import Gone
from kvoffload.types import Tier

STALL_S = 0.5
"""Reads under way of which none makes progress for this long: the tier hangs. A disk that is only
busy finishes something every few tens of milliseconds."""
LOOK_S = STALL_S / 4
"""Of many reads under way some are looked at (core/filling.py). Where none of them has got on for
so long, others may have, and all are."""
SURE_S = 2 * STALL_S
"""Of a read that is found to be up when its turn to be looked at came nobody knows how long it was.
Where for so long there was nothing but that, all are looked at."""
MAX_STALLS = 8
"""In a row; from then on the pauses are long."""
LONG_PAUSE_S = 60.0
"""The first of the long pauses, each twice as long as the one before: an hour of hanging costs six
more slots. Not none at all: what hangs may be one drive of several, and never return."""
LONGEST_PAUSE_S = 3600.0


class Watch:
    """Over the reads of one tier. Not thread safe: the Manager's lock guards it."""

    def __init__(self, reads: Reads, pool: Pool, breaker: Breaker, counters: Counters) -> None:
        self._reads = reads
        self._pool = pool
        self._breaker = breaker
        self._counters = counters
        self._progress = 0.0  # when a read last got on, or began with no other under way
        self._surely = 0.0  # the same, seen at once
        self._looked_at_all = 0.0
        self._hung_at = float("-inf")  # reads begun before say nothing about the tier's rate
        self._stalls = 0  # since a read last got on

    def read(self, entries: Sequence[Entry], now: float) -> bool:
        """``Reads.submit``. On a tier that may work again this is the probe."""
        if not self._waiting():
            self._progress = self._surely = now
        ok = self._reads.submit(entries, now)
        if self._breaker.probe_due(now) and self._waiting():
            self._breaker.probing()
        return ok

    def progressed(self, now: float) -> None:
        """A chunk came up."""
        self._progress, self._stalls = now, 0

    def finish(self, job: int, results: bytes, now: float) -> None:
        """A read job has returned; see ``Reads.finish``."""
        given_up = self.given_up(job)
        self.progressed(now)
        self._surely = now
        self._reads.finish(job, results, now)
        if given_up:
            self._breaker.retry(now)  # it answers again; how well, a probe tells
        if not self._waiting():
            self._breaker.inconclusive()  # a probe that ended without deciding anything

    def timed_out(self, entry: Entry, now: float) -> None:
        """A load's deadline passed while ``entry`` was still being read. It may be short: a tier
        that got on lately is not broken for it."""
        self._reads.last_failed = entry.chunk_id()
        if now - self._progress >= DEADLINE_FLOOR_S:
            self._breaker.failure(now)

    def given_up(self, job: int) -> bool:
        """Whether a job in flight was found to hang."""
        return self._reads.began(job) <= self._hung_at

    def seems_still(self, now: float) -> bool:
        """Whether all reads under way are to be looked at before anything follows from what was
        seen of some.

        Where none has got on: once in ``LOOK_S``, and always before they are given up. Where some
        were found to be up, but maybe were long ago, which would hide that the tier hangs: once in
        ``SURE_S``.
        """
        if not self._waiting():
            return False
        still, unseen = now - self._progress, now - self._looked_at_all
        if still <= LOOK_S:
            return min(unseen, now - self._surely) > SURE_S
        return still > STALL_S or unseen > LOOK_S

    def look(self, now: float) -> None:
        """Trip the breaker when reads hang; probe a tier that may work again."""
        if self._pool.filling.looked_at_all:
            self._looked_at_all = now
        if self._pool.filling.first_came:
            self._surely = now
        # Also while the breaker is open: who began to wait before must be told.
        if self._waiting() and now - self._progress > STALL_S:
            self._give_up(now)
        elif self._breaker.probe_due(now):
            self._probe(now)

    def standstill_s(self) -> float:
        """For how long no read under way had got on when all were last looked at: of what some
        show, nothing follows for the others. Who asks for more now waits at least as long again,
        as far as anyone can tell."""
        return max(0.0, self._looked_at_all - self._progress) if self._waiting() else 0.0

    def _waiting(self) -> bool:
        """Whether reads are under way that nobody has given up yet: one that hangs for good must
        not make the tier look still for ever."""
        return any(not self.given_up(job) for job in self._reads.inflight)

    def _give_up(self, now: float) -> None:
        """Nothing moves: whoever waits is told now, and nobody else begins to wait."""
        self._progress = self._hung_at = now
        self._stalls += 1
        self._counters.nvme_stalled += 1
        self._breaker.trip(now, self._pause_s())
        hung = [e for e in self._reads.entries() if not e.dropped]
        for entry in sorted(hung, key=lambda e: -e.chunk):
            self._reads.last_failed = entry.chunk_id()
            self._pool.fail(entry)
            # Its slot is out of use until the read returns.
            self._pool.drop(entry, now, Gone.STALLED)

    def _pause_s(self) -> float:
        beyond = self._stalls - MAX_STALLS
        return COOL_S if beyond < 0 else min(LONGEST_PAUSE_S, LONG_PAUSE_S * 2.0 ** min(beyond, 10))

    def _probe(self, now: float) -> None:
        """Read the chunk that failed last: nobody waits for it. Where there is none, or it is in
        DRAM again, the next request that could use the tier finds one (core/weigh.py)."""
        what = self._reads.last_failed
        if what is None or what.key in self._pool.index:
            return
        entry = self._pool.take_as(what, Tier.NVME, now)
        if entry is not None and self.read([entry], now):
            self._counters.nvme_probes += 1
