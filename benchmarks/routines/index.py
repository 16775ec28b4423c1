"""``index``: the scheduler-side bookkeeping alone: longest-prefix lookup, insert, evict.

The real Manager over a real arena whose slots are never touched, so no bytes move; beside it the
primary-tier manager of vLLM's native offloading on the same keys. Nanoseconds are CPU time of the
calling thread: nothing here waits, and other work on the machine does not count. ``key_index``:
the native key index with a million keys, beside a dict and the same manager of vLLM's.
"""

from __future__ import annotations

import argparse
import gc
import hashlib
import importlib.util
import time
import tracemalloc
from collections.abc import Callable
from functools import partial
from typing import Any

import keyindex
from common import Json, quantile, summary
from context import Context

NAME = "index"
SLOT = 1 << 20  # bytes of address space per chunk; its pages are never faulted in
CHAIN = 512  # chunks per prompt


def add_options(parser: argparse.ArgumentParser) -> None:
    """Options of this routine."""
    parser.add_argument("--chunks", type=int, default=16384, help="chunks held")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--keys", type=int, default=1_000_000, help="keys of the key index")
    parser.add_argument("--chain", type=int, default=8192, help="keys per lookup of the key index")
    parser.add_argument("--lookups", type=int, default=31, help="chains per side")


def _hashes(chain: int, chunks: int) -> list[bytes]:
    return [hashlib.sha256(b"%d/%d" % (chain, i)).digest() for i in range(chunks)]


def _per_key(call: Callable[[], Any], keys: int) -> float:
    start = time.thread_time_ns()
    call()
    return (time.thread_time_ns() - start) / keys


class Kvoffload:
    """Our Manager, filled with whole chains; evicts when full."""

    def __init__(self, chunks: int) -> None:
        from kvoffload import _core
        from kvoffload.core.hashchain import Chain
        from kvoffload.core.manager import Manager
        from kvoffload.core.sizes import slots_needed
        from kvoffload.types import CacheLayout, GroupKind, GroupLayout

        group = GroupLayout(0, GroupKind.FULL, 16, 1, SLOT, 1)
        self._layout = CacheLayout((group,), 16, 16, 1)
        self._chain_type = Chain
        data = chunks * SLOT
        self._arena = _core.Arena.create(data, slots_needed(self._layout, data), 1, False)
        self._arena.set_attached(0)
        self.manager = Manager(self._layout, self._arena, None, load="always")

    def chain(self, number: int, chunks: int) -> Any:
        """Keys of one prompt; hashing is measured apart."""
        out = self._chain_type(b"bench", b"", self._layout)
        out.extend(_hashes(number, chunks))
        return out

    def insert(self, chain: Any) -> None:
        """What a store costs the scheduler thread: slots, then collecting their completion."""
        items = self.manager.begin_store(chain, 0, chain.tokens)
        if len(items) != chain.n_chunks(0):
            raise RuntimeError(f"only {len(items)} of {chain.n_chunks(0)} chunks got a slot")
        for item in items:
            self._arena.fill_done(item.ref.slot, item.ref.generation)
        self.manager.poll()

    def lookup(self, chain: Any) -> None:
        """The longest prefix; all of it is there."""
        hit = self.manager.lookup(chain, 0, chain.tokens)
        if hit.end != chain.tokens:
            raise RuntimeError(f"hit ends at {hit.end} of {chain.tokens}")

    def close(self) -> None:
        self.manager.check()
        self.manager.close()
        self._arena.close()


class Native:
    """vLLM's CPUOffloadingManager: one call per key, as its scheduler side makes them."""

    def __init__(self, chunks: int) -> None:
        from vllm.v1.kv_offload.base import LookupResult, ReqContext, make_offload_key
        from vllm.v1.kv_offload.cpu.manager import CPUOffloadingManager

        self._hit, self._key, self._context = LookupResult.HIT, make_offload_key, ReqContext
        self.manager = CPUOffloadingManager(num_chunks=chunks)

    def chain(self, number: int, chunks: int) -> Any:
        return [self._key(h, 0) for h in _hashes(number, chunks)]

    def insert(self, chain: Any) -> None:
        context = self._context("bench")
        self.manager.prepare_store(chain, context)
        self.manager.complete_store(chain, context)

    def lookup(self, chain: Any) -> None:
        context = self._context("bench")
        for key in chain:
            if self.manager.lookup(key, context) is not self._hit:
                raise RuntimeError("a stored key is not a hit")

    def close(self) -> None:
        self.manager.shutdown()


def _measure(make: Callable[[int], Any], chunks: int, repeats: int) -> Json:
    chains = max(2, chunks // CHAIN)
    length = chunks // chains
    insert, evict, lookup, held = [], [], [], 0.0
    for repeat in range(repeats):
        side = make(chains * length)
        keys = [side.chain(n, length) for n in range(2 * chains)]
        gc.collect()
        if repeat == 0:  # its own pass: tracing slows everything down
            tracemalloc.start()
            before = tracemalloc.get_traced_memory()[0]
        for chain in keys[:chains]:
            insert.append(_per_key(partial(side.insert, chain), length))
        if repeat == 0:
            held = (tracemalloc.get_traced_memory()[0] - before) / (chains * length)
            tracemalloc.stop()
            insert.clear()
        for chain in keys[:chains]:
            lookup.append(_per_key(partial(side.lookup, chain), length))
        for chain in keys[chains:]:
            evict.append(_per_key(partial(side.insert, chain), length))
        side.close()
    out: Json = {"bytes_per_chunk": round(held)}
    for name, values in (("lookup", lookup), ("insert", insert), ("insert_evicting", evict)):
        out[f"{name}_ns_per_key"] = round(quantile(values, 0.5), 1)
        out[f"{name}_ns_per_key_spread"] = summary(values, 1)
    return out


def run(context: Context, options: argparse.Namespace) -> Json:
    """Both sides; kvoffload's figures are the top-level keys."""
    if options.quick:
        options.chunks, options.repeats = 1024, 2
        options.keys, options.chain, options.lookups = 20_000, 512, 3
    systems: Json = {}
    for name, module, make in (
        ("kvoffload", "kvoffload._core", Kvoffload),
        ("native", "vllm", Native),
    ):
        if importlib.util.find_spec(module) is None:
            systems[name] = {"skipped": f"{module} is not installed"}
            continue
        context.progress(f"{name}: {options.chunks} chunks")
        systems[name] = _measure(make, options.chunks, max(2, options.repeats))
    top = {k: v for k, v in systems["kvoffload"].items() if not k.endswith("_spread")}
    large = keyindex.measure(context, options.keys, options.chain, options.lookups)
    return {"chunks": options.chunks, "systems": systems, "key_index": large} | top


def table(result: Json) -> tuple[list[str], list[list[str]]]:
    """Header and rows of the final table."""
    keys = (
        "lookup_ns_per_key",
        "insert_ns_per_key",
        "insert_evicting_ns_per_key",
        "bytes_per_chunk",
    )
    rows = [
        [name, *(str(f.get(key, "-")) for key in keys)] for name, f in result["systems"].items()
    ]
    for name, f in result["key_index"]["systems"].items():
        label = f"{name}, {result['key_index']['keys']} keys"
        rows.append([label, str(f.get(keys[0], "-")), "-", "-", str(f.get(keys[3], "-"))])
    return ["system", "lookup ns/key", "insert", "insert+evict", "bytes/chunk"], rows
