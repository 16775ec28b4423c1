"""``KVOffloadTier``: the chunk store as a tier under vLLM's own OffloadingConnector.

For people who already run that connector; docs/adapters.md has the flags. vLLM moves blocks between
the GPU and its pool in host memory and decides what to keep there; this tier writes rows of that
pool to the chunk store and reads them back, verified. Keys are vLLM's block hash and group under a
namespace of our own (weights, resolved configuration, geometry), because vLLM's say nothing of the
model. Every method runs on the scheduler thread and only enqueues; I/O runs on native threads.
"""

from __future__ import annotations

import dataclasses
import hashlib
import logging
from collections.abc import Collection, Iterable
from typing import TYPE_CHECKING, Any, ClassVar

from vllm.v1.kv_offload.base import (
    Locality,
    LookupResult,
    Medium,
    OffloadingCounterMetadata,
    OffloadingMetricMetadata,
    RequestOffloadingContext,
)
from vllm.v1.kv_offload.tiering.base import JobResult, SecondaryTierManager, TransferJob

from kvoffload.config import GIB
from kvoffload.core.stats import Counters
from kvoffload.engines.vllm import engine_calls
from kvoffload.engines.vllm.guard import HookGuard, guarded
from kvoffload.engines.vllm.namespace import NamespaceSource, canonical_json
from kvoffload.engines.vllm.native_settings import (
    check_engine,
    engine_being_built,
    tier_config,
)
from kvoffload.errors import StoreError
from kvoffload.tiers.nvme import QUEUE_BYTES, StripedStore, open_watched
from kvoffload.types import StoreResult

if TYPE_CHECKING:
    from vllm.v1.kv_offload.base import OffloadKey, ReqContext

__all__ = ["KVOffloadTier"]

logger = logging.getLogger("vllm.kvoffload")

EVENTS_METRIC = "kvoffload_tier_events"
QUEUE_SHARE = 4
"""A quarter of vLLM's pool may wait to be written: its rows stay where they are until then, and one
step's stores, which vLLM does not offer again, are more than the store's own bound."""
_CLOSE_MS = 5000
_DRAIN_SAY_MS = 10_000
_DOMAIN = b"kvoffload/native tier/v1\0"
_REPORTS_BYTES = "transfer_bytes" in {f.name for f in dataclasses.fields(JobResult)}  # since 0.31


@dataclasses.dataclass(slots=True)
class _Job:
    """One job of vLLM's, under its own number."""

    keys: list[OffloadKey]
    req_id: str
    load: bool


class KVOffloadTier(SecondaryTierManager):
    """``{"type": "KVOffloadTier", "module_path": "kvoffload.engines.vllm.native_tier", ...}``.

    Further keys: ``nvme_path`` (required), ``nvme_gib``, ``io_engine``, vLLM's ``locality``. Raises
    ConfigError and UnsupportedError (one line) at start. A directory that cannot be used is said
    once and the tier then holds nothing. No other failure leaves it: a miss and a count.
    """

    medium: ClassVar[Medium] = Medium.STORAGE

    def __init__(
        self,
        offloading_spec: Any,
        primary_kv_view: memoryview,
        tier_type: str,
        *,
        names: NamespaceSource | None = None,
        **settings: Any,
    ) -> None:
        """``primary_kv_view``: (rows, row bytes) of vLLM's pool. ``names``: for tests."""
        detector = {k: settings.pop(k) for k in ("backpressure_detector",) if k in settings}
        super().__init__(offloading_spec, primary_kv_view, tier_type, **detector)
        config = tier_config(settings)
        if names is None:
            vllm_config, kv_cache_config = engine_being_built()
            check_engine(vllm_config)
            names = NamespaceSource(vllm_config, kv_cache_config)
        locality = settings.get("locality")
        self.locality = Locality(locality) if locality is not None else None
        self.guard = HookGuard("tier")
        self.counters = Counters()
        self._told = Counters()
        self._names = names
        self._namespace: bytes | None = None
        self._tag = 0
        self._prefix = hashlib.sha256()
        self._geometry = _geometry(offloading_spec, primary_kv_view.strides[0]).encode()
        self._row_bytes = primary_kv_view.strides[0]
        self._rows = primary_kv_view.cast("B")
        self._jobs: dict[int, _Job] = {}
        self._refused: list[JobResult] = []
        self._live: set[str] = set()
        self._unreadable: dict[str, set[OffloadKey]] = {}
        self._store = _open(config, primary_kv_view.nbytes // QUEUE_SHARE)
        self._unwatch = engine_calls.watch(engine_calls.Listener(names.new_epoch))

    # -- requests

    @guarded(lambda self, ctx: RequestOffloadingContext())
    def on_new_request(self, req_context: ReqContext) -> RequestOffloadingContext:
        """No wish of our own: chunks as they come."""
        self._live.add(req_context.req_id)
        self._names.on_first_request()
        return RequestOffloadingContext()

    @guarded(lambda self, ctx: None)
    def on_request_finished(self, req_context: ReqContext) -> None:
        """Forget what was learnt for this request."""
        self._live.discard(req_context.req_id)
        self._unreadable.pop(req_context.req_id, None)

    @guarded(lambda self, key, ctx: LookupResult.MISS)
    def lookup(self, key: OffloadKey, req_context: ReqContext) -> LookupResult:
        """HIT or MISS at once: the store's index is in memory. No I/O."""
        store = self._store
        if store is None or key in self._unreadable.get(req_context.req_id, ()):
            return LookupResult.MISS
        name = self._names_of([key])
        held = name is not None and store.contains(name) == b"\x01"
        return LookupResult.HIT if held else LookupResult.MISS

    # -- transfers

    @guarded(lambda self, job: self._refuse(job))
    def submit_store(self, job_metadata: TransferJob) -> None:
        """Write rows, which vLLM keeps until the job is reported; held keys are not rewritten.

        In the order of the prompt, whatever vLLM's is: what is dropped is the end of a chain.
        """
        keys, rows = self._in_order(job_metadata)
        names = self._names_of(keys)
        if self._store is None or names is None:
            self._refuse(job_metadata)
            return
        self._jobs[job_metadata.job_id] = _Job(keys, job_metadata.req_context.req_id, False)
        self._store.put(job_metadata.job_id, names, rows, self._tag)

    @guarded(lambda self, job: self._refuse(job))
    def submit_load(self, job_metadata: TransferJob) -> None:
        """Read into rows vLLM has set aside; a row is written only with verified bytes."""
        keys, rows = self._in_order(job_metadata)
        names = self._names_of(keys)
        if self._store is None or names is None:
            self._refuse(job_metadata)
            return
        self._jobs[job_metadata.job_id] = _Job(keys, job_metadata.req_context.req_id, True)
        self._store.get(job_metadata.job_id, names, rows)

    def _in_order(self, job: TransferJob) -> tuple[list[OffloadKey], list[memoryview]]:
        """Keys and rows of a job as they stand in the prompt, where vLLM says so (since 0.32)."""
        position = getattr(job.req_context, "get_offload_key_position", lambda key: None)
        pairs = list(zip(job.keys, map(int, job.chunk_ids), strict=True))
        pairs.sort(key=lambda pair: position(pair[0]) or 0)
        n = self._row_bytes
        return [k for k, _ in pairs], [self._rows[c * n : (c + 1) * n] for _, c in pairs]

    def _refuse(self, job: TransferJob) -> None:
        """Answer a job that never reached the store."""
        self._jobs.pop(job.job_id, None)
        self.counters.nvme_dropped += len(job.keys)
        if job.is_promotion and job.req_context.req_id in self._live:
            self._unreadable.setdefault(job.req_context.req_id, set()).update(job.keys)
        self._refused.append(JobResult(job_id=job.job_id, success=False))

    @guarded(lambda self: [])
    def get_finished_jobs(self) -> Iterable[JobResult]:
        """Each job exactly once."""
        results, self._refused = self._refused, []
        if self._store is not None:
            results += [self._finish(done) for done in self._store.poll()]
        return results

    def _finish(self, done: Any) -> JobResult:
        job = self._jobs.pop(done.job)
        codes = [StoreResult(code) for code in done.results]
        self._count(job.load, codes, done.nbytes)
        good = [k for k, code in zip(job.keys, codes, strict=True) if code is StoreResult.OK]
        whole = len(good) == len(job.keys)
        if job.load and not whole and job.req_id in self._live:
            # vLLM asks again at once: without this what cannot be read is offered for ever.
            bad = set(job.keys).difference(good)
            self._unreadable.setdefault(job.req_id, set()).update(bad)
        return JobResult(
            job_id=done.job,
            success=whole,
            successful_keys=tuple(good) if job.load and good and not whole else None,
            transfer_time=done.ns / 1e9,
            **({"transfer_bytes": done.nbytes} if _REPORTS_BYTES else {}),
        )

    def drain_jobs(self) -> None:
        """Block until no I/O touches vLLM's pool, then hide what was stored so far.

        vLLM calls this when its cache is reset, after which nobody expects old hits.
        """
        if self._store is not None:
            for job in list(self._jobs):
                while not self._store.wait(job, _DRAIN_SAY_MS):
                    logger.warning("kvoffload: a cache reset waits for I/O on %s", self._path)
        self._names.new_epoch()

    # -- life

    def shutdown(self) -> None:
        """Flush (bounded) and close. Nothing touches vLLM's pool afterwards, hung I/O included."""
        self._unwatch()
        self._names.close()
        store, self._store = self._store, None
        if store is not None:
            store.close(_CLOSE_MS)
            store.poll()  # lets go of the rows of what has ended
            self._jobs.clear()
        self._rows.release()

    @classmethod
    def build_metric_definitions(
        cls, extra_config: dict[str, Any]
    ) -> dict[str, OffloadingMetricMetadata]:
        """One counter with a label, beside vLLM's own ``kv_offload_tiering_*``."""
        text = "Chunks by what happened to them in kvoffload's tier."
        return {EVENTS_METRIC: OffloadingCounterMetadata(text, labelnames=("event",))}

    @guarded(lambda self: None)
    def get_stats(self) -> Any:
        """Counts since the last call, or None."""
        from vllm.distributed.kv_transfer.kv_connector.v1.offloading.metrics import (
            OffloadingConnectorStats,
        )

        self.counters.tier_errors += sum(self.guard.take_errors().values())
        if self._store is not None:
            self.counters.nvme_breaker_trips = self._store.trips()
        before, now = self._told.as_dict(), self.counters.as_dict()
        self._told = self.counters.copy()
        grown = {name: n - before[name] for name, n in now.items() if n > before[name]}
        if not grown:
            return None
        stats = OffloadingConnectorStats()
        for name, n in grown.items():
            stats.increase_counter(EVENTS_METRIC, n, (name,))
        return stats

    def check(self) -> None:
        """Raise AssertionError on a broken invariant."""
        assert set(self._unreadable) <= self._live, "kept for a request that is gone"
        assert self._namespace is None or len(self._namespace) == 16
        self._names.check()
        if self._store is not None:
            self._store.check()

    # -- internals

    @property
    def _path(self) -> str:
        return self._store.path if self._store is not None else "(closed)"

    def _names_of(self, keys: Collection[OffloadKey]) -> bytes | None:
        """16 bytes per key; None while the namespace is unknown, or would die with this process."""
        namespace = self._names.namespace()
        if namespace is None or not self._names.persistent:
            return None
        if namespace != self._namespace:
            self._namespace = namespace
            self._tag = int.from_bytes(namespace[:4], "little")
            self._prefix = hashlib.sha256(_DOMAIN + namespace + self._geometry)
        out = []
        for key in keys:
            state = self._prefix.copy()
            state.update(key)
            out.append(state.digest()[:16])
        return b"".join(out)

    def _count(self, load: bool, codes: list[StoreResult], nbytes: int) -> None:
        c, n = self.counters, {code: codes.count(code) for code in StoreResult}
        if load:
            c.nvme_read += n[StoreResult.OK]
            c.nvme_read_bytes += nbytes
        else:
            c.nvme_written += n[StoreResult.OK]
            c.nvme_written_bytes += nbytes
        if n[StoreResult.CORRUPT] and not c.nvme_corrupt:
            logger.warning("kvoffload: damaged chunks in %s are recomputed (said once)", self._path)
        c.nvme_corrupt += n[StoreResult.CORRUPT]
        c.nvme_miss += n[StoreResult.MISS]
        c.nvme_no_space += n[StoreResult.NO_SPACE]
        c.nvme_dropped += n[StoreResult.DROPPED]
        c.nvme_io_errors += n[StoreResult.IO_ERROR]


def _open(config: Any, queue_bytes: int) -> StripedStore | None:
    try:
        store = open_watched(
            config.nvme_path or (),
            max_bytes=config.nvme_bytes(),
            queue_bytes=max(QUEUE_BYTES, queue_bytes),
            io_engine=config.io_engine,
        )
    except StoreError as exc:
        logger.error("kvoffload: nvme_path is not used, the tier holds nothing: %s", exc)
        return None
    stats = store.stats()
    logger.info(
        "kvoffload: tier of %.1f GiB at %s (%d chunks found, io_engine=%s)",
        stats["bytes_max"] / GIB, store.path, stats["entries"], store.io_engine,
    )  # fmt: skip
    return store


def _geometry(spec: Any, row_bytes: int) -> str:
    """What a row of vLLM's pool holds, beyond what the namespace says of the engine."""
    config = spec.config
    return canonical_json(
        {
            "row_bytes": row_bytes,
            "dtype": config.model.dtype,
            "tokens_per_hash": config.cache.tokens_per_hash,
            "blocks_per_chunk": config.cache.blocks_per_chunk,
            "world_size": config.parallel.world_size,
            "groups": config.groups,
            **{
                name: getattr(config, name, None)
                for name in ("replicated_layout", "canonical_layout", "kv_cache_layout")
            },
        }
    )
