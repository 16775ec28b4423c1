"""Names of LMCache's objects: 16 bytes over its key, the objects' layout, the model's weights."""

from __future__ import annotations

import hashlib
import json
import os
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING

from lmcache.logging import init_logger

from kvoffload.engines.vllm.weight_files import NotLocal, WeightFiles, weight_files
from kvoffload.engines.vllm.weights import Identity, WeightsDigest

if TYPE_CHECKING:
    from lmcache.v1.distributed.api import ObjectKey

logger = init_logger(__name__)

_DOMAIN = b"kvoffload/lmcache/v1"
FIRST_WAIT_S = 2.0
"""So long the first lookups for a model may wait for its weights' digest; later ones never do."""
RECHECK_S = 5.0
"""How often a model's files are looked at again: less than an engine takes to start with others."""

_Found = tuple[tuple[str, Identity], ...]


def layout_of(shapes: Sequence[Sequence[int]], dtypes: Sequence[object]) -> bytes:
    """Shapes and dtypes of one object as bytes."""
    text = json.dumps([[list(map(int, s)) for s in shapes], [str(d) for d in dtypes]])
    return text.encode()


def _model_files(model: str) -> list[WeightFiles]:
    """Weights and config.json of a local model folder. Raises NotLocal (one line)."""
    if not os.path.isabs(model) or not os.path.isdir(model):
        raise NotLocal(f"{model} is not a local folder: set namespace in adapter_params")
    load = SimpleNamespace(load_format="auto", model_loader_extra_config={}, download_dir=None)
    engine = SimpleNamespace(model_config=SimpleNamespace(model=model), load_config=load)
    settings = Path(model, "config.json")
    extra = (settings,) if settings.is_file() else ()
    return [*weight_files(engine), WeightFiles("config", Path(model), extra)]


def _identities(files: Sequence[WeightFiles]) -> _Found:
    return tuple((str(p), Identity.of(os.stat(p))) for source in files for p in source.files)


class Names:
    """16-byte names of LMCache's objects. Thread-safe; ``of`` does no I/O.

    A server outlives the engines that use it. A model whose files are not those of its digest any
    more has no names from then on: old KV must not be served under new weights.
    """

    def __init__(self, namespace: str | None) -> None:
        self._fixed = hashlib.sha256(namespace.encode()).digest() if namespace else None
        self._since = time.time_ns()
        self._digests: dict[str, WeightsDigest] = {}
        self._started: dict[str, float] = {}
        self._found: dict[str, _Found] = {}  # what each digest is of
        self._unsure: set[str] = set()  # their files could not be looked at the last time
        self._replaced: set[str] = set()
        self._said: set[str] = set()
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._watch: threading.Thread | None = None

    def of(self, key: ObjectKey, layout: bytes) -> bytes | None:
        """None while, or because, the weights of the key's model are not known."""
        weights = self._fixed or self._weights(key.model_name)
        if weights is None:
            return None
        sha = hashlib.sha256(_DOMAIN)
        fields = (weights, key.model_name.encode(), key.chunk_hash, key.cache_salt.encode(), layout)
        numbers = (key.kv_rank, key.object_group_id)
        for part in (*fields, *(str(n).encode() for n in numbers)):
            sha.update(len(part).to_bytes(8, "little"))
            sha.update(part)
        return sha.digest()[:16]

    def _weights(self, model: str) -> bytes | None:
        with self._lock:
            digest = self._digests.get(model)
            if digest is None:
                find: Callable[[], list[WeightFiles]] = lambda: self._find(model)  # noqa: E731
                digest = self._digests[model] = WeightsDigest(find, unchanged_since_ns=self._since)
                self._started[model] = time.monotonic()
                digest.start()
                self._start_watch()
            if model in self._replaced or model in self._unsure:
                return None
            result = digest.result()
            if result is not None and result.digest is None and model not in self._said:
                self._said.add(model)
                logger.warning("kvoffload: nothing is stored or loaded: %s", result.reason)
        return result.digest if result is not None else None

    def _find(self, model: str) -> list[WeightFiles]:
        files = _model_files(model)
        self._found[model] = _identities(files)  # before they are read: one that changes is refused
        return files

    def _start_watch(self) -> None:
        if self._watch is None and not self._stop.is_set():
            self._watch = threading.Thread(
                target=self._recheck, name="kvoffload-names", daemon=True
            )
            self._watch.start()

    def _recheck(self) -> None:
        while not self._stop.wait(RECHECK_S):
            with self._lock:
                models = [m for m, digest in self._digests.items() if m not in self._replaced]
            for model in models:
                try:
                    self._look_again(model)
                except Exception:
                    logger.exception("kvoffload: the files of %s could not be looked at", model)

    def _look_again(self, model: str) -> None:
        result = self._digests[model].result()
        if result is None or result.digest is None:
            return
        try:
            same = _identities(_model_files(model)) == self._found[model]
        except (OSError, NotLocal):  # a network's moods, say: no names until it answers
            with self._lock:
                self._unsure.add(model)
            return
        with self._lock:
            self._unsure.discard(model)
            if not same:
                self._replaced.add(model)
        if not same:
            logger.warning(
                "kvoffload: the files of %s were replaced: nothing of it is stored or loaded until "
                "this server is started again",
                model,
            )

    def worth_waiting(self, model: str) -> float:
        """Seconds in which a first lookup may still learn the weights: unchanged files take ms."""
        if self._fixed is not None or self._weights(model) is not None:
            return 0.0
        known = self._digests[model].result() is not None  # replaced ones are, too
        return 0.0 if known else max(0.0, self._started[model] + FIRST_WAIT_S - time.monotonic())

    def wait(self, model: str, timeout_s: float) -> None:
        """Block until the model's weights are known or known not to be."""
        if self._fixed is None:
            self._weights(model)
            self._digests[model].wait(timeout_s)

    def close(self) -> None:
        """Stop the digests' threads."""
        self._stop.set()
        with self._lock:
            digests = list(self._digests.values())
        for digest in digests:
            digest.close()
        if self._watch is not None:
            self._watch.join(timeout=5)
