"""Eviction policies by name."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from kvoffload.core.policy.adaptive import AdaptivePolicy
from kvoffload.core.policy.aged import AgedPolicy
from kvoffload.core.policy.base import Policy
from kvoffload.core.policy.fifo import FifoPolicy
from kvoffload.core.policy.lanes import ArcPolicy, S3FifoPolicy
from kvoffload.core.policy.lru import LruPolicy
from kvoffload.errors import ConfigError

POLICIES: dict[str, Callable[[Iterator[int]], Policy]] = {
    "lru": LruPolicy,
    "fifo": FifoPolicy,
    "s3fifo": S3FifoPolicy,
    "arc": ArcPolicy,
    "adaptive": AdaptivePolicy,
}


def make_policy(name: str, ticks: Iterator[int]) -> Policy:
    """A policy for one slot class. ``ticks`` counts up; policies that share it compare by heat.

    Raises ConfigError for an unknown name.
    """
    if name not in POLICIES:
        raise ConfigError(f"policy={name!r}: must be one of {', '.join(sorted(POLICIES))}")
    return POLICIES[name](ticks)


__all__ = [
    "POLICIES",
    "AdaptivePolicy",
    "AgedPolicy",
    "ArcPolicy",
    "FifoPolicy",
    "LruPolicy",
    "Policy",
    "S3FifoPolicy",
    "make_policy",
]
