"""The ledger and the curve of a real engine, read back by ``kvoffload report``.

The metrics are kept as ``metrics.txt`` in the test's folder: docs/report.md shows what they gave.
"""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from kvoffload.cli.main import app
from kvoffload.config import GIB
from kvoffload.replay.trace import Trace
from tests.e2e.prompts import connector, prompt, total
from tests.support import models
from tests.support.engine import EngineLife, Output

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(900)]

DOCUMENTS = {i: prompt(70 + i, 1536) for i in range(10)}
ROUNDS = 14
PROBES = 2
KV_BYTES = 4096  # of a token in the tiny model


def tenant(name: str) -> dict[str, Any]:
    return {"extra_args": {"kv_transfer_params": {"kvoffload": {"tenant": name}}}}


def test_savings_are_booked_to_tenants_and_sizes_are_advised(tmp_path: Path) -> None:
    rng = random.Random(5)
    weights = [1 / (i + 1) for i in DOCUMENTS]
    stream = tmp_path / "stream.jsonl"
    # Replay knows nothing of how fast this machine computes: both load whatever they find.
    settings = connector(dram_gib=0.08, load="always", record_path=str(stream))
    hits = []
    with EngineLife(models.llama(), settings) as life:
        for turn in range(ROUNDS):
            picked = rng.choices(list(DOCUMENTS), weights, k=5)
            for number in picked:
                question = prompt(1000 + 10 * turn + number, 40)
                asked = [DOCUMENTS[number] + question]
                hits += hit_tokens(asked, life.generate(asked, max_tokens=2, **tenant("acme")))
                assert life.reset_prefix_cache()
            asked = [prompt(5000 + turn, 1000)]
            hits += hit_tokens(asked, life.generate(asked, max_tokens=2, **tenant("one-offs")))
            asked = [DOCUMENTS[0]]
            hits += hit_tokens(asked, life.generate(asked, max_tokens=2, cache_salt="secret"))
            assert life.reset_prefix_cache()
        # What a request's end books is exported with a later step, the curve every 5 s.
        until_curve(life)
        values = life.metrics()
    path = tmp_path / "metrics.txt"
    path.write_text("".join(f"{k} {v}\n" for k, v in values.items() if "kvoffload" in k))
    done = CliRunner().invoke(app, ["report", "--file", str(path), "--json"])
    assert done.exit_code == 0, done.stderr
    got = json.loads(done.stdout)
    tenants = {line["name"]: line for line in got["tenants"]}
    salted = next(name for name in tenants if name.startswith("salt-"))
    assert {"acme", "one-offs", salted} <= set(tenants) and "secret" not in path.read_text()
    assert tenants["acme"]["requests"] == 5 * ROUNDS
    assert tenants["acme"]["loaded"]["dram"] > 1000 and tenants[salted]["loaded"]["dram"] > 1000
    assert not tenants["one-offs"]["loaded"]
    assert tenants["one-offs"]["missed"] == 1000 * ROUNDS
    assert got["total"]["saved_s"] > 0
    assert len(got["models"]) == 1 and got["models"][0]["name"] not in ("", "other")
    (curve,) = got["curves"]
    ratios = [curve["ratios"][k] for k in ("0.25", "0.5", "1.0", "2.0", "4.0")]
    assert ratios == sorted(ratios) and ratios[-1] > 0.3
    # The curve was told of every prompt; what really hit is close to what it says of 1x.
    real = got["total"]["tokens"] / got["total"]["asked"]
    assert curve["ratios"]["1.0"] == pytest.approx(real, abs=0.1)
    replayed_as_it_was(stream, hits, got, total(values, "kvoffload_dram_total_bytes"))


def hit_tokens(asked: list[list[int]], answers: list[Output]) -> list[int]:
    """Prompt tokens that were not computed; the last one always is."""
    return [min(a.num_cached_tokens or 0, len(p) - 1) for p, a in zip(asked, answers, strict=True)]


def replayed_as_it_was(
    stream: Path, hits: list[int], ledger: dict[str, Any], dram_bytes: float
) -> None:
    """The recording of the run, replayed with an arena of its size, hits the same tokens."""
    trace = Trace(stream)
    assert trace.chunk_tokens == 256
    size = ["--dram", f"{dram_bytes / GIB!r}", "--kv-bytes-per-token", str(KV_BYTES)]
    done = CliRunner().invoke(
        app, ["replay", str(stream), *size, "--load", "always", "--json", "-"]
    )
    assert done.exit_code == 0, done.output
    (run,) = json.loads(done.stdout)["runs"]
    assert run["dram_bytes"] == dram_bytes and run["evicted_chunks"] > 0
    assert run["requests"] == len(hits) + PROBES
    got = {t: round(share * run["input_tokens"]) for t, share in run["token_hit_by_tier"].items()}
    assert got == {"dram": sum(hits), "nvme": 0}
    # The ledger has what was loaded: of a prompt that hits whole also the token computed again.
    whole = sum(hit == len(DOCUMENTS[0]) - 1 for hit in hits)
    assert ledger["total"]["loaded"] == {"dram": sum(hits) + whole}


def until_curve(life: EngineLife) -> None:
    """A few tiny requests, more than 5 s apart from the curve's last export."""
    import time

    for _ in range(PROBES):
        time.sleep(5.5)
        life.generate([prompt(9, 20)], max_tokens=2, **tenant("probe"))
