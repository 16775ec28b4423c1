"""``replay``: request traces through the real index, policy, admission and planner, no bytes moved.

Without sizes: every capacity of the reference table, DRAM 5 % with last-use hints of 80 %
accuracy, and DRAM 10 % with NVMe 50 % beside writing everything. Counting rules: docs/replay.md.
``million`` times the driver itself on a synthetic trace (CPU seconds of the one thread, reading
the trace included).
"""

from __future__ import annotations

import argparse
import json
import random
import time
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

from common import Json
from context import Context

NAME = "replay"
FRACTIONS = (0.01, 0.05, 0.10, 0.25, 0.50)
TIERS = (0.10, 0.50)


def add_options(parser: argparse.ArgumentParser) -> None:
    """Options of this routine."""
    parser.add_argument("--trace", action="append", type=Path, help="trace file; repeat it")
    parser.add_argument("--policy", default="lru", help="comma-separated")
    parser.add_argument("--dram-frac", help="of the unique blocks, comma-separated")
    parser.add_argument("--nvme-frac", help="likewise; 0: none")
    parser.add_argument("--admission", default="budget", help="budget, or all: no budget")
    parser.add_argument(
        "--write-tb-per-day",
        type=float,
        default=1000.0,
        help="NVMe write budget; ample: what admission itself lets through is measured",
    )
    parser.add_argument("--hint-accuracy", type=float, help="of last-use hints; none without")
    parser.add_argument("--synthetic", type=int, default=0, help="requests of 100 chunks to time")


def _toy(path: Path, requests: int = 300, shared: int = 6, fresh: int = 3) -> Path:
    """Sessions whose prefix is asked for again and again with something new behind it."""
    rng, number = random.Random(1), 0
    sessions = [list(range(-(n + 1) * shared, -n * shared)) for n in range(200)]
    with path.open("w") as f:
        f.write(json.dumps({"meta": True, "name": "synthetic", "block_size": 64}) + "\n")
        for n in range(requests):
            ids = rng.choice(sessions) + list(range(number, number + fresh))
            ids = [i % (1 << 64) for i in ids]
            number += fresh
            row = {"timestamp": n * 10, "input_length": 64 * len(ids) + 10, "output_length": 100}
            f.write(json.dumps(row | {"hash_ids": ids}) + "\n")
    return path


def _sizes(options: argparse.Namespace) -> list[tuple[float, float, bool, float | None]]:
    """(DRAM, NVMe, write everything, accuracy of hints) of each run."""
    every, hints = options.admission == "all", options.hint_accuracy
    if options.dram_frac or options.nvme_frac:
        dram = [float(x) for x in (options.dram_frac or "0.1").split(",")]
        nvme = [float(x) for x in (options.nvme_frac or "0").split(",")]
        return [(d, n, every, hints) for d, n in product(dram, nvme)]
    table = [(f, 0.0, False, hints) for f in FRACTIONS]
    return [*table, (0.05, 0.0, False, 0.8), (*TIERS, False, hints), (*TIERS, True, hints)]


def _run_trace(
    context: Context, options: argparse.Namespace, path: Path
) -> tuple[Json, list[Json]]:
    from kvoffload.replay.driver import Setup
    from kvoffload.replay.report import Size, run
    from kvoffload.replay.trace import Trace

    trace = Trace(path)
    facts = trace.facts()
    setup = Setup(
        chunk_tokens=trace.chunk_tokens,
        kv_bytes_per_token=131072,
        dram_chunks=1,
        load="always",
        nvme_write_tb_per_day=options.write_tb_per_day,
    )
    out = []
    for policy, (dram, nvme, every, hints) in product(options.policy.split(","), _sizes(options)):
        context.progress(f"{trace.name}: {policy}, DRAM {dram:.0%}, NVMe {nvme:.0%}")
        result = run(
            trace,
            replace(setup, policy=policy, write_everything=every),
            Size(dram, True),
            Size(nvme, True),
            facts,
            hint_accuracy=hints,
            seed=options.seed,
        )
        out.append(result.as_json() | {"dram_frac": dram, "nvme_frac": nvme})
    about = {
        "requests": facts.requests,
        "unique_blocks": facts.unique_chunks,
        "infinite": round(facts.ceiling, 4),
        "block_tokens": trace.block_tokens,
    }
    return {trace.name: about}, out


def _million(context: Context, requests: int) -> Json:
    """CPU time of the driver on a synthetic trace of 70 % hits, 100 chunks a request."""
    from kvoffload.replay.driver import Replay, Setup, uncollected
    from kvoffload.replay.trace import Trace

    trace = Trace(_toy(context.scratch / "synthetic.jsonl", requests, shared=70, fresh=30))
    replay = Replay(Setup(chunk_tokens=64, kv_bytes_per_token=131072, dram_chunks=100_000))
    context.progress(f"{requests} requests of 100 chunks")
    began, wall = time.thread_time(), time.monotonic()
    with uncollected():
        for request in trace:
            replay.serve(request)
    cpu_s = time.thread_time() - began
    replay.check()
    return {
        "requests": requests,
        "chunks_per_request": 100,
        "token_hit": round(replay.dram_tokens / replay.input_tokens, 4),
        "cpu_s": round(cpu_s, 2),
        "wall_s": round(time.monotonic() - wall, 2),
        "us_per_chunk": round(cpu_s / requests * 1e4, 3),
        "million_requests_cpu_min": round(cpu_s / requests * 1e6 / 60, 2),
    }


def run(context: Context, options: argparse.Namespace) -> Json:
    """All runs; the keys of a single run are the top-level keys as well."""
    paths = options.trace or []
    if options.quick and not paths:
        paths = [_toy(context.scratch / "toy.jsonl")]
    out: Json = {"traces": {}, "runs": []}
    for path in paths:
        about, runs = _run_trace(context, options, path)
        out["traces"] |= about
        out["runs"] += runs
    if options.synthetic or options.quick:
        out["million"] = _million(context, options.synthetic or 200)
    if len(out["runs"]) == 1:
        out |= out["runs"][0]
    out["config"] = {
        "trace": [str(p.name) for p in paths],
        "write_tb_per_day": options.write_tb_per_day,
    }
    return out


def table(result: Json) -> tuple[list[str], list[list[str]]]:
    """Header and rows of the final table."""
    rows: list[list[str]] = []
    for r in result["runs"]:
        tiers = r["token_hit_by_tier"]
        wrote: Any = r["nvme_bytes_written"] + r["nvme_bytes_rewritten"]
        rows.append(
            [
                r["trace"],
                r["policy"]
                + (", write everything" if r["write_everything"] else "")
                + (f", hints {r['hint_accuracy']:.0%}" if r["hint_accuracy"] else ""),
                f"{r['dram_frac']:.0%}",
                f"{r['nvme_frac']:.0%}",
                f"{r['token_hit']:.4f}",
                f"{tiers['nvme']:.4f}",
                f"{wrote / 2**40:.3f} TiB",
                str(r["orphans"]),
            ]
        )
    if m := result.get("million"):
        text = f"{m['us_per_chunk']} us/chunk = {m['million_requests_cpu_min']} min per million"
        rows.append(["synthetic", text, "", "", f"{m['token_hit']:.4f}", "", "", ""])
    return ["trace", "policy", "DRAM", "NVMe", "hit", "of it NVMe", "written", "orphans"], rows
