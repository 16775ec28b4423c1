"""Sources of other vLLM versions are fetched once, however many test workers ask at the same time."""

from __future__ import annotations

import importlib
import sys
import threading
import time
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.contract import reading

pytestmark = pytest.mark.contract

sys.path.insert(0, str(reading.ROOT / "scripts"))
fetch = importlib.import_module("fetch_vllm_wheels")


def test_one_download_however_many_ask(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    downloads: list[str] = []
    busy = threading.Lock()

    def download(version: str, folder: Path) -> Path:  # pip's place: two at once break each other
        assert busy.acquire(blocking=False), "two downloads at once"
        folder.mkdir(parents=True, exist_ok=True)
        wheel = folder / f"vllm-{version}-cp38-abi3.whl"
        time.sleep(0.1)
        with zipfile.ZipFile(wheel, "w") as archive:
            archive.writestr("vllm/version.py", "")
        downloads.append(version)
        busy.release()
        return wheel

    monkeypatch.setattr(fetch, "download", download)
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda _: fetch.ensure("0.33.0", root=tmp_path), range(4)))
    assert downloads == ["0.33.0"]
    assert {path.joinpath("vllm/version.py").is_file() for path in found} == {True}
