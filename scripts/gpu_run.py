"""Runs one stage's command: output to the log, progress to the terminal, killed at its budget."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

Json = dict[str, Any]

#: Lines of a stage's output that are progress: the benchmark driver's, pytest's last.
PROGRESS = re.compile(r"^\[ *[0-9.]+ s\] |^(?:=+ )?\d+ (?:passed|failed|skipped)|^missing: |^built")
GRACE_S = 15.0
PASSED, FAILED, SKIPPED, OVERRAN = "passed", "failed", "skipped", "overran"


@dataclass(frozen=True)
class Ended:
    """How a command ended; ``status`` None: it was killed at its budget."""

    status: int | None
    seconds: float
    tail: list[str]

    def last(self, pattern: str) -> str:
        """Last line of the tail that matches, empty without one."""
        return next((line for line in reversed(self.tail) if re.search(pattern, line)), "")


@dataclass
class Outcome:
    """What one stage came to. ``figures`` go into the table, ``result`` into the JSON."""

    status: str
    note: str = ""
    figures: list[str] = field(default_factory=list)
    result: Json | None = None


def say(line: str) -> None:
    """A progress line, at once."""
    print(line, flush=True)


class Runner:
    """Runs commands one after the other. Main thread only."""

    def __init__(self, log: Path, env: dict[str, str], cwd: Path) -> None:
        self._log, self._env, self._cwd = log, env, cwd

    def note(self, text: str) -> None:
        """Add to the log."""
        with self._log.open("a", errors="replace") as out:
            out.write(text.rstrip("\n") + "\n")

    def run(self, command: list[str], budget_s: float, env: dict[str, str] | None = None) -> Ended:
        """Run to the end or the budget; what it started goes with it."""
        self.note(f"$ {' '.join(command)}   (budget {budget_s:.0f} s)")
        start = time.monotonic()
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            env=self._env | (env or {}),
            cwd=self._cwd,
            start_new_session=True,
        )
        tail: deque[str] = deque(maxlen=80)
        reader = threading.Thread(target=self._read, args=(process, tail), daemon=True)
        reader.start()
        status: int | None
        try:
            status = process.wait(max(budget_s, 0.1))
        except subprocess.TimeoutExpired:
            status = None
        finally:
            end_tree(process)
        reader.join(5.0)
        return Ended(status, time.monotonic() - start, list(tail))

    def _read(self, process: subprocess.Popen[str], tail: deque[str]) -> None:
        assert process.stdout is not None
        with self._log.open("a", errors="replace") as out:
            for line in process.stdout:
                out.write(line)
                out.flush()
                tail.append(line.rstrip("\n"))
                if PROGRESS.search(line):
                    say("      " + line.rstrip("\n"))


def descendants(pid: int) -> list[int]:
    """Process ids below ``pid``, from /proc; sessions of their own included."""
    children: dict[int, list[int]] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError, IndexError, ValueError):
                parent = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
                children.setdefault(parent, []).append(int(entry.name))
    found, stack = [], [pid]
    while stack:
        below = children.get(stack.pop(), [])
        found += below
        stack += below
    return found


def end_tree(process: subprocess.Popen[Any]) -> None:
    """Ask a command that still runs to end, then kill it and all it started. Idempotent."""
    below = descendants(process.pid) if process.poll() is None else []
    if process.poll() is None:
        process.send_signal(signal.SIGTERM)  # the benchmark driver then ends its engines in order
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(GRACE_S)
    below += descendants(process.pid)
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    for pid in below:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.kill(pid, signal.SIGKILL)
    process.wait(10)


def checkout_site(folder: Path) -> Path:
    """A folder for PYTHONPATH that declares the checkout's vLLM plugin as an install would."""
    info = folder / "kvoffload_checkout-0.0.dist-info"
    info.mkdir(parents=True, exist_ok=True)
    (info / "METADATA").write_text(
        "Metadata-Version: 2.1\nName: kvoffload_checkout\nVersion: 0.0\n"
    )
    (info / "entry_points.txt").write_text(
        "[vllm.general_plugins]\nkvoffload = kvoffload.engines.vllm.plugin:register\n"
    )
    return folder


def has_plugin() -> bool:
    """Whether an installed kvoffload already declares the plugin to this Python."""
    from importlib.metadata import entry_points

    found = entry_points(group="vllm.general_plugins")
    return any(p.value.startswith("kvoffload.") for p in found)


def python() -> str:
    """The interpreter that runs us; stages use the same."""
    return sys.executable
