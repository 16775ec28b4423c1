"""What a machine takes to compute a prompt and to load its KV: the modelled time to first token."""

from __future__ import annotations

from dataclasses import dataclass

from kvoffload.core.manager import Manager
from kvoffload.core.prefill import PrefillWork
from kvoffload.core.rates import Rates, TierRate
from kvoffload.types import Tier


@dataclass(frozen=True, slots=True)
class Hardware:
    """One engine's rates. The defaults are an 8B model in bf16 on one H100 (docs/replay.md).

    Computing tokens [a, b) of a prompt takes ``alpha_s (b - a) + beta_s (b^2 - a^2) / 2``.
    """

    alpha_s: float = 29.5e-6  # per token: dense layers
    beta_s: float = 1.32e-9  # per token and token before it: attention
    dram_bytes_per_s: float = 50e9
    nvme_bytes_per_s: float = 7e9

    def prefill_s(self, start: int, end: int) -> float:
        """Seconds to compute prompt tokens [start, end)."""
        return (end - start) * (self.alpha_s + self.beta_s * (start + end) / 2)

    def tiers(self) -> dict[Tier, TierRate]:
        """Rates of the tiers, with the fixed cost of a load that the planner assumes."""
        rates = {Tier.DRAM: self.dram_bytes_per_s, Tier.NVME: self.nvme_bytes_per_s}
        return {tier: TierRate(rate, Rates.LATENCY_S[tier]) for tier, rate in rates.items()}

    def read_s(self, nbytes: int) -> float:
        """Seconds of one NVMe read."""
        return Rates.LATENCY_S[Tier.NVME] + nbytes / self.nvme_bytes_per_s

    def teach(self, manager: Manager) -> None:
        """What a warm engine has learned: prefill and both tiers."""
        for tokens in (512, 4096, 32768):
            manager.observe_prefill(PrefillWork.span(0, tokens), self.prefill_s(0, tokens))
        for tier, rate in self.tiers().items():
            for _ in range(4):
                manager.observe_load(tier, 1 << 28, rate.latency_s + (1 << 28) / rate.bytes_per_s)
