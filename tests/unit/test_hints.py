"""Hints: what is taken of a client's words, and what they do to eviction, bounds and sessions."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvoffload.core.hints import (
    MAX_RETAIN_S,
    NO_HINTS,
    PRIORITY_S,
    Hints,
    parse_hints,
)
from kvoffload.core.holds import Holds
from kvoffload.core.index import Kept
from kvoffload.core.keep import _end
from kvoffload.core.layout import boundary_tokens
from kvoffload.core.lookup import span
from kvoffload.core.manager import Manager
from kvoffload.core.pins import Pins
from kvoffload.core.policy import POLICIES
from kvoffload.core.stats import Counters
from kvoffload.types import CacheLayout, ChunkKey, SlotState
from tests.support.fakes import (
    UNIT,
    chain_of,
    full_group,
    layout_of,
    run_until_idle,
    sliding_group,
)
from tests.unit.test_manager import ONE, TOK, Rig, make

# -- the vocabulary


def test_all_hints_are_taken() -> None:
    given = {
        "retain_s": 600,
        "store": False,
        "end_session": True,
        "priority": 2,
        "prefetch": True,
        "pin": True,
        "session": "chat-7",
        "tenant": "acme",
    }
    hints, problems = parse_hints(given)
    assert not problems
    assert hints == Hints(600, False, True, 2, True, True, "chat-7", "acme")
    assert hints.kinds() == ["retain", "one_shot", "end_session", "priority", "prefetch", "pin"]
    assert parse_hints({"pin": False})[0].kinds() == ["unpin"]
    assert parse_hints({}) == (NO_HINTS, []) and NO_HINTS.kinds() == []
    assert parse_hints({"retain_s": None, "pin": None}) == (NO_HINTS, [])


@pytest.mark.parametrize(
    "given",
    [
        {"retain_s": 0},
        {"retain_s": -1},
        {"retain_s": math.nan},
        {"retain_s": math.inf},
        {"retain_s": MAX_RETAIN_S + 1},
        {"retain_s": True},
        {"retain_s": "600"},
        {"retain_s": 10**400},
        {"retain_s": -(10**5000)},
        {"priority": 10**5000},
        {"store": 0},
        {"store": "no"},
        {"end_session": 1},
        {"priority": 4},
        {"priority": -1},
        {"priority": 1.0},
        {"priority": True},
        {"prefetch": []},
        {"pin": "yes"},
        {"session": ""},
        {"tenant": 3},
        {"session": "x" * 257},
        {"session": 7},
    ],
)
def test_a_bad_value_is_left_out_with_one_line(given: dict[str, Any]) -> None:
    hints, (problem,) = parse_hints(given | ({"pin": True} if "pin" not in given else {}))
    (key,) = given
    assert problem.reason == "bad_value"
    assert f"kvoffload.{key}=" in problem.line and ": give " in problem.line
    assert hints.pin is (None if "pin" in given else True), "the good ones hold"
    assert getattr(hints, key) == getattr(NO_HINTS, key)


def test_unknown_keys_and_other_things() -> None:
    hints, (problem,) = parse_hints({"retain": 5, "store": False})
    assert problem.reason == "unknown_key" and "retain_s" in problem.line and not hints.store
    for wrong in (None, 5, "pin", ["pin"], True, 10**5000):
        hints, (problem,) = parse_hints(wrong)
        assert hints == NO_HINTS and problem.reason == "not_an_object"
    _, problems = parse_hints({f"k{i}": i for i in range(1000)})
    assert len(problems) == 8


anything = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)
names = st.sampled_from([*Hints.__dataclass_fields__, "kvoffload", "x\ny\x1b"])


@given(st.dictionaries(names | st.integers(), anything) | anything)
def test_nothing_a_client_sends_raises_or_gets_long(given: Any) -> None:
    hints, problems = parse_hints(given)
    again, none = parse_hints({f: getattr(hints, f) for f in Hints.__dataclass_fields__})
    assert again == hints and not none, "what is taken is good"
    for problem in problems:
        assert len(problem.line) < 250 and problem.line.isprintable()


def test_how_long_a_use_counts() -> None:
    assert Hints().keeps_s == 0
    assert Hints(retain_s=5, priority=2).keeps_s == 5
    assert Hints(priority=1).keeps_s == PRIORITY_S


# -- retention


def retain(rig: Rig, text: str, seconds: float = 100.0, level: int = 0) -> None:
    chain = rig.chain(text)
    rig.manager.keep.retain(chain, chain.tokens, seconds, level)
    rig.manager.check()


def others(rig: Rig, slots: int = 8) -> None:
    """Traffic that turns the whole arena over, twice."""
    for i in range(2 * slots):
        rig.put(chr(0x4E00 + next(_fresh) % 20000) + "x"[: i % 2])


_fresh = itertools.count()


@pytest.mark.parametrize("policy", sorted(POLICIES))
def test_retained_chunks_outlive_traffic_then_go(policy: str) -> None:
    rig = make(slots=8, policy=policy)
    rig.put("abc")
    retain(rig, "abc", 100)
    others(rig)
    assert rig.hit("abc") == 3 * TOK
    rig.clock.advance(101)
    rig.manager.poll()
    others(rig)
    assert rig.hit("abc") < 3 * TOK
    assert rig.manager.counters.hint_retain_cut == 0


def test_more_than_half_the_oldest_retention_goes_first() -> None:
    rig = make(slots=8)
    for i, text in enumerate(("ab", "cd", "ef")):
        rig.put(text)
        retain(rig, text, 100 + i)
    assert rig.manager.keep.nbytes[Kept.RETAINED] == 4 * UNIT
    assert rig.manager.counters.hint_retain_cut == 2
    others(rig)
    assert [rig.hit(t) for t in ("ab", "cd", "ef")] == [0, 2 * TOK, 2 * TOK]


def test_half_a_chain_goes_leaf_first() -> None:
    rig = make(slots=8)
    rig.put("abcdef")
    retain(rig, "abcdef")
    others(rig)
    assert rig.hit("abcdef") == 4 * TOK


def test_priority_is_kept_longest_under_pressure_and_ends_too() -> None:
    rig = make(slots=8)
    rig.put("ab")
    retain(rig, "ab", PRIORITY_S, level=2)
    for i in range(6):
        text = chr(0x600 + i) + "q"
        rig.put(text)
        retain(rig, text, 5000)
    others(rig)
    assert rig.hit("ab") == 2 * TOK, "a later end does not beat a higher priority"
    rig.clock.advance(PRIORITY_S + 1)
    rig.manager.poll()
    others(rig)
    assert rig.hit("ab") == 0


def test_a_use_by_somebody_else_does_not_shorten_it() -> None:
    rig = make(slots=8)
    rig.put("ab")
    retain(rig, "ab", 500)
    retain(rig, "ab", 5)
    rig.clock.advance(10)
    rig.manager.poll()
    others(rig)
    assert rig.hit("ab") == 2 * TOK


def test_what_a_retained_chunk_needs_is_retained_when_it_comes_back() -> None:
    """Its ancestors are in nobody's way by themselves, but cannot go before it: they count."""
    rig = make(slots=8)
    rig.put("abcd")
    retain(rig, "abcd")
    index = rig.manager._pool.index
    chain = rig.chain("abcd")
    root = index.get(chain.key(0, 0))
    assert root is not None
    rig.manager.slot_failed(root.ref, rig_failure())
    assert rig.manager.keep.nbytes[Kept.RETAINED] == 3 * UNIT
    rig.put("abcd")
    assert rig.manager.keep.nbytes[Kept.RETAINED] == 4 * UNIT
    rig.manager.check()


def test_what_comes_back_keeps_its_own_ancestors_too() -> None:
    rig = make(slots=16)
    rig.put("abcd")
    retain(rig, "abcd")
    index, chain = rig.manager._pool.index, rig.chain("abcd")
    for i in (1, 0):
        entry = index.get(chain.key(0, i))
        assert entry is not None
        rig.manager.slot_failed(entry.ref, rig_failure())
    rig.put("a")
    assert rig.manager.keep.nbytes[Kept.RETAINED] == 2 * UNIT, "nothing links it yet"
    rig.put("ab")
    assert rig.manager.keep.nbytes[Kept.RETAINED] == 4 * UNIT
    rig.manager.check()


def test_retention_that_has_ended_makes_the_next_no_stronger() -> None:
    """Whether or not a tick came in between."""
    rig = make(slots=8)
    rig.put("ab")
    retain(rig, "ab", seconds=10.0, level=3)
    rig.clock.advance(20.0)
    retain(rig, "ab", seconds=10.0)
    hold = rig.manager.keep._holds.get(rig.chain("ab").key(0, 1))
    assert hold is not None and hold.level == 0
    rig.manager.check()


def test_what_keeps_coming_back_leaves_no_rows() -> None:
    """The order of what is retained is bounded by what is retained, with no hint in between too."""
    rig = make(slots=8)
    rig.put("ab")
    retain(rig, "ab")
    for _ in range(200):
        root = rig.manager._pool.index.get(rig.chain("a").key(0, 0))
        assert root is not None
        rig.manager.slot_failed(root.ref, rig_failure())
        rig.put("a")
    rig.manager.check()
    assert sum(map(len, rig.manager.keep._holds._queues)) < 100


def rig_failure() -> Any:
    from kvoffload.types import LoadFailure

    return LoadFailure.CORRUPT


def test_retention_never_refuses_room() -> None:
    """Everything else is leased: what is retained gives way, and is counted."""
    rig = make(slots=4)
    rig.put("ab")
    retain(rig, "ab")
    rig.put("cd")
    lease = rig.load("cd")
    assert lease is not None
    items = rig.manager.begin_store(rig.chain("ef"), 0, 2 * TOK)
    assert len(items) == 2
    assert rig.manager.counters.hint_retain_cut == 2
    assert rig.hit("ab") == 0
    rig.manager.check()


# -- pins


def test_a_pin_stays_until_unpinned() -> None:
    rig = make(slots=8)
    rig.put("abc")
    chain = rig.chain("abc")
    assert rig.manager.keep.pin(chain, 2 * TOK + 5)
    assert rig.manager.keep.pin(chain, 2 * TOK), "the same whole chunks: the same pin"
    rig.clock.advance(1e6)
    others(rig)
    assert rig.hit("abc") == 2 * TOK, "the prompt's chunks, and those only"
    assert rig.manager.keep.nbytes[Kept.PINNED] == 2 * UNIT
    assert not rig.manager.keep.unpin(chain, 3 * TOK), "another prompt"
    assert rig.manager.keep.unpin(chain, 2 * TOK)
    assert not rig.manager.keep.unpin(chain, 2 * TOK)
    others(rig)
    assert rig.hit("abc") == 0 and rig.manager.keep.nbytes[Kept.PINNED] == 0


def test_pins_are_bounded_and_shared_chunks_count_once() -> None:
    rig = make(slots=16)
    pin = rig.manager.keep.pin
    assert pin(rig.chain("abc"), 3 * TOK)
    assert pin(rig.chain("abd"), 3 * TOK), "one more chunk: four of sixteen"
    assert not pin(rig.chain("x"), TOK)
    assert rig.manager.counters.hint_pin_refused == 1
    assert rig.manager.keep.unpin(rig.chain("abc"), 3 * TOK)
    assert pin(rig.chain("x"), TOK)
    assert not pin(rig.chain("x"), TOK - 1) and not pin(rig.chain(""), 100), "no whole chunk"
    rig.manager.check()


def test_a_pinned_prompt_that_is_stored_later_is_pinned_then() -> None:
    rig = make(slots=8)
    assert rig.manager.keep.pin(rig.chain("ab"), 2 * TOK)
    assert rig.manager.keep.nbytes[Kept.PINNED] == 0
    rig.put("ab")
    assert rig.manager.keep.nbytes[Kept.PINNED] == 2 * UNIT
    others(rig)
    assert rig.hit("ab") == 2 * TOK


def test_a_pin_outlives_retention_and_the_other_way_round() -> None:
    rig = make(slots=8)
    rig.put("ab")
    chain = rig.chain("ab")
    retain(rig, "ab", 100)
    assert rig.manager.keep.pin(chain, 2 * TOK)
    assert rig.manager.keep.nbytes[Kept.RETAINED] == 0
    rig.manager.keep.unpin(chain, 2 * TOK)
    assert rig.manager.keep.nbytes[Kept.RETAINED] == 2 * UNIT
    others(rig)
    assert rig.hit("ab") == 2 * TOK
    rig.manager.keep.pin(chain, 2 * TOK)
    rig.clock.advance(101)
    rig.manager.poll()
    others(rig)
    assert rig.hit("ab") == 2 * TOK


def test_reset_ends_pins() -> None:
    rig = make(slots=8)
    rig.put("ab")
    rig.manager.keep.pin(rig.chain("ab"), 2 * TOK)
    rig.manager.reset()
    rig.put("ab")
    others(rig)
    assert rig.hit("ab") == 0
    rig.manager.check()


def test_a_chat_that_pins_every_turn_is_kept_book_of_once() -> None:
    rig = make(slots=1024)
    pins = rig.manager.keep._pins
    text = "x" * 200
    chain = rig.chain(text)
    for turn in range(1, 201):
        assert rig.manager.keep.pin(chain, turn * TOK)
    assert len(pins) == 200 and pins.nbytes == 200 * UNIT
    assert sum(len(tips) for tips in pins._prompts.values()) == 200, "a row per prompt"
    rig.manager.check()


def test_a_pin_of_a_prefix_outlives_the_pin_that_goes_on() -> None:
    rig = make(slots=16)
    rig.put("abcd")
    keep, chain = rig.manager.keep, rig.chain("abcd")
    assert keep.pin(chain, 2 * TOK) and keep.pin(chain, 4 * TOK)
    assert keep.unpin(chain, 4 * TOK) and keep.nbytes[Kept.PINNED] == 2 * UNIT
    others(rig, 16)
    assert rig.hit("abcd") == 2 * TOK, "an operator's pin of the system prompt, say"
    assert keep.pin(chain, 4 * TOK) and keep.unpin(chain, 2 * TOK)
    assert keep._pins.nbytes == 4 * UNIT
    rig.manager.check()


HYBRID: CacheLayout = layout_of(
    full_group(0, blocks=2, slot_bytes=2 * UNIT), sliding_group(1, window=40, slot_bytes=UNIT)
)


def test_a_pin_of_a_hybrid_keeps_both_groups() -> None:
    rig = make(slots=64, layout=HYBRID)
    rig.put("abcdefgh")
    chain = rig.chain("abcdefgh")
    assert rig.manager.keep.pin(chain, chain.tokens)
    assert rig.manager.keep.nbytes[Kept.PINNED] == (4 * 2 + 5) * UNIT, "of the window: its end"
    others(rig, 64)
    assert rig.hit("abcdefgh") == chain.tokens


@given(
    steps=st.lists(st.tuples(st.booleans(), st.text("ab", max_size=10)), max_size=30),
    hybrid=st.booleans(),
)
def test_pins_are_the_union_of_what_each_prompt_needs(
    steps: list[tuple[bool, str]], hybrid: bool
) -> None:
    layout = HYBRID if hybrid else ONE
    counters = Counters()
    pins = Pins(layout, 30 * UNIT, counters)
    now: dict[bytes, set[bytes]] = {}
    for pin, text in steps:
        chain = chain_of(layout, text)
        grid = boundary_tokens(layout)
        end = chain.tokens // grid * grid
        needs = {
            chain.key(g.group, i)
            for g in layout.groups
            for to in (end, end - grid)
            for i in span(g, 0, to)
        }
        name = chain.key(0, span(layout.groups[0], 0, end)[-1]) if needs else b""
        before = set().union(*now.values())
        if pin:
            got = pins.pin(chain, chain.tokens)
            if got is not None:
                now[name] = needs
                assert set(got) == needs - before
            else:
                sizes = {k: g.slot_bytes for g in layout.groups for k in chain.keys(g.group)}
                more = sum(sizes[ChunkKey(k)] for k in needs - before)
                assert not needs or (pins.nbytes + more > pins.max_bytes and name not in now)
        else:
            had = now.pop(name, None)
            gone = pins.unpin(chain, chain.tokens)
            assert (gone is None) == (had is None)
            assert set(gone or ()) == before - set().union(*now.values())
        pins.check()
        assert set(pins._chunks) == set().union(*now.values())


# -- the end of a session


def release(rig: Rig, text: str, start: int = 0) -> int:
    chain = rig.chain(text)
    gone = rig.manager.keep.release(chain, start * TOK, chain.tokens)
    rig.manager.check()
    return gone


@pytest.mark.parametrize("policy", sorted(POLICIES))
def test_an_ended_session_goes_first(policy: str) -> None:
    rig = make(slots=8, policy=policy)
    rig.put("abc")
    rig.put("wxy")
    rig.put("de")  # the youngest
    assert release(rig, "de") == 2
    rig.put("12")
    assert (rig.hit("abc"), rig.hit("wxy"), rig.hit("de")) == (3 * TOK, 3 * TOK, 0)


def test_touched_again_it_is_like_any_other() -> None:
    rig = make(slots=4)
    rig.put("ab")
    rig.put("cd")
    assert release(rig, "cd") == 2
    lease = rig.load("cd")
    assert lease is not None
    rig.manager.release(lease.id)
    rig.put("12")
    assert (rig.hit("ab"), rig.hit("cd")) == (0, 2 * TOK)


def test_what_others_built_on_stays() -> None:
    rig = make(slots=16)
    rig.put("sysA")
    rig.put("sysB")
    assert release(rig, "sysA") == 1, "the leaf that nobody shares"
    assert release(rig, "sysB", 2) == 2, "now nobody else does; from the third chunk on"


def test_release_ends_retention_but_not_pins() -> None:
    rig = make(slots=16)
    rig.put("abcd")
    retain(rig, "abcd")
    rig.manager.keep.pin(rig.chain("abcd"), 2 * TOK)
    assert release(rig, "abcd") == 2
    assert rig.manager.keep.nbytes[Kept.RETAINED] == 0
    assert rig.manager.keep.nbytes[Kept.PINNED] == 2 * UNIT


def test_what_is_released_is_not_written_and_goes_from_nvme() -> None:
    rig = make(slots=16)
    rig.put("ab")
    run_until_idle(lambda: rig.manager.tick(False), rig.store)
    rig.put("abcd")
    assert release(rig, "abcd", 1) == 3
    run_until_idle(lambda: rig.manager.tick(False), rig.store)
    assert list(rig.store.held) == [rig.chain("a").key(0, 0)]
    assert rig.manager.counters.hint_deleted == 1
    rig.store.raising = {"delete"}
    release(rig, "ab")
    assert rig.manager.counters.tier_errors == 1, "a store that cannot delete costs a count"


def use_again(rig: Rig, text: str) -> None:
    """A later request loads it, and there is time to write."""
    lease = rig.load(text)
    assert lease is not None
    rig.manager.release(lease.id)
    run_until_idle(lambda: rig.manager.tick(False), rig.store)


def test_released_and_used_again_it_is_written_after_all() -> None:
    rig = make(slots=16)
    rig.put("ab")
    release(rig, "ab")
    use_again(rig, "ab")
    assert len(rig.store.held) == 2


def test_written_then_released_and_used_again_it_is_written_again() -> None:
    rig = make(slots=16)
    rig.put("ab")
    run_until_idle(lambda: rig.manager.tick(False), rig.store)
    assert len(rig.store.held) == 2
    release(rig, "ab")
    assert not rig.store.held
    use_again(rig, "ab")
    assert len(rig.store.held) == 2 and rig.manager.occupancy().dirty_chunks == 0


def test_released_while_it_is_being_written_it_does_not_stay_on_nvme() -> None:
    rig = make(slots=16)
    rig.put("ab")
    rig.manager.tick(False)
    assert release(rig, "ab") == 2
    rig.store.step()
    rig.manager.poll()
    rig.manager.check()
    assert not rig.store.held and rig.manager.counters.hint_deleted == 2
    use_again(rig, "ab")
    assert len(rig.store.held) == 2


def test_released_while_it_is_being_written_and_stored_anew_it_stays() -> None:
    rig = make(slots=16)
    rig.put("a")
    rig.manager.tick(False)
    release(rig, "a")
    entry = rig.manager._pool.index.get(rig.chain("a").key(0, 0))
    assert entry is not None
    rig.manager.slot_failed(entry.ref, rig_failure())
    rig.put("a")
    run_until_idle(lambda: rig.manager.tick(False), rig.store)
    rig.manager.check()
    assert len(rig.store.held) == 1 and rig.manager.counters.hint_deleted == 0


def test_released_while_it_is_being_written_by_a_store_that_cannot_delete() -> None:
    rig = make(slots=16)
    rig.put("a")
    rig.manager.tick(False)
    release(rig, "a")
    rig.store.raising = {"delete"}
    rig.store.step()
    rig.manager.poll()
    assert rig.manager.counters.tier_errors == 1 and rig.hit("a") == TOK


def test_a_session_ends_only_its_own_retention() -> None:
    rig = make(slots=16)
    rig.put("abcdef")
    keep, chain = rig.manager.keep, rig.chain("abcdef")
    keep.retain(chain, 6 * TOK, 100, owner="a")
    keep.retain(chain, 4 * TOK, 50, owner="b")
    rig.manager.check()
    assert keep.release(chain, 0, 6 * TOK, owner="a") == 2, "what b asked to keep stays"
    assert keep.nbytes[Kept.RETAINED] == 4 * UNIT
    others(rig, 16)
    assert rig.hit("abcdef") == 4 * TOK


def test_what_was_let_go_of_and_is_retained_again_keeps_what_is_before_it() -> None:
    """A session ended and is back; then another branch of it ends."""
    rig = make(slots=16)
    rig.put("pc")
    rig.put("pd")
    keep, back, other = rig.manager.keep, rig.chain("pc"), rig.chain("pd")
    assert keep.release(back, TOK, 2 * TOK, owner="s") == 1
    keep.retain(back, 2 * TOK, 600.0, owner="s")
    rig.manager.check()
    assert keep.release(other, 0, 2 * TOK, owner="s") == 1, "its leaf only"
    rig.manager.check()
    others(rig, 16)
    assert rig.hit("pc") == 2 * TOK


def test_what_a_request_adds_within_a_grain_does_not_renew_what_is_before_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    rig = make(slots=512)
    text = "x" * 200
    rig.put(text)
    adds = 0
    real = Holds.add

    def counting(self: Holds, *args: Any) -> bool:
        nonlocal adds
        adds += 1
        return real(self, *args)

    monkeypatch.setattr(Holds, "add", counting)
    keep, chain = rig.manager.keep, rig.chain(text)
    keep.retain(chain, 100 * TOK, 60)
    assert 100 <= adds <= 200
    adds = 0
    for n in range(100, 200):
        keep.retain(chain, (n + 1) * TOK, 60, start=n * TOK)
        rig.clock.advance(0.01)
    assert adds <= 200 + 2 * 200, "each once, and all of them at most twice in that time"
    rig.manager.check()
    until = {hold.until for key in keep._holds if (hold := keep._holds.get(key)) is not None}
    assert until == {1062.0}, "all of the chain as long as its end"


def test_an_answer_that_grows_for_minutes_renews_its_prompt_now_and_then() -> None:
    rig = make(slots=1024)
    text = "x" * 400
    rig.put(text)
    keep, chain = rig.manager.keep, rig.chain(text)
    root = rig.manager._pool.index.get(chain.keys(0)[0])
    assert root is not None
    keep.retain(chain, 100 * TOK, 600)
    renewed, before = 0, root.wish
    for n in range(100, 400):  # a chunk a second
        rig.clock.advance(1.0)
        keep.retain(chain, (n + 1) * TOK, 600, start=n * TOK)
        renewed, before = renewed + (root.wish is not before), root.wish
        assert root.wish is not None and root.wish.until >= rig.clock() + 600, "never shorter"
    assert renewed <= 300 / 32 + 1
    rig.manager.check()


@pytest.mark.parametrize("now", [0.0, 12.25, 1e6 + 1 / 3])
def test_retention_ends_a_little_late_and_in_the_order_asked_for(now: float) -> None:
    asked = [0.1, 1, 15, 16, 31, 32, 33, 100, 101, 107, 600, 3600, 3601, 604800]
    ends = [_end(now, seconds) for seconds in asked]
    assert ends == sorted(ends)
    for seconds, end in zip(asked, ends, strict=True):
        assert 0 <= end - now - seconds <= min(max(1.0, seconds / 16), 256)


def test_what_is_being_loaded_is_not_deleted() -> None:
    rig = make(slots=16)
    rig.to_nvme("ab")
    lease = rig.load("ab")
    assert lease is not None
    release(rig, "ab")
    assert len(rig.store.held) == 2
    run_until_idle(lambda: rig.manager.tick(False), rig.store)
    assert rig.bytes_right(lease)
    rig.manager.release(lease.id)


def test_released_while_the_store_is_under_way() -> None:
    rig = make(slots=8)
    chain = rig.chain("ab")
    items = rig.manager.begin_store(chain, 0, chain.tokens)
    assert release(rig, "ab") == 2
    for item in items:
        rig.arena.worker_store(item)
    rig.put("cdefgh")
    run_until_idle(lambda: rig.manager.tick(False), rig.store)
    assert not set(rig.store.held) & set(chain.keys(0))
    rig.put("x")
    assert rig.hit("ab") == TOK


def test_release_of_a_hybrid_spares_the_window_that_others_share() -> None:
    rig = make(slots=64, layout=HYBRID)
    rig.put("abcdefgh")
    rig.put("abcdxyzw")
    gone = rig.manager.keep.release(rig.chain("abcdefgh"), 0, 8 * TOK)
    assert gone == 2 + 4
    assert rig.hit("abcdxyzw") == 8 * TOK and rig.hit("abcd") == 4 * TOK


# -- prefetch by wish


def test_a_wished_prefetch_moves_what_would_not_pay() -> None:
    rig = make(slots=16, load="auto")
    rig.to_nvme("abcd")
    learned_that_loads_are_slow(rig.manager)
    chain = rig.chain("abcd")
    assert rig.manager.prefetch("r", chain, 0, chain.tokens) == 0
    assert rig.manager.prefetch("r", chain, 0, chain.tokens, True) == 4
    run_until_idle(lambda: rig.manager.tick(False), rig.store)
    states = [e.state for e in rig.manager._pool.index]
    assert states == [SlotState.READY] * 4
    rig.to_nvme("12345678")
    long = rig.chain("12345678")
    rig.manager.cancel_prefetch("r")
    assert rig.manager.prefetch("s", long, 0, long.tokens, True) == 4, "the budget holds"


def learned_that_loads_are_slow(manager: Manager) -> None:
    from kvoffload.core.prefill import PrefillWork
    from kvoffload.types import Tier

    for _ in range(50):
        manager.observe_load(Tier.NVME, UNIT, 10.0)
        manager.observe_load(Tier.DRAM, UNIT, 10.0)
        manager.observe_prefill(PrefillWork.span(0, 1024), 0.001)


def test_shutdown_writes_first_what_hints_keep() -> None:
    rig = make(slots=16)
    for text in ("a", "b", "c", "d"):
        rig.put(text)
    rig.manager.keep.pin(rig.chain("b"), TOK)
    retain(rig, "c")
    release(rig, "d")
    assert rig.manager.drain(5.0)
    written = [key for kind, key in rig.store.order if kind == 0]
    assert written == [rig.chain(t).key(0, 0) for t in "bca"]


assert ONE.groups[0].slot_bytes == UNIT
