"""Deterministic token-id prompts for the tiny models, and small helpers shared by the e2e modules."""

from __future__ import annotations

import json
import random
import time
from collections.abc import Callable
from typing import Any

from typer.testing import CliRunner

from kvoffload.cli import why
from kvoffload.cli.main import app
from tests.support.models import VOCAB


def prompt(seed: int, tokens: int) -> list[int]:
    """``tokens`` random ids; the first ids already differ between seeds."""
    rng = random.Random(f"kvoffload-{seed}")
    return [rng.randrange(3, VOCAB) for _ in range(tokens)]


def connector(**extra: Any) -> dict[str, Any]:
    """The one flag, with extra keys. Two CPU blocks a chunk: more can go wrong than with one."""
    # Tests count hits: on a machine shared with other tests a load may take longer than its plan allows.
    config = {"dram_gib": 0.25, "chunk_tokens": 256, "load_deadline_ms": 5000, **extra}
    return {
        "kv_connector": "KVOffloadConnector",
        "kv_role": "kv_both",
        "kv_connector_extra_config": config,
    }


def causes(life: Any, env: Any) -> dict[str, tuple[str | None, dict[str, Any]]]:
    """Request id -> (cause, details) of what `kvoffload why --json` says of this engine by now.

    vLLM adds a dash and 8 random digits to the ids it is given.
    """
    env.setenv("XDG_CACHE_HOME", life.env["XDG_CACHE_HOME"])
    running = {e.pid for e in why.engines(why._folder())}
    (pid,) = running & set(life.info["engine_pids"])
    result = CliRunner().invoke(app, ["why", "--json", "--pid", str(pid), "--last", "1000"])
    assert result.exit_code == 0, result.output
    (engine,) = json.loads(result.stdout)["engines"]
    return {r["id"].partition("-")[0]: (r["cause"], r["details"]) for r in engine["requests"]}


def total(metrics: dict[str, float], name: str, **labels: str) -> float:
    """Sum of all series of a metric whose labels match."""
    wanted = [f'{k}="{v}"' for k, v in labels.items()]
    return sum(
        v
        for k, v in metrics.items()
        if (k == name or k.startswith(name + "{")) and all(w in k for w in wanted)
    )


def until(condition: Callable[[], bool], timeout: float = 30.0, every: float = 0.2) -> bool:
    """Poll until true; False on timeout."""
    deadline = time.monotonic() + timeout
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(every)
    return True
