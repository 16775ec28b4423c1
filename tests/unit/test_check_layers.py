"""The layer checker finds every kind of broken rule, and the package breaks none."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from scripts import check_layers

ROOT = Path(__file__).resolve().parents[2]


def _check(tmp_path: Path, files: dict[str, str]) -> list[str]:
    for name, source in files.items():
        path = tmp_path / "kvoffload" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(source)
    return check_layers.check(tmp_path)


def test_package_keeps_the_rules() -> None:
    assert check_layers.check(ROOT) == []


@pytest.mark.parametrize(
    ("file", "source", "told"),
    [
        ("core/manager.py", "import vllm\n", "may not import vllm"),
        ("core/manager.py", "import torch\n", "may not import torch"),
        ("core/manager.py", "def f():\n    import torch.cuda\n", "may not import torch.cuda"),
        (
            "core/manager.py",
            "from kvoffload.tiers.dram import X\n",
            "kvoffload.core may not import",
        ),
        ("core/manager.py", "from kvoffload import _core\n", "kvoffload.core may not import"),
        (
            "core/manager.py",
            "from ..engines.vllm import connector\n",
            "kvoffload.core may not import",
        ),
        ("core/policy/lru.py", "from ...copy import cpu\n", "kvoffload.core may not import"),
        (
            "tiers/nvme/store.py",
            "from kvoffload.core.manager import M\n",
            "kvoffload.tiers may not",
        ),
        ("tiers/nvme/store.py", "import torch\n", "may not import torch"),
        ("copy/cpu.py", "from kvoffload.tiers.base import T\n", "kvoffload.copy may not import"),
        ("types.py", "from kvoffload.errors import E\n", "kvoffload.types may not import"),
        ("errors.py", "import kvoffload.types\n", "kvoffload.errors may not import"),
        ("cli/main.py", "import vllm\n", "may not import vllm"),
        ("cli/main.py", "from kvoffload.engines import vllm\n", "inside a function only"),
        ("__init__.py", "import numpy\n", "lazily"),
        ("__init__.py", "from kvoffload import _core\n", "lazily"),
        (
            "core/x.py",
            "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from kvoffload.tiers.dram import D\n",
            "kvoffload.core may not import",
        ),
        (
            "core/x.py",
            "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    pass\nelse:\n    import torch\n",
            "may not import torch",
        ),
    ],
)
def test_broken_rule_is_found(tmp_path: Path, file: str, source: str, told: str) -> None:
    lines = _check(tmp_path, {file: source})
    assert len(lines) == 1
    assert lines[0].startswith(f"kvoffload/{file}:")
    assert told in lines[0]


@pytest.mark.parametrize(
    ("file", "source"),
    [
        (
            "core/manager.py",
            "import numpy\nfrom kvoffload.types import Tier\nfrom .index import Index\n",
        ),
        ("core/manager.py", "from kvoffload.tiers.base import ChunkStore\n"),
        ("tiers/dram.py", "import torch\nfrom kvoffload._core import Arena\n"),
        ("copy/cuda.py", "import torch\nimport triton\n"),
        ("engines/vllm/worker.py", "import vllm\nfrom kvoffload.core.manager import M\n"),
        ("cli/main.py", "def run():\n    from kvoffload.engines import vllm\n"),
        ("__init__.py", "def open_store():\n    from kvoffload import _core\n"),
        (
            "cli/x.py",
            "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import torch\n",
        ),
        ("core/torchlike.py", "import torchish\nimport vllm_other\n"),
    ],
)
def test_allowed_import_is_silent(tmp_path: Path, file: str, source: str) -> None:
    assert _check(tmp_path, {file: source}) == []


def test_command_line_reports_and_fails(tmp_path: Path) -> None:
    _check(tmp_path, {"core/x.py": "\nimport vllm\n"})
    script = ROOT / "scripts" / "check_layers.py"
    done = subprocess.run(
        [sys.executable, str(script), "--root", str(tmp_path)], capture_output=True, text=True
    )
    assert done.returncode == 1
    assert done.stdout == "kvoffload/core/x.py:2: kvoffload.core.x may not import vllm\n"
