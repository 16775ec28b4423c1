"""The plugin: registration, the start-up check as a user meets it, in-place weight updates."""

from __future__ import annotations

import json
import logging
import os
import pickle
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("vllm")

from kvoffload.config import Config
from kvoffload.engines.vllm import compat, native_settings, notes, plugin
from kvoffload.engines.vllm.weight_files import NotLocal, WeightFiles, loaded_after
from kvoffload.errors import UnsupportedError
from kvoffload.memory import HostMemory
from tests.unit.test_namespace import HF

OURS = {"kv_connector": "KVOffloadConnector", "kv_role": "kv_both"}


@pytest.fixture(autouse=True)
def restore() -> Iterator[None]:
    """Wrapped classes and registrations of one test do not reach the next."""
    from vllm.config import VllmConfig
    from vllm.distributed.kv_transfer.kv_connector.factory import KVConnectorFactory

    registry = dict(KVConnectorFactory._registry)
    original = VllmConfig._post_init_kv_transfer_config
    resolve = VllmConfig._resolve_mm_embedding_inputs
    yield
    KVConnectorFactory._registry.clear()
    KVConnectorFactory._registry.update(registry)
    VllmConfig._post_init_kv_transfer_config = original
    VllmConfig._resolve_mm_embedding_inputs = resolve
    plugin._said.clear()
    plugin._listeners.clear()


def transfer(extra: dict[str, Any] | None = None, **kw: Any) -> Any:
    from vllm.config import KVTransferConfig

    return KVTransferConfig(**(OURS | {"kv_connector_extra_config": extra or {}} | kw))


def engine(extra: dict[str, Any] | None = None, **kw: Any) -> Any:
    return SimpleNamespace(
        kv_transfer_config=transfer(extra, **kw),
        parallel_config=SimpleNamespace(pipeline_parallel_size=1),
        model_config=SimpleNamespace(is_encoder_decoder=False),
        aux_output_config=SimpleNamespace(),
    )


def multi(*children: dict[str, Any]) -> Any:
    return engine({"connectors": list(children)}, kv_connector="MultiConnector")


# -- registration ------------------------------------------------------------------------------------


def test_register_is_idempotent() -> None:
    from vllm.config import VllmConfig
    from vllm.distributed.kv_transfer.kv_connector.factory import KVConnectorFactory

    plugin.register()
    wrapped = VllmConfig._post_init_kv_transfer_config
    plugin.register()
    assert VllmConfig._post_init_kv_transfer_config is wrapped
    assert "KVOffloadConnector" in KVConnectorFactory._registry
    assert 0 < plugin.loaded_after_ns() == plugin.loaded_after_ns()


def test_register_survives_a_vllm_without_the_hook(caplog: pytest.LogCaptureFixture) -> None:
    from vllm.config import VllmConfig
    from vllm.distributed.kv_transfer.kv_connector.factory import KVConnectorFactory

    del VllmConfig._post_init_kv_transfer_config
    with caplog.at_level(logging.WARNING, "vllm.kvoffload"):
        logging.getLogger("vllm").propagate = True
        plugin.register()
    assert any("_post_init_kv_transfer_config" in r.message for r in caplog.records)
    assert "KVOffloadConnector" in KVConnectorFactory._registry
    assert not hasattr(VllmConfig, "_post_init_kv_transfer_config")


def test_process_start_is_before_now_and_after_boot() -> None:
    import time

    began = plugin._process_start_ns()
    assert 0 < began < time.time_ns()
    assert time.time_ns() - began < 86400 * 10**9


# -- the check ---------------------------------------------------------------------------------------


def test_a_good_config_gets_recompute_and_says_so_once(caplog: pytest.LogCaptureFixture) -> None:
    logging.getLogger("vllm").propagate = True
    with caplog.at_level(logging.INFO, "vllm.kvoffload"):
        for _ in range(2):
            config = engine({"dram_gib": 0.1})
            plugin.prepare(config)
            assert config.kv_transfer_config.kv_load_failure_policy == "recompute"
    assert sum("recompute" in r.message for r in caplog.records) == 1


def test_children_of_multi_connector_are_ours_too() -> None:
    other = {"kv_connector": "ExampleConnector", "kv_role": "kv_both"}
    config = multi(other, OURS | {"kv_connector_extra_config": {"dram_gib": 0.1}})
    plugin.prepare(config)
    assert config.kv_transfer_config.kv_load_failure_policy == "recompute"
    bad = multi(other, OURS | {"kv_connector_extra_config": {"dram_gb": 1}})
    with pytest.raises(plugin.StartupError, match="did you mean dram_gib"):
        plugin.prepare(bad)
    with pytest.raises(plugin.StartupError, match="given 2 times"):
        plugin.prepare(multi(OURS, OURS))


@pytest.mark.parametrize("children", [5, "ab", {"a": 1}, [5, None, ["x"]]])
@pytest.mark.parametrize("name", ["MultiConnector", "OffloadingConnector"])
def test_settings_of_any_shape_are_not_ours(
    name: str, children: Any, caplog: pytest.LogCaptureFixture
) -> None:
    """Nothing of ours is named: whether that is an error is for vLLM to say."""
    logging.getLogger("vllm").propagate = True
    extra = {"connectors": children, "secondary_tiers": children}
    config = engine(extra, kv_connector=name)
    with caplog.at_level(logging.ERROR, "vllm.kvoffload"):
        plugin.prepare(config)
    assert not caplog.records and not list(plugin.our_configs(config.kv_transfer_config))


@pytest.mark.parametrize("config", [None, "other", "multi-other"])
def test_other_connectors_are_left_alone(config: str | None) -> None:
    made = engine(kv_connector="ExampleConnector")
    if config is None:
        made.kv_transfer_config = None
    if config == "multi-other":
        made = multi({"kv_connector": "ExampleConnector", "kv_role": "kv_both"})
    made.parallel_config.pipeline_parallel_size = 4
    plugin.prepare(made)
    if made.kv_transfer_config is not None:
        assert made.kv_transfer_config.kv_load_failure_policy == "fail"


@pytest.mark.parametrize(
    ("where", "field", "value", "part"),
    [
        ("parallel_config", "pipeline_parallel_size", 2, "--pipeline-parallel-size 2"),
        ("parallel_config", "decode_context_parallel_size", 2, "--decode-context-parallel-size 2"),
        (
            "parallel_config",
            "prefill_context_parallel_size",
            2,
            "--prefill-context-parallel-size 2",
        ),
        ("parallel_config", "nnodes", 2, "several nodes"),
        ("parallel_config", "enable_fault_tolerance", True, "--enable-fault-tolerance"),
        ("parallel_config", "nnodes_within_dp", 2, "several nodes"),
        ("model_config", "is_encoder_decoder", True, "encoder-decoder"),
        ("model_config", "enable_sleep_mode", True, "--enable-sleep-mode"),
        ("model_config", "enable_return_routed_experts", True, "--enable-return-routed-experts"),
        (
            "aux_output_config",
            "enable_return_routed_experts",
            True,
            "--enable-return-routed-experts",
        ),
        ("kv_transfer_config", "kv_role", "kv_producer", "kv_role='kv_producer'"),
    ],
)
def test_refused_by_name(where: str, field: str, value: Any, part: str) -> None:
    config = engine()
    setattr(getattr(config, where), field, value)
    with pytest.raises(plugin.StartupError) as caught:
        plugin.prepare(config)
    line = str(caught.value)
    assert part in line and "\n" not in line and ";" in line


@pytest.mark.parametrize(
    ("version", "refused"),
    [
        ((0, 25, 1), True),
        ((0, 26, 0), False),
        ((0, 27, 1), True),
        ((0, 29, 0), True),
        ((0, 30, 0), False),
        ((0, 33, 0), False),
        ((0, 34, 0), False),  # newer than tested: doctor warns, nothing is refused
        ((), False),
    ],
)
def test_versions_that_were_never_read_are_refused(
    version: tuple[int, ...], refused: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compat, "vllm_version", lambda: version)
    config = engine({"dram_gib": 0.1})
    if not refused:
        plugin.prepare(config)
        return
    with pytest.raises(plugin.StartupError) as caught:
        plugin.prepare(config)
    line = str(caught.value)
    assert f"vLLM {'.'.join(map(str, version))} is not supported" in line and "\n" not in line


def test_a_scheduler_in_every_rank_is_refused() -> None:
    """Under torchrun: as many arenas as ranks, and to none of them all ranks attach."""
    config = engine({"dram_gib": 0.1})
    config.parallel_config.distributed_executor_backend = "external_launcher"
    plugin.prepare(config)  # one rank has one scheduler
    config.parallel_config.tensor_parallel_size = 2
    with pytest.raises(plugin.StartupError) as caught:
        plugin.prepare(config)
    line = str(caught.value)
    assert "--distributed-executor-backend external_launcher" in line and "\n" not in line
    config.parallel_config.distributed_executor_backend = "mp"
    plugin.prepare(config)


def test_data_parallel_over_nodes_is_fine() -> None:
    config = engine()
    config.parallel_config.nnodes = 4
    config.parallel_config.nnodes_within_dp = 1
    plugin.prepare(config)


# -- data parallel on one machine


@pytest.mark.parametrize(
    ("parallel", "engines"),
    [
        ({"data_parallel_size": 8, "data_parallel_size_local": 8}, 8),
        ({"data_parallel_size": 16, "data_parallel_size_local": 8}, 8),
        ({"data_parallel_size": 8, "data_parallel_size_local": 0}, 1),  # its engines are elsewhere
        ({"data_parallel_size": 8, "data_parallel_size_local": None}, 1),
        ({}, 1),
    ],
)
def test_engines_of_one_machine_share_what_is_free(
    parallel: dict[str, Any], engines: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They start together: each would take a quarter of the same free memory."""
    monkeypatch.setattr("kvoffload.config.host_memory", lambda: HostMemory(1 << 40, 1 << 39))
    child = engine(kv_connector="MultiConnector")  # a child's settings are without notes
    made = engine()
    for config in (made, child):
        vars(config.parallel_config).update(parallel)
    plugin.prepare(made)
    # As an engine process does with a dense model's rank, before it builds its connector.
    made.parallel_config.data_parallel_size = made.parallel_config.data_parallel_size_local = 1
    plugin.prepare(made)
    for config in (made, child):
        n = compat.local_engines(config)
        assert n == engines
        assert Config().dram_bytes(n) == (64 << 30) // engines
        assert Config(dram_gib=3).dram_bytes(n) == 3 << 30, "what is asked for is per engine"


def test_dram_gib_counts_once_per_engine_of_the_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kvoffload.config.host_memory", lambda: HostMemory(100 << 30, 90 << 30))
    config = engine({"dram_gib": 50})
    config.parallel_config.data_parallel_size_local = 2
    plugin.prepare(config)
    config.parallel_config.data_parallel_size_local = 4
    config.kv_transfer_config = transfer({"dram_gib": 50})
    with pytest.raises(plugin.StartupError) as caught:
        plugin.prepare(config)
    assert str(caught.value) == (
        "kvoffload: dram_gib=50.0 is not allowed: each of the 4 data parallel engines of this "
        "machine takes it, 200.0 GiB in all, and this machine (or container) has 100.0 GiB of "
        "memory"
    )
    child = multi(OURS | {"kv_connector_extra_config": {"dram_gib": 50}})
    child.parallel_config.data_parallel_size_local = 4
    with pytest.raises(plugin.StartupError, match="each of the 4 data parallel engines"):
        plugin.prepare(child)


def test_a_mistake_of_the_check_itself_is_not_the_users(caplog: pytest.LogCaptureFixture) -> None:
    logging.getLogger("vllm").propagate = True

    class Moved:
        """A parallel config whose field turned into something that raises."""

        @property
        def pipeline_parallel_size(self) -> int:
            raise RuntimeError("moved")

    config = engine({"dram_gib": 0.1})
    config.parallel_config = Moved()
    with caplog.at_level(logging.ERROR, "vllm.kvoffload"):
        plugin.prepare(config)
    assert any("start-up check failed" in r.message for r in caplog.records)
    with pytest.raises(UnsupportedError):
        plugin.check_supported(SimpleNamespace(parallel_config=SimpleNamespace(nnodes=2)))


def test_the_layout_is_asked_for_only_when_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm.platforms import current_platform

    alone, beside = engine({"dram_gib": 0.1}), multi(OURS, {"kv_connector": "ExampleConnector"})
    for config in (alone, beside):
        plugin.prepare(config)
    assert compat.wanted_layout(alone) is None  # the CPU backend has one layout
    monkeypatch.setattr(type(current_platform), "is_cuda", lambda self: True)
    assert compat.wanted_layout(alone) == "BLHNC"
    assert compat.wanted_layout(beside) is None
    alone.model_config.use_mla = True
    assert compat.wanted_layout(alone) is None
    alone.model_config.use_mla = False
    monkeypatch.setattr(compat, "vllm_version", lambda: (0, 26, 0))
    assert compat.wanted_layout(alone) is None
    assert compat.wanted_layout(engine()) is None  # the start-up check did not run


def test_our_place_cannot_be_taken_unnoticed(tmp_path: Path) -> None:
    from vllm.engine.arg_utils import EngineArgs

    (tmp_path / "config.json").write_text(json.dumps(HF))
    plugin.register()
    with pytest.raises(plugin.StartupError, match=r"--kv-offloading-size .* dram_gib"):
        _without_class(
            lambda: EngineArgs(
                model=str(tmp_path),
                skip_tokenizer_init=True,
                max_model_len=256,
                kv_transfer_config=transfer(),
                kv_offloading_size=1.0,
            )
        )


def test_through_the_real_vllm_config(tmp_path: Path) -> None:
    from vllm.engine.arg_utils import EngineArgs

    (tmp_path / "config.json").write_text(json.dumps(HF))
    args: dict[str, Any] = {
        "model": str(tmp_path),
        "skip_tokenizer_init": True,
        "max_model_len": 256,
    }
    plugin.register()
    config = _without_class(lambda: EngineArgs(**args, kv_transfer_config=transfer()))
    assert config.kv_transfer_config.kv_load_failure_policy == "recompute"
    reached = pickle.loads(pickle.dumps(config))
    assert compat.is_alone(reached) and str(tmp_path) in notes.read(reached)["folders"]
    with pytest.raises(plugin.StartupError) as caught:
        _without_class(lambda: EngineArgs(**args, kv_transfer_config=transfer({"dram_gib": "8"})))
    assert str(caught.value).startswith("kvoffload: dram_gib='8' is not allowed")


def test_vllm_can_copy_the_config(tmp_path: Path) -> None:
    """Every multimodal model and many drafters build parts of themselves from a copy."""
    from vllm.config.utils import replace
    from vllm.engine.arg_utils import EngineArgs

    (tmp_path / "config.json").write_text(json.dumps(HF))
    plugin.register()
    given: dict[str, Any] = {"dram_gib": 0.1}
    asked = transfer(given)  # may be given to the next engine as well
    config = _without_class(
        lambda: EngineArgs(
            model=str(tmp_path),
            skip_tokenizer_init=True,
            max_model_len=256,
            kv_transfer_config=asked,
        )
    )
    for copied in (replace(config), config.with_hf_config(config.model_config.hf_config)):
        assert notes.read(copied) == notes.read(config)
        assert compat.is_alone(copied)
        assert [dict(e) for e in plugin.our_configs(copied.kv_transfer_config)] == [given]
    assert given == asked.kv_connector_extra_config == {"dram_gib": 0.1}


def test_a_checkpoint_written_between_two_engines_of_a_process(tmp_path: Path) -> None:
    """Train, save, LLM(checkpoint), and again: files younger than the first engine are no younger
    than the second, but what is written after its own configuration is."""
    from kvoffload.engines.vllm.weights import DigestCache, digest_all

    cache = DigestCache(tmp_path / "weights.json")
    plugin.register()
    folder = tmp_path / "model"
    folder.mkdir()
    weights = folder / "a.safetensors"
    weights.write_bytes(b"1")
    time.sleep(0.05)
    config = engine()
    config.model_config.model = str(folder)
    plugin.prepare(config)
    assert plugin.loaded_after_ns() < weights.stat().st_ctime_ns < loaded_after(config)
    assert loaded_after(config) < time.time_ns()
    source = WeightFiles("model", folder, (weights,))
    digest_all([source], cache, loaded_after(config))
    time.sleep(0.05)
    weights.write_bytes(b"2")
    plugin.prepare(config)  # vLLM copies its configuration: still that of the first time
    with pytest.raises(NotLocal, match="changed after this engine was started"):
        digest_all([source], cache, loaded_after(config))


def test_children_and_the_tier_are_noted_too(tmp_path: Path) -> None:
    """Or a folder that is swapped while vLLM loads it is filed under the new weights' digest."""
    from vllm.distributed.kv_transfer.kv_connector.v1.multi_connector import MultiConnector

    inner = {"kv_connector": "MultiConnector", "kv_role": "kv_both"}
    example = {"kv_connector": "ExampleConnector", "kv_role": "kv_both"}
    ours = OURS | {"kv_connector_extra_config": {"dram_gib": 0.1}}
    given = [example, inner | {"kv_connector_extra_config": {"connectors": [ours]}}]
    before = json.dumps(given)
    config = multi(*given)
    config.model_config.model = str(tmp_path)
    plugin._register_connector()
    plugin.prepare(config)
    assert json.dumps(given) == before
    assert notes.KEY not in config.kv_transfer_config.kv_connector_extra_config["connectors"][0]
    for _ in range(2):
        config = MultiConnector._get_connector_classes_and_configs(config)[-1][1]
    assert config.kv_transfer_config.kv_connector == plugin.CONNECTOR
    assert str(tmp_path) in notes.read(config)["folders"] and not compat.is_alone(config)
    (extra,) = plugin.our_configs(config.kv_transfer_config)
    assert extra == {"dram_gib": 0.1}

    tier = {"type": "KVOffloadTier", "module_path": native_settings.TIER_MODULE, "nvme_path": "/n"}
    config = engine({"secondary_tiers": [tier]}, kv_connector="OffloadingConnector")
    config.model_config.model = str(tmp_path)
    plugin.prepare(config)
    assert str(tmp_path) in notes.read(config)["folders"]


@pytest.mark.parametrize("others", [[], [{"kv_connector": "NixlConnector", "kv_role": "kv_both"}]])
def test_an_offload_cache_is_no_decode_side(others: list[dict[str, Any]]) -> None:
    """Of a KV consumer vLLM supposes that images without embeddings come with their KV."""
    from vllm.config import VllmConfig

    plugin.register()
    mm = SimpleNamespace(
        allow_missing_mm_embeddings=None, enable_mm_embeds=False, language_model_only=False
    )
    for config in (engine(), multi(OURS), multi(OURS, *others)):
        config.model_config.multimodal_config = mm
        config.ec_transfer_config = None
        had = config.kv_transfer_config
        VllmConfig._resolve_mm_embedding_inputs(config)
        assert config.kv_transfer_config is had
    assert mm.allow_missing_mm_embeddings is mm.enable_mm_embeds is bool(others)


def _without_class(make: Any) -> Any:
    """create_engine_config with a stand-in connector class (ours needs the native core)."""
    from vllm.distributed.kv_transfer.kv_connector.factory import KVConnectorFactory
    from vllm.distributed.kv_transfer.kv_connector.v1.example_connector import ExampleConnector

    KVConnectorFactory._registry["KVOffloadConnector"] = lambda: ExampleConnector
    return make().create_engine_config()


# -- what a user sees --------------------------------------------------------------------------------


def _installed(folder: Path) -> Path:
    """The entry point as an installed distribution would declare it."""
    info = folder / "kvoffload_under_test-0.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(
        "Metadata-Version: 2.1\nName: kvoffload_under_test\nVersion: 0.0\n"
    )
    (info / "entry_points.txt").write_text(
        "[vllm.general_plugins]\nkvoffload_under_test = kvoffload.engines.vllm.plugin:register\n"
    )
    return folder


@pytest.mark.timeout(180)
@pytest.mark.parametrize(
    ("extra", "args", "line"),
    [
        ({"dram_gb": 4}, [], "unknown key 'dram_gb': did you mean dram_gib?"),
        ({}, ["--pipeline-parallel-size", "2"], "--pipeline-parallel-size 2 is not supported"),
    ],
)
def test_the_server_ends_with_one_readable_line(
    tmp_path: Path, extra: dict[str, Any], args: list[str], line: str
) -> None:
    model = tmp_path / "m"
    model.mkdir()
    (model / "config.json").write_text(json.dumps(HF))
    connector = json.dumps(OURS | {"kv_connector_extra_config": extra})
    root = str(Path(__file__).parents[2])
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(model)]
    options = ["--port", "0", "--skip-tokenizer-init", "--max-model-len", "256"]
    run = subprocess.run(
        [*command, *options, "--kv-transfer-config", connector, *args],
        capture_output=True,
        text=True,
        timeout=150,
        cwd=tmp_path,
        env=os.environ
        | {"PYTHONPATH": os.pathsep.join([str(_installed(tmp_path / "site")), root])},
    )
    last = (run.stdout + run.stderr).strip().splitlines()[-1]
    assert run.returncode != 0
    assert "kvoffload: " in last and line in last, (run.stdout + run.stderr)[-3000:]
    assert "EngineCore" not in run.stdout + run.stderr, "an engine process was started"


# -- weights that change in place --------------------------------------------------------------------


@pytest.fixture
def workers() -> Iterator[Any]:
    """vLLM's real worker classes plus a worker with an extension, unwrapped afterwards."""
    import vllm.v1.worker.gpu_worker as gpu_worker
    from vllm.v1.worker.worker_base import WorkerBase

    class Extension:
        def receive_weights_from_trainer(self) -> str:
            return "received"

        def update_named_param(self, name: str) -> str:  # as TRL's extension
            return name

        def load_model(self) -> str:  # vLLM has one of that name, and calls it itself
            return "loaded"

        @staticmethod
        def load_params_from(path: str) -> str:
            return f"read {path}"

        @classmethod
        def merged_by(cls) -> str:
            return cls.__name__

        sync_type = dict

        def ping(self) -> str:
            return "pong"

    class MyWorker(gpu_worker.Worker, Extension):
        def __init__(self) -> None:  # no device here
            self.fails = False

        def reload_weights(self, *args: Any, **kwargs: Any) -> str:
            if self.fails:
                raise OSError("gone")
            return "reloaded"

        def add_lora(self, lora_request: Any) -> bool:
            return True

    classes = [c for c in plugin._weight_classes() if c is not object]
    saved = [(c, n, f) for c in classes for n, f in list(vars(c).items()) if callable(f)]
    assert WorkerBase in classes and Extension in classes
    yield MyWorker
    for cls, name, original in saved:
        if vars(cls).get(name) is not original:
            setattr(cls, name, original)


def test_real_worker_classes_are_wrapped_once(workers: Any) -> None:
    done = plugin.wrap_weight_methods()
    for method in plugin.WEIGHT_METHODS:
        assert {f"Worker.{method}", f"WorkerBase.{method}"} & set(done)
    assert "GPUModelRunner.reload_weights" in done
    assert "MyWorker.reload_weights" in done
    assert ("Worker.reset_weights" in done) is hasattr(workers.__mro__[1], "reset_weights")
    assert "Extension.receive_weights_from_trainer" in done and "Extension.ping" not in done
    assert "Extension.update_named_param" in done and "Extension.load_model" not in done
    assert "WorkerBase.apply_model" in done
    assert plugin.wrap_weight_methods() == []


def test_listeners_hear_success_and_failure(workers: Any) -> None:
    heard: list[str] = []

    def listener() -> None:
        heard.append("changed")

    def broken() -> None:
        raise RuntimeError("a listener's own mistake")

    plugin.add_weights_listener(broken)
    plugin.add_weights_listener(listener)
    plugin.add_weights_listener(listener)
    worker = workers()
    assert worker.reload_weights() == "reloaded" and len(heard) == 2  # before and after
    worker.fails = True
    with pytest.raises(OSError, match="gone"):
        worker.reload_weights()
    assert len(heard) == 4
    assert worker.receive_weights_from_trainer() == "received" and len(heard) == 6
    assert worker.ping() == "pong" and len(heard) == 6
    worker.add_lora(SimpleNamespace(load_inplace=False))
    assert len(heard) == 6
    worker.add_lora(lora_request=SimpleNamespace(load_inplace=True))
    assert len(heard) == 8
    plugin.remove_weights_listener(listener)
    worker.fails = False
    worker.reload_weights()
    assert len(heard) == 8


def test_what_an_extension_keeps_under_such_names_stays_what_it_is(workers: Any) -> None:
    heard: list[int] = []
    plugin.add_weights_listener(lambda: heard.append(1))
    plugin.wrap_weight_methods()
    worker = workers()
    assert worker.load_params_from("x") == workers.load_params_from("x") == "read x"
    assert len(heard) == 4
    assert worker.merged_by() == "MyWorker" and len(heard) == 6
    assert worker.sync_type is dict and isinstance({}, worker.sync_type) and len(heard) == 6


def test_the_real_update_methods_notify_even_when_they_refuse(workers: Any) -> None:
    heard: list[int] = []
    plugin.add_weights_listener(lambda: heard.append(1))
    worker = workers()
    worker.weight_transfer_engine = None
    for call in (
        lambda: worker.update_weights({}),
        lambda: worker.finish_weight_update(),
    ):
        before = len(heard)
        with pytest.raises(RuntimeError, match="not configured"):
            call()
        assert len(heard) == before + 2
