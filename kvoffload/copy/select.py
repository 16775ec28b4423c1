"""Picks the copy engine for a device type."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kvoffload.errors import UnsupportedError

if TYPE_CHECKING:
    from kvoffload._core import Arena
    from kvoffload.copy.base import CopyEngine


def copy_engine(device_type: str, arena: Arena, rank: int) -> CopyEngine:
    """Engine for ``torch.device.type``. Raises UnsupportedError for other devices."""
    if device_type == "cpu":
        from kvoffload.copy.cpu import CpuCopyEngine

        return CpuCopyEngine(arena, rank)
    if device_type == "cuda":
        from kvoffload.copy.cuda import CudaCopyEngine

        return CudaCopyEngine(arena, rank)
    raise UnsupportedError(
        f"KV cache on device {device_type!r}: kvoffload copies cpu and cuda only"
    )
