"""Miss-ratio curve, live: the share of prompt tokens that a leaf-first LRU tier of any size hits.

A prompt's chunks are touched leaf first and root last, so a chunk is never older than the chunks
behind it. Hence a request hits, in a tier of C chunks, exactly those of its chunks whose *stack
distance* (place in the order of last touches) is at most C: they are always a leading run.

Two facts give that distance without keeping keys: when a chunk was last touched, and how many
chunks were touched since. Both come from a fixed table of stamps:

- a key owns one cell in each of two rows, which hold the epoch (about: the request) of their last
  touch. Cells are shared, so a stamp can only be too young. The older of the two is taken, and then
  the oldest along the chain so far: since stamps fall along a chain, a wrong one can only lengthen
  the run it ends, by much less than a chunk on average.
- cells of the first row younger than a stamp, counted per epoch and corrected for keys that share a
  cell (linear counting), are the chunks touched since.

Where even that table would be too large (4 million chunks), keys are sampled by their hash, as
SHARDS does, at ``rate``, and distances are scaled. Sampling one chunk in a hundred *instead* of
keeping stamps was measured: too noisy for caches of 10^5 chunks whose roots are hot, see
docs/decisions/0012.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from kvoffload.types import ChunkKey

U32 = npt.NDArray[np.uint32]

_EPOCHS = 1 << 16
"""Epochs that are told apart; a chunk untouched for longer counts as never seen."""
_BLOCK = 256
"""Epochs per partial sum."""
_SUB = 32
"""Bins per octave of the distance histogram: 3 % wide, exact below 64."""
_ONE = np.int32(1)
MIN_CELLS = 1 << 14
MAX_CELLS = 1 << 22


def _bin(distance: int) -> int:
    shift = max(0, distance.bit_length() - 6)
    return shift * _SUB + (distance >> shift)


def _edge(index: int) -> int:
    """The smallest distance in bin ``index``."""
    if index < 2 * _SUB:
        return index
    shift = index // _SUB - 1
    return (index - shift * _SUB) << shift


class MissRatioCurve:
    """Fixed memory (``nbytes``), a few tens of microseconds per request. One thread only.

    ``reach``: the largest tier, in chunks, that will be asked about. ``chunk_tokens``: tokens per
    chunk. ``window``: after so many chunks all counts are halved, so that the curve follows the
    workload; None: never. ``rate`` and ``cells`` (a power of two) follow from ``reach``; give them
    to measure. Raises ValueError on sizes below 1.
    """

    def __init__(
        self,
        reach: int,
        chunk_tokens: int,
        *,
        window: int | None = None,
        rate: float | None = None,
        cells: int | None = None,
    ) -> None:
        if reach < 1 or chunk_tokens < 1:
            raise ValueError(f"reach {reach} and chunk_tokens {chunk_tokens} must be at least 1")
        if cells is None:
            cells = min(MAX_CELLS, max(MIN_CELLS, 1 << (2 * reach - 1).bit_length()))
        self.rate = rate if rate is not None else min(1.0, cells / reach)
        self.chunk_tokens = chunk_tokens
        self._below = np.uint64(self.rate * 2**32)
        self._window = window
        self._mask = np.uint32(cells - 1)
        self._rows = np.zeros((2, cells), np.uint32)
        self._recent = np.zeros(_EPOCHS, np.int32)  # cells of the first row by their epoch
        self._sums = np.zeros(_EPOCHS // _BLOCK, np.int32)  # the same by block of epochs
        self._epoch = _BLOCK  # 0 in a cell: never touched
        self._per_epoch = max(1, int(reach * self.rate) * 16 // _EPOCHS)
        self._in_epoch = 0
        self._bins = np.zeros(_bin(1 << 40) + 1, np.float64)  # hits among sampled chunks
        self._sampled = self._chunks = self._tokens = 0.0

    @property
    def nbytes(self) -> int:
        """Bytes of all tables: they never grow."""
        tables = (self._rows, self._recent, self._sums, self._bins)
        return sum(int(t.nbytes) for t in tables)

    @property
    def tokens(self) -> float:
        """Prompt tokens counted so far (halved with everything else)."""
        return self._tokens

    # -- feeding

    def query(self, keys: Sequence[ChunkKey], tokens: int) -> None:
        """A request of ``tokens`` prompt tokens asks for these chunks, root first: count, touch."""
        self._chunks += len(keys)
        self._tokens += tokens
        words = self._sample(keys)
        if words is not None:
            self._sampled += len(words)
            first, second = self._rows
            stamps = np.minimum(first[words[:, 0] & self._mask], second[words[:, 1] & self._mask])
            self._count(np.minimum.accumulate(stamps).tolist())
            self._stamp(words)
        if self._window is not None and self._chunks > self._window:
            self._bins /= 2
            self._sampled /= 2
            self._chunks /= 2
            self._tokens /= 2

    def touch(self, keys: Sequence[ChunkKey]) -> None:
        """A request leaves these chunks behind, root first (its generated tokens included)."""
        words = self._sample(keys)
        if words is not None:
            self._stamp(words)

    def _sample(self, keys: Sequence[ChunkKey]) -> U32 | None:
        """The sampled keys as rows of four words; None for none."""
        words: U32 = np.frombuffer(b"".join(keys), "<u4").reshape(-1, 4)
        if self.rate < 1.0:
            words = words[words[:, 2] < self._below]
        return words if len(words) else None

    def _stamp(self, words: U32) -> None:
        """These keys are touched now."""
        self._advance(len(words))
        first, second = self._rows
        at = words[:, 0] & self._mask
        gone = first[at]
        # Two keys of one chain may share a cell, which then counts once: as its last writer's.
        marks = np.arange(len(words), dtype=np.uint32)
        first[at] = marks
        once = first[at] == marks
        first[at] = self._epoch
        second[words[:, 1] & self._mask] = self._epoch
        gone = gone[once]
        here = self._epoch % _EPOCHS
        self._recent[here] += len(gone)
        self._sums[here // _BLOCK] += len(gone)
        left = gone[gone >= self._oldest()].astype(np.intp) % _EPOCHS
        np.subtract.at(self._recent, left, _ONE)  # of the table's type: ten times as fast
        np.subtract.at(self._sums, left // _BLOCK, _ONE)

    def _advance(self, touched: int) -> None:
        """Begin a new epoch once the running one has enough; forgets the oldest block of them."""
        self._in_epoch += touched
        if self._in_epoch < self._per_epoch:
            return
        self._in_epoch = 0
        self._epoch += 1
        if self._epoch % _BLOCK == 0:
            block = self._epoch % _EPOCHS // _BLOCK
            self._recent[block * _BLOCK : (block + 1) * _BLOCK] = 0
            self._sums[block] = 0

    def _oldest(self) -> int:
        """The oldest epoch that is still told apart."""
        return max(1, (self._epoch // _BLOCK + 1) * _BLOCK - _EPOCHS)

    def _since(self, epoch: int) -> float:
        """Sampled chunks touched in later epochs than ``epoch``."""
        block, now = epoch // _BLOCK, self._epoch // _BLOCK
        at = (epoch + 1) % _EPOCHS
        count = 0
        if (epoch + 1) // _BLOCK == block:
            count = int(self._recent[at : (at // _BLOCK + 1) * _BLOCK].sum())
        size = len(self._sums)
        low, high = (block + 1) % size, (now + 1) % size
        if block < now:
            if low < high:
                count += int(self._sums[low:high].sum())
            else:
                count += int(self._sums[low:].sum()) + int(self._sums[:high].sum())
        cells = self._rows.shape[1]
        # Beyond a full row nothing is known but "far"; what was counted stays finite.
        return -cells * math.log(max(1 - count / cells, 0.5 / cells))

    def _count(self, stamps: list[int]) -> None:
        """Book the distances of a request whose chunks were last touched in these epochs."""
        start, oldest = 0, self._oldest()
        while start < len(stamps) and stamps[start] >= oldest:
            stop = start + 1
            while stop < len(stamps) and stamps[stop] == stamps[start]:
                stop += 1
            # Chunks touched in the same epoch were touched leaf first: the shallower are younger.
            self._book(self._since(stamps[start]), stop - start)
            start = stop

    def _book(self, younger: float, run: int) -> None:
        """``run`` sampled chunks at the distances ``younger`` + 1, + 2, ... (sampled chunks)."""
        if self.rate < 1.0:
            for i in range(run):
                self._bins[_bin(int((younger + i) / self.rate) + 1)] += 1
            return
        at = round(younger) + 1
        end = at + run
        while at < end:
            index = _bin(at)
            stop = min(end, _edge(index + 1))
            self._bins[index] += stop - at
            at = stop

    # -- reading

    def hit_ratio(self, chunks: float) -> float | None:
        """Share of all prompt tokens, 0..1, that a tier of so many chunks hits; None: no tokens."""
        if not self._tokens:
            return None
        if not self._sampled or chunks < 1:
            return 0.0
        at = _bin(min(int(chunks), 1 << 40))
        low, high = _edge(at), _edge(at + 1)
        part = min(1.0, (chunks - low + 1) / (high - low))  # a distance of ``chunks`` is a hit
        hits = float(self._bins[:at].sum() + self._bins[at] * part) / self.rate
        # A sample with more or fewer uses than its share has too many or too few of the hottest
        # keys, whose uses are hits in any tier (the SHARDS-adj correction).
        hits += self._chunks - self._sampled / self.rate
        return min(1.0, max(0.0, hits * self.chunk_tokens / self._tokens))

    def check(self) -> None:
        """Raise AssertionError naming the first broken invariant. O(cells)."""
        first = self._rows[0]
        live = first[first >= self._oldest()] % _EPOCHS
        counts = np.bincount(live, minlength=_EPOCHS)
        assert (counts == self._recent).all(), "cells by epoch"
        blocks = counts.reshape(-1, _BLOCK).sum(1)
        assert (blocks == self._sums).all(), "cells by block of epochs"
        assert (self._bins >= 0).all() and self._bins.sum() <= self._sampled + 1e-6, "more hits"
