"""Who waits for a store, and what happens where the two roles do not see the same slots."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from kvoffload.engines.vllm import attach
from kvoffload.types import CacheLayout
from tests.support import steps
from tests.support.steps import MiniEngine, Options, tokens


@pytest.mark.parametrize("alone", [True, False])
def test_who_only_reads_a_prefix_waits_for_no_store(alone: bool) -> None:
    """Waiting costs the step, and after FENCE_MS the store of the shared prefix would be given up.

    Beside another connector nobody can tell a prefix hit from blocks that the other one loads.
    """
    engine = MiniEngine(Options(in_flight=2, store_lag=50))
    engine.scheduler_half._alone = alone
    first = engine.add(tokens(24), 30)
    engine.until(lambda: first.num_output_tokens > 1)
    assert engine.manager.store_inflight() > 0
    fences: list[list[int]] = []
    build = engine.scheduler_half.build_connector_meta

    def spy(output: Any) -> Any:
        orders = build(output)
        if output.scheduled_new_reqs:
            fences.append(list(orders.fence))
        return orders

    engine.scheduler_half.build_connector_meta = spy  # type: ignore[method-assign]
    second = engine.add([*tokens(24), 7, 8, 9], 1)
    engine.until(second.is_finished)
    assert fences == [[]] if alone else fences[0]
    engine.run()
    engine.settle()


@pytest.mark.parametrize("factor", [2 / 3, 4 / 3])
def test_roles_that_see_other_slots_do_without_the_cache(
    factor: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A slot too small would let one chunk's store run over its neighbour."""
    options = Options(token_bytes=4096, layers=3, arena_bytes=8 << 20)
    real = steps.cache_layout(options)
    groups = tuple(replace(g, block_bytes=int(g.block_bytes * factor)) for g in real.groups)
    other = CacheLayout(groups, real.hash_tokens, real.align_tokens, real.world_size)
    monkeypatch.setattr(steps, "cache_layout", lambda options: other)
    rank = MiniEngine._rank

    def with_own_layout(self: MiniEngine, number: int) -> Any:
        made = rank(self, number)
        made.half.layout = real
        return made

    monkeypatch.setattr(MiniEngine, "_rank", with_own_layout)
    monkeypatch.setattr(attach, "ATTACH_S", 0.0)  # an idle engine steps no longer for it
    engine = MiniEngine(options)
    for seed in (0, 1, 0, 1):
        engine.ask(tokens(40, seed), 2)
        engine.forget_hbm()
    assert engine.stores_done() == 0 and engine.scheduler.failed_loads == 0
    assert "this rank" in engine.ranks[0].half._attach_failed
