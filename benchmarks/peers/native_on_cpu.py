"""vLLM's own OffloadingConnector with its tiering on the CPU platform.

vLLM ships the connector's copy worker for CUDA and XPU only. This spec replaces that one class and
leaves everything else (manager, policies, file-system tier, scheduler side) as shipped, so that
native offloading can be the baseline on a machine without a GPU.

What the copies do is chosen in the baseline's favour: loads run inline (a forward on this platform
is synchronous, so nothing could overlap them, and the result is reported in the same step), stores
run on a thread of their own (as the DMA engine would) and are waited for where vLLM asks for it.
"""

from __future__ import annotations

import time
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import wait as wait_futures

import torch
from vllm.v1.kv_offload.base import (
    CanonicalKVCaches,
    GPULoadStoreSpec,
    LoadStoreSpec,
    OffloadingWorker,
    TransferResult,
)
from vllm.v1.kv_offload.cpu.common import CPULoadStoreSpec
from vllm.v1.kv_offload.cpu.shared_offload_region import SharedOffloadRegion
from vllm.v1.kv_offload.tiering.spec import TieringOffloadingSpec


class HostCopyWorker(OffloadingWorker):
    """Row copies between the engine's KV pages and the shared region. Worker thread only."""

    def __init__(self, caches: CanonicalKVCaches, region: SharedOffloadRegion) -> None:
        self._region = region
        self._refs = caches.group_data_refs
        self._pages = [_rows(t.tensor, t.page_size_bytes) for t in caches.tensors]
        self._host = [region.create_next_worker_view(t.page_size_bytes) for t in caches.tensors]
        self._storer = ThreadPoolExecutor(1, thread_name_prefix="native-store")
        self._stores: dict[int, Future[TransferResult]] = {}
        self._done: deque[TransferResult] = deque()

    def _copy(
        self, job: int, engine: GPULoadStoreSpec, host: LoadStoreSpec, store: bool
    ) -> TransferResult:
        assert isinstance(host, CPULoadStoreSpec)
        start, moved, at = time.perf_counter(), 0, 0
        blocks, chunks = engine.block_ids.tolist(), host.chunk_ids.tolist()
        for group, size in enumerate(engine.group_sizes):
            pairs = list(zip(blocks[at : at + size], chunks[at : at + size], strict=True))
            for ref in self._refs[group]:
                pages, rows, n = (
                    self._pages[ref.tensor_idx],
                    self._host[ref.tensor_idx],
                    ref.page_size_bytes,
                )
                for block, chunk in pairs:
                    if store:
                        rows[chunk, :n].copy_(pages[block, :n])
                    else:
                        pages[block, :n].copy_(rows[chunk, :n])
                moved += n * size
            at += size
        return TransferResult(job, True, moved, time.perf_counter() - start)

    def submit_store(
        self, job_id: int, src_spec: GPULoadStoreSpec, dst_spec: LoadStoreSpec
    ) -> bool:
        self._stores[job_id] = self._storer.submit(self._copy, job_id, src_spec, dst_spec, True)
        return True

    def submit_load(self, job_id: int, src_spec: LoadStoreSpec, dst_spec: GPULoadStoreSpec) -> bool:
        self._done.append(self._copy(job_id, dst_spec, src_spec, False))
        return True

    def get_finished(self) -> list[TransferResult]:
        for job in [job for job, future in self._stores.items() if future.done()]:
            self._done.append(self._stores.pop(job).result())
        finished = list(self._done)
        self._done.clear()
        return finished

    def wait(self, job_ids: set[int]) -> None:
        wait_futures([self._stores[job] for job in job_ids if job in self._stores])

    def shutdown(self) -> None:
        self._storer.shutdown(wait=True)
        self._host.clear()
        self._region.cleanup()


def _rows(tensor: torch.Tensor, page: int) -> torch.Tensor:
    """The canonical cache as int8 rows, one per block."""
    rows = tensor.view(torch.int8)
    if rows.ndim != 2 or rows.shape[1] < page:
        raise ValueError(f"unexpected canonical KV tensor {tuple(rows.shape)}, page {page} bytes")
    return rows


class NativeOnCpuSpec(TieringOffloadingSpec):
    """``spec_name`` for kv_connector_extra_config; one block per chunk (vLLM's default)."""

    def get_worker(self, kv_caches: CanonicalKVCaches) -> OffloadingWorker:
        """Build the copy worker once. Raises ValueError for more than one block per chunk."""
        if not self._worker:
            if self.blocks_per_chunk != 1:
                raise ValueError("NativeOnCpuSpec copies whole blocks: leave block_size unset")
            region = SharedOffloadRegion(
                engine_id=self.config.engine_id,
                num_chunks=self.num_chunks,
                rank=self.config.parallel.rank,
                kv_bytes_per_chunk=self.kv_bytes_per_chunk,
                cpu_page_size=self.cpu_page_size_per_worker,
            )
            self._worker = HostCopyWorker(kv_caches, region)
        return self._worker
