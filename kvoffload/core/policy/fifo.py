"""First in, first out: the reference policy."""

from __future__ import annotations

from collections.abc import Sequence

from kvoffload.core.policy.base import RETIRED, OrderedPolicy
from kvoffload.types import ChunkKey


class FifoPolicy(OrderedPolicy):
    """Evicts in order of arrival. A parent waits for its children: only leaves are offered."""

    def touch(self, chain: Sequence[ChunkKey]) -> None:
        """Use does not matter here, except that it takes back ``retire``."""
        stamp = self._stamp
        for key in chain:
            if stamp[key] < 0:
                stamp[key] += RETIRED
