"""Live estimates of what tiers and the engine do, for the planner."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from kvoffload.core.prefill import PrefillModel
from kvoffload.types import Tier


class Ewma:
    """Amount per second from (amount, seconds) samples, recent ones counting more.

    Sums decay by ``keep`` per sample, so a sample counts by its duration. Known after ``warm``
    samples. A tier that changes for good (a slow disk that recovers) is not waited for that long:
    where sums that decay by ``quick`` say more than ``apart`` times as much or as little, what was
    before is forgotten.
    """

    def __init__(
        self, keep: float = 0.9, warm: int = 3, quick: float = 0.5, apart: float = 2.0
    ) -> None:
        self._keep, self._warm, self._quick, self._apart = keep, warm, quick, apart
        self._samples = 0
        self._slow = (0.0, 0.0)  # amount, seconds
        self._fast = (0.0, 0.0)

    def add(self, amount: float, seconds: float) -> None:
        """Samples of nothing, or of no time, say nothing and are ignored."""
        if amount <= 0 or seconds <= 0:
            return
        self._samples += 1
        self._slow = _decayed(self._slow, self._keep, amount, seconds)
        self._fast = _decayed(self._fast, self._quick, amount, seconds)
        ratio = (self._fast[0] / self._fast[1]) / (self._slow[0] / self._slow[1])
        if not 1 / self._apart <= ratio <= self._apart:
            self._slow = self._fast

    @property
    def rate(self) -> float | None:
        """Amount per second, None until known."""
        return self._slow[0] / self._slow[1] if self._samples >= self._warm else None


def _decayed(
    sums: tuple[float, float], keep: float, amount: float, seconds: float
) -> tuple[float, float]:
    return sums[0] * keep + amount, sums[1] * keep + seconds


@dataclass(frozen=True, slots=True)
class TierRate:
    """What a tier does: bytes per second, and seconds per load that do not depend on its size."""

    bytes_per_s: float
    latency_s: float


class Rates:
    """Live estimates that the planner uses. Deterministic; not thread safe (the Manager locks).

    Bytes count all shards of a chunk, as ``GroupLayout.slot_bytes`` does, whichever rank moved
    them.
    """

    LATENCY_S: Mapping[Tier, float] = {Tier.DRAM: 0.0005, Tier.NVME: 0.001, Tier.REMOTE: 0.002}
    """Fixed cost per load; subtracted from samples (down to a tenth) so that small loads do not
    make a tier look slow."""
    STEP_SHARE = 0.1
    STEP_MAX_S = 0.1

    def __init__(self) -> None:
        self._tiers: dict[Tier, Ewma] = {}
        self.prefill = PrefillModel()
        self.step_s = 0.0
        """What a load takes beyond its transfer: it starts after one forward of the engine and is
        seen to be complete after another. A tenth of the error of each load that was alone in the
        engine corrects it: beside others a load waits for their steps, which computing would too,
        and which refusing loads makes longer."""

    def observe(self, tier: Tier, nbytes: int, seconds: float) -> None:
        """A load moved ``nbytes`` out of ``tier`` in ``seconds``."""
        net = max(seconds - self.LATENCY_S[tier], seconds / 10)
        self._tiers.setdefault(tier, Ewma()).add(nbytes, net)

    def observe_load(self, took_s: float, expected_s: float) -> None:
        """A load took ``took_s`` from allocation to answer; ``expected_s`` had been planned."""
        corrected = self.step_s + self.STEP_SHARE * (took_s - expected_s)
        self.step_s = min(self.STEP_MAX_S, max(0.0, corrected))

    def tiers(
        self,
        queued: Mapping[Tier, int] | None = None,
        standstill_s: Mapping[Tier, float] | None = None,
    ) -> dict[Tier, TierRate]:
        """The tiers whose rate is known. ``queued``: bytes that go first, by tier.
        ``standstill_s``: for how long nothing has come out of a tier that works on something.

        DRAM's latency includes ``step_s``: every load crosses the DRAM hop.
        """
        out: dict[Tier, TierRate] = {}
        for tier, ewma in self._tiers.items():
            if ewma.rate is not None:
                ahead = (queued or {}).get(tier, 0) / ewma.rate
                ahead += (standstill_s or {}).get(tier, 0.0)
                extra = self.step_s if tier is Tier.DRAM else 0.0
                out[tier] = TierRate(ewma.rate, self.LATENCY_S[tier] + extra + ahead)
        return out

    def check(self) -> None:
        """Raise AssertionError unless every known rate is positive."""
        assert all(r.bytes_per_s > 0 for r in self.tiers().values()), "tier rate"
        assert self.step_s >= 0, "step time"
        self.prefill.check()
