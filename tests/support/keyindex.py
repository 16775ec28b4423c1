"""Reference of the native key index: a dict, one key at a time. The contract is ``KeyIndex``'s."""

from __future__ import annotations

from collections.abc import Sequence


class ReferenceIndex:
    """Keys of 16 bytes to numbers. Not thread safe."""

    def __init__(self) -> None:
        self._values: dict[bytes, int] = {}

    def insert(self, keys: Sequence[bytes], values: Sequence[int]) -> int:
        """Set the value of each key; returns how many keys are new."""
        before = len(self._values)
        self._values.update(zip(keys, values, strict=True))
        return len(self._values) - before

    def erase(self, keys: Sequence[bytes]) -> int:
        """Returns how many were there."""
        return sum(self._values.pop(key, None) is not None for key in keys)

    def contains(self, keys: Sequence[bytes]) -> bytes:
        """One byte per key, 1 if there."""
        return bytes(key in self._values for key in keys)

    def get(self, keys: Sequence[bytes], missing: int) -> list[int]:
        """The value of each key, ``missing`` where it is not there."""
        return [self._values.get(key, missing) for key in keys]

    def longest_prefix(self, keys: Sequence[bytes]) -> int:
        """How many keys from the first on are there."""
        return next((i for i, key in enumerate(keys) if key not in self._values), len(keys))

    def __len__(self) -> int:
        return len(self._values)

    def check(self) -> None:
        """Raise AssertionError naming the first broken invariant."""
        assert all(len(key) == 16 for key in self._values), "a key that is not 16 bytes long"
