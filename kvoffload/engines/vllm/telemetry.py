"""What the scheduler half learns from step times, and the levels it exports."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping
from typing import Any

from kvoffload.core.index import Kept
from kvoffload.core.lookup import primary
from kvoffload.core.manager import Manager
from kvoffload.core.prefill import PrefillWork
from kvoffload.engines.vllm.requests import RequestState
from kvoffload.metrics import Recorder
from kvoffload.replay.record import Ended, StreamRecorder
from kvoffload.types import CacheLayout

MAX_STEPS_OUT = 8
"""More steps than any engine has in flight."""


PREFILL_TOKENS = 64
"""Steps with fewer tokens say nothing about the prefill rate."""


class StepClock:
    """Pairs each step's output with when the step was built. Scheduler thread only; seconds.

    Only steps that say something about prefill are kept: most do not, and cost a count.
    """

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._out: deque[tuple[int, PrefillWork, float]] = deque()
        self._built = 0
        self._ended = 0
        self._last_end = float("-inf")

    def built(self, prefill: PrefillWork | None, now: float) -> None:
        """A step was built; ``prefill`` None where it says nothing about prefill."""
        self._built += 1
        if prefill is not None:
            self._out.append((self._built, prefill, now))

    def ended(self) -> tuple[PrefillWork, float] | None:
        """A step's output arrived: (its prefill, seconds it ran), None when nothing is learned.

        Outputs come in the order of the steps. A step ran from when it was built, or from when the
        step before it ended, until now.
        """
        self._ended = min(self._ended + 1, self._built)
        if self._built - self._ended > MAX_STEPS_OUT:  # outputs went missing: pairs would be wrong
            self._ended = self._built
            self._out.clear()
        if not self._out:
            return None  # what is built from now on begins after this end
        now = self._clock()
        learned = None
        if self._out[0][0] <= self._ended:
            _, prefill, built = self._out.popleft()
            learned = prefill, now - max(built, self._last_end)
        self._last_end = now
        return learned


def prefill_work(output: Any, states: Mapping[str, RequestState]) -> PrefillWork | None:
    """Prompt tokens of a step, None where they are few or not most of it."""
    total = sum(output.num_scheduled_tokens.values())
    if total < PREFILL_TOKENS:
        return None  # most steps only decode
    prompt = PrefillWork(0, 0.0)
    for request_id, scheduled in output.num_scheduled_tokens.items():
        if scheduled == 1:
            continue  # it decodes: a thousand others may, and one token says nothing
        state = states.get(request_id)
        if state is not None:
            done, end = int(state.request.num_computed_tokens), int(state.request.num_prompt_tokens)
            if done < end:
                prompt += PrefillWork.span(done, min(done + scheduled, end))
    mostly = prompt.tokens >= PREFILL_TOKENS and 2 * prompt.tokens >= total
    return prompt if mostly else None


def record(recorder: StreamRecorder, state: RequestState, layout: CacheLayout) -> None:
    """Hand an ended request over: its prompt's chunks of the group that hits are counted by."""
    request: Any = state.request
    chain, group = state.chain, primary(layout)
    if chain is None:
        return
    prompt = int(request.num_prompt_tokens)
    keys = chain.keys(group.group)[: prompt // group.chunk_tokens]
    output = max(0, int(request.num_tokens) - prompt)
    recorder.add(Ended(state.arrived, prompt, output, keys, chain.namespace_id))


def report_levels(manager: Manager, metrics: Recorder) -> None:
    """Occupancy and running totals. O(1)."""
    use = manager.levels()
    counters = manager.counters
    metrics.dram(use.bytes_used, use.bytes_total, use.bytes_pinned, use.slots_used)
    kept = manager.keep.nbytes
    metrics.kept(kept[Kept.RETAINED], kept[Kept.PINNED], use.nvme_retained_bytes)
    nvme = None
    if use.nvme_max:
        nvme = {
            "bytes_read": counters.nvme_read_bytes,
            "bytes_written": counters.nvme_written_bytes,
            "bytes_used": use.nvme_bytes,
            "bytes_max": use.nvme_max,
            "entries": use.nvme_entries,
        }
    events = counters.as_dict() | {"hint_retain_cut_nvme": use.nvme_retain_cut}
    metrics.manager(events, nvme)
    if use.wear is not None:
        metrics.wear(use.wear)
    metrics.planner(use.bytes_per_s, use.prefill_tokens_per_s)
    if use.nvme_max:
        metrics.queue(use.reading_bytes, use.writing_bytes, use.read_breaker, use.write_breaker)


def report_drives(store: Any, metrics: Recorder) -> None:
    """Each drive of a store over several paths; a single path is in the totals. O(drives)."""
    from kvoffload.tiers.nvme import StripedStore

    if isinstance(store, StripedStore):
        for drive in store.drives():
            metrics.drive(drive.path, drive.up, drive.bytes_used, drive.io_errors, drive.trips)
