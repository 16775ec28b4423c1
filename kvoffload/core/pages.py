"""How far two computations of the same KV differ, page by page. Pure; numpy only.

The same tokens computed in another batch differ by rounding. Another block's values, the mistake
that checksums cannot see, differ by about as much as they are large. ``LIMIT`` lies between the
two; docs/decisions/0008-shadow-check.md has the measurement.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

import numpy as np
import numpy.typing as npt

LIMIT = 0.2
"""A page whose error (see ``page_errors``) is above this was not made from these tokens."""
SEGMENT = 64
"""Values that are compared as one vector: a head, or part of one."""
_QUARTILE = 0.75
_LARGE = 1e18  # garbage read as floats: squares must stay finite
_WINDOW_BYTES = 1 << 20  # compared at a time, to bound what is copied

Bytes = npt.NDArray[np.uint8]
Floats = npt.NDArray[np.float32]


class ValueType(str, Enum):
    """What the bytes of a page are. Quantised and packed KV cannot be compared by value."""

    FP32 = "float32"
    FP16 = "float16"
    BF16 = "bfloat16"

    @property
    def nbytes(self) -> int:
        """Bytes per value."""
        return 4 if self is ValueType.FP32 else 2


@dataclass(frozen=True, slots=True)
class PageFormat:
    """``page_bytes``: one block of one layer; a whole number of values."""

    values: ValueType
    page_bytes: int


def _floats(data: Bytes, values: ValueType) -> Floats:
    if values is ValueType.BF16:
        wide = data.view(np.uint16).astype(np.uint32) << np.uint32(16)
        out = wide.view(np.float32)
    else:
        kind = np.float16 if values is ValueType.FP16 else np.float32
        out = data.view(kind).astype(np.float32)
    np.nan_to_num(out, copy=False, nan=0.0, posinf=_LARGE, neginf=-_LARGE)
    return np.clip(out, -_LARGE, _LARGE, out=out)


def worst_error(held: Bytes, computed: Bytes, fmt: PageFormat) -> float:
    """The largest page error, 0.0 without pages. Raises ValueError on different lengths."""
    if len(held) != len(computed):
        raise ValueError(f"{len(held)} bytes are compared with {len(computed)}")
    return float(page_errors(held, computed, fmt).max(initial=0.0))


def page_errors(held: Bytes, computed: Bytes, fmt: PageFormat) -> Floats:
    """One error per page of two equally long byte arrays; 0: the same, about 1: unrelated.

    A page is cut into vectors of 64 values; its error is the upper quartile of their relative L2
    distances. Not the largest: a vector of tiny values (an attention sink's V) may round to
    anything. Not the mean, nor one distance for the page: the K of some models is mostly a constant
    bias, alike for all tokens, and outweighs the V that tells them apart. A last page may be
    shorter.
    """
    whole = len(held) - len(held) % fmt.page_bytes
    step = max(1, _WINDOW_BYTES // fmt.page_bytes) * fmt.page_bytes
    parts = [
        _errors(held[at : at + step], computed[at : at + step], fmt) for at in range(0, whole, step)
    ]
    if whole < len(held):
        rest = PageFormat(fmt.values, len(held) - whole)
        parts.append(_errors(held[whole:], computed[whole:], rest))
    return np.concatenate(parts) if parts else np.zeros(0, np.float32)


def _errors(held: Bytes, computed: Bytes, fmt: PageFormat) -> Floats:
    a, b = held.reshape(-1, fmt.page_bytes), computed.reshape(-1, fmt.page_bytes)
    out = np.zeros(len(a), np.float32)
    differ = (a != b).any(axis=1)  # also: padding, and whatever is no number in both
    if not differ.any():
        return out
    n = fmt.page_bytes // fmt.values.nbytes
    width = int(np.gcd(n, SEGMENT))
    x = _floats(a[differ].reshape(-1), fmt.values).reshape(-1, n // width, width)
    y = _floats(b[differ].reshape(-1), fmt.values).reshape(-1, n // width, width)
    size = np.maximum(_norm(x), _norm(y))
    distance = np.divide(_norm(x - y), size, out=np.zeros_like(size), where=size > 0)
    out[differ] = np.quantile(distance, _QUARTILE, axis=1, method="lower")
    return out


def _norm(vectors: Floats) -> npt.NDArray[np.float64]:
    squares = np.square(vectors, dtype=np.float64)
    out: npt.NDArray[np.float64] = np.sqrt(squares.sum(axis=-1))
    return out
