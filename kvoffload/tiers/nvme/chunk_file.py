"""Chunks in a safetensors file: one U8 tensor per chunk, named by its key in hex.

Layout (docs/format.md): u64le header length, JSON header padded with spaces, payloads one after the
other. ``__metadata__`` holds ``format`` and ``version``, and per chunk, under the tensor's name,
"<namespace: 8 hex digits> <depth> <checksum: 16 hex digits>". A signed file is version 2 and has
one more note, the signature. Written and read by hand because the safetensors library wants all
tensors in memory to write, and trusts more than we do when it reads.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import hmac
import json
import os
import re
import secrets
import struct
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, BinaryIO

from kvoffload.errors import StoreError

FORMAT = "kvoffload-chunks"
VERSION = "1"
SIGNED = "2"
SIGNATURE = "hmac-sha256"
MAX_HEADER = 32 << 20
"""Header bytes, about 170 000 chunks: JSON is parsed in memory, and a file may be hostile."""
MAX_PAYLOAD = (1 << 32) - 1

Sign = Callable[[bytes, bytes], str]
"""(header with UNSIGNED in it, SHA-256 of all payloads) -> 64 hex digits; see kvoffload.signing."""
UNSIGNED = "0" * 64
_NAME = re.compile(r"[0-9a-f]{32}")
_SIGNATURE = re.compile(r"[0-9a-f]{64}")
_NOTE = re.compile(r"([0-9a-f]{8}) (0|[1-9][0-9]{0,9}) ([0-9a-f]{16})")


@dataclass(frozen=True, slots=True)
class FileChunk:
    """One chunk of a file; ``offset`` counts from the first payload."""

    key: bytes
    namespace: int
    depth: int
    checksum: int
    offset: int
    nbytes: int


def refuse(path: str, why: str) -> StoreError:
    """One line naming the file."""
    return StoreError(errno.EINVAL, f"chunk file {path}: {why}")


# -- writing


def _header(chunks: Iterable[FileChunk], signature: str | None) -> bytes:
    notes = {"format": FORMAT, "version": VERSION if signature is None else SIGNED}
    if signature is not None:
        notes[SIGNATURE] = signature
    tensors: dict[str, Any] = {"__metadata__": notes}
    for c in chunks:
        name = c.key.hex()
        notes[name] = f"{c.namespace:08x} {c.depth} {c.checksum:016x}"
        end = c.offset + c.nbytes
        tensors[name] = {"dtype": "U8", "shape": [c.nbytes], "data_offsets": [c.offset, end]}
    return json.dumps(tensors, separators=(",", ":")).encode()


class ChunkWriter:
    """Writes a chunk file beside its final name and renames it when it is complete.

    Not thread safe. Room for the header is kept by ``planned``; chunks of it may be left out.
    """

    def __init__(
        self,
        path: str,
        planned: Iterable[FileChunk],
        *,
        overwrite: bool,
        sign: Sign | None = None,
    ) -> None:
        """Raises StoreError when the file exists (unless ``overwrite``), cannot be made, or would
        hold too many chunks."""
        self.path = path
        self._sign = sign
        self._digest = hashlib.sha256()
        self._blank = None if sign is None else UNSIGNED
        self._room = -(-len(_header(planned, self._blank)) // 8) * 8
        if self._room > MAX_HEADER:
            raise refuse(path, "too many chunks for one file: choose fewer (--newest, --namespace)")
        if not overwrite and os.path.lexists(path):
            raise refuse(path, "already exists (--force replaces it)")
        self._written: list[FileChunk] = []
        self._keys: set[bytes] = set()
        self._end = 0
        self._finished = False
        # Not the pid: a kill leaves the file behind, and in containers the pid comes again.
        self._temporary = f"{path}.part-{secrets.token_hex(4)}"
        try:
            flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
            self._file = os.fdopen(os.open(self._temporary, flags, 0o600), "wb")
            self._file.seek(8 + self._room)
        except OSError as error:
            raise StoreError(error.errno, f"chunk file {path}: {error.strerror}") from error

    def add(self, key: bytes, namespace: int, depth: int, checksum: int, payload: bytes) -> None:
        """Append one chunk. Raises ValueError on a key that was added before: the header names each
        once, so that nobody could read the file."""
        if key in self._keys:
            raise ValueError(f"chunk file {self.path}: {key.hex()} twice")
        self._keys.add(key)
        chunk = FileChunk(key, namespace, depth, checksum, self._end, len(payload))
        self._file.write(payload)
        if self._sign is not None:
            self._digest.update(payload)
        self._end += chunk.nbytes
        self._written.append(chunk)

    def finish(self) -> None:
        """Header, fsync, final name."""
        header = _header(self._written, self._blank).ljust(self._room)
        if self._sign is not None:
            signature = self._sign(header, self._digest.digest())
            header = _header(self._written, signature).ljust(self._room)
        assert len(header) == self._room
        self._file.seek(0)
        self._file.write(struct.pack("<Q", self._room) + header)
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        os.replace(self._temporary, self.path)
        self._finished = True

    def abandon(self) -> None:
        """Leave nothing behind; nothing to do after ``finish``. Raises nothing: what counts is the
        error it is called for."""
        if self._finished:
            return
        with contextlib.suppress(OSError):  # it writes what is buffered, on a disk that may be full
            self._file.close()
        with contextlib.suppress(OSError):
            os.unlink(self._temporary)


# -- reading


class ChunkReader:
    """A chunk file opened for reading, its header checked: no field of it is trusted as a size."""

    def __init__(self, path: str, sign: Sign | None = None) -> None:
        """Raises StoreError with one line where the file is cut off, damaged or not ours; with
        ``sign`` also where it is not signed so. All of it is read for that, once."""
        self.path = path
        try:
            self._file: BinaryIO = open(path, "rb")  # noqa: SIM115  (closed by close)
        except OSError as error:
            raise StoreError(error.errno, f"chunk file {path}: {error.strerror}") from error
        try:
            self.chunks = self._read_header(sign)
        except BaseException:
            self._file.close()
            raise

    def _read_header(self, sign: Sign | None) -> list[FileChunk]:
        size = os.fstat(self._file.fileno()).st_size
        head = self._file.read(8)
        length = struct.unpack("<Q", head)[0] if len(head) == 8 else 0
        if not 2 <= length <= MAX_HEADER:
            raise refuse(self.path, "not a chunk file (safetensors header missing or too long)")
        if 8 + length > size:
            raise refuse(self.path, "cut off inside its header")
        try:
            raw = self._file.read(length)
            header = json.loads(raw, object_pairs_hook=_no_duplicates)
            signature, chunks = _parse(header)
        except (ValueError, RecursionError) as error:
            why = str(error) if isinstance(error, _BadFile) else "its header is not readable"
            raise refuse(self.path, why) from error
        self._start = 8 + length
        want = self._start + (chunks[-1].offset + chunks[-1].nbytes if chunks else 0)
        if size != want:
            cut = "cut off" if size < want else "longer than its header says"
            raise refuse(self.path, f"{cut} ({size} bytes, not {want})")
        if sign is not None:
            self._verify(sign, raw, signature)
        return chunks

    def _verify(self, sign: Sign, raw: bytes, signature: str | None) -> None:
        if signature is None:
            raise refuse(self.path, "not signed, and --verify-key asks for it: nothing imported")
        note = f'"{SIGNATURE}":"{{}}"'
        there = note.format(signature).encode()
        blank = raw.replace(there, note.format(UNSIGNED).encode())
        digest = hashlib.sha256()
        while part := self._file.read(1 << 20):
            digest.update(part)
        good = hmac.compare_digest(sign(blank, digest.digest()), signature)
        if raw.count(there) != 1 or not good:
            why = "its signature is not of this key, or it was changed: nothing imported"
            raise refuse(self.path, why)

    def payload(self, chunk: FileChunk, checksum: Callable[[bytes, bytes], int]) -> bytes | None:
        """The chunk's bytes, None where they are not what was exported. ``checksum(data, key)``.

        Raises StoreError when the file cannot be read.
        """
        try:
            self._file.seek(self._start + chunk.offset)
            data = self._file.read(chunk.nbytes)
        except OSError as error:
            raise StoreError(error.errno, f"chunk file {self.path}: {error.strerror}") from error
        good = len(data) == chunk.nbytes and checksum(data, chunk.key) == chunk.checksum
        return data if good else None

    def close(self) -> None:
        """Close the file. Idempotent."""
        self._file.close()

    def __enter__(self) -> ChunkReader:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class _BadFile(ValueError):
    """A header that does not hold what it should; the text says what."""


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    out = dict(pairs)
    if len(out) != len(pairs):
        raise _BadFile("its header names something twice")
    return out


def _parse(header: Any) -> tuple[str | None, list[FileChunk]]:
    """(signature, chunks in the order of their payloads)."""
    notes = header.pop("__metadata__", None) if isinstance(header, dict) else None
    if not isinstance(notes, dict) or notes.get("format") != FORMAT:
        raise _BadFile("not written by kvoffload store export")
    if notes.get("version") not in (VERSION, SIGNED):
        shown = str(notes.get("version"))[:20]
        raise _BadFile(f"version {shown!r} is not one this kvoffload reads ({VERSION}, {SIGNED})")
    signature = notes.pop(SIGNATURE, None) if notes["version"] == SIGNED else None
    signed = isinstance(signature, str) and _SIGNATURE.fullmatch(signature) is not None
    if signed != (notes["version"] == SIGNED):
        raise _BadFile("its header is damaged: a signed file without a signature")
    if len(notes) != len(header) + 2:
        raise _BadFile("its header is damaged: chunks and their notes differ in number")
    chunks = sorted(_entries(header, notes), key=lambda c: c.offset)
    end = 0
    for chunk in chunks:
        if chunk.offset != end:
            raise _BadFile("its header is damaged: payloads overlap or leave gaps")
        end += chunk.nbytes
    return signature, chunks


def _entries(header: dict[str, Any], notes: dict[str, Any]) -> Iterator[FileChunk]:
    for name, tensor in header.items():
        note = notes.get(name)
        match = _NOTE.fullmatch(note) if isinstance(note, str) else None
        begin, end = _span(tensor)
        if not _NAME.fullmatch(name) or match is None or not 0 <= begin < end:
            raise _BadFile(f"its header is damaged at {name[:32]!r}")
        namespace, depth, checksum = int(match[1], 16), int(match[2]), int(match[3], 16)
        if end - begin > MAX_PAYLOAD or depth >= 1 << 32:
            raise _BadFile(f"its header is damaged at {name!r}: too large")
        yield FileChunk(bytes.fromhex(name), namespace, depth, checksum, begin, end - begin)


def _span(tensor: Any) -> tuple[int, int]:
    """(begin, end) of a one-dimensional U8 tensor; (0, 0) for anything else."""
    if not isinstance(tensor, dict) or tensor.keys() != {"dtype", "shape", "data_offsets"}:
        return 0, 0
    shape, span = tensor["shape"], tensor["data_offsets"]
    lists = isinstance(shape, list) and isinstance(span, list) and len(span) == 2
    if not lists or tensor["dtype"] != "U8" or not all(type(n) is int for n in (*span, *shape)):
        return 0, 0
    return (span[0], span[1]) if shape == [span[1] - span[0]] else (0, 0)
