"""Load or recompute: a pure plan over live estimates of tier and prefill rates."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import Enum

from kvoffload.errors import ConfigError
from kvoffload.types import Tier


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


@dataclass(frozen=True, slots=True)
class Step:
    """A boundary (tokens from the root) and all bytes a load up to it moves, by tier."""

    end: int
    nbytes: Mapping[Tier, int]


@dataclass(frozen=True, slots=True)
class TierRate:
    """What a tier does: bytes per second, and seconds per load that do not depend on its size."""

    bytes_per_s: float
    latency_s: float


def load_seconds(nbytes: Mapping[Tier, int], tiers: Mapping[Tier, TierRate]) -> float:
    """Seconds until all bytes are in HBM. Unknown tiers cost nothing: they are learnt by loading.

    All bytes cross the DRAM hop; slower tiers stream into DRAM meanwhile, so the slowest hop
    counts.
    """
    total = sum(nbytes.values())
    slowest = latency = 0.0
    for tier, rate in tiers.items():
        moved = total if tier is Tier.DRAM else nbytes.get(tier, 0)
        if moved:
            slowest = max(slowest, moved / rate.bytes_per_s)
            latency += rate.latency_s
    return slowest + latency


def plan(
    start: int,
    steps: Sequence[Step],
    tiers: Mapping[Tier, TierRate],
    prefill_tokens_per_s: float | None,
    mode: LoadMode = LoadMode.AUTO,
) -> int:
    """The boundary to load up to, ``start`` (what HBM has) for none.

    ``steps`` ascend; each is servable. AUTO picks the boundary that saves the most time against
    recomputing [start, end), the longest among equals, and none that costs more than it saves. An
    unknown prefill rate loads everything.
    """
    if not steps or mode is LoadMode.NEVER:
        return start
    if mode is LoadMode.ALWAYS or prefill_tokens_per_s is None:
        return steps[-1].end
    best, gain = start, 0.0
    for step in steps:
        saved = (step.end - start) / prefill_tokens_per_s - load_seconds(step.nbytes, tiers)
        if saved > 0 and saved >= gain:
            best, gain = step.end, saved
    return best


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


class Rates:
    """Live estimates that the planner uses. Deterministic; not thread safe (the Manager locks).

    Bytes count all shards of a chunk, as ``GroupLayout.slot_bytes`` does, whichever rank moved
    them.
    """

    LATENCY_S: Mapping[Tier, float] = {Tier.DRAM: 0.0005, Tier.NVME: 0.001, Tier.REMOTE: 0.002}
    """Fixed cost per load; subtracted from samples (down to a tenth) so that small loads do not
    make a tier look slow. Where the engine pays steps per load, the adapter sets ``step_s``."""

    def __init__(self) -> None:
        self._tiers: dict[Tier, Ewma] = {}
        self._prefill = Ewma()
        self.step_s = 0.0

    def observe(self, tier: Tier, nbytes: int, seconds: float) -> None:
        """A load moved ``nbytes`` out of ``tier`` in ``seconds``."""
        net = max(seconds - self.LATENCY_S[tier], seconds / 10)
        self._tiers.setdefault(tier, Ewma()).add(nbytes, net)

    def observe_prefill(self, tokens: int, seconds: float) -> None:
        """The engine computed ``tokens`` prompt tokens in ``seconds``."""
        self._prefill.add(tokens, seconds)

    @property
    def prefill_tokens_per_s(self) -> float | None:
        """None until known."""
        return self._prefill.rate

    def tiers(self) -> dict[Tier, TierRate]:
        """The tiers whose rate is known. DRAM's latency includes ``step_s``."""
        out: dict[Tier, TierRate] = {}
        for tier, ewma in self._tiers.items():
            if ewma.rate is not None:
                extra = self.step_s if tier is Tier.DRAM else 0.0
                out[tier] = TierRate(ewma.rate, self.LATENCY_S[tier] + extra)
        return out

    def check(self) -> None:
        """Raise AssertionError unless every known rate is positive."""
        known = [r.bytes_per_s for r in self.tiers().values()]
        assert all(r > 0 for r in known), "tier rate"
        assert (self.prefill_tokens_per_s or 1.0) > 0, "prefill rate"
