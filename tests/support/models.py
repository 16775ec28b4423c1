"""Tiny seeded random models whose output depends strongly on every KV block.

Each maker writes a Hugging Face model directory (config.json, fp32 model.safetensors, no tokenizer)
under ``.cache/models`` once and returns its path; the directory name carries a digest of the recipe, so
a changed recipe never meets an old file. Start them with ``skip_tokenizer_init=True``,
``dtype="float32"`` and token-id prompts.

The scale of the weights is what makes these models useful: attention is peaked and no layer is close to
the identity, so one foreign KV block in one layer moves the log-probabilities by more than 0.2 (a trained
model: 0.003; vLLM's ``load_format=dummy``: exactly 0). Two blocks of one request swapped with each other
stay invisible in the output of any model: check bytes for that.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

Tensors = dict[str, torch.Tensor]

_RECIPE = 3  # bump when the tensors of an unchanged configuration change
_LAYERS, _HIDDEN, _HEADS, _KV_HEADS, _HEAD_DIM = 4, 256, 4, 2, 64
VOCAB = 4096


def cache_dir() -> Path:
    """Directory of the made models: ``$KVOFFLOAD_TEST_MODELS`` or ``.cache/models`` in the checkout."""
    default = Path(__file__).resolve().parents[2] / ".cache" / "models"
    return Path(os.environ.get("KVOFFLOAD_TEST_MODELS", default))


def llama(seed: int = 0, layers: int = _LAYERS) -> Path:
    """Llama, full attention, one KV group. Other ``seed``: same shape, other weights."""
    config = _dense_config("LlamaForCausalLM", "llama", layers)
    return _cached(f"llama-s{seed}", config, seed, lambda g: _llama_tensors(g, layers))


def drafter(seed: int = 7, layers: int = 1) -> Path:
    """For speculative decoding beside :func:`llama`: twice its KV heads, so other pages."""
    config = _dense_config("LlamaForCausalLM", "llama", layers)
    config["num_key_value_heads"] = _HEADS
    return _cached(f"drafter-s{seed}", config, seed, lambda g: _llama_tensors(g, layers, _HEADS))


def sliding(seed: int = 0, window: int = 256) -> Path:
    """Layers alternate full / sliding-window attention (``window`` tokens): two KV groups."""
    config = _dense_config("LlamaForCausalLM", "llama", _LAYERS) | {
        "sliding_window": window,
        "layer_types": ["full_attention", "sliding_attention"] * (_LAYERS // 2),
    }
    return _cached(f"sliding-s{seed}", config, seed, lambda g: _llama_tensors(g, _LAYERS))


def mla(seed: int = 0) -> Path:
    """DeepSeek-V2 style multi-head latent attention (512 + 64 wide), dense MLPs.

    On a CPU: with AMX start it with ``dtype="bfloat16"`` (prefix caching works, blocks of 128; float32
    is refused); without AMX, or with ``attention_config={"backend": "CPU_MLA"}``, float32 works but
    vLLM turns prefix caching off. In bf16 a prefix hit differs from a cold run by rounding alone: send
    one request at a time and compare a reload with an HBM hit of the same length.
    """
    config = _dense_config("DeepseekV2ForCausalLM", "deepseek_v2", _LAYERS) | {
        "num_key_value_heads": _HEADS,
        "q_lora_rank": None,
        "kv_lora_rank": 512,
        "qk_nope_head_dim": 128,
        "qk_rope_head_dim": 64,
        "v_head_dim": 128,
        "first_k_dense_replace": _LAYERS,
        "moe_layer_freq": 1,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": _HIDDEN,
        "n_routed_experts": 8,  # never built: every layer is below first_k_dense_replace
        "n_shared_experts": 1,
        "tie_word_embeddings": False,
    }
    config.pop("head_dim")
    return _cached(f"mla-s{seed}", config, seed, _mla_tensors)


def lora(base: Path, count: int = 2, rank: int = 8) -> list[Path]:
    """``count`` different random PEFT adapters for a model made by :func:`llama`.

    They change q, k, v and o projections, so KV made under one adapter is wrong under another.
    """
    config = json.loads((base / "config.json").read_text())
    return [_adapter(base, config, seed, rank) for seed in range(1, count + 1)]


# -- recipes ----------------------------------------------------------------


def _dense_config(architecture: str, model_type: str, layers: int) -> dict[str, Any]:
    return {
        "architectures": [architecture],
        "model_type": model_type,
        "hidden_size": _HIDDEN,
        "intermediate_size": 2 * _HIDDEN,
        "num_hidden_layers": layers,
        "num_attention_heads": _HEADS,
        "num_key_value_heads": _KV_HEADS,
        "head_dim": _HEAD_DIM,
        "vocab_size": VOCAB,
        "max_position_embeddings": 8192,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "hidden_act": "silu",
        "tie_word_embeddings": True,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "torch_dtype": "float32",
    }


def _normal(g: torch.Generator, out: int, fan_in: int, gain: float = 2.0) -> torch.Tensor:
    return torch.randn(out, fan_in, generator=g) * (gain * fan_in**-0.5)


def _mlp_and_norms(g: torch.Generator, prefix: str) -> Tensors:
    return {
        f"{prefix}.mlp.gate_proj.weight": _normal(g, 2 * _HIDDEN, _HIDDEN),
        f"{prefix}.mlp.up_proj.weight": _normal(g, 2 * _HIDDEN, _HIDDEN),
        f"{prefix}.mlp.down_proj.weight": _normal(g, _HIDDEN, 2 * _HIDDEN),
        f"{prefix}.input_layernorm.weight": torch.ones(_HIDDEN),
        f"{prefix}.post_attention_layernorm.weight": torch.ones(_HIDDEN),
    }


def _llama_tensors(g: torch.Generator, layers: int, kv_heads: int = _KV_HEADS) -> Tensors:
    tensors: Tensors = {
        "model.embed_tokens.weight": torch.randn(VOCAB, _HIDDEN, generator=g),
        "model.norm.weight": torch.ones(_HIDDEN),
    }
    for i in range(layers):
        attn = f"model.layers.{i}.self_attn"
        # q and k twice as large again: without it attention is flat and output degenerates to one token.
        tensors[f"{attn}.q_proj.weight"] = _normal(g, _HEADS * _HEAD_DIM, _HIDDEN, 4.0)
        tensors[f"{attn}.k_proj.weight"] = _normal(g, kv_heads * _HEAD_DIM, _HIDDEN, 4.0)
        tensors[f"{attn}.v_proj.weight"] = _normal(g, kv_heads * _HEAD_DIM, _HIDDEN)
        tensors[f"{attn}.o_proj.weight"] = _normal(g, _HIDDEN, _HEADS * _HEAD_DIM)
        tensors |= _mlp_and_norms(g, f"model.layers.{i}")
    return tensors


def _mla_tensors(g: torch.Generator) -> Tensors:
    nope, rope, value, latent = 128, 64, 128, 512
    tensors: Tensors = {
        "model.embed_tokens.weight": torch.randn(VOCAB, _HIDDEN, generator=g),
        "lm_head.weight": _normal(g, VOCAB, _HIDDEN, 1.0),
        "model.norm.weight": torch.ones(_HIDDEN),
    }
    for i in range(_LAYERS):
        attn = f"model.layers.{i}.self_attn"
        tensors |= {
            f"{attn}.q_proj.weight": _normal(g, _HEADS * (nope + rope), _HIDDEN, 2.5),
            f"{attn}.kv_a_proj_with_mqa.weight": _normal(g, latent + rope, _HIDDEN, 2.5),
            f"{attn}.kv_a_layernorm.weight": torch.ones(latent),
            f"{attn}.kv_b_proj.weight": _normal(g, _HEADS * (nope + value), latent, 2.5),
            f"{attn}.o_proj.weight": _normal(g, _HIDDEN, _HEADS * value),
        }
        tensors |= _mlp_and_norms(g, f"model.layers.{i}")
    return tensors


def _adapter(base: Path, config: dict[str, Any], seed: int, rank: int) -> Path:
    heads, dim = config["num_attention_heads"], config["head_dim"]
    widths = {
        "q_proj": (config["hidden_size"], heads * dim),
        "k_proj": (config["hidden_size"], config["num_key_value_heads"] * dim),
        "v_proj": (config["hidden_size"], config["num_key_value_heads"] * dim),
        "o_proj": (heads * dim, config["hidden_size"]),
    }
    adapter = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base.name,
        "r": rank,
        "lora_alpha": 2 * rank,
        "lora_dropout": 0.0,
        "bias": "none",
        "target_modules": sorted(widths),
    }

    def make(g: torch.Generator) -> Tensors:
        tensors: Tensors = {}
        for i in range(config["num_hidden_layers"]):
            for module, (fan_in, out) in widths.items():
                name = f"base_model.model.model.layers.{i}.self_attn.{module}"
                tensors[f"{name}.lora_A.weight"] = _normal(g, rank, fan_in)
                tensors[f"{name}.lora_B.weight"] = _normal(g, out, rank, 1.0)
        return tensors

    return _cached(
        f"{base.name}-lora{seed}",
        adapter,
        1000 + seed,
        make,
        "adapter_config.json",
        "adapter_model",
    )


# -- cache ----------------------------------------------------------------


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _cached(
    name: str,
    config: dict[str, Any],
    seed: int,
    make: Callable[[torch.Generator], Tensors],
    config_name: str = "config.json",
    weights_name: str = "model",
    files: Mapping[str, str] | None = None,
) -> Path:
    """Make the directory once: written beside its place, then renamed, so a reader sees all or nothing.

    ``files``: more of them, text by name; they belong to the recipe ``_RECIPE`` numbers.
    """
    text = json.dumps(config, indent=2, sort_keys=True)
    digest = hashlib.sha256(f"{_RECIPE} {seed} {text}".encode()).hexdigest()[:10]
    root = cache_dir()
    root.mkdir(parents=True, exist_ok=True)
    final = root / f"{name}-{digest}"
    with _locked(root / f".{final.name}.lock"):
        if final.is_dir():
            return final
        temp = Path(tempfile.mkdtemp(prefix=f".{final.name}.", dir=root))
        try:
            tensors = make(torch.Generator().manual_seed(seed))
            save_file(tensors, str(temp / f"{weights_name}.safetensors"), metadata={"format": "pt"})
            (temp / config_name).write_text(text)
            for file, content in (files or {}).items():
                (temp / file).write_text(content)
            temp.chmod(0o755)
            temp.rename(final)
        except BaseException:
            shutil.rmtree(temp, ignore_errors=True)
            raise
    return final
