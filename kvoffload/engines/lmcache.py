"""The chunk store as an L2 adapter of LMCache's server (MP mode); needs no vLLM in this process.

    lmcache server ... --l2-adapter '{"type": "plugin", "module_path": "kvoffload.engines.lmcache",
        "class_name": "KVOffloadL2Adapter", "adapter_params": {"nvme_path": "/mnt/nvme/kv"}}'

docs/adapters.md has the flags. LMCache's keys name a model and hash its tokens; they say nothing of
weights or dtypes. Here a chunk's name covers LMCache's key, the objects' shapes and dtypes, and the
weights: the bytes of the model's folder, or what ``namespace`` says.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lmcache.lmcache_native import Bitmap
from lmcache.logging import init_logger
from lmcache.v1.distributed.internal_api import L2StoreResult
from lmcache.v1.distributed.l2_adapters.base import AdapterUsage, L2AdapterInterface
from lmcache.v1.distributed.l2_adapters.config import L2AdapterConfigBase
from lmcache.v1.platform import create_event_notifier

from kvoffload.config import Config
from kvoffload.engines.lmcache_names import Names, layout_of
from kvoffload.engines.vllm.guard import HookGuard, guarded
from kvoffload.errors import ConfigError
from kvoffload.tiers.nvme import QUEUE_BYTES, open_watched
from kvoffload.types import StoreResult

if TYPE_CHECKING:
    from lmcache.v1.distributed.api import MemoryLayoutDesc, ObjectKey
    from lmcache.v1.memory_management import MemoryObj

__all__ = ["KVOffloadL2Adapter", "KVOffloadL2AdapterConfig"]

logger = init_logger(__name__)

_STORE_KEYS = ("nvme_path", "nvme_gib", "io_engine")
_KEYS = (*_STORE_KEYS, "namespace")
QUEUE_SHARE = 4
"""A quarter of L1 may wait to be written: it stays there until then, and LMCache offers nothing
twice."""
_WAIT_MS = 20
_CLOSE_MS = 5000


# -- settings ------------------------------------------------------------------------------------


class KVOffloadL2AdapterConfig(L2AdapterConfigBase):  # type: ignore[misc]
    """``adapter_params``: ``nvme_path`` (required), ``nvme_gib``, ``io_engine``, ``namespace``."""

    def __init__(self, config: Config, namespace: str | None) -> None:
        self.config = config
        self.namespace = namespace

    @classmethod
    def from_dict(cls, d: Mapping[str, Any]) -> KVOffloadL2AdapterConfig:
        """Raises ConfigError: one line that names the key and what is allowed."""
        for key in d:
            if key not in _KEYS:
                known = ", ".join(_KEYS)
                raise ConfigError(f"kvoffload: unknown adapter_params key {key!r}: known: {known}")
        if d.get("nvme_path") is None:
            raise ConfigError("kvoffload: nvme_path is missing: give one absolute directory path")
        config = Config.from_extra_config({k: d[k] for k in _STORE_KEYS if k in d})
        namespace = d.get("namespace")
        if namespace is not None and not (isinstance(namespace, str) and namespace):
            raise ConfigError(f"kvoffload: namespace={namespace!r} is not allowed: give a text")
        return cls(config, namespace)

    @classmethod
    def help(cls) -> str:
        """What ``adapter_params`` takes."""
        return (
            "kvoffload chunk store:\n- nvme_path (str): absolute directory (required)\n"
            "- nvme_gib (number): bound of that directory (default: half of its free space)\n"
            "- io_engine (str): auto, uring or threads\n"
            "- namespace (str): names the weights; needed unless the model is a local folder"
        )


# -- the adapter ---------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Task:
    """A task under way; it holds LMCache's objects until the store has let go of their bytes."""

    load: bool
    keys: list[ObjectKey]
    objects: list[MemoryObj]
    new: list[bool]  # stores: not held before


class KVOffloadL2Adapter(L2AdapterInterface):  # type: ignore[misc]
    """LMCache's L2 contract over one chunk store. Thread-safe, as LMCache asks.

    Lookups are answered at once (the index is in memory), but for a model's first, which may wait
    for the weights' digest. Stores and loads run on the store's native threads, verified on every
    read; two Python threads wait for them and signal LMCache. There are no locks: a chunk recycled
    between lookup and load is a miss. Raises StoreError (one line) when the directory cannot be
    used; no later failure leaves it: a miss and a count in report_status.
    """

    def __init__(self, config: KVOffloadL2AdapterConfig, l1_memory_desc: Any = None) -> None:
        super().__init__(max_capacity_bytes=0)  # the store bounds itself
        self.guard = HookGuard("lmcache")
        self.names = Names(config.namespace)
        self._store = open_watched(
            config.config.nvme_path or (),
            max_bytes=config.config.nvme_bytes(),
            queue_bytes=max(QUEUE_BYTES, getattr(l1_memory_desc, "size", 0) // QUEUE_SHARE),
            io_engine=config.config.io_engine,
        )
        self._efds = [create_event_notifier() for _ in range(3)]  # store, lookup, load
        self._lock = threading.Lock()
        self._next = 1
        self._tasks: dict[int, _Task] = {}
        self._stored: dict[int, L2StoreResult] = {}
        self._found: dict[int, Bitmap] = {}
        self._loaded: dict[int, Bitmap] = {}
        self._layouts: dict[tuple[str, int], bytes] = {}  # as last looked up
        self._odd_layout_said = False
        self._failures = 0
        self._queues: dict[bool, queue.SimpleQueue[int | None]] = {
            load: queue.SimpleQueue() for load in (False, True)
        }
        self._lookups = ThreadPoolExecutor(1, thread_name_prefix="kvoffload-lookups")
        self._threads = [
            threading.Thread(target=self._await, args=(q,), name=f"kvoffload-{n}", daemon=True)
            for n, q in zip(("stores", "loads"), self._queues.values(), strict=True)
        ]
        for thread in self._threads:
            thread.start()
        logger.info("kvoffload: chunk store at %s, %s", self._store.path, self._store.io_engine)

    def get_store_event_fd(self) -> int:
        """Signalled when a store ended."""
        return int(self._efds[0].fileno())

    def get_lookup_and_lock_event_fd(self) -> int:
        """Signalled when a lookup was answered."""
        return int(self._efds[1].fileno())

    def get_load_event_fd(self) -> int:
        """Signalled when a load ended."""
        return int(self._efds[2].fileno())

    # -- lookups

    def submit_lookup_and_lock_task(
        self, keys: list[ObjectKey], group_layout_descs: dict[int, MemoryLayoutDesc]
    ) -> int:
        """Which keys are held for these layouts. Nothing is locked."""
        task = self._number()
        if keys and self.names.worth_waiting(keys[0].model_name):
            self._lookups.submit(self._wait_and_answer, task, keys, group_layout_descs)
        else:
            self._answer(task, keys, group_layout_descs)
        return task

    def _wait_and_answer(self, task: int, keys: list[ObjectKey], descs: Mapping[int, Any]) -> None:
        try:
            # Anew: others have waited before this one.
            self.names.wait(keys[0].model_name, self.names.worth_waiting(keys[0].model_name))
        finally:
            self._answer(task, keys, descs)

    def _answer(self, task: int, keys: list[ObjectKey], descs: Mapping[int, Any]) -> None:
        found = Bitmap(len(keys))
        self._look_up(keys, descs, found)
        with self._lock:
            self._found[task] = found
        self._efds[1].notify()

    @guarded(lambda self, *args: None)
    def _look_up(self, keys: list[ObjectKey], descs: Mapping[int, Any], found: Bitmap) -> None:
        for i, key in enumerate(keys):
            desc = descs.get(key.object_group_id)
            if desc is None:
                continue
            layout = layout_of(desc.shapes, desc.dtypes)
            self._layouts[(key.model_name, key.object_group_id)] = layout
            name = self.names.of(key, layout)
            if name is not None and self._store.contains(name) == b"\x01":
                found.set(i)

    def query_lookup_and_lock_result(self, task_id: int) -> Bitmap | None:
        """Once per task."""
        with self._lock:
            return self._found.pop(task_id, None)

    def submit_unlock(self, keys: list[ObjectKey]) -> None:
        """Nothing is ever locked."""

    # -- stores and loads

    def submit_store_task(self, keys: list[ObjectKey], objects: list[MemoryObj]) -> int:
        """Write objects, which LMCache keeps until then; held ones are not rewritten."""
        task = self._number()
        if not self._submit(task, False, keys, objects):
            self._end_store(task, L2StoreResult(False, 0))
        return task

    def pop_completed_store_tasks(self) -> dict[int, L2StoreResult]:
        """Each task once."""
        with self._lock:
            done, self._stored = self._stored, {}
        return done

    def submit_load_task(self, keys: list[ObjectKey], objects: list[MemoryObj]) -> int:
        """Read into objects; an object's bytes are touched only when they were verified."""
        task = self._number()
        if not self._submit(task, True, keys, objects):
            self._end_load(task, Bitmap(len(keys)))
        return task

    def query_load_result(self, task_id: int) -> Bitmap | None:
        """Once per task."""
        with self._lock:
            return self._loaded.pop(task_id, None)

    @guarded(lambda self, task, *args: self._forget(task))
    def _submit(
        self, task: int, load: bool, keys: list[ObjectKey], objects: list[MemoryObj]
    ) -> bool:
        """False: it did not reach the store."""
        layouts = [layout_of(o.get_shapes(), o.get_dtypes()) for o in objects]
        names = [self.names.of(k, lay) for k, lay in zip(keys, layouts, strict=True)]
        known = [n for n in names if n is not None]
        if len(known) < len(names) or not names:
            return False
        joined = b"".join(known)
        new = [not held for held in self._store.contains(joined)]
        if not load:
            self._check_layout(keys[0], layouts[0])
        buffers = [memoryview(o.byte_array).cast("B") for o in objects]
        self._tasks[task] = _Task(load, list(keys), list(objects), new)
        if load:
            self._store.get(task, joined, buffers)
        else:
            self._store.put(task, joined, buffers)
        self._queues[load].put(task)
        return True

    def _check_layout(self, key: ObjectKey, layout: bytes) -> None:
        asked = self._layouts.get((key.model_name, key.object_group_id))
        if asked is not None and asked != layout and not self._odd_layout_said:
            self._odd_layout_said = True
            logger.warning(
                "kvoffload: LMCache stores other shapes than it looks up (a serde?), so what it "
                "stores is never found; leave serde out of this adapter"
            )

    def _await(self, tasks: queue.SimpleQueue[int | None]) -> None:
        """Thread: wait for the oldest task of one kind; report whatever has ended."""
        while (task := tasks.get()) is not None:
            while True:
                ended = self._store.wait(task, _WAIT_MS)
                self._collect()
                if ended:
                    break

    def _collect(self) -> None:
        for done in self._store.poll():
            self._finish(done)

    @guarded(lambda self, done: self._fail(done))
    def _finish(self, done: Any) -> None:
        task = self._tasks.pop(done.job)
        codes = [StoreResult(code) for code in done.results]
        good = [i for i, code in enumerate(codes) if code is StoreResult.OK]
        keys = [task.keys[i] for i in good]
        bad = sum(code not in (StoreResult.OK, StoreResult.MISS) for code in codes)
        if bad:
            self._failures += bad
            logger.warning("kvoffload: %d of %d objects failed: %s", bad, len(codes), set(codes))
        if task.load:
            if keys:
                self._notify_keys_accessed(keys)
            read = Bitmap(len(codes))
            for i in good:
                read.set(i)
            self._end_load(done.job, read)
            return
        sizes = [task.objects[i].get_size() if task.new[i] else 0 for i in good]
        if keys:
            self._notify_keys_stored(keys, sizes)
        self._end_store(done.job, L2StoreResult(len(good) == len(codes), sum(sizes)))

    def _fail(self, done: Any) -> None:
        """Report a task of which nothing else could be said."""
        self._tasks.pop(done.job, None)
        if done.kind:
            self._end_load(done.job, Bitmap(len(done.results)))
        else:
            self._end_store(done.job, L2StoreResult(False, 0))

    def _forget(self, task: int) -> bool:
        self._tasks.pop(task, None)
        return False

    def _end_store(self, task: int, result: L2StoreResult) -> None:
        with self._lock:
            self._stored[task] = result
        self._efds[0].notify()

    def _end_load(self, task: int, read: Bitmap) -> None:
        with self._lock:
            self._loaded[task] = read
        self._efds[2].notify()

    def _number(self) -> int:
        with self._lock:
            task, self._next = self._next, self._next + 1
        return task

    # -- the rest of the contract

    @guarded(lambda self, keys: None)
    def delete(self, keys: list[ObjectKey]) -> None:
        """Forget keys, in the layout they were last looked up in."""
        gone, sizes = [], []
        for key in keys:
            layout = self._layouts.get((key.model_name, key.object_group_id))
            name = self.names.of(key, layout) if layout is not None else None
            nbytes = self._store.length(name) if name is not None else -1
            if name is not None and nbytes >= 0 and self._store.delete(name):
                gone.append(key)
                sizes.append(nbytes)
        if gone:
            self._notify_keys_deleted(gone, sizes)

    def get_usage(self) -> AdapterUsage:
        """Bytes on disk from the store; per salt what this process stored, recycled or not."""
        stats = self._store.stats()
        return AdapterUsage(
            total_bytes_used=int(stats["bytes_used"]),
            total_capacity_bytes=int(stats["bytes_max"]),
            bytes_by_cache_salt=super().get_usage().bytes_by_cache_salt,
        )

    def report_status(self) -> dict[str, Any]:
        """``is_healthy``, the store's counters, and what failed here."""
        return {
            "is_healthy": all(thread.is_alive() for thread in self._threads),
            "type": "kvoffload",
            "path": self._store.path,
            "io_engine": self._store.io_engine,
            "tasks": len(self._tasks),
            "failed_objects": self._failures,
            "errors": dict(self.guard.errors),
            **self._store.stats(),
        }

    def close(self) -> None:
        """Flush (bounded by 5 s) and close; tasks under way are reported. Idempotent."""
        self.names.close()
        self._lookups.shutdown(wait=True)
        self._store.close(_CLOSE_MS)
        self._collect()
        for tasks in self._queues.values():
            tasks.put(None)
        for thread in self._threads:
            thread.join(timeout=5)
        if self._tasks:
            logger.warning("kvoffload: closed with %d tasks that hang", len(self._tasks))
        efds, self._efds = self._efds, []
        for efd in efds:
            efd.close()

    def check(self) -> None:
        """Raise AssertionError on a broken invariant."""
        with self._lock:
            assert all(task < self._next for task in self._tasks), "a task from the future"
            assert not set(self._stored) & set(self._loaded), "a task of both kinds"
        self._store.check()
