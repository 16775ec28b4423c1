"""Our L2 adapter in a real LMCache server under a real vLLM: store, restart, hit, damage.

Skipped where there is no LMCache environment (scripts/setup_lmcache.sh). Both server and engine run
on that environment's Python; this checkout reaches it by PYTHONPATH.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import time
import urllib.error
import urllib.request
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

from kvoffload import open_store
from tests.e2e.asks import ask
from tests.e2e.prompts import prompt, until
from tests.e2e.test_nvme import flip_everywhere
from tests.support import models
from tests.support.engine import ROOT, EngineLife, Output, assert_same
from tests.support.lmcache_env import lmcache_python

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(900)]

CHUNK = 256  # tokens per object of LMCache's
TOKENS = 1024 + 30
PROMPTS = [prompt(400 + i, TOKENS) for i in range(2)]
OBJECTS = 2 * (TOKENS // CHUNK)
ENV: dict[str, str | None] = {
    "PYTHONPATH": str(ROOT),
    "LMCACHE_TRACK_USAGE": "false",
    "LMCACHE_LOG_LEVEL": "INFO",
    "VLLM_PLUGINS": "",
}


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class Server:
    """One life of ``lmcache server``; killed hard at the end."""

    def __init__(self, path: Path, log: Path) -> None:
        self.port, self.http = _free_port(), _free_port()
        self.log = log
        adapter = {
            "type": "plugin",
            "module_path": "kvoffload.engines.lmcache",
            "class_name": "KVOffloadL2Adapter",
            "adapter_params": {"nvme_path": str(path), "nvme_gib": 1},
        }
        flags = {
            "--host": "127.0.0.1",
            "--port": self.port,
            "--http-host": "127.0.0.1",
            "--http-port": self.http,
            "--l1-size-gb": 0.5,
            "--l1-init-size-gb": 1,
            "--eviction-policy": "LRU",
            "--supported-transfer-mode": "auto",
            "--chunk-size": CHUNK,
            "--shm-name": f"kvotest-{uuid.uuid4().hex[:8]}",
            "--l2-adapter": json.dumps(adapter),
        }
        tool = lmcache_python().with_name("lmcache")
        with log.open("ab") as out:
            self._proc = subprocess.Popen(
                [str(tool), "server", *(str(x) for pair in flags.items() for x in pair)],
                stdout=out,
                stderr=subprocess.STDOUT,
                env={k: v for k, v in (os.environ | ENV).items() if v is not None},
                start_new_session=True,
            )

    def ready(self) -> bool:
        assert self._proc.poll() is None, self.log.read_text()[-4000:]
        with contextlib.suppress(urllib.error.URLError, OSError):
            return bool(self.call("/healthcheck", "GET"))
        return False

    def call(self, route: str, method: str) -> str:
        url = f"http://127.0.0.1:{self.http}{route}"
        with urllib.request.urlopen(urllib.request.Request(url, method=method), timeout=10) as got:
            return f"{got.status} {got.read().decode()}"

    def kill(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._proc.pid, signal.SIGKILL)
        self._proc.wait()


@contextlib.contextmanager
def serving(path: Path, log: Path) -> Iterator[tuple[Server, EngineLife]]:
    """A server and an engine on it."""
    server = Server(path, log)
    try:
        assert until(server.ready, timeout=120), log.read_text()[-4000:]
        extra = {"lmcache.mp.host": "tcp://127.0.0.1", "lmcache.mp.port": server.port}
        transfer = {
            "kv_connector": "LMCacheMPConnector",
            "kv_role": "kv_both",
            "kv_connector_extra_config": extra,
        }
        with EngineLife(models.llama(), transfer, env=ENV, python=lmcache_python()) as life:
            yield server, life
    finally:
        server.kill()
        for left in Path("/dev/shm").glob("*kvotest-*"):
            left.unlink(missing_ok=True)


def on_disk(path: Path) -> int:
    with open_store(path, read_only=True) as store:
        return len(store)


def test_store_restart_hit_and_damage(tmp_path: Path) -> None:
    python = lmcache_python()
    path, log = tmp_path / "store", tmp_path / "lmcache.log"
    plain: list[Output] = []
    with EngineLife(models.llama(), None, {"enable_prefix_caching": False}, python=python) as life:
        plain = [ask(life, tokens) for tokens in PROMPTS]

    with serving(path, log) as (_, life):
        for reference, tokens in zip(plain, PROMPTS, strict=True):
            assert_same(reference, ask(life, tokens))
        assert until(lambda: on_disk(path) >= OBJECTS), log.read_text()[-4000:]

    with serving(path, log) as (server, life):
        for reference, tokens in zip(plain, PROMPTS, strict=True):
            warm = ask(life, tokens)
            assert_same(reference, warm)
            assert (warm.num_cached_tokens or 0) >= TOKENS // CHUNK * CHUNK

        # Every object on disk damaged, nothing left in LMCache's memory or in HBM.
        for segment in path.glob("w*/seg-*.kv"):
            flip_everywhere(segment)
        assert server.call("/cache/clear", "POST").startswith("200")
        assert life.reset_prefix_cache()
        time.sleep(0.5)
        for reference, tokens in zip(plain, PROMPTS, strict=True):
            out = ask(life, tokens)
            assert_same(reference, out)
            assert (out.num_cached_tokens or 0) < TOKENS // CHUNK * CHUNK
        assert "CORRUPT" in log.read_text()
