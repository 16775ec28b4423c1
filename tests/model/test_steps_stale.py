"""After weights changed in place: HBM's old KV is never stored anew, and the tier comes back."""

from __future__ import annotations

import pytest

from tests.support.steps import MiniEngine, Options, tokens
from tests.support.steps_blocks import GroupSpec
from tests.support.steps_rank import Rank

HYBRID = (GroupSpec(), GroupSpec(window=9))


@pytest.fixture
def hbm_is_vllms_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """That vLLM attends to what nobody reset is its own doing; the audit of DRAM stays."""
    monkeypatch.setattr(Rank, "_attend", lambda self, rid, start, digests: None)


def nothing_stored_since(engine: MiniEngine, before: int) -> None:
    engine.settle()
    engine.audit_dram()  # raises WrongBytes where old KV lies under the new name
    assert engine.stores_done() == before


@pytest.mark.usefixtures("hbm_is_vllms_own")
def test_an_hbm_hit_while_the_namespace_is_not_known() -> None:
    engine = MiniEngine()
    engine.ask(tokens(24))
    before = engine.stores_done()
    engine.change_weights()
    engine.namespaces.known = False
    hit = engine.add(tokens(24) + tokens(16, 1), 12)
    engine.until(lambda: hit.num_output_tokens > 2)
    engine.namespaces.known = True
    engine.run()
    nothing_stored_since(engine, before)


@pytest.mark.usefixtures("hbm_is_vllms_own")
def test_an_hbm_hit_of_a_request_whose_load_failed() -> None:
    """With several KV groups a failed load puts it back to no tokens; vLLM asks anew."""
    engine = MiniEngine(Options(groups=HYBRID, blocks=128))
    engine.expect_bad = True
    engine.ask(tokens(40))
    engine.forget_hbm()
    engine.ask(tokens(17))  # [0, 16) is in HBM again
    for copies in engine.engines:
        copies.inject(1)
    victim = engine.add(tokens(40), 12)
    engine.until(lambda: engine.scheduler.failed_loads == 1)
    for copies in engine.engines:
        copies.inject(0)
    assert victim.num_computed_tokens == 0
    before = engine.stores_done()
    engine.change_weights()
    engine.run()
    nothing_stored_since(engine, before)


@pytest.mark.parametrize("changed", [False, True])
def test_loads_come_back_after_a_full_reset(changed: bool) -> None:
    """HBM was empty, and then holds KV of the new weights: hits on it are as good as ever."""
    engine = MiniEngine(Options(blocks=64))
    engine.ask(tokens(8))
    if changed:
        engine.change_weights()
    assert engine.reset(connector=True, running=True)
    engine.ask(tokens(40))
    for turn in range(3):
        engine.forget_hbm()
        engine.ask(tokens(16))  # [0, 16) of the new weights is in HBM
        request = engine.ask(tokens(40) + tokens(16, turn + 1))
        assert request.loads == 1, f"turn {turn}: not loaded from DRAM"
    engine.finish()


@pytest.mark.parametrize("empty", [False, True])
def test_old_blocks_in_hbm_are_warned_of(empty: bool, caplog: pytest.LogCaptureFixture) -> None:
    engine = MiniEngine(Options(blocks=64))
    engine.ask(tokens(24))
    engine.change_weights()
    if empty:
        engine.forget_hbm()
    engine.ask(tokens(24, 1))
    warned = [m for m in caplog.messages if "/reset_prefix_cache" in m]
    assert len(warned) == (not empty)


def test_stores_come_back_after_a_full_reset() -> None:
    """A round of training: requests run, weights change, all is preempted and reset."""
    engine = MiniEngine(Options(in_flight=2, blocks=128))
    runner = engine.add(tokens(24, 9), 30)
    engine.until(lambda: runner.num_output_tokens > 3)
    engine.change_weights()
    assert engine.reset(connector=True, running=True)
    engine.run()
    engine.ask(tokens(24), 1)
    for turn in range(1, 4):  # turns of a chat hit HBM
        before = engine.stores_done()
        engine.ask(tokens(24) + tokens(16, turn), 1)
        assert engine.stores_done() > before, f"turn {turn}: nothing is stored"
    engine.finish()
