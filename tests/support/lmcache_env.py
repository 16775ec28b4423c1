"""Where LMCache is: an environment of its own (scripts/setup_lmcache.sh), or none."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def lmcache_python() -> Path:
    """Python of the environment that has LMCache. Skips the test where there is none."""
    chosen = os.environ.get("KVOFFLOAD_LMCACHE_VENV", str(ROOT / ".venv-lmcache"))
    python = Path(chosen, "bin", "python")
    if not python.exists():
        pytest.skip(f"no LMCache in {chosen} (scripts/setup_lmcache.sh)")
    return python
