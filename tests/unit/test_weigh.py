"""What a lookup's plan says of the queue before it."""

from __future__ import annotations

import pytest

from kvoffload.core.planner import DEADLINE_LOADS, Plan, deadline_s
from kvoffload.core.prefill import PrefillWork
from kvoffload.types import CacheLayout, Tier
from tests.support.fakes import UNIT, full_group, layout_of, sliding_group
from tests.unit.test_manager import TOK, Rig, make

SLOT = 16 * UNIT
HEAD = 64
HYBRID = layout_of(full_group(slot_bytes=SLOT), sliding_group(1, window=32, slot_bytes=SLOT))
MINE = "m" * (HEAD + 16)
OTHER = "o" * 128


def _beside_reads(layout: CacheLayout) -> Rig:
    """``MINE``'s first chunks are in DRAM. Another prompt, 2 GiB, is being read from NVMe."""
    rig = make(slots=512 * 16, layout=layout)
    rig.put(MINE[:HEAD])
    other = rig.chain(OTHER)
    for group in range(len(layout.groups)):
        rig.store.held.update((key, key) for key in other.keys(group))
    for _ in range(4):
        rig.manager.observe_load(Tier.DRAM, 1 << 30, 0.5)
        rig.manager.rates.observe(Tier.NVME, 1 << 30, 1.0)
        rig.manager.observe_prefill(PrefillWork.span(0, HEAD * TOK), 3.0)
    assert rig.load(OTHER, owner="other") is not None
    return rig


def _plan(rig: Rig) -> Plan:
    chain = rig.chain(MINE)
    return rig.manager.plan(chain, 0, chain.tokens)


@pytest.mark.parametrize("hybrid", [False, True])
def test_a_load_from_dram_does_not_queue_behind_reads_from_nvme(hybrid: bool) -> None:
    """Its deadline must keep its slack: with all of it taken for queue, it was its expectation."""
    rig = _beside_reads(HYBRID if hybrid else layout_of(full_group(slot_bytes=SLOT)))
    if not hybrid:  # the rest of it lies behind the queue and is left out
        rig.store.held.update((key, key) for key in rig.chain(MINE).keys(0)[HEAD:])
    made = _plan(rig)
    assert made.end == HEAD * TOK and made.load_s is not None and made.load_s > 0.4
    assert made.queue_s == 0.0
    assert deadline_s(made, 5.0) == pytest.approx(DEADLINE_LOADS * made.load_s)


def test_a_load_from_nvme_does() -> None:
    rig = _beside_reads(layout_of(full_group(slot_bytes=SLOT)))
    rig.store.held.update((key, key) for key in rig.chain(MINE).keys(0)[HEAD:])
    for _ in range(40):
        rig.manager.observe_prefill(PrefillWork.span(0, HEAD * TOK), 60.0)
    made = _plan(rig)
    assert made.end == len(MINE) * TOK and made.load_s is not None
    assert made.queue_s == pytest.approx(2.0, rel=0.05) and made.load_s > made.queue_s
