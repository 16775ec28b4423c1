"""The order in which retention ends, and that what is stale in it goes a little at a time."""

from __future__ import annotations

import random
from itertools import count

import pytest

from kvoffload.core.hints import MAX_PRIORITY
from kvoffload.core.holds import Hold, Holds
from kvoffload.types import ChunkKey


def key(n: int) -> ChunkKey:
    return ChunkKey(n.to_bytes(16, "little"))


def queued(made: Holds) -> int:
    return sum(map(len, made._queues))


def test_stale_rows_are_never_gone_through_all_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    made = Holds()
    n = 20_000
    looked = count()
    live = Holds._live
    monkeypatch.setattr(Holds, "_live", lambda self, row: next(looked) >= 0 and live(self, row))
    most, at = 0, 0
    for round_ in range(6):
        for i in range(n):
            made.add(key(i), i % 800, Hold(0, 1000.0 + 100 * round_ + i % 50))
            made.compact()
            now = next(looked)
            most, at = max(most, now - at), now + 1
    assert most <= 8, "O(1) with each that is added"
    assert queued(made) <= 4 * n
    made.check()


def test_a_chunk_that_keeps_going_and_coming_leaves_no_rows() -> None:
    made = Holds()
    for _ in range(5000):
        made.add(key(1), 0, Hold(0, 1000.0))
        made.compact()
        made.drop(key(1))
    made.add(key(1), 0, Hold(0, 1000.0))
    assert queued(made) <= 4 * 64
    made.check()
    assert made.weakest() == key(1) and made.weakest() is None


class Plain:
    """The same, the slow way."""

    def __init__(self) -> None:
        self.held: dict[ChunkKey, tuple[Hold, int]] = {}

    def add(self, one: ChunkKey, chunk: int, hold: Hold) -> None:
        old = self.held.get(one)
        self.held[one] = (old[0].merged(hold) if old else hold, chunk)

    def weakest(self) -> ChunkKey | None:
        ranked = sorted((h.level, h.until, -chunk, k) for k, (h, chunk) in self.held.items())
        return ranked[0][3] if ranked else None


@pytest.mark.parametrize("seed", range(8))
def test_the_order_is_that_of_what_is_held(seed: int) -> None:
    rng = random.Random(seed)
    made, plain = Holds(), Plain()
    for _ in range(3000):
        n = rng.randrange(60)
        what = rng.random()
        if what < 0.75:
            hold = Hold(rng.choice([0, 0, MAX_PRIORITY]), float(rng.randrange(40)))
            made.add(key(n), n, hold)
            plain.add(key(n), n, hold)
        elif what < 0.85:
            made.drop(key(n))
            plain.held.pop(key(n), None)
        elif what < 0.95:
            want = plain.weakest()
            assert made.weakest() == want
            plain.held.pop(want, None)  # type: ignore[arg-type]
        else:
            odd = [k for k in plain.held if k[0] % 2]
            got = made.weakest_of(lambda k: k[0] % 2 == 1, 1 << 30)
            assert (got is None) == (not odd)
            if got is not None:
                ranked = sorted((plain.held[k][0][:2], -plain.held[k][1], k) for k in odd)
                assert got == ranked[0][2]
                plain.held.pop(got)
        made.compact()
        if rng.random() < 0.1:
            made.check()
    for level in range(MAX_PRIORITY + 1):
        rows = {k: h for k, (h, _) in plain.held.items() if h.level == level}
        assert all(made.get(k) == h for k, h in rows.items())
    now = 20.0
    want = {k for k, (h, _) in plain.held.items() if h.until <= now}
    assert set(made.end(now)) == want
    made.check()
