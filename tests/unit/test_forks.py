"""Who used what of a session: told by where prompts fork, forgotten on the safe side."""

from __future__ import annotations

from collections.abc import Sequence

from hypothesis import given
from hypothesis import strategies as st

from kvoffload.core.forks import Forks
from kvoffload.types import ChunkKey
from tests.support.fakes import chain_of, layout_of


def keys(text: str) -> Sequence[ChunkKey]:
    return chain_of(layout_of(), text).keys(0)


def test_others_uses_count_and_ones_own_do_not() -> None:
    forks = Forks()
    forks.used(keys("abcd"), 3, "me", 1.0)
    assert forks.by_others(keys("abcdef"), 1, "me", 0.0) == 1
    forks.used(keys("abxy"), 2, "you", 2.0)
    assert forks.by_others(keys("abcdef"), 1, "me", 0.0) == 2
    assert forks.by_others(keys("abcdef"), 4, "me", 0.0) == 4, "what was never the session's"
    forks.used(keys("abcz"), 3, "you", 3.0)
    forks.used(keys("abcd"), 3, "me", 4.0)
    assert forks.by_others(keys("abcdef"), 1, "me", 0.0) == 3, "one of several"
    forks.used(keys("q"), 0, "you", 5.0)
    forks.check()


def test_what_had_to_be_forgotten_counts_as_used_by_whoever_was_there() -> None:
    forks = Forks(most=2)
    for n, text in enumerate("abcd"):
        forks.used(keys(text), 1, text, float(n))
        forks.check()
    assert len(forks) == 2
    assert forks.by_others(keys("xy"), 0, "me", 1.0) == 2, "it may have been used then"
    assert forks.by_others(keys("xy"), 0, "me", 1.5) == 0, "it began later"


@given(st.lists(st.tuples(st.text("ab", min_size=1, max_size=6), st.sampled_from("xyz"))))
def test_nothing_that_others_used_is_missed(uses: list[tuple[str, str]]) -> None:
    forks = Forks()
    for n, (text, user) in enumerate(uses):
        forks.used(keys(text), len(text), user, float(n))
    for text in ("aaaaaa", "ababab", "bbabba"):
        shared = max((len(t) for t, user in uses if user != "x" and text.startswith(t)), default=0)
        assert forks.by_others(keys(text), 0, "x", -1.0) == shared
