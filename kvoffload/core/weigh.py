"""Load or recompute, for one lookup: the pure planner over what is held, queued and learned."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from kvoffload.core.hashchain import Chain
from kvoffload.core.lease import Prefetches
from kvoffload.core.loader import Loader
from kvoffload.core.lookup import Hit
from kvoffload.core.planner import LoadMode, Plan, Step, explore, plan
from kvoffload.core.prefetch import Prefetcher
from kvoffload.core.rates import Rates
from kvoffload.core.stats import Counters
from kvoffload.types import Decision, Tier

EXPLORE_EVERY = 64
"""Of one in so many refused hits in DRAM the head is loaded all the same, so that a bad estimate is
unlearned: only loads tell what loads cost."""
EXPLORE_S = 1.0
EXPLORE_BYTES = 4 << 20
"""A refused hit on NVMe sets this much of it moving to DRAM, at most once a second: nobody waits,
and the estimate follows the disk."""
_EXPLORER = ""  # no request: owner of reads that only serve to learn


class Weigher:
    """Not thread safe: the Manager's lock guards it."""

    def __init__(
        self,
        loader: Loader,
        prefetcher: Prefetcher,
        prefetches: Prefetches,
        rates: Rates,
        counters: Counters,
        mode: LoadMode,
    ) -> None:
        self._loader = loader
        self._prefetcher = prefetcher
        self._prefetches = prefetches
        self._rates = rates
        self._counters = counters
        self._mode = mode
        self._explored = float("-inf")

    def plan(self, chain: Chain, start: int, limit: int, now: float) -> tuple[Plan, Hit]:
        """See Manager.plan; also the hit as far as it is to be loaded."""
        near = self._in_dram(chain, start, limit, now)
        if near is not None:
            return near
        search, held = self._loader.search(chain, start, limit, now)
        if held > start and self._prefetcher.probe(chain, start, held, now):
            search, held = self._loader.search(chain, start, limit, now)
        if held <= start:
            return Plan(start, Decision.MISS), Hit(start, 0, {})
        steps = search.steps(start, held)
        ahead = self._loader.ahead(chain, start, held)
        still = self._loader.standstill_s()
        tiers = self._rates.tiers({Tier.NVME: ahead}, {Tier.NVME: still})
        made = plan(start, steps, tiers, self._rates.prefill.seconds, self._mode)
        nvme = tiers.get(Tier.NVME)
        if ahead and nvme and made.load_s is not None and _reads_nvme(steps, made.end):
            queue_s = min(made.load_s, ahead / nvme.bytes_per_s)
            made = replace(made, queue_s=queue_s)
        if made.end < held:
            self._counters.planner_refused += 1
        if made.decision is Decision.REFUSED:
            made = self._explore(chain, start, steps, made, now)
        return made, search.hit(start, made.end)

    def _in_dram(self, chain: Chain, start: int, limit: int, now: float) -> tuple[Plan, Hit] | None:
        """The plan of most hits, without a search and without weighing every boundary; None where
        that is not it.

        What a load from one tier saves is convex in its length (prefill's seconds are, its own are
        linear), so that the whole or nothing saves most.
        """
        found = self._loader.in_dram(chain, start, limit, now)
        if found is None:
            return None
        if found.end <= start:
            return Plan(start, Decision.MISS), Hit(start, 0, {})
        step = Step(found.end, {Tier.DRAM: found.nbytes})
        made = plan(start, [step], self._rates.tiers(), self._rates.prefill.seconds, self._mode)
        if made.end < found.end or made.decision is Decision.UNKNOWN:
            return None  # part of it may be better
        return made, Hit(found.end, found.chunks, {Tier.DRAM: found.end - start})

    def _explore(
        self, chain: Chain, start: int, steps: Sequence[Step], refused: Plan, now: float
    ) -> Plan:
        """Keep learning what the refused hit would cost, at nobody's expense where possible."""
        if steps[-1].nbytes.get(Tier.NVME):
            if now - self._explored >= EXPLORE_S:
                self._explored = now
                end = steps[-1].end
                self._prefetcher.prefetch(_EXPLORER, chain, start, end, now, EXPLORE_BYTES)
                self._prefetches.cancel(_EXPLORER)
        elif self._counters.planner_refused % EXPLORE_EVERY == 0:
            return explore(start, steps, self._rates.tiers(), self._rates.prefill.seconds)
        return refused

    def worth_prefetching(
        self, chain: Chain, start: int, limit: int, now: float, wished: bool = False
    ) -> int:
        """The boundary up to which a later load will pay, whatever the queue is now, or is
        ``wished`` for; ``start`` where all of it is in DRAM already, where it then ages as if it
        were used."""
        near = self._loader.in_dram(chain, start, limit, now)
        if near is not None:
            self._loader.touch(chain, start, near.end)
            return start
        search, end = self._loader.search(chain, start, limit, now)
        if end > start and search.whole(start, end):
            self._loader.touch(chain, start, end)
            return start
        if self._mode is LoadMode.AUTO and not wished:
            tiers, prefill = self._rates.tiers(), self._rates.prefill.seconds
            end = plan(start, search.steps(start, end), tiers, prefill).end
        return end


def _reads_nvme(steps: Sequence[Step], end: int) -> bool:
    """Whether a load up to the boundary ``end`` waits for reads from NVMe at all."""
    return any(s.end == end and s.nbytes.get(Tier.NVME) for s in steps)
