"""Eviction order: leaf-first LRU against a naive model, FIFO as reference."""

from __future__ import annotations

from itertools import count

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvoffload.core.policy import FifoPolicy, LruPolicy, Policy, make_policy
from kvoffload.errors import ConfigError
from kvoffload.types import ChunkKey


def key(n: int) -> ChunkKey:
    return ChunkKey(n.to_bytes(16, "little"))


def drain(policy: Policy, parent: dict[ChunkKey, ChunkKey], resident: set[ChunkKey]) -> list[int]:
    """Evict everything, offering only leaves, as the index does."""
    out = []
    while resident:
        for k in resident:
            leaf = all(parent.get(r) != k for r in resident)
            (policy.offer if leaf else policy.withhold)(k)
        victim = policy.victim()
        assert victim is not None and policy.victim() == victim, "peeking changes nothing"
        policy.remove(victim)
        resident.discard(victim)
        out.append(int.from_bytes(victim, "little"))
    assert policy.victim() is None
    return out


def chain(policy: Policy, *numbers: int) -> dict[ChunkKey, ChunkKey]:
    keys = [key(n) for n in numbers]
    for i, k in enumerate(keys):
        policy.insert(k, keys[i - 1] if i else None)
    return {k: keys[i] for i, k in enumerate(keys[1:])}


def test_leaves_go_first_and_touching_a_prefix_saves_it() -> None:
    lru = LruPolicy(count(1))
    parent = chain(lru, 1, 2, 3) | chain(lru, 11, 12)
    lru.touch([key(1), key(2)])
    assert drain(lru, parent, {key(n) for n in (1, 2, 3, 11, 12)}) == [3, 12, 11, 2, 1]


def test_touching_only_the_tail_protects_its_ancestors() -> None:
    lru = LruPolicy(count(1))
    parent = chain(lru, 1, 2) | chain(lru, 11)
    lru.touch([key(2)])
    assert drain(lru, parent, {key(1), key(2), key(11)}) == [11, 2, 1]


def test_a_parent_inherits_the_heat_of_a_child_that_was_dropped() -> None:
    lru = LruPolicy(count(1))
    parent = chain(lru, 1, 2) | chain(lru, 11)
    lru.touch([key(2)])
    lru.remove(key(2))  # not evicted: its bytes were bad
    assert drain(lru, parent, {key(1), key(11)}) == [11, 1]


def test_a_chunk_touched_while_it_is_offered_is_no_longer_next() -> None:
    lru = LruPolicy(count(1))
    for n in (1, 2, 3):
        lru.insert(key(n), None)
        lru.offer(key(n))
    assert lru.victim() == key(1)
    lru.touch([key(1)])
    assert lru.victim() == key(2)


def test_fifo_ignores_use() -> None:
    fifo = FifoPolicy(count(1))
    parent = chain(fifo, 1, 2) | chain(fifo, 11)
    fifo.touch([key(1), key(2)])
    assert drain(fifo, parent, {key(1), key(2), key(11)}) == [2, 1, 11]


def test_unknown_policy_names_the_key() -> None:
    with pytest.raises(ConfigError, match="policy='mru'"):
        make_policy("mru", count())


def test_heap_stays_small_under_repeated_offers() -> None:
    lru = LruPolicy(count(1))
    lru.insert(key(1), None)
    for _ in range(1000):
        lru.offer(key(1))
        lru.touch([key(1)])
        lru.withhold(key(1))
    assert len(lru._heap) < 200


@given(
    ops=st.lists(
        st.tuples(st.sampled_from(["add", "touch", "evict"]), st.integers(0, 5), st.integers(0, 4)),
        max_size=60,
    )
)
def test_lru_equals_touching_whole_chains_leaf_to_root(ops: list[tuple[str, int, int]]) -> None:
    """Model: a list in age order; using a chunk moves it and then all ancestors to the young end."""
    lru = LruPolicy(count(1))
    age: list[ChunkKey] = []
    parent: dict[ChunkKey, ChunkKey] = {}

    def line(k: ChunkKey) -> list[ChunkKey]:
        out = [k]
        while out[-1] in parent:
            out.append(parent[out[-1]])
        return out  # leaf to root

    for what, prompt, depth in ops:
        keys = [key(100 * (prompt if d else 0) + d) for d in range(depth + 1)]  # one shared root
        if what == "add":
            for d, k in enumerate(keys):
                if k not in age:
                    age.append(k)
                    if d:
                        parent[k] = keys[d - 1]
                    lru.insert(k, keys[d - 1] if d else None)
        elif what == "touch" and keys[-1] not in age:
            continue
        if what in ("add", "touch"):
            lru.touch([keys[-1]])
            for k in line(keys[-1]):
                age.remove(k)
                age.append(k)
        elif age:
            leaves = [k for k in age if all(parent.get(r) != k for r in age)]
            for k in age:
                (lru.offer if k in leaves else lru.withhold)(k)
            assert lru.victim() == leaves[0]
            lru.check(set(leaves), set(age))
            lru.remove(leaves[0])
            age.remove(leaves[0])
            parent.pop(leaves[0], None)
