"""kvoffload: a KV cache that outlives the GPU. Importing this is light: no torch, no vLLM."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"
__all__ = ["Config", "__version__", "open_store"]

if TYPE_CHECKING:
    from kvoffload.config import Config
    from kvoffload.store import open_store


def __getattr__(name: str) -> Any:
    if name == "Config":
        from kvoffload.config import Config

        return Config
    if name == "open_store":
        from kvoffload.store import open_store

        return open_store
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
