"""Who else asked for the same tokens: under which cache salt, LoRA adapter and namespace. Pure."""

from __future__ import annotations

import hashlib
import os
from array import array
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

GENERATION = 4096
MAX_VARIANTS = 4
_NONE = "none"


@dataclass(frozen=True, slots=True)
class Variant:
    """How a prompt was asked for. ``salt`` and ``adapter``: digests keyed by this process."""

    salt: str
    adapter: str
    space: int  # a number for the namespace

    def nearest(self, others: Sequence[Variant]) -> Variant:
        """The one of ``others`` that differs in the least, the newest of those."""

        def differences(other: Variant) -> int:
            return (
                (self.salt != other.salt)
                + (self.adapter != other.adapter)
                + (self.space != other.space)
            )

        return min(reversed(others), key=differences)


class Kin:
    """The latest 4 variants of each of the latest 4096 to 8192 first chunks, at most about 8 MiB.

    Tokens, salts and adapters are kept as digests under a random key of this object: they say
    whether two are the same, and nothing else. One thread.
    """

    def __init__(self, generation: int = GENERATION) -> None:
        self._generation = generation
        self._secret = os.urandom(32)
        self._young: dict[bytes, tuple[Variant, ...]] = {}
        self._old: dict[bytes, tuple[Variant, ...]] = {}

    def variant(self, salt: str | None, adapter: bytes, space: int) -> Variant:
        """The variant of a request: its cache salt and adapter digest, if any."""
        return Variant(
            self._name((salt or "").encode("utf-8", "surrogatepass")), self._name(adapter), space
        )

    def meet(self, tokens: Iterable[int], variant: Variant) -> tuple[Variant, ...]:
        """Enter ``variant`` for these tokens; returns those that were met before, newest last."""
        key = self._digest(array("q", tokens).tobytes())
        young = self._young
        known = young.get(key) or self._old.get(key) or ()
        young[key] = (*(v for v in known if v != variant), variant)[-MAX_VARIANTS:]
        if len(young) >= self._generation:
            self._old, self._young = young, {}
        return known

    def _digest(self, data: bytes) -> bytes:
        return hashlib.blake2b(data, digest_size=8, key=self._secret).digest()

    def _name(self, data: bytes) -> str:
        return self._digest(data).hex()[:8] if data else _NONE

    def __len__(self) -> int:
        """Prompts held, those in both generations twice."""
        return len(self._young) + len(self._old)

    def check(self) -> None:
        """Raise AssertionError on a broken invariant."""
        assert len(self._young) < self._generation, "a full generation was not put away"
        assert len(self._old) in (0, self._generation), "the old generation is cut short"
        for held in (self._young, self._old):
            for variants in held.values():
                assert 0 < len(set(variants)) == len(variants) <= MAX_VARIANTS, "variants"
