"""compat: what older vLLM does not hand over, from what it does."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from kvoffload.engines.vllm import compat
from kvoffload.errors import UnsupportedError


def step(
    new: dict[str, list[int]] | None = None,
    more: dict[str, list[int] | None] | None = None,
    resumed: tuple[str, ...] = (),
    finished: tuple[str, ...] = (),
    preempted: tuple[str, ...] | None = None,
) -> Any:
    """A step's output as vLLM 0.26 makes it (one KV group)."""
    more = more or {}
    return SimpleNamespace(
        scheduled_new_reqs=[
            SimpleNamespace(req_id=r, block_ids=(ids,)) for r, ids in (new or {}).items()
        ],
        scheduled_cached_reqs=SimpleNamespace(
            req_ids=list(more),
            new_block_ids=[None if ids is None else (ids,) for ids in more.values()],
            resumed_req_ids=set(resumed),
        ),
        finished_req_ids=set(finished),
        preempted_req_ids=None if preempted is None else set(preempted),
        num_scheduled_tokens={},
    )


def test_block_tables_are_followed() -> None:
    bridge = compat.Bridge()
    given = [3, 4]
    first = bridge.step(step(new={"a": given, "b": [9]}))
    tables = first.kv_connector_block_state
    assert tables.get_block_ids("a") == ([3, 4],) and tables.get_block_ids("c") is None
    bridge.step(step(more={"a": [5], "b": None}))
    assert tables.get_block_ids("a") == ([3, 4, 5],) and tables.get_block_ids("b") == ([9],)
    assert given == [3, 4], "vLLM's own list was changed"
    bridge.step(step(preempted=("a",), finished=("b",)))
    assert tables.get_block_ids("a") is None and tables.get_block_ids("b") is None
    bridge.step(step(more={"a": [7, 8]}, resumed=("a",)))
    assert tables.get_block_ids("a") == ([7, 8],)
    bridge.step(step(finished=("a",), new={"a": [1]}))  # a request's id used anew
    assert tables.get_block_ids("a") == ([1],)


def test_the_step_itself_is_handed_through() -> None:
    output = step(new={"a": [1]})
    output.num_scheduled_tokens = {"a": 16}
    seen = compat.Bridge().step(output)
    assert seen.num_scheduled_tokens is output.num_scheduled_tokens
    assert seen.finished_req_ids == set() and not hasattr(output, "kv_connector_block_state")
    with pytest.raises(AttributeError):
        _ = seen.no_such_field
    modern = SimpleNamespace(kv_connector_block_state=None)
    assert compat.Bridge().step(modern) is modern


def test_answers_have_failed_requests() -> None:
    old = SimpleNamespace(finished_recving={"a"}, invalid_block_ids={4})
    seen = compat.Bridge.answers(old)
    assert seen.failed_recving is None and seen.finished_recving == {"a"}
    modern = SimpleNamespace(failed_recving={"a"})
    assert compat.Bridge.answers(modern) is modern


def test_a_failure_without_blocks_is_never_a_success() -> None:
    assert compat.Bridge.finished({"a"}, set()) == (None, {"a"})
    assert compat.Bridge.finished(set(), set()) == (None, None)
    with pytest.raises(UnsupportedError, match="'b'"):
        compat.Bridge.finished({"a", "b"}, {"b"})


def test_layer_names_in_both_words() -> None:
    assert compat.tensor_layers(SimpleNamespace(layers=["x"])) == ["x"]
    assert compat.tensor_layers(SimpleNamespace(shared_by=["y", "z"])) == ["y", "z"]


@pytest.mark.parametrize(
    ("version", "algo", "seed", "random"),
    [
        ((0, 26, 0), "sha256", None, True),
        ((0, 26, 0), "sha256", "0", False),
        ((0, 32, 0), "sha256", None, False),
        ((0, 32, 0), "xxhash", None, True),
        ((0, 32, 0), "xxhash_cbor", "random", True),
        ((0, 32, 0), "xxhash", "0", False),
    ],
)
def test_random_hash_seeds(
    version: tuple[int, ...],
    algo: str,
    seed: str | None,
    random: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(compat, "vllm_version", lambda: version)
    if seed is None:
        monkeypatch.delenv("PYTHONHASHSEED", raising=False)
    else:
        monkeypatch.setenv("PYTHONHASHSEED", seed)
    assert compat.hash_seed_is_random(algo) is random


def groups(*modes: str | None) -> Any:
    def mode(name: str | None) -> Any:
        return SimpleNamespace(name=name, is_per_token_head=name is not None)

    specs = [SimpleNamespace(kv_cache_spec=SimpleNamespace(kv_quant_mode=mode(m))) for m in modes]
    return SimpleNamespace(kv_cache_groups=specs)


def test_what_an_old_interface_cannot_serve(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compat, "vllm_version", lambda: (0, 26, 0))
    assert compat.why_not_served(groups(None)) is None
    assert "2 KV groups" in str(compat.why_not_served(groups(None, None)))
    assert "INT8" in str(compat.why_not_served(groups("INT8_PER_TOKEN_HEAD")))
    monkeypatch.setattr(compat, "vllm_version", lambda: (0, 32, 0))
    assert compat.why_not_served(groups("INT8_PER_TOKEN_HEAD", None)) is None


def test_an_empty_pool_is_seen_in_each_form() -> None:
    class Cache:
        def __init__(self, cached: dict[int, int]) -> None:
            self._cache = cached

    def pool(cached: Any) -> Any:
        return SimpleNamespace(cached_block_hash_to_block=cached)

    assert compat.block_pool_is_empty(pool({})) and compat.block_pool_is_empty(pool(Cache({})))
    assert not compat.block_pool_is_empty(pool({1: 1}))
    assert not compat.block_pool_is_empty(pool(Cache({1: 1})))
    assert not compat.block_pool_is_empty(None)
