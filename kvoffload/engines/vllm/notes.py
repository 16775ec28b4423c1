"""What the start-up check leaves for the engine's processes, in our connector's own settings.

Not as attributes of vLLM's configuration: ``vllm.config.utils.replace``, which every multimodal
model and many drafters go through, refuses a VllmConfig with anything that is not a field of it.
The settings are a plain dict that vLLM hands on untouched. A child of MultiConnector has settings
of its own in there, and notes of its own.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

KEY = "_kvoffload"
"""Among the keys of ``kv_connector_extra_config``; no setting."""


def leave(vllm_config: Any, connector: str, **notes: Any) -> None:
    """Add ``notes`` (plain data) to a VllmConfig, also for each child that names ``connector``.

    What the user gave (and may give to another engine) is not touched: neither the KVTransferConfig
    nor its dict.

    What was noted before stays: a configuration is checked anew whenever vLLM copies it.
    """
    transfer = copy.copy(vllm_config.kv_transfer_config)
    extra = getattr(transfer, "kv_connector_extra_config", None) or {}
    transfer.kv_connector_extra_config = _noted(extra, connector, notes)
    vllm_config.kv_transfer_config = transfer


def _noted(extra: Mapping[str, Any], connector: str, notes: Mapping[str, Any]) -> dict[str, Any]:
    out = {**extra, KEY: {**notes, **extra.get(KEY, {})}}
    if isinstance(children := extra.get("connectors"), list):
        out["connectors"] = [_child(child, connector, notes) for child in children]
    return out


def _child(child: Any, connector: str, notes: Mapping[str, Any]) -> Any:
    if not isinstance(child, Mapping):
        return child
    if child.get("kv_connector") not in (connector, "MultiConnector"):
        return child
    extra = child.get("kv_connector_extra_config") or {}
    if not isinstance(extra, Mapping):
        return child
    return {**child, "kv_connector_extra_config": _noted(extra, connector, notes)}


def read(vllm_config: Any) -> Mapping[str, Any]:
    """The notes; empty where the start-up check did not run."""
    transfer = getattr(vllm_config, "kv_transfer_config", None)
    extra = getattr(transfer, "kv_connector_extra_config", None)
    found = extra.get(KEY) if isinstance(extra, Mapping) else None
    return found if isinstance(found, Mapping) else {}


def without(extra: Any) -> Any:
    """Settings as the user gave them."""
    return {k: v for k, v in extra.items() if k != KEY} if isinstance(extra, Mapping) else extra
