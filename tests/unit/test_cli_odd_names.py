"""Names that no file or host should have: one line, exit status 2, no traceback."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from kvoffload.cli import main
from kvoffload.errors import StoreError
from kvoffload.store import open_store
from tests.support.engine import ROOT

ODD = "nope\udcff"  # as Python has the byte 0xff of an argument


@pytest.mark.parametrize("command", ["stats", "ls", "verify", "export", "import"])
@pytest.mark.parametrize("drives", [1, 2])
def test_a_store_whose_path_is_not_utf8(tmp_path: Path, command: str, drives: int) -> None:
    (tmp_path / "file").write_bytes(b"")
    odd = str(tmp_path / ODD)
    paths = [odd] if drives == 1 else [odd, str(tmp_path / "good")]
    if drives == 2:
        open_store(tmp_path / "good", max_bytes=64 << 20).close()
    file = [str(tmp_path / "file")] if command in ("export", "import") else []
    done = CliRunner().invoke(main.app, ["store", command, *paths, *file])
    assert done.exit_code == 2 and isinstance(done.exception, SystemExit), done.exception
    assert "nope\\udcff: cannot be opened: the path is not UTF-8 text" in done.stderr
    assert done.stderr.count("\n") == 1 and not (tmp_path / ODD).exists()


def test_the_library_says_so_too(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="not UTF-8 text"):
        open_store(tmp_path / ODD, max_bytes=64 << 20)


@pytest.mark.parametrize(
    "url", ["http://a..b:8000", f"http://{'x' * 70}:8000", "http://127.0.0.1:9/\xfc"]
)
@pytest.mark.parametrize("command", ["top", "report", "stats", "warm"])
def test_addresses_that_cannot_be_asked(tmp_path: Path, command: str, url: str) -> None:
    with open_store(tmp_path / "store", max_bytes=64 << 20):
        pass
    (tmp_path / "prompts").write_text("hello")
    args = {
        "top": ["top", url, "--once"],
        "report": ["report", "--url", url],
        "stats": ["store", "stats", str(tmp_path / "store"), "--url", url],
        "warm": ["warm", str(tmp_path / "prompts"), "--url", url],
    }[command]
    done = CliRunner().invoke(main.app, args)
    assert done.exit_code == 2 and isinstance(done.exception, SystemExit), done.exception
    assert "not an address that can be asked" in done.stderr and done.stderr.count("\n") == 1


def test_names_that_are_no_text_can_be_printed(tmp_path: Path) -> None:
    with open_store(tmp_path / "store", max_bytes=64 << 20) as store:
        store.put(b"k" * 16, b"x" * 5000)
    code = "from kvoffload.cli.main import main; main()"
    args = ["store", "export", str(tmp_path / "store"), os.fsencode(tmp_path / ODD)]
    env = os.environ | {"PYTHONPATH": str(ROOT), "PYTHONIOENCODING": "utf-8"}
    done = subprocess.run([sys.executable, "-c", code, *args], capture_output=True, env=env)
    assert done.returncode == 0 and not done.stderr, done.stderr
    assert b"nope\\udcff" in done.stdout and (tmp_path / ODD).exists()


def test_a_traceback_shows_no_values_of_variables() -> None:
    assert not main.app.pretty_exceptions_show_locals
