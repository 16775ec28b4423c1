"""``faults``: a reuse workload while the NVMe tier is slow, hung, corrupt, full, read-only or gone.

Two engines of the same settings, one with kvoffload and one that recomputes everything, take the
same requests by turns; whoever waits is stopped (SIGSTOP). HBM is smaller than the working set and
DRAM smaller still, so that reuse comes from NVMe. In each window the fault begins under
``concurrency`` clients with requests in flight, and ends with the window; then requests go on until
the tier is seen to work again. Faults take turns within a round, the order of the two engines
changes from window to window, and each arm's requests are pooled over the rounds. Rounds are spread
over several lives of both engines: one life of the same engine differs from the next for
as long as it lasts.

Requests arrive at random times (exponential gaps), the same for both engines, so often that the
recomputing engine is busy for ``utilization`` of the time; they are timed from their arrival. In a
closed loop (``--utilization 0``) an engine that is faster gets more requests in the same time, and
its clients wait for a first token where before they waited for the next.

``slow`` to ``killed`` are made by a ``FaultyStore`` in the engine's process. ``slow_disk`` and
``hung_disk`` are made below it, by the kernel, on a disk of our own (``loopdisk.py``).
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import random
import shutil
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from common import DirectFile, Json, Skip, engine_lock
from context import Context, portable, skip_reason
from fault_arms import COUNTS, Arm, Window, delta, pairs_of
from lives import LifeFailed, Live, live
from loopdisk import STOPPED, LoopDisk, loop_disk

NAME = "faults"
QUICK_SYSTEMS = ("none", "kvoffload")
BLOCK = 128
TOLERANCE = 0.05  # of a logprob, or ten times the floor if that is more
SETTLE_S = 0.2  # the tier looks at the fault file and reports every 50 ms
# Name in the result -> what the fault file says.
FAULTS = {
    "healthy": "none",
    "slow": "slow",
    "hung": "hung",
    "corrupt": "corrupt",
    "full": "full",
    "read_only": "read_only",
    "killed": "gone",
    "slow_disk": "none",
    "hung_disk": "none",
}
BELOW = ("slow_disk", "hung_disk")
NVME_GIB = 4.0
WRITES_FAIL = ("full", "read_only")


def add_options(parser: argparse.ArgumentParser) -> None:
    """Options of this routine."""
    parser.add_argument("--requests", type=int, default=200, help="per fault and engine, pooled")
    parser.add_argument("--rounds", type=int, default=4, help="windows they are spread over")
    parser.add_argument("--lives", type=int, default=2, help="of each engine, for the rounds")
    parser.add_argument("--faults", default=",".join(FAULTS), help="comma-separated")
    parser.add_argument("--concurrency", type=int, default=8)
    parser.add_argument("--utilization", type=float, default=0.6, help="0: closed loop")
    parser.add_argument("--docs", type=int, default=48, help="documents in turn: the working set")
    parser.add_argument("--doc-tokens", type=int, default=1024)
    parser.add_argument("--tail-tokens", type=int, default=160, help="new in every request")
    parser.add_argument("--output-tokens", type=int, default=4)
    parser.add_argument("--factor", type=float, default=10.0, help="how slow slow is")
    parser.add_argument("--recover-s", type=float, default=40.0, help="waited for at most")
    parser.add_argument("--limit-s", type=float, default=60.0, help="a request's; then an error")


class Prompts:
    """Documents in turn, each request with a new tail. Names are unique over the run."""

    def __init__(self, options: argparse.Namespace, vocab: int) -> None:
        self._rng, self._vocab, self._tail = random.Random(options.seed), vocab, options.tail_tokens
        self._docs = [self._tokens(options.doc_tokens) for _ in range(options.docs)]
        self._count = 0

    def _tokens(self, n: int) -> list[int]:
        return [self._rng.randrange(3, self._vocab) for _ in range(n)]

    def take(self, n: int) -> dict[str, list[int]]:
        """The next ``n`` requests."""
        out = {}
        for _ in range(n):
            doc = self._docs[self._count % len(self._docs)]
            out[f"r{self._count}"] = doc + self._tokens(self._tail)
            self._count += 1
        return out


class Run:
    """State of one routine call."""

    def __init__(self, context: Context, options: argparse.Namespace) -> None:
        self.context, self.options = context, options
        if context.quick:
            options.requests, options.rounds, options.docs, options.doc_tokens = 24, 1, 20, 512
            options.faults, options.recover_s = "slow,killed", 3.0
        self.faults = options.faults.split(",")
        self.disk: LoopDisk | None = None
        self.no_disk: str | None = None
        self.disk_bytes_per_s = 0
        if unknown := sorted(set(self.faults) - set(FAULTS)):
            raise SystemExit(
                f"run.py: --faults: unknown fault {unknown[0]!r}; known: {', '.join(FAULTS)}"
            )
        prompt = options.doc_tokens + options.tail_tokens + options.output_tokens
        blocks = options.concurrency * (math.ceil(prompt / BLOCK) + 1) + 8
        working = options.docs * options.doc_tokens
        assert blocks * BLOCK < working, "HBM holds the working set: more --docs"
        self.hbm_tokens = blocks * BLOCK
        dram = working * context.shape.kv_bytes_per_token / 3
        self.place = context.workplace(
            {
                "max_model_len": math.ceil(prompt / BLOCK) * BLOCK,
                "max_num_batched_tokens": 2048,
                "max_num_seqs": options.concurrency,
                "disable_log_stats": False,  # of both; kvoffload's counters are asked for
                "num_gpu_blocks_override": blocks,
            },
            hbm_gib=1,
            dram_gib=round(dram / 2**30, 4),
        )
        self.place = replace(self.place, budget=replace(self.place.budget, nvme_gib=NVME_GIB))
        self.prompts = Prompts(options, context.shape.vocab)
        self.control = context.scratch / "fault"
        self.arms = {name: Arm() for name in self.faults}
        self.floor = 0.0
        self.service_s = 0.0  # of a request, with all clients at it and everything recomputed
        self.arrival_rng = random.Random(options.seed)

    # -- one engine ------------------------------------------------------------------------

    def load(
        self,
        engine: Live,
        prompts: dict[str, list[int]],
        write: Json | None = None,
        due: dict[str, float] | None = None,
    ) -> Json:
        """All requests through the clients, ``due`` (none: at once) seconds after the start."""
        op: Json = {
            "op": "load",
            "define": prompts,
            "prompts": list(prompts),
            "concurrency": self.options.concurrency,
            "max_tokens": self.options.output_tokens,
            "limit_s": self.options.limit_s,
        }
        return engine.ask(op | ({"write": write} if write else {}) | ({"due": due} if due else {}))

    def arrivals(self, prompts: dict[str, list[int]]) -> dict[str, float] | None:
        """When each request is due."""
        if not self.options.utilization:
            return None
        rate, at, due = self.options.utilization / self.service_s, 0.0, {}
        for name in prompts:
            due[name] = at = at + self.arrival_rng.expovariate(rate)
        return due

    def order(self, name: str, after: int) -> Json:
        """A ``write`` that switches the tier once ``after`` requests were sent."""
        text = json.dumps({"fault": FAULTS[name], "factor": self.options.factor})
        controls: dict[str, str] = {}
        if self.disk is not None:
            slow = int(self.disk_bytes_per_s / self.options.factor)
            limit = {"slow_disk": slow, "hung_disk": STOPPED}.get(name, 0)
            controls = self.disk.limit_files(limit)
        return {"after": after, "files": {str(self.control): text}, "controls": controls}

    def status(self) -> Json:
        """What the tier says of itself, at most 50 ms old."""
        time.sleep(SETTLE_S)
        return dict(json.loads(self.control.with_name("fault.status").read_text()))

    # -- a window --------------------------------------------------------------------------

    def window(self, name: str, none: Live, own: Live, first: Live) -> Window:
        """The same requests through both engines, ``first`` first."""
        per = max(2 * self.options.concurrency, self.options.requests // self.options.rounds)
        prompts = self.prompts.take(per)
        due = self.arrivals(prompts)
        results: dict[Live, Json] = {}
        before: Json = {}
        under: Json = {}
        alive, recovered, metrics = True, None, {}
        for engine in (first, own if first is none else none):
            engine.resume()
            engine.ask({"op": "reset"})
            if engine is none:
                # As beside the status and the counters: after its stop, neither is timed cold.
                time.sleep(SETTLE_S)
                self.step(none)
                results[none] = self.load(none, prompts, due=due)
            else:
                before, counted = self.status(), self.metrics(own)
                # The clients are out of step by then: some wait for a first token, some decode.
                order = self.order(name, self.options.concurrency * 3 // 2)
                results[own] = self.load(own, prompts, order, due)
                under, after = self.status(), self.metrics(own)
                metrics = {k: v - counted.get(k, 0) for k, v in after.items()}
                metrics = {k: v for k, v in metrics.items() if v}
                if under["fault"] != FAULTS[name]:
                    raise RuntimeError(f"the tier is {under['fault']}, not {FAULTS[name]}")
                recovered = self.recover(name, own)
                alive = bool(own.ask({"op": "alive"})["alive"])
                self.status()  # a moment: a read in flight would look hung when the engine goes on
            engine.pause()
        chunks = {name: under[k] - before[k] for name, k in COUNTS.items()}
        at = None if name == "healthy" else results[own]["wrote"]
        answers = (results[none]["requests"], results[own]["requests"])
        return Window(*answers, at, chunks, alive, recovered, metrics)

    def metrics(self, own: Live) -> Json:
        """kvoffload's counters; they travel with engine steps, so one is taken first."""
        self.step(own)
        counted = own.ask({"op": "metrics", "prefix": "kvoffload"})
        path, name = str(self.place.model), self.place.model.name  # results are published
        return {series.replace(path, name): value for series, value in counted.items()}

    def step(self, engine: Live) -> None:
        """One short request, not timed."""
        self.load(engine, {"metrics": [3] * BLOCK})

    def recover(self, name: str, own: Live) -> float | None:
        """End the fault and send requests until the tier is used again: seconds to the answer of
        the first request with a hit, or where only writes failed, to the first that worked. None
        when that did not come in time."""
        began = ended = time.monotonic()
        if name == "healthy":
            return 0.0
        write: Json | None = self.order("healthy", 0)
        while time.monotonic() - began < self.options.recover_s:
            made = self.load(own, self.prompts.take(self.options.concurrency), write)
            ended = made["wrote"] if write is not None else ended
            write = None
            said = self.status()
            if name in WRITES_FAIL and said["put_worked_s"] is not None:
                return float(said["put_worked_s"])
            # HBM and DRAM do not hold these documents any more: a hit comes from the tier.
            hits = [r for r in made["requests"] if "error" not in r and (r["cached"] or 0) >= BLOCK]
            if name not in WRITES_FAIL and said["get_worked_s"] is not None and hits:
                return float(min(r["sent"] + r["ttft"] for r in hits) - ended)
        return None

    # -- everything ------------------------------------------------------------------------

    @contextlib.contextmanager
    def engines(self, life: int) -> Iterator[tuple[Live, Live]]:
        """Both engines, ready and paused, on an empty tier."""
        # Neither the budget nor admission is what is measured here.
        extra = {"nvme_write_tb_per_day": 1000, "nvme_admission": "all"}
        env = {"KVOFFLOAD_FAULT_FILE": str(self.control)}
        with contextlib.ExitStack() as stack:
            stack.enter_context(engine_lock(self.place.lock, self.place.progress))
            storage = self.storage(stack, self.context.scratch / f"life{life}")
            self.context.progress("starting the engine without a connector")
            none = stack.enter_context(live(self.place, "none", {}, None))
            none.pause()
            self.context.progress("starting the engine with kvoffload")
            own = stack.enter_context(live(self.place, "kvoffload", {}, storage, extra, env))
            if self.disk is not None:
                self.disk.join(own.pids())
                stack.callback(self.disk.limit, 0)  # what hangs could not be stopped
            own.pause()
            yield none, own

    def storage(self, stack: contextlib.ExitStack, here: Path) -> Path:
        """The tier's folder below ``here``, on a disk of our own where a fault wants one."""
        here.mkdir()
        if set(self.faults).isdisjoint(BELOW):
            return here / "tier"
        try:
            size = int((NVME_GIB + 1) * 2**30)
            self.disk = stack.enter_context(loop_disk(here, size))
            probe = DirectFile(self.disk.path / "probe", 64 << 20)
            probe.transfer(True, 4)
            self.disk_bytes_per_s = int(probe.transfer(False, 4)[0] * 1e9)
            probe.close()
            return self.disk.path / "tier"
        except Skip as reason:
            self.no_disk = portable(str(reason))
            self.faults = [f for f in self.faults if f not in BELOW]
            return here / "tier"

    def warm(self, none: Live, own: Live) -> None:
        """Every document once; without a connector twice, for the floor of ``wrong_outputs`` and
        for how long a request takes."""
        prompts = self.prompts.take(self.options.docs)
        none.resume()
        runs = []
        for _ in range(2):
            none.ask({"op": "reset"})
            made = self.load(none, prompts)
            runs.append(made["requests"])
        self.service_s = made["wall_s"] / len(prompts)
        none.pause()
        same = [(a, b) for a, b in pairs_of(*runs) if a["tokens"] == b["tokens"]]
        self.floor = max([self.floor, *(delta(a, b) for a, b in same)])
        own.resume()
        ((name, tokens),) = self.prompts.take(1).items()
        written = 0
        for _ in range(10):  # nothing is stored before the weights are digested
            self.load(own, prompts | {name: tokens})
            own.ask({"op": "settle", "prompt": name, "disk": True})
            before, written = written, self.status()["ok_puts"]
            if written == before >= self.options.docs:
                break  # the tier holds all: what a small DRAM had no room for came with this pass
        if written < self.options.docs:
            raise LifeFailed("no document was written to the tier")
        own.pause()

    def everything(self) -> None:
        """Life by life: warm up, then its rounds' windows, faults in turn."""
        lives = min(self.options.lives, self.options.rounds)
        for life in range(lives):
            with self.engines(life) as (none, own):
                self.context.progress("warming up")
                self.warm(none, own)
                for number in range(life, self.options.rounds, lives):
                    self.round(number, none, own)
            shutil.rmtree(self.context.scratch / f"life{life}", ignore_errors=True)

    def round(self, number: int, none: Live, own: Live) -> None:
        """A window of each fault."""
        for place, name in enumerate(self.faults):
            self.context.progress(f"round {number + 1} of {self.options.rounds}: {name}")
            made = self.window(name, none, own, (none, own)[(number // 2 + place) % 2])
            self.arms[name].windows.append(made)

    def report(self) -> Json:
        """Everything but the machine."""
        tolerance = max(TOLERANCE, 10 * self.floor)
        faults = {n: a.report(tolerance) for n, a in self.arms.items() if a.windows}
        if self.no_disk is not None:
            asked = [n for n in BELOW if n in self.arms]
            faults |= {n: {"skipped": self.no_disk} for n in asked}
        own = {
            "disk_bytes_per_s": self.disk_bytes_per_s or None,
            "hbm_tokens": self.hbm_tokens,
            "working_set_tokens": self.options.docs * self.options.doc_tokens,
            "service_ms": round(self.service_s * 1e3, 3),
            "logprob_floor": self.floor,
            "tolerance": tolerance,
            "systems": list(QUICK_SYSTEMS),
        }
        return {
            "faults": faults,
            "config": self.place.describe() | own,
        }


def run(context: Context, options: argparse.Namespace) -> Json:
    """All faults; ``{"skipped": why}`` where an engine cannot run here."""
    made = Run(context, options)
    skipped: dict[str, str] = {}
    with skip_reason(skipped, "faults"):
        made.everything()
    return made.report() | ({"skipped": skipped["faults"]} if skipped else {})


def _figure(f: Json, key: str) -> str:
    if f.get(key) is None:
        return "-"
    return f"{f[key]:.2f} ({f[key + '_lo']:.2f} to {f[key + '_hi']:.2f})"


def table(result: Json) -> tuple[list[str], list[list[str]]]:
    """Header and rows of the final table."""
    rows = []
    for name, f in result["faults"].items():
        if "skipped" in f:
            rows.append([name, f["skipped"][:80]])
            continue
        p95, p99 = (_figure(f, f"p{p}_ttft_vs_recompute") for p in (95, 99))
        back = "never" if f["recovered_s"] is None else f"{f['recovered_s']:.1f}"
        counts = [str(f[k]) for k in ("errors", "wrong_outputs", "engine_alive")]
        hits = f"{f['cached_tokens_per_request']:.0f}"
        reads = f"{f['chunks_read']} / {f['chunks_not_read']}"
        writes = f"{f['chunks_written']} / {f['chunks_not_written']}"
        caught = f"{f['in_flight']['n']}: {f['in_flight']['max_ms']:.0f}"
        rows.append(
            [name, str(f["requests"]), p95, p99, caught, *counts, back, hits, reads, writes]
        )
    if "skipped" in result:
        rows.append(["skipped", result["skipped"][:100]])
    head = ["fault", "n", "p95 TTFT / recompute", "p99", "in flight: max ms", "errors", "wrong"]
    return [*head, "alive", "back, s", "cached tok", "read / not", "written / not"], rows
