"""A discrete simulation of load-or-recompute: the planner, that learns, against those who need not.

Requests come one after the other; each has a prefix held in DRAM and, behind it, on NVMe, and a tail
that nobody holds. A policy says how much of the prefix to load, the world says how long that and the
rest take. The planner sees only what a server sees: noisy times of its own loads and prefill steps.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from kvoffload.core.planner import Plan, Step, explore, load_seconds, plan
from kvoffload.core.prefill import PrefillWork
from kvoffload.core.rates import Rates, TierRate
from kvoffload.core.weigh import EXPLORE_BYTES, EXPLORE_EVERY, EXPLORE_S
from kvoffload.types import Decision, Tier

CHUNK = 128  # tokens
STEP_TOKENS = 2048  # of one prefill step
LATENCY = {Tier.DRAM: Rates.LATENCY_S[Tier.DRAM], Tier.NVME: Rates.LATENCY_S[Tier.NVME]}


@dataclass(frozen=True)
class World:
    """True costs. Rates in bytes per second may change with time (seconds)."""

    token_bytes: int
    dram: Callable[[float], float]
    nvme: Callable[[float], float]
    alpha: float  # seconds per token
    beta: float  # seconds per token and token of context
    step_s: float  # what a load takes beyond its bytes
    noise: float = 0.15  # standard deviation of a measured time, relative

    def prefill(self, start: int, end: int) -> float:
        work = PrefillWork.span(start, end)
        return self.alpha * work.tokens + self.beta * work.token_context

    def tiers(self, now: float) -> dict[Tier, TierRate]:
        return {
            Tier.DRAM: TierRate(self.dram(now), LATENCY[Tier.DRAM] + self.step_s),
            Tier.NVME: TierRate(self.nvme(now), LATENCY[Tier.NVME]),
        }


@dataclass(frozen=True)
class Ask:
    """A request: tokens held in DRAM, then on NVMe, then by nobody; seconds to the next one."""

    dram: int
    nvme: int
    fresh: int
    pause: float

    def steps(self, token_bytes: int) -> list[Step]:
        held = range(CHUNK, self.dram + self.nvme + 1, CHUNK)
        return [
            Step(
                end,
                {
                    Tier.DRAM: min(end, self.dram) * token_bytes,
                    Tier.NVME: max(0, end - self.dram) * token_bytes,
                },
            )
            for end in held
        ]


Policy = Callable[[float, Sequence[Step]], int]
"""(now, boundaries) -> tokens to load."""


class Learner:
    """The planner with its estimates and its ways to keep learning, as in the Manager."""

    def __init__(self, world: World, seed: int) -> None:
        self.rates = Rates()
        self._world = world
        self._rng = random.Random(seed)
        self._explored = float("-inf")
        self._refused = 0

    def choose(self, now: float, steps: Sequence[Step]) -> Plan:
        made = plan(0, steps, self.rates.tiers(), self.rates.prefill.seconds)
        if made.decision is Decision.REFUSED:
            self._refused += 1
            if steps[-1].nbytes[Tier.NVME] and now - self._explored >= EXPLORE_S:
                self._explored = now
                seconds = EXPLORE_BYTES / self._world.nvme(now) + LATENCY[Tier.NVME]
                self.rates.observe(Tier.NVME, EXPLORE_BYTES, self._seen(seconds))
            elif not steps[-1].nbytes[Tier.NVME] and self._refused % EXPLORE_EVERY == 0:
                made = explore(0, steps, self.rates.tiers(), self.rates.prefill.seconds)
        return made

    def _seen(self, seconds: float) -> float:
        return max(0.1, self._rng.gauss(1.0, self._world.noise)) * seconds

    def loaded(self, now: float, step: Step, planned: Plan) -> None:
        world = self._world
        total = sum(step.nbytes.values())
        if nvme := step.nbytes[Tier.NVME]:
            took = nvme / world.nvme(now) + LATENCY[Tier.NVME]
            self.rates.observe(Tier.NVME, nvme, self._seen(took))
        else:  # with NVMe behind it, a load waits: such copies say nothing of DRAM
            took = total / world.dram(now) + LATENCY[Tier.DRAM]
            self.rates.observe(Tier.DRAM, total, self._seen(took))
            if planned.load_s is not None:
                whole = load_seconds(step.nbytes, world.tiers(now))
                self.rates.observe_load(self._seen(whole), planned.load_s)

    def computed(self, start: int, end: int) -> None:
        for low in range(start, end, STEP_TOKENS):
            work = PrefillWork.span(low, min(low + STEP_TOKENS, end))
            high = low + work.tokens
            self.rates.prefill.add(work, self._seen(self._world.prefill(low, high)))


def cost(world: World, now: float, ask: Ask, end: int) -> float:
    """True seconds to the first token when [0, end) is loaded."""
    steps = [s for s in ask.steps(world.token_bytes) if s.end == end]
    load = load_seconds(steps[0].nbytes, world.tiers(now)) if steps else 0.0
    return load + world.prefill(end, ask.dram + ask.nvme + ask.fresh)


def run_static(world: World, asks: Sequence[Ask], policy: Policy) -> float:
    """Summed seconds to first token under a fixed policy."""
    now = total = 0.0
    for ask in asks:
        took = cost(world, now, ask, policy(now, ask.steps(world.token_bytes)))
        total += took
        now += took + ask.pause
    return total


def run_learner(world: World, asks: Sequence[Ask], seed: int = 0) -> float:
    """Summed seconds to first token under the planner."""
    learner = Learner(world, seed)
    now = total = 0.0
    for ask in asks:
        steps = ask.steps(world.token_bytes)
        made = learner.choose(now, steps) if steps else Plan(0, Decision.MISS)
        took = cost(world, now, ask, made.end)
        if made.end:
            learner.loaded(now, next(s for s in steps if s.end == made.end), made)
        learner.computed(made.end, ask.dram + ask.nvme + ask.fresh)
        total += took
        now += took + ask.pause
    return total


def threshold(tokens: int) -> Policy:
    """Load all of a hit of at least ``tokens``: 0 is always, a huge one never."""
    return lambda now, steps: steps[-1].end if steps and steps[-1].end >= tokens else 0


def oracle(world: World) -> Policy:
    """The planner's choice with the true rates of the moment."""
    return lambda now, steps: plan(0, steps, world.tiers(now), world.prefill).end


def traffic(seed: int, count: int = 1500) -> list[Ask]:
    """Chats, documents and strangers."""
    rng = random.Random(seed)
    out = []
    for _ in range(count):
        kind = rng.random()
        length = CHUNK * int(2 ** rng.uniform(0, 7))
        dram = 0 if kind < 0.3 else length if kind < 0.5 else CHUNK * (length // CHUNK // 2)
        nvme = 0 if kind > 0.9 else length - dram
        out.append(Ask(dram, nvme, rng.randrange(16, 1024), rng.expovariate(2.0)))
    return out
