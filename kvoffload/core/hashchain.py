"""The chunk keys of one prompt, root first: pure hashing over vLLM's chained block hashes."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from functools import lru_cache
from typing import TYPE_CHECKING

from kvoffload.errors import ConfigError
from kvoffload.types import CacheLayout, ChunkKey, GroupKind

if TYPE_CHECKING:
    from hashlib import _Hash

KEY_BYTES = 16
_DOMAIN = b"kvoffload/chunk/v1"


def _field(data: bytes) -> bytes:
    # Length-prefixed, so that no two (namespace, adapter) pairs concatenate to the same bytes.
    return len(data).to_bytes(8, "little") + data


@lru_cache(maxsize=256)
def _prefixes(namespace: bytes, adapter: bytes, layout: CacheLayout) -> tuple[_Hash | None, ...]:
    """Per group: the hash state of everything but the block hash; None for a NONE group."""
    out: list[_Hash | None] = []
    for group in layout.groups:
        if group.kind is GroupKind.NONE:
            out.append(None)
            continue
        if group.chunk_tokens <= 0 or group.chunk_tokens % layout.hash_tokens:
            raise ConfigError(
                f"chunk_tokens={group.chunk_tokens} of KV group {group.group} is not a multiple "
                f"of the hash block ({layout.hash_tokens} tokens)"
            )
        state = hashlib.sha256(_field(_DOMAIN))
        state.update(_field(namespace))
        state.update(_field(adapter))
        state.update(group.chunk_tokens.to_bytes(8, "little"))
        state.update(group.group.to_bytes(8, "little"))
        out.append(state)
    return tuple(out)


class Chain:
    """Chunk keys of one request, per KV group, growing with the request.

    ``namespace`` and ``adapter`` are digests of any length (``adapter`` is empty without LoRA). A
    chunk has a key only once its last hash-block exists. Not thread safe: a chain belongs to the
    scheduler thread; other threads only see the immutable keys. Raises ConfigError when a group's
    chunk is not a whole number of hash-blocks.
    """

    __slots__ = ("_keys", "_per_chunk", "_prefix", "_seen", "hash_tokens", "namespace_id")

    def __init__(self, namespace: bytes, adapter: bytes, layout: CacheLayout) -> None:
        self._prefix = _prefixes(namespace, adapter, layout)
        self._per_chunk = tuple(
            0 if g.kind is GroupKind.NONE else g.chunk_tokens // layout.hash_tokens
            for g in layout.groups
        )
        self._keys: tuple[list[ChunkKey], ...] = tuple([] for _ in layout.groups)
        self._seen = 0
        self.hash_tokens = layout.hash_tokens
        self.namespace_id = int.from_bytes(hashlib.sha256(namespace).digest()[:8], "little")
        """64-bit tag of the namespace in the chunk store's records (for listings, not identity)."""

    @classmethod
    def of_keys(cls, layout: CacheLayout, keys: Sequence[ChunkKey], namespace_id: int = 0) -> Chain:
        """A complete chain of known keys, for a layout of one group: a recorded prompt."""
        (group,) = layout.groups
        chain = cls.__new__(cls)
        chain._prefix = (None,)
        chain._per_chunk = (group.chunk_tokens // layout.hash_tokens,)
        chain._keys = (list(keys),)
        chain._seen = len(keys) * chain._per_chunk[0]
        chain.hash_tokens = layout.hash_tokens
        chain.namespace_id = namespace_id
        return chain

    def extend(self, block_hashes: Sequence[bytes]) -> None:
        """Take the request's whole list of chained block hashes; only new chunks are hashed.

        The list may only grow between calls (vLLM appends); a shorter list is ignored.
        """
        count = len(block_hashes)
        if count <= self._seen:
            return
        for prefix, per, keys in zip(self._prefix, self._per_chunk, self._keys, strict=True):
            if prefix is None:
                continue
            for last in range((len(keys) + 1) * per - 1, count, per):
                state = prefix.copy()
                state.update(block_hashes[last])
                keys.append(ChunkKey(state.digest()[:KEY_BYTES]))
        self._seen = count

    @property
    def tokens(self) -> int:
        """Hashed tokens so far."""
        return self._seen * self.hash_tokens

    def n_chunks(self, group: int) -> int:
        """Chunks of ``group`` that have a key; 0 for a NONE group."""
        return len(self._keys[group])

    def key(self, group: int, i: int) -> ChunkKey:
        """Key of chunk ``i`` of ``group``. Raises IndexError where there is none yet."""
        return self._keys[group][i]

    def keys(self, group: int) -> Sequence[ChunkKey]:
        """All keys of ``group``, root first: a live view, do not modify."""
        return self._keys[group]

    def check(self) -> None:
        """Raise AssertionError naming the first broken invariant."""
        for per, keys in zip(self._per_chunk, self._keys, strict=True):
            want = self._seen // per if per else 0
            assert len(keys) == want, f"{len(keys)} keys for {want} complete chunks"
            assert all(len(k) == KEY_BYTES for k in keys), "key length"
            assert len(set(keys)) == len(keys), "a key occurs twice in one chain"
