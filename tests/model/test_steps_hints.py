"""Hints through both halves of the connector, over real bytes: what a client asks for happens."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from kvoffload.core.holds import Hold, Holds
from kvoffload.core.index import Kept
from kvoffload.core.planner import Plan
from kvoffload.engines.vllm.hints import MAX_SESSIONS
from kvoffload.types import ChunkKey, Decision
from tests.support.steps import MiniEngine, Options, tokens
from tests.support.steps_blocks import GroupSpec

# Chunks of 8 tokens; slots so big that the arena holds 32 of them.
SMALL = Options(token_bytes=4096, layers=2, blocks=128)
# Two extents, one for each group.
HYBRID = replace(SMALL, groups=(GroupSpec(), GroupSpec(window=9)), blocks=256, arena_bytes=8 << 20)
ENGINES = {
    "one step": SMALL,
    "two in flight": replace(SMALL, in_flight=2, random_lag=3),
    "two ranks": replace(SMALL, ranks=2, in_flight=2, late_ranks=False, arena_bytes=4 << 20),
    "hybrid": HYBRID,
    "small steps": replace(SMALL, budget=8, in_flight=2),
    "followers": replace(SMALL, follow=True, in_flight=2),
}


@pytest.fixture(params=ENGINES.values(), ids=ENGINES.keys())
def engine(request: pytest.FixtureRequest) -> Iterator[MiniEngine]:
    made = MiniEngine(request.param)
    yield made
    made.close()


def counted(engine: MiniEngine, name: str) -> dict[str, float]:
    """A hint counter by label, since the last call of any of these."""
    payload = engine.scheduler_half.metrics.take()["c"]
    return {s.split("|")[1]: v for s, v in payload.items() if s.split("|")[0] == name}


def traffic(engine: MiniEngine, seed: int) -> None:
    """Other prompts, more than the arena holds."""
    for i in range(8 * (engine.options.arena_bytes >> 20)):
        engine.ask(tokens(33, 1000 * seed + i))
    engine.forget_hbm()


def loaded(engine: MiniEngine, prompt: list[int], **more: Any) -> int:
    """Prompt tokens that a tier served."""
    engine.forget_hbm()
    request = engine.ask(prompt, **more)
    return len(prompt) - engine.computed(request)


def test_without_hints_traffic_evicts(engine: MiniEngine) -> None:
    """What the other tests rest on."""
    engine.ask(tokens(40))
    traffic(engine, 1)
    assert loaded(engine, tokens(40)) == 0
    engine.finish()


@pytest.mark.parametrize("hints", [{"retain_s": 60}, {"priority": 1}, {"pin": True}], ids=str)
def test_kept_over_traffic(engine: MiniEngine, hints: dict[str, Any]) -> None:
    engine.ask(tokens(40), hints=hints)
    traffic(engine, 1)
    assert loaded(engine, tokens(40)) > 24
    engine.finish()


def test_retention_ends(engine: MiniEngine) -> None:
    engine.ask(tokens(40), hints={"retain_s": 60})
    assert engine.manager.keep.nbytes[Kept.RETAINED] > 0
    engine.clock.now += 60 * 17 / 16
    engine.settle()
    assert engine.manager.keep.nbytes[Kept.RETAINED] == 0
    traffic(engine, 1)
    assert loaded(engine, tokens(40)) == 0
    engine.finish()


def test_generated_tokens_are_retained_too(engine: MiniEngine) -> None:
    first = engine.ask(tokens(20), 21, hints={"retain_s": 60})
    traffic(engine, 1)
    turn = list(first.chain.tokens[:-1])
    assert loaded(engine, turn + tokens(1, 5)) > 24
    engine.finish()


def test_a_running_request_is_retained_already(engine: MiniEngine) -> None:
    request = engine.add(tokens(40), 30, hints={"retain_s": 60})
    engine.until(lambda: request.num_output_tokens > 20)
    slot = engine.layout.groups[0].slot_bytes
    assert engine.manager.keep.nbytes[Kept.RETAINED] >= 6 * slot, "generated chunks as well"
    engine.finish()


def test_a_running_request_does_not_renew_its_chain_with_each_chunk(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    engine = MiniEngine(replace(SMALL, arena_bytes=8 << 20))
    adds: list[ChunkKey] = []
    real = Holds.add

    def counting(self: Holds, key: ChunkKey, chunk: int, hold: Hold) -> bool:
        adds.append(key)
        return real(self, key, chunk, hold)

    monkeypatch.setattr(Holds, "add", counting)
    began = engine.clock.now
    engine.ask(tokens(40), 401, hints={"retain_s": 60})
    seconds = engine.clock.now - began
    engine.finish()
    assert len(set(adds)) > 50 and seconds < 5
    assert max(Counter(adds).values()) <= 2 * seconds + 4


def test_unpinned_it_goes(engine: MiniEngine) -> None:
    engine.ask(tokens(40), hints={"pin": True})
    assert engine.manager.keep.nbytes[Kept.PINNED] > 0
    engine.ask(tokens(40), hints={"pin": False})
    assert engine.manager.keep.nbytes[Kept.PINNED] == 0
    traffic(engine, 1)
    assert loaded(engine, tokens(40)) == 0
    engine.finish()


def test_one_shot_stores_nothing_and_uses_hits(engine: MiniEngine) -> None:
    engine.ask(tokens(24))
    engine.forget_hbm()
    stored = engine.manager.counters.stored
    request = engine.ask(tokens(60), 12, hints={"store": False})
    assert request.loads == 1 and engine.computed(request) < 60
    assert engine.manager.counters.stored == stored
    assert loaded(engine, tokens(60)) <= 24
    assert engine.manager.counters.stored > stored, "the next one's are kept"
    engine.finish()


def test_one_shot_is_no_sample_of_the_shadow_check() -> None:
    engine = MiniEngine(replace(SMALL, verify=1.0))
    engine.ask(tokens(40))
    assert loaded(engine, tokens(40), hints={"store": False}) > 24
    assert engine.manager.counters.verify_sampled == 0
    assert loaded(engine, tokens(40)) == 0
    assert engine.manager.counters.verify_sampled > 0
    engine.finish()


def test_the_end_of_a_session_lets_all_its_turns_go(engine: MiniEngine) -> None:
    system = tokens(16, 7)
    other = engine.ask(system + tokens(24, 8), session="b")
    engine.forget_hbm()
    chat = system + tokens(20, 9)
    for turn in range(3):
        request = engine.ask(chat, 5, session="a", hints={"end_session": turn == 2})
        chat = list(request.chain.tokens) + tokens(8, turn)
        engine.forget_hbm()
    index = engine.manager._pool.index
    chain = engine.chain_of(engine.known[request.request_id])
    held = [index.get(k) for k in chain.keys(0)]
    assert [e is not None and e.retired for e in held] == [False] * 2 + [True] * (len(held) - 2)
    assert loaded(engine, list(other.chain.tokens[:40])) > 24, "the other session has its prefix"
    engine.finish()


def test_without_a_session_only_the_last_turn_goes(engine: MiniEngine) -> None:
    first = engine.ask(tokens(32), 4)
    engine.ask(list(first.chain.tokens) + tokens(20, 1), 4, hints={"end_session": True})
    index = engine.manager._pool.index
    chain = engine.chain_of(engine.known["r2"])
    retired = [e.retired for k in chain.keys(0) if (e := index.get(k)) is not None]
    assert sum(retired) in (2, 3) and not any(retired[:4])
    engine.finish()


def test_a_hint_names_the_session_where_vllm_cannot() -> None:
    engine = MiniEngine(SMALL)
    first = engine.ask(tokens(32), 4, hints={"session": "x"})
    turn = list(first.chain.tokens) + tokens(20, 1)
    engine.ask(turn, 4, hints={"session": "x", "end_session": True})
    assert all(e.retired for e in engine.manager._pool.index)
    engine.finish()


def test_what_a_live_request_shares_stays(engine: MiniEngine) -> None:
    """Somebody else still runs on a prefix that the session computed, and has stored nothing yet."""
    engine.ask(tokens(40), session="q")
    guest = engine.add(tokens(40), 7)
    engine.until(lambda: guest.num_output_tokens > 0)
    last = engine.add(tokens(40) + tokens(8, 2), 1, hints={"end_session": True}, session="q")
    engine.until(lambda: last.request_id not in engine.scheduler.requests)
    assert not guest.is_finished()
    index = engine.manager._pool.index
    chain = engine.chain_of(engine.known[last.request_id])
    held = [e.retired for k in chain.keys(0) if (e := index.get(k)) is not None]
    assert held == [False] * 5 + [True]
    engine.finish()


def test_an_aborted_request_ends_its_session_too(engine: MiniEngine) -> None:
    request = engine.add(tokens(40), 50, hints={"end_session": True})
    engine.until(lambda: request.num_output_tokens > 4)
    engine.abort(request)
    engine.run()
    engine.settle()
    assert engine.manager.counters.hint_released > 0
    engine.finish()


def test_prefetch_brings_the_whole_prompt_up(tmp_path: Path) -> None:
    engine = MiniEngine(replace(SMALL, nvme=str(tmp_path)))
    engine.ask(tokens(40))
    engine._rest()
    engine.manager.reset()
    engine.forget_hbm()
    before = engine.manager.counters.prefetched
    engine.ask(tokens(40), hints={"prefetch": True})
    assert engine.manager.counters.prefetched - before == 5
    assert counted(engine, "kvoffload_hints_total") == {"prefetch": 1}
    engine.finish()


def test_a_pin_brings_up_what_hbm_holds(tmp_path: Path) -> None:
    """Where HBM has it all nothing is loaded; it is pinned in DRAM all the same."""
    engine = MiniEngine(replace(SMALL, nvme=str(tmp_path)))
    engine.ask(tokens(42))
    engine._rest()
    engine.manager.reset()
    request = engine.ask(tokens(42), hints={"pin": True})
    assert request.loads == 0
    engine._rest()
    assert engine.manager.keep.nbytes[Kept.PINNED] == 5 * engine.layout.groups[0].slot_bytes
    engine.finish()


def test_an_ended_session_leaves_nvme(tmp_path: Path) -> None:
    engine = MiniEngine(replace(SMALL, nvme=str(tmp_path)))
    engine.ask(tokens(40), session="a")
    engine._rest()
    assert engine.store.stats()["entries"] == 5
    engine.ask(tokens(40) + tokens(17, 1), session="a", hints={"end_session": True})
    engine._rest()
    assert engine.store.stats()["entries"] == 0
    engine.finish()


TENANTS = [
    ({"tenant": "a"}, {"tenant": "b"}),
    ({"tenant": "a"}, {}),
    ({}, {"tenant": "default"}),  # what the ledger calls those without a name
    ({"tenant": "a_b"}, {"tenant": "a b"}),  # one name in the ledger
    ({"tenant": "a"}, {"tenant": "a' 1"}),
]


@pytest.mark.parametrize(("one", "other"), TENANTS, ids=str)
@pytest.mark.parametrize("named", [False, True], ids=["vLLM's id", "hint"])
def test_sessions_of_two_tenants_are_two(
    tmp_path: Path, one: dict[str, Any], other: dict[str, Any], named: bool
) -> None:
    """Who else calls a session "1" ends neither that nor what it retains."""
    engine = MiniEngine(replace(SMALL, nvme=str(tmp_path)))
    hint = {"session": "1"} if named else {}
    vllms = None if named else "1"
    engine.ask(tokens(40), session=vllms, hints=one | hint | {"retain_s": 600})
    retained = engine.manager.keep.nbytes[Kept.RETAINED]
    ends = tokens(40) + tokens(17, 1)
    engine.ask(ends, session=vllms, hints=other | hint | {"end_session": True})
    engine._rest()
    assert engine.manager.keep.nbytes[Kept.RETAINED] == retained > 0
    assert engine.store.stats()["entries"] == 5, "the other's own chunks are gone"
    engine.manager.reset()
    assert loaded(engine, tokens(40)) == 39  # the last token is computed in any case
    engine.finish()


def test_a_tenants_session_ends_as_one_without(tmp_path: Path) -> None:
    engine = MiniEngine(replace(SMALL, nvme=str(tmp_path)))
    hints: dict[str, Any] = {"tenant": "a", "retain_s": 600}
    engine.ask(tokens(40), session="1", hints=hints)
    engine.ask(tokens(40) + tokens(17, 1), session="1", hints=hints | {"end_session": True})
    engine._rest()
    assert engine.store.stats()["entries"] == 0
    engine.finish()


@pytest.mark.parametrize("how", ["hit", "computed again", "one shot"])
@pytest.mark.parametrize("session", [None, "b"])
def test_what_others_built_on_stays_on_nvme(tmp_path: Path, how: str, session: str | None) -> None:
    """The other's own chunks lie on NVMe alone, and are of no use without those of the session."""
    engine = MiniEngine(replace(SMALL, nvme=str(tmp_path)))
    engine.ask(tokens(40), session="a")
    if how == "computed again":
        engine.forget_hbm()
        engine.manager.plan = (  # type: ignore[method-assign]
            lambda chain, start, limit: Plan(start, Decision.MISS)
        )
    question = tokens(40) + tokens(16, 5)
    hints = {"store": False} if how == "one shot" else None
    engine.ask(question, session=session, hints=hints)
    engine._rest()
    engine.manager.__dict__.pop("plan", None)
    engine.manager.reset()
    engine.forget_hbm()
    engine.ask(tokens(40) + tokens(17, 1), session="a", hints={"end_session": True})
    engine._rest()
    engine.manager.reset()
    served = 40 if how == "one shot" else 48
    assert served <= loaded(engine, question) <= 56
    assert loaded(engine, tokens(40) + tokens(17, 1)) <= 40
    engine.finish()


def test_bad_hints_fail_nothing_and_are_said_once(
    engine: MiniEngine, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING, "vllm.kvoffload")
    for bad in ({"retain_s": -1, "pin": True}, "now", {"colour": 1}, ["x"], 7):
        assert engine.ask(tokens(40), 3, hints=bad).is_finished()
    assert counted(engine, "kvoffload_hints_refused_total") == {
        "bad_value": 1,
        "not_an_object": 3,
        "unknown_key": 1,
    }
    said = [r.getMessage() for r in caplog.records]
    assert len(said) == 1 and "retain_s=-1" in said[0] and "r1" in said[0]
    engine.clock.now += 61
    engine.ask(tokens(40), hints={"priority": "high"})
    assert len(caplog.records) == 2
    engine.finish()


def test_a_pin_that_does_not_fit_is_said(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING, "vllm.kvoffload")
    engine = MiniEngine(SMALL)
    engine.ask(tokens(80), hints={"pin": True})
    engine.ask(tokens(7, 1), hints={"pin": True})
    assert counted(engine, "kvoffload_hints_refused_total") == {
        "pin_refused": 1,
        "pin_too_short": 1,
    }
    assert engine.manager.keep.nbytes[Kept.PINNED] == 0 and "quarter" in caplog.text
    engine.finish()


@pytest.mark.parametrize("when", ["never", "at its end"])
def test_a_pin_of_what_was_not_stored_is_refused(when: str) -> None:
    """The weights are being digested while it runs: it has no keys, and nothing of it is stored."""
    engine = MiniEngine(SMALL)
    engine.namespaces.known = False
    request = engine.add(tokens(40), 3, hints={"pin": True})
    engine.until(lambda: request.num_output_tokens >= 1)
    if when == "at its end":
        finished = engine.scheduler_half.request_finished

        def known_by_then(ended: Any) -> Any:
            engine.namespaces.known = True
            return finished(ended)

        engine.scheduler_half.request_finished = known_by_then  # type: ignore[method-assign]
    engine.run()
    assert counted(engine, "kvoffload_hints_refused_total") == {"pin_refused": 1}
    assert engine.manager.keep.nbytes[Kept.PINNED] == 0
    engine.namespaces.known = True
    engine.ask(tokens(40), hints={"pin": True})
    assert engine.manager.keep.nbytes[Kept.PINNED] > 0, "sent again it is pinned"
    assert not counted(engine, "kvoffload_hints_refused_total")
    engine.finish()


def test_a_pin_that_a_reset_ended_meanwhile_is_refused() -> None:
    engine = MiniEngine(SMALL)
    request = engine.add(tokens(40), 3, hints={"pin": True})
    engine.until(lambda: request.num_output_tokens >= 1)
    assert engine.scheduler_half.reset_cache()
    engine.run()
    assert counted(engine, "kvoffload_hints_refused_total") == {"pin_refused": 1}
    engine.finish()


def test_a_pin_is_made_again_where_a_reset_came_before_the_request_ran() -> None:
    engine = MiniEngine(SMALL)
    engine.add(tokens(40), 3, hints={"pin": True})
    assert engine.scheduler_half.reset_cache()  # it is still queued
    engine.run()
    assert not counted(engine, "kvoffload_hints_refused_total")
    assert engine.manager.keep.nbytes[Kept.PINNED] > 0
    engine.finish()


def test_a_pin_that_was_made_is_not_refused_at_the_end(engine: MiniEngine) -> None:
    for repeat in range(3):
        engine.ask(tokens(40), hints={"pin": True})
        engine.ask(tokens(16), 2, hints={"pin": True})
        if repeat:
            engine.forget_hbm()
    aborted = engine.add(tokens(24, 1), 3, hints={"pin": True})
    engine.abort(aborted)
    engine.run()
    assert not counted(engine, "kvoffload_hints_refused_total")
    engine.finish()


def test_a_pin_is_made_as_soon_as_there_are_keys() -> None:
    engine = MiniEngine(SMALL)
    engine.namespaces.known = False
    request = engine.add(tokens(40), 3, hints={"pin": True})
    engine.until(lambda: request.num_output_tokens >= 1)
    engine.namespaces.known = True
    engine.run()
    assert not counted(engine, "kvoffload_hints_refused_total")
    assert engine.manager.keep.nbytes[Kept.PINNED] > 0
    engine.finish()


@pytest.mark.parametrize("why", ["not served", "a rank cannot attach"])
def test_an_engine_that_serves_nothing_refuses_pins(why: str) -> None:
    engine = MiniEngine(SMALL)
    if why == "not served":
        engine.scheduler_half._serve = False
    else:
        engine.scheduler_half._attach.done = lambda: False  # type: ignore[method-assign]
        engine.clock.now += 31  # an idle engine waits for it no longer
    engine.ask(tokens(40), hints={"pin": True})
    assert counted(engine, "kvoffload_hints_refused_total") == {"pin_refused": 1}
    engine.finish()


def test_nothing_of_refused_pins_is_kept() -> None:
    """However late a pin is refused: at arrival, when its keys come, or at its end."""
    engine = MiniEngine(SMALL)
    for known in (True, False):
        engine.namespaces.known = known
        request = engine.add(tokens(80, known), 3, hints={"pin": True})
        engine.until(lambda request=request: request.num_output_tokens >= 1)
        engine.namespaces.known = True
        engine.run()
    engine.namespaces.known = False
    engine.ask(tokens(80, 2), hints={"pin": True})
    assert counted(engine, "kvoffload_hints_refused_total") == {"pin_refused": 3}
    assert not engine.scheduler_half._hints._unpinned
    engine.namespaces.known = True
    engine.finish()


def test_other_connectors_keys_are_left_alone() -> None:
    engine = MiniEngine(SMALL)
    params = {"do_remote_prefill": True, "remote_host": "x", "kvoffload": {"pin": True}}
    request = engine.add(tokens(40))
    engine.run()
    request = engine.add(tokens(40, 1))
    request.kv_transfer_params = dict(params)
    engine.scheduler_half._states.clear()  # as if it had just arrived with them
    engine.scheduler_half.on_new_request(request)
    engine.run()
    assert request.kv_transfer_params == params
    assert counted(engine, "kvoffload_hints_total") == {"pin": 1}
    assert not counted(engine, "kvoffload_hints_refused_total")
    engine.finish()


def test_hints_of_an_orchestrator() -> None:
    """vLLM's kv_hints: our actions are read, others' are not."""
    engine = MiniEngine(SMALL)
    request = engine.add(tokens(40))
    engine.run()
    request = engine.add(tokens(40, 1))
    action = SimpleNamespace(action_type="kvoffload", payload={"retain_s": 9, "priority": 9})
    foreign = SimpleNamespace(action_type="prefetch", payload={"x": 1})
    request.kv_hints = SimpleNamespace(actions=[foreign, action])
    engine.scheduler_half._states.clear()
    engine.scheduler_half.on_new_request(request)
    payload = engine.scheduler_half.metrics.take()["c"]
    assert payload["kvoffload_hints_total|retain"] == 1
    assert payload["kvoffload_hints_refused_total|bad_value"] == 1
    engine.run()
    assert engine.manager.keep.nbytes[Kept.RETAINED] > 0
    engine.finish()


def test_a_reset_ends_pins_and_forgets_no_manners(engine: MiniEngine) -> None:
    engine.ask(tokens(40), hints={"pin": True, "retain_s": 100})
    assert engine.reset(connector=True)
    assert set(engine.manager.keep.nbytes.values()) == {0}
    engine.ask(tokens(40))
    traffic(engine, 1)
    assert loaded(engine, tokens(40)) == 0
    engine.finish()


def test_sessions_are_bounded() -> None:
    engine = MiniEngine(SMALL)
    hints = engine.scheduler_half._hints
    for i in range(MAX_SESSIONS):
        hints._sessions[f"old {i}"] = (0, b"", 0.0)  # type: ignore[assignment]
    engine.ask(tokens(40), session="new")
    (new,) = (name for name in hints._sessions if not name.startswith("old"))
    engine.ask(tokens(40, 1), session="x" * 10_000)
    assert len(hints._sessions) == MAX_SESSIONS and next(reversed(hints._sessions)) == new
    assert all(len(name) <= 32 for name in hints._sessions), "as long as a client likes"
    engine.finish()


def test_levels_are_exported() -> None:
    engine = MiniEngine(SMALL)
    engine.ask(tokens(16), hints={"pin": True})
    engine.ask(tokens(40, 2), hints={"retain_s": 60})
    gauges = engine.exported()["g"]
    slot = engine.layout.groups[0].slot_bytes
    assert gauges["kvoffload_hint_bytes|pinned"] == 2 * slot
    assert gauges["kvoffload_hint_bytes|retained"] == 5 * slot
    engine.finish()
