"""Small files that a user's processes keep between runs: where, and how they are replaced."""

from __future__ import annotations

import contextlib
import json
import os
import tempfile
from pathlib import Path
from typing import Any


def user_cache_file(name: str) -> Path:
    """$XDG_CACHE_HOME/kvoffload/``name`` (~/.cache where that is not set)."""
    base = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return Path(base, "kvoffload", name)


def replace_json(path: Path, data: Any) -> None:
    """Write ``data`` beside ``path`` (mode 0600) and rename it there: readers see all or nothing.

    Makes the directory (mode 0700). Any thread or process; the last one wins. Raises OSError, and
    TypeError or ValueError on what JSON cannot say; then ``path`` is as it was and nothing is left.
    """
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    fd, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.stem}-")
    try:
        with os.fdopen(fd, "w") as f:
            json.dump(data, f)
        os.replace(name, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(name)
        raise
