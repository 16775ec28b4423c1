"""Keeps vLLM from taking an engine with an offload cache for the decode side of a split deployment.

``kv_role`` "kv_both", which every offload cache has, counts as a KV consumer, and of a consumer of
a multimodal model vLLM (0.30 and newer) supposes that a prefiller sends the prompt's KV: the front
end then accepts requests with the metadata of an image and without its embedding. Nobody sends us
that KV, so the encoder would be run on nothing, which ends the engine. Without a connector such a
request is refused by the front end; so it is with us.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

_RESOLVE = "_resolve_mm_embedding_inputs"
_WRAPPED = "_kvoffload_wrapped"


def wrap(config_class: Any, connector: str) -> None:
    """Have ``config_class`` (VllmConfig) decide on embedding inputs as if there were no connector,
    where all there is is ``connector``. Idempotent; nothing on a vLLM without that decision."""
    original = getattr(config_class, _RESOLVE, None)
    if original is None or getattr(original, _WRAPPED, False):
        return

    @functools.wraps(original)
    def resolve(self: Any, *args: Any, **kwargs: Any) -> Any:
        transfer = self.kv_transfer_config
        if transfer is None or not _only(_as_child(transfer), connector):
            return original(self, *args, **kwargs)
        self.kv_transfer_config = None
        try:
            return original(self, *args, **kwargs)
        finally:
            self.kv_transfer_config = transfer

    setattr(resolve, _WRAPPED, True)
    setattr(config_class, _RESOLVE, resolve)


def _as_child(transfer: Any) -> dict[str, Any]:
    keys = ("kv_connector", "kv_connector_extra_config")
    return {key: getattr(transfer, key, None) for key in keys}


def _only(child: Any, connector: str) -> bool:
    """Whether a connector is ours, or a MultiConnector of nothing else."""
    if not isinstance(child, Mapping):
        return False
    if child.get("kv_connector") == connector:
        return True
    extra = child.get("kv_connector_extra_config")
    inner = extra.get("connectors") if isinstance(extra, Mapping) else None
    multi = child.get("kv_connector") == "MultiConnector"
    return (
        multi
        and isinstance(inner, list)
        and bool(inner)
        and all(_only(c, connector) for c in inner)
    )
