"""The scheduler half's outstanding loads: orders out, answers in. Scheduler thread only.

Every attempt entered here is answered exactly once by the ranks (core/loads.py); what an answer
means for tiers, requests and metrics is decided here.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from kvoffload.core.follow import Leaders
from kvoffload.core.loads import Attempt, LoadTable
from kvoffload.core.manager import Lease, Manager
from kvoffload.core.planner import deadline_s
from kvoffload.engines.vllm.account import Accounts
from kvoffload.engines.vllm.guard import HookGuard
from kvoffload.engines.vllm.meta import I32, BadChunk, FailOrder, LoadOrder, WorkerReport
from kvoffload.engines.vllm.orders import BlockTables, load_copies
from kvoffload.engines.vllm.requests import ProvisionalLease, RequestState
from kvoffload.engines.vllm.stores import AGAIN
from kvoffload.engines.vllm.why import WhyMiss
from kvoffload.metrics import Recorder
from kvoffload.types import CacheLayout, ChunkKey, LoadFailure, SlotRef, Tier

logger = logging.getLogger("vllm.kvoffload")

LONGEST_S = 5.0
"""A load's deadline while the rates are not known, and the longest there is."""
_BAD_BYTES = (LoadFailure.CORRUPT, LoadFailure.SLOT_LOST)
_Bad = tuple[int, int, bool]  # slot, generation, bad bytes (or not: they came too late)


def _sources(attempt: Attempt) -> dict[Tier, int]:
    """Its tokens by the tier that they come from."""
    total = attempt.end - attempt.start
    nvme = min(total, attempt.lease.tokens_by_tier.get(Tier.NVME, 0))
    return {Tier.DRAM: total - nvme, Tier.NVME: nvme}


class Loads:
    """One per scheduler half. ``states`` is the half's table of live requests, shared and read.

    ``deadline_ms``: of every load; None: from its plan.
    """

    def __init__(
        self,
        layout: CacheLayout,
        manager: Manager,
        metrics: Recorder,
        guard: HookGuard,
        states: Mapping[str, RequestState],
        deadline_ms: int | None,
        clock: Callable[[], float],
        fail_by_blocks: bool = False,
        accounts: Accounts | None = None,
        *,
        why: WhyMiss,
    ) -> None:
        self._accounts = accounts
        self._layout = layout
        self._manager = manager
        self._metrics = metrics
        self._guard = guard
        self._states = states
        self._deadline_ms = deadline_ms
        self._leaders = Leaders()
        self._clock = clock
        self._fail_by_blocks = fail_by_blocks
        self._why = why
        self._table = LoadTable()
        self._fills: dict[int, list[I32]] = {}  # by attempt: the blocks it is to fill; -1: none
        self._unsent: list[LoadOrder] = []
        self._blamed: dict[int, set[_Bad]] = {}  # by attempt

    def is_banned(self, request_id: str) -> bool:
        """A load of this request failed before: it is never offered one again."""
        return self._table.is_banned(request_id)

    def outstanding(self, request_id: str) -> bool:
        """Whether the request waits for a load."""
        return self._table.get(request_id) is not None

    def leader(self, last: ChunkKey) -> Attempt | None:
        """The outstanding load of a live request that brings this chunk."""
        attempt = self._leaders.of(last)
        return attempt if attempt is not None and attempt.request_id in self._states else None

    def low_water(self) -> int:
        """See LoadTable."""
        return self._table.low_water()

    # ---------------------------------------------------------------- orders

    def commit(
        self, state: RequestState, held: ProvisionalLease, tables: BlockTables, num_external: int
    ) -> None:
        """Enter the attempt that fills ``num_external`` tokens; ordered with the next step."""
        end = min(held.end, held.start + num_external)
        within = self._deadline_ms
        if within is None:
            within = int(1000 * deadline_s(held.planned, LONGEST_S))
        attempt = self._table.open(
            state.request_id,
            held.lease,
            held.start,
            end,
            self._clock(),
            within / 1000.0,
            held.planned,
        )
        attempt.alone = len(self._states) == 1
        self._leaders.add(attempt)
        state.provisional = None  # the attempt owns the lease, whatever breaks below
        copies = load_copies(self._layout, held.lease, tables, held.start, end)
        self._fills[attempt.attempt] = [c.block_ids for c in copies]
        self._unsent.append(LoadOrder(attempt.attempt, state.request_id, within, copies))
        state.hit_sources = _sources(attempt)

    def commit_failed(self, request: Any, blocks: Any, num_external: int) -> None:
        """vLLM will park the request: make sure that an attempt exists and is failed at once."""
        request_id = str(request.request_id)
        state = self._states.get(request_id)
        attempt = self._table.get(request_id)
        if attempt is None:
            lease = Lease(0, request_id, (), {})
            start = int(getattr(request, "num_computed_tokens", 0))
            if state is not None and state.provisional is not None:
                start, lease = state.provisional.start, state.provisional.lease
                state.provisional = None
            attempt = self._table.open(
                request_id, lease, start, start + num_external, self._clock(), 0.0
            )
        self._unsent = [o for o in self._unsent if o.attempt != attempt.attempt]
        # No blocks named: the ranks answer with failed_recving. The request's blocks include those
        # of its HBM hit, which running requests share; naming them makes vLLM truncate those too.
        self._fills[attempt.attempt] = []
        if self._fail_by_blocks:  # the only way before vLLM 0.30, which then has one KV group
            block = self._layout.groups[0].block_tokens
            wanted = slice(attempt.start // block, -(-attempt.end // block))
            ids = np.array(blocks.get_block_ids()[0][wanted], np.int32)
            self._fills[attempt.attempt] = [ids]
        attempt.next_order = 0.0

    def orders(self, now: float) -> tuple[list[LoadOrder], list[FailOrder]]:
        """This step's orders. They count as sent once ``sent`` is called."""
        for order in self._unsent:
            attempt = self._table.get(order.request_id)
            if attempt is not None:
                attempt.sent = True
        fails = self._due(now)
        failing = {f.attempt for f in fails}
        return [o for o in self._unsent if o.attempt not in failing], fails

    def sent(self) -> None:
        """The step with the orders is complete. Not called: ``fail_unsent``."""
        self._unsent.clear()

    def fail_unsent(self, now: float) -> list[FailOrder]:
        """No step could be built: what waited for it fails now."""
        for order in self._unsent:
            attempt = self._table.get(order.request_id)
            if attempt is not None:
                attempt.next_order = 0.0
        self._unsent.clear()
        return self._due(now)

    def _due(self, now: float) -> list[FailOrder]:
        return [
            FailOrder(a.attempt, a.request_id, self._blocks(a.attempt), a.void)
            for a in self._table.due(now)
        ]

    def _blocks(self, attempt: int) -> list[int]:
        """What an attempt is to fill. Not kept as a list: only failures ask."""
        return [b for ids in self._fills.get(attempt, ()) for b in ids[ids >= 0].tolist()]

    def fail_all(self) -> None:
        """The cache was reset or the weights changed: nothing outstanding may be used."""
        self._table.fail_all(self._clock())

    def forget(self, request_id: str) -> None:
        """The request is finished; an outstanding attempt stays until the ranks answered."""
        self._table.forget(request_id)

    # ---------------------------------------------------------------- answers

    def answer(self, output: Any) -> None:
        """Requests named by the ranks: their attempts are over."""
        failed_requests = set(output.failed_recving or ())
        invalid = set(output.invalid_block_ids or ())
        for attempt in self._table if invalid else ():
            # With several ranks one may report its failure steps before the last one answers.
            if not invalid.isdisjoint(self._blocks(attempt.attempt)):
                attempt.failed = True
        for request_id in output.finished_recving or ():
            answered = self._table.answer(request_id, failed=request_id in failed_requests)
            if answered is not None:
                self._finish(answered)

    def answer_blindly(self, output: Any, report: WorkerReport | None) -> None:
        """Something broke on the way: whatever is named is over and not to be trusted."""
        for request_id in output.finished_recving or ():
            attempt = self._table.answer(request_id, failed=True)
            if attempt is not None:
                self._finish(attempt)
        if report is not None:
            try:  # bad chunks must go and the ranks' failures be counted
                self.take_report(report)
            except Exception as exc:
                self._guard.record("update_connector_output.report", exc)

    def _finish(self, attempt: Attempt) -> None:
        self._fills.pop(attempt.attempt, None)
        self._blamed.pop(attempt.attempt, None)
        self._leaders.remove(attempt)
        if attempt.request_id not in self._states:
            self._table.forget(attempt.request_id)  # aborted while loading: no ban to keep
        self._manager.release(attempt.lease.id)
        state = self._states.get(attempt.request_id)
        seconds = self._clock() - attempt.opened
        recompute = self._manager.recompute_seconds(attempt.start, attempt.end)
        if self._accounts is not None:
            self._accounts.loaded(attempt, seconds, recompute)
        if attempt.failed:
            # Take in what else of this load is bad, so that the recomputed chunks are stored anew.
            self._manager.poll()
            if state is not None:
                state.again = AGAIN
                self._why.failed(state, attempt.start, attempt.reason, seconds)
                self._metrics.saved(-seconds)  # it waited for nothing; of an aborted one nobody did
            self._metrics.load_failed_request()
        else:
            if state is not None:
                self._why.loaded(state, state.hit_sources or {})
                if attempt.start <= state.stored and not state.hints.keeps_s:
                    # A tier has it: no step need look it up again (retention would want to).
                    state.stored = max(state.stored, attempt.end)
            self._metrics.hit(_sources(attempt))  # not before: a load that fails is no hit
            self._metrics.load_done(seconds, attempt.end - attempt.start)
            self._learn(attempt, seconds, recompute)

    def _learn(self, attempt: Attempt, seconds: float, recompute: float | None) -> None:
        """What the load saved, and how far off its plan was."""
        if recompute is not None:
            self._metrics.saved(recompute - seconds)
        planned = attempt.planned
        from_disk = attempt.lease.tokens_by_tier.get(Tier.NVME)  # its moods are not the engine's
        alone = attempt.alone and len(self._states) == 1
        if planned is None or planned.load_s is None or planned.cut:
            return  # nothing comparable was expected
        if alone and not from_disk:
            self._manager.observe_load_time(seconds, planned.load_s)

    def take_report(self, report: WorkerReport) -> None:
        """The ranks' account of a step: rates, failures by kind, chunks whose bytes are bad."""
        news = self._first_told(report.bad)
        self._metrics.worker(replace(report, bad=news) if report.bad else report)
        if report.rate_s:
            # One rank's rate times the shards that move side by side.
            shards = max(g.shards for g in self._layout.groups)
            self._manager.observe_load(Tier.DRAM, report.rate_bytes * shards, report.rate_s)
        blamed = self._blamed.keys() | {bad.attempt for bad in report.bad}  # counted by chunk
        for attempt_id, reason in report.failed_attempts.items():
            attempt = self._table.find(attempt_id)
            told = attempt is not None and attempt.reason is not None  # by a rank in another step
            if attempt is not None:
                attempt.failed = True
                attempt.reason = attempt.reason or reason
            if reason not in _BAD_BYTES and attempt_id not in blamed and not told:
                self._metrics.failure(reason.value)
        for bad in report.bad:
            if bad.reason in (*_BAD_BYTES, LoadFailure.DEADLINE):
                ref = SlotRef(bad.slot, bad.generation, bad.offset)
                self._manager.slot_failed(ref, bad.reason)

    def _first_told(self, bad: Sequence[BadChunk]) -> list[BadChunk]:
        """Those that no rank has reported before: what ranks share is bad for each of them, in this
        step or another."""
        news: list[BadChunk] = []
        late: dict[int, set[_Bad]] = {}  # of attempts that are over
        for one in bad:
            known = late if self._table.find(one.attempt) is None else self._blamed
            seen = known.setdefault(one.attempt, set())
            bad = (one.slot, one.generation, one.reason in _BAD_BYTES)
            if bad not in seen:
                seen.add(bad)
                news.append(one)
        return news

    def is_empty(self) -> bool:
        """Nothing outstanding, nothing waiting to be sent."""
        return not (len(self._table) or self._fills or self._unsent or len(self._leaders))

    def check(self) -> None:
        """Raise AssertionError on a broken invariant."""
        self._table.check()
        for attempt in self._table:
            assert attempt.attempt in self._fills, "attempt without its blocks"
        assert self._blamed.keys() <= self._fills.keys(), "bad chunks of attempts that are over"
