"""A million keys and long chains: the native key index beside a Python dict and vLLM's manager.

One thread, nothing else on the structure. ``cpu`` is the calling thread's CPU time, ``wall`` the
clock; both per key. Every chain is drawn at random from all keys, so that its lookup finds nothing
in the caches that the one before left there. Bytes per chunk: all that a structure keeps alive,
Python's key objects included. The native index has 44 bytes of them for where a chunk lies; the
dict keeps keys alone.
"""

from __future__ import annotations

import gc
import importlib.util
import sys
import time
import tracemalloc
from collections.abc import Callable
from typing import Any

import numpy as np
from common import Json, quantile, summary
from context import Context

PART = 4096  # keys per insert


class NativeIndex:
    """``kvoffload._core.KeyIndex``, keys passed as one bytes object as the store gets them."""

    def __init__(self, keys: int, reserve: bool = False) -> None:
        from kvoffload._core import KeyIndex

        self._index = KeyIndex()
        if reserve:
            self._index.reserve(keys)

    def chain(self, keys: list[bytes]) -> Any:
        return b"".join(keys)

    def insert(self, chain: Any) -> None:
        self._index.insert(chain, np.zeros(len(chain) // 16, dtype=np.uint64))

    def longest_prefix(self, chain: Any) -> int:
        return self._index.longest_prefix(chain)

    def own_bytes(self) -> int:
        """What tracemalloc does not see."""
        return self._index.memory_bytes()


class PythonDict:
    """The keys in a dict, as the simplest Python store would have them; values are shared."""

    def __init__(self, keys: int) -> None:
        self._held: dict[bytes, object] = {}

    def chain(self, keys: list[bytes]) -> Any:
        return keys

    def insert(self, chain: Any) -> None:
        for key in chain:
            self._held[key] = self

    def longest_prefix(self, chain: Any) -> int:
        held = self._held
        for at, key in enumerate(chain):
            if key not in held:
                return at
        return len(chain)

    def own_bytes(self) -> int:
        return sum(map(sys.getsizeof, self._held))


class VllmManager:
    """vLLM's CPUOffloadingManager: one call per key, as its scheduler side makes them."""

    def __init__(self, keys: int) -> None:
        from vllm.v1.kv_offload.base import LookupResult, ReqContext, make_offload_key
        from vllm.v1.kv_offload.cpu.manager import CPUOffloadingManager

        self._hit, self._key, self._context = LookupResult.HIT, make_offload_key, ReqContext
        self._manager = CPUOffloadingManager(num_chunks=keys)
        self._key_bytes = 0

    def chain(self, keys: list[bytes]) -> Any:
        return [self._key(key, 0) for key in keys]

    def insert(self, chain: Any) -> None:
        context = self._context("bench")
        self._key_bytes += sum(map(sys.getsizeof, chain))
        self._manager.prepare_store(chain, context)
        self._manager.complete_store(chain, context)

    def longest_prefix(self, chain: Any) -> int:
        context = self._context("bench")
        for at, key in enumerate(chain):
            if self._manager.lookup(key, context) is not self._hit:
                return at
        return len(chain)

    def own_bytes(self) -> int:
        return self._key_bytes


def _fill(side: Any, keys: list[bytes]) -> Json:
    parts = [side.chain(keys[at : at + PART]) for at in range(0, len(keys), PART)]
    gc.collect()
    tracemalloc.start()
    before = tracemalloc.get_traced_memory()[0]
    for part in parts:
        side.insert(part)
    held = tracemalloc.get_traced_memory()[0] - before + side.own_bytes()
    tracemalloc.stop()
    return {"bytes_per_chunk": round(held / len(keys), 1)}


def _lookups(side: Any, keys: list[bytes], length: int, repeats: int) -> Json:
    rng = np.random.default_rng(1)
    cpu, wall = [], []
    for _ in range(repeats):
        chain = side.chain([keys[i] for i in rng.integers(len(keys), size=length)])
        started, used = time.perf_counter_ns(), time.thread_time_ns()
        found = side.longest_prefix(chain)
        used, took = time.thread_time_ns() - used, time.perf_counter_ns() - started
        if found != length:
            raise RuntimeError(f"{found} of {length} keys found")
        cpu.append(used / length)
        wall.append(took / length)
    return {
        "lookup_ns_per_key": round(quantile(cpu, 0.5), 1),
        "lookup_wall_ns_per_key": round(quantile(wall, 0.5), 1),
        "lookup_ns_per_key_spread": summary(cpu, 1),
        "lookup_wall_ns_per_key_spread": summary(wall, 1),
    }


def _slowest_insert(keys: list[bytes]) -> Json:
    """One key at a time into a fresh native index: the longest is a table that grows."""
    side = NativeIndex(len(keys))
    took = []
    for key in keys:
        used = time.thread_time_ns()
        side.insert(key)
        took.append(time.thread_time_ns() - used)
    return {
        "insert_one_ns": round(quantile(took, 0.5)),
        "insert_one_slowest_us": round(max(took) / 1e3, 1),
    }


def measure(context: Context, count: int, length: int, repeats: int) -> Json:
    """All sides with ``count`` keys; chains of ``length``, ``repeats`` of them."""
    raw = np.random.default_rng(0).bytes(16 * count)
    keys = [raw[at : at + 16] for at in range(0, len(raw), 16)]
    sides: dict[str, tuple[str, Callable[[], Any]]] = {
        "key_index": ("kvoffload._core", lambda: NativeIndex(count)),
        "key_index_reserved": ("kvoffload._core", lambda: NativeIndex(count, reserve=True)),
        "python_dict": ("builtins", lambda: PythonDict(count)),
        "vllm": ("vllm", lambda: VllmManager(count)),
    }
    systems: Json = {}
    for name, (module, make) in sides.items():
        if importlib.util.find_spec(module) is None:
            systems[name] = {"skipped": f"{module} is not installed"}
            continue
        context.progress(f"{name}: {count} keys, chains of {length}")
        side = make()
        systems[name] = _fill(side, keys) | _lookups(side, keys, length, repeats)
        del side
    systems["key_index"] |= _slowest_insert(keys)
    return {"keys": count, "chain": length, "repeats": repeats, "systems": systems}
