"""One life of a real vLLM engine in a subprocess, for end-to-end tests.

An engine takes about 50 s to start on two cores: use one per test module (a module-scoped fixture) and
``reset_prefix_cache()`` between tests. Example::

    with EngineLife(models.llama(), {"kv_connector": "KVOffloadConnector", "kv_role": "kv_both"}) as life:
        cold = life.generate([prompt], max_tokens=8, logprobs=1)[0]
        assert life.reset_prefix_cache()
        warm = life.generate([prompt], max_tokens=8, logprobs=1)[0]
        assert_same(cold, warm)
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import queue
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
_CHILD = Path(__file__).with_name("engine_child.py")


class EngineError(RuntimeError):
    """The engine process failed or died; the message ends with the tail of its log."""


@dataclass(frozen=True)
class Output:
    """What one request produced. Times in milliseconds, measured in the engine's front-end process."""

    request_id: str
    token_ids: list[int]
    logprobs: list[dict[str, float]]  # per position: token id (as text) -> log-probability
    num_cached_tokens: int | None  # prompt tokens that were not computed (HBM and connector)
    ttft_ms: float | None
    total_ms: float
    finish_reason: str | None


@dataclass
class Pending:
    """A submitted request. Thread rule: use from the thread that submitted it."""

    life: EngineLife
    request_id: str
    inbox: queue.SimpleQueue[dict[str, Any]]
    tokens: int = field(default=0)
    _done: dict[str, Any] | None = field(default=None)

    def wait_tokens(self, count: int, timeout: float = 120.0) -> bool:
        """Wait until ``count`` tokens arrived; False when the request ended before."""
        deadline = time.monotonic() + timeout
        while self.tokens < count and self._done is None:
            self._take(deadline)
        return self.tokens >= count

    def result(self, timeout: float = 300.0) -> Output:
        """Wait for the end. Raises EngineError when the request or the engine failed."""
        deadline = time.monotonic() + timeout
        while self._done is None:
            self._take(deadline)
        if "error" in self._done:
            raise EngineError(f"request {self.request_id}: {self._done['error']}{self.life.tail()}")
        return Output(**self._done["output"])

    def abort(self) -> None:
        """Ask the engine to drop the request; ``result()`` then has finish_reason "abort"."""
        self.life.call("abort", request_id=self.request_id)

    def _take(self, deadline: float) -> None:
        message = self.life.take(self.inbox, deadline)
        if message["event"] == "token":
            self.tokens = message["count"]
        else:
            self._done = message


class EngineLife:
    """Start, drive and end one engine.

    ``kv_transfer_config``: dict as for ``--kv-transfer-config``, or None for plain vLLM.
    ``engine_args``: fields of vLLM's AsyncEngineArgs, over defaults made for the tiny test models.
    ``env``: added to the child's environment; a value of None removes the variable.
    ``python``: interpreter of another environment that has vLLM (default: this one).
    ``workdir``: holds the log, and is the child's working directory (default: a new temporary directory,
    removed at the end unless something failed).
    """

    def __init__(
        self,
        model: Path,
        kv_transfer_config: dict[str, Any] | None = None,
        engine_args: dict[str, Any] | None = None,
        env: dict[str, str | None] | None = None,
        workdir: Path | None = None,
        startup_timeout: float = 300.0,
        python: Path | None = None,
    ) -> None:
        args = _DEFAULT_ARGS | {"model": str(model)} | (engine_args or {})
        if kv_transfer_config is not None:
            args["kv_transfer_config"] = kv_transfer_config
        self.args = args
        # After start: startup_s, block_size, num_gpu_blocks, engine_pids, takes_embeddings.
        self.info: dict[str, Any] = {}
        self._keep = workdir is not None
        self.workdir = workdir or Path(tempfile.mkdtemp(prefix="kvo-engine-"))
        self.workdir.mkdir(parents=True, exist_ok=True)
        self.log_path = self.workdir / f"engine-{os.getpid()}-{next(_SERIAL)}.log"
        self._env = self.env = _environment(env or {})
        if (
            len(str(self.workdir)) <= 60
        ):  # vLLM leaves sockets there; their paths are limited to 107
            self._env["TMPDIR"] = str(self.workdir)
        self._timeout = startup_timeout
        self._python = python or Path(sys.executable)
        self._ids = itertools.count(1)
        self._inboxes: dict[int, queue.SimpleQueue[dict[str, Any]]] = {}
        self._lock = threading.Lock()  # guards writes to the socket
        self._proc: subprocess.Popen[bytes] | None = None
        self._sock: socket.socket | None = None

    # -- life ----------------------------------------------------------------

    def __enter__(self) -> EngineLife:
        return self.start()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        tb: TracebackType | None,
    ) -> None:
        if error is not None:
            self._keep = True
            print(self.tail(80), file=sys.stderr)
        self.stop()

    def start(self) -> EngineLife:
        """Start the process and wait until the engine is ready. Raises EngineError."""
        ours, theirs = socket.socketpair()
        with self.log_path.open("wb") as log:
            self._proc = subprocess.Popen(
                [str(self._python), str(_CHILD), str(theirs.fileno())],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                pass_fds=[theirs.fileno()],
                env=self._env,
                cwd=self.workdir,
                start_new_session=True,
            )
        theirs.close()
        self._sock = ours
        threading.Thread(target=self._read, args=(ours,), daemon=True).start()
        try:
            answer = self.call("start", timeout=self._timeout, args=self.args)
        except BaseException:
            self.kill9()
            raise
        self.info = {k: v for k, v in answer.items() if k not in ("id", "event")}
        return self

    def stop(self, timeout: float = 60.0) -> int | None:
        """Orderly end (connector shutdown included), then SIGKILL whatever is left. Returns the exit code."""
        proc = self._proc
        if proc is None:
            return None
        if proc.poll() is None:
            with contextlib.suppress(OSError):
                self._send({"id": 0, "op": "stop"})
            with contextlib.suppress(subprocess.TimeoutExpired):
                proc.wait(timeout)
        self.kill9()
        if not self._keep:
            shutil.rmtree(self.workdir, ignore_errors=True)
        return proc.returncode

    def kill9(self) -> None:
        """SIGKILL the whole process group at once, as a power cut would."""
        if self._proc is None:
            return
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._proc.pid, signal.SIGKILL)
        self._proc.wait()
        if self._sock is not None:
            self._sock.close()

    @property
    def alive(self) -> bool:
        """True while the front-end process runs."""
        return self._proc is not None and self._proc.poll() is None

    # -- requests ----------------------------------------------------------------

    def submit(
        self,
        prompt: Sequence[int],
        max_tokens: int = 16,
        logprobs: int | None = None,
        lora: Path | None = None,
        cache_salt: str | None = None,
        priority: int = 0,
        audio: int | None = None,
        **params: Any,
    ) -> Pending:
        """Start one request (greedy, EOS ignored unless ``params`` says otherwise) and return at once.

        ``audio``: seed of three seconds of noise, for a model and a prompt that take one.
        """
        number = next(self._ids)
        fields: dict[str, Any] = {
            "request_id": f"r{number}",
            "prompt": list(prompt),
            "params": {"max_tokens": max_tokens, "logprobs": logprobs, **params},
            "cache_salt": cache_salt,
            "priority": priority,
            "audio": audio,
        }
        if lora is not None:
            fields["lora"] = [lora.name, 1 + sum(lora.name.encode()) % 10_000, str(lora)]
        inbox = self._post(number, "generate", fields)
        return Pending(self, fields["request_id"], inbox)

    def generate(self, prompts: Iterable[Sequence[int]], **options: Any) -> list[Output]:
        """Submit all prompts together (options as for submit) and wait; outputs in prompt order."""
        pending = [self.submit(prompt, **options) for prompt in prompts]
        return [p.result() for p in pending]

    def reset_prefix_cache(
        self, reset_connector: bool = False, reset_running: bool = False, timeout: float = 30.0
    ) -> bool:
        """Empty HBM's prefix cache; retried while blocks are still held.

        What was asked before is in the tiers then: a request's stores may still be under way when
        its last token is here, and its blocks are free at once.
        """
        if self.args.get("kv_transfer_config") is not None and not reset_connector:
            self.metrics()
        deadline = time.monotonic() + timeout
        while True:
            answer = self.call(
                "reset", reset_connector=reset_connector, reset_running=reset_running
            )
            if answer["value"] or time.monotonic() > deadline:
                return bool(answer["value"])
            time.sleep(0.1)

    def metrics(self) -> dict[str, float]:
        """All Prometheus samples: ``name`` or ``name{label="value"}`` (engine, model_name left out).

        Levels and events follow the last token of the last request by some milliseconds.
        """
        before: dict[str, float] | None = None
        for _ in range(20):
            values: dict[str, float] = self.call("metrics")["value"]
            ours = {k: v for k, v in values.items() if k.startswith("kvoffload_")}
            if ours == before:
                break
            before = ours
            time.sleep(0.15)
        return values

    def collective_rpc(self, method: str, *args: Any, **kwargs: Any) -> Any:
        """Run a worker method (such as ``reload_weights``) on all ranks; JSON arguments only."""
        return self.call("rpc", method=method, args=args, kwargs=kwargs)["value"]

    # -- plumbing ----------------------------------------------------------------

    def call(self, op: str, timeout: float = 120.0, **fields: Any) -> dict[str, Any]:
        """One operation of the child, answered. Raises EngineError."""
        inbox = self._post(next(self._ids), op, fields)
        answer = self.take(inbox, time.monotonic() + timeout)
        if "error" in answer:
            raise EngineError(f"{op}: {answer['error']}{self.tail()}")
        return answer

    def take(self, inbox: queue.SimpleQueue[dict[str, Any]], deadline: float) -> dict[str, Any]:
        """Next message of an inbox. Raises EngineError when the engine died or the deadline passed."""
        try:
            return inbox.get(timeout=max(0.0, deadline - time.monotonic()))
        except queue.Empty:
            state = "no answer in time" if self.alive else "the engine process is gone"
            raise EngineError(f"{state}{self.tail()}") from None

    def tail(self, lines: int = 40) -> str:
        """The last lines of the engine's log."""
        text = self.log_path.read_text(errors="replace") if self.log_path.exists() else ""
        return f"\n--- end of {self.log_path} ---\n" + "\n".join(text.splitlines()[-lines:])

    def _post(
        self, number: int, op: str, fields: dict[str, Any]
    ) -> queue.SimpleQueue[dict[str, Any]]:
        inbox: queue.SimpleQueue[dict[str, Any]] = queue.SimpleQueue()
        self._inboxes[number] = inbox
        try:
            self._send({"id": number, "op": op, **fields})
        except OSError as error:
            raise EngineError(f"{op}: {error}{self.tail()}") from None
        return inbox

    def _send(self, message: dict[str, Any]) -> None:
        if self._sock is None:
            raise EngineError("the engine was not started")
        with self._lock:
            self._sock.sendall(json.dumps(message).encode() + b"\n")

    def _read(self, sock: socket.socket) -> None:
        with contextlib.suppress(OSError), sock.makefile("rb") as lines:
            for line in lines:
                message = json.loads(line)
                inbox = self._inboxes.get(message["id"])
                if inbox is not None:
                    inbox.put(message)
                    if message["event"] == "done":
                        self._inboxes.pop(message["id"], None)
        for inbox in list(self._inboxes.values()):
            inbox.put({"event": "done", "error": "the engine process is gone"})


_SERIAL = itertools.count()

_DEFAULT_ARGS: dict[str, Any] = {
    "dtype": "float32",
    "skip_tokenizer_init": True,
    "enforce_eager": True,
    "max_model_len": 4096,
    "max_num_seqs": 16,
    "seed": 0,
}


def _environment(changes: dict[str, str | None]) -> dict[str, str]:
    env = os.environ | {
        "HF_HUB_OFFLINE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "DO_NOT_TRACK": "1",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_LOGGING_LEVEL": "INFO",
        "PYTHONUNBUFFERED": "1",
        # The first request compiles a kernel or two (10 s): keep them between lives and runs.
        "TORCHINDUCTOR_CACHE_DIR": str(ROOT / ".cache" / "inductor"),
        "XDG_CACHE_HOME": str(ROOT / ".cache" / "xdg"),
        "VLLM_CACHE_ROOT": str(ROOT / ".cache" / "vllm"),
        "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")])),
    }
    for name, value in changes.items():
        if value is None:
            env.pop(name, None)
        else:
            env[name] = value
    return env


# -- oracles ----------------------------------------------------------------


def max_dlogprob(a: Output, b: Output) -> float:
    """Largest difference of log-probabilities over tokens both outputs report, infinity if none match."""
    worst = 0.0 if a.logprobs or b.logprobs else float("inf")
    for left, right in zip(a.logprobs, b.logprobs, strict=True):
        shared = left.keys() & right.keys()
        if not shared:
            return float("inf")
        worst = max([worst, *(abs(left[t] - right[t]) for t in shared)])
    return worst


def assert_same(a: Output, b: Output, atol: float = 0.05) -> None:
    """Same greedy tokens and log-probabilities within ``atol`` (a foreign KV block: at least 0.28)."""
    assert a.token_ids == b.token_ids, (a.token_ids, b.token_ids)
    worst = max_dlogprob(a, b)
    assert worst <= atol, f"log-probabilities differ by {worst}"
