"""An engine on a real device with KV memory, for tests/gpu and its script."""

from __future__ import annotations

from functools import cache
from types import TracebackType
from typing import Any

import numpy as np
import torch

from kvoffload.copy.base import OK
from kvoffload.copy.cuda import CudaCopyEngine
from kvoffload.copy.cuda_movers import CudaScratch, build_movers
from kvoffload.copy.cuda_runtime import CudaRuntime
from kvoffload.copy.mover import Mover
from kvoffload.copy.mover_set import MoverSet, Prepared
from kvoffload.copy.movers import PlainMover
from tests.support.cuda import Layout, chunks, make_arena, make_layout

MIB = 1 << 20
PIECE = 3 * MIB
LAYOUTS = [
    make_layout([65536] * 8, True, 0, 64, 4),  # one run per block
    make_layout([65536, 4096, 512], False, 0, 64, 4),  # one array per layer
    make_layout([1000, 77, 3], True, 13, 64, 3),  # nothing aligned
    make_layout([2 * MIB], True, 0, 32, 2),  # several blocks in one copy, across pinned pieces
    make_layout([2048] * 64, False, 0, 256, 16),  # many small pages: 1024 runs, one batch exactly
    make_layout([1024] * 96, False, 0, 256, 16),  # more runs than one batch takes
]


class Refusing(CudaRuntime):
    """A driver that pins nothing."""

    def host_register(self, address: int, nbytes: int) -> None:
        raise RuntimeError("refused by the test")


def movers_here(runtime: CudaRuntime) -> dict[bool, list[Mover]]:
    """All movers of this machine, each direction its own. New ones: engines close theirs."""
    scratch = CudaScratch(runtime)
    try:
        return build_movers(runtime, scratch, PIECE, lambda: False)
    finally:
        scratch.close()


@cache
def available() -> list[str]:
    """Names of the movers this machine has, in both directions."""
    if not CudaRuntime().same_addresses():
        return ["plain"]
    return [m.name for m in movers_here(CudaRuntime())[True]]


class Device:
    """``mover``: the one of all movers to use."""

    def __init__(self, layout: Layout, *, pinned: bool = True, mover: str = "") -> None:
        self.layout = layout
        self.arena = make_arena(64 * MIB, leaf_table=bool(mover))
        runtime = CudaRuntime() if pinned else Refusing()
        movers = None
        if mover and pinned:
            here = movers_here(runtime)
            prepared = Prepared(here[True], here[False])
            movers = MoverSet(PlainMover(runtime), prepared, only=mover)
        self.engine = CudaCopyEngine(
            self.arena, 0, runtime=runtime, movers=movers, piece_bytes=PIECE
        )
        assert self.engine._pinner.wait(60)
        assert self.engine.pinned_bytes() == (64 * MIB if pinned else 0)
        self.kv = torch.zeros(layout.total, dtype=torch.uint8, device="cuda")
        self.group = self.engine.add_group(
            layout.fragments(self.kv.data_ptr()), layout.num_blocks, layout.shard_bytes
        )
        self.job = 0

    def __enter__(self) -> Device:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, at: TracebackType | None
    ) -> None:
        self.engine.close()

    def submit(self, kind: str, slots: list[int], gens: list[int], ids: Any) -> int:
        self.job += 1
        c = chunks(slots, gens, [s * self.layout.shard_bytes for s in slots], ids)
        if kind == "store":
            self.engine.submit_store(self.job, self.group, c, 0)
        else:
            self.engine.submit_load(self.job, self.group, c, 0, 20_000)
        return self.job

    def done(self, job: int) -> Any:
        assert self.engine.wait(job, 20_000)
        (found,) = self.engine.poll()
        self.engine.check()
        return found

    def random(self, seed: int) -> np.ndarray:
        data = np.random.default_rng(seed).integers(0, 256, self.layout.total, np.uint8)
        self.kv.copy_(torch.from_numpy(data))
        return data

    def host(self) -> np.ndarray:
        return self.kv.cpu().numpy()

    def assert_served(self, mover: str) -> None:
        """Every copy went by this mover: none was picked otherwise or dropped."""
        assert set(self.engine.movers.served) == {mover}, self.engine.movers.served
        assert self.engine.movers.dropped == {} and self.engine.errors == 0


def round_trip(d: Device, seed: int = 0) -> None:
    """Store four chunks, check slots and leaf table, load them elsewhere, check every byte."""
    layout = d.layout
    bpc, n = layout.blocks_per_chunk, 4
    order = np.random.default_rng(seed).permutation(layout.num_blocks)[: n * bpc]
    order[:bpc] = np.arange(bpc)  # a chunk of neighbours
    if len(set(order.tolist())) != n * bpc:
        order = np.arange(n * bpc)
    source, slots = order.reshape(n, bpc), list(range(n))
    before = d.random(2 * seed + 1)
    gens = [d.arena.begin_fill(s, 1) for s in slots]
    assert d.done(d.submit("store", slots, gens, source)).status == OK
    for slot, row in zip(slots, source, strict=True):
        want = b"".join(layout.block(before, b) for b in row)
        at = slot * layout.shard_bytes
        assert bytes(d.arena.view(at, layout.shard_bytes)) == want.ljust(layout.shard_bytes, b"\0")
        key = chunks([slot], [1], [0], [[0]]).keys
        assert d.arena.verify_leaves(at, layout.shard_bytes, key)  # by the host
    expected = d.random(2 * seed + 2)
    target = source[::-1].copy()
    target[0, 1:] = -1
    assert d.done(d.submit("load", slots, gens, target)).status == OK
    for to, frm in zip(target.ravel().tolist(), source.ravel().tolist(), strict=True):
        for at, stride, nbytes in layout.parts if to >= 0 else ():
            new = before[at + frm * stride : at + frm * stride + nbytes]
            expected[at + to * stride : at + to * stride + nbytes] = new
    assert np.array_equal(d.host(), expected)
