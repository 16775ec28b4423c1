"""The L2 adapter against LMCache's own contract; run by the interpreter that has LMCache.

Not collected by name: tests/unit/test_lmcache_adapter.py runs this file with the LMCache
environment's Python. No server, no vLLM.
"""

from __future__ import annotations

import argparse
import json
import select
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from lmcache.v1.distributed.api import MemoryLayoutDesc, ObjectKey
from lmcache.v1.distributed.l2_adapters import create_l2_adapter
from lmcache.v1.distributed.l2_adapters.base import L2AdapterInterface
from lmcache.v1.distributed.l2_adapters.config import (
    add_l2_adapters_args,
    parse_args_to_l2_adapters_config,
)
from lmcache.v1.memory_management import MemoryObjMetadata, TensorMemoryObj
from lmcache.v1.platform import consume_fd

from kvoffload.engines import lmcache_names
from kvoffload.engines.lmcache import KVOffloadL2Adapter
from kvoffload.tiers.nvme import drive
from kvoffload.tiers.nvme.requests import GET

SHAPE = (2, 64, 96)
MODEL = "some/model"
GROUP: dict[int, Any] = {0: MemoryLayoutDesc([torch.Size(SHAPE)], [torch.float16])}


def build(path: Path, **params: Any) -> Any:
    """As the server does it from the command line."""
    params = {"nvme_path": str(path), "nvme_gib": 0.1, "namespace": "test"} | params
    spec = {
        "type": "plugin",
        "module_path": "kvoffload.engines.lmcache",
        "class_name": "KVOffloadL2Adapter",
        "adapter_params": {k: v for k, v in params.items() if v is not None},
    }
    parser = add_l2_adapters_args(argparse.ArgumentParser())
    args = parser.parse_args(["--l2-adapter", json.dumps(spec)])
    return create_l2_adapter(parse_args_to_l2_adapters_config(args).adapters[0])


def key(n: int, **fields: Any) -> ObjectKey:
    return ObjectKey(n.to_bytes(32, "big"), **({"model_name": MODEL, "kv_rank": 1} | fields))


def obj(value: int | None, dtype: torch.dtype = torch.float16) -> TensorMemoryObj:
    """An object of one group; ``None``: filled with a pattern that no test stores."""
    n = torch.Size(SHAPE).numel() * dtype.itemsize
    raw = torch.full((n,), 0xEE, dtype=torch.uint8)
    if value is not None:
        raw = (torch.arange(n, dtype=torch.int64) * (value + 3) % 251).to(torch.uint8)
    size = torch.Size(SHAPE)
    meta = MemoryObjMetadata(size, dtype, 0, n, 1, shapes=[size], dtypes=[dtype])
    return TensorMemoryObj(raw, meta, None)


def same(a: TensorMemoryObj, b: TensorMemoryObj) -> bool:
    return torch.equal(a.raw_data, b.raw_data)


def answer(fd: int, query: Callable[[], Any], timeout_s: float = 20.0) -> Any:
    """Wait as LMCache's controllers do: the fd, then the question."""
    poller = select.poll()
    poller.register(fd, select.POLLIN)
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        if poller.poll(200):
            consume_fd(fd)
            if (found := query()) is not None and found != {}:
                return found
    raise AssertionError("not signalled in time")


def store(adapter: Any, keys: list[ObjectKey], objects: list[TensorMemoryObj]) -> Any:
    task = adapter.submit_store_task(keys, objects)
    done = answer(adapter.get_store_event_fd(), adapter.pop_completed_store_tasks)
    assert list(done) == [task]
    return done[task]


def held(adapter: Any, keys: list[ObjectKey], descs: dict[int, Any] = GROUP) -> list[int]:
    task = adapter.submit_lookup_and_lock_task(keys, descs)
    fd = adapter.get_lookup_and_lock_event_fd()
    found = answer(fd, lambda: adapter.query_lookup_and_lock_result(task))
    assert adapter.query_lookup_and_lock_result(task) is None
    adapter.submit_unlock(keys)
    return [i for i in range(len(keys)) if found.test(i)]


def load(adapter: Any, keys: list[ObjectKey], objects: list[TensorMemoryObj]) -> list[int]:
    task = adapter.submit_load_task(keys, objects)
    read = answer(adapter.get_load_event_fd(), lambda: adapter.query_load_result(task))
    assert adapter.query_load_result(task) is None
    return [i for i in range(len(keys)) if read.test(i)]


@pytest.fixture
def adapter(tmp_path: Path) -> Iterator[Any]:
    made = build(tmp_path / "store")
    yield made
    made.check()
    made.close()


KEYS = [key(n) for n in range(6)]
OBJECTS = [obj(n) for n in range(6)]


def test_it_is_an_adapter(adapter: Any) -> None:
    assert isinstance(adapter, KVOffloadL2Adapter) and isinstance(adapter, L2AdapterInterface)
    fds = {adapter.get_store_event_fd(), adapter.get_lookup_and_lock_event_fd()}
    assert len(fds | {adapter.get_load_event_fd()}) == 3
    assert "vllm" not in sys.modules


def test_round_trip(adapter: Any) -> None:
    assert held(adapter, KEYS) == []
    result = store(adapter, KEYS[:4], OBJECTS[:4])
    assert result.is_successful() and result.bytes_transferred() == 4 * OBJECTS[0].get_size()
    assert held(adapter, KEYS) == [0, 1, 2, 3]
    into = [obj(None) for _ in KEYS]
    assert load(adapter, KEYS, into) == [0, 1, 2, 3]
    assert all(same(a, b) for a, b in zip(OBJECTS[:4], into, strict=False))
    assert all(same(o, obj(None)) for o in into[4:])
    # Held already: nothing is written again.
    assert store(adapter, KEYS[:4], OBJECTS[:4]).bytes_transferred() == 0
    assert adapter.get_usage().total_bytes_used > 0
    assert adapter.report_status()["is_healthy"]


def test_restart_and_names(tmp_path: Path) -> None:
    first = build(tmp_path)
    assert store(first, KEYS, OBJECTS).is_successful()
    first.close()
    second = build(tmp_path)
    try:
        assert held(second, KEYS) == list(range(6))
        into = [obj(None) for _ in KEYS]
        assert load(second, KEYS, into) == list(range(6))
        assert all(same(a, b) for a, b in zip(OBJECTS, into, strict=True))
        for field in ({"model_name": "other"}, {"kv_rank": 2}, {"cache_salt": "s"}):
            assert held(second, [key(0, **field)]) == [], field
        assert held(second, [key(0, object_group_id=1)], {1: GROUP[0]}) == []
        for desc in (
            MemoryLayoutDesc([torch.Size(SHAPE)], [torch.bfloat16]),
            MemoryLayoutDesc([torch.Size((64, 2, 96))], [torch.float16]),
        ):
            assert held(second, KEYS, {0: desc}) == []
        assert load(second, KEYS, [obj(None, torch.bfloat16) for _ in KEYS]) == []
    finally:
        second.close()
    other = build(tmp_path, namespace="other weights")
    assert held(other, KEYS) == []
    other.close()


def test_damage_is_a_miss(adapter: Any, tmp_path: Path) -> None:
    assert store(adapter, KEYS, OBJECTS).is_successful()
    (segment,) = (tmp_path / "store").glob("w*/seg-*.kv")
    data = bytearray(segment.read_bytes())
    at = data.find(bytes(OBJECTS[2].raw_data[:4096].numpy()))
    assert at > 0
    with segment.open("r+b") as f:
        f.seek(at + 5000)
        f.write(bytes([data[at + 5000] ^ 1]))
    into = [obj(None) for _ in KEYS]
    assert load(adapter, KEYS, into) == [0, 1, 3, 4, 5]
    assert same(into[2], obj(None))  # not one byte of it
    assert held(adapter, KEYS) == [0, 1, 3, 4, 5]
    assert adapter.report_status()["failed_objects"] == 1
    # Stored again, it is there again.
    assert store(adapter, [KEYS[2]], [OBJECTS[2]]).bytes_transferred() > 0
    assert load(adapter, [KEYS[2]], [into[2]]) == [0] and same(into[2], OBJECTS[2])


def _folder(path: Path, weights: bytes, settings: str = "{}") -> str:
    path.mkdir()
    (path / "model.safetensors").write_bytes(weights)
    (path / "config.json").write_text(settings)
    return str(path)


def test_weights_name_the_chunks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    folder = _folder(tmp_path / "model", b"one")
    seen: dict[str, list[int]] = {}

    def life(what: str, put: bool = False) -> None:
        made = build(tmp_path / "store", namespace=None)
        keys = [key(n, model_name=folder) for n in range(3)]
        if put:
            assert held(made, keys) == []
            assert store(made, keys, OBJECTS[:3]).is_successful()
        seen[what] = held(made, keys)
        made.close()

    life("stored", put=True)
    life("again")
    (tmp_path / "model" / "config.json").write_text('{"rope_theta": 2}')
    life("other settings")
    (tmp_path / "model" / "config.json").write_text("{}")
    (tmp_path / "model" / "model.safetensors").write_bytes(b"two")
    life("other weights")
    all_of_them: list[int] = [0, 1, 2]
    assert seen == {
        "stored": all_of_them,
        "again": all_of_them,
        "other settings": [],
        "other weights": [],
    }


@pytest.mark.parametrize("file", ["model.safetensors", "config.json"])
def test_a_model_replaced_under_a_running_server_has_no_names(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, file: str
) -> None:
    """vLLM starts again with other weights of the same path: the old KV is not theirs."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    monkeypatch.setattr(lmcache_names, "RECHECK_S", 0.05)
    kept, replaced = _folder(tmp_path / "a", b"one"), _folder(tmp_path / "b", b"one")
    names = lmcache_names.Names(None)
    for model in (kept, replaced):
        names.wait(model, 20)
        assert names.of(key(0, model_name=model), b"") is not None
    new = tmp_path / "new"
    new.write_bytes(b"two")
    new.replace(Path(replaced, file))
    until = time.monotonic() + 20
    while names.of(key(0, model_name=replaced), b"") is not None:
        assert time.monotonic() < until, "it kept its name"
        time.sleep(0.02)
    time.sleep(0.2)
    assert names.of(key(0, model_name=kept), b"") is not None
    Path(kept).rename(tmp_path / "away")  # a file system that does not answer for a while
    while names.of(key(0, model_name=kept), b"") is not None:
        assert time.monotonic() < until, "it kept its name"
        time.sleep(0.02)
    (tmp_path / "away").rename(kept)
    while names.of(key(0, model_name=kept), b"") is None:
        assert time.monotonic() < until, "it is still there"
        time.sleep(0.02)
    assert names.of(key(0, model_name=replaced), b"") is None
    names.close()


def test_unknown_weights_delay_first_lookups_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lmcache_names, "FIRST_WAIT_S", 0.2)
    hold = threading.Event()
    monkeypatch.setattr(lmcache_names, "_model_files", lambda model: hold.wait(20) and [])
    made = build(tmp_path, namespace=None)
    try:
        took = []
        for _ in range(3):
            began = time.monotonic()
            assert held(made, KEYS) == []
            took.append(time.monotonic() - began)
        assert 0.15 < took[0] < 5 and max(took[1:]) < 0.15, took
        assert not store(made, KEYS, OBJECTS).is_successful()
    finally:
        hold.set()
        made.close()


def test_first_lookups_wait_together(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lmcache_names, "FIRST_WAIT_S", 0.5)
    hold = threading.Event()
    monkeypatch.setattr(lmcache_names, "_model_files", lambda model: hold.wait(20) and [])
    made = build(tmp_path, namespace=None)
    try:
        began = time.monotonic()
        tasks = [made.submit_lookup_and_lock_task(KEYS, GROUP) for _ in range(8)]
        while tasks:
            assert time.monotonic() - began < 20
            tasks = [t for t in tasks if made.query_lookup_and_lock_result(t) is None]
            time.sleep(0.01)
        assert 0.4 < time.monotonic() - began < 2.0
    finally:
        hold.set()
        made.close()


def test_a_load_that_hangs_ends(adapter: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """LMCache has no deadline, and eight loads that hang stop all of its lookups."""
    assert store(adapter, KEYS, OBJECTS).is_successful()
    monkeypatch.setitem(drive.STALL_S, GET, 0.2)
    native = adapter._store._drives[0].store
    native.inject("hang_read", 1)
    fresh = [obj(None) for _ in KEYS]
    before = [bytes(o.byte_array) for o in fresh]
    assert load(adapter, KEYS, fresh) == []
    assert held(adapter, KEYS) == [], "until a read of our own was fine"
    native.inject("hang_read", 0)
    time.sleep(0.2)
    assert [bytes(o.byte_array) for o in fresh] == before, "L1 may have given them to others"


def test_a_hub_name_needs_a_namespace(tmp_path: Path) -> None:
    made = build(tmp_path, namespace=None)
    try:
        assert held(made, KEYS) == []
        assert not store(made, KEYS, OBJECTS).is_successful()
        assert held(made, KEYS) == [] and load(made, KEYS, [obj(None) for _ in KEYS]) == []
        assert "set namespace" in made.names._digests[MODEL].result().reason
    finally:
        made.close()


def test_other_shapes_than_looked_up_are_said(adapter: Any) -> None:
    """What a serde does: it is stored, never found, and one line says why."""
    assert held(adapter, KEYS) == []
    assert store(adapter, KEYS[:1], OBJECTS[:1]).is_successful()
    assert not adapter._odd_layout_said
    assert store(adapter, [KEYS[1]], [obj(1, torch.bfloat16)]).is_successful()
    assert adapter._odd_layout_said
    assert held(adapter, KEYS) == [0]


def test_delete(adapter: Any) -> None:
    assert store(adapter, KEYS, OBJECTS).is_successful()
    assert held(adapter, KEYS) == list(range(6))
    adapter.delete(KEYS[:2])
    assert held(adapter, KEYS) == [2, 3, 4, 5]
    assert adapter.get_usage().bytes_by_cache_salt[""] == 4 * OBJECTS[0].get_size()


def test_our_failures_are_misses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    faults = {"lmcache._look_up": 1, "lmcache._submit": 1, "lmcache._finish": 1}
    monkeypatch.setenv("KVOFFLOAD_TEST_FAULTS", json.dumps(faults))
    made = build(tmp_path)
    try:
        assert held(made, KEYS) == []
        assert not store(made, KEYS, OBJECTS).is_successful()  # not submitted
        assert not store(made, KEYS, OBJECTS).is_successful()  # not reported
        assert store(made, KEYS, OBJECTS).is_successful()
        assert held(made, KEYS) == list(range(6))
        errors = made.report_status()["errors"]
        assert errors == {"_look_up": 1, "_submit": 1, "_finish": 1}
    finally:
        made.close()


def test_two_controllers_at_once(adapter: Any) -> None:
    """LMCache's store and prefetch controllers are two threads."""
    errors: list[BaseException] = []

    def run(part: Callable[[], None]) -> None:
        try:
            part()
        except BaseException as error:
            errors.append(error)

    def stores() -> None:
        for n in range(0, 60, 6):
            keys = [key(n + i) for i in range(6)]
            assert store(adapter, keys, OBJECTS).is_successful()

    def loads() -> None:
        got = 0
        deadline = time.monotonic() + 30
        while got < 60 and time.monotonic() < deadline:
            keys = [key(n) for n in range(60)]
            there = [keys[i] for i in held(adapter, keys)]
            if there:
                into = [obj(None) for _ in there]
                good = load(adapter, there, into)
                for i in good:
                    assert same(into[i], OBJECTS[int.from_bytes(there[i].chunk_hash, "big") % 6])
                got = len(good)
        assert got == 60

    threads = [threading.Thread(target=run, args=(part,)) for part in (stores, loads)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []


@pytest.mark.parametrize(
    ("params", "line"),
    [
        ({"nvme_pth": "/x"}, r"unknown adapter_params key 'nvme_pth': known: nvme_path"),
        ({"nvme_path": "relative"}, r"nvme_path='relative' is not allowed"),
        ({"nvme_path": None}, r"nvme_path is missing"),
        ({"nvme_gib": "8"}, r"nvme_gib='8' is not allowed"),
        ({"namespace": 7}, r"namespace=7 is not allowed"),
    ],
)
def test_bad_settings(tmp_path: Path, params: dict[str, Any], line: str) -> None:
    with pytest.raises(ValueError, match=line):
        build(tmp_path, **params)


def test_close_is_idempotent_and_reports(tmp_path: Path) -> None:
    made = build(tmp_path)
    made.submit_store_task(KEYS, OBJECTS)
    made.close()
    assert len(made.pop_completed_store_tasks()) == 1
    made.close()
