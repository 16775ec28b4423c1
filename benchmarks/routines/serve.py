"""``serve``: ``vllm serve`` under streaming OpenAI clients with less HBM than the working set.

Three workloads, closed loop, one server life per system: multi-turn chat (the answer becomes part
of the next prompt), many users of a few shared system prompts, and questions on long documents.
Requests are ordered so that a prefix comes back after others pushed it out of HBM. `none` runs a
second time at the end: the difference between its two lives is the floor for ``wrong_outputs``.

On request two more, in this order: ``shared_cold``, one new prefix after the other, each asked for
by twice as many requests as there are clients, which arrive together; and ``shared_warm``, the same
prefixes again with other endings, when HBM has held others since.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import random
import re
import subprocess
import time
import urllib.request
import uuid
from collections import defaultdict
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
from common import Json, add_times, engine_lock, log_tail, percentiles, stop_group
from context import Context, skip_reason
from lives import LifeFailed, LifeResult, Workplace, base_env, read_probe
from systems import _free_port, running

NAME = "serve"
QUICK_SYSTEMS = ("none", "kvoffload")
BLOCK = 128
READY_S = 240.0
REQUEST_S = 120.0
TOLERANCE = 0.05  # of a logprob, or ten times the floor if that is more
TIERS = re.compile(r'vllm:prompt_tokens_cached_by_source(?:_total)?\{.*source="(\w+)".*\} (\S+)')


def add_options(parser: argparse.ArgumentParser) -> None:
    """Options of this routine."""
    parser.add_argument("--hbm-tokens", type=int, default=16384, help="KV tokens that fit in HBM")
    parser.add_argument("--concurrency", type=int, default=4)
    parser.add_argument("--scale", type=float, default=1.0, help="more sessions per workload")
    parser.add_argument("--output-tokens", type=int, default=32)
    parser.add_argument("--workloads", default="chat,shared_prompt,document_qa")


# -- workloads -------------------------------------------------------------------------------


@dataclass(frozen=True)
class Turn:
    """One request: the session's history, if any, plus ``tokens``."""

    session: int
    number: int
    tokens: tuple[int, ...]
    keep: bool  # prompt and answer become the history of the session's next turn


class Builder:
    """Deterministic workloads from one seed for so many clients; sizes in tokens."""

    def __init__(self, vocab: int, seed: int, scale: float, quick: bool, clients: int) -> None:
        self._rng, self._vocab, self._clients = random.Random(seed), vocab, clients
        self._scale, self._quick = scale, quick
        self._shared: list[tuple[int, ...]] = []

    def _tokens(self, n: int) -> tuple[int, ...]:
        return tuple(self._rng.randrange(3, self._vocab) for _ in range(n))

    def _count(self, n: int) -> int:
        return 2 if self._quick else max(2, round(n * self._scale))

    def _size(self, n: int) -> int:
        return n // 4 if self._quick else n

    def warm(self, clients: int) -> list[Turn]:
        """Unrelated requests of a usual length, two per client; not part of any figure."""
        return [Turn(i, 0, self._tokens(self._size(1024)), False) for i in range(2 * clients)]

    def chat(self) -> list[Turn]:
        """All sessions take turn 0, then all turn 1, ...: history comes back after the others."""
        sessions, turns = self._count(12), 2 if self._quick else 5
        first, more = self._size(1024), self._size(256)
        return [
            Turn(s, t, self._tokens(more if t else first), True)
            for t in range(turns)
            for s in range(sessions)
        ]

    def _common_prefix(self, prefixes: int, length: int, rounds: int, tail: int) -> list[Turn]:
        heads = [self._tokens(length) for _ in range(prefixes)]
        return [
            Turn(r * prefixes + p, 0, heads[p] + self._tokens(tail), False)
            for r in range(rounds)
            for p in range(prefixes)
        ]

    def shared_prompt(self) -> list[Turn]:
        """A few system prompts, many users, in turn."""
        rounds = 2 if self._quick else 10
        return self._common_prefix(self._count(6), self._size(3072), rounds, self._size(128))

    def _together(self, clients: int) -> list[Turn]:
        """Every shared prefix in turn, for all clients at once, twice."""
        if not self._shared:
            self._shared = [self._tokens(self._size(3072)) for _ in range(self._count(8))]
        turns = [head for head in self._shared for _ in range(2 * clients)]
        return [Turn(n, 0, head + self._tokens(128), False) for n, head in enumerate(turns)]

    def shared_cold(self) -> list[Turn]:
        """Prefixes that nobody asked for before, in flight together."""
        return self._together(self._clients)

    def shared_warm(self) -> list[Turn]:
        """The prefixes of ``shared_cold`` once more."""
        return self._together(self._clients)

    def document_qa(self) -> list[Turn]:
        """Long documents, several questions each; a document returns after all others."""
        rounds = 2 if self._quick else 5
        return self._common_prefix(self._count(8), self._size(6144), rounds, self._size(128))


@dataclass
class Answer:
    """What came back for one turn. Times in seconds since the request was sent."""

    times: list[float] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    error: str | None = None


# -- client ----------------------------------------------------------------------------------


async def _chunks(response: Any) -> AsyncIterator[Json]:
    """The JSON events of a server-sent-event stream, up to [DONE]."""
    async for raw in response.content:
        line = raw.decode().strip()
        if not line.startswith("data:"):
            continue
        body = line.removeprefix("data:").strip()
        if body == "[DONE]":
            return
        yield json.loads(body)


class Client:
    """Closed-loop clients of one workload on one server. Event-loop thread only."""

    def __init__(self, base: str, model: str, output_tokens: int) -> None:
        self._url, self._model, self._out = base + "/v1/completions", model, output_tokens
        self._history: dict[int, tuple[int, ...]] = defaultdict(tuple)
        self._turn_done: dict[tuple[int, int], asyncio.Event] = defaultdict(asyncio.Event)
        self.answers: dict[tuple[int, int], Answer] = {}

    async def _ask(self, http: Any, prompt: tuple[int, ...]) -> Answer:
        answer, start = Answer(), time.perf_counter()
        body = {
            "model": self._model,
            "prompt": list(prompt),
            "max_tokens": self._out,
            "temperature": 0.0,
            "ignore_eos": True,
            "logprobs": 1,
            "stream": True,
            "return_token_ids": True,
        }
        try:
            async with http.post(self._url, json=body) as response:
                if response.status != 200:
                    answer.error = f"HTTP {response.status}: {(await response.text())[:200]}"
                    return answer
                async for event in _chunks(response):
                    if "error" in event:
                        answer.error = str(event["error"])[:200]
                    for choice in event.get("choices", ()):
                        ids = choice.get("token_ids") or []
                        add_times(answer.times, time.perf_counter() - start, len(ids))
                        answer.tokens += ids
                        answer.logprobs += (choice.get("logprobs") or {}).get("token_logprobs", [])
        except (OSError, TimeoutError, ValueError) as error:
            answer.error = f"{type(error).__name__}: {error}"
        if answer.error is None and len(answer.tokens) != self._out:
            answer.error = f"{len(answer.tokens)} of {self._out} tokens"
        return answer

    async def _work(self, http: Any, queue: list[Turn]) -> None:
        while queue:
            turn = queue.pop()
            if turn.number:
                await self._turn_done[turn.session, turn.number - 1].wait()
            prompt = self._history[turn.session] + turn.tokens
            answer = await self._ask(http, prompt)
            self.answers[turn.session, turn.number] = answer
            if turn.keep:
                self._history[turn.session] = prompt + tuple(answer.tokens)
            self._turn_done[turn.session, turn.number].set()

    async def run(self, turns: list[Turn], concurrency: int) -> float:
        """Seconds for all turns. Cannot deadlock: turn n-1 of a session is always taken first."""
        import aiohttp

        limit = aiohttp.ClientTimeout(total=REQUEST_S)
        async with aiohttp.ClientSession(timeout=limit, read_bufsize=1 << 20) as http:
            queue, start = list(reversed(turns)), time.perf_counter()
            await asyncio.gather(*(self._work(http, queue) for _ in range(concurrency)))
            return time.perf_counter() - start


# -- server ----------------------------------------------------------------------------------


def _get(url: str) -> str:
    with urllib.request.urlopen(url, timeout=10) as response:
        return str(response.read().decode())


def _hits(base: str) -> dict[str, float]:
    """vLLM's own counters of prefix tokens by the tier that supplied them."""
    return {tier: float(value) for tier, value in TIERS.findall(_get(base + "/metrics"))}


def _arguments(place: Workplace, port: int, transfer: Json | None) -> list[str]:
    out = ["--model", str(place.model), "--served-model-name", "bench", "--port", str(port)]
    out += ["--host", "127.0.0.1", "--dtype", "float32", "--enforce-eager", "--seed", "0"]
    out += ["--disable-uvicorn-access-log"]
    for key, value in place.engine.items():
        out += [f"--{key.replace('_', '-')}", str(value)]
    if transfer is not None:
        out += ["--kv-transfer-config", json.dumps(transfer)]
    return out


@contextlib.contextmanager
def _server(
    place: Workplace, system: str, here: Path
) -> Iterator[tuple[str, subprocess.Popen[Any]]]:
    """A ready server of ``system``: (base URL, process). Raises Skip or LifeFailed."""
    port, log = _free_port(), here / "server.log"
    storage = None if system == "none" else here / "tier"
    with running(system, storage, place.budget, here) as side, log.open("wb") as sink:
        command = [side.python, "-m", "vllm.entrypoints.openai.api_server"]
        process = subprocess.Popen(
            command + _arguments(place, port, side.transfer),
            stdout=sink,
            stderr=subprocess.STDOUT,
            env=base_env(place, here / "probe", side.env),
            start_new_session=True,
        )
        base, deadline = f"http://127.0.0.1:{port}", time.monotonic() + READY_S
        try:
            while True:
                if process.poll() is not None:
                    raise LifeFailed(f"exit status {process.returncode}\n{log_tail(log)}")
                if time.monotonic() > deadline:
                    raise LifeFailed(f"not ready after {READY_S:.0f} s\n{log_tail(log)}")
                with contextlib.suppress(OSError):
                    _get(base + "/health")
                    break
                time.sleep(0.3)
            yield base, process
        finally:
            stop_group(process)
            if place.keep_logs is not None:
                place.keep_logs.mkdir(parents=True, exist_ok=True)
                (place.keep_logs / f"serve-{here.name}.log").write_bytes(log.read_bytes())


@dataclass
class Outcome:
    """One workload on one server life."""

    answers: dict[tuple[int, int], Answer]
    wall_s: float
    hits: dict[str, int]

    def report(self, reference: Outcome | None, tolerance: float) -> Json:
        """The contract's keys for one workload and system."""
        good = [a for a in self.answers.values() if a.error is None]
        gaps = [b - a for r in good for a, b in zip(r.times, r.times[1:], strict=False)]
        errors = [a.error for a in self.answers.values() if a.error is not None]
        return {
            "requests": len(self.answers),
            "ttft_ms": percentiles([a.times[0] * 1e3 for a in good], (50, 95, 99)),
            "itl_ms": percentiles([g * 1e3 for g in gaps], (50, 99)),
            "tokens_per_s": round(sum(len(a.tokens) for a in good) / self.wall_s, 2),
            "wall_s": round(self.wall_s, 2),
            "hit_tokens_by_tier": self.hits,
            "errors": len(errors),
            "first_error": errors[0] if errors else None,
            "wrong_outputs": None if reference is None else self.wrong(reference, tolerance),
        }

    def wrong(self, reference: Outcome, tolerance: float) -> int:
        """Requests answered on both sides whose tokens or logprobs differ."""
        count = 0
        for key, own in self.answers.items():
            other = reference.answers[key]
            if own.error is None and other.error is None:
                count += own.tokens != other.tokens or _delta(own, other) > tolerance
        return count

    def floor(self, other: Outcome) -> float:
        """Largest logprob difference where both lives gave the same tokens."""
        pairs = [(a, other.answers[k]) for k, a in self.answers.items()]
        return max((_delta(a, b) for a, b in pairs if a.tokens == b.tokens), default=0.0)


def _delta(a: Answer, b: Answer) -> float:
    return max((abs(x - y) for x, y in zip(a.logprobs, b.logprobs, strict=False)), default=0.0)


class Run:
    """State of one routine call."""

    def __init__(self, context: Context, options: argparse.Namespace) -> None:
        self.context, self.options = context, options
        builder = Builder(
            context.shape.vocab, options.seed, options.scale, context.quick, options.concurrency
        )
        self.workloads = {n: getattr(builder, n)() for n in options.workloads.split(",")}
        self.warm = builder.warm(options.concurrency)
        self.place = context.workplace(
            {
                "max_model_len": min(context.shape.max_tokens, options.hbm_tokens // 2),
                "max_num_batched_tokens": 2048,
                "max_num_seqs": options.concurrency,
                "num_gpu_blocks_override": options.hbm_tokens // BLOCK,
            },
            hbm_gib=1,
            dram_gib=2.0,
        )

    def life(self, system: str) -> dict[str, Outcome]:
        """One server life through all workloads."""
        self.context.progress(f"{system}: starting the server")
        here = self.place.scratch / f"{system}-{uuid.uuid4().hex[:8]}"
        (here / "probe").mkdir(parents=True)
        outcomes: dict[str, Outcome] = {}
        with (
            engine_lock(self.place.lock, self.place.progress),
            _server(self.place, system, here) as (base, process),
        ):
            self.context.progress(f"{system}: warming up")
            warm = Client(base, "bench", self.options.output_tokens)
            asyncio.run(warm.run(self.warm, self.options.concurrency))
            for name, turns in self.workloads.items():
                self.context.progress(f"{system}: {name}, {len(turns)} requests")
                before, client = _hits(base), Client(base, "bench", self.options.output_tokens)
                wall = asyncio.run(client.run(turns, self.options.concurrency))
                if not psutil.pid_exists(process.pid) or process.poll() is not None:
                    raise LifeFailed(
                        f"the server died during {name}\n{log_tail(here / 'server.log')}"
                    )
                after = _hits(base)
                hits = {t: int(v - before.get(t, 0.0)) for t, v in after.items()}
                outcomes[name] = Outcome(client.answers, wall, hits)
        self.place.same_cores(system, here / "server.log")
        seen = LifeResult(0.0, [])
        read_probe(here / "probe", seen)
        if system != "none" and not seen.probed:
            raise LifeFailed("the connector probe saw no connector in the server's engine")
        return outcomes


def run(context: Context, options: argparse.Namespace) -> Json:
    """All systems in turn, `none` first and once more at the end."""
    if options.quick:
        options.workloads, options.output_tokens, options.concurrency = "chat", 8, 2
        options.hbm_tokens = 4096
    run_ = Run(context, options)
    lives: dict[str, dict[str, Outcome]] = {}
    skipped: dict[str, str] = {}
    order = sorted(context.systems, key=lambda s: s != "none")
    if "none" in order and not options.quick:
        order.append("none again")
    for entry in order:
        with skip_reason(skipped, entry):
            lives[entry] = run_.life(entry.split(" ")[0])
    out: Json = {}
    for name in run_.workloads:
        reference = lives["none"][name] if "none" in lives else None
        again = lives["none again"][name] if "none again" in lives else None
        floor = reference.floor(again) if reference and again else None
        tolerance = max(10 * (floor or 0.0), TOLERANCE)
        reports: Json = {s: {"skipped": why} for s, why in skipped.items()}
        for system, outcomes in lives.items():
            reports[system] = outcomes[name].report(reference, tolerance)
        out[name] = {"floor_dlogprob": floor, "tolerance": tolerance, "systems": reports}
    return {"config": run_.place.describe(), "workloads": out}


def table(result: Json) -> tuple[list[str], list[list[str]]]:
    """Header and rows of the final table."""
    rows = []
    for name, workload in result["workloads"].items():
        for system, f in workload["systems"].items():
            if "skipped" in f:
                rows.append([name, system, f["skipped"][:60]])
                continue
            ttft, itl = f["ttft_ms"] or {}, f["itl_ms"] or {}
            cells = [f"{ttft.get(p, float('nan')):.0f}" for p in ("p50", "p95")]
            cells += [f"{itl.get('p50', float('nan')):.1f}", f"{f['tokens_per_s']:.1f}"]
            hits = " ".join(f"{t}:{n}" for t, n in f["hit_tokens_by_tier"].items() if n)
            rows.append([name, system, *cells, hits, str(f["errors"]), str(f["wrong_outputs"])])
    head = ["workload", "system", "TTFT p50", "p95", "ITL p50", "tok/s", "hit tokens"]
    return [*head, "errors", "wrong"], rows
