"""Every cause that a scheduler half can meet, step by step over real bytes: what `why` says of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from kvoffload.config import Config
from kvoffload.core import fit, planner
from kvoffload.core.why import Report
from kvoffload.engines.vllm import why as why_module
from kvoffload.engines.vllm.why import WhyMiss
from kvoffload.types import Decision, MissCause
from tests.support.steps import MiniEngine, Options, tokens
from tests.support.steps_blocks import GroupSpec, MiniRequest, TokenChain
from tests.support.steps_types import Blocks

CHUNK = 8
SMALL = Options(token_bytes=25 << 10)  # the arena holds five chunks
HYBRID = (GroupSpec(), GroupSpec(window=9))


def why(engine: MiniEngine, request: MiniRequest) -> Report:
    """The report of a request; it must be the only one."""
    engine.scheduler_half.why.work(engine.clock())
    engine.scheduler_half.why.check()
    (found,) = (
        r for r in engine.scheduler_half.why.log.last() if r.request_id == request.request_id
    )
    return found


def asked(engine: MiniEngine, prompt: Sequence[int], **options: Any) -> Report:
    return why(engine, engine.ask(prompt, **options))


def counted(engine: MiniEngine) -> dict[str, float]:
    """Causes as exported."""
    name = "kvoffload_miss_cause_total|"
    taken = engine.scheduler_half.metrics.take()["c"]
    return {k.removeprefix(name): v for k, v in taken.items() if k.startswith(name)}


def test_nothing_missed_and_nothing_ever_stored() -> None:
    engine = MiniEngine()
    first = asked(engine, tokens(40))
    assert first.cause is MissCause.NEVER_STORED and first.details == {}
    assert (first.prompt, first.hbm, first.loaded, first.missed) == (40, 0, {}, 40)
    assert (first.token, first.chunk) == (0, 0) and len(first.key) == 8
    in_hbm = asked(engine, tokens(40) + tokens(9, 5))
    assert (in_hbm.hbm, in_hbm.token, in_hbm.chunk) == (40, 40, 5)
    assert in_hbm.cause is MissCause.NEVER_STORED
    engine.forget_hbm()
    hit = asked(engine, tokens(40))
    assert hit.cause is None and hit.loaded == {"dram": 40} and hit.missed == 0
    engine.forget_hbm()
    longer = asked(engine, tokens(24) + tokens(16, 3))
    assert (longer.loaded, longer.token, longer.chunk) == ({"dram": 24}, 24, 3)
    assert longer.cause is MissCause.NEVER_STORED
    assert counted(engine) == {"never_stored": 3}
    engine.finish()


def test_less_than_a_chunk() -> None:
    engine = MiniEngine()
    assert asked(engine, tokens(7)).cause is MissCause.BELOW_FLOOR
    engine.finish()


def test_a_tail_below_a_chunk() -> None:
    engine = MiniEngine()
    prompt = tokens(29)
    asked(engine, prompt)
    engine.forget_hbm()
    tail = asked(engine, prompt)
    assert tail.cause is MissCause.BELOW_FLOOR and tail.loaded == {"dram": 24}
    assert (tail.missed, tail.token, tail.chunk, tail.key) == (5, 24, 3, "")
    engine.finish()


def test_a_drafter_has_the_last_block_computed() -> None:
    """A hit of no more than that is none; the offer of it was never made."""
    one = GroupSpec(blocks_per_chunk=1)
    engine = MiniEngine(Options(groups=(one,), spec_tokens=2, eagle=True))
    block = engine.layout.align_tokens
    for blocks in (1, 3):
        prompt = tokens(blocks * block + block - 1, blocks)
        loaded = (blocks - 1) * block
        asked(engine, prompt, max_tokens=4)  # what is drafted behind a block must be settled first
        engine.forget_hbm()
        report = asked(engine, prompt)
        assert report.cause is MissCause.BELOW_FLOOR, report
        assert report.loaded == ({"dram": loaded} if loaded else {})
        assert (report.token, report.missed) == (loaded, len(prompt) - loaded)
        engine.forget_hbm()
        longer = asked(engine, prompt[: blocks * block] + tokens(9, 9 + blocks))
        assert longer.cause is MissCause.NEVER_STORED and longer.token == loaded
    engine.finish()


def test_evicted_says_when_and_how() -> None:
    engine = MiniEngine(SMALL)
    engine.ask(tokens(40))
    engine.forget_hbm()
    engine.ask(tokens(40, 1))
    engine.forget_hbm()
    engine.clock.now += 12.0
    before = engine.manager.counters.evicted
    gone = asked(engine, tokens(40))
    assert before >= 5 and gone.cause is MissCause.EVICTED
    assert gone.details["how"] == "evicted" and 12.0 <= float(str(gone.details["ago_s"])) < 40.0
    assert gone.chunk == 0
    engine.finish()


def test_the_chunk_where_the_hit_ends_is_the_one_that_is_explained() -> None:
    """Leaves go first: the head is loaded, the first missing chunk is an evicted one."""
    engine = MiniEngine(SMALL)
    engine.ask(tokens(40))
    engine.forget_hbm()
    engine.ask(tokens(16, 1))
    engine.forget_hbm()
    part = asked(engine, tokens(40))
    assert part.loaded == {"dram": 24} and (part.token, part.chunk) == (24, 3)
    assert part.cause is MissCause.EVICTED
    engine.finish()


def test_no_slot_when_it_was_to_be_stored() -> None:
    engine = MiniEngine(SMALL)
    engine.ask(tokens(64))
    engine.forget_hbm()
    report = asked(engine, tokens(64))
    assert (report.cause, report.details["how"]) == (MissCause.STORE_SKIPPED, "no_room")
    assert report.chunk == 5 and report.loaded == {"dram": 40}
    engine.finish()


def test_another_requests_store_is_still_out() -> None:
    engine = MiniEngine(Options(store_lag=10**6, caching=False, blocks=128))
    first = engine.add(tokens(24))
    engine.until(first.is_finished)
    second = engine.add(tokens(24))
    engine.until(second.is_finished)
    assert why(engine, second).cause is MissCause.STORING
    for lazy in engine.engines:
        lazy.flush()
    engine.finish()


def test_reset() -> None:
    engine = MiniEngine()
    asked(engine, tokens(40))
    assert engine.reset(connector=True)
    engine.clock.now += 3.0
    report = asked(engine, tokens(40))
    assert report.cause is MissCause.RESET
    other = asked(engine, tokens(40, 1))
    assert other.cause is MissCause.NEVER_STORED, "these were never asked for"
    engine.finish()


def test_reset_while_loading() -> None:
    engine = MiniEngine(Options(in_flight=2, load_lag=6))
    asked(engine, tokens(40))
    engine.forget_hbm()
    request = engine.add(tokens(40), 2)
    engine.until_loading(request)
    engine.reset(connector=True)
    engine.run()
    report = why(engine, request)
    assert report.cause is MissCause.RESET and report.missed == 40
    engine.finish()


def test_salt() -> None:
    engine = MiniEngine()
    asked(engine, tokens(40), salt=b"tenant a")
    engine.forget_hbm()
    other = asked(engine, tokens(40), salt=b"tenant b")
    assert other.cause is MissCause.SALT and other.details == {"fields": ["salt"]}
    assert "tenant" not in str(other)
    plain = asked(engine, tokens(40))
    assert plain.cause is MissCause.SALT
    engine.forget_hbm()
    assert asked(engine, tokens(40), salt=b"tenant a").cause is None
    engine.finish()


def test_requests_that_nobody_explains_are_let_go(monkeypatch: pytest.MonkeyPatch) -> None:
    """Files hang: reports wait, and say what they do not know; the engine's requests do not."""
    monkeypatch.setattr(why_module, "MAX_WHOLE", 4)
    engine = MiniEngine()
    asked(engine, tokens(40), salt=b"tenant a")
    for n in range(10):
        engine.forget_hbm()
        engine.ask(tokens(40), salt=b"tenant %d" % n)
    half = engine.scheduler_half
    waiting = list(half.why._closed)
    assert len(waiting) == 10 and sum(a.request is not None for a in waiting) == 4
    half.why.work(engine.clock())
    early, late = half.why.log.last()[1:7], half.why.log.last()[7:]
    assert {r.cause for r in early} == {MissCause.NEVER_STORED}
    assert all("not compared" in str(r.details["note"]) for r in early)
    assert [(r.cause, r.details) for r in late] == [(MissCause.SALT, {"fields": ["salt"]})] * 4
    failures = half.metrics.take()["c"]
    assert failures["kvoffload_failures_total|why_behind"] == 6
    engine.ask(tokens(40, 1))
    half.why.work(engine.clock())
    assert "kvoffload_failures_total|why_behind" not in half.metrics.take()["c"]
    engine.finish()


def test_adapter(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = MiniEngine()
    asked(engine, tokens(40))
    engine.forget_hbm()
    monkeypatch.setattr(type(engine.namespaces), "adapter", lambda self, request: b"a" * 32)
    assert asked(engine, tokens(40)).cause is MissCause.ADAPTER
    monkeypatch.undo()
    engine.finish()


def test_refused_by_the_planner() -> None:
    engine = MiniEngine()
    engine.ask(tokens(40))
    engine.forget_hbm()
    engine.manager._weigher._mode = planner.LoadMode.NEVER
    report = asked(engine, tokens(40))
    assert report.cause is MissCause.REFUSED
    assert report.details == {"decision": "forced", "held": 40}
    assert (report.token, report.chunk) == (0, 0)
    engine.finish()


def test_part_of_a_hit_is_worth_loading(monkeypatch: pytest.MonkeyPatch) -> None:
    """The planner stops at 16 of 40 tokens, although all are there."""

    def head(start: int, steps: Sequence[Any], *rest: Any) -> planner.Plan:
        return planner.Plan(16, Decision.PARTIAL, 0.1, 0.2, held=steps[-1].end)

    engine = MiniEngine()
    engine.ask(tokens(40))
    engine.forget_hbm()
    monkeypatch.setattr("kvoffload.core.weigh.plan", head)
    report = asked(engine, tokens(40))
    assert report.cause is MissCause.REFUSED and report.loaded == {"dram": 16}
    assert (report.token, report.chunk) == (16, 2)
    assert report.details == {"decision": "partial", "held": 40, "load_s": 0.1, "recompute_s": 0.2}
    engine.finish()


def test_no_room_to_load(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = MiniEngine()
    engine.ask(tokens(40))
    engine.forget_hbm()
    monkeypatch.setattr(fit, "LEASE_TRIES", 0)
    assert asked(engine, tokens(40)).cause is MissCause.NO_ROOM
    engine.finish()


def test_timed_out() -> None:
    engine = MiniEngine(Options(in_flight=2, load_lag=10**6))
    engine.ask(tokens(40))
    engine.forget_hbm()
    request = engine.add(tokens(40), 2)
    engine.until_loading(request)
    for _ in range(5):  # it has begun: its time counts from there
        engine.step()
    engine.clock.now += 5.0
    engine.run()
    report = why(engine, request)
    assert report.cause is MissCause.TIMED_OUT and report.missed == 40 and not report.loaded
    assert "after 5.0" in str(report.details["note"])
    engine.finish()


def test_load_failed() -> None:
    engine = MiniEngine()
    engine.ask(tokens(40))
    engine.forget_hbm()
    engine.engines[0].inject(4)  # the fourth chunk
    report = asked(engine, tokens(40))
    assert report.cause is MissCause.LOAD_FAILED
    assert report.details == {"note": "load failed: injected"}
    engine.finish()


def test_corrupt_chunks_are_load_failures_for_the_next_one_too() -> None:
    """Between the failure and the next store of the chunk."""
    engine = MiniEngine()
    engine.expect_bad = True
    first = engine.ask(tokens(16))
    engine.forget_hbm()
    chain = engine.chain_of(engine.known[first.request_id])
    lease = engine.manager.acquire("test", chain, 0, 16)
    assert lease is not None
    engine.manager.release(lease.id)
    engine.arena.view(lease.items[0].ref.offset, 64)[5] ^= 1
    failed = engine.add(tokens(16))
    engine.until(lambda: engine.bad_chunks > 0)
    trace = engine.manager.trace([lease.items[0].key])
    assert trace.gone is not None and trace.gone.name == "BAD_BYTES"
    engine.run()
    assert why(engine, failed).cause is MissCause.LOAD_FAILED
    engine.finish()


def test_not_ready_and_not_asked() -> None:
    engine = MiniEngine()
    engine.namespaces.known = False
    assert asked(engine, tokens(40)).cause is MissCause.NOT_READY
    engine.namespaces.known = True
    request = engine.add(tokens(40, 1), skip=True)
    engine.run()
    assert why(engine, request).cause is MissCause.NOT_ASKED
    engine.finish()


def test_aborted_before_it_ran_has_no_report_and_others_have_one() -> None:
    engine = MiniEngine(Options(blocks=12))
    running = engine.add(tokens(40), 4)
    engine.step()
    waiting = engine.add(tokens(40, 1), 4)
    engine.step()
    engine.abort(waiting)
    engine.run()
    engine.scheduler_half.why.work(engine.clock())
    assert [r.request_id for r in engine.scheduler_half.why.log.last()] == [running.request_id]
    engine.finish()


@pytest.mark.parametrize("defer", [False, True])
def test_preempted_requests_are_reported_once(defer: bool) -> None:
    engine = MiniEngine(Options(blocks=22, caching=False, in_flight=2, defer_alloc=defer))
    requests = [engine.add(tokens(16, i), 36) for i in range(3)]
    engine.run()
    assert engine.scheduler.preemptions
    for request in requests:
        assert why(engine, request).cause is MissCause.NEVER_STORED
    engine.finish()


@pytest.mark.parametrize("groups", [HYBRID, (GroupSpec(), GroupSpec(blocks_per_chunk=1))])
def test_several_groups(groups: Any) -> None:
    """The cause is that of the group whose chunk is missing."""
    engine = MiniEngine(Options(groups=groups, blocks=128))
    assert asked(engine, tokens(40)).cause is MissCause.NEVER_STORED
    engine.forget_hbm()
    assert asked(engine, tokens(41)).missed in (0, 1)
    engine.forget_hbm()
    half, chain = engine.scheduler_half, engine.chain_of(next(iter(engine.known.values())))
    victim = half.manager._pool.index.get(chain.key(1, chain.n_chunks(1) - 1))
    if victim is not None and groups is not HYBRID:
        half.manager._pool._evict(victim)
        report = asked(engine, tokens(40))
        assert report.cause is MissCause.EVICTED and report.loaded == {"dram": 32}
    engine.finish()


# -- NVMe


def test_from_nvme_and_dropped_from_there(tmp_path: Path) -> None:
    options = replace(SMALL, nvme=str(tmp_path))
    engine = MiniEngine(options)
    engine.ask(tokens(40))
    assert engine.manager.drain(5.0)
    engine.forget_hbm()
    engine.ask(tokens(40, 1))
    assert engine.manager.drain(5.0)
    engine.forget_hbm()
    up = asked(engine, tokens(40))
    assert up.cause is None and up.loaded == {"nvme": 40}
    engine.forget_hbm()
    engine.ask(tokens(40, 2))  # the first prompt is only on NVMe now
    engine.forget_hbm()
    chain = engine.chain_of(next(iter(engine.known.values())))
    for key in chain.keys(0):
        engine.store.delete(bytes(key))
    report = asked(engine, tokens(40))
    assert (report.cause, report.details["how"]) == (MissCause.NVME_DROPPED, "written")
    engine.close()  # `finish` may want a slot while all five are being read into


def test_evicted_before_it_was_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The disk is behind, or the write budget is used up: two causes."""
    for limited, cause in ((False, MissCause.EVICTED), (True, MissCause.RATE_LIMITED)):
        store = tmp_path / str(limited)
        store.mkdir(mode=0o700)
        engine = MiniEngine(replace(SMALL, nvme=str(store)))
        writes = engine.manager._nvme.writes  # type: ignore[union-attr]
        if limited:
            monkeypatch.setattr(writes._bucket, "take", lambda *a: False)
        else:
            monkeypatch.setattr(writes, "submit", lambda *a: 0)
        engine.ask(tokens(40))
        engine.forget_hbm()
        engine.ask(tokens(40, 1))
        engine.forget_hbm()
        report = asked(engine, tokens(40))
        assert report.cause is cause, report
        monkeypatch.undo()
        engine.finish()


def test_nvme_is_not_in_use(tmp_path: Path) -> None:
    engine = MiniEngine(replace(SMALL, nvme=str(tmp_path)))
    engine.ask(tokens(40))
    assert engine.manager.drain(5.0)
    engine.finish()
    engine = MiniEngine(replace(SMALL, nvme=str(tmp_path)))
    assert engine.manager._nvme is not None
    engine.manager._nvme.breaker.trip(engine.clock())
    assert asked(engine, tokens(40)).cause is MissCause.TIER_OFF
    assert asked(engine, tokens(40, 1)).cause is MissCause.NEVER_STORED
    engine.finish()


def test_after_a_restart_with_another_setting(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The store's namespaces.json names the field; losing it loses only that."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    store = tmp_path / "store"
    store.mkdir(mode=0o700)

    def life(dtype: str) -> Report:
        engine = MiniEngine(Options(nvme=str(store)))
        names = engine.namespaces
        name = dtype.encode().ljust(16)
        monkeypatch.setattr(names, "_name", lambda: name)
        names.of_weights[name] = 0
        monkeypatch.setattr(names, "fields", lambda: {"epoch": "", "dtype": dtype, "hash": "h"})
        engine.scheduler_half.why.write_to([store], {})
        report = asked(engine, tokens(40))
        engine.forget_hbm()
        assert engine.manager.drain(5.0)
        engine.scheduler_half.why.close()
        engine.finish()
        return report

    assert life("bfloat16").cause is MissCause.NEVER_STORED
    assert life("bfloat16").loaded == {"nvme": 40}
    other = life("float16")
    assert other.cause is MissCause.NAMESPACE
    assert other.details == {"fields": ["dtype"], "tier": "nvme"}
    assert (store / "namespaces.json").stat().st_mode & 0o777 == 0o600
    for i, content in enumerate((b"", b"{", b'{"namespaces": [1, {}]}', b"\xff")):
        (store / "namespaces.json").write_bytes(content)
        assert life(f"float8 {i}").cause is MissCause.NEVER_STORED


# -- a failure of its own, switched off, and bounded


def test_a_failure_in_here_costs_a_report_and_no_hit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KVOFFLOAD_TEST_FAULTS", '{"scheduler.why": -1}')
    engine = MiniEngine()
    engine.ask(tokens(40))
    engine.forget_hbm()
    assert engine.ask(tokens(40)).loads == 1
    engine.scheduler_half.why.work(engine.clock())
    assert not engine.scheduler_half.why.log.last()
    assert engine.scheduler_half.guard.errors["why"] >= 4
    monkeypatch.delenv("KVOFFLOAD_TEST_FAULTS")
    engine.finish()


def test_a_folder_that_cannot_be_written_is_said_and_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "kvoffload").write_text("a file where the folder should be")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    engine = MiniEngine()
    half = engine.scheduler_half
    half.why.write_to([], {})
    assert asked(engine, tokens(40)).cause is MissCause.NEVER_STORED
    half.why.work(engine.clock() + 10)
    assert half.metrics.take()["c"]["kvoffload_failures_total|why_file"] == 1
    assert sum("kvoffload why" in r.getMessage() for r in caplog.records) == 1
    engine.finish()


def test_off() -> None:
    engine = MiniEngine()
    half = engine.scheduler_half
    half.why = half._lookups._why = half._loads._why = WhyMiss(
        0, engine.layout, engine.manager, engine.namespaces, half.metrics, half.guard, engine.clock
    )
    engine.ask(tokens(40))
    engine.forget_hbm()
    engine.ask(tokens(40))
    half.why.work(engine.clock())
    assert not half.why.log.last() and not counted(engine)
    assert Config(why_requests=0).why_requests == 0
    engine.finish()


def test_only_the_last_are_kept() -> None:
    engine = MiniEngine()
    half = engine.scheduler_half
    half.why = half._lookups._why = half._loads._why = WhyMiss(
        3, engine.layout, engine.manager, engine.namespaces, half.metrics, half.guard, engine.clock
    )
    for i in range(5):
        engine.ask(tokens(8, i))
        half.why.work(engine.clock())
    assert [r.request_id for r in half.why.log.last()] == ["r3", "r4", "r5"]
    assert half.why.log.requests == 5 and counted(engine) == {"never_stored": 5}
    engine.finish()


def test_an_offer_that_is_not_taken_and_a_request_that_is_not_asked_for() -> None:
    """MultiConnector may take another connector's hit."""
    engine = MiniEngine()
    engine.ask(tokens(40))
    engine.forget_hbm()
    half = engine.scheduler_half
    for name, asks in (("taken elsewhere", True), ("never asked", False)):
        chain = TokenChain(tokens(40), b"", engine.layout.hash_tokens)
        request = MiniRequest(name, chain, 40, 1)
        if asks:
            assert half.get_num_new_matched_tokens(request, 0) == (40, True)
        half.update_state_after_alloc(request, Blocks(([],)), 0)
        report = why(engine, request)
        assert report.cause is MissCause.NOT_ASKED and "the engine did not" in str(report.details)
        half.request_finished(request)
    engine.finish()
