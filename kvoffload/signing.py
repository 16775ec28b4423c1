"""Signatures of chunk files: HMAC-SHA256 under a key that both sides have in a private file."""

from __future__ import annotations

import errno
import hashlib
import hmac
import os
import stat
from pathlib import Path

from kvoffload.errors import StoreError

MIN_KEY = 16
MAX_KEY = 4096
_DOMAIN = b"kvoffload chunk file, version 2\0"


def read_key(path: str | os.PathLike[str]) -> bytes:
    """The key in a file: its bytes without a final newline.

    Raises StoreError, one line: the file cannot be read, is not this user's alone (mode 0600 or
    0400), or holds fewer than 16 bytes or more than 4096.
    """
    name = os.fspath(path)
    try:
        fd = os.open(name, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        with os.fdopen(fd, "rb") as file:
            info = os.fstat(fd)
            if not stat.S_ISREG(info.st_mode):
                raise _refuse(name, "not a file")
            if info.st_uid != os.geteuid():
                raise _refuse(name, f"belongs to user {info.st_uid}, not to this one")
            if info.st_mode & 0o077:
                mode = stat.S_IMODE(info.st_mode)
                raise _refuse(name, f"mode is {mode:04o}, others could read it: chmod 600")
            key = file.read(MAX_KEY + 2)
    except OSError as error:
        if isinstance(error, StoreError):
            raise
        raise StoreError(error.errno, f"key file {name}: {error.strerror}") from error
    key = key.removesuffix(b"\n")
    if not MIN_KEY <= len(key) <= MAX_KEY:
        raise _refuse(name, f"give {MIN_KEY} to {MAX_KEY} bytes (head -c 32 /dev/urandom > FILE)")
    return key


def _refuse(name: str, why: str) -> StoreError:
    return StoreError(errno.EINVAL, f"key file {Path(name)}: {why}")


def signature(key: bytes, header: bytes, payloads: bytes) -> str:
    """64 hex digits over the header (64 zeros where it goes) and the SHA-256 of all payloads."""
    mac = hmac.new(key, _DOMAIN, hashlib.sha256)
    mac.update(len(header).to_bytes(8, "little") + header + payloads)
    return mac.hexdigest()
