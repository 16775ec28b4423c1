"""Eviction policies by name."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from kvoffload.core.policy.base import Policy
from kvoffload.core.policy.fifo import FifoPolicy
from kvoffload.core.policy.lru import LruPolicy
from kvoffload.errors import ConfigError

POLICIES: dict[str, Callable[[Iterator[int]], Policy]] = {"lru": LruPolicy, "fifo": FifoPolicy}


def make_policy(name: str, ticks: Iterator[int]) -> Policy:
    """A policy for one slot class. ``ticks`` counts up; policies that share it compare by heat.

    Raises ConfigError for an unknown name.
    """
    if name not in POLICIES:
        raise ConfigError(f"policy={name!r}: must be one of {', '.join(sorted(POLICIES))}")
    return POLICIES[name](ticks)


__all__ = ["POLICIES", "FifoPolicy", "LruPolicy", "Policy", "make_policy"]
