"""Which local files an engine's weights were read from, and what else of their folder counts."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kvoffload.engines.vllm import notes

#: vLLM's load formats that read local weight files, and the patterns they read.
_PATTERNS: dict[str, tuple[str, ...]] = {
    "auto": ("*.safetensors", "*.bin", "*.pt"),
    "hf": ("*.safetensors", "*.bin", "*.pt"),
    "safetensors": ("*.safetensors",),
    "fastsafetensors": ("*.safetensors",),
    "instanttensor": ("*.safetensors",),
    "mistral": ("consolidated*.safetensors",),
    "sharded_state": ("*.safetensors",),
    "pt": ("*.pt",),
    "npcache": ("*.bin", "*.pt"),
}
#: Some model classes read these too, whatever the format (a drafter's embedding, an audio codec).
_BESIDE = ("*.bin", "*.pt")
_NOT_WEIGHTS = ("training_args.bin", "optimizer.bin", "optimizer.pt", "scheduler.pt", "scaler.pt")


class NotLocal(Exception):
    """The loaded weights are not bytes of local files; the message says why."""


def folder_id(path: str | Path) -> str:
    """Which folder a path leads to now (device, inode, real path): a link may be turned, or a
    folder put in its place. Raises OSError."""
    real = os.path.realpath(path, strict=True)
    st = os.stat(real)
    return f"{st.st_dev}:{st.st_ino}:{real}"


@dataclass(frozen=True, slots=True)
class WeightFiles:
    """One model's files. ``pinned``: a snapshot of the hub's cache, whose files never change.

    ``was``: its ``folder_id`` before anything was loaded from it, None where nobody looked.
    """

    role: str
    folder: Path
    files: tuple[Path, ...]
    pinned: bool = False
    was: str | None = None

    def check_folder(self) -> None:
        """Raise NotLocal when the path leads to another folder than before the weights were
        loaded."""
        if self.was is None:
            return
        try:
            same = folder_id(self.folder) == self.was
        except OSError:
            same = False
        if not same:
            raise NotLocal(f"{self.folder} became another folder after this engine was started")


# -- before the weights are loaded -----------------------------------------------------------------


def machine() -> str:
    """Where a folder's identity means anything: this boot of this machine, in this container."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        return f"{boot} {os.readlink('/proc/self/ns/mnt')}"
    except OSError:
        return ""


def loaded_after(vllm_config: Any) -> int:
    """Wall clock in ns before which this engine cannot have opened a weight file: when its
    configuration was checked, where that was on this machine, else when the plugin came."""
    from kvoffload.engines.vllm.plugin import loaded_after_ns

    left = notes.read(vllm_config)
    since = left.get("since") if left.get("where") == machine() != "" else None
    return max(loaded_after_ns(), since) if isinstance(since, int) else loaded_after_ns()


def model_folders(vllm_config: Any) -> dict[str, str]:
    """Which local folders the models of ``vllm_config`` are read from, by path. Never raises."""
    seen: dict[str, str] = {}
    for model in _model_configs(vllm_config):
        for path in (getattr(model, "model_weights", ""), getattr(model, "model", "")):
            try:
                if path and os.path.isdir(str(path)):
                    seen[str(path)] = folder_id(str(path))
            except OSError:
                continue
    return seen


def _model_configs(vllm_config: Any) -> list[Any]:
    spec = getattr(vllm_config, "speculative_config", None)
    found = (getattr(vllm_config, "model_config", None), getattr(spec, "draft_model_config", None))
    return [m for m in found if m is not None]


# -- after -----------------------------------------------------------------------------------------


def weight_files(vllm_config: Any) -> list[WeightFiles]:
    """The local files of the model and, if there is one, the drafter. Raises NotLocal.

    A superset where vLLM's choice depends on the model class: every format's files of the folder
    and its direct subfolders. A byte too many costs a cold start, a byte too few a wrong hit.
    """
    left = notes.read(vllm_config)  # on another node of a Ray cluster the same path is another one
    noted = left.get("folders", {}) if left.get("where") == machine() != "" else {}
    found = [_of_model("model", vllm_config.model_config, vllm_config.load_config, noted)]
    spec = getattr(vllm_config, "speculative_config", None)
    draft = getattr(spec, "draft_model_config", None)
    if draft is not None:
        load = getattr(spec, "draft_load_config", None) or vllm_config.load_config
        found.append(_of_model("draft", draft, load, noted))
    return found


def _of_model(
    role: str, model_config: Any, load_config: Any, noted: Mapping[str, str]
) -> WeightFiles:
    load_format = getattr(load_config.load_format, "value", load_config.load_format)
    patterns = _PATTERNS.get(str(load_format).lower())
    if patterns is None:
        raise NotLocal(f"load_format {load_format} does not read local weight files")
    extra = load_config.model_loader_extra_config
    if not isinstance(extra, dict) or "pattern" in extra:
        raise NotLocal("the loader's extra config chooses the weight files")
    _refuse_second_repository(model_config)
    weights = str(getattr(model_config, "model_weights", "") or model_config.model)
    folder, pinned = local_folder(weights, model_config, load_config)
    files = _matching(folder, patterns)
    if not files:
        raise NotLocal(f"no weight files in {folder}")
    found = WeightFiles(role, folder, files, pinned, None if pinned else noted.get(weights))
    found.check_folder()
    return found


def _refuse_second_repository(model_config: Any) -> None:
    # Ultravox and the like load parts from repositories that only their config names.
    hf_config = getattr(model_config, "hf_config", None)
    for key, value in vars(hf_config).items() if hf_config is not None else ():
        if key.endswith("_model_id") and isinstance(value, str) and value:
            raise NotLocal(f"{key} loads weights from a second repository")


def _matching(folder: Path, patterns: Sequence[str]) -> tuple[Path, ...]:
    """Files of all patterns and those beside them; () where there is none of the patterns.

    Not the first pattern that finds something: that could be a file of a subfolder, while vLLM
    reads those of another format in the folder itself.
    """
    if not any(_found(folder, pattern) for pattern in patterns):
        return ()
    every = dict.fromkeys((*patterns, *_BESIDE))
    return tuple(sorted({path for pattern in every for path in _found(folder, pattern)}))


def _found(folder: Path, pattern: str) -> list[Path]:
    return [
        p
        for p in (*folder.glob(pattern), *folder.glob(f"*/{pattern}"))
        if p.is_file()
        and p.name not in _NOT_WEIGHTS
        and p.relative_to(folder).parts[0] != "original"
    ]


def local_folder(model: str, model_config: Any, load_config: Any) -> tuple[Path, bool]:
    """The folder that ``model`` (a path or a name of the hub) was read from, and whether its files
    never change. Raises NotLocal."""
    if re.match(r"[a-z0-9+.-]+://", model, re.IGNORECASE):
        raise NotLocal("the weights are streamed from object storage")
    if os.path.isdir(model):
        return Path(model), False
    if os.environ.get("VLLM_USE_MODELSCOPE", "").lower() in ("1", "true"):
        raise NotLocal("the weights come from ModelScope's cache")
    try:
        from huggingface_hub import snapshot_download

        revision = getattr(model_config, "revision", None)
        folder = Path(
            snapshot_download(
                model,
                revision=revision,
                cache_dir=load_config.download_dir,
                local_files_only=True,
            )
        )
    except Exception as exc:
        raise NotLocal(f"{model} is not in the local cache ({type(exc).__name__})") from exc
    commit = getattr(getattr(model_config, "hf_config", None), "_commit_hash", None)
    if commit and folder.name != commit:
        raise NotLocal(f"{model} moved to another revision while it was loaded")
    pinned = re.fullmatch("[0-9a-f]{40}", folder.name) is not None
    return folder, pinned
