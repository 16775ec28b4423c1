"""``copy``: arena slots <-> paged KV blocks, beside plain memory copies and per-block torch copies.

``d2h`` is KV blocks to arena (a store), ``h2d`` arena to KV blocks (a load), as on a GPU. Blocks
are taken in random order, every load is checked against what was stored. kvoffload's copies include
checksums: hashing on store, verification on load; ``kvoffload_unverified`` loads without, and
``kvoffload_small_pages`` has an arena without huge pages. Like a worker they attach to an arena
that is there: ``first_store_ms`` is with their first touch of it.
``--device cuda``: the blocks are in GPU memory (``peers/cuda_copies.py``).
"""

from __future__ import annotations

import argparse
import importlib.util
import time
from collections import defaultdict
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
from chunks import WAIT_MS, ArenaChunks, Ids, finish
from common import Json, quantile, summary
from context import Context

NAME = "copy"
Bytes = npt.NDArray[np.uint8]


def add_options(parser: argparse.ArgumentParser) -> None:
    """Options of this routine."""
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--fragments-kib", default="32,128", help="bytes of one layer's page")
    parser.add_argument("--blocks", type=int, default=64, help="blocks per copy")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")


class Pages:
    """KV memory of one engine: ``layers`` pages of ``fragment`` bytes per block.

    layout ``per_layer``: one array per layer (LBNHC); ``block_contiguous``: all layers of a block
    side by side (BLHNC).
    """

    def __init__(self, layout: str, layers: int, fragment: int, num_blocks: int) -> None:
        self.layout, self.fragment, self.layers = layout, fragment, layers
        self.num_blocks, self.block_bytes = num_blocks, layers * fragment
        rng = np.random.default_rng(1)
        total = layers * fragment * num_blocks
        self.memory: Bytes = rng.integers(0, 256, total, dtype=np.uint8)
        if layout == "block_contiguous":
            self.views = [self.memory.reshape(num_blocks, self.block_bytes)]
        else:
            self.views = list(self.memory.reshape(layers, num_blocks, fragment))

    def fragments(self) -> list[tuple[int, int, int]]:
        """(base, stride, nbytes) per fragment, what ``add_group`` takes."""
        return [(v.ctypes.data, v.strides[0], v.shape[1]) for v in self.views]


def _median_rate(seconds: list[float], nbytes: int) -> float:
    return round(nbytes / quantile(seconds, 0.5) / 1e9, 3)


def _timed(call: Callable[[], None]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


class Memcpy:
    """The limit: the same bytes in one piece per thread."""

    def __init__(self, nbytes: int, threads: int) -> None:
        self._from = np.full(nbytes, 7, np.uint8)
        self._to = np.zeros(nbytes, np.uint8)
        step = -(-nbytes // threads)
        self._parts = [slice(i * step, (i + 1) * step) for i in range(threads)]
        self._pool = ThreadPoolExecutor(threads)
        self.run()  # starts the threads and faults the pages in

    def _one(self, part: slice) -> None:
        np.copyto(self._to[part], self._from[part])  # without the GIL

    def run(self) -> None:
        list(self._pool.map(self._one, self._parts))

    def close(self) -> None:
        self._pool.shutdown()


class TorchBlocks:
    """One torch copy per block and fragment: what vLLM-style code does without a batched kernel."""

    def __init__(self, pages: Pages, blocks: int) -> None:
        import torch

        # One thread: OpenMP's barrier per block costs more than it gains on small or busy machines.
        torch.set_num_threads(1)
        self._views = [torch.from_numpy(v) for v in pages.views]
        self._host = torch.zeros((blocks, pages.block_bytes), dtype=torch.uint8)
        self._pages = pages

    def _copy(self, ids: Ids, store: bool) -> None:
        for row, block in enumerate(ids.tolist()):
            at = 0
            for view in self._views:
                n = view.shape[1]
                page, cell = view[block], self._host[row, at : at + n]
                (cell.copy_(page) if store else page.copy_(cell))
                at += n

    def store(self, ids: Ids) -> None:
        self._copy(ids, True)

    def load(self, ids: Ids, verify: bool = True) -> None:
        self._copy(ids, False)

    def close(self) -> None:
        """Nothing to give back."""


class Kvoffload:
    """``CpuCopyPool`` between an arena and the pages, one chunk of blocks per slot."""

    def __init__(self, pages: Pages, blocks: int, threads: int, hugepages: bool) -> None:
        from kvoffload import _core

        self._chunks = ArenaChunks(pages.block_bytes, blocks, hugepages)
        self._worker = _core.Arena.attach(self._chunks.arena.path, self._chunks.arena.inode)
        self._pool = _core.CpuCopyPool(self._worker, 0, threads)
        self._group = self._pool.add_group(pages.fragments(), pages.num_blocks, self._chunks.shard)
        self._job = 0

    def _copies(self, ids: Ids) -> tuple[Any, ...]:
        c = self._chunks
        return self._group, c.slots, c.generations, c.offsets, c.keys, c.chosen(ids)

    def store(self, ids: Ids) -> None:
        self._chunks.begin_fill()
        self._job += 1
        self._pool.submit_store(self._job, *self._copies(ids))
        finish(self._pool, self._job)

    def load(self, ids: Ids, verify: bool = True) -> None:
        self._job += 1
        self._pool.submit_load(self._job, *self._copies(ids), WAIT_MS, verify)
        finish(self._pool, self._job)

    def close(self) -> None:
        self._pool.check()
        self._pool.close()
        self._worker.close()
        self._chunks.arena.close()


def _check_load(pages: Pages, side: Any, ids: Ids) -> float:
    """Store, wipe, load: the blocks hold the same bytes again. Seconds of that first store."""
    first = _timed(partial(side.store, ids))
    want = [view[ids].copy() for view in pages.views]
    for view in pages.views:
        view[ids] = 0
    side.load(ids)
    for view, expected in zip(pages.views, want, strict=True):
        assert np.array_equal(view[ids], expected), "a load brought back other bytes"
    return first


def _case(context: Context, options: argparse.Namespace, layout: str, fragment: int) -> list[Json]:
    pages = Pages(layout, options.layers, fragment, 2 * options.blocks)
    nbytes = options.blocks * pages.block_bytes
    sides: dict[str, Any] = {"vllm_torch": TorchBlocks(pages, options.blocks)}
    if importlib.util.find_spec("kvoffload._core") is not None:
        for name, hugepages in (("kvoffload", True), ("kvoffload_small_pages", False)):
            sides[name] = Kvoffload(pages, options.blocks, options.threads, hugepages)
    limit = Memcpy(nbytes, options.threads)
    seconds: dict[tuple[str, str], list[float]] = defaultdict(list)
    first: dict[str, float] = {}
    rng = np.random.default_rng(2)
    for name, side in sides.items():
        context.progress(f"{layout}, {fragment >> 10} KiB pages: checking {name}")
        first[name] = _check_load(
            pages, side, rng.permutation(pages.num_blocks)[: options.blocks].astype(np.int32)
        )
    for _ in range(options.repeats):
        ids = rng.permutation(pages.num_blocks)[: options.blocks].astype(np.int32)
        seconds["limit", "both"].append(_timed(limit.run))
        for name in rng.permutation(list(sides)).tolist():  # who comes after whom matters
            side = sides[name]
            seconds[name, "d2h"].append(_timed(partial(side.store, ids)))
            seconds[name, "h2d"].append(_timed(partial(side.load, ids)))
            if name == "kvoffload":
                unverified = _timed(partial(side.load, ids, False))
                seconds["kvoffload_unverified", "h2d"].append(unverified)
    top = _median_rate(seconds["limit", "both"], nbytes)
    out = []
    for name in dict.fromkeys(engine for engine, _ in seconds):
        row: Json = {"layout": layout, "fragment_bytes": pages.views[0].shape[1]}
        row |= {"blocks": options.blocks, "engine": name, "bytes": nbytes}
        for way in ("h2d", "d2h"):
            values = seconds.get((name, way)) or seconds.get((name, "both"))
            row[f"{way}_gbps"] = _median_rate(values, nbytes) if values else None
            row[f"{way}_ms"] = summary([1e3 * s for s in values]) if values else None
        row["first_store_ms"] = round(1e3 * first[name], 2) if name in first else None
        row["vs_limit"] = {
            w: row[f"{w}_gbps"] and round(row[f"{w}_gbps"] / top, 3) for w in ("h2d", "d2h")
        }
        out.append(row)
    for side in (*sides.values(), limit):
        side.close()
    return out


def run(context: Context, options: argparse.Namespace) -> Json:
    """All layouts and page sizes on the chosen device."""
    if options.quick:
        options.blocks, options.repeats, options.fragments_kib = 16, 2, "32"
    case = _case
    if options.device == "cuda":
        from peers.cuda_copies import case
    cases: list[Json] = []
    for layout in ("per_layer", "block_contiguous"):
        for kib in map(int, options.fragments_kib.split(",")):
            cases += case(context, options, layout, kib << 10)
    limit = {
        f"{way}_gbps": max(c[f"{way}_gbps"] for c in cases if c["engine"] == "limit")
        for way in ("h2d", "d2h")
    }
    out: Json = {"device": options.device, "limit": limit, "cases": cases}
    if not any(c["engine"] == "kvoffload" for c in cases):
        out["systems"] = {"kvoffload": {"skipped": "kvoffload._core is not built"}}
    return out


def table(result: Json) -> tuple[list[str], list[list[str]]]:
    """Header and rows of the final table."""
    rows = []
    for c in result["cases"]:
        rates = [c["h2d_gbps"], c["d2h_gbps"], c["vs_limit"]["h2d"], c["vs_limit"]["d2h"]]
        cells = ["-" if r is None else f"{r:.2f}" for r in rates]
        rows.append(
            [c["layout"], str(c["fragment_bytes"] >> 10), str(c["blocks"]), c["engine"], *cells]
        )
    head = ["layout", "fragment KiB", "blocks", "engine", "load GB/s", "store GB/s"]
    return [*head, "load/limit", "store/limit"], rows
