"""The copy kernels: work tables, the ring that brings them to a device, and the interpreter's run."""

from __future__ import annotations

import ast
import itertools
import os
import subprocess
import sys
import xml.etree.ElementTree as ET
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import xxhash

from kvoffload import _core
from kvoffload.copy.kernels import DeviceTables, KernelMover
from kvoffload.copy.kernels_table import SPECS, checked_work, hash_keys, plain_work
from kvoffload.copy.mover import LeafCheck
from kvoffload.copy.runs import Run
from kvoffload.errors import UnsupportedError

LEAF = _core.LEAF_BYTES
ROOT = Path(__file__).resolve().parents[2]
CASES = ROOT / "tests" / "support" / "triton_cases.py"
M64 = (1 << 64) - 1


# ------------------------------------------------------------------------------ the interpreter


def case_names() -> list[str]:
    tree = ast.parse(CASES.read_text())
    return [f.name for f in tree.body if isinstance(f, ast.FunctionDef) if f.name[:5] == "test_"]


@pytest.fixture(scope="module")
def interpreted(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, list[str]], str]:
    """Outcomes per test function of tests/support/triton_cases.py, and the child's output.

    A process of its own: triton decides when it is imported whether it interprets or compiles.
    """
    pytest.importorskip("triton", reason="triton is not installed: no kernels to run")
    pytest.importorskip("torch", reason="torch is not installed: triton interprets torch tensors")
    report = tmp_path_factory.mktemp("kernels") / "report.xml"
    command = [
        sys.executable,
        "-m",
        "pytest",
        str(CASES),
        f"--junitxml={report}",
        "-q",
        "--tb=short",
    ]
    done = subprocess.run(
        [*command, "-p", "no:cacheprovider"],
        cwd=ROOT,
        env=os.environ | {"TRITON_INTERPRET": "1", "PYTEST_ADDOPTS": ""},
        capture_output=True,
        text=True,
        timeout=280,
    )
    outcomes: dict[str, list[str]] = {}
    if report.exists():
        for case in ET.parse(report).iter("testcase"):
            name = case.get("name", "").partition("[")[0]
            outcomes.setdefault(name, []).append(next((e.tag for e in case), "passed"))
    return outcomes, f"exit status {done.returncode}\n{done.stdout[-8000:]}{done.stderr[-2000:]}"


@pytest.mark.parametrize("name", case_names())
def test_interpreted(name: str, interpreted: tuple[dict[str, list[str]], str]) -> None:
    outcomes, output = interpreted
    assert set(outcomes.get(name, ["missing"])) == {"passed"}, output


def test_importing_the_mover_imports_neither_triton_nor_torch() -> None:
    code = (
        "import sys, kvoffload.copy.kernels, kvoffload.copy.kernels_table\n"
        "bad = {'triton', 'torch', 'vllm'} & sys.modules.keys()\n"
        "sys.exit(f'imported {bad}' if bad else 0)"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


def test_without_triton_the_mover_is_unsupported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "triton", None)
    monkeypatch.delitem(sys.modules, "kvoffload.copy.kernels_jit", raising=False)
    with pytest.raises(UnsupportedError, match="triton"):
        KernelMover()


# ------------------------------------------------------------------------------ keys and tables


def xxh3_of_leaf(data: bytes, keys: list[int]) -> int:
    """XXH3-64 of one leaf from the words of hash_keys, written down as plainly as possible."""
    words = np.frombuffer(data, "<u8").reshape(16, 16, 8).tolist()
    acc = keys[40:48]
    for b in range(16):
        for s in range(16):
            key = keys[24:32] if b == s == 15 else keys[s : s + 8]
            for i in range(8):
                mixed = words[b][s][i] ^ key[i]
                acc[i ^ 1] = acc[i ^ 1] + words[b][s][i] & M64
                acc[i] = acc[i] + (mixed & 0xFFFFFFFF) * (mixed >> 32) & M64
        if b < 15:
            acc = [
                ((a ^ a >> 47) ^ k) * 0x9E3779B1 & M64 for a, k in zip(acc, keys[16:], strict=False)
            ]
    result = LEAF * 0x9E3779B185EBCA87
    for i in range(0, 8, 2):
        product = (acc[i] ^ keys[32 + i]) * (acc[i + 1] ^ keys[33 + i])
        result += (product & M64) ^ product >> 64
    result &= M64
    result = (result ^ result >> 37) * 0x165667919E3779F9 & M64
    return result ^ result >> 32


@pytest.mark.parametrize("seed", [0, 1, 0x9E3779B97F4A7C15, M64])
def test_hash_keys_are_those_of_xxh3(seed: int) -> None:
    data = np.random.default_rng(seed % 97).bytes(LEAF)
    assert xxh3_of_leaf(data, hash_keys(seed).tolist()) == xxhash.xxh3_64_intdigest(data, seed)


@pytest.mark.parametrize("seed", [-1, 1 << 64])
def test_seeds_are_64_bits(seed: int) -> None:
    with pytest.raises(ValueError, match="64 bits"):
        hash_keys(seed)


def test_runs_are_cut_at_leaves_and_keep_their_bytes() -> None:
    runs = [
        Run(1 << 40, LEAF - 5, 2 * LEAF + 9),
        Run(5000, 7 * LEAF, LEAF),
        Run(9, 4 * LEAF + 1, 1),
    ]
    table = plain_work(runs, 1 << 33, False).table.reshape(-1, 3).tolist()
    arena = 1 << 33
    bytes_of = {(a + i, arena + o + i) for a, o, n in runs for i in range(n)}
    assert {(a + i, t + i) for a, t, n in table for i in range(n)} == bytes_of
    assert sum(n for _, _, n in table) == len(bytes_of)
    assert all((t - arena) // LEAF == (t - arena + n - 1) // LEAF for _, t, n in table)


def leaf_check(**kw: int) -> LeafCheck:
    return replace(LeafCheck(1, LEAF, 4 * LEAF, leaves=64, bad=64, first=1, count=2), **kw)


@pytest.mark.parametrize(
    ("check", "run", "load", "text"),
    [
        (leaf_check(), Run(64, LEAF, 10), True, "outside the leaves"),
        (leaf_check(), Run(64, 3 * LEAF, LEAF + 1), True, "outside the leaves"),
        (leaf_check(), Run(64, 5 * LEAF - 1, 2), False, "outside the leaves"),
        (leaf_check(), Run(64, 0, 2), False, "outside the leaves"),
        (leaf_check(first=3), Run(64, 4 * LEAF, 2), True, "of a shard of 4"),
        (leaf_check(first=-1), Run(64, 4 * LEAF, 2), True, "of a shard of 4"),
        (leaf_check(shard=8), Run(64, 2 * LEAF, 2), True, "not made of leaves"),
        (leaf_check(shard_bytes=LEAF + 16), Run(64, LEAF, 2), False, "not made of leaves"),
        (leaf_check(seed=-1), Run(64, 2 * LEAF, 2), True, "64 bits"),
        (leaf_check(), Run(64, 2 * LEAF, 0), True, "no bytes"),
        (leaf_check(), Run(0, 2 * LEAF, 8), True, "no address"),
    ],
)
def test_a_check_that_does_not_fit_is_refused(
    check: LeafCheck, run: Run, load: bool, text: str
) -> None:
    with pytest.raises(ValueError, match=text):
        checked_work([run], 1 << 20, load, check)


def test_an_arena_off_its_alignment_is_refused() -> None:
    with pytest.raises(ValueError, match="aligned to 16"):
        checked_work([], (1 << 20) + 8, True, leaf_check())


def test_a_plain_copy_of_nothing_is_no_launch() -> None:
    assert plain_work([], 0, True).launches == ()


def odd_runs() -> list[Run]:
    """Runs of four leaves, of every alignment of address, offset and size."""
    rng = np.random.default_rng(2)
    runs, at = [], LEAF
    while at < 4 * LEAF:
        n = int(rng.choice([16, 24, 100, 4096, 7, 9, 64]))
        runs.append(Run(int(rng.integers(1, 1 << 40)) * int(rng.choice([1, 4, 8, 16])), at, n))
        at += -at % 16 + n + int(rng.choice([0, 4, 8, 16, 3000]))
    return runs


def test_every_leaf_is_in_one_launch() -> None:
    runs = odd_runs()
    work = checked_work(runs, 1 << 20, False, leaf_check())
    assert all(launch.spec in SPECS for launch in work.launches)
    units = [u for one in work.launches for u in range(one.first, one.last)]
    rows = np.stack([work.table[4 * u : 4 * u + 4] for u in units])
    assert sorted(rows[:, 0].tolist()) == [0, 1, 2, 3]
    pieces = [p for _, begin, end, _ in rows.tolist() for p in range(begin, end, 3)]
    assert sum(int(work.table[p + 2]) for p in pieces) == sum(r.nbytes for r in runs)


def test_a_launch_is_as_aligned_as_it_claims() -> None:
    """A device faults on a wide access off its alignment; the interpreter would not notice."""
    runs, aligns = odd_runs(), set()
    plain = plain_work(runs, 1 << 20, True)
    for spec, first, last in plain.launches:
        aligns.add(spec.align)
        rows = plain.table.reshape(-1, 3)[first:last]
        assert not (rows % spec.align).any()
        assert rows[:, 2].max() <= spec.width
    assert aligns == {16, 8, 4, 1}
    # One fragment a leaf, so that each leaf has an alignment of its own, from any of the three.
    for address, low, size in itertools.product((16, 8, 4, 1), repeat=3):
        run = Run((1 << 40) + address, 2 * LEAF + low, 4096 + size)
        work = checked_work([run], 1 << 20, True, leaf_check(first=1, count=1))
        (launch,) = work.launches
        assert launch.spec.align == min(address, low, size)
        (piece,) = work.table[-3:].reshape(1, 3).tolist()
        assert piece == [run.address, low, run.nbytes]


# ------------------------------------------------------------------------------ the ring of tables


class Waitable:
    """An event, or a stream: notes that it was waited for."""

    def __init__(self, log: list[str], name: str) -> None:
        self.log, self.name = log, name

    def synchronize(self) -> None:
        self.log.append(self.name)


class HostRing(DeviceTables):
    """DeviceTables whose device memory is the host's; events only note that they were waited for."""

    def __init__(self, ring: int, words: int) -> None:
        super().__init__(ring, words)
        self.log: list[str] = []
        self.recorded = 0
        self.refuse = False

    def _current(self, stream: Any) -> Any:
        return nullcontext()

    def _buffers(self, words: int) -> tuple[Any, Any]:
        import torch

        self.log.append(f"alloc {words}")
        return torch.empty(words, dtype=torch.int64), torch.empty(words, dtype=torch.int64)

    def _record(self, stream: Any) -> Any:
        if self.refuse:
            raise RuntimeError("planted: cudaEventRecord")
        self.recorded += 1
        return Waitable(self.log, f"event {self.recorded}")


def test_a_table_is_rewritten_only_after_its_last_use() -> None:
    pytest.importorskip("torch")
    ring = HostRing(ring=3, words=8)
    stream = Waitable(ring.log, "stream")
    for i in range(8):
        before = list(ring.log)
        with ring.staged(np.arange(i + 1, dtype=np.int64), stream) as table:
            assert table[: i + 1].tolist() == list(range(i + 1))
            waited = [x for x in ring.log[len(before) :] if x.startswith("event")]
            assert waited == ([f"event {i - 2}"] if i >= 3 else [])
        ring.check()
    with ring.staged(np.arange(100, dtype=np.int64), stream) as table:
        assert len(table) == 128 and table[99] == 99  # grown
    assert ring.log[-2:] == ["event 6", "alloc 128"]
    ring.close()
    assert ring.log[-3:] == ["event 7", "event 8", "event 9"]
    with pytest.raises(RuntimeError, match="closed"), ring.staged(np.zeros(1, np.int64), stream):
        pass
    ring.check()


def test_a_use_without_an_event_waits_for_the_stream() -> None:
    pytest.importorskip("torch")
    ring = HostRing(ring=1, words=8)
    stream, words = Waitable(ring.log, "stream"), np.zeros(4, np.int64)
    ring.refuse = True
    with pytest.raises(RuntimeError, match="planted"), ring.staged(words, stream):
        pass
    ring.refuse = False
    with ring.staged(words, stream):
        assert ring.log[-1] == "stream"
    with pytest.raises(OSError), ring.staged(words, stream):
        raise OSError("a launch failed half-way: what was enqueued still has its event")
    with ring.staged(words, stream):
        assert ring.log[-1] == "event 2"
