"""One run: a trace through the real Manager, its clock set by the trace, no byte moved.

Per request, as the connector does it with an empty HBM: plan, lease (what is on NVMe is read up),
release, store every chunk of the prompt that no tier holds, tick. Requests come one after another
and end at once, and so do copies, reads and writes; the write budget goes by the trace's clock.
"""

from __future__ import annotations

import contextlib
import gc
import inspect
import random
from array import array
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from kvoffload.core.admission import MODES
from kvoffload.core.alloc import ARENA_GRAIN, SlotAllocator
from kvoffload.core.fit import lease_what_fits
from kvoffload.core.hashchain import Chain
from kvoffload.core.manager import Manager
from kvoffload.core.planner import load_seconds
from kvoffload.core.sizes import slots_needed
from kvoffload.core.stats import Counters
from kvoffload.errors import ConfigError
from kvoffload.replay.arena import InstantArena
from kvoffload.replay.hardware import Hardware
from kvoffload.replay.stores import LruModel, SegmentModel, StoreModel
from kvoffload.replay.trace import Request
from kvoffload.types import CacheLayout, ChunkKey, GroupKind, GroupLayout, Tier

STORES = {"fifo": SegmentModel, "lru": LruModel}
UNLIMITED_TB_PER_DAY = 1e12
_OWNER = "replay"


@dataclass(frozen=True, slots=True, kw_only=True)
class Setup:
    """What is to be sized. Sizes in bytes; ``nvme_chunks`` 0 is no NVMe tier. Raises ConfigError.

    ``write_everything``: the reference that every written byte is compared with: all chunks go to
    NVMe at once, without a budget. ``options``: further keyword arguments of the Manager.
    """

    chunk_tokens: int
    kv_bytes_per_token: int
    dram_chunks: int
    nvme_chunks: int = 0
    policy: str = "lru"
    load: str = "auto"
    nvme_store: str = "fifo"
    nvme_write_tb_per_day: float | None = None
    nvme_admission: str | None = None  # None: the Manager's default
    write_everything: bool = False
    hardware: Hardware = field(default_factory=Hardware)
    options: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Checks what nobody else would look at without an NVMe tier."""
        if self.nvme_store not in STORES:
            raise ConfigError(f"nvme_store={self.nvme_store!r}: must be one of {', '.join(STORES)}")
        mode = self.nvme_admission
        if mode is not None and mode not in MODES:
            raise ConfigError(f"nvme_admission={mode!r}: must be one of {', '.join(MODES)}")

    def layout(self) -> CacheLayout:
        """One full-attention group whose block is the chunk."""
        nbytes = self.kv_bytes_per_token * self.chunk_tokens
        group = GroupLayout(0, GroupKind.FULL, self.chunk_tokens, 1, nbytes, 1)
        return CacheLayout((group,), self.chunk_tokens, self.chunk_tokens, 1)


@dataclass(frozen=True, slots=True)
class Served:
    """What a request got: hit tokens by tier, and the modelled seconds to its first token."""

    dram_tokens: int
    nvme_tokens: int
    ttft_s: float
    recompute_s: float  # the same without kvoffload


def manager_options(setup: Setup) -> dict[str, Any]:
    """Keyword arguments of the Manager for ``setup``. ConfigError for what it does not know."""
    known = inspect.signature(Manager.__init__).parameters
    out = dict(setup.options)
    out |= {"policy": setup.policy, "load": setup.load}
    out["write_tb_per_day"] = setup.nvme_write_tb_per_day
    admission = setup.nvme_admission
    if setup.write_everything:
        out["write_tb_per_day"] = UNLIMITED_TB_PER_DAY
        admission = "all"
    if admission is not None:
        out["nvme_admission"] = admission
    for name in out:
        if name not in known:
            raise ConfigError(f"{name}: not available in this version; leave it out")
    return out


def arena_bytes(chunks: int, chunk_bytes: int) -> int:
    """The smallest arena that holds so many chunks: arenas come in units of a few MiB."""
    data_bytes = max(1, chunks) * chunk_bytes
    while SlotAllocator(data_bytes, (chunk_bytes,)).capacity(0) < chunks:
        data_bytes += max(chunk_bytes, ARENA_GRAIN)
    return data_bytes


@contextlib.contextmanager
def uncollected() -> Iterator[None]:
    """No cyclic garbage collection: nothing here makes cycles, and its passes over a large index
    take an eighth of a replay's time."""
    was = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was:
            gc.enable()


class Replay:
    """The Manager with its byte-less tiers, and what it did so far. Single thread.

    Raises ConfigError (one line) from the constructor.
    """

    def __init__(self, setup: Setup) -> None:
        self.setup = setup
        self.now = 0.0
        self.layout = setup.layout()
        self.chunk_bytes = self.layout.groups[0].slot_bytes
        data_bytes = arena_bytes(setup.dram_chunks, self.chunk_bytes)
        self.dram_chunks = SlotAllocator(data_bytes, (self.chunk_bytes,)).capacity(0)
        arena = InstantArena(data_bytes, slots_needed(self.layout, data_bytes))
        self.store: StoreModel | None = None
        if setup.nvme_chunks:
            self.store = STORES[setup.nvme_store](
                setup.nvme_chunks, self.chunk_bytes, lambda: self.now, setup.hardware.read_s
            )
        self.manager = Manager(
            self.layout,
            arena,
            self.store,
            nvme_bytes=setup.nvme_chunks * self.chunk_bytes,
            clock=lambda: self.now,
            **manager_options(setup),
        )
        setup.hardware.teach(self.manager)
        self._tiers = setup.hardware.tiers()
        self.requests = self.input_tokens = self.dram_tokens = self.nvme_tokens = 0
        self.ttft_s, self.recompute_s = array("f"), array("f")

    def serve(self, request: Request, last_use: Sequence[bool] | None = None) -> Served:
        """Take one request from arrival to end. ``last_use``: per chunk whether it is hinted that
        it will not be used again."""
        self.now = max(self.now, request.arrival_s)
        self._settle()
        chain = Chain.of_keys(self.layout, request.keys)
        tokens = request.input_tokens
        dram, nvme = self._load(chain, tokens)
        self.manager.begin_store(chain, dram + nvme, tokens)  # what was loaded is held already
        self._settle()
        if last_use is not None:
            marked = zip(request.keys, last_use, strict=True)
            self.manager.retire([key for key, last in marked if last])
        return self._count(request, dram, nvme)

    def _load(self, chain: Chain, tokens: int) -> tuple[int, int]:
        """Tokens loaded, by tier."""
        end = self.manager.plan(chain, 0, tokens).end
        if end <= 0:
            return 0, 0
        lease, end = lease_what_fits(self.manager, _OWNER, chain, 0, end)
        if lease is None:
            return 0, 0
        nvme = lease.tokens_by_tier.get(Tier.NVME, 0)
        if nvme:
            self.manager.poll()  # the reads have ended
        self.manager.release(lease.id)
        return end - nvme, nvme

    def _settle(self) -> None:
        """Let the Manager see what has ended and write what it wants to write."""
        if self.store is None:
            self.manager.poll()
            return
        while True:
            before = self.store.puts
            self.manager.tick(busy=True)
            if self.store.puts == before:
                return

    def _count(self, request: Request, dram: int, nvme: int) -> Served:
        tokens = request.input_tokens
        # The last prompt token is always computed: its logits are the first output.
        hit = max(0, min(dram + nvme, tokens - 1))
        per = self.setup.kv_bytes_per_token
        hardware = self.setup.hardware
        load_s = 0.0
        if dram + nvme:
            load_s = load_seconds({Tier.DRAM: dram * per, Tier.NVME: nvme * per}, self._tiers)
        nvme = min(nvme, hit)
        recompute_s = hardware.prefill_s(0, tokens)
        served = Served(hit - nvme, nvme, load_s + hardware.prefill_s(hit, tokens), recompute_s)
        self.requests += 1
        self.input_tokens += tokens
        self.dram_tokens += served.dram_tokens
        self.nvme_tokens += nvme
        self.ttft_s.append(served.ttft_s)
        self.recompute_s.append(recompute_s)
        return served

    @property
    def counters(self) -> Counters:
        """The Manager's own counts."""
        return self.manager.counters

    def orphans(self) -> int:
        """Chunks in DRAM that no lookup can reach: the chunk before them is on no tier."""
        held = self.store.holds if self.store is not None else lambda key: False
        return sum(not held(key) for key in self.manager.missing_parents())

    def check(self) -> None:
        """Raise AssertionError naming the first broken invariant."""
        self.manager.check()
        if self.store is not None:
            self.store.check()


def last_use_bits(
    requests: Iterable[Request], accuracy: float, seed: int = 0
) -> Iterable[list[bool]]:
    """Per request and chunk whether it is never used again; each bit wrong with probability
    1 - ``accuracy``. Reads ``requests`` twice."""
    last: dict[ChunkKey, int] = {}
    for n, request in enumerate(requests):
        for key in request.keys:
            last[key] = n
    draw = random.Random(seed).random
    for n, request in enumerate(requests):
        yield [(last[key] == n) == (draw() < accuracy) for key in request.keys]
