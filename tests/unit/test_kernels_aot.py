"""The copy kernels compiled for sm_80, sm_90 and sm_100: registers, spills and access widths.

No GPU is needed. tests/support/triton_aot.py says how to regenerate the expected table.
"""

from __future__ import annotations

import importlib.util
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from kvoffload.copy import select
from kvoffload.copy.kernels import KernelMover
from kvoffload.copy.kernels_table import SPECS
from tests.support.triton_aot import ARCHES, GOLDEN, figures, name_of

triton = pytest.importorskip("triton", reason="triton is not installed: nothing to compile with")

VLLM = importlib.util.find_spec("vllm")
MONITOR = Path(VLLM.origin if VLLM and VLLM.origin else "none").parent / "utils" / "jit_monitor.py"

MAX_REGISTERS = 224
"""A leaf in registers is 64 of them with two warps; 255 is where the compiler starts to spill."""


@pytest.fixture(autouse=True, scope="module")
def fresh_cache(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """What is looked at is compiled now, not found in a cache."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_CACHE_DIR", str(tmp_path_factory.mktemp("triton")))
        patch.delenv("TRITON_INTERPRET", raising=False)
        yield


@pytest.fixture(scope="module")
def golden() -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads(Path(GOLDEN).read_text())
    return loaded


def test_golden_table_is_whole(golden: dict[str, Any]) -> None:
    assert set(golden) == {"triton", *(f"sm_{arch}" for arch in ARCHES)}
    for arch in ARCHES:
        assert list(golden[f"sm_{arch}"]) == [name_of(spec) for spec in SPECS]


@pytest.mark.parametrize("arch", ARCHES)
@pytest.mark.parametrize("spec", SPECS, ids=name_of)
@pytest.mark.filterwarnings("ignore:TRITON_DEFAULT_FP_FUSION")
def test_compiles_as_expected(spec: Any, arch: int, golden: dict[str, Any]) -> None:
    got, ptx = figures(spec, arch)
    assert got["spill_bytes"] == 0
    assert got["registers"] <= MAX_REGISTERS
    per_thread = 16384 // (32 * spec.warps) // 16
    checked = spec.kernel != "copy_pieces"
    if spec.align == 16:  # every byte of the blocks and of the arena goes 16 bytes at a time
        assert got["loads_of_16"] >= per_thread and got["stores_of_16"] >= per_thread
        assert re.search(r"ld\.global(\.\w+)*\.v[24]\.b(64|32)", ptx)
        assert re.search(r"st\.global(\.\w+)*\.v[24]\.b(64|32)", ptx)
    elif spec.kernel == "store_leaves":  # blocks narrow, the arena's side is always aligned
        assert got["stores_of_16"] >= per_thread
    elif spec.kernel == "load_leaves":
        assert got["loads_of_16"] >= per_thread and got["stores_of_16"] == 0
        assert got["narrowest_store"] == spec.element
    else:
        assert got["stores_of_16"] == 0 and got["widest_store"] == spec.element
    assert checked or got["shared_bytes"] == 0
    if triton.__version__ == golden["triton"]:
        assert got == golden[f"sm_{arch}"][name_of(spec)]


# -------------------------------------------------------------------- before vLLM's JIT monitor starts


class HostTables:
    """As DeviceTables, in host memory: for launches that only compile."""

    @contextmanager
    def staged(self, words: Any, stream: Any) -> Iterator[Any]:
        torch = pytest.importorskip("torch")
        yield torch.empty(1 << 13, dtype=torch.int64)

    def close(self) -> None:
        """Nothing is kept."""

    def check(self) -> None:
        """Nothing to break."""


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Names of the kernels that vLLM's monitor would complain of, on an H100 that is not here. Launches
    do everything but launch."""
    from triton.backends.compiler import GPUTarget
    from triton.runtime.driver import driver
    from triton.runtime.jit import JITFunction

    from kvoffload.copy import kernels_jit

    pytest.importorskip("torch")
    fake = SimpleNamespace(
        get_current_device=lambda: 0,
        get_current_stream=lambda device: 0,
        get_current_target=lambda: GPUTarget("cuda", 90, 32),
    )
    seen: list[str] = []

    def hook(**kwargs: Any) -> None:
        seen.append(kwargs["fn"].name)

    monkeypatch.setattr(triton.knobs.runtime, "jit_post_compile_hook", hook)
    monkeypatch.setattr(
        JITFunction, "__getitem__", lambda self, grid: partial(self.warmup, grid=grid)
    )
    monkeypatch.setattr("torch.version.cuda", "13.0")
    kernels = [getattr(kernels_jit, name) for name in {s.kernel for s in SPECS}]
    for kernel in kernels:
        kernel.device_caches.clear()
    monkeypatch.setattr(driver, "_active", fake)
    yield seen
    for kernel in kernels:
        kernel.device_caches.clear()


@pytest.mark.filterwarnings("ignore:TRITON_DEFAULT_FP_FUSION")
def test_what_is_compiled_in_advance_is_what_is_launched(compiled: list[str]) -> None:
    select.precompile("cpu")
    assert not compiled
    select.precompile("cuda")
    assert len(compiled) == len(SPECS)
    compiled.clear()
    KernelMover(tables=HostTables()).warm(None)
    assert not compiled, "compiled again: launches differ from what was compiled in advance"


@pytest.mark.filterwarnings("ignore:TRITON_DEFAULT_FP_FUSION")
def test_without_that_the_engine_compiles_in_the_first_step(compiled: list[str]) -> None:
    KernelMover(tables=HostTables()).warm(None, SPECS[:1])
    assert len(compiled) == 1


def test_a_compiler_that_raises_costs_the_kernels_only(
    compiled: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kvoffload.copy.kernels.precompile", lambda: 1 / 0)
    select.precompile("cuda")


def test_they_are_compiled_when_the_kv_caches_are_registered() -> None:
    """The engine is made too late: in the first step, behind vLLM's warm-up."""
    pytest.importorskip("vllm")
    from kvoffload.engines.vllm.build import WorkerSide

    asked: list[str] = []
    half = SimpleNamespace(guard=SimpleNamespace(maybe_fault=lambda name: None))
    config = SimpleNamespace(kv_cache_groups=[], num_blocks=4)
    side: Any = WorkerSide(half, config, ["cuda"], asked.append)  # type: ignore[arg-type]
    side.register({})
    assert asked == ["cuda"]


@pytest.mark.parametrize("monitor", [True, False])
def test_the_line_about_unused_kernels_tells_the_monitor_from_the_compiler(
    monitor: bool, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    pytest.importorskip("torch")
    from kvoffload.copy import cuda_movers

    said = "Triton kernel JIT compilation during inference: copy_pieces. This causes"
    error = RuntimeError(said if monitor else "ptxas: no such file")

    def refuse(self: Any, stream: Any, specs: Any) -> None:
        raise error

    monkeypatch.setattr(KernelMover, "warm", refuse)
    monkeypatch.setattr("kvoffload.copy.kernels.DeviceTables", HostTables)
    scratch: Any = SimpleNamespace(stream=None)
    assert cuda_movers._kernel_mover(scratch, lambda: False) is None
    (line,) = caplog.messages
    assert str(error) in line
    assert ("jit-monitor-mode" in line) == monitor == ("do not compile" not in line)


@pytest.mark.skipif(not MONITOR.exists(), reason="no vLLM, or one without the monitor")
def test_the_monitor_still_says_so() -> None:
    source = MONITOR.read_text()
    assert (
        "raise RuntimeError(message % args)" in source and '"%s %s during inference: %s' in source
    )
    assert 'event="kernel JIT compilation"' in source
