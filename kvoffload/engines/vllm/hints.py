"""Hints of a request, as vLLM passes them on, and what they do at which hook.

``kv_transfer_params["kvoffload"]`` holds the hints (docs/hints.md); other keys belong to other
connectors and are left alone. ``kv_hints`` actions of type ``kvoffload`` carry the same object
where an orchestrator sends them, and ``session_id`` is vLLM's. All of them are read by attribute:
older vLLM has fewer. Scheduler thread only.
"""

from __future__ import annotations

import hashlib
import logging
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

from kvoffload.core.forks import Forks
from kvoffload.core.hashchain import Chain
from kvoffload.core.hints import MAX_NAME, NO_HINTS, Hints, Problem, parse_hints
from kvoffload.core.layout import boundary_tokens
from kvoffload.core.ledger import tenant_of
from kvoffload.core.lookup import primary
from kvoffload.core.manager import Manager
from kvoffload.engines.vllm.requests import RequestState
from kvoffload.metrics import Recorder
from kvoffload.types import CacheLayout, ChunkKey, GroupKind

logger = logging.getLogger("vllm.kvoffload")

KEY = "kvoffload"
SAY_EVERY_S = 60.0
MAX_SESSIONS = 4096
"""Sessions whose first own chunk is remembered; the least recently used is forgotten."""


class _First(NamedTuple):
    """The first chunk that one of a session's requests computed, and when that arrived."""

    chunk: int
    key: ChunkKey
    since: float


def common_chunks(mine: Sequence[ChunkKey], theirs: Sequence[ChunkKey]) -> int:
    """The longest prefix that two chains have in common, in chunks of the keys' group."""
    low, high = 0, min(len(mine), len(theirs))
    while low < high:  # equal keys mean equal prefixes
        middle = (low + high + 1) // 2
        if mine[middle - 1] == theirs[middle - 1]:
            low = middle
        else:
            high = middle - 1
    return low


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
        served = all(g.kind is not GroupKind.NONE for g in layout.groups)
        self._boundary = boundary_tokens(layout) if served else None  # the shortest that is pinned
        self._said = float("-inf")
        self._unpinned: set[str] = set()  # live requests whose pin was refused
        self._sessions: OrderedDict[str, _First] = OrderedDict()
        self._forks = Forks()

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
                if problem.key == "tenant" and hints.tenant is None:
                    hints = replace(hints, tenant="")  # booked apart from those who named none
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
                self._refuse_pin(state, "a quarter of DRAM is pinned already, or would be")
        self.used(state, chain, chain.tokens)

    def _refuse_pin(self, state: RequestState, why: str) -> None:
        """A prompt without a whole chunk is counted apart: only its length is in the way."""
        state.pin_done = True
        self._unpinned.add(state.request_id)
        reason = "pin_refused"
        if self._boundary is not None and state.request.num_prompt_tokens < self._boundary:
            reason, why = "pin_too_short", f"its prompt has no {self._boundary} tokens"
        self._refuse(Problem(reason, f"kvoffload.pin=true: {why}"), state.request)

    def _pin_failed(self, state: RequestState) -> bool:
        """Whether whoever asked for the pin must not take it for granted, at the request's end.

        It had no keys while it ran (the weights are being digested, nothing is served), or it was
        computed and nothing of it was stored (a rank cannot attach; a reset, which ends pins too).
        """
        if not state.pin_done:
            return state.chain is None or state.hints.end_session
        computed = int(state.request.num_computed_tokens) > 0
        said = state.request_id in self._unpinned
        return not said and computed and state.stored == 0 and state.hints.store

    def used(self, state: RequestState, chain: Chain, end: int, start: int = 0) -> None:
        """[0, end) of the request is in DRAM as far as it will be, [0, start) was before: retain
        it."""
        hints = state.hints
        if hints.keeps_s:
            owner = _user(state)
            self._manager.keep.retain(
                chain, end, hints.keeps_s, hints.priority, start=start, owner=owner
            )

    def finished(
        self,
        state: RequestState,
        chain_of: Callable[[RequestState], Chain | None],
        live: Iterable[RequestState],
    ) -> None:
        """The request ended, in whatever way. ``live``: the others."""
        hints = state.hints
        session = _session(state)
        if hints.pin and self._pin_failed(state):
            self._refuse_pin(state, "nothing of it was stored")
        self._unpinned.discard(state.request_id)
        chain = chain_of(state) if hints != NO_HINTS or session is not None else state.chain
        if chain is None:
            return
        main, user = self._main, _user(state)
        keys = chain.keys(main.group)
        own, since = self._own(state, chain, session)
        if state.born is not None:
            self._forks.used(keys, own // main.chunk_tokens, user, self._clock())
        if not hints.end_session:
            self.arrived(state, chain)
            self._unpinned.discard(state.request_id)  # its keys may have come with its last step
            return
        shared = self._forks.by_others(keys, own // main.chunk_tokens, user, since)
        for other in live:
            if other.chain is None:
                continue
            theirs = other.chain.keys(main.group)
            # Nearly always they have parted by here, and all live requests are looked at at once.
            if shared < min(len(keys), len(theirs)) and keys[shared] == theirs[shared]:
                shared = common_chunks(keys, theirs)
        own = max(own, shared * main.chunk_tokens)
        if own < chain.tokens:
            self._manager.keep.release(chain, own, chain.tokens, owner=user)

    def check(self) -> None:
        """Raise AssertionError on a broken invariant."""
        assert len(self._sessions) <= MAX_SESSIONS, "sessions are not bounded"
        self._forks.check()

    def _own(self, state: RequestState, chain: Chain, session: str | None) -> tuple[int, float]:
        """From which token on the chain was computed by the request's session (or by itself), and
        since when."""
        main = self._main
        keys = chain.keys(main.group)
        own = chain.tokens if state.born is None else max(state.born, state.found)
        since = state.arrived
        if session is None:
            return own, since
        known = self._sessions.pop(session, None)
        there = known is not None and keys[known.chunk : known.chunk + 1] == [known.key]
        if known is not None and there and known.chunk * main.chunk_tokens <= own:
            own, since = known.chunk * main.chunk_tokens, known.since
        if not state.hints.end_session:
            first = -(-own // main.chunk_tokens)
            if first < len(keys):
                known = _First(first, keys[first], since)
            if known is not None:
                self._sessions[session] = known
                if len(self._sessions) > MAX_SESSIONS:
                    self._sessions.popitem(last=False)
        return own, since


def _session(state: RequestState) -> str | None:
    """The request's session, within its tenant: two of them may call theirs the same."""
    session = state.hints.session or getattr(state.request, "session_id", None)
    if not isinstance(session, str) or not 0 < len(session) <= MAX_NAME:
        return None
    return _scoped(state, session)


def _user(state: RequestState) -> str:
    """In whose name the request uses and keeps chunks: its session's, or its own."""
    session = _session(state)
    return f"session {session}" if session else f"request {_scoped(state, state.request_id)}"


def _scoped(state: RequestState, name: str) -> str:
    """``name`` among the tenant's own; 32 characters: thousands are kept."""
    named = state.hints.tenant
    salted = tenant_of(None, getattr(state.request, "cache_salt", None)) if named is None else ""
    whose = repr((named, salted, name)).encode()
    return hashlib.blake2b(whose, digest_size=16).hexdigest()
