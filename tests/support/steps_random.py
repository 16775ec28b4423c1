"""Random life of an engine: requests with shared prefixes, aborts, resets, faults, anything goes.

``drive`` is deterministic in (options, script): a script is a list of small ints, so that Hypothesis
can shrink it.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np

from tests.support.steps import LOAD, STORE, MiniEngine, Options, refuse_nth, tokens
from tests.support.steps_blocks import MiniRequest

FAMILIES = [tokens(48, seed) for seed in range(3)]
HINTS = [
    {"retain_s": 0.2},
    {"retain_s": 1000, "priority": 1},
    {"store": False},
    {"end_session": True},
    {"end_session": True, "session": "s1", "prefetch": True},
    {"priority": 3},
    {"pin": True},
    {"pin": False},
    {"prefetch": True},
    {"retain_s": -1, "pin": "x"},
]


class Driver:
    """Applies scripted actions to an engine and ends with every check there is."""

    def __init__(self, options: Options, *, faults: bool = False) -> None:
        self.engine = MiniEngine(options)
        self.faults = faults
        self.engine.expect_bad = faults
        self.live: list[MiniRequest] = []
        self.actions: list[Callable[[int], None]] = [
            self.add, self.add, self.steps, self.steps, self.steps, self.abort, self.wait,
            self.reset_hbm, self.reset_all, self.weights,
        ]  # fmt: skip
        if faults:
            self.actions += [self.corrupt, self.inject, self.refuse, self.late, self.disk]

    def run(self, script: Sequence[tuple[int, int]]) -> MiniEngine:
        for what, how in script:
            self.actions[what % len(self.actions)](how)
            self.live = [r for r in self.live if not r.is_finished()]
        for engine in self.engine.engines:
            engine.inject(0)
        self.engine.finish()
        assert not self.engine.manager.counters.verify_mismatch, "a false alarm"
        return self.engine

    # -- ordinary life

    def add(self, how: int) -> None:
        """A prompt that shares a prefix with others of its family and then goes its own way."""
        prompt = list(FAMILIES[how % 3][: 1 + (how // 3) % 48])
        if how & 1024:
            prompt += tokens(how % 7, how)
        salt = b"tenant" if how % 11 == 0 else b""
        skip = how % 13 == 0
        hints = HINTS[how // 17 % len(HINTS)] if how % 5 < 2 else None
        session = f"s{how % 3}" if how % 4 == 0 else None
        more = {"salt": salt, "skip": skip, "hints": hints, "session": session}
        self.live.append(self.engine.add(prompt, 1 + (how // 7) % 9, **more))

    def steps(self, how: int) -> None:
        for _ in range(1 + how % 6):
            self.engine.step()

    def wait(self, how: int) -> None:
        self.engine.clock.now += (0.01, 0.1, 1.5)[how % 3]

    def abort(self, how: int) -> None:
        loading = [r for r in self.live if r in self.engine.loading()]
        pick = loading if loading and how % 2 else self.live
        if pick:
            self.engine.abort(pick[how % len(pick)])
            if not self.engine.queue:
                self.engine._take_aborts()

    # -- resets

    def _quiet(self) -> bool:
        """vLLM refuses to reset running requests while a load holds blocks."""
        self.engine.drain_queue()
        scheduler = self.engine.scheduler
        return not scheduler.holding and not any(
            r.is_finished() for r in scheduler.requests.values()
        )

    def reset_hbm(self, how: int) -> None:
        if self._quiet():
            assert self.engine.reset(connector=False, running=True)

    def reset_all(self, how: int) -> None:
        if how % 3 == 0:
            self.engine.reset(connector=True, running=self._quiet())

    def weights(self, how: int) -> None:
        """In place, and the engine told to recompute what runs, as RLHF trainers do."""
        if how % 3 == 0 and self._quiet():
            self.engine.change_weights()
            assert self.engine.reset(connector=how % 2 == 0, running=True)

    # -- faults

    def corrupt(self, how: int) -> None:
        """Flip a byte somewhere in the arena's used part."""
        size = 16384
        slots = self.engine.arena.data_bytes // size
        view = np.frombuffer(self.engine.arena.view((how % min(slots, 24)) * size, size), np.uint8)
        view[how % 512] ^= 0x40

    def inject(self, how: int) -> None:
        for engine in self.engine.engines[: 1 + how % 2]:
            engine.inject(how % 4)

    def refuse(self, how: int) -> None:
        kind = LOAD if how % 2 else STORE
        for engine in self.engine.engines[: 1 + how % 2]:
            engine.fail_submit = refuse_nth(kind, 1 + how % 3)

    def disk(self, how: int) -> None:
        if self.engine.store is not None:
            what = ("read_eio", "write_eio", "enospc", "short_read")[how % 4]
            self.engine.disks[how // 12 % len(self.engine.disks)].inject(what, how // 4 % 3)

    def late(self, how: int) -> None:
        """All attempts are overdue for the scheduler."""
        self.engine.clock.now += self.engine.options.deadline_ms / 1000.0


def drive(
    options: Options, script: Sequence[tuple[int, int]], *, faults: bool = False, nvme: bool = False
) -> MiniEngine:
    """Run a script and every final check; the engine is closed in any case."""
    with tempfile.TemporaryDirectory() as folder:
        if nvme:
            options = replace(options, nvme=folder)
        driver = Driver(options, faults=faults)
        try:
            return driver.run(script)
        finally:
            driver.engine.close()
