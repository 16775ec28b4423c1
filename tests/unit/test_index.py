"""The index: pins and children decide what may be evicted."""

from __future__ import annotations

import gc
from dataclasses import replace
from itertools import count

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvoffload.core.hottest import Hottest
from kvoffload.core.index import Entry, Index
from kvoffload.core.policy import LruPolicy
from kvoffload.core.retire import first_retired
from kvoffload.types import ChunkKey, SlotRef, SlotState, Tier


def key(n: int) -> ChunkKey:
    return ChunkKey(bytes([n]) * 16)


def wide(n: int) -> ChunkKey:
    return ChunkKey(n.to_bytes(16, "little"))


def entry(n: int, parent: int | None = None, chunk: int = 0) -> Entry:
    return Entry(
        key=key(n),
        group=0,
        chunk=chunk,
        cls=0,
        nbytes=1,
        ref=SlotRef(n, 1, n),
        source=Tier.DRAM,
        parent=None if parent is None else key(parent),
        namespace_id=0,
        started=0.0,
        state=SlotState.READY,
    )


@pytest.fixture
def index() -> Index:
    return Index([LruPolicy(count(1))])


def test_only_unpinned_ready_leaves_are_victims(index: Index) -> None:
    root, leaf = entry(1), entry(2, 1, 1)
    index.add(root)
    index.add(leaf)
    assert index.victim(0) is leaf and index.children(key(1)) == {key(2)}
    index.pin(leaf)
    assert index.victim(0) is None, "a pinned leaf protects its ancestors"
    index.unpin(leaf)
    leaf.io += 1
    index.refresh(leaf)
    assert index.victim(0) is None
    leaf.io -= 1
    index.refresh(leaf)
    index.check()
    index.remove(leaf)
    assert index.victim(0) is root and leaf.dropped and index.get(key(2)) is None
    index.check()


def test_a_parent_that_comes_back_finds_its_children(index: Index) -> None:
    child = entry(2, 1, 1)
    index.add(child)
    index.add(entry(1))
    assert index.victim(0) is child
    index.check()


def test_family_is_deepest_first_or_nothing(index: Index) -> None:
    root, mid, leaf, other = entry(1), entry(2, 1, 1), entry(3, 2, 2), entry(4, 1, 1)
    for e in (root, mid, leaf, other):
        index.add(e)
    family = index.family([root])
    assert family is not None and family[0] is leaf and family[-1] is root and len(family) == 4
    index.pin(leaf)
    assert index.family([root]) is None and index.family([other]) == [other]


@pytest.mark.parametrize("part", [1, 2, None])
def test_hottest_first_puts_ancestors_before_descendants(index: Index, part: int | None) -> None:
    for e in (entry(1), entry(2, 1, 1), entry(9)):
        e.dirty = True
        index.add(e)
    index.touch(0, [key(2)])
    hot = Hottest(index)
    while not hot.look(part):
        pass
    order = []
    while (e := hot.peek()) is not None:
        order.append(e.key[0])
        hot.pop()
    assert order == [1, 2, 9]


def test_retiring_settles_contradictions_along_a_chain(index: Index) -> None:
    line = [entry(n, n - 1 if n > 1 else None, n - 1) for n in range(1, 7)]
    for e in [*line, entry(20)]:
        index.add(e)
    index.touch(0, [e.key for e in line])
    index.retire([key(1)])  # one mark against five: the chain lives
    assert index.victim(0).key == key(20)  # type: ignore[union-attr]
    index.retire([key(3), key(4), key(5)])  # three against one: so does 6 go, though not named
    for n in (6, 5, 4, 3):
        victim = index.victim(0)
        assert victim is not None and victim.key == key(n)
        index.remove(victim)
        index.check()
    assert index.victim(0).key == key(20)  # type: ignore[union-attr]
    index.retire([key(99)])


@given(marks=st.lists(st.booleans(), max_size=12))
def test_the_retired_tail_contradicts_fewest_marks(marks: list[bool]) -> None:
    def wrong(cut: int) -> int:
        return sum(marks[:cut]) + sum(not m for m in marks[cut:])

    at = first_retired(marks)
    assert wrong(at) == min(wrong(i) for i in range(len(marks) + 1))
    assert all(wrong(i) > wrong(at) for i in range(at + 1, len(marks) + 1)), "the shortest tail"


def test_misuse_and_broken_links_are_seen(index: Index) -> None:
    one = entry(1)
    index.add(one)
    with pytest.raises(ValueError, match="resident already"):
        index.add(entry(1))
    with pytest.raises(ValueError, match="not pinned"):
        index.unpin(one)
    one.pins = 1  # behind the index's back: the policy still offers it
    with pytest.raises(AssertionError, match="offered"):
        index.check()


def test_children_come_and_go_in_any_order(index: Index) -> None:
    index.add(entry(1))
    kids = [entry(n, 1, 1) for n in (2, 3, 4)]
    for kid in kids:
        index.add(kid)
        index.check()
    assert index.children(key(1)) == {key(2), key(3), key(4)}
    for kid in (kids[0], kids[2]):
        index.remove(kid)
        index.check()
    assert index.children(key(1)) == {key(3)} and index.victim(0) is kids[1]
    index.add(entry(5, 1, 1))
    assert index.children(key(1)) == {key(3), key(5)}
    index.remove(kids[1])
    index.check()
    index.remove(index.get(key(5)))
    assert not index.children(key(1)) and index.victim(0) is index.get(key(1))
    index.check()


def test_the_garbage_collector_has_two_objects_of_a_chunk_to_look_at(index: Index) -> None:
    """An arena's worth of them is looked at in each full collection, and the engine waits."""
    entries = [
        replace(entry(1), key=wide(n), parent=wide(n - 1) if n else None, ref=SlotRef(n, 1, n))
        for n in range(4096)
    ]
    gc.collect()
    before = len(gc.get_objects())
    for one in entries:
        index.add(one)
    gc.collect()
    assert len(gc.get_objects()) - before < 100, "more than an Entry and its SlotRef"
    index.check()
