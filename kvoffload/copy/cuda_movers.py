"""The movers of a real device, and the scratch memory on which they are tried.

What is missing is left out: no cuMemcpyBatchAsync before CUDA 12.8, no kernels without triton.
"""

from __future__ import annotations

import ctypes
import logging
import mmap
import time
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch

from kvoffload import __version__
from kvoffload.copy.calibrate import cache_file
from kvoffload.copy.cuda_driver import find_batch_copy
from kvoffload.copy.cuda_runtime import PIECE_BYTES, CudaRuntime
from kvoffload.copy.mover import Mover
from kvoffload.copy.mover_set import Prepared
from kvoffload.copy.movers import BatchMover, PlainMover, StagedMover
from kvoffload.copy.trials import GRID, SCRATCH_BYTES, U8, calibrate
from kvoffload.errors import UnsupportedError

logger = logging.getLogger("vllm.kvoffload")

_MONITOR = "JIT compilation during inference"  # of what vllm/utils/jit_monitor.py raises


class CudaScratch:
    """trials.Scratch on the current device. Raises RuntimeError where memory is refused."""

    def __init__(self, runtime: CudaRuntime) -> None:
        self._runtime = runtime
        self.stream = runtime.stream(high_priority=False)
        self._memory = mmap.mmap(-1, SCRATCH_BYTES)
        self.host = ctypes.addressof(ctypes.c_char.from_buffer(self._memory))
        self.host_bytes: U8 = np.frombuffer(self._memory, np.uint8)
        with torch.cuda.stream(self.stream):
            self._tensor = torch.empty(SCRATCH_BYTES, dtype=torch.uint8, device="cuda")
        self.device = int(self._tensor.data_ptr())
        runtime.host_register(self.host, SCRATCH_BYTES)

    def put(self, data: U8) -> None:
        """See Scratch."""
        with torch.cuda.stream(self.stream):
            self._tensor[: len(data)].copy_(torch.from_numpy(data))
        self.stream.synchronize()

    def get(self, nbytes: int) -> U8:
        """See Scratch."""
        with torch.cuda.stream(self.stream):
            out: U8 = self._tensor[:nbytes].cpu().numpy()
        return out

    def elapsed(self, enqueue: Callable[[], None]) -> float:
        """See Scratch."""
        first, last = (torch.cuda.Event(enable_timing=True, blocking=True) for _ in range(2))
        first.record(self.stream)
        try:
            enqueue()
        finally:
            last.record(self.stream)
            last.synchronize()
        return float(first.elapsed_time(last)) / 1e3

    def close(self) -> None:
        """Unpin and let the memory go; everything enqueued has ended."""
        self.stream.synchronize()
        self._runtime.host_unregister(self.host)


def _kernel_mover(scratch: CudaScratch, stopped: Callable[[], bool]) -> Mover | None:
    """Compiled for every shape of copy, so that no copy waits for a compiler."""
    try:
        from kvoffload.copy.kernels import KernelMover
        from kvoffload.copy.kernels_table import SPECS

        mover = KernelMover()
    except (ImportError, UnsupportedError) as exc:
        logger.debug("kvoffload: no copy kernels: %s", exc)
        return None
    try:
        for spec in SPECS:
            if stopped():
                return None
            mover.warm(scratch.stream, [spec])
    except Exception as exc:  # triton has exceptions of its own
        _say_why_not(exc)
        return None
    return mover


def _say_why_not(exc: Exception) -> None:
    if isinstance(exc, RuntimeError) and _MONITOR in str(exc):
        # They compile; select.precompile, before the monitor starts, has not or not all of them.
        logger.error(
            "kvoffload: vLLM's JIT monitor (--jit-monitor-mode error) lets no copy kernel be "
            "compiled after its warm-up (%s); they are not used.", exc,
        )  # fmt: skip
        return
    logger.error(
        "kvoffload: the copy kernels do not compile here (%s: %s); they are not used.",
        type(exc).__name__, exc, exc_info=exc,
    )  # fmt: skip


def build_movers(
    runtime: CudaRuntime, scratch: CudaScratch, piece_bytes: int, stopped: Callable[[], bool]
) -> dict[bool, list[Mover]]:
    """Every mover this device and its software have, separate ones for each direction."""

    def allocate(nbytes: int, stream: Any) -> Any:
        # Under the stream that uses it: the allocator may hand out what another one still reads.
        with torch.cuda.stream(stream):
            return torch.empty(nbytes, dtype=torch.uint8, device="cuda")

    batch = find_batch_copy()
    out: dict[bool, list[Mover]] = {}
    for to_device in (True, False):
        movers: list[Mover] = [PlainMover(runtime)]
        if batch is not None:
            movers.append(BatchMover(batch))
        kernel = _kernel_mover(scratch, stopped)
        if kernel is not None:
            movers += [StagedMover(kernel, runtime, allocate, piece_bytes), kernel]
        out[to_device] = movers
    return out


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return ""


def device_key(movers: dict[bool, list[Mover]]) -> dict[str, Any]:
    """What the figures of a calibration depend on."""
    try:
        driver = Path("/proc/driver/nvidia/version").read_text().splitlines()[0]
    except (OSError, IndexError):
        driver = ""  # a container may hide it
    return {
        "device": torch.cuda.get_device_name(),
        "driver": driver,
        "cuda": torch.version.cuda,
        "torch": torch.__version__,
        "triton": _version("triton"),
        "kvoffload": __version__,
        "movers": [[m.name for m in movers[up]] for up in (True, False)],
        "grid": [list(point) for point in GRID],
    }


def prepare(
    runtime: CudaRuntime, stopped: Callable[[], bool], piece_bytes: int = PIECE_BYTES
) -> Prepared:
    """Compile, verify and time. On the thread that ``runtime.enter_thread`` was called on.

    Raises RuntimeError where the device gives no scratch memory.
    """
    if not runtime.same_addresses():
        logger.info(
            "kvoffload: this device sees pinned memory at other addresses than the host; plain "
            "copies are used."
        )
        return Prepared()
    try:
        scratch = CudaScratch(runtime)
    except RuntimeError as exc:
        logger.warning("kvoffload: no memory to try the copy kernels (%s); plain copies.", exc)
        return Prepared()
    start = time.monotonic()
    try:
        movers = build_movers(runtime, scratch, piece_bytes, stopped)
        built = time.monotonic()
        key = device_key(movers)
        good, table = calibrate(movers, scratch, key, cache_file(key), stopped=stopped)
    finally:
        scratch.close()
    names = {up: [m.name for m in some] for up, some in good.items()}
    logger.info(
        "kvoffload: copies: loads by %s, stores by %s, picked by size (%.1f s to compile, %.1f s "
        "to try).", "/".join(names[True]), "/".join(names[False]), built - start,
        time.monotonic() - built,
    )  # fmt: skip
    return Prepared(good[True], good[False], table)
