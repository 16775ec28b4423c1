#!/usr/bin/env python3
"""Measure what a returning prompt costs: cold, HBM hit, DRAM reload, NVMe reload after a restart.

Normally run by scripts/demo.sh, which prepares the environment and cleans up after it. Writes
``result.json`` and the server's log into ``--out`` and prints a table.

Exit status: 0 all outputs equal and (with kvoffload) every reload came from its tier, 1 otherwise.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import json
import os
import random
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NoReturn

import httpx
from prometheus_client.parser import text_string_to_metric_families
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from tokenizers import Tokenizer

Samples = dict[tuple[str, frozenset[tuple[str, str]]], float]  # (name, labels) -> value
MODEL_NAME = "demo"
CONSOLE = Console(width=None if sys.stdout.isatty() else 110)
START_TIMEOUT_S = 240
STOP_TIMEOUT_S = 60
FLUSH_TIMEOUT_S = 60
STEPS = ("cold", "hbm", "dram", "nvme")
TITLES = {
    "cold": "cold (computed)",
    "hbm": "HBM hit",
    "dram": "DRAM reload",
    "nvme": "NVMe reload after restart",
}


@dataclass
class Answer:
    """One streamed completion. Times in milliseconds, measured here at the client."""

    ttft_ms: float
    total_ms: float
    text: str
    prompt_tokens: int
    cached_tokens: int


@dataclass
class Step:
    """All prompts once, in one state of the caches."""

    name: str
    answers: list[Answer] = field(default_factory=list)
    loaded: dict[str, int] = field(default_factory=dict)  # tier -> tokens, by /metrics

    @property
    def ttft_ms(self) -> float:
        """Median time to first token."""
        return statistics.median(a.ttft_ms for a in self.answers)


# -- server ----------------------------------------------------------------


def _die_with_parent() -> None:
    """In the child: SIGTERM when this script dies, however it dies (Linux)."""
    ctypes.CDLL(None, use_errno=True).prctl(1, signal.SIGTERM)


class Server:
    """One life of vLLM's OpenAI-compatible server on loopback, in a process group of its own."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.log = args.out / "server.log"
        self.pid_file = args.out / "server.pid"
        self.port = _free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.command = _command(args, self.port)
        self.client = httpx.Client(base_url=self.url, timeout=120, trust_env=False)
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> float:
        """Start and wait for /health; returns seconds. Raises RuntimeError with the log's tail."""
        env = os.environ | {
            "VLLM_SERVER_DEV_MODE": "1",  # /reset_prefix_cache
            "VLLM_NO_USAGE_STATS": "1",
            "DO_NOT_TRACK": "1",
            "HF_HUB_OFFLINE": "1",
            "VLLM_CPU_KVCACHE_SPACE": os.environ.get("VLLM_CPU_KVCACHE_SPACE", "1"),
        }
        begin = time.monotonic()
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                self.command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=env,
                start_new_session=True,
                preexec_fn=_die_with_parent,
            )
        self.pid_file.write_text(str(self.process.pid))
        while time.monotonic() - begin < START_TIMEOUT_S:
            if self.process.poll() is not None:
                self._give_up(f"the server ended with status {self.process.returncode}")
            with contextlib.suppress(httpx.HTTPError):
                if self.client.get("/health", timeout=2).status_code == 200:
                    return time.monotonic() - begin
            time.sleep(0.5)
        self._give_up(f"the server was not ready after {START_TIMEOUT_S} s")

    def stop(self, grace_s: float = STOP_TIMEOUT_S) -> None:
        """SIGTERM, wait ``grace_s``, then SIGKILL whatever is left of the group. Idempotent."""
        process, self.process = self.process, None
        if process is None:
            return
        with contextlib.suppress(ProcessLookupError, subprocess.TimeoutExpired):
            process.terminate()
            process.wait(grace_s)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        self.pid_file.unlink(missing_ok=True)

    def complete(self, prompt: str, max_tokens: int) -> Answer:
        """One greedy streamed completion."""
        body = {
            "model": MODEL_NAME,
            "prompt": prompt,
            "max_tokens": max_tokens,
            "temperature": 0,
            "seed": 0,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        begin = time.perf_counter()
        first, text = 0.0, []
        usage: dict[str, Any] = {}
        with self.client.stream("POST", "/v1/completions", json=body) as response:
            if response.status_code != 200:
                raise RuntimeError(f"the server said {response.status_code}: {response.read()!r}")
            for event in _events(response):
                if event.get("choices"):
                    first = first or time.perf_counter()
                    text.append(event["choices"][0]["text"])
                usage = event.get("usage") or usage
        end = time.perf_counter()
        details = usage.get("prompt_tokens_details") or {}
        return Answer(
            ttft_ms=(first - begin) * 1e3,
            total_ms=(end - begin) * 1e3,
            text="".join(text),
            prompt_tokens=usage.get("prompt_tokens", 0),
            cached_tokens=details.get("cached_tokens") or 0,
        )

    def reset_hbm(self) -> None:
        """Empty the prefix cache in HBM only; waits while blocks are still being stored."""
        deadline = time.monotonic() + 30
        while time.monotonic() < deadline:
            answer = self.client.post("/reset_prefix_cache")
            answer.raise_for_status()
            if answer.json()["success"]:
                return
            time.sleep(0.2)
        raise RuntimeError("the server did not reset its prefix cache within 30 s")

    def metrics(self) -> Samples:
        """(name, labels) -> value of every sample."""
        text = self.client.get("/metrics").text
        return {
            (s.name, frozenset(s.labels.items())): s.value
            for family in text_string_to_metric_families(text)
            for s in family.samples
        }

    def _give_up(self, reason: str) -> NoReturn:
        self.stop()
        tail = "\n".join(self.log.read_text(errors="replace").splitlines()[-30:])
        raise RuntimeError(f"{reason}; the end of {self.log}:\n{tail}")


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def _command(args: argparse.Namespace, port: int) -> list[str]:
    # `vllm serve` runs this same module; the CPU wheel's `vllm` command does not start.
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server"]
    command += ["--model", str(args.model), "--served-model-name", MODEL_NAME]
    command += ["--host", "127.0.0.1", "--port", str(port)]
    command += ["--dtype", args.dtype, "--max-model-len", "8192", "--enforce-eager"]
    command += ["--enable-prompt-tokens-details"]
    if args.system == "kvoffload":
        extra = {
            "dram_gib": args.dram_gib,
            "nvme_path": str(args.out / "store"),
            "nvme_gib": args.nvme_gib,
            "nvme_write_tb_per_day": 1000,  # the demo writes once: no endurance budget in its way
        }
        transfer = {
            "kv_connector": "KVOffloadConnector",
            "kv_role": "kv_both",
            "kv_connector_extra_config": extra,
        }
        command += ["--kv-transfer-config", json.dumps(transfer)]
    return command


def _events(response: httpx.Response) -> Iterator[dict[str, Any]]:
    for line in response.iter_lines():
        if line.startswith("data: ") and line != "data: [DONE]":
            event: dict[str, Any] = json.loads(line[6:])
            if "error" in event:
                raise RuntimeError(f"the server said: {event['error']}")
            yield event


# -- prompts ----------------------------------------------------------------

_SUBJECTS = "river bridge market garden engine harbour library mountain railway orchard".split()
_VERBS = "crosses feeds follows measures repairs records watches carries opens divides".split()
_PLACES = "valley village station island meadow quarry lighthouse workshop reservoir".split()
_QUALITIES = "narrow copper northern patient seasonal public quiet weathered steep busy".split()


def make_prompts(model: Path, count: int, tokens: int) -> list[str]:
    """``count`` different deterministic texts of about ``tokens`` tokens each."""
    tokenizer = Tokenizer.from_file(str(model / "tokenizer.json"))
    return [_prompt(random.Random(1000 + i), tokenizer, i, tokens) for i in range(count)]


def _prompt(rng: random.Random, tokenizer: Tokenizer, number: int, tokens: int) -> str:
    head = f"Report number {number + 1} of the district survey.\n"
    tail = "\nIn one sentence, the report says that"
    used = len(tokenizer.encode(head + tail).ids)
    lines = [head]
    for entry in range(1, tokens):
        line = (
            f"Entry {entry}: the {rng.choice(_QUALITIES)} {rng.choice(_SUBJECTS)} "
            f"{rng.choice(_VERBS)} the {rng.choice(_QUALITIES)} {rng.choice(_PLACES)}, "
            f"{rng.randrange(2, 90)} paces from the {rng.choice(_SUBJECTS)}.\n"
        )
        used += len(tokenizer.encode(line).ids)
        if used > tokens:
            break
        lines.append(line)
    return "".join(lines) + tail


# -- metrics ----------------------------------------------------------------


def loaded_tokens(samples: Samples) -> dict[str, int]:
    """Prompt tokens taken from each place so far: "hbm" by vLLM's counter, tiers by kvoffload's."""
    found: dict[str, float] = {}
    for (name, labels), value in samples.items():
        if name == "vllm:prefix_cache_hits_total":
            place = "hbm"
        elif name == "vllm:external_prefix_cache_hits_total":
            place = "external"  # all tiers together, as vLLM counts it
        elif name == "kvoffload_hit_tokens_total":
            place = dict(labels)["tier"]
        elif name == "kvoffload_loaded_tokens_total":
            place = "loaded"  # all tiers together, only loads that succeeded
        else:
            continue
        found[place] = found.get(place, 0.0) + value
    return {place: int(tokens) for place, tokens in found.items()}


def difference(after: dict[str, int], before: dict[str, int]) -> dict[str, int]:
    """Per place; only what grew."""
    grown = {place: tokens - before.get(place, 0) for place, tokens in after.items()}
    return {place: tokens for place, tokens in grown.items() if tokens > 0}


def wait_written(server: Server) -> float:
    """Wait until every chunk in DRAM is on NVMe too, or nothing moves for 15 s; returns seconds."""
    begin = since = time.monotonic()
    last: dict[str, float] = {}
    while time.monotonic() - begin < FLUSH_TIMEOUT_S:
        server.complete("ping", 1)  # an idle engine takes no steps and publishes no counters
        entries = {
            dict(labels)["tier"]: value
            for (name, labels), value in server.metrics().items()
            if name == "kvoffload_entries"
        }
        if 0 < entries.get("dram", 0) <= entries.get("nvme", 0):
            break
        if entries != last:
            last, since = entries, time.monotonic()
        if time.monotonic() - since > 15:
            break
        time.sleep(0.5)
    return time.monotonic() - begin


def drop_page_cache(store: Path) -> str:
    """Make the next reads of the store's files come from the device; says which way worked."""
    files = [p for p in store.rglob("*") if p.is_file()] if store.is_dir() else []
    if not files:
        return "no store files"
    for path in files:
        fd = os.open(path, os.O_RDONLY)
        try:
            os.fsync(fd)  # dirty pages would stay
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(fd)
    try:
        Path("/proc/sys/vm/drop_caches").write_text("1\n")
    except OSError:
        return f"posix_fadvise on {len(files)} files"
    return f"posix_fadvise on {len(files)} files and drop_caches"


# -- the demo ----------------------------------------------------------------


class Demo:
    """Runs the four steps and keeps what they measured."""

    def __init__(self, args: argparse.Namespace, progress: Progress) -> None:
        self.args = args
        self.progress = progress
        self.prompts = make_prompts(args.model, args.prompts, args.tokens)
        self.steps: list[Step] = []
        self.notes: dict[str, Any] = {}
        self.server = Server(args)

    def run(self) -> None:
        """Everything, in order; the server is stopped whatever happens."""
        try:
            self._start("starting vLLM")
            self._step("cold")
            self._step("hbm")
            self.server.reset_hbm()
            self._step("dram")
            if self.args.system == "kvoffload":
                task = self.progress.add_task("writing behind to NVMe", total=None)
                self.notes["write_behind_wait_s"] = round(wait_written(self.server), 2)
                self.progress.update(task, total=1, completed=1)
            self._restart()
            self._step("nvme")
        finally:
            self.server.stop(grace_s=5)  # nothing left to keep; a server that starts is slow to go

    def _start(self, title: str) -> None:
        task = self.progress.add_task(title, total=None)
        self.notes.setdefault("start_s", []).append(round(self.server.start(), 1))
        # An unrelated request first: it pays for what any first request of a process pays for.
        warm_up = make_prompts(self.args.model, self.args.prompts + 1, 300)[-1]
        self.server.complete(warm_up[::-1], 4)
        self.progress.update(task, total=1, completed=1)

    def _restart(self) -> None:
        task = self.progress.add_task("stopping vLLM, dropping the page cache", total=None)
        self.server.stop()
        self.notes["page_cache"] = drop_page_cache(self.args.out / "store")
        self.progress.update(task, total=1, completed=1)
        self.server = Server(self.args)
        self._start("starting vLLM again")

    def _step(self, name: str) -> None:
        step = Step(name)
        before = loaded_tokens(self.server.metrics())
        task = self.progress.add_task(TITLES[name], total=len(self.prompts))
        for prompt in self.prompts:
            step.answers.append(self.server.complete(prompt, self.args.max_tokens))
            self.progress.advance(task)
        time.sleep(0.5)  # the server publishes a step's counters after its last token
        step.loaded = difference(loaded_tokens(self.server.metrics()), before)
        self.steps.append(step)

    # -- judgement

    def equal(self, step: Step) -> bool:
        """Same text as the cold run, prompt by prompt."""
        return _same_texts(step, self.steps[0])

    def same_output(self, step: Step) -> str:
        """The table's word for it."""
        if self.equal(step):
            return "yes"
        if step.name == "hbm" or _same_texts(step, self.steps[1]):
            return "as HBM hit"  # vLLM's own hit rounds differently from its cold run
        return "NO"

    def problems(self) -> list[str]:
        """What did not go as the demo promises; empty when all is well."""
        found = [
            f"{TITLES[s.name]}: output differs" for s in self.steps if self.same_output(s) == "NO"
        ]
        if self.args.system == "kvoffload":
            found += [
                f"{TITLES[s.name]}: nothing was loaded from {s.name.upper()}"
                for s in self.steps[2:]
                if not s.loaded.get(s.name)
            ]
        return found

    def table(self) -> Table:
        """The closing table."""
        cold = self.steps[0].ttft_ms
        tokens = statistics.median(a.prompt_tokens for a in self.steps[0].answers)
        table = Table(title=f"{len(self.prompts)} prompts of {tokens:.0f} tokens, SmolLM2-135M")
        table.add_column("state of the caches", no_wrap=True)
        for title in ("ms", "speed", "HBM", "DRAM", "NVMe", "same output"):
            table.add_column(title, justify="right", no_wrap=True)
        for step in self.steps:
            cells = [f"{step.loaded.get(place, 0):,}" for place in ("hbm", "dram", "nvme")]
            speed = f"{cold / step.ttft_ms:.1f}x"
            name, first = TITLES[step.name], f"{step.ttft_ms:,.0f}"
            table.add_row(name, first, speed, *cells, self.same_output(step))
        table.caption = (
            "ms: to the first token, median. HBM, DRAM, NVMe: prompt tokens taken from there."
        )
        return table

    def result(self) -> dict[str, Any]:
        """The JSON form."""
        return {
            "schema": "kvoffload-demo/1",
            "system": self.args.system,
            "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            "machine": {"cpus": os.cpu_count(), "kernel": os.uname().release},
            "versions": _versions(),
            "prompt_tokens": [a.prompt_tokens for a in self.steps[0].answers],
            "max_tokens": self.args.max_tokens,
            "dtype": self.args.dtype,
            "problems": self.problems(),
            **self.notes,
            "steps": [
                asdict(step)
                | {
                    "ttft_ms_median": step.ttft_ms,
                    "outputs_equal": self.equal(step),
                    "outputs_equal_to_hbm_hit": _same_texts(step, self.steps[1]),
                }
                for step in self.steps
            ],
        }


def _same_texts(one: Step, other: Step) -> bool:
    return [a.text for a in one.answers] == [a.text for a in other.answers]


def _versions() -> dict[str, str]:
    from importlib.metadata import PackageNotFoundError, version

    found = {"python": sys.version.split()[0]}
    for name in ("kvoffload", "vllm", "vllm-cpu", "torch"):
        with contextlib.suppress(PackageNotFoundError):
            found[name] = version(name)
    return found


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("demo-out"), help="store, log and result")
    parser.add_argument("--model", type=Path, required=True, help="model directory")
    parser.add_argument("--system", choices=("kvoffload", "none"), default="kvoffload")
    parser.add_argument("--prompts", type=int, default=3, help="how many different prompts")
    parser.add_argument("--tokens", type=int, default=3500, help="tokens per prompt")
    parser.add_argument("--max-tokens", type=int, default=16, help="tokens generated per prompt")
    # In bf16 vLLM's own prefix hit already rounds differently from a cold run and may change words.
    gpu = shutil.which("nvidia-smi") is not None
    dtype = "bfloat16" if gpu else "float32"
    parser.add_argument(
        "--dtype", default=dtype, help="computation and KV; default here: %(default)s"
    )
    parser.add_argument("--dram-gib", type=float, default=1.0)
    parser.add_argument("--nvme-gib", type=float, default=2.0)
    args = parser.parse_args()
    if args.prompts < 1 or not 200 <= args.tokens <= 8000:
        parser.error("--prompts must be at least 1 and --tokens between 200 and 8000")
    args.out = args.out.resolve()
    return args


def _interrupted(number: int, frame: object) -> NoReturn:
    # Also needed for SIGINT: a background job of a shell starts with it ignored.
    signal.signal(number, signal.SIG_IGN)
    raise SystemExit(128 + number)


def main() -> int:
    """Command line entry."""
    args = _parse()
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, _interrupted)
    args.out.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(args.out / "store", ignore_errors=True)  # an earlier run's: cold must be cold
    (args.out / "server.log").unlink(missing_ok=True)
    columns = (TextColumn("{task.description:<40}"), BarColumn(), TimeElapsedColumn())
    try:
        with Progress(*columns, console=CONSOLE) as progress:
            demo = Demo(args, progress)
            demo.run()
    except (RuntimeError, OSError, httpx.HTTPError) as error:
        CONSOLE.print(f"demo failed: {error}", style="red", markup=False)
        return 1
    (args.out / "result.json").write_text(json.dumps(demo.result(), indent=2))
    CONSOLE.print(demo.table())
    CONSOLE.print(f"details: {args.out / 'result.json'}; server log: {args.out / 'server.log'}")
    for problem in demo.problems():
        CONSOLE.print(f"problem: {problem}", style="red", markup=False)
    return 1 if demo.problems() else 0


if __name__ == "__main__":
    sys.exit(main())
