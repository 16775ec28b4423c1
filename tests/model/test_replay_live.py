"""Replay gives what the connector gives: its recorded stream, replayed, hits the same tokens."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from kvoffload.replay.driver import Replay, Setup
from kvoffload.replay.trace import Trace
from tests.support.steps import MiniEngine, Options
from tests.support.steps_setup import MIB

SLOT = 16384  # the smallest slot: a chunk of 8 tokens is padded to it
CHUNK = 8


def prompts(seed: int, count: int) -> list[list[int]]:
    """Conversations that grow, fork and are forgotten; some prompts end with a chunk."""
    rng = random.Random(seed)
    seen: list[list[int]] = [[rng.randrange(1000) for _ in range(24)]]
    out = []
    for _ in range(count):
        # Old favourites come back: the order of eviction matters.
        old = rng.choice(seen[:8] if rng.random() < 0.4 else seen[-40:])
        kept = old[: rng.choice((len(old), len(old) // 2, 8, 0))]
        prompt = kept + [rng.randrange(1000) for _ in range(rng.choice((0, 3, 8, 16, 40)))]
        prompt = prompt[:120] or [1]
        seen.append(prompt)
        out.append(prompt)
    return out


def loaded_chunks(engine: MiniEngine) -> int:
    return engine.manager.counters.load_chunks_dram + engine.manager.counters.load_chunks_nvme


@pytest.mark.parametrize("nvme", [False, True], ids=["dram", "dram and nvme"])
@pytest.mark.parametrize("seed", [0, 1])
def test_a_recorded_stream_replays_to_the_same_hits(tmp_path: Path, seed: int, nvme: bool) -> None:
    path = tmp_path / "stream.jsonl"
    folder = tmp_path / "nvme"
    folder.mkdir(0o700)
    options = Options(
        arena_bytes=2 * MIB, blocks=96, record=str(path), nvme=str(folder) if nvme else None
    )
    engine = MiniEngine(options)
    slots = options.arena_bytes // SLOT
    asked = prompts(seed, 240)
    live = []
    for prompt in asked:
        engine.forget_hbm()  # what comes back can only come from a tier
        before = loaded_chunks(engine)
        engine.ask(prompt)
        live.append((loaded_chunks(engine) - before) * CHUNK)
        if nvme:
            assert engine.manager.drain(20.0)
    evicted = engine.manager.counters.evicted
    engine.finish()

    trace = Trace(path)
    assert trace.chunk_tokens == CHUNK
    replay = Replay(
        Setup(
            chunk_tokens=CHUNK,
            kv_bytes_per_token=SLOT // CHUNK,
            dram_chunks=slots,
            nvme_chunks=options.nvme_bytes // SLOT if nvme else 0,
            load="always",
            nvme_admission="all",  # as the harness's Manager has it
        )
    )
    replayed = []
    for request in trace:
        served = replay.serve(request)
        replayed.append(served.dram_tokens + served.nvme_tokens)
    replay.check()
    want = [min(n, len(p) - 1) for n, p in zip(live, asked, strict=True)]
    assert replayed == want
    assert sum(want) > 1000 and evicted > 100  # there was something to be the same about
    if not nvme:
        assert replay.counters.evicted == evicted
