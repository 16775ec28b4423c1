"""The half of why-miss with a thread of its own: explains what was noted, and writes it down."""

from __future__ import annotations

import logging
import os
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from kvoffload.core.kin import Kin, Variant
from kvoffload.core.lookup import primary
from kvoffload.core.manager import Manager
from kvoffload.core.why import Asked, Details, Report, WhyLog, cause_of
from kvoffload.engines.vllm.spaces import FILE, KnownSpaces, Space
from kvoffload.files import user_cache_file
from kvoffload.linefile import LineFile
from kvoffload.metrics import Recorder
from kvoffload.types import CacheLayout, MissCause

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


class Explainer:
    """One per scheduler half. Why thread only, after ``write_to``. ``keep``: reports kept."""

    def __init__(
        self,
        keep: int,
        layout: CacheLayout,
        manager: Manager,
        names: Names,
        metrics: Recorder,
        clock: Callable[[], float],
    ) -> None:
        self.log = WhyLog(keep)
        self._keep = keep
        self._layout = layout
        self._size = primary(layout).chunk_tokens
        self._manager = manager
        self._names = names
        self._metrics = metrics
        self._clock = clock
        self._kin = Kin()
        self._spaces: dict[int, Space] = {}
        self._known: KnownSpaces | None = None
        self._remembered: Space | None = None
        self._probes = 0
        self._folder: Path | None = None  # until the file in it is open
        self._roots: Sequence[Path] = ()
        self._head: dict[str, Any] = {}
        self._file: LineFile | None = None
        self._unwritten: list[Report] = []
        self._flushed = float("-inf")

    def write_to(self, roots: Sequence[Path], head: Mapping[str, Any]) -> None:
        """Keep the reports in a file for ``kvoffload why``, and know the namespaces of the chunk
        store's directories. Before the thread starts; does no I/O itself."""
        self._folder = reports_folder()
        self._head = {"kind": "engine", "pid": os.getpid(), "started": time.time(), **head}
        self._roots = roots

    def work(self, closed: deque[Asked], now: float) -> None:
        """Explain what was closed; write what is new, at most once a second.

        What cannot be written is counted and said once; reports then have no file.
        """
        if self._folder is not None:
            folder, self._folder = self._folder, None
            self._try(lambda: self._open(folder))
        self._probes = PROBES
        for _ in range(min(BATCH, len(closed))):
            asked = closed.popleft()
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
        space, request = asked.space, asked.request  # the latter may be let go of at any time
        if isinstance(space, Space):
            self._remember(space)
            unknown = cause is MissCause.NEVER_STORED and asked.chunk == 0
            if request is not None:
                cause, details = self._elsewhere(request, space, unknown) or (cause, details)
            elif unknown:
                details = {"note": "not compared with other requests: too many waited for it"}
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
        self, request: Any, space: Space, wanted: bool
    ) -> tuple[MissCause, Details] | None:
        """Where the prompt's first chunk is known instead, if ``wanted``; enters the request."""
        size = self._size
        tokens = getattr(request, "prompt_token_ids", None)
        adapter = self._names.adapter(request)
        if not tokens or len(tokens) < size or adapter is None:
            return None
        if not getattr(request, "mm_features", None):  # images have the same tokens
            mine = self._kin.variant(getattr(request, "cache_salt", None), adapter, space.number)
            others = self._kin.meet(tokens[:size], mine)
            if wanted and others and mine not in others:
                return self._differs(mine, mine.nearest(others), space)
        return self._on_nvme(request, space, adapter) if wanted else None

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
        self, request: Any, space: Space, adapter: bytes
    ) -> tuple[MissCause, Details] | None:
        if self._known is None or self._probes <= 0:
            return None
        found = self._known.keys_elsewhere(space, request.block_hashes, adapter)
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
