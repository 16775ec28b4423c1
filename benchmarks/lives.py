"""Runs engine lives in child processes and reads back what they and the probe saw."""

from __future__ import annotations

import contextlib
import json
import os
import re
import select
import signal
import subprocess
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
from common import BENCH, Json, Skip, engine_lock, log_tail, stop_group
from systems import Budget, running

# The same for every system: eager fp32, one sequence of chunks big enough for a whole prompt.
ENGINE: Json = {
    "dtype": "float32",
    "enforce_eager": True,
    "skip_tokenizer_init": True,
    "disable_log_stats": True,
    "seed": 0,
}


# vLLM's CPU worker leaves one core free without a connector, two with one, and none at all where
# that would be every core: on two cores a connector's engine would compute on twice the cores.
RESERVED_CPUS = 2 if len(os.sched_getaffinity(0)) > 2 else 1
CORES = re.compile(r"local_rank=0, core ids=(\[[^\]]*\])")


class LifeFailed(Exception):
    """The child ended without a result; the message holds the end of its log."""


@dataclass(frozen=True)
class Workplace:
    """What all lives of one run share."""

    scratch: Path
    model: Path
    engine: Json
    budget: Budget
    hbm_gib: int = 1
    lock: str | None = None
    timeout_s: float = 900.0
    keep_logs: Path | None = None
    progress: Callable[[str], None] = print
    cores: dict[str, str] = field(default_factory=dict)

    def describe(self) -> Json:
        """What a result's ``config`` says about the engines."""
        engine = ENGINE | self.engine
        budget = {"hbm_gib": self.hbm_gib, "dram_gib": self.budget.dram_gib}
        cores = {"reserved_cpus": RESERVED_CPUS, "worker_cores": sorted(set(self.cores.values()))}
        return {"engine": engine, "nvme_gib": self.budget.nvme_gib} | budget | cores

    def same_cores(self, system: str, log: Path) -> None:
        """Note what cores the engine computed on. Raises LifeFailed when another system had others.

        Without this a change of vLLM's thread binding would pass for an effect of a connector.
        """
        found = CORES.search(log.read_text(errors="replace"))
        self.cores[system] = found.group(1) if found else "not bound"
        if len(set(self.cores.values())) > 1:
            raise LifeFailed(f"engines ran on different cores: {self.cores}")


@dataclass
class LifeResult:
    """Ops' results plus the probe's events: loads by request id, ns per step."""

    ready_s: float
    ops: list[Json]
    loads: dict[str, list[Json]] = field(default_factory=dict)
    step_ns: list[int] = field(default_factory=list)
    probed: bool = False

    def load_of(self, request: str) -> Json | None:
        """First load event of a client request; vLLM appends a suffix to the client's id."""
        for name, events in self.loads.items():
            if name == request or name.startswith(request + "-"):
                return events[0]
        return None


def base_env(place: Workplace, probe: Path, system_env: dict[str, str]) -> dict[str, str]:
    """Environment of an engine process: offline, quiet, probed."""
    quiet = {
        "VLLM_CPU_KVCACHE_SPACE": str(place.hbm_gib),
        "VLLM_LOGGING_LEVEL": "INFO",
        "VLLM_CPU_NUM_OF_RESERVED_CPU": str(RESERVED_CPUS),
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",
        "TRANSFORMERS_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "KVBENCH_PROBE": str(probe),
    }
    return dict(os.environ) | quiet | system_env


def read_probe(folder: Path, into: LifeResult) -> None:
    """Add all events below ``folder``."""
    for file in sorted(folder.glob("*.jsonl")):
        for line in file.read_text().splitlines():
            event = json.loads(line)
            into.probed = True
            if event["ev"] == "load":
                into.loads.setdefault(event["req"], []).append(event)
            elif event["ev"] == "steps":
                into.step_ns += event["ns"]


def _child(place: Workplace, python: str, env: dict[str, str], plan: Json, here: Path) -> Json:
    (here / "plan.json").write_text(json.dumps(plan))
    log, out = here / "engine.log", here / "out.json"
    with log.open("wb") as sink:
        process = subprocess.Popen(
            [python, str(BENCH / "life.py"), str(here / "plan.json"), str(out)],
            stdout=sink,
            stderr=subprocess.STDOUT,
            env=env,
            start_new_session=True,
        )
        try:
            process.wait(place.timeout_s)
        except subprocess.TimeoutExpired:
            raise LifeFailed(f"no end after {place.timeout_s:.0f} s\n{log_tail(log)}") from None
        finally:
            stop_group(process)
            if place.keep_logs is not None:
                place.keep_logs.mkdir(parents=True, exist_ok=True)
                (place.keep_logs / f"{here.name}.log").write_bytes(log.read_bytes())
    if not out.exists():
        raise LifeFailed(f"exit status {process.returncode}\n{log_tail(log)}")
    return dict(json.loads(out.read_text()))


class Live:
    """An engine that is told one op at a time and can be stopped in between.

    Two of them share a machine by turns: a paused one (SIGSTOP, its whole process group) takes no
    CPU. One thread only.
    """

    def __init__(
        self, place: Workplace, python: str, env: dict[str, str], plan: Json, here: Path
    ) -> None:
        self._log, self._limit_s, self._keep = here / "engine.log", place.timeout_s, place.keep_logs
        (there, tell), (hear, back) = os.pipe(), os.pipe()
        plan_file = here / "plan.json"
        plan_file.write_text(json.dumps(plan | {"talk": [there, back]}))
        with self._log.open("wb") as sink:
            self._process = subprocess.Popen(
                [python, str(BENCH / "life.py"), str(plan_file), str(here / "out.json")],
                stdout=sink,
                stderr=subprocess.STDOUT,
                env=env,
                start_new_session=True,
                pass_fds=(there, back),
            )
        os.close(there)
        os.close(back)
        self._tell, self._hear = os.fdopen(tell, "w", buffering=1), os.fdopen(hear, "rb")
        try:
            self.ready_s = float(self._answer()["ready_s"])
        except BaseException:
            self.stop()
            raise

    @property
    def log(self) -> Path:
        """The engine's log so far."""
        return self._log

    def pids(self) -> list[int]:
        """All processes of the life."""
        root = psutil.Process(self._process.pid)
        return [root.pid, *(p.pid for p in root.children(recursive=True))]

    def ask(self, op: Json) -> Json:
        """Do an op and return its result. Raises LifeFailed when the engine process is gone."""
        try:
            self._tell.write(json.dumps(op) + "\n")
        except BrokenPipeError:
            raise LifeFailed(f"the life ended\n{log_tail(self._log)}") from None
        return self._answer()

    def _answer(self) -> Json:
        if not select.select([self._hear], [], [], self._limit_s)[0]:
            raise LifeFailed(f"no answer in {self._limit_s:.0f} s\n{log_tail(self._log)}")
        line = self._hear.readline()
        if not line:
            raise LifeFailed(f"the life ended\n{log_tail(self._log)}")
        return dict(json.loads(line))

    def pause(self) -> None:
        """Stop the process group where it stands; between two ops only."""
        os.killpg(self._process.pid, signal.SIGSTOP)

    def resume(self) -> None:
        """Let it go on."""
        os.killpg(self._process.pid, signal.SIGCONT)

    def stop(self) -> None:
        """Let it shut down, then end whatever is left of it. Idempotent."""
        with contextlib.suppress(ProcessLookupError):
            self.resume()
        with contextlib.suppress(OSError):
            self._tell.close()  # the end of its ops: it shuts its engine down
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(30)
        stop_group(self._process)
        self._hear.close()
        if self._keep is not None:
            self._keep.mkdir(parents=True, exist_ok=True)
            (self._keep / f"{self._log.parent.name}.log").write_bytes(self._log.read_bytes())


@contextlib.contextmanager
def live(
    place: Workplace,
    system: str,
    prompts: dict[str, list[int]],
    storage: Path | None,
    extra: Json | None = None,
    env: dict[str, str] | None = None,
) -> Iterator[Live]:
    """A ready ``Live`` of ``system``. ``extra`` is added to its connector's settings, ``env`` to
    its environment. The caller holds the engine lock. Raises Skip or LifeFailed."""
    here = place.scratch / f"{system}-{uuid.uuid4().hex[:8]}"
    (here / "probe").mkdir(parents=True)
    with running(system, storage, place.budget, here) as side:
        engine: dict[str, Any] = ENGINE | {"model": str(place.model)} | place.engine
        if side.transfer is not None:
            side.transfer["kv_connector_extra_config"] |= extra or {}
            engine["kv_transfer_config"] = side.transfer
        around = base_env(place, here / "probe", side.env | (env or {}))
        made = Live(place, side.python, around, {"engine": engine, "prompts": prompts}, here)
        try:
            place.same_cores(system, made.log)
            yield made
        finally:
            made.stop()


def run_life(
    place: Workplace,
    system: str,
    ops: list[Json],
    prompts: dict[str, list[int]],
    storage: Path | None,
) -> LifeResult:
    """One engine life of ``system``. Raises Skip (cannot run here) or LifeFailed."""
    here = place.scratch / f"{system}-{uuid.uuid4().hex[:8]}"
    probe = here / "probe"
    probe.mkdir(parents=True)
    used = {name for op in ops for name in [*op.get("prompts", []), op.get("prompt")] if name}
    with (
        engine_lock(place.lock, place.progress),
        running(system, storage, place.budget, here) as side,
    ):
        engine: dict[str, Any] = ENGINE | {"model": str(place.model)} | place.engine
        if side.transfer is not None:
            engine["kv_transfer_config"] = side.transfer
        plan: Json = {
            "engine": engine,
            "ops": ops,
            "prompts": {name: prompts[name] for name in used},
            "extra_pids": [side.server_pid] if side.server_pid else [],
        }
        raw = _child(place, side.python, base_env(place, probe, side.env), plan, here)
    place.same_cores(system, here / "engine.log")
    result = LifeResult(raw["ready_s"], raw["ops"])
    read_probe(probe, result)
    if system != "none" and not result.probed:
        raise LifeFailed("the connector probe saw no connector in the engine process")
    return result


__all__ = [
    "LifeFailed",
    "LifeResult",
    "Live",
    "Skip",
    "Workplace",
    "live",
    "read_probe",
    "run_life",
]
