"""What the loaded weights are: a digest of the bytes of the local files they were read from.

KV bytes mean nothing under other weights, and a model's name or path says nothing about its bytes.
Digests are computed on a background thread and cached by file identity; until they are known
nothing is loaded or stored.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import logging
import os
import re
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kvoffload.engines.vllm.weight_files import NotLocal, WeightFiles, loaded_after, weight_files
from kvoffload.files import replace_json, user_cache_file

logger = logging.getLogger("vllm.kvoffload")

_READ_BYTES = 8 << 20
_CACHE_ENTRIES = 8192
# A file changed this recently could change again within the same tick of the file system's clock.
_SETTLED_NS = 2_000_000_000


@dataclass(frozen=True, slots=True)
class Identity:
    """A file's identity: unchanged identity, unchanged bytes."""

    dev: int
    inode: int
    size: int
    mtime_ns: int
    ctime_ns: int

    @classmethod
    def of(cls, st: os.stat_result) -> Identity:
        """From a stat result."""
        return cls(st.st_dev, st.st_ino, st.st_size, st.st_mtime_ns, st.st_ctime_ns)

    @property
    def key(self) -> str:
        """Text form, the key in the digest cache."""
        return f"{self.dev}:{self.inode}:{self.size}:{self.mtime_ns}:{self.ctime_ns}"


@dataclass(frozen=True, slots=True)
class DigestResult:
    """``digest``: 32 bytes, or None with a one-line ``reason``."""

    digest: bytes | None
    reason: str = ""


def default_cache_file() -> Path:
    """$XDG_CACHE_HOME/kvoffload/weights.json."""
    return user_cache_file("weights.json")


# -- digests of files ----------------------------------------------------------------------------


class DigestCache:
    """sha256 by file identity in one JSON file. Any thread or process; a broken file is empty."""

    def __init__(self, path: Path | None = None) -> None:
        self.path = path or default_cache_file()

    def read(self) -> dict[str, str]:
        """What is known. Only a file that is ours and that nobody else may write is trusted."""
        try:
            with open(self.path, "rb") as f:
                st = os.fstat(f.fileno())
                if st.st_uid != os.geteuid() or st.st_mode & 0o022:
                    return {}
                data = json.load(f)
            files = data["files"] if data["version"] == 1 else {}
            return {
                k: v
                for k, v in files.items()
                if isinstance(v, str) and re.fullmatch("[0-9a-f]{64}", v)
            }
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            return {}

    def add(self, new: dict[str, str]) -> None:
        """Merge and replace atomically (mode 0600). A failure is logged: only time is lost."""
        if not new:
            return
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            with open(self.path.with_suffix(".lock"), "a", opener=_private) as lock:
                fcntl.flock(lock, fcntl.LOCK_EX)
                known = self.read()
                for key in new:
                    known.pop(key, None)  # so that it counts as the youngest
                known.update(new)
                kept = dict(list(known.items())[-_CACHE_ENTRIES:])
                replace_json(self.path, {"version": 1, "files": kept})
        except OSError as exc:
            logger.warning("kvoffload: cannot keep weight digests in %s (%s)", self.path, exc)


def _private(path: str, flags: int) -> int:
    return os.open(path, flags, 0o600)


def digest_file(path: Path, stop: Callable[[], bool]) -> tuple[Identity, str]:
    """sha256 of a file and the identity it had throughout.

    Raises NotLocal when it changed meanwhile, OSError, InterruptedError when ``stop()``.
    """
    sha = hashlib.sha256()
    buffer = memoryview(bytearray(_READ_BYTES))
    with open(path, "rb", buffering=0) as f:
        before = Identity.of(os.fstat(f.fileno()))
        left = before.size
        while left >= 0 and (n := f.readinto(buffer)):  # a growing file is given up, not chased
            if stop():
                raise InterruptedError("closed")
            sha.update(buffer[:n])
            left -= n
        after = Identity.of(os.fstat(f.fileno()))
    if before != after:
        raise NotLocal(f"{path.name} changed while it was read")
    return after, sha.hexdigest()


def digest_all(
    sources: Sequence[WeightFiles],
    cache: DigestCache,
    unchanged_since_ns: int,
    stop: Callable[[], bool] = lambda: False,
) -> bytes:
    """32 bytes over roles, names, sizes and bytes of all files.

    A file changed after ``unchanged_since_ns`` (wall clock) may not be what was loaded: NotLocal.
    So may every file of a folder that is another one than when the engine was configured.
    """
    known = cache.read()
    fresh: dict[str, str] = {}
    rows: list[tuple[str, str, int, str]] = []
    try:
        for source in sources:
            for path in source.files:
                identity = Identity.of(os.stat(path))
                if not source.pinned and identity.ctime_ns > unchanged_since_ns:
                    raise NotLocal(f"{path.name} changed after this engine was started")
                hexdigest = known.get(identity.key) or fresh.get(identity.key)
                if hexdigest is None:
                    identity, hexdigest = digest_file(path, stop)
                    if not source.pinned and identity.ctime_ns > unchanged_since_ns:
                        raise NotLocal(f"{path.name} changed after this engine was started")
                    if time.time_ns() - identity.ctime_ns > _SETTLED_NS:
                        fresh[identity.key] = hexdigest
                name = path.relative_to(source.folder).as_posix()
                rows.append((source.role, name, identity.size, hexdigest))
            source.check_folder()
    finally:
        cache.add(fresh)
    return hashlib.sha256(json.dumps(sorted(rows)).encode()).digest()


# -- the background digest -----------------------------------------------------------------------


class WeightsDigest:
    """Digest of an engine's weights, computed once on a background thread.

    ``start()`` once; ``result()`` never blocks: None until known. Thread-safe.
    """

    def __init__(
        self,
        find: Callable[[], Sequence[WeightFiles]],
        *,
        cache: DigestCache | None = None,
        unchanged_since_ns: int | None = None,
    ) -> None:
        self._find = find
        self._cache = cache or DigestCache()
        self._since = time.time_ns() if unchanged_since_ns is None else unchanged_since_ns
        self._stop = threading.Event()
        self._done = threading.Event()
        self._result: DigestResult | None = None
        self._thread = threading.Thread(target=self._run, name="kvoffload-weights", daemon=True)

    @classmethod
    def of(cls, vllm_config: Any) -> WeightsDigest:
        """For a VllmConfig; files changed after it was made are refused."""
        return cls(lambda: weight_files(vllm_config), unchanged_since_ns=loaded_after(vllm_config))

    def start(self) -> None:
        """Begin; calling it again does nothing."""
        if self._thread.ident is None and not self._stop.is_set():
            self._thread.start()

    def result(self) -> DigestResult | None:
        """What is known now: None while the thread works."""
        return self._result

    def wait(self, timeout_s: float) -> DigestResult | None:
        """Block until known, at most ``timeout_s``."""
        self._done.wait(timeout_s)
        return self._result

    def close(self) -> None:
        """Stop the thread; a digest not finished stays unknown."""
        self._stop.set()
        if self._thread.ident is not None:
            self._thread.join(timeout=5)

    def check(self) -> None:
        """Raise AssertionError when the result and the flag disagree."""
        assert self._done.is_set() == (self._result is not None)
        if self._result is not None:
            assert (self._result.digest is None) == bool(self._result.reason)

    def _run(self) -> None:
        began = time.monotonic()
        try:
            digest = digest_all(self._find(), self._cache, self._since, self._stop.is_set)
            result = DigestResult(digest)
            logger.info(
                "kvoffload: weights digest %s (%.1f s)", digest.hex()[:16], time.monotonic() - began
            )
        except InterruptedError:
            return
        except NotLocal as exc:
            result = DigestResult(None, str(exc))
        except Exception as exc:
            logger.warning("kvoffload: the weight files could not be digested", exc_info=True)
            result = DigestResult(None, f"{type(exc).__name__}: {exc}")
        self._result = result
        self._done.set()
