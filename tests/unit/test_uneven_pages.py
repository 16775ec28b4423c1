"""Layers of one KV group with pages of different sizes: both roles size the slots alike.

For its scheduler vLLM puts the first layer's spec in the place of all (generate_scheduler_kv_cache_
config); a slot of that size would hold a part of what the workers write, or too much.
"""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("vllm")

from kvoffload.engines.vllm import geometry
from kvoffload.types import CacheLayout, GroupKind
from tests.unit.test_namespace import make_config


def full(heads: int, block: int = 16) -> Any:
    import torch
    from vllm.v1.kv_cache_interface import FullAttentionSpec

    return FullAttentionSpec(
        block_size=block, num_kv_heads=heads, head_size=64, dtype=torch.bfloat16
    )


def mla(width: int, dtype: str) -> Any:
    import torch
    from vllm.v1.kv_cache_interface import MLAAttentionSpec

    return MLAAttentionSpec(
        block_size=64, num_kv_heads=1, head_size=width, dtype=getattr(torch, dtype)
    )


MODELS: dict[str, dict[str, Any]] = {
    "a drafter with more heads": {**{f"l{i}": full(8) for i in range(4)}, "draft": full(32)},
    "fewer heads in the first layers": {f"l{i}": full(2 if i < 2 else 8) for i in range(4)},
    "an indexer before the attention": {
        k: v
        for i in range(3)
        for k, v in ((f"{i}.indexer", mla(132, "uint8")), (f"{i}.attn", mla(576, "bfloat16")))
    },
    "all alike": {f"l{i}": full(8) for i in range(4)},
}


def layouts(vllm_config: Any, specs: dict[str, Any], ranks: int) -> tuple[CacheLayout, CacheLayout]:
    """As the scheduler role and the worker role see them, through vLLM's own functions."""
    from vllm.v1.core import kv_cache_utils as utils
    from vllm.v1.kv_cache_interface import UniformTypeKVCacheSpecs

    if len({spec.page_size_bytes for spec in specs.values()}) > 1:
        uniform = UniformTypeKVCacheSpecs.from_specs(specs)
        assert uniform is not None
        groups = utils._get_kv_cache_groups_uniform_type(uniform)
    else:
        groups = utils._get_kv_cache_groups_uniform_spec(specs)
    worker = utils.get_kv_cache_config_from_groups(vllm_config, groups, 1 << 30)
    scheduler = utils.generate_scheduler_kv_cache_config([worker])
    block = next(iter(specs.values())).block_size

    def seen(config: Any) -> CacheLayout:
        return geometry.cache_layout(
            config, hash_tokens=block, align_tokens=block, world_size=ranks, chunk_tokens=None
        )

    return seen(scheduler), seen(worker)


@pytest.fixture(params=["LBNHC", "BLHNC"])
def vllm_config(request: pytest.FixtureRequest, tmp_path: Path) -> Any:
    """With layers, or blocks, outermost."""
    config = make_config(tmp_path / "m")
    config.cache_config.kv_cache_layout = request.param
    return config


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("model", MODELS)
def test_both_roles_see_one_layout(vllm_config: Any, model: str, ranks: int) -> None:
    specs = MODELS[model]
    scheduler, worker = layouts(vllm_config, specs, ranks)
    assert scheduler == worker
    (group,) = worker.groups
    assert group.kind is GroupKind.FULL
    assert group.block_bytes == sum(spec.page_size_bytes for spec in specs.values())


def test_they_are_not_compared_by_value(vllm_config: Any) -> None:
    """verify_sample takes a chunk for pages of one size and type."""
    from vllm.v1.core import kv_cache_utils as utils
    from vllm.v1.kv_cache_interface import UniformTypeKVCacheSpecs

    specs = MODELS["a drafter with more heads"]
    groups = utils._get_kv_cache_groups_uniform_type(UniformTypeKVCacheSpecs.from_specs(specs))
    worker = utils.get_kv_cache_config_from_groups(vllm_config, groups, 1 << 30)
    config = utils.generate_scheduler_kv_cache_config([worker])
    layout = geometry.cache_layout(
        config, hash_tokens=16, align_tokens=16, world_size=1, chunk_tokens=None
    )
    assert "different sizes" in str(geometry.page_formats(config, layout))


def test_pages_of_vllm_before_0_30() -> None:
    tensors = [
        SimpleNamespace(size=64 * 100, shared_by=["a"], block_stride=0),
        SimpleNamespace(size=64 * 300, shared_by=["b"], block_stride=0),
    ]
    config = SimpleNamespace(kv_cache_tensors=tensors, num_blocks=64)
    assert geometry.compat.layer_page_bytes(config) == {"a": 100, "b": 300}
    tensors[1].block_stride = 400  # packed: a page's size is not told
    group = SimpleNamespace(
        layer_names=["a", "b"], kv_cache_spec=SimpleNamespace(page_size_bytes=100)
    )
    pages = geometry.compat.layer_page_bytes(config)
    assert geometry.group_block_bytes(group, pages) == 200
