"""The CUDA copy engine on a real device: the byte and order checks of tests/unit/test_cuda_engine.py.

Needs an NVIDIA GPU and a CUDA build of torch; skipped elsewhere.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

# ruff: noqa: E402
torch = pytest.importorskip("torch")
pytest.importorskip("kvoffload._core")
pytestmark = pytest.mark.gpu
if not torch.cuda.is_available():
    pytest.skip("no CUDA device", allow_module_level=True)

from kvoffload.copy.base import CANCELLED, FAILED, OK
from kvoffload.copy.cuda import CudaCopyEngine
from kvoffload.copy.cuda_job import Reason
from kvoffload.copy.cuda_runtime import CudaRuntime
from tests.support.cuda import Layout, chunks, make_arena, make_layout

MIB = 1 << 20
LAYOUTS = [
    make_layout([65536] * 8, True, 0, 64, 4),  # one run per block
    make_layout([65536, 4096, 512], False, 0, 64, 4),  # one array per layer
    make_layout([1000, 77, 3], True, 13, 64, 3),  # nothing aligned
    make_layout([2 * MIB], True, 0, 32, 2),  # several blocks in one copy, across pinned pieces
]


class Refusing(CudaRuntime):
    """A driver that pins nothing."""

    def host_register(self, address: int, nbytes: int) -> None:
        raise RuntimeError("refused by the test")


class Device:
    def __init__(self, layout: Layout, *, pinned: bool) -> None:
        self.layout = layout
        self.arena = make_arena(64 * MIB)
        runtime = CudaRuntime() if pinned else Refusing()
        self.engine = CudaCopyEngine(self.arena, 0, runtime=runtime, piece_bytes=3 * MIB)
        assert self.engine._pinner.wait(60)
        assert self.engine.pinned_bytes() == (64 * MIB if pinned else 0)
        self.kv = torch.zeros(layout.total, dtype=torch.uint8, device="cuda")
        self.group = self.engine.add_group(
            layout.fragments(self.kv.data_ptr()), layout.num_blocks, layout.shard_bytes
        )
        self.job = 0

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


@pytest.fixture(params=[True, False], ids=["pinned", "unpinned"])
def pinned(request: pytest.FixtureRequest) -> Iterator[bool]:
    yield request.param


@pytest.mark.parametrize("layout", LAYOUTS, ids=range(len(LAYOUTS)))
def test_round_trip(layout: Layout, pinned: bool) -> None:
    d = Device(layout, pinned=pinned)
    bpc, n = layout.blocks_per_chunk, 4
    order = np.random.default_rng(0).permutation(layout.num_blocks)
    order[:bpc] = np.arange(bpc)  # a chunk of neighbours
    before = d.random(1)
    source, slots = order[: n * bpc].reshape(n, bpc), list(range(n))
    if len(set(order[: n * bpc].tolist())) != n * bpc:
        source = np.arange(n * bpc).reshape(n, bpc)
    gens = [d.arena.begin_fill(s, 1) for s in slots]
    assert d.done(d.submit("store", slots, gens, source)).status == OK
    for slot, row in zip(slots, source, strict=True):
        want = b"".join(layout.block(before, b) for b in row)
        got = bytes(d.arena.view(slot * layout.shard_bytes, layout.shard_bytes))
        assert got == want + bytes(layout.shard_bytes - len(want))
    expected = d.random(2)
    target = source[::-1].copy()
    target[0, 1:] = -1
    assert d.done(d.submit("load", slots, gens, target)).status == OK
    for to, frm in zip(target.ravel().tolist(), source.ravel().tolist(), strict=True):
        for at, stride, nbytes in layout.parts if to >= 0 else ():
            new = before[at + frm * stride : at + frm * stride + nbytes]
            expected[at + to * stride : at + to * stride + nbytes] = new
    assert np.array_equal(d.host(), expected)
    d.engine.close()


def test_order_against_the_compute_stream(pinned: bool) -> None:
    """A slow forward before the store, a slow zeroing before the load: both are waited for."""
    d = Device(LAYOUTS[0], pinned=pinned)
    gens = [d.arena.begin_fill(0, 1)]
    d.kv.fill_(1)
    torch.cuda._sleep(100_000_000)
    d.kv.fill_(7)
    store = d.submit("store", [0], gens, [[0, 1, 2, 3]])
    assert not d.engine.wait(store, 5)  # submitting did not wait either
    assert d.done(store).status == OK
    assert set(bytes(d.arena.view(0, d.layout.shard_bytes))) == {7}
    torch.cuda._sleep(100_000_000)
    d.kv.zero_()
    assert d.done(d.submit("load", [0], gens, [[4, 5, 6, 7]])).status == OK
    host = d.host()
    assert set(d.layout.block(host, 4)) == {7} and set(d.layout.block(host, 3)) == {0}
    d.engine.close()


def test_corrupt_and_cancelled(pinned: bool) -> None:
    d = Device(LAYOUTS[1], pinned=pinned)
    d.random(1)
    gens = [d.arena.begin_fill(s, 1) for s in (0, 1)]
    assert d.done(d.submit("store", [0, 1], gens, np.arange(8).reshape(2, 4))).status == OK
    d.arena.view(d.layout.shard_bytes + 50, 1)[0] ^= 1
    before = d.host()
    done = d.done(d.submit("load", [0, 1], gens, np.arange(8, 16).reshape(2, 4)))
    assert (done.status, done.failed_item, done.reason) == (FAILED, 1, Reason.CORRUPT)
    assert d.layout.block(d.host(), 12) == d.layout.block(before, 12)
    job = d.submit("load", [2], [d.arena.begin_fill(2, 1)], [[0, 1, 2, 3]])
    d.engine.cancel(job)
    assert d.done(job).status == CANCELLED
    d.engine.close()


def test_copies_during_a_graph_capture() -> None:
    """A capture on the main thread neither breaks nor is broken by our threads' calls."""
    d = Device(LAYOUTS[0], pinned=True)
    d.random(1)
    gens = [d.arena.begin_fill(0, 1)]
    assert d.done(d.submit("store", [0], gens, [[0, 1, 2, 3]])).status == OK
    later = d.arena.begin_fill(1, 1)
    job = d.submit("load", [0, 1], [*gens, later], [[4, 5, 6, 7], [8, 9, 10, 11]])
    x = torch.zeros(16, device="cuda")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = x + 1
        d.arena.fail(1, later)
        assert d.engine.wait(job, 10_000)
    graph.replay()
    torch.cuda.synchronize()
    assert y.sum().item() == 16
    (done,) = d.engine.poll()
    assert (done.failed_item, done.reason) == (1, Reason.SLOT_LOST)
    d.engine.close()


def test_a_refused_pin_leaves_no_error_behind() -> None:
    runtime = CudaRuntime()
    with pytest.raises(RuntimeError, match="cudaHostRegister"):
        runtime.host_register(4096, 4096)  # not mapped
    assert torch.ones(4, device="cuda").sum().item() == 4
