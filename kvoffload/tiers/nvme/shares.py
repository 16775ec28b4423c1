"""How one byte bound is split over several drives."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path


def split_bound(total: int, capacities: Sequence[int]) -> list[int]:
    """Bytes per drive: even shares; a drive that holds less gives its rest to the others.

    The sum is ``total``, or what all hold where that is less.
    """
    out = [0] * len(capacities)
    left = total
    order = sorted(range(len(capacities)), key=lambda i: capacities[i])
    for done, i in enumerate(order):
        out[i] = min(left // (len(order) - done), max(capacities[i], 0))
        left -= out[i]
    return out


def drive_bounds(paths: Sequence[str], total: int | None) -> list[int]:
    """``max_bytes`` for the store in each path; 0 where the store's own bound stands.

    ``total`` None: every store as it was created, or what lies there where that is more (the store
    itself sees to that); a new one half of its drive's free space. What a path can hold is the
    drive's free space plus what lies under the path already; several paths on one drive share its
    free space. A path that cannot be examined keeps its even share.
    """
    places = [_examine(path) for path in paths]
    same = [sum(p is not None and p[0] == q[0] for p in places) if q else 1 for q in places]
    if total is None:
        fresh = [not os.path.exists(os.path.join(path, "MANIFEST")) for path in paths]
        return [
            place[1] // 2 // n if place and new and n > 1 else 0
            for place, new, n in zip(places, fresh, same, strict=True)
        ]
    holds = [
        total if place is None else place[1] // n + _held(path)
        for path, place, n in zip(paths, places, same, strict=True)
    ]
    return split_bound(total, holds)


def _examine(path: str) -> tuple[int, int] | None:
    """(device, free bytes) of the path or of the nearest parent that exists."""
    at = path
    try:
        while not os.path.isdir(at) and os.path.dirname(at) != at:
            at = os.path.dirname(at)
        stat = os.statvfs(at)
        return os.stat(at).st_dev, stat.f_bavail * stat.f_frsize
    except OSError:
        return None


def _held(path: str) -> int:
    """Bytes on disk under the path; what cannot be looked at counts as nothing."""
    total = 0
    for folder, _, names in os.walk(path):
        for name in names:
            try:
                total += (Path(folder) / name).lstat().st_blocks * 512
            except OSError:
                continue
    return total
