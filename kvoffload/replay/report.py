"""Whole runs and what they come to."""

from __future__ import annotations

import time
from array import array
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from kvoffload.config import GIB
from kvoffload.errors import ConfigError
from kvoffload.replay.driver import Replay, Setup, last_use_bits, uncollected
from kvoffload.replay.trace import Facts, Trace

PERCENTILES = (50, 95, 99)
_EVERY = 64  # requests between two calls of the progress callback


@dataclass(frozen=True, slots=True)
class Size:
    """A tier's size as it was asked for: GiB, or a share of the trace's unique chunks."""

    value: float
    of_trace: bool

    def chunks(self, unique: int, chunk_bytes: int) -> int:
        """Chunks that fit; at least one where anything was asked for."""
        if not self.value:
            return 0
        wanted = self.value * unique if self.of_trace else self.value * GIB / chunk_bytes
        return max(1, int(wanted + 1e-9))

    def __str__(self) -> str:
        return f"{100 * self.value:g} %" if self.of_trace else f"{self.value:g} GiB"


def parse_size(text: str, key: str) -> Size:
    """``10%`` or ``64`` or ``64GiB``. Raises ConfigError that names ``key``."""
    raw = text.strip().lower()
    try:
        if raw.endswith("%"):
            size = Size(float(raw[:-1]) / 100, True)
        else:
            size = Size(float(raw.removesuffix("gib")), False)
    except ValueError:
        size = Size(-1.0, False)
    if not 0 <= size.value < 1e9:
        raise ConfigError(
            f"{key}={text!r}: give GiB (64) or a share of the trace's unique chunks (10%)"
        )
    return size


@dataclass(frozen=True, slots=True)
class Result:
    """One run. Rates are shares of all prompt tokens, times are modelled seconds."""

    trace: str
    policy: str
    dram: str  # as asked for
    nvme: str
    dram_frac: float | None  # of the trace's unique chunks
    nvme_frac: float | None
    dram_bytes: int
    nvme_bytes: int
    write_everything: bool
    hint_accuracy: float | None
    requests: int
    input_tokens: int
    token_hit: float
    token_hit_by_tier: dict[str, float]
    evicted_chunks: int
    nvme_bytes_written: int  # by the Manager
    nvme_bytes_rewritten: int  # by the store itself, to keep what was read
    nvme_bytes_read: int
    nvme_bytes_written_per_hit_byte: float | None
    nvme_write_tb_per_day: float | None
    orphans: int  # chunks in DRAM whose parent no tier holds: no lookup can reach them
    ttft_s: dict[str, float]
    recompute_ttft_s: dict[str, float]  # the same requests without kvoffload
    wall_s: float

    def as_json(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)


def _percentiles(values: array[float]) -> dict[str, float]:
    data = np.frombuffer(values, np.float32)
    out = {"mean": float(data.mean())}
    for p, value in zip(PERCENTILES, np.percentile(data, PERCENTILES), strict=True):
        out[f"p{p}"] = float(value)
    return {k: round(v, 6) for k, v in out.items()}


def run(
    trace: Trace,
    setup: Setup,
    dram: Size,
    nvme: Size,
    facts: Facts | None = None,
    *,
    hint_accuracy: float | None = None,
    seed: int = 0,
    progress: Callable[[int], None] | None = None,
) -> Result:
    """Replay ``trace`` with tiers of these sizes (those of ``setup`` are ignored).

    ``facts`` are needed where a size is a share of the trace. ``progress`` is given
    ``trace.position()`` now and then. Raises ConfigError (one line).
    """
    chunk_bytes = setup.layout().groups[0].slot_bytes
    unique = facts.unique_chunks if facts is not None else 0
    setup = replace(
        setup,
        dram_chunks=dram.chunks(unique, chunk_bytes),
        nvme_chunks=nvme.chunks(unique, chunk_bytes),
    )
    began = time.monotonic()
    replay = Replay(setup)
    bits = iter(last_use_bits(trace, hint_accuracy, seed)) if hint_accuracy is not None else None
    with uncollected():
        for n, request in enumerate(trace):
            replay.serve(request, next(bits) if bits is not None else None)
            if progress is not None and n % _EVERY == 0:
                progress(trace.position())
    if not replay.requests:
        raise ConfigError(f"{trace.path}: holds no request")
    return _result(replay, trace, dram, nvme, facts, hint_accuracy, time.monotonic() - began)


def _result(
    replay: Replay,
    trace: Trace,
    dram: Size,
    nvme: Size,
    facts: Facts | None,
    hint_accuracy: float | None,
    wall_s: float,
) -> Result:
    setup, counters, store = replay.setup, replay.counters, replay.store
    tokens = max(1, replay.input_tokens)
    unique = facts.unique_chunks if facts is not None else None
    written = counters.nvme_written_bytes
    rewritten = store.rewritten * replay.chunk_bytes if store is not None else 0
    nvme_hit_bytes = replay.nvme_tokens * setup.kv_bytes_per_token
    seconds = replay.now or 1.0
    return Result(
        trace=trace.name,
        policy=setup.policy,
        dram=str(dram),
        nvme=str(nvme),
        dram_frac=round(replay.dram_chunks / unique, 6) if unique else None,
        nvme_frac=round(setup.nvme_chunks / unique, 6) if unique else None,
        dram_bytes=replay.dram_chunks * replay.chunk_bytes,
        nvme_bytes=setup.nvme_chunks * replay.chunk_bytes,
        write_everything=setup.write_everything,
        hint_accuracy=hint_accuracy,
        requests=replay.requests,
        input_tokens=replay.input_tokens,
        token_hit=round((replay.dram_tokens + replay.nvme_tokens) / tokens, 6),
        token_hit_by_tier={
            "dram": round(replay.dram_tokens / tokens, 6),
            "nvme": round(replay.nvme_tokens / tokens, 6),
        },
        evicted_chunks=counters.evicted,
        nvme_bytes_written=written,
        nvme_bytes_rewritten=rewritten,
        nvme_bytes_read=counters.nvme_read_bytes,
        nvme_bytes_written_per_hit_byte=(
            round((written + rewritten) / nvme_hit_bytes, 4) if nvme_hit_bytes else None
        ),
        nvme_write_tb_per_day=round((written + rewritten) / seconds * 86400 / 1e12, 4),
        orphans=replay.orphans(),
        ttft_s=_percentiles(replay.ttft_s),
        recompute_ttft_s=_percentiles(replay.recompute_s),
        wall_s=round(wall_s, 2),
    )
