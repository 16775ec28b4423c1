"""Hints hold on NVMe: what the Manager tells the chunk store to keep, when, and when that ends."""

from __future__ import annotations

from pathlib import Path

import pytest

from kvoffload.core.hints import PRIORITY_S
from kvoffload.core.stats import Counters
from kvoffload.tiers.faulty import FaultyStore
from kvoffload.tiers.null import NullStore
from kvoffload.tiers.nvme import open_drives
from tests.support.fakes import run_until_idle
from tests.unit import test_admission
from tests.unit.test_manager import TOK, Rig, make


def kept(rig: Rig, text: str) -> str:
    """Which chunks of the prompt the store keeps."""
    keys = rig.chain(text).keys(0)
    return "".join(
        c if rig.store.keeps_for_others(k) else "." for c, k in zip(text, keys, strict=True)
    )


def retain(rig: Rig, text: str, seconds: float = 100.0, level: int = 0, **kw: object) -> None:
    chain = rig.chain(text)
    rig.manager.keep.retain(chain, chain.tokens, seconds, level, **kw)  # type: ignore[arg-type]
    rig.manager.check()


def settle(rig: Rig) -> None:
    run_until_idle(lambda: rig.manager.tick(False), rig.store)
    rig.manager.check()


def test_what_lies_on_nvme_alone_is_retained_there() -> None:
    rig = make()
    rig.to_nvme("abc")
    retain(rig, "abcd")
    assert kept(rig, "abcd") == "abc."
    assert not rig.manager._pool.index, "nothing moved"
    rig.clock.advance(102)
    assert kept(rig, "abc") == "..."


def test_what_is_written_later_is_retained_until_its_end() -> None:
    rig = make()
    rig.put("ab")
    retain(rig, "ab", 100, level=2)
    assert kept(rig, "ab") == ".."
    rig.clock.advance(60)
    settle(rig)
    assert kept(rig, "ab") == "ab"
    assert {level for _, level, _ in rig.store.keeps.values()} == {2}
    rig.clock.advance(41)
    assert kept(rig, "ab") == ".."


def test_it_outlives_traffic_on_both_tiers() -> None:
    rig = make(slots=4, max_entries=6)
    rig.put("abcd")
    retain(rig, "abcd")  # half of DRAM: the end of the chain is let go of there
    assert rig.manager.counters.hint_retain_cut == 2
    settle(rig)
    for i in range(30):
        rig.put(chr(0x4E00 + i))
        settle(rig)
    assert kept(rig, "abcd") == "abcd" and rig.hit("abcd") == 4 * TOK


def test_a_retained_chain_is_extended_as_a_whole_once_a_grain() -> None:
    rig = make(slots=64)
    rig.to_nvme("abcdef")
    rig.put("abcdefgh")  # its beginning is on NVMe alone
    settle(rig)
    retain(rig, "abcdefgh", 100)
    calls: list[int] = []
    inner = rig.store.retain

    def counted(keys: bytes, seconds: float, level: int = 0, owner: int = 0) -> bytes:
        calls.append(len(keys) // 16)
        return inner(keys, seconds, level, owner)

    rig.store.retain = counted  # type: ignore[method-assign]
    chain = rig.chain("abcdefgh")
    rig.manager.keep.retain(chain, 8 * TOK, 100, start=7 * TOK)
    assert calls == [2], "the new one, and the one before it"
    rig.clock.advance(10)
    rig.manager.keep.retain(chain, 8 * TOK, 100, start=7 * TOK)
    assert calls[1:] == [2, 6], "all of it lasts as long as its end"
    assert {until for until, _, _ in rig.store.keeps.values()} == {1112.0}
    rig.clock.advance(0.2)
    rig.manager.keep.retain(chain, 8 * TOK, 100, start=7 * TOK)
    assert calls[3:] == [2, 6] or calls[3:] == [2]


def test_pins_hold_on_nvme_and_end_with_unpin() -> None:
    rig = make()
    rig.to_nvme("ab")
    chain = rig.chain("abc")
    assert rig.manager.keep.pin(chain, chain.tokens)
    assert kept(rig, "abc") == "ab."
    rig.put("abc")
    settle(rig)
    assert kept(rig, "abc") == "abc", "what is written later as well"
    retain(rig, "a", 50)
    assert rig.manager.keep.unpin(chain, chain.tokens)
    assert kept(rig, "abc") == "a..", "retention goes on"


def test_the_end_of_a_session_ends_it_but_not_for_others() -> None:
    rig = make()
    rig.to_nvme("abcd")
    retain(rig, "abcd", owner="mine")
    retain(rig, "ab", owner="theirs")
    chain = rig.chain("abcd")
    rig.manager.keep.release(chain, 0, chain.tokens, owner="mine")
    assert kept(rig, "abcd") == "ab.." and len(rig.store.held) == 2
    rig.manager.keep.release(chain, 0, chain.tokens, owner="theirs")
    assert kept(rig, "abcd") == "ab..", "two asked: it ends with its time"
    rig.clock.advance(200)
    rig.manager.keep.release(chain, 0, chain.tokens, owner="theirs")
    assert not rig.store.held


def test_a_reset_ends_all_of_it() -> None:
    rig = make()
    rig.to_nvme("abc")
    retain(rig, "a")
    assert rig.manager.keep.pin(rig.chain("bc"), 2 * TOK)
    rig.manager.reset()
    assert not rig.store.keeps and not rig.store.pinned
    rig.manager.check()


def test_what_is_being_written_at_a_reset_is_not_retained() -> None:
    rig = make()
    rig.put("a")
    retain(rig, "a")
    rig.manager.tick(False)
    assert rig.store.queue, "the write is under way"
    rig.manager.reset()
    settle(rig)
    assert rig.store.held and not rig.store.keeps


@pytest.mark.parametrize("what", ["retain", "retained", "retain_none"])
def test_a_store_that_raises_is_a_count(what: str) -> None:
    rig = make()
    rig.put("abc")
    rig.store.raising = {what}
    retain(rig, "abc")
    assert rig.manager.keep.pin(rig.chain("x"), TOK)
    settle(rig)
    rig.manager.keep.release(rig.chain("abc"), 0, 3 * TOK)
    rig.manager.reset()
    assert rig.manager.counters.tier_errors > 0
    assert rig.manager.keep.pin(rig.chain("y"), TOK) and rig.manager.keep.unpin(rig.chain("y"), TOK)


def test_without_hints_the_store_is_never_asked() -> None:
    rig = make(slots=4)
    rig.store.raising = {"retain", "retained", "retain_none"}
    for i in range(12):
        rig.put(chr(0x4E00 + i) + "x")
        settle(rig)
    assert rig.manager.counters.tier_errors == 0


# -- admission


def admission_rig() -> test_admission.Rig:
    rig = test_admission.Rig()
    rig.judge._asked = 0.0  # NVMe has given nothing: no chunk is worth it
    return rig


def cut_early(rig: test_admission.Rig, *texts: str) -> None:
    """Retained, and let go of by DRAM for want of room."""
    for text in texts:
        rig.put(text)
        chain = rig.chain(text)
        rig.manager.keep.retain(chain, chain.tokens, 600)
    while rig.manager.keep.make_room():
        pass
    assert rig.c.hint_retain_cut == len(texts)


def turn_over(rig: test_admission.Rig) -> None:
    for i in range(120):
        rig.put(chr(0x4E00 + i))
        rig.tick()


def test_what_dram_gives_up_early_is_written_whatever_it_is_worth() -> None:
    rig = admission_rig()
    cut_early(rig, "a", "b")
    turn_over(rig)
    keys = [rig.chain(text).key(0, 0) for text in "ab"]
    assert all(k in rig.store.held for k in keys) and len(rig.store.held) == 2
    assert all(rig.store.keeps_for_others(k) for k in keys)
    assert rig.c.nvme_admitted_hint == rig.c.nvme_written == 2
    assert rig.c.nvme_refused_value > 10, "the others"


def test_what_has_ended_is_judged_like_any_other() -> None:
    rig = admission_rig()
    cut_early(rig, "a", "b")
    rig.clock.advance(PRIORITY_S + 1)
    turn_over(rig)
    assert not rig.store.held and rig.c.nvme_admitted_hint == 0


def test_the_write_budget_binds_hints_too() -> None:
    rig = test_admission.Rig(tb=0.0)
    rig.judge._asked = 0.0
    cut_early(rig, "a", "b")
    turn_over(rig)
    assert not rig.store.held
    assert rig.c.nvme_refused_budget == 2 and rig.c.nvme_written == 0


def test_judged_before_the_hint_came_it_is_judged_again() -> None:
    rig = admission_rig()
    rig.put("a")
    chain = rig.chain("a")
    entry = rig.manager._pool.index.get(chain.key(0, 0))
    assert entry is not None and not rig.judge.decide(entry, rig.clock.now)
    rig.manager.keep.retain(chain, chain.tokens, 600)
    assert rig.manager.keep.make_room()
    turn_over(rig)
    assert len(rig.store.held) == 1


def test_idle_time_writes_hints_whatever_nvme_proved_to_be_worth() -> None:
    rig = admission_rig()
    rig.c.nvme_written_bytes = 1 << 40  # what is free to be written is used up
    rig.put("abc")
    assert rig.manager.keep.pin(rig.chain("ab"), 32)
    rig.idle()
    assert set(rig.store.held) == set(rig.chain("ab").keys(0))


# -- the other stores


def test_null_and_faulty_stores_have_it(tmp_path: Path) -> None:
    null = NullStore()
    assert null.retain(bytes(32), 1.0) == bytes(2) == null.retained(bytes(32))
    null.retain_none()
    store = open_drives([tmp_path / "s"], max_bytes=16 << 20)
    faulty = FaultyStore(store)
    try:
        store.put(1, b"k" * 16, [b"x" * 5000])
        assert store.wait(1, 5000)
        faulty.retain(b"k" * 16, 60.0, 2, 7)
        assert faulty.retained(b"k" * 16) == store.retained(b"k" * 16) == b"\1"
        faulty.retain_none()
        assert faulty.retained(b"k" * 16) == b"\0"
    finally:
        faulty.close()


def test_several_drives_keep_each_its_own(tmp_path: Path) -> None:
    store = open_drives([tmp_path / "a", tmp_path / "b"], max_bytes=64 << 20, segment_bytes=1 << 20)
    keys = [bytes([i]) * 16 for i in range(1, 21)]
    try:
        for i, key in enumerate(keys):
            store.put(i, key, [bytes([i]) * 50_000])
            assert store.wait(i, 5000)
        store.poll()
        assert store.retain(b"".join(keys), 60.0, owner=3) == bytes(20)
        assert store.retain(b"".join(keys), 90.0, owner=3) == b"\1" * 20
        assert store.retained(b"".join(keys)) == b"\1" * 20
        assert store.retained(b"".join(keys), 3) == bytes(20)
        parts = [d.store.stats() for d in store._drives if d.store is not None]  # type: ignore[union-attr]
        assert all(p["retained_chunks"] for p in parts)
        stats = store.stats()
        assert stats["retained_chunks"] == 20 and stats["retained_bytes"] == 20 * 53248
        store.retain_none()
        assert store.retained(b"".join(keys)) == bytes(20)
        store.check()
    finally:
        store.close()


def test_counts_have_names() -> None:
    assert {"nvme_admitted_hint", "hint_retain_cut"} <= Counters().as_dict().keys()
