"""A file of JSON lines that lives as long as its writer: what one process tells others of late.

The writer holds a lock (flock) on its file. So a reader tells a live writer from one that was
killed, in whatever container it runs, and dead files are removed by whoever meets them first.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

_SUFFIX = ".jsonl"
_STRAY_S = 60.0


class LineFile:
    """Writer: a head line, then at most 2 * ``keep`` + one batch of lines. One thread.

    ``last()`` gives the newest ``keep`` lines whenever the file is written anew. Mode 0600, in a
    directory of mode 0700 if it has to be made. Every method but ``close`` raises OSError.
    """

    def __init__(
        self, path: Path, keep: int, head: Mapping[str, Any], last: Callable[[], Iterable[Any]]
    ) -> None:
        self._path = path
        self._keep = keep
        self._head = head
        self._last = last
        self._fd = -1
        self._lines = 0
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        remove_dead(path.parent)
        self._rewrite([])

    def append(self, new: Sequence[Any]) -> None:
        """Add lines; they are among those that ``last`` gives from now on."""
        if self._lines + len(new) > 2 * self._keep:
            self._rewrite(list(self._last()))
        else:
            self._write(self._fd, new)
            self._lines += len(new)

    def _rewrite(self, lines: Sequence[Any]) -> None:
        fd, name = tempfile.mkstemp(dir=self._path.parent, prefix=f".{self._path.stem}-")
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            self._write(fd, [self._head, *lines])
            os.replace(name, self._path)
        except BaseException:
            os.close(fd)
            with contextlib.suppress(OSError):
                os.unlink(name)
            raise
        if self._fd >= 0:
            os.close(self._fd)
        self._fd, self._lines = fd, len(lines)

    @staticmethod
    def _write(fd: int, lines: Iterable[Any]) -> None:
        data = "".join(json.dumps(x, separators=(",", ":")) + "\n" for x in lines).encode()
        while data:  # a reader skips a line that is not complete yet
            data = data[os.write(fd, data) :]

    def close(self) -> None:
        """Remove the file; idempotent."""
        if self._fd >= 0:
            with contextlib.suppress(OSError):
                os.unlink(self._path)
            os.close(self._fd)
            self._fd = -1


def _remove_if_dead(path: Path) -> None:
    """Remove it if nobody holds the lock of the file that ``path`` names now. Raises OSError.

    A live writer may put a new file there, and close the old one, while this looks at the old one:
    having got the old one's lock says nothing then.
    """
    fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)  # BlockingIOError: its writer lives
        if os.path.samestat(os.fstat(fd), os.lstat(path)):
            path.unlink()
    finally:
        os.close(fd)


def remove_dead(folder: Path) -> None:
    """Remove what killed writers left in ``folder``; what cannot be removed stays."""
    with contextlib.suppress(OSError):
        for path in list(folder.iterdir()):
            with contextlib.suppress(OSError):
                if path.name.startswith("."):  # a file being made is locked at once, but not sooner
                    if time.time() - path.stat().st_mtime > _STRAY_S:
                        _remove_if_dead(path)
                elif path.suffix == _SUFFIX:
                    _remove_if_dead(path)


def live_files(folder: Path) -> list[Path]:
    """Files of live writers, by name. Removes those of dead ones. Raises OSError where there is a
    folder that cannot be read."""
    remove_dead(folder)
    try:
        return sorted(p for p in folder.iterdir() if p.suffix == _SUFFIX and p.name[0] != ".")
    except FileNotFoundError:
        return []


def read_lines(path: Path) -> list[dict[str, Any]]:
    """All complete lines that hold an object, the head first. Raises OSError."""
    out = []
    for line in path.read_bytes().splitlines():
        with contextlib.suppress(ValueError):
            value = json.loads(line)
            if isinstance(value, dict):
                out.append(value)
    return out
