"""``copy`` on a CUDA device: the same cases with the blocks in GPU memory.

``limit`` is one copy of the same bytes between pinned memory and the device, each way by itself.
``torch_blocks`` is one asynchronous torch copy per page, ``vllm_batch`` vLLM's own batched copy
(swap_blocks_batch, what its OffloadingConnector uses), both without checksums and with memory that
is pinned. kvoffload's engine includes hashing on store and verification on load; it is timed once
its calibration has picked the movers, and its row says which of them served. All are timed from the
first call to the end of the last copy.
"""

from __future__ import annotations

import argparse
import importlib.util
import time
from collections import Counter, defaultdict
from collections.abc import Callable
from functools import partial
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from chunks import WAIT_MS, ArenaChunks, Ids, finish
from common import Json, quantile, summary
from context import Context

PIN_S = 60.0
CALIBRATE_S = 20.0
"""The kernels are compiled first. gpu_check.sh has a minute for all cases; what was compiled or
timed for one is found in a cache by the next."""


class Pages:
    """KV memory of one engine on the device; layouts as in routines/copy.py."""

    def __init__(self, layout: str, layers: int, fragment: int, num_blocks: int) -> None:
        self.layout, self.fragment, self.layers = layout, fragment, layers
        self.num_blocks, self.block_bytes = num_blocks, layers * fragment
        torch.manual_seed(1)
        shape = (layers * fragment * num_blocks,)
        self.memory = torch.randint(0, 256, shape, dtype=torch.uint8, device="cuda")
        if layout == "block_contiguous":
            self.views = [self.memory.view(num_blocks, self.block_bytes)]
        else:
            self.views = list(self.memory.view(layers, num_blocks, fragment))

    def fragments(self) -> list[tuple[int, int, int]]:
        """(address, stride, bytes) per fragment, what ``add_group`` takes."""
        return [(v.data_ptr(), v.stride(0), v.shape[1]) for v in self.views]

    def read(self, ids: Ids) -> list[torch.Tensor]:
        index = torch.from_numpy(ids.astype(np.int64)).cuda()
        return [view[index].clone() for view in self.views]

    def wipe(self, ids: Ids) -> None:
        index = torch.from_numpy(ids.astype(np.int64)).cuda()
        for view in self.views:
            view[index] = 0
        torch.cuda.synchronize()


class Plain:
    """The limit: the same bytes in one copy."""

    def __init__(self, nbytes: int) -> None:
        self._host = torch.zeros(nbytes, dtype=torch.uint8, pin_memory=True)
        self._device = torch.zeros(nbytes, dtype=torch.uint8, device="cuda")

    def store(self, ids: Ids) -> None:
        self._host.copy_(self._device, non_blocking=True)
        torch.cuda.synchronize()

    def load(self, ids: Ids) -> None:
        self._device.copy_(self._host, non_blocking=True)
        torch.cuda.synchronize()

    def close(self) -> None:
        """Nothing to give back."""


class TorchBlocks:
    """One asynchronous torch copy per block and fragment."""

    def __init__(self, pages: Pages, blocks: int) -> None:
        self._pages = pages
        self._host = torch.zeros((blocks, pages.block_bytes), dtype=torch.uint8, pin_memory=True)

    def _copy(self, ids: Ids, store: bool) -> None:
        for row, block in enumerate(ids.tolist()):
            at = 0
            for view in self._pages.views:
                n = view.shape[1]
                page, cell = view[block], self._host[row, at : at + n]
                (cell if store else page).copy_(page if store else cell, non_blocking=True)
                at += n
        torch.cuda.synchronize()

    def store(self, ids: Ids) -> None:
        self._copy(ids, True)

    def load(self, ids: Ids) -> None:
        self._copy(ids, False)

    def close(self) -> None:
        """Nothing to give back."""


class VllmBatch(TorchBlocks):
    """vLLM's swap_blocks_batch: all pages in one driver call. Raises ImportError without it."""

    def __init__(self, pages: Pages, blocks: int) -> None:
        super().__init__(pages, blocks)
        from vllm._custom_ops import swap_blocks_batch

        self._swap = swap_blocks_batch

    def _copy(self, ids: Ids, store: bool) -> None:
        device, host, sizes, at = [], [], [], 0
        rows = self._host.data_ptr() + np.arange(len(ids), dtype=np.int64) * self._pages.block_bytes
        for base, stride, nbytes in self._pages.fragments():
            device.append(base + ids.astype(np.int64) * stride)
            host.append(rows + at)
            sizes.append(np.full(len(ids), nbytes, np.int64))
            at += nbytes
        gpu, cpu = (torch.from_numpy(np.concatenate(x)) for x in (device, host))
        lengths = torch.from_numpy(np.concatenate(sizes))
        self._swap(gpu if store else cpu, cpu if store else gpu, lengths)
        torch.cuda.synchronize()


class Kvoffload:
    """kvoffload's CUDA engine between an arena and the pages, one chunk of blocks per slot."""

    def __init__(self, pages: Pages, blocks: int) -> None:
        from kvoffload.copy.base import Fragment
        from kvoffload.copy.select import copy_engine

        self._chunks = ArenaChunks(pages.block_bytes, blocks)
        arena = self._chunks.arena
        self._engine: Any = copy_engine("cuda", arena, 0)
        fragments = [Fragment(*f) for f in pages.fragments()]
        self._group = self._engine.add_group(fragments, pages.num_blocks, self._chunks.shard)
        self._job = 0
        end = time.monotonic() + PIN_S
        while self._engine.pinned_bytes() < arena.data_bytes and time.monotonic() < end:
            time.sleep(0.01)
        self.pinned = self._engine.pinned_bytes() >= arena.data_bytes
        self.calibrated = bool(self._engine.movers.wait(CALIBRATE_S))  # until then: plain copies
        self._before: Counter[str] = Counter()

    def start(self) -> None:
        """What served before this is not counted."""
        self._before = Counter(self._engine.movers.served)

    def row(self) -> Json:
        """How it was set up, and the items that each mover copied since ``start``."""
        served = dict(Counter(self._engine.movers.served) - self._before)
        return {"pinned": self.pinned, "calibrated": self.calibrated, "served": served}

    def _copies(self, ids: Ids) -> Any:
        c = self._chunks
        return SimpleNamespace(
            slots=c.slots,
            generations=c.generations.copy(),
            offsets=c.offsets,
            keys=c.keys,
            block_ids=c.chosen(ids),
        )

    def store(self, ids: Ids) -> None:
        self._chunks.begin_fill()
        self._job += 1
        self._engine.submit_store(self._job, self._group, self._copies(ids), 0)
        finish(self._engine, self._job)

    def load(self, ids: Ids) -> None:
        self._job += 1
        self._engine.submit_load(self._job, self._group, self._copies(ids), 0, WAIT_MS)
        finish(self._engine, self._job)

    def close(self) -> None:
        self._engine.check()
        self._engine.close()
        self._chunks.arena.close()


def _check_load(pages: Pages, side: Any, ids: Ids) -> None:
    """Store, wipe, load: the blocks hold the same bytes again."""
    want = pages.read(ids)
    side.store(ids)
    pages.wipe(ids)
    side.load(ids)
    torch.cuda.synchronize()
    for got, expected in zip(pages.read(ids), want, strict=True):
        assert torch.equal(got, expected), "a load brought back other bytes"


def _sides(context: Context, pages: Pages, blocks: int) -> dict[str, Any]:
    sides: dict[str, Any] = {"torch_blocks": TorchBlocks(pages, blocks)}
    if importlib.util.find_spec("vllm") is not None:
        try:
            sides["vllm_batch"] = VllmBatch(pages, blocks)
        except (ImportError, OSError) as error:
            context.progress(f"vllm_batch cannot run: {error}")
    if importlib.util.find_spec("kvoffload._core") is not None:
        sides["kvoffload"] = Kvoffload(pages, blocks)
    return sides


def _timed(call: Callable[[], None]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def case(context: Context, options: argparse.Namespace, layout: str, fragment: int) -> list[Json]:
    """Rows of one layout and page size."""
    pages = Pages(layout, options.layers, fragment, 2 * options.blocks)
    sides = _sides(context, pages, options.blocks)
    rng = np.random.default_rng(2)

    def draw() -> Ids:
        return rng.permutation(pages.num_blocks)[: options.blocks].astype(np.int32)

    for name, side in list(sides.items()):
        context.progress(f"{layout}, {fragment >> 10} KiB pages: checking {name}")
        try:
            _check_load(pages, side, draw())
        except (RuntimeError, NotImplementedError, AttributeError) as error:
            if name == "kvoffload":
                raise
            context.progress(f"{name} cannot run: {error}")  # a peer without its kernel
            del sides[name]
    sides = {"limit": Plain(options.blocks * pages.block_bytes)} | sides
    if "kvoffload" in sides:
        sides["kvoffload"].start()
    seconds: dict[tuple[str, str], list[float]] = defaultdict(list)
    for _ in range(options.repeats):
        ids = draw()
        for name, side in sides.items():
            seconds[name, "d2h"].append(_timed(partial(side.store, ids)))
            seconds[name, "h2d"].append(_timed(partial(side.load, ids)))
    rows = [_row(pages, options.blocks, name, seconds) for name in sides]
    for row in rows:
        if row["engine"] == "kvoffload":
            row |= sides["kvoffload"].row()
    for side in sides.values():
        side.close()
    return rows


def _row(pages: Pages, blocks: int, name: str, seconds: dict[tuple[str, str], list[float]]) -> Json:
    nbytes = blocks * pages.block_bytes
    row: Json = {"layout": pages.layout, "fragment_bytes": pages.views[0].shape[1]}
    row |= {"blocks": blocks, "engine": name, "bytes": nbytes, "vs_limit": {}}
    for way in ("h2d", "d2h"):
        values = seconds[name, way]
        row[f"{way}_gbps"] = round(nbytes / quantile(values, 0.5) / 1e9, 3)
        row[f"{way}_ms"] = summary([1e3 * s for s in values])
        top = nbytes / quantile(seconds["limit", way], 0.5) / 1e9
        row["vs_limit"][way] = round(row[f"{way}_gbps"] / top, 3)
    return row
