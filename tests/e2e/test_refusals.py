"""A configuration that cannot work ends in the front end: one line that names the key, no engine."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.prompts import connector
from tests.support import models

ROOT = Path(__file__).resolve().parents[2]

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(200)]


def _serve(tmp_path: Path, transfer: dict[str, Any], *options: str) -> str:
    """Output of a server that must end by itself."""
    env = os.environ | {
        "HF_HUB_OFFLINE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "PYTHONPATH": str(ROOT),
    }
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "vllm.entrypoints.openai.api_server",
            "--model",
            str(models.llama()),
            "--dtype=float32",
            "--max-model-len=2048",
            "--skip-tokenizer-init",
            "--kv-transfer-config",
            json.dumps(transfer),
            *options,
        ],
        cwd=tmp_path,
        env=env,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=150,
    )
    assert done.returncode != 0
    return done.stdout


@pytest.mark.parametrize(
    ("transfer", "options", "line"),
    [
        (
            connector(dram_gb=4),
            (),
            "kvoffload: unknown key 'dram_gb': did you mean dram_gib?",
        ),
        (
            connector(load="sometimes"),
            (),
            "kvoffload: load='sometimes' is not allowed: choose one of auto, always, never",
        ),
        (
            connector(),
            ("--pipeline-parallel-size=2",),
            "kvoffload: --pipeline-parallel-size 2 is not supported",
        ),
        (
            {
                "kv_connector": "MultiConnector",
                "kv_role": "kv_both",
                "kv_connector_extra_config": {"connectors": [connector(chunk_tokens="many")]},
            },
            (),
            "kvoffload: chunk_tokens='many' is not allowed",
        ),
    ],
    ids=["unknown-key", "bad-value", "unsupported", "inside-multi"],
)
def test_refused_before_an_engine_starts(
    tmp_path: Path, transfer: dict[str, Any], options: tuple[str, ...], line: str
) -> None:
    output = _serve(tmp_path, transfer, *options)
    lines = [text for text in output.splitlines() if line in text]
    assert len(lines) == 1, output[-3000:]
    assert output.rstrip().splitlines()[-1] == lines[0], output[-3000:]  # the last thing one reads
    assert "EngineCore" not in output
    assert "validation error" not in output
