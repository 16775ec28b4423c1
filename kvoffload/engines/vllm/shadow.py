"""The shadow check (``verify_sample``): now and then a hit is computed all the same and compared.

Checksums are made from what was stored: they cannot see right bytes in the wrong place. This can.
The scheduler thread picks the requests, the tick thread compares; core/shadow.py keeps the slots.
"""

from __future__ import annotations

import logging
import random
from collections.abc import Mapping
from typing import Any

import numpy as np

from kvoffload.core.hashchain import Chain
from kvoffload.core.manager import Manager
from kvoffload.core.pages import LIMIT, PageFormat, worst_error
from kvoffload.core.shadow import Check
from kvoffload.engines.vllm.requests import RequestState
from kvoffload.metrics import Recorder
from kvoffload.types import LoadFailure, Tier

logger = logging.getLogger("vllm.kvoffload")

_WHAT_NOW = {
    Tier.DRAM: "The cache is off in this process. What nvme_path holds was written from DRAM: "
    "delete that directory before the next start.",
    Tier.NVME: "NVMe is not used any more in this process: delete the nvme_path directory before "
    "the next start.",
}


class ShadowCheck:
    """One per scheduler half. ``share``: of the requests with a hit worth loading, 0..1.

    ``formats``: of the pages of each KV group that can be compared. ``rng`` picks the requests.
    """

    def __init__(
        self,
        share: float,
        formats: Mapping[int, PageFormat],
        manager: Manager,
        arena: Any,
        metrics: Recorder,
        rng: random.Random | None = None,
    ) -> None:
        self._share = share
        self._formats = formats
        self._manager = manager
        self._arena = arena
        self._metrics = metrics
        self._rng = rng if rng is not None else random.Random(0)
        self.worst = 0.0
        """The largest page error seen so far. Tick thread only."""

    def picks(self, state: RequestState, chain: Chain, start: int, end: int) -> bool:
        """Whether this hit is computed instead of loaded. Drawn once per request."""
        if state.sampled is None:
            # Not of one that stores nothing: the comparison needs what it computes.
            state.sampled = (
                state.hints.store
                and self._rng.random() < self._share
                and bool(
                    self._manager.shadow.begin(
                        state.request_id, chain, start, end, self._arena.epoch()
                    )
                )
            )
            if state.sampled:
                self._metrics.miss("verify_sample")
        return state.sampled

    def compare(self) -> bool:
        """Compare one chunk, if one is due. Tick thread. True when there may be more."""
        check = self._manager.shadow.due()
        if check is None:
            return False
        error: float | None = None
        try:
            error = self._error(check)
        finally:
            same = None if error is None else error <= LIMIT
            counts = self._manager.shadow.settle(check, same)
        if error is not None and counts:
            self.worst = max(self.worst, error)
            if not same:
                self._mismatch(check, error)
        return True

    def _error(self, check: Check) -> float | None:
        """None where the comparison would say nothing about the tier."""
        fmt = self._formats[check.group]
        for ref, key in ((check.ref, check.key), (check.twin_ref, check.twin_key)):
            if not self._arena.verify_leaves(ref.offset, check.nbytes, key):
                # The business of checksums: those bytes would not have been loaded either.
                self._metrics.failure(LoadFailure.CORRUPT.value)
                self._manager.slot_failed(ref, LoadFailure.CORRUPT)
                return None
        held = np.frombuffer(self._arena.view(check.ref.offset, check.nbytes), np.uint8)
        computed = np.frombuffer(self._arena.view(check.twin_ref.offset, check.nbytes), np.uint8)
        error = worst_error(held, computed, fmt)
        # Workers count up before and after they touch the weights: never compare over a change.
        return error if self._arena.epoch() == check.stamp else None

    def _mismatch(self, check: Check, error: float) -> None:
        self._manager.quarantine(check.tier)
        self._metrics.failure("verify")
        logger.error(
            "kvoffload: WRONG KV FOUND in tier %s: chunk %s of KV group %d, tokens %d to %d, is "
            "not what computing it gave (error %.2f, allowed %.2f) though its checksum is right. "
            "The tier is quarantined. %s Prefixes loaded before may still be in HBM: restart the "
            "engine, and report this.",
            check.tier.value, check.key.hex(), check.group, check.start, check.end, error, LIMIT,
            _WHAT_NOW.get(check.tier, ""),
        )  # fmt: skip
