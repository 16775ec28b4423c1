"""The NVMe tier: opens native chunk stores (docs/format.md) with errors of our own kind."""

from __future__ import annotations

import errno
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

from kvoffload._core import SegmentStore
from kvoffload.config import IoEngine, refuse_overlap
from kvoffload.errors import StoreError
from kvoffload.tiers.nvme.counted import CountedStore
from kvoffload.tiers.nvme.drive import Drive, DriveLevel
from kvoffload.tiers.nvme.shares import drive_bounds
from kvoffload.tiers.nvme.striped import StripedStore

__all__ = [
    "QUEUE_BYTES",
    "DriveLevel",
    "SegmentStore",
    "StripedStore",
    "open_drives",
    "open_segment_store",
    "open_watched",
]


QUEUE_BYTES = 256 << 20
"""Puts that wait for the drive, by default; what is beyond is dropped."""


def open_segment_store(
    path: str | os.PathLike[str],
    *,
    max_bytes: int | None = None,
    segment_bytes: int | None = None,
    threads: int = 4,
    queue_bytes: int = QUEUE_BYTES,
    direct: bool = True,
    read_only: bool = False,
    io_engine: IoEngine = "auto",
    endurance_bytes: int | None = None,
) -> SegmentStore:
    """Open or create the chunk store in ``path``; blocks while it recovers (milliseconds per GiB).

    ``max_bytes`` bounds everything under the path, other processes' directories included; None:
    what the store was created with (at creation half of the free space), or what lies there where
    that is more: others may have been given a larger bound since. ``segment_bytes`` None: 256 MiB,
    less where the bound is small. ``queue_bytes``: of puts that wait for the drive; what is beyond
    ends as dropped. ``direct`` False: through the page cache. ``io_engine``: "uring" (StoreError
    where this process cannot have it), "threads", or "auto".
    ``endurance_bytes``: what the drive endures; None: as a writer last said (``lifetime`` file).
    Raises StoreError (one line naming the path) and ValueError for numbers out of range.
    """
    where = _utf8(path)
    sizes = max_bytes or 0, segment_bytes or 0, threads, queue_bytes
    try:
        if read_only:
            return SegmentStore(where, *sizes, direct, True, io_engine)
        return CountedStore(where, *sizes, direct, io_engine, endurance_bytes)
    except OSError as error:
        raise StoreError(error.errno, error.strerror) from error


def _utf8(path: str | os.PathLike[str]) -> str:
    """What the native store takes, and files with a path in them. Raises StoreError."""
    text = os.fspath(path)
    try:
        text.encode()
    except UnicodeEncodeError as error:
        shown = text.encode("utf-8", "backslashreplace").decode()
        line = f"chunk store {shown}: cannot be opened: the path is not UTF-8 text"
        raise StoreError(errno.EILSEQ, line) from error
    return text


def open_drives(
    paths: Sequence[str | os.PathLike[str]],
    *,
    max_bytes: int | None = None,
    segment_bytes: int | None = None,
    threads: int = 4,
    queue_bytes: int = QUEUE_BYTES,
    direct: bool = True,
    read_only: bool = False,
    io_engine: IoEngine = "auto",
    endurance_bytes: int | None = None,
) -> SegmentStore | StripedStore:
    """The store in one path, or one store over several (in any order), opened at the same time.

    ``max_bytes`` is the sum over the paths (``shares.drive_bounds``), and so is
    ``endurance_bytes``, in even shares; the rest is as in ``open_segment_store``, for each path. Of
    several paths those that cannot be opened are left out and named by ``StripedStore.drives()``.
    Raises ConfigError where paths are the same directory or nested, StoreError when no path can be
    opened.
    """
    where = [os.fspath(path) for path in paths]
    refuse_overlap(where)
    bounds = [max_bytes or 0] if len(where) == 1 else drive_bounds(where, max_bytes)
    endures = None if endurance_bytes is None else endurance_bytes // max(1, len(where))

    def opened(at: int) -> SegmentStore:
        return open_segment_store(
            where[at],
            max_bytes=bounds[at] or None,
            segment_bytes=segment_bytes,
            threads=threads,
            queue_bytes=queue_bytes,
            direct=direct,
            read_only=read_only,
            io_engine=io_engine,
            endurance_bytes=endures,
        )

    def drive(at: int) -> Drive:
        try:
            return Drive(where[at], opened(at))
        except StoreError as error:
            return Drive(where[at], None, error.strerror or str(error))

    if len(where) == 1:
        return opened(0)
    with ThreadPoolExecutor(max(1, len(where))) as pool:
        drives = list(pool.map(drive, range(len(where))))
    if not any(d.store is not None for d in drives):
        lines = "; ".join(d.error for d in drives)
        raise StoreError(errno.EIO, lines or "no path of a chunk store was given")
    return StripedStore(drives)


def open_watched(
    paths: Sequence[str | os.PathLike[str]],
    *,
    max_bytes: int | None,
    queue_bytes: int,
    io_engine: IoEngine,
) -> StripedStore:
    """As ``open_drives``; also over one path a StripedStore, which gives up I/O that hangs and
    leaves a drive that fails alone. For callers that do not see to that themselves.
    """
    store = open_drives(paths, max_bytes=max_bytes, queue_bytes=queue_bytes, io_engine=io_engine)
    if isinstance(store, StripedStore):
        return store
    return StripedStore([Drive(os.fspath(paths[0]), store)])
