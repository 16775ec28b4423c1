"""What a miss cause means and what to do about it, in words; docs/why.md has the long form."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from kvoffload.cli.units import seconds
from kvoffload.types import MissCause

UNKNOWN = "a cause that this kvoffload does not know"

MEANING: Mapping[MissCause, str] = {
    MissCause.NEVER_STORED: "never stored",
    MissCause.EVICTED: "evicted",
    MissCause.RATE_LIMITED: "evicted before the write budget let it go to NVMe",
    MissCause.NVME_DROPPED: "was on NVMe, which needed the room",
    MissCause.STORE_SKIPPED: "was to be stored, but was not",
    MissCause.STORING: "another request was still storing it",
    MissCause.RESET: "hidden by a reset or a change of weights",
    MissCause.NAMESPACE: "stored under another namespace",
    MissCause.SALT: "stored under another cache_salt",
    MissCause.ADAPTER: "stored under another LoRA adapter",
    MissCause.BELOW_FLOOR: "less than a chunk",
    MissCause.REFUSED: "held, but the planner expects computing to be faster",
    MissCause.NO_ROOM: "held, but no free slots to bring it up",
    MissCause.TIMED_OUT: "took too long",
    MissCause.LOAD_FAILED: "could not be loaded",
    MissCause.TIER_OFF: "the tier that holds it is not in use",
    MissCause.NOT_READY: "kvoffload was not ready",
    MissCause.NOT_ASKED: "nothing was looked up or taken",
}

_ADVICE: Mapping[MissCause, str] = {
    MissCause.NEVER_STORED: "nothing: new text (or another machine's, or from before the restart)",
    MissCause.RATE_LIMITED: "raise nvme_write_tb_per_day, or dram_gib",
    MissCause.NVME_DROPPED: "raise nvme_gib",
    MissCause.STORING: "nothing: the next one finds it",
    MissCause.RESET: "nothing: stored KV of other weights must not be used",
    MissCause.SALT: "use the same cache_salt where sharing is wanted",
    MissCause.ADAPTER: "nothing: KV depends on the adapter",
    MissCause.BELOW_FLOOR: "nothing, or a smaller chunk_tokens",
    MissCause.REFUSED: "nothing; load=always if you know better",
    MissCause.NO_ROOM: "raise dram_gib: leases and writes hold the arena",
    MissCause.TIMED_OUT: "see kvoffload top for the disk's rate; load_deadline_ms",
    MissCause.LOAD_FAILED: "see kvoffload_failures_total and the log; check the disk",
    MissCause.TIER_OFF: "see kvoffload_breaker_open and the log; check the disk",
    MissCause.NOT_READY: "nothing: it is ready some seconds after the start",
    MissCause.NOT_ASKED: "nothing: the request or another connector wanted it so",
}

_FIELDS = {
    "kv_dtype": "KV dtype",
    "dtype": "compute dtype",
    "weights": "weights",
    "vllm": "vLLM version",
    "chunk_tokens": "chunk size",
    "ranks": "parallel sizes",
    "pages": "page geometry",
    "salt": "cache_salt",
    "adapter": "LoRA adapter",
    "epoch": "reset or weights changed in place",
}

_HOW = {
    "no_room": "no free slot",
    "store_failed": "its copy failed",
    "given_up": "its store was taken back",
    "bad_bytes": "its bytes were damaged",
    "read_failed": "NVMe could not read it",
    "stalled": "NVMe did not answer",
    "quarantined": "its tier gave wrong bytes",
    "unwritten": "not yet written to NVMe",
}


def cause_of(record: Mapping[str, Any]) -> MissCause | None:
    """The record's cause. None: nothing was missed, or a cause of a newer version."""
    try:
        return MissCause(record["cause"])
    except (KeyError, ValueError):
        return None


def _field(name: str) -> str:
    return _FIELDS.get(name, name.replace("hf_config.", "model config "))


def why(record: Mapping[str, Any]) -> str:
    """The cause in words, with what is known beside it; empty for a hit."""
    if not record.get("cause"):
        return ""
    cause = cause_of(record)
    if cause is None:
        return f"{record['cause']}: {UNKNOWN}"
    details = record.get("details") or {}
    text = MEANING[cause]
    if "ago_s" in details:
        text += f" {seconds(float(details['ago_s']))} before"
    extra = [str(details["note"])] if details.get("note") else []
    extra += [_HOW[details["how"]]] if details.get("how") in _HOW else []
    if cause is MissCause.NAMESPACE and details.get("fields"):
        extra.append("different " + ", ".join(map(_field, details["fields"])))
    if cause is MissCause.REFUSED and details.get("decision") == "forced":
        extra.append("load=never")
    elif cause is MissCause.REFUSED and "load_s" in details and "recompute_s" in details:
        load, compute = float(details["load_s"]), float(details["recompute_s"])
        extra.append(f"its head: load {seconds(load)}, compute {seconds(compute)}")
    return f"{text} ({'; '.join(extra)})" if extra else text


def advice(cause: MissCause | None, engine: Mapping[str, Any]) -> str:
    """What to do about a cause on that engine, in a few words."""
    size = engine.get("dram_gib")
    dram = f"DRAM ({size} GiB, {engine.get('policy', 'lru')})" if size else "DRAM"
    if cause is MissCause.EVICTED:
        more = "" if engine.get("nvme_gib") else ", or add nvme_path"
        return f"{dram} is too small: raise dram_gib{more}"
    if cause is MissCause.STORE_SKIPPED:
        return f"{dram} is too small for what is in use at once: raise dram_gib"
    if cause is MissCause.NAMESPACE:
        return "serve with the same settings and weights to find it again"
    return _ADVICE.get(cause, "") if cause else ""
