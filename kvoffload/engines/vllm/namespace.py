"""The namespace of chunk keys: 16 bytes over everything that makes KV bytes meaningless elsewhere.

A fact too many is a cold start, a fact too few is a wrong hit. Facts are canonical JSON, so the
same engine started again gets the same namespace and any difference gets another one.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import os
import re
from collections.abc import Mapping, Sequence
from enum import Enum
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from kvoffload.engines.vllm import compat
from kvoffload.engines.vllm.adapters import AdapterDigests
from kvoffload.engines.vllm.weight_files import NotLocal, loaded_after, local_folder
from kvoffload.engines.vllm.weights import WeightsDigest

logger = logging.getLogger("vllm.kvoffload")

_FACTS_VERSION = 1
_ZERO_EPOCH = bytes(16)
_DROPPED_HF_KEYS = frozenset({"_name_or_path", "transformers_version"})
# What a CPU can do decides how vLLM's CPU attention packs a page.
_CPU_FLAGS = re.compile(r"^(avx|amx|sve|asimd|bf16|i8mm)")


# -- canonical form ------------------------------------------------------------------------------


def canonical(value: Any) -> Any:
    """JSON-able form of a configuration value; equal values give equal forms in every process."""
    if value is None or isinstance(value, bool | int | float | str):
        return value.value if isinstance(value, Enum) else value
    if isinstance(value, Enum):
        return f"{type(value).__name__}.{value.name}"
    if isinstance(value, bytes):
        return {"bytes": value.hex()}
    if isinstance(value, Mapping):
        items = [[canonical_json(k), canonical(v)] for k, v in value.items()]
        return {"map": sorted(items, key=lambda item: item[0])}
    if isinstance(value, list | tuple):
        return [canonical(v) for v in value]
    if isinstance(value, set | frozenset):
        return {"set": sorted(canonical_json(v) for v in value)}
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {
            f.name: canonical(getattr(value, f.name, None)) for f in dataclasses.fields(value)
        }
        return {"type": type(value).__qualname__, "fields": fields}
    if hasattr(value, "to_dict"):
        return {"type": type(value).__qualname__, "dict": canonical(value.to_dict())}
    # A repr with an address in it differs each time: a cold start, never a wrong hit.
    return {"type": type(value).__qualname__, "repr": repr(value)}


def canonical_json(value: Any) -> str:
    """The canonical form as text."""
    return json.dumps(canonical(value), sort_keys=True, separators=(",", ":"))


# -- facts ---------------------------------------------------------------------------------------


def namespace_facts(vllm_config: Any, kv_cache_config: Any, canary: bytes) -> dict[str, Any]:
    """Everything but the weights' bytes that the meaning of a page depends on.

    ``canary``: from ``canary()``. The number of blocks is not a fact.
    """
    model, load = vllm_config.model_config, vllm_config.load_config
    cache = vllm_config.cache_config
    return {
        "version": _FACTS_VERSION,
        "vllm": _vllm_minor(),
        "hf_config": _hf_config(model.hf_config),
        "max_model_len": model.max_model_len,
        "model_impl": canonical(getattr(model, "model_impl", None)),
        "model_class": canonical(getattr(model, "model_class_overrides", None) or None),
        "code": _code(model, load),
        "load_format": canonical(load.load_format),
        "loader": canonical(load.model_loader_extra_config),
        "quantization": canonical(getattr(model, "quantization", None)),
        "quantization_config": canonical(getattr(model, "quantization_config", None)),
        "dtype": str(model.dtype),
        "disable_sliding_window": getattr(model, "disable_sliding_window", None),
        "kv_dtype": canonical(cache.cache_dtype),
        "kv_dtype_skip": canonical(getattr(cache, "kv_cache_dtype_skip_layers", None)),
        "kv_scales": _kv_scales(model, cache),
        "attention": canonical(getattr(vllm_config, "attention_config", None)),
        "device": _device(),
        "pages": _pages(kv_cache_config, vllm_config),
        "ranks": _ranks(vllm_config.parallel_config),
        "hash": canonical(cache.prefix_caching_hash_algo),
        "canary": canary.hex(),
        "multimodal": _multimodal(model, load),
        "speculative": _speculative(getattr(vllm_config, "speculative_config", None)),
    }


def _vllm_minor() -> str:
    # How an attention backend packs a page changed three times in a year at equal page sizes.
    import vllm

    return ".".join(str(vllm.__version__).split(".")[:2])


def _hf_config(config: Any) -> Any:
    def clean(value: Any) -> Any:
        if isinstance(value, Mapping):
            return {k: clean(v) for k, v in value.items() if k not in _DROPPED_HF_KEYS}
        if isinstance(value, list | tuple):
            return [clean(v) for v in value]
        return value

    return canonical(clean(config.to_dict()))


_PROCESSOR_FILES = (
    "preprocessor_config.json",
    "processor_config.json",
    "video_preprocessor_config.json",
)


def _multimodal(model: Any, load: Any) -> Any:
    """What turns an image into embeddings besides the weights; None for text models."""
    config = getattr(model, "multimodal_config", None)
    if config is None:
        return None
    return {"config": canonical(config), "files": _files(model, load, _PROCESSOR_FILES)}


def _code(model: Any, load: Any) -> Any:
    """The model's own Python files; None where they are not trusted, so not run."""
    if not getattr(model, "trust_remote_code", False):
        return None
    revision = getattr(model, "code_revision", None)
    return {"revision": canonical(revision), "files": _files(model, load, ("*.py",))}


def _files(model: Any, load: Any, patterns: Sequence[str]) -> dict[str, str]:
    """sha256 by name of files in the model's folder, also where that is a snapshot of the hub."""
    try:
        folder, _ = local_folder(str(model.model), model, load)
    except NotLocal:
        return {}  # then its weights have no name that outlives the process either
    found = [path for pattern in patterns for path in folder.glob(pattern) if path.is_file()]
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(found)}


_LORA_CAPACITY = frozenset(
    {"max_loras", "max_cpu_loras", "max_lora_rank", "max_lora_cls_labels", "specialize_active_lora"}
)


def lora_facts(vllm_config: Any) -> str:
    """What of the LoRA settings decides how an adapter's files are applied, as text."""
    config = getattr(vllm_config, "lora_config", None)
    if config is None or not dataclasses.is_dataclass(config):
        return canonical_json(config)
    fields = (f.name for f in dataclasses.fields(config) if f.name not in _LORA_CAPACITY)
    return canonical_json({name: getattr(config, name, None) for name in fields})


def _kv_scales(model: Any, cache: Any) -> dict[str, Any]:
    # Static scales are in the checkpoint (its digest covers their values); here: which are used.
    quantization = getattr(model.hf_config, "quantization_config", None)
    scheme = quantization.get("kv_cache_scheme") if isinstance(quantization, Mapping) else None
    return {
        "scheme": canonical(scheme),
        "calculated": getattr(cache, "calculate_kv_scales", None),
        "per_layer": canonical(getattr(model, "kv_cache_scales", None)),
    }


def _device() -> dict[str, Any]:
    from vllm.platforms import current_platform

    out: dict[str, Any] = {"type": current_platform.device_type, "machine": os.uname().machine}
    if current_platform.device_type == "cpu":
        out["cpu"] = _cpu_flags()
    else:
        out["capability"] = str(current_platform.get_device_capability())
    return out


def _cpu_flags() -> list[str]:
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="ascii", errors="replace")
    except OSError:
        return []
    line = re.search(r"^(?:flags|Features)\s*:(.*)$", text, re.MULTILINE)
    return sorted(f for f in (line.group(1).split() if line else ()) if _CPU_FLAGS.match(f))


def _pages(kv_cache_config: Any, vllm_config: Any) -> dict[str, Any]:
    groups = [
        {
            "spec": type(group.kv_cache_spec).__qualname__,
            "block_size": group.kv_cache_spec.block_size,
            "page_bytes": group.kv_cache_spec.page_size_bytes,
            "layers": list(group.layer_names),
            "eagle": getattr(group, "is_eagle_group", False),
            "fields": canonical(group.kv_cache_spec),
        }
        for group in kv_cache_config.kv_cache_groups
    ]
    layout = compat.kv_layout(kv_cache_config, vllm_config)
    return {
        "groups": groups,
        "layout": canonical(layout or getattr(vllm_config.cache_config, "kv_cache_layout", None)),
        # The order of layers in memory; offsets and strides grow with the number of blocks.
        "tensors": [compat.tensor_layers(t) for t in kv_cache_config.kv_cache_tensors],
    }


def _ranks(parallel: Any) -> dict[str, Any]:
    return {
        name: getattr(parallel, name, None)
        for name in (
            "tensor_parallel_size",
            "pipeline_parallel_size",
            "decode_context_parallel_size",
            "prefill_context_parallel_size",
        )
    }


def _speculative(spec: Any) -> Any:
    if spec is None:
        return None
    draft = getattr(spec, "draft_model_config", None)
    hf_config = getattr(draft, "hf_config", None)
    return {
        "method": canonical(getattr(spec, "method", None)),
        "tokens": getattr(spec, "num_speculative_tokens", None),
        "parallel": getattr(spec, "parallel_drafting", None),
        "draft_tp": getattr(spec, "draft_tensor_parallel_size", None),
        "draft_dtype": str(getattr(draft, "dtype", None)),
        "draft_quantization": canonical(getattr(draft, "quantization", None)),
        "draft": _hf_config(hf_config) if hf_config is not None else None,
    }


def field_digests(facts: Mapping[str, Any], weights_digest: bytes, epoch: bytes) -> dict[str, str]:
    """8 hex digits for each named part of a namespace, the HF configuration's keys one by one.

    Equal namespaces have equal digests, and different ones differ in at least one (up to chance).
    """
    named = {k: canonical_json(v) for k, v in facts.items() if k != "hf_config"}
    for key, value in (facts.get("hf_config") or {}).get("map", ()):
        named[f"hf_config.{json.loads(key)}"] = canonical_json(value)
    named["weights"] = weights_digest.hex()
    out = {k: hashlib.sha256(v.encode()).hexdigest()[:8] for k, v in named.items()}
    out["epoch"] = "" if epoch == _ZERO_EPOCH else epoch.hex()[:8]
    return out


def namespace_bytes(facts: Mapping[str, Any], weights_digest: bytes, epoch: bytes) -> bytes:
    """16 bytes: facts, 32 bytes of weights, 16 bytes of epoch (zeros until the first reset)."""
    sha = hashlib.sha256(b"kvoffload namespace 1\0")
    for part in (canonical_json(facts).encode(), weights_digest, epoch):
        sha.update(len(part).to_bytes(8, "little"))
        sha.update(part)
    return sha.digest()[:16]


# -- the canary ----------------------------------------------------------------------------------


def canary(vllm_config: Any) -> bytes:
    """32 bytes that change when vLLM hashes blocks differently.

    One plain block and one with a cache salt and a LoRA adapter, by the configured algorithm and
    through vLLM's own functions. Call it once vLLM has seeded its hash (first request); before
    that, or when vLLM's functions moved, it raises and nothing is loaded or stored.
    """
    from vllm.utils.hashing import get_hash_fn_by_name
    from vllm.v1.core import kv_cache_utils

    hash_fn = get_hash_fn_by_name(vllm_config.cache_config.prefix_caching_hash_algo)
    if not getattr(kv_cache_utils, "NONE_HASH", None):
        raise RuntimeError("vLLM has not seeded its block hash yet")
    salted = SimpleNamespace(
        request_id="canary",
        mm_features=[],
        prompt_embeds=None,
        cache_salt="kvoffload",
        lora_request=SimpleNamespace(
            lora_name="canary", lora_path="/canary", lora_int_id=1, path="/canary", name="canary"
        ),
    )
    extra, _ = kv_cache_utils.generate_block_hash_extra_keys(salted, 0, 16, 0)
    if not extra:
        raise RuntimeError("vLLM's block hash ignores cache_salt and LoRA")
    plain = kv_cache_utils.hash_block_tokens(hash_fn, None, range(16), None)
    second = kv_cache_utils.hash_block_tokens(hash_fn, plain, range(16, 32), extra)
    return hashlib.sha256(bytes(plain) + b"\0" + bytes(second)).digest()


def volatile_hash_reason(vllm_config: Any) -> str:
    """Why another process would hash the same tokens differently; empty when it would not."""
    algo = str(vllm_config.cache_config.prefix_caching_hash_algo)
    if compat.hash_seed_is_random(algo):
        return f"{algo} block hashes are seeded per process: set PYTHONHASHSEED"
    multimodal = getattr(vllm_config.model_config, "multimodal_config", None)
    if multimodal is not None and not getattr(multimodal, "mm_processor_cache_gb", 1):
        # vLLM then may name multimodal inputs by a counter that starts anew with each process.
        return "multimodal inputs are not hashed by content with mm_processor_cache_gb=0"
    if getattr(vllm_config.cache_config, "calculate_kv_scales", False):
        return "KV scales are calculated from this process's first requests"
    return ""


# -- the source of namespaces of one engine ------------------------------------------------------


class NamespaceSource:
    """The current namespace of one engine. Scheduler thread only, except the digests' threads.

    ``persistent``: None until known; False when the namespace is random, so that NVMe must not be
    used; ``reason`` says why.
    """

    def __init__(
        self,
        vllm_config: Any,
        kv_cache_config: Any,
        *,
        weights: WeightsDigest | None = None,
        adapters: AdapterDigests | None = None,
    ) -> None:
        self._vllm_config = vllm_config
        self._kv_cache_config = kv_cache_config
        self._weights = weights or WeightsDigest.of(vllm_config)
        self._adapters = adapters or AdapterDigests(unchanged_since_ns=loaded_after(vllm_config))
        self._lora = hashlib.sha256(lora_facts(vllm_config).encode()).digest()
        self._facts: dict[str, Any] | None = None
        self._tried = False
        self._epoch = _ZERO_EPOCH
        self._namespace: bytes | None = None
        self._digest: bytes | None = None
        self.persistent: bool | None = None
        self.reason = ""
        self._weights.start()

    def on_first_request(self) -> None:
        """Collect the facts and the canary, once. Raises what went wrong, once: no hits then."""
        if self._tried:
            return
        self._tried = True
        self._facts = namespace_facts(
            self._vllm_config, self._kv_cache_config, canary(self._vllm_config)
        )

    def namespace(self) -> bytes | None:
        """16 bytes, or None while weights or facts are not known. O(1) after the first answer."""
        if self._namespace is None and self._facts is not None:
            if self._digest is None:
                self._digest = self._settle_digest()
            if self._digest is not None:
                self._namespace = namespace_bytes(self._facts, self._digest, self._epoch)
        return self._namespace

    def fields(self) -> dict[str, str]:
        """The current namespace's ``field_digests``; empty while it is not known."""
        if self._namespace is None or self._facts is None or self._digest is None:
            return {}
        return field_digests(self._facts, self._digest, self._epoch)

    def adapter(self, request: Any) -> bytes | None:
        """Digest of the request's adapter and of how it is applied: b"" without one, None while
        not known."""
        digest = self._adapters.get(getattr(request, "lora_request", None))
        if not digest:
            return digest
        return hashlib.sha256(self._lora + digest).digest()

    def forget_adapter(self, lora_int_id: int) -> None:
        """The workers let this adapter go: its files are looked at again at its next request."""
        self._adapters.forget(lora_int_id)

    def new_epoch(self) -> None:
        """Hide everything stored so far, here and on NVMe, behind a random epoch."""
        self._epoch = os.urandom(16)
        self._namespace = None

    def close(self) -> None:
        """Stop the background threads."""
        self._weights.close()
        self._adapters.close()

    def check(self) -> None:
        """Raise AssertionError on a broken invariant."""
        assert self._namespace is None or len(self._namespace) == 16
        assert self._namespace is None or self.persistent is not None
        self._weights.check()
        self._adapters.check()

    def _settle_digest(self) -> bytes | None:
        result = self._weights.result()
        if result is None:
            return None
        self.reason = volatile_hash_reason(self._vllm_config) or result.reason
        self.persistent = not self.reason
        if self.persistent:
            return result.digest
        logger.warning(
            "kvoffload: cached KV is kept in DRAM only and ends with this process: %s", self.reason
        )
        return os.urandom(32)
