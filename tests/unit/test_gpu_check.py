"""gpu_check: stages are bounded and judged by what they measured; benchmark settings for a GPU."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
NAMES = ("gpu_check", "gpu_stages", "gpu_run", "gpu_build")


@pytest.fixture(autouse=True)
def modules(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, Any]]:
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    yield {name: importlib.import_module(name) for name in NAMES}


@pytest.fixture
def machine(modules: dict[str, Any], tmp_path: Path) -> Any:
    runner = modules["gpu_run"].Runner(tmp_path / "log", dict(os.environ), tmp_path)
    return modules["gpu_stages"].Machine(runner, tmp_path, tmp_path, dry=True, quick=True)


def python(code: str) -> list[str]:
    return [sys.executable, "-c", code]


# -- running -----------------------------------------------------------------------------------------


def test_output_goes_to_the_log_and_progress_to_the_terminal(
    modules: dict[str, Any], machine: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    ended = machine.runner.run(python("print('[  1.5 s] half way'); print('noise')"), 20)
    assert ended.status == 0 and ended.tail == ["[  1.5 s] half way", "noise"]
    shown = capsys.readouterr().out
    assert "half way" in shown and "noise" not in shown
    assert "noise" in (machine.scratch / "log").read_text()


def test_an_overrun_ends_everything_it_started(modules: dict[str, Any], machine: Any) -> None:
    # Like the benchmark driver: a child in a session of its own, and SIGTERM ignored.
    code = (
        "import signal, subprocess, sys, time\n"
        "signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
        "p = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'],"
        " start_new_session=True)\n"
        "print(p.pid, flush=True)\ntime.sleep(60)\n"
    )
    modules["gpu_run"].GRACE_S = 0.5
    try:
        begun = time.monotonic()
        ended = machine.runner.run(python(code), 2.0)
    finally:
        modules["gpu_run"].GRACE_S = 15.0
    assert ended.status is None and time.monotonic() - begun < 15
    child = int(ended.tail[0])
    for _ in range(50):
        if not Path(f"/proc/{child}").exists() or _is_zombie(child):
            break
        time.sleep(0.1)
    else:
        pytest.fail("the child of a killed stage still runs")
    outcome = modules["gpu_stages"].ended_badly(ended, 2.0)
    assert outcome.status == "overran" and "2 s" in outcome.note


def _is_zombie(pid: int) -> bool:
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return True
    return text.rpartition(")")[2].split()[0] == "Z"


def test_a_failed_stage_does_not_stop_the_next(modules: dict[str, Any], machine: Any) -> None:
    stages, run, check = modules["gpu_stages"], modules["gpu_run"], modules["gpu_check"]
    seen: list[float] = []

    def good(_machine: Any, budget: float) -> Any:
        seen.append(budget)
        return run.Outcome("passed", "", ["42 GB/s"], {"x": 1})

    def broken(_machine: Any, budget: float) -> Any:
        raise KeyError("mistake")

    def slow(_machine: Any, budget: float) -> Any:
        time.sleep(1.2)
        return run.Outcome("passed")

    chosen = [stages.Stage(n, 30.0, f) for n, f in (("a", broken), ("b", good), ("c", slow))]
    rows = check.run_stages([*chosen, stages.Stage("d", 30.0, good)], machine, 6.0)
    assert [r["status"] for r in rows] == ["failed", "passed", "passed", "overran"]
    assert "KeyError" in rows[0]["note"] and "no time left" in rows[3]["note"]
    assert len(seen) == 1 and seen[0] <= 6.0
    assert not check.all_passed(rows) and check.all_passed(rows[1:3])
    assert not check.all_passed([{"status": "skipped"}])
    shown = check.table(rows)
    assert "42 GB/s" in shown and "mistake" in shown


def test_results_do_not_name_this_machine(modules: dict[str, Any], tmp_path: Path) -> None:
    rows = [{"note": f"no {tmp_path}/x and {ROOT}/y", "result": {"deep": [str(tmp_path)]}}]
    text = json.dumps(modules["gpu_check"].portable(rows, tmp_path))
    assert str(tmp_path) not in text and str(ROOT) not in text and "TMP/x" in text


def test_without_a_gpu_only_a_dry_run(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    if torch.cuda.is_available():
        pytest.skip("a GPU is here")
    command = ["bash", str(ROOT / "scripts" / "gpu_check.sh"), "--out", str(tmp_path)]
    env = os.environ | {"PYTHON": sys.executable}
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, env=env)
    assert done.returncode == 2 and "--dry-run" in done.stderr
    done = subprocess.run(
        [*command, "--stages", "nothing"], capture_output=True, text=True, timeout=60, env=env
    )
    assert done.returncode == 2 and "no stage 'nothing'" in done.stderr


def test_every_stage_fits_into_the_limit(modules: dict[str, Any]) -> None:
    check = modules["gpu_check"]
    for dry, limit, most in ((True, check.DRY_LIMIT_S, 360), (False, check.LIMIT_S, 540)):
        assert limit + 15 <= most
        for stage in check.stages(dry, False):
            assert stage.budget_s < limit


# -- judging -----------------------------------------------------------------------------------------


def equality(**changes: Any) -> dict[str, Any]:
    ours = {
        "max_abs_dlogprob": 2e-5,
        "tokens_loaded": {"dram": 1024},
        "outputs_equal": True,
        "failed_loads": 0,
    }
    return {
        "cases": [{"prompt_tokens": 1100, "systems": {"none": {}, "kvoffload": ours | changes}}]
    }


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({}, ""),
        ({"max_abs_dlogprob": 0.28}, "dlogprob"),
        ({"max_abs_dlogprob": None}, "unknown"),
        ({"tokens_loaded": {"dram": 0}}, "nothing was loaded"),
        ({"tokens_loaded": {"dram": None}}, "nothing was loaded"),
        ({"outputs_equal": False}, "other tokens"),
        ({"outputs_equal": None}, "other tokens"),
        ({"failed_loads": 2}, "2 failed loads"),
        ({"skipped": "engine life failed"}, "engine life failed"),
    ],
)
def test_equality_is_judged(modules: dict[str, Any], changes: dict[str, Any], word: str) -> None:
    outcome = modules["gpu_stages"].judge_equality(equality(**changes))
    assert outcome.status == ("failed" if word else "passed")
    assert word in outcome.note


def test_a_peer_may_be_missing_but_not_ours(modules: dict[str, Any]) -> None:
    judge = modules["gpu_stages"].judge_ttft
    ms = {"median": 100.0}
    none = {"cold_ms": ms, "dram_ms": ms, "tokens_loaded": {"dram": 0}}
    ours = {"cold_ms": ms, "dram_ms": {"median": 9.6}, "tokens_loaded": {"dram": 4096}}
    peer = {"skipped": "no room in /dev/shm"}

    def result(own: dict[str, Any]) -> dict[str, Any]:
        systems = {"none": none, "native": peer, "kvoffload": own}
        return {"cases": [{"prompt_tokens": 4096, "systems": systems}], "systems": systems}

    good = judge(result(ours))
    assert good.status == "passed" and "/dev/shm" in good.note
    assert "kvoffload dram 10 ms" in good.figures[0]
    assert judge(result(ours | {"tokens_loaded": {"dram": 0}})).status == "failed"
    assert judge(result({"skipped": "it died"})).note == "it died"


def test_overhead_and_copies_are_judged(modules: dict[str, Any]) -> None:
    stages = modules["gpu_stages"]
    own = {"throughput_ratio": 0.995, "itl_p50_ratio": 1.002, "loads": 0}
    assert stages.judge_overhead({"systems": {"kvoffload": own}}).status == "passed"
    assert stages.judge_overhead({"systems": {"kvoffload": own | {"loads": 1}}}).status == "failed"
    assert stages.judge_overhead({"systems": {}}).status == "failed"
    row = {"engine": "kvoffload", "layout": "per_layer", "h2d_gbps": 40.0, "d2h_gbps": 30.0}
    row["vs_limit"] = {"h2d": 0.8, "d2h": 0.6}
    assert stages.judge_copy({"cases": [row]}).status == "passed"
    assert stages.judge_copy({"cases": [row | {"pinned": False}]}).status == "failed"
    made = {"pinned": True, "calibrated": False, "served": {"plain": 9, "triton": 2}}
    (figure,) = stages.judge_copy({"cases": [row | made]}).figures
    assert figure.endswith(", by plain/triton, not calibrated in time")
    assert stages.judge_copy({"cases": [{"engine": "limit"}]}).status == "failed"


def test_skipped_tests_are_no_pass(modules: dict[str, Any]) -> None:
    judge = modules["gpu_stages"].judge_tests
    assert judge("===== 11 passed in 3.20s =====").status == "passed"
    assert judge("1 skipped in 0.10s").status == "failed"
    assert judge("").status == "failed"


# -- building ----------------------------------------------------------------------------------------


def test_a_header_is_found_outside_of_the_compilers_path(
    modules: dict[str, Any], tmp_path: Path
) -> None:
    build = modules["gpu_build"]
    command = [*build.compiler(), "-nostdinc"]  # knows no folder at all
    folder = tmp_path / "carried"
    folder.mkdir()
    (folder / "xxhash.h").write_text("int XXH3_64bits_withSeed(const void*, int, int);\n")
    old = tmp_path / "old"
    old.mkdir()
    (old / "xxhash.h").write_text("// 0.6 has no XXH3\n")
    assert build.find_xxhash(command, iter([tmp_path, old, folder])) == folder
    with pytest.raises(build.Missing, match=r"no xxhash\.h.*KVOFFLOAD_XXHASH_INCLUDE"):
        build.find_xxhash(command, iter([old]))


def test_a_missing_compiler_is_named(
    modules: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler -O1")
    with pytest.raises(modules["gpu_build"].Missing, match="no-such-compiler"):
        modules["gpu_build"].compiler()


def test_the_checkout_declares_its_plugin(modules: dict[str, Any], tmp_path: Path) -> None:
    site = modules["gpu_run"].checkout_site(tmp_path / "site")
    code = (
        "from importlib.metadata import entry_points as e\n"
        f"import sys; sys.path = [p for p in sys.path if 'site-packages' not in p] + [{str(site)!r}]\n"
        "print([p.value for p in e(group='vllm.general_plugins')])"
    )
    done = subprocess.run(python(code), capture_output=True, text=True, timeout=60, cwd=tmp_path)
    assert "kvoffload.engines.vllm.plugin:register" in done.stdout, done.stderr


# -- what the benchmarks do on a GPU -----------------------------------------------------------------


@pytest.fixture
def systems(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setenv("KVBENCH_DEVICE", "cuda")
    return importlib.import_module("systems")


def test_native_is_as_shipped_on_a_gpu(systems: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    budget = systems.Budget(dram_gib=0.001)
    extra = systems._native(None, budget)["kv_connector_extra_config"]
    assert extra == {"cpu_bytes_to_use": int(0.001 * 2**30)}
    with pytest.raises(systems.Skip, match="/dev/shm has"):
        systems._native(None, systems.Budget(dram_gib=1e6))
    monkeypatch.setenv("KVBENCH_DEVICE", "cpu")
    assert (
        systems._native(None, budget)["kv_connector_extra_config"]["spec_name"] == "NativeOnCpuSpec"
    )


def test_engines_keep_the_callers_path(
    systems: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    pytest.importorskip("vllm")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(["", "/bundle/site", str(ROOT)]))
    with systems.running("none", None, systems.Budget(), tmp_path) as side:
        paths = side.env["PYTHONPATH"].split(os.pathsep)
    assert paths[0].endswith("probe") and paths[-1] == "/bundle/site"
    assert paths.count(str(ROOT)) == 1 and "" not in paths


def test_the_timed_models_have_the_shapes_they_are_named_after(tmp_path: Path) -> None:
    model = importlib.import_module("model")
    shape = model.SHAPES["llama8b"]
    assert shape.kv_bytes_per_token == 128 * 1024
    assert shape.engine == {"dtype": "bfloat16", "load_format": "dummy"}
    made = model.make_model(tmp_path / "m", shape)
    config = json.loads((made / "config.json").read_text())
    assert config["num_key_value_heads"] == 8 and config["intermediate_size"] == 14336
    assert not list(made.glob("*.safetensors"))
    assert model.SHAPES["tiny"].engine == {"dtype": "float32"}
    assert model.SHAPES["smollm135m"].kv_bytes_per_token == 45 * 1024  # 2 * 30 * 3 * 64 * 4
