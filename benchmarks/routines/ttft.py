"""``ttft``: time to first token of a long prompt, cold and from every tier, system beside system.

Per round and system two engine lives: the first takes every prompt cold, again from HBM, then from
DRAM after the HBM prefix cache was reset, and waits for the write-behind; the second, after the
page cache was dropped, takes the same prompts from NVMe. Systems alternate within a round, and the
next round takes them the other way round, so that drift favours none of them. Every request
streams 8 greedy tokens with logprobs, so that the very reload that was timed is also the one whose
output is compared with the cold run without a connector.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import time
from collections import defaultdict
from dataclasses import dataclass, field, replace
from pathlib import Path

from common import DirectFile, Json, Skip, drop_page_cache, quantile, summary
from context import Context, skip_reason
from lives import LifeResult, Workplace, run_life
from model import SHAPES
from systems import SYSTEMS

NAME = "ttft"
BLOCK = 128  # vLLM's block on CPU; aligned prompts end on a block
PHASES = ("cold", "hbm", "dram", "nvme_restart")
OUTPUT_TOKENS = 8
LIMIT_DEPTHS = (1, 2, 4, 8)


def add_options(parser: argparse.ArgumentParser) -> None:
    """Options of this routine."""
    parser.add_argument("--prompt-tokens", type=int, default=4096, help="rounded to a whole block")
    parser.add_argument("--long-tokens", type=int, default=8064, help="second length, 0: none")
    parser.add_argument("--unaligned", type=int, default=57, help="third length: N + this, 0: none")
    parser.add_argument("--repeats", type=int, default=10, help="prompts per length and system")
    parser.add_argument("--lives", type=int, default=2, help="rounds the prompts are spread over")
    parser.add_argument("--lengths", help="comma-separated, instead of the three lengths above")
    parser.add_argument("--shape", choices=sorted(SHAPES), default="tiny")
    parser.add_argument("--engine", default="{}", help="JSON of more engine arguments")
    parser.add_argument("--no-nvme", action="store_true", help="DRAM tier only")
    parser.add_argument("--deadline-s", type=float, default=0.0, help="start no life beyond")


@dataclass
class Samples:
    """What one system did at one length, over all rounds."""

    ms: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))
    by_round: dict[str, dict[int, list[float]]] = field(
        default_factory=lambda: defaultdict(lambda: defaultdict(list))
    )
    load_ms: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))
    arrival_ms: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))
    loaded: dict[str, list[int]] = field(default_factory=lambda: defaultdict(list))
    cached: dict[str, list[int]] = field(default_factory=lambda: defaultdict(list))
    dlogprob: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    unequal: dict[str, int] = field(default_factory=lambda: defaultdict(int))
    failed_loads: int = 0
    compared: int = 0

    def add(
        self, phase: str, number: int, request: Json, life: LifeResult, reference: Json | None
    ) -> None:
        """Take the figures of one request of round ``number``; ``reference`` is the same prompt
        cold without a connector."""
        self.ms[phase].append(request["ttft"] * 1e3)
        self.by_round[phase][number].append(request["ttft"] * 1e3)
        self.cached[phase].append(request["cached"] or 0)
        event = life.load_of(request["request"])
        if event is not None:
            self.failed_loads += bool(event.get("failed"))
            self.load_ms[phase].append(event["ns"] / 1e6)
            self.arrival_ms[phase].append(event["since_arrival_ns"] / 1e6)
            self.loaded[phase].append(event["tokens"])
        else:
            self.loaded[phase].append(0)
        if reference is not None:
            self.compared += 1
            self.unequal[phase] += request["tokens"] != reference["tokens"]
            for got, want in zip(request["logprobs"], reference["logprobs"], strict=True):
                self.dlogprob[phase] = max(self.dlogprob[phase], abs(got - want))

    def report(self) -> Json:
        """The contract's keys."""
        out: Json = {f"{p}_ms": summary(self.ms[p]) for p in PHASES}
        out["life_medians_ms"] = {
            p: [round(quantile(times, 0.5), 3) for times in self.by_round[p].values()]
            for p in PHASES
        }
        tiers = ("dram", "nvme_restart")
        out["load_only_ms"] = {p: summary(self.load_ms[p]) for p in tiers}
        out["arrival_to_loaded_ms"] = {p: summary(self.arrival_ms[p]) for p in tiers}
        out["tokens_loaded"] = {p: _median_int(self.loaded[p]) for p in tiers}
        out["cached_tokens"] = {p: _median_int(self.cached[p]) for p in PHASES}
        out["outputs_equal"] = not any(self.unequal.values()) if self.compared else None
        out["unequal_outputs"] = {p: self.unequal[p] for p in PHASES if self.ms[p]}
        out["max_abs_dlogprob"] = max(self.dlogprob.values(), default=None)
        out["failed_loads"] = self.failed_loads
        return out


def _median_int(values: list[int]) -> int | None:
    return int(quantile(values, 0.5)) if values else None


@dataclass(frozen=True)
class Plan:
    """Prompts by id, and which ids each round takes."""

    lengths: tuple[int, ...]
    prompts: dict[str, list[int]]
    rounds: tuple[tuple[str, ...], ...]
    kv_bytes_per_token: int

    def length_of(self, prompt: str) -> int:
        return int(prompt.split("x")[0])

    def bytes_of(self, prompts: tuple[str, ...]) -> int:
        """KV bytes of whole blocks, i.e. what a system can store of these prompts."""
        tokens = sum(self.length_of(p) // BLOCK * BLOCK for p in prompts)
        return tokens * self.kv_bytes_per_token


def _plan(context: Context, options: argparse.Namespace) -> Plan:
    first = max(BLOCK, options.prompt_tokens // BLOCK * BLOCK)
    lengths = [first]
    if options.lengths:
        lengths = [int(n) for n in options.lengths.split(",")]
    elif options.long_tokens:
        lengths.append(options.long_tokens // BLOCK * BLOCK)
    if options.unaligned and not options.lengths:
        lengths.append(first + options.unaligned)
    rng = random.Random(options.seed)
    prompts = {
        f"{n}x{i}": [rng.randrange(3, context.shape.vocab) for _ in range(n)]
        for n in lengths
        for i in range(options.repeats)
    }
    lives = min(options.lives, options.repeats)
    rounds = [[p for p in prompts if int(p.split("x")[1]) % lives == r] for r in range(lives)]
    for round_ in rounds:
        rng.shuffle(round_)
    prompts["warm"] = [rng.randrange(3, context.shape.vocab) for _ in range(max(lengths))]
    prompts["short"] = [rng.randrange(3, context.shape.vocab) for _ in range(BLOCK // 2)]
    fixed = tuple(tuple(r) for r in rounds)
    return Plan(tuple(lengths), prompts, fixed, context.shape.kv_bytes_per_token)


def _generate(prompts: tuple[str, ...], gap_s: float = 0.05) -> Json:
    return {"op": "generate", "prompts": list(prompts), "max_tokens": OUTPUT_TOKENS, "gap_s": gap_s}


def _first_ops(plan: Plan, prompts: tuple[str, ...], disk: bool) -> tuple[list[Json], Json]:
    """Ops of the first life and which of them hold which phase."""
    settle = {"op": "settle", "prompt": "short"}
    ops: list[Json] = [_generate(("short", "warm"))]
    ops += [_generate(prompts), _generate(prompts), settle, {"op": "reset"}, _generate(prompts)]
    if disk:
        want = int(plan.bytes_of(prompts) * 0.95)
        ops.append(settle | {"disk": True, "bytes": want, "timeout_s": 60.0})
    return ops, {"cold": 1, "hbm": 2, "dram": 5}


class Run:
    """State of one routine call."""

    def __init__(self, context: Context, options: argparse.Namespace) -> None:
        self.context, self.options = context, options
        context.shape = SHAPES[options.shape]
        self.ends = time.monotonic() + options.deadline_s if options.deadline_s else math.inf
        self.shortest = 0.0  # seconds of a life; the first one also warms caches
        self.plan = _plan(context, options)
        self.samples: dict[str, dict[int, Samples]] = {}
        self.skipped: dict[str, str] = {}
        self.reference: dict[str, Json] = {}
        self.notes: list[str] = []
        self._taken: list[tuple[str, str, int, list[Json], LifeResult]] = []  # in this round
        largest = max(self.plan.bytes_of(r) for r in self.plan.rounds)
        self.place: Workplace = context.workplace(
            {
                "max_model_len": max(self.plan.lengths) + 2 * BLOCK,
                "max_num_batched_tokens": 8192,
                "max_num_seqs": 4,
            }
            | context.shape.engine
            | json.loads(options.engine),
            hbm_gib=max(1, math.ceil(largest * 1.5 / 2**30)),
            dram_gib=max(1.0, math.ceil(largest * 1.5 / 2**30)),
        )

    def round_over(self) -> None:
        """Book what the round's lives said: those without a connector first, the others are
        compared with them."""
        taken, self._taken = self._taken, []
        for entry in sorted(taken, key=lambda t: t[0] != "none"):
            self._book(*entry)

    def _book(
        self, system: str, phase: str, number: int, requests: list[Json], life: LifeResult
    ) -> None:
        for request in requests:
            prompt = request["prompt"]
            if system == "none" and phase == "cold" and not self.context.shape.dummy:
                self.reference[prompt] = request
            sample = self.samples.setdefault(system, {})
            length = sample.setdefault(self.plan.length_of(prompt), Samples())
            length.add(phase, number, request, life, self.reference.get(prompt))

    def _life(self, system: str, ops: list[Json], storage: Path | None) -> LifeResult:
        start = time.monotonic()
        if self.ends - start < 0.7 * self.shortest:
            raise Skip(f"no time left: a life took {self.shortest:.0f} s")
        place = replace(self.place, timeout_s=min(self.place.timeout_s, self.ends - start))
        try:
            return run_life(place, system, ops, self.plan.prompts, storage)
        finally:
            took = time.monotonic() - start
            self.shortest = min(self.shortest or took, took)

    def system_round(self, system: str, number: int) -> None:
        """Both lives of one system in one round. Raises Skip or LifeFailed."""
        prompts = self.plan.rounds[number]
        kept = system != "none" and not self.options.no_nvme
        storage = self.place.scratch / f"{system}-tier-{number}" if kept else None
        ops, phases = _first_ops(self.plan, prompts, storage is not None)
        self.context.progress(f"{system}: life {number + 1}a (cold, HBM, DRAM)")
        life = self._life(system, ops, storage)
        for phase, at in phases.items():
            self._taken.append((system, phase, number, life.ops[at]["requests"], life))
        if storage is None:
            return
        if not life.ops[-1]["complete"]:
            self.notes.append(
                f"{system} round {number}: wrote {life.ops[-1]['written']} bytes only"
            )
        self.context.page_cache = drop_page_cache(storage)
        order = list(prompts)
        random.Random(number + 1).shuffle(order)
        self.context.progress(f"{system}: life {number + 1}b (NVMe after restart)")
        life = self._life(system, [_generate(("short", "warm")), _generate(tuple(order))], storage)
        self._taken.append((system, "nvme_restart", number, life.ops[1]["requests"], life))

    def read_limit(self, tokens: int) -> Json:
        """Raw O_DIRECT reads of one prompt's KV bytes, page cache dropped before each.

        The limit is the best depth's median: on a few cores many threads read slower than one.
        """
        nbytes = tokens // BLOCK * BLOCK * self.plan.kv_bytes_per_token
        file = DirectFile(self.place.scratch / "limit.bin", nbytes)
        rates: dict[int, list[float]] = {depth: [] for depth in LIMIT_DEPTHS}
        try:
            file.transfer(write=True, depth=4)
            for _ in range(max(7, self.options.repeats)):
                for depth, seen in rates.items():
                    drop_page_cache(file.path)
                    seen.append(file.transfer(write=False, depth=depth)[0])
        finally:
            file.close()
        best = max(rates, key=lambda depth: quantile(rates[depth], 0.5))
        median = quantile(rates[best], 0.5)
        out = {"read_gbps": round(median, 3), "spread_gbps": summary(rates[best]), "depth": best}
        return out | {"bytes": file.nbytes, "read_ms": round(file.nbytes / median / 1e6, 3)}


def _ratios(report: Json, cold_ms: float | None, limit: Json) -> Json:
    """Ratios of medians, the figures to quote."""
    out: Json = {}
    for phase in ("hbm", "dram", "nvme_restart"):
        own = report[f"{phase}_ms"]
        if own and cold_ms:
            out[f"{phase}_speedup"] = round(cold_ms / own["median"], 2)
    # From arrival: some systems read the disk before update_state_after_alloc, others after it.
    load = report["arrival_to_loaded_ms"]["nvme_restart"]
    if load:
        out["nvme_load_vs_limit"] = round(limit["read_ms"] / load["median"], 3)
    return out


def _case(run: Run, length: int) -> Json:
    skipped: Json = {"skipped": "DRAM tier only", "read_ms": None}
    limit = skipped if run.options.no_nvme else run.read_limit(length)
    systems: Json = {}
    none = run.samples.get("none", {}).get(length)
    cold = quantile(none.ms["cold"], 0.5) if none else None
    for system in run.context.systems:
        if system in run.skipped:
            systems[system] = {"skipped": run.skipped[system]}
            continue
        systems[system] = run.samples[system][length].report()
        systems[system]["ratios"] = _ratios(systems[system], cold, limit)
    return {"prompt_tokens": length, "systems": systems, "limit": limit}


def run(context: Context, options: argparse.Namespace) -> Json:
    """Run all rounds; the first length's case is also the top level of the result."""
    if options.quick:
        options.prompt_tokens = min(options.prompt_tokens, 1024)
        options.long_tokens = options.unaligned = 0
        options.repeats, options.lives = 2, 1
        options.lengths = options.lengths and options.lengths.split(",")[0]
    run_ = Run(context, options)
    rounds = len(run_.plan.rounds)
    ordered = sorted(context.systems, key=SYSTEMS.index)
    for number in range(rounds):
        for system in ordered if number % 2 == 0 else ordered[::-1]:
            if system in run_.skipped:
                continue
            with skip_reason(run_.skipped, system):
                run_.system_round(system, number)
        run_.round_over()
    cases = [_case(run_, length) for length in run_.plan.lengths]
    return {
        "config": run_.place.describe() | {"output_tokens": OUTPUT_TOKENS, "rounds": rounds},
        "prompt_tokens": run_.plan.lengths[0],
        "systems": cases[0]["systems"],
        "limit": cases[0]["limit"],
        "cases": cases,
        "notes": run_.notes,
    }


def table(result: Json) -> tuple[list[str], list[list[str]]]:
    """Header and rows of the final table."""
    rows = []
    for case in result["cases"]:
        for system, figures in case["systems"].items():
            if "skipped" in figures:
                rows.append([str(case["prompt_tokens"]), system, figures["skipped"][:60]])
                continue
            cells = [_cell(figures[f"{p}_ms"]) for p in PHASES]
            loads = [_cell(figures["load_only_ms"][p]) for p in ("dram", "nvme_restart")]
            loads.append(_cell(figures["arrival_to_loaded_ms"]["nvme_restart"]))
            same = {True: "yes", False: "NO", None: "-"}[figures["outputs_equal"]]
            delta = figures["max_abs_dlogprob"]
            last = [same, "-" if delta is None else f"{delta:.1e}"]
            rows.append([str(case["prompt_tokens"]), system, *cells, *loads, *last])
    head = [
        "tokens",
        "system",
        "cold",
        "HBM",
        "DRAM",
        "NVMe",
        "load DRAM",
        "load NVMe",
        "arrival-loaded NVMe",
    ]
    return [*head, "equal", "dlogp"], rows


def _cell(value: Json | None) -> str:
    return "-" if value is None else f"{value['median']:.1f}"
