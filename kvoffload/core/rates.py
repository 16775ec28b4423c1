"""Live estimates of what tiers and the engine do, for the planner."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from kvoffload.core.prefill import PrefillModel
from kvoffload.types import Tier


class Ewma:
    """Amount per second from (amount, seconds) samples, recent ones counting more.

    Sums decay by ``keep`` per sample, so a sample counts by its duration. Known after ``warm``
    samples.
    """

    def __init__(self, keep: float = 0.9, warm: int = 3) -> None:
        self._keep = keep
        self._warm = warm
        self._samples = 0
        self._amount = 0.0
        self._seconds = 0.0

    def add(self, amount: float, seconds: float) -> None:
        """Samples of nothing, or of no time, say nothing and are ignored."""
        if amount <= 0 or seconds <= 0:
            return
        self._samples += 1
        self._amount = self._amount * self._keep + amount
        self._seconds = self._seconds * self._keep + seconds

    @property
    def rate(self) -> float | None:
        """Amount per second, None until known."""
        return self._amount / self._seconds if self._samples >= self._warm else None


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

    def tiers(self, queued: Mapping[Tier, int] | None = None) -> dict[Tier, TierRate]:
        """The tiers whose rate is known. ``queued``: bytes that go first, by tier.

        DRAM's latency includes ``step_s``: every load crosses the DRAM hop.
        """
        out: dict[Tier, TierRate] = {}
        for tier, ewma in self._tiers.items():
            if ewma.rate is not None:
                ahead = (queued or {}).get(tier, 0) / ewma.rate
                extra = self.step_s if tier is Tier.DRAM else 0.0
                out[tier] = TierRate(ewma.rate, self.LATENCY_S[tier] + extra + ahead)
        return out

    def check(self) -> None:
        """Raise AssertionError unless every known rate is positive."""
        assert all(r.bytes_per_s > 0 for r in self.tiers().values()), "tier rate"
        assert self.step_s >= 0, "step time"
        self.prefill.check()
