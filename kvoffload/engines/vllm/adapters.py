"""Digests of LoRA adapters: part of a chunk's key, so adapters are told apart by bytes."""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import queue
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kvoffload.engines.vllm.weight_files import NotLocal, WeightFiles
from kvoffload.engines.vllm.weights import DigestCache, Identity, digest_all

logger = logging.getLogger("vllm.kvoffload")

RECHECK_S = 5.0
"""How often the files of known adapters are looked at again."""
AWAKE_S = 600.0
"""An adapter that nobody asked for this long is looked at when it is asked for again: vllm serve
tells nobody that one was unloaded, and trainers load one after the other."""
_PROCESS_SECRET = os.urandom(32)

Key = tuple[int, str]


@dataclass(slots=True)
class _Adapter:
    digest: bytes | None = None  # None: not known yet, or never again
    files: bytes = b""  # what they were, b"" when they could not be read
    used: float = 0.0
    queued: bool = True  # for its first digest, or, after a sleep, for a look at its files
    changed: bool = False  # its files are not what they were: which of them are loaded, who knows


class AdapterDigests:
    """sha256 over the files of each adapter's folder, by (id, path), on a background thread.

    An adapter whose files cannot be read, or that changed after this engine was started, gets a
    digest of this process only: its KV is shared in this process and by nobody else. One whose
    files change while it is known has none from then on: the workers may read them again at any
    time. Thread-safe; ``get`` does no I/O. An adapter that came stays known, some 300 bytes.
    """

    def __init__(
        self,
        *,
        cache: DigestCache | None = None,
        unchanged_since_ns: int | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        if unchanged_since_ns is None:
            from kvoffload.engines.vllm.plugin import loaded_after_ns

            unchanged_since_ns = loaded_after_ns()
        self._cache = cache or DigestCache()
        self._since = unchanged_since_ns
        self._clock = clock
        self._lock = threading.Lock()
        self._known: dict[Key, _Adapter] = {}
        self._work: queue.SimpleQueue[Key | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None
        self._closed = False
        self._private = 0

    def get(self, lora_request: Any) -> bytes | None:
        """Digest of the request's adapter: b"" without one, None while it is not known.

        An adapter loaded in place is never known: vLLM reads its files again at each use.
        """
        if lora_request is None:
            return b""
        if getattr(lora_request, "load_inplace", False):
            return None
        key = (int(lora_request.lora_int_id), str(lora_request.lora_path))
        now = self._clock()
        with self._lock:
            adapter = self._known.get(key)
            if adapter is None:
                adapter = self._known[key] = _Adapter(used=now)
                self._enqueue(key)
            elif not adapter.queued and now - adapter.used > AWAKE_S:
                adapter.queued = True  # not looked at since
                self._enqueue(key)
            adapter.used = now
            return None if adapter.queued else adapter.digest

    def forget(self, lora_int_id: int) -> None:
        """The workers let this adapter go: what comes under its id and path next is read anew."""
        with self._lock:
            for key in [k for k in self._known if k[0] == lora_int_id]:
                del self._known[key]

    def close(self) -> None:
        """Stop the thread. What is not known stays unknown."""
        with self._lock:
            self._closed = True
            thread = self._thread
        self._work.put(None)
        if thread is not None:
            thread.join(timeout=5)

    def check(self) -> None:
        """Raise AssertionError when an adapter is neither known nor being worked on."""
        with self._lock:
            for key, adapter in self._known.items():
                waits = adapter.queued or adapter.changed or self._closed
                assert adapter.digest is not None or waits, key
                assert adapter.digest is None or len(adapter.digest) == 32, key

    def _enqueue(self, key: Key) -> None:
        if self._thread is None and not self._closed:
            self._thread = threading.Thread(
                target=self._run, name="kvoffload-adapters", daemon=True
            )
            self._thread.start()
        self._work.put(key)

    def _run(self) -> None:
        due = time.monotonic() + RECHECK_S
        while True:
            try:
                key = self._work.get(timeout=max(0.0, due - time.monotonic()))
            except queue.Empty:
                self._look_again()
                due = time.monotonic() + RECHECK_S
                continue
            if key is None:
                return
            with self._lock:
                adapter = self._known.get(key)
            if adapter is None or not adapter.queued:
                continue
            if adapter.digest is None and not adapter.changed:
                self._find(key, adapter)
            else:
                self._look_at(key, adapter)

    def _find(self, key: Key, adapter: _Adapter) -> None:
        known_by = b""
        digest: bytes | None = None
        try:
            files = _files(key)
            known_by = _identity(files)
            source = WeightFiles("adapter", files[0].parent, files)
            digest = digest_all([source], self._cache, self._since, lambda: self._closed)
        except Exception as exc:
            if not isinstance(exc, NotLocal | OSError | InterruptedError):
                logger.warning("kvoffload: adapter %s cannot be digested", key, exc_info=True)
        with self._lock:
            if digest is None:  # a name that nobody else can have
                self._private += 1
                private = repr((key, self._private)).encode()
                digest = hashlib.sha256(_PROCESS_SECRET + private).digest()
            adapter.digest, adapter.files, adapter.queued = digest, known_by, False

    def _look_again(self) -> None:
        awake = self._clock() - AWAKE_S
        with self._lock:
            known = [(k, a) for k, a in self._known.items() if a.used >= awake and not a.queued]
        for key, adapter in known:
            self._look_at(key, adapter)

    def _look_at(self, key: Key, adapter: _Adapter) -> None:
        """Whether its files are what they were; the digest of one whose are not is gone."""
        same = not adapter.files or adapter.changed
        if not same:
            with contextlib.suppress(OSError, NotLocal):
                same = _identity(_files(key)) == adapter.files
        with self._lock:
            adapter.queued = False
            if not same:
                adapter.changed, adapter.digest = True, None
        if not same:
            logger.warning(
                "kvoffload: the files of the LoRA adapter %s changed while it was served: its "
                "requests are neither loaded nor stored until it is unloaded and loaded again.",
                key[1],
            )


def _files(key: Key) -> tuple[Path, ...]:
    """The files of an adapter's folder, at least one. Raises NotLocal, OSError."""
    folder = Path(os.path.expanduser(key[1]))
    if not folder.is_dir():
        raise NotLocal("not a local folder")
    files = tuple(sorted(p for p in folder.iterdir() if p.is_file()))
    if not files:
        raise NotLocal("an empty folder")
    return files


def _identity(files: tuple[Path, ...]) -> bytes:
    """16 bytes for the names, sizes, times and inodes of the files."""
    seen = [(p.name, Identity.of(os.stat(p))) for p in files]
    return hashlib.blake2b(repr(seen).encode("utf-8", "surrogateescape"), digest_size=16).digest()
