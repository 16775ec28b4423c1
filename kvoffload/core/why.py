"""Why a request missed: what became of chunks, which cause that makes, and the last N answers.

Pure. A request's first missing chunk is traced on the scheduler thread, when it is looked up: what
is known then is not known any more once the request itself has stored the chunk. What takes longer
(who else asked for these tokens, words, files) is for a thread that nobody waits for.

    chunk leaves DRAM -> KeyMemory (the latest 32768 to 65536, at most about 10 MiB)
    lookup -> Asked (with a Trace) -> cause_of -> Report -> WhyLog (the last N)
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import TYPE_CHECKING, Any

from kvoffload.core.admission import Fate
from kvoffload.core.planner import Plan
from kvoffload.types import ChunkKey, LoadFailure, MissCause, SlotState, Tier

if TYPE_CHECKING:
    from kvoffload.core.index import Entry
    from kvoffload.core.nvme import NvmeTier
    from kvoffload.core.pool import Pool

Details = dict[str, "str | int | float | list[str]"]
"""What a person needs beside the cause. Never tokens, texts, whole keys or salts."""

GENERATION = 32768
_ID_CHARS = 128  # clients choose request ids


class Gone(IntEnum):
    """Why a chunk is not in DRAM any more, or did not get there."""

    EVICTED = 1  # room was needed, and there is no tier below
    UNWRITTEN = 2  # room was needed before it was written to NVMe
    LIMITED = 3  # the same, because of the write budget
    WRITTEN = 4  # room was needed (or a read found nothing); NVMe had it
    NO_ROOM = 5  # no slot when it was to be stored
    STORE_FAILED = 6
    TIMED_OUT = 7  # nobody finished its store, or its read within a load's deadline
    GIVEN_UP = 8  # its store or read was taken back
    BAD_BYTES = 9
    READ_FAILED = 10
    STALLED = 11  # NVMe hung while it was being read
    QUARANTINED = 12  # its tier gave wrong bytes
    RESET = 13


FAILED_FILL = {Tier.DRAM: Gone.STORE_FAILED, Tier.NVME: Gone.READ_FAILED}
GONE_BY_FAILURE = {
    LoadFailure.CORRUPT: Gone.BAD_BYTES,
    LoadFailure.SLOT_LOST: Gone.BAD_BYTES,
    LoadFailure.DEADLINE: Gone.TIMED_OUT,
}
_CAUSE = {
    Gone.EVICTED: MissCause.EVICTED,
    Gone.UNWRITTEN: MissCause.EVICTED,
    Gone.LIMITED: MissCause.RATE_LIMITED,
    Gone.WRITTEN: MissCause.NVME_DROPPED,
    Gone.NO_ROOM: MissCause.STORE_SKIPPED,
    Gone.STORE_FAILED: MissCause.STORE_SKIPPED,
    Gone.TIMED_OUT: MissCause.TIMED_OUT,
    Gone.GIVEN_UP: MissCause.STORE_SKIPPED,
    Gone.BAD_BYTES: MissCause.LOAD_FAILED,
    Gone.READ_FAILED: MissCause.LOAD_FAILED,
    Gone.STALLED: MissCause.TIMED_OUT,
    Gone.QUARANTINED: MissCause.TIER_OFF,
    Gone.RESET: MissCause.RESET,
}


class KeyMemory:
    """What last happened to a chunk key, for the latest keys to which anything happened.

    Two generations of at most ``generation`` keys: when the young one is full it becomes the old
    one. Not thread safe: the Manager's lock guards it. O(1).
    """

    def __init__(self, generation: int = GENERATION) -> None:
        self._generation = generation
        self._young: dict[ChunkKey, int] = {}
        self._old: dict[ChunkKey, int] = {}

    def note(self, key: ChunkKey, gone: Gone, now: float) -> None:
        """``now``: seconds of the Manager's clock, kept to the millisecond."""
        young = self._young
        young[key] = int(now * 1000) << 5 | gone
        if len(young) >= self._generation:
            self._old, self._young = young, {}

    def get(self, key: ChunkKey) -> tuple[Gone, float] | None:
        """(what happened, when), None where nothing is known."""
        packed = self._young.get(key) or self._old.get(key)
        return (Gone(packed & 31), (packed >> 5) / 1000) if packed else None

    def __len__(self) -> int:
        """Keys held, those in both generations twice."""
        return len(self._young) + len(self._old)

    def check(self) -> None:
        """Raise AssertionError on a broken invariant."""
        assert len(self._young) < self._generation, "a full generation was not put away"
        assert len(self._old) in (0, self._generation), "the old generation is cut short"


@dataclass(frozen=True, slots=True)
class Trace:
    """What was known of a chunk that a lookup missed. ``ago_s``: seconds since it went."""

    gone: Gone | None = None
    ago_s: float = 0.0
    storing: bool = False
    off: bool = False  # NVMe has it (or anything may), but is not in use


UNKNOWN = Trace()
STORING = Trace(storing=True)
OFF = Trace(off=True)


def fate(entry: Entry, gone: Gone, nvme: NvmeTier | None) -> Gone:
    """``gone``; for an eviction: whether NVMe has the chunk, and if not, what kept it."""
    if gone is not Gone.EVICTED or nvme is None or not nvme.enabled:
        return gone
    if not entry.dirty:
        return Gone.WRITTEN
    limited = nvme.writes.limited if entry.fate is None else entry.fate is Fate.NO_BUDGET
    return Gone.LIMITED if limited else Gone.UNWRITTEN


def trace(
    keys: Sequence[ChunkKey],
    pool: Pool,
    nvme: NvmeTier | None,
    memory: KeyMemory,
    clock: Callable[[], float],
) -> Trace:
    """See Manager.trace. O(keys); an in-memory question to the chunk store, no I/O."""
    for key in keys:
        entry = pool.index.get(key)
        if entry is not None:
            if entry.state is SlotState.READY:
                continue  # with several KV groups another one's chunk ended the lookup
            return STORING if entry.source is Tier.DRAM else OFF
        if nvme is not None:
            now = clock()
            if not nvme.usable(now):
                if nvme.holds(key):
                    return OFF
            elif len(keys) > 1 and nvme.held([key], now)[0]:
                continue
        known = memory.get(key)
        return Trace(known[0], max(0.0, clock() - known[1])) if known else UNKNOWN
    return UNKNOWN


@dataclass(slots=True)
class Asked:
    """What one request asked for and got; filled in as it goes. Tokens from the root."""

    request_id: str
    wall: float  # arrival, seconds since the epoch
    prompt: int
    hbm: int = 0  # leading tokens that HBM held
    plan: Plan | None = None
    offered: int = 0  # the end of what the engine was told
    chunk: int = -1  # of the first KV group: the first one that was not loaded
    key: ChunkKey | None = None  # its key; None where the prompt does not fill it
    trace: Trace | None = None
    loaded: Mapping[Tier, int] | None = None
    barred: MissCause | None = None  # settled by something else than where chunks are
    note: str = ""
    request: Any = None  # the engine's, until explained, or until too many wait for that
    space: Any = None  # the namespace it asked under
    closed: bool = False

    def missed(self) -> int:
        """Tokens that were computed and could have been held."""
        return max(0, self.prompt - self.hbm - sum((self.loaded or {}).values()))


def cause_of(asked: Asked) -> tuple[MissCause | None, Details]:
    """The cause and its details, from the trace alone; None when nothing was missed."""
    if not asked.missed():
        return None, {}
    if asked.barred is not None:
        return asked.barred, {"note": asked.note} if asked.note else {}
    plan = asked.plan
    if plan is not None and plan.end < plan.held:
        more: Details = {"decision": plan.decision.value, "held": plan.held}
        if plan.load_s is not None:
            more["load_s"] = plan.load_s
        if plan.recompute_s is not None:
            more["recompute_s"] = plan.recompute_s
        return MissCause.REFUSED, more
    if asked.key is None:
        return MissCause.BELOW_FLOOR, {}
    known = asked.trace or UNKNOWN
    if known.storing:
        return MissCause.STORING, {}
    if known.off:
        return MissCause.TIER_OFF, {}
    if known.gone is None:
        return MissCause.NEVER_STORED, {}
    more = {"how": known.gone.name.lower(), "ago_s": round(known.ago_s, 3)}
    return _CAUSE[known.gone], more


@dataclass(frozen=True, slots=True)
class Report:
    """The answer for one request. ``token`` and ``chunk``: the first that diverged."""

    request_id: str
    wall: float
    prompt: int
    hbm: int
    loaded: Mapping[str, int]  # by tier
    missed: int
    token: int
    chunk: int
    key: str  # 8 hex digits, enough to tell chunks apart
    cause: MissCause | None
    details: Details

    @classmethod
    def of(cls, asked: Asked, cause: MissCause | None, details: Details) -> Report:
        """What is kept of ``asked``."""
        missed = asked.missed()
        return cls(
            asked.request_id[:_ID_CHARS],
            asked.wall,
            asked.prompt,
            asked.hbm,
            {t.value: n for t, n in (asked.loaded or {}).items() if n},
            missed,
            asked.prompt - missed,
            asked.chunk,
            asked.key.hex()[:8] if asked.key else "",
            cause,
            details,
        )

    def as_dict(self) -> dict[str, Any]:
        """JSON-able."""
        return {
            "id": self.request_id,
            "time": round(self.wall, 3),
            "prompt": self.prompt,
            "hbm": self.hbm,
            "loaded": dict(self.loaded),
            "missed": self.missed,
            "token": self.token,
            "chunk": self.chunk,
            "key": self.key,
            "cause": self.cause.value if self.cause else None,
            "details": self.details,
        }


class WhyLog:
    """The last ``keep`` reports, and totals by cause since it was made. One thread."""

    def __init__(self, keep: int) -> None:
        self._reports: deque[Report] = deque(maxlen=keep)
        self.requests = 0
        self.totals: dict[MissCause, int] = {}

    def add(self, report: Report) -> None:
        """The newest."""
        self._reports.append(report)
        self.requests += 1
        if report.cause is not None:
            self.totals[report.cause] = self.totals.get(report.cause, 0) + 1

    def last(self) -> list[Report]:
        """Oldest first."""
        return list(self._reports)

    def __len__(self) -> int:
        return len(self._reports)

    def check(self) -> None:
        """Raise AssertionError on a broken invariant."""
        assert len(self._reports) <= self.requests, "more reports than requests"
        assert sum(self.totals.values()) <= self.requests, "more causes than requests"
