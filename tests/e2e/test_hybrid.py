"""A hybrid model with recurrent state (short convolutions): 0 hits, nothing stored, said once."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.asks import ask
from tests.e2e.prompts import connector, prompt, total
from tests.support.engine import EngineLife

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(400)]

# Made-up weights will do: nothing may come from kvoffload at all.
CONFIG: dict[str, Any] = {
    "architectures": ["Lfm2ForCausalLM"],
    "model_type": "lfm2",
    "hidden_size": 256,
    "intermediate_size": 512,
    "block_ff_dim": 512,
    "block_dim": 256,
    "conv_dim": 256,
    "num_hidden_layers": 4,
    "layer_types": ["conv", "full_attention", "conv", "full_attention"],
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "conv_L_cache": 3,
    "conv_bias": False,
    "vocab_size": 4096,
    "max_position_embeddings": 4096,
    "norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "tie_word_embeddings": True,
    "torch_dtype": "float32",
}


def test_zero_hits_and_one_line(tmp_path: Path) -> None:
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text(json.dumps(CONFIG))
    args = {"load_format": "dummy", "enable_prefix_caching": False, "max_num_batched_tokens": 1024}
    with EngineLife(model, connector(), args) as life:
        tokens = prompt(1, 1500)
        first, second = ask(life, tokens), ask(life, tokens)
        assert second.num_cached_tokens == 0
        assert first.token_ids == second.token_ids
        metrics = life.metrics()
        assert total(metrics, "kvoffload_bytes_total") == 0
        assert total(metrics, "kvoffload_hit_tokens_total") == 0
        assert total(metrics, "kvoffload_failures_total") == 0
        log = life.log_path.read_text(errors="replace")
        assert log.count("which cannot be served yet: 0 hits, nothing is stored.") == 1
