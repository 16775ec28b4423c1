"""Which chunks a step stores: complete, computed, hashed, and held by no tier."""

from __future__ import annotations

import heapq
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from kvoffload.core.hashchain import Chain
from kvoffload.core.lookup import primary
from kvoffload.core.manager import Manager, StoreItem
from kvoffload.engines.vllm.account import Accounts
from kvoffload.engines.vllm.guard import HookGuard
from kvoffload.engines.vllm.hints import RequestHints
from kvoffload.engines.vllm.meta import StoreOrder
from kvoffload.engines.vllm.orders import Fence, store_copies
from kvoffload.engines.vllm.requests import RequestState
from kvoffload.types import CacheLayout

NEVER = 1 << 62  # tokens
FEW = 16
"""More tokens of one request in one step than decoding takes, drafts included."""
AGAIN = 3
"""After a failed load, chunks whose bad copies are still being taken out of the tiers cannot be
stored yet: that many steps look again from the root."""


class StorePlanner:
    """Builds the store orders of a step and enters them in the fence. Scheduler thread only.

    A request completes a chunk every few dozen steps, so each is looked at when it may have done
    so, not in every step: a step costs O(requests that are due). Time is counted in tokens, as if
    every request had been given as many as the step's greediest of those that get at most FEW, so
    that it is never late. Who gets more is looked at in that step: the step's budget of tokens
    bounds how many these are, and a chunk of a prompt does not make every decoding request due.
    """

    def __init__(
        self,
        layout: CacheLayout,
        manager: Manager,
        fence: Fence,
        guard: HookGuard,
        hints: RequestHints,
        *,
        eagle: bool = False,
        accounts: Accounts | None = None,
    ) -> None:
        self._accounts = accounts
        self._layout = layout
        self._manager = manager
        self._fence = fence
        self._guard = guard
        self._hints = hints
        self._eagle = eagle
        self._grid = min((g.chunk_tokens for g in layout.groups), default=1)
        self._main = primary(layout)
        self._blocks_per_chunk = {g.group: g.blocks_per_chunk for g in layout.groups}
        self._number = 0
        self._tokens = 0  # the time
        self._due: dict[str, int] = {}  # when each request known is to be looked at
        self._queue: list[tuple[int, str]] = []  # heap of the same, and of what is no longer true

    def orders(
        self,
        output: Any,
        states: Mapping[str, RequestState],
        chain_of: Callable[[RequestState], Chain | None],
    ) -> list[StoreOrder]:
        """One order per scheduled request that completes a chunk in this step.

        Called for the steps that ``has_work`` says, right after it.
        """
        out: list[StoreOrder] = []
        for request_id in self._to_look_at(output.num_scheduled_tokens):
            state = states.get(request_id)
            if state is None or state.tainted or state.unsupported:
                continue
            try:
                order = self._of_request(output, state, chain_of)
            except Exception as exc:  # the orders of the other requests have slots already
                self._guard.record("store_orders", exc)
                self._put_off(request_id, 1)
                continue
            if order is not None:
                out.append(order)
        return out

    def look_at(self, request_id: str) -> None:
        """Its KV may no longer be what it was (it was admitted anew): look at it in the next step
        that it is in."""
        self._due.pop(request_id, None)

    forget = look_at
    """The request is over."""

    def look_at_all(self) -> None:
        """Nothing is stored any more."""
        self._due.clear()
        self._queue.clear()

    def has_work(self, output: Any, most: int) -> bool:
        """Take in a step, in which no request gets more than ``most`` tokens: whether any request
        is new here or due."""
        scheduled = output.num_scheduled_tokens
        if most > FEW:
            # One at least: what is no longer true leaves the queue as the time passes.
            self._tokens += max((n for n in scheduled.values() if n <= FEW), default=1)
            return True
        self._tokens += most
        if self._queue and self._queue[0][0] <= self._tokens:
            return True
        return not scheduled.keys() <= self._due.keys()

    def _to_look_at(self, scheduled: Mapping[str, int]) -> list[str]:
        """Requests of the step that get many tokens, are new here or due; never again unless they
        are put off."""
        some = [r for r, n in scheduled.items() if n > FEW or r not in self._due]
        self._due.update(dict.fromkeys(some, NEVER))
        while self._queue and self._queue[0][0] <= self._tokens:
            due, request_id = heapq.heappop(self._queue)
            if self._due.get(request_id) != due:
                continue
            if request_id in scheduled:
                some.append(request_id)
                self._due[request_id] = NEVER
            else:
                del self._due[request_id]  # not in this step: new when it comes back
        return some

    def _put_off(self, request_id: str, tokens: int) -> None:
        self._due[request_id] = due = self._tokens + tokens
        heapq.heappush(self._queue, (due, request_id))

    def _of_request(
        self,
        output: Any,
        state: RequestState,
        chain_of: Callable[[RequestState], Chain | None],
    ) -> StoreOrder | None:
        if state.born is None:
            state.born = int(state.request.num_computed_tokens)
        if not state.hints.store:
            return None
        scheduled = output.num_scheduled_tokens[state.request_id]
        order = None
        end = self.storable(state, scheduled)
        if end // self._grid > state.stored // self._grid or state.again:
            order = self._of_chunks(output, state, end, chain_of)
        # The next step while its hash is not known, or there is no chain yet.
        boundary = (state.stored // self._grid + 1) * self._grid
        left = boundary - int(state.request.num_computed_tokens) - scheduled
        self._put_off(state.request_id, 1 if state.again else max(1, left))
        return order

    def _of_chunks(
        self,
        output: Any,
        state: RequestState,
        end: int,
        chain_of: Callable[[RequestState], Chain | None],
    ) -> StoreOrder | None:
        """The order for the chunks up to token ``end``, and what is known of them afterwards."""
        chain = chain_of(state)
        block_state = output.kv_connector_block_state
        tables = block_state.get_block_ids(state.request_id) if block_state is not None else None
        if chain is None or tables is None:
            return None
        start = 0 if state.again else state.stored
        order = self._order(state, chain, tables, start, end)
        self._hints.used(state, chain, end, start)
        state.stored = end
        state.again = max(0, state.again - 1)
        return order

    def _found(self, state: RequestState, items: Sequence[StoreItem], end: int) -> None:
        """Remember how far others, or its session's turns, had stored what it has computed now."""
        size = self._main.chunk_tokens
        new = {i.chunk for i in items if i.group == self._main.group}
        for i in range(end // size - 1, state.stored // size - 1, -1):
            if i not in new:
                state.found = (i + 1) * size
                return

    def storable(self, state: RequestState, scheduled: int) -> int:
        """Tokens whose KV is final after this step: computed, and hashed (so not speculative)."""
        request = state.request
        hashed = len(request.block_hashes) * self._layout.hash_tokens
        end = min(int(request.num_computed_tokens) + scheduled, hashed)
        if self._eagle:
            # A drafter's KV of the last block changes once the next token is known.
            end -= self._layout.align_tokens
        return max(end, 0)

    def _order(
        self, state: RequestState, chain: Chain, tables: Any, start: int, end: int
    ) -> StoreOrder | None:
        def present(group: int, chunk: int) -> bool:
            n = self._blocks_per_chunk[group]
            ids = tables[group][chunk * n : (chunk + 1) * n]
            return len(ids) == n and all(b > 0 for b in ids)

        items = self._manager.begin_store(chain, start, end, present)
        self._found(state, items, end)
        if state.sampled:
            items += self._manager.shadow.begin_twins(state.request_id, end)
        if not items:
            return None
        try:
            order = StoreOrder(self._number + 1, store_copies(self._layout, items, tables))
            self._fence.add(order)
        except Exception:
            self._manager.abort_store(items)
            raise
        self._number += 1
        if self._accounts is not None:
            self._accounts.stored(state.request_id, items)
        return order

    def check(self) -> None:
        """Raise AssertionError on a broken invariant."""
        queued = set(self._queue)
        for request_id, due in self._due.items():
            assert due == NEVER or (due, request_id) in queued, "a request will not be looked at"
