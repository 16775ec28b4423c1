"""Feeds the ledger and the miss-ratio curve from the hooks, and exports both.

Scheduler thread only. Nothing here decides anything: a failure costs figures, never a request.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

from kvoffload.core.hashchain import Chain
from kvoffload.core.lease import StoreItem
from kvoffload.core.ledger import Account, Ledger, tenant_of
from kvoffload.core.loads import Attempt
from kvoffload.core.lookup import primary
from kvoffload.core.mrc import MissRatioCurve
from kvoffload.engines.vllm.guard import HookGuard, guarded
from kvoffload.engines.vllm.requests import RequestState
from kvoffload.metrics import Recorder
from kvoffload.types import CacheLayout, ChunkKey, GroupKind, Tier

FACTORS = (0.25, 0.5, 1.0, 2.0, 4.0)
"""Sizes at which the curve is exported, as multiples of the tier's own."""
CURVE_S = 5.0
"""The curve is read this often at most."""
WINDOW = 8
"""The curve looks back over so many times the chunks of the largest size it is asked about."""
WINDOW_MIN = 1 << 18
MAX_UNFED = 32  # requests that the curve is behind, at most: about 1 ms to catch up

_harmless = guarded(lambda self, *args: None)


class Accounts:
    """One per scheduler half. ``dram_bytes`` and ``nvme_bytes`` (0: none): the tiers' sizes."""

    def __init__(
        self,
        layout: CacheLayout,
        metrics: Recorder,
        guard: HookGuard,
        model: str,
        dram_bytes: int,
        nvme_bytes: int,
    ) -> None:
        self.guard = guard
        self.ledger = Ledger(layout.world_size)
        self.curve: MissRatioCurve | None = None
        self._metrics = metrics
        self._model = model
        self._layout = layout
        self._main = primary(layout) if layout.groups else None
        self._sizes: dict[Tier, tuple[float, float]] = {}  # chunks before the tier, in it
        self._fed: dict[str, int] = {}  # chunks of live requests that the curve has seen
        self._unfed: list[tuple[Sequence[ChunkKey], int | None]] = []
        self._curve_read = float("-inf")
        full = [g for g in layout.groups if g.kind is GroupKind.FULL]
        if full and self._main is not None and dram_bytes > 0:
            size = self._main.chunk_tokens
            chunk_bytes = sum(g.slot_bytes * size / g.chunk_tokens for g in full)
            dram, nvme = dram_bytes / chunk_bytes, nvme_bytes / chunk_bytes
            self._sizes[Tier.DRAM] = (0.0, dram)
            if nvme:
                self._sizes[Tier.NVME] = (dram, nvme)
            reach = max(1, int(FACTORS[-1] * max(dram, nvme) + dram))
            self.curve = MissRatioCurve(reach, size, window=max(WINDOW_MIN, WINDOW * reach))

    # -- hooks

    @_harmless
    def arrived(self, request: Any, named: str | None) -> None:
        """A request was seen for the first time. ``named``: the tenant of its hints."""
        adapter = getattr(request, "lora_request", None)
        model = str(adapter.lora_name) if adapter is not None else self._model
        tenant = tenant_of(named, getattr(request, "cache_salt", None))
        self.ledger.begin(str(request.request_id), model, tenant)

    @_harmless
    def asked(self, state: RequestState, chain: Chain, start: int) -> None:
        """Its first lookup, HBM holding [0, ``start``)."""
        prompt = int(state.request.num_prompt_tokens)
        self.ledger.asked(state.request_id, prompt, start)
        if self.curve is not None and self._main is not None:
            count = min(chain.n_chunks(self._main.group), prompt // self._main.chunk_tokens)
            self._fed[state.request_id] = count
            self._feed(chain.keys(self._main.group)[:count], prompt)

    @_harmless
    def loaded(self, attempt: Attempt, seconds: float, recompute_s: float | None) -> None:
        """A load was answered after ``seconds``; whether it failed is in the attempt."""
        nbytes: dict[Tier, int] = {}
        for (tier, group), chunks in Counter(
            [(item.tier, item.group) for item in attempt.lease.items]
        ).items():
            nbytes[tier] = nbytes.get(tier, 0) + chunks * self._layout.groups[group].slot_bytes
        total = attempt.end - attempt.start
        nvme = min(total, attempt.lease.tokens_by_tier.get(Tier.NVME, 0))
        tokens = {Tier.DRAM: total - nvme, Tier.NVME: nvme}
        self.ledger.load(
            attempt.request_id, tokens, nbytes, seconds, recompute_s, failed=attempt.failed
        )

    @_harmless
    def stored(self, request_id: str, items: Sequence[StoreItem]) -> None:
        """These chunks of it were ordered to be stored."""
        nbytes = sum(self._layout.groups[item.group].slot_bytes for item in items)
        self.ledger.stored(request_id, nbytes)

    @_harmless
    def ended(self, request_id: str, chain: Chain | None) -> None:
        """The request is over. Chunks of generated tokens are in the tiers now."""
        self.ledger.end(request_id)
        fed = self._fed.pop(request_id, None)
        if fed is not None and chain is not None and self._main is not None:
            keys = chain.keys(self._main.group)
            if len(keys) > fed and self.curve is not None:
                self._feed(keys, None)

    def _feed(self, keys: Sequence[ChunkKey], prompt: int | None) -> None:
        """A query (``prompt`` tokens) or a touch for the curve, which is fed at the next export: it
        takes tens of microseconds, and here a request waits."""
        self._unfed.append((keys, prompt))
        if len(self._unfed) >= MAX_UNFED:
            self._feed_curve()

    def _feed_curve(self) -> None:
        unfed, self._unfed = self._unfed, []
        for keys, prompt in unfed if self.curve is not None else ():
            if prompt is None:
                self.curve.touch(keys)
            else:
                self.curve.query(keys, prompt)

    # -- export

    @_harmless
    def report(self, now: float) -> None:
        """Everything booked since the last call goes to the metrics; the curve, now and then."""
        for (model, tenant), account in self.ledger.take().items():
            self._book(model, tenant, account)
        self._feed_curve()
        if self.curve is not None and now - self._curve_read >= CURVE_S and self.curve.tokens:
            self._curve_read = now
            self._metrics.set("kvoffload_curve_tokens", round(self.curve.tokens))
            for tier, (before, size) in self._sizes.items():
                for factor in FACTORS:
                    share = self.curve.hit_ratio(before + factor * size)
                    if share is not None:
                        self._metrics.set(
                            "kvoffload_curve_hit_ratio", round(share, 4), tier.value, f"{factor:g}"
                        )

    def _book(self, model: str, tenant: str, account: Account) -> None:
        inc, who = self._metrics.inc, (model, tenant)
        inc("kvoffload_ledger_requests_total", account.requests, *who)
        inc("kvoffload_ledger_lookup_seconds_total", account.lookup_s, *who)
        inc("kvoffload_ledger_tokens_total", account.hbm, *who, "hbm")
        inc("kvoffload_ledger_tokens_total", account.missed, *who, "miss")
        inc("kvoffload_ledger_bytes_total", account.stored_bytes, *who, Tier.DRAM.value, "store")
        for tier, part in account.tiers.items():
            name = tier.value
            inc("kvoffload_ledger_tokens_total", part.tokens, *who, name)
            inc("kvoffload_ledger_loads_total", part.loads, *who, name)
            inc("kvoffload_ledger_bytes_total", part.bytes, *who, name, "load")
            inc("kvoffload_ledger_saved_gpu_seconds_total", part.saved_s, *who, name)
            inc("kvoffload_ledger_lost_gpu_seconds_total", part.lost_s, *who, name)
            inc("kvoffload_ledger_load_seconds_total", part.load_s, *who, name)

    def check(self) -> None:
        """Raise AssertionError on a broken invariant."""
        self.ledger.check()
        assert len(self._unfed) < MAX_UNFED, "the curve is too far behind"
