"""Chunks of a store to a file and back (``Store.export``, ``Store.import_``)."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from kvoffload.errors import StoreError
from kvoffload.signing import signature
from kvoffload.tiers.nvme.chunk_file import ChunkReader, ChunkWriter, FileChunk, Sign
from kvoffload.types import LEAF_BYTES, StoreResult

if TYPE_CHECKING:
    from kvoffload._core import Arena, SegmentStore
    from kvoffload.store import Chunk, PathLike, Progress, Store
    from kvoffload.tiers.nvme import StripedStore

BATCH_BYTES = 16 << 20
"""Payload per request. A batch is held at most three times (buffer, bytes, slot)."""
_BLOCK = 4096


@dataclass(frozen=True, slots=True)
class Selection:
    """Which chunks to export: by ``keys``, by ``chain``, or by ``newest`` and ``namespace``."""

    keys: tuple[bytes, ...] | None = None
    chain: tuple[bytes, ...] | None = None
    newest: int = 0
    namespace: int | None = None

    def __post_init__(self) -> None:
        filters = bool(self.newest) or self.namespace is not None
        if (self.keys is not None) + (self.chain is not None) + filters > 1:
            raise ValueError("choose by key, by chain, or by newest and namespace: one of them")
        if self.newest < 0:
            raise ValueError("newest must be 0 or more")

    def of(self, held: Sequence[Chunk]) -> tuple[list[Chunk], int]:
        """(what to export of ``held``, which is newest first; how many named keys are not held)."""
        named = self.keys if self.keys is not None else self.chain
        if named is None:
            space = None if self.namespace is None else self.namespace & 0xFFFFFFFF
            out = [c for c in held if space is None or c.namespace == space]
            return out[: self.newest or None][::-1], 0
        by_key = {c.key: c for c in held}
        unique = list(dict.fromkeys(named))
        found = [by_key.get(key) for key in unique]
        if self.chain is not None and None in found:
            found = found[: found.index(None)]
        present = [c for c in found if c is not None]
        return present, len(unique) - len(present)


@dataclass(frozen=True, slots=True)
class ExportReport:
    """What ``export`` wrote."""

    chunks: int
    nbytes: int  # payload bytes
    missing: int  # asked for by key and not held; of a chain, all from the first gap on
    lost: int  # gone or damaged by the time they were read
    seconds: float


@dataclass(frozen=True, slots=True)
class ImportReport:
    """What ``import_`` did with a file's chunks."""

    chunks: int  # in the file
    imported: int
    held: int  # were there already
    bad: int  # failed their checksum
    refused: int  # the store had no room for them, or its disk failed
    nbytes: int  # payload bytes imported
    seconds: float


def export_chunks(
    store: Store,
    file: PathLike,
    wanted: Selection,
    *,
    overwrite: bool = False,
    sign_key: bytes | None = None,
    progress: Progress | None = None,
) -> ExportReport:
    """See Store.export."""
    from kvoffload._core import checksum

    began = time.monotonic()
    path = os.fspath(file)
    chosen, missing = wanted.of(store.ls())
    total = sum(c.nbytes for c in chosen)
    # Offsets and checksums of the plan only have to be as long as the longest there can be.
    plan = [FileChunk(c.key, c.namespace, c.depth, 0, total, c.nbytes) for c in chosen]
    writer = ChunkWriter(path, plan, overwrite=overwrite, sign=_signer(sign_key))
    written = nbytes = done = 0
    try:
        for batch in batches(chosen):
            for chunk, payload in zip(batch, store.get_many([c.key for c in batch]), strict=True):
                if payload is None:
                    continue
                root = checksum(payload, chunk.key)
                writer.add(chunk.key, chunk.namespace, chunk.depth, root, payload)
                written, nbytes = written + 1, nbytes + len(payload)
            done += len(batch)
            if progress is not None:
                progress(done, len(chosen), nbytes)
        writer.finish()
    except OSError as error:
        if isinstance(error, StoreError):
            raise
        raise StoreError(error.errno, f"chunk file {path}: {error.strerror}") from error
    finally:
        writer.abandon()
    seconds = time.monotonic() - began
    return ExportReport(written, nbytes, missing, len(chosen) - written, seconds)


def batches(chunks: Sequence[Any]) -> Iterator[list[Any]]:
    """Neighbours of one namespace, up to ``BATCH_BYTES`` together (a larger chunk goes alone)."""
    batch: list[Any] = []
    size = 0
    for chunk in chunks:
        full = size + chunk.nbytes > BATCH_BYTES
        if batch and (full or chunk.namespace != batch[0].namespace):
            yield batch
            batch, size = [], 0
        batch.append(chunk)
        size += chunk.nbytes
    if batch:
        yield batch


def _signer(key: bytes | None) -> Sign | None:
    return None if key is None else partial(signature, key)


def import_chunks(
    store: Store,
    file: PathLike,
    *,
    verify_key: bytes | None = None,
    progress: Progress | None = None,
) -> ImportReport:
    """See Store.import_."""
    from kvoffload._core import checksum

    began = time.monotonic()
    imported = held = bad = refused = nbytes = done = 0
    with ChunkReader(os.fspath(file), _signer(verify_key)) as reader:
        slots = _Slots()
        most = int(store.stats()["segment_bytes"]) - (16 << 10)
        for batch in batches(reader.chunks):
            fresh: list[tuple[FileChunk, bytes]] = []
            for chunk in batch:
                if store.contains(chunk.key):
                    held += 1
                    continue
                if chunk.nbytes > most:  # not even read: it may be large
                    refused += 1
                    continue
                payload = reader.payload(chunk, checksum)
                if payload is None:
                    bad += 1
                else:
                    fresh.append((chunk, payload))
            for (chunk, _), result in zip(fresh, _put(store, fresh, slots), strict=True):
                good = result is StoreResult.OK
                imported, refused = imported + good, refused + (not good)
                nbytes += chunk.nbytes * good
            done += len(batch)
            if progress is not None:
                progress(done, len(reader.chunks), nbytes)
        total = len(reader.chunks)
    return ImportReport(total, imported, held, bad, refused, nbytes, time.monotonic() - began)


def _put(store: Store, items: list[tuple[FileChunk, bytes]], slots: _Slots) -> list[StoreResult]:
    """Chunks of one namespace. A depth is stored from slots only, which are whole blocks."""
    out: dict[bytes, StoreResult] = {}
    plain = [i for i in items if not i[0].depth or i[0].nbytes % _BLOCK]
    if plain:
        pairs = [(c.key, payload) for c, payload in plain]
        results = store.put_many(pairs, namespace=plain[0][0].namespace)
        out.update(zip((c.key for c, _ in plain), results, strict=True))
    for nbytes in dict.fromkeys(c.nbytes for c, _ in items if c.key not in out):
        alike = [i for i in items if i[0].key not in out and i[0].nbytes == nbytes]
        results = slots.put(store, alike)
        out.update(zip((c.key for c, _ in alike), results, strict=True))
    return [out[c.key] for c, _ in items]


class _Slots:
    """Arena slots to put chunks from, made when the first chunk needs them. Not thread safe."""

    def __init__(self) -> None:
        self._arena: Arena | None = None

    def _of(self, count: int, nbytes: int) -> Arena:
        from kvoffload._core import Arena

        arena = self._arena
        if arena is None or arena.data_bytes < nbytes or arena.max_slots < count:
            most = max(nbytes, BATCH_BYTES + count * LEAF_BYTES, 2 << 20)
            arena = self._arena = Arena.create(-(-most // (2 << 20)) * (2 << 20), count, 1, False)
        return arena

    def put(self, store: Store, items: list[tuple[FileChunk, bytes]]) -> list[StoreResult]:
        """Chunks of one size and namespace, with their depths."""
        import numpy as np

        nbytes, namespace = items[0][0].nbytes, items[0][0].namespace
        stride = -(-nbytes // LEAF_BYTES) * LEAF_BYTES
        count = len(items)
        arena = self._of(count, stride * count)
        generations = np.empty(count, np.uint64)
        for i, (chunk, payload) in enumerate(items):
            generations[i] = arena.begin_fill(i, 1)
            arena.view(i * stride, nbytes)[:] = payload
            arena.hash_leaves(i * stride, nbytes, chunk.key)
            arena.fill_done(i, int(generations[i]))
        keys = b"".join(chunk.key for chunk, _ in items)
        depths = np.array([chunk.depth for chunk, _ in items], np.uint32)
        numbers = np.arange(count, dtype=np.uint32)
        offsets = np.arange(count, dtype=np.uint64) * np.uint64(stride)

        def send(native: SegmentStore | StripedStore, job: int, late: int) -> None:
            native.put_slots(
                job, arena, keys, numbers, generations, offsets, nbytes, namespace, depths, late
            )

        return store.submit(count, send)
