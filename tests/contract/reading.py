"""Our reading of vLLM: checks that answer with a list of what is not as we think."""

from __future__ import annotations

import ast
from dataclasses import dataclass
from pathlib import Path

from kvoffload.engines.vllm import compat
from tests.contract.vllm_source import Function, Module, Parameters, Source, calls_in

ROOT = Path(__file__).resolve().parents[2]
ADAPTER = ROOT / "kvoffload" / "engines" / "vllm"

BASE = "vllm.distributed.kv_transfer.kv_connector.v1.base"
FACTORY = "vllm.distributed.kv_transfer.kv_connector.factory"
METRICS = "vllm.distributed.kv_transfer.kv_connector.v1.metrics"
MIXIN = "vllm.v1.worker.kv_connector_model_runner_mixin"
RUNNER_V2 = "vllm.v1.worker.gpu.kv_connector"
SCHEDULER = "vllm.v1.core.sched.scheduler"
HASHING = "vllm.v1.core.kv_cache_utils"
LAYOUTS = "vllm.v1.kv_cache_layout"
TIERING = "vllm.v1.kv_offload.tiering.base"
CORE = "vllm.v1.engine.core"
TIER_FACTORY = "vllm.v1.kv_offload.tiering.factory"

#: Hooks that exist only from this version on; before, vLLM never calls them.
HOOKS_SINCE = {
    "requires_kv_delivery": (0, 28),
    "bind_kv_cache_manager": (0, 30),
    "get_transfer_results": (0, 30),
    "get_loaded_kv_cache_group_ids": (0, 32),
    "get_external_cache_hit_sources": (0, 32),
    "supports_sleep_mode": (0, 33),
}
#: Modules and names imported only where a hook of that version asks for them, never at module level.
IMPORTS_SINCE = {
    ("vllm.v1.metrics.cache_hit_source", "CacheHitSource"): (0, 32),
    (BASE, "KVConnectorTransferResults"): (0, 30),
}
#: Files of ours that are imported from this version on only.
FILES_SINCE = {"native_tier.py": (0, 30)}
#: What ``compat`` makes up for, or calls by another name, in older versions.
FIELDS_SINCE = {
    "has_sync_kv_loads": (0, 30),
    "kv_connector_block_state": (0, 30),
    "failed_recving": (0, 30),
    "kv_cache_layout": (0, 30),
    "layers": (0, 30),
    "session_id": (0, 30),
    "kv_hints": (0, 31),
}
CLASSES_SINCE = {
    "KVConnectorTransferResults": (0, 30),
    "KvHintsEnvelope": (0, 31),
    "KvHintAction": (0, 31),
}
#: Fields that ``compat`` reads in older versions: (module, class) -> attributes, below 0.30.
OLD_FIELDS: dict[tuple[str, str], tuple[str, ...]] = {
    ("vllm.v1.core.block_pool", "BlockPool"): ("cached_block_hash_to_block", "get_cached_block"),
    ("vllm.v1.kv_cache_interface", "KVCacheTensor"): ("shared_by",),
    ("vllm.v1.kv_cache_interface", "AttentionSpec"): ("kv_quant_mode",),
    ("vllm.v1.core.sched.output", "NewRequestData"): ("req_id", "block_ids"),
    ("vllm.v1.core.sched.output", "CachedRequestData"): (
        "req_ids",
        "resumed_req_ids",
        "new_block_ids",
    ),
}
BRIDGED = (0, 30)
"""Below this, compat.Bridge stands between vLLM and the connector."""

#: What we read of vLLM's objects: (module, class) -> attributes.
FIELDS: dict[tuple[str, str], tuple[str, ...]] = {
    ("vllm.v1.core.block_pool", "BlockPool"): ("cached_block_hash_to_block", "get_cached_block"),
    ("vllm.v1.core.sched.output", "SchedulerOutput"): (
        "scheduled_new_reqs",
        "scheduled_cached_reqs",
        "num_scheduled_tokens",
        "total_num_scheduled_tokens",
        "finished_req_ids",
        "preempted_req_ids",
        "kv_connector_metadata",
        "has_sync_kv_loads",
        "kv_connector_block_state",
    ),
    ("vllm.v1.outputs", "KVConnectorOutput"): (
        "finished_sending",
        "finished_recving",
        "failed_recving",
        "invalid_block_ids",
        "kv_connector_stats",
        "kv_connector_worker_meta",
    ),
    (BASE, "KVConnectorTransferResults"): (
        "finished_sending",
        "finished_recving",
        "failed_recving",
    ),
    ("vllm.v1.kv_cache_interface", "KVCacheConfig"): (
        "num_blocks",
        "kv_cache_tensors",
        "kv_cache_groups",
        "kv_cache_layout",
    ),
    ("vllm.v1.kv_cache_interface", "KVCacheGroupSpec"): (
        "layer_names",
        "kv_cache_spec",
        "is_eagle_group",
    ),
    ("vllm.v1.kv_cache_interface", "KVCacheTensor"): ("layers", "block_stride", "offset"),
    ("vllm.v1.kv_cache_interface", "KVCacheSpec"): ("block_size", "page_size_bytes"),
    ("vllm.v1.kv_cache_interface", "SlidingWindowSpec"): ("sliding_window",),
    ("vllm.config.kv_transfer", "KVTransferConfig"): (
        "kv_connector",
        "kv_connector_module_path",
        "kv_connector_extra_config",
        "kv_role",
        "kv_load_failure_policy",
    ),
    ("vllm.config.vllm", "VllmConfig"): (
        "model_config",
        "cache_config",
        "parallel_config",
        "load_config",
        "attention_config",
        "speculative_config",
        "kv_transfer_config",
    ),
    ("vllm.config.model", "ModelConfig"): (
        "model",
        "model_weights",
        "revision",
        "hf_config",
        "max_model_len",
        "dtype",
        "quantization",
        "is_encoder_decoder",
        "enable_sleep_mode",
        "use_mla",
    ),
    ("vllm.config.load", "LoadConfig"): (
        "load_format",
        "model_loader_extra_config",
        "download_dir",
    ),
    ("vllm.config.cache", "CacheConfig"): (
        "cache_dtype",
        "prefix_caching_hash_algo",
        "kv_cache_layout",
        "kv_cache_dtype_skip_layers",
    ),
    ("vllm.config.parallel", "ParallelConfig"): (
        "tensor_parallel_size",
        "pipeline_parallel_size",
        "decode_context_parallel_size",
        "prefill_context_parallel_size",
        "nnodes",
        "nnodes_within_dp",
    ),
    ("vllm.config.speculative", "SpeculativeConfig"): (
        "method",
        "num_speculative_tokens",
        "draft_model_config",
        "draft_load_config",
    ),
    ("vllm.v1.request", "Request"): (
        "request_id",
        "block_hashes",
        "num_tokens",
        "num_computed_tokens",
        "lora_request",
        "cache_salt",
        "num_prompt_tokens",
        "kv_transfer_params",
        "session_id",
        "kv_hints",
    ),
    ("vllm.v1.kv_hints.protocol", "KvHintsEnvelope"): ("actions",),
    ("vllm.v1.kv_hints.protocol", "KvHintAction"): ("action_type", "payload"),
    ("vllm.lora.request", "LoRARequest"): ("lora_int_id", "lora_path", "load_inplace"),
}

#: The order of a step's calls on the connector in a worker.
STEP_ORDER: tuple[str, ...] = (
    "bind_connector_metadata",
    "start_load_kv",
    "wait_for_save",
    "get_transfer_results",
    "get_block_ids_with_load_errors",
    "get_kv_connector_stats",
    "build_connector_worker_meta",
    "clear_connector_metadata",
)


# -- our own adapter, read the same way ----------------------------------------------------------


def adapter_modules() -> dict[str, Module]:
    """Every module of kvoffload/engines/vllm."""
    return {p.name: Module(p.read_text(encoding="utf-8")) for p in sorted(ADAPTER.glob("*.py"))}


def our_hooks() -> dict[str, Function]:
    """Public methods that KVOffloadConnector defines itself."""
    connector = adapter_modules()["connector.py"].cls("KVOffloadConnector")
    assert connector is not None, "connector.py has no KVOffloadConnector"
    return {
        n.name: n
        for n in connector.body
        if isinstance(n, ast.FunctionDef) and not n.name.startswith("_")
    }


@dataclass(frozen=True)
class Imported:
    """``from module import name`` (name empty: ``import module``) somewhere in a file of ours."""

    file: str
    module: str
    name: str
    eager: bool = False  # at module level: it must exist in every version


def our_imports() -> set[Imported]:
    """Every import from vllm in the adapter, wherever it stands."""
    found: set[Imported] = set()
    for file, module in adapter_modules().items():
        top = {id(n) for n in module.tree.body}
        for node in ast.walk(module.tree):
            eager = id(node) in top
            if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "vllm":
                found |= {Imported(file, node.module or "", a.name, eager) for a in node.names}
            elif isinstance(node, ast.Import):
                found |= {
                    Imported(file, a.name, "", eager)
                    for a in node.names
                    if a.name.split(".")[0] == "vllm"
                }
    return found


# -- checks --------------------------------------------------------------------------------------


def check_hooks(source: Source, hooks: dict[str, Function]) -> list[str]:
    """Each of our hooks exists in the base class and can be called the way the base's can."""
    module = source.need(BASE)
    base = {**module.methods("SupportsHMA"), **module.methods("KVConnectorBase_V1")}
    problems = []
    for name, ours in hooks.items():
        since = HOOKS_SINCE.get(name, (0, 0))
        if name not in base:
            if source.minor >= since:
                problems.append(f"hook {name} is gone")
            continue
        reason = Parameters.of(ours).accepts_calls_for(Parameters.of(base[name]))
        if reason:
            problems.append(f"hook {name}: {reason}")
        if _is_property(ours) != _is_property(base[name]):
            problems.append(f"hook {name}: property in one, method in the other")
    return problems


def _is_property(function: Function) -> bool:
    return any(isinstance(d, ast.Name) and d.id == "property" for d in function.decorator_list)


def check_abstract(source: Source, hooks: dict[str, Function]) -> list[str]:
    """Every abstract method of the base classes is one of ours."""
    problems = []
    for cls in ("KVConnectorBase_V1", "SupportsHMA"):
        for name, method in source.need(BASE).methods(cls).items():
            marks = {getattr(d, "id", getattr(d, "attr", "")) for d in method.decorator_list}
            if "abstractmethod" in marks and name not in hooks:
                problems.append(f"abstract {cls}.{name} is not implemented")
    return problems


def check_tier(source: Source) -> list[str]:
    """KVOffloadTier against vLLM's tier contract, and what native_settings wraps."""
    if source.minor < FILES_SINCE["native_tier.py"]:
        return []
    tier = adapter_modules()["native_tier.py"].methods("KVOffloadTier")
    base = source.need(TIERING).methods("SecondaryTierManager")
    problems = []
    for name, method in base.items():
        marks = {getattr(d, "id", getattr(d, "attr", "")) for d in method.decorator_list}
        if "abstractmethod" in marks and name not in tier:
            problems.append(f"abstract SecondaryTierManager.{name} is not implemented")
        if name in tier and name != "__init__":
            reason = Parameters.of(tier[name]).accepts_calls_for(Parameters.of(method))
            if reason:
                problems.append(f"SecondaryTierManager.{name}: {reason}")
    missing = {"job_id", "success", "successful_keys", "transfer_time"}
    missing -= set(source.need(TIERING).fields("JobResult"))
    missing |= {"job_id", "keys", "chunk_ids", "is_promotion", "req_context"} - set(
        source.need(TIERING).fields("TransferJob")
    )
    problems += [f"JobResult or TransferJob has no {name}" for name in sorted(missing)]
    if 'get("module_path")' not in source.text(TIER_FACTORY):
        problems.append("secondary_tiers takes no module_path")
    create = source.need(FACTORY).methods("KVConnectorFactory").get("create_connector")
    wanted = ("config", "role", "kv_cache_config")
    if create is None or Parameters.of(create).positional[-3:] != wanted:
        problems.append("KVConnectorFactory.create_connector changed")
    rpc = source.need(CORE).methods("EngineCore").get("collective_rpc")
    if rpc is None or Parameters.of(rpc).positional[0] != "method":
        problems.append("EngineCore.collective_rpc changed")
    remove = source.need(CORE).methods("EngineCore").get("remove_lora")
    if remove is None or Parameters.of(remove).positional != ("lora_id",):
        problems.append("EngineCore.remove_lora changed")
    return problems


def check_constructor(source: Source) -> list[str]:
    """(vllm_config, role, kv_cache_config), called by position, and both roles exist."""
    module = source.need(BASE)
    init = module.methods("KVConnectorBase_V1").get("__init__")
    problems = []
    if init is None or Parameters.of(init).positional != ("vllm_config", "role", "kv_cache_config"):
        problems.append("the connector's constructor changed")
    role = module.cls("KVConnectorRole")
    members = {t.id for n in (role.body if role else ()) if isinstance(n, ast.Assign) for t in n.targets if isinstance(t, ast.Name)}  # fmt: skip
    if not {"SCHEDULER", "WORKER"} <= members:
        problems.append("KVConnectorRole lost SCHEDULER or WORKER")
    return problems


def check_imports(source: Source, imports: set[Imported]) -> list[str]:
    """Each module we import exists and binds the names we take."""
    problems = []
    for item in sorted(imports, key=lambda i: (i.module, i.name, i.file)):
        since = IMPORTS_SINCE.get((item.module, item.name), (0, 0))
        if source.minor < since and not item.eager:
            continue
        if source.minor < FILES_SINCE.get(item.file, (0, 0)):
            continue
        if source.module(item.module) is None:
            problems.append(f"{item.file}: no module {item.module}")
        elif item.name and not source.binds(item.module, item.name):
            problems.append(f"{item.file}: {item.module} has no {item.name}")
    return problems


def check_fields(source: Source) -> list[str]:
    """The attributes in FIELDS exist."""
    problems = []
    wanted = dict(FIELDS)
    if source.minor < BRIDGED:
        for key, names in OLD_FIELDS.items():
            wanted[key] = (*wanted.get(key, ()), *names)
    for (module, cls), names in wanted.items():
        if source.minor < CLASSES_SINCE.get(cls, (0, 0)):
            continue
        parsed = source.module(module)
        have = parsed.fields(cls) if parsed else set()
        for name in names:
            if name not in have and source.minor >= FIELDS_SINCE.get(name, (0, 0)):
                problems.append(f"{module}.{cls} has no {name}")
    return problems


def step_order(source: Source) -> tuple[str, ...]:
    """STEP_ORDER in this version's words."""
    if source.minor >= BRIDGED:
        return STEP_ORDER
    return tuple("get_finished" if n == "get_transfer_results" else n for n in STEP_ORDER)


def check_step_order(source: Source) -> list[str]:
    """One step of a worker, runner V1: STEP_ORDER, and loads start before or after the forward."""
    method = (
        source.need(MIXIN).methods("KVConnectorModelRunnerMixin").get("_get_kv_connector_output")
    )
    if method is None:
        return ["_get_kv_connector_output is gone"]
    calls = [(at, name) for at, owner, name in calls_in(method) if owner == "kv_connector"]
    problems = _in_order(calls, step_order(source))
    forward = [n.lineno for n in ast.walk(method) if isinstance(n, ast.Yield)]
    starts = [at[0] for at, name in calls if name == "start_load_kv"]
    if source.minor < BRIDGED:
        if not (len(forward) == 1 and starts and max(starts) < forward[0]):
            problems.append("start_load_kv no longer runs before the forward")
        return problems
    if not (len(forward) == 1 and starts and min(starts) < forward[0] < max(starts)):
        problems.append("start_load_kv no longer runs before (sync) or after (async) the forward")
    guard = [n for n in ast.walk(method) if isinstance(n, ast.Attribute)]
    if not any(n.attr == "has_sync_kv_loads" for n in guard):
        problems.append("has_sync_kv_loads no longer decides when loads start")
    return problems


def check_step_order_v2(source: Source) -> list[str]:
    """One step of a worker, runner V2: pre_forward, forward, post_forward."""
    methods = source.need(RUNNER_V2).methods("ActiveKVConnector")
    problems = []
    for name, order in (
        ("pre_forward", ("handle_preemptions", "bind_connector_metadata")),
        ("post_forward", step_order(source)[2:]),
    ):
        if name not in methods:
            problems.append(f"ActiveKVConnector.{name} is gone")
            continue
        calls = [(at, n) for at, owner, n in calls_in(methods[name]) if owner == "kv_connector"]
        problems += _in_order(calls, order)
    return problems


def _in_order(calls: list[tuple[tuple[int, int], str]], order: tuple[str, ...]) -> list[str]:
    last, problems = (0, 0), []
    for name in order:
        at = next((p for p, called in calls if called == name), None)
        if at is None:
            problems.append(f"{name} is not called")
        elif at < last:
            problems.append(f"{name} is called earlier than we rely on")
        else:
            last = at
    return problems


def check_scheduler_order(source: Source) -> list[str]:
    """match -> allocate_slots -> update_state_after_alloc -> build_connector_meta in schedule()."""
    methods = source.need(SCHEDULER).methods("Scheduler")
    schedule = methods.get("schedule")
    if schedule is None:
        return ["Scheduler.schedule is gone"]
    calls = calls_in(schedule)

    def first(name: str, owner: str, after: tuple[int, int] = (0, 0)) -> tuple[int, int] | None:
        return next((at for at, o, n in calls if n == name and o == owner and at > after), None)

    problems, at = [], (0, 0)
    for name, owner in (
        ("get_num_new_matched_tokens", "connector"),
        ("allocate_slots", "kv_cache_manager"),
        ("update_state_after_alloc", "connector"),
        ("_build_kv_connector_meta", "self"),
    ):
        found = first(name, owner, at)
        if found is None:
            problems.append(f"schedule() does not call {owner}.{name} after the step before it")
        else:
            at = found
    build = methods.get("_build_kv_connector_meta")
    if build is None or ("connector", "build_connector_meta") not in {
        (o, n) for _, o, n in calls_in(build)
    }:
        problems.append("_build_kv_connector_meta does not call build_connector_meta")
    return problems


def check_scheduler_calls(source: Source) -> list[str]:
    """Hooks that only work when the scheduler calls them somewhere."""
    scheduler = source.need(SCHEDULER).cls("Scheduler")
    assert scheduler is not None
    called = {n for _, owner, n in calls_in(scheduler) if owner == "connector"}
    needed = {
        "on_new_request",
        "update_connector_output",
        "get_kv_connector_stats",
        "request_finished",
        "request_finished_all_groups",
        "has_pending_push_work",
        "reset_cache",
        "shutdown",
    }
    return [f"the scheduler does not call {n}" for n in sorted(needed - called)]


def check_wrap_points(source: Source) -> list[str]:
    """What plugin.py wraps or calls."""
    from kvoffload.engines.vllm.plugin import (
        _MODEL_RUNNERS,
        _POST_INIT,
        WEIGHT_METHODS,
        WEIGHT_METHODS_SINCE,
    )

    problems = []
    config = source.need("vllm.config.vllm").methods("VllmConfig")
    if _POST_INIT not in config:
        problems.append(f"VllmConfig.{_POST_INIT} is gone")
    if not any(n == _POST_INIT for _, _, n in calls_in(config["__post_init__"])):
        problems.append(f"VllmConfig does not call {_POST_INIT}")
    worker = source.need("vllm.v1.worker.gpu_worker").methods("Worker")
    methods = [*WEIGHT_METHODS, "add_lora"]
    methods += [m for since, m in WEIGHT_METHODS_SINCE if source.minor >= since]
    base = source.need("vllm.v1.worker.worker_base").methods("WorkerBase")
    inherited = {"apply_model"} & set(base)
    problems += [f"Worker.{m} is gone" for m in methods if m not in worker and m not in inherited]
    bases = source.need("vllm.v1.worker.gpu_worker").cls("Worker")
    if bases is None or "WorkerBase" not in {getattr(b, "id", "") for b in bases.bases}:
        problems.append("Worker is no WorkerBase")
    for module, name in _MODEL_RUNNERS:
        if "reload_weights" not in source.need(module).methods(name):
            problems.append(f"{module}.{name}.reload_weights is gone")
    factory = source.need(FACTORY)
    register = factory.methods("KVConnectorFactory").get("register_connector")
    if register is None or len(Parameters.of(register).positional) != 3:
        problems.append("KVConnectorFactory.register_connector changed")
    if "_registry" not in factory.fields("KVConnectorFactory"):
        problems.append("KVConnectorFactory._registry is gone")
    if '"vllm.general_plugins"' not in source.text("vllm.plugins"):
        problems.append("the entry point group vllm.general_plugins is gone")
    return problems


def check_hashing(source: Source) -> list[str]:
    """What the canary calls, and what vLLM's key makers read of a request."""
    module = source.need(HASHING)
    problems = []
    for name, positional in (
        (
            "hash_block_tokens",
            ("hash_function", "parent_block_hash", "curr_block_token_ids", "extra_keys"),
        ),
        (
            "generate_block_hash_extra_keys",
            ("request", "start_token_idx", "end_token_idx", "start_mm_idx"),
        ),
    ):
        function = module.function(name)
        if function is None or Parameters.of(function, method=False).positional != positional:
            problems.append(f"{name} changed")
    offered = {"mm_features", "prompt_embeds", "cache_salt", "lora_request", "request_id"}
    for name, function in _extra_key_makers(module):
        for attribute in sorted(_read_of(function, "request") - offered):
            if attribute != "_prompt_embeds_per_block_hashes":  # only with prompt_embeds
                problems.append(
                    f"{name} reads request.{attribute}, which the canary does not offer"
                )
    if "NONE_HASH" not in module.names:
        problems.append("NONE_HASH is gone")
    maker = module.function("_gen_lora_extra_hash_keys")
    by_path = maker is not None and any(
        isinstance(n, ast.Attribute) and n.attr == "lora_path" for n in ast.walk(maker)
    )
    if maker is None or by_path != compat.hashes_adapter_paths(source.minor):
        problems.append("block hashes name LoRA adapters otherwise than compat says")
    return problems


def _extra_key_makers(module: Module) -> list[tuple[str, Function]]:
    names = [
        n for n in module.names if n.startswith("_gen_") or n == "generate_block_hash_extra_keys"
    ]
    return [(n, f) for n in sorted(names) if (f := module.function(n)) is not None]


def _read_of(function: Function, name: str) -> set[str]:
    return {
        n.attr
        for n in ast.walk(function)
        if isinstance(n, ast.Attribute) and isinstance(n.value, ast.Name) and n.value.id == name
    }


def check_loaders(source: Source) -> list[str]:
    """Formats whose files we digest are read from local files by the loaders we know."""
    from kvoffload.engines.vllm.weight_files import _PATTERNS

    module = source.need("vllm.model_executor.model_loader")
    table: dict[str, str] = {}
    for node in ast.walk(module.tree):
        named = getattr(getattr(node, "target", None), "id", "")
        if named == "_LOAD_FORMAT_TO_MODEL_LOADER" and isinstance(node, ast.AnnAssign):
            assert isinstance(node.value, ast.Dict)
            for key, value in zip(node.value.keys, node.value.values, strict=True):
                table[ast.literal_eval(key)] = getattr(value, "id", "")  # type: ignore[arg-type]
    if not table:
        return ["the table of model loaders is gone"]
    local = {"DefaultModelLoader", "ShardedStateLoader"}
    return [
        f"load_format {name} is read by {table[name]}"
        for name in _PATTERNS
        if name in table and table[name] not in local
    ]


def check_stats(source: Source) -> list[str]:
    """The stats classes we subclass."""
    module = source.need(METRICS)
    problems = [
        f"KVConnectorStats.{m} is gone"
        for m in ("reset", "aggregate", "reduce", "is_empty")
        if m not in module.methods("KVConnectorStats")
    ]
    if "data" not in module.fields("KVConnectorStats"):
        problems.append("KVConnectorStats.data is gone")
    prom = module.methods("KVConnectorPromMetrics")
    expected = ("vllm_config", "metric_types", "labelnames", "per_engine_labelvalues")
    if "__init__" not in prom or Parameters.of(prom["__init__"]).positional != expected:
        problems.append("KVConnectorPromMetrics' constructor changed")
    if "observe" not in prom or Parameters.of(prom["observe"]).positional != (
        "transfer_stats_data",
        "engine_idx",
    ):
        problems.append("KVConnectorPromMetrics.observe changed")
    problems += [
        f"KVConnectorPromMetrics has no {f}"
        for f in ("_labelnames", "per_engine_labelvalues")
        if f not in module.fields("KVConnectorPromMetrics")
    ]
    return problems


def check_layout_and_sleep(source: Source) -> list[str]:
    """The layout that compat asks for has that name, and vLLM asks about sleep mode (0.33+)."""
    problems = []
    if source.minor >= BRIDGED and "\n    BLHNC = (1, 0, 2, 3, 4)" not in source.text(LAYOUTS):
        problems.append("the layout BLHNC is gone or has another order")
    if source.minor >= HOOKS_SINCE["supports_sleep_mode"]:
        methods = source.need("vllm.config.vllm").methods("VllmConfig")
        verify = methods.get("_verify_kv_transfer_compat")
        if verify is None or "supports_sleep_mode" not in {n for _, _, n in calls_in(verify)}:
            problems.append("vLLM no longer asks a connector about sleep mode")
    return problems
