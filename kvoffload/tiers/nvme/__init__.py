"""The NVMe tier: opens the native chunk store (docs/format.md) with errors of our own kind."""

from __future__ import annotations

import os

from kvoffload._core import SegmentStore
from kvoffload.config import IoEngine
from kvoffload.errors import StoreError

__all__ = ["SegmentStore", "open_segment_store"]


def open_segment_store(
    path: str | os.PathLike[str],
    *,
    max_bytes: int | None = None,
    segment_bytes: int | None = None,
    threads: int = 4,
    queue_bytes: int = 256 << 20,
    direct: bool = True,
    read_only: bool = False,
    io_engine: IoEngine = "auto",
) -> SegmentStore:
    """Open or create the chunk store in ``path``; blocks while it recovers (milliseconds per GiB).

    ``max_bytes`` bounds everything under the path, other processes' directories included; None:
    what the store was created with, at creation half of the free space. ``segment_bytes`` None:
    256 MiB, less where ``max_bytes`` is small. ``direct`` False: through the page cache.
    ``io_engine``: "uring" (StoreError where this process cannot have it), "threads", or "auto".
    Raises StoreError (one line naming the path) and ValueError for numbers out of range.
    """
    try:
        return SegmentStore(
            os.fspath(path),
            max_bytes or 0,
            segment_bytes or 0,
            threads,
            queue_bytes,
            direct,
            read_only,
            io_engine,
        )
    except OSError as error:
        raise StoreError(error.errno, error.strerror) from error
