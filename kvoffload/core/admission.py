"""What is worth writing to NVMe: decided when a chunk is about to leave DRAM, from what is seen.

Drives wear out by writing, and most of what leaves DRAM is never asked for again. Each chunk is
judged once, at the end of its time in DRAM: retained by a hint (which DRAM may have given up for
want of room) or used twice, it is written; else a coin decides. The
coin's probability follows a purse (a share of the bytes that come goes in, what is written goes
out), the level of the budget, and what such requests' chunks were worth so far (core/kinds.py).
Nothing is written while what leaves DRAM is not asked for again, which is seen without writing:
keys of chunks that left are remembered. Why these numbers: docs/decisions/0010-nvme-admission.md.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from enum import Enum
from typing import TYPE_CHECKING

from kvoffload.core.index import Entry, Index
from kvoffload.core.kinds import KINDS, Kinds, Origin
from kvoffload.core.stats import Counters
from kvoffload.errors import ConfigError
from kvoffload.types import ChunkKey

if TYPE_CHECKING:
    from kvoffload.core.pool import Pool

MODES = ("auto", "all")

SHARE = 0.59
"""Of the bytes that reach DRAM for the first time this part is written. On conversations 60 % of
the writes bring 94 % of the hits: what more of the chunks used once would add is small."""
WORTH = 1 / 32
"""Below so many bytes asked for again per byte that left, nothing is written. Where NVMe is of use
it is 1/7 and more, where DRAM is enough 1/180 and less: this is the geometric mean of the two."""
TRUST_PART = 4
"""A quarter of the arena may leave before chunks that are asked for again must have been seen."""
SWING_PART = 16
"""The purse holding this part of the arena means writing every chunk; less, in proportion. It is
more than one request brings, so that the coin's probability does not jump."""
FREE_BYTES, FREE_PART = 1 << 30, 8
"""What may be written in idle time before anything is known: 1 GiB wears no drive, and a restart of
a small cache then finds everything; of a large arena, an eighth."""
_NUMBER = 63  # mask of the bits of a ghost's number
_USED = 63  # a number that is no kind: the chunk was used in DRAM
assert KINDS <= _USED
_GHOST_MIN, _GHOST_MAX = 1 << 12, 1 << 21
_HOUR_S, _DAY_S = 3600.0, 86400.0
_MIN_BURST = 1 << 30


class TokenBucket:
    """``rate`` bytes per second, up to ``burst`` saved up; starts full."""

    def __init__(self, rate: float, burst: float, now: float) -> None:
        self._rate = rate
        self._burst = burst
        self._level = burst
        self._last = now

    def _fill(self, now: float) -> None:
        self._level = min(self._burst, self._level + max(0.0, now - self._last) * self._rate)
        self._last = max(self._last, now)

    def take(self, nbytes: int, now: float) -> bool:
        """Spend ``nbytes`` if they are there. A chunk over the burst passes when it is full."""
        self._fill(now)
        if self._rate <= 0 or self._level < min(nbytes, self._burst):
            return False
        self._level -= nbytes
        return True

    def refund(self, nbytes: int) -> None:
        """Bytes that were not written after all."""
        self._level = min(self._burst, self._level + nbytes)

    def full(self, now: float) -> float:
        """How full it is, 0 to 1."""
        self._fill(now)
        return max(0.0, self._level / self._burst) if self._rate > 0 else 0.0


def budget(write_tb_per_day: float | None, nvme_bytes: int, now: float) -> TokenBucket:
    """The write budget. ``write_tb_per_day`` (10^12 bytes) is kept within 5 % over any hour: the
    burst is a twentieth of an hour's bytes (or one chunk, where that is more). The default is
    ``nvme_bytes`` a day, in bursts of a tenth of ``nvme_bytes``, at least 1 GiB: a promise per day,
    so that small stores are filled at once. Zero per day writes nothing."""
    if write_tb_per_day is not None:
        rate = write_tb_per_day * 1e12 / _DAY_S
        return TokenBucket(rate, max(rate * _HOUR_S / 20, 1.0), now)
    return TokenBucket(nvme_bytes / _DAY_S, max(nvme_bytes / 10, _MIN_BURST), now)


class Fate(Enum):
    """What was decided about a chunk, and why."""

    HINT = "hint"
    TWICE = "used_twice"
    COIN = "coin"
    NOT_COIN = "not_coin"
    NO_VALUE = "no_value"
    NO_BUDGET = "no_budget"
    OUTRUN = "outrun"

    @property
    def admitted(self) -> bool:
        """It is to be written."""
        return self is Fate.TWICE or self is Fate.COIN or self is Fate.HINT


class Ghost:
    """Keys of chunks that left DRAM, the latest about ``slots`` of them, each with a number of 0 to
    63: 4 bytes together.

    A newer key takes the place of an older one. Once in 2^26 a key that was never added is found.
    """

    def __init__(self, slots: int) -> None:
        size = _GHOST_MIN
        while size < min(slots, _GHOST_MAX):
            size *= 2
        self._mask = size - 1
        self._tags = array("I", bytes(4 * size))

    def _place(self, key: ChunkKey) -> tuple[int, int]:
        # One bit is always set: a free place is 0.
        tag = int.from_bytes(key[:4], "little") & ~_NUMBER | (_NUMBER + 1)
        return int.from_bytes(key[4:8], "little") & self._mask, tag

    def add(self, key: ChunkKey, number: int) -> None:
        """The chunk left."""
        at, tag = self._place(key)
        self._tags[at] = tag | number

    def take(self, key: ChunkKey) -> int | None:
        """Its number, None where it is not remembered; afterwards it is not any more."""
        at, tag = self._place(key)
        held = self._tags[at]
        if held & ~_NUMBER != tag:
            return None
        self._tags[at] = 0
        return held & _NUMBER


class Admission:
    """Decides which chunks are written to NVMe. Not thread safe: the Manager's lock guards it.

    Bytes are slot bytes. ``arena_bytes`` is the scale of all it remembers, ``chunks`` how many keys
    of chunks gone it remembers at least (twice as many, at most 2^21). Calls are O(chunks given).
    """

    def __init__(
        self,
        index: Index,
        counters: Counters,
        bucket: TokenBucket,
        arena_bytes: int,
        chunks: int,
    ) -> None:
        self.bucket = bucket
        self._index = index
        self._counters = counters
        self._arena_bytes = arena_bytes
        self._ghost = Ghost(2 * chunks)
        self._kinds = Kinds()
        # Bytes of late (half of what it was after each arena full that left). A start on trust:
        # as if twice what is worth it had been asked for again.
        self._left = arena_bytes / TRUST_PART
        self._asked = 2 * WORTH * self._left
        self._until_half = float(arena_bytes)
        self._proven = False  # something was asked for again
        self._purse = 0.0  # bytes that may be written: SHARE of what came, less what was admitted

    # -- what is seen

    def stored(self, entry: Entry) -> None:
        """A chunk that no tier held got a slot. Did it leave before?"""
        parent = self._index.get(entry.parent) if entry.parent is not None else None
        # A parent that nobody has used yet was stored by the same request.
        origin = parent.origin if parent is not None and not parent.uses else None
        if origin is None:
            origin = Origin(_draw(entry.key), entry.chunk)
        origin.chunks += 1
        entry.origin = origin
        if self._back(entry):
            entry.uses += 1
            self._counters.nvme_ghost_hits += 1
            self.asked(entry.nbytes)
        else:
            self._pay(-SHARE * entry.nbytes)

    def read(self, entries: Sequence[Entry]) -> None:
        """Chunks are read from NVMe."""
        for entry in entries:
            self._back(entry)
        self.asked(sum(e.nbytes for e in entries))

    def _back(self, entry: Entry) -> bool:
        """Whether it had left; its kind is told then."""
        number = self._ghost.take(entry.key)
        if number is not None and number != _USED:
            self._kinds.asked(number)
        return number is not None

    def asked(self, nbytes: int) -> None:
        """Bytes that had left DRAM are wanted again: NVMe gave them, or would have."""
        self._proven = True
        self._asked += nbytes

    def gone(self, entry: Entry) -> None:
        """A chunk left DRAM, written or not: both tell what its kind is worth."""
        if entry.origin is not None and not entry.uses:
            kind = entry.origin.kind()
            self._kinds.left(kind)
            self._ghost.add(entry.key, kind)
        elif entry.dirty:
            self._ghost.add(entry.key, _USED)

    def _leaves(self, nbytes: int) -> None:
        self._left += nbytes
        self._until_half -= nbytes
        if self._until_half <= 0:
            self._until_half = float(self._arena_bytes)
            self._left /= 2
            self._asked /= 2
            self._kinds.fade()

    def _pay(self, nbytes: float) -> None:
        # Neither a quiet month nor a bad hour is held against the next day.
        most = SHARE * self._arena_bytes
        self._purse = min(most, max(-most, self._purse - nbytes))

    # -- what follows from it

    def value(self) -> float:
        """Bytes asked for again per byte that left DRAM, of late."""
        return self._asked / self._left if self._left else 0.0

    def probability(self, now: float) -> float:
        """Of writing a chunk that was used once, of a request of average worth. 0 to 1."""
        return self._probability(1.0, now)

    def _probability(self, odds: float, now: float) -> float:
        if self.value() < WORTH:
            return 0.0
        share = max(0.0, self._purse / (self._arena_bytes / SWING_PART))
        return min(1.0, odds * share) * self.bucket.full(now)

    def decide(self, entry: Entry, now: float) -> bool:
        """Whether ``entry``, which will leave soon, is to be written. Sets its fate, which stays
        until it is used again."""
        if entry.fate is None:
            entry.fate = self._judge(entry, now)
            self._tally(entry.fate)
            if entry.fate.admitted:
                self._pay(entry.nbytes)
                parent = self._index.get(entry.parent) if entry.parent is not None else None
                if parent is not None:
                    parent.carries = True  # else this one could not be reached
        return entry.fate.admitted

    def _judge(self, entry: Entry, now: float) -> Fate:
        self._leaves(entry.nbytes)
        if entry.hinted(now):
            return Fate.HINT
        if self.value() < WORTH:
            return Fate.NO_VALUE
        if entry.uses:
            return Fate.TWICE
        return Fate.COIN if entry.carries or self._coin(entry, now) else Fate.NOT_COIN

    def _coin(self, entry: Entry, now: float) -> bool:
        origin = entry.origin
        if origin is None:
            return _draw(entry.key) < self.probability(now)
        return origin.draw < self._probability(self._kinds.odds(origin.kind()), now)

    def _tally(self, fate: Fate) -> None:
        c = self._counters
        c.nvme_admitted_twice += fate is Fate.TWICE
        c.nvme_admitted_coin += fate is Fate.COIN
        c.nvme_admitted_hint += fate is Fate.HINT
        c.nvme_refused_coin += fate is Fate.NOT_COIN
        c.nvme_refused_value += fate is Fate.NO_VALUE

    def withdraw(self, entry: Entry, why: Fate | None) -> None:
        """An admitted chunk is not written: no budget, no time, or (None) nobody wants it."""
        entry.fate = why
        self._pay(-entry.nbytes)
        self._counters.nvme_refused_budget += why is Fate.NO_BUDGET
        self._counters.nvme_outrun += why is Fate.OUTRUN

    # -- idle time

    def idle_bytes(self, written: int) -> int:
        """What may be written now because there is time, ``written`` in all so far."""
        free = max(FREE_BYTES, self._arena_bytes // FREE_PART)
        proven = self._proven and self.value() >= WORTH
        return max(0, free - written, int(self._purse) if proven else 0)

    def idle(self, entry: Entry) -> None:
        """``entry`` will be written because there is time."""
        self._counters.nvme_admitted_idle += 1
        self._pay(entry.nbytes)

    def check(self) -> None:
        """Raise AssertionError naming the first broken invariant."""
        assert self._left >= 0 and self._asked >= 0, "bytes seen"
        self._kinds.check()
        assert self._until_half > 0, "what was seen long ago must count less"
        assert abs(self._purse) <= SHARE * self._arena_bytes, "the purse"


def admission(
    mode: str,
    pool: Pool,
    counters: Counters,
    bucket: TokenBucket,
    arena_bytes: int,
    nvme_bytes: int,
) -> Admission | None:
    """What decides in this mode; None for "all". Raises ConfigError for an unknown mode."""
    if mode not in MODES:
        raise ConfigError(f"nvme_admission={mode!r}: must be one of {', '.join(MODES)}")
    chunks = nvme_bytes // max(pool.alloc.slot_bytes)
    return Admission(pool.index, counters, bucket, arena_bytes, chunks) if mode == "auto" else None


def _draw(key: ChunkKey) -> float:
    """In [0, 1), the same for a key each time."""
    return int.from_bytes(key[8:16], "little") / 2.0**64
