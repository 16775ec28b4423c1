"""A native store that counts what is written under its path beyond its own life (``lifetime``)."""

from __future__ import annotations

import fcntl
import logging
import os
import threading
import time
import weakref
from collections.abc import Callable, Mapping
from dataclasses import replace

from kvoffload._core import SegmentStore
from kvoffload.tiers.base import device_bytes
from kvoffload.tiers.nvme.lifetime import MAX_BYTES, Lifetime, load, open_folder, read_path, save

log = logging.getLogger("kvoffload.tiers.nvme")

EVERY_S = 60.0
"""Seconds between two writes of the file; a kill loses what was counted since."""
JOIN_S = 0.25
"""The least time a close gives the file, whatever the drive has used up."""


class CountedStore(SegmentStore):
    """A writer's SegmentStore that keeps the ``lifetime`` file of its directory (docs/format.md).

    The file is read when the store is opened and replaced about once a minute, when it changed, on
    a thread of its own, and at the end of ``close``. A file that cannot be read or written is one
    log line and ``lifetime_errors`` in ``stats()``, and stops nothing.
    """

    def __init__(
        self,
        path: str,
        max_bytes: int,
        segment_bytes: int,
        threads: int,
        queue_bytes: int,
        direct: bool,
        io_engine: str,
        endurance_bytes: int | None = None,
    ) -> None:
        """As SegmentStore's, for a writer. ``endurance_bytes``: what the drive endures; None: as
        the file says."""
        super().__init__(
            path, max_bytes, segment_bytes, threads, queue_bytes, direct, False, io_engine
        )
        self._tally = _Tally(self, endurance_bytes)

    def stats(self) -> dict[str, int | float]:
        """See SegmentStore; beside it ``lifetime_*`` of all writers under the path. No I/O."""
        return self._tally.added_to(super().stats())

    def native_stats(self) -> dict[str, int | float]:
        """SegmentStore's alone."""
        return super().stats()

    def close(self, timeout_ms: int = 5000) -> None:
        """See SegmentStore. The file gets what is left of the time, a quarter of a second at
        least."""
        until = time.monotonic() + timeout_ms / 1000
        self._tally.pause()
        super().close(timeout_ms)
        self._tally.end(max(JOIN_S, until - time.monotonic()))

    def _abandon(self) -> None:
        self._tally.forget()
        super()._abandon()


class _Tally:
    """The file of one writer's directory and the thread that keeps it.

    ``added_to`` may be called from any thread; what it reads is replaced whole. All else that
    changes is the thread's.
    """

    def __init__(self, store: CountedStore, endurance_bytes: int | None) -> None:
        self._path = store.path
        self._where = store.writer_dir
        self._said = False
        self._errors = 0
        self._paused = False
        self._stop = threading.Event()
        self._folder = -1
        self._saved: Lifetime | None = None
        self._others: Lifetime | None = None
        now = time.time()
        try:
            self._folder = open_folder(self._where)
            self._saved = load(self._folder)
        except (OSError, ValueError) as error:
            self._failed(error)
        own = self._saved or Lifetime(since=int(now), at=int(now))
        if endurance_bytes is not None:
            own = replace(own, endurance_bytes=min(endurance_bytes, MAX_BYTES - 1))
        self._own = (own, 0, 0)  # and what of it the native store counted: payload, device
        self._rate = 0.0
        self._left: float | None = None
        self._look(now)
        self._store: Callable[[], CountedStore | None] = weakref.ref(
            store, lambda _: self._stop.set()
        )
        self._thread = threading.Thread(target=self._run, name="kvo-lifetime", daemon=True)
        self._thread.start()

    # -- any thread

    def added_to(self, stats: dict[str, int | float]) -> dict[str, int | float]:
        """The native store's ``stats`` with the path's totals up to now."""
        life, payload, device = self._own
        others, left = self._others, self._left
        stats["lifetime_payload_bytes"] = (
            life.payload_bytes
            + int(stats["accepted_bytes"])
            - payload
            + (others.payload_bytes if others else 0)
        )
        stats["lifetime_device_bytes"] = (
            life.device_bytes
            + device_bytes(stats)
            - device
            + (others.device_bytes if others else 0)
        )
        stats["lifetime_since"] = min(life.since, others.since) if others else life.since
        stats["lifetime_per_day"] = self._rate
        stats["lifetime_errors"] = self._errors
        if left is not None:
            stats["lifetime_days_left"] = left
        return stats

    def pause(self) -> None:
        """The directory may soon be another writer's: no write begins from now on but the last."""
        self._paused = True

    def end(self, timeout_s: float) -> None:
        """The store is closed: write what is left. Idempotent."""
        self._stop.set()
        self._thread.join(timeout_s)

    def forget(self) -> None:
        """Write nothing any more, as after a kill."""
        self._paused = True
        self._store = lambda: None
        self._stop.set()

    # -- the thread

    def _run(self) -> None:
        try:
            while not self._stop.wait(EVERY_S):
                if not self._paused:
                    self._count()
                    self._write()
            if self._count():
                self._write_last()
        finally:
            if self._folder >= 0:
                os.close(self._folder)

    def _count(self) -> bool:
        """Take over what was written since; False when the store is gone."""
        store = self._store()
        if store is None:
            return False
        stats: Mapping[str, float] = store.native_stats()
        own, payload, device = self._own
        now = time.time()
        new = int(stats["accepted_bytes"]), device_bytes(stats)
        if new != (payload, device):
            self._own = (own.plus(new[0] - payload, new[1] - device, now), *new)
        self._look(now)
        return True

    def _look(self, now: float) -> None:
        """The other writers' totals, and what follows from all."""
        own = self._own[0]
        try:
            mine = os.fstat(self._folder) if self._folder >= 0 else None
            self._others = read_path(self._path, self._note, but=mine) if mine else None
        except OSError as error:
            self._failed(error)
        all_of_it = own.merged(self._others) if self._others else own
        self._rate = all_of_it.bytes_per_day(now)
        self._left = all_of_it.days_left(now)

    def _write(self) -> None:
        own = self._own[0]
        if self._folder < 0 or own == self._saved:
            return
        if self._saved is None and not own.device_bytes and not own.endurance_bytes:
            return
        try:
            save(self._folder, own)
            self._saved = own
        except OSError as error:
            self._failed(error)

    def _write_last(self) -> None:
        """The native store has given up the directory; another writer that has it counts on from
        what it found. A store that did not close in time holds on to the lock: nothing either."""
        if self._folder < 0:
            return
        flags = os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK
        try:
            lock = os.open("LOCK", flags, dir_fd=self._folder)
        except OSError as error:
            self._failed(error)
            return
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if self._still_ours():
                self._write()
        except BlockingIOError:
            pass
        finally:
            os.close(lock)

    def _still_ours(self) -> bool:
        """Whether no other writer has come and gone meanwhile."""
        try:
            return load(self._folder) in (None, self._saved)
        except (OSError, ValueError):
            return True

    def _failed(self, error: Exception) -> None:
        self._note(f"{self._where}: lifetime totals: {error}")

    def _note(self, line: str) -> None:
        self._errors += 1
        if not self._said:
            self._said = True
            log.warning("%s (said once, counted on)", line)
