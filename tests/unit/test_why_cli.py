"""``kvoffload why`` over what real writers left: screens, JSON, ids, several engines, following."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from kvoffload.cli import why
from kvoffload.cli.main import app
from kvoffload.core.why import Report
from kvoffload.linefile import LineFile
from kvoffload.types import MissCause

ROW = Report("r", 1.0e9, 2000, 128, {"dram": 256}, 1616, 384, 3, "a1b2c3d4", None, {})
EVICTED = replace(
    ROW, request_id="cmpl-abc-0", cause=MissCause.EVICTED, details={"how": "evicted", "ago_s": 12.0}
)
HIT = replace(ROW, request_id="chatcmpl-abd", loaded={"dram": 1000, "nvme": 872}, missed=0)
OTHER = replace(
    ROW,
    request_id="cmpl-xyz",
    loaded={},
    cause=MissCause.NAMESPACE,
    details={"fields": ["kv_dtype"]},
)


class Engines:
    """Writers in the folder that the command looks into."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder / "kvoffload" / "why"
        self.files: list[LineFile] = []

    def start(self, pid: int, reports: list[Report], **head: Any) -> LineFile:
        lines: list[dict[str, Any]] = [{"kind": "request", **r.as_dict()} for r in reports]
        causes: dict[str, int] = {}
        for r in reports:
            if r.cause:
                causes[r.cause.value] = causes.get(r.cause.value, 0) + 1
        lines.append({"kind": "totals", "requests": len(reports) + 5, "causes": causes})
        about = {"kind": "engine", "pid": pid, "model": "a/model", "dram_gib": 0.5, **head}
        file = LineFile(self.folder / f"{pid}.jsonl", 100, about, lambda: lines)
        file.append(lines)
        self.files.append(file)
        return file


@pytest.fixture
def running(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Engines]:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("TZ", "UTC")
    monkeypatch.setenv("COLUMNS", "150")
    engines = Engines(tmp_path)
    yield engines
    for file in engines.files:
        file.close()


def run(*args: str) -> Result:
    return CliRunner().invoke(app, ["why", *args])


def test_nobody_is_there(running: Engines) -> None:
    result = run()
    assert result.exit_code == 2 and "no running engine" in result.stderr
    assert result.stderr.count("\n") == 1 and not result.stdout


def test_a_folder_that_cannot_be_read_is_one_line(running: Engines) -> None:
    running.folder.parent.mkdir(parents=True)
    running.folder.write_text("no folder")
    for args in ((), ("--json",), ("--follow",)):
        result = run(*args)
        assert result.exit_code == 2 and not result.stdout, result.exception
        assert result.stderr.count("\n") == 1 and "cannot be read: Not a directory" in result.stderr


@pytest.mark.parametrize("args", [(), ("--follow",), ("--json", "--last", "1")])
def test_a_file_that_cannot_be_read_is_one_line(running: Engines, args: tuple[str, ...]) -> None:
    """Another user's, say; one that can be read is shown all the same."""
    (running.folder / "6.jsonl").mkdir(
        parents=True
    )  # root may read every file, but no folder as one
    result = run(*args)
    assert result.exit_code == 2 and not result.stdout, result.exception
    assert result.stderr.count("\n") == 1 and "6.jsonl cannot be read" in result.stderr
    running.start(7, [EVICTED])
    if "--follow" not in args:
        assert run(*args).exit_code == 0 and "cmpl-abc-0" in run(*args).stdout


def test_the_last_requests_and_what_to_do(running: Engines) -> None:
    running.start(7, [EVICTED, HIT, OTHER])
    result = run()
    assert result.exit_code == 0, result.output
    text = re.sub(r" +", " ", result.stdout)
    assert "engine 7 a/model" in text
    assert "cmpl-abc-0 2000 128 256 dram 1616 384 evicted 12.0 s before" in text
    assert "chatcmpl-abd 2000 128 1000 dram + 872 nvme 0 - -" in text
    assert "stored under another namespace (different KV dtype)" in text
    assert "8 requests since the engine started" in text
    assert (
        "evicted 1 evicted DRAM (0.5 GiB, lru) is too small: raise dram_gib, or add nvme_path"
        in text
    )
    assert "\x1b" not in result.stdout


def test_last_and_misses(running: Engines) -> None:
    running.start(7, [EVICTED, OTHER, HIT])
    assert "cmpl-abc-0" not in run("--last", "2").stdout
    assert "chatcmpl-abd" not in run("--misses").stdout
    ids = [
        r["id"]
        for r in json.loads(run("--json", "--last", "1", "--misses").stdout)["engines"][0][
            "requests"
        ]
    ]
    assert ids == ["cmpl-xyz"]
    assert run("--last", "0").exit_code == 2


@pytest.mark.parametrize("wanted", ["abc", "cmpl-abc", "cmpl-abc-0", "chatcmpl-abc"])
def test_one_request_by_the_beginning_of_its_id(running: Engines, wanted: str) -> None:
    running.start(7, [EVICTED, HIT, OTHER])
    text = run(wanted).stdout
    assert re.search(r"first missing +token 384, chunk 3, key a1b2c3d4\.\.\.", text)
    assert re.search(r"what to do +DRAM \(0\.5 GiB, lru\) is too small", text)
    assert "xyz" not in text


def test_a_prefix_of_several_and_of_none(running: Engines) -> None:
    running.start(7, [EVICTED, HIT, OTHER])
    both = run("ab").stdout
    assert "cmpl-abc-0" in both and "chatcmpl-abd" in both and "xyz" not in both
    none = run("nope")
    assert none.exit_code == 2 and "no request 'nope' among the last 3" in none.stderr


def test_json(running: Engines) -> None:
    running.start(7, [EVICTED, OTHER])
    (engine,) = json.loads(run("--json").stdout)["engines"]
    assert engine["pid"] == 7 and engine["total_requests"] == 7
    assert engine["causes"] == {"evicted": 1, "namespace": 1}
    first = engine["requests"][0]
    assert first["id"] == "cmpl-abc-0" and first["cause"] == "evicted" and first["token"] == 384
    assert first["why"] == "evicted 12.0 s before" and first["advice"].startswith("DRAM")


def test_several_engines(running: Engines) -> None:
    running.start(7, [EVICTED])
    running.start(8, [OTHER], model="b/model")
    result = run()
    assert (
        result.exit_code == 2 and "--pid 7  a/model" in result.stderr and "--pid 8" in result.stderr
    )
    assert "xyz" in run("--pid", "8").stdout and "abc" not in run("--pid", "8").stdout
    assert "engine 8" in run("xyz").stdout, "an id is looked for in all of them"
    assert "no such engine; running: 7, 8" in run("--pid", "9").stderr


def test_hostile_ids_and_damaged_files(running: Engines) -> None:
    nasty = replace(EVICTED, request_id="\x1b[31mred[bold]\n\u202e")
    file = running.start(7, [nasty], model="\x1b]0;title\x07")
    file.append([{"kind": "request", "id": 5}, {"kind": "request", "cause": "x"}])
    result = run()
    assert (
        result.exit_code == 0 and "\x1b" not in result.stdout and "[31mred[bold]" in result.stdout
    )
    (running.folder / "7.jsonl").write_text("nothing of ours\n")
    assert run().exit_code == 0


def test_a_cause_of_a_newer_version(running: Engines) -> None:
    file = running.start(7, [])
    row = {"kind": "request", **EVICTED.as_dict(), "cause": "moonlight", "details": {}}
    file.append([row, {"kind": "totals", "requests": 1, "causes": {"moonlight": 1}}])
    text = run().stdout
    assert "moonlight" in text and "does not know" in text


def test_following(running: Engines, monkeypatch: pytest.MonkeyPatch) -> None:
    file = running.start(7, [EVICTED])
    rounds: list[float] = []

    def sleep(seconds: float) -> None:
        rounds.append(seconds)
        if len(rounds) == 1:
            file.append([{"kind": "request", **OTHER.as_dict()}])
        elif len(rounds) == 3:
            file.close()

    monkeypatch.setattr(why, "_sleep", sleep)
    result = run("--follow")
    assert result.exit_code == 0, result.output
    lines = result.stdout.splitlines()
    assert "cmpl-abc-0" in lines[1] and "cmpl-xyz" in lines[2]
    assert lines[3] == "the engine has ended" and len(rounds) == 3
    assert run("--follow", "--json").exit_code == 2


def test_nothing_missed_is_told_from_nothing_asked(running: Engines) -> None:
    running.start(7, [HIT])
    assert "nothing was missed" in run("--misses").stdout
    named = run("--misses", "abd")
    assert named.exit_code == 0 and "nothing was missed" in named.stdout
    running.start(8, [])
    assert "no requests yet" in run("--pid", "8").stdout
    assert "no requests yet" in run("--pid", "8", "--misses").stdout


def test_an_id_is_shown_by_the_engine_that_had_it(running: Engines) -> None:
    running.start(7, [EVICTED])
    running.start(8, [OTHER])
    text = run("xyz").stdout
    assert "engine 8" in text and "engine 7" not in text and "no requests" not in text


def test_following_engines_of_one_process_id(
    running: Engines, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Containers that share a home number their processes alike; one may start meanwhile."""
    file = running.start(7, [EVICTED])
    late: list[LineFile] = []

    def sleep(seconds: float) -> None:
        if late:
            file.close()
        else:
            head = {"kind": "engine", "pid": 7}
            late.append(LineFile(running.folder / "7-b.jsonl", 9, head, list))
            file.append([{"kind": "request", **OTHER.as_dict()}])

    monkeypatch.setattr(why, "_sleep", sleep)
    result = run("--follow")
    assert result.exit_code == 0, result.exception
    lines = result.stdout.splitlines()
    assert "cmpl-xyz" in lines[2] and lines[3] == "the engine has ended"
    late[0].close()


def test_ctrl_c_ends_following(running: Engines, monkeypatch: pytest.MonkeyPatch) -> None:
    running.start(7, [EVICTED])

    def sleep(seconds: float) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(why, "_sleep", sleep)
    assert run("--follow").exit_code == 0


def test_it_is_light_until_it_prints() -> None:
    code = (
        "import sys; from kvoffload.cli import why; "
        "print([m for m in ('rich.table', 'torch', 'vllm', 'numpy') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
