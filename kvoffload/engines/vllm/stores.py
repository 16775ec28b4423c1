"""Which chunks a step stores: complete, computed, hashed, and held by no tier."""

from __future__ import annotations

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

AGAIN = 3
"""After a failed load, chunks whose bad copies are still being taken out of the tiers cannot be
stored yet: that many steps look again from the root."""


class StorePlanner:
    """Builds the store orders of a step and enters them in the fence. Scheduler thread only."""

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

    def orders(
        self,
        output: Any,
        states: Mapping[str, RequestState],
        chain_of: Callable[[RequestState], Chain | None],
    ) -> list[StoreOrder]:
        """One order per scheduled request that completes a chunk in this step."""
        out: list[StoreOrder] = []
        for request_id, scheduled in output.num_scheduled_tokens.items():
            state = states.get(request_id)
            if state is None or state.tainted or state.unsupported:
                continue
            if state.born is None:
                state.born = int(state.request.num_computed_tokens)
            if not state.hints.store:
                continue
            try:
                order = self._of_request(output, state, scheduled, chain_of)
            except Exception as exc:  # the orders of the other requests have slots already
                self._guard.record("store_orders", exc)
                continue
            if order is not None:
                out.append(order)
        return out

    def _of_request(
        self,
        output: Any,
        state: RequestState,
        scheduled: int,
        chain_of: Callable[[RequestState], Chain | None],
    ) -> StoreOrder | None:
        end = self.storable(state, scheduled)
        if end // self._grid <= state.stored // self._grid and not state.again:
            return None
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
