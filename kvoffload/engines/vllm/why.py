"""Why requests missed: what the scheduler half notes. engines/vllm/explain.py makes reports of it.

A failure in here costs a report, never a hit: nothing raises but ``close``. Every request ends in
at most one report, when it gets its blocks, or when its load has ended; one that is aborted before
gets none. Scheduler-thread methods are O(1) and do no I/O; ``work`` and ``close`` belong to a
thread of their own (engines/vllm/background.py), which files may stop.
"""

from __future__ import annotations

import functools
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from kvoffload.core.hashchain import Chain
from kvoffload.core.layout import boundary_tokens
from kvoffload.core.lookup import primary
from kvoffload.core.manager import Manager
from kvoffload.core.planner import Plan
from kvoffload.core.why import Asked, WhyLog
from kvoffload.engines.vllm.explain import Explainer, Names
from kvoffload.engines.vllm.guard import HookGuard
from kvoffload.engines.vllm.spaces import Space
from kvoffload.metrics import Recorder
from kvoffload.types import CacheLayout, ChunkKey, LoadFailure, MissCause, Tier

MAX_WHOLE = 256
"""Requests of the engine that are kept, whole, until they are explained: with prompts of 100,000
tokens some 3 MiB each. Of what waits beyond that the notes are kept, not the tokens."""


def _guarded(body: Callable[..., None]) -> Callable[..., None]:
    @functools.wraps(body)
    def run(self: WhyMiss, *args: Any) -> None:
        try:
            self._guard.maybe_fault("why")
            body(self, *args)
        except Exception as exc:  # counted and said once by the guard
            self._guard.record("why", exc)

    return run


class WhyMiss:
    """One per scheduler half. ``keep``: reports kept; 0: nothing is noted, nothing is counted."""

    def __init__(
        self,
        keep: int,
        layout: CacheLayout,
        manager: Manager,
        names: Names,
        metrics: Recorder,
        guard: HookGuard,
        clock: Callable[[], float],
    ) -> None:
        self._explainer = Explainer(max(1, keep), layout, manager, names, metrics, clock)
        self._keep = keep
        self._layout = layout
        self._main = primary(layout)
        self._size = self._main.chunk_tokens
        self._grid = boundary_tokens(layout)
        self._manager = manager
        self._names = names
        self._guard = guard
        self._clock = clock
        self._here: Space | None = None
        self._space_id = -1
        self._numbers = 0
        self._closed: deque[Asked] = deque(maxlen=max(1, keep))
        self._whole: deque[Asked] = deque()  # the latest of them, scheduler thread only
        self._metrics = metrics

    @property
    def log(self) -> WhyLog:
        """The last reports and the totals. Why thread."""
        return self._explainer.log

    # ---------------------------------------------------------------- scheduler thread

    def skipped(self, state: Any, start: int, cause: MissCause, note: str) -> tuple[int, bool]:
        """No lookup is made; returns what the hook answers then."""
        self._skipped(state, start, cause, note)
        return 0, False

    @_guarded
    def _skipped(self, state: Any, start: int, cause: MissCause, note: str) -> None:
        asked = self._asked(state)
        if asked is not None:
            asked.hbm, asked.plan, asked.trace = start, None, None
            self._bar(asked, start, cause, note)

    @_guarded
    def looked_up(
        self, state: Any, chain: Chain, start: int, limit: int, planned: Plan, offered: int
    ) -> None:
        """Each lookup of a request until it gets its blocks: the last one counts.

        [``start``, ``offered``) is offered: with a drafter less than ``planned``. What is missing
        is looked for behind the plan: the block in between is held, and computed all the same.
        """
        asked = self._asked(state)
        if asked is None:
            return
        if chain.namespace_id != self._space_id:
            self._space_id = chain.namespace_id
            self._space()
        end, size = planned.end, self._size
        asked.hbm, asked.plan, asked.barred, asked.space = start, planned, None, self._here
        asked.offered = offered
        asked.chunk = chunk = end // size
        keys = chain.keys(self._main.group)
        if chunk >= len(keys) or (chunk + 1) * size > limit:
            asked.key = asked.trace = None
            return
        asked.key = key = keys[chunk]
        if end >= planned.held:  # else it is held, but not worth it
            one = len(self._layout.groups) == 1
            asked.trace = self._manager.trace((key,) if one else self._keys(chain, end))

    def _keys(self, chain: Chain, held: int) -> Sequence[ChunkKey]:
        """Chunks of which one is not held, where all before token ``held`` are."""
        out = []
        for g in self._layout.groups:
            if chain.n_chunks(g.group):
                stop = min(-(-(held + self._grid) // g.chunk_tokens), chain.n_chunks(g.group))
                out += [chain.key(g.group, i) for i in range(held // g.chunk_tokens, stop)]
        return out

    @_guarded
    def no_room(self, state: Any, start: int) -> None:
        """There are no slots to bring up what is held from ``start`` on."""
        asked = self._asked(state)
        if asked is not None:
            self._bar(asked, start, MissCause.NO_ROOM, "")

    def sampled(self, state: Any, start: int) -> None:
        """The shadow check has it computed."""
        self.skipped(state, start, MissCause.NOT_ASKED, "the shadow check computes it")

    @_guarded
    def settled(self, state: Any) -> None:
        """The request got its blocks, and nothing is being loaded into them."""
        asked = self._asked(state)
        if asked is None:
            return
        if asked.barred is None and asked.plan is None:
            self._bar(asked, asked.hbm, MissCause.NOT_ASKED, "the engine did not ask")
        elif asked.barred is None and asked.offered > asked.hbm:
            self._bar(asked, asked.hbm, MissCause.NOT_ASKED, "the engine did not take the offer")
        self._close(asked)

    @_guarded
    def loaded(self, state: Any, sources: Mapping[Tier, int]) -> None:
        """Its load succeeded."""
        asked = self._asked(state)
        if asked is not None:
            asked.loaded = sources
            self._close(asked)

    @_guarded
    def failed(self, state: Any, start: int, reason: LoadFailure | None, seconds: float) -> None:
        """Its load, from token ``start`` on, failed after ``seconds``."""
        asked = self._asked(state)
        if asked is None:
            return
        if asked.space is not None and asked.space is not self._space():
            self._bar(asked, start, MissCause.RESET, "while it was being loaded")
        elif reason is LoadFailure.DEADLINE:
            self._bar(asked, start, MissCause.TIMED_OUT, f"load given up after {seconds:.2f} s")
        else:
            what = (reason or LoadFailure.EXCEPTION).value
            self._bar(asked, start, MissCause.LOAD_FAILED, f"load failed: {what}")
        self._close(asked)

    def _asked(self, state: Any) -> Asked | None:
        """The request's open notes, made at first."""
        asked: Asked | None = state.why
        if asked is None:
            if not self._keep:
                return None
            request = state.request
            wall = getattr(request, "arrival_time", None) or time.time()
            asked = Asked(request.request_id, wall, request.num_prompt_tokens, request=request)
            state.why = asked
            return asked
        return None if asked.closed else asked

    def _bar(self, asked: Asked, start: int, cause: MissCause, note: str) -> None:
        asked.barred, asked.note = cause, note
        asked.chunk, asked.key = start // self._main.chunk_tokens, None

    def _close(self, asked: Asked) -> None:
        asked.closed = True
        self._closed.append(asked)
        self._whole.append(asked)
        if len(self._whole) > MAX_WHOLE:
            late = self._whole.popleft()
            if late.request is not None:  # not explained yet: files hang, or it is a burst
                late.request = None
                self._metrics.failure("why_behind")

    def _space(self) -> Space | None:
        """The namespace in use; a new object with each new one."""
        namespace = self._names.namespace()
        if namespace is None or (self._here and self._here.namespace == namespace):
            return self._here
        self._numbers += 1
        main = self._main
        self._here = Space(
            namespace,
            self._names.fields(),
            main.group,
            main.chunk_tokens,
            self._layout.hash_tokens,
            self._numbers,
            self._clock(),
        )
        return self._here

    # ---------------------------------------------------------------- why thread

    def write_to(self, roots: Sequence[Path], head: Mapping[str, Any]) -> None:
        """See Explainer.write_to; nothing where no requests are kept."""
        if self._keep:
            self._explainer.write_to(roots, head)

    @_guarded
    def work(self, now: float) -> None:
        """Explain what was closed; see Explainer.work."""
        self._explainer.work(self._closed, now)

    def close(self) -> None:
        """Remove the file. Idempotent."""
        self._explainer.close()

    def check(self) -> None:
        """Raise AssertionError on a broken invariant."""
        self._explainer.check()
