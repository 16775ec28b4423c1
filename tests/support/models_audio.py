"""A tiny multimodal model: Qwen2-Audio with random weights and a tokenizer of its own.

As in :mod:`tests.support.models`, output depends strongly on every KV block, those of an audio too. The
audio's classes are the only multimodal ones that the locked CPU set can import (no torchvision).
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from tests.support import models
from tests.support.models import Tensors

AUDIO, BEGIN, END = VOCAB_IDS = (4000, 4001, 4002)
"""Token ids: an audio's place in a prompt is BEGIN, AUDIO, END."""
_NAMES = ("<|AUDIO|>", "<|audio_bos|>", "<|audio_eos|>")
_TOWER = {
    "model_type": "qwen2_audio_encoder",
    "d_model": 64,
    "encoder_layers": 1,
    "encoder_attention_heads": 2,
    "encoder_ffn_dim": 64,
    "num_mel_bins": 16,
    "max_source_positions": 1500,  # 30 s, which the feature extractor pads to
}


def qwen2_audio(seed: int = 0) -> Path:
    """Prompts are token ids; ``skip_tokenizer_init`` must be False."""
    text = models._dense_config("Qwen2ForCausalLM", "qwen2", models._LAYERS)
    config = {
        "architectures": ["Qwen2AudioForConditionalGeneration"],
        "model_type": "qwen2_audio",
        "text_config": text,
        "audio_config": _TOWER,
        "audio_token_index": AUDIO,
        "vocab_size": models.VOCAB,
        "tie_word_embeddings": True,
        "torch_dtype": "float32",
    }
    return models._cached(
        f"qwen2-audio-s{seed}", config, seed, lambda g: _tensors(g, config), files=_files()
    )


def _tensors(g: torch.Generator, config: dict[str, Any]) -> Tensors:
    text = models._llama_tensors(g, models._LAYERS)
    for i in range(models._LAYERS):
        for name in ("q", "k", "v"):
            weight = text[f"model.layers.{i}.self_attn.{name}_proj.weight"]
            text[f"model.layers.{i}.self_attn.{name}_proj.bias"] = torch.zeros(weight.shape[0])
    return {f"language_model.{k}": v for k, v in text.items()} | _tower(g, config)


def _tower(g: torch.Generator, config: dict[str, Any]) -> Tensors:
    """Names and shapes as transformers has them, matrices and kernels drawn anew."""
    from transformers import Qwen2AudioConfig, Qwen2AudioForConditionalGeneration

    known = {k: v for k, v in config.items() if k not in ("architectures", "model_type")}
    made = Qwen2AudioForConditionalGeneration(Qwen2AudioConfig(**known)).state_dict()
    out: Tensors = {}
    for key, tensor in made.items():
        name = key.removeprefix("model.")
        if name.startswith(("audio_tower.", "multi_modal_projector.")):
            out[name] = tensor.clone()
            if tensor.dim() > 1:
                out[name] = torch.randn(tensor.shape, generator=g) * (2 * tensor[0].numel() ** -0.5)
    return out


def _files() -> dict[str, str]:
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel

    ids = dict(zip(VOCAB_IDS, _NAMES, strict=True))
    tokenizer = Tokenizer(
        WordLevel({ids.get(i, f"t{i}"): i for i in range(models.VOCAB)}, unk_token="t0")
    )
    tokenizer.add_special_tokens(list(_NAMES))
    return {
        "tokenizer.json": tokenizer.to_str(),
        "tokenizer_config.json": json.dumps(
            {
                "tokenizer_class": "PreTrainedTokenizerFast",
                "unk_token": "t0",
                "bos_token": "t1",
                "eos_token": "t2",
            }
        ),
        "preprocessor_config.json": json.dumps(
            {
                "feature_extractor_type": "WhisperFeatureExtractor",
                "processor_class": "Qwen2AudioProcessor",
                "feature_size": _TOWER["num_mel_bins"],
            }
        ),
    }
