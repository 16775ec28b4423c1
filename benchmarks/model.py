"""The seeded KV-sensitive model: random weights scaled so that a wrong KV block shows in logprobs.

vLLM's dummy weights cannot see garbage KV (every logprob stays the same): a shape with ``dummy``
set is for timings alone, and its outputs are never compared. The scaling (2/sqrt(fan_in), twice
that for q and k, unit embeddings) is the one that was measured to react: a foreign block in one
layer moves a logprob by at least 0.28 in fp32.
"""

from __future__ import annotations

import json
import sys
from dataclasses import asdict, dataclass
from pathlib import Path


@dataclass(frozen=True)
class ModelShape:
    """Shape of the tiny Llama. KV bytes per token in fp32: 8 * layers * kv_heads * head_dim."""

    hidden: int = 256
    layers: int = 4
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 64
    vocab: int = 4096
    max_tokens: int = 16384
    intermediate: int = 0  # 0: twice hidden
    dtype: str = "float32"
    dummy: bool = False  # no weight file: start vLLM with load_format="dummy"

    @property
    def kv_bytes_per_token(self) -> int:
        """Bytes of K and V of one token over all layers."""
        return (
            2 * self.layers * self.kv_heads * self.head_dim * (4 if self.dtype == "float32" else 2)
        )

    @property
    def engine(self) -> dict[str, object]:
        """What an engine of this model is started with, besides its folder."""
        return {"dtype": self.dtype} | ({"load_format": "dummy"} if self.dummy else {})


SHAPES = {
    "tiny": ModelShape(),
    # SmolLM2-135M's shape, the demo's model: 45 KiB of KV per token in fp32.
    "smollm135m": ModelShape(
        hidden=576,
        layers=30,
        heads=9,
        kv_heads=3,
        vocab=49152,
        max_tokens=8192,
        intermediate=1536,
    ),
    # Llama-3.1-8B's shape: 128 KiB of KV per token in bf16.
    "llama8b": ModelShape(
        hidden=4096,
        layers=32,
        heads=32,
        kv_heads=8,
        head_dim=128,
        vocab=128256,
        max_tokens=131072,
        intermediate=14336,
        dtype="bfloat16",
        dummy=True,
    ),
}


def _write_tokenizer(where: Path, vocab: int) -> None:
    """A word-level tokenizer ``t<id>``: the HTTP server wants one; prompts stay token ids."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = {f"t{i}": i for i in range(vocab)}
    tokenizer = Tokenizer(models.WordLevel(vocab=words, unk_token="t0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.save(str(where / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "unk_token": "t0",
        "bos_token": "t1",
        "eos_token": "t2",
        "pad_token": "t2",
        "clean_up_tokenization_spaces": False,
    }
    (where / "tokenizer_config.json").write_text(json.dumps(settings))


def make_model(where: Path, shape: ModelShape | None = None, seed: int = 0) -> Path:
    """Write config, fp32 weights (safetensors) and tokenizer below ``where``; returns it.

    Of a dummy shape the config alone.
    """
    shape = shape or ModelShape()
    where.mkdir(parents=True, exist_ok=True)
    if shape.dummy:
        (where / "config.json").write_text(json.dumps(_dummy_config(shape)))
    else:
        _write_weights(where, shape, seed)
        _write_tokenizer(where, shape.vocab)
    (where / "shape.json").write_text(json.dumps(asdict(shape)))
    return where


def _dummy_config(shape: ModelShape) -> dict[str, object]:
    """config.json of a Llama without weights: needs neither torch nor transformers to make."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": shape.hidden,
        "intermediate_size": shape.intermediate or 2 * shape.hidden,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "head_dim": shape.head_dim,
        "vocab_size": shape.vocab,
        "max_position_embeddings": shape.max_tokens,
        "rms_norm_eps": 1e-5,
        "rope_theta": 500000.0,
        "hidden_act": "silu",
        "tie_word_embeddings": False,
        "attention_bias": False,
        "mlp_bias": False,
        "torch_dtype": shape.dtype,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }


def _write_weights(where: Path, shape: ModelShape, seed: int) -> None:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate or 2 * shape.hidden,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        head_dim=shape.head_dim,
        vocab_size=shape.vocab,
        max_position_embeddings=shape.max_tokens,
        tie_word_embeddings=True,
        bos_token_id=1,
        eos_token_id=2,
    )
    torch.manual_seed(seed)
    model = LlamaForCausalLM(config).to(torch.float32)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.ndim != 2:
                continue
            std = 1.0 if "embed" in name else 2.0 * weight.shape[1] ** -0.5
            if "q_proj" in name or "k_proj" in name:
                std *= 2.0
            weight.normal_(0.0, std)
    model.save_pretrained(where)


if __name__ == "__main__":
    # Own process: the driver must not keep torch's memory and threads beside the engine.
    make_model(Path(sys.argv[1]), ModelShape(**json.loads(sys.argv[2])))
