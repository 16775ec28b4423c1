"""The LMCache adapter, checked by the interpreter of the LMCache environment where there is one."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from tests.support.lmcache_env import lmcache_python

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.timeout(280)
def test_lmcache_checks(tmp_path: Path) -> None:
    checks = ROOT / "tests" / "support" / "lmcache_checks.py"
    command = [str(lmcache_python()), "-m", "pytest", "-q", "-p", "no:cacheprovider", str(checks)]
    env = os.environ | {
        "PYTHONPATH": str(ROOT),
        "LMCACHE_TRACK_USAGE": "false",
        "DO_NOT_TRACK": "1",
        "TMPDIR": str(tmp_path),
    }
    run = subprocess.run(
        [*command, "-m", ""], cwd=ROOT, env=env, capture_output=True, text=True, timeout=260
    )
    assert run.returncode == 0, run.stdout[-8000:] + run.stderr[-4000:]
    assert " passed" in run.stdout and "skipped" not in run.stdout, run.stdout[-500:]
