"""The ledger and the curve, fed by both halves of the connector over real bytes."""

from __future__ import annotations

import random
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest

from kvoffload.core.prefill import PrefillWork
from kvoffload.metrics import split_series
from tests.support.steps import MiniEngine, Options, tokens

ACME = {"kvoffload": {"tenant": "acme"}}
MINE = "kvoffload_ledger_"


@pytest.fixture
def engine() -> Iterator[MiniEngine]:
    made = MiniEngine(Options(ranks=2, load_lag=3))
    made.scheduler_half._accounts._model = "tiny"
    yield made
    made.close()


def booked(engine: MiniEngine) -> dict[tuple[str, ...], float]:
    """Ledger counters since the last call: (name, model, tenant, ...) -> increase."""
    payload = engine.exported()
    out: dict[tuple[str, ...], float] = {}
    for series, value in payload["c"].items():
        name, labels = split_series(series)
        if name.startswith(MINE):
            out[(name.removeprefix(MINE), *labels)] = value
    return out


def test_a_load_is_booked_to_its_tenant(engine: MiniEngine) -> None:
    prompt = tokens(37)
    engine.ask(prompt, 1, params={"kvoffload": {"tenant": "writer"}})
    first = booked(engine)
    assert first["requests_total", "tiny", "writer"] == 1
    assert first["tokens_total", "tiny", "writer", "miss"] == 37
    assert first["lookup_seconds_total", "tiny", "writer"] > 0
    assert first["bytes_total", "tiny", "writer", "dram", "store"] > 0
    assert not any(key[0].startswith(("loads", "saved")) for key in first)

    engine.forget_hbm()
    for _ in range(8):  # a second per token: whatever the load takes, it saves
        engine.manager.observe_prefill(PrefillWork(100, 0.0), 100.0)
    again = engine.ask(prompt, 1, params=ACME)
    assert again.loads == 1
    second = booked(engine)
    assert {key[2] for key in second} == {"acme"}
    assert second["loads_total", "tiny", "acme", "dram"] == 1
    loaded = second["tokens_total", "tiny", "acme", "dram"]
    assert loaded == 32 and second["tokens_total", "tiny", "acme", "miss"] == 5
    slots = engine.layout.groups[0].slot_bytes * loaded / engine.layout.groups[0].chunk_tokens
    assert second["bytes_total", "tiny", "acme", "dram", "load"] == slots
    seconds = second["load_seconds_total", "tiny", "acme", "dram"]
    saved = second["saved_gpu_seconds_total", "tiny", "acme", "dram"]
    assert saved == pytest.approx(2 * (32.0 - seconds), rel=0.01)  # two ranks
    assert ("lookup_seconds_total", "tiny", "acme") not in second


def test_a_load_that_is_the_slower_way_is_a_loss(engine: MiniEngine) -> None:
    prompt = tokens(37)
    engine.ask(prompt)
    engine.forget_hbm()
    booked(engine)
    for _ in range(200):
        engine.manager.observe_prefill(PrefillWork(10**6, 0.0), 1e-6)
    engine.ask(prompt, params=ACME)  # the harness always loads
    second = booked(engine)
    assert second["lost_gpu_seconds_total", "tiny", "acme", "dram"] > 0
    assert not any(key[0].startswith("saved") for key in second)


def test_hbm_hits_are_booked_as_such(engine: MiniEngine) -> None:
    prompt = tokens(37)
    engine.ask(prompt)
    booked(engine)
    engine.ask(prompt, params=ACME)
    assert booked(engine)["tokens_total", "tiny", "acme", "hbm"] == 36


def test_the_curve_sees_prompts_and_generated_tokens(engine: MiniEngine) -> None:
    first = engine.ask(tokens(40), 20)
    turn = [*first.chain.tokens, *tokens(4)]
    engine.ask(turn)
    curve = engine.scheduler_half._accounts.curve
    payload = _gauges(engine)
    assert curve is not None and curve.tokens == 40 + len(turn)
    # All whole chunks (8 tokens) of the first turn, the generated ones among them.
    kept = (len(first.chain.tokens) - 1) // 8 * 8
    assert curve.hit_ratio(10**6) == pytest.approx(kept / (40 + len(turn)))
    assert payload["kvoffload_curve_hit_ratio|dram|1"] == pytest.approx(
        kept / (40 + len(turn)), abs=1e-3
    )
    assert payload["kvoffload_curve_tokens"] == curve.tokens
    assert not any("|nvme|" in series for series in payload)


def _gauges(engine: MiniEngine) -> dict[str, Any]:
    return dict(engine.exported()["g"])


def test_a_ledger_that_fails_costs_figures_and_no_request(
    engine: MiniEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*args: Any, **kwargs: Any) -> None:
        raise RuntimeError("broken books")

    ledger = engine.scheduler_half._accounts.ledger
    for name in ("begin", "asked", "load", "stored", "end", "take"):
        monkeypatch.setattr(ledger, name, broken)
    prompt = tokens(37)
    engine.ask(prompt)
    engine.forget_hbm()
    assert engine.ask(prompt).loads == 1
    assert _counts(engine)["kvoffload_failures_total|hook_loaded"] == 1


def _counts(engine: MiniEngine) -> dict[str, Any]:
    return dict(engine.exported()["c"])


def test_the_curve_at_its_own_size_is_what_the_tier_hits() -> None:
    """Documents in turn through an arena too small for them: expected hits are real hits."""
    rng = random.Random(5)
    made = MiniEngine(Options(blocks=256, budget=256, arena_bytes=4 << 20, token_bytes=512))
    documents = [[rng.randrange(1000) for _ in range(320)] for _ in range(10)]
    weights = [1 / (i + 1) for i in range(len(documents))]
    for document in rng.choices(documents, weights, k=80):
        made.ask(document + [rng.randrange(1000) for _ in range(10)], params=ACME)
        made.forget_hbm()
    payload = booked(made)
    hits = payload["tokens_total", "default", "acme", "dram"]
    real = hits / (hits + payload["tokens_total", "default", "acme", "miss"])
    curve = made.scheduler_half._accounts.curve
    assert curve is not None
    size = made.arena.data_bytes / made.layout.groups[0].slot_bytes
    assert len(documents) * 320 / 8 > 1.5 * size and 0.1 < real < 0.9
    assert curve.hit_ratio(size) == pytest.approx(real, abs=0.02)
    made.close()


def test_adapters_are_models_and_salts_are_tenants(engine: MiniEngine) -> None:
    """As vLLM's Request names them."""
    accounts = engine.scheduler_half._accounts
    lora = SimpleNamespace(lora_name="sql|adapter")
    for rid, adapter, salt in (("a", lora, None), ("b", None, "secret")):
        request = SimpleNamespace(
            request_id=rid, lora_request=adapter, cache_salt=salt, kv_transfer_params=None
        )
        accounts.arrived(request, None)
        accounts.ledger.asked(rid, 10, 0)
        accounts.ended(rid, None)
    got = {key[1:] for key in booked(engine) if key[0] == "requests_total"}
    assert ("sql_adapter", "default") in got and len(got) == 2
    (salted,) = (tenant for model, tenant in got if model == "tiny")
    assert salted.startswith("salt-")


@pytest.mark.parametrize(
    ("tenant", "name"),
    [
        ("acme", "acme"),
        ("x" * 256, "x" * 64),
        (None, "default"),
        ("x" * 257, "invalid"),
        ("", "invalid"),
        (7, "invalid"),
        (["a"], "invalid"),
    ],
)
def test_the_tenant_that_is_booked_is_the_hint_that_was_taken(
    engine: MiniEngine, tenant: object, name: str
) -> None:
    engine.ask(tokens(9), hints={"tenant": tenant})
    assert {key[2] for key in booked(engine)} == {name}


def test_an_orchestrators_tenant_counts(engine: MiniEngine) -> None:
    """vLLM's kv_hints: over a bad one of the client, and not undone by a bad one."""
    half = engine.scheduler_half
    for theirs, ours, name in ((7, "acme", "acme"), ("acme", 7, "acme"), (None, 7, "invalid")):
        request = engine.add(tokens(9))
        request.kv_transfer_params = {"kvoffload": {"tenant": theirs}}
        action = SimpleNamespace(action_type="kvoffload", payload={"tenant": ours})
        request.kv_hints = SimpleNamespace(actions=[action])
        half._states.clear()  # as if it had just arrived with them
        half._accounts.ledger._open.clear()
        half.on_new_request(request)
        engine.run()
        assert {key[2] for key in booked(engine)} == {name}, (theirs, ours)
