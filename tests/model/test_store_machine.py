"""The chunk store against a dict, over reopens and kills, with its invariants checked at every step.

Jobs on arena slots stay in flight over the steps that follow: what they pin is read and written
while other chunks push it out, keys are deleted, slots move on, and the store is closed or killed.
"""

from __future__ import annotations

import hashlib
import shutil
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from kvoffload._core import Arena
from kvoffload.config import IoEngine
from kvoffload.store import Store, open_store
from kvoffload.types import SlotState, StoreResult
from tests.support.store_engines import skip_without

KEYS = st.integers(0, 60)
SLOT_IDS = range(100, 116)  # chunks of whole slots
SLOT_KEYS = st.sampled_from(SLOT_IDS)
SLOTS, SLOT_BYTES = 16, 16384
FIRST_JOB = 1 << 40  # beyond those of Store
SIZES = (1, 100, 4096, 5000, 30_000, 70_000)


def key_of(i: int) -> bytes:
    return hashlib.sha256(b"machine %d" % i).digest()[:16]


def payload_of(i: int) -> bytes:
    nbytes = SLOT_BYTES if i in SLOT_IDS else SIZES[i % len(SIZES)]
    return (hashlib.sha256(b"payload %d" % i).digest() * (nbytes // 32 + 1))[:nbytes]


@dataclass
class Flight:
    """A job on slots that nobody has waited for: (slot, generation, number of the chunk) each."""

    write: bool
    items: list[tuple[int, int, int]]
    must: set[int]  # chunks that have to come back
    moved: set[int] = field(default_factory=set)  # slots that have another owner since


class StoreMachine(RuleBasedStateMachine):
    """``sure``: must be held. ``maybe``: put or deleted since the last flush, or old enough to go.

    ``absent`` keys must not be held: never put, or deleted and flushed (a phantom would be one).
    """

    roomy = True
    io_engine: IoEngine = "threads"

    @initialize(roomy=st.booleans())
    def begin(self, roomy: bool) -> None:
        skip_without(self.io_engine)
        self.dir = Path(tempfile.mkdtemp(prefix="kvo-machine-"))
        self.roomy = roomy
        self.sure: set[int] = set()
        self.maybe: set[int] = set()
        self.unflushed: set[int] = set()
        self.arena = Arena.create(2 << 20, SLOTS, 1, False)
        self.flights: dict[int, Flight] = {}
        self.next_job = FIRST_JOB
        self.store: Store = self.open()

    def open(self) -> Store:
        bound = (16 << 20) if self.roomy else (1 << 20)
        return open_store(
            self.dir / "s",
            max_bytes=bound,
            segment_bytes=1 << (18 if self.roomy else 17),
            threads=2,
            io_engine=self.io_engine,
        )

    @rule(keys=st.lists(KEYS, min_size=1, max_size=12))
    def put(self, keys: list[int]) -> None:
        results = self.store.put_many((key_of(i), payload_of(i)) for i in keys)
        assert set(results) == {StoreResult.OK}
        self.sure |= set(keys)
        self.maybe -= set(keys)
        self.unflushed |= set(keys)

    @rule(keys=st.lists(KEYS, min_size=1, max_size=12))
    def get(self, keys: list[int]) -> None:
        for i, found in zip(keys, self.store.get_many([key_of(i) for i in keys]), strict=True):
            if found is not None:
                assert found == payload_of(i)
                assert i in self.sure | self.maybe, f"phantom {i}"
            elif self.roomy:
                assert i not in self.sure, f"lost {i}"

    @rule(key=KEYS)
    def delete(self, key: int) -> None:
        held = self.store.contains(key_of(key))
        assert self.store.delete(key_of(key)) == held
        assert self.store.get(key_of(key)) is None
        if held:
            self.sure.discard(key)
            self.unflushed.add(key)

    @rule(
        keys=st.lists(KEYS, min_size=1, max_size=12),
        seconds=st.sampled_from([0.0, 0.01, 600.0]),
        level=st.integers(0, 4),
        owner=st.integers(0, 2),
    )
    def retain(self, keys: list[int], seconds: float, level: int, owner: int) -> None:
        native = self.store._native
        assert native is not None
        names = b"".join(map(key_of, keys))
        assert len(native.retain(names, seconds, level, owner)) == len(keys)
        for i, kept in zip(keys, native.retained(names), strict=True):
            assert not kept or self.store.contains(key_of(i)), "kept and not there"

    @rule()
    def retain_none(self) -> None:
        native = self.store._native
        assert native is not None
        native.retain_none()
        assert self.store.stats()["retained_bytes"] == 0

    # -- jobs on slots

    def free_slots(self, most: int) -> list[int]:
        taken = {slot for flight in self.flights.values() for slot, _, _ in flight.items}
        return [slot for slot in range(SLOTS) if slot not in taken][:most]

    def writing(self) -> set[int]:
        """Chunks that a put in flight may bring in at any moment."""
        return {i for f in self.flights.values() if f.write for _, _, i in f.items}

    @rule(keys=st.lists(SLOT_KEYS, min_size=1, max_size=6, unique=True), write=st.booleans())
    def start(self, keys: list[int], write: bool) -> None:
        slots = self.free_slots(len(keys))
        items = [(s, self.arena.begin_fill(s, 1), i) for s, i in zip(slots, keys, strict=False)]
        if not items:
            return
        native = self.store._native
        assert native is not None
        where = {
            "slots": np.array([s for s, _, _ in items], dtype=np.uint32),
            "generations": np.array([g for _, g, _ in items], dtype=np.uint64),
            "offsets": np.array([s * SLOT_BYTES for s, _, _ in items], dtype=np.uint64),
            "nbytes": SLOT_BYTES,
        }
        numbers = [i for _, _, i in items]
        names = b"".join(map(key_of, numbers))
        job, self.next_job = self.next_job, self.next_job + 1
        sure = {i for i in numbers if i in self.sure} if self.roomy else set()
        if write:
            for slot, generation, i in items:
                self.arena.view(slot * SLOT_BYTES, SLOT_BYTES)[:] = payload_of(i)
                self.arena.hash_leaves(slot * SLOT_BYTES, SLOT_BYTES, key_of(i))
                assert self.arena.fill_done(slot, generation)
            depths = np.zeros(len(items), dtype=np.uint32)
            native.put_slots(job, self.arena, names, namespace=0, depths=depths, **where)
            self.maybe |= set(numbers) - self.sure
            self.unflushed |= set(numbers)
            self.flights[job] = Flight(True, items, set(numbers) if self.roomy else set())
        else:
            native.inject("slow_read_ms", 2)  # it lasts until after the next steps have begun
            native.get_slots(job, self.arena, names, **where)
            self.flights[job] = Flight(False, items, sure)

    @precondition(lambda self: self.flights)
    @rule(pick=st.integers(0, 1 << 20))
    def move_on(self, pick: int) -> None:
        """A slot under I/O gets another owner, who writes to it where the store only reads it."""
        flight = list(self.flights.values())[pick % len(self.flights)]
        slot, generation, i = flight.items[pick % len(flight.items)]
        if slot in flight.moved:
            return
        assert self.arena.begin_fill(slot, 1) > generation
        flight.moved.add(slot)
        flight.must.discard(i)
        if flight.write:
            self.arena.view(slot * SLOT_BYTES, SLOT_BYTES)[:] = b"\xee" * SLOT_BYTES

    @precondition(lambda self: self.flights)
    @rule(pick=st.integers(0, 1 << 20))
    def finish(self, pick: int) -> None:
        job = list(self.flights)[pick % len(self.flights)]
        assert self.store._native is not None
        assert self.store._native.wait(job, 20_000)
        self.settle(self.flights.pop(job))

    def settle(self, flight: Flight, *, cut_off: bool = False) -> None:
        """The job is over; ``cut_off``: because the store is. Its slots say how it went."""
        for slot, generation, i in flight.items:
            if slot in flight.moved:  # whoever has it now is not told that it is filled
                assert self.arena.state(slot) == SlotState.FILLING
                continue
            assert self.arena.generation(slot) == generation
            state = self.arena.state(slot)
            if flight.write:
                assert state == SlotState.READY
                if i in flight.must and not cut_off:
                    assert self.store.contains(key_of(i)), f"lost {i}"
                    self.sure.add(i)
                continue
            assert state in (SlotState.READY, SlotState.FAILED)
            if state == SlotState.READY:
                assert bytes(self.arena.view(slot * SLOT_BYTES, SLOT_BYTES)) == payload_of(i)
            else:
                assert cut_off or i not in flight.must, f"lost {i}"
        if not cut_off and not any(not f.write for f in self.flights.values()):
            assert self.store._native is not None
            self.store._native.inject("slow_read_ms", 0)

    def settle_all(self, *, cut_off: bool = False) -> None:
        for job in list(self.flights):
            if not cut_off:
                assert self.store._native is not None
                assert self.store._native.wait(job, 20_000)
            self.settle(self.flights.pop(job), cut_off=cut_off)

    @rule(key=SLOT_KEYS)
    def delete_slot_key(self, key: int) -> None:
        coming = key in self.writing()
        assert self.store.delete(key_of(key)) in (0, 1)
        self.sure.discard(key)
        self.unflushed.add(key)
        for flight in self.flights.values():
            flight.must.discard(key)
        if coming:
            self.maybe.add(key)  # a put that ends later brings it back
        else:
            assert not self.store.contains(key_of(key))

    @rule()
    def flush(self) -> None:
        assert self.store.flush()
        self.unflushed = set()

    @rule()
    def reopen(self) -> None:
        held = {row.key for row in self.store.ls()}
        coming = set(map(key_of, self.writing()))
        self.store.close()
        self.settle_all(cut_off=True)
        self.unflushed = set()
        self.store = self.open()
        # Room may be made at open; nothing may appear but what was being put.
        now = {row.key for row in self.store.ls()}
        assert now <= held | coming
        assert not self.roomy or held <= now

    @rule()
    def kill(self) -> None:
        assert self.store._native is not None
        self.store._native._abandon()
        self.settle_all(cut_off=True)
        self.store = self.open()
        self.sure -= self.unflushed
        self.maybe |= self.unflushed  # put: here or not. deleted: gone or back.
        self.unflushed = set()

    @rule()
    def verify(self) -> None:
        self.settle_all()
        report = self.store.verify()
        assert report.bad == 0 and report.checked == len(self.store)

    @invariant()
    def sound(self) -> None:
        if not hasattr(self, "store"):
            return
        self.store.check()
        held_keys = [self.store.contains(key_of(i)) for i in range(61)]
        leading = held_keys.index(False) if False in held_keys else 61
        assert self.store.longest_prefix([key_of(i) for i in range(61)]) == leading
        for i in (*range(61), *SLOT_IDS):
            held = self.store.contains(key_of(i))
            assert not held or i in self.sure | self.maybe, f"phantom {i}"
            assert held or not self.roomy or i not in self.sure, f"lost {i}"
        stats = self.store.stats()
        assert stats["corrupt"] == stats["io_errors"] == 0
        assert self.disk_bytes() <= stats["bytes_max"]

    def disk_bytes(self) -> int:
        total = 0
        for entry in self.dir.rglob("*"):
            try:
                info = entry.lstat()
            except FileNotFoundError:  # a journal whose segment was sealed just now
                continue
            total += max(info.st_size, info.st_blocks * 512)
        return total

    def teardown(self) -> None:
        if hasattr(self, "store"):
            self.store.close()
            shutil.rmtree(self.dir)


class UringMachine(StoreMachine):
    """The same on the other engine."""

    io_engine: IoEngine = "uring"


SETTINGS = settings(
    max_examples=25,
    stateful_step_count=25,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
for machine in (StoreMachine, UringMachine):
    machine.TestCase.settings = SETTINGS
TestStoreMachine = StoreMachine.TestCase
TestUringMachine = UringMachine.TestCase
