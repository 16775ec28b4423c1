"""What the driver hands to a routine."""

from __future__ import annotations

import contextlib
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from common import BENCH, ROOT, Json, Skip
from lives import LifeFailed, Workplace
from model import ModelShape
from systems import Budget


@dataclass
class Context:
    """One driver call. ``progress`` shows a line; ``page_cache`` says how it was dropped."""

    scratch: Path
    systems: list[str]
    progress: Any
    quick: bool
    lock: str | None = None
    keep_logs: Path | None = None
    page_cache: str = "not dropped"
    shape: ModelShape = field(default_factory=ModelShape)

    def model(self) -> Path:
        """The KV-sensitive model of this run, made on first use in a process of its own."""
        where = self.scratch / "model"
        if not where.exists():
            self.progress("making the model")
            command = [sys.executable, str(BENCH / "model.py"), str(where)]
            command.append(json.dumps(asdict(self.shape)))
            done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
            if done.returncode:
                raise RuntimeError(f"cannot make the model: {done.stderr[-800:]}")
        return where

    def workplace(self, engine: Json, hbm_gib: int, dram_gib: float) -> Workplace:
        """Settings that all engine lives of this run share."""
        budget = replace(Budget(), dram_gib=dram_gib)
        return Workplace(
            scratch=self.scratch,
            model=self.model(),
            engine=engine,
            budget=budget,
            hbm_gib=hbm_gib,
            lock=self.lock,
            keep_logs=self.keep_logs,
            progress=self.progress,
        )


def portable(text: str) -> str:
    """``text`` without this machine's folders: results are kept and published."""
    for folder, name in ((str(ROOT), "."), (tempfile.gettempdir(), "TMP"), (sys.base_prefix, "PY")):
        text = text.replace(folder, name)
    return text


def _short(error: LifeFailed) -> str:
    """First line and the last that names an error; the whole log end goes to stderr."""
    print(error, file=sys.stderr)
    first, *rest = str(error).splitlines()
    named = [line.strip() for line in rest if re.search(r"\b\w*(Error|Exception)\b", line)]
    return f"engine life failed: {first}; {named[-1][:300] if named else 'no error in the log'}"


@contextlib.contextmanager
def skip_reason(into: dict[str, str], system: str) -> Iterator[None]:
    """A system that cannot run, or whose engine died, becomes its reason, never silence."""
    try:
        yield
    except Skip as error:
        into[system] = portable(str(error))
    except LifeFailed as error:
        into[system] = portable(_short(error))
