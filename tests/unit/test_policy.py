"""Eviction order: leaf-first LRU against a naive model, FIFO as reference."""

from __future__ import annotations

import hashlib
from itertools import count

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvoffload.core.policy import (
    POLICIES,
    AdaptivePolicy,
    AgedPolicy,
    ArcPolicy,
    FifoPolicy,
    LruPolicy,
    Policy,
    S3FifoPolicy,
    make_policy,
)
from kvoffload.core.policy.duel import SAMPLE, Duel
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


@pytest.mark.parametrize("name", sorted(POLICIES))
def test_retired_chunks_go_first_unless_touched_again(name: str) -> None:
    policy = make_policy(name, count(1))
    parent = chain(policy, 1, 2) | chain(policy, 11, 12) | chain(policy, 21)
    everything = {key(n) for n in (1, 2, 11, 12, 21)}
    for k in (key(2), key(12), key(21)):
        policy.offer(k)
    policy.touch([key(11), key(12)])
    policy.retire([key(1), key(21), key(11), key(12), key(99)])  # 99 is not known
    policy.touch([key(1)])
    policy.touch([key(21)])
    assert policy.victim() == key(12)
    policy.check({key(2), key(12), key(21)}, everything)
    policy.remove(key(12))
    order = drain(policy, parent, everything - {key(12)})
    assert order[:2] == [11, 2], "what was touched again is no longer retired"


def test_a_retired_parent_stays_so_when_its_child_leaves() -> None:
    lru = LruPolicy(count(1))
    parent = chain(lru, 1, 2) | chain(lru, 11)
    lru.retire([key(1)])
    lru.touch([key(2)])
    assert drain(lru, parent, {key(1), key(2), key(11)}) == [11, 2, 1]
    parent = chain(lru, 1, 2) | chain(lru, 11)
    lru.retire([key(1)])
    lru.touch([key(2)])
    lru.remove(key(2))
    assert drain(lru, {}, {key(1), key(11)}) == [1, 11]


def cached(policy: Policy, uses: list[int], room: int) -> list[int]:
    """Which uses hit in a cache of single chunks."""
    held: set[ChunkKey] = set()
    hits = []
    for n in uses:
        k = key(n)
        if k in held:
            policy.touch([k])
            hits.append(n)
            continue
        if len(held) == room:
            victim = policy.victim()
            assert victim is not None
            policy.remove(victim)
            held.discard(victim)
        policy.insert(k, None)
        policy.offer(k)
        held.add(k)
    policy.check(held, held)
    return hits


SCAN = [n for i in range(60) for n in (1, 2, 3, *range(100 + 8 * i, 108 + 8 * i))]
"""Three chunks used again and again; between two uses more new ones than the cache holds."""


def test_lru_loses_to_a_scan_and_the_others_do_not() -> None:
    assert cached(LruPolicy(count(1)), SCAN, 8) == []
    for policy in (AgedPolicy(count(1)), S3FifoPolicy(count(1))):
        assert len(cached(policy, SCAN, 8)) > 100, type(policy).__name__
    # ARC has to see a second use while a chunk is resident.
    assert len(cached(ArcPolicy(count(1)), [1, 2, 3, *SCAN], 8)) == 180


def test_aged_counts_uses_of_one_request_once() -> None:
    aged = AgedPolicy(count(1))
    for n in range(1000):
        aged.insert(key(n), None)
    for _ in range(8):
        aged.touch([key(0)])
    aged.touch([key(1)])
    aged.touch([key(0)])  # first and last of ten uses in a row
    assert aged.heat(key(0)) < aged.heat(key(1)) + 16
    aged.touch([key(n) for n in range(500, 1000)])
    aged.touch([key(0)])
    assert aged.heat(key(0)) > aged.heat(key(999)) + 1000, "a third use"
    aged.touch([key(n) for n in range(500, 1000)])
    aged.touch([key(999), key(0)])
    assert aged.heat(key(0)) > aged.heat(key(999)) + 1000, "a fourth"


def aged_by_value(values: list[float | None], uses: int) -> AgedPolicy:
    """Chunks 0, 1, ... that came in this order and were then used in this order."""
    aged = AgedPolicy(count(1))
    for n, value in enumerate(values):
        aged.insert(key(n), None, value)
        aged.offer(key(n))
    for _ in range(uses - 1):
        for n in range(len(values)):
            aged.touch([key(n)])
    return aged


def order(policy: Policy, n: int) -> list[int]:
    return drain(policy, {}, {key(i) for i in range(n)})


def test_of_chunks_that_came_back_those_that_take_long_to_compute_stay() -> None:
    values: list[float | None] = [1e-9, 8e-9, 1e-9, 2e-9, None, 8e-9]
    assert order(aged_by_value(values, 1), 6) == [0, 1, 2, 3, 4, 5], "no use for value alone"
    aged = aged_by_value(values, 3)
    assert aged.victim() == key(0)
    assert order(aged, 6)[-2:] == [1, 5], "what is worth most goes last"
    heat = aged_by_value([1.0] * 50 + [1000.0], 3).heat
    assert heat(key(50)) < 4 * heat(key(49)), "however much it is worth, for a few turnovers only"


def test_cheap_chunks_keep_what_their_use_is_worth() -> None:
    plain, valued = aged_by_value([None, None], 3), aged_by_value([1.0, 1e-6], 3)
    assert [valued.heat(key(n)) for n in (0, 1)] == [plain.heat(key(n)) for n in (0, 1)]


@pytest.mark.parametrize("scale", [1e-12, 1.0, 1e6])
def test_the_unit_of_value_does_not_matter(scale: float) -> None:
    values = [1.0 + n * n % 17 for n in range(100)]
    scaled = aged_by_value([v * scale for v in values], 2)
    assert order(scaled, 100) == order(aged_by_value([*values], 2), 100) != list(range(100))
    even = aged_by_value([3.0 * scale] * 100, 2)
    assert order(even, 100) == list(range(100)), "no difference, no effect"


def test_what_value_is_compared_with_follows_what_comes_in() -> None:
    """After many chunks of the new kind a value that was high is nothing special any more."""
    aged = aged_by_value([1.0] * 20, 1)
    was = aged._grade(8.0)
    for n in range(100, 400):
        aged.insert(key(n), None, 8.0)
        aged.remove(key(n))
    assert was >= 3 and aged._grade(8.0) == 0 and aged._grade(64.0) >= 3


def test_the_duel_hears_of_value() -> None:
    adaptive = AdaptivePolicy(count(1))
    for n in range(2000):
        adaptive.insert(key(n), None, 1.0 + n)
        adaptive.touch([key(n)])
    followed = adaptive._followed
    assert 10 < len(followed) < 2000
    assert all(v == 1.0 + int.from_bytes(k, "little") for k, v in followed.items())
    aged = adaptive._duel._second._policy
    assert isinstance(aged, AgedPolicy) and aged._mean > 100
    adaptive.check(set(), {key(n) for n in range(2000)})


def test_aged_forgets_old_counts() -> None:
    aged = AgedPolicy(count(1))
    cached(aged, list(range(1, 1000)), 10)
    assert len(aged._past) <= 2 * 10 + 64


def test_adaptive_follows_the_winner_both_ways() -> None:
    """The same scan at the size of a real cache, then chunks that are used often for a while and
    never again, which frequency keeps too long."""
    policy = AdaptivePolicy(count(1))
    policy.set_worth(0.0)
    policy._duel.second_leads = False
    keys = iter(range(10**6, 10**7))
    hot = list(range(400))
    scan = [n for _ in range(12) for n in (*hot, *(next(keys) for _ in range(1000)))]
    cached(policy, scan, 1000)
    assert policy.worth == 1.0
    fading = AdaptivePolicy(count(1))
    sets = [[next(keys) for _ in range(700)] for _ in range(60)]
    cached(fading, [n for s in sets for _ in range(6) for n in s], 800)
    assert fading.worth == 0.0


def test_a_duel_is_bounded_and_deterministic() -> None:
    def run() -> Duel:
        duel = Duel(LruPolicy(count(1)), AgedPolicy(count(1)))
        for n in range(20_000):
            k = ChunkKey(hashlib.sha256(b"%d" % (n % 15_000)).digest()[:16])
            if duel.follows(k):
                duel.use(k, 12_000)
        return duel

    one, two = run(), run()
    one.check()
    assert 100 < len(one._first.held) <= SAMPLE and one._mask > 7
    assert one._score == two._score and one._first.held == two._first.held
