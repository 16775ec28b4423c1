"""``recover``: opening a chunk store of N small chunks, closed properly and after a kill.

The chunks are really put; each open is a process of its own with a warm page cache. ``rss_mib`` is
that process after the open, the interpreter included; ``rss_grown_mib`` is what the open added.
``open_cpu_ms``: CPU time of all its threads, which other work on the machine does not add to.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from common import ROOT, Json, quantile, summary
from context import Context

NAME = "recover"
PAYLOAD = 4096
BATCH = 2048
_SPARE = 1.2  # of the bytes the chunks need: journals, footers, what lives left half full

_FILL = """
import os, sys
import numpy as np
from kvoffload.tiers.nvme import open_segment_store

path, first, last, bound, nbytes, batch = sys.argv[1], *map(int, sys.argv[2:])
store = open_segment_store(path, max_bytes=bound)
payload = memoryview(np.random.default_rng(0).bytes(nbytes))
for start in range(first, last, batch):
    count = min(batch, last - start)
    keys = np.random.default_rng(start).bytes(16 * count)
    store.put(1, keys, [payload] * count)
    if not store.wait(1, 120_000) or any(store.poll()[0].results):
        sys.exit("a put failed")
if not store.flush(120_000):
    sys.exit("flush timed out")
if store.stats()["entries"] != last:
    sys.exit(f"{store.stats()['entries']} chunks held, {last} put")
if first:
    os.kill(os.getpid(), 9)
store.close()
"""

_OPEN = """
import json, sys, time
from kvoffload.tiers.nvme import open_segment_store

def rss_mib():
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith("VmRSS")) / 1024

before, cpu, start = rss_mib(), time.process_time(), time.perf_counter()
store = open_segment_store(sys.argv[1], max_bytes=int(sys.argv[2]))
out = {"open_ms": (time.perf_counter() - start) * 1e3, "rss_mib": rss_mib()}
out["open_cpu_ms"] = (time.process_time() - cpu) * 1e3
out |= {"rss_grown_mib": out["rss_mib"] - before, "chunks": store.stats()["entries"]}
out |= {"segments": store.stats()["segments"], "recover_ms": store.stats()["recover_ms"]}
store.check()
store.close()
print(json.dumps(out))
"""


def add_options(parser: argparse.ArgumentParser) -> None:
    """Options of this routine."""
    parser.add_argument("--chunks", type=int, default=1_000_000)
    parser.add_argument("--repeats", type=int, default=5, help="opens after a proper close")


def _python(code: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    env = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, sys.path)])}
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, env=env, timeout=1800)


def _open(path: Path, bound: int) -> Json:
    done = _python(_OPEN, path, bound)
    if done.returncode:
        raise RuntimeError(f"the open failed: {done.stderr[-800:]}")
    result: Json = json.loads(done.stdout)
    return result


def run(context: Context, options: argparse.Namespace) -> Json:
    """Fill, then open: after a close ``repeats`` times, after a kill once."""
    if options.quick:
        options.chunks, options.repeats = 20_000, 2
    chunks, path = options.chunks, context.scratch / "store"
    reserve = (600 if chunks > 100_000 else 24) << 20  # segments the store keeps clean
    bound = max(64 << 20, int(chunks * (PAYLOAD + 64) * _SPARE) + reserve)
    disk = os.statvfs(context.scratch)
    if disk.f_bavail * disk.f_frsize < bound * 1.1:
        return {"skipped": f"needs {bound >> 20} MiB of disk space"}
    context.progress(f"putting {chunks} chunks of {PAYLOAD} bytes")
    start, more = time.perf_counter(), max(1, chunks // 1000)
    done = _python(_FILL, path, 0, chunks, bound, PAYLOAD, BATCH)
    if done.returncode:
        raise RuntimeError(f"the fill failed: {done.stderr[-800:]}")
    filled_s = time.perf_counter() - start
    opens = []
    for number in range(options.repeats + 1):
        context.progress(f"open {number} of {options.repeats}")
        opens.append(_open(path, bound))
    context.progress("after a kill")
    done = _python(_FILL, path, chunks, chunks + more, bound, PAYLOAD, BATCH)
    if done.returncode != -signal.SIGKILL:
        raise RuntimeError(f"the second fill failed: {done.stderr[-800:]}")
    killed = _open(path, bound)
    warm = opens[1:]  # the first brings the footers into the page cache
    if any(o["chunks"] != chunks for o in opens) or killed["chunks"] != chunks + more:
        raise RuntimeError("chunks are missing after an open")
    keys = ("open_ms", "open_cpu_ms", "rss_mib", "rss_grown_mib")
    values = {key: [o[key] for o in warm] for key in keys}
    out: Json = {key: round(quantile(v, 0.5), 1) for key, v in values.items()}
    return {
        "chunks": chunks,
        **out,
        "open_ms_spread": summary(values["open_ms"], 1),
        "open_ms_first": round(opens[0]["open_ms"], 1),
        "open_ms_after_kill": round(killed["open_ms"], 1),
        "ns_per_chunk": round(out["open_ms"] * 1e6 / chunks),
        "bytes_per_chunk": round(out["rss_grown_mib"] * 2**20 / chunks),
        "segments": opens[0]["segments"],
        "fill_s": round(filled_s, 1),
        "config": {"payload_bytes": PAYLOAD, "max_bytes": bound, "journalled_chunks": more},
    }


def table(result: Json) -> tuple[list[str], list[list[str]]]:
    """Header and rows of the final table."""
    if "skipped" in result:
        return ["skipped"], [[result["skipped"]]]
    keys = ["chunks", "open_ms", "open_cpu_ms", "open_ms_first", "open_ms_after_kill", "rss_mib"]
    keys += ["rss_grown_mib", "ns_per_chunk", "bytes_per_chunk"]
    return keys, [[str(result[key]) for key in keys]]
