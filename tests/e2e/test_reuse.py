"""One engine, full attention, DRAM tier: every way a prefix can come back, right each time.

Oracle: logprobs in fp32 with the KV-sensitive model; a foreign block in one layer gives >= 0.28.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

from tests.e2e.prompts import causes, connector, prompt, total, until
from tests.support import models
from tests.support.engine import EngineLife, Output, assert_same

pytestmark = pytest.mark.e2e

ASK = {"max_tokens": 8, "logprobs": 1}


@pytest.fixture(scope="module")
def life() -> Iterator[EngineLife]:
    args = {"max_num_batched_tokens": 1024, "max_model_len": 8192}
    with EngineLife(models.llama(), connector(), args) as engine:
        yield engine


@pytest.fixture(autouse=True)
def fresh(life: EngineLife) -> None:
    assert life.reset_prefix_cache(reset_connector=True)


def ask(life: EngineLife, tokens: list[int], **options: object) -> Output:
    return life.generate([tokens], **(ASK | options))[0]  # type: ignore[arg-type]


def test_full_prompt_hit(life: EngineLife) -> None:
    tokens = prompt(1, 2048)  # block aligned; chunked prefill in two steps
    cold = ask(life, tokens)
    assert cold.num_cached_tokens == 0
    assert life.reset_prefix_cache()
    warm = ask(life, tokens)
    assert warm.num_cached_tokens == 2048
    assert_same(cold, warm)


def test_unaligned_prompt_keeps_its_whole_chunks(life: EngineLife) -> None:
    tokens = prompt(2, 2048 + 57)
    cold = ask(life, tokens)
    assert life.reset_prefix_cache()
    warm = ask(life, tokens)
    assert warm.num_cached_tokens == 2048
    assert_same(cold, warm)


def test_hbm_hit_that_ends_inside_a_chunk(life: EngineLife) -> None:
    tokens = prompt(3, 1024)
    cold = ask(life, tokens)
    assert life.reset_prefix_cache()
    # One block (128) in HBM: half a chunk (256), too short for a chunk of its own.
    ask(life, tokens[:140], max_tokens=1)
    before = life.metrics()
    warm = ask(life, tokens)
    after = life.metrics()
    assert warm.num_cached_tokens == 1024
    loaded = total(after, "kvoffload_hit_tokens_total") - total(
        before, "kvoffload_hit_tokens_total"
    )
    assert loaded == 1024 - 128
    assert_same(cold, warm)


def test_generated_tokens_hit_in_the_next_turn(life: EngineLife) -> None:
    tokens = prompt(4, 700)
    first = ask(life, tokens, max_tokens=400)
    turn = tokens + first.token_ids + prompt(5, 100)
    assert life.reset_prefix_cache()
    warm = ask(life, turn)
    assert warm.num_cached_tokens is not None and warm.num_cached_tokens >= 1024
    assert life.reset_prefix_cache(reset_connector=True)
    assert_same(ask(life, turn), warm)


def test_requests_together_share_a_prefix(life: EngineLife) -> None:
    shared = prompt(6, 1536)
    prompts = [shared + prompt(100 + i, 200) for i in range(8)]
    cold = [ask(life, p) for p in prompts]
    assert life.reset_prefix_cache()
    warm = life.generate(prompts, max_tokens=8, logprobs=1)
    for a, b in zip(cold, warm, strict=True):
        assert b.num_cached_tokens is not None and b.num_cached_tokens >= 1536
        assert_same(a, b)


def test_prompt_logprobs_are_computed(life: EngineLife) -> None:
    tokens = prompt(7, 600)
    cold = ask(life, tokens)
    assert life.reset_prefix_cache()
    full = ask(life, tokens, prompt_logprobs=1)
    assert full.num_cached_tokens == 0
    assert_same(cold, full)


def test_salts_are_kept_apart(life: EngineLife) -> None:
    tokens = prompt(8, 1024)
    ask(life, tokens, cache_salt="a")
    assert life.reset_prefix_cache()
    assert ask(life, tokens, cache_salt="b").num_cached_tokens == 0
    assert ask(life, tokens).num_cached_tokens == 0
    assert life.reset_prefix_cache()
    assert ask(life, tokens, cache_salt="a").num_cached_tokens == 1024


def test_reset_with_connector_hides_everything(life: EngineLife) -> None:
    tokens = prompt(9, 1024)
    ask(life, tokens)
    assert life.reset_prefix_cache(reset_connector=True)
    assert ask(life, tokens).num_cached_tokens == 0


def test_aborts_at_any_moment_leave_nothing_behind(life: EngineLife) -> None:
    prompts = [prompt(20 + i, 2048) for i in range(4)]
    cold = [ask(life, p) for p in prompts]
    for round_ in range(3):
        assert life.reset_prefix_cache()
        pending = [life.submit(p, max_tokens=64) for p in prompts]
        if round_:
            pending[0].wait_tokens(1)
        with ThreadPoolExecutor(4) as pool:
            list(pool.map(lambda p: p.abort(), pending))
        for p in pending:
            assert p.result().finish_reason in ("abort", "length")
    assert life.reset_prefix_cache()
    for tokens, a in zip(prompts, cold, strict=True):
        b = ask(life, tokens)
        assert b.num_cached_tokens == 2048
        assert_same(a, b)
    assert total(life.metrics(), "kvoffload_failed_loads_total") == 0


def test_metrics_tell_what_happened(life: EngineLife) -> None:
    before = life.metrics()
    tokens = prompt(30, 1024)
    ask(life, tokens)
    assert life.reset_prefix_cache()
    ask(life, tokens)
    after = life.metrics()

    def grew(name: str, **labels: str) -> float:
        return total(after, name, **labels) - total(before, name, **labels)

    assert grew("kvoffload_hit_tokens_total", tier="dram") == 1024
    assert grew("kvoffload_miss_requests_total", reason="no_hit") == 1
    assert grew("kvoffload_bytes_total", tier="dram", direction="load") >= 4 << 20
    assert grew("kvoffload_bytes_total", tier="dram", direction="store") >= 4 << 20
    assert grew("kvoffload_load_seconds_count") == 1
    assert total(after, "kvoffload_dram_used_bytes") > 0
    # vLLM's own per-tier source of the hit: host memory.
    assert grew("vllm:prompt_tokens_cached_by_source_total", source="host") == 1024
    assert total(after, "kvoffload_failures_total") == 0


def test_why_tells_each_request(life: EngineLife, monkeypatch: pytest.MonkeyPatch) -> None:
    tokens = prompt(31, 1024 + 57)
    asked = {"never_stored": ask(life, tokens)}
    assert life.reset_prefix_cache()
    asked["salt"] = ask(life, tokens, cache_salt="another tenant")
    asked["below_floor"] = ask(life, tokens)  # the tail; the rest is loaded
    assert life.reset_prefix_cache(reset_connector=True)
    asked["reset"] = ask(life, tokens)

    def told() -> dict[str, str | None]:
        known = causes(life, monkeypatch)
        by_id = {out.request_id: cause for cause, out in asked.items()}
        return {by_id[r]: known[r][0] for r in known if r in by_id}

    assert until(lambda: len(told()) == 4), told()
    assert told() == {cause: cause for cause in asked}
    ask(life, tokens, max_tokens=1)  # metrics travel with steps
    for cause in asked:
        assert total(life.metrics(), "kvoffload_miss_cause_total", cause=cause) > 0
