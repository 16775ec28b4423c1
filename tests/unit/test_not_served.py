"""A model with a KV group we cannot serve (Mamba, ...): the engine starts, nothing is offered."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from kvoffload import _core
from kvoffload.core.hashchain import Chain
from kvoffload.core.manager import Manager
from kvoffload.core.sizes import slots_needed
from kvoffload.engines.vllm import geometry
from kvoffload.types import CacheLayout, GroupKind


class FullAttentionSpec:
    """vLLM's specs are told apart by class name."""

    block_size = 128
    page_size_bytes = 65536


class MambaSpec:
    """Without its cache mode "align", vLLM hashes such a model in blocks of the longest prompt."""

    block_size = 4096
    page_size_bytes = 65536


def _layout(*specs: Any, chunk_tokens: int | None = None) -> tuple[CacheLayout, str | None]:
    groups = [SimpleNamespace(kv_cache_spec=s, layer_names=["a", "b"]) for s in specs]
    config = SimpleNamespace(kv_cache_groups=groups)
    layout = geometry.cache_layout(
        config, hash_tokens=4096, align_tokens=4096, world_size=2, chunk_tokens=chunk_tokens
    )
    return layout, geometry.why_not_served(config)


@pytest.mark.parametrize(
    "specs",
    [(MambaSpec(), FullAttentionSpec()), (FullAttentionSpec(), MambaSpec()), (MambaSpec(),)],
    ids=["mamba first", "mamba last", "mamba only"],
)
@pytest.mark.parametrize("chunk_tokens", [None, 256])
def test_every_group_is_none(specs: tuple[Any, ...], chunk_tokens: int | None) -> None:
    layout, why = _layout(*specs, chunk_tokens=chunk_tokens)
    assert why == "a model with a KV group of kind MambaSpec"
    assert {g.kind for g in layout.groups} == {GroupKind.NONE}


@pytest.mark.parametrize("data_bytes", [4 << 20, 5 << 20])
def test_a_manager_of_nothing(data_bytes: int) -> None:
    layout, _ = _layout(MambaSpec(), FullAttentionSpec())
    arena = _core.Arena.create(data_bytes, slots_needed(layout, data_bytes), 2)
    manager = Manager(layout, arena, None)
    chain = Chain(b"n" * 16, b"", layout)
    chain.extend([bytes([i]) * 32 for i in range(4)])
    assert manager.plan(chain, 0, 4 * 4096).end == 0
    assert not manager.begin_store(chain, 0, 4 * 4096, lambda group, chunk: True)
    manager.tick(busy=False)
    manager.check()
    assert manager.occupancy().slots_used == 0
    manager.close()


def test_kv_that_depends_on_what_follows_is_not_served() -> None:
    class PrefixLM(FullAttentionSpec):
        non_causal = True

    PrefixLM.__name__ = "FullAttentionSpec"
    layout, why = _layout(PrefixLM())
    assert why is not None and "non-causal" in why
    assert {g.kind for g in layout.groups} == {GroupKind.NONE}


@pytest.mark.parametrize(
    ("model", "caching", "invariant", "served"),
    [
        ({}, True, "0", True),
        ({}, False, "0", True),  # the user's wish
        ({"is_prefix_caching_supported": True}, False, "0", True),
        ({"is_prefix_caching_supported": False}, True, "0", False),
        ({"is_prefix_caching_supported": False}, False, "0", False),
        ({"use_mla": True}, True, "0", True),
        ({"use_mla": True}, False, "0", False),
        ({}, True, "1", True),
        ({}, False, "1", False),
    ],
)
def test_a_model_whose_prefixes_vllm_does_not_reuse(
    model: dict[str, bool],
    caching: bool,
    invariant: str,
    served: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Mean pooling, say, wants the whole prompt: after a hit vLLM's pooler raises in the worker."""
    monkeypatch.setenv("VLLM_BATCH_INVARIANT", invariant)
    monkeypatch.setattr(geometry.compat, "_device_type", lambda: "cpu")
    config = SimpleNamespace(
        kv_cache_groups=[SimpleNamespace(kv_cache_spec=FullAttentionSpec(), layer_names=["a"])]
    )
    vllm_config = SimpleNamespace(
        model_config=SimpleNamespace(**model),
        cache_config=SimpleNamespace(enable_prefix_caching=caching),
    )
    layout = geometry.cache_layout(
        config,
        hash_tokens=128,
        align_tokens=128,
        world_size=1,
        chunk_tokens=None,
        vllm_config=vllm_config,
    )
    assert (geometry.why_not_served(config, vllm_config) is None) == served
    assert (layout.groups[0].kind is not GroupKind.NONE) == served
