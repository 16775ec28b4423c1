"""``mrc``: the live miss-ratio curve beside an exact simulation of a leaf-first LRU.

Error in points of token hit rate at five cache sizes, and what feeding costs. ``stamps`` is
kvoffload's curve; ``crowded`` the same with a table for a tenth of the distinct chunks, asked about
no more than that; ``thinned`` the curve fed with one key in a hundred, as it is where even the
table would be too large;
``sampled`` the usual way, a ghost list of one key in a hundred, picked by hash, with the SHARDS-adj
correction: once per seed, so that its spread shows. Traces: ``*.jsonl`` or ``*.jsonl.xz`` in the
Mooncake format (``input_length``, ``hash_ids``), else made up: sessions over shared prompts.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import lzma
import random
import time
from pathlib import Path

from common import Json, quantile
from context import Context

NAME = "mrc"
FRACTIONS = (0.01, 0.05, 0.1, 0.25, 0.5)
Request = tuple[int, list[int]]  # prompt tokens, chunk ids from the root


def add_options(parser: argparse.ArgumentParser) -> None:
    """Options of this routine."""
    parser.add_argument("--traces", type=Path, help="folder of traces; none: a made-up one")
    parser.add_argument("--rate", type=float, default=0.01, help="share of keys sampled")
    parser.add_argument("--seeds", type=int, default=20, help="samplings tried")
    parser.add_argument("--requests", type=int, default=4000, help="of the made-up trace")


class Stack:
    """Exact LRU stack distances: a Fenwick tree over the order of touches."""

    def __init__(self, size: int) -> None:
        self._tree = [0] * (size + 1)
        self._at: dict[int, int] = {}
        self._next = 1

    def _add(self, i: int, value: int) -> None:
        while i < len(self._tree):
            self._tree[i] += value
            i += i & -i

    def distance(self, key: int) -> int:
        """Place of ``key``, 1 for the youngest; 0: never touched."""
        i = self._at.get(key, 0)
        if not i:
            return 0
        total, i = len(self._at), i - 1
        while i:
            total -= self._tree[i]
            i &= i - 1
        return total

    def touch(self, key: int) -> None:
        before = self._at.pop(key, 0)
        if before:
            self._add(before, -1)
        self._at[key] = self._next
        self._add(self._next, 1)
        self._next += 1


def read(path: Path) -> tuple[int, list[Request]]:
    """(tokens per chunk, requests) of one trace."""
    data = path.read_bytes()
    size, out = 512, []
    for line in (lzma.decompress(data) if path.suffix == ".xz" else data).splitlines():
        row = json.loads(line)
        if "hash_ids" not in row or row.get("meta"):
            size = int(row.get("block_size", size))
            continue
        full = row["input_length"] // size
        out.append((int(row["input_length"]), row["hash_ids"][:full]))
    return size, out


def made_up(requests: int, seed: int) -> tuple[int, list[Request]]:
    """Sessions that grow turn by turn over three shared system prompts, picked with recency."""
    rng, size, names = random.Random(seed), 128, iter(range(1 << 30))
    prompts = [[next(names) for _ in range(8)] for _ in range(3)]
    live: list[list[int]] = []
    out = []
    for _ in range(requests):
        if not live or rng.random() < 0.2:
            live.append(list(rng.choice(prompts)))
        at = max(0, len(live) - 1 - int(rng.expovariate(0.01)))
        live[at] = live[at] + [next(names) for _ in range(rng.randint(1, 16))]
        out.append((len(live[at]) * size + rng.randrange(size), list(live[at])))
    return size, out


def distances(requests: list[Request], keep: set[int] | None) -> tuple[list[int], int]:
    """Distances of all reused chunks among ``keep`` (None: all), and how many were asked for."""
    chains = [ids if keep is None else [i for i in ids if i in keep] for _, ids in requests]
    asked = sum(map(len, chains))
    stack, found = Stack(asked), []
    for chain in chains:
        found += [d for d in map(stack.distance, chain) if d]
        for key in reversed(chain):
            stack.touch(key)
    return found, asked


def _sampled(requests: list[Request], ids: list[int], rate: float, seed: int) -> list[float]:
    """Estimated hits (chunks) at each size from one sampled ghost list."""
    rng = random.Random(seed)
    found, asked = distances(requests, {i for i in ids if rng.random() < rate})
    total = sum(len(chain) for _, chain in requests)
    extra = total - asked / rate  # SHARDS-adj: what the sample lacks were hits at distance 1
    hits = []
    for fraction in FRACTIONS:
        within = sum((d - 1) / rate + 1 <= fraction * len(ids) for d in found)
        hits.append(max(0.0, within / rate + extra))
    return hits


def _curve(
    requests: list[Request], size: int, reach: int, cells: int | None, rate: float | None = None
) -> Json:
    from kvoffload.core.mrc import MissRatioCurve

    names = {i for _, ids in requests for i in ids}
    keys = {i: hashlib.sha256(b"%d" % i).digest()[:16] for i in names}
    chains = [([keys[i] for i in ids], tokens) for tokens, ids in requests]
    curve = MissRatioCurve(reach, size, cells=cells, rate=rate)
    start = time.thread_time_ns()
    for chain, tokens in chains:
        curve.query(chain, tokens)  # type: ignore[arg-type]
    spent = time.thread_time_ns() - start
    chunks = sum(len(chain) for chain, _ in chains)
    return {
        "hit": [curve.hit_ratio(f * len(names)) for f in FRACTIONS],
        "bytes": curve.nbytes,
        "bytes_per_chunk": round(curve.nbytes / len(names), 1),
        "us_per_request": round(spent / 1e3 / len(chains), 1),
        "ns_per_chunk": round(spent / max(1, chunks), 1),
    }


def _points(hits: list[float], exact: list[float]) -> list[float]:
    return [round(100 * (a - b), 2) for a, b in zip(hits, exact, strict=True)]


def _measure(name: str, size: int, requests: list[Request], options: argparse.Namespace) -> Json:
    ids = sorted({i for _, chain in requests for i in chain})
    tokens = sum(t for t, _ in requests)
    found, asked = distances(requests, None)
    exact = [sum(d <= int(f * len(ids)) for d in found) * size / tokens for f in FRACTIONS]
    out: Json = {"trace": name, "requests": len(requests), "chunks": len(ids), "asked": asked}
    out["exact"] = [round(x, 4) for x in exact]
    for arm, reach, cells, rate in (
        ("stamps", len(ids), None, None),
        ("crowded", len(ids) // 10, 1 << (2 * (len(ids) // 10) - 1).bit_length(), None),
        ("thinned", len(ids), None, options.rate),
    ):
        figures = _curve(requests, size, reach, cells, rate)
        asked_of = exact[: FRACTIONS.index(0.1) + 1] if arm == "crowded" else exact
        figures["error_points"] = _points(figures.pop("hit")[: len(asked_of)], asked_of)
        figures["worst_points"] = max(map(abs, figures["error_points"]))
        out[arm] = figures
    worst = []
    for seed in range(options.seeds):
        hits = _sampled(requests, ids, options.rate, options.seed + seed)
        errors = _points([min(1.0, h * size / tokens) for h in hits], exact)
        worst.append(max(map(abs, errors)))
    out["sampled"] = {
        "rate": options.rate,
        "keys": round(options.rate * len(ids)),
        "worst_points_median": round(quantile(worst, 0.5), 2),
        "worst_points_max": max(worst),
        "within_2_points": sum(w <= 2 for w in worst),
        "seeds": options.seeds,
    }
    return out


def run(context: Context, options: argparse.Namespace) -> Json:
    """All traces; top level: the worst error of kvoffload's curve over all of them."""
    if options.quick:
        options.seeds, options.requests = 2, 400
    cases = []
    if options.traces is None:
        context.progress(f"{options.requests} made-up requests")
        cases.append(_measure("made up", *made_up(options.requests, options.seed), options))
    else:
        options.traces, folder = options.traces.name, options.traces
        for path in sorted(p for p in folder.iterdir() if p.name.endswith((".jsonl", ".jsonl.xz"))):
            context.progress(path.name)
            cases.append(_measure(path.name.split(".")[0], *read(path), options))
    if not cases:
        raise SystemExit(f"run.py: no *.jsonl or *.jsonl.xz in {folder}")
    return {
        "fractions": list(FRACTIONS),
        "cases": cases,
        "worst_points": max(c["stamps"]["worst_points"] for c in cases),
        "crowded_worst_points": max(c["crowded"]["worst_points"] for c in cases),
    }


def table(result: Json) -> tuple[list[str], list[list[str]]]:
    """Header and rows of the final table."""
    rows = [
        [
            case["trace"],
            str(case["chunks"]),
            f"{case['stamps']['worst_points']:.2f}",
            f"{case['crowded']['worst_points']:.2f}",
            f"{case['thinned']['worst_points']:.2f}",
            " .. ".join(f"{case['sampled'][f'worst_points_{k}']:.1f}" for k in ("median", "max")),
            str(case["stamps"]["us_per_request"]),
            str(case["stamps"]["bytes_per_chunk"]),
        ]
        for case in result["cases"]
    ]
    head = ["trace", "distinct chunks", "worst error, points", "crowded", "thinned"]
    return [*head, "1 in 100 keys", "us/request", "bytes/chunk"], rows
