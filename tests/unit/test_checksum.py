"""The two-level XXH3-64 checksum against the independent `xxhash` package, on every ISA path."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import xxhash
from hypothesis import given, settings
from hypothesis import strategies as st

from kvoffload import _core

LEAF = _core.LEAF_BYTES
ISAS = ["base"] + [
    i for i, f in (("avx2", "avx2"), ("avx512", "avx512f")) if f in _core.cpu_features()
]
SIZES = [
    0,
    1,
    3,
    8,
    16,
    17,
    128,
    129,
    240,
    241,
    1023,
    1024,
    1025,
    LEAF - 1,
    LEAF,
    LEAF + 1,
    5 * LEAF + 77,
]


@pytest.fixture(params=ISAS)
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    before = _core._isa()
    _core._set_isa(request.param)
    yield request.param
    _core._set_isa(before)


def reference_leaves(data: bytes, key: bytes) -> list[int]:
    seed = int.from_bytes(key[:8], "little") ^ int.from_bytes(key[8:], "little")
    return [xxhash.xxh3_64_intdigest(data[i : i + LEAF], seed) for i in range(0, len(data), LEAF)]


def reference_root(data: bytes, key: bytes) -> int:
    seed = int.from_bytes(key[:8], "little") ^ int.from_bytes(key[8:], "little")
    joined = b"".join(h.to_bytes(8, "little") for h in reference_leaves(data, key))
    return xxhash.xxh3_64_intdigest(joined, seed)


@pytest.mark.parametrize("size", SIZES)
def test_matches_xxhash(isa: str, size: int) -> None:
    assert _core._isa() == isa
    rng = np.random.default_rng(size)
    data, key = rng.bytes(size), rng.bytes(16)
    assert _core.leaf_checksums(data, key).tolist() == reference_leaves(data, key)
    assert _core.checksum(data, key) == reference_root(data, key)


@settings(max_examples=60, deadline=None)
@given(
    data=st.binary(max_size=70_000),
    key=st.binary(min_size=16, max_size=16),
    shift=st.integers(0, 63),
    which=st.sampled_from(ISAS),
)
def test_any_bytes_any_alignment(data: bytes, key: bytes, shift: int, which: str) -> None:
    padded = bytearray(shift) + data
    before = _core._isa()
    _core._set_isa(which)
    try:
        assert _core.checksum(memoryview(padded)[shift:], key) == reference_root(data, key)
    finally:
        _core._set_isa(before)


def test_every_bytes_like_object_agrees() -> None:
    data, key = np.random.default_rng(1).bytes(40_000), bytes(range(16))
    want = reference_root(data, key)
    for view in (data, bytearray(data), memoryview(data), np.frombuffer(data, np.uint8)):
        assert _core.checksum(view, key) == want


def test_one_flipped_bit_or_another_key_shows() -> None:
    data, key = bytearray(np.random.default_rng(2).bytes(3 * LEAF)), bytes(range(16))
    want, leaves = _core.checksum(data, key), _core.leaf_checksums(data, key)
    data[LEAF + 5] ^= 1
    assert _core.checksum(data, key) != want
    assert (_core.leaf_checksums(data, key) != leaves).tolist() == [False, True, False]
    data[LEAF + 5] ^= 1
    assert _core.checksum(data, key) == want
    assert _core.checksum(data, bytes(15) + b"\x01") != want


def test_bad_arguments_are_refused() -> None:
    with pytest.raises(ValueError, match="16 bytes"):
        _core.checksum(b"x", b"short")
    with pytest.raises((ValueError, BufferError)):
        _core.checksum(np.zeros((4, 4), np.uint8)[:, ::2], bytes(16))
    with pytest.raises(TypeError):
        _core.checksum("text", bytes(16))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="isa"):
        _core._set_isa("sse9")
