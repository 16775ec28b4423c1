"""Times any vLLM KV connector from outside, in the same way for every system.

``KVConnectorFactory.create_connector`` is wrapped; scheduler-role instances get timed versions of
their hooks. One JSON line per event goes to ``$KVBENCH_PROBE/<pid>.jsonl``:

- ``{"ev": "load", "req", "tokens", "ns", "since_arrival_ns"}``: ``ns`` from
  ``update_state_after_alloc`` with external tokens to the ``update_connector_output`` that names
  the request; ``since_arrival_ns`` from the request's arrival in the scheduler
  (``on_new_request``) to the same end: a connector that moves bytes from disk before it asks for
  blocks does not hide that there. ``"failed": true`` where the connector reported the load as
  failed. CLOCK_MONOTONIC.
- ``{"ev": "steps", "ns": [...]}``: nanoseconds spent in scheduler-side hooks per engine step.

Standard library only: this runs inside the engine, before anything else is imported.
"""

from __future__ import annotations

import atexit
import importlib.abc
import importlib.machinery
import json
import os
import sys
import time
from collections.abc import Callable
from types import ModuleType
from typing import Any

FACTORY = "vllm.distributed.kv_transfer.kv_connector.factory"
# Scheduler-side hooks that run on the engine's thread; build_connector_meta ends a step.
HOOKS = (
    "on_new_request",
    "get_num_new_matched_tokens",
    "get_loaded_kv_cache_group_ids",
    "update_state_after_alloc",
    "get_external_cache_hit_sources",
    "build_connector_meta",
    "update_connector_output",
    "get_kv_connector_stats",
    "take_events",
    "request_finished",
    "request_finished_all_groups",
    "has_pending_push_work",
    "has_pending_block_frees",
)
FLUSH_STEPS = 256


class Probe:
    """Collects events of one connector instance. Engine thread only."""

    def __init__(self, folder: str) -> None:
        self._path = os.path.join(folder, f"{os.getpid()}.jsonl")
        self._open: dict[str, tuple[int, int]] = {}
        self._arrived: dict[str, int] = {}
        self._steps: list[int] = []
        self._events: list[dict[str, Any]] = []
        self._now_ns = 0
        self._depth = 0
        atexit.register(self.flush)

    def note(self, event: dict[str, Any]) -> None:
        """Written later: a request that is being timed waits for whoever notes something."""
        self._events.append(event)

    def flush(self) -> None:
        if self._steps:
            self.note({"ev": "steps", "ns": self._steps})
            self._steps = []
        if self._events:
            with open(self._path, "a") as out:
                out.writelines(json.dumps(event) + "\n" for event in self._events)
            self._events = []

    def timed(self, name: str, hook: Callable[..., Any]) -> Callable[..., Any]:
        """``hook`` plus its time; a hook called by another hook counts once."""
        before = getattr(self, "_before_" + name, None)
        after = getattr(self, "_after_" + name, None)

        def call(*args: Any, **kwargs: Any) -> Any:
            if before is not None and self._depth == 0:
                before(*args, **kwargs)
            self._depth += 1
            start = time.perf_counter_ns()
            try:
                return hook(*args, **kwargs)
            finally:
                self._depth -= 1
                if self._depth == 0:
                    self._now_ns += time.perf_counter_ns() - start
                    if after is not None:
                        after(*args, **kwargs)

        return call

    def _before_on_new_request(self, request: Any) -> None:
        self._arrived[request.request_id] = time.monotonic_ns()

    def _before_request_finished(self, request: Any, *_args: Any) -> None:
        self._arrived.pop(request.request_id, None)
        self._open.pop(request.request_id, None)

    _before_request_finished_all_groups = _before_request_finished

    def _before_update_state_after_alloc(self, request: Any, blocks: Any, tokens: int) -> None:
        if tokens > 0:
            self._open[request.request_id] = (time.monotonic_ns(), tokens)

    def _before_update_connector_output(self, output: Any) -> None:
        # Taken before the hook: what the connector does with the news is not part of the load.
        now = time.monotonic_ns()
        failed = set(getattr(output, "failed_recving", None) or ())
        for name in set(output.finished_recving or ()) | failed:
            began = self._open.pop(name, None)
            if began is not None:
                event = {"ev": "load", "req": name, "tokens": began[1], "ns": now - began[0]}
                event["since_arrival_ns"] = now - self._arrived.get(name, began[0])
                self.note(event | ({"failed": True} if name in failed else {}))

    def _after_build_connector_meta(self, *_args: Any, **_kwargs: Any) -> None:
        self._steps.append(self._now_ns)
        self._now_ns = 0
        if len(self._steps) >= FLUSH_STEPS:
            self.flush()

    def _before_shutdown(self) -> None:
        self.flush()


def _wrap_factory(module: ModuleType) -> None:
    factory = module.KVConnectorFactory
    create = factory.create_connector.__func__

    def create_connector(cls: Any, config: Any, role: Any, *args: Any, **kwargs: Any) -> Any:
        connector = create(cls, config, role, *args, **kwargs)
        if role.name == "SCHEDULER":
            probe = Probe(os.environ["KVBENCH_PROBE"])
            for name in (*HOOKS, "shutdown"):
                hook = getattr(connector, name, None)
                if hook is not None:
                    # On the instance: isinstance checks and class attributes stay as they are.
                    setattr(connector, name, probe.timed(name, hook))
            probe.note({"ev": "created", "class": type(connector).__name__})
            probe.flush()
        return connector

    factory.create_connector = classmethod(create_connector)


class _Finder(importlib.abc.MetaPathFinder):
    """Runs ``_wrap_factory`` right after the factory module was executed."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        if name != FACTORY:
            return None
        sys.meta_path.remove(self)
        spec = importlib.machinery.PathFinder.find_spec(name, path, target)
        if spec is None or spec.loader is None:
            return spec
        execute = spec.loader.exec_module

        def exec_module(module: ModuleType) -> None:
            execute(module)
            _wrap_factory(module)

        spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


def install() -> None:
    """Arm the import hook once per process."""
    if FACTORY in sys.modules:
        _wrap_factory(sys.modules[FACTORY])
    else:
        sys.meta_path.insert(0, _Finder())
