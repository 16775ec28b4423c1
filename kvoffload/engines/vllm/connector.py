"""The vLLM connector: a facade that hands every hook to the scheduler or the worker half.

One instance per role and process. No hook ever raises: see guard.py and docs/request-lifecycle.md.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorBase_V1,
    KVConnectorMetadata,
    KVConnectorRole,
    KVConnectorWorkerMetadata,
    SupportsHMA,
)

from kvoffload.engines.vllm import build, compat, plugin
from kvoffload.engines.vllm.meta import CALM, StepOrders, WorkerReport
from kvoffload.engines.vllm.stats import KVOffloadPromMetrics, KVOffloadStats

if TYPE_CHECKING:
    import torch
    from vllm.config import KVTransferConfig, VllmConfig
    from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorTransferResults
    from vllm.v1.core.block_pool import BlockPool
    from vllm.v1.core.kv_cache_manager import KVCacheBlocks
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.kv_cache_interface import KVCacheConfig
    from vllm.v1.outputs import KVConnectorOutput
    from vllm.v1.request import Request

FLUSH_S = 3.0
"""Bounded flush at shutdown: vLLM kills an engine process 5 s after asking it to end."""


class StepMetadata(KVConnectorMetadata):
    """StepOrders in vLLM's envelope."""

    def __init__(self, orders: StepOrders) -> None:
        self.orders = orders

    def __reduce__(self) -> str | tuple[Any, ...]:
        return "CALM_STEP" if self is CALM_STEP else (StepMetadata, (self.orders,))


CALM_STEP = StepMetadata(CALM)
"""Of most steps; pickled by name, as CALM is."""


class WorkerMetadata(KVConnectorWorkerMetadata):
    """WorkerReport in vLLM's envelope."""

    def __init__(self, report: WorkerReport) -> None:
        self.report = report

    def aggregate(self, other: KVConnectorWorkerMetadata) -> KVConnectorWorkerMetadata:
        """Fold another rank's report into this one."""
        if isinstance(other, WorkerMetadata):
            self.report.merge(other.report)
        return self


class KVOffloadConnector(KVConnectorBase_V1, SupportsHMA):
    """KV cache that outlives the GPU, as a vLLM v1 KV connector."""

    def __init__(
        self, vllm_config: VllmConfig, role: KVConnectorRole, kv_cache_config: KVCacheConfig
    ) -> None:
        super().__init__(vllm_config, role, kv_cache_config)
        self._scheduler: build.SchedulerSide | None = None
        self._worker: build.WorkerSide | None = None
        self._half: Any = None  # of the scheduler role
        self._rank: Any = None  # of the worker role
        self._idle = False  # nothing to do for the rank in this step
        self._bridge = compat.Bridge()
        if role is KVConnectorRole.SCHEDULER:
            self._scheduler = build.scheduler_side(vllm_config, kv_cache_config)
            self._half = self._scheduler.half
        else:
            self._worker = build.worker_side(vllm_config, kv_cache_config)
            self._rank = self._worker.half
            plugin.add_weights_listener(self._worker.half.weights_changed)

    # ------------------------------------------------------------ class-level answers

    @property
    def requires_kv_delivery(self) -> bool:
        """A cache: a dropped store is a future miss, never a reason to recompute an output."""
        return False

    @classmethod
    def get_required_kvcache_layout(cls, vllm_config: VllmConfig) -> str | None:
        """All layers of a block side by side, where the attention backend takes that."""
        return compat.wanted_layout(vllm_config)

    @classmethod
    def supports_sleep_mode(cls, kv_transfer_config: KVTransferConfig) -> bool:
        """Refused (0.33 asks): copies of ours may be out when the KV memory is unmapped."""
        return False

    @classmethod
    def build_kv_connector_stats(cls, data: dict[str, Any] | None = None) -> KVOffloadStats | None:
        """Stats object around a payload that crossed a process border."""
        return KVOffloadStats(data=data) if data is not None else KVOffloadStats()

    @classmethod
    def build_prom_metrics(
        cls,
        vllm_config: VllmConfig,
        metric_types: dict[Any, Any],
        labelnames: list[str],
        per_engine_labelvalues: dict[int, list[object]],
    ) -> KVOffloadPromMetrics:
        """Our metrics in vLLM's /metrics."""
        return KVOffloadPromMetrics(vllm_config, metric_types, labelnames, per_engine_labelvalues)

    # ------------------------------------------------------------ scheduler role

    def bind_gpu_block_pool(self, gpu_block_pool: BlockPool) -> None:
        """HBM's own prefix cache: watched after in-place weight updates, and at arrivals."""
        self._half.watch_hbm(
            lambda: compat.block_pool_is_empty(gpu_block_pool),
            compat.block_pool_lookup(gpu_block_pool),
        )

    def on_new_request(self, request: Request) -> None:
        """Arrival of a request."""
        self._half.on_new_request(request)

    def get_num_new_matched_tokens(
        self, request: Request, num_computed_tokens: int
    ) -> tuple[int | None, bool]:
        """Tokens beyond the local hit that will be loaded."""
        answer: tuple[int, bool] = self._half.get_num_new_matched_tokens(
            request, num_computed_tokens
        )
        return answer

    def update_state_after_alloc(
        self, request: Request, blocks: KVCacheBlocks, num_external_tokens: int
    ) -> None:
        """Blocks are there: order the load."""
        self._half.update_state_after_alloc(request, blocks, num_external_tokens)

    def get_external_cache_hit_sources(
        self, request: Request, num_external_tokens: int
    ) -> dict[Any, int]:
        """Loaded tokens by tier, in vLLM's words (0.32+)."""
        by_tier = self._half.hit_sources(request, num_external_tokens)
        if by_tier is None:
            return super().get_external_cache_hit_sources(request, num_external_tokens)
        return compat.cache_hit_sources(by_tier)

    def build_connector_meta(self, scheduler_output: SchedulerOutput) -> KVConnectorMetadata:
        """Orders of this step."""
        orders = self._half.build_connector_meta(self._bridge.step(scheduler_output))
        return CALM_STEP if orders is CALM else StepMetadata(orders)

    def update_connector_output(self, connector_output: KVConnectorOutput) -> None:
        """Answers of the ranks."""
        meta = connector_output.kv_connector_worker_meta
        if not (meta or connector_output.finished_recving or connector_output.invalid_block_ids):
            return  # of most steps
        report = meta.report if isinstance(meta, WorkerMetadata) else None
        self._half.update_connector_output(self._bridge.answers(connector_output), report)

    def request_finished(
        self, request: Request, block_ids: list[int]
    ) -> tuple[bool, dict[str, Any] | None]:
        """Blocks are never held back: copies out are fenced instead."""
        self._half.request_finished(request)
        return False, None

    def request_finished_all_groups(
        self, request: Request, block_ids: tuple[list[int], ...]
    ) -> tuple[bool, dict[str, Any] | None]:
        """As request_finished, with several KV groups."""
        self._half.request_finished(request)
        return False, None

    def has_pending_push_work(self) -> bool:
        """Whether an idle engine must keep stepping for us."""
        return bool(self._half.has_pending_push_work())

    def reset_cache(self) -> bool | None:
        """reset_prefix_cache(reset_connector=True): hide everything stored."""
        return bool(self._half.reset_cache())

    # ------------------------------------------------------------ worker role

    def register_kv_caches(self, kv_caches: dict[str, torch.Tensor]) -> None:
        """KV tensors of this rank."""
        assert self._worker is not None
        self._worker.register(kv_caches)

    def handle_preemptions(self, kv_connector_metadata: KVConnectorMetadata) -> None:
        """Fence: stores whose source blocks this step overwrites are finished first."""
        if kv_connector_metadata is CALM_STEP:
            return  # no fence
        if isinstance(kv_connector_metadata, StepMetadata):
            self._rank.handle_preemptions(kv_connector_metadata.orders)

    def bind_connector_metadata(self, connector_metadata: KVConnectorMetadata) -> None:
        """Take this step's orders."""
        super().bind_connector_metadata(connector_metadata)
        if isinstance(connector_metadata, StepMetadata):
            self._idle = self._rank.bind(connector_metadata.orders)

    def has_connector_metadata(self) -> bool:
        """Never: vLLM asks whether to call the two hooks of each layer, which are empty here."""
        return False

    def clear_connector_metadata(self) -> None:
        """End of step."""
        super().clear_connector_metadata()
        self._idle = False
        self._rank.clear()

    def start_load_kv(self, forward_context: Any, **kwargs: Any) -> None:
        """Submit loads."""
        if not self._idle:
            self._rank.start_load_kv()

    def wait_for_layer_load(self, layer_name: str) -> None:
        """Loads are per request and asynchronous; nothing to wait for in a layer."""

    def save_kv_layer(
        self, layer_name: str, kv_layer: torch.Tensor, attn_metadata: Any, **kwargs: Any
    ) -> None:
        """Stores are per chunk, after the forward."""

    def wait_for_save(self) -> None:
        """Submit stores."""
        self._rank.wait_for_save()  # without any, too: it notes a forward that raised

    def get_transfer_results(self, finished_req_ids: set[str]) -> KVConnectorTransferResults:
        """Requests whose loads ended, failed ones included."""
        if self._idle:
            return self._bridge.transfer_results(set(), set())
        answers = self._rank.transfer_results()
        return self._bridge.transfer_results(answers.finished, answers.failed)

    def get_finished(self, finished_req_ids: set[str]) -> tuple[set[str] | None, set[str] | None]:
        """As get_transfer_results, for vLLM before 0.30."""
        if self._idle:
            return None, None
        answers = self._rank.transfer_results()
        return self._bridge.finished(answers.finished, answers.failed)

    def get_block_ids_with_load_errors(self) -> set[int]:
        """Blocks left without valid KV by failed loads."""
        if self._idle:
            return set()
        blocks: set[int] = self._rank.take_invalid_blocks()
        return blocks

    def build_connector_worker_meta(self) -> KVConnectorWorkerMetadata | None:
        """This rank's account of the step."""
        if self._idle:
            return None
        report = self._rank.take_report()
        return WorkerMetadata(report) if report is not None else None

    # ------------------------------------------------------------ both

    def get_kv_connector_stats(self) -> KVOffloadStats | None:
        """Counters since the last call (scheduler role; ranks report through worker metadata)."""
        if self._scheduler is None:
            return None
        return self._scheduler.stats()

    def shutdown(self) -> None:
        """Bounded flush (scheduler role) or stop of the copy threads (worker role)."""
        if self._scheduler is not None:
            self._scheduler.shutdown(FLUSH_S)
        if self._worker is not None:
            plugin.remove_weights_listener(self._worker.half.weights_changed)
            self._worker.shutdown()
