"""Calls to an engine from outside, beside requests, that change what its KV means.

Whatever a user asks of the workers goes through a method of ``EngineCore``, on the scheduler
thread: functions and worker methods through ``collective_rpc``, the end of an adapter through
``remove_lora``.
"""

from __future__ import annotations

import functools
import logging
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

_WRAPPED = "_kvoffload_wrapped"
logger = logging.getLogger("vllm.kvoffload")

SOUNDS_LIKE_WEIGHTS = re.compile(
    r"weight|param|state_dict|(?:^|_)(?:re)?load|(?<!a)sync|update|merge|apply_model"
)
"""Names of methods, not vLLM's own, that may change weights in place. A false alarm costs a cold
cache, and what hits HBM is neither loaded nor stored until HBM's prefix cache has been empty; a
method that is missed costs wrong tokens: trainers' worker extensions have update_named_param,
load_state_dict, sync_from_trainer and the like."""


@dataclass(frozen=True, slots=True)
class Listener:
    """``weights_changed``: called before and after what may change weights. ``by_name``: also for
    worker methods that sound like it, not only for functions sent to the workers.
    ``adapter_removed``: called with the id after a LoRA adapter was removed."""

    weights_changed: Callable[[], None]
    by_name: bool = True
    adapter_removed: Callable[[int], None] = lambda lora_int_id: None


_listeners: list[Listener] = []


def watch(listener: Listener) -> Callable[[], None]:
    """Tell ``listener`` of the calls to this process's engine; returns how to stop."""
    from vllm.v1.engine.core import EngineCore

    for name, wrap in (("collective_rpc", _telling_of_weights), ("remove_lora", _telling_of_end)):
        original = getattr(EngineCore, name, None)
        if original is None:
            logger.warning("kvoffload: cannot watch EngineCore.%s", name)
        elif not getattr(original, _WRAPPED, False):
            wrapped = functools.wraps(original)(wrap(original))
            setattr(wrapped, _WRAPPED, True)
            setattr(EngineCore, name, wrapped)
    _listeners.append(listener)
    return lambda: _listeners.remove(listener)


def may_change_weights(method: Any, by_name: bool) -> bool:
    """Whether a call to the workers may: a function that is sent to them can do anything."""
    if not isinstance(method, str):
        return True
    return by_name and "checksum" not in method and bool(SOUNDS_LIKE_WEIGHTS.search(method))


def _telling_of_weights(original: Callable[..., Any]) -> Callable[..., Any]:
    def collective_rpc(self: Any, method: Any, *args: Any, **kwargs: Any) -> Any:
        tell = [x for x in _listeners if may_change_weights(method, x.by_name)]
        for listener in tell:
            listener.weights_changed()
        try:
            return original(self, method, *args, **kwargs)
        finally:
            for listener in tell:
                listener.weights_changed()

    return collective_rpc


def _telling_of_end(original: Callable[..., Any]) -> Callable[..., Any]:
    def remove_lora(self: Any, lora_id: int) -> Any:
        try:
            return original(self, lora_id)
        finally:
            for listener in list(_listeners):
                listener.adapter_removed(lora_id)

    return remove_lora
