"""The wheel builds from a clean source tree and works where neither torch nor vLLM can be imported."""

from __future__ import annotations

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

pytestmark = pytest.mark.packaging

ROOT = Path(__file__).resolve().parents[2]
SOURCES = ("kvoffload", "csrc", "pyproject.toml", "setup.py", "README.md", "LICENSE", "MANIFEST.in")
BUILT = shutil.ignore_patterns("*.so", "__pycache__", "*.o", "build")

# Runs isolated: no checkout on the path, imports of torch and vllm refused.
PRELUDE = """
import sys
class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("torch", "vllm", "transformers"):
            raise ImportError(f"{name} must not be imported")
sys.meta_path.insert(0, Refuse())
sys.path.insert(0, sys.argv[1])
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    source = tmp_path_factory.mktemp("source")
    for name in SOURCES:
        path = ROOT / name
        if path.is_dir():
            shutil.copytree(path, source / name, ignore=BUILT)
        elif path.exists():
            shutil.copy(path, source / name)
    out = tmp_path_factory.mktemp("wheel")
    pip = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation"]
    done = subprocess.run([*pip, "-w", str(out), str(source)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    return next(out.glob("kvoffload-*.whl"))


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("installed")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(target)
    return target


def _run(installed: Path, code: str) -> str:
    command = [sys.executable, "-I", "-c", PRELUDE + code, str(installed)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=installed)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_wheel_holds_what_it_should(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    assert "kvoffload/py.typed" in names
    assert "kvoffload/_core.pyi" in names
    assert [n for n in names if n.startswith("kvoffload/_core.") and n.endswith(".so")]
    assert [n for n in names if n.endswith("licenses/LICENSE")]
    assert not [n for n in names if n.startswith(("tests/", "scripts/", "benchmarks/", "csrc/"))]


def test_entry_points(installed: Path) -> None:
    text = next(installed.glob("kvoffload-*.dist-info/entry_points.txt")).read_text()
    assert "kvoffload = kvoffload.engines.vllm.plugin:register" in text
    assert "kvoffload = kvoffload.cli.main:main" in text


def test_import_is_light(installed: Path) -> None:
    out = _run(
        installed,
        "import kvoffload; print(kvoffload.__file__)\n"
        "heavy = {'numpy', 'typer', 'rich', 'zmq', 'kvoffload._core'} & set(sys.modules)\n"
        "assert not heavy, heavy\n",
    )
    assert out.startswith(str(installed))


def test_native_core_works(installed: Path) -> None:
    _run(
        installed,
        "from kvoffload import _core\n"
        "key = bytes(range(16))\n"
        "assert _core.checksum(b'abc', key) == _core.checksum(bytearray(b'abc'), key)\n"
        "assert _core.checksum(b'abc', key) != _core.checksum(b'abd', key)\n",
    )


def test_command_line_starts(installed: Path) -> None:
    out = _run(
        installed,
        "sys.argv = ['kvoffload', '--help']\nfrom kvoffload.cli.main import main\nmain()\n",
    )
    assert "doctor" in out
