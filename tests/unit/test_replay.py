"""Traces, byte-less tiers, the driver against a plain simulator, and the command."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from typer.testing import CliRunner

from kvoffload.cli.replay import app
from kvoffload.config import Config
from kvoffload.errors import ConfigError
from kvoffload.replay.driver import Replay, Setup, last_use_bits
from kvoffload.replay.record import Ended, StreamRecorder
from kvoffload.replay.report import parse_size, run
from kvoffload.replay.stores import LruModel, SegmentModel, StoreModel
from kvoffload.replay.trace import Request, Trace, chunk_keys
from kvoffload.types import ChunkKey

BLOCK = 16


def rows(seed: int = 0, count: int = 400) -> list[dict[str, Any]]:
    """Conversations as a trace has them: chained ids, a parent each, some prompts cut short."""
    rng = random.Random(seed)
    fresh = iter(range(1 << 30))
    seen: list[list[int]] = [[]]
    out = []
    for n in range(count):
        old = rng.choice(seen[-60:])
        ids = old[: rng.choice((len(old), len(old) // 2))]
        ids = ids + [next(fresh) for _ in range(rng.choice((0, 1, 2, 5, 12)))]
        ids = ids[:40]
        seen.append(ids)
        tokens = len(ids) * BLOCK + rng.choice((0, 1, 7))
        at = n // 3 * 3000
        row = {"timestamp": at, "input_length": tokens or 1, "output_length": 3, "hash_ids": ids}
        out.append(row)
    return out


def write(path: Path, lines: Sequence[dict[str, Any]], meta: bool = True) -> Path:
    head = [{"meta": True, "name": "toy", "block_size": BLOCK}] if meta else []
    text = "\n".join(map(json.dumps, [*head, *lines])) + "\n"
    opener: Any = {".gz": gzip.open, ".xz": lzma.open}.get(path.suffix, open)
    with opener(path, "wt") as f:
        f.write(text)
    return path


def setup(dram: int, **more: Any) -> Setup:
    # Slots of the allocator's unit: every capacity is possible.
    return Setup(
        chunk_tokens=BLOCK, kv_bytes_per_token=(4 << 20) // BLOCK, dram_chunks=dram, **more
    )


# -- the driver


def leaf_first_lru(trace: Sequence[Request], capacity: int) -> list[int]:
    """The counting rules of the reference figures, by the book."""
    age: dict[ChunkKey, int] = {}
    tick = 0
    out = []
    for request in trace:
        run_ = next((i for i, k in enumerate(request.keys) if k not in age), len(request.keys))
        out.append(min(run_ * BLOCK, request.input_tokens - 1))
        for key in reversed(request.keys[:capacity]):  # leaf first: a parent is the younger one
            tick += 1
            age[key] = tick
        for key in sorted(age, key=age.__getitem__)[: max(0, len(age) - capacity)]:
            del age[key]
    return out


@pytest.mark.parametrize("capacity", [8, 24, 60, 200])
@pytest.mark.parametrize("seed", [0, 1])
def test_lru_by_the_reference_rules(tmp_path: Path, capacity: int, seed: int) -> None:
    trace = list(Trace(write(tmp_path / "t.jsonl", rows(seed))))
    replay = Replay(setup(capacity, load="always"))
    got = []
    for n, request in enumerate(trace):
        served = replay.serve(request)
        got.append(served.dram_tokens)
        assert served.nvme_tokens == 0
        if n % 97 == 0:
            replay.check()
    assert got == leaf_first_lru(trace, capacity)
    assert replay.orphans() == 0
    assert replay.counters.evicted > 0 or capacity == 200


def test_unlimited_tiers_give_the_ceiling(tmp_path: Path) -> None:
    trace = Trace(write(tmp_path / "t.jsonl", rows()))
    facts = trace.facts()
    for dram, nvme in (("100%", "0"), ("3%", "20GiB")):
        result = run(
            trace,
            setup(1, load="always", write_everything=True),
            parse_size(dram, "dram"),
            parse_size(nvme, "nvme"),
            facts,
        )
        assert result.token_hit == pytest.approx(facts.ceiling, abs=1e-6)
        assert result.orphans == 0
        assert (result.token_hit_by_tier["nvme"] > 0.05) == (nvme != "0")


def test_writes_keep_to_the_budget_and_everything_is_written_without(tmp_path: Path) -> None:
    trace = Trace(write(tmp_path / "t.jsonl", rows()))
    facts = trace.facts()
    dram, nvme = parse_size("5%", "dram"), parse_size("60%", "nvme")
    chunk = 4 << 20
    everything = run(trace, setup(1, write_everything=True), dram, nvme, facts)
    assert everything.nvme_bytes_written >= facts.unique_chunks * chunk
    tight = run(trace, setup(1, nvme_write_tb_per_day=0.1), dram, nvme, facts)
    burst = max(nvme.chunks(facts.unique_chunks, chunk) * chunk / 10, 1 << 30)
    allowed = burst + 0.1e12 / 86400 * facts.span_s
    assert tight.nvme_bytes_written <= allowed + chunk < everything.nvme_bytes_written
    assert run(trace, setup(1), dram, parse_size("0", "nvme"), facts).nvme_bytes_written == 0


def test_the_planner_refuses_what_a_slow_tier_would_cost(tmp_path: Path) -> None:
    from kvoffload.replay.hardware import Hardware

    trace = Trace(write(tmp_path / "t.jsonl", rows()))
    sizes = parse_size("100%", "dram"), parse_size("0", "nvme")
    slow = Hardware(dram_bytes_per_s=1e9)
    refused = run(trace, setup(1, hardware=slow), *sizes, trace.facts())
    forced = run(trace, setup(1, hardware=slow, load="always"), *sizes, trace.facts())
    assert refused.token_hit < 0.1 < forced.token_hit
    assert forced.ttft_s["mean"] > 3 * refused.ttft_s["mean"]  # which now and then explores
    assert refused.ttft_s["p50"] == pytest.approx(refused.recompute_ttft_s["p50"], rel=0.05)


def test_last_use_bits_are_right_as_often_as_asked(tmp_path: Path) -> None:
    trace = list(Trace(write(tmp_path / "t.jsonl", rows())))
    truth = [b for bits in last_use_bits(trace, 1.0) for b in bits]
    later: set[ChunkKey] = set()
    want = []
    for request in reversed(trace):
        want.append([k not in later for k in request.keys])
        later.update(request.keys)
    assert truth == [b for bits in reversed(want) for b in bits]
    wrong = [b for bits in last_use_bits(trace, 0.8, 0) for b in bits]
    assert wrong == [b for bits in last_use_bits(trace, 0.8, 0) for b in bits]
    share = sum(a != b for a, b in zip(truth, wrong, strict=True)) / len(truth)
    assert share == pytest.approx(0.2, abs=0.03)


def test_hints_keep_what_comes_back(tmp_path: Path) -> None:
    trace = Trace(write(tmp_path / "t.jsonl", rows()))
    sizes = parse_size("4%", "dram"), parse_size("0", "nvme")
    hits = [
        run(trace, setup(1, load="always"), *sizes, trace.facts(), hint_accuracy=a).token_hit
        for a in (None, 0.8, 1.0)
    ]
    assert hits[0] < hits[1] < hits[2]


# -- traces


@pytest.mark.parametrize("name", ["t.jsonl", "t.jsonl.gz", "t.jsonl.xz"])
def test_formats_and_what_is_left_out(tmp_path: Path, name: str) -> None:
    lines = [
        {"timestamp": 5000, "input_length": 50, "output_length": 1, "hash_ids": [1, 2, 3, 4]},
        {"timestamp": 5000, "input_length": 32, "output_length": 2, "hash_ids": [1, 2]},
        {"timestamp": 8000, "input_length": 31, "output_length": 0, "hash_ids": [1, 9]},
    ]
    path = write(tmp_path / name, lines)
    trace = Trace(path)
    got = list(trace)
    # an id of an incomplete block is no block; one time stamp's requests are spread
    assert [len(r.keys) for r in got] == [3, 2, 1]
    assert [r.arrival_s for r in got] == [0.0, 1.5, 3.0]
    assert got[0].keys[:2] == got[1].keys and got[2].keys[0] == got[0].keys[0]
    facts = trace.facts()
    assert (facts.requests, facts.unique_chunks, facts.input_tokens) == (3, 3, 113)
    assert facts.ceiling == pytest.approx((31 + 16) / 113)
    assert [len(r.keys) for r in Trace(path, chunk_blocks=2)] == [1, 1, 0]
    assert trace.position() == path.stat().st_size


def test_the_block_size_is_worked_out_or_asked_for(tmp_path: Path) -> None:
    assert Trace(write(tmp_path / "a.jsonl", rows(), meta=False)).block_tokens == BLOCK
    few = [{"timestamp": 0, "input_length": 3, "output_length": 1, "hash_ids": [1]}]
    path = write(tmp_path / "b.jsonl", few, meta=False)
    with pytest.raises(ConfigError, match="--block-tokens"):
        Trace(path)
    assert Trace(path, 4).block_tokens == 4
    with pytest.raises(ConfigError, match="has blocks of 16"):
        Trace(write(tmp_path / "c.jsonl", few), 4)


@pytest.mark.parametrize(
    ("line", "why"),
    [
        ("{", "line 2: is not JSON"),
        ("[1]", "line 2: is not a JSON object"),
        ('{"timestamp": 0, "input_length": 4}', "line 2: needs timestamp"),
        ('{"timestamp": 0, "input_length": -1, "hash_ids": []}', "line 2: input_length=-1: must"),
        ('{"timestamp": 0, "input_length": 4.0, "hash_ids": []}', "line 2: input_length=4.0: must"),
        ('{"timestamp": 0, "input_length": true, "hash_ids": []}', "line 2: input_length=true:"),
        (
            '{"timestamp": 0, "input_length": 4, "output_length": 1e400, "hash_ids": []}',
            "line 2: output_length=Infinity: must be a whole",
        ),
        ('{"timestamp": NaN, "input_length": 4, "hash_ids": []}', "line 2: timestamp=NaN: must"),
        ('{"timestamp": "0", "input_length": 4, "hash_ids": []}', 'line 2: timestamp="0": must'),
        ('{"timestamp": 0, "input_length": 4, "hash_ids": "ab"}', 'line 2: hash_ids="ab": must'),
        ('{"timestamp": 0, "input_length": 4, "hash_ids": %s}' % ("[" * 99999), "line 2: is not"),
        ('{"timestamp": 0, "input_length": 99, "hash_ids": [1.2, 1.7]}', "line 2: hash_ids"),
        ('{"timestamp": 0, "input_length": 99, "hash_ids": [1, 1.0]}', "line 2: hash_ids"),
        ('{"timestamp": 0, "input_length": 99, "hash_ids": [true]}', "line 2: hash_ids"),
        ('{"timestamp": 0, "input_length": 99, "hash_ids": ["x"]}', "line 2: hash_ids"),
        ('{"timestamp": 0, "input_length": 99, "hash_ids": [null]}', "line 2: hash_ids"),
        ('{"timestamp": 0, "input_length": 99, "hash_ids": [-1]}', "line 2: hash_ids"),
    ],
)
def test_a_bad_line_is_named(tmp_path: Path, line: str, why: str) -> None:
    path = tmp_path / "t.jsonl"
    path.write_text('{"meta": true, "block_size": 16}\n' + line + "\n")
    with pytest.raises(ConfigError, match=why):
        list(Trace(path))


@pytest.mark.parametrize("suffix", [".gz", ".xz", ".bz2"])
def test_a_damaged_file_is_named(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"t.jsonl{suffix}"
    module: Any = {".gz": gzip, ".xz": lzma, ".bz2": bz2}[suffix]
    text = "".join(json.dumps(row) + "\n" for row in rows(count=3000))
    whole = module.compress(text.encode())
    for damaged in (whole[: len(whole) // 2], whole[:10] + b"\xff" * 99, b"x" * 99):
        path.write_bytes(damaged)
        with pytest.raises(ConfigError, match=rf"{path.name}.*: cannot be read: ") as raised:
            list(Trace(path, BLOCK))
        assert "\n" not in str(raised.value)


def test_keys_are_spread_and_distinct() -> None:
    keys = chunk_keys(range(20000))
    assert len(set(keys)) == 20000
    for at in (0, 4, 8, 12):  # admission and sampling draw from any of these
        ones = sum(k[at] >> 7 for k in keys)
        assert ones == pytest.approx(10000, abs=400)


# -- stores


def store_of(kind: type[StoreModel], capacity: int) -> StoreModel:
    return kind(capacity, 1 << 20, lambda: 0.0, lambda n: n / 1e9)


@pytest.mark.parametrize("kind", [LruModel, SegmentModel])
@pytest.mark.parametrize("capacity", [1, 7, 64, 1000])
def test_stores_hold_what_fits_and_no_more(kind: type[StoreModel], capacity: int) -> None:
    store, rng = store_of(kind, capacity), random.Random(capacity)
    keys = chunk_keys(range(3 * capacity + 5))
    for n in range(6 * capacity + 20):
        key = rng.choice(keys)
        if store.holds(key):
            store._read(key)
        else:
            store.puts += 1
            store._put(key, n % 9)
            assert store.holds(key) or capacity == 1
        if n % 50 == 0:
            store.check()
    assert capacity / 2 < len(store) <= capacity
    assert store.rewritten <= store.puts / 3


def test_what_was_read_is_written_again_before_its_segment_goes() -> None:
    store = store_of(SegmentModel, 400)
    hot, cold = chunk_keys(range(20)), chunk_keys(range(1000, 3000))
    for key in (*hot, *cold[:180]):
        store._put(key, 0)
    for n, key in enumerate(cold[180:1200]):
        if n % 20 == 0:
            for k in filter(store.holds, hot):
                store._read(k)
        store._put(key, 0)
    assert sum(map(store.holds, hot)) == 20
    assert not any(map(store.holds, cold[:160]))
    assert store.rewritten > 0
    store.check()


# -- the recorder


def test_the_recording_is_private_hashed_and_read_back(tmp_path: Path) -> None:
    path = tmp_path / "r.jsonl"
    recorder = StreamRecorder(path, BLOCK, 100.0)
    keys = list(chunk_keys(range(3)))
    recorder.add(Ended(102.0, 50, 7, keys, 5))
    recorder.add(Ended(101.0, 40, 7, keys[:2], 5))  # ended later, arrived first
    with pytest.raises(OSError):
        StreamRecorder(path, BLOCK, 0.0)  # another engine's
    recorder.close()
    assert path.stat().st_mode & 0o777 == 0o600
    text = path.read_text()
    assert all(k.hex()[:8] not in text for k in keys)
    got = list(Trace(path))
    assert [(r.arrival_s, r.input_tokens, len(r.keys)) for r in got] == [(0, 40, 2), (1, 50, 3)]
    assert got[1].keys[:2] == got[0].keys
    again = StreamRecorder(path, BLOCK, 0.0)  # an old recording moves aside
    again.add(Ended(1.0, 50, 7, keys, 5))
    again.close()
    assert (tmp_path / "r.jsonl.1").read_text() == text
    assert not set(json.loads(path.read_text().splitlines()[1])["hash_ids"]) & set(
        json.loads(text.splitlines()[1])["hash_ids"]
    ), "the same key has the same hash in two recordings"


def test_the_recording_is_bounded(tmp_path: Path) -> None:
    recorder = StreamRecorder(tmp_path / "r.jsonl", BLOCK, 0.0, max_bytes=20_000)
    for n in range(500):
        recorder.add(Ended(float(n), 20 * BLOCK, 1, chunk_keys(range(20)), 0))
        if n % 100 == 0:
            while recorder.written < n:
                assert recorder._thread.is_alive()
    recorder.close()
    assert recorder.dropped == 0 and recorder.written == 500
    files = sorted(tmp_path.iterdir())
    assert [f.name for f in files] == ["r.jsonl", "r.jsonl.1"]
    assert sum(f.stat().st_size for f in files) <= 20_000 + 256 * 600
    assert all(f.stat().st_mode & 0o777 == 0o600 for f in files)
    assert len(list(Trace(files[0]))) > 0


def test_record_path_is_an_absolute_file(tmp_path: Path) -> None:
    assert Config(record_path=str(tmp_path / "r.jsonl")).record_path == str(tmp_path / "r.jsonl")
    assert Config(record_path=None).record_path is None
    for bad in ("r.jsonl", "", 3, str(tmp_path)):
        with pytest.raises(ConfigError, match=r"record_path=.*absolute path of a file"):
            Config(record_path=bad)  # type: ignore[arg-type]


# -- the command


def test_command(tmp_path: Path) -> None:
    path = write(tmp_path / "t.jsonl.xz", rows())
    out, plot = tmp_path / "out.json", tmp_path / "out.svg"
    args = ["--dram", "5%,20%", "--nvme", "0,50%", "--json", str(out), "--plot", str(plot)]
    done = CliRunner().invoke(app, [str(path), *args, "--kv-bytes-per-token", "1024"])
    assert done.exit_code == 0, done.output
    data = json.loads(out.read_text())
    assert data["trace"]["requests"] == 400
    assert [(r["dram"], r["nvme"]) for r in data["runs"]] == [
        ("5 %", "0 GiB"),
        ("20 %", "0 GiB"),
        ("5 %", "50 %"),
        ("20 %", "50 %"),
    ]
    hits = [r["token_hit"] for r in data["runs"]]
    assert 0 < hits[0] < hits[1] <= data["trace"]["ceiling"] and hits[2] > hits[0]
    assert "toy" in done.output and f"{100 * hits[1]:.2f}" in done.output
    assert ElementTree.parse(plot).getroot().tag.endswith("svg")


@pytest.mark.parametrize(
    ("args", "why"),
    [
        (["--dram", "x"], "dram='x'"),
        (["--policy", "best"], "policy='best'"),
        (["--load", "maybe"], "load='maybe'"),
        (["--nvme", "10%", "--nvme-store", "x"], "nvme_store='x'"),
        (["--nvme-store", "x"], "nvme_store='x': must be one of fifo, lru"),
        (["--nvme-admission", "x"], "nvme_admission='x': must be one of "),
        (["--dram-gbps", "0"], "dram_gbps=0"),
        (["--last-use-hints", "2"], "last_use_hints=2"),
        (["--block-tokens", "64"], "block_tokens=64"),
    ],
)
def test_command_refuses_in_one_line(tmp_path: Path, args: list[str], why: str) -> None:
    path = write(tmp_path / "t.jsonl", rows(count=20))
    done = CliRunner().invoke(app, [str(path), *args])
    assert done.exit_code == 2
    assert why in done.output and len(done.output.strip().splitlines()) == 1, done.output


def test_command_without_a_trace(tmp_path: Path) -> None:
    done = CliRunner().invoke(app, [str(tmp_path / "none.jsonl")])
    assert done.exit_code == 2 and "none.jsonl: cannot be read" in done.output
