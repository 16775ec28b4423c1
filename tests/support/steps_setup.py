"""How an engine of the step harness is configured, and its stand-ins for time and weights."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from kvoffload.types import CacheLayout, GroupKind, GroupLayout
from tests.support.steps_blocks import GroupSpec

MIB = 1 << 20


class Clock:
    """Seconds that pass only when told."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


class FakeNamespaces:
    """Namespaces without weights to digest; remembers which weights each epoch's bytes come from."""

    persistent: bool | None = True

    def __init__(self) -> None:
        self.epoch = 0
        self.weights = 0
        self.known = True
        self.of_weights: dict[bytes, int] = {self._name(): 0}
        self.first_requests = 0
        self.forgotten: list[int] = []

    def _name(self) -> bytes:
        return self.epoch.to_bytes(16, "big")

    def namespace(self) -> bytes | None:
        return self._name() if self.known else None

    def fields(self) -> dict[str, str]:
        return {"epoch": str(self.epoch or "")}

    def adapter(self, request: Any) -> bytes | None:
        return b""

    def forget_adapter(self, lora_int_id: int) -> None:
        self.forgotten.append(lora_int_id)

    def on_first_request(self) -> None:
        self.first_requests += 1

    def new_epoch(self) -> None:
        self.epoch += 1
        self.of_weights[self._name()] = self.weights


@dataclass(frozen=True)
class Options:
    """An engine. Lags are in polls (see LazyEngine), budgets in tokens, arena in bytes."""

    groups: tuple[GroupSpec, ...] = (GroupSpec(),)
    ranks: int = 1
    in_flight: int = 1
    blocks: int = 64
    budget: int = 32
    max_running: int = 8
    caching: bool = True
    spec_tokens: int = 0
    eagle: bool = False
    defer_alloc: bool = False  # vLLM 0.33
    token_bytes: int = 64
    layers: int = 2
    kv_layout: str = "LBHNC"
    pad: int = 0
    replicated: bool = False
    arena_bytes: int = 2 * MIB
    nvme: str | None = None  # directory of a chunk store
    nvme_bytes: int = 64 * MIB
    drives: int = 1  # more: as many directories below ``nvme``, one store over them
    store_lag: int = 0
    load_lag: int = 0
    random_lag: int = 0  # adds 0..n polls
    late_ranks: bool = True  # ranks run a step only when its result is needed
    pickled: bool = True
    deadline_ms: int = 5000
    follow: bool = False  # requests may wait for another one's load of the same prefix
    verify: float = 0.0  # share of hits that are computed and compared
    record: str | None = None  # file that the request stream is recorded to
    values: str = "bfloat16"  # what the bytes are then taken for
    seed: int = 0


def cache_layout(options: Options) -> CacheLayout:
    bt = options.groups[0].block_tokens
    page = options.layers * bt * options.token_bytes
    groups = tuple(
        GroupLayout(
            i,
            GroupKind.SLIDING if g.window else GroupKind.FULL,
            bt,
            1 if g.window else g.blocks_per_chunk,
            page,
            1 if options.replicated else options.ranks,
            g.window - 1 if g.window else 0,
        )
        for i, g in enumerate(options.groups)
    )
    return CacheLayout(groups, bt, bt, options.ranks)
