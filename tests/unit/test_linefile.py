"""A file of lines that lives as long as its writer: bounded, private, and gone when the writer is."""

from __future__ import annotations

import fcntl
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from kvoffload.linefile import LineFile, live_files, read_lines, remove_dead

HEAD = {"kind": "engine"}


class Writer:
    """Numbers, of which the last ``keep`` are known."""

    def __init__(self, path: Path, keep: int = 3) -> None:
        self.numbers: list[dict[str, int]] = []
        self.keep = keep
        self.file = LineFile(path, keep, HEAD, lambda: self.numbers[-keep:])

    def add(self, *numbers: int) -> None:
        new = [{"n": n} for n in numbers]
        self.numbers += new
        self.file.append(new)


def test_lines_come_after_the_head_and_are_bounded(tmp_path: Path) -> None:
    path = tmp_path / "why" / "1.jsonl"
    writer = Writer(path)
    assert read_lines(path) == [HEAD]
    for i in range(20):
        writer.add(i)
        lines = read_lines(path)
        assert lines[0] == HEAD and lines[-1] == {"n": i} and len(lines) <= 1 + 2 * 3
        newest = [x["n"] for x in lines[1:]]
        assert newest == list(range(newest[0], i + 1)) and len(newest) >= min(3, i + 1)
    assert path.stat().st_mode & 0o777 == 0o600
    assert path.parent.stat().st_mode & 0o777 == 0o700
    assert [p.name for p in path.parent.iterdir()] == ["1.jsonl"]
    writer.file.close()
    writer.file.close()
    assert not list(path.parent.iterdir())


def test_a_batch_larger_than_the_file(tmp_path: Path) -> None:
    writer = Writer(tmp_path / "1.jsonl")
    writer.add(*range(100))
    assert [x["n"] for x in read_lines(tmp_path / "1.jsonl")[1:]] == [97, 98, 99]
    writer.file.close()


def test_incomplete_and_foreign_lines_are_skipped(tmp_path: Path) -> None:
    (tmp_path / "1.jsonl").write_bytes(b'{"kind":"engine"}\n[1]\n\xff\n{"n":1}\n{"n":')
    assert read_lines(tmp_path / "1.jsonl") == [HEAD, {"n": 1}]


CHILD = """
import os, sys
from pathlib import Path
from kvoffload.linefile import LineFile
file = LineFile(Path(sys.argv[1]), 3, {"kind": "engine"}, list)
print("up", flush=True)
sys.stdin.read()
"""


def test_a_killed_writers_file_is_dead_and_removed(tmp_path: Path) -> None:
    path = tmp_path / "2.jsonl"
    child = subprocess.Popen(
        [sys.executable, "-c", CHILD, str(path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert child.stdout is not None and child.stdin is not None
    assert child.stdout.readline() == b"up\n"
    mine = Writer(tmp_path / "1.jsonl")
    assert [p.name for p in live_files(tmp_path)] == ["1.jsonl", "2.jsonl"]
    child.kill()
    child.wait()
    child.stdin.close()
    child.stdout.close()
    assert [p.name for p in live_files(tmp_path)] == ["1.jsonl"]
    assert not path.exists()
    mine.file.close()


def test_a_file_that_is_written_anew_meanwhile_is_not_dead(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The reader has the old file open, whose lock is free once the writer has a new one."""
    path = tmp_path / "1.jsonl"
    writer = Writer(path)
    real = fcntl.flock
    took: list[int] = []

    def flock(fd: int, how: int) -> None:
        if how & fcntl.LOCK_SH and not took:
            writer.add(*range(10))
            real(fd, how)  # the old file's: free
            took.append(fd)
        else:
            real(fd, how)

    monkeypatch.setattr(fcntl, "flock", flock)
    assert live_files(tmp_path) == [path] and took
    assert read_lines(path)[-1] == {"n": 9}
    writer.file.close()


def test_only_what_is_ours_and_dead_is_removed(tmp_path: Path) -> None:
    other = tmp_path / "notes.txt"
    other.write_text("keep")
    young = tmp_path / ".1-abc"
    young.write_text("")
    old = tmp_path / ".1-def"
    old.write_text("")
    os.utime(old, (1, 1))
    link = tmp_path / "3.jsonl"
    link.symlink_to(other)
    remove_dead(tmp_path)
    assert other.exists() and young.exists() and link.is_symlink() and not old.exists()
    remove_dead(tmp_path / "none")
    assert live_files(tmp_path / "none") == []


def test_a_failed_write_leaves_nothing_behind(tmp_path: Path, monkeypatch: Any) -> None:
    writer = Writer(tmp_path / "1.jsonl")
    before = (tmp_path / "1.jsonl").read_bytes()

    def full(*args: Any) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "write", full)
    with pytest.raises(OSError, match="No space"):
        writer.add(*range(10))
    monkeypatch.undo()
    assert (tmp_path / "1.jsonl").read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["1.jsonl"]
    writer.add(10)
    assert json.loads((tmp_path / "1.jsonl").read_text().splitlines()[-1]) == {"n": 10}
    writer.file.close()
