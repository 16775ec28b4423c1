"""What a rank has out: the state of a load attempt, a step's answers, and the wait for a copy."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field

from kvoffload.copy.base import CopyEngine
from kvoffload.engines.vllm.meta import ChunkCopies, LoadOrder
from kvoffload.types import LoadFailure

logger = logging.getLogger("vllm.kvoffload")

ROUND_MS = 1000
LONG_ROUNDS = 3
"""After so many rounds of ``settle`` a line says that it still waits, once."""

REASONS = {
    1: LoadFailure.SLOT_LOST,
    2: LoadFailure.CORRUPT,
    3: LoadFailure.DEADLINE,
    4: LoadFailure.CANCELLED,
    5: LoadFailure.INJECTED,
}
"""CopyDone.reason as the scheduler half is told; any other is an exception."""


@dataclass(slots=True)
class RunningLoad:
    """One attempt: its order and the engine's jobs still out. Worker's main thread only."""

    order: LoadOrder
    jobs: dict[int, ChunkCopies] = field(default_factory=dict)
    started: bool = False
    until: float | None = None  # its deadline in the worker's seconds; None: it has not begun
    overdue: bool = False  # the scheduler half waits no longer
    bad_blocks: set[int] = field(default_factory=set)
    failure: LoadFailure | None = None

    def all_blocks(self) -> set[int]:
        """Every block the attempt was to fill."""
        return {
            block for c in self.order.copies for block in c.block_ids[c.block_ids >= 0].tolist()
        }

    def note_begun(self, engine: CopyEngine, now: float) -> None:
        """Set its deadline once all its jobs have begun: none waits for compute any more."""
        if self.until is not None or not self.started:
            return
        if all(engine.wait_begun(job, 0) for job in self.jobs):
            self.until = now + self.order.deadline_ms / 1000.0

    def is_past(self, now: float) -> bool:
        """Whether it has begun and its deadline is over."""
        return self.until is not None and now >= self.until


@dataclass(slots=True)
class StepAnswers:
    """What this rank answers in one step."""

    finished: set[str] = field(default_factory=set)
    failed: set[str] = field(default_factory=set)
    invalid_blocks: set[int] = field(default_factory=set)


def settle(engine: CopyEngine, job: int, given_ms: int, rank: int) -> None:
    """Wait until nothing of the job reads or writes any more. Blocks the calling thread.

    What has not started ``given_ms`` after the job began is dropped. The compute before it is
    waited for in any case: until it ends the copies cannot move, so dropping them tells nothing
    about their speed, and those already enqueued behind it cannot be called back.
    """
    rounds = 0
    while not engine.wait_begun(job, ROUND_MS):
        rounds = _another(rounds, rank, "the compute before a copy")
    if engine.wait(job, given_ms):
        return
    engine.cancel(job)
    rounds = 0
    while not engine.wait(job, ROUND_MS):
        rounds = _another(rounds, rank, "a copy")


def _another(rounds: int, rank: int, what: str) -> int:
    rounds += 1
    if rounds == LONG_ROUNDS:
        logger.error(
            "kvoffload: rank %d has waited %d s for %s to end, and goes on waiting.",
            rank, LONG_ROUNDS * ROUND_MS // 1000, what,
        )  # fmt: skip
    return rounds
