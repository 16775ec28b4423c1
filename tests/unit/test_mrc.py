"""The live miss-ratio curve against an exact simulation of a leaf-first LRU."""

from __future__ import annotations

import hashlib
import random
from collections import OrderedDict
from collections.abc import Callable, Iterable

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from kvoffload.core import mrc
from kvoffload.core.mrc import MissRatioCurve
from kvoffload.types import ChunkKey

CHUNK = 16
Trace = list[list[int]]


def key(n: int) -> ChunkKey:
    return ChunkKey(hashlib.sha256(b"%d" % n).digest()[:16])


def exact(trace: Trace, capacity: int) -> float:
    """Hit tokens over prompt tokens of a leaf-first LRU of ``capacity`` chunks, from cold."""
    held: OrderedDict[int, None] = OrderedDict()
    hits = asked = 0
    for chain in trace:
        asked += len(chain)
        for chunk in chain:
            if chunk not in held:
                break
            hits += 1
        for chunk in reversed(chain[:capacity]):
            held[chunk] = None
            held.move_to_end(chunk)
        while len(held) > capacity:
            held.popitem(last=False)
    return hits / asked


def sessions(seed: int, requests: int) -> Trace:
    """Chats: a shared system prompt, sessions that grow turn by turn, picked with recency."""
    rng = random.Random(seed)
    names = iter(range(1, 1 << 30))
    prompts = [[next(names) for _ in range(4)] for _ in range(3)]
    live: list[list[int]] = []
    out = []
    for _ in range(requests):
        if not live or rng.random() < 0.2:
            live.append(list(rng.choice(prompts)))
        at = max(0, len(live) - 1 - int(rng.expovariate(0.02)))
        live[at] = live[at] + [next(names) for _ in range(rng.randint(1, 12))]
        out.append(list(live[at]))
    return out


def documents(seed: int, requests: int) -> Trace:
    """Zipf over documents of 5 to 60 chunks, each with a question of its own."""
    rng = random.Random(seed)
    names = iter(range(1, 1 << 30))
    docs = [[next(names) for _ in range(rng.randint(5, 60))] for _ in range(400)]
    weights = [1 / (i + 1) ** 0.9 for i in range(len(docs))]
    picks = rng.choices(docs, weights, k=requests)
    return [d + [next(names) for _ in range(rng.randint(0, 2))] for d in picks]


def fed(trace: Trace, reach: int, **how: float | int) -> MissRatioCurve:
    curve = MissRatioCurve(reach, CHUNK, **how)  # type: ignore[arg-type]
    for chain in trace:
        curve.query([key(n) for n in chain], len(chain) * CHUNK)
    curve.check()
    return curve


def distinct(trace: Trace) -> int:
    return len({n for chain in trace for n in chain})


@pytest.mark.parametrize("make", [sessions, documents])
def test_within_half_a_point_of_the_exact_simulation(make: Callable[[int, int], Trace]) -> None:
    trace = make(1, 1500)
    total = distinct(trace)
    curve = fed(trace, total)
    for share in (0.01, 0.05, 0.1, 0.25, 0.5, 1.0):
        got = curve.hit_ratio(share * total)
        assert got == pytest.approx(exact(trace, int(share * total)), abs=0.005), share


def test_crowded_cells_cost_two_points_at_most() -> None:
    """Three distinct chunks per cell, half of that within reach."""
    trace = sessions(2, 2000)
    total = distinct(trace)
    cells = 1 << (total // 3).bit_length() - 1
    curve = fed(trace, total // 2, cells=cells)
    assert total / cells > 2.9
    for share in (0.01, 0.05, 0.1, 0.25, 0.5):
        got = curve.hit_ratio(share * total)
        assert got == pytest.approx(exact(trace, int(share * total)), abs=0.02), share


def test_sampled_keys_scale_their_distances() -> None:
    trace = documents(3, 3000)
    total = distinct(trace)
    curve = fed(trace, total, rate=0.5)
    for share in (0.05, 0.25, 1.0):
        got = curve.hit_ratio(share * total)
        assert got == pytest.approx(exact(trace, int(share * total)), abs=0.05), share


def test_a_key_that_was_only_left_behind_is_a_hit_later() -> None:
    curve = MissRatioCurve(100, CHUNK)
    chain = [key(n) for n in range(10)]
    curve.query(chain[:4], 5 * CHUNK)
    assert curve.hit_ratio(100) == 0.0
    curve.touch(chain)
    curve.query(chain, 10 * CHUNK)
    assert curve.hit_ratio(10) == pytest.approx(10 / 15)
    assert curve.hit_ratio(4) == pytest.approx(4 / 15)


def test_nothing_asked_is_no_figure() -> None:
    curve = MissRatioCurve(10, CHUNK)
    assert curve.hit_ratio(5) is None
    curve.query([], 7)  # a prompt shorter than a chunk
    assert curve.hit_ratio(5) == 0.0


def test_old_epochs_are_forgotten_not_mixed_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """A ring of few epochs wraps many times; reuse within it stays exact, beyond it is a miss."""
    monkeypatch.setattr(mrc, "_EPOCHS", 1024)
    curve = MissRatioCurve(64, CHUNK)
    for n in range(5000):
        curve.query([key(n % 50), key(1000 + n)], 2 * CHUNK)
        if n % 500 == 0:
            curve.check()
    # Every root comes back after 50 requests of 2 chunks (half of them new): 99 younger ones.
    assert curve.hit_ratio(110) == pytest.approx(0.5, abs=0.01)
    assert curve.hit_ratio(90) == pytest.approx(0.0, abs=0.01)
    late = MissRatioCurve(64, CHUNK)
    late.query([key(1)], CHUNK)
    for n in range(2, 3000):
        late.touch([key(n)])
    late.query([key(1)], CHUNK)
    assert late.hit_ratio(1 << 30) == 0.0
    late.check()


def test_the_window_lets_the_curve_follow() -> None:
    curve = MissRatioCurve(100, CHUNK, window=200)
    for n in range(1000):
        curve.query([key(n)], CHUNK)
    assert curve.hit_ratio(100) == 0.0
    for _ in range(1000):
        curve.query([key(1)], CHUNK)
    assert (curve.hit_ratio(100) or 0) > 0.95 and curve.tokens <= 201 * CHUNK


@pytest.mark.parametrize("reach, chunk", [(0, 16), (10, 0)])
def test_sizes_below_one_are_refused(reach: int, chunk: int) -> None:
    with pytest.raises(ValueError, match="at least 1"):
        MissRatioCurve(reach, chunk)


def test_large_tiers_are_sampled_in_bounded_memory() -> None:
    small, large = MissRatioCurve(1000, CHUNK), MissRatioCurve(1 << 26, CHUNK)
    assert small.rate == 1.0 and small.nbytes < 1 << 20
    assert large.rate == pytest.approx(1 / 16) and large.nbytes < 34 << 20


def chains(draw: st.DataObject) -> Iterable[list[int]]:
    """Chains of a small random tree."""
    for _ in range(draw.draw(st.integers(1, 30))):
        at, chain = 1, []
        for turn in draw.draw(st.lists(st.integers(0, 1), min_size=1, max_size=8)):
            at = 2 * at + turn
            chain.append(at)
        yield chain


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_any_trace_gives_the_exact_curve_in_fixed_memory(data: st.DataObject) -> None:
    """No two keys share a cell of the row that is counted: exact, monotone, never growing."""
    trace = list(chains(data))
    names = {n for chain in trace for n in chain}
    cells = {int.from_bytes(key(n)[:4], "little") % mrc.MIN_CELLS for n in names}
    assume(len(cells) == len(names))
    curve = MissRatioCurve(1000, CHUNK, cells=mrc.MIN_CELLS)
    size = curve.nbytes
    for chain in trace:
        curve.query([key(n) for n in chain], len(chain) * CHUNK)
        curve.check()
    assert curve.nbytes == size
    points = [curve.hit_ratio(c) or 0.0 for c in (*range(1, 40), 100, 10**6)]
    assert points == sorted(points) and points[0] >= 0 and points[-1] <= 1
    for capacity in (1, 2, 3, 5, 8, 13, 30):
        assert curve.hit_ratio(capacity) == pytest.approx(exact(trace, capacity), abs=1e-9)


def test_one_key_in_a_hundred_is_two_points_off_at_most() -> None:
    """Most uses are of four keys, of which a sample has too many or, as here, none."""
    rng = random.Random(7)
    hot = [n for n in range(100) if int.from_bytes(key(n)[8:12], "little") > 0.01 * 2**32][:4]
    trace = [[*hot, 1000 + int(100_000 * rng.random() ** 3)] for _ in range(40_000)]
    curve = MissRatioCurve(100_000, CHUNK, rate=0.01)
    for chain in trace:
        curve.query([key(n) for n in chain], len(chain) * CHUNK)
    for capacity in (1000, 5000, 20_000):
        assert curve.hit_ratio(capacity) == pytest.approx(exact(trace, capacity), abs=0.02)
