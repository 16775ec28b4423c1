"""``policies``: token hit rate of every eviction policy on request traces, one DRAM tier.

The policies alone, under the rule that only leaves go (see ``tracecache.py``); no bytes move. With
``--hint-accuracy`` also each policy with last-use hints that are right that often.
"""

from __future__ import annotations

import argparse
from itertools import count
from pathlib import Path

from common import Json
from context import Context
from tracecache import Trace, chat, last_use, load, replay

SHARES = (0.01, 0.05, 0.1, 0.25, 0.5)
WEIGHED = (0.05, 0.1)  # shares that the table also shows by what hits save, or with hints
WEIGHED = (0.05, 0.1)  # shares that the table also shows by what hits save, or with hints


def add_options(parser: argparse.ArgumentParser) -> None:
    """Options of this routine."""
    parser.add_argument("--traces", type=Path, nargs="+", default=[], help=".jsonl or .jsonl.xz")
    parser.add_argument(
        "--policies", default="lru,fifo,s3fifo,arc,adaptive", help="comma-separated"
    )
    parser.add_argument("--dram-fracs", default=",".join(map(str, SHARES)), help="of unique blocks")
    parser.add_argument("--hint-accuracy", type=float, default=0.8, help="0: no run with hints")


def _case(trace: Trace, policy: str, share: float, accuracy: float, seed: int) -> Json:
    from kvoffload.core.policy import make_policy

    plain = replay(trace, make_policy(policy, count(1)), share)
    case: Json = {"trace": trace.name, "policy": policy, "dram_frac": share} | vars(plain)
    if accuracy:
        hints = last_use(trace, accuracy, seed)
        case["token_hit_hinted"] = replay(
            trace, make_policy(policy, count(1)), share, hints
        ).token_hit
    return case


def run(context: Context, options: argparse.Namespace) -> Json:
    """Every trace, policy and capacity; a made-up trace where none is given."""
    shares = [float(x) for x in options.dram_fracs.split(",")]
    policies = options.policies.split(",")
    made_up = chat(options.seed, 100 if options.quick else 4000)
    traces = [load(path) for path in options.traces] or [made_up]
    cases: list[Json] = []
    total = len(traces) * len(policies) * len(shares)
    for trace in traces:
        for policy in policies:
            for share in shares:
                context.progress(f"{len(cases)}/{total}: {trace.name}, {policy}, {share:.0%}")
                hinted = options.hint_accuracy if share in WEIGHED else 0.0
                cases.append(_case(trace, policy, share, hinted, options.seed))
    facts = [
        {"trace": t.name, "requests": len(t.requests), "unique": t.unique, "block_tokens": t.block}
        for t in traces
    ]
    paths = [path.name for path in options.traces]
    return {"config": {"traces": paths}, "traces": facts, "cases": cases}


def table(result: Json) -> tuple[list[str], list[list[str]]]:
    """Header and rows of the final table: token hit rates, and shares of the prefill work saved."""
    shares = sorted({case["dram_frac"] for case in result["cases"]})
    weighed = [s for s in WEIGHED if s in shares]
    cases = {(c["trace"], c["policy"], c["dram_frac"]): c for c in result["cases"]}
    rows = []
    for trace, policy in dict.fromkeys((t, p) for t, p, _ in cases):
        row = [f"{cases[trace, policy, s]['token_hit']:.4f}" for s in shares]
        row += [f"{cases[trace, policy, s]['cost_hit']:.4f}" for s in weighed]
        rows.append([trace, policy, *row])
    header = [*(f"{s:.0%}" for s in shares), *(f"{s:.0%}, by cost" for s in weighed)]
    return ["trace", "policy", *header], rows
