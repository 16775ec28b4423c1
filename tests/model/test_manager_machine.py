"""The whole Manager against a dict model, by random histories over the fake arena and store.

What the model knows: which keys were ever stored whole in this epoch, which slots somebody may still
write to or read from, and what the chunk store holds. The Manager may evict as it likes, but it may
never offer what nobody stored, never reuse a slot in use, never lose a leased chunk, and its lookup
must equal a brute-force search over what is there.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from kvoffload.core import filling, prefetch
from kvoffload.core.breaker import BreakerState
from kvoffload.core.hashchain import Chain
from kvoffload.core.index import Kept
from kvoffload.core.layout import boundary_tokens
from kvoffload.core.manager import Lease, Manager, StoreItem
from kvoffload.core.policy import POLICIES
from kvoffload.core.pool import STORE_TIMEOUT_S
from kvoffload.core.sizes import slots_needed
from kvoffload.types import (
    CacheLayout,
    ChunkKey,
    GroupKind,
    LoadFailure,
    SlotRef,
    SlotState,
    StoreResult,
    Tier,
)
from tests.support.fakes import (
    UNIT,
    FakeArena,
    FakeClock,
    FakeStore,
    chain_of,
    full_group,
    layout_of,
    sliding_group,
)

PROMPTS = ["aaaaaaaa", "aaaabbbb", "aacc", "dddddd", "ddee", "ffffffffffff"]
FAULTS = ["contains", "get_slots", "put_slots", "poll", "retain", "retained", "retain_none"]
prompts = st.sampled_from(PROMPTS)
picks = st.integers(0, 1000)
owners = st.sampled_from(["", "x"])


@pytest.fixture(autouse=True)
def _quiet(caplog: pytest.LogCaptureFixture) -> None:
    """Injected errors are logged with tracebacks, which would bury a failing history."""
    caplog.set_level("CRITICAL", logger="kvoffload.core")


@dataclass
class Out:
    """A store that workers have not finished."""

    item: StoreItem
    started: float


class ManagerMachine(RuleBasedStateMachine):
    LAYOUT: CacheLayout = layout_of(full_group())
    SLOTS = 8
    POLICY = "lru"
    ADMISSION = "all"
    READS_LOOKED = filling.READS_LOOKED
    STEP_CHUNKS = prefetch.STEP_CHUNKS

    def __init__(self) -> None:
        super().__init__()
        filling.READS_LOOKED, prefetch.STEP_CHUNKS = self.READS_LOOKED, self.STEP_CHUNKS
        self.clock = FakeClock()
        data = self.SLOTS * UNIT
        self.arena = FakeArena(data, slots_needed(self.LAYOUT, data))
        self.store = FakeStore(max_entries=12, clock=self.clock)
        self.epoch = 0
        self.manager = Manager(
            self.LAYOUT,
            self.arena,
            self.store,
            policy=self.POLICY,
            write_tb_per_day=1000.0,
            nvme_bytes=1 << 40,
            nvme_admission=self.ADMISSION,
            clock=self.clock,
        )
        self.out: list[Out] = []
        self.leases: dict[int, Lease] = {}
        self.whole: set[ChunkKey] = set()  # stored whole in DRAM at some time in this epoch
        self.failed: set[ChunkKey] = set()  # dropped for cause, not evicted
        self.disowned: set[SlotRef] = set()  # leased when a reset came
        self.links: dict[ChunkKey, ChunkKey] = {}  # FULL child -> parent
        self.before: set[ChunkKey] = set()
        self.counts = self.manager.counters.as_dict()
        self.faulty = False  # a call of the store has raised at some time
        self.kept: dict[
            ChunkKey, tuple[Kept, float]
        ] = {}  # by hints, with the end of the retention
        self.let_go = False  # the last rule ended pins or sessions

    # -- views

    def chain(self, text: str) -> Chain:
        chain = chain_of(self.LAYOUT, text, b"epoch%d" % self.epoch)
        for g in self.LAYOUT.groups:
            if g.kind is GroupKind.FULL:
                keys = chain.keys(g.group)
                self.links.update(zip(keys[1:], keys, strict=False))
        return chain

    def resident(self) -> set[ChunkKey]:
        return {e.key for e in self.manager._pool.index}

    def servable(self, key: ChunkKey) -> bool:
        entry = self.manager._pool.index.get(key)
        usable = self.manager._nvme.usable(self.clock.now)  # type: ignore[union-attr]
        if entry is None:
            return key in self.store.held and "contains" not in self.store.raising and usable
        return entry.state is SlotState.READY or (entry.source is Tier.NVME and usable)

    def brute_force(self, chain: Chain, start: int, limit: int) -> int:
        grid = boundary_tokens(self.LAYOUT)
        for end in range(limit // grid * grid, start, -grid):
            if all(self.group_serves(chain, g, start, end) for g in self.LAYOUT.groups):
                return end
        return start

    def group_serves(self, chain: Chain, g: object, start: int, end: int) -> bool:
        size, group = g.chunk_tokens, g.group  # type: ignore[attr-defined]
        low = max(start, end - g.window) if g.kind is GroupKind.SLIDING else start  # type: ignore[attr-defined]
        need = [i for i in range(end // size + 1) if (i + 1) * size > low and i * size < end]
        return all(i < chain.n_chunks(group) and self.servable(chain.key(group, i)) for i in need)

    # -- stores

    @rule(text=prompts, start=st.integers(0, 12), length=st.integers(1, 12), low=st.integers(0, 9))
    def begin_store(self, text: str, start: int, length: int, low: int) -> None:
        chain = self.chain(text)
        need = (lambda g, i: i >= low) if low else None
        items = self.manager.begin_store(chain, start * 16, (start + length) * 16, need)
        for item in items:
            group = self.LAYOUT.groups[item.group]
            assert start * 16 < (item.chunk + 1) * group.chunk_tokens <= (start + length) * 16
            assert item.key == chain.key(item.group, item.chunk)
            assert self.arena.state(item.ref.slot) == SlotState.FILLING
            assert item.ref.offset % 16384 == 0
            self.out.append(Out(item, self.clock.now))
        self.no_slot_twice()

    def no_slot_twice(self) -> None:
        """Everything somebody may touch lies in disjoint byte ranges."""
        spans = {}
        leased = [i for lease in self.leases.values() for i in lease.items]
        for item in [*leased, *(o.item for o in self.out)]:
            size = self.LAYOUT.groups[item.group].slot_bytes
            spans[(item.ref.slot, item.ref.generation)] = (item.ref.offset, item.ref.offset + size)
        order = sorted(spans.values())
        assert all(a[1] <= b[0] for a, b in pairwise(order)), "slots overlap"
        assert not order or order[-1][1] <= self.arena.data_bytes

    @precondition(lambda self: self.out)
    @rule(pick=picks, ok=st.booleans(), count=st.integers(1, 6))
    def workers_finish(self, pick: int, ok: bool, count: int) -> None:
        ranks = tuple(range(self.LAYOUT.world_size))
        for _ in range(min(count, len(self.out))):
            out = self.out.pop(pick % len(self.out))
            item = out.item
            live = self.arena.generation(item.ref.slot) == item.ref.generation
            assert live, "a slot was reused under a worker's copy"
            self.arena.worker_store(item, ranks, ok=ok or count > 1)
            if ok or count > 1:
                self.whole.add(item.key)
                self.failed.discard(item.key)
            else:
                self.failed.add(item.key)

    @precondition(lambda self: self.out)
    @rule(pick=picks)
    def abort_store(self, pick: int) -> None:
        out = self.out.pop(pick % len(self.out))
        late = self.clock.now - out.started > STORE_TIMEOUT_S
        self.failed.add(out.item.key)
        self.manager.abort_store([out.item])
        if late or self.arena.state(out.item.ref.slot) == SlotState.FILLING:
            # Timed out or reset before: quarantined, and the quarantine ends with the slot's answer.
            self.arena.fail(out.item.ref.slot, out.item.ref.generation)

    # -- loads

    @rule(text=prompts, start=st.integers(0, 100))
    def lookup(self, text: str, start: int) -> None:
        chain = self.chain(text)
        limit = chain.tokens
        want = self.brute_force(chain, start, limit)
        hit = self.manager.lookup(chain, start, limit)
        assert hit.end == want
        assert sum(hit.by_tier.values()) == hit.end - start
        plan = self.manager.plan(chain, start, limit)
        assert start <= plan.end <= max(start, hit.end)

    @rule(text=prompts, start=st.integers(0, 100))
    def acquire(self, text: str, start: int) -> None:
        chain = self.chain(text)
        hit = self.manager.lookup(chain, start, chain.tokens)
        before = self.manager.counters.copy()
        reads = [e for e in self.manager._pool.index if e.source is Tier.NVME]
        failed = any(self.arena.state(e.ref.slot) == SlotState.FAILED for e in reads)
        lease = self.manager.acquire("r", chain, start, hit.end)
        if lease is None:
            c = self.manager.counters
            no_room = c.lease_no_room > before.lease_no_room
            faulty = c.tier_errors > before.tier_errors
            late = failed and c.lease_lost > before.lease_lost
            assert hit.end == start or no_room or faulty or late, "a hit without a lease"
            return
        assert hit.end > start and len(lease.items) == hit.chunks
        assert sum(lease.tokens_by_tier.values()) == hit.end - start
        assert all(i.key == chain.key(i.group, i.chunk) for i in lease.items)
        states = [self.arena.state(i.ref.slot) for i in lease.items]
        assert SlotState.FAILED not in states, "leased though it failed"
        self.leases[lease.id] = lease
        self.no_slot_twice()

    @precondition(lambda self: self.leases)
    @rule(pick=picks, twice=st.booleans())
    def release(self, pick: int, twice: bool) -> None:
        lease_id = sorted(self.leases)[pick % len(self.leases)]
        del self.leases[lease_id]
        self.manager.release(lease_id)
        if twice:
            self.manager.release(lease_id)

    @precondition(lambda self: self.leases)
    @rule(pick=picks, reason=st.sampled_from(list(LoadFailure)))
    def slot_failed(self, pick: int, reason: LoadFailure) -> None:
        items = [i for _, lease in sorted(self.leases.items()) for i in lease.items]
        item = items[pick % len(items)]
        if self.manager.slot_failed(item.ref, reason):
            self.failed.add(item.key)
            assert self.arena.state(item.ref.slot) == SlotState.FAILED

    @rule(text=prompts, start=st.integers(0, 60), owner=st.sampled_from("xy"), wished=st.booleans())
    def prefetch(self, text: str, start: int, owner: str, wished: bool) -> None:
        chain = self.chain(text)
        moved = self.manager.prefetch(owner, chain, start, chain.tokens, wished)
        assert moved >= 0
        assert self.manager.occupancy().prefetch_bytes <= self.arena.data_bytes // 4

    @rule(owner=st.sampled_from("xy"))
    def cancel_prefetch(self, owner: str) -> None:
        self.manager.cancel_prefetch(owner)

    # -- hints

    @rule(
        text=prompts,
        seconds=st.sampled_from([1.0, 20.0, 600.0]),
        level=st.integers(0, 3),
        start=st.sampled_from([0, 0, 30]),
        owner=owners,
    )
    def retain(self, text: str, seconds: float, level: int, start: int, owner: str) -> None:
        chain = self.chain(text)
        keep = self.manager.keep
        keep.retain(chain, chain.tokens, seconds, level, start=start, owner=owner)

    @rule(text=prompts, end=st.integers(0, 200))
    def pin(self, text: str, end: int) -> None:
        self.manager.keep.pin(self.chain(text), end)

    @rule(text=prompts, end=st.integers(0, 200))
    def unpin(self, text: str, end: int) -> None:
        self.let_go = self.manager.keep.unpin(self.chain(text), end)

    @rule(text=prompts, start=st.integers(0, 100), owner=owners)
    def end_session(self, text: str, start: int, owner: str) -> None:
        chain = self.chain(text)
        self.let_go = True
        keep = self.manager.keep
        holds = [(key, keep._holds.get(key)) for key in keep._holds]
        now = self.clock.now
        theirs = {key for key, h in holds if h and h.owner != owner and h.until > now}
        keep.release(chain, start, chain.tokens, owner=owner)
        assert all(key in keep._holds for key in theirs), "somebody else's retention ended"

    # -- the chunk store

    @rule(jobs=st.integers(1, 3))
    def disk_works(self, jobs: int) -> None:
        self.store.step(jobs)

    @rule()
    def disk_does_one_key(self) -> None:
        self.store.step_one_key()

    @precondition(lambda self: self.store.held)
    @rule(pick=picks, corrupt=st.booleans())
    def spoil(self, pick: int, corrupt: bool) -> None:
        key = sorted(self.store.held)[pick % len(self.store.held)]
        self.failed.add(ChunkKey(key))
        if corrupt:
            self.store.corrupt.add(key)
        else:
            self.store.lose(key)

    @precondition(lambda self: self.store.held)
    @rule(pick=picks)
    def bad_sector(self, pick: int) -> None:
        self.store.unreadable.add(sorted(self.store.held)[pick % len(self.store.held)])

    @rule(hung=st.sampled_from([False, False, True]))
    def disk_hangs(self, hung: bool) -> None:
        self.store.hung = hung

    @rule(texts=st.lists(prompts, min_size=2, max_size=4), pause=st.sampled_from([0.7, 3.0]))
    def prefetches_meet_a_stall(self, texts: list[str], pause: float) -> None:
        """Several prompts are on their way when the disk hangs, some of them for nobody."""
        for n, text in enumerate(texts):
            chain = self.chain(text)
            self.manager.prefetch("xy"[n % 2], chain, 0, chain.tokens, bool(n & 2))
            if n & 1:
                self.manager.cancel_prefetch("y")
        self.store.hung = True
        for seconds in (0.6, pause):
            self.clock.advance(seconds)
            self.tick(True)

    @rule(result=st.sampled_from([None, None, StoreResult.IO_ERROR]))
    def disk_reads_fail(self, result: StoreResult | None) -> None:
        self.store.read_result = result

    @rule(result=st.sampled_from([None, None, *[r for r in StoreResult if r >= 3]]))
    def disk_writes_fail(self, result: StoreResult | None) -> None:
        self.store.write_result = result

    @rule(what=st.sampled_from([None, None, *FAULTS]))
    def store_raises(self, what: str | None) -> None:
        self.store.raising = set() if what is None else {what}
        self.faulty |= what is not None

    # -- time

    @rule(busy=st.booleans())
    def tick(self, busy: bool) -> None:
        nvme = self.manager._nvme
        assert nvme is not None
        before = {id(e) for e in nvme.reads.entries()}
        self.manager.tick(busy)
        if nvme.breaker.state(self.clock()) is not BreakerState.CLOSED:
            new = [e for e in nvme.reads.entries() if id(e) not in before]
            assert len(new) <= 1, "more than a probe is read from a tier that may hang"

    @rule()
    def poll(self) -> None:
        self.manager.poll()

    @rule(seconds=st.sampled_from([0.05, 5.0, 35.0, STORE_TIMEOUT_S + 1]))
    def time_passes(self, seconds: float) -> None:
        self.clock.advance(seconds)

    @rule(new_epoch=st.integers(0, 4))
    def reset(self, new_epoch: int) -> None:
        """Mostly with the same keys, as after a restart: NVMe still has what was written."""
        self.failed |= self.resident()
        self.disowned |= {i.ref for lease in self.leases.values() for i in lease.items}
        self.manager.reset()
        assert not self.resident()
        if new_epoch == 0:
            self.epoch += 1

    @rule(text=prompts)
    def serve_and_write_out(self, text: str) -> None:
        """A whole good life in one step, so that histories get past the beginning."""
        chain = self.chain(text)
        self.store.raising.clear()
        self.store.write_result = None
        for item in self.manager.begin_store(chain, 0, chain.tokens):
            self.arena.worker_store(item, tuple(range(self.LAYOUT.world_size)))
            self.whole.add(item.key)
            self.failed.discard(item.key)
        for _ in range(2):
            self.manager.tick(False)
            self.store.step()
        self.manager.tick(False)

    # -- always

    @invariant()
    def parts_agree(self) -> None:
        self.manager.check()

    @invariant()
    def only_what_was_stored_is_offered(self) -> None:
        for entry in self.manager._pool.index:
            if entry.state is SlotState.READY:
                table = self.arena.state(entry.ref.slot)
                assert table in (SlotState.READY, SlotState.FAILED)
                assert self.arena.bytes_at[entry.ref.offset] == entry.key
                assert (
                    entry.key in self.whole
                    or entry.key in self.store.held
                    or (entry.source is Tier.NVME)
                )

    @invariant()
    def nvme_keeps_what_dram_was_asked_to(self) -> None:
        """What is on NVMe and was wished for when it came there, or since, is kept there."""
        if self.faulty:
            return
        for entry in self.manager._pool.index:
            wish = entry.wish
            wished = wish is not None and wish.until > self.clock.now and not entry.retired
            if entry.key in self.store.held and not entry.dirty and wished:
                until, level, _ = self.store.keeps[entry.key]
                assert wish is not None and until >= wish.until - 1 and level >= wish.level
        pinned = self.manager.keep._pins
        lost = [k for k in self.store.pinned if k not in pinned]
        assert not lost, "pinned on NVMe though nobody asks"

    @invariant()
    def leased_bytes_stay(self) -> None:
        for lease in self.leases.values():
            for item in lease.items:
                slot, offset = item.ref.slot, item.ref.offset
                assert self.arena.generation(slot) == item.ref.generation, "reused under a lease"
                entry = self.manager._pool.index.get(item.key)
                there = entry is not None and entry.ref == item.ref
                why = item.ref in self.disowned or self.arena.state(slot) == SlotState.FAILED
                assert there or why, "a leased chunk was evicted"
                if self.arena.state(slot) == SlotState.READY:
                    assert self.arena.bytes_at[offset] == item.key

    @invariant()
    def no_parent_is_evicted_before_its_child(self) -> None:
        now = self.resident()
        after = self.manager.counters.as_dict()
        assert all(after[n] >= v for n, v in self.counts.items()), "counters only grow"
        # Parents may also go because their read or store failed; that is no eviction.
        causes = ("store_timeout", "tier_errors", "nvme_stalled")
        if all(after[n] == self.counts[n] for n in causes):
            excused = self.failed | self.store.bad_reads
            for child, parent in self.links.items():
                gone = parent in self.before and parent not in now and parent not in excused
                assert not (gone and child in self.before and child in now), "an orphan"
            self.what_hints_keep_stays(now, after, excused)
        self.before, self.counts = now, after
        holds = self.manager.keep._holds
        self.kept = {
            e.key: (e.kept, hold.until if (hold := holds.get(e.key)) is not None else 0.0)
            for e in self.manager._pool.index
            if e.kept
        }
        self.let_go = False

    def what_hints_keep_stays(
        self, now: set[ChunkKey], after: dict[str, int], excused: set[ChunkKey]
    ) -> None:
        cut = after["hint_retain_cut"] > self.counts["hint_retain_cut"]
        for key, (kept, until) in self.kept.items():
            if key not in now and key not in excused and not self.let_go:
                ended = cut or until <= self.clock.now
                assert kept is Kept.RETAINED and ended, f"evicted though {kept.name}"
        for kept, share in ((Kept.RETAINED, 2), (Kept.PINNED, 4)):
            entries = (e for e in self.manager._pool.index if e.kept is kept)
            assert sum(e.nbytes for e in entries) <= self.arena.data_bytes // share

    def teardown(self) -> None:
        """Whatever happened, once everybody is done every slot comes back."""
        filling.READS_LOOKED = ManagerMachine.READS_LOOKED
        prefetch.STEP_CHUNKS = ManagerMachine.STEP_CHUNKS
        self.store.raising.clear()
        self.store.hung = False
        self.store.read_result = self.store.write_result = None
        for out in self.out:
            self.arena.worker_store(out.item, tuple(range(self.LAYOUT.world_size)))
        for lease_id in self.leases:
            self.manager.release(lease_id)
        self.manager.drop_nvme()  # else a probe of the tier may hold a slot at the end
        self.manager.reset()
        self.store.step()
        self.manager.tick(False)
        self.clock.advance(STORE_TIMEOUT_S + 1)
        self.manager.tick(False)
        self.manager.check()
        left = self.manager.occupancy()
        assert (left.slots_used, left.prefetch_bytes, left.leases) == (0, 0, 0), "leaked"
        super().teardown()


class ManyReadsMachine(ManagerMachine):
    """More reads are under way than a tick looks at, and prefetches take several."""

    READS_LOOKED = STEP_CHUNKS = 2
    SLOTS = 24


class FifoMachine(ManagerMachine):
    POLICY = "fifo"


class S3FifoMachine(ManagerMachine):
    POLICY = "s3fifo"


class ArcMachine(ManagerMachine):
    POLICY = "arc"


class AdaptiveMachine(ManagerMachine):
    POLICY = "adaptive"


class AdmissionMachine(ManagerMachine):
    """Victims are judged and written before their turn; idle time writes what is hot."""

    ADMISSION = "auto"
    SLOTS = 16


class TwoGroupsAdmissionMachine(ManagerMachine):
    """The same with two slot classes."""

    ADMISSION = "auto"
    LAYOUT = layout_of(
        full_group(0, blocks=2, slot_bytes=2 * UNIT), sliding_group(1, window=40, slot_bytes=UNIT)
    )
    SLOTS = 24


class TwoGroupsMachine(ManagerMachine):
    """Different slot sizes: extents change class; hits need both groups."""

    LAYOUT = layout_of(
        full_group(0, blocks=2, slot_bytes=2 * UNIT), sliding_group(1, window=40, slot_bytes=UNIT)
    )
    SLOTS = 16


class TwoRanksMachine(ManagerMachine):
    """Slots that two ranks fill."""

    LAYOUT = layout_of(full_group(ranks=2, blocks=2), world_size=2)


MACHINE = settings(
    max_examples=80,
    stateful_step_count=50,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
)
TestLru = ManagerMachine.TestCase
TestManyReads = ManyReadsMachine.TestCase
TestFifo = FifoMachine.TestCase
TestS3Fifo = S3FifoMachine.TestCase
TestArc = ArcMachine.TestCase
TestAdaptive = AdaptiveMachine.TestCase
TestTwoGroups = TwoGroupsMachine.TestCase
TestTwoRanks = TwoRanksMachine.TestCase
TestAdmission = AdmissionMachine.TestCase
TestTwoGroupsAdmission = TwoGroupsAdmissionMachine.TestCase
for case in (
    TestLru,
    TestManyReads,
    TestFifo,
    TestS3Fifo,
    TestArc,
    TestAdaptive,
    TestTwoGroups,
    TestTwoRanks,
    TestAdmission,
    TestTwoGroupsAdmission,
):
    case.settings = MACHINE


def test_every_policy_runs_the_machine() -> None:
    machines = (ManagerMachine, FifoMachine, S3FifoMachine, ArcMachine, AdaptiveMachine)
    assert {m.POLICY for m in machines} == set(POLICIES)
