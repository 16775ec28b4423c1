"""Every policy behind the real index, by random histories of one small cache.

Requests walk down a tree of prefixes, pin what they use, insert what is missing and evict for it;
chunks are dropped for cause and retired. Whatever the policy: the capacity holds, nothing pinned and
no parent of a resident chunk goes, there is a victim whenever something may go, and retired chunks go
first.
"""

from __future__ import annotations

from itertools import count

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    rule,
    run_state_machine_as_test,
)

from kvoffload.core.index import Entry, Index
from kvoffload.core.policy import POLICIES, make_policy
from kvoffload.types import ChunkKey, SlotRef, SlotState, Tier

PATHS = st.tuples(st.integers(0, 4), st.integers(0, 2), st.integers(1, 7))
PICKS = st.integers(0, 10_000)


def chain_of(prompt: int, fork: int, length: int) -> list[ChunkKey]:
    """Prompts share a root; a prompt's forks share its first three chunks."""
    names = [b"root"] + [b"%d.%d.%d" % (prompt, fork if d > 2 else 0, d) for d in range(1, length)]
    return [ChunkKey(n.ljust(16, b".")) for n in names]


class PolicyMachine(RuleBasedStateMachine):
    POLICY = ""

    @initialize(capacity=st.integers(1, 14))
    def start(self, capacity: int) -> None:
        self.capacity = capacity
        self.index = Index([make_policy(self.POLICY, count(1))], lambda e: e.chunk * 1e-9 or None)
        self.pinned: list[Entry] = []
        self.retired: set[ChunkKey] = set()
        self.slots = count()

    def make_room(self) -> bool:
        while len(self.index) >= self.capacity:
            may_go = {e.key for e in self.index if self.index.evictable(e)}
            victim = self.index.victim(0)
            assert (victim is not None) == bool(may_go), "a victim exactly when something may go"
            if victim is None:
                return False
            assert victim.key in may_go, "in use, or the parent of a resident chunk"
            assert not (self.retired & may_go) or victim.key in self.retired, "retired go first"
            assert self.index.victim(0) is victim, "looking changes nothing"
            self.leave(victim)
        return True

    def leave(self, entry: Entry) -> None:
        self.index.remove(entry)
        self.retired.discard(entry.key)

    @rule(path=PATHS, keep=st.booleans(), ready=st.booleans())
    def request(self, path: tuple[int, int, int], keep: bool, ready: bool) -> None:
        keys = chain_of(*path)
        mine: list[Entry] = []
        for entry in filter(None, map(self.index.get, keys)):  # gaps: some were dropped
            self.index.pin(entry)
            mine.append(entry)
        self.index.touch(0, [e.key for e in mine])
        self.retired -= {e.key for e in mine}
        for depth, key in enumerate(keys):
            if key in self.index:
                continue
            if not self.make_room():
                break
            parent = keys[depth - 1] if depth else None
            slot = next(self.slots)
            entry = Entry(key, 0, depth, 0, 1, SlotRef(slot, 1, slot), Tier.DRAM, parent, 0, 0.0)
            self.index.add(entry)
            self.index.pin(entry)
            mine.append(entry)
        mine.sort(key=lambda e: e.chunk)
        for entry in mine:
            if ready and entry.state is SlotState.FILLING:
                entry.state = SlotState.READY
                self.index.refresh(entry)
        if keep:
            self.pinned += mine
        else:
            for entry in mine:
                self.index.unpin(entry)

    @rule()
    def let_go(self) -> None:
        for entry in self.pinned:
            if not entry.dropped:
                self.index.unpin(entry)
        self.pinned.clear()

    @rule()
    def stores_finish(self) -> None:
        for entry in list(self.index):
            if entry.state is SlotState.FILLING:
                entry.state = SlotState.READY
                self.index.refresh(entry)

    @rule(pick=PICKS)
    def drop_for_cause(self, pick: int) -> None:
        entries = [e for e in self.index if not e.pins]
        if entries:
            self.leave(entries[pick % len(entries)])

    @rule(path=PATHS, low=st.integers(0, 6))
    def retire(self, path: tuple[int, int, int], low: int) -> None:
        keys = chain_of(*path)[low:]
        self.index._policies[0].retire(keys)  # the index would settle contradictions
        self.retired |= {k for k in keys if k in self.index}

    @invariant()
    def holds(self) -> None:
        if hasattr(self, "index"):
            assert len(self.index) <= self.capacity, "capacity exceeded"
            self.index.check()

    def teardown(self) -> None:
        """Everything can be evicted once nothing is in use, children first."""
        if hasattr(self, "index"):
            self.let_go()
            self.stores_finish()
            self.capacity = 1
            assert self.make_room() and not len(self.index), "leaked"
            assert self.index.victim(0) is None


@pytest.mark.parametrize("policy", sorted(POLICIES))
def test_every_policy(policy: str) -> None:
    machine = type("Machine", (PolicyMachine,), {"POLICY": policy})
    run_state_machine_as_test(
        machine, settings=settings(max_examples=120, stateful_step_count=50, deadline=None)
    )
