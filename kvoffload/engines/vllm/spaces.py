"""Namespaces that were in use: by what fields they differ, and which ones an NVMe store knows.

``namespaces.json`` beside the chunk store (mode 0600) holds the latest 64 namespaces whose chunks
went there, with a short digest of each field: after a restart with another setting that tells which
one made everything a miss. Losing it loses only that.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from kvoffload.core.hashchain import Chain
from kvoffload.core.lookup import primary
from kvoffload.files import replace_json
from kvoffload.types import CacheLayout, ChunkKey, GroupKind, GroupLayout

FILE = "namespaces.json"
MAX_KNOWN = 64
_MAX_BYTES = 4 << 20


@dataclass(frozen=True, slots=True)
class Space:
    """A namespace: its 16 bytes, digests by field, and how its first KV group is cut up."""

    namespace: bytes
    fields: Mapping[str, str]
    group: int
    chunk_tokens: int
    hash_tokens: int
    number: int = 0  # in this process
    since: float = 0.0  # seconds of the Manager's clock
    used: float = field(default=0.0, compare=False)  # seconds since the epoch

    def differs(self, other: Space) -> list[str]:
        """Names of the fields in which the two differ."""
        names = self.fields.keys() | other.fields.keys()
        out = [n for n in sorted(names) if self.fields.get(n) != other.fields.get(n)]
        if self.chunk_tokens != other.chunk_tokens:
            out.append("chunk_tokens")
        return out

    def first_key(self, block_hashes: Sequence[bytes], adapter: bytes) -> ChunkKey | None:
        """Key of a prompt's first chunk here; None where the prompt does not fill it."""
        blocks = self.chunk_tokens // self.hash_tokens
        if len(block_hashes) < blocks:
            return None
        layout = CacheLayout(
            (GroupLayout(self.group, GroupKind.FULL, self.hash_tokens, blocks, 1, 1),),
            self.hash_tokens,
            self.hash_tokens,
            1,
        )
        chain = Chain(self.namespace, adapter, layout)
        chain.extend(block_hashes[:blocks])
        return chain.key(0, 0)

    def as_json(self) -> dict[str, Any]:
        """What ``of_json`` reads."""
        return {
            "namespace": self.namespace.hex(),
            "group": self.group,
            "chunk_tokens": self.chunk_tokens,
            "hash_tokens": self.hash_tokens,
            "used": self.used,
            "fields": dict(self.fields),
        }

    @classmethod
    def of_json(cls, data: Any) -> Space:
        """Raises KeyError, TypeError, ValueError or AttributeError on what is none."""
        fields = {str(k): str(v) for k, v in data["fields"].items()}
        group, chunk, hashed = (int(data[k]) for k in ("group", "chunk_tokens", "hash_tokens"))
        namespace = bytes.fromhex(data["namespace"])
        if len(namespace) != 16 or group < 0 or hashed <= 0 or chunk < hashed or chunk % hashed:
            raise ValueError("not a namespace")
        return cls(namespace, fields, group, chunk, hashed, used=float(data["used"]))


class KnownSpaces:
    """Namespaces on NVMe, of this engine and of others before it. One thread; does I/O.

    ``roots``: the store's directories; all are read, the first is written.
    """

    def __init__(self, layout: CacheLayout, roots: Sequence[Path]) -> None:
        self._hash_tokens = layout.hash_tokens
        self._group = primary(layout).group
        self._roots = roots
        self._known: dict[bytes, Space] = {}
        for root in roots:
            for space in _read(root / FILE):
                self._known[space.namespace] = space

    def remember(self, space: Space) -> None:
        """``space`` stores to NVMe from now on. Raises OSError."""
        if not self._roots:
            return
        self._known[space.namespace] = replace(space, used=time.time())
        latest = sorted(self._known.values(), key=lambda s: s.used)[-MAX_KNOWN:]
        self._known = {s.namespace: s for s in latest}
        known = [s.as_json() for s in latest]
        replace_json(self._roots[0] / FILE, {"version": 1, "namespaces": known})

    def keys_elsewhere(
        self, here: Space, block_hashes: Sequence[bytes], adapter: bytes
    ) -> list[tuple[Space, ChunkKey]]:
        """A prompt's first chunk under every other known namespace with the same hash blocks."""
        out = []
        for space in reversed(self._known.values()):
            same = (space.group, space.hash_tokens) == (self._group, self._hash_tokens)
            if space.namespace != here.namespace and same:
                key = space.first_key(block_hashes, adapter)
                if key is not None:
                    out.append((space, key))
        return out


def _read(path: Path) -> list[Space]:
    """What the file holds; nothing where it is missing, damaged or not ours."""
    try:
        if path.is_symlink() or path.stat().st_size > _MAX_BYTES:
            return []
        found = json.loads(path.read_bytes())["namespaces"]
        return [Space.of_json(data) for data in found[-MAX_KNOWN:]]
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return []
