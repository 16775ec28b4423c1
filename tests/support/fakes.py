"""Small pure-Python arena and chunk store for core tests: stepped by hand, with fault switches.

They behave as ``kvoffload._core`` documents, in one thread, and remember *whose bytes* are where: the
content of a slot or of a stored chunk is the key it was written under. So a test sees a foreign or torn
chunk as a wrong key.
"""

from __future__ import annotations

import hashlib
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from kvoffload.core.hashchain import Chain
from kvoffload.tiers.base import PIN_LEVEL
from kvoffload.tiers.null import NullDone
from kvoffload.types import CacheLayout, ChunkKey, GroupKind, GroupLayout, SlotState, StoreResult

KEY_BYTES = 16
TORN = b"torn"


class FakeClock:
    """A clock that only moves when told."""

    def __init__(self, now: float = 1000.0) -> None:
        self.now = now

    def __call__(self) -> float:
        return self.now

    def advance(self, seconds: float) -> None:
        self.now += seconds


class Faulty:
    """``raising`` names methods that raise OSError until removed from it."""

    def __init__(self) -> None:
        self.raising: set[str] = set()

    def _maybe(self, what: str) -> None:
        if what in self.raising:
            raise OSError(f"injected: {what}")


class FakeArena(Faulty):
    """The slot table plus, per offset, the key whose bytes lie there."""

    def __init__(self, data_bytes: int, max_slots: int) -> None:
        super().__init__()
        self.data_bytes = data_bytes
        self.max_slots = max_slots
        self._state = [int(SlotState.FREE)] * max_slots
        self._generation = [0] * max_slots
        self._need = [0] * max_slots
        self._done = [0] * max_slots
        self.bytes_at: dict[int, bytes] = {}

    def begin_fill(self, slot: int, need_mask: int) -> int:
        self._maybe("begin_fill")
        self._state[slot] = int(SlotState.FILLING)
        self._generation[slot] += 1
        self._need[slot], self._done[slot] = need_mask, 0
        return self._generation[slot]

    def _live(self, slot: int, generation: int, *states: SlotState) -> bool:
        return self._generation[slot] == generation and self._state[slot] in states

    def rank_done(self, slot: int, generation: int, rank: int) -> bool:
        if not self._live(slot, generation, SlotState.FILLING):
            return False
        self._done[slot] |= 1 << rank
        if self._done[slot] & self._need[slot] == self._need[slot]:
            self._state[slot] = int(SlotState.READY)
        return True

    def fill_done(self, slot: int, generation: int) -> bool:
        ok = self._live(slot, generation, SlotState.FILLING)
        if ok:
            self._state[slot] = int(SlotState.READY)
        return ok

    def fail(self, slot: int, generation: int) -> bool:
        self._maybe("fail")
        ok = self._live(slot, generation, SlotState.FILLING, SlotState.READY)
        if ok:
            self._state[slot] = int(SlotState.FAILED)
        return ok

    def set_free(self, slot: int) -> None:
        self._maybe("set_free")
        self._state[slot] = int(SlotState.FREE)

    def state(self, slot: int) -> int:
        return self._state[slot]

    def generation(self, slot: int) -> int:
        return self._generation[slot]

    def states(
        self, slots: npt.NDArray[np.uint32], generations: npt.NDArray[np.uint64]
    ) -> npt.NDArray[np.uint8]:
        self._maybe("states")
        out = [
            self._state[s] if self._generation[s] == g else int(SlotState.FREE)
            for s, g in zip(slots.tolist(), generations.tolist(), strict=True)
        ]
        return np.array(out, np.uint8)

    # -- what workers do

    def worker_store(self, item: Any, ranks: Sequence[int] = (0,), ok: bool = True) -> None:
        """Copy a StoreItem's bytes in on these ranks; ``ok`` False: the last one fails."""
        slot, generation = item.ref.slot, item.ref.generation
        for rank in ranks if ok else ranks[:-1]:
            self.bytes_at[item.ref.offset] = item.key
            self.rank_done(slot, generation, rank)
        if not ok:
            self.bytes_at[item.ref.offset] = TORN
            self.fail(slot, generation)


@dataclass
class _Job:
    job: int
    kind: int
    arena: FakeArena
    keys: list[bytes]
    slots: list[int]
    generations: list[int]
    offsets: list[int]
    nbytes: int
    results: list[int] = field(default_factory=list)


class FakeStore(Faulty):
    """A chunk store of ``max_entries`` chunks (oldest recycled first) whose jobs run in ``step``."""

    def __init__(self, max_entries: int = 1 << 30, clock: FakeClock | None = None) -> None:
        super().__init__()
        self.max_entries = max_entries
        self.held: dict[bytes, bytes] = {}  # key -> whose bytes they are
        self.keeps: dict[bytes, tuple[float, int, int]] = {}  # until, level, owner
        self.pinned: set[bytes] = set()
        self.corrupt: set[bytes] = set()
        self.unreadable: set[bytes] = set()  # lie on bad sectors: EIO until written anew
        self.job_ns = 1_000_000  # what a job says it took
        self.read_result: StoreResult | None = None  # force this outcome for reads
        self.write_result: StoreResult | None = None
        self.hung = False
        self.queue: deque[_Job] = deque()
        self.order: list[tuple[int, bytes]] = []  # (kind, key) as executed
        self.bad_reads: set[bytes] = set()  # keys whose read ever failed
        self._done: list[NullDone] = []
        self._clock = clock

    def _submit(self, job: int, kind: int, arena: FakeArena, *arrays: Any) -> None:
        keys, slots, generations, offsets, nbytes = arrays
        parts = [keys[i : i + KEY_BYTES] for i in range(0, len(keys), KEY_BYTES)]
        assert len(parts) == len(slots) == len(generations) == len(offsets) and parts
        self.queue.append(
            _Job(
                job,
                kind,
                arena,
                parts,
                slots.tolist(),
                generations.tolist(),
                offsets.tolist(),
                nbytes,
            )
        )

    def put_slots(
        self,
        job: int,
        arena: Any,
        keys: bytes,
        slots: npt.NDArray[np.uint32],
        generations: npt.NDArray[np.uint64],
        offsets: npt.NDArray[np.uint64],
        nbytes: int,
        namespace: int,
        depths: npt.NDArray[np.uint32],
        deadline_ms: int = 0,
    ) -> None:
        self._maybe("put_slots")
        assert 0 <= namespace < 1 << 64 and len(depths) == len(slots)
        self._submit(job, 0, arena, keys, slots, generations, offsets, nbytes)

    def get_slots(
        self,
        job: int,
        arena: Any,
        keys: bytes,
        slots: npt.NDArray[np.uint32],
        generations: npt.NDArray[np.uint64],
        offsets: npt.NDArray[np.uint64],
        nbytes: int,
        deadline_ms: int = 0,
    ) -> None:
        self._maybe("get_slots")
        self._submit(job, 1, arena, keys, slots, generations, offsets, nbytes)

    def cancel(self, job: int) -> int:
        for queued in [q for q in self.queue if q.job == job]:
            self.queue.remove(queued)
            started = len(queued.results)
            for at in range(started, len(queued.keys)):
                if queued.kind == 1:
                    queued.arena.fail(queued.slots[at], queued.generations[at])
                queued.results.append(int(StoreResult.DROPPED))
            self._finish(queued)
            return len(queued.keys) - started
        return 0

    def step(self, jobs: int = 1 << 30) -> int:
        """Run up to ``jobs`` queued jobs to their end; returns how many ran."""
        ran = 0
        while self.queue and ran < jobs and not self.hung:
            self._run(self.queue.popleft())
            ran += 1
        return ran

    def step_one_key(self) -> bool:
        """Do one key of the first job, so that its slot changes while the job is still out."""
        if not self.queue or self.hung:
            return False
        job = self.queue[0]
        self._one(job, len(job.results))
        if len(job.results) == len(job.keys):
            self._finish(self.queue.popleft())
        return True

    def _run(self, job: _Job) -> None:
        for at in range(len(job.results), len(job.keys)):
            self._one(job, at)
        self._finish(job)

    def _finish(self, job: _Job) -> None:
        good = sum(r == StoreResult.OK for r in job.results)
        self._done.append(
            NullDone(job.job, job.kind, bytes(job.results), good * job.nbytes, self.job_ns)
        )

    def _one(self, job: _Job, at: int) -> None:
        do = self._put_one if job.kind == 0 else self._get_one
        self.order.append((job.kind, job.keys[at]))
        slot = (job.slots[at], job.generations[at], job.offsets[at])
        job.results.append(int(do(job.arena, job.keys[at], *slot)))

    def _put_one(
        self, arena: FakeArena, key: bytes, slot: int, generation: int, offset: int
    ) -> StoreResult:
        assert arena.generation(slot) == generation, "a slot was reused under a write"
        if self.write_result is not None:
            return self.write_result
        while len(self.held) >= self.max_entries and key not in self.held:
            oldest = next(iter(self.held))
            self.lose(next((k for k in self.held if not self.keeps_for_others(k)), oldest))
        self.held[key] = arena.bytes_at[offset]
        self.unreadable.discard(key)
        self.corrupt.discard(key)
        return StoreResult.OK

    def _get_one(
        self, arena: FakeArena, key: bytes, slot: int, generation: int, offset: int
    ) -> StoreResult:
        assert arena.generation(slot) == generation, "a slot was reused under a read"
        result = self.read_result or StoreResult.OK
        if key not in self.held:
            result = StoreResult.MISS
        elif result is StoreResult.CORRUPT or key in self.corrupt or self.held[key] != key:
            self.lose(key)
            self.corrupt.discard(key)
            result = StoreResult.CORRUPT
        elif key in self.unreadable:
            result = StoreResult.IO_ERROR
        if result is not StoreResult.OK:
            self.bad_reads.add(key)
            arena.bytes_at[offset] = TORN
            arena.fail(slot, generation)
            return result
        arena.bytes_at[offset] = key
        return StoreResult.OK if arena.fill_done(slot, generation) else StoreResult.DROPPED

    def poll(self) -> Sequence[NullDone]:
        self._maybe("poll")
        done, self._done = self._done, []
        return done

    def wait(self, job: int, timeout_ms: int) -> bool:
        """Waiting lets one job run; it costs the whole time-out when the store hangs."""
        self._maybe("wait")
        if not any(j.job == job for j in self.queue):
            return True
        if self._clock is not None and self.hung:
            self._clock.advance(timeout_ms / 1000)
        self.step(1)
        return not any(j.job == job for j in self.queue)

    def contains(self, keys: bytes) -> bytes:
        self._maybe("contains")
        parts = (keys[i : i + KEY_BYTES] for i in range(0, len(keys), KEY_BYTES))
        return bytes(k in self.held for k in parts)

    def delete(self, keys: bytes) -> int:
        self._maybe("delete")
        parts = [keys[i : i + KEY_BYTES] for i in range(0, len(keys), KEY_BYTES)]
        found = sum(key in self.held for key in parts)
        for key in parts:
            self.lose(key)
        return found

    def retain(self, keys: bytes, seconds: float, level: int = 0, owner: int = 0) -> bytes:
        self._maybe("retain")
        assert seconds >= 0 and 0 <= level <= PIN_LEVEL and 0 <= owner < 1 << 64
        parts = [keys[i : i + KEY_BYTES] for i in range(0, len(keys), KEY_BYTES)]
        return bytes(self._retain(key, seconds, level, owner) for key in parts)

    def _retain(self, key: bytes, seconds: float, level: int, owner: int) -> bool:
        if level == PIN_LEVEL:
            (self.pinned.add if seconds and key in self.held else self.pinned.discard)(key)
            return False
        now = self._clock() if self._clock is not None else 0.0
        old = self.keeps.get(key)
        old = old if old is not None and old[0] > now else None
        if not seconds or key not in self.held:
            self.keeps.pop(key, None)
            return False
        new = (now + seconds, level, owner)
        if old is not None:
            who = owner if old[2] == owner else 0
            new = (max(old[0], new[0]), max(old[1], level), who)
        self.keeps[key] = new
        return old is not None and (new[0] > old[0] + 0.5 or new[1] > old[1])

    def retained(self, keys: bytes, owner: int = 0) -> bytes:
        self._maybe("retained")
        parts = (keys[i : i + KEY_BYTES] for i in range(0, len(keys), KEY_BYTES))
        return bytes(self.keeps_for_others(key, owner) for key in parts)

    def keeps_for_others(self, key: bytes, owner: int = 0) -> bool:
        if key not in self.held:
            return False
        now = self._clock() if self._clock is not None else 0.0
        until, _, who = self.keeps.get(key, (0.0, 0, 0))
        return key in self.pinned or (until > now and (not who or who != owner))

    def retain_none(self) -> None:
        self._maybe("retain_none")
        self.keeps.clear()
        self.pinned.clear()

    def lose(self, key: bytes) -> None:
        """Forget a chunk, as recycling does."""
        self.held.pop(key, None)
        self.keeps.pop(key, None)
        self.pinned.discard(key)

    def flush(self, timeout_ms: int) -> bool:
        self._maybe("flush")
        return not self.queue and not self.hung

    def stats(self) -> dict[str, int | float]:
        self._maybe("stats")
        return {"entries": len(self.held), "bytes_used": len(self.held), "bytes_max": 1 << 40}


# -- small layouts and chains

UNIT = 1 << 20  # slot bytes of the usual test group: an arena of n MiB has n slots


def full_group(
    group: int = 0,
    *,
    slot_bytes: int = UNIT,
    block_tokens: int = 16,
    blocks: int = 1,
    ranks: int = 1,
) -> GroupLayout:
    return GroupLayout(
        group=group,
        kind=GroupKind.FULL,
        block_tokens=block_tokens,
        blocks_per_chunk=blocks,
        block_bytes=slot_bytes // blocks // ranks,
        shards=ranks,
    )


def sliding_group(
    group: int, *, window: int, slot_bytes: int = UNIT, block_tokens: int = 16
) -> GroupLayout:
    return GroupLayout(
        group=group,
        kind=GroupKind.SLIDING,
        block_tokens=block_tokens,
        blocks_per_chunk=1,
        block_bytes=slot_bytes,
        shards=1,
        window=window,
    )


def layout_of(*groups: GroupLayout, world_size: int = 1, hash_tokens: int = 16) -> CacheLayout:
    return CacheLayout(
        groups=groups or (full_group(),),
        hash_tokens=hash_tokens,
        align_tokens=max((g.block_tokens for g in groups), default=16),
        world_size=world_size,
    )


def block_hashes(text: str) -> list[bytes]:
    """A chained hash per letter: prompts with a common prefix share its hashes."""
    return [hashlib.sha256(text[: i + 1].encode()).digest() for i in range(len(text))]


def chain_of(layout: CacheLayout, text: str, namespace: bytes = b"ns") -> Chain:
    """The chain of a prompt written as one letter per hash-block."""
    chain = Chain(namespace, b"", layout)
    chain.extend(block_hashes(text))
    return chain


def run_until_idle(tick: Callable[[], None], store: FakeStore, rounds: int = 64) -> None:
    """Tick and step until the store has nothing to do."""
    for _ in range(rounds):
        tick()
        if not store.step():
            tick()
            return
    raise AssertionError("the store never became idle")


__all__ = [
    "TORN",
    "UNIT",
    "ChunkKey",
    "FakeArena",
    "FakeClock",
    "FakeStore",
    "block_hashes",
    "chain_of",
    "full_group",
    "layout_of",
    "run_until_idle",
    "sliding_group",
]
