"""Hints through a real OpenAI server, and ``kvoffload warm`` against it: what a client sees.

One server with a DRAM tier of 128 chunks (of 128 tokens) and no NVMe: a few prompts turn it over.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.request import Request, urlopen

import pytest

from tests.e2e.prompts import prompt, total, until
from tests.support import models
from tests.support.engine import ROOT, _environment

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(600)]

CHUNK = 128
CHUNKS = 128
READY_S = 240


_PROBES = itertools.count(90_000)


def text(ids: list[int]) -> str:
    return " ".join(f"t{i}" for i in ids)


def with_tokenizer(where: Path) -> Path:
    """The tiny model with a tokenizer of words ``t<id>`` and a chat template that adds nothing."""
    from tokenizers import Tokenizer, pre_tokenizers
    from tokenizers.models import WordLevel

    shutil.copytree(models.llama(), where)
    # Special tokens are found inside words too: no word may hold one.
    special = dict(zip(("<unk>", "<s>", "</s>"), range(3), strict=True))
    words = special | {f"t{i}": i for i in range(3, models.VOCAB)}
    tokenizer = Tokenizer(WordLevel(vocab=words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.save(str(where / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "unk_token": "<unk>",
        "bos_token": "<s>",
        "eos_token": "</s>",
        "chat_template": "{% for m in messages %}{{ m['content'] }} {% endfor %}",
    }
    (where / "tokenizer_config.json").write_text(json.dumps(settings))
    return where


@dataclass
class Live:
    url: str
    log: Path

    def post(self, path: str, body: dict[str, Any] | None = None, **headers: str) -> Any:
        data = json.dumps(body or {}).encode()
        head = {"Content-Type": "application/json"} | {
            k.replace("_", "-"): v for k, v in headers.items()
        }
        with urlopen(Request(self.url + path, data, head), timeout=120) as answer:
            raw = answer.read()
        return json.loads(raw) if raw else None

    def ask(self, ids: list[int], hints: Any = None, tokens: int = 4, **headers: str) -> Any:
        """One completion; its first choice with ``cached``, the prompt tokens not computed."""
        body: dict[str, Any] = {
            "model": "tiny",
            "prompt": ids,
            "max_tokens": tokens,
            "temperature": 0,
            "logprobs": 1,
            "ignore_eos": True,
            "return_token_ids": True,
        }
        if hints is not None:
            body["kv_transfer_params"] = {"kvoffload": hints}
        answer = self.post("/v1/completions", body, **headers)
        details = answer["usage"]["prompt_tokens_details"] or {}
        return answer["choices"][0] | {"cached": details.get("cached_tokens") or 0}

    def empty_hbm(self) -> None:
        """Refused while stores still hold blocks: tried until it works."""
        probe = prompt(next(_PROBES), CHUNK + 1)
        for _ in range(50):
            self.ask(probe, {"store": False}, tokens=1)
            self.post("/reset_prefix_cache")
            if self.ask(probe, {"store": False}, tokens=1)["cached"] == 0:
                self.post("/reset_prefix_cache")
                return
            time.sleep(0.1)
        raise AssertionError("HBM cannot be emptied")

    def metrics(self) -> dict[str, float]:
        with urlopen(f"{self.url}/metrics", timeout=30) as answer:
            lines = answer.read().decode().splitlines()
        rows = (line.rpartition(" ") for line in lines if line.startswith("kvoffload_"))
        return {name: float(value) for name, _, value in rows}

    def traffic(self, seed: int) -> None:
        """More than DRAM holds, then HBM is emptied: what is found comes from DRAM."""
        for i in range(8):
            self.ask(prompt(1000 * seed + i, 20 * CHUNK), tokens=1)
        self.empty_hbm()


@pytest.fixture(scope="module")
def live(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    where = tmp_path_factory.mktemp("hints")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    extra = {"dram_gib": 64 / 1024, "chunk_tokens": CHUNK, "load": "always"}
    config = {
        "kv_connector": "KVOffloadConnector",
        "kv_role": "kv_both",
        "kv_connector_extra_config": extra | {"load_deadline_ms": 5000},
    }
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server"]
    command += ["--model", str(with_tokenizer(where / "model")), "--served-model-name", "tiny"]
    command += ["--host", "127.0.0.1", "--port", str(port), "--dtype", "float32"]
    command += ["--enforce-eager", "--max-model-len", "4096", "--seed", "0"]
    command += ["--enable-prompt-tokens-details", "--kv-transfer-config", json.dumps(config)]
    log = where / "server.log"
    env = _environment({"VLLM_SERVER_DEV_MODE": "1"})
    with log.open("wb") as sink:
        process = subprocess.Popen(
            command, stdout=sink, stderr=subprocess.STDOUT, env=env, cwd=where,
            start_new_session=True,
        )  # fmt: skip
    server = Live(f"http://127.0.0.1:{port}", log)

    def ready() -> bool:
        assert process.poll() is None, log.read_text(errors="replace")[-4000:]
        try:
            with urlopen(f"{server.url}/health", timeout=5):
                return True
        except OSError:
            return False

    try:
        assert until(ready, READY_S, 0.5), log.read_text(errors="replace")[-4000:]
        yield server
    finally:
        process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(30)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def same(a: Any, b: Any) -> None:
    assert a["token_ids"] == b["token_ids"]
    pairs = zip(a["logprobs"]["token_logprobs"], b["logprobs"]["token_logprobs"], strict=True)
    assert max(abs(x - y) for x, y in pairs) < 0.05


def test_kept_prompts_outlive_traffic_and_answer_the_same(live: Live) -> None:
    size = 8 * CHUNK + 5
    hints = [None, {"retain_s": 600}, {"priority": 2}, {"pin": True}]
    prompts = [prompt(10 + i, size) for i in range(4)]
    first = [live.ask(p, h) for p, h in zip(prompts, hints, strict=True)]
    assert [a["cached"] for a in first] == [0] * 4
    assert all(a.get("kv_transfer_params") is None for a in first)
    live.traffic(1)
    again = [live.ask(p) for p in prompts]
    assert [a["cached"] for a in again] == [0, 8 * CHUNK, 8 * CHUNK, 8 * CHUNK]
    for a, b in zip(first, again, strict=True):
        same(a, b)
    metrics = live.metrics()
    asked = {k: total(metrics, "kvoffload_hints_total", kind=k) for k in ("retain", "pin")}
    assert asked == {"retain": 1, "pin": 1}
    slot = CHUNK * 4096
    assert total(metrics, "kvoffload_hint_bytes", kind="pinned") == 8 * slot
    assert total(metrics, "kvoffload_hint_bytes", kind="retained") == 16 * slot
    live.ask(prompts[3], {"pin": False})
    live.traffic(2)
    assert [live.ask(prompts[i])["cached"] for i in (3, 1)] == [0, 8 * CHUNK]


def test_one_shot_is_not_kept(live: Live) -> None:
    ids = prompt(20, 8 * CHUNK + 5)
    first = live.ask(ids, {"store": False})
    live.empty_hbm()
    again = live.ask(ids)
    assert (first["cached"], again["cached"]) == (0, 0)
    live.empty_hbm()
    third = live.ask(ids, {"store": False})
    assert third["cached"] == 8 * CHUNK, "hits are used all the same"
    same(first, third)


def test_a_session_by_vllms_own_header_ends(live: Live) -> None:
    before = live.metrics()
    turn = prompt(30, 6 * CHUNK)
    for i in range(3):
        hints = {"end_session": True} if i == 2 else None
        answer = live.ask(turn, hints, 8, X_Session_ID="conversation 30")
        turn = [*turn, *answer["token_ids"], *prompt(31 + i, 2 * CHUNK - 8)]

    def released() -> float:
        live.ask(prompt(next(_PROBES), 5), {"store": False}, tokens=1)  # idle engines say nothing
        return total(live.metrics(), "kvoffload_events_total", event="hint_released")

    already = total(before, "kvoffload_events_total", event="hint_released")
    assert until(lambda: released() - already >= 10, 20.0, 0.2), "the chunks of all three turns"


def test_bad_hints_are_counted_and_fail_nothing(live: Live) -> None:
    for bad in ({"retain_s": "long"}, {"colour": 1}, "now", [1], {"pin": {"a": [None]}}):
        assert len(live.ask(prompt(40, 50), bad)["token_ids"]) == 4
    metrics = live.metrics()
    refused = {
        r: total(metrics, "kvoffload_hints_refused_total", reason=r)
        for r in ("bad_value", "unknown_key", "not_an_object")
    }
    assert refused == {"bad_value": 2, "unknown_key": 1, "not_an_object": 2}
    assert live.log.read_text().count("a hint of request") == 1
    assert total(metrics, "kvoffload_failures_total") == 0


def test_warm(live: Live, tmp_path: Path) -> None:
    size = 6 * CHUNK
    plain, ids, chat = (prompt(50 + i, size) for i in range(3))
    lines = [
        text(plain),
        json.dumps({"prompt": ids}),
        json.dumps({"messages": [{"role": "system", "content": text(chat)}]}),
    ]
    (tmp_path / "prompts.jsonl").write_text("\n".join(lines))
    live.ask(plain, {"pin": False})  # no pin of before is in the way
    before = live.metrics()
    command = [sys.executable, "-c", "from kvoffload.cli.main import main; main()", "warm"]
    command += [str(tmp_path / "prompts.jsonl"), "--url", live.url, "--json"]
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, capture_output=True, text=True, env=env, timeout=240)
    assert done.returncode == 0, done.stdout + done.stderr + str(before)
    told = json.loads(done.stdout)
    assert (told["sent"], told["failed"], told["pins_refused"]) == (3, 0, 0)
    assert told["model"] == "tiny" and told["prompt_tokens"] >= 3 * size
    live.traffic(3)
    for warmed in (plain, ids, chat):
        assert live.ask([*warmed, *prompt(60, 40)])["cached"] >= 5 * CHUNK
    live.traffic(4)
    assert live.ask([*ids, *prompt(61, 40)])["cached"] == size
    done = subprocess.run(
        [*command, "--unpin"], capture_output=True, text=True, env=env, timeout=240
    )
    assert done.returncode == 0, done.stderr
    live.traffic(5)
    assert live.ask([*ids, *prompt(62, 40)])["cached"] == 0
    assert total(live.metrics(), "kvoffload_hint_bytes", kind="pinned") == 0
