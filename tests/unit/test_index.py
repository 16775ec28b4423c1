"""The index: pins and children decide what may be evicted."""

from __future__ import annotations

from itertools import count

import pytest

from kvoffload.core.index import Entry, Index
from kvoffload.core.policy import LruPolicy
from kvoffload.types import ChunkKey, SlotRef, SlotState, Tier


def key(n: int) -> ChunkKey:
    return ChunkKey(bytes([n]) * 16)


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


def test_hottest_first_puts_ancestors_before_descendants(index: Index) -> None:
    for e in (entry(1), entry(2, 1, 1), entry(9)):
        index.add(e)
    index.touch(0, [key(2)])
    assert [e.key[0] for e in index.hottest_first()] == [1, 2, 9]


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
