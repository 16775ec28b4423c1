"""Load or recompute: a pure plan over live estimates of tier and prefill rates."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import NamedTuple

from kvoffload.core.rates import TierRate
from kvoffload.errors import ConfigError
from kvoffload.types import Decision, Tier

Prefill = Callable[[int, int], "float | None"]
"""Seconds to compute tokens [start, end) of a prompt; None while not known."""


class LoadMode(str, Enum):
    """The ``load`` configuration key."""

    AUTO = "auto"
    ALWAYS = "always"
    NEVER = "never"


def load_mode(name: str) -> LoadMode:
    """Parse the ``load`` key. Raises ConfigError that names it."""
    try:
        return LoadMode(name)
    except ValueError:
        allowed = ", ".join(m.value for m in LoadMode)
        raise ConfigError(f"load={name!r}: must be one of {allowed}") from None


class Step(NamedTuple):
    """A boundary (tokens from the root) and all bytes a load up to it moves, by tier."""

    end: int
    nbytes: Mapping[Tier, int]


@dataclass(frozen=True, slots=True)
class Plan:
    """Load up to ``end`` (tokens from the root). Seconds are None while the rates are not known."""

    end: int
    decision: Decision
    load_s: float | None = None  # expected, from allocation to answer
    recompute_s: float | None = None  # of what is loaded
    queue_s: float = 0.0  # of load_s: what goes first
    held: int = 0  # the end of what could be loaded; 0 where nothing can
    cut: bool = False  # there was room for less than was planned: load_s is of more than is loaded


PRIOR: Mapping[Tier, TierRate] = {
    Tier.DRAM: TierRate(4e9, 0.001),
    Tier.NVME: TierRate(0.5e9, 0.002),
    Tier.REMOTE: TierRate(0.1e9, 0.01),
}
"""What a tier is taken for while unknown: slower than most, so that only a hit that would pay even
then is loaded; small reads that nobody waits for (Manager) soon tell better."""
LEARN_BYTES = 256 << 20
"""At most so much is loaded of a hit while nothing is known of the engine's prefill."""
EXPLORE_BYTES = 32 << 20
"""And of a refused hit that is loaded all the same."""


def load_seconds(nbytes: Mapping[Tier, int], tiers: Mapping[Tier, TierRate]) -> float:
    """Seconds until all bytes are in HBM. Unknown tiers are taken for PRIOR.

    All bytes cross the DRAM hop; slower tiers stream into DRAM meanwhile, so the slowest hop
    counts.
    """
    return _seconds(nbytes, _hops(tiers))


Hops = Sequence[tuple[Tier, float, float]]
"""(tier, bytes per second, latency), DRAM first."""


def _hops(tiers: Mapping[Tier, TierRate]) -> Hops:
    rates = ((tier, tiers.get(tier, prior)) for tier, prior in PRIOR.items())
    return [(tier, rate.bytes_per_s, rate.latency_s) for tier, rate in rates]


def _seconds(nbytes: Mapping[Tier, int], hops: Hops) -> float:
    # Asked for every boundary that a plan may choose.
    total = sum(nbytes.values())
    if not total:
        return 0.0
    _, rate, latency = hops[0]
    slowest = total / rate
    if len(nbytes) > 1 or Tier.DRAM not in nbytes:
        for tier, rate, wait in hops[1:]:
            moved = nbytes.get(tier, 0)
            if moved:
                slowest = max(slowest, moved / rate)
                latency += wait
    return slowest + latency


def plan(
    start: int,
    steps: Sequence[Step],
    tiers: Mapping[Tier, TierRate],
    prefill: Prefill,
    mode: LoadMode = LoadMode.AUTO,
) -> Plan:
    """What to load of a hit; ``Plan.end`` is ``start`` (what HBM has) for nothing.

    ``steps`` ascend; each is servable. AUTO picks the boundary that saves the most time against
    recomputing [start, end), the longest among equals, and none that costs more than it saves.
    While the prefill rate is not known, up to LEARN_BYTES are loaded.
    """
    if not steps or mode is LoadMode.NEVER:
        return Plan(start, Decision.FORCED, held=steps[-1].end if steps else 0)
    last = steps[-1]
    if mode is LoadMode.ALWAYS:
        return _whole(start, last, last.end, tiers, prefill, Decision.FORCED)
    if prefill(start, last.end) is None:
        head = _head(steps, LEARN_BYTES)
        return _whole(start, head, last.end, tiers, prefill, Decision.UNKNOWN)
    hops = _hops(tiers)
    best, gain, load, recompute = None, 0.0, 0.0, 0.0
    # From one tier what is saved is convex in the boundary (prefill grows with its square, loading
    # with its length): only the ends can be best.
    convex = len(last.nbytes) == 1
    for step in (steps[0], last) if convex else steps:
        compute_s, load_s = prefill(start, step.end) or 0.0, _seconds(step.nbytes, hops)
        saved = compute_s - load_s
        if saved > 0 and saved >= gain:
            best, gain, load, recompute = step, saved, load_s, compute_s
    if best is None:
        return Plan(start, Decision.REFUSED, held=last.end)
    decision = Decision.WHOLE if best is last else Decision.PARTIAL
    return Plan(best.end, decision, load, recompute, held=last.end)


def explore(
    start: int, steps: Sequence[Step], tiers: Mapping[Tier, TierRate], prefill: Prefill
) -> Plan:
    """Load the head of a refused hit all the same."""
    head = _head(steps, EXPLORE_BYTES)
    return _whole(start, head, steps[-1].end, tiers, prefill, Decision.EXPLORE)


def _head(steps: Sequence[Step], nbytes: int) -> Step:
    """The last boundary whose load moves at most ``nbytes``; the first where all move more."""
    small = [s for s in steps if sum(s.nbytes.values()) <= nbytes]
    return (small or steps)[-1 if small else 0]


def _whole(
    start: int,
    step: Step,
    held: int,
    tiers: Mapping[Tier, TierRate],
    prefill: Prefill,
    decision: Decision,
) -> Plan:
    known = all(t in tiers for t, n in step.nbytes.items() if n) and Tier.DRAM in tiers
    load = load_seconds(step.nbytes, tiers) if known else None
    return Plan(step.end, decision, load, prefill(start, step.end), held=held)


DEADLINE_FLOOR_S = 0.25
"""The shortest deadline of a load that saves at least so much: a shared disk stalls for tens of
milliseconds without being broken."""
DEADLINE_LEAST_S = 0.05
"""The shortest deadline of all. In between it is what recomputing takes: who waits no longer than
that for a tier that hangs pays at most twice, whenever it began to hang."""
DEADLINE_LOADS = 4.0
"""A load that takes this many times what was expected, beyond the queue before it, is not going to
be the sooner one."""
DEADLINE_RECOMPUTE = 0.05
"""Waiting this share of what recomputing takes costs no more than the promise allows."""


def deadline_s(planned: Plan, longest_s: float) -> float:
    """How long a load may take before the rest is recomputed, at most ``longest_s``.

    While the rates are not known nothing better than ``longest_s`` is.
    """
    if planned.load_s is None:
        return longest_s
    recompute_s = planned.recompute_s if planned.recompute_s is not None else DEADLINE_FLOOR_S
    allowed = max(
        DEADLINE_LEAST_S,
        min(DEADLINE_FLOOR_S, recompute_s),
        DEADLINE_LOADS * (planned.load_s - planned.queue_s) + planned.queue_s,
        DEADLINE_RECOMPUTE * recompute_s,
    )
    return min(longest_s, allowed)
