"""Comparing pages by value: rounding passes, another block does not, in every type of KV."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from kvoffload.core.pages import LIMIT, PageFormat, ValueType, page_errors, worst_error
from kvoffload.engines.vllm import geometry
from kvoffload.types import CacheLayout

TYPES = list(ValueType)
TOKENS, HEAD = 16, 64
Floats = npt.NDArray[np.float32]


def encode(x: Floats, values: ValueType) -> npt.NDArray[np.uint8]:
    if values is ValueType.BF16:
        bits = np.ascontiguousarray(x, np.float32).view(np.uint32)
        return ((bits + 0x8000) >> 16).astype(np.uint16).reshape(-1).view(np.uint8)
    kind = np.float16 if values is ValueType.FP16 else np.float32
    return np.ascontiguousarray(x, kind).reshape(-1).view(np.uint8)


def pages(seed: int, n: int = 8, bias: float = 0.0) -> Floats:
    """(pages, K and V, tokens, head); ``bias``: a constant that K has in common for all tokens."""
    rng = np.random.default_rng(seed)
    out = rng.standard_normal((n, 2, TOKENS, HEAD)).astype(np.float32)
    out[:, 0] += bias * np.random.default_rng(0).standard_normal(HEAD).astype(np.float32)
    return out


def form(values: ValueType) -> PageFormat:
    return PageFormat(values, 2 * TOKENS * HEAD * values.nbytes)


@pytest.mark.parametrize("values", TYPES)
@pytest.mark.parametrize("noise", [0.0, 1e-3, 0.03])
def test_rounding_passes(values: ValueType, noise: float) -> None:
    held = pages(1)
    rng = np.random.default_rng(2)
    computed = held * (1 + noise * rng.standard_normal(held.shape).astype(np.float32))
    worst = worst_error(encode(held, values), encode(computed, values), form(values))
    assert worst <= max(2 * noise, 0.01) < LIMIT


@pytest.mark.parametrize("values", TYPES)
def test_a_swapped_page_is_seen_and_named(values: ValueType) -> None:
    held = pages(1)
    computed = held.copy()
    computed[[2, 5]] = held[[5, 2]]
    errors = page_errors(encode(held, values), encode(computed, values), form(values))
    assert np.flatnonzero(errors > LIMIT).tolist() == [2, 5] and errors.min() == 0
    assert (errors[[2, 5]] > 0.9).all()


@pytest.mark.parametrize("values", TYPES)
def test_keys_that_are_mostly_bias_do_not_hide_a_swap(values: ValueType) -> None:
    """Relative to a K of 40 the difference of two pages is 0.03."""
    held, other = pages(1, bias=40.0), pages(2, bias=40.0)
    errors = page_errors(encode(held, values), encode(other, values), form(values))
    assert (errors > LIMIT).all()


@pytest.mark.parametrize("values", TYPES)
def test_tiny_vectors_may_round_to_anything(values: ValueType) -> None:
    held = pages(1)
    held[:, 1, 0] *= 1e-4  # the V of an attention sink
    computed = held.copy()
    computed[:, 1, 0] *= -3
    assert worst_error(encode(held, values), encode(computed, values), form(values)) < LIMIT


@pytest.mark.parametrize("values", TYPES)
def test_any_bytes_give_a_number(values: ValueType) -> None:
    """NaN, infinities and padding: equal bytes are equal, others are finite errors."""
    rng = np.random.default_rng(3)
    a, b = rng.integers(0, 256, (2, 4096), np.uint8)
    zero = np.zeros_like(a)
    fmt = PageFormat(values, 512)
    assert worst_error(a, a, fmt) == 0
    assert worst_error(zero, zero, fmt) == 0
    assert np.isfinite(page_errors(a, b, fmt)).all() and worst_error(a, b, fmt) > LIMIT
    assert worst_error(a, zero, fmt) == pytest.approx(1.0)


@pytest.mark.parametrize("page_bytes", [96, 1536, 3 << 20])
def test_pages_of_any_size_and_a_shorter_last_one(page_bytes: int) -> None:
    data = pages(1, 300).reshape(-1).view(np.uint8)
    other = data.copy()
    other.view(np.float32)[-10:] += 5.0
    errors = page_errors(data, other, PageFormat(ValueType.FP32, page_bytes))
    assert len(errors) == -(-len(data) // page_bytes)
    assert (errors[:-1] == 0).all()


def test_lengths_must_agree() -> None:
    data = np.zeros(128, np.uint8)
    with pytest.raises(ValueError, match="128 bytes are compared with 64"):
        worst_error(data, data[:64], PageFormat(ValueType.FP32, 64))


# -- what the scheduler half takes pages for


class FullAttentionSpec:
    block_size = 16
    page_size_bytes = 4096
    kv_quant_mode = 0

    def __init__(self, dtype: str, quant: int = 0) -> None:
        self.dtype = _Dtype(dtype)
        self.kv_quant_mode = quant


class SlidingWindowSpec(FullAttentionSpec):
    sliding_window = 64


class _Dtype(str):
    """Prints as torch's do."""

    def __str__(self) -> str:
        return "torch." + str.__str__(self)


def formats(*specs: Any) -> dict[int, PageFormat] | str:
    groups = [SimpleNamespace(kv_cache_spec=s, layer_names=["a", "b"]) for s in specs]
    config = SimpleNamespace(kv_cache_groups=groups)
    layout: CacheLayout = geometry.cache_layout(
        config, hash_tokens=16, align_tokens=16, world_size=1, chunk_tokens=None
    )
    return geometry.page_formats(config, layout)


@pytest.mark.parametrize("values", TYPES)
def test_page_formats_of_full_attention_groups(values: ValueType) -> None:
    got = formats(FullAttentionSpec(values.value), SlidingWindowSpec(values.value))
    assert got == {0: PageFormat(values, 4096)}


@pytest.mark.parametrize(
    ("make", "why"),
    [
        (lambda: FullAttentionSpec("uint8"), "KV of type uint8"),
        (lambda: FullAttentionSpec("float8_e4m3fn", 1), "float8_e4m3fn (quantised)"),
        (lambda: FullAttentionSpec("bfloat16", 2), "bfloat16 (quantised)"),
        (lambda: SlidingWindowSpec("float32"), "no full-attention KV group"),
    ],
)
def test_what_cannot_be_compared_is_named(make: Callable[[], Any], why: str) -> None:
    got = formats(make())
    assert isinstance(got, str) and why in got
