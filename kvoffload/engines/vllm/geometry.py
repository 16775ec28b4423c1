"""From vLLM's KVCacheConfig to our CacheLayout, and from registered tensors to block fragments.

Only ``compat`` and this module know the names of vLLM's spec classes; they are told apart by class
name along the MRO so that no vLLM import is needed and unknown new kinds are refused, not guessed.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from kvoffload.core.layout import Run, TensorSpec, block_runs, choose_blocks_per_chunk
from kvoffload.core.pages import PageFormat, ValueType
from kvoffload.engines.vllm import compat
from kvoffload.types import CacheLayout, GroupKind, GroupLayout

_FULL = {"FullAttentionSpec"}
_SLIDING = {"SlidingWindowSpec"}
# Subclasses of the above whose pages cannot be served by a plain prefix store.
_NOT_SERVED = {
    "RSWASpec",
    "HiddenStateCacheSpec",
    "SinkFullAttentionSpec",
    "CircularBufferSpec",
    "ChunkedLocalAttentionSpec",
    "MambaSpec",
    "CrossAttentionSpec",
    "EncoderOnlyAttentionSpec",
    "HiSparseHotSpec",
    "HiSparseResidentSpec",
}


@dataclass(frozen=True, slots=True)
class SpecFacts:
    """What we need to know of one group's KVCacheSpec."""

    kind: GroupKind
    block_tokens: int
    window: int
    replicated: bool  # every tensor-parallel rank holds the same bytes (MLA)
    name: str


def _leaf_specs(spec: Any) -> list[Any]:
    inner = getattr(spec, "kv_cache_specs", None)
    return list(inner.values()) if isinstance(inner, dict) else [spec]


def spec_facts(spec: Any) -> SpecFacts:
    """Classify a KVCacheSpec; UniformTypeKVCacheSpecs by its members, which must agree."""
    facts = {_one_spec(s) for s in _leaf_specs(spec)}
    if len(facts) == 1:
        return facts.pop()
    names = "+".join(sorted({f.name for f in facts}))
    kinds = {f.kind for f in facts}
    windows = {f.window for f in facts}
    if (
        len(kinds) == 1
        and GroupKind.NONE not in kinds
        and len({f.block_tokens for f in facts}) == 1
    ):
        first = next(iter(facts))
        return SpecFacts(
            first.kind, first.block_tokens, max(windows), all(f.replicated for f in facts), names
        )
    return SpecFacts(GroupKind.NONE, int(spec.block_size), 0, False, names)


def _one_spec(spec: Any) -> SpecFacts:
    names = {c.__name__ for c in type(spec).__mro__}
    name = type(spec).__name__
    block = int(spec.block_size)
    replicated = "MLAAttentionSpec" in names or "SlidingWindowMLASpec" in names
    if names & _NOT_SERVED or getattr(spec, "bounded_replay", False):
        return SpecFacts(GroupKind.NONE, block, 0, False, name)
    if getattr(spec, "non_causal", False):  # its KV depends on the tokens that follow, too
        return SpecFacts(GroupKind.NONE, block, 0, False, f"{name} (non-causal)")
    if names & _SLIDING:
        # The next token attends to the window-1 tokens before it.
        window = int(spec.sliding_window) - 1 + int(getattr(spec, "extra_retained_tokens", 0))
        return SpecFacts(GroupKind.SLIDING, block, window, replicated, name)
    if names & _FULL:
        return SpecFacts(GroupKind.FULL, block, 0, replicated, name)
    return SpecFacts(GroupKind.NONE, block, 0, False, name)


def uneven_pages(group: Any, pages: Mapping[str, int]) -> list[int] | None:
    """Page bytes of a group's layers in their order where they differ (a drafter with other heads,
    an indexer's cache beside the attention's), else None. ``pages``: compat.layer_page_bytes."""
    each = [pages.get(name, 0) for name in group.layer_names]
    return each if len(set(each)) > 1 else None


def group_block_bytes(group: Any, pages: Mapping[str, int]) -> int:
    """Bytes of one block of a KVCacheGroupSpec on one rank, all its layers, padding included."""
    uneven = uneven_pages(group, pages)
    if uneven is not None and all(uneven):
        return sum(uneven)
    spec = group.kv_cache_spec
    inner = getattr(spec, "kv_cache_specs", None)
    if isinstance(inner, dict):
        return sum(int(inner[name].page_size_bytes) for name in group.layer_names)
    return int(spec.page_size_bytes) * len(group.layer_names)


def group_facts(group: Any) -> SpecFacts:
    """Facts of a KVCacheGroupSpec; groups that vLLM keeps from external stores are of kind NONE."""
    facts = spec_facts(group.kv_cache_spec)
    if not getattr(group, "enable_kv_transfer", True) or getattr(group, "host_resident", False):
        return SpecFacts(GroupKind.NONE, facts.block_tokens, 0, False, facts.name + " (local only)")
    return facts


def cache_layout(
    kv_cache_config: Any,
    *,
    hash_tokens: int,
    align_tokens: int,
    world_size: int,
    chunk_tokens: int | None,
    vllm_config: Any = None,
) -> CacheLayout:
    """Layout of an engine; every group is of kind NONE where ``why_not_served`` says why.

    Raises ConfigError when ``chunk_tokens`` does not fit the blocks.
    """
    groups = kv_cache_config.kv_cache_groups
    facts = [group_facts(g) for g in groups]
    if why_not_served(kv_cache_config, vllm_config) is not None:
        # All or nothing: a group that cannot be served may also have a grid that no chunk fits.
        facts = [replace(f, kind=GroupKind.NONE) for f in facts]
        chunk_tokens = None
    replicated = bool(facts) and all(f.replicated for f in facts)
    shards = 1 if replicated else world_size
    layouts = []
    pages = compat.layer_page_bytes(kv_cache_config)
    for index, (group, fact) in enumerate(zip(groups, facts, strict=True)):
        block_bytes = group_block_bytes(group, pages)
        n = choose_blocks_per_chunk(
            block_bytes * shards, fact.block_tokens, fact.kind, chunk_tokens
        )
        layouts.append(
            GroupLayout(index, fact.kind, fact.block_tokens, n, block_bytes, shards, fact.window)
        )
    return CacheLayout(tuple(layouts), hash_tokens, align_tokens, world_size)


def why_not_served(kv_cache_config: Any, vllm_config: Any = None) -> str | None:
    """What of an engine we cannot serve: its first KV group of such a kind, or a model whose
    prefixes vLLM does not reuse either. None when all can be served."""
    if not kv_cache_config.kv_cache_groups:
        return "a model without KV"
    for group in kv_cache_config.kv_cache_groups:
        facts = group_facts(group)
        if facts.kind is GroupKind.NONE:
            return f"a model with a KV group of kind {facts.name}"
    refused = compat.why_not_reused(vllm_config) if vllm_config is not None else None
    return refused or compat.why_not_served(kv_cache_config)


def page_formats(kv_cache_config: Any, layout: CacheLayout) -> dict[int, PageFormat] | str:
    """What the pages of the full-attention groups hold, or the first reason why that cannot be
    compared by value."""
    out: dict[int, PageFormat] = {}
    pages = compat.layer_page_bytes(kv_cache_config)
    for g, group in zip(layout.groups, kv_cache_config.kv_cache_groups, strict=True):
        if g.kind is not GroupKind.FULL:
            continue
        if uneven_pages(group, pages) is not None:
            return "a KV group whose layers have pages of different sizes"
        specs = _leaf_specs(group.kv_cache_spec)
        dtypes = {str(getattr(s, "dtype", None)).removeprefix("torch.") for s in specs}
        packed = any(getattr(s, "kv_quant_mode", 0) for s in specs)
        if packed or len(dtypes) != 1 or not dtypes <= {v.value for v in ValueType}:
            return f"KV of type {'+'.join(sorted(dtypes))}{' (quantised)' if packed else ''}"
        values = ValueType(dtypes.pop())
        layers = max(1, len(group.layer_names))
        whole = g.block_bytes % (layers * values.nbytes) == 0
        out[g.group] = PageFormat(values, g.block_bytes // layers if whole else g.block_bytes)
    return out if out else "no full-attention KV group"


def tensor_spec(tensor: Any) -> TensorSpec:
    """A registered KV tensor as plain integers."""
    return TensorSpec(
        tuple(tensor.shape), tuple(tensor.stride()), tensor.element_size(), tensor.data_ptr()
    )


def group_runs(group: Any, kv_caches: dict[str, Any], num_blocks: int) -> list[Run]:
    """Byte runs of one block of a group on this rank, its layers in the group's order."""
    return block_runs([tensor_spec(kv_caches[name]) for name in group.layer_names], num_blocks)
