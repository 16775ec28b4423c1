"""Miss causes by themselves: what is remembered of a chunk, what that makes, and that it is bounded."""

from __future__ import annotations

import tracemalloc
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvoffload.cli import why_words
from kvoffload.core.kin import MAX_VARIANTS, Kin
from kvoffload.core.planner import Plan
from kvoffload.core.why import (
    _CAUSE,
    GENERATION,
    Asked,
    Gone,
    KeyMemory,
    Report,
    Trace,
    WhyLog,
    cause_of,
)
from kvoffload.engines.vllm.spaces import MAX_KNOWN, KnownSpaces, Space
from kvoffload.metric_table import METRICS
from kvoffload.types import CacheLayout, ChunkKey, Decision, MissCause, Tier
from tests.support.fakes import chain_of, full_group, layout_of


def key(i: int) -> ChunkKey:
    return ChunkKey(i.to_bytes(16, "little"))


# -- the memory of keys


def test_the_latest_event_of_a_key_counts() -> None:
    memory = KeyMemory()
    assert memory.get(key(1)) is None
    memory.note(key(1), Gone.NO_ROOM, 1.0)
    memory.note(key(1), Gone.EVICTED, 2.5004)
    assert memory.get(key(1)) == (Gone.EVICTED, 2.5)


@given(
    st.integers(1, 8),
    st.lists(st.tuples(st.integers(0, 30), st.sampled_from(list(Gone))), max_size=120),
)
def test_the_latest_keys_are_known_and_no_more(
    generation: int, events: list[tuple[int, Gone]]
) -> None:
    """Bounded at two generations; whatever happened to the latest ``generation`` keys is known."""
    memory = KeyMemory(generation)
    for now, (i, gone) in enumerate(events):
        memory.note(key(i), gone, float(now))
        memory.check()
        assert len(memory) <= 2 * generation
    latest: dict[int, tuple[Gone, float]] = {}
    for now, (i, gone) in reversed(list(enumerate(events))):
        latest.setdefault(i, (gone, float(now)))
        if len(latest) == generation:
            break
    for i, known in latest.items():
        assert memory.get(key(i)) == known


def test_the_memory_takes_at_most_what_is_promised() -> None:
    tracemalloc.start()
    memory = KeyMemory()
    for i in range(3 * GENERATION - 1):
        memory.note(key(i), Gone.EVICTED, 1e6 + i)
    used, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(memory) == 2 * GENERATION - 1
    assert used < 11 << 20, f"{used / 2**20:.1f} MiB"


# -- from what happened to a cause

ASKED = Asked("r", 0.0, prompt=100, hbm=10, plan=Plan(10, Decision.MISS), key=key(1))


@pytest.mark.parametrize("gone", list(Gone))
def test_every_event_has_a_cause(gone: Gone) -> None:
    cause, details = cause_of(replace(ASKED, trace=Trace(gone, 12.0)))
    assert cause is _CAUSE[gone] and details == {"how": gone.name.lower(), "ago_s": 12.0}


def test_causes_without_an_event() -> None:
    def cause(**changes: Any) -> MissCause | None:
        return cause_of(replace(ASKED, **changes))[0]

    assert cause(trace=Trace()) is MissCause.NEVER_STORED
    assert cause(trace=Trace(storing=True)) is MissCause.STORING
    assert cause(trace=Trace(off=True)) is MissCause.TIER_OFF
    assert cause(key=None) is MissCause.BELOW_FLOOR
    assert cause(plan=Plan(10, Decision.REFUSED, held=90)) is MissCause.REFUSED
    assert cause(plan=Plan(90, Decision.WHOLE, held=90)) is MissCause.NEVER_STORED
    assert cause(loaded={Tier.DRAM: 90}) is None and cause(hbm=100) is None
    assert cause(barred=MissCause.NO_ROOM) is MissCause.NO_ROOM
    assert cause(barred=MissCause.NO_ROOM, loaded={Tier.DRAM: 90}) is None


def test_a_report_says_where_it_diverged() -> None:
    asked = replace(ASKED, loaded={Tier.DRAM: 32, Tier.NVME: 0}, chunk=2, request_id="x" * 1000)
    report = Report.of(asked, MissCause.EVICTED, {"ago_s": 1.0})
    assert report.as_dict() == {
        "id": "x" * 128,
        "time": 0.0,
        "prompt": 100,
        "hbm": 10,
        "loaded": {"dram": 32},
        "missed": 58,
        "token": 42,
        "chunk": 2,
        "key": "01000000",
        "cause": "evicted",
        "details": {"ago_s": 1.0},
    }


@given(st.integers(1, 5), st.lists(st.sampled_from([None, *MissCause]), max_size=30))
def test_the_log_keeps_the_last(keep: int, causes: list[MissCause | None]) -> None:
    log = WhyLog(keep)
    for i, cause in enumerate(causes):
        log.add(Report.of(replace(ASKED, request_id=str(i)), cause, {}))
        log.check()
    assert [r.request_id for r in log.last()] == [str(i) for i in range(len(causes))][-keep:]
    assert sum(log.totals.values()) == sum(c is not None for c in causes)


# -- who else asked


@given(
    st.integers(1, 4),
    st.lists(
        st.tuples(st.integers(0, 6), st.sampled_from("abcdef"), st.integers(0, 2)), max_size=60
    ),
)
def test_kin_are_those_with_the_same_tokens(
    generation: int, asked: list[tuple[int, str, int]]
) -> None:
    kin = Kin(generation)
    for prompt, salt, space in asked:
        mine = kin.variant(salt, b"", space)
        others = kin.meet([prompt] * 8, mine)
        kin.check()
        met = {kin.variant(s, b"", n) for p, s, n in asked if p == prompt}
        assert set(others) <= met and len(others) <= MAX_VARIANTS and len(kin) <= 2 * generation
        assert kin.meet([prompt] * 8, mine)[-1] == mine


def test_the_nearest_kin() -> None:
    kin = Kin()
    mine = kin.variant("a", b"", 2)
    reset, other, both = (kin.variant(s, b"", n) for s, n in (("a", 1), ("b", 2), ("b", 1)))
    assert mine.nearest([both, reset, both]) == reset
    assert mine.nearest([reset, other]) == other, "the newest of equals"


def test_a_salt_may_be_half_a_character() -> None:
    """JSON carries lone surrogates, and vLLM takes such a salt."""
    kin = Kin()
    assert kin.variant("\ud800", b"", 1) == kin.variant("\ud800", b"", 1)
    assert kin.variant("\ud800", b"", 1).salt != kin.variant("\ud801", b"", 1).salt


def test_kin_tells_nothing_but_equality() -> None:
    one, two = Kin(), Kin()
    salted = one.variant("tenant", b"adapter", 1)
    assert salted == one.variant("tenant", b"adapter", 1) != two.variant("tenant", b"adapter", 1)
    assert "tenant" not in repr(salted) and len(salted.salt) == len(salted.adapter) == 8
    assert one.variant(None, b"", 1) == one.variant("", b"", 1)
    assert one.variant(None, b"", 1).salt == "none"


# -- namespaces

LAYOUT = layout_of(full_group())


def space(i: int, **fields: str) -> Space:
    return Space(i.to_bytes(16, "little"), fields, 0, 16, 16)


def test_the_first_key_is_that_of_the_chain() -> None:
    layout: CacheLayout = LAYOUT
    chain = chain_of(layout, "abc")
    hashes = [b"h0", b"h1"]
    from kvoffload.core.hashchain import Chain

    real = Chain(bytes(16), b"lora", layout)
    real.extend(hashes)
    size, hashed = layout.groups[0].chunk_tokens, layout.hash_tokens
    known = Space(bytes(16), {}, 0, size, hashed)
    assert known.first_key(hashes, b"lora") == real.key(0, 0) != known.first_key(hashes, b"")
    assert known.first_key([], b"") is None and chain.n_chunks(0)


def test_namespaces_are_kept_beside_the_store_and_bounded(tmp_path: Any) -> None:
    known = KnownSpaces(LAYOUT, [tmp_path])
    for i in range(MAX_KNOWN + 6):
        known.remember(space(i, dtype=str(i)))
    known.remember(space(10, dtype="10"))
    again = KnownSpaces(LAYOUT, [tmp_path])
    found = again.keys_elsewhere(space(10, dtype="10"), [b"h"], b"")
    assert len(found) == MAX_KNOWN - 1
    assert found[0][0].namespace == space(MAX_KNOWN + 5).namespace, "the latest first"
    assert space(1, a="1", b="2").differs(space(2, b="2", c="3")) == ["a", "c"]
    names = [p.name for p in tmp_path.iterdir()]
    assert names == ["namespaces.json"]


def test_no_store_no_file() -> None:
    known = KnownSpaces(LAYOUT, [])
    known.remember(space(1))
    assert known.keys_elsewhere(space(2), [b"h"], b"") == []


# -- words


def test_every_cause_is_exported_and_has_words() -> None:
    exported = METRICS["kvoffload_miss_cause_total"].series
    assert exported == tuple((c.value,) for c in MissCause)
    assert set(why_words.MEANING) == set(MissCause)
    for cause in MissCause:
        assert why_words.advice(cause, {}) and why_words.why({"cause": cause.value})


def test_every_cause_is_in_the_docs(repo_root: Any) -> None:
    text = (repo_root / "docs" / "why.md").read_text()
    missing = [c.value for c in MissCause if f"| `{c.value}` |" not in text]
    assert not missing


def test_words_with_details() -> None:
    def words(cause: MissCause, **details: Any) -> str:
        return why_words.why({"cause": cause.value, "details": details})

    assert words(MissCause.EVICTED, how="evicted", ago_s=12.0) == "evicted 12.0 s before"
    assert (
        words(MissCause.NAMESPACE, fields=["kv_dtype", "hf_config.rope_theta"])
        == "stored under another namespace (different KV dtype, model config rope_theta)"
    )
    assert words(MissCause.REFUSED, decision="forced").endswith("(load=never)")
    assert words(MissCause.REFUSED, load_s=0.2, recompute_s=0.1).endswith(
        "(its head: load 200 ms, compute 100 ms)"
    )
    assert words(MissCause.STORE_SKIPPED, how="no_room", ago_s=0).endswith("(no free slot)")
    assert why_words.why({"cause": None}) == ""
    assert why_words.why({"cause": "of 2030"}) == f"of 2030: {why_words.UNKNOWN}"
    engine = {"dram_gib": 0.5, "nvme_gib": 0, "policy": "fifo"}
    assert why_words.advice(MissCause.EVICTED, engine) == (
        "DRAM (0.5 GiB, fifo) is too small: raise dram_gib, or add nvme_path"
    )
