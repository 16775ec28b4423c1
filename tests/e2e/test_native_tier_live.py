"""Our tier under vLLM's own OffloadingConnector: restart, damaged chunks, other weights.

Each life is a new engine on the same directory, in the order of the numbers. vLLM copies on GPUs
only: benchmarks/peers/native_on_cpu.py stands in for its copy worker, everything else is as shipped.
"""

from __future__ import annotations

import os
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.asks import ask
from tests.e2e.prompts import prompt, total, until
from tests.e2e.test_nvme import flip_everywhere
from tests.support import models
from tests.support.engine import ROOT, EngineError, EngineLife, Output, assert_same

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(900)]

TOKENS = 1024 + 30
PROMPTS = [prompt(300 + i, TOKENS) for i in range(3)]
CHUNKS = 3 * (TOKENS // 128)
ENV = {"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "benchmarks" / "peers")])}


def native(path: Path, **tier: Any) -> dict[str, Any]:
    ours = {
        "type": "KVOffloadTier",
        "module_path": "kvoffload.engines.vllm.native_tier",
        "nvme_path": str(path),
        "nvme_gib": 1,
        **tier,
    }
    return {
        "kv_connector": "OffloadingConnector",
        "kv_role": "kv_both",
        "engine_id": f"kvotest-{uuid.uuid4().hex[:12]}",
        "kv_connector_extra_config": {
            "cpu_bytes_to_use": 256 << 20,
            "spec_name": "NativeOnCpuSpec",
            "spec_module_path": "native_on_cpu",
            "secondary_tiers": [ours],
        },
    }


def life(path: Path, **model: Any) -> EngineLife:
    return EngineLife(models.llama(**model), native(path), env=dict(ENV))


def events(engine: EngineLife, name: str) -> float:
    """A tiny request first: an idle engine exports nothing."""
    engine.generate([prompt(999, 20)], max_tokens=1)
    return total(engine.metrics(), "kvoffload_tier_events_total", event=name)


@pytest.fixture(scope="module")
def plain() -> list[Output]:
    """Outputs without a connector."""
    with EngineLife(models.llama(), None, {"enable_prefix_caching": False}) as engine:
        return [ask(engine, p) for p in PROMPTS]


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("native") / "store"


@pytest.fixture(scope="module", autouse=True)
def no_leftovers() -> Iterator[None]:
    """vLLM's pool has a name in /dev/shm until its creator closes it."""
    yield
    for left in Path("/dev/shm").glob("vllm_offload_kvotest-*"):
        left.unlink(missing_ok=True)


def test_1_stores_everything(path: Path, plain: list[Output]) -> None:
    with life(path) as engine:
        for reference, tokens in zip(plain, PROMPTS, strict=True):
            assert_same(reference, ask(engine, tokens))
        assert until(lambda: events(engine, "nvme_written") >= CHUNKS), engine.metrics()

        # A reset as after a change of weights: nothing stored before is served again.
        assert engine.reset_prefix_cache(reset_connector=True)
        again = ask(engine, PROMPTS[0])
        assert_same(plain[0], again)
        assert not again.num_cached_tokens
        assert events(engine, "tier_errors") == 0


def test_2_restart_hits(path: Path, plain: list[Output]) -> None:
    with life(path) as engine:
        for reference, tokens in zip(plain, PROMPTS, strict=True):
            warm = ask(engine, tokens)
            assert_same(reference, warm)
            assert warm.num_cached_tokens == TOKENS // 128 * 128
        metrics = engine.metrics()
        assert total(metrics, "kvoffload_tier_events_total", event="nvme_read") == CHUNKS
        source = "vllm:prompt_tokens_cached_by_source_total"
        assert total(metrics, source, source="disk") == 3 * (TOKENS // 128 * 128)
        assert total(metrics, "kvoffload_tier_events_total", event="tier_errors") == 0


def test_3_damaged_chunks_are_recomputed(path: Path, plain: list[Output]) -> None:
    for segment in path.glob("w*/seg-*.kv"):
        flip_everywhere(segment)
    with life(path) as engine:
        for reference, tokens in zip(plain, PROMPTS, strict=True):
            out = ask(engine, tokens)
            assert_same(reference, out)
            assert (out.num_cached_tokens or 0) < TOKENS // 128 * 128
        assert events(engine, "nvme_corrupt") > 0
        # What was recomputed is stored again.
        assert until(lambda: events(engine, "nvme_written") > 0), engine.metrics()
    with life(path) as engine:
        warm = [ask(engine, tokens) for tokens in PROMPTS]
        for reference, out in zip(plain, warm, strict=True):
            assert_same(reference, out)
        assert [o.num_cached_tokens for o in warm] == [TOKENS // 128 * 128] * 3


def test_4_other_weights_are_a_miss(path: Path, plain: list[Output]) -> None:
    with life(path, seed=1) as engine:
        out = ask(engine, PROMPTS[0])
        assert not out.num_cached_tokens
        assert out.token_ids != plain[0].token_ids


@pytest.mark.parametrize(
    ("tier", "args", "line"),
    [
        ({"nvme_pth": "/x"}, {}, "unknown key 'nvme_pth' of the tier KVOffloadTier"),
        ({}, {"enable_lora": True}, "--enable-lora is not supported by KVOffloadTier"),
    ],
)
def test_5_refused_before_the_engine_starts(
    tmp_path: Path, tier: dict[str, Any], args: dict[str, Any], line: str
) -> None:
    refused = EngineLife(models.llama(), native(tmp_path, **tier), args, env=dict(ENV))
    with pytest.raises(EngineError, match=line):
        refused.start()
    refused.stop()
