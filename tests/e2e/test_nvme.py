"""NVMe under a real engine: restart, kill -9, damaged files, a full disk, other weights.

Each life is a new engine on the same directory, in the order of the numbers: a later test needs what
the earlier ones left there (choose a whole prefix with -k, not single ones). Oracle: tokens and fp32 logprobs of a life without
kvoffload (the KV-sensitive model).
"""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.e2e.prompts import causes, connector, prompt, total, until
from tests.support import models
from tests.support.engine import EngineLife, Output, assert_same

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(900)]

ASK = {"max_tokens": 8, "logprobs": 1}
TOKENS = 2048
PROMPTS = {i: prompt(50 + i, TOKENS) for i in range(6)}
SMALL = 0.02  # GiB: 20 chunks of 1 MiB, the six prompts need 48


def ask(life: EngineLife, number: int) -> Output:
    return life.generate([PROMPTS[number]], **ASK)[0]  # type: ignore[arg-type]


def nvme_chunks(life: EngineLife) -> float:
    """Chunks on NVMe; an idle engine exports metrics only with a step, so a tiny request goes first."""
    life.generate([prompt(999, 20)], max_tokens=1)
    return total(life.metrics(), "kvoffload_events_total", event="nvme_written")


def events(life: EngineLife) -> dict[str, float]:
    """All Manager counters, for failure messages."""
    return {k: v for k, v in life.metrics().items() if k.startswith("kvoffload_events_total") and v}


def event(life: EngineLife, name: str) -> float:
    return total(life.metrics(), "kvoffload_events_total", event=name)


def flip_everywhere(path: Path, every: int = 256 << 10) -> None:
    """One bit in each ``every`` bytes behind the header of a segment."""
    with path.open("r+b") as f:
        for at in range(64 << 10, path.stat().st_size, every):
            f.seek(at)
            byte = f.read(1)
            f.seek(at)
            f.write(bytes([byte[0] ^ 0x20]))
        f.flush()
        os.fsync(f.fileno())


@pytest.fixture(scope="module")
def plain() -> dict[int, Output]:
    """Outputs without kvoffload."""
    with EngineLife(models.llama(), None, {"enable_prefix_caching": False}) as life:
        return {i: ask(life, i) for i in PROMPTS}


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("nvme") / "store"


def same(life: EngineLife, plain: dict[int, Output], numbers: Iterator[int] | range) -> list[int]:
    """Ask again after an HBM reset; returns the cached tokens of each."""
    assert life.reset_prefix_cache()
    cached = []
    for i in numbers:
        out = ask(life, i)
        assert_same(plain[i], out)
        cached.append(out.num_cached_tokens or 0)
    return cached


def test_1_reload_damage_and_kill(path: Path, plain: dict[int, Output]) -> None:
    extra = connector(nvme_path=str(path), nvme_gib=1, dram_gib=SMALL, nvme_admission="all")
    with EngineLife(models.llama(), extra) as life:
        for i in PROMPTS:
            assert_same(plain[i], ask(life, i))
        assert until(lambda: nvme_chunks(life) >= 48), events(life)

        # DRAM holds 20 of 48 chunks: most of this comes from NVMe.
        assert same(life, plain, range(6)) == [TOKENS] * 6
        assert total(life.metrics(), "kvoffload_hit_tokens_total", tier="nvme") > 3 * TOKENS
        assert event(life, "nvme_corrupt") == 0

        # Every chunk on disk damaged, the first of each prompt included: no livelock, right tokens.
        for segment in path.glob("w*/seg-*.kv"):
            flip_everywhere(segment)
        cached = same(life, plain, range(6))
        assert min(cached) < TOKENS
        assert event(life, "nvme_corrupt") > 0
        assert total(life.metrics(), "kvoffload_failures_total", kind="exception") == 0

        # What was recomputed is stored again and comes back.
        assert until(lambda: nvme_chunks(life) >= 60), events(life)
        assert max(same(life, plain, range(6))) == TOKENS

        # A segment cut short under the running engine.
        for segment in path.glob("w*/seg-*.kv"):
            os.truncate(segment, 1 << 20)
        same(life, plain, range(6))

        # kill -9 with stores under way.
        for i in range(4):
            life.submit(prompt(70 + i, TOKENS), max_tokens=4)
        until(lambda: False, timeout=0.5)
        life.kill9()


def test_2_restart_after_kill(path: Path, plain: dict[int, Output]) -> None:
    extra = connector(nvme_path=str(path), nvme_gib=1)
    with EngineLife(models.llama(), extra) as life:
        same(life, plain, range(6))
        assert total(life.metrics(), "kvoffload_failures_total", kind="exception") == 0
        # Each of the 48 chunks is on NVMe again, or was read from there.
        on_nvme = lambda: nvme_chunks(life) + event(life, "nvme_read") >= 48  # noqa: E731
        assert until(on_nvme), events(life)


def test_3_restart_serves_from_nvme(path: Path, plain: dict[int, Output]) -> None:
    """After an orderly stop: everything is there; then reloaded weights and a missing segment."""
    extra = connector(nvme_path=str(path), nvme_gib=1)
    with EngineLife(models.llama(), extra) as life:
        assert same(life, plain, range(6)) == [TOKENS] * 6
        metrics = life.metrics()
        # What has come up before it is looked up (the machine is busy) counts as a hit in DRAM.
        nvme = total(metrics, "kvoffload_hit_tokens_total", tier="nvme")
        assert (
            nvme and nvme + total(metrics, "kvoffload_hit_tokens_total", tier="dram") == 6 * TOKENS
        )
        source = "vllm:prompt_tokens_cached_by_source_total"
        assert total(metrics, source, source="disk") == nvme
        assert total(metrics, "kvoffload_failed_loads_total") == 0

        # Weights written in place (the same ones here): everything stored before is a miss.
        life.collective_rpc("reload_weights")
        assert same(life, plain, range(2)) == [0, 0]


def test_4_missing_segment(path: Path, plain: dict[int, Output]) -> None:
    next(iter(sorted(path.glob("w*/seg-*.kv")))).unlink()
    with EngineLife(models.llama(), connector(nvme_path=str(path), nvme_gib=1)) as life:
        same(life, plain, range(6))
        assert same(life, plain, range(6)) == [TOKENS] * 6


def test_5_other_weights_are_a_miss(
    path: Path, plain: dict[int, Output], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Same shapes, same prompt, same directory: not one token is served, and `why` says why."""
    with EngineLife(models.llama(seed=1), connector(nvme_path=str(path), nvme_gib=1)) as life:
        outs = [ask(life, i) for i in range(2)]
        assert [o.num_cached_tokens for o in outs] == [0, 0]
        assert outs[0].token_ids != plain[0].token_ids
        assert until(lambda: len(causes(life, monkeypatch)) == 2)
        told = [("namespace", {"fields": ["weights"], "tier": "nvme"})] * 2
        assert list(causes(life, monkeypatch).values()) == told


@pytest.fixture
def tiny_disk(tmp_path: Path) -> Iterator[Path]:
    if os.geteuid() != 0:
        pytest.skip("needs root to mount a small file system")
    mount = tmp_path / "disk"
    mount.mkdir()
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=40m", "kvo-test", str(mount)])
    if done.returncode:
        pytest.skip("cannot mount a tmpfs here")
    yield mount
    subprocess.run(["umount", "-l", str(mount)], check=True)


def test_6_disk_full(tiny_disk: Path, plain: dict[int, Output]) -> None:
    store = str(tiny_disk / "store")
    extra = connector(nvme_path=store, nvme_gib=1, dram_gib=SMALL, nvme_admission="all")
    with EngineLife(models.llama(), extra) as life:
        for i in PROMPTS:
            assert_same(plain[i], ask(life, i))
        same(life, plain, range(6))
        life.generate([prompt(998, 20)], max_tokens=1)
        metrics = life.metrics()
        full = [
            total(metrics, "kvoffload_events_total", event=e)
            for e in ("nvme_no_space", "nvme_dropped", "nvme_io_errors")
        ]
        assert sum(full) > 0, metrics
        assert total(metrics, "kvoffload_failures_total", kind="exception") == 0
