"""Chunk keys: what they cover, and that growing a chain changes nothing that was there."""

from __future__ import annotations

import hashlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvoffload.core.hashchain import Chain
from kvoffload.errors import ConfigError
from kvoffload.types import GroupKind, GroupLayout
from tests.support.fakes import block_hashes, full_group, layout_of, sliding_group

TWO = layout_of(full_group(0, blocks=4), sliding_group(1, window=64))


def test_keys_exist_only_for_complete_chunks() -> None:
    chain = Chain(b"ns", b"", TWO)
    chain.extend(block_hashes("abcdefghi"))
    assert chain.tokens == 9 * 16
    assert (chain.n_chunks(0), chain.n_chunks(1)) == (2, 9)
    assert chain.key(0, 1) == chain.keys(0)[1] and len(chain.key(0, 1)) == 16
    with pytest.raises(IndexError):
        chain.key(0, 2)
    chain.check()


@given(text=st.text("ab", max_size=40), cuts=st.lists(st.integers(0, 40), max_size=6))
def test_growing_in_steps_gives_the_same_keys(text: str, cuts: list[int]) -> None:
    whole, grown = Chain(b"ns", b"", TWO), Chain(b"ns", b"", TWO)
    hashes = block_hashes(text)
    whole.extend(hashes)
    for cut in sorted(cuts):
        grown.extend(hashes[:cut])
        grown.check()
    grown.extend(hashes)
    grown.extend(hashes[:1])  # a shorter list changes nothing
    assert [list(grown.keys(g)) for g in (0, 1)] == [list(whole.keys(g)) for g in (0, 1)]


def test_common_prefix_shares_keys_and_nothing_else() -> None:
    a, b = Chain(b"ns", b"", TWO), Chain(b"ns", b"", TWO)
    a.extend(block_hashes("aaaaaaaaaaaa"))
    b.extend(block_hashes("aaaaaaaabbbb"))
    assert a.keys(0)[:2] == b.keys(0)[:2] and a.key(0, 2) != b.key(0, 2)


def test_everything_that_gives_bytes_their_meaning_is_in_the_key() -> None:
    hashes = block_hashes("abcdefgh")

    def key(namespace: bytes, adapter: bytes, blocks: int, group: int) -> bytes:
        groups = [full_group(i, blocks=blocks) for i in range(group + 1)]
        chain = Chain(namespace, adapter, layout_of(*groups))
        chain.extend(hashes)
        return chain.key(group, 8 // blocks - 1)  # each ends with the same hash-block

    variants = [
        key(b"ns", b"", 4, 0),
        key(b"nt", b"", 4, 0),
        key(b"ns", b"lora", 4, 0),
        key(b"nsl", b"ora", 4, 0),
        key(b"ns", b"", 8, 0),
        key(b"ns", b"", 4, 1),
    ]
    assert len(set(variants)) == len(variants)


def test_key_is_the_documented_hash() -> None:
    """Golden: the key format outlives the process, so a change must be deliberate."""
    chain = Chain(b"ns", b"ad", layout_of(full_group(blocks=2)))
    hashes = block_hashes("ab")
    chain.extend(hashes)
    parts = (b"kvoffload/chunk/v1", b"ns", b"ad")
    plain = b"".join(len(p).to_bytes(8, "little") + p for p in parts)
    plain += (32).to_bytes(8, "little") + (0).to_bytes(8, "little") + hashes[1]
    assert chain.key(0, 0) == hashlib.sha256(plain).digest()[:16]


def test_chunk_must_be_whole_hash_blocks_and_none_groups_have_no_keys() -> None:
    with pytest.raises(ConfigError, match="not a multiple"):
        Chain(b"ns", b"", layout_of(full_group(block_tokens=24), hash_tokens=16))
    none = GroupLayout(1, GroupKind.NONE, 16, 0, 0, 1)
    chain = Chain(b"ns", b"", layout_of(full_group(), none))
    chain.extend(block_hashes("abc"))
    assert (chain.n_chunks(0), chain.n_chunks(1)) == (3, 0)
    chain.check()
