"""Why requests missed: notes taken by the scheduler half, explained by the tick thread.

Every request ends in at most one report, when it gets its blocks, or when its load has ended; one
that is aborted before gets none. Scheduler-thread methods are O(1) and do no I/O; ``work`` and
``close`` belong to the tick thread.
"""

from __future__ import annotations

import logging
import os
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from kvoffload.core.hashchain import Chain
from kvoffload.core.kin import Kin, Variant
from kvoffload.core.layout import boundary_tokens
from kvoffload.core.lookup import primary
from kvoffload.core.manager import Manager
from kvoffload.core.planner import Plan
from kvoffload.core.why import Asked, Details, Report, WhyLog, cause_of
from kvoffload.engines.vllm.spaces import FILE, KnownSpaces, Space
from kvoffload.files import user_cache_file
from kvoffload.linefile import LineFile
from kvoffload.metrics import Recorder
from kvoffload.types import CacheLayout, ChunkKey, LoadFailure, MissCause, Tier

logger = logging.getLogger("vllm.kvoffload")

FLUSH_S = 1.0
BATCH = 256
"""Requests explained in one go: the thread has other work."""
PROBES = 512
"""Keys looked for under other namespaces in one go."""
MAX_SPACES = 16


class Names(Protocol):
    """What is asked of the namespaces (engines/vllm/namespace.py)."""

    persistent: bool | None

    def namespace(self) -> bytes | None:
        """16 bytes, or None while not known."""

    def fields(self) -> dict[str, str]:
        """Digests by field of that namespace."""

    def adapter(self, request: Any) -> bytes | None:
        """Digest of the request's LoRA adapter. Any thread."""


class WhyMiss:
    """One per scheduler half. ``keep``: reports kept; 0: nothing is noted, nothing is counted."""

    def __init__(
        self,
        keep: int,
        layout: CacheLayout,
        manager: Manager,
        names: Names,
        metrics: Recorder,
        clock: Callable[[], float],
    ) -> None:
        self.log = WhyLog(max(1, keep))
        self._keep = keep
        self._layout = layout
        self._main = primary(layout)
        self._size = self._main.chunk_tokens
        self._grid = boundary_tokens(layout)
        self._manager = manager
        self._names = names
        self._metrics = metrics
        self._clock = clock
        self._here: Space | None = None
        self._space_id = -1
        self._spaces: dict[int, Space] = {}
        self._numbers = 0
        self._closed: deque[Asked] = deque(maxlen=max(1, keep))
        # Tick thread:
        self._kin = Kin()
        self._known: KnownSpaces | None = None
        self._remembered: Space | None = None
        self._probes = 0
        self._folder: Path | None = None  # until the file in it is open
        self._roots: Sequence[Path] = ()
        self._head: dict[str, Any] = {}
        self._file: LineFile | None = None
        self._unwritten: list[Report] = []
        self._flushed = float("-inf")

    # ---------------------------------------------------------------- scheduler thread

    def skipped(self, state: Any, start: int, cause: MissCause, note: str) -> tuple[int, bool]:
        """No lookup is made; returns what the hook answers then."""
        asked = self._asked(state)
        if asked is not None:
            asked.hbm, asked.plan, asked.trace = start, None, None
            self._bar(asked, start, cause, note)
        return 0, False

    def looked_up(self, state: Any, chain: Chain, start: int, limit: int, planned: Plan) -> None:
        """Each lookup of a request until it gets its blocks: the last one counts."""
        asked = self._asked(state)
        if asked is None:
            return
        if chain.namespace_id != self._space_id:
            self._space_id = chain.namespace_id
            self._space()
        end, size = planned.end, self._size
        asked.hbm, asked.plan, asked.barred, asked.space = start, planned, None, self._here
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

    def no_room(self, state: Any, start: int) -> None:
        """There are no slots to bring up what is held from ``start`` on."""
        asked = self._asked(state)
        if asked is not None:
            self._bar(asked, start, MissCause.NO_ROOM, "")

    def sampled(self, state: Any, start: int) -> None:
        """The shadow check has it computed."""
        self.skipped(state, start, MissCause.NOT_ASKED, "the shadow check computes it")

    def settled(self, state: Any) -> None:
        """The request got its blocks, and nothing is being loaded into them."""
        asked = self._asked(state)
        if asked is None:
            return
        if asked.barred is None and asked.plan is None:
            self._bar(asked, asked.hbm, MissCause.NOT_ASKED, "the engine did not ask")
        elif asked.barred is None and asked.plan.end > asked.hbm:
            self._bar(asked, asked.hbm, MissCause.NOT_ASKED, "the engine did not take the offer")
        self._close(asked)

    def loaded(self, state: Any, sources: Mapping[Tier, int]) -> None:
        """Its load succeeded."""
        asked = self._asked(state)
        if asked is not None:
            asked.loaded = sources
            self._close(asked)

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

    # ---------------------------------------------------------------- tick thread

    def write_to(self, roots: Sequence[Path], head: Mapping[str, Any]) -> None:
        """Keep the reports in a file for ``kvoffload why``, and know the namespaces of the chunk
        store's directories. Before the tick thread starts; does no I/O itself."""
        if self._keep:
            self._folder = reports_folder()
            self._head = {"kind": "engine", "pid": os.getpid(), "started": time.time(), **head}
            self._roots = roots

    def work(self, now: float) -> None:
        """Explain what was closed; write what is new, at most once a second.

        What cannot be written is counted and said once; reports then have no file.
        """
        if self._folder is not None:
            folder, self._folder = self._folder, None
            self._try(lambda: self._open(folder))
        self._probes = PROBES
        for _ in range(min(BATCH, len(self._closed))):
            asked = self._closed.popleft()
            report = self._explain(asked)
            asked.request = asked.space = None
            self.log.add(report)
            if report.cause is not None:
                self._metrics.miss_cause(report.cause)
            if self._file is not None:
                self._unwritten.append(report)
        if self._unwritten and now - self._flushed >= FLUSH_S:
            self._flushed = now
            self._try(self._flush)

    def _try(self, write: Callable[[], None]) -> None:
        try:
            write()
        except OSError as exc:
            self._metrics.failure("why_file")
            logger.warning("kvoffload: `kvoffload why` will know nothing of this engine: %s", exc)
            self.close()

    def _open(self, folder: Path) -> None:
        self._known = KnownSpaces(self._layout, self._roots)
        # Containers that share a home have the same process ids.
        path = folder / f"{os.getpid()}-{os.urandom(3).hex()}.jsonl"
        self._file = LineFile(path, self._keep, self._head, self._lines)

    def _flush(self) -> None:
        new, self._unwritten = self._unwritten, []
        if self._file is not None:
            self._file.append([*map(_line, new), self._totals()])

    def _lines(self) -> list[dict[str, Any]]:
        return [*map(_line, self.log.last()), self._totals()]

    def _totals(self) -> dict[str, Any]:
        causes = {c.value: n for c, n in self.log.totals.items()}
        return {"kind": "totals", "requests": self.log.requests, "causes": causes}

    def _explain(self, asked: Asked) -> Report:
        cause, details = cause_of(asked)
        space = asked.space
        if isinstance(space, Space):
            self._remember(space)
            unknown = cause is MissCause.NEVER_STORED and asked.chunk == 0
            cause, details = self._elsewhere(asked, space, unknown) or (cause, details)
        return Report.of(asked, cause, details)

    def _remember(self, space: Space) -> None:
        if self._remembered is not space:
            self._remembered = space
            self._spaces[space.number] = space
            while len(self._spaces) > MAX_SPACES:
                del self._spaces[next(iter(self._spaces))]
            known = self._known
            if known is not None and self._names.persistent and not space.fields.get("epoch"):
                try:
                    known.remember(space)
                except OSError as exc:
                    self._metrics.failure("why_file")
                    logger.warning("kvoffload: %s cannot be kept: %s", FILE, exc)

    def _elsewhere(
        self, asked: Asked, space: Space, wanted: bool
    ) -> tuple[MissCause, Details] | None:
        """Where the prompt's first chunk is known instead, if ``wanted``; enters the request."""
        request, size = asked.request, self._main.chunk_tokens
        tokens = getattr(request, "prompt_token_ids", None)
        adapter = self._names.adapter(request)
        if not tokens or len(tokens) < size or adapter is None:
            return None
        if not getattr(request, "mm_features", None):  # images have the same tokens
            mine = self._kin.variant(getattr(request, "cache_salt", None), adapter, space.number)
            others = self._kin.meet(tokens[:size], mine)
            if wanted and others and mine not in others:
                return self._differs(mine, mine.nearest(others), space)
        return self._on_nvme(asked, space, adapter) if wanted else None

    def _differs(self, mine: Variant, other: Variant, space: Space) -> tuple[MissCause, Details]:
        names = [n for n in ("salt", "adapter") if getattr(mine, n) != getattr(other, n)]
        if mine.space != other.space:
            before = self._spaces.get(other.space)
            fields = space.differs(before) if before is not None else []
            if fields == ["epoch"] and not names:
                return MissCause.RESET, {"ago_s": round(max(0.0, self._clock() - space.since), 3)}
            return MissCause.NAMESPACE, {"fields": fields + names}
        cause = MissCause.SALT if "salt" in names else MissCause.ADAPTER
        return cause, {"fields": names}

    def _on_nvme(
        self, asked: Asked, space: Space, adapter: bytes
    ) -> tuple[MissCause, Details] | None:
        if self._known is None or self._probes <= 0:
            return None
        found = self._known.keys_elsewhere(space, asked.request.block_hashes, adapter)
        self._probes -= len(found)
        held = self._manager.on_nvme([key for _, key in found]) if found else ()
        for (other, _), there in zip(found, held, strict=True):
            if there:
                return MissCause.NAMESPACE, {"fields": space.differs(other), "tier": "nvme"}
        return None

    def close(self) -> None:
        """Remove the file. Idempotent."""
        if self._file is not None:
            self._file.close()
            self._file = None
        self._folder = None

    def check(self) -> None:
        """Raise AssertionError on a broken invariant."""
        self.log.check()
        self._kin.check()
        assert len(self._spaces) <= MAX_SPACES, "namespaces"


def reports_folder() -> Path:
    """Where engines keep their reports, one file each; owned by the user."""
    return user_cache_file("why")


def _line(report: Report) -> dict[str, Any]:
    return {"kind": "request", **report.as_dict()}
