"""The chunk store by itself: bytes under 16-byte keys in a bounded directory that survives kill -9.

    with open_store("/mnt/nvme/cache", max_bytes=10 << 30) as store:
        store.put(key, payload)
        payload = store.get(key)  # None: a miss

It is a cache: the oldest segments make room for new ones, a key is written once, and whatever the
disk gets wrong is a miss and a counter in ``stats()``, never other bytes. Several paths (one per
drive) make one store: reads come from all, and a drive that fails costs only what it holds. Needs
no vLLM, no torch.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import TYPE_CHECKING, Any

from kvoffload.config import IoEngine
from kvoffload.errors import ClosedError, StoreError
from kvoffload.types import StoreResult

if TYPE_CHECKING:
    from kvoffload._core import SegmentStore, StoreDone
    from kvoffload.tiers.nvme import DriveLevel, StripedStore
    from kvoffload.transfer import ExportReport, ImportReport

Progress = Callable[[int, int, int], None]
"""Called with (entries done, entries in all, payload bytes read)."""

PathLike = str | os.PathLike[str]


@dataclass(frozen=True, slots=True)
class Chunk:
    """One stored payload, as ``ls`` shows it."""

    key: bytes
    namespace: int  # low 32 bits of what put() was given
    depth: int
    nbytes: int
    segment: int
    seq: int  # grows with time: newer chunks have larger ones


@dataclass(frozen=True, slots=True)
class VerifyReport:
    """What ``verify`` found."""

    checked: int
    bad: int
    nbytes: int  # payload bytes read
    seconds: float
    dropped: int  # bad ones taken out (repair)


def open_store(
    path: PathLike | Sequence[PathLike],
    *,
    max_bytes: int | None = None,
    segment_bytes: int | None = None,
    threads: int = 4,
    direct: bool = True,
    read_only: bool = False,
    timeout_s: float = 30.0,
    io_engine: IoEngine = "auto",
) -> Store:
    """Open or create a store in one path, or one store over several (in any order).

    ``max_bytes`` bounds everything under the path, or under all paths together: even shares, less
    where a drive holds less. None: each as it was created (at creation half of the free space), or
    what lies there where that is more; nothing is removed but for what is put later.
    ``threads`` are per path. ``timeout_s``: the longest a put or get waits for the disk. Several
    processes may open one path; each writes its own directory and reads all. ``io_engine``: "uring"
    (StoreError where this process cannot have it), "threads", or "auto": io_uring where it works.
    Of several paths those that cannot be opened are left out; ``drives()`` says why.
    Raises StoreError with one line that names the path; ValueError for numbers out of range, and
    for paths that are the same directory or one inside another.
    """
    from kvoffload.tiers.nvme import open_drives

    native = open_drives(
        [path] if isinstance(path, str | os.PathLike) else list(path),
        max_bytes=max_bytes,
        segment_bytes=segment_bytes,
        threads=threads,
        direct=direct,
        read_only=read_only,
        io_engine=io_engine,
    )
    return Store(native, timeout_s)


class Store:
    """An open chunk store; made by ``open_store``. Every method may be called from any thread.

    Keys are 16 bytes, and the same key must always mean the same payload: a key that is held is not
    written again. ``io_engine`` says what does the I/O: "uring" or "threads". Methods raise
    ClosedError after ``close``, ValueError for a key of another length, StoreError when a read-only
    store is written to. Disk failures are results and counters.
    """

    def __init__(self, native: SegmentStore | StripedStore, timeout_s: float = 30.0) -> None:
        self._native: SegmentStore | StripedStore | None = native
        self._timeout_s = timeout_s
        self._lock = threading.Lock()
        self._next_job = 1
        self._waiting: set[int] = set()
        self._results: dict[int, StoreDone] = {}
        self.path = native.path
        self.writer_dir = native.writer_dir
        self.io_engine = native.io_engine

    # -- payloads

    def put(self, key: bytes, payload: Any, *, namespace: int = 0) -> StoreResult:
        """Store one bytes-like payload (1 byte to segment size - 16 KiB). See ``put_many``."""
        return self.put_many([(key, payload)], namespace=namespace)[0]

    def put_many(
        self, items: Iterable[tuple[bytes, Any]], *, namespace: int = 0
    ) -> list[StoreResult]:
        """Store payloads together (they will lie together) and wait until they are written.

        OK means a later ``get`` finds it, and after at most 10 ms more (or ``flush``) also after a
        kill. Outcomes: OK, NO_SPACE, IO_ERROR, DROPPED (queue full, or no answer in time). A
        writable buffer is copied first: after DROPPED it may still be written to disk, and must
        then hold what its checksum was computed from.
        """
        keys, payloads = [], []
        for key, payload in items:
            keys.append(_checked(key))
            view = memoryview(payload)
            payloads.append(view if view.readonly else memoryview(bytes(view)))
        packed, space = b"".join(keys), namespace & 0xFFFFFFFF

        def put(native: SegmentStore | StripedStore, job: int, late: int) -> None:
            native.put(job, packed, payloads, space, late)

        return self.submit(len(keys), put)

    def get(self, key: bytes) -> bytes | None:
        """The payload, verified; None when it is not held, damaged or not readable in time."""
        return self.get_many([key])[0]

    def get_many(self, keys: Sequence[bytes]) -> list[bytes | None]:
        """Payloads in the order of ``keys``; adjacent ones are read together."""
        native = self._open()
        out: list[bytes | None] = [None] * len(keys)
        held = [(i, key, native.length(_checked(key))) for i, key in enumerate(keys)]
        # A miss goes down too: it is counted, and makes the store look for other writers' news.
        buffers = [bytearray(max(nbytes, 0)) for _, _, nbytes in held]
        packed = b"".join(keys)
        results = self.submit(
            len(keys), lambda native, job, late: native.get(job, packed, buffers, late)
        )
        for (i, _, _), buffer, result in zip(held, buffers, results, strict=True):
            if result is StoreResult.OK:
                out[i] = bytes(buffer)
        return out

    def get_into(self, key: bytes, buffer: Any) -> StoreResult:
        """Read into a writable buffer of exactly ``length(key)`` bytes; it is untouched unless OK.

        After DROPPED (no answer in time) the buffer may still be written to until ``close``.
        """
        packed = _checked(key)
        return self.submit(1, lambda native, job, late: native.get(job, packed, [buffer], late))[0]

    def delete(self, *keys: bytes) -> int:
        """Forget keys, for good once flushed; returns how many were held."""
        with _store_errors():
            return self._open().delete(b"".join(_checked(key) for key in keys))

    # -- what is there

    def __contains__(self, key: bytes) -> bool:
        return self.contains(key)

    def __len__(self) -> int:
        return int(self.stats()["entries"])

    def contains(self, key: bytes) -> bool:
        """Whether the key is held. No I/O."""
        return self._open().contains(_checked(key)) == b"\x01"

    def longest_prefix(self, keys: Sequence[bytes]) -> int:
        """How many keys from the first on are held. No I/O; stops at the first that is not."""
        return self._open().longest_prefix(b"".join(_checked(key) for key in keys))

    def length(self, key: bytes) -> int | None:
        """Payload bytes held under the key, or None. No I/O."""
        nbytes = self._open().length(_checked(key))
        return None if nbytes < 0 else nbytes

    def stats(self) -> dict[str, int | float]:
        """Counters and gauges; docs/format.md names them. No I/O."""
        return self._open().stats()

    def drives(self) -> list[DriveLevel]:
        """Every path with what it holds, whether it is up, and why not. No I/O."""
        from kvoffload.tiers.nvme import StripedStore
        from kvoffload.tiers.nvme.drive import Drive

        native = self._open()
        if isinstance(native, StripedStore):
            return native.drives()
        return [Drive(self.path, native).level()]

    def ls(self, limit: int = 0) -> list[Chunk]:
        """Held chunks, newest first; ``limit`` 0: all."""
        return [Chunk(*row) for row in self._open().ls(limit)]

    def verify(self, *, repair: bool = False, progress: Progress | None = None) -> VerifyReport:
        """Read and check every payload (minutes for a full disk). ``repair`` drops the bad ones."""
        with _store_errors():
            found = self._open().verify(repair, progress)
        return VerifyReport(
            checked=int(found["checked"]),
            bad=int(found["bad"]),
            nbytes=int(found["bytes"]),
            seconds=float(found["seconds"]),
            dropped=int(found["dropped"]),
        )

    # -- to a file and back

    def export(
        self,
        file: PathLike,
        *,
        keys: Sequence[bytes] | None = None,
        chain: Sequence[bytes] | None = None,
        newest: int = 0,
        namespace: int | None = None,
        overwrite: bool = False,
        sign_key: bytes | None = None,
        progress: Progress | None = None,
    ) -> ExportReport:
        """Write chunks to a safetensors file (docs/format.md), oldest first.

        All held chunks, or the ``newest`` so many, or those of a ``namespace`` (its low 32 bits);
        or the given ``keys``; or of ``chain`` (a prompt's keys, root first) what is held without
        a gap. The file appears when it is complete. Memory: at most some 64 MiB of payload.
        ``sign_key`` signs it (``kvoffload.signing.read_key`` reads one from a private file).
        Raises StoreError with one line naming the file, ValueError for a selection that makes no
        sense; what ``progress`` raises.
        """
        from kvoffload.transfer import Selection, export_chunks

        given = [None if k is None else tuple(map(_checked, k)) for k in (keys, chain)]
        wanted = Selection(given[0], given[1], newest, namespace)
        return export_chunks(
            self, file, wanted, overwrite=overwrite, sign_key=sign_key, progress=progress
        )

    def import_(
        self,
        file: PathLike,
        *,
        verify_key: bytes | None = None,
        progress: Progress | None = None,
    ) -> ImportReport:
        """Put the chunks of a file that ``export`` wrote, each once its checksum has been verified.

        A chunk that is damaged is left out and counted. The checksum finds accidents, not
        attackers: without ``verify_key`` import only files that you trust like the store itself.
        With it nothing is put unless the file was signed with that key (nobody else may write to
        the file meanwhile). Raises StoreError with one line naming the file, before anything is
        put, where it is truncated, not ours or not signed so.
        """
        from kvoffload.transfer import import_chunks

        return import_chunks(self, file, verify_key=verify_key, progress=progress)

    def check(self) -> None:
        """Raise AssertionError naming the first broken invariant."""
        self._open().check()

    # -- life

    def flush(self, timeout_s: float = 30.0) -> bool:
        """Wait until all put so far survives a kill. False on timeout or a failed journal."""
        return self._open().flush(int(timeout_s * 1000))

    def close(self, timeout_s: float = 5.0) -> None:
        """Flush and close, bounded by ``timeout_s`` even on a hung disk. Idempotent."""
        with self._lock:
            native, self._native = self._native, None
        if native is not None:
            native.close(int(timeout_s * 1000))

    def __enter__(self) -> Store:
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    # -- internals

    def _open(self) -> SegmentStore | StripedStore:
        native = self._native
        if native is None:
            raise ClosedError(f"chunk store {self.path}: closed")
        return native

    def submit(
        self, n: int, send: Callable[[SegmentStore | StripedStore, int, int], None]
    ) -> list[StoreResult]:
        """Submit one job of ``n`` keys by ``send(native store, job, deadline_ms)``, wait for it.

        What the disk has not begun in ``timeout_s`` is not done later either. For our own.
        """
        native = self._open()
        with self._lock:
            job, self._next_job = self._next_job, self._next_job + 1
            self._waiting.add(job)
        try:
            with _store_errors():
                send(native, job, min(max(1, int(self._timeout_s * 1000)), 86_400_000))
            done = self._await(native, job)
        finally:
            with self._lock:
                self._waiting.discard(job)
                self._results.pop(job, None)
        if done is None:
            return [StoreResult.DROPPED] * n
        return [StoreResult(code) for code in done.results]

    def _await(self, native: SegmentStore | StripedStore, job: int) -> StoreDone | None:
        """Wait for one job; ``poll`` hands out everybody's results: keep what is waited for."""
        until = time.monotonic() + self._timeout_s
        while True:
            left = until - time.monotonic()
            ended = native.wait(job, max(0, int(left * 1000)))
            with self._lock:
                for done in native.poll():
                    if done.job in self._waiting:
                        self._results[done.job] = done
                if job in self._results:
                    return self._results[job]
            if not ended or left <= 0:
                return None


class _store_errors:
    """Turns the native core's OSError into StoreError."""

    def __enter__(self) -> None:
        pass

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None
    ) -> None:
        if isinstance(error, OSError) and not isinstance(error, StoreError):
            raise StoreError(error.errno, error.strerror) from error


def _checked(key: bytes) -> bytes:
    if len(key) != 16:
        raise ValueError(f"a key is 16 bytes, not {len(key)}")
    return bytes(key)
