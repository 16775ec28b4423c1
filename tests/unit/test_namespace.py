"""Namespaces: equal for the same engine started again, different for every fact, hidden by an epoch."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("vllm")

from kvoffload.engines.vllm import namespace as ns
from kvoffload.engines.vllm.weights import DigestCache, DigestResult, NotLocal, WeightsDigest

HF = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 32,
    "vocab_size": 128,
    "max_position_embeddings": 2048,
    "torch_dtype": "float32",
}


def make_config(folder: Path, **overrides: Any) -> Any:
    from vllm.engine.arg_utils import EngineArgs

    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(HF))
    args: dict[str, Any] = {
        "model": str(folder),
        "skip_tokenizer_init": True,
        "max_model_len": 512,
        "block_size": 32,
        "enforce_eager": True,
    }
    return EngineArgs(**(args | overrides)).create_engine_config()


@pytest.fixture(scope="module")
def vllm_config(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return make_config(tmp_path_factory.mktemp("hf") / "m")


@pytest.fixture
def kv_config() -> Any:
    return make_kv_config()


def make_kv_config(num_blocks: int = 8, head_size: int = 32, layers: int = 2) -> Any:
    import torch
    from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec

    names = [f"model.layers.{i}.self_attn.attn" for i in range(layers)]
    spec = FullAttentionSpec(
        block_size=32, num_kv_heads=1, head_size=head_size, dtype=torch.float32
    )
    return KVCacheConfig(
        num_blocks=num_blocks,
        kv_cache_tensors=[],
        kv_cache_groups=[KVCacheGroupSpec(names, spec)],
        kv_cache_layout="LBNHC",
    )


def test_fields_name_what_differs(vllm_config: Any, kv_config: Any) -> None:
    """Equal namespaces have equal digests; each change shows under its own name."""
    facts = ns.namespace_facts(vllm_config, kv_config, b"c" * 32)
    weights, zero = b"w" * 32, bytes(16)
    base = ns.field_digests(facts, weights, zero)
    assert base == ns.field_digests(copy.deepcopy(facts), weights, zero)
    assert base["epoch"] == "" and all(len(v) == 8 for k, v in base.items() if k != "epoch")
    assert "hf_config.hidden_size" in base and "hf_config" not in base

    def differs(facts: Any, weights: bytes = weights, epoch: bytes = zero) -> list[str]:
        other = ns.field_digests(facts, weights, epoch)
        return [k for k in base.keys() | other.keys() if base.get(k) != other.get(k)]

    assert differs({**facts, "kv_dtype": "fp8"}) == ["kv_dtype"]
    assert differs(facts, weights=b"v" * 32) == ["weights"]
    assert differs(facts, epoch=b"e" * 16) == ["epoch"]
    wider = copy.deepcopy(vllm_config)
    wider.model_config.hf_config.hidden_size = 128
    assert differs(ns.namespace_facts(wider, kv_config, b"c" * 32)) == ["hf_config.hidden_size"]


def name(
    vllm_config: Any, kv_config: Any, weights: bytes = b"w" * 32, epoch: bytes = bytes(16)
) -> bytes:
    return ns.namespace_bytes(ns.namespace_facts(vllm_config, kv_config, b"c" * 32), weights, epoch)


def change(path: str, value: Any) -> Callable[[Any], None]:
    def apply(root: Any) -> None:
        *way, last = path.split(".")
        for part in way:
            root = getattr(root, part)
        setattr(root, last, value)

    return apply


# -- stable ------------------------------------------------------------------------------------------


def test_the_same_engine_elsewhere_has_the_same_namespace(tmp_path: Path, vllm_config: Any) -> None:
    moved = make_config(tmp_path / "another-folder")
    moved.model_config.hf_config.transformers_version = "99.0"
    assert name(moved, make_kv_config()) == name(vllm_config, make_kv_config(num_blocks=999))
    assert len(name(moved, make_kv_config())) == 16


def test_facts_do_not_depend_on_the_process(
    vllm_config: Any, kv_config: Any, tmp_path: Path
) -> None:
    code = (
        "import sys; sys.path[:0] = sys.argv[2:]\n"
        "from pathlib import Path\n"
        "from tests.unit import test_namespace as t\n"
        "print(t.name(t.make_config(Path(sys.argv[1])), t.make_kv_config()).hex())"
    )
    root = str(Path(__file__).parents[2])
    out = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "m"), root],
        capture_output=True,
        text=True,
        check=True,
        env={"PYTHONHASHSEED": "7", "PATH": "/usr/bin:/bin", "HOME": str(tmp_path)},
        timeout=120,
    )
    assert out.stdout.split()[-1] == name(vllm_config, kv_config).hex()


def test_facts_hold_no_addresses(vllm_config: Any, kv_config: Any) -> None:
    text = ns.canonical_json(ns.namespace_facts(vllm_config, kv_config, b""))
    assert " at 0x" not in text and str(vllm_config.model_config.model) not in text


# -- every fact counts -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("model_config.hf_config.rope_theta", 12345.0),
        ("model_config.hf_config.rope_scaling", {"rope_type": "linear", "factor": 2.0}),
        ("model_config.hf_config.quantization_config", {"kv_cache_scheme": {"num_bits": 8}}),
        ("model_config.max_model_len", 511),
        ("model_config.quantization", "fp8"),
        ("model_config.dtype", "float16"),
        ("load_config.load_format", "safetensors"),
        ("load_config.model_loader_extra_config", {"num_threads": 2}),
        ("cache_config.cache_dtype", "fp8"),
        ("cache_config.prefix_caching_hash_algo", "sha256_cbor"),
        ("cache_config.kv_cache_dtype_skip_layers", ["0"]),
        ("parallel_config.tensor_parallel_size", 2),
        ("parallel_config.decode_context_parallel_size", 2),
        ("attention_config.flash_attn_version", 2),
        ("model_config.model_class_overrides", {"LlamaForCausalLM": "mine:Llama"}),
    ],
)
def test_engine_settings_count(vllm_config: Any, kv_config: Any, path: str, value: Any) -> None:
    other = copy.deepcopy(vllm_config)
    change(path, value)(other)
    assert name(other, kv_config) != name(vllm_config, kv_config)


def _hub(tmp_path: Path, commits: dict[str, dict[str, str]]) -> Path:
    """A local cache of the hub that holds snapshots of org/m."""
    hub = tmp_path / "hub"
    for commit, files in commits.items():
        folder = hub / "models--org--m" / "snapshots" / commit
        folder.mkdir(parents=True)
        for file, text in files.items():
            (folder / file).write_text(text)
    (hub / "models--org--m" / "refs").mkdir()
    return hub


@pytest.mark.parametrize(
    ("file", "field", "value"),
    [
        ("preprocessor_config.json", "multimodal_config", SimpleNamespace(media={})),
        ("modeling_mine.py", "trust_remote_code", True),
    ],
)
def test_files_of_a_hub_model_count(
    vllm_config: Any, kv_config: Any, tmp_path: Path, file: str, field: str, value: Any
) -> None:
    """Two commits with the same weights: the processor, or the model's own code, changed."""
    commits = {"a" * 40: {file: "1"}, "b" * 40: {file: "2"}, "c" * 40: {file: "2"}}
    hub = _hub(tmp_path, commits)
    names = []
    for commit in commits:
        other = copy.deepcopy(vllm_config)
        other.model_config.model, other.model_config.revision = "org/m", commit
        other.load_config.download_dir = str(hub)
        setattr(other.model_config, field, value)
        names.append(name(other, kv_config))
    assert names[0] != names[1] == names[2]


def test_how_adapters_are_applied_counts(vllm_config: Any, kv_config: Any) -> None:
    """--lora-target-modules leaves layers out: other KV from the same adapter, and the same KV
    without one."""
    from vllm.config.lora import LoRAConfig

    class Same:
        def get(self, lora: Any) -> bytes | None:
            return lora

    def digests(lora: LoRAConfig) -> tuple[Any, Any, Any]:
        other = copy.copy(vllm_config)
        object.__setattr__(other, "lora_config", lora)
        weights = WeightsDigest(lambda: [])
        source = ns.NamespaceSource(other, kv_config, weights=weights, adapters=Same())  # type: ignore[arg-type]
        asked = (b"", None, b"d" * 32)
        got = [source.adapter(SimpleNamespace(lora_request=lora)) for lora in asked]
        weights.close()
        return got[0], got[1], got[2]

    every = digests(LoRAConfig())
    some = digests(LoRAConfig(target_modules=["o_proj"]))
    assert every[:2] == some[:2] == (b"", None)
    assert every[2] != some[2] and every == digests(LoRAConfig(max_loras=4, max_lora_rank=64))


def test_what_decides_the_layout_of_older_vllm_counts(
    vllm_config: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """0.26 has no KVCacheConfig.kv_cache_layout: the environment or a connector decides."""
    monkeypatch.setattr(ns.compat, "vllm_version", lambda: (0, 26, 0))
    kv = make_kv_config()
    kv.kv_cache_layout = None

    def pages(connector: str, *children: str) -> Any:
        other = copy.copy(vllm_config)
        extra = {"connectors": [{"kv_connector": c} for c in children]}
        transfer = SimpleNamespace(kv_connector=connector, kv_connector_extra_config=extra)
        object.__setattr__(other, "kv_transfer_config", transfer)
        return json.dumps(ns.namespace_facts(other, kv, b"c" * 32)["pages"])

    seen = {
        pages("KVOffloadConnector"),
        pages("MultiConnector", "KVOffloadConnector", "NixlConnector"),
    }
    monkeypatch.setenv("VLLM_KV_CACHE_LAYOUT", "HND")
    seen |= {pages("KVOffloadConnector"), pages("KVOffloadConnector")}
    assert len(seen) == 3


def test_pages_count(vllm_config: Any, kv_config: Any) -> None:
    seen = {name(vllm_config, kv_config)}
    for changed in (make_kv_config(head_size=64), make_kv_config(layers=3)):
        seen.add(name(vllm_config, changed))
    other = make_kv_config()
    other.kv_cache_layout = "BLHNC"
    seen.add(name(vllm_config, other))
    other = make_kv_config()
    other.kv_cache_groups[0].layer_names.reverse()
    seen.add(name(vllm_config, other))
    assert len(seen) == 5


def test_weights_epoch_and_canary_count(vllm_config: Any, kv_config: Any) -> None:
    facts = ns.namespace_facts(vllm_config, kv_config, b"c" * 32)
    other = ns.namespace_facts(vllm_config, kv_config, b"d" * 32)
    made = {
        ns.namespace_bytes(facts, b"w" * 32, bytes(16)),
        ns.namespace_bytes(facts, b"v" * 32, bytes(16)),
        ns.namespace_bytes(facts, b"w" * 32, b"e" * 16),
        ns.namespace_bytes(other, b"w" * 32, bytes(16)),
        ns.namespace_bytes(facts, b"w" * 31, b"w" + bytes(16)),  # no part runs into the next
    }
    assert len(made) == 5


def test_speculation_counts(vllm_config: Any, kv_config: Any, tmp_path: Path) -> None:
    from types import SimpleNamespace

    names = {name(vllm_config, kv_config)}
    draft = make_config(tmp_path / "d").model_config
    for tokens, method in ((1, "eagle"), (2, "eagle"), (2, "mtp")):
        other = copy.copy(vllm_config)
        spec = SimpleNamespace(
            method=method, num_speculative_tokens=tokens, draft_model_config=draft
        )
        object.__setattr__(other, "speculative_config", spec)
        names.add(name(other, kv_config))
    assert len(names) == 4


def test_cpu_features_and_version_count(
    vllm_config: Any, kv_config: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = {name(vllm_config, kv_config)}
    monkeypatch.setattr(ns, "_cpu_flags", lambda: ["amx_tile"])
    seen.add(name(vllm_config, kv_config))
    monkeypatch.setattr(ns, "_vllm_minor", lambda: "0.99")
    seen.add(name(vllm_config, kv_config))
    assert len(seen) == 3


def test_canonical_forms_tell_types_apart() -> None:
    values = [
        1,
        "1",
        1.5,
        True,
        None,
        b"1",
        [1],
        (),
        {"1": 1},
        {1: 1},
        {1},
        float("nan"),
        {"a": {1, 2}},
    ]
    forms = [ns.canonical_json(v) for v in values]
    assert len(set(forms)) == len(forms)
    assert ns.canonical_json({"b": 1, "a": 2}) == ns.canonical_json({"a": 2, "b": 1})
    assert ns.canonical_json({"x", "y", "z"}) == ns.canonical_json({"z", "y", "x"})


# -- the canary --------------------------------------------------------------------------------------


@pytest.fixture
def seeded(monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm.utils.hashing import sha256
    from vllm.v1.core import kv_cache_utils

    monkeypatch.delenv("PYTHONHASHSEED", raising=False)
    monkeypatch.setattr(kv_cache_utils, "NONE_HASH", b"", raising=False)
    kv_cache_utils.init_none_hash(sha256)


@pytest.mark.usefixtures("seeded")
def test_canary_is_stable_and_sees_the_hash(
    vllm_config: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from vllm.v1.core import kv_cache_utils

    first = ns.canary(vllm_config)
    assert first == ns.canary(vllm_config) and len(first) == 32
    seen = {first}
    for part, value in (
        ("NONE_HASH", b"another seed"),
        ("_gen_lora_extra_hash_keys", lambda request: [request.lora_request.lora_name]),
        ("hash_block_tokens", lambda fn, parent, tokens, extra: fn((parent, tuple(tokens)))),
    ):
        with monkeypatch.context() as m:
            m.setattr(kv_cache_utils, part, value)
            seen.add(ns.canary(vllm_config))
    other = copy.deepcopy(vllm_config)
    other.cache_config.prefix_caching_hash_algo = "sha256_cbor"
    seen.add(ns.canary(other))
    assert len(seen) == 5


def test_canary_needs_a_seeded_hash(vllm_config: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm.v1.core import kv_cache_utils

    monkeypatch.delattr(kv_cache_utils, "NONE_HASH", raising=False)
    with pytest.raises(RuntimeError, match="not seeded"):
        ns.canary(vllm_config)


@pytest.mark.usefixtures("seeded")
def test_canary_refuses_a_hash_without_salt(
    vllm_config: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from vllm.v1.core import kv_cache_utils

    monkeypatch.setattr(kv_cache_utils, "generate_block_hash_extra_keys", lambda *a: (None, 0))
    with pytest.raises(RuntimeError, match="ignores"):
        ns.canary(vllm_config)


@pytest.mark.parametrize(
    ("algo", "seed", "volatile"),
    [
        ("sha256", None, False),
        ("sha256_cbor", None, False),
        ("xxhash", None, True),
        ("xxhash_cbor", "random", True),
        ("xxhash", "5", False),
    ],
)
def test_hashes_of_one_process_only(
    vllm_config: Any, monkeypatch: pytest.MonkeyPatch, algo: str, seed: str | None, volatile: bool
) -> None:
    other = copy.deepcopy(vllm_config)
    other.cache_config.prefix_caching_hash_algo = algo
    monkeypatch.delenv("PYTHONHASHSEED", raising=False)
    if seed:
        monkeypatch.setenv("PYTHONHASHSEED", seed)
    assert bool(ns.volatile_hash_reason(other)) is volatile


# -- the source --------------------------------------------------------------------------------------


class StillDigesting(WeightsDigest):
    """A digest that is finished by hand."""

    def __init__(self) -> None:
        super().__init__(lambda: [])

    def start(self) -> None:
        pass

    def finish(self, result: DigestResult) -> None:
        self._result = result
        self._done.set()


@pytest.mark.usefixtures("seeded")
def test_nothing_is_known_before_weights_and_canary(vllm_config: Any, kv_config: Any) -> None:
    weights = StillDigesting()
    source = ns.NamespaceSource(vllm_config, kv_config, weights=weights)
    assert source.namespace() is None
    source.on_first_request()
    assert source.namespace() is None and source.persistent is None
    weights.finish(DigestResult(b"w" * 32))
    first = source.namespace()
    assert first is not None and first == source.namespace() and source.persistent is True
    source.new_epoch()
    second = source.namespace()
    source.new_epoch()
    assert len({first, second, source.namespace()}) == 3
    source.check()
    source.close()


@pytest.mark.usefixtures("seeded")
def test_weights_that_are_not_local_files(vllm_config: Any, kv_config: Any) -> None:
    made = set()
    for _ in range(2):
        weights = StillDigesting()
        weights.finish(DigestResult(None, "load_format dummy"))
        source = ns.NamespaceSource(vllm_config, kv_config, weights=weights)
        source.on_first_request()
        made.add(source.namespace())
        assert source.namespace() == source.namespace()
        assert source.persistent is False and "dummy" in source.reason
        source.check()
        source.close()
    assert len(made) == 2


def test_a_failed_canary_means_no_namespace(
    vllm_config: Any, kv_config: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from vllm.v1.core import kv_cache_utils

    monkeypatch.delattr(kv_cache_utils, "NONE_HASH", raising=False)
    weights = StillDigesting()
    weights.finish(DigestResult(b"w" * 32))
    source = ns.NamespaceSource(vllm_config, kv_config, weights=weights)
    with pytest.raises(RuntimeError):
        source.on_first_request()
    source.on_first_request()  # said once
    assert source.namespace() is None
    source.close()


@pytest.mark.usefixtures("seeded")
def test_over_real_files(vllm_config: Any, kv_config: Any, tmp_path: Path) -> None:
    from kvoffload.engines.vllm.weights import weight_files

    with pytest.raises(NotLocal):
        weight_files(vllm_config)  # only a config.json there
    Path(vllm_config.model_config.model, "model.safetensors").write_bytes(b"weights")
    weights = WeightsDigest(
        lambda: weight_files(vllm_config),
        cache=DigestCache(tmp_path / "w.json"),
        unchanged_since_ns=1 << 62,
    )
    source = ns.NamespaceSource(vllm_config, kv_config, weights=weights)
    source.on_first_request()
    assert weights.wait(20) is not None
    assert source.namespace() is not None and source.persistent is True
    source.close()
