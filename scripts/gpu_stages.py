"""The stages of gpu_check: what each runs, and what its result has to say to count as passed."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from gpu_run import FAILED, OVERRAN, PASSED, SKIPPED, Ended, Json, Outcome, Runner, python

ROOT = Path(__file__).resolve().parent.parent
WRONG = 0.05
"""A log-probability (fp32, KV-sensitive model) that differs by more than this is a wrong block."""
NO_DEVICE = "needs a CUDA device"
GRAPHS = {"mode": 0, "cudagraph_mode": "FULL", "cudagraph_capture_sizes": [1, 2, 4]}
"""Full CUDA graphs without torch.compile: what is replayed does not call into a connector."""


@dataclass(frozen=True)
class Machine:
    """What the stages are to run on and with."""

    runner: Runner
    scratch: Path
    out: Path
    dry: bool
    quick: bool
    backend: str = "FLASH_ATTN"
    graphs: bool = False


@dataclass(frozen=True)
class Stage:
    """One stage; ``run`` gets its seconds and never raises on a failing command."""

    name: str
    budget_s: float
    run: Callable[[Machine, float], Outcome]


def ended_badly(ended: Ended, budget_s: float) -> Outcome | None:
    """An Outcome for a command that was killed or failed, None for one that did neither."""
    if ended.status is None:
        return Outcome(OVERRAN, f"killed after its {budget_s:.0f} s")
    if ended.status != 0:
        said = ended.last(r"(Error|Exception|missing:|failed)\b") or ended.last(r"\S")
        return Outcome(FAILED, f"exit status {ended.status}: {said.strip()[:200]}")
    return None


# -- without an engine ---------------------------------------------------------------------------


def build(machine: Machine, budget_s: float) -> Outcome:
    """The native core, in place."""
    ended = machine.runner.run([python(), "scripts/gpu_build.py"], budget_s)
    bad = ended_badly(ended, budget_s)
    if bad is not None:
        bad.note = ended.last(r"^(missing|build failed|built, but)") or bad.note
        return bad
    return Outcome(PASSED, ended.last(r"\S"))


def device_tests(machine: Machine, budget_s: float) -> Outcome:
    """tests/gpu."""
    if machine.dry:
        return Outcome(SKIPPED, NO_DEVICE)
    ended = machine.runner.run(_pytest(), budget_s)
    return ended_badly(ended, budget_s) or judge_tests(ended.last(r"\d+ (passed|skipped)"))


def _pytest(*more: str) -> list[str]:
    command = [python(), "-m", "pytest", "tests/gpu", "-m", "gpu", "-q", "-p", "no:cacheprovider"]
    return [*command, "--timeout", "100", *more]


def judge_tests(line: str) -> Outcome:
    """pytest's last line; all tests skipped is not a pass."""
    passed = " passed" in line
    return Outcome(PASSED if passed else FAILED, line.strip("= ") or "no test ran")


def memory_checker(machine: Machine, budget_s: float) -> Outcome:
    """compute-sanitizer over the copy tests: memcheck, then racecheck."""
    if machine.dry:
        return Outcome(SKIPPED, NO_DEVICE)
    tool = shutil.which("compute-sanitizer") or shutil.which(
        "compute-sanitizer", path="/usr/local/cuda/bin"
    )
    if tool is None:
        return Outcome(SKIPPED, "no compute-sanitizer on PATH")
    figures = []
    left = budget_s
    for check in ("memcheck", "racecheck"):
        command = [tool, "--tool", check, "--error-exitcode", "9", *_pytest("-k", "round_trip")]
        ended = machine.runner.run(command, left)
        left -= ended.seconds
        bad = ended_badly(ended, budget_s)
        if bad is not None:
            bad.note = f"{check}: {ended.last('ERROR SUMMARY|RACECHECK SUMMARY') or bad.note}"
            return bad
        figures.append(f"{check} clean")
    return Outcome(PASSED, "", figures)


def _bench(
    machine: Machine, name: str, options: list[str], budget_s: float, always: bool = False
) -> tuple[Outcome | None, Json]:
    """One benchmark driver call: (what went wrong or None, its result)."""
    target = machine.scratch / f"{name}.json"
    logs = machine.scratch / f"{name}-logs"
    command = [python(), "benchmarks/run.py", *options, "--json", str(target)]
    command += ["--dir", str(machine.scratch), "--keep-logs", str(logs)]
    extra = {"KVBENCH_DEVICE": "cpu" if machine.dry else "cuda"}
    if always:
        extra["KVBENCH_KVOFFLOAD_EXTRA"] = '{"load": "always"}'
    ended = machine.runner.run(command, budget_s, extra)
    bad = ended_badly(ended, budget_s)
    if bad is None and not target.exists():
        bad = Outcome(FAILED, "the driver wrote no result")
    return bad, json.loads(target.read_text()) if target.exists() else {}


def _with_logs(machine: Machine, name: str, outcome: Outcome) -> Outcome:
    """The ends of the engines' logs, where a stage did not pass."""
    if outcome.status != PASSED:
        for log in sorted((machine.scratch / f"{name}-logs").glob("*.log")):
            lines = log.read_text(errors="replace").splitlines()
            machine.runner.note(f"--- end of {log.name}\n" + "\n".join(lines[-60:]))
    return outcome


def copies(machine: Machine, budget_s: float) -> Outcome:
    """Arena <-> KV blocks beside the plain copy."""
    options = ["copy", "--quick"]
    if not machine.dry:
        blocks = "64" if machine.quick else "256"
        options = ["copy", "--device", "cuda", "--layers", "32", "--fragments-kib", "64"]
        options += ["--blocks", blocks, "--repeats", "7"]
    bad, result = _bench(machine, "copy", options, budget_s)
    return bad or judge_copy(result)


def judge_copy(result: Json) -> Outcome:
    """kvoffload's rates by layout; the routine itself compares the bytes."""
    ours = [c for c in result["cases"] if c["engine"] == "kvoffload"]
    figures = [
        f"{c['layout']}: load {c['h2d_gbps']:.1f} GB/s ({c['vs_limit']['h2d']:.2f} of limit), "
        f"store {c['d2h_gbps']:.1f} ({c['vs_limit']['d2h']:.2f})" + _served(c)
        for c in ours
    ]
    if any(c.get("pinned") is False for c in ours):
        return Outcome(FAILED, "the driver did not pin the arena", figures, result)
    note = "" if ours else "kvoffload has no row"
    return Outcome(PASSED if ours else FAILED, note, figures, result)


def _served(row: Json) -> str:
    """Which movers it was; nothing on the CPU, which has one."""
    if "served" not in row:
        return ""
    late = "" if row.get("calibrated", True) else ", not calibrated in time"
    return f", by {'/'.join(sorted(row['served']))}{late}"


def deadline(budget_s: float) -> str:
    """When the driver is to stop by itself: it ends its engine in order, and writes its result."""
    return str(int(max(budget_s - 25, budget_s * 0.8)))


# -- with engines --------------------------------------------------------------------------------


def equality(machine: Machine, budget_s: float) -> Outcome:
    """fp32, the KV-sensitive model: a reload gives the log-probabilities of a cold run."""
    engine: Json = {"max_num_batched_tokens": 512}  # chunked prefill on the way
    if not machine.dry:
        engine |= {"attention_backend": "TRITON_ATTN", "gpu_memory_utilization": 0.15}
    if machine.graphs:
        engine |= {"enforce_eager": False, "compilation_config": GRAPHS}
    lengths = "512,1100" if machine.dry else "2048,4177"
    options = ["ttft", "--lengths", lengths, "--repeats", "2", "--lives", "1", "--no-nvme"]
    options += ["--systems", "none,kvoffload", "--engine", json.dumps(engine)]
    options += ["--deadline-s", deadline(budget_s)]
    bad, result = _bench(machine, "equality", options, budget_s, always=True)
    return _with_logs(machine, "equality", bad or judge_equality(result))


def judge_equality(result: Json) -> Outcome:
    """Tokens equal, log-probabilities within WRONG, and the bytes really came from the cache."""
    figures, problems = [], []
    for case in result["cases"]:
        tokens, ours = case["prompt_tokens"], case["systems"].get("kvoffload", {})
        if "skipped" in ours or not ours:
            return Outcome(FAILED, str(ours.get("skipped", "kvoffload did not run")), [], result)
        delta = ours["max_abs_dlogprob"]
        loaded = ours["tokens_loaded"]["dram"] or 0
        figures.append(f"{tokens}: {loaded} loaded, max |dlogprob| {_number(delta)}")
        if not loaded:
            problems.append(f"{tokens} tokens: nothing was loaded")
        if delta is None or delta > WRONG:
            problems.append(f"{tokens} tokens: max |dlogprob| {_number(delta)}")
        if ours["outputs_equal"] is not True:
            problems.append(f"{tokens} tokens: other tokens")
        if ours["failed_loads"]:
            problems.append(f"{tokens} tokens: {ours['failed_loads']} failed loads")
    return Outcome(FAILED if problems else PASSED, "; ".join(problems), figures, result)


def _number(value: float | None) -> str:
    return "unknown" if value is None else f"{value:.1e}"


def _big(machine: Machine) -> tuple[list[str], Json]:
    """Options and engine arguments of the model that is timed."""
    if machine.dry:
        return ["--no-nvme"], {}
    engine = {"attention_backend": machine.backend, "gpu_memory_utilization": 0.6}
    return ["--no-nvme", "--shape", "llama8b"], engine


def ttft(machine: Machine, budget_s: float) -> Outcome:
    """Time to first token, an 8B-shaped model with random weights, peers first."""
    shape, engine = _big(machine)
    lengths = "512,1024" if machine.dry else ("4096,16384" if machine.quick else "4096,16384,32768")
    if not machine.dry:
        engine |= {"max_num_batched_tokens": 16384}
    repeats = "2" if machine.dry or machine.quick else "3"
    options = ["ttft", *shape, "--lengths", lengths, "--repeats", repeats, "--lives", "1"]
    options += ["--systems", "none,native,kvoffload", "--engine", json.dumps(engine)]
    options += ["--deadline-s", deadline(budget_s)]
    bad, result = _bench(machine, "ttft", options, budget_s, always=machine.dry)
    return _with_logs(machine, "ttft", bad or judge_ttft(result))


def judge_ttft(result: Json) -> Outcome:
    """Figures of all systems; passed when kvoffload ran and loaded at every length."""
    figures, problems = [], []
    for case in result["cases"]:
        cells = []
        for name, system in case["systems"].items():
            if "skipped" in system:
                cells.append(f"{name} skipped")
                if name == "kvoffload":
                    problems.append(system["skipped"])
                continue
            place = "cold" if name == "none" else "dram"
            cells.append(f"{name} {place} {_ms(system[f'{place}_ms'])}")
            if name == "kvoffload" and not system["tokens_loaded"]["dram"]:
                problems.append(f"{case['prompt_tokens']} tokens: kvoffload loaded nothing")
        figures.append(f"{case['prompt_tokens']}: " + ", ".join(cells))
    skipped = {n: s["skipped"] for n, s in result["systems"].items() if "skipped" in s}
    note = "; ".join(dict.fromkeys(problems)) or "; ".join(f"{n}: {w}" for n, w in skipped.items())
    return Outcome(FAILED if problems else PASSED, note[:300], figures, result)


def _ms(value: Json | None) -> str:
    return "-" if value is None else f"{value['median']:.0f} ms"


def overhead(machine: Machine, budget_s: float) -> Outcome:
    """What a workload without reuse pays; one life per system."""
    shape, engine = _big(machine)
    options = ["overhead", *shape, "--share-base", "--engine", json.dumps(engine)]
    options += ["--deadline-s", deadline(budget_s)]
    if machine.dry:
        options += ["--quick", "--systems", "none,kvoffload"]
    else:
        options += ["--requests", "24" if machine.quick else "64", "--concurrency", "16"]
        options += ["--pairs", "1", "--systems", "none,native,kvoffload"]
    bad, result = _bench(machine, "overhead", options, budget_s)
    return _with_logs(machine, "overhead", bad or judge_overhead(result))


def judge_overhead(result: Json) -> Outcome:
    """Ratios to the life without a connector; nothing may have been loaded."""
    figures = []
    for name, system in result["systems"].items():
        if "skipped" in system:
            figures.append(f"{name}: skipped ({system['skipped'][:80]})")
            continue
        figures.append(
            f"{name}: throughput x{system['throughput_ratio']:.3f}, "
            f"ITL p50 x{system['itl_p50_ratio']:.3f}"
        )
    ours = result["systems"].get("kvoffload", {"skipped": "kvoffload did not run"})
    if "skipped" in ours:
        return Outcome(FAILED, ours["skipped"][:300], figures, result)
    if ours["loads"]:
        return Outcome(FAILED, f"{ours['loads']} loads without any reuse", figures, result)
    return Outcome(PASSED, "", figures, result)


def plots(machine: Machine, budget_s: float) -> Outcome:
    """SVGs of the ttft stage."""
    source = machine.scratch / "ttft.json"
    if not source.exists():
        return Outcome(FAILED, "no ttft result to plot")
    copy = machine.scratch / "gpu.json"
    copy.write_text(source.read_text())
    command = [python(), "benchmarks/plot.py", str(copy), "--out", str(machine.out)]
    ended = machine.runner.run(command, budget_s)
    made = sorted(p.name for p in machine.out.glob("gpu-*.svg"))
    return ended_badly(ended, budget_s) or Outcome(PASSED, "", made)


def stages(dry: bool, quick: bool) -> list[Stage]:
    """All stages in order; budgets in seconds. What matters most comes first."""
    big = (175, 110) if dry else ((150, 130) if quick else (230, 190))
    return [
        Stage("build", 120, build),
        Stage("device tests", 60, device_tests),
        Stage("copy", 60, copies),
        Stage("equality", 130 if dry else 110, equality),
        Stage("ttft", big[0], ttft),
        Stage("overhead", big[1], overhead),
        Stage("plots", 20, plots),
        Stage("memory checker", 90, memory_checker),
    ]
