"""Every benchmark routine runs tiny and keeps the keys that others read."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from kvoffload.core.policy import POLICIES

ROOT = Path(__file__).resolve().parents[2]
RUN = ROOT / "benchmarks" / "run.py"
needs_core = pytest.mark.skipif(
    importlib.util.find_spec("kvoffload._core") is None, reason="kvoffload._core is not built"
)


def bench(routine: str, *options: str, timeout: float = 120.0) -> dict[str, Any]:
    """One driver call; the JSON object must be the last and only thing on stdout."""
    command = [sys.executable, str(RUN), routine, "--quick", "--json", "-", *options]
    done = subprocess.run(command, capture_output=True, text=True, timeout=timeout, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-3000:]
    result: dict[str, Any] = json.loads(done.stdout)
    assert result["routine"] == routine
    facts = {"cpu", "cores", "ram_gib", "disk", "gpu", "vllm", "torch"}
    assert facts <= result["machine"].keys()
    assert {"commit", "config"} <= result.keys()
    return result


def test_the_readme_lists_every_option() -> None:
    text = (ROOT / "benchmarks" / "README.md").read_text()
    options = text[text.index("Options of every routine") :].splitlines()
    rows = {m[1]: m[2] for line in options if (m := re.match(r"\| `(\w+)` \| (`--.*) \|$", line))}
    common = {"--help"} | set(re.findall(r"--[a-z-]+", " ".join(options[:2])))
    routines = (ROOT / "benchmarks" / "routines").glob("[a-z]*.py")
    assert set(rows) == {path.stem for path in routines}
    code = (
        "import json, run\n"
        "subs = run._parser()._subparsers._group_actions[0].choices\n"
        "print(json.dumps({n: sorted(p._option_string_actions) for n, p in subs.items()}))"
    )
    found = json.loads(
        subprocess.check_output([sys.executable, "-c", code], cwd=RUN.parent, timeout=60)
    )
    for routine, row in rows.items():
        assert set(re.findall(r"--[a-z-]+", row)) == {*found[routine]} - common - {"-h"}, routine
        assert common <= {*found[routine]}


@needs_core
def test_store_keys(tmp_path: Path) -> None:
    result = bench("store", "--dir", str(tmp_path))
    assert {"read_gbps", "write_gbps"} <= result["limit"].keys()
    assert {"size", "depth", "engine"} <= result["cases"][0].keys()
    ours = result["systems"]["kvoffload"]
    for key in ("put_gbps", "get_gbps", "restore_gbps", "put_vs_limit", "restore_vs_limit"):
        assert ours[key] > 0
    assert ours["restore_vs_limit_lo"] <= ours["restore_vs_limit"] <= ours["restore_vs_limit_hi"]
    assert ours["put_ms"]["p50"] <= ours["put_ms"]["p99"]
    assert 0 < ours["put_beside_load_ms"]["n"] <= result["config"]["single_puts"]
    assert ours["checksum_cpu_s_per_gb"] > 0
    peer = result["systems"]["vllm_fs"]
    assert "skipped" in peer or peer["restore_gbps"] > 0
    assert "skipped" in result["systems"]["lmcache"]  # said, not left out
    assert result["small"]["kvoffload"]["restore_gbps"] > 0
    assert not list(tmp_path.iterdir()), "the temp dir was left behind"


@needs_core
def test_index_keys() -> None:
    result = bench("index")
    for key in ("lookup_ns_per_key", "insert_ns_per_key", "bytes_per_chunk"):
        assert result[key] > 0
        assert result[key] == result["systems"]["kvoffload"][key]


def test_policies_keys() -> None:
    result = bench("policies")
    assert {case["policy"] for case in result["cases"]} == set(POLICIES)
    assert result["traces"][0]["requests"] > 100
    for case in result["cases"]:
        assert 0 < case["token_hit"] < 1 and 0 < case["cost_hit"] < 1 and case["ns_per_block"] > 0
    by = {(c["policy"], c["dram_frac"]): c for c in result["cases"]}
    assert by["lru", 0.1]["token_hit"] > by["lru", 0.01]["token_hit"]
    assert by["lru", 0.05]["token_hit_hinted"] > by["lru", 0.05]["token_hit"]


@needs_core
def test_copy_keys() -> None:
    pytest.importorskip("torch")
    result = bench("copy")
    assert result["device"] == "cpu"
    assert result["limit"]["h2d_gbps"] > 0
    engines = {case["engine"] for case in result["cases"]}
    assert {"limit", "kvoffload", "vllm_torch"} <= engines
    assert {case["layout"] for case in result["cases"]} == {"per_layer", "block_contiguous"}


def test_replay_keys() -> None:
    result = bench("replay", "--dram-frac", "0.2", "--nvme-frac", "0.5")
    for key in ("trace", "policy", "token_hit", "nvme_bytes_written_per_hit_byte", "orphans"):
        assert key in result
    assert (result["dram_frac"], result["nvme_frac"], result["orphans"]) == (0.2, 0.5, 0)
    assert result["token_hit"] == pytest.approx(sum(result["token_hit_by_tier"].values()), abs=1e-5)
    assert 0 < result["token_hit"] <= result["traces"]["synthetic"]["infinite"]
    assert result["million"]["us_per_chunk"] > 0


def test_unknown_system_is_refused() -> None:
    command = [sys.executable, str(RUN), "index", "--systems", "nothing"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, cwd=ROOT)
    assert done.returncode == 2
    assert "unknown system 'nothing'" in done.stderr


@pytest.fixture
def bench_modules(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))


@pytest.mark.usefixtures("bench_modules")
def test_statistics() -> None:
    common = importlib.import_module("common")
    assert common.quantile([3.0, 1.0, 2.0], 0.5) == 2.0
    assert common.quantile([1.0, 2.0], 0.25) == 1.25
    assert common.summary([]) is None
    assert common.summary([2.0, 1.0, 9.0]) == {"min": 1.0, "median": 2.0, "max": 9.0, "n": 3}
    times: list[float] = []
    for now, count in ((1.0, 1), (3.0, 2)):
        common.add_times(times, now, count)
    assert times == [1.0, 2.0, 3.0]  # a merged message is spread over its tokens
    few = common.percentiles([float(i) for i in range(50)], (50, 99))
    assert "p99" not in few and few["p50_lo"] <= few["p50"] <= few["p50_hi"]
    assert "p99" in common.percentiles([float(i) for i in range(200)], (50, 99))


@needs_core
@pytest.mark.usefixtures("bench_modules")
def test_cuda_copies_are_timed_once_the_calibration_has_ended(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Before, the movers that it picks do not serve: plain copies would be timed."""
    pytest.importorskip("torch")
    module = importlib.import_module("peers.cuda_copies")
    movers: Any = SimpleNamespace(served=Counter(plain=1), waited=0.0)

    def wait(timeout_s: float) -> bool:
        movers.waited = timeout_s
        return True

    movers.wait = wait
    engine = SimpleNamespace(
        movers=movers, pinned_bytes=lambda: 1 << 40, add_group=lambda *_: 0, close=lambda: None
    )
    monkeypatch.setattr("kvoffload.copy.select.copy_engine", lambda *_: engine)
    pages = SimpleNamespace(block_bytes=1 << 16, num_blocks=32, fragments=lambda: [])
    side = module.Kvoffload(pages, 16)
    assert 0 < movers.waited < 600
    movers.served.update({"plain": 4})  # the check before the timed copies
    side.start()
    movers.served.update({"triton": 3})
    assert side.row() == {"pinned": True, "calibrated": True, "served": {"triton": 3}}


@pytest.mark.usefixtures("bench_modules")
def test_a_failed_life_is_told_in_one_portable_line(capsys: pytest.CaptureFixture[str]) -> None:
    context, lives = importlib.import_module("context"), importlib.import_module("lives")
    log = f"exit status 1\n  File {ROOT}/x.py\nImportError: no y in {ROOT}/x.py\nshutting down"
    skipped: dict[str, str] = {}
    with context.skip_reason(skipped, "kvoffload"):
        raise lives.LifeFailed(log)
    want = "engine life failed: exit status 1; ImportError: no y in ./x.py"
    assert skipped == {"kvoffload": want}
    assert "shutting down" in capsys.readouterr().err


@pytest.mark.usefixtures("bench_modules")
def test_engines_on_different_cores_are_refused(tmp_path: Path) -> None:
    lives, systems = importlib.import_module("lives"), importlib.import_module("systems")
    place = lives.Workplace(tmp_path, tmp_path, {}, systems.Budget())
    log = tmp_path / "engine.log"
    log.write_text("INFO local_rank=0, core ids=[0]\n")
    place.same_cores("none", log)
    place.same_cores("native", log)
    log.write_text("INFO local_rank=0, core ids=[0, 1]\n")
    with pytest.raises(lives.LifeFailed, match="different cores"):
        place.same_cores("kvoffload", log)


@pytest.mark.usefixtures("bench_modules")
def test_probe_times_a_load_from_alloc_to_the_output_that_names_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks" / "probe"))
    module = importlib.import_module("connector_probe")

    class Request:
        request_id = "r1"

    class Output:
        finished_recving = frozenset({"r1", "unknown"})
        failed_recving: frozenset[str] = frozenset()

    probe = module.Probe(str(tmp_path))
    calls: list[str] = []
    hook = {
        name: probe.timed(name, lambda *_a, n=name: calls.append(n))
        for name in ("on_new_request", "update_state_after_alloc", "update_connector_output")
    }
    step = probe.timed("build_connector_meta", lambda *_a: "meta")
    hook["on_new_request"](Request())
    hook["update_state_after_alloc"](Request(), None, 256)
    assert step(None) == "meta"
    hook["update_connector_output"](Output())
    hook["update_connector_output"](Output())  # named twice: still one load
    probe.flush()
    (file,) = tmp_path.glob("*.jsonl")
    events = [json.loads(line) for line in file.read_text().splitlines()]
    loads = [e for e in events if e["ev"] == "load"]
    assert len(loads) == 1 and loads[0]["tokens"] == 256 and loads[0]["req"] == "r1"
    assert 0 < loads[0]["ns"] <= loads[0]["since_arrival_ns"]
    assert sum(len(e["ns"]) for e in events if e["ev"] == "steps") == 1
    assert calls[:2] == ["on_new_request", "update_state_after_alloc"]


@pytest.mark.usefixtures("bench_modules")
def test_plot_of_a_store_result() -> None:
    plot = importlib.import_module("plot")
    spread = {"min": 0.5, "median": 1.0, "max": 2.0, "n": 3}
    waits = {"p50": 1.0, "p50_lo": 0.9, "p50_hi": 1.1, "p99": 3.0, "p99_lo": 2.0, "p99_hi": 4.0}
    figures = {"put_gbps_spread": spread, "restore_gbps_spread": spread}
    full = figures | {"put_beside_load_ms": waits}
    systems = {"kvoffload": full, "lmcache": {"skipped": "no"}}
    result = {"routine": "store", "limit": full, "systems": systems}
    made = plot.plots([result | {"small": {"kvoffload": figures}}])
    assert list(made) == ["store-1mib", "store-64kib", "store-put-beside-load"]
    assert made["store-1mib"].count("<title>") == 4 and made["store-64kib"].count("<title>") == 2


@pytest.mark.usefixtures("bench_modules")
def test_plot_of_a_ttft_result() -> None:
    plot = importlib.import_module("plot")
    bars = {"min": 1.0, "median": 2.0, "max": 4.0, "n": 3}
    figures = {"cold_ms": bars, "hbm_ms": None, "dram_ms": bars, "nvme_restart_ms": None}
    case = {"prompt_tokens": 4096, "systems": {"kvoffload": figures, "lmcache": {"skipped": "no"}}}
    made = plot.plots([{"routine": "ttft", "cases": [case]}])
    assert list(made) == ["ttft-4096"]
    assert made["ttft-4096"].count("<title>") == 2  # cold and DRAM
    with pytest.raises(ValueError, match="no plot"):
        plot.plots([{"routine": "crash"}])


def answer(name: str, ttft: float, sent: float = 0.0, logprob: float = -1.0) -> dict[str, Any]:
    return {
        "prompt": name,
        "sent": sent,
        "ttft": ttft,
        "tokens": [1],
        "logprobs": [logprob],
        "cached": 128,
    }


@pytest.mark.usefixtures("bench_modules")
def test_a_fault_is_judged_beside_recomputing() -> None:
    faults, plot = importlib.import_module("routines.faults"), importlib.import_module("plot")
    arms = importlib.import_module("fault_arms")
    names = [f"r{i}" for i in range(200)]
    none = [answer(n, 1.0 + i / 1000) for i, n in enumerate(names)]
    own = [answer(n, 2.0 + i / 500, sent=i / 10) for i, n in enumerate(names)]
    own[3] = {"prompt": "r3", "error": "TimeoutError: "}
    own[4]["logprobs"] = [-1.2]
    own[5]["tokens"] = [2]
    chunks = {"read": 10, "not_read": 3, "written": 0, "not_written": 0}
    window = arms.Window(none, own, 1.05, chunks, True, 0.5, {})
    late = arms.Window(none, own, 1.05, chunks, True, None, {})
    made = arms.Arm([window]).report(0.05)
    assert made["p95_ttft_vs_recompute"] == pytest.approx(2.0, abs=0.01)
    assert made["p99_ttft_vs_recompute"] is None  # 199 answers are too few
    both = arms.Arm([window, late]).report(0.05)
    low, high = both["p99_ttft_vs_recompute_lo"], both["p99_ttft_vs_recompute_hi"]
    assert low == high == both["p99_ttft_vs_recompute"] == 2.0  # pairs are resampled as pairs
    assert (made["errors"], made["wrong_outputs"], made["chunks_not_read"]) == (1, 2, 3)
    assert arms.Arm([window]).report(0.5)["wrong_outputs"] == 1  # tokens differ all the same
    # Sent at 0.0 to 1.0 and without a token at 1.05; r3 failed.
    assert made["in_flight"] == {"n": 10, "max_ms": 2020.0}
    assert made["recovered_s"] == 0.5 and both["recovered_s"] is None
    result = {"routine": "faults", "faults": {"slow": both}}
    rows = faults.table(result)[1]
    assert len(rows[0]) == len(faults.table(result)[0]) and "never" in rows[0]
    assert sorted(plot.plots([result])) == ["faults-p50", "faults-p95", "faults-p99"]


@pytest.mark.usefixtures("bench_modules")
def test_a_life_is_told_and_paused_and_its_end_is_noticed(tmp_path: Path) -> None:
    """The conversation itself, with a child that is no engine."""
    lives, systems = importlib.import_module("lives"), importlib.import_module("systems")
    child = tmp_path / "python"
    child.write_text(
        f"""#!{sys.executable}
import json, sys
source, sink = json.load(open(sys.argv[2]))["talk"]
out = open(sink, "w", buffering=1)
out.write('{{"ready_s": 1.5}}' + chr(10))
for line in open(source):
    op = json.loads(line)
    if op["op"] == "die":
        print("ValueError: told to")
        sys.exit(3)
    out.write(line)
"""
    )
    child.chmod(0o755)
    place = lives.Workplace(tmp_path, tmp_path, {}, systems.Budget(), timeout_s=2.0)
    life = lives.Live(place, str(child), dict(os.environ), {}, tmp_path)
    assert life.ready_s == 1.5 and life.ask({"op": "x"}) == {"op": "x"}
    life.pause()
    with pytest.raises(lives.LifeFailed, match="no answer"):
        life.ask({"op": "y"})
    life.resume()
    assert life.ask({"op": "z"}) == {"op": "y"}
    with pytest.raises(lives.LifeFailed, match="told to"):
        for _ in range(3):
            life.ask({"op": "die"})
    life.pause()
    life.stop()
    life.stop()


@pytest.mark.usefixtures("bench_modules")
@pytest.mark.parametrize("first", ["none", "kvoffload"])
def test_both_engines_are_timed_after_the_same_requests(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, first: str
) -> None:
    faults = importlib.import_module("routines.faults")
    naps: list[float] = []
    monkeypatch.setattr(faults.time, "sleep", naps.append)

    class Engine:
        def __init__(self) -> None:
            self.seen: list[Any] = []

        def resume(self) -> None:
            naps.clear()

        def pause(self) -> None:
            pass

        def ask(self, op: dict[str, Any]) -> dict[str, Any]:
            if op["op"] in ("reset", "load"):
                self.seen.append((op.get("define", op["op"]), sum(naps)))
            answer = {"requests": [], "wrote": 0.0, "alive": True}
            return answer if op["op"] != "metrics" else {}

    run = faults.Run.__new__(faults.Run)
    run.options = SimpleNamespace(
        concurrency=2, requests=8, rounds=2, utilization=0.0, output_tokens=1, limit_s=1.0,
        factor=10.0, seed=0, tail_tokens=2, docs=2, doc_tokens=4,
    )  # fmt: skip
    run.prompts, run.disk, run.control = faults.Prompts(run.options, 50), None, tmp_path / "fault"
    run.place = SimpleNamespace(model=Path("model"))
    said = {"fault": "slow"} | dict.fromkeys(faults.COUNTS.values(), 0)
    (tmp_path / "fault.status").write_text(json.dumps(said))
    monkeypatch.setattr(run, "recover", lambda name, own: 0.0)
    none, own = Engine(), Engine()
    run.window("slow", none, own, none if first == "none" else own)
    assert len(none.seen) == 3 and own.seen[:3] == none.seen


@pytest.mark.e2e
@pytest.mark.timeout(600)
def test_faults_of_the_tier_cost_no_output(tmp_path: Path) -> None:
    pytest.importorskip("vllm")
    lock = ["--lock", os.environ["KVBENCH_LOCK"]] if "KVBENCH_LOCK" in os.environ else []
    result = bench("faults", "--dir", str(tmp_path), *lock, timeout=550)
    assert list(result["faults"]) == ["slow", "killed"], result.get("skipped")
    for figures in result["faults"].values():
        assert (figures["errors"], figures["wrong_outputs"]) == (0, 0)
        assert figures["engine_alive"] and figures["requests"] == 24
        assert figures["p95_ttft_vs_recompute_lo"] <= figures["p95_ttft_vs_recompute_hi"]
    assert str(tmp_path) not in json.dumps(result["faults"]), "a path of this machine"
    # The faults were there, and so was the tier before them.
    killed = result["faults"]["killed"]
    assert killed["chunks_not_read"] + killed["chunks_not_written"] > 0
    assert not list(tmp_path.iterdir()), "the temp dir was left behind"


@pytest.mark.e2e
@pytest.mark.timeout(900)
def test_ttft_native_reloads_what_none_recomputes(tmp_path: Path) -> None:
    pytest.importorskip("vllm")
    lock = ["--lock", os.environ["KVBENCH_LOCK"]] if "KVBENCH_LOCK" in os.environ else []
    options = ["--systems", "none,native", "--dir", str(tmp_path), *lock]
    result = bench("ttft", *options, timeout=850)
    native = result["systems"]["native"]
    assert native["tokens_loaded"] == {"dram": 1024, "nvme_restart": 1024}
    assert native["outputs_equal"] and native["max_abs_dlogprob"] < 0.05
    assert native["load_only_ms"]["dram"]["median"] > 0
    assert result["systems"]["none"]["tokens_loaded"]["dram"] == 0
    assert result["limit"]["read_gbps"] > 0
    assert not list(tmp_path.iterdir()), "the temp dir was left behind"


@pytest.mark.e2e
@pytest.mark.timeout(900)
@pytest.mark.parametrize("routine", ["overhead", "serve"])
def test_load_routines_of_native(routine: str) -> None:
    pytest.importorskip("vllm")
    lock = ["--lock", os.environ["KVBENCH_LOCK"]] if "KVBENCH_LOCK" in os.environ else []
    result = bench(routine, "--systems", "none,native", *lock, timeout=850)
    if routine == "overhead":
        native = result["systems"]["native"]
        assert native["loads"] == 0, "a workload without reuse loaded something"
        assert native["throughput_ratio"] > 0 and native["scheduler_us_per_step"]["p50"] > 0
    else:
        native = result["workloads"]["chat"]["systems"]["native"]
        assert native["errors"] == 0 and native["wrong_outputs"] == 0
        assert native["ttft_ms"]["p50"] > 0


def test_mrc_keys() -> None:
    """The curve is within a point of the exact simulation, at all sizes and in a small table."""
    result = bench("mrc")
    assert result["worst_points"] < 1 and result["crowded_worst_points"] < 1
    case = result["cases"][0]
    assert len(case["exact"]) == len(result["fractions"]) == len(case["stamps"]["error_points"])
    assert case["stamps"]["us_per_request"] > 0 and case["sampled"]["seeds"] == 2
