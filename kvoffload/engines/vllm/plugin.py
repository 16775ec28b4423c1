"""Entry point of ``vllm.general_plugins``: runs once in every vLLM process, before models load.

It registers the connector, checks our keys in the front end (before an engine process starts),
sets ``kv_load_failure_policy`` and notices in-place weight updates in workers. It never breaks a
vLLM that does not use kvoffload: everything is guarded, and nothing happens unless the connector
is named.
"""

from __future__ import annotations

import functools
import inspect
import logging
import os
import re
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from kvoffload.config import Config
from kvoffload.engines.vllm import compat, consumer, engine_calls, native_settings, notes
from kvoffload.engines.vllm.weight_files import machine, model_folders
from kvoffload.errors import ConfigError, OffloadError, UnsupportedError

CONNECTOR = "KVOffloadConnector"
CONNECTOR_MODULE = "kvoffload.engines.vllm.connector"
_WRAPPED = "_kvoffload_wrapped"
_POST_INIT = "_post_init_kv_transfer_config"

#: Methods of a vLLM worker or model runner that change weights in place (0.26, 0.30..0.33).
WEIGHT_METHODS = (
    "reload_weights",
    "start_weight_update",
    "start_draft_weight_update",
    "update_weights",
    "finish_weight_update",
    "apply_model",
)
#: The same, in some versions only: (since, name).
WEIGHT_METHODS_SINCE = (((0, 33), "reset_weights"),)
_ALL_WEIGHT_METHODS = frozenset(WEIGHT_METHODS) | {name for _, name in WEIGHT_METHODS_SINCE}
_MODEL_RUNNERS = (
    ("vllm.v1.worker.gpu_model_runner", "GPUModelRunner"),
    ("vllm.v1.worker.gpu.model_runner", "GPUModelRunner"),
)

# A child of vllm's logger: vLLM configures only its own tree, so a line under "kvoffload" at INFO
# would not be seen by anyone.
logger = logging.getLogger("vllm.kvoffload")

_CLOCK_NS = 20_000_000
"""File systems stamp a change with a clock that is up to a tick (10 ms at 100 Hz) behind."""

_lock = threading.Lock()
_listeners: list[Callable[[], None]] = []
_said: set[str] = set()
_loaded_after_ns: int | None = None


class StartupError(OffloadError):
    """A configuration that is refused before the engine starts; the message is one line.

    Not a ValueError on purpose: pydantic would wrap that in a report of several lines that ends
    with a link and buries the reason.
    """


# -- registration --------------------------------------------------------------------------------


def register() -> None:
    """Register the connector and wrap the start-up check. Idempotent, thread-safe, never raises."""
    global _loaded_after_ns
    with _lock:
        if _loaded_after_ns is None:
            _loaded_after_ns = time.time_ns()
        steps = (_register_connector, _wrap_config, _wrap_consumer, native_settings.wrap_factory)
        for step in steps:
            try:
                step()
            except Exception:
                logger.exception(
                    "kvoffload: %s failed; kvoffload may be unavailable", step.__name__
                )


def loaded_after_ns() -> int:
    """Wall clock in ns before which this process cannot have opened a weight file."""
    return _loaded_after_ns if _loaded_after_ns is not None else _process_start_ns()


def _process_start_ns() -> int:
    try:
        with open("/proc/self/stat", encoding="ascii", errors="replace") as f:
            ticks = int(f.read().rpartition(")")[2].split()[19])
        with open("/proc/uptime", encoding="ascii") as f:
            uptime = float(f.read().split()[0])
        age = uptime - ticks / os.sysconf("SC_CLK_TCK")
        return time.time_ns() - int((age + 1.0) * 1e9)  # a second early: both clocks are coarse
    except (OSError, ValueError, IndexError):
        return 0


def _register_connector() -> None:
    from vllm.distributed.kv_transfer.kv_connector.factory import KVConnectorFactory

    if CONNECTOR not in KVConnectorFactory._registry:
        KVConnectorFactory.register_connector(CONNECTOR, CONNECTOR_MODULE, CONNECTOR)


def _wrap_config() -> None:
    from vllm.config import VllmConfig

    original = getattr(VllmConfig, _POST_INIT, None)
    if original is None:
        logger.warning(
            "kvoffload: this vLLM has no VllmConfig.%s; settings are checked at engine start",
            _POST_INIT,
        )
        return
    if getattr(original, _WRAPPED, False):
        return

    @functools.wraps(original)
    def checked(self: Any, *args: Any, **kwargs: Any) -> Any:
        named = _names_us(self)
        result = original(self, *args, **kwargs)
        if named and not _names_us(self):
            raise StartupError(
                "kvoffload: --kv-offloading-size puts vLLM's own connector in our place; "
                "leave it out and set dram_gib in kv_connector_extra_config"
            )
        prepare(self)
        return result

    setattr(checked, _WRAPPED, True)
    setattr(VllmConfig, _POST_INIT, checked)


def _wrap_consumer() -> None:
    from vllm.config import VllmConfig

    consumer.wrap(VllmConfig, CONNECTOR)


# -- the start-up check --------------------------------------------------------------------------


def our_configs(kv_transfer_config: Any) -> Iterator[Mapping[str, Any]]:
    """The extra config of each KVOffloadConnector: named directly or a child of MultiConnector."""
    name = getattr(kv_transfer_config, "kv_connector", None)
    extra = getattr(kv_transfer_config, "kv_connector_extra_config", None) or {}
    yield from our_settings({"kv_connector": name, "kv_connector_extra_config": extra})


def our_settings(child: Any) -> Iterator[Mapping[str, Any]]:
    """As ``our_configs``, of a ``--kv-transfer-config`` object or a child of MultiConnector."""
    if not isinstance(child, Mapping):
        return
    extra = child.get("kv_connector_extra_config") or {}
    if child.get("kv_connector") == CONNECTOR:
        yield notes.without(extra)
    elif child.get("kv_connector") == "MultiConnector" and isinstance(extra, Mapping):
        children = extra.get("connectors")
        for inner in children if isinstance(children, list | tuple) else ():
            yield from our_settings(inner)


def _names_us(vllm_config: Any) -> bool:
    transfer = getattr(vllm_config, "kv_transfer_config", None)
    try:
        return transfer is not None and any(True for _ in our_configs(transfer))
    except Exception:  # settings of another shape: prepare() meets the same and logs it
        return False


def prepare(vllm_config: Any) -> None:
    """Check and complete a VllmConfig that names our connector or tier; nothing for any other.

    Raises StartupError (one line). An error of this function itself is logged, never raised.
    """
    try:
        transfer = getattr(vllm_config, "kv_transfer_config", None)
        native_settings.check_native_tiers(vllm_config)
        extras = list(our_configs(transfer)) if transfer is not None else []
        if extras:
            _check_all(vllm_config, transfer, extras)
        elif transfer is None or not any(True for _ in native_settings.our_tiers(transfer)):
            return
        left = {
            "alone": getattr(transfer, "kv_connector", None) == CONNECTOR,
            "folders": model_folders(vllm_config),
            "where": machine(),
            "since": time.time_ns() - _CLOCK_NS,
            "engines": compat.local_engines(vllm_config),
        }
        notes.leave(vllm_config, CONNECTOR, **left)
        if extras:
            _set_failure_policy(vllm_config.kv_transfer_config)
    except (ConfigError, UnsupportedError) as exc:
        raise StartupError(str(exc)) from None
    except Exception:
        logger.exception("kvoffload: the start-up check failed; the engine checks again at start")


def _check_all(vllm_config: Any, transfer: Any, extras: list[Mapping[str, Any]]) -> None:
    for extra in extras:
        Config.from_extra_config(extra).check_host(compat.local_engines(vllm_config))
    if len(extras) > 1:
        raise UnsupportedError(
            f"kvoffload: {CONNECTOR} is given {len(extras)} times; two caches of the same blocks "
            "only cost memory; keep one"
        )
    role = getattr(transfer, "kv_role", None)
    if role != "kv_both":
        raise UnsupportedError(
            f"kvoffload: kv_role={role!r} is not supported: an offload cache stores and loads; "
            'set "kv_role": "kv_both"'
        )
    check_supported(vllm_config)


def check_supported(vllm_config: Any) -> None:
    """Refuse engine settings we cannot serve. Raises UnsupportedError: what, why, what to do.

    docs/gpu.md has the table of what works, what is refused here, and what vLLM refuses itself.
    """
    if (refused := compat.why_refused(compat.vllm_version())) is not None:
        raise UnsupportedError(f"kvoffload: {refused}; or start vLLM without {CONNECTOR}")
    _check_parallel(getattr(vllm_config, "parallel_config", None))
    _check_model(getattr(vllm_config, "model_config", None))
    _check_outputs(vllm_config)


def _check_parallel(parallel: Any) -> None:
    for field, option, why in (
        ("pipeline_parallel_size", "--pipeline-parallel-size", "chunks hold all layers of a block"),
        (
            "decode_context_parallel_size",
            "--decode-context-parallel-size",
            "ranks hold interleaved tokens",
        ),
        (
            "prefill_context_parallel_size",
            "--prefill-context-parallel-size",
            "ranks hold parts of a prompt",
        ),
    ):
        size = getattr(parallel, field, 1)
        if isinstance(size, int) and size > 1:
            raise UnsupportedError(
                f"kvoffload: {option} {size} is not supported: {why}; "
                f"set it to 1 or start vLLM without {CONNECTOR}"
            )
    ranks = getattr(parallel, "tensor_parallel_size", 1)
    launcher = getattr(parallel, "distributed_executor_backend", None)
    if launcher == "external_launcher" and isinstance(ranks, int) and ranks > 1:
        raise UnsupportedError(
            "kvoffload: --distributed-executor-backend external_launcher is not supported with "
            f"--tensor-parallel-size {ranks}: every rank has a scheduler, and so a cache, of its "
            f"own; use mp, or start vLLM without {CONNECTOR}"
        )
    if getattr(parallel, "enable_fault_tolerance", False) is True:
        raise UnsupportedError(
            "kvoffload: --enable-fault-tolerance is not supported: vLLM drops the outputs of a "
            "faulted step, and with them what its ranks said of their loads; leave it off or "
            f"start vLLM without {CONNECTOR}"
        )
    if _nodes_of_one_engine(parallel) > 1:
        raise UnsupportedError(
            "kvoffload: tensor parallel over several nodes is not supported: the DRAM arena is "
            "shared memory of one machine; keep an engine on one node or start vLLM without "
            f"{CONNECTOR}"
        )


def _check_model(model: Any) -> None:
    if getattr(model, "enable_sleep_mode", False) is True:
        raise UnsupportedError(
            "kvoffload: --enable-sleep-mode is not supported: sleeping unmaps the KV blocks while "
            f"copies of them may be out; leave it off or start vLLM without {CONNECTOR}"
        )
    if getattr(model, "is_encoder_decoder", False) is True:
        raise UnsupportedError(
            "kvoffload: encoder-decoder models are not supported: vLLM has no KV connector for "
            f"cross-attention blocks; start vLLM without {CONNECTOR}"
        )


def _check_outputs(vllm_config: Any) -> None:
    """vLLM keeps the experts of a prompt's tokens beside HBM's blocks: of what we load there are
    none, which ends the engine (0.31 and newer) or returns those of other tokens (before)."""
    for holder in ("aux_output_config", "model_config"):
        part = getattr(vllm_config, holder, None)
        if getattr(part, "enable_return_routed_experts", False) is True:
            raise UnsupportedError(
                "kvoffload: --enable-return-routed-experts is not supported: vLLM has no experts "
                "to return for tokens that were loaded; leave it off or start vLLM without "
                f"{CONNECTOR}"
            )


def _nodes_of_one_engine(parallel: Any) -> int:
    nodes = getattr(parallel, "nnodes_within_dp", None)
    if not isinstance(nodes, int):
        nodes = getattr(parallel, "nnodes", 1)
    return nodes if isinstance(nodes, int) else 1


def _set_failure_policy(transfer: Any) -> None:
    if getattr(transfer, "kv_load_failure_policy", "recompute") == "recompute":
        return
    transfer.kv_load_failure_policy = "recompute"
    _say_once('kvoffload: kv_load_failure_policy set to "recompute": a failed load is recomputed')


def _say_once(line: str) -> None:
    if line not in _said:
        _said.add(line)
        logger.info(line)


# -- weights that change in place ----------------------------------------------------------------


def add_weights_listener(fn: Callable[[], None]) -> None:
    """Call ``fn`` whenever this worker's weights change in place; also wraps the worker classes.

    Call it from the worker process once its worker class is imported (the worker-role connector is
    built after that). ``fn`` runs on the thread that changes the weights, before and after the
    change: before, so that nothing is looked up or stored under the old name while both exist;
    after (also when it failed), because what was stored in between is of neither. Must not block.
    """
    with _lock:
        if fn not in _listeners:
            _listeners.append(fn)
    wrap_weight_methods()


def remove_weights_listener(fn: Callable[[], None]) -> None:
    """Undo add_weights_listener; unknown functions are ignored."""
    with _lock:
        if fn in _listeners:
            _listeners.remove(fn)


def on_weights_changed() -> None:
    """Tell every listener. A listener that raises is logged and does not stop the others."""
    with _lock:
        listeners = list(_listeners)
    for fn in listeners:
        try:
            fn()
        except Exception:
            logger.exception("kvoffload: a weights listener failed; restart before trusting hits")


def wrap_weight_methods() -> list[str]:
    """Wrap the weight-changing methods of all imported worker and runner classes. Idempotent.

    Returns the names wrapped by this call, as ``Class.method``.
    """
    done: list[str] = []
    for cls in _weight_classes():
        for name in sorted(vars(cls)):
            if not _changes_weights(cls, name):
                continue
            member = vars(cls)[name]
            kind = type(member) if isinstance(member, staticmethod | classmethod) else None
            original = member.__func__ if kind else member
            if not inspect.isfunction(original) or getattr(original, _WRAPPED, False):
                continue  # a class or another value that an extension keeps under such a name
            wrapped = _notifying(original, name == "add_lora")
            try:
                setattr(cls, name, kind(wrapped) if kind else wrapped)
                done.append(f"{cls.__name__}.{name}")
            except (AttributeError, TypeError):
                logger.warning("kvoffload: cannot watch %s.%s", cls.__name__, name)
    return done


def _changes_weights(cls: type, name: str) -> bool:
    if name in _ALL_WEIGHT_METHODS or name == "add_lora":
        return True
    # A worker extension (--worker-extension-cls) names its own methods, a platform's own worker
    # has vLLM's, which vLLM calls as well (load_model, update_config).
    if cls.__module__.startswith("vllm.") or name.startswith("_"):
        return False
    words = re.compile("weight") if _is_vllms(cls, name) else engine_calls.SOUNDS_LIKE_WEIGHTS
    return words.search(name) is not None


def _is_vllms(cls: type, name: str) -> bool:
    workers = ("vllm.v1.worker.worker_base", "WorkerBase"), ("vllm.v1.worker.gpu_worker", "Worker")
    known = (getattr(sys.modules.get(module), worker, None) for module, worker in workers)
    return any(hasattr(vllms, name) for vllms in known)


def _weight_classes() -> list[type]:
    found: dict[type, None] = {}
    base_module = sys.modules.get("vllm.v1.worker.worker_base")
    stack = [getattr(base_module, "WorkerBase", None)]
    while stack:
        cls = stack.pop()
        if not isinstance(cls, type):
            continue
        for part in cls.__mro__:
            if part is not object:
                found.setdefault(part)
        stack.extend(cls.__subclasses__())
    for module, name in _MODEL_RUNNERS:
        cls = getattr(sys.modules.get(module), name, None)
        if isinstance(cls, type):
            found.setdefault(cls)
    return list(found)


def _notifying(original: Callable[..., Any], only_in_place: bool) -> Callable[..., Any]:
    @functools.wraps(original)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        if only_in_place and not _is_in_place(args, kwargs):
            return original(*args, **kwargs)
        on_weights_changed()
        try:
            return original(*args, **kwargs)
        finally:
            on_weights_changed()

    setattr(wrapped, _WRAPPED, True)
    return wrapped


def _is_in_place(args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    request = kwargs.get("lora_request", args[1] if len(args) > 1 else None)
    return bool(getattr(request, "load_inplace", False))
