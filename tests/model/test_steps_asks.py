"""What the hooks cost, and count, at an arrival and while vLLM asks again and again."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvoffload.core.hashchain import Chain
from kvoffload.core.planner import Plan
from kvoffload.engines.vllm.lookups import REFUSAL_S
from kvoffload.types import Decision
from tests.support.steps import MiniEngine, Options, tokens
from tests.support.steps_blocks import MiniRequest, Status

FOLLOW = Options(follow=True, in_flight=2, blocks=256, load_lag=10**6, budget=256)
MISSES = "kvoffload_miss_requests_total"


class Counted:
    """Calls of one of the Manager's methods; ``answer``: what it says instead."""

    def __init__(self, engine: MiniEngine, name: str, answer: Any = ...) -> None:
        self.calls = 0
        self._real = getattr(engine.manager, name)
        self._answer = answer
        setattr(engine.manager, name, self)

    def __call__(self, *args: Any) -> Any:
        self.calls += 1
        return self._real(*args) if self._answer is ... else self._answer


def ask(engine: MiniEngine, request: MiniRequest, hbm: int = 0) -> int | None:
    """As the scheduler does each step, until the request is admitted."""
    engine.clock.now += 0.001
    return engine.scheduler_half.get_num_new_matched_tokens(request, hbm)[0]


def waiting_request(engine: MiniEngine) -> MiniRequest:
    """One whose prompt (40 tokens) DRAM holds, and that vLLM has not asked for yet."""
    engine.ask(tokens(40))
    engine.forget_hbm()
    return engine.add(tokens(40))


def stored_by_others(engine: MiniEngine, number: int) -> None:
    """Another request's chunk comes to DRAM (and goes again)."""
    namespace = engine.namespaces.namespace()
    assert namespace is not None
    chain = Chain(namespace, b"", engine.layout)
    chain.extend([bytes([number, i]) * 16 for i in range(4)])
    items = engine.manager.begin_store(chain, 0, 8)
    assert items
    engine.manager.abort_store(items)


def followed() -> tuple[MiniEngine, MiniRequest, MiniRequest]:
    """A request that loads, and one that was told to wait for it."""
    engine = MiniEngine(FOLLOW)
    engine.ask(tokens(40))
    engine.forget_hbm()
    leader = engine.add(tokens(40), 2)
    engine.until_loading(leader)
    plans = Counted(engine, "plan")
    follower = engine.add(tokens(44), 2)
    assert ask(engine, follower) is None and plans.calls == 1
    return engine, leader, follower


def test_a_follower_is_planned_for_once() -> None:
    engine, _, follower = followed()
    plans = Counted(engine, "plan")
    assert [ask(engine, follower) for _ in range(10)] == [None] * 10
    assert not plans.calls
    engine.close()


@pytest.mark.parametrize("how", ["abort", "failed", "too long", "in HBM"])
def test_a_follower_is_let_go(how: str) -> None:
    """When the other load is off, at the time-out, and when HBM has what was waited for."""
    engine, leader, follower = followed()
    hbm = 0
    if how == "abort":
        engine.abort(leader)
        engine._take_aborts()
    elif how == "failed":
        attempt = engine.scheduler_half._loads._table.get(leader.request_id)
        assert attempt is not None
        attempt.failed = True
    elif how == "too long":
        engine.clock.now += 0.2
    else:
        assert ask(engine, follower, 16) is None, "not all of it yet"
        hbm = 40
    plans = Counted(engine, "plan")
    assert ask(engine, follower, hbm) == 40 - hbm and plans.calls == 1
    engine.close()


def test_what_does_not_pay_is_not_planned_anew_for_what_others_store() -> None:
    engine = MiniEngine()
    request = waiting_request(engine)
    plans = Counted(engine, "plan", Plan(0, Decision.REFUSED, held=40))
    for i in range(10):
        assert ask(engine, request) == 0
        stored_by_others(engine, i)
    assert plans.calls == 1
    engine.clock.now += REFUSAL_S
    assert ask(engine, request) == 0 and plans.calls == 2, "rates and queues change"
    assert ask(engine, request, 8) == 0 and plans.calls == 3, "so does what HBM holds"
    engine.close()


def test_a_miss_is_looked_up_again_when_anything_came() -> None:
    engine = MiniEngine()
    request = engine.add(tokens(40, seed=9))
    plans = Counted(engine, "plan")
    assert [ask(engine, request) for _ in range(10)] == [0] * 10
    assert plans.calls == 1
    stored_by_others(engine, 1)
    assert ask(engine, request) == 0 and plans.calls == 2
    engine.close()


def test_without_room_the_next_try_is_a_while_later(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = MiniEngine()
    request = waiting_request(engine)
    real = engine.manager.acquire
    plans, leases = Counted(engine, "plan"), Counted(engine, "acquire", None)
    for i in range(10):
        assert ask(engine, request) == 0
        stored_by_others(engine, i)
    tries = leases.calls
    assert plans.calls == 1 and 1 <= tries <= 4
    engine.clock.now += REFUSAL_S
    assert ask(engine, request) == 0 and leases.calls == 2 * tries
    assert engine.exported()["c"][f"{MISSES}|lease_refused"] == 1, "requests, not steps"
    engine.clock.now += REFUSAL_S
    monkeypatch.setattr(engine.manager, "acquire", real)
    assert ask(engine, request) == 40
    engine.close()


def test_misses_while_weights_are_digested_are_counted_by_request() -> None:
    engine = MiniEngine(Options(blocks=12))
    engine.namespaces.known = False
    asked = [engine.add(tokens(32, seed=i), 8) for i in range(2)]
    for _ in range(5):
        engine.step()
    assert asked[1].status is Status.WAITING, "it is asked for in every step"
    engine.run()
    assert engine.exported()["c"][f"{MISSES}|namespace_unknown"] == 2
    engine.namespaces.known = True
    engine.finish()


def test_streaming_input_does_not_wait_for_the_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = MiniEngine()
    add = engine.scheduler.add

    def add_streaming(request: MiniRequest) -> None:
        request.resumable = True
        add(request)

    monkeypatch.setattr(engine.scheduler, "add", add_streaming)
    for known in (False, True):
        engine.namespaces.known = known
        engine.ask(tokens(40))
    counted = engine.exported()["c"]
    assert f"{MISSES}|namespace_unknown" not in counted, counted
    assert not engine.stores_done()
    engine.finish()


# -- arrival


@pytest.fixture(scope="module")
def engine() -> Iterator[MiniEngine]:
    made = MiniEngine()
    yield made
    made.close()


def hbm_tokens(engine: MiniEngine, blocks: int, held: set[int]) -> tuple[int, int]:
    """Tokens of a prompt that HBM is taken to hold, and how many blocks it was asked for."""
    asked: list[int] = []

    def holds(block: int) -> bool:
        asked.append(block)
        return block in held

    half = engine.scheduler_half
    half.watch_hbm(lambda: False, holds)
    found = half._hbm.leading_tokens(list(range(blocks)))
    return found, len(asked)


@pytest.mark.parametrize("held", [0, 1, 2, 5000, 9999, 10_000])
def test_what_hbm_holds_of_a_long_prompt_is_found_in_a_few_looks(
    engine: MiniEngine, held: int
) -> None:
    found, asked = hbm_tokens(engine, 10_000, set(range(held)))
    assert found == held * engine.layout.hash_tokens and asked <= 20


@given(st.integers(0, 40), st.sets(st.integers(0, 39)))
def test_it_ends_where_a_block_is_held_and_the_next_is_not(
    engine: MiniEngine, blocks: int, held: set[int]
) -> None:
    found, _ = hbm_tokens(engine, blocks, held)
    end, rest = divmod(found, engine.layout.hash_tokens)
    assert not rest and 0 <= end <= blocks
    assert end == blocks or end not in held
    assert (end - 1 in held) if end else (0 not in held or not blocks)


def test_only_what_hbm_does_not_hold_is_moved_up_at_arrival(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    engine = MiniEngine(Options(blocks=256, budget=256))
    engine.ask(tokens(40))
    asked: list[tuple[int, int]] = []

    def prefetch(owner: str, chain: Chain, start: int, limit: int, wished: bool) -> int:
        asked.append((start, limit))
        return 0

    monkeypatch.setattr(engine.manager, "prefetch", prefetch)
    engine.add(tokens(8, seed=5), 8)  # a live request: the next may have to wait
    engine.add([*tokens(40), *tokens(20, seed=3)])
    assert asked == [(40, 60)]
    engine.finish()
