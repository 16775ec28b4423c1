"""The Manager: the one coordinator of what is held where, which chunks load, and which are stored.

A slot's life (state words are those of the shared slot table):

             begin_store, acquire, prefetch
      FREE ------------------------------> FILLING --- abort_store: nobody was told ---> FREE
                                             |  |
              all ranks done, read verified  |  |  rank failed, read failed, slot_failed, reset,
                                             v  |  store without an answer for 60 s
      FREE <--- evicted: unpinned, no I/O, READY|
                no resident child            |  |
                   slot_failed, reset        v  v
      FREE <--- nothing uses the slot ---- dropped: no longer in the index
        ^                                    |  a lease, an NVMe job or an unfinished copy uses it
        +------- the last user is gone ---- quarantine

While READY a chunk is dirty until the chunk store holds it (write-behind), and may be pinned by
leases.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Sequence
from threading import Lock

from kvoffload.core.admission import admission, budget
from kvoffload.core.audit import Parts, check, levels, occupancy
from kvoffload.core.hashchain import Chain
from kvoffload.core.index import Entry
from kvoffload.core.keep import Keeper
from kvoffload.core.layout import check_layout
from kvoffload.core.lease import Lease, LeaseItem, Prefetches, StoreItem
from kvoffload.core.loader import Loader
from kvoffload.core.lookup import Hit
from kvoffload.core.nvme import NvmeTier
from kvoffload.core.planner import Plan, load_mode
from kvoffload.core.pool import Pool
from kvoffload.core.prefetch import Prefetcher
from kvoffload.core.prefill import PrefillWork
from kvoffload.core.rates import Rates
from kvoffload.core.shadow import Shadow
from kvoffload.core.stats import Counters, Guard, Levels, Occupancy
from kvoffload.core.storer import Storer
from kvoffload.core.weigh import Weigher
from kvoffload.core.why import GONE_BY_FAILURE, OFF, Gone, KeyMemory, Trace, fate, trace
from kvoffload.tiers.base import ArenaLike, ChunkStoreLike
from kvoffload.types import (
    CacheLayout,
    ChunkKey,
    Decision,
    GroupKind,
    LoadFailure,
    SlotRef,
    SlotState,
    Tier,
)

__all__ = ["Hit", "Lease", "LeaseItem", "Manager", "StoreItem"]

_SETTLED_KEPT = 65536


class Manager:
    """Owns the DRAM tier's slots and the way to and from the chunk store.

    Called by the scheduler thread, a tick thread and one that explains misses; every method takes
    the one lock, is O(chunks of the request) and does no I/O, except ``drain``, which blocks
    without the lock.
    Failures of arena and store are misses or skipped stores plus a count; only wrong configuration
    raises (ConfigError, from the constructor). The arena and the store belong to the caller, who
    closes the store first. Tokens are counted from the root of the prompt; times are ``clock``
    seconds.
    """

    def __init__(
        self,
        layout: CacheLayout,
        arena: ArenaLike,
        store: ChunkStoreLike | None,
        *,
        policy: str = "lru",
        load: str = "auto",
        write_tb_per_day: float | None = None,
        nvme_bytes: int = 0,
        nvme_admission: str = "auto",
        writer_masks: Sequence[int] | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        check_layout(layout)
        self.counters = Counters()
        self.rates = Rates()
        self._layout = layout
        self._clock = clock
        self._lock = Lock()
        self._closed = False
        self._nvme_bytes = nvme_bytes
        self._data_bytes = arena.data_bytes
        # A group that cannot be served means that no boundary can be: nothing is stored either.
        self._serving = all(g.kind is not GroupKind.NONE for g in layout.groups)
        guard = Guard(self.counters)
        self._pool = Pool(
            layout, arena, policy, self.counters, guard, writer_masks, self.rates.prefill.seconds
        )
        self._pool.on_drop = self._on_drop
        self._pool.note = self._note
        self._memory = KeyMemory()
        self._prefetches = Prefetches(arena.data_bytes // 4)
        self._settled: deque[ChunkKey] = deque(maxlen=_SETTLED_KEPT)
        self._nvme: NvmeTier | None = None
        if store is not None:
            bucket = budget(write_tb_per_day, nvme_bytes, clock())
            judge = admission(
                nvme_admission, self._pool, self.counters, bucket, arena.data_bytes, nvme_bytes
            )
            self._nvme = NvmeTier(
                store, arena, self._pool, self.counters, guard, bucket, self._observe_read, judge
            )
        self.keep = Keeper(
            layout, self._pool, self._nvme, self.counters, arena.data_bytes, self._lock, clock
        )
        self._loader = Loader(layout, self._pool, self._nvme, self._prefetches, self.counters)
        self._storer = Storer(layout, self._pool, self._nvme, self._memory, self.counters)
        self._prefetcher = Prefetcher(
            layout, self._pool, self._nvme, self._prefetches, self.counters, self._loader
        )
        self._weigher = Weigher(
            self._loader,
            self._prefetcher,
            self._prefetches,
            self.rates,
            self.counters,
            load_mode(load),
        )
        self.shadow = Shadow(
            layout, self._pool, self._loader, self.counters, arena.data_bytes, self._lock, clock
        )
        self.shadow.enabled = self._serving

    def _on_drop(self, entry: Entry) -> None:
        if entry.owner is not None:
            self._prefetches.settle(entry)
        self.keep.dropped(entry)
        if self._nvme is not None:
            self._nvme.writes.forget(entry)

    def _note(self, entry: Entry, gone: Gone) -> None:
        if not entry.twin:
            why = fate(entry, gone, self._nvme) if self._nvme is not None else gone
            self._memory.note(entry.key, why, self._clock())

    # -- finding

    def lookup(self, chain: Chain, start: int, limit: int) -> Hit:
        """The longest boundary in (start, limit] that all groups can serve, HBM holding [0, start).

        Held means READY in DRAM, being read from NVMe, or on NVMe. Nothing is pinned.
        """
        with self._lock:
            if self._closed or not self._serving:
                return self._count_hit(Hit(start, 0, {}), start)
            search, end = self._loader.search(chain, start, limit, self._clock())
            return self._count_hit(search.hit(start, end), start)

    def plan(self, chain: Chain, start: int, limit: int) -> Plan:
        """``lookup``, cut back to what is worth loading by the live rates and the load mode."""
        with self._lock:
            if self._closed or not self._serving:
                return Plan(start, Decision.MISS)
            made, hit = self._weigher.plan(chain, start, limit, self._clock())
            self._count_hit(hit, start)
            return made

    def _count_hit(self, hit: Hit, start: int) -> Hit:
        c = self.counters
        c.lookups += 1
        c.lookup_hits += hit.end > start
        c.lookup_misses += hit.end <= start
        c.hit_tokens_dram += hit.by_tier.get(Tier.DRAM, 0)
        c.hit_tokens_nvme += hit.by_tier.get(Tier.NVME, 0)
        return hit

    def trace(self, keys: Sequence[ChunkKey]) -> Trace:
        """What became of the first of ``keys`` (where a lookup ended) that is not held."""
        with self._lock:
            if self._closed or not self._serving:
                return OFF
            return trace(keys, self._pool, self._nvme, self._memory, self._clock)

    def on_nvme(self, keys: Sequence[ChunkKey]) -> Sequence[int]:
        """Per key whether a request could load it from NVMe now."""
        with self._lock:
            return self._nvme.held(keys, self._clock()) if self._nvme else bytes(len(keys))

    def reading(self) -> bool:
        """Whether reads from NVMe are under way that anybody waits for."""
        with self._lock:
            return self._nvme is not None and any(self._nvme.reads.wanted())

    def changes(self) -> int:
        """Grows when what is held in DRAM changes: an answer to ``plan`` may then differ."""
        with self._lock:
            return self._pool.changes

    # -- loading

    def acquire(
        self, owner: str, chain: Chain, start: int, end: int, *, now_s: float | None = None
    ) -> Lease | None:
        """Pin all chunks that a load of [start, end) needs, moving those on NVMe into slots.

        Whoever else already reads a chunk shares its slot. None when a chunk has gone or there is
        no room; then nothing is pinned. ``end`` must be a boundary that ``lookup`` gave.
        """
        with self._lock:
            if self._closed or not self._serving:
                return None
            now = self._clock() if now_s is None else now_s
            self._prefetcher.came(owner)
            return self._loader.acquire(owner, chain, start, end, now)

    def release(self, lease_id: int) -> None:
        """End a lease; idempotent. A slot that is still being read into is not reused before."""
        with self._lock:
            self._loader.release(lease_id, self._clock())

    def prefetch(
        self, owner: str, chain: Chain, start: int, limit: int, wished: bool = False
    ) -> int:
        """Start moving what a later load of [start, limit] needs from NVMe to DRAM, as far as it
        pays, or all of it when ``wished`` for by a hint.

        The first 512 chunks move at once, from the root on, the others in later ticks, 512 in each,
        in the order of the calls. That ends when ``owner`` acquires what it needs or with
        ``cancel_prefetch`` (unless ``wished``), and where a chunk has gone or there is no room.
        ``chain`` is not used after the call. Returns the chunks that this call set moving for
        ``owner``. At most a quarter of the arena holds prefetched chunks that nobody has acquired.
        Not pinned: see ``cancel_prefetch``.
        """
        with self._lock:
            if self._closed or not self._serving:
                return 0
            now = self._clock()
            end = self._weigher.worth_prefetching(chain, start, limit, now, wished)
            if end <= start:
                return 0
            return self._prefetcher.prefetch(owner, chain, start, end, now, wished=wished)

    def cancel_prefetch(self, owner: str) -> int:
        """``owner`` will not come: what is not moving yet stays on NVMe, or is moved for nobody
        where it was ``wished`` for; its unused chunks free its budget and age like any other.
        Returns the latter."""
        with self._lock:
            self._prefetcher.give_up(owner)
            gone = self._prefetches.cancel(owner)
            self.counters.prefetch_cancelled += gone
            return gone

    def slot_failed(self, which: SlotRef | ChunkKey, reason: LoadFailure) -> bool:
        """A worker could not use a chunk's bytes: drop it, wake everybody else who waits on it.

        False when that slot or key is not resident (any more). The slot is reused once nobody uses
        it.
        """
        with self._lock:
            if isinstance(which, SlotRef):
                entry = self._pool.index.at_slot(which.slot)
                if entry is not None and entry.ref != which:
                    entry = None
            else:
                entry = self._pool.index.get(which)
            if entry is None:
                return False
            now = self._clock()
            self.counters.slot_failed += 1
            filling = entry.state is SlotState.FILLING
            if filling and self._nvme is not None and reason is LoadFailure.DEADLINE:
                self._nvme.timed_out(entry, now)
            if not (filling and entry.source is Tier.DRAM):
                # A store's slot is left alone: its workers' answer tells when they are done with
                # it.
                self._pool.fail(entry)
            self._pool.drop(entry, now, GONE_BY_FAILURE.get(reason, Gone.READ_FAILED))
            return True

    # -- storing

    def begin_store(
        self,
        chain: Chain,
        start: int,
        end: int,
        need: Callable[[int, int], bool] | None = None,
        *,
        now_s: float | None = None,
    ) -> list[StoreItem]:
        """A FILLING slot for every complete chunk that ends in (start, end] and that no tier holds.

        ``need(group, chunk)`` filters SLIDING chunks; it runs under the lock and must not call
        back. Without room the rest of a group is skipped and counted. Give items that never reach
        the workers back with ``abort_store``.
        """
        with self._lock:
            if self._closed or not self._serving:
                return []
            now = self._clock() if now_s is None else now_s
            return self._storer.begin(chain, start, end, need, now)

    def retire(self, keys: Sequence[ChunkKey]) -> None:
        """These chunks of one chain are not expected to be used again: evict them first, unless
        they are touched later."""
        with self._lock:
            self._pool.index.retire(keys)

    def abort_store(self, items: Sequence[StoreItem]) -> None:
        """Take back items of ``begin_store`` that no worker was or will be told about."""
        with self._lock:
            self._storer.abort(items, self._clock())

    def spoil_store(self, slot: int, generation: int) -> bool:
        """A store's source blocks are about to be overwritten: its bytes must not become READY.

        False when it has ended. Its copy may still be running, so the slot stays out of use.
        """
        with self._lock:
            return self._pool.spoil(slot, generation, self._clock())

    def store_inflight(self) -> int:
        """Stores that workers still have to finish (timed-out ones excepted)."""
        with self._lock:
            return self._pool.stores_filling()

    def stores_settled(self) -> list[ChunkKey]:
        """Keys whose store became READY since the last call (the latest 65536)."""
        with self._lock:
            out = list(self._settled)
            self._settled.clear()
            return out

    def quarantine(self, tier: Tier) -> None:
        """``tier`` gave wrong bytes: for the life of this Manager nothing is taken from it or given
        to it, and what came from it is dropped; loads under way fail and are recomputed.

        All ways lead through DRAM: without it no tier is used. Idempotent.
        """
        with self._lock:
            now = self._clock()
            if self._nvme is not None:
                self._nvme.enabled = False
            if tier is Tier.DRAM:
                self._serving = self.shadow.enabled = False
                self.shadow.clear(now)
            for entry in sorted(self._pool.index, key=lambda e: -e.chunk):
                if tier is not Tier.DRAM and entry.source is not tier:
                    continue
                if entry.state is SlotState.READY or entry.source is not Tier.DRAM:
                    self._pool.fail(entry)  # else its workers' answer tells when they are done
                self._pool.drop(entry, now, Gone.QUARANTINED)

    # -- progress

    def _collect(self, now: float, all_reads: bool = False) -> None:
        self.keep.expire(now)
        # Jobs first, then the slot table: a returned job's slots are then seen in their final
        # state.
        done = self._nvme.poll() if self._nvme is not None else ()
        returned = self._nvme.returned(done) if self._nvme is not None else ()
        all_reads = all_reads or (self._nvme is not None and self._nvme.seems_still(now))
        for entry in self._pool.settle(now, returned, all_reads):
            if entry.twin:
                continue
            if entry.source is Tier.DRAM:
                self.counters.stored += 1
                self.counters.stored_bytes += entry.nbytes
                self._settled.append(entry.key)
                if self._nvme is not None:
                    self._nvme.writes.push(entry)
            elif self._nvme is not None:
                self._nvme.progressed(now)
        if self._nvme is not None:
            self._nvme.finish(done, now)
            self._nvme.watch(now)

    def poll(self) -> None:
        """Take in all finished stores, reads and writes. O(reads under way): after a failure."""
        with self._lock:
            self._collect(self._clock(), all_reads=True)

    def tick(self, busy: bool) -> None:
        """Take in what has finished (of the reads at least those whose jobs have returned and the
        longest under way), go on with prefetches, then write-behind; ``busy`` while the engine runs
        steps."""
        with self._lock:
            now = self._clock()
            self._collect(now)
            if self._nvme is not None and not self._closed:
                self._prefetcher.go_on(now)
                self._nvme.write_behind(now, busy)

    def observe_load(self, tier: Tier, nbytes: int, seconds: float) -> None:
        """A worker copied ``nbytes`` (all shards) from ``tier``; NVMe reads report themselves."""
        with self._lock:
            self.rates.observe(tier, nbytes, seconds)

    def observe_prefill(self, work: PrefillWork, seconds: float) -> None:
        """The engine computed prompt tokens in ``seconds``."""
        with self._lock:
            self.rates.prefill.add(work, seconds)

    def observe_load_time(self, took_s: float, expected_s: float) -> None:
        """A load from DRAM took ``took_s`` from allocation to answer; its plan had said
        ``expected_s``."""
        with self._lock:
            self.rates.observe_load(took_s, expected_s)

    def recompute_seconds(self, start: int, end: int) -> float | None:
        """What computing prompt tokens [start, end) takes; None until known."""
        with self._lock:
            return self.rates.prefill.seconds(start, end)

    def _observe_read(self, nbytes: int, seconds: float) -> None:
        self.rates.observe(Tier.NVME, nbytes, seconds)

    # -- ending

    def reset(self) -> None:
        """Forget all of DRAM (what is in use, once it is not). New keys hide NVMe."""
        with self._lock:
            now = self._clock()
            self.counters.resets += 1
            self._settled.clear()
            self.shadow.clear(now)
            self.keep.reset()
            self._prefetcher.clear()
            self._pool.drop_all(now, Gone.RESET)

    def end_idle_writes(self) -> None:
        """Keys end with this process from now on: nothing is written for the next one any more, in
        idle time or by ``drain``, only what DRAM has no room for."""
        with self._lock:
            if self._nvme is not None:
                self._nvme.idle.enabled = False

    def drop_nvme(self) -> None:
        """Keys turned out to be this process's own: neither read nor write the chunk store."""
        with self._lock:
            if self._nvme is not None:
                self._nvme.enabled = False

    def drain(self, timeout_s: float) -> bool:
        """Write dirty chunks out, hottest first, within the write budget; then flush the store.

        Blocks for at most about ``timeout_s`` without the lock. True when nothing dirty was left
        waiting and the flush succeeded.
        """
        nvme = self._nvme
        if nvme is None:
            return True
        deadline = self._clock() + timeout_s
        with self._lock:
            self._collect(self._clock())
            nvme.begin_push_out()
        while True:
            with self._lock:
                now = self._clock()
                self._collect(now)
                job = nvme.push_out(now)
                clean = not len(nvme.writes)
            if job is None or now >= deadline:
                break
            nvme.wait(job, deadline - now)
        flushed = nvme.flush(deadline - self._clock())
        self.poll()
        return clean and job is None and flushed

    def close(self) -> None:
        """No more hits, leases, stores or writes; idempotent. The caller then closes the store."""
        with self._lock:
            self._closed = True
            self.shadow.enabled = False

    # -- looking at it

    def levels(self) -> Levels:
        """Occupancy for metrics. O(1)."""
        with self._lock:
            return levels(self._parts(), self.rates, self._clock())

    def occupancy(self) -> Occupancy:
        """What is held now. O(everything held)."""
        with self._lock:
            return occupancy(self._parts(), self._nvme_bytes)

    def missing_parents(self) -> list[ChunkKey]:
        """For each resident chunk whose parent is not resident, that parent. O(everything held)."""
        with self._lock:
            index = self._pool.index
            return [e.parent for e in index if e.parent is not None and e.parent not in index]

    def check(self) -> None:
        """Raise AssertionError naming the first broken invariant. O(everything held)."""
        with self._lock:
            self.rates.check()
            check(self._parts())
            self.keep.check()

    def _parts(self) -> Parts:
        return Parts(
            self._pool,
            self._nvme,
            self._loader.leases,
            self._prefetches,
            self._prefetcher,
            self.shadow,
            self._data_bytes,
        )
