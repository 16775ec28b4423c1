"""Digests of weight files and adapters: which files, whose bytes, when they are known, when not."""

from __future__ import annotations

import copy
import json
import os
import shutil
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from kvoffload.engines.vllm import notes
from kvoffload.engines.vllm import weights as w
from kvoffload.engines.vllm.adapters import AdapterDigests
from kvoffload.engines.vllm.weight_files import machine, model_folders

FAR = 1 << 62  # no file is younger


@pytest.fixture(autouse=True)
def settled_files(monkeypatch: pytest.MonkeyPatch) -> None:
    # The tests' files are seconds old; the two-second rule has its own test.
    monkeypatch.setattr(w, "_SETTLED_NS", -1)


@pytest.fixture
def cache(tmp_path: Path) -> w.DigestCache:
    return w.DigestCache(tmp_path / "xdg" / "kvoffload" / "weights.json")


def model(folder: Path, **files: bytes) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name, data in files.items():
        path = folder / name.replace("__", "/").replace("_st", ".safetensors").replace(
            "_bin", ".bin"
        )
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(data)
    return folder


def config(folder: Path | str, load_format: str = "auto", **extra: Any) -> Any:
    return SimpleNamespace(
        model_config=SimpleNamespace(
            model=str(folder), model_weights="", revision=None, hf_config=SimpleNamespace()
        ),
        load_config=SimpleNamespace(
            load_format=load_format, model_loader_extra_config={}, download_dir=None
        ),
        speculative_config=extra.get("speculative_config"),
    )


def names(vllm_config: Any) -> list[str]:
    return [
        p.relative_to(s.folder).as_posix() for s in w.weight_files(vllm_config) for p in s.files
    ]


def digest(vllm_config: Any, cache: w.DigestCache, since: int = FAR) -> w.DigestResult:
    d = w.WeightsDigest(lambda: w.weight_files(vllm_config), cache=cache, unchanged_since_ns=since)
    d.start()
    d.start()
    result = d.wait(20)
    assert result is not None
    d.check()
    d.close()
    return result


# -- which files -------------------------------------------------------------------------------------


def test_files_of_every_format_that_may_be_read(tmp_path: Path) -> None:
    folder = model(
        tmp_path / "m", a_st=b"1", b_st=b"2", c_bin=b"3", sub__d_st=b"4", original__e_st=b"5"
    )
    (folder / "x.pt").write_bytes(b"6")
    (folder / "config.json").write_text("{}")
    st, beside = ["a.safetensors", "b.safetensors"], ["c.bin", "x.pt"]
    assert names(config(folder)) == [*st, "c.bin", "sub/d.safetensors", "x.pt"]
    assert names(config(folder, "pt")) == beside
    assert names(config(folder, "npcache")) == beside
    only_bin = model(tmp_path / "n", a_bin=b"1", optimizer_bin=b"2")
    assert names(config(only_bin)) == ["a.bin"]
    with pytest.raises(w.NotLocal, match="no weight files"):
        names(config(only_bin, "safetensors"))


def test_a_subfolder_does_not_hide_the_files_on_top(tmp_path: Path, cache: w.DigestCache) -> None:
    """vLLM looks for formats in the top folder alone: it reads the .bin files here."""
    one = config(model(tmp_path / "1", a_bin=b"1", checkpoint__b_st=b"x"))
    two = config(model(tmp_path / "2", a_bin=b"2", checkpoint__b_st=b"x"))
    assert digest(one, cache).digest != digest(two, cache).digest


@pytest.mark.parametrize("how", ["link", "rename"])
def test_a_folder_that_became_another_one_is_refused(
    tmp_path: Path, cache: w.DigestCache, how: str
) -> None:
    """A deploy while vLLM loads: the old weights must not be filed under the new ones' digest."""
    path = tmp_path / "current"
    for n in ("v1", "v2"):
        model(tmp_path / n, a_st=n.encode())
    if how == "link":
        path.symlink_to("v1")
    else:
        (tmp_path / "v1").rename(path)
    vllm_config = config(path)
    vllm_config.kv_transfer_config = SimpleNamespace(kv_connector_extra_config={})
    notes.leave(vllm_config, "Ours", folders=model_folders(vllm_config), where=machine())
    elsewhere = copy.deepcopy(vllm_config)
    elsewhere.kv_transfer_config.kv_connector_extra_config[notes.KEY]["where"] = "another node"
    assert digest(vllm_config, cache).digest is not None
    if how == "link":
        (tmp_path / "new").symlink_to("v2")
        (tmp_path / "new").replace(path)
    else:
        path.rename(tmp_path / "old")
        (tmp_path / "v2").rename(path)
    assert "another folder" in digest(vllm_config, cache).reason
    assert digest(elsewhere, cache).digest is not None  # nobody has seen this node's folder before
    shutil.rmtree(tmp_path / "old", ignore_errors=True)
    path.unlink() if how == "link" else shutil.rmtree(path)
    assert digest(vllm_config, cache).digest is None


def test_the_drafter_counts(tmp_path: Path, cache: w.DigestCache) -> None:
    target = model(tmp_path / "m", a_st=b"1")
    draft = model(tmp_path / "d", a_st=b"2")
    spec = SimpleNamespace(draft_model_config=config(draft).model_config, draft_load_config=None)
    both = config(target, speculative_config=spec)
    assert [s.role for s in w.weight_files(both)] == ["model", "draft"]
    before = digest(both, cache).digest
    assert before != digest(config(target), cache).digest
    (draft / "a.safetensors").write_bytes(b"3")
    assert digest(both, cache).digest != before


@pytest.mark.parametrize(
    "load_format",
    [
        "dummy",
        "tensorizer",
        "runai_streamer",
        "runai_streamer_sharded",
        "modelexpress",
        "ipc_cache",
        "mine",
    ],
)
def test_not_local_by_format(tmp_path: Path, cache: w.DigestCache, load_format: str) -> None:
    result = digest(config(model(tmp_path / "m", a_st=b"1"), load_format), cache)
    assert result.digest is None and load_format in result.reason


@pytest.mark.parametrize("where", ["s3://bucket/m", "gs://b/m", "nobody/never-downloaded-model"])
def test_not_local_by_place(
    tmp_path: Path, cache: w.DigestCache, where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    result = digest(config(where), cache)
    assert result.digest is None and result.reason and "\n" not in result.reason


def test_not_local_for_other_reasons(tmp_path: Path, cache: w.DigestCache) -> None:
    second = config(model(tmp_path / "m", a_st=b"1"))
    second.model_config.hf_config.text_model_id = "org/other"
    assert "second repository" in digest(second, cache).reason
    chosen = config(tmp_path / "m")
    chosen.load_config.model_loader_extra_config = {"pattern": "x"}
    assert "extra config" in digest(chosen, cache).reason
    assert "no weight files" in digest(config(model(tmp_path / "empty")), cache).reason


def test_hub_snapshot_in_the_local_cache(
    tmp_path: Path, cache: w.DigestCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("huggingface_hub")
    commit = "a" * 40
    root = tmp_path / "hub" / "models--org--m"
    snapshot = model(root / "snapshots" / commit)
    (root / "blobs").mkdir()
    (root / "blobs" / "b1").write_bytes(b"weights")
    (snapshot / "a.safetensors").symlink_to(root / "blobs" / "b1")
    (root / "refs").mkdir()
    (root / "refs" / "main").write_text(commit)
    vllm_config = config("org/m")
    vllm_config.load_config.download_dir = str(tmp_path / "hub")
    vllm_config.model_config.hf_config._commit_hash = commit
    # Downloaded after the engine started: fine, a snapshot's files never change.
    assert digest(vllm_config, cache, since=0).digest is not None
    vllm_config.model_config.hf_config._commit_hash = "b" * 40
    assert "another revision" in digest(vllm_config, cache).reason


# -- whose bytes -------------------------------------------------------------------------------------


def test_digest_follows_bytes_not_the_place(tmp_path: Path, cache: w.DigestCache) -> None:
    a = digest(config(model(tmp_path / "a", x_st=b"12", y_st=b"34")), cache)
    b = digest(config(model(tmp_path / "b", x_st=b"12", y_st=b"34")), cache)
    c = digest(config(model(tmp_path / "c", x_st=b"12", y_st=b"35")), cache)
    d = digest(config(model(tmp_path / "d", x_st=b"34", y_st=b"12")), cache)
    assert a.digest == b.digest and len({a.digest, c.digest, d.digest}) == 3


def test_files_changed_since_start_are_refused(tmp_path: Path, cache: w.DigestCache) -> None:
    folder = model(tmp_path / "m", a_st=b"1")
    assert "changed after this engine was started" in digest(config(folder), cache, since=0).reason
    since = time.time_ns()
    time.sleep(0.05)
    (folder / "a.safetensors").write_bytes(b"2")
    os.utime(folder / "a.safetensors", ns=(1, 1))  # mtime can be set back, ctime cannot
    assert digest(config(folder), cache, since=since).digest is None


def test_a_file_that_changes_while_it_is_read(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    path.write_bytes(b"x" * (w._READ_BYTES + 1))
    calls = []

    def meddle() -> bool:
        calls.append(1)
        with open(path, "ab") as f:
            f.write(b"y")
        return False

    with pytest.raises(w.NotLocal, match="changed while it was read"):
        w.digest_file(path, meddle)
    assert calls


# -- the cache ---------------------------------------------------------------------------------------


def test_cache_is_used_private_and_by_identity(
    tmp_path: Path, cache: w.DigestCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = model(tmp_path / "m", a_st=b"1", b_st=b"2")
    first = digest(config(folder), cache)
    assert cache.path.stat().st_mode & 0o777 == 0o600
    read: list[str] = []
    real = w.digest_file
    monkeypatch.setattr(w, "digest_file", lambda p, s: (read.append(p.name), real(p, s))[1])
    assert digest(config(folder), cache) == first and read == []
    (folder / "b.safetensors").write_bytes(b"3")
    assert digest(config(folder), cache) != first and read == ["b.safetensors"]


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        '{"version": 2, "files": {}}',
        '{"version": 1}',
        '{"version": 1, "files": []}',
        "\0",
    ],
)
def test_a_broken_cache_is_an_empty_one(tmp_path: Path, cache: w.DigestCache, text: str) -> None:
    folder = model(tmp_path / "m", a_st=b"1")
    expected = digest(config(folder), cache)
    cache.path.write_text(text)
    assert digest(config(folder), cache) == expected
    assert len(json.loads(cache.path.read_text())["files"]) == 1


def test_a_cache_others_can_write_is_not_trusted(tmp_path: Path, cache: w.DigestCache) -> None:
    folder = model(tmp_path / "m", a_st=b"1")
    expected = digest(config(folder), cache)
    data = json.loads(cache.path.read_text())
    data["files"] = dict.fromkeys(data["files"], "0" * 64)
    cache.path.write_text(json.dumps(data))
    assert digest(config(folder), cache) != expected  # it is used ...
    cache.path.write_text(json.dumps(data))
    cache.path.chmod(0o666)
    assert digest(config(folder), cache) == expected  # ... but not like this


def test_an_unwritable_cache_costs_only_time(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    blocked = w.DigestCache(tmp_path / "file" / "weights.json")
    assert digest(config(model(tmp_path / "m", a_st=b"1")), blocked).digest is not None


def test_fresh_files_are_not_cached(
    tmp_path: Path, cache: w.DigestCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(w, "_SETTLED_NS", 60_000_000_000)
    assert digest(config(model(tmp_path / "m", a_st=b"1")), cache).digest is not None
    assert not cache.path.exists()


def test_caches_of_several_processes_merge(cache: w.DigestCache) -> None:
    threads = [
        threading.Thread(target=lambda i=i: cache.add({f"1:{i}:0:0:0": f"{i:064x}"}))
        for i in range(8)
    ]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert len(cache.read()) == 8
    assert [p.name for p in cache.path.parent.iterdir() if p.name.startswith(".weights-")] == []


def test_close_stops_a_long_digest(tmp_path: Path, cache: w.DigestCache) -> None:
    folder = model(tmp_path / "m")
    with open(folder / "a.safetensors", "wb") as f:
        f.truncate(64 << 30)  # sparse: minutes to hash
    d = w.WeightsDigest(lambda: w.weight_files(config(folder)), cache=cache, unchanged_since_ns=FAR)
    d.start()
    time.sleep(0.1)
    assert d.result() is None
    began = time.monotonic()
    d.close()
    assert time.monotonic() - began < 2 and d.result() is None
    d.check()


# -- adapters ----------------------------------------------------------------------------------------


def lora(path: Path | str, number: int = 1, **kw: Any) -> Any:
    return SimpleNamespace(lora_name="a", lora_int_id=number, lora_path=str(path), **kw)


def known(digests: AdapterDigests, request: Any) -> bytes:
    for _ in range(400):
        got = digests.get(request)
        if got is not None:
            digests.check()
            return got
        time.sleep(0.01)
    raise AssertionError("the adapter's digest never came")


@pytest.fixture
def digests(cache: w.DigestCache) -> Any:
    made = AdapterDigests(cache=cache, unchanged_since_ns=FAR)
    yield made
    made.close()


def test_no_adapter_is_known_at_once(digests: AdapterDigests) -> None:
    assert digests.get(None) == b""


def test_adapters_by_bytes(tmp_path: Path, digests: AdapterDigests) -> None:
    a = model(tmp_path / "a", adapter_model_st=b"1")
    b = model(tmp_path / "b", adapter_model_st=b"1")
    c = model(tmp_path / "c", adapter_model_st=b"2")
    assert digests.get(lora(a, 1)) is None  # asked for, not known yet
    one = known(digests, lora(a, 1))
    assert one == known(digests, lora(b, 2)) != known(digests, lora(c, 3)) and len(one) == 32


def test_unreadable_or_young_adapters_are_this_process_only(
    tmp_path: Path, cache: w.DigestCache
) -> None:
    folder = model(tmp_path / "a", adapter_model_st=b"1")
    young = AdapterDigests(cache=cache, unchanged_since_ns=0)
    other = AdapterDigests(cache=cache, unchanged_since_ns=0)
    old = AdapterDigests(cache=cache, unchanged_since_ns=FAR)
    private = known(young, lora(folder))
    assert private == known(young, lora(folder)) != known(old, lora(folder))
    assert known(young, lora("org/adapter", 2)) != known(young, lora("org/adapter", 3))
    for d in (young, other, old):
        d.close()


@pytest.mark.parametrize("since", [FAR, 0], ids=["older than the engine", "younger"])
def test_an_adapter_that_changes_has_no_name_any_more(
    tmp_path: Path, cache: w.DigestCache, monkeypatch: pytest.MonkeyPatch, since: int
) -> None:
    """Nobody knows which bytes the workers hold: they may read the folder again at any time."""
    monkeypatch.setattr("kvoffload.engines.vllm.adapters.RECHECK_S", 0.05)
    digests = AdapterDigests(cache=cache, unchanged_since_ns=since)
    folder = model(tmp_path / "a", adapter_model_st=b"1")
    before = known(digests, lora(folder))
    time.sleep(0.3)
    assert known(digests, lora(folder)) == before
    (folder / "adapter_model.safetensors").write_bytes(b"2")
    end = time.monotonic() + 5
    while digests.get(lora(folder)) is not None and time.monotonic() < end:
        time.sleep(0.01)
    time.sleep(0.2)
    assert digests.get(lora(folder)) is None  # and for good
    digests.check()
    digests.forget(1)  # unloaded: what comes next is another one
    after = known(digests, lora(folder))
    assert after != before
    digests.close()


def test_an_adapter_that_comes_back_unchanged_has_its_name_again(
    tmp_path: Path, digests: AdapterDigests
) -> None:
    folder, other = model(tmp_path / "a", adapter_model_st=b"1"), model(tmp_path / "b", x_st=b"2")
    before, kept = known(digests, lora(folder)), known(digests, lora(other, 2))
    digests.forget(1)
    assert digests.get(lora(folder)) is None and digests.get(lora(other, 2)) == kept
    assert known(digests, lora(folder)) == before


@pytest.mark.parametrize("change", ["same", "other bytes", "deleted"])
def test_an_adapter_nobody_asked_for_is_looked_at_when_it_is_asked_for_again(
    tmp_path: Path,
    cache: w.DigestCache,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    change: str,
) -> None:
    """vllm serve tells nobody that an adapter was unloaded; the folder of a training step goes."""
    monkeypatch.setattr("kvoffload.engines.vllm.adapters.RECHECK_S", 0.05)
    now = [0.0]
    digests = AdapterDigests(cache=cache, unchanged_since_ns=FAR, clock=lambda: now[0])
    folder = model(tmp_path / "a", adapter_model_st=b"1")
    before = known(digests, lora(folder))
    now[0] += 601
    if change == "other bytes":
        (folder / "adapter_model.safetensors").write_bytes(b"2")
    elif change == "deleted":
        shutil.rmtree(folder)
    time.sleep(0.2)
    assert not caplog.messages
    assert digests.get(lora(folder)) is None  # not before it was looked at
    if change == "same":
        assert known(digests, lora(folder)) == before
    else:
        time.sleep(0.2)
        assert digests.get(lora(folder)) is None
        assert [m for m in caplog.messages if "changed while it was served" in m]
    digests.check()
    digests.close()


def test_in_place_adapters_are_never_known(tmp_path: Path, digests: AdapterDigests) -> None:
    folder = model(tmp_path / "a", adapter_model_st=b"1")
    known(digests, lora(folder))
    assert digests.get(lora(folder, load_inplace=True)) is None
