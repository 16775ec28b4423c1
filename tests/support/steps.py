"""Step harness: both halves of the connector in one process, without vLLM, with real bytes.

``MiniEngine`` re-enacts an engine step by step: the mini scheduler (steps_sched) drives the scheduler
half, one mini runner per rank (steps_rank) drives a worker half over real KV memory, a real arena and
real copy threads. With ``in_flight=2`` the orders of step N+1 are built before step N has run, as with
vLLM's async scheduling, which the CPU build of vLLM cannot do.

What makes it red: a token attending to bytes that are not exactly its prefix's (``WrongBytes``),
anything vLLM asserts on, an invariant of ``check()``, a request that does not finish, anything left
over at the end (lease, slot, table entry, job), bytes in DRAM or HBM that are filed under the wrong key.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from kvoffload import _core
from kvoffload.config import Config
from kvoffload.copy.base import LOAD, STORE
from kvoffload.copy.cpu import CpuCopyEngine
from kvoffload.core.hashchain import Chain
from kvoffload.core.lookup import primary
from kvoffload.core.manager import Lease, Manager
from kvoffload.core.pages import PageFormat, ValueType
from kvoffload.core.sizes import slots_needed
from kvoffload.engines.vllm import worker as worker_module
from kvoffload.engines.vllm.scheduler import SchedulerHalf
from kvoffload.engines.vllm.worker import WorkerHalf
from kvoffload.metrics import Payload, empty_payload, merge
from kvoffload.replay.record import StreamRecorder
from kvoffload.tiers.nvme import StripedStore
from kvoffload.tiers.nvme.drive import Drive
from kvoffload.types import GroupKind, GroupLayout
from tests.support.steps_blocks import (
    BlockPool,
    GroupSpec,
    KVGroups,
    MiniRequest,
    Status,
    TokenChain,
)
from tests.support.steps_lazy import LazyEngine, refuse_nth
from tests.support.steps_rank import (
    Aggregator,
    Geometry,
    KVMemory,
    Rank,
    RankOutput,
    WrongBytes,
)
from tests.support.steps_sched import MiniScheduler
from tests.support.steps_setup import MIB, Clock, FakeNamespaces, Options, cache_layout
from tests.support.steps_types import StepOutput

# A loaded machine must not turn a wait at the fence into a lost store.
worker_module.FENCE_MS = 5000


@dataclass
class Known:
    """A request that the harness has seen: what its tokens' bytes must be, wherever they are kept."""

    request: MiniRequest
    salt: bytes
    aborted: bool = False


@dataclass
class MiniEngine:
    """One engine. ``step()`` is vLLM's step_with_batch_queue (or step, with one step in flight)."""

    options: Options = field(default_factory=Options)
    attach: Callable[[str, int], Any] = _core.Arena.attach

    def __post_init__(self) -> None:
        o = self.options
        self.rng = random.Random(o.seed)
        self.clock = Clock()
        self.layout = cache_layout(o)
        self.arena = _core.Arena.create(
            o.arena_bytes, slots_needed(self.layout, o.arena_bytes), o.ranks, False
        )
        self.store: Any = None
        self.disks: list[_core.SegmentStore] = []  # the native stores, to break
        if o.nvme is not None:
            self._open_store(Path(o.nvme))
        self.manager = Manager(
            self.layout,
            self.arena,
            self.store,
            load="always",
            nvme_bytes=o.nvme_bytes if self.store is not None else 0,
            nvme_admission="all",
            clock=self.clock,
        )
        self.namespaces = FakeNamespaces()  # the same in every engine: a restart finds its chunks
        self.scheduler_half = SchedulerHalf(
            Config(load_deadline_ms=o.deadline_ms, verify_sample=o.verify),
            self.layout,
            self.manager,
            self.arena,
            self.namespaces,
            eagle=o.eagle,
            follow=o.follow and o.caching,
            formats=self._formats(),
            recorder=self._recorder(),
            alone=True,
            clock=self.clock,
        )
        self.known: dict[str, Known] = {}
        self.pool = BlockPool(o.blocks)
        self.scheduler_half.watch_hbm(
            lambda: not self.pool.hash_of,
            lambda block_hash: self.pool.cached(0, block_hash) is not None,
        )
        self.kv = KVGroups(o.groups, self.pool, o.caching)
        self.engines: list[LazyEngine] = []
        self.ranks = [self._rank(r) for r in range(o.ranks)]
        self.scheduler = MiniScheduler(
            self.scheduler_half,
            self.kv,
            budget=o.budget,
            max_running=o.max_running,
            asynchronous=o.in_flight > 1,
            spec_tokens=o.spec_tokens,
            defer_alloc=o.defer_alloc,
        )
        self.aggregator = Aggregator(o.ranks)
        self.queue: list[StepOutput] = []
        self.abort_queue: list[str] = []
        self.steps = 0
        self._failures = 0  # of the scheduler half's hooks
        self.bad_chunks = 0  # corrupt or lost slots that ranks reported
        self.hook_errors = 0  # exceptions in the ranks' hooks
        self.expect_bad = False  # a test corrupts bytes on purpose
        self.leaks_allowed = False  # a test breaks request_finished for good
        self._number = 0
        for _ in range(4):  # an idle engine steps until its workers have attached
            self.step()

    def _recorder(self) -> StreamRecorder | None:
        if self.options.record is None:
            return None
        tokens = primary(self.layout).chunk_tokens
        return StreamRecorder(self.options.record, tokens, self.clock())

    def _formats(self) -> dict[int, PageFormat]:
        o = self.options
        return {
            g.group: PageFormat(ValueType(o.values), g.block_bytes // o.layers)
            for g in self.layout.groups
            if g.kind is GroupKind.FULL
        }

    def _tick(self) -> None:
        """What the tick thread does."""
        while self.scheduler_half.compare_sample():
            pass
        self.manager.tick(False)

    def _rank(self, rank: int) -> Rank:
        o = self.options
        memory = KVMemory(
            Geometry(o.blocks, o.layers, o.token_bytes, o.kv_layout, o.pad),
            o.groups,
            0 if o.replicated else rank,
        )

        def make(arena: Any) -> LazyEngine:
            engine = LazyEngine(CpuCopyEngine(arena, rank, 2), self._lag)
            self.engines.append(engine)
            return engine

        half = WorkerHalf(self.layout, rank, attach=self.attach, make_engine=make, clock=self.clock)
        for group in self.layout.groups:
            half.register_group(group.group, memory.fragments(), o.blocks)
        return Rank(
            half,
            memory,
            salt_root=lambda rid: TokenChain([], self.known[rid].salt, 1).last(),
            spec_tokens=o.spec_tokens,
            pickled=o.pickled,
        )

    def _lag(self, kind: int) -> int:
        o = self.options
        base = o.load_lag if kind == LOAD else o.store_lag
        return base + (self.rng.randint(0, o.random_lag) if o.random_lag and base >= 0 else 0)

    # -- requests

    def add(
        self,
        prompt: Sequence[int],
        max_tokens: int = 1,
        *,
        salt: bytes = b"",
        skip: bool = False,
        params: dict[str, Any] | None = None,
        hints: Any = None,
        session: str | None = None,
        lora: Any = None,
    ) -> MiniRequest:
        """A new request; ids are never used twice, as in vLLM. ``hints``: as a client gives them."""
        self._number += 1
        rid = f"r{self._number}"
        chain = TokenChain(prompt, salt, self.layout.hash_tokens)
        request = MiniRequest(rid, chain, len(prompt), max_tokens, skip, session_id=session)
        request.cache_salt = salt.decode() or None
        request.lora_request = lora
        request.kv_transfer_params = params
        if hints is not None:
            request.kv_transfer_params = {"kvoffload": hints}
        self.known[rid] = Known(request, salt)
        self.scheduler.add(request)
        return request

    def abort(self, request: MiniRequest) -> None:
        """As a client that hangs up: seen between a step's result and its bookkeeping."""
        self.known[request.request_id].aborted = True
        self.abort_queue.append(request.request_id)

    def _take_aborts(self) -> None:
        for rid in self.abort_queue:
            self.scheduler.abort(rid)
        self.abort_queue.clear()

    # -- stepping

    def step(self) -> bool:
        """Schedule, run and book what is due. False when the engine is idle."""
        self.steps += 1
        self.clock.now += 0.001
        if len(self.queue) < self.options.in_flight and self.scheduler.has_requests():
            step = self.scheduler.schedule()
            self._nothing_overdue(step)
            self.queue.append(step)
            for rank in self.ranks:
                rank.push(step)
            if not self.options.late_ranks:
                self._run_some()
            self.check()
            busy = bool(step.num_scheduled_tokens)
            more = busy or self.scheduler.has_requests()
            if len(self.queue) < self.options.in_flight and more:
                return True
        elif not self.queue:
            return False
        self._book()
        self.check()
        return True

    def _nothing_overdue(self, step: StepOutput) -> None:
        """Requests are looked at when they may have completed a chunk; here all are, in each step."""
        half = self.scheduler_half
        failures, self._failures = self._failures, sum(half.guard.errors.values())
        if not (self.namespaces.known and half._ready()) or failures != self._failures:
            return
        for request_id in step.num_scheduled_tokens:  # they count as computed by now
            state = half._states.get(request_id)
            if state is None or state.chain is None or state.tainted or not state.hints.store:
                continue
            request, layout = state.request, self.layout
            end = min(request.num_computed_tokens, len(request.block_hashes) * layout.hash_tokens)
            end -= layout.align_tokens if self.options.eagle else 0
            grid = min(g.chunk_tokens for g in layout.groups)
            assert end // grid <= state.stored // grid, "a complete chunk is not stored"

    def _run_some(self) -> None:
        """Ranks run ahead at their own pace, each in order."""
        for rank in self.ranks:
            while rank.pending and self.rng.random() < 0.5:
                rank.run_next()

    def run_pending(self) -> None:
        """Let every rank run all steps it was given."""
        for rank in self.ranks:
            while rank.pending:
                rank.run_next()

    def _book(self) -> None:
        step = self.queue.pop(0)
        outputs: list[RankOutput] = []
        for rank in self.ranks:
            if not rank.outputs:
                rank.run_next()
            outputs.append(rank.outputs.pop(0))
        assert all(o.sampled == outputs[0].sampled for o in outputs), "ranks sampled differently"
        self._take_aborts()
        conn = self.aggregator.add(outputs)
        if conn.report is not None:
            self.bad_chunks += len(conn.report.bad)
            self.hook_errors += sum(conn.report.hook_errors.values())
        self.scheduler.update_from_output(step, outputs[0].sampled, conn)

    def run(self, max_steps: int = 2000) -> None:
        """Step until idle; a livelock or a request that hangs ends in an AssertionError."""
        self._take_aborts()
        for _ in range(max_steps):
            if not self.step() and not self.queue:
                return
            self._take_aborts_if_idle()
        left = {r.request_id: r.status for r in self.scheduler.requests.values()}
        raise AssertionError(f"not idle after {max_steps} steps: {left}")

    def _take_aborts_if_idle(self) -> None:
        if not self.queue:
            self._take_aborts()

    def drain_queue(self) -> None:
        """Book every step in flight without scheduling another."""
        while self.queue:
            self._book()
            self.check()

    def settle(self, rounds: int = 200) -> None:
        """Let stores, reads and write-behind come to rest, as an idle engine's tick thread would."""
        for done in range(rounds + 2000):
            self.run()
            if done < rounds:
                self.clock.now += 0.05
            else:  # copies run at low priority on real threads: a loaded machine takes its time
                time.sleep(0.005)
            self._tick()
            if not self.manager.store_inflight():
                return
        raise AssertionError("stores do not settle")

    def ask(self, prompt: Sequence[int], max_tokens: int = 1, **more: Any) -> MiniRequest:
        """One request from start to end, engine idle afterwards; ``more`` as for ``add``."""
        request = self.add(prompt, max_tokens, **more)
        self.run()
        self.settle()
        assert request.is_finished() and request.num_output_tokens == max_tokens
        return request

    # -- things that happen to an engine

    def forget_hbm(self) -> None:
        """Empty the prefix cache of an idle engine: what comes next can only come from a tier."""
        assert self.scheduler.reset_prefix_cache(running=False, connector=False)

    def reset(self, *, connector: bool, running: bool = False) -> bool:
        """reset_prefix_cache, with nothing in flight."""
        self.drain_queue()
        return self.scheduler.reset_prefix_cache(running=running, connector=connector)

    def change_weights(self) -> None:
        """What plugin.py's wrap of reload_weights does, after the steps that workers already have."""
        self.run_pending()
        self.namespaces.weights += 1
        for rank in self.ranks:
            rank.weights += 1
            rank.half.weights_changed()

    def loading(self) -> list[MiniRequest]:
        return [r for r in self.scheduler.requests.values() if r.status is Status.REMOTE]

    # -- oracles

    def exported(self) -> Payload:
        """Metrics since the last export, of an engine at rest: what the step that ends a request
        takes along, and the rest."""
        out = empty_payload()
        for _ in range(2):
            out = merge(out, self.scheduler_half.take_stats() or empty_payload())
            self.clock.now += 10
        return out

    def check(self) -> None:
        self.scheduler.check()
        self.scheduler_half.check()
        for rank in self.ranks:
            rank.half.check()
        if not self.expect_bad:
            assert not self.bad_chunks, "a rank met a corrupt or lost slot"

    def chain_of(self, known: Known) -> Chain:
        namespace = self.namespaces.namespace()
        assert namespace is not None
        chain = Chain(namespace, b"", self.layout)
        chain.extend(known.request.block_hashes)
        return chain

    def audit_hbm(self) -> int:
        """Every block in the prefix cache holds its hash's bytes, on every rank. Returns the count."""
        digests: dict[bytes, Any] = {}
        size = self.kv.block_tokens
        for known in self.known.values():
            array = known.request.chain.array()
            for i, block_hash in enumerate(known.request.block_hashes):
                digests[block_hash] = array[i * size : (i + 1) * size]
        for block, (group, block_hash) in self.pool.hash_of.items():
            for rank in self.ranks:
                rank.memory.verify(
                    f"cached block {block}", group, [block], 0, digests[block_hash], rank.weights
                )
        return len(self.pool.hash_of)

    def audit_dram(self) -> int:
        """Every chunk that a lookup finds holds its key's bytes. Returns chunks checked."""
        seen: set[bytes] = set()
        namespace = self.namespaces.namespace()
        assert namespace is not None
        weights = self.namespaces.of_weights[namespace]
        grid = max(g.chunk_tokens for g in self.layout.groups)
        for known in self.known.values():
            chain = self.chain_of(known)
            # Step by step: NVMe may hold more of a chain than fits into the arena.
            for end in range(grid, chain.tokens + 1, grid):
                if self.manager.lookup(chain, end - grid, end).end < end:
                    continue
                lease = self._acquire(chain, end - grid, end)
                if lease is None:
                    continue
                for item in lease.items:
                    if bytes(item.key) not in seen and self._ready(item.ref):
                        seen.add(bytes(item.key))
                        self._audit_chunk(known, item, weights)
                self.manager.release(lease.id)
        return len(seen)

    def _acquire(self, chain: Chain, start: int, end: int) -> Lease | None:
        lease = self.manager.acquire("audit", chain, start, end)
        if lease is None:
            self._rest()
            lease = self.manager.acquire("audit", chain, start, end)
        alloc = self.manager._pool.alloc
        cramped = alloc.n_extents < len(alloc.slot_bytes)  # one group's slots keep another's out
        assert lease is not None or cramped, "a hit that cannot be acquired on an idle engine"
        return lease

    def _ready(self, ref: Any) -> bool:
        return self.arena.wait_ready(ref.slot, ref.generation, 2000) == _core.READY

    def _audit_chunk(self, known: Known, item: Any, weights: int) -> None:
        g = self.layout.groups[item.group]
        array = known.request.chain.array()
        for shard in range(g.shards):
            memory = self.ranks[shard].memory
            view = self.arena.view(item.ref.offset + shard * g.shard_bytes, g.shard_bytes)
            got = np.frombuffer(view, np.uint8)
            want = self._shard(memory, array, g, item.chunk, weights)
            if not (got[: len(want)] == want).all():
                raise WrongBytes(f"chunk {item.chunk} of group {item.group}, shard {shard} in DRAM")

    def _shard(self, memory: KVMemory, array: Any, g: GroupLayout, chunk: int, weights: int) -> Any:
        """A chunk's bytes: block by block, a block's layers in the order of the fragments."""
        out = []
        for b in range(g.blocks_per_chunk):
            first = (chunk * g.blocks_per_chunk + b) * g.block_tokens
            digests = array[first : first + g.block_tokens]
            for layer in range(self.options.layers):
                out.append(memory.expected(digests, g.group, layer, weights).reshape(-1))
        return np.concatenate(out)

    def finish(self) -> None:
        """The end of a test: everything finished, nothing left over, all kept bytes right."""
        self.run()
        self.settle()
        for known in self.known.values():
            r = known.request
            assert r.is_finished(), f"{r.request_id} is {r.status}"
            assert known.aborted or r.num_output_tokens == r.max_tokens, f"{r.request_id} cut short"
        if not self.expect_bad:
            self.audit_dram()
        self.audit_hbm()
        self._check_empty()
        self.close()

    def _check_empty(self) -> None:
        half = self.scheduler_half
        self.aggregator.check_idle()
        assert not self.scheduler.requests and not self.scheduler.deferred_frees
        assert self.pool.free_blocks == self.pool.num_blocks - 1, "HBM blocks leaked"
        assert half._loads.is_empty()
        assert self.manager.store_inflight() == 0
        if not self.leaks_allowed:
            assert not half._states, "requests never forgotten"
            assert not half._loads._table._banned, "bans outlive their requests"
        for rank in self.ranks:
            assert not rank.half._running
        for engine in self.engines:
            engine.flush()
        self.clock.now += 120.0  # what is kept from reuse for a while is free by then
        use = self._rest()
        assert use.bytes_pinned == 0, "a lease was never released"
        assert use.slots_quarantined == 0, "a slot never came back"
        self.manager.check()

    def _rest(self) -> Any:
        """Occupancy once the chunk store's jobs have come back (real time, 2 s at most): a slot
        that is read into or written from cannot be evicted."""
        for _ in range(200):
            self._tick()
            use = self.manager.occupancy()
            if not use.slots_quarantined and not use.nvme_inflight_write_bytes:
                break
            time.sleep(0.01)
        return use

    def _open_store(self, path: Path) -> None:
        o = self.options
        path.mkdir(parents=True, exist_ok=True)
        paths = [path] if o.drives == 1 else [path / f"d{i}" for i in range(o.drives)]
        self.disks = [
            _core.SegmentStore(str(p), o.nvme_bytes // o.drives, direct=False, threads=2)
            for p in paths
        ]
        self.store = self.disks[0]
        if o.drives > 1:
            drives = [Drive(str(p), d) for p, d in zip(paths, self.disks, strict=True)]
            self.store = StripedStore(drives, self.clock)

    def close(self) -> None:
        """Idempotent; part of ``finish``."""
        for rank in self.ranks:
            rank.half.shutdown()
        self.scheduler_half.shutdown(5.0)
        if self.store is not None:
            self.store.check()
            self.store.close()
            self.store = None

    # -- conveniences of tests

    def loads_done(self) -> int:
        """Chunk loads submitted to the copy engines, over all ranks."""
        return sum(e.loads for e in self.engines)

    def stores_done(self) -> int:
        """Chunk stores submitted to the copy engines, over all ranks."""
        return sum(e.stores for e in self.engines)

    def computed(self, request: MiniRequest) -> int:
        """Tokens that a forward computed for a request, drafts and repeats included."""
        return self.scheduler.computed.get(request.request_id, 0)

    def until(self, condition: Callable[[], bool], max_steps: int = 200) -> None:
        """Step until the condition holds."""
        for _ in range(max_steps):
            if condition():
                return
            self.step()
        raise AssertionError("it never came to that")

    def until_loading(self, request: MiniRequest) -> None:
        """Step until the request waits for its load."""
        self.until(lambda: request.status is Status.REMOTE)


def tokens(n: int, seed: int = 0) -> list[int]:
    """A prompt of ``n`` tokens; different seeds share no prefix."""
    rng = random.Random(f"prompt {seed}")
    return [rng.randrange(1 << 20) for _ in range(n)]


__all__ = [
    "LOAD",
    "MIB",
    "STORE",
    "GroupSpec",
    "MiniEngine",
    "Options",
    "WrongBytes",
    "refuse_nth",
    "tokens",
]
