"""One engine life: a child process that runs vLLM's AsyncLLM and times requests at the client.

``python life.py PLAN OUT``: PLAN is JSON ``{"engine": {...}, "prompts": {id: [tokens]},
"ops": [...]}``; OUT becomes JSON ``{"ready_s", "ops": [result per op]}``. With ``"talk": [in,
out]`` (descriptors) instead of ``ops``, ops come as JSON lines until the end of ``in``, and each
result is a line to ``out``, ``{"ready_s"}`` first. Times are seconds. Ops:

- ``generate``: ``prompts`` one after the other; per prompt TTFT, token times, tokens, logprobs.
- ``load``: the same, ``concurrency`` at a time, plus wall time and CPU seconds of the process tree.
  ``define`` adds prompts. With ``due`` (seconds after the op's start, by prompt) no request is sent
  before, and one that is sent later, because no client was free, is timed from there all the same.
  With ``limit_s`` a request that fails or takes longer is an ``error`` of its own. ``write``
  ``{"after", "files": {path: text}, "controls": {path: text}}`` replaces files, and writes to
  kernel control files, when so many were sent.
- ``metrics``: the counters whose name starts with ``prefix``, summed over engines.
- ``alive``: whether the engine says that it is healthy.
- ``reset``: drop the HBM prefix cache, leave the connector's tiers alone.
- ``settle``: let background stores finish: until the process tree stopped writing to disk.
"""

from __future__ import annotations

import asyncio
import json
import sys
import time
from collections.abc import AsyncIterator, Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
from common import add_times

Json = dict[str, Any]
WHOSE = ("engine", "model_name")  # labels that say which engine, not what
QUIET_S = 1.0  # no disk writes for this long means that write-behind is done


class Tree:
    """CPU and disk counters of this process, its descendants and a side server."""

    def __init__(self, extra_pids: list[int]) -> None:
        self._roots = [psutil.Process(), *(psutil.Process(pid) for pid in extra_pids)]

    def _all(self) -> list[psutil.Process]:
        found: list[psutil.Process] = []
        for root in self._roots:
            with suppress(psutil.NoSuchProcess):
                found += [root, *root.children(recursive=True)]
        return found

    def cpu_s(self) -> float:
        """User and system seconds so far."""
        total = 0.0
        for process in self._all():
            with suppress(psutil.NoSuchProcess):
                times = process.cpu_times()
                total += times.user + times.system
        return total

    def written(self) -> int:
        """Bytes handed to block devices so far (page-cache writes count when dirtied)."""
        total = 0
        for process in self._all():
            with suppress(psutil.Error):
                total += process.io_counters().write_bytes
        return total


class Life:
    """The engine and the requests of one life. Event-loop thread only."""

    def __init__(self, plan: Json) -> None:
        self._plan = plan
        self._prompts: dict[str, list[int]] = plan["prompts"]
        self._tree = Tree(plan.get("extra_pids", []))
        self._count = 0
        self._done: list[Json] = []

    async def _stream(self, tokens: list[int], op: Json, name: str) -> AsyncIterator[Any]:
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        params = SamplingParams(
            temperature=0.0,
            max_tokens=op.get("max_tokens", 8),
            logprobs=1,
            ignore_eos=True,
            detokenize=False,
            output_kind=RequestOutputKind.DELTA,
        )
        async for out in self._engine.generate({"prompt_token_ids": tokens}, params, name):
            yield out

    async def _one(self, prompt: str, op: Json, due: float | None = None) -> Json:
        times: list[float] = []
        tokens: list[int] = []
        logprobs: list[float] = []
        self._count += 1
        request = f"kvbench{self._count}"
        late = 0.0 if due is None else time.monotonic() - due
        cached, start, sent = None, time.perf_counter() - late, time.monotonic() - late
        async for out in self._stream(self._prompts[prompt], op, request):
            now = time.perf_counter() - start
            step = out.outputs[0]
            add_times(times, now, len(step.token_ids))
            for token, table in zip(step.token_ids, step.logprobs or [], strict=True):
                logprobs.append(table[token].logprob)
            tokens += step.token_ids
            if out.num_cached_tokens is not None:
                cached = out.num_cached_tokens
        return {
            "prompt": prompt,
            "request": request,
            "sent": sent,
            "ttft": times[0],
            "times": times,
            "tokens": tokens,
            "logprobs": logprobs,
            "cached": cached,
        }

    async def _generate(self, op: Json) -> Json:
        results = []
        for prompt in op["prompts"]:
            results.append(await self._one(prompt, op))
            await asyncio.sleep(op.get("gap_s", 0.0))
        return {"requests": results}

    async def _load(self, op: Json) -> Json:
        self._prompts |= op.get("define", {})
        queue = list(reversed(op["prompts"]))
        results: list[Json] = []
        one = self._tried if "limit_s" in op else self._one
        wrote = None

        sent, began = 0, time.monotonic()

        async def client() -> None:
            nonlocal wrote, sent
            while queue:
                prompt = queue.pop()
                due = began + op["due"][prompt] if "due" in op else None
                if due is not None:
                    await asyncio.sleep(due - time.monotonic())
                if wrote is None and "write" in op:
                    wrote = self._write(op["write"], sent)
                sent += 1
                results.append(await one(prompt, op, due))

        cpu, start = self._tree.cpu_s(), time.perf_counter()
        await asyncio.gather(*(client() for _ in range(op["concurrency"])))
        wall = time.perf_counter() - start
        cpu = self._tree.cpu_s() - cpu
        return {"requests": results, "wall_s": wall, "cpu_s": cpu, "wrote": wrote}

    async def _tried(self, prompt: str, op: Json, due: float | None) -> Json:
        try:
            async with asyncio.timeout(op["limit_s"]):
                return await self._one(prompt, op, due)
        except Exception as error:  # what a client would see; the driver counts it
            return {"prompt": prompt, "error": f"{type(error).__name__}: {error}"[:300]}

    def _write(self, what: Json, sent: int) -> float | None:
        """When all was written (monotonic seconds), None while it is too early."""
        if sent < what["after"]:
            return None
        for name, text in what["files"].items():
            part = Path(name + ".part")
            part.write_text(text)
            part.replace(name)
        for name, text in what["controls"].items():
            Path(name).write_text(text)
        return time.monotonic()

    async def _metrics(self, op: Json) -> Json:
        from prometheus_client import REGISTRY

        out: Json = {}
        for metric in REGISTRY.collect():
            if metric.type != "counter" or not metric.name.startswith(op["prefix"]):
                continue
            for sample in metric.samples:
                if sample.name.endswith("_total"):
                    said = [v for k, v in sorted(sample.labels.items()) if k not in WHOSE]
                    name = ".".join([metric.name, *said])
                    out[name] = out.get(name, 0) + sample.value
        return out

    async def _alive(self, op: Json) -> Json:
        try:
            await self._engine.check_health()
        except Exception as error:  # EngineDeadError; whatever it is, this engine is no more
            return {"alive": False, "error": f"{type(error).__name__}: {error}"[:300]}
        return {"alive": True}

    async def _reset(self, op: Json) -> Json:
        for _ in range(50):  # refused while finished requests still hold blocks
            if await self._engine.reset_prefix_cache():
                return {"ok": True}
            await asyncio.sleep(0.1)
        return {"ok": False}

    async def _settle(self, op: Json) -> Json:
        """A short unrelated request makes the engine step; then wait for quiet disks."""
        start, limit = time.perf_counter(), op.get("timeout_s", 30.0)
        await self._one(op["prompt"], {"max_tokens": 1})
        if not op.get("disk", False):
            await asyncio.sleep(op.get("sleep_s", 0.5))
            await self._one(op["prompt"], {"max_tokens": 1})
            return {"waited_s": time.perf_counter() - start}
        want, seen, since = op.get("bytes", 0), -1, start
        while time.perf_counter() - start < limit:
            written, now = self._tree.written(), time.perf_counter()
            if written != seen:
                seen, since = written, now
            elif now - since >= QUIET_S and written >= want:
                break
            await asyncio.sleep(0.1)
        waited = time.perf_counter() - start
        return {"waited_s": waited, "written": seen, "complete": seen >= want}

    async def _ops(self, ready: float) -> AsyncIterator[tuple[Json, Callable[[Json], None]]]:
        """The ops with where each one's result goes."""
        if "talk" not in self._plan:
            for op in self._plan["ops"]:
                yield op, self._done.append
            return
        source, sink = self._plan["talk"]
        with open(source) as told, open(sink, "w", buffering=1) as out:

            def answer(result: Json) -> None:
                out.write(json.dumps(result) + "\n")

            answer({"ready_s": ready})
            while line := await asyncio.to_thread(told.readline):
                yield json.loads(line), answer

    async def run(self) -> Json:
        """Start the engine, do all ops in order, shut it down."""
        from vllm.engine.arg_utils import AsyncEngineArgs
        from vllm.v1.engine.async_llm import AsyncLLM

        start = time.perf_counter()
        self._engine = AsyncLLM.from_engine_args(AsyncEngineArgs(**self._plan["engine"]))
        ready = time.perf_counter() - start
        try:
            async for op, answer in self._ops(ready):
                answer(await getattr(self, "_" + op["op"])(op))
        finally:
            start = time.perf_counter()
            self._engine.shutdown()
        return {"ready_s": ready, "ops": self._done, "shutdown_s": time.perf_counter() - start}


def main() -> None:
    """Entry point of the child process."""
    plan = json.loads(Path(sys.argv[1]).read_text())
    result = asyncio.run(Life(plan).run())
    Path(sys.argv[2]).write_text(json.dumps(result))


if __name__ == "__main__":
    main()
