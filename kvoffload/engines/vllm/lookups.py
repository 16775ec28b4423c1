"""What a request is offered: plan, provisional lease, or a wait for another request's load.

Scheduler thread only. vLLM asks again each step until it admits the request, so answers are
kept: an offer as a provisional lease, a refusal until something it rests on may have changed.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from kvoffload.core.fit import lease_what_fits
from kvoffload.core.follow import wait_for
from kvoffload.core.hashchain import Chain
from kvoffload.core.lookup import primary
from kvoffload.core.manager import Manager
from kvoffload.core.planner import Plan
from kvoffload.engines.vllm.account import Accounts
from kvoffload.engines.vllm.loads import Loads
from kvoffload.engines.vllm.requests import LEASE_S, ProvisionalLease, Refusal, RequestState
from kvoffload.engines.vllm.shadow import ShadowCheck
from kvoffload.engines.vllm.why import WhyMiss
from kvoffload.metrics import Recorder
from kvoffload.types import CacheLayout, Decision, GroupKind

REFUSAL_S = 0.1
"""A refusal is thought over again after this long at the latest: rates and queues change."""


class Lookups:
    """One per scheduler half. ``follow``: requests may wait for each other's loads."""

    def __init__(
        self,
        layout: CacheLayout,
        manager: Manager,
        metrics: Recorder,
        loads: Loads,
        clock: Callable[[], float],
        *,
        eagle: bool,
        follow: bool,
        shadow: ShadowCheck | None = None,
        why: WhyMiss,
        accounts: Accounts | None = None,
    ) -> None:
        self._accounts = accounts
        self._layout = layout
        self._manager = manager
        self._metrics = metrics
        self._loads = loads
        self._clock = clock
        self._eagle = eagle
        self._follow = follow
        self._shadow = shadow
        self._why = why
        self._sliding = any(g.kind is GroupKind.SLIDING for g in layout.groups)
        self._primary = primary(layout)
        self._leased: dict[str, RequestState] = {}  # those with a provisional lease

    def offer(self, state: RequestState, chain: Chain, start: int) -> int | None:
        """Tokens beyond ``start`` to be loaded, 0 for none, None to be asked again."""
        if state.sampled:
            self._manager.shadow.computes_from(state.request_id, start)
            return 0
        now = self._clock()
        held = state.provisional
        if held is not None and held.start == start:
            held.expires = now + LEASE_S
            return held.end - held.start
        self.drop(state)
        if self._still_waits(state, chain, start, now):
            return None
        if state.refusal is not None and state.refusal.holds(start, self._manager.changes(), now):
            return 0
        state.refusal = None
        planned = self._plan(state, chain, start)
        if self._begins_to_wait(state, chain, start, planned, now):
            return None
        if planned.end <= start:
            # What does not pay is not made to pay by the chunks that a busy engine stores.
            refused = planned.decision is Decision.REFUSED
            changes = None if refused else self._manager.changes()
            state.refusal = Refusal(start, changes, now + REFUSAL_S)
            return 0
        if self._shadow is not None and self._shadow.picks(state, chain, start, planned.end):
            self._why.sampled(state, start)
            return 0
        lease, end = lease_what_fits(self._manager, state.request_id, chain, start, planned.end)
        if lease is None:
            state.refusal = Refusal(start, None, now + REFUSAL_S)
            if state.misses("lease_refused"):
                self._metrics.miss("lease_refused")
            self._why.no_room(state, start)
            return 0
        if end < planned.end:
            self._why.no_room(state, end)
            planned = replace(
                planned, end=end, decision=Decision.PARTIAL, recompute_s=None, cut=True
            )
        state.provisional = ProvisionalLease(lease, start, end, now + LEASE_S, planned)
        self._leased[state.request_id] = state
        return end - start

    def _plan(self, state: RequestState, chain: Chain, start: int) -> Plan:
        request: Any = state.request
        # A full-prompt hit is trimmed by vLLM to all but one token, after it dropped the blocks
        # that a sliding window of the full prompt no longer needs: such engines stop one short.
        limit = request.num_tokens - (1 if self._sliding else 0)
        first = not state.looked_up
        state.looked_up = True
        planned = self._manager.plan(chain, start, limit)
        end = planned.end
        if self._eagle and end > start:
            # The drafter needs the hidden states of the last block: vLLM recomputes it on a local
            # hit, so must we.
            end -= self._layout.align_tokens
            if self._sliding:  # another boundary needs other blocks of the window
                end = self._manager.lookup(chain, start, end).end
            end = max(end, start)
        self._why.looked_up(state, chain, start, limit, planned, end)
        planned = replace(planned, end=end) if end < planned.end else planned
        if first:
            self._metrics.lookup(queried=max(0, limit - start), hit=max(0, end - start))
            if self._accounts is not None:
                self._accounts.asked(state, chain, start)
        if state.decision is not planned.decision:
            state.decision = planned.decision
            self._metrics.plan(planned.decision.value)
        return planned

    def _still_waits(self, state: RequestState, chain: Chain, start: int, now: float) -> bool:
        """Whether the request goes on waiting for another's load. Asked each step, before any
        plan; the wait ends here, when HBM has what was waited for, the other load ended or failed,
        or it took too long."""
        waiting = state.waiting
        if waiting is None:
            return False
        if start >= waiting.end:
            self._metrics.follower("hit_hbm", waiting.end // self._primary.block_tokens)
            if self._accounts is not None:
                self._accounts.ledger.followed(state.request_id, start)
        elif now < waiting.until and self._leader(state, chain, waiting.end) is not None:
            return True
        else:
            self._metrics.follower("gave_up")
        state.waiting = None
        state.follows = False  # once is enough: the next answer is final
        return False

    def _begins_to_wait(
        self, state: RequestState, chain: Chain, start: int, planned: Plan, now: float
    ) -> bool:
        """Whether the request waits, from now on, for another's load of what it would load."""
        if not self._follow or planned.end <= start:
            return False
        leader = self._leader(state, chain, planned.end)
        waiting = leader and wait_for(leader, planned.end, planned, now)
        if waiting is None:
            return False
        state.waiting = waiting
        state.decision = Decision.FOLLOW
        self._metrics.plan(Decision.FOLLOW.value)
        return True

    def _leader(self, state: RequestState, chain: Chain, end: int) -> Any:
        """Another live request's load that brings what ends at ``end``."""
        last = end // self._primary.chunk_tokens - 1
        if not state.follows or not 0 <= last < chain.n_chunks(self._primary.group):
            return None
        leader = self._loads.leader(chain.key(self._primary.group, last))
        if leader is None or leader.request_id == state.request_id:
            return None
        if self._sliding and leader.end != end:  # other boundaries need other blocks of a window
            return None
        return leader

    def committed(self, state: RequestState) -> None:
        """The provisional lease became a load."""
        self._leased.pop(state.request_id, None)

    def drop(self, state: RequestState) -> None:
        """Give the provisional lease up, if there is one."""
        if state.provisional is not None:
            self._manager.release(state.provisional.lease.id)
            state.provisional = None
        self._leased.pop(state.request_id, None)

    def is_empty(self) -> bool:
        """No provisional lease."""
        return not self._leased

    def expire(self, now: float) -> None:
        """Drop provisional leases that vLLM has not asked for in a while."""
        for state in list(self._leased.values()):
            if state.provisional is None or state.provisional.expires <= now:
                self.drop(state)
