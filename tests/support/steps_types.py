"""What passes between the mini scheduler, the connector and the mini runners in a step."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from kvoffload.engines.vllm.meta import WorkerReport


@dataclass(frozen=True)
class NewData:
    req_id: str
    block_ids: tuple[list[int], ...]
    tokens: list[int]
    num_computed_tokens: int


@dataclass
class CachedData:
    req_ids: list[str] = field(default_factory=list)
    resumed: dict[str, list[int]] = field(default_factory=dict)  # id -> all its tokens
    new_block_ids: list[tuple[list[int], ...] | None] = field(default_factory=list)
    num_computed_tokens: list[int] = field(default_factory=list)


@dataclass(frozen=True)
class BlockState:
    """vLLM's KVConnectorBlockState: tables of the requests scheduled in this step, nobody else's."""

    req_ids: frozenset[str]
    resolve: Callable[[str], tuple[list[int], ...]]

    def get_block_ids(self, req_id: str) -> tuple[list[int], ...] | None:
        return self.resolve(req_id) if req_id in self.req_ids else None


@dataclass
class StepOutput:
    """What a step is: the fields of SchedulerOutput that connectors and runners use."""

    seq: int
    scheduled_new_reqs: list[NewData] = field(default_factory=list)
    scheduled_cached_reqs: CachedData = field(default_factory=CachedData)
    num_scheduled_tokens: dict[str, int] = field(default_factory=dict)
    preempted_req_ids: set[str] = field(default_factory=set)
    finished_req_ids: set[str] = field(default_factory=set)
    fresh_blocks: list[int] = field(default_factory=list)  # allocated for compute: holds garbage
    kv_connector_block_state: Any = None
    metadata: Any = None


@dataclass
class ConnectorOutput:
    """What KVOutputAggregator makes of the ranks' answers."""

    finished_recving: set[str] = field(default_factory=set)
    failed_recving: set[str] = field(default_factory=set)
    invalid_block_ids: set[int] = field(default_factory=set)
    report: WorkerReport | None = None


class Blocks:
    """vLLM's KVCacheBlocks, as handed to update_state_after_alloc."""

    def __init__(self, ids: tuple[list[int], ...]) -> None:
        self._ids = ids

    def get_block_ids(self) -> tuple[list[int], ...]:
        return self._ids
