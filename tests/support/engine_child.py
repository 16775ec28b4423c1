"""Child process of :mod:`tests.support.engine`: one AsyncLLM driven by JSON lines over a socket.

Not a test module. ``python engine_child.py <fd>`` reads ``{"id", "op", ...}`` lines and answers
``{"id", ...}`` lines; generation answers with ``event`` "token" lines and one "done" line.
"""

from __future__ import annotations

import asyncio
import json
import socket
import sys
import time
import traceback
from typing import Any


class Child:
    """Runs operations concurrently; one writer at a time on the socket."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer
        self._engine: Any = None
        self._tasks: set[asyncio.Task[None]] = set()

    def send(self, message: dict[str, Any]) -> None:
        """Queue one line; the event loop writes it."""
        self._writer.write(json.dumps(message).encode() + b"\n")

    async def run(self) -> None:
        """Serve until the parent says stop or goes away."""
        while line := await self._reader.readline():
            message = json.loads(line)
            if message["op"] == "stop":
                break
            task = asyncio.create_task(self._guarded(message))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)
        for task in self._tasks:
            task.cancel()
        if self._engine is not None:
            self._engine.shutdown()
        self.send({"id": 0, "event": "done", "stopped": True})
        await self._writer.drain()

    async def _guarded(self, message: dict[str, Any]) -> None:
        try:
            result = await getattr(self, "op_" + message["op"])(message)
            self.send({"id": message["id"], "event": "done", **(result or {})})
        except asyncio.CancelledError:
            raise
        except BaseException as error:
            traceback.print_exc()
            self.send({"id": message["id"], "event": "done", "error": repr(error)})

    async def op_start(self, message: dict[str, Any]) -> dict[str, Any]:
        from vllm import AsyncEngineArgs
        from vllm.v1.engine.async_llm import AsyncLLM

        start = time.monotonic()
        self._engine = AsyncLLM.from_engine_args(AsyncEngineArgs(**message["args"]))
        cache = self._engine.vllm_config.cache_config
        multimodal = self._engine.vllm_config.model_config.multimodal_config
        return {
            "startup_s": round(time.monotonic() - start, 2),
            "block_size": cache.block_size,
            "num_gpu_blocks": cache.num_gpu_blocks,
            "engine_pids": _engine_pids(),
            "takes_embeddings": getattr(multimodal, "enable_mm_embeds", False),
        }

    async def op_generate(self, message: dict[str, Any]) -> dict[str, Any]:
        from vllm import SamplingParams
        from vllm.lora.request import LoRARequest
        from vllm.sampling_params import RequestOutputKind

        params = SamplingParams(
            **{"temperature": 0.0, "detokenize": False, "ignore_eos": True, **message["params"]},
            output_kind=RequestOutputKind.DELTA,
        )
        prompt: dict[str, Any] = {"prompt_token_ids": message["prompt"]}
        if message.get("cache_salt"):
            prompt["cache_salt"] = message["cache_salt"]
        if message.get("audio") is not None:
            prompt["multi_modal_data"] = {"audio": _noise(message["audio"])}
        lora = LoRARequest(*message["lora"]) if message.get("lora") else None
        out = _Collected(message["request_id"])
        stream = self._engine.generate(
            prompt, params, out.request_id, lora_request=lora, priority=message.get("priority", 0)
        )
        async for step in stream:
            if new := out.add(step):
                self.send({"id": message["id"], "event": "token", "count": new})
        return {"output": out.as_dict()}

    async def op_abort(self, message: dict[str, Any]) -> None:
        await self._engine.abort(message["request_id"])

    async def op_reset(self, message: dict[str, Any]) -> dict[str, Any]:
        done = await self._engine.reset_prefix_cache(
            message["reset_running"], message["reset_connector"]
        )
        return {"value": bool(done)}

    async def op_rpc(self, message: dict[str, Any]) -> dict[str, Any]:
        value = await self._engine.collective_rpc(
            message["method"], args=tuple(message["args"]), kwargs=message["kwargs"]
        )
        return {"value": json.loads(json.dumps(value, default=repr))}

    async def op_metrics(self, message: dict[str, Any]) -> dict[str, Any]:
        from vllm.v1.metrics.prometheus import get_prometheus_registry

        await self._engine.do_log_stats()
        values: dict[str, float] = {}
        for family in get_prometheus_registry().collect():
            for sample in family.samples:
                labels = {k: v for k, v in sorted(sample.labels.items()) if k not in _DULL_LABELS}
                text = ",".join(f'{k}="{v}"' for k, v in labels.items())
                name = f"{sample.name}{{{text}}}" if text else sample.name
                values[name] = values.get(name, 0.0) + sample.value
        return {"value": values}


_DULL_LABELS = frozenset({"engine", "model_name"})


class _Collected:
    """One request's outputs, step by step."""

    def __init__(self, request_id: str) -> None:
        self.request_id = request_id
        self._start = time.perf_counter()
        self._ttft_ms: float | None = None
        self._tokens: list[int] = []
        self._logprobs: list[dict[str, float]] = []
        self._cached: int | None = None
        self._finish: str | None = None

    def add(self, step: Any) -> int:
        """Take one RequestOutput; returns how many tokens are there now (0: none new)."""
        completion = step.outputs[0]
        if step.num_cached_tokens is not None:
            self._cached = step.num_cached_tokens
        self._finish = completion.finish_reason or self._finish
        if not completion.token_ids:
            return 0
        if self._ttft_ms is None:
            self._ttft_ms = (time.perf_counter() - self._start) * 1e3
        self._tokens += [int(t) for t in completion.token_ids]
        for entry in completion.logprobs or []:
            self._logprobs.append({str(t): p.logprob for t, p in entry.items()})
        return len(self._tokens)

    def as_dict(self) -> dict[str, Any]:
        """JSON form of tests.support.engine.Output."""
        return {
            "request_id": self.request_id,
            "token_ids": self._tokens,
            "logprobs": self._logprobs,
            "num_cached_tokens": self._cached,
            "ttft_ms": self._ttft_ms,
            "finish_reason": self._finish,
            "total_ms": (time.perf_counter() - self._start) * 1e3,
        }


def _noise(seed: int) -> tuple[Any, int]:
    import numpy as np

    rate = 16000
    return np.random.default_rng(seed).standard_normal(3 * rate).astype(np.float32), rate


def _engine_pids() -> list[int]:
    import psutil

    return [p.pid for p in psutil.Process().children(recursive=True)]


async def _main(fd: int) -> None:
    sock = socket.socket(fileno=fd)
    reader, writer = await asyncio.open_connection(sock=sock, limit=1 << 26)
    await Child(reader, writer).run()


if __name__ == "__main__":
    asyncio.run(_main(int(sys.argv[1])))
