"""Hints of a request, as vLLM passes them on, and what they do at which hook.

``kv_transfer_params["kvoffload"]`` holds the hints (docs/hints.md); other keys belong to other
connectors and are left alone. ``kv_hints`` actions of type ``kvoffload`` carry the same object
where an orchestrator sends them, and ``session_id`` is vLLM's. All of them are read by attribute:
older vLLM has fewer. Scheduler thread only.
"""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from kvoffload.core.hashchain import Chain
from kvoffload.core.hints import MAX_NAME, NO_HINTS, Hints, Problem, parse_hints
from kvoffload.core.lookup import primary
from kvoffload.core.manager import Manager
from kvoffload.engines.vllm.requests import RequestState
from kvoffload.metrics import Recorder
from kvoffload.types import CacheLayout, ChunkKey

logger = logging.getLogger("vllm.kvoffload")

KEY = "kvoffload"
SAY_EVERY_S = 60.0
MAX_SESSIONS = 4096
"""Sessions whose first own chunk is remembered; the least recently used is forgotten."""


def common_tokens(chain: Chain, other: Chain, group: int, chunk_tokens: int) -> int:
    """Tokens of the longest prefix, in chunks of ``group``, that both chains have."""
    mine, theirs = chain.keys(group), other.keys(group)
    low, high = 0, min(len(mine), len(theirs))
    while low < high:  # equal keys mean equal prefixes
        middle = (low + high + 1) // 2
        if mine[middle - 1] == theirs[middle - 1]:
            low = middle
        else:
            high = middle - 1
    return low * chunk_tokens


class RequestHints:
    """One per scheduler half."""

    def __init__(
        self,
        layout: CacheLayout,
        manager: Manager,
        metrics: Recorder,
        clock: Callable[[], float],
    ) -> None:
        self._manager = manager
        self._metrics = metrics
        self._clock = clock
        self._main = primary(layout)
        self._said = float("-inf")
        # Session -> (place, key) of the first chunk that one of its requests computed.
        self._sessions: OrderedDict[str, tuple[int, ChunkKey]] = OrderedDict()

    # -- reading

    def read(self, request: Any) -> Hints:
        """The good hints of a new request; what is wrong is counted and said now and then."""
        params = getattr(request, "kv_transfer_params", None)
        given = [params[KEY]] if isinstance(params, Mapping) and KEY in params else []
        for action in getattr(getattr(request, "kv_hints", None), "actions", None) or ():
            if getattr(action, "action_type", None) == KEY:
                given.append(action.payload)
        hints = NO_HINTS
        for one in given:
            hints, problems = parse_hints(one, hints)
            for problem in problems:
                self._refuse(problem, request)
        for kind in hints.kinds():
            self._metrics.hint(kind)
        return hints

    def _refuse(self, problem: Problem, request: Any) -> None:
        self._metrics.hint_refused(problem.reason)
        now = self._clock()
        if now - self._said >= SAY_EVERY_S:
            self._said = now
            logger.warning(
                "kvoffload: a hint of request %s is ignored: %s. (Said at most once a minute, "
                "counted in kvoffload_hints_refused_total.)",
                request.request_id,
                problem.line,
            )

    # -- doing

    def arrived(self, state: RequestState, chain: Chain) -> None:
        """At arrival: pins, and what is held already is kept from now on."""
        hints = state.hints
        if hints.pin is not None and not state.pin_done:
            state.pin_done = True
            end = int(state.request.num_prompt_tokens)
            if not hints.pin:
                self._manager.keep.unpin(chain, end)
            elif not self._manager.keep.pin(chain, end):
                why = "its prompt has no whole chunk, or a quarter of DRAM is pinned already"
                self._refuse(Problem("pin_refused", f"kvoffload.pin=true: {why}"), state.request)
        self.used(state, chain, chain.tokens)

    def used(self, state: RequestState, chain: Chain, end: int) -> None:
        """[0, end) of the request is in DRAM as far as it will be: retain it."""
        if state.hints.keeps_s:
            self._manager.keep.retain(chain, end, state.hints.keeps_s, state.hints.priority)

    def finished(
        self,
        state: RequestState,
        chain_of: Callable[[RequestState], Chain | None],
        live: Iterable[RequestState],
    ) -> None:
        """The request ended, in whatever way. ``live``: the others."""
        hints = state.hints
        session = hints.session or getattr(state.request, "session_id", None)
        chain = chain_of(state) if hints != NO_HINTS or session else None
        if chain is None:
            return
        own = self._own(state, chain, session)
        if not hints.end_session:
            self.arrived(state, chain)
            return
        main = self._main
        for other in live:
            if other.chain is not None:
                shared = common_tokens(chain, other.chain, main.group, main.chunk_tokens)
                own = max(own, shared)
        if own < chain.tokens:
            self._manager.keep.release(chain, own, chain.tokens)

    def check(self) -> None:
        """Raise AssertionError on a broken invariant."""
        assert len(self._sessions) <= MAX_SESSIONS, "sessions are not bounded"

    def _own(self, state: RequestState, chain: Chain, session: Any) -> int:
        """From where on the chain was computed by the request's session (or by itself)."""
        born = chain.tokens if state.born is None else state.born
        if not isinstance(session, str) or not 0 < len(session) <= MAX_NAME:
            return born
        main = self._main
        keys = chain.keys(main.group)
        known = self._sessions.pop(session, None)
        if known is not None and known[0] < len(keys) and keys[known[0]] == known[1]:
            born = min(born, known[0] * main.chunk_tokens)
        first = -(-born // main.chunk_tokens)
        if not state.hints.end_session:
            if first < len(keys):
                known = (first, keys[first])
            if known is not None:
                self._sessions[session] = known
                if len(self._sessions) > MAX_SESSIONS:
                    self._sessions.popitem(last=False)
        return born
