"""setup.py and scripts/setup.sh where something that they need is missing: one line that says it."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def find_python(**env: str) -> subprocess.CompletedProcess[str]:
    """That function of setup.sh, by itself: the script would go on to install packages."""
    text = (ROOT / "scripts" / "setup.sh").read_text()
    wanted = [
        found[0]
        for name in ("say", "die", "supported", "find_python")
        if (found := re.search(rf"^{name}\(\) {{(.*}}$|\n(.*\n)*?}}$)", text, re.M)) is not None
    ]
    assert len(wanted) == 4
    code = "\n".join(("set -euo pipefail", *wanted, "found=$(find_python)", 'echo "<$found>"'))
    return subprocess.run(
        ["bash", "-c", code],
        capture_output=True,
        text=True,
        env={k: v for k, v in os.environ.items() if k != "PYTHON"} | env,
    )


def test_an_interpreter_that_is_named_is_taken(tmp_path: Path) -> None:
    named = tmp_path / "a folder" / "python3"
    named.parent.mkdir()
    named.write_text(f'#!/bin/sh\nexec "{sys.executable}" "$@"\n')
    named.chmod(0o755)
    done = find_python(PYTHON=str(named))
    assert (done.returncode, done.stdout) == (0, f"<{named}>\n"), done.stderr


@pytest.mark.parametrize("named", ["/nowhere/python3", "/nowhere/a b", "false"])
def test_no_other_interpreter_takes_its_place(named: str) -> None:
    done = find_python(PYTHON=named)
    assert done.returncode == 1 and not done.stdout
    assert f"PYTHON={named} is no Python" in done.stderr and done.stderr.count("\n") == 1


@pytest.mark.parametrize("empty", [True, False])
def test_without_a_name_one_is_found(tmp_path: Path, empty: bool) -> None:
    (tmp_path / "python3.12").symlink_to(sys.executable)
    path = f"{tmp_path}{os.pathsep}{os.environ['PATH']}"
    done = find_python(PATH=path, **({"PYTHON": ""} if empty else {}))
    assert done.returncode == 0 and "python3" in done.stdout


@pytest.mark.skipif(shutil.which("g++") is None, reason="no g++")
def test_a_missing_header_is_one_line(tmp_path: Path) -> None:
    """Before a file is compiled, and not a page of the compiler's about the first that needs it."""
    pytest.importorskip("pybind11")
    without = tmp_path / "g++"
    without.write_text(
        "#!/bin/sh\n"
        'for a in "$@"; do case $a in *.cpp) grep -q "<xxhash.h>" "$a" && exit 1;; esac; done\n'
        f'exec {shutil.which("g++")} "$@"\n'
    )
    without.chmod(0o755)
    command = [sys.executable, "setup.py", "-q", "build_ext"]
    command += ["--build-lib", str(tmp_path / "lib"), "--build-temp", str(tmp_path / "temp")]
    env = os.environ | {"CC": str(without), "CXX": str(without)}
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=env, timeout=120)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith("kvoffload: no xxhash.h (0.8 or newer)")
    assert "libxxhash-dev" in done.stderr and "Traceback" not in done.stderr
    assert not list(tmp_path.rglob("*.o"))
