"""The shadow check in the step harness: samples are right, a planted misplacement is caught."""

from __future__ import annotations

import logging
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kvoffload.core.shadow import MAX_CHUNKS
from kvoffload.types import Tier
from tests.support.steps import MiniEngine, Options, tokens
from tests.support.steps_blocks import GroupSpec
from tests.support.steps_random import drive

HYBRID = (GroupSpec(), GroupSpec(window=9))
ALL = Options(verify=1.0)
ENGINES = {
    "one step": ALL,
    "two in flight": replace(ALL, in_flight=2, random_lag=3),
    "two ranks": replace(ALL, ranks=2, in_flight=2, late_ranks=False),
    "replicated KV": replace(ALL, ranks=2, replicated=True),
    "strided pages": replace(ALL, pad=64, layers=3, values="float32"),
    "small steps": replace(ALL, budget=8, values="float16"),
    "hybrid": replace(ALL, groups=HYBRID, blocks=128),
    "drafts": replace(ALL, spec_tokens=2, eagle=True, in_flight=2),
    "real threads": replace(ALL, in_flight=2, store_lag=-1, load_lag=-1),
}


def counts(engine: MiniEngine) -> tuple[int, int, int, int]:
    c = engine.manager.counters
    return c.verify_sampled, c.verify_ok, c.verify_mismatch, c.verify_given_up


def swap(engine: MiniEngine, one: int, other: int) -> None:
    """Two chunks in each other's slots, each with the checksum of what it holds now."""
    index, arena = engine.manager._pool.index, engine.arena
    entries = [
        e for i in (one, other) for e in index if e.chunk == i and e.group == 0 and not e.twin
    ]
    assert len(entries) == 2, "one prompt is held"
    views = [np.frombuffer(arena.view(e.ref.offset, e.nbytes), np.uint8) for e in entries]
    held = [v.copy() for v in views]
    for view, entry, data in zip(views, entries, reversed(held), strict=True):
        view[:] = data
        arena.hash_leaves(entry.ref.offset, entry.nbytes, entry.key)
    engine.expect_bad = True


@pytest.mark.parametrize("options", ENGINES.values(), ids=ENGINES.keys())
def test_a_sample_is_computed_and_compares_equal(options: Options) -> None:
    engine = MiniEngine(options)
    prompt = tokens(44)
    first = engine.ask(prompt, 3)
    stored = engine.manager.counters.stored
    engine.forget_hbm()
    again = engine.ask(prompt, 3)
    assert again.loads == 0 and engine.computed(again) >= 44
    sampled, ok, mismatch, given_up = counts(engine)
    assert sampled == ok >= 4 and not mismatch and not given_up
    assert again.chain.tokens == first.chain.tokens
    assert engine.manager.counters.stored == stored, "a twin is no store"
    engine.finish()


def test_samples_are_bounded_and_spread() -> None:
    engine = MiniEngine(replace(ALL, blocks=128, arena_bytes=8 << 20))
    prompt = tokens(200)
    engine.ask(prompt)
    engine.forget_hbm()
    engine.ask(prompt)
    assert counts(engine) == (MAX_CHUNKS, MAX_CHUNKS, 0, 0)
    engine.finish()


def test_a_share_is_a_share() -> None:
    engine = MiniEngine(replace(ALL, verify=0.5))
    engine.ask(tokens(40))
    loads = 0
    for _ in range(20):
        engine.forget_hbm()
        loads += engine.ask(tokens(40)).loads
    assert 4 <= loads <= 16
    engine.finish()


@pytest.mark.parametrize("values", ["float32", "float16", "bfloat16"])
def test_right_bytes_in_the_wrong_place(values: str, caplog: pytest.LogCaptureFixture) -> None:
    engine = MiniEngine(replace(ALL, values=values, in_flight=2))
    prompt = tokens(44)
    engine.ask(prompt)
    swap(engine, 1, 3)
    engine.forget_hbm()
    with caplog.at_level(logging.ERROR, "vllm.kvoffload"):
        engine.ask(prompt)
    assert counts(engine)[2] >= 1
    said = [r.getMessage() for r in caplog.records if "WRONG KV" in r.getMessage()]
    assert said and "tier dram" in said[0] and "KV group 0, tokens 8 to 16" in said[0]
    assert engine.exported()["c"]["kvoffload_failures_total|verify"] >= 1
    # Quarantined: nothing from it, nothing into it.
    assert engine.manager.occupancy().slots_used == 0
    for other in (prompt, tokens(40, 7)):
        for _ in range(2):
            engine.forget_hbm()
            request = engine.ask(other)
            assert request.loads == 0
    assert engine.manager.occupancy().slots_used == 0
    engine.finish()


def test_without_samples_the_misplacement_reaches_hbm() -> None:
    """What the check is for: every checksum is right, and the forward sees foreign bytes."""
    engine = MiniEngine()
    engine.ask(tokens(44))
    swap(engine, 1, 3)
    engine.forget_hbm()
    with pytest.raises(AssertionError, match="foreign bytes"):
        engine.ask(tokens(44))
    engine.close()


def test_a_load_under_way_fails_when_its_tier_is_quarantined() -> None:
    engine = MiniEngine(Options(in_flight=2, load_lag=8))
    engine.expect_bad = True
    engine.ask(tokens(40))
    engine.forget_hbm()
    request = engine.add(tokens(40), 2)
    engine.until_loading(request)
    engine.manager.quarantine(Tier.DRAM)
    engine.run()
    assert request.is_finished() and engine.computed(request) >= 40 and engine.bad_chunks
    engine.finish()


def nvme_engine(folder: Path, options: Options) -> MiniEngine:
    """A second life: all that it finds is on NVMe."""
    first = MiniEngine(replace(options, nvme=str(folder), verify=0.0))
    first.ask(tokens(44))
    first.finish()
    return MiniEngine(replace(options, nvme=str(folder)))


def rest(engine: MiniEngine) -> None:
    for _ in range(100):
        engine._tick()
        if not engine.manager.shadow._pairs:
            return
        time.sleep(0.01)
    raise AssertionError("samples do not end")


def test_samples_of_nvme_are_read_up(tmp_path: Path) -> None:
    engine = nvme_engine(tmp_path, ALL)
    assert engine.ask(tokens(44)).loads == 0
    rest(engine)
    sampled, ok, mismatch, given_up = counts(engine)
    assert sampled == ok >= 4 and not mismatch and not given_up
    engine.finish()


def test_wrong_chunks_on_nvme_cost_only_nvme(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    engine = nvme_engine(tmp_path, replace(ALL, verify=0.0))
    assert engine.ask(tokens(44)).loads == 1  # brings the chunks up: what NVMe gave is in DRAM
    swap(engine, 1, 3)
    engine.ask(tokens(40, 5))
    shadow = MiniEngineShadow(engine)
    engine.forget_hbm()
    with caplog.at_level(logging.ERROR, "vllm.kvoffload"):
        engine.ask(tokens(44))
        rest(engine)
    assert any("tier nvme" in r.getMessage() for r in caplog.records)
    shadow.off()
    engine.forget_hbm()
    assert engine.ask(tokens(40, 5)).loads == 1, "what was stored by this engine still serves"
    engine.forget_hbm()
    engine._rest()  # what was being written then may still return
    written = engine.manager.counters.nvme_written
    engine.ask(tokens(40, 9))
    engine.settle()
    assert engine.manager.counters.nvme_written == written, "nothing goes to NVMe any more"
    engine.finish()


class MiniEngineShadow:
    """Switches sampling on and off in a running engine."""

    def __init__(self, engine: MiniEngine) -> None:
        from kvoffload.engines.vllm.shadow import ShadowCheck

        half = engine.scheduler_half
        self._half: Any = half
        half._shadow = half._lookups._shadow = ShadowCheck(
            1.0, engine._formats(), engine.manager, engine.arena, half.metrics
        )

    def off(self) -> None:
        self._half._lookups._shadow = None


@pytest.mark.parametrize("steps", range(5))
def test_aborted_samples_are_given_up(steps: int) -> None:
    engine = MiniEngine(replace(ALL, budget=8, in_flight=2, store_lag=2))
    engine.ask(tokens(44))
    engine.forget_hbm()
    request = engine.add(tokens(44), 4)
    for _ in range(steps):
        engine.step()
    engine.abort(request)
    engine.finish()
    sampled, ok, mismatch, given_up = counts(engine)
    assert sampled == ok + given_up and not mismatch


@pytest.mark.parametrize("what", ["reset", "weights", "time", "corrupt"])
def test_what_changes_meanwhile_is_no_verdict(what: str) -> None:
    engine = MiniEngine(replace(ALL, in_flight=1, store_lag=10_000))
    prompt = tokens(44)
    engine.ask(prompt[:1])
    engine.options = replace(engine.options, store_lag=0)
    engine.ask(prompt)
    engine.options = replace(engine.options, store_lag=10_000)
    engine.forget_hbm()
    request = engine.add(prompt, 2)
    engine.until(lambda: request.is_finished())
    assert counts(engine)[0] and counts(engine)[1:] == (0, 0, 0)
    if what == "reset":
        engine.reset(connector=True)
    elif what == "weights":
        swap(engine, 1, 3)  # stands for twins of the new weights
        engine.change_weights()
    elif what == "time":
        engine.clock.now += 61.0
    else:
        engine.expect_bad = True
        entry = next(e for e in engine.manager._pool.index if e.chunk == 2 and not e.twin)
        np.frombuffer(engine.arena.view(entry.ref.offset, 1), np.uint8)[0] ^= 1
    for lazy in engine.engines:
        lazy.flush()
    engine.manager.poll()
    engine._tick()  # before the scheduler half has seen the weights change
    if what == "weights":
        engine.reset(connector=False, running=True)
    engine.options = replace(engine.options, store_lag=0)
    engine.finish()
    sampled, ok, mismatch, given_up = counts(engine)
    assert not mismatch and sampled == ok + given_up
    assert given_up == (1 if what == "corrupt" else sampled)


@pytest.mark.parametrize("seed", range(6))
def test_random_lives(seed: int) -> None:
    rng = np.random.default_rng(seed)
    script = [(int(a), int(b)) for a, b in rng.integers(0, (100, 4096), (50, 2))]
    groups = HYBRID if seed % 2 else (GroupSpec(),)
    options = Options(
        verify=0.7, groups=groups, blocks=40 * len(groups), random_lag=3, in_flight=2, seed=seed
    )
    engine = drive(options, script, nvme=seed % 3 == 0)
    assert counts(engine)[2] == 0
