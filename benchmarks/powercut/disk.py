"""A disk that forgets: replays a recording and says what a power cut could leave behind.

What was flushed (fsync, fdatasync of that file; fsync of the directory for names) is there. Of
all else any subset of 512-byte sectors may be missing, in any order, and sizes and names may be
those of any moment since the last flush. That is more than any journalling file system loses.

A write through io_uring is there in two steps: submitted, then done. A flush in between does not
cover it, and a kill leaves it whole, in part or not at all.
"""

from __future__ import annotations

import os
import random
import struct
from collections.abc import Iterator
from dataclasses import dataclass, field
from enum import Enum, IntEnum
from pathlib import Path

SECTOR = 512
_HEAD = struct.Struct("<IiQQII")
Image = dict[str, bytes]  # path below the store's directory -> content


class What(IntEnum):
    """Operations in record.c's log."""

    OPEN = 1
    WRITE = 2
    TRUNCATE = 3
    EXTEND = 4
    SYNC = 5
    UNLINK = 6
    RENAME = 7
    MKDIR = 8
    SUBMIT = 9
    DONE = 10


@dataclass(frozen=True, slots=True)
class Entry:
    """One logged call; ``at``: offset, size, open flags or (DONE) bytes written."""

    what: What
    fd: int
    at: int
    name: str
    data: bytes
    token: int = 0  # of a SUBMIT and its DONE


def read_trace(path: Path) -> list[Entry]:
    """All entries. Raises ValueError where the log is cut off."""
    raw, at, out = path.read_bytes(), 0, []
    while at < len(raw):
        if at + _HEAD.size > len(raw):
            raise ValueError("trace is cut off")
        what, fd, a, token, name, data = _HEAD.unpack_from(raw, at)
        at += _HEAD.size
        if at + name + data > len(raw):
            raise ValueError("trace is cut off")
        text = raw[at : at + name].decode()
        out.append(Entry(What(what), fd, a, text, raw[at + name : at + name + data], token))
        at += name + data
    return out


class Loss(str, Enum):
    """What happens to sectors written after the last flush of their file."""

    NONE = "none"  # a kill: the kernel still writes everything
    ALL = "all"
    SOME = "some"  # each on its own
    RUNS = "runs"  # neighbours together
    LATE = "late"  # what was written after some moment
    TORN = "torn"  # some, and some of those inside the sector
    JUNK = "junk"  # some, and they read as other bytes


_LOSSES = [Loss.NONE] * 2 + [Loss.ALL] + [Loss.SOME] * 4 + [Loss.RUNS] * 2
_LOSSES += [Loss.LATE] * 2 + [Loss.TORN] * 2 + [Loss.JUNK]


@dataclass(slots=True)
class Version:
    """What a sector may hold."""

    when: int
    content: bytes
    token: int = 0  # of the write that is still under way


@dataclass(slots=True)
class Inode:
    """A file: what is durable, and every version of each sector since."""

    durable: bytearray = field(default_factory=bytearray)
    size: int = 0
    sizes: list[int] = field(default_factory=lambda: [0])  # since the last flush, durable one first
    pending: dict[int, list[Version]] = field(default_factory=dict)

    def _old(self, sector: int) -> bytes:
        return bytes(self.durable[sector * SECTOR : (sector + 1) * SECTOR]).ljust(SECTOR, b"\0")

    def write(self, when: int, at: int, data: bytes, token: int = 0) -> None:
        for sector in range(at // SECTOR, -(-(at + len(data)) // SECTOR)):
            start = sector * SECTOR - at
            new = data[max(start, 0) : start + SECTOR]
            versions = self.pending.setdefault(sector, [])
            if len(new) < SECTOR:
                old = versions[-1].content if versions else self._old(sector)
                skip = max(-start, 0)
                new = old[:skip] + new + old[skip + len(new) :]
            versions.append(Version(when, new, token))
        self.resize(when, max(self.size, at + len(data)))

    def resize(self, when: int, size: int) -> None:
        if size < self.size:  # what is cut off reads as zeros when the file grows again
            for sector in [s for s in self.pending if s * SECTOR >= size]:
                self.pending[sector].append(Version(when, bytes(SECTOR)))
        if size != self.size:
            self.size = size
            self.sizes.append(size)

    def done(self, token: int, sectors: range, written: int) -> None:
        """The write came back: its first ``written`` bytes are there, the others never were."""
        for index, sector in enumerate(sectors):
            versions = self.pending.get(sector, [])
            for version in [v for v in versions if v.token == token]:
                if index * SECTOR < written:
                    version.token = 0
                else:
                    versions.remove(version)
            if not versions:
                self.pending.pop(sector, None)

    def flush(self) -> None:
        need = max([self.size, *((s + 1) * SECTOR for s in self.pending)])
        self.durable.extend(bytes(max(0, need - len(self.durable))))
        left: dict[int, list[Version]] = {}
        for sector, versions in self.pending.items():
            written = [v for v in versions if not v.token]
            if written:
                self.durable[sector * SECTOR : (sector + 1) * SECTOR] = written[-1].content
            if len(written) < len(versions):
                left[sector] = [v for v in versions if v.token]
        del self.durable[self.size :]
        self.pending = left
        self.sizes = [self.size]


@dataclass(slots=True)
class Cut:
    """What is left: ``image``, and how many sectors are not what was last written."""

    image: Image
    loss: Loss
    lost: int


class _Picker:
    """Decides sector by sector."""

    def __init__(self, rng: random.Random, loss: Loss, now: int) -> None:
        self.rng, self.loss = rng, loss
        self.share = rng.choice((0.02, 0.1, 0.5, 0.9))
        self.until = rng.randint(max(0, now - 60), now)
        self.gone = False
        self.landed: dict[int, float] = {}  # of a write under way: the share that is there

    def killed(self, old: bytes, versions: list[Version]) -> bytes:
        """What a kill leaves: all that came back, and of the rest what the kernel got to."""
        for version in reversed(versions):
            if not version.token:
                return version.content
            share = self.landed.setdefault(version.token, self.rng.choice((0.0, 0.5, 1.0)))
            if self.rng.random() < share:
                return version.content
        return old

    def pick(self, old: bytes, versions: list[Version]) -> bytes:
        """One of the contents the sector had, or (TORN, JUNK) a mixture or another."""
        new, rng = versions[-1].content, self.rng
        if self.loss is Loss.NONE:
            return self.killed(old, versions)
        if self.loss is Loss.ALL:
            return old
        if self.loss is Loss.LATE:
            return next((v.content for v in reversed(versions) if v.when <= self.until), old)
        if self.loss is Loss.RUNS:
            if rng.random() < 0.15:
                self.gone = not self.gone
            return old if self.gone else new
        if rng.random() >= self.share:
            return new
        lost = rng.choice([old, *(v.content for v in versions[:-1])])
        if self.loss is Loss.TORN and rng.random() < 0.3:
            split = rng.randrange(1, SECTOR)
            return new[:split] + lost[split:]
        if self.loss is Loss.JUNK:
            return rng.choice((bytes(SECTOR), rng.randbytes(SECTOR), lost))
        return lost


class Disk:
    """One directory tree under a recording: ``apply`` entries in order, ``cut`` anywhere."""

    def __init__(self, base: Image | None = None) -> None:
        # Per directory and name: what it was since the directory's last flush, durable first.
        self._names: dict[str, dict[str, list[Inode | None]]] = {"": {}}
        self._open: dict[int, Inode | str] = {}
        self._flying: dict[int, tuple[Inode, range]] = {}
        self._when = 0
        self.flushes = self.writes = self.ring_writes = 0
        for path, data in (base or {}).items():
            folder, _, name = path.rpartition("/")
            inode = Inode(bytearray(data), len(data), [len(data)])
            self._names.setdefault(folder, {})[name] = [inode]

    @property
    def flying(self) -> int:
        """Writes submitted and not done."""
        return len(self._flying)

    def _states(self, path: str) -> list[Inode | None]:
        folder, _, name = path.rpartition("/")
        return self._names.setdefault(folder, {}).setdefault(name, [None])

    def apply(self, entry: Entry) -> None:
        """Raises KeyError for a descriptor that was never opened: the recording is not complete."""
        self._when += 1
        match entry.what:
            case What.OPEN:
                self._opened(entry)
            case What.MKDIR:
                self._names.setdefault(entry.name, {})
            case What.UNLINK:
                self._states(entry.name).append(None)
            case What.RENAME:
                moved = self._states(entry.name)
                self._states(entry.data.decode()).append(moved[-1])
                moved.append(None)
            case What.DONE:
                inode, sectors = self._flying.pop(entry.token)
                inode.done(entry.token, sectors, entry.at)
            case _:
                self._change(self._open[entry.fd], entry)

    def _opened(self, entry: Entry) -> None:
        if entry.name in self._names:
            self._open[entry.fd] = entry.name
            return
        states = self._states(entry.name)
        inode = states[-1]
        if inode is None:
            states.append(inode := Inode())
        self._open[entry.fd] = inode
        if entry.at & os.O_TRUNC:
            inode.resize(self._when, 0)

    def _change(self, target: Inode | str, entry: Entry) -> None:
        if isinstance(target, str):
            if entry.what is not What.SYNC:
                raise ValueError(f"{entry.what.name} of a directory")
            self.flushes += 1
            for states in self._names[target].values():
                del states[:-1]
        elif entry.what is What.SYNC:
            self.flushes += 1
            target.flush()
        elif entry.what is What.WRITE:
            self.writes += 1
            target.write(self._when, entry.at, entry.data)
        elif entry.what is What.SUBMIT:
            if entry.at % SECTOR:
                raise ValueError("a ring write that starts inside a sector is not modelled")
            self.writes += 1
            self.ring_writes += 1
            first = entry.at // SECTOR
            sectors = range(first, first + -(-len(entry.data) // SECTOR))
            self._flying[entry.token] = (target, sectors)
            target.write(self._when, entry.at, entry.data, entry.token)
        elif entry.what is What.TRUNCATE:
            target.resize(self._when, entry.at)
        else:
            target.resize(self._when, max(target.size, entry.at))

    def cut(self, rng: random.Random, loss: Loss | None = None) -> Cut:
        """A power cut now; the disk itself goes on."""
        loss = loss or rng.choice(_LOSSES)
        picker, image, lost = _Picker(rng, loss, self._when), {}, 0
        for path, states in self._files():
            keep = loss is Loss.NONE or rng.random() < 0.7
            inode = states[-1] if keep else rng.choice(states)
            if inode is None:
                continue
            data = bytearray(inode.durable)
            size = inode.size if keep else rng.choice(inode.sizes)
            reach = max([size, *((s + 1) * SECTOR for s in inode.pending)])
            data.extend(bytes(max(0, reach - len(data))))
            for sector in sorted(inode.pending):
                versions = inode.pending[sector]
                found = picker.pick(inode._old(sector), versions)
                lost += found is not versions[-1].content
                data[sector * SECTOR : (sector + 1) * SECTOR] = found
            image[path] = bytes(data[:size])
        return Cut(image, loss, lost)

    def _files(self) -> Iterator[tuple[str, list[Inode | None]]]:
        for folder, names in sorted(self._names.items()):
            for name, states in sorted(names.items()):
                yield f"{folder}/{name}" if folder else name, states


def write_image(image: Image, path: Path) -> None:
    """Makes ``path`` hold exactly ``image``, with the modes the store asks for."""
    path.mkdir(mode=0o700)
    for name, data in image.items():
        target = path / name
        if not target.parent.exists():
            target.parent.mkdir(mode=0o700)
        fd = os.open(target, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(fd, "wb") as file:
            file.write(data)


def read_image(path: Path) -> Image:
    """All files below ``path``."""
    files = (p for p in path.rglob("*") if p.is_file())
    return {str(p.relative_to(path)): p.read_bytes() for p in files}
