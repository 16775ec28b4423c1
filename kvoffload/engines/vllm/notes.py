"""What the start-up check leaves for the engine's processes, in our connector's own settings.

Not as attributes of vLLM's configuration: ``vllm.config.utils.replace``, which every multimodal
model and many drafters go through, refuses a VllmConfig with anything that is not a field of it.
The settings are a plain dict that vLLM hands on untouched. A child of MultiConnector gets settings
of its own, without notes.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

KEY = "_kvoffload"
"""Among the keys of ``kv_connector_extra_config``; no setting."""


def leave(transfer: Any, **notes: Any) -> None:
    """Add ``notes`` (plain data) to a KVTransferConfig; the dict that the user gave is not touched.

    What was noted before stays: a configuration is checked anew whenever vLLM copies it.
    """
    extra = getattr(transfer, "kv_connector_extra_config", None) or {}
    transfer.kv_connector_extra_config = {**extra, KEY: {**notes, **extra.get(KEY, {})}}


def read(vllm_config: Any) -> Mapping[str, Any]:
    """The notes; empty where the start-up check did not run."""
    transfer = getattr(vllm_config, "kv_transfer_config", None)
    extra = getattr(transfer, "kv_connector_extra_config", None)
    found = extra.get(KEY) if isinstance(extra, Mapping) else None
    return found if isinstance(found, Mapping) else {}


def without(extra: Any) -> Any:
    """Settings as the user gave them."""
    return {k: v for k, v in extra.items() if k != KEY} if isinstance(extra, Mapping) else extra
