"""Who else used which prefix, so that the end of a session takes nothing away from others.

What others built on a session's chunks may lie in HBM or on NVMe only, and would be of no use
without them. A prompt that used chunks which it did not compute used all before them too, so the
last of these stands for all: one row per place where prompts fork, none per chunk. Where a row had
to be forgotten that a session might need, all of the session counts as used.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from typing import NamedTuple

from kvoffload.types import ChunkKey

MAX_ROWS = 32768
"""Some 10 MiB when full. A request without a session that reuses something takes a row."""


class _Row(NamedTuple):
    user: str | None  # None: several
    at: float


class Forks:
    """Last chunks of prefixes, with who used them. Not thread safe. Times are the caller's."""

    def __init__(self, most: int = MAX_ROWS) -> None:
        self._most = most
        self._rows: OrderedDict[ChunkKey, _Row] = OrderedDict()
        self._forgot = float("-inf")  # when the latest of the forgotten rows was last used

    def __len__(self) -> int:
        return len(self._rows)

    def used(self, keys: Sequence[ChunkKey], chunks: int, user: str, now: float) -> None:
        """``user`` used the first ``chunks`` of this chain and did not compute them. O(1)."""
        if not chunks:
            return
        key = keys[chunks - 1]
        row = self._rows.pop(key, None)
        same = row is None or row.user == user
        self._rows[key] = _Row(user if same else None, now)
        if len(self._rows) > self._most:
            _, old = self._rows.popitem(last=False)
            self._forgot = max(self._forgot, old.at)

    def by_others(self, keys: Sequence[ChunkKey], first: int, user: str, since: float) -> int:
        """How many leading chunks of this chain others than ``user`` used, ``first`` at least.
        ``since``: when those from ``first`` on began to be. O(chunks from ``first`` on)."""
        if self._forgot >= since:
            return len(keys)
        for i in range(len(keys) - 1, first - 1, -1):
            row = self._rows.get(keys[i])
            if row is not None and row.user != user:
                return i + 1
        return first

    def check(self) -> None:
        """Raise AssertionError on a broken invariant."""
        assert len(self._rows) <= self._most, "rows are not bounded"
