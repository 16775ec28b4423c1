"""Digests of LoRA adapters: part of a chunk's key, so adapters are told apart by bytes."""

from __future__ import annotations

import hashlib
import logging
import os
import queue
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kvoffload.engines.vllm.weight_files import NotLocal, WeightFiles
from kvoffload.engines.vllm.weights import DigestCache, Identity, digest_all

logger = logging.getLogger("vllm.kvoffload")

_RECHECK_S = 5.0
_PROCESS_SECRET = os.urandom(32)

Key = tuple[int, str]


@dataclass(slots=True)
class _Adapter:
    digest: bytes | None = None
    identities: tuple[tuple[str, Identity], ...] = ()
    checked: float = 0.0
    queued: bool = True
    local: bool = False

    def due(self, now: float) -> bool:
        return self.local and not self.queued and now - self.checked > _RECHECK_S


class AdapterDigests:
    """sha256 over the files of each adapter's folder, by (id, path), on a background thread.

    An adapter whose files cannot be read, or that changed after this engine was started, gets a
    digest of this process only: its KV is shared in this process and by nobody else. Thread-safe;
    ``get`` does no I/O.
    """

    def __init__(
        self, *, cache: DigestCache | None = None, unchanged_since_ns: int | None = None
    ) -> None:
        if unchanged_since_ns is None:
            from kvoffload.engines.vllm.plugin import loaded_after_ns

            unchanged_since_ns = loaded_after_ns()
        self._cache = cache or DigestCache()
        self._since = unchanged_since_ns
        self._lock = threading.Lock()
        self._known: dict[Key, _Adapter] = {}
        self._work: queue.SimpleQueue[Key | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None
        self._closed = False
        self._changes = 0

    def get(self, lora_request: Any) -> bytes | None:
        """Digest of the request's adapter: b"" without one, None while it is not known.

        An adapter loaded in place is never known: vLLM reads its files again at each use.
        """
        if lora_request is None:
            return b""
        if getattr(lora_request, "load_inplace", False):
            return None
        key = (int(lora_request.lora_int_id), str(lora_request.lora_path))
        with self._lock:
            adapter = self._known.get(key)
            if adapter is None:
                adapter = self._known[key] = _Adapter()
                self._enqueue(key)
            elif adapter.due(time.monotonic()):
                adapter.queued = True
                self._enqueue(key)
            return adapter.digest

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
                assert adapter.digest is not None or adapter.queued or self._closed, key
                assert adapter.digest is None or len(adapter.digest) == 32, key

    def _enqueue(self, key: Key) -> None:
        if self._thread is None and not self._closed:
            self._thread = threading.Thread(
                target=self._run, name="kvoffload-adapters", daemon=True
            )
            self._thread.start()
        self._work.put(key)

    def _run(self) -> None:
        while (key := self._work.get()) is not None:
            try:
                identities, digest = self._digest(key)
            except Exception as exc:
                if not isinstance(exc, NotLocal | OSError | InterruptedError):
                    logger.warning("kvoffload: adapter %s cannot be digested", key, exc_info=True)
                identities, digest = (), None
            with self._lock:
                self._settle(key, identities, digest)

    def _digest(self, key: Key) -> tuple[tuple[tuple[str, Identity], ...], bytes | None]:
        folder = Path(os.path.expanduser(key[1]))
        if not folder.is_dir():
            raise NotLocal("not a local folder")
        files = tuple(sorted(p for p in folder.iterdir() if p.is_file()))
        identities = tuple((p.name, Identity.of(os.stat(p))) for p in files)
        if self._known[key].identities == identities:
            return identities, self._known[key].digest
        source = WeightFiles("adapter", folder, files)
        digest = digest_all([source], self._cache, self._since, lambda: self._closed)
        return identities, digest

    def _settle(self, key: Key, identities: Any, digest: bytes | None) -> None:
        adapter = self._known[key]
        adapter.queued = False
        adapter.checked = time.monotonic()
        if digest is not None and adapter.digest in (None, digest):
            adapter.digest, adapter.identities, adapter.local = digest, identities, True
            return
        # Unreadable, or not what it was: a name that nobody else can have.
        self._changes += 1
        adapter.local = False
        private = repr((key, self._changes)).encode()
        adapter.digest = hashlib.sha256(_PROCESS_SECRET + private).digest()
