"""A lease on as much of a hit as the arena has room for."""

from __future__ import annotations

from kvoffload.core.hashchain import Chain
from kvoffload.core.lease import Lease
from kvoffload.core.manager import Manager

LEASE_TRIES = 4
"""Where the arena has no room for a whole hit, half of it is tried, then a quarter, ..."""


def lease_what_fits(
    manager: Manager, owner: str, chain: Chain, start: int, end: int
) -> tuple[Lease | None, int]:
    """A lease on [start, end), or on less where the arena has no room for all of it; and its end.

    (None, ``start``) when nothing fits, or the chunks have gone.
    """
    for _ in range(LEASE_TRIES):
        lease = manager.acquire(owner, chain, start, end)
        if lease is not None:
            return lease, end
        half = start + (end - start) // 2
        end = manager.lookup(chain, start, half).end
        if end <= start:
            break
    return None, start
