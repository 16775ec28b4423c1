"""Builds the two connector halves from vLLM's configuration."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from kvoffload.config import GIB, Config
from kvoffload.core.lookup import primary
from kvoffload.core.manager import Manager
from kvoffload.engines.vllm import compat, engine_calls, geometry, notes, plugin
from kvoffload.engines.vllm.background import Background
from kvoffload.engines.vllm.namespace import NamespaceSource
from kvoffload.engines.vllm.room import room_for
from kvoffload.engines.vllm.scheduler import SchedulerHalf
from kvoffload.engines.vllm.stats import KVOffloadStats
from kvoffload.engines.vllm.telemetry import report_drives
from kvoffload.engines.vllm.worker import IDLE_WAIT_MS, SHARED_WAIT_MS, WorkerHalf
from kvoffload.replay.record import StreamRecorder
from kvoffload.types import CacheLayout

logger = logging.getLogger("vllm.kvoffload")

DRIVES_S = 1.0
PREFAULT_THREADS = 4
PREFAULT_WAIT_S = 5.0
"""The longest an engine's start waits for the arena: a second or less per GiB and core. A page
first touched when a chunk is stored costs more, and a request is there then."""


def engine_config(vllm_config: Any) -> Config:
    """Our settings. Raises ConfigError (one line) on a bad key or value."""
    extra = vllm_config.kv_transfer_config.kv_connector_extra_config or {}
    return Config.from_extra_config(notes.without(extra))


def engine_layout(vllm_config: Any, kv_cache_config: Any, config: Config) -> CacheLayout:
    """The layout both roles derive from the same facts."""
    align, hashed = compat.block_sizes(kv_cache_config, vllm_config)
    return geometry.cache_layout(
        kv_cache_config,
        hash_tokens=hashed,
        align_tokens=align,
        world_size=int(vllm_config.parallel_config.tensor_parallel_size),
        chunk_tokens=config.chunk_tokens,
        vllm_config=vllm_config,
    )


# ------------------------------------------------------------------------------ scheduler role


@dataclass(slots=True)
class SchedulerSide:
    """What lives in the EngineCore process."""

    half: SchedulerHalf
    background: Background
    arena: Any
    store: Any
    namespaces: NamespaceSource
    unwatch: Callable[[], None]
    closed: bool = field(default=False)
    drives_said: float = field(default=float("-inf"))

    def stats(self) -> KVOffloadStats | None:
        """Metrics since the last call. vLLM asks once per step's output."""
        self.half.step_ended()
        if not self.half.has_stats():
            return None
        now = time.monotonic()
        if self.store is not None and now - self.drives_said >= DRIVES_S:
            self.drives_said = now
            report_drives(self.store, self.half.metrics)
        payload = self.half.take_stats()
        return KVOffloadStats(data=payload) if payload is not None else None

    def shutdown(self, flush_s: float) -> None:
        """Stop the threads, flush what the time allows, close. Idempotent, never raises."""
        if self.closed:
            return
        self.closed = True
        began = time.monotonic()
        self.unwatch()
        self.background.stop()
        try:
            self.half.shutdown(flush_s)
            if self.store is not None:
                self.store.close(1000)
            self.namespaces.close()
        except Exception as exc:
            self.half.guard.record("shutdown", exc)
        logger.info("kvoffload: closed in %.1f s.", time.monotonic() - began)


def scheduler_side(vllm_config: Any, kv_cache_config: Any) -> SchedulerSide:
    """Create the arena, open the store, start the background threads."""
    from kvoffload import _core

    plugin.check_supported(vllm_config)  # again: the plugin may not have been loaded
    config = engine_config(vllm_config)
    vllm_config.kv_transfer_config.kv_load_failure_policy = "recompute"
    room = room_for(
        engine_layout(vllm_config, kv_cache_config, config),
        config,
        compat.local_engines(vllm_config),
        geometry.why_not_served(kv_cache_config, vllm_config),
    )
    layout = room.layout
    arena = _core.Arena.create(room.data_bytes, room.slots, layout.world_size)
    _prefault(arena)
    namespaces = NamespaceSource(vllm_config, kv_cache_config)
    store = _open_store(config) if room.serve else None
    manager = Manager(
        layout,
        arena,
        store,
        policy=config.policy,
        load=config.load,
        write_tb_per_day=config.nvme_write_tb_per_day,
        nvme_bytes=_bound(store) if store is not None else 0,
        nvme_admission=config.nvme_admission,
    )
    half = SchedulerHalf(
        config,
        layout,
        manager,
        arena,
        namespaces,
        serve=room.serve,
        eagle=compat.drops_last_block(vllm_config),
        follow=bool(vllm_config.cache_config.enable_prefix_caching),
        fail_by_blocks=compat.is_reduced(compat.vllm_version()),
        adapter_paths=compat.hashes_adapter_paths(compat.vllm_version()),
        formats=_comparable(config, kv_cache_config, layout) if room.serve else {},
        model=_model_name(vllm_config),
        recorder=_recorder(config, layout) if room.serve else None,
        alone=compat.is_alone(vllm_config),
    )
    # Methods of the workers are watched where they run; a function sent to them can only be here.
    calls = engine_calls.Listener(arena.bump_epoch, False, half.adapter_removed)
    half.metrics.failure("drive_open", len(_unopened(store)))
    half.metrics.set("kvoffload_nvme_endurance_bytes", (config.nvme_tbw or 0) * 1e12)
    half.why.write_to(*_for_why(vllm_config, config, arena, store))
    _announce(config, layout, arena, store)
    return SchedulerSide(
        half, Background(half), arena, store, namespaces, engine_calls.watch(calls)
    )


def _for_why(
    vllm_config: Any, config: Config, arena: Any, store: Any
) -> tuple[list[Path], dict[str, Any]]:
    """The chunk store's directories, and what ``kvoffload why`` says of the engine."""
    roots = [Path(p) for p in config.nvme_path or ()] if store is not None else []
    head = {
        "model": str(getattr(vllm_config.model_config, "model", "")),
        "dram_gib": round(arena.data_bytes / GIB, 3),
        "nvme_gib": round(_bound(store) / GIB, 3) if store is not None else 0,
        "policy": config.policy,
        "load": config.load,
    }
    return roots, head


def _model_name(vllm_config: Any) -> str:
    """The name that requests use: the first served one."""
    model = vllm_config.model_config
    served = getattr(model, "served_model_name", None) or model.model
    return str(served if isinstance(served, str) else served[0])


def _comparable(
    config: Config, kv_cache_config: Any, layout: CacheLayout
) -> dict[int, geometry.PageFormat]:
    """Page formats for the shadow check; none where it is off, or cannot be (said once)."""
    if not config.verify_sample:
        return {}
    formats = geometry.page_formats(kv_cache_config, layout)
    if isinstance(formats, str):
        logger.warning("kvoffload: verify_sample has no effect: %s cannot be compared.", formats)
        return {}
    return formats


def _recorder(config: Config, layout: CacheLayout) -> StreamRecorder | None:
    """Writes the request stream; None: not configured, or not possible (said)."""
    if config.record_path is None:
        return None
    try:
        return StreamRecorder(config.record_path, primary(layout).chunk_tokens, time.monotonic())
    except OSError as exc:
        logger.error("kvoffload: record_path is not used, nothing is recorded: %s", exc)
        return None


def _bound(store: Any) -> int:
    return int(store.stats()["bytes_max"])


def _open_store(config: Config) -> Any:
    """The NVMe tier, or None: not configured, or not usable (said in one line)."""
    from kvoffload.tiers.nvme import open_drives

    if config.nvme_path is None:
        return None
    try:
        store = open_drives(
            config.nvme_path,
            max_bytes=config.nvme_bytes(),
            io_engine=config.io_engine,
            endurance_bytes=int(config.nvme_tbw * 1e12) if config.nvme_tbw else None,
        )
    except OSError as exc:
        logger.error("kvoffload: nvme_path is not used, DRAM only: %s", exc)
        return None
    for error in _unopened(store):
        logger.warning("kvoffload: nvme_path goes on without a drive: %s", error)
    return _with_faults(store)


def _with_faults(store: Any) -> Any:
    """The store, or under ``$KVOFFLOAD_FAULT_FILE`` the store with faults on demand."""
    control = os.environ.get("KVOFFLOAD_FAULT_FILE")
    if not control:
        return store
    from kvoffload.tiers.faulty import FaultyStore

    logger.warning(
        "kvoffload: KVOFFLOAD_FAULT_FILE is set: the NVMe tier fails as %s says. Never serve so.",
        control,
    )
    return FaultyStore(store, Path(control))


def _prefault(arena: Any) -> None:
    """Touch the arena before there are requests to hold up; what takes longer goes on gently."""
    arena.prefault_start(min(PREFAULT_THREADS, len(os.sched_getaffinity(0))))
    end = time.monotonic() + PREFAULT_WAIT_S
    while arena.prefaulted_bytes() < arena.data_bytes and time.monotonic() < end:
        time.sleep(0.005)


def _unopened(store: Any) -> list[str]:
    """Why drives of a store over several paths could not be opened."""
    from kvoffload.tiers.nvme import StripedStore

    if not isinstance(store, StripedStore):
        return []
    return [drive.error for drive in store.drives() if drive.error]


def _announce(config: Config, layout: CacheLayout, arena: Any, store: Any) -> None:
    chunks = ", ".join(
        f"group {g.group}: {g.kind.value} {g.chunk_tokens} tokens = {g.slot_bytes / 2**20:.2f} MiB"
        for g in layout.groups
    )
    nvme = (
        f"{_bound(store) / GIB:.1f} GiB at {store.path} "
        f"({int(store.stats()['entries'])} chunks found, io_engine={store.io_engine})"
        if store is not None
        else "none"
    )
    logger.info(
        "kvoffload: DRAM %.2f GiB%s, NVMe %s; chunks: %s; load=%s",
        arena.data_bytes / GIB,
        " (hugepages)" if arena.hugepages else "",
        nvme,
        chunks,
        config.load,
    )


# ------------------------------------------------------------------------------ worker role


@dataclass(slots=True)
class WorkerSide:
    """What lives in a worker process."""

    half: WorkerHalf
    kv_cache_config: Any
    device: list[str]
    precompile: Callable[[str], None]  # for a device type

    def register(self, kv_caches: dict[str, Any]) -> None:
        """Note the blocks of every served group as byte runs. Guarded: a failure means 0 hits.

        The copy kernels are compiled here: the engine is made in the first step, which names the
        arena, and by then vLLM takes whatever is compiled for a fault.
        """
        try:
            self.half.guard.maybe_fault("register_kv_caches")
            groups = self.kv_cache_config.kv_cache_groups
            for index, group in enumerate(groups):
                if self.half.layout.groups[index].kind is geometry.GroupKind.NONE:
                    continue
                tensors = {n: kv_caches[n] for n in group.layer_names}
                self.device[0] = next(iter(tensors.values())).device.type
                blocks = int(self.kv_cache_config.num_blocks)
                runs = geometry.group_runs(group, tensors, blocks)
                self.half.register_group(index, runs, blocks)
            self.precompile(self.device[0])
        except Exception as exc:
            self.half.guard.record("register_kv_caches", exc)
            self.half.refuse(f"its KV blocks are not known: {exc}")

    def shutdown(self) -> None:
        """Stop the copy threads. Never raises."""
        try:
            self.half.shutdown()
        except Exception as exc:
            self.half.guard.record("shutdown", exc)


def worker_side(vllm_config: Any, kv_cache_config: Any) -> WorkerSide:
    """The rank's half; it attaches to the arena when the first step names it."""
    from kvoffload import _core
    from kvoffload.copy.select import copy_engine, precompile

    plugin.check_supported(vllm_config)
    config = engine_config(vllm_config)
    layout = engine_layout(vllm_config, kv_cache_config, config)
    rank = compat.tensor_parallel_rank()
    parallel = vllm_config.parallel_config
    device = ["cpu"]
    half = WorkerHalf(
        layout,
        rank,
        attach=_core.Arena.attach,
        make_engine=lambda arena: copy_engine(device[0], arena, rank),
        # Of a dense model's rank vLLM makes an engine of its own, with a size of 1.
        idle_wait_ms=SHARED_WAIT_MS if parallel.data_parallel_size > 1 else IDLE_WAIT_MS,
    )
    return WorkerSide(half, kv_cache_config, device, precompile)
