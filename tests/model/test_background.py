"""The scheduler half's threads over a real chunk store, while the files of why-miss hang."""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from kvoffload.engines.vllm import background
from kvoffload.engines.vllm.background import Background, Periodic
from kvoffload.engines.vllm.spaces import FILE
from kvoffload.linefile import live_files
from tests.support.steps import MiniEngine, Options, tokens


def until(condition: Callable[[], object], timeout: float = 20.0) -> bool:
    deadline = time.monotonic() + timeout
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.01)
    return True


@pytest.fixture
def idle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> MiniEngine:
    """An engine that takes no steps, with chunks in DRAM that NVMe does not have yet."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    (tmp_path / "nvme").mkdir(0o700)
    engine = MiniEngine(Options(nvme=str(tmp_path / "nvme")))
    engine.ask(tokens(40))
    engine.clock.now += 10
    return engine


def test_an_idle_engine_writes_behind_and_reports(idle: MiniEngine, tmp_path: Path) -> None:
    folder = tmp_path / "home" / "kvoffload" / "why"
    idle.scheduler_half.why.write_to([tmp_path / "nvme"], {})
    threads = Background(idle.scheduler_half)
    assert until(lambda: idle.store.stats()["entries"] == 5)
    assert until(lambda: idle.scheduler_half.why.log.requests == 1) and live_files(folder)
    threads.stop()
    assert not live_files(folder), "the engine has ended"
    threads.stop()
    idle.finish()


def test_hung_files_stop_the_reports_and_nothing_else(
    idle: MiniEngine,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """A pipe that nobody writes to takes the place of a file: opening it does not return."""
    hung = tmp_path / "nvme" / FILE
    os.mkfifo(hung)
    monkeypatch.setattr(background, "JOIN_S", 0.2)
    caplog.set_level(logging.WARNING, "vllm.kvoffload")
    at_work = threading.Event()
    work = idle.scheduler_half.why.work

    def noted(now: float) -> None:
        at_work.set()
        work(now)

    monkeypatch.setattr(idle.scheduler_half.why, "work", noted)
    idle.scheduler_half.why.write_to([tmp_path / "nvme"], {})
    threads = Background(idle.scheduler_half)
    try:
        assert at_work.wait(20) and until(lambda: idle.store.stats()["entries"] == 5)
        assert idle.scheduler_half.why.log.requests == 0, "that file is not what hangs"
        began = time.monotonic()
        threads.stop()
        assert time.monotonic() - began < 5 and "hang" in caplog.text
    finally:
        os.close(os.open(hung, os.O_RDWR))  # the file answers after all
    assert threads._why.join(20)
    assert not live_files(tmp_path / "home" / "kvoffload" / "why")
    idle.finish()


def test_a_failure_ends_nothing() -> None:
    seen: list[str] = []
    called = threading.Semaphore(0)

    def work() -> None:
        called.release()
        raise RuntimeError("work")

    def last() -> None:
        raise RuntimeError("last")

    thread = Periodic("t", 0.001, work, lambda exc: seen.append(str(exc)), last)
    for _ in range(3):
        assert called.acquire(timeout=20)
    thread.stop()
    assert thread.join(20)
    assert seen.count("work") >= 3 and seen[-1] == "last"
