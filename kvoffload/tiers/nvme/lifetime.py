"""What was written to a drive as long as a store's directory lives: the ``lifetime`` files.

Each writer's directory holds one (docs/format.md). Its writer alone replaces it; everybody may
read it at any time, without a lock. A file that makes no sense counts as none.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import stat
import time
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import UTC, date, datetime, timedelta
from functools import reduce

NAME = "lifetime"
DAYS_KEPT = 30
RATE_DAYS = 7
_NEXT = "lifetime.next"
_TITLE = "kvoffload lifetime 1"
_DAY_S = 86400
_MAX_FILE = 4096
MAX_BYTES = 1 << 60
"""No drive takes an exbibyte: a number above it is damage."""
_MAX_TIME = 1 << 33
_FIELDS = ("since", "at", "payload_bytes", "device_bytes", "endurance_bytes")
_LIMITS = (_MAX_TIME, _MAX_TIME, MAX_BYTES, MAX_BYTES, MAX_BYTES)
_WRITER = re.compile(r"w(0|[1-9][0-9]{0,2})")


@dataclass(frozen=True, slots=True)
class Lifetime:
    """Totals in bytes; times in unix seconds. ``days``: device bytes by UTC day, oldest first."""

    since: int  # when counting began
    at: int  # when it was last brought up to date
    payload_bytes: int = 0  # of chunks accepted
    device_bytes: int = 0  # all that was written for them
    endurance_bytes: int = 0  # what the drive endures, as last configured; 0: unknown
    days: tuple[tuple[date, int], ...] = ()

    def plus(self, payload: int, device: int, now: float) -> Lifetime:
        """With so many bytes more, written just before ``now``."""
        days = dict(self.days)
        if device > 0:
            days[_day(now)] = days.get(_day(now), 0) + device
        return replace(
            self,
            at=int(now),
            payload_bytes=self.payload_bytes + payload,
            device_bytes=self.device_bytes + device,
            days=tuple(sorted(days.items())[-DAYS_KEPT:]),
        )

    def amplification(self) -> float | None:
        """Device bytes per payload byte; None before anything was accepted."""
        return self.device_bytes / self.payload_bytes if self.payload_bytes else None

    def bytes_per_day(self, now: float) -> float:
        """To the device, by the last 7 days (UTC, today included), or as long as it is known.

        On the first day the rest of it counts as nothing: a burst at the start is no rate.
        """
        today = _day(now)
        first = today - timedelta(days=RATE_DAYS - 1)
        written = sum(n for day, n in self.days if first <= day <= today)
        began = max(self.since, datetime.combine(first, datetime.min.time(), UTC).timestamp())
        return written / max(_DAY_S, now - began) * _DAY_S

    def days_left(self, now: float, endurance_bytes: float | None = None) -> float | None:
        """Days until the drive has taken what it endures, at that rate; infinite: nothing is
        written. None: what it endures is known neither by the caller nor by the file."""
        endures = self.endurance_bytes if endurance_bytes is None else endurance_bytes
        if not endures:
            return None
        rate = self.bytes_per_day(now)
        return max(0.0, endures - self.device_bytes) / rate if rate else float("inf")

    def merged(self, other: Lifetime) -> Lifetime:
        """Of both together; what the drive endures as the later one says."""
        days = dict(self.days)
        for day, n in other.days:
            days[day] = days.get(day, 0) + n
        told = [x for x in (self, other) if x.endurance_bytes]
        return Lifetime(
            since=min(self.since, other.since),
            at=max(self.at, other.at),
            payload_bytes=self.payload_bytes + other.payload_bytes,
            device_bytes=self.device_bytes + other.device_bytes,
            endurance_bytes=max(told, key=lambda x: x.at).endurance_bytes if told else 0,
            days=tuple(sorted(days.items())[-DAYS_KEPT:]),
        )

    def text(self) -> str:
        """The file."""
        lines = [_TITLE, *(f"{name} {getattr(self, name)}" for name in _FIELDS)]
        lines += [f"day {day} {n}" for day, n in self.days]
        body = "\n".join(lines) + "\n"
        return f"{body}crc32 {zlib.crc32(body.encode()):08x}\n"


def parse(raw: bytes) -> Lifetime:
    """The file's meaning. Raises ValueError where it is not exactly what ``text`` writes, or says
    what cannot be."""
    try:
        life = _understood(raw)
    except ValueError:
        raise ValueError("damaged, or of a version that is not known here") from None
    # The text is canonical: what does not come out the same again is damaged.
    if life.text().encode() != raw:
        raise ValueError("damaged")
    values = [getattr(life, name) for name in _FIELDS]
    if not all(0 <= value < limit for value, limit in zip(values, _LIMITS, strict=True)):
        raise ValueError("numbers that cannot be")
    written = [n for _, n in life.days]
    if life.payload_bytes > life.device_bytes or min(written, default=0) < 0:
        raise ValueError("numbers that cannot be")
    if sum(written) > life.device_bytes or list(life.days) != sorted(dict(life.days).items()):
        raise ValueError("days that cannot be")
    return life


def _understood(raw: bytes) -> Lifetime:
    """What the lines say, whatever that is worth. Raises ValueError."""
    lines = raw.decode("ascii").splitlines()[1:-1]
    values, days = lines[: len(_FIELDS)], lines[len(_FIELDS) :]
    if len(days) > DAYS_KEPT:
        raise ValueError("too many days")
    since, at, payload, device, endurance = (int(line.rpartition(" ")[2]) for line in values)
    parts = [line.split(" ") for line in days]
    by_day = tuple((date.fromisoformat(day), int(n)) for _, day, n in parts)
    return Lifetime(since, at, payload, device, endurance, by_day)


def load(folder: int) -> Lifetime | None:
    """From the writer's directory that is open as ``folder``; None: there is no file.

    Raises ValueError (a few words) for a file that is damaged or not ours, OSError.
    """
    try:
        fd = os.open(
            NAME, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=folder
        )
    except FileNotFoundError:
        return None
    try:
        info = os.fstat(fd)
        if not stat.S_ISREG(info.st_mode) or not _private(info):
            raise ValueError("not a regular file of ours with mode 0600")
        raw = os.read(fd, _MAX_FILE + 1)
    finally:
        os.close(fd)
    if len(raw) > _MAX_FILE:
        raise ValueError("too large")
    return parse(raw)


def save(folder: int, life: Lifetime) -> None:
    """Replace the file in ``folder``; for the holder of the writer's lock. Blocks on the disk.

    Raises OSError, and then the file is as it was.
    """
    with contextlib.suppress(FileNotFoundError):
        os.unlink(_NEXT, dir_fd=folder)
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    fd = os.open(_NEXT, flags, 0o600, dir_fd=folder)
    try:
        os.fchmod(fd, 0o600)
        data = life.text().encode()
        if os.write(fd, data) != len(data):
            raise OSError(errno.ENOSPC, "no space")
        # Some file systems rename before they write: a power cut would leave an empty file, and
        # years of counting gone. The rename itself may be lost.
        os.fdatasync(fd)
        os.rename(_NEXT, NAME, src_dir_fd=folder, dst_dir_fd=folder)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(_NEXT, dir_fd=folder)
        raise
    finally:
        os.close(fd)


def read_path(
    path: str | os.PathLike[str],
    complain: Callable[[str], None],
    but: os.stat_result | None = None,
) -> Lifetime | None:
    """All writers' totals of a store, added up; None: there are none. No lock.

    ``complain`` gets a line for each file that is left out; ``but``: a directory to leave out.
    Raises OSError where ``path`` cannot be listed.
    """
    found = []
    with opened(path) as root:
        for name in sorted(os.listdir(root)):
            if not _WRITER.fullmatch(name) or int(name[1:]) > 255:
                continue
            try:
                with opened(name, root) as folder:
                    info = os.fstat(folder)
                    if not _private(info) or (but and os.path.samestat(info, but)):
                        continue
                    life = load(folder)
            except (OSError, ValueError) as error:
                complain(f"{os.fspath(path)}/{name}/{NAME} is left out: {error}")
                continue
            if life is not None:
                found.append(life)
    return reduce(Lifetime.merged, found) if found else None


@contextmanager
def opened(path: str | os.PathLike[str], parent: int | None = None) -> Iterator[int]:
    """A directory, no symbolic link, open while in the block. Raises OSError."""
    fd = open_folder(path, parent)
    try:
        yield fd
    finally:
        os.close(fd)


def open_folder(path: str | os.PathLike[str], parent: int | None = None) -> int:
    """A directory's descriptor; the caller closes it. Raises OSError, also for a symbolic link."""
    flags = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
    return os.open(path, flags, dir_fd=parent)


def _private(info: os.stat_result) -> bool:
    return info.st_uid == os.geteuid() and not info.st_mode & 0o077


def _day(now: float) -> date:
    return date(*time.gmtime(now)[:3])
