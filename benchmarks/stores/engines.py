"""kvoffload's chunk store and vLLM's file-system tier, as the ``store`` routine drives them."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import mmap
import time
from pathlib import Path

import numpy as np

from stores.drive import Ring

MIB = 1 << 20
WAIT_MS = 60_000


def key_of(chunk: int) -> bytes:
    return hashlib.blake2b(chunk.to_bytes(8, "little"), digest_size=16).digest()


def in_memory(rows: int, size: int) -> Ring:
    """A ring in anonymous memory."""
    return Ring(mmap.mmap(-1, rows * size), rows, size)


class Kvoffload:
    """``SegmentStore``; ``slots``: on an arena's slots, as the connector uses it, else on buffers.

    A put from slots does not hash: the copy out of the KV cache has, so ``prepare`` does it here.
    """

    def __init__(
        self, where: Path, rows: int, size: int, held: int, io_engine: str, slots: bool
    ) -> None:
        from kvoffload import _core

        nbytes = -(-rows * size // (2 * MIB)) * 2 * MIB
        self._arena = _core.Arena.create(nbytes, rows, 1)
        self.ring = Ring(self._arena.view(0, nbytes), rows, size)
        # Several segments more than what is asked for again: they are recycled whole.
        self.room = 4 * held  # chunks
        self._store = _core.SegmentStore(
            str(where), max_bytes=self.room * size, threads=4, io_engine=io_engine
        )
        self.io_engine = self._store.io_engine
        self._slots = slots
        self._generations = np.zeros(rows, dtype=np.uint64)
        self._done: list[tuple[int, bool]] = []

    def prepare(self, chunks: list[int], rows: list[int], write: bool) -> None:
        if not self._slots:
            return
        size = self.ring.size
        for chunk, row in zip(chunks, rows, strict=True):
            self._generations[row] = generation = self._arena.begin_fill(row, 1)
            if write:
                self._arena.hash_leaves(row * size, size, key_of(chunk))
                self._arena.fill_done(row, generation)

    def start(self, job: int, chunks: list[int], rows: list[int], write: bool) -> None:
        keys = b"".join(map(key_of, chunks))
        if not self._slots:
            buffers = [self.ring.data[r] for r in rows]
            (self._store.put if write else self._store.get)(job, keys, buffers)
            return
        slots = np.array(rows, dtype=np.uint32)
        where = (
            slots,
            self._generations[rows],
            slots.astype(np.uint64) * np.uint64(self.ring.size),
        )
        if write:
            depths = np.zeros(len(rows), dtype=np.uint32)
            self._store.put_slots(job, self._arena, keys, *where, self.ring.size, 0, depths)
        else:
            self._store.get_slots(job, self._arena, keys, *where, self.ring.size)

    def next_done(self) -> tuple[int, bool]:
        if not self._done:
            if not self._store.wait_any(WAIT_MS):
                raise TimeoutError("the store finished no job in a minute")
            self._done = [(item.job, not any(item.results)) for item in self._store.poll()]
        return self._done.pop()

    def forget(self, chunks: list[int]) -> None:
        """It recycles its oldest segments."""

    def close(self) -> None:
        self._store.close()


class VllmFs:
    """vLLM's fs tier at its own data path: its thread pool, its file layout, its batch calls."""

    def __init__(self, where: Path, rows: int, size: int, threads: int = 4) -> None:
        from vllm.v1.kv_offload.tiering.fs import io
        from vllm.v1.kv_offload.tiering.fs.thread_pool import DualQueueThreadPool

        where.mkdir(parents=True)
        self.ring = in_memory(rows, size)
        self._io, self._where = io, where
        self._direct = io.probe_o_direct(str(where))
        self._pool = DualQueueThreadPool(threads, threads)
        self._done: list[tuple[int, bool]] = []

    def _path(self, chunk: int) -> str:
        name = hashlib.sha256(chunk.to_bytes(8, "little")).hexdigest()
        return f"{self._where}/kv_r0/{name[:3]}/{name[3:5]}_g0/{name}.bin"

    def prepare(self, chunks: list[int], rows: list[int], write: bool) -> None:
        """Nothing."""

    def start(self, job: int, chunks: list[int], rows: list[int], write: bool) -> None:
        # One job is one task on one thread: that is what the tier does with a request.
        call = self._io.batch_store_block if write else self._io.batch_load_block
        size = self.ring.size
        paths, offsets = [self._path(chunk) for chunk in chunks], [row * size for row in rows]
        task = functools.partial(call, paths, self.ring.view, offsets, size, self._direct)
        (self._pool.enqueue_store if write else self._pool.enqueue_load)(job, 1, [task])

    def next_done(self) -> tuple[int, bool]:
        until = time.monotonic() + WAIT_MS / 1e3
        while not self._done:
            self._done += [(job, ok) for job, ok, _ in self._pool.get_finished()]
            if not self._done:
                if time.monotonic() > until:
                    raise TimeoutError("vLLM's fs tier finished no job in a minute")
                time.sleep(50e-6)
        return self._done.pop()

    def forget(self, chunks: list[int]) -> None:
        for chunk in chunks:
            with contextlib.suppress(FileNotFoundError):
                Path(self._path(chunk)).unlink()

    def close(self) -> None:
        self._pool.shutdown()
