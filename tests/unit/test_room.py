"""The arena an engine makes: the default where memory is short, and what is then served."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from kvoffload.config import Config
from kvoffload.core.sizes import holds_one_each, slots_needed
from kvoffload.engines.vllm import build
from kvoffload.engines.vllm import room as room_module
from kvoffload.engines.vllm.room import IDLE_BYTES, room_for
from kvoffload.errors import ConfigError
from kvoffload.memory import HostMemory
from kvoffload.types import CacheLayout, GroupKind, GroupLayout
from tests.support.steps_setup import FakeNamespaces
from tests.support.steps_types import StepOutput

MIB = 1 << 20


def layout(*slots: int) -> CacheLayout:
    """Groups with chunks of so many MiB."""
    groups = tuple(GroupLayout(i, GroupKind.FULL, 16, 1, n * MIB, 1) for i, n in enumerate(slots))
    return CacheLayout(groups, 16, 16, 1)


def available(monkeypatch: pytest.MonkeyPatch, nbytes: int) -> None:
    memory = HostMemory(1 << 40, nbytes)
    monkeypatch.setattr("kvoffload.config.host_memory", lambda: memory)


@pytest.mark.parametrize(
    ("slots", "least"),
    [
        ((1,), 2),  # what an arena is made of
        ((5,), 8),
        ((5, 5), 16),  # two slots of one size
        ((4, 8), 16),  # an extent for each size
    ],
)
def test_a_chunk_of_each_group_is_what_it_takes(slots: tuple[int, ...], least: int) -> None:
    whole = layout(*slots)
    for mib in range(2, 40, 2):
        assert holds_one_each(whole, mib * MIB) == (mib >= least), mib
    assert not holds_one_each(whole, 0)


def test_a_default_that_is_too_small_serves_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    lines: list[str] = []
    monkeypatch.setattr(room_module.logger, "warning", lambda text, *a: lines.append(text % a))
    whole = layout(4, 8)
    for free, engines, serves in ((0, 1, False), (60, 1, False), (64, 1, True), (64, 2, False)):
        available(monkeypatch, free * MIB)
        lines.clear()
        room = room_for(whole, Config(), engines, None)
        assert room.serve == serves
        if serves:
            assert (room.layout, room.data_bytes, lines) == (whole, free * MIB // 4, [])
            assert room.slots == slots_needed(whole, room.data_bytes)
        else:
            assert len(lines) == 1 and "\n" not in lines[0]
            assert "(12.0 MiB): 0 hits" in lines[0] and "set dram_gib" in lines[0]
            assert {g.kind for g in room.layout.groups} == {GroupKind.NONE}
            assert (room.data_bytes, room.slots) == (IDLE_BYTES, 1)


def test_tiny_chunks_need_an_arena_too(monkeypatch: pytest.MonkeyPatch) -> None:
    available(monkeypatch, 4 * MIB)
    tiny = CacheLayout((GroupLayout(0, GroupKind.FULL, 16, 1, 16384, 1),), 16, 16, 1)
    assert not room_for(tiny, Config(), 1, None).serve
    available(monkeypatch, 8 * MIB)
    assert room_for(tiny, Config(), 1, None).serve


def test_what_was_asked_for_and_is_too_small_is_an_error() -> None:
    with pytest.raises(ConfigError, match="dram_gib"):
        room_for(layout(8), Config(dram_gib=0.002), 1, None)


def test_an_engine_without_memory_for_a_cache_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    """As vLLM builds the scheduler's half, the model being loaded: it must not raise, and steps on
    without telling ranks of an arena that has no slots for them."""
    available(monkeypatch, 100 * MIB)
    monkeypatch.setattr(build.plugin, "check_supported", lambda config: None)
    monkeypatch.setattr(build, "engine_layout", lambda *a: layout(64, 32))
    monkeypatch.setattr(build.geometry, "why_not_served", lambda *a: None)
    monkeypatch.setattr(build, "NamespaceSource", lambda *a: Names())
    monkeypatch.setattr(build.compat, "drops_last_block", lambda config: False)
    config: Any = SimpleNamespace(
        kv_transfer_config=SimpleNamespace(kv_connector_extra_config={"why_requests": 0}),
        model_config=SimpleNamespace(model="m", served_model_name=None),
        cache_config=SimpleNamespace(enable_prefix_caching=True),
        parallel_config=SimpleNamespace(data_parallel_size_local=1),
    )
    side = build.scheduler_side(config, None)
    try:
        assert side.arena.data_bytes == IDLE_BYTES
        assert side.half.build_connector_meta(StepOutput(1)).arena is None
        assert not side.half.has_pending_push_work()
        side.half.check()
    finally:
        side.shutdown(0.0)
    assert not side.half.guard.errors


class Names(FakeNamespaces):
    def close(self) -> None:
        pass
