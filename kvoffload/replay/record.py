"""Records a live engine's request stream, to be replayed: hashes only, bounded, off the thread.

One line per request that has ended, in the format of ``kvoffload.replay.trace``. Chunk keys are
hashed anew with a random key that never leaves the process: who has the file can tell which
requests shared a prefix, and cannot confirm what any of them said.
"""

from __future__ import annotations

import fcntl
import json
import logging
import os
import queue
import secrets
import threading
from collections.abc import Sequence
from hashlib import blake2b
from pathlib import Path
from typing import NamedTuple

from kvoffload.types import ChunkKey

log = logging.getLogger("kvoffload.replay")

MAX_BYTES = 256 << 20
"""Of the two files together: PATH, and PATH.1 with what came before."""
MAX_WAITING = 4096
"""Requests handed over and not written yet; more are left out and counted."""
_ID_BYTES = 8


class Ended(NamedTuple):
    """A request that has ended: seconds on the engine's clock, tokens, and its chunks' keys."""

    arrived_s: float
    input_tokens: int
    output_tokens: int
    keys: Sequence[ChunkKey]
    namespace_id: int


class StreamRecorder:
    """Appends to ``path`` (mode 0600) from a thread of its own. ``add`` is for one thread.

    ``chunk_tokens``: tokens per key; ``began_s``: the engine's clock now. What was at ``path``
    becomes ``path``.1. Raises OSError from the constructor when the file cannot be made, or is
    being written by another engine; later errors end the recording with one line in the log.
    """

    def __init__(
        self, path: str | Path, chunk_tokens: int, began_s: float, max_bytes: int = MAX_BYTES
    ) -> None:
        self.path = Path(path)
        self.dropped = 0
        self.written = 0
        self._chunk_tokens = chunk_tokens
        self._began_s = began_s
        self._half = max_bytes // 2
        self._salt = secrets.token_bytes(32)
        self._recording = secrets.token_hex(8)
        self._waiting: queue.SimpleQueue[Ended | None] = queue.SimpleQueue()
        self._failed = False
        self._bytes = 0
        self._fd = self._open()
        self._thread = threading.Thread(target=self._run, name="kvoffload-record", daemon=True)
        self._thread.start()

    def add(self, ended: Ended) -> None:
        """Hand a request over; O(1), never blocks. ``keys`` must not change afterwards."""
        if self._failed or self._waiting.qsize() >= MAX_WAITING:
            self.dropped += 1
        else:
            self._waiting.put(ended)

    def close(self, timeout_s: float = 5.0) -> None:
        """Write what is waiting, for at most ``timeout_s``. Idempotent."""
        if self._thread.is_alive():
            self._waiting.put(None)
            self._thread.join(timeout_s)
            if self.dropped:
                log.warning("record_path: %d requests were not recorded.", self.dropped)

    # -- the thread

    def _run(self) -> None:
        try:
            while (ended := self._waiting.get()) is not None:
                lines = [self._line(ended)]
                last = False
                while not self._waiting.empty() and len(lines) < 256:
                    more = self._waiting.get()
                    if more is None:
                        last = True
                        break
                    lines.append(self._line(more))
                self._write(lines)
                if last:
                    break
        except Exception as error:  # a recording that ends must not end anything else
            self._failed = True
            log.error("record_path: the recording ends: %s", error)
        finally:
            os.close(self._fd)

    def _line(self, ended: Ended) -> bytes:
        ids = [self._hashed(key) for key in ended.keys]
        row = {
            "timestamp": max(0, round((ended.arrived_s - self._began_s) * 1000)),
            "input_length": ended.input_tokens,
            "output_length": ended.output_tokens,
            "namespace": self._hashed(ended.namespace_id.to_bytes(8, "little")),
            "hash_ids": ids,
        }
        return json.dumps(row, separators=(",", ":")).encode() + b"\n"

    def _hashed(self, key: bytes) -> str:
        return blake2b(key, key=self._salt, digest_size=_ID_BYTES).hexdigest()

    def _write(self, lines: list[bytes]) -> None:
        data = b"".join(lines)
        if self._bytes + len(data) > self._half:
            fd = self._open()
            os.close(self._fd)
            self._fd = fd
        self._bytes += len(data)
        while data:
            data = data[os.write(self._fd, data) :]
        self.written += len(lines)

    def _open(self) -> int:
        """A new file with its first line; the old one moves aside."""
        flags = os.O_WRONLY | os.O_NOFOLLOW | os.O_CLOEXEC
        if self.path.exists():
            held = os.open(self.path, flags)
            try:
                if not self._bytes:  # ours we hold ourselves
                    fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
                os.replace(self.path, self.path.with_name(self.path.name + ".1"))
            finally:
                os.close(held)
        fd = os.open(self.path, flags | os.O_CREAT | os.O_EXCL, 0o600)
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        head = {
            "meta": True,
            "name": self.path.name.split(".")[0],
            "recording": self._recording,
            "block_size": self._chunk_tokens,
        }
        first = json.dumps(head).encode() + b"\n"
        self._bytes = os.write(fd, first)
        return fd
