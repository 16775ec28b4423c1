"""``overhead``: what a connector costs a workload without any reuse; lives alternate A B B A.

Every prompt is unique, so nothing can be loaded and everything is stored. Each system's life is
paired with a life without a connector right before it, in every second pair right after it: a
ratio is taken per pair and the median over pairs is reported, so that a machine that gets faster
or slower all the time favours neither.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import time
from dataclasses import dataclass, replace
from itertools import pairwise

from common import Json, Skip, quantile, summary
from context import Context, skip_reason
from lives import run_life
from model import SHAPES

NAME = "overhead"
QUICK_SYSTEMS = ("none", "kvoffload")


def add_options(parser: argparse.ArgumentParser) -> None:
    """Options of this routine."""
    parser.add_argument("--requests", type=int, default=64, help="per life")
    parser.add_argument("--prompt-tokens", type=int, default=1024)
    parser.add_argument("--output-tokens", type=int, default=64)
    parser.add_argument("--concurrency", type=int, default=4)
    parser.add_argument("--pairs", type=int, default=2, help="lives per system, each beside a none")
    parser.add_argument("--no-nvme", action="store_true", help="DRAM tier only")
    parser.add_argument("--shape", choices=sorted(SHAPES), default="tiny")
    parser.add_argument("--engine", default="{}", help="JSON of more engine arguments")
    parser.add_argument(
        "--share-base", action="store_true", help="one life without a connector a round, for all"
    )
    parser.add_argument("--deadline-s", type=float, default=0.0, help="start no life beyond")


@dataclass(frozen=True)
class Figures:
    """One life."""

    tokens_per_s: float
    cpu_s_per_token: float
    ttft_ms: list[float]
    itl_ms: list[float]
    step_us: list[float]
    loads: int

    @staticmethod
    def of(load: Json, step_ns: list[int], loads: int) -> Figures:
        """From the ``load`` op's result; tokens are generated tokens."""
        tokens = sum(len(r["tokens"]) for r in load["requests"])
        gaps = [
            (b - a) * 1e3
            for r in load["requests"]
            for a, b in zip(r["times"], r["times"][1:], strict=False)
        ]
        return Figures(
            tokens_per_s=tokens / load["wall_s"],
            cpu_s_per_token=load["cpu_s"] / tokens,
            ttft_ms=[r["ttft"] * 1e3 for r in load["requests"]],
            itl_ms=gaps,
            step_us=[ns / 1e3 for ns in step_ns],
            loads=loads,
        )


RATIOS = (
    "throughput_ratio",
    "cpu_s_per_token_ratio",
    "itl_p50_ratio",
    "itl_p99_ratio",
    "ttft_p99_ratio",
)


def _ratios(own: Figures, base: Figures) -> dict[str, float]:
    return {
        "throughput_ratio": own.tokens_per_s / base.tokens_per_s,
        "cpu_s_per_token_ratio": own.cpu_s_per_token / base.cpu_s_per_token,
        "itl_p50_ratio": quantile(own.itl_ms, 0.5) / quantile(base.itl_ms, 0.5),
        "itl_p99_ratio": quantile(own.itl_ms, 0.99) / quantile(base.itl_ms, 0.99),
        "ttft_p99_ratio": quantile(own.ttft_ms, 0.99) / quantile(base.ttft_ms, 0.99),
    }


def _report(pairs: list[tuple[Figures, Figures]]) -> Json:
    each = [_ratios(own, base) for own, base in pairs]
    out: Json = {key: round(quantile([e[key] for e in each], 0.5), 4) for key in RATIOS}
    out["pairs"] = [{k: round(v, 4) for k, v in e.items()} for e in each]
    steps = [us for own, _ in pairs for us in own.step_us]
    out["scheduler_us_per_step"] = (
        {f"p{p}": round(quantile(steps, p / 100), 1) for p in (50, 99)} if steps else None
    )
    out["steps"] = len(steps)
    for side, index in (("own", 0), ("none", 1)):
        lives = [pair[index] for pair in pairs]
        out[side] = {
            "tokens_per_s": summary([f.tokens_per_s for f in lives]),
            "cpu_s_per_token": summary([f.cpu_s_per_token for f in lives], 6),
            "itl_ms": summary([x for f in lives for x in f.itl_ms]),
            "ttft_ms": summary([x for f in lives for x in f.ttft_ms]),
        }
    out["loads"] = sum(own.loads for own, _ in pairs)  # must be 0: there is nothing to reuse
    return out


def _floor(bases: list[Figures]) -> Json | None:
    """The same ratios between lives without a connector: what a ratio may move by chance."""
    each = [_ratios(b, a) for a, b in pairwise(bases)]
    return {key: summary([e[key] for e in each], 4) for key in RATIOS} if each else None


class Run:
    """State of one routine call."""

    def __init__(self, context: Context, options: argparse.Namespace) -> None:
        self.context, self.options = context, options
        context.shape = SHAPES[options.shape]
        self.ends = time.monotonic() + options.deadline_s if options.deadline_s else math.inf
        self.shortest = 0.0  # seconds of a life; the first one also warms caches
        self._bases: dict[int, Figures] = {}
        tokens = options.prompt_tokens + options.output_tokens
        dram = 1.25 * options.requests * tokens * context.shape.kv_bytes_per_token / 2**30
        self.place = context.workplace(
            {
                "max_model_len": tokens + 256,
                "max_num_batched_tokens": 2048,
                "max_num_seqs": max(4, options.concurrency),
            }
            | context.shape.engine
            | json.loads(options.engine),
            hbm_gib=1,
            dram_gib=max(1.0, round(dram + 0.5)),
        )

    def base(self, number: int) -> Figures:
        """The life without a connector that ``number``'s are compared with."""
        if self.options.share_base and number in self._bases:
            return self._bases[number]
        self._bases[number] = self.life("none", number)
        return self._bases[number]

    def pair(self, system: str, number: int, own_first: bool) -> tuple[Figures, Figures]:
        """The system's life and that without a connector. Same prompts; they share no cache."""
        if own_first:
            own = self.life(system, number)
            return own, self.base(number)
        base = self.base(number)
        return self.life(system, number), base

    def life(self, system: str, number: int) -> Figures:
        """One life with prompts no other life has seen. Raises Skip or LifeFailed."""
        opt = self.options
        rng = random.Random(opt.seed * 1000 + number)
        names = [f"u{i}" for i in range(opt.requests)]
        prompts = {n: [rng.randrange(3, 4096) for _ in range(opt.prompt_tokens)] for n in names}
        prompts["warm"] = prompts["u0"][::-1]
        ops: list[Json] = [
            {"op": "generate", "prompts": ["warm"], "max_tokens": opt.output_tokens},
            {
                "op": "load",
                "prompts": names,
                "max_tokens": opt.output_tokens,
                "concurrency": opt.concurrency,
            },
        ]
        storage = None
        if system != "none" and not opt.no_nvme:
            storage = self.place.scratch / f"{system}-tier-{number}"
        self.context.progress(f"{system}: life {number}")
        start = time.monotonic()
        if self.ends - start < 0.7 * self.shortest:
            raise Skip(f"no time left: a life took {self.shortest:.0f} s")
        place = replace(self.place, timeout_s=min(self.place.timeout_s, self.ends - start))
        try:
            life = run_life(place, system, ops, prompts, storage)
        finally:
            took = time.monotonic() - start
            self.shortest = min(self.shortest or took, took)
        loads = sum(len(events) for events in life.loads.values())
        return Figures.of(life.ops[1], life.step_ns, loads)


def run(context: Context, options: argparse.Namespace) -> Json:
    """Run all pairs; kvoffload's figures are at the top level as well."""
    if options.quick:
        options.requests, options.prompt_tokens = 4, 256
        options.output_tokens, options.pairs = 8, 1
    run_, number = Run(context, options), 0
    pairs: dict[str, list[tuple[Figures, Figures]]] = {}
    skipped: dict[str, str] = {}
    systems = [s for s in context.systems if s != "none"]
    for turn in range(options.pairs):
        for system in [s for s in systems if s not in skipped]:
            with skip_reason(skipped, system):
                made = run_.pair(system, number, own_first=turn % 2 == 1)
                pairs.setdefault(system, []).append(made)
            number += not options.share_base
        number += options.share_base
    reports = {s: {"skipped": skipped[s]} if s in skipped else _report(pairs[s]) for s in systems}
    bases = {id(base): base for done in pairs.values() for _, base in done}
    floor = _floor(list(bases.values()))
    out: Json = {"config": run_.place.describe(), "systems": reports, "floor": floor}
    if "kvoffload" in reports:
        out |= {k: v for k, v in reports["kvoffload"].items() if k not in ("own", "none", "pairs")}
    return out


def table(result: Json) -> tuple[list[str], list[list[str]]]:
    """Header and rows of the final table."""
    rows = []
    for system, figures in result["systems"].items():
        if "skipped" in figures:
            rows.append([system, figures["skipped"][:60]])
            continue
        steps = figures["scheduler_us_per_step"] or {}
        cells = [f"{figures[key]:.3f}" for key in RATIOS]
        rows.append([system, *cells, str(steps.get("p50", "-")), str(steps.get("p99", "-"))])
    return ["system", *(r.removesuffix("_ratio") for r in RATIOS), "us/step p50", "p99"], rows
