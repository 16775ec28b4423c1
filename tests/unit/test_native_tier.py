"""KVOffloadTier without an engine: vLLM's own manager, pool and keys over a real chunk store."""

from __future__ import annotations

import dataclasses
import itertools
import json
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

pytest.importorskip("vllm")
pytest.importorskip("vllm.v1.kv_offload.tiering.base")

from vllm.v1.kv_offload.base import LookupResult, ReqContext, ScheduleEndContext, make_offload_key
from vllm.v1.kv_offload.config import (
    OffloadingCacheConfig,
    OffloadingConfig,
    OffloadingGroupConfig,
    OffloadingModelConfig,
    OffloadingParallelConfig,
)
from vllm.v1.kv_offload.cpu.shared_offload_region import SharedOffloadRegion
from vllm.v1.kv_offload.tiering.base import TransferJob
from vllm.v1.kv_offload.tiering.manager import (
    CPUPrimaryTierOffloadingManager,
    TieringOffloadingManager,
)

from kvoffload.engines.vllm import compat, native_settings, native_tier
from kvoffload.engines.vllm.native_tier import KVOffloadTier
from kvoffload.errors import ConfigError, UnsupportedError
from kvoffload.tiers.nvme import drive
from kvoffload.tiers.nvme.breaker import THRESHOLD
from kvoffload.tiers.nvme.requests import GET

ROWS, ROW = 12, 8192


class FakeNames:
    """A namespace source whose facts the test sets."""

    def __init__(self, namespace: bytes | None = b"n" * 16, persistent: bool | None = True) -> None:
        self.value, self.persistent, self.closed = namespace, persistent, False

    def namespace(self) -> bytes | None:
        return self.value

    def on_first_request(self) -> None: ...

    def new_epoch(self) -> None:
        self.value = uuid.uuid4().bytes

    def close(self) -> None:
        self.closed = True

    def check(self) -> None: ...


def spec(**changes: Any) -> Any:
    parallel = {f.name: 1 for f in dataclasses.fields(OffloadingParallelConfig)}
    config = OffloadingConfig(
        groups=(OffloadingGroupConfig(128, ("layer.0",), 0),),
        worker_kv_bytes_per_block=ROW,
        enable_kv_cache_events=False,
        extra_config={},
        engine_id="e",
        model=OffloadingModelConfig("m", "float16"),
        cache=OffloadingCacheConfig(128, 1),
        parallel=OffloadingParallelConfig(**parallel | {"rank": 0}),
    )
    return SimpleNamespace(config=dataclasses.replace(config, **changes))


def key(n: int, group: int = 0) -> Any:
    return make_offload_key(n.to_bytes(32, "big"), group)


KEYS = [key(n) for n in range(6)]


class Bench:
    """A tier over a pool of its own."""

    def __init__(
        self,
        path: Path,
        names: Any = None,
        the_spec: Any = None,
        rows: int = ROWS,
        **settings: Any,
    ) -> None:
        self.pool = np.full((rows, ROW), 0xEE, dtype=np.uint8)
        self.names = names or FakeNames()
        settings = {"nvme_path": str(path), "nvme_gib": 0.05} | settings
        view = memoryview(self.pool.view(np.int8))
        self.tier = KVOffloadTier(the_spec or spec(), view, "t", names=self.names, **settings)
        self._jobs = itertools.count(1)
        self.request("r")

    def request(self, name: str) -> None:
        """From now on it is this one's."""
        self.ctx = ReqContext(name)
        self.tier.on_new_request(self.ctx)

    def inject(self, fault: str, value: int) -> None:
        store = self.tier._store._drives[0].store
        assert store is not None
        store.inject(fault, value)

    def trips(self) -> int:
        return int(self.tier._store.trips())

    def fill(self, keys: list[Any]) -> None:
        for row, k in enumerate(keys):
            self.pool[row] = pattern(k)

    def job(self, keys: list[Any], rows: list[int], promotion: bool) -> TransferJob:
        return TransferJob(next(self._jobs), keys, np.array(rows, np.int32), promotion, self.ctx)

    def finished(self, timeout_s: float = 10.0) -> Any:
        deadline = time.monotonic() + timeout_s
        while time.monotonic() < deadline:
            if results := list(self.tier.get_finished_jobs()):
                assert len(results) == 1
                return results[0]
            time.sleep(0.002)
        raise AssertionError("the job was not reported")

    def store(self, keys: list[Any]) -> Any:
        self.fill(keys)
        self.tier.submit_store(self.job(keys, list(range(len(keys))), False))
        result = self.finished()
        self.pool[:] = 0xEE
        return result

    def load(self, keys: list[Any]) -> Any:
        """Into the rows from 6 on."""
        self.tier.submit_load(self.job(keys, [6 + i for i in range(len(keys))], True))
        return self.finished()

    def held(self, keys: list[Any]) -> list[int]:
        hit = LookupResult.HIT
        return [i for i, k in enumerate(keys) if self.tier.lookup(k, self.ctx) is hit]

    def row_is(self, row: int, k: Any) -> bool:
        return bool((self.pool[row] == pattern(k)).all())

    def untouched(self, row: int) -> bool:
        return bool((self.pool[row] == 0xEE).all())


def pattern(k: Any) -> Any:
    return np.random.default_rng(int.from_bytes(k, "big")).integers(0, 255, ROW, dtype=np.uint8)


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[Bench]:
    made = Bench(tmp_path / "store")
    yield made
    made.tier.check()
    made.tier.shutdown()


def test_round_trip(bench: Bench) -> None:
    assert bench.held(KEYS) == []
    result = bench.store(KEYS[:4])
    assert result.success and result.transfer_bytes == 4 * ROW and result.transfer_time > 0
    assert bench.held(KEYS) == [0, 1, 2, 3]
    result = bench.load(KEYS[:4])
    assert result.success and result.successful_keys is None
    assert all(bench.row_is(6 + i, k) for i, k in enumerate(KEYS[:4]))
    assert bench.untouched(0) and bench.untouched(10)
    assert bench.held([key(0, group=1)]) == []


def test_restart_and_names(tmp_path: Path) -> None:
    first = Bench(tmp_path)
    assert first.store(KEYS).success
    first.tier.shutdown()
    assert first.names.closed
    grown = dataclasses.replace(spec().config.cache, blocks_per_chunk=2)
    model = OffloadingModelConfig("m", "bfloat16")
    for names, the_spec, held in (
        (FakeNames(), spec(), 6),
        (FakeNames(b"x" * 16), spec(), 0),
        (FakeNames(), spec(cache=grown), 0),
        (FakeNames(), spec(model=model), 0),
        (FakeNames(), spec(engine_id="another"), 6),
        (FakeNames(), spec(kv_cache_layout="BLHNC"), 0),
        (FakeNames(persistent=False), spec(), 0),
        (FakeNames(None, None), spec(), 0),
    ):
        again = Bench(tmp_path, names, the_spec)
        assert len(again.held(KEYS)) == held
        again.tier.shutdown()


def test_nothing_is_kept_without_a_namespace(tmp_path: Path) -> None:
    for names in (FakeNames(None, None), FakeNames(persistent=False)):
        bench = Bench(tmp_path, names)
        assert not bench.store(KEYS).success
        assert bench.tier.counters.nvme_dropped == 6
        names.value, names.persistent = b"n" * 16, True
        assert bench.held(KEYS) == []
        bench.tier.shutdown()


def test_damage_is_a_partial_load(bench: Bench, tmp_path: Path) -> None:
    assert bench.store(KEYS).success
    (segment,) = (tmp_path / "store").glob("w*/seg-*.kv")
    data = segment.read_bytes()
    for k in (KEYS[1], KEYS[4]):
        at = data.find(pattern(k).tobytes())
        assert at > 0
        with segment.open("r+b") as f:
            f.seek(at + 7000)
            f.write(bytes([data[at + 7000] ^ 4]))
    result = bench.load(KEYS)
    assert not result.success
    assert set(result.successful_keys) == {KEYS[i] for i in (0, 2, 3, 5)}
    assert bench.untouched(7) and bench.untouched(10) and bench.row_is(6, KEYS[0])
    assert bench.held(KEYS) == [0, 2, 3, 5]
    assert bench.tier.counters.nvme_corrupt == 2
    assert bench.store([KEYS[1]]).success  # recomputed, stored again
    assert bench.held([KEYS[1]]) == []  # not for the request that met the damage
    bench.tier.on_request_finished(bench.ctx)
    assert bench.held([KEYS[1]]) == [0]


def test_unreadable_is_offered_once_per_request_then_not_at_all(bench: Bench) -> None:
    assert bench.store(KEYS).success
    bench.inject("read_eio", 1)
    for n in range(THRESHOLD):
        bench.request(f"r{n}")
        assert bench.held(KEYS) == list(range(6))
        assert not bench.load(KEYS).success
        assert bench.held(KEYS) == []
        bench.tier.on_request_finished(bench.ctx)
    assert bench.tier.counters.nvme_io_errors == 6 * THRESHOLD and bench.trips() == 1
    bench.request("late")
    assert bench.held(KEYS) == []


def test_a_disk_that_takes_no_writes_still_serves(bench: Bench) -> None:
    assert bench.store(KEYS).success
    bench.inject("write_eio", 1)
    for n in range(THRESHOLD):
        assert bench.trips() == 0 and not bench.store([key(20 + n)]).success
        assert bench.store(KEYS).success, "is held, which says nothing of writes"
    assert bench.trips() == 1
    bench.inject("write_eio", 0)
    assert not bench.store([key(40)]).success, "there is a pause first"
    assert bench.held(KEYS) == list(range(6)) and bench.load(KEYS).success


def test_a_tier_that_brings_damaged_bytes_is_left_alone(bench: Bench) -> None:
    assert bench.store(KEYS).success
    for n in range(THRESHOLD + 2):
        assert bench.trips() == 0
        bench.request(f"r{n}")
        bench.inject("flip_read", int(n != 1))  # one that is right in between
        assert bench.load([KEYS[n % 2]]).success == (n == 1)
        bench.inject("flip_read", 0)
        assert bench.store([KEYS[0]]).success
    assert bench.trips() == 1
    bench.request("late")
    assert bench.held(KEYS) == []
    drive = bench.tier._store._drives[0]
    written = drive.store.stats()["bytes_written"]
    assert bench.store(KEYS[3:5]).success
    assert drive.store.stats()["bytes_written"] > written, "in place of what may be damaged"
    drive.reads.close()
    assert bench.load(KEYS[3:5]).success and not drive.suspect


def test_a_read_that_hangs_ends_and_touches_nothing_later(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert bench.store(KEYS).success
    monkeypatch.setitem(drive.STALL_S, GET, 0.1)
    bench.inject("hang_read", 1)
    assert not bench.load(KEYS).success and bench.trips() == 1
    bench.request("late")
    assert bench.held(KEYS) == [], "until a read of our own was fine"
    bench.inject("hang_read", 0)
    time.sleep(0.2)
    assert all(bench.untouched(row) for row in range(ROWS)), "they are somebody else's by now"


def test_a_step_is_stored_whole_up_to_a_quarter_of_the_pool(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """vLLM stores what a step computed in one job and does not offer it again."""
    monkeypatch.setattr(native_tier, "QUEUE_BYTES", ROW)
    bench = Bench(tmp_path / "store", rows=24)
    assert bench.store(KEYS).success
    more = [key(n) for n in range(10, 20)]
    assert not bench.store(more).success
    assert bench.held(more) == list(range(6)) and bench.tier.counters.nvme_dropped == 4
    bench.tier.shutdown()


def test_what_is_dropped_is_the_end_of_a_chain(bench: Bench) -> None:
    """vLLM names a job's keys in any order."""
    bench.fill(KEYS)
    put: list[bytes] = []
    real = bench.tier._store.put
    for at, k in enumerate(KEYS):
        bench.ctx.set_offload_key_position(k, 128 * (at + 1))
    order = [4, 0, 5, 2, 1, 3]

    def noted(job: int, names: bytes, rows: Any, tag: int) -> None:
        put.extend(bytes(row[:8]) for row in rows)
        real(job, names, rows, tag)

    bench.tier._store.put = noted
    bench.tier.submit_store(bench.job([KEYS[i] for i in order], order, False))
    assert bench.finished().success
    assert put == [bytes(pattern(k).tobytes()[:8]) for k in KEYS]
    assert bench.load(KEYS).success and all(bench.row_is(6 + i, k) for i, k in enumerate(KEYS))


def test_reset_waits_and_hides(bench: Bench) -> None:
    bench.fill(KEYS)
    bench.tier.submit_store(bench.job(KEYS, list(range(6)), False))
    bench.tier.drain_jobs()
    assert [r.success for r in bench.tier.get_finished_jobs()] == [True]
    assert bench.held(KEYS) == []


def test_weights_changed_in_place(bench: Bench) -> None:
    from vllm.v1.engine.core import EngineCore

    calls: list[Any] = []
    core = SimpleNamespace(
        model_executor=SimpleNamespace(collective_rpc=lambda *a: calls.append(a))
    )

    def during(method: Any) -> list[int]:
        """Hits while the workers run ``method``, and after it."""
        assert bench.store([key(len(calls) + 100)]).success
        held = []
        core.model_executor.collective_rpc = lambda *a: held.append(
            len(bench.held([key(len(calls) + 100)]))
        )
        EngineCore.collective_rpc(core, method, None, (), {})
        held.append(len(bench.held([key(len(calls) + 100)])))
        calls.append(method)
        return held

    assert during("compute_weight_checksums") == [1, 1]
    assert during("profile") == [1, 1]
    assert during("reload_weights") == [0, 0]
    assert during("update_weights") == [0, 0]
    assert during(lambda worker: None) == [0, 0]

    def stored_meanwhile(*_: Any) -> None:
        assert bench.store([key(7)]).success

    core.model_executor.collective_rpc = stored_meanwhile
    EngineCore.collective_rpc(core, "update_weights")
    assert bench.held([key(7)]) == []  # of neither the old weights nor the new


def test_our_failures_are_misses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hooks = ("lookup", "submit_store", "submit_load", "get_finished_jobs", "on_new_request")
    monkeypatch.setenv("KVOFFLOAD_TEST_FAULTS", json.dumps({f"tier.{h}": 1 for h in hooks}))
    bench = Bench(tmp_path)
    assert bench.held(KEYS[:1]) == []
    assert not bench.store(KEYS).success
    assert bench.store(KEYS).success
    assert not bench.load(KEYS).success
    assert bench.load(KEYS).success
    stats = bench.tier.get_stats().reduce()
    assert stats["kvoffload_tier_events:('tier_errors',)"] == len(hooks)
    assert stats["kvoffload_tier_events:('nvme_read',)"] == 6
    assert bench.tier.get_stats() is None
    bench.tier.shutdown()


def test_a_directory_that_cannot_be_used(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "file").write_text("")
    bench = Bench(tmp_path / "file")
    assert "the tier holds nothing" in caplog.text
    assert not bench.store(KEYS).success and bench.held(KEYS) == []
    bench.tier.drain_jobs()
    bench.tier.shutdown()


def test_under_vllms_manager(tmp_path: Path) -> None:
    """Cascade and promotion by vLLM's own orchestrator, its pool in shared memory."""
    region = SharedOffloadRegion(f"kvotest-{uuid.uuid4().hex[:8]}", 4, None, ROW, ROW)
    primary = CPUPrimaryTierOffloadingManager(4, region)
    view = primary.get_kv_memoryview()
    tier = KVOffloadTier(
        spec(), view, "KVOffloadTier", names=FakeNames(), nvme_path=str(tmp_path), nvme_gib=0.05
    )
    manager = TieringOffloadingManager(primary, [tier])

    def rows() -> Any:  # anew each time: what is kept keeps vLLM from closing its pool
        return region.base_tensor.view(4, ROW).numpy().view(np.uint8)

    def step(until: Callable[[], bool]) -> None:
        deadline = time.monotonic() + 10
        while not until():
            assert time.monotonic() < deadline
            manager.on_schedule_end(ScheduleEndContext((), ()))
            time.sleep(0.002)

    def through(keys: list[Any], ctx: ReqContext) -> None:
        manager.on_new_request(ctx)
        out = manager.prepare_store(keys, ctx)
        assert out is not None
        for k, chunk in zip(out.keys_to_store, out.store_spec.chunk_ids, strict=True):
            rows()[chunk] = pattern(k)
        manager.complete_store(keys, ctx)
        step(lambda: not manager.has_pending_work())
        manager.on_request_finished(ctx)

    through(KEYS[:4], ReqContext("a"))
    through(KEYS[4:], ReqContext("b"))  # pushes two of the first four out of the pool
    rows()[:] = 0xEE  # whoever reads the pool now reads nonsense
    primary.reset_cache()
    ctx = ReqContext("c")
    manager.on_new_request(ctx)
    found: dict[Any, LookupResult] = {}

    def all_there() -> bool:
        found.update({k: manager.lookup(k, ctx) for k in KEYS[:3]})
        return set(found.values()) == {LookupResult.HIT}

    step(all_there)
    loaded = manager.prepare_load(KEYS[:3], ctx)
    for k, chunk in zip(KEYS[:3], loaded.chunk_ids, strict=True):
        assert (rows()[chunk] == pattern(k)).all()
    manager.complete_load(KEYS[:3], ctx)
    manager.on_request_finished(ctx)
    manager.reset_cache()
    pool = region.mmap_obj
    manager.shutdown()
    assert pool is not None and pool.closed  # we kept no view of it


# -- settings ------------------------------------------------------------------------------------


def engine(lora: Any = None, **tier: Any) -> Any:
    entry = {"type": "KVOffloadTier", "module_path": native_settings.TIER_MODULE} | tier
    transfer = SimpleNamespace(
        kv_connector="OffloadingConnector",
        kv_connector_extra_config={"secondary_tiers": [{"type": "fs", "root_dir": "/x"}, entry]},
    )
    return SimpleNamespace(kv_transfer_config=transfer, lora_config=lora)


@pytest.mark.parametrize(
    ("tier", "line"),
    [
        ({"nvme_path": "/x", "dram_gib": 3}, "unknown key 'dram_gib' of the tier KVOffloadTier"),
        ({"nvme_gib": 3}, "needs nvme_path: give one absolute directory path"),
        ({"nvme_path": "x"}, "nvme_path='x' is not allowed"),
        ({"nvme_path": "/x", "nvme_gib": -1}, "nvme_gib=-1 is not allowed"),
        ({"nvme_path": "/x", "io_engine": "aio"}, "io_engine='aio' is not allowed"),
        ({"nvme_path": "/x", "locality": "HERE"}, "locality='HERE' is not allowed"),
        ({"nvme_path": "/x", "type": "Tier"}, "type='Tier' is not allowed"),
    ],
)
def test_bad_settings(tier: dict[str, Any], line: str) -> None:
    with pytest.raises(ConfigError, match=line) as caught:
        native_settings.check_native_tiers(engine(**tier))
    assert "\n" not in str(caught.value)


def test_lora_is_refused_and_others_are_let_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    native_settings.check_native_tiers(engine(nvme_path="/x", nvme_gib=1, locality="LOCAL"))
    with pytest.raises(UnsupportedError, match="--enable-lora is not supported by KVOffloadTier"):
        native_settings.check_native_tiers(engine(object(), nvme_path="/x"))
    native_settings.check_native_tiers(engine(object(), module_path="another.module"))
    native_settings.check_native_tiers(SimpleNamespace(kv_transfer_config=None))
    with monkeypatch.context() as old:
        old.setattr(compat, "vllm_version", lambda: (0, 26, 0))
        native_settings.check_native_tiers(engine(module_path="another.module"))
        with pytest.raises(UnsupportedError, match=r"needs vLLM 0\.30 or newer, not 0\.26\.0"):
            native_settings.check_native_tiers(engine(nvme_path="/x"))
    multi = engine(nvme_path="x")
    child = {
        "kv_connector": "OffloadingConnector",
        "kv_connector_extra_config": multi.kv_transfer_config.kv_connector_extra_config,
    }
    multi.kv_transfer_config = SimpleNamespace(
        kv_connector="MultiConnector", kv_connector_extra_config={"connectors": [child]}
    )
    with pytest.raises(ConfigError, match="nvme_path='x'"):
        native_settings.check_native_tiers(multi)


def test_the_engine_is_known_only_while_a_connector_is_built(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from vllm.distributed.kv_transfer.kv_connector.factory import KVConnectorFactory

    monkeypatch.setattr(KVConnectorFactory, "create_connector", KVConnectorFactory.create_connector)
    native_settings.wrap_factory()
    wrapped = KVConnectorFactory.create_connector.__func__
    native_settings.wrap_factory()
    assert KVConnectorFactory.create_connector.__func__ is wrapped

    seen: list[Any] = []

    class Connector:
        def __init__(self, config: Any, role: Any, kv_cache_config: Any) -> None:
            seen.append(native_settings.engine_being_built())
            raise RuntimeError("no connector after all")

    transfer = SimpleNamespace(engine_id="e", kv_connector="C")
    config = SimpleNamespace(
        kv_transfer_config=transfer,
        scheduler_config=SimpleNamespace(disable_hybrid_kv_cache_manager=True),
    )
    monkeypatch.setattr(KVConnectorFactory, "get_connector_class", lambda _: Connector)
    with pytest.raises(RuntimeError, match="no connector"):
        KVConnectorFactory.create_connector(config, None, "kv cache config")
    assert seen == [(config, "kv cache config")]
    with pytest.raises(UnsupportedError, match="needs kvoffload's vLLM plugin"):
        native_settings.engine_being_built()
