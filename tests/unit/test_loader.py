"""The short way to a hit in DRAM gives what a full search and a full acquire give."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvoffload.core.hashchain import Chain
from kvoffload.core.lease import Lease
from kvoffload.core.manager import Manager
from kvoffload.core.prefill import PrefillWork
from kvoffload.types import Tier
from tests.support.fakes import UNIT
from tests.unit.test_manager import TOK, Rig, make

PROMPT = "abcdefghijkl"


def filled(places: list[str]) -> tuple[Rig, Chain]:
    """A prompt whose chunks lie each at its place: in DRAM, being filled, on NVMe, nowhere."""
    rig = make(slots=64)
    chain = rig.chain(PROMPT)
    at = dict(enumerate(places))
    for i, place in at.items():
        if place == "nvme":
            rig.store.held[chain.key(0, i)] = chain.key(0, i)
    for i, place in at.items():
        if place in ("dram", "filling"):
            for item in rig.manager.begin_store(chain, i * TOK, (i + 1) * TOK):
                if place == "dram":
                    rig.arena.worker_store(item)
    rig.manager.poll()
    return rig, chain


def the_long_way(manager: Manager) -> None:
    manager._loader._only = None


def teach(manager: Manager, prefill_s: float) -> None:
    """Rates: loads pay (0.5 s of prefill for 1000 tokens), or they do not (1 ms)."""
    for _ in range(4):
        manager.observe_load(Tier.DRAM, UNIT, 0.001)
        manager.observe_load(Tier.NVME, UNIT, 0.004)
        for tokens in (100, 1000):
            manager.observe_prefill(PrefillWork.span(0, tokens), prefill_s * tokens / 1000)


def items(lease: Lease | None) -> object:
    return lease and ([i[:3] + i[4:] for i in lease.items], lease.tokens_by_tier)


@settings(max_examples=150, deadline=None)
@given(
    st.builds(
        lambda head, tail: (["dram"] * head + tail)[:12],
        st.integers(0, 12),
        st.lists(st.sampled_from(["dram", "filling", "nvme", "absent"]), max_size=8),
    ),
    st.sampled_from([0, 0, TOK, 40, 100]),
    st.integers(0, 13 * TOK),
    st.sampled_from(["auto", "auto", "always", "never"]),
    st.sampled_from([None, 0.5, 0.001]),
)
def test_same_plan_and_same_lease(
    places: list[str], start: int, limit: int, load: str, prefill_s: float | None
) -> None:
    short, chain = filled(places)
    long, _ = filled(places)
    the_long_way(long.manager)
    for rig in (short, long):
        rig.manager._weigher._mode = type(rig.manager._weigher._mode)(load)
        if prefill_s is not None:
            teach(rig.manager, prefill_s)
    plans = [rig.manager.plan(chain, start, limit) for rig in (short, long)]
    assert plans[0] == plans[1]
    assert short.manager.counters == long.manager.counters
    end = plans[0].end
    if end > start:
        leases = [rig.manager.acquire("r", chain, start, end) for rig in (short, long)]
        assert items(leases[0]) == items(leases[1])
        for rig, lease in zip((short, long), leases, strict=True):
            rig.manager.check()
            if lease is not None:
                rig.manager.release(lease.id)
            rig.manager.check()
    assert short.manager.counters == long.manager.counters


@pytest.mark.parametrize(
    ("places", "short"),
    [
        (["dram"] * 12, True),
        (["dram"] * 5 + ["absent"] * 7, True),
        (["absent"] * 12, True),
        (["dram"] * 5 + ["filling"], False),
        (["dram"] * 5 + ["nvme"], False),
    ],
    ids=["whole", "head", "none", "filling", "nvme"],
)
def test_when_it_is_taken(places: list[str], short: bool) -> None:
    rig, chain = filled(places)
    near = rig.manager._loader.in_dram(chain, 0, 12 * TOK, rig.clock())
    assert (near is not None) == short
    if near is not None:
        held = places.count("dram")
        assert near[:2] == (held * TOK, held)
        assert rig.manager.lookup(chain, 0, 12 * TOK).by_tier == (
            {Tier.DRAM: held * TOK} if held else {}
        )
