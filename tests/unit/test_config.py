"""Every key: its default, what it accepts, and the one line it refuses with."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvoffload.config import _RULES, GIB, Config, default_dram_gib
from kvoffload.errors import ConfigError
from kvoffload.memory import HostMemory, host_memory


def refuse(**extra: object) -> str:
    with pytest.raises(ConfigError) as caught:
        Config.from_extra_config(extra)
    line = str(caught.value)
    assert "\n" not in line and len(line) < 400
    return line


def test_empty_config_is_dram_only() -> None:
    config = Config.from_extra_config({})
    assert config == Config()
    assert config.nvme_path is None and config.load == "auto" and config.load_deadline_ms is None
    assert config.policy == "lru" and config.io_engine == "auto"
    assert config.dram_bytes() == pytest.approx(default_dram_gib() * GIB, rel=0.2)


def test_good_values_are_typed_exactly(tmp_path: Path) -> None:
    config = Config.from_extra_config(
        {
            "dram_gib": 8,
            "nvme_path": [str(tmp_path) + "/"],
            "nvme_gib": 0.5,
            "nvme_write_tb_per_day": 1,
            "nvme_admission": "all",
            "nvme_tbw": 14000,
            "io_engine": "threads",
            "chunk_tokens": 128,
            "load": "never",
            "load_deadline_ms": 10,
            "policy": "fifo",
            "verify_sample": 0.001,
            "why_requests": 0,
            "server_autostart": False,
            "remote": None,
        }
    )
    assert type(config.dram_gib) is float and config.dram_bytes() == 8 * GIB
    assert config.nvme_path == (str(tmp_path),)
    assert config.nvme_bytes() == GIB // 2
    assert config.nvme_write_bytes_per_s(0) == pytest.approx(1e12 / 86400)
    assert config.verify_sample == 0.001 and config.why_requests == 0


def test_defaults_that_depend_on_the_path() -> None:
    config = Config(nvme_path="/data")
    assert config.nvme_bytes() is None
    assert config.nvme_write_bytes_per_s(86400) == 1.0


@pytest.mark.parametrize("key", ["dram_gib", "nvme_gib", "nvme_write_tb_per_day"])
@pytest.mark.parametrize("value", [True, False, "8", -1, 0, math.nan, math.inf, -math.inf, [1], {}])
def test_bad_numbers(key: str, value: object) -> None:
    line = refuse(**{"nvme_path": "/data", key: value})
    assert f"{key}=" in line and "above 0" in line


@pytest.mark.parametrize("key", ["chunk_tokens", "load_deadline_ms"])
@pytest.mark.parametrize("value", [True, "128", 128.0, math.nan, 0, -5, 10**9])
def test_bad_whole_numbers(key: str, value: object) -> None:
    line = refuse(**{key: value})
    assert f"{key}={value!r}" in line and "whole number" in line


@pytest.mark.parametrize(
    ("key", "value", "part"),
    [
        ("io_engine", "URING", "choose one of auto, uring, threads"),
        ("load", None, "choose one of auto, always, never"),
        ("load", True, "auto, always, never"),
        ("policy", "mru", "choose one of lru, fifo, s3fifo, arc, adaptive"),
        ("remote", "redis://x", "not available in this version"),
        ("server", "unix:///x", "not available in this version"),
        ("server_autostart", True, "not available in this version"),
        ("server_autostart", 0, "not available in this version"),
        ("verify_sample", 1.5, "a share of the hits from 0 (off) to 1"),
        ("verify_sample", -0.1, "a share of the hits"),
        ("verify_sample", math.nan, "a share of the hits"),
        ("verify_sample", True, "a share of the hits"),
        ("verify_sample", "0.1", "a share of the hits"),
        ("nvme_path", "relative", "absolute"),
        ("nvme_path", "", "absolute"),
        ("nvme_path", 3, "absolute"),
        ("nvme_path", [], "absolute"),
        ("nvme_path", ["/a", 3], "absolute"),
        ("nvme_path", ["/a", "b"], "absolute"),
        ("nvme_path", ["/a", "/b/../a/"], "/a and /b/../a/ are the same directory"),
        ("nvme_path", ["/a/b", "/c", "/a"], "/a/b lies inside /a"),
        ("nvme_path", ["/", "/c"], "/c lies inside /"),
        ("nvme_path", [f"/d{i}" for i in range(17)], "at most 16"),
        ("config_file", 3, ".json or .toml"),
        ("config_file", "x.yaml", ".json or .toml"),
        ("config_file", "/does/not/exist.json", "No such file"),
    ],
)
def test_refused_by_name(key: str, value: object, part: str) -> None:
    line = refuse(**{key: value})
    assert key in line and repr(value)[:20] in line and part in line


def test_nvme_keys_need_a_path() -> None:
    assert "nvme_path" in refuse(nvme_gib=10)


def test_unknown_key_suggests_the_nearest() -> None:
    assert "did you mean dram_gib?" in refuse(dram_gb=3)
    assert "known keys" in refuse(zzzzqq=3)
    assert "did you mean nvme_path?" in refuse(**{"nvme-path": "/x"})


def test_long_values_are_cut() -> None:
    assert "..." in refuse(dram_gib="x" * 5000)


@pytest.mark.parametrize("suffix", ["json", "toml"])
def test_config_file_and_inline_wins(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"kv.{suffix}"
    if suffix == "json":
        path.write_text(json.dumps({"dram_gib": 2, "load": "never"}))
    else:
        path.write_text('dram_gib = 2\nload = "never"\n')
    config = Config.from_extra_config({"config_file": str(path), "dram_gib": 4})
    assert config.dram_gib == 4.0 and config.load == "never" and config.config_file == str(path)


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("{", "cannot be read"),
        ("[1]", "one object"),
        ('{"dram_gib": NaN}', "dram_gib"),
        ('{"dram_gib": 1, "dram_gib": 2}', "twice"),
        ('{"dram_gb": 1}', "did you mean dram_gib?"),
        ('{"config_file": "y.json"}', "names another file"),
        ("\xff", "cannot be read"),
    ],
)
def test_bad_config_file(tmp_path: Path, text: str, part: str) -> None:
    path = tmp_path / "kv.json"
    path.write_bytes(text.encode("latin-1"))
    assert part in refuse(config_file=str(path))


def test_direct_construction_is_checked_too() -> None:
    with pytest.raises(ConfigError, match="dram_gib"):
        Config(dram_gib=-1)
    with pytest.raises(ConfigError, match="object of keys"):
        Config.from_extra_config([])  # type: ignore[arg-type]


words = st.sampled_from(["", "auto", "threads", "lru", "/data", "~", "a\nb", "\0", "8"])
json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | words,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(words, inner, max_size=2),
    max_leaves=5,
)


@given(st.dictionaries(st.sampled_from(sorted(set(_RULES) - {"config_file"})), json_values))
def test_any_value_is_a_config_or_one_line(extra: dict[str, object]) -> None:
    try:
        config = Config.from_extra_config(extra)
    except ConfigError as exc:
        line = str(exc)
        assert "\n" not in line and any(key in line for key in extra)
    else:
        for key in ("dram_gib", "nvme_gib", "nvme_write_tb_per_day"):
            value = getattr(config, key)
            assert value is None or (type(value) is float and math.isfinite(value) and value > 0)


def _fake_root(tmp_path: Path, cgroup: dict[str, str]) -> str:
    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / "proc/meminfo").write_text("MemTotal: 1048576 kB\nMemAvailable: 524288 kB\n")
    (tmp_path / "proc/self/cgroup").write_text("0::/pod/box\n")
    folder = tmp_path / "sys/fs/cgroup/pod/box"
    folder.mkdir(parents=True)
    for name, text in cgroup.items():
        (folder / name).write_text(text)
    return str(tmp_path)


def test_memory_without_a_limit(tmp_path: Path) -> None:
    root = _fake_root(tmp_path, {"memory.max": "max\n", "memory.current": "5\n"})
    assert host_memory(root) == HostMemory(1 << 30, 1 << 29)
    assert default_dram_gib(host_memory(root)) == 0.125


def test_memory_in_a_limited_container(tmp_path: Path) -> None:
    limits = {
        "memory.max": "1000\n",
        "memory.current": "600\n",
        "memory.stat": "inactive_file 100\n",
    }
    assert host_memory(_fake_root(tmp_path, limits)) == HostMemory(1000, 500)


def test_page_cache_of_a_container_can_be_had_back(tmp_path: Path) -> None:
    """Weight files that were read twice are active page cache; what is dirty must be written first."""
    limits = {
        "memory.max": "1000\n",
        "memory.current": "900\n",
        "memory.stat": "anon 200\ninactive_file 100\nactive_file 500\nfile_dirty 30\n"
        "file_writeback 20\n",
    }
    assert host_memory(_fake_root(tmp_path, limits)) == HostMemory(1000, 650)


V1_LIMIT = {
    "memory.limit_in_bytes": "2000\n",
    "memory.usage_in_bytes": "1500\n",
    "memory.stat": "inactive_file 7\nhierarchical_memory_limit 2000\ntotal_inactive_file 300\n"
    "total_active_file 400\ntotal_dirty 40\ntotal_writeback 60\n",
}


@pytest.mark.parametrize(
    ("groups", "folder"),
    [
        ("9:memory:/docker/abc\n1:cpu,cpuacct:/docker/abc\n", ""),  # a container sees its own root
        ("9:memory:/pod/box\n", "pod/box"),
        ("9:memory:/pod/box\n", "pod"),  # the parent's limit
        ("9:memory:/pod/box\n0::/user.slice\n", "pod/box"),  # hybrid: v2 without the controller
        ("3:hugetlb,memory:/pod/box\n", "pod/box"),
    ],
)
def test_memory_in_a_container_of_cgroup_v1(tmp_path: Path, groups: str, folder: str) -> None:
    root = _fake_root(tmp_path, {})
    (tmp_path / "proc/self/cgroup").write_text(groups)
    (tmp_path / "sys/fs/cgroup/memory/pod/box").mkdir(parents=True)
    for name, text in V1_LIMIT.items():
        (tmp_path / "sys/fs/cgroup/memory" / folder / name).write_text(text)
    assert host_memory(root) == HostMemory(2000, 2000 - (1500 - 600))


def test_no_limit_in_cgroup_v1_is_a_large_number(tmp_path: Path) -> None:
    root = _fake_root(tmp_path, {})
    (tmp_path / "proc/self/cgroup").write_text("9:memory:/\n")
    (tmp_path / "sys/fs/cgroup/memory").mkdir(parents=True)
    unlimited = V1_LIMIT | {"memory.limit_in_bytes": "9223372036854771712\n"}
    for name, text in unlimited.items():
        (tmp_path / "sys/fs/cgroup/memory" / name).write_text(text)
    assert host_memory(root) == HostMemory(1 << 30, 1 << 29)


def test_dram_default_is_capped() -> None:
    assert default_dram_gib(HostMemory(1 << 50, 1 << 50)) == 64.0
    assert default_dram_gib(HostMemory(0, 0)) == 0.0


def test_more_dram_than_the_machine_has() -> None:
    Config(dram_gib=0.01).check_host()
    with pytest.raises(ConfigError, match="GiB of memory"):
        Config(dram_gib=1_000_000).check_host()


@pytest.mark.parametrize("key", [k for k in _RULES if k not in ("config_file", "record_path")])
@pytest.mark.parametrize("digits", [400, 5000])
def test_whole_numbers_of_any_size_are_one_line(key: str, digits: int, tmp_path: Path) -> None:
    """Beyond 1e308 they are no float; beyond 4300 digits Python does not write them out."""
    path = {"nvme_path": str(tmp_path)} if key.startswith("nvme") else {}
    for value in (10**digits, -(10**digits)):
        assert key in refuse(**(path | {key: value}))


@pytest.mark.parametrize("path", ["/mnt/\ud800", "~\ud800/kv", "/mnt/\udcff"])
def test_paths_that_are_no_text_are_one_line(path: str) -> None:
    """JSON can hold what no file can be called; other names the native store cannot be given."""
    for wanted in (path, ["/mnt/a", path]):
        assert "nvme_path" in refuse(nvme_path=wanted)
    assert "record_path" in refuse(record_path=path)
    assert "config_file" in refuse(config_file=path + ".json")


def test_importing_is_light() -> None:
    code = "import kvoffload.config, sys; print([m for m in ('torch','vllm','numpy') if m in sys.modules])"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"


def test_several_paths(tmp_path: Path) -> None:
    paths = [str(tmp_path / "a"), str(tmp_path / "ab")]
    assert Config(nvme_path=paths).nvme_path == tuple(paths)  # type: ignore[arg-type]
    (tmp_path / "a").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "a")
    line = refuse(nvme_path=[paths[0], str(tmp_path / "link")])
    assert "same directory" in line and "nvme_path" in line
    assert "lies inside" in refuse(nvme_path=[paths[0], str(tmp_path / "link" / "x")])
