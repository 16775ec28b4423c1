"""Picks the copy engine for a device type."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from kvoffload.errors import UnsupportedError

if TYPE_CHECKING:
    from kvoffload._core import Arena
    from kvoffload.copy.base import CopyEngine
    from kvoffload.copy.cuda import CudaCopyEngine

logger = logging.getLogger("vllm.kvoffload")


def copy_engine(device_type: str, arena: Arena, rank: int) -> CopyEngine:
    """Engine for ``torch.device.type``. Raises UnsupportedError for other devices."""
    if device_type == "cpu":
        from kvoffload.copy.cpu import CpuCopyEngine

        return CpuCopyEngine(arena, rank)
    if device_type == "cuda":
        return cuda_engine(arena, rank)
    raise UnsupportedError(
        f"KV cache on device {device_type!r}: kvoffload copies cpu and cuda only"
    )


def precompile(device_type: str) -> None:
    """Compile what the device's engine will launch. Never raises; the engine does without.

    For a worker that knows its device and not yet its arena: from the end of vLLM's warm-up on, its
    JIT monitor warns of each kernel that is compiled, or raises, also when triton's cache has it.
    Nothing is launched or allocated. Seconds the first time on a machine.
    """
    if device_type != "cuda":
        return
    try:
        import torch

        if torch.version.cuda:
            from kvoffload.copy import kernels

            kernels.precompile()
    except Exception as exc:  # triton has exceptions of its own
        # The engine says so, if it comes to it: it may not be able to use the kernels anyway.
        logger.debug("kvoffload: copy kernels not compiled in advance: %s", exc, exc_info=exc)


def cuda_engine(arena: Arena, rank: int, *, only: str = "") -> CudaCopyEngine:
    """Engine for the current CUDA device; its faster movers join when they are calibrated.

    ``only``: the name of the one mover to use besides the plain one, for tests and measurements.
    Raises UnsupportedError, RuntimeError like CudaCopyEngine.
    """
    from kvoffload.copy.cuda import CudaCopyEngine
    from kvoffload.copy.cuda_movers import prepare
    from kvoffload.copy.cuda_runtime import CudaRuntime
    from kvoffload.copy.mover_set import MoverSet
    from kvoffload.copy.movers import PlainMover

    runtime = CudaRuntime()
    movers = MoverSet(PlainMover(runtime), only=only)
    engine = CudaCopyEngine(arena, rank, runtime=runtime, movers=movers)
    movers.prepare(runtime.enter_thread, lambda stopped: prepare(runtime, stopped))
    return engine
