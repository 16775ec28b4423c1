"""Request traces: who asked for which prefix when. No text, no tokens, only ids of prefix blocks.

Read are, plain or compressed (.gz, .xz, .bz2), one JSON object a line:

- Mooncake's: ``timestamp`` (ms), ``input_length``, ``output_length``, ``hash_ids``: one id per
  block of the prompt, root first, where equal ids mean equal prefixes. An id of an incomplete last
  block is left out, as vLLM does. The tokens per block come from a first line
  ``{"meta": true, "block_size": n}``, else from ``block_tokens``, else they are worked out.
- ours (``record_path``, see docs/replay.md): the same, with hexadecimal ids of chunks.
"""

from __future__ import annotations

import bz2
import gzip
import heapq
import json
import lzma
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO, cast

import numpy as np
import numpy.typing as npt

from kvoffload.errors import ConfigError
from kvoffload.types import ChunkKey

_OPENERS: dict[str, Callable[[BinaryIO], Any]] = {".gz": gzip.open, ".xz": lzma.open}
_OPENERS[".bz2"] = bz2.open
_GUESSED = 1000  # requests from which the block size is worked out
_BLOCKS = tuple(1 << n for n in range(3, 14))
_KEY_BYTES = 16
_REORDERED = 4096  # requests of a recording that may overtake each other
_MOST = 1 << 53  # tokens, milliseconds: exact as a float


@dataclass(frozen=True, slots=True)
class Request:
    """One request: seconds since the trace began, tokens, and its chunks' keys, root first."""

    arrival_s: float
    input_tokens: int
    output_tokens: int
    keys: tuple[ChunkKey, ...]


@dataclass(frozen=True, slots=True)
class Facts:
    """What a trace asks for. ``ceiling``: the token hit rate if nothing were ever forgotten."""

    requests: int
    input_tokens: int
    output_tokens: int
    unique_chunks: int
    span_s: float
    ceiling: float


class Trace:
    """A trace file, read anew by every iteration.

    ``chunk_blocks``: blocks of the trace that make one chunk. Raises ConfigError (one line that
    names the file, and the line where one is bad) from the constructor and while iterating.
    """

    def __init__(
        self, path: str | Path, block_tokens: int | None = None, chunk_blocks: int = 1
    ) -> None:
        self.path = Path(path)
        self._position: Callable[[], int] = lambda: 0
        if chunk_blocks < 1:
            raise ConfigError(f"chunk_blocks={chunk_blocks}: must be at least 1")
        if block_tokens is not None and block_tokens < 1:
            raise ConfigError(f"block_tokens={block_tokens}: must be at least 1")
        meta = self._meta()
        self.name = str(meta.get("name") or self.path.name.split(".")[0])
        self.block_tokens = self._block_tokens(meta, block_tokens)
        self.chunk_blocks = chunk_blocks
        self._recorded = "recording" in meta
        self.chunk_tokens = self.block_tokens * chunk_blocks

    def bytes(self) -> int:
        """Size of the file."""
        return self.path.stat().st_size

    def position(self) -> int:
        """Bytes of the file that the running iteration has read."""
        return self._position()

    def __iter__(self) -> Iterator[Request]:
        """Requests in file order. Those of one time stamp are spread evenly up to the next one."""
        run: list[dict[str, Any]] = []
        first: float | None = None
        for row in _in_order(self._rows()) if self._recorded else self._rows():
            if first is None:
                first = row["timestamp"]
            if run and row["timestamp"] > run[0]["timestamp"]:
                yield from self._spread(run, row["timestamp"], first)
                run = []
            run.append(row)
        if run and first is not None:
            yield from self._spread(run, run[0]["timestamp"], first)

    def facts(self, progress: Callable[[int], None] | None = None) -> Facts:
        """Read it once; ``progress`` is given ``position()`` now and then."""
        seen: set[bytes] = set()
        asked = answered = hit = n = 0
        last = 0.0
        for n, request in enumerate(self, 1):
            known = next((i for i, k in enumerate(request.keys) if k not in seen), None)
            known = len(request.keys) if known is None else known
            seen.update(request.keys)
            hit += max(0, min(known * self.chunk_tokens, request.input_tokens - 1))
            asked += request.input_tokens
            answered += request.output_tokens
            last = request.arrival_s
            if progress is not None and n % 256 == 0:
                progress(self.position())
        if not n:
            raise ConfigError(f"{self.path}: holds no request")
        return Facts(n, asked, answered, len(seen), last, hit / max(1, asked))

    # -- lines

    def _lines(self) -> Iterator[tuple[int, str]]:
        number = 0
        try:
            with self.path.open("rb") as raw:
                self._position = raw.tell
                opener = _OPENERS.get(self.path.suffix)
                text = opener(raw) if opener else raw
                for number, line in enumerate(text, 1):
                    if line.strip():
                        yield number, cast(str, line)
        except (OSError, EOFError, lzma.LZMAError, zlib.error) as error:
            why = getattr(error, "strerror", None) or error
            where = f", after line {number}" if number else ""
            raise ConfigError(f"{self.path}{where}: cannot be read: {why}") from error
        finally:
            self._position = self.path.stat().st_size.__int__ if self.path.exists() else int

    def _objects(self) -> Iterator[tuple[int, dict[str, Any]]]:
        for number, line in self._lines():
            try:
                row = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise self._bad(number, f"is not JSON ({error})") from None
            if not isinstance(row, dict):
                raise self._bad(number, "is not a JSON object")
            yield number, row

    def _bad(self, number: int, why: str) -> ConfigError:
        return ConfigError(f"{self.path}, line {number}: {why}")

    def _meta(self) -> dict[str, Any]:
        for _, row in self._objects():
            return row if row.get("meta") else {}
        raise ConfigError(f"{self.path}: is empty")

    def _rows(self) -> Iterator[dict[str, Any]]:
        for number, row in self._objects():
            if row.get("meta"):
                continue
            why = _wrong(row)
            if why:
                raise self._bad(number, why)
            row["line"] = number
            yield row

    def _block_tokens(self, meta: dict[str, Any], given: int | None) -> int:
        said = meta.get("block_size")
        if said is not None:
            if type(said) is not int or said < 1:
                raise ConfigError(f"{self.path}: block_size={said!r} of its first line: no number")
            if given not in (None, said):
                raise ConfigError(f"block_tokens={given}: {self.path} has blocks of {said} tokens")
            return said
        if given is not None:
            return given
        sample = [(r["input_length"], len(r["hash_ids"])) for r in islice(self._rows(), _GUESSED)]
        fits = [b for b in _BLOCKS if all(ids in (n // b, -(-n // b)) for n, ids in sample)]
        if len(fits) != 1:
            raise ConfigError(
                f"block_tokens: cannot be worked out from {self.path}: give --block-tokens"
            )
        return fits[0]

    # -- requests

    def _spread(self, run: list[dict[str, Any]], until: float, first: float) -> Iterator[Request]:
        at = run[0]["timestamp"]
        step = (until - at) / len(run)
        for i, row in enumerate(run):
            yield self._request(row, max(0.0, (at + i * step - first) / 1000))

    def _request(self, row: dict[str, Any], arrival_s: float) -> Request:
        tokens = row["input_length"]
        n = self.chunk_blocks
        ids = row["hash_ids"][: tokens // self.block_tokens]
        if n > 1:
            ids = ids[n - 1 :: n]
        try:
            if ids and isinstance(ids[0], str):
                ids = [int(i, 16) for i in ids]
            elif not {*map(type, ids)} <= {int}:
                raise TypeError("numpy would cut them to whole numbers")
            keys = chunk_keys(ids)
        except (ValueError, TypeError, OverflowError):
            raise self._bad(
                row["line"], "hash_ids must be whole numbers (64 bits) or hex digits"
            ) from None
        return Request(arrival_s, tokens, row.get("output_length", 0), keys)


def _wrong(row: dict[str, Any]) -> str:
    """What is wrong with a request's line; empty: nothing."""
    if not row.keys() >= {"timestamp", "input_length", "hash_ids"}:
        return "needs timestamp, input_length and hash_ids"
    for name in ("input_length", "output_length"):
        value = row.get(name, 0)
        if type(value) is not int or not 0 <= value <= _MOST:
            return f"{name}={_shown(value)}: must be a whole number, at least 0"
    at = row["timestamp"]
    if type(at) not in (int, float) or not 0 <= at <= _MOST:
        return f"timestamp={_shown(at)}: must be milliseconds, at least 0"
    if not isinstance(row["hash_ids"], list):
        return f"hash_ids={_shown(row['hash_ids'])}: must be a list"
    return ""


def _shown(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 40 else f"{text[:37]}..."


def _in_order(rows: Iterator[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """A recording has requests in the order in which they ended: give them as they arrived."""
    waiting: list[tuple[float, int, dict[str, Any]]] = []
    for row in rows:
        heapq.heappush(waiting, (row["timestamp"], row["line"], row))
        if len(waiting) > _REORDERED:
            yield heapq.heappop(waiting)[2]
    while waiting:
        yield heapq.heappop(waiting)[2]


def chunk_keys(ids: Sequence[int]) -> tuple[ChunkKey, ...]:
    """A key per id, as evenly spread as a hash: admission and sampling draw from its bits.

    Raises TypeError, ValueError or OverflowError for what is no unsigned 64-bit number.
    """
    low = np.array(ids, dtype=np.uint64)
    both = np.empty((len(ids), 2), np.uint64)
    both[:, 0], both[:, 1] = _mixed(low), _mixed(low ^ np.uint64(0xA5A5_5A5A_C3C3_3C3C))
    raw = both.tobytes()
    at = range(0, len(raw), _KEY_BYTES)
    return tuple([cast(ChunkKey, raw[i : i + _KEY_BYTES]) for i in at])


def _mixed(x: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """splitmix64: a bijection that spreads neighbours over all 64 bits."""
    x = x + np.uint64(0x9E37_79B9_7F4A_7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58_476D_1CE4_E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D0_49BB_1331_11EB)
    return x ^ (x >> np.uint64(31))
