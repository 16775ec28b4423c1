"""What the scheduler half knows of HBM's prefix cache. Scheduler thread only."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

from kvoffload.engines.vllm.requests import RequestState
from kvoffload.types import CacheLayout


class HbmCache:
    """Which of a prompt's blocks HBM holds, and whether they may be of weights that are gone.

    Knows nothing until ``watch``: HBM then holds no block, and is never seen empty.
    """

    def __init__(self, layout: CacheLayout) -> None:
        self._layout = layout
        self._is_empty: Callable[[], bool] = lambda: False
        self._holds: Callable[[Any], bool] | None = None
        self._stale = False

    def watch(
        self, is_empty: Callable[[], bool], holds: Callable[[Any], bool] | None = None
    ) -> None:
        """How to see into it: whether it is empty (asked only after a weight change), and whether
        it holds the block with a vLLM block hash (asked at arrival)."""
        self._is_empty = is_empty
        groups = self._layout.groups
        if len(groups) == 1 and groups[0].block_tokens == self._layout.hash_tokens:
            self._holds = holds

    def leading_tokens(self, hashes: Sequence[Any]) -> int:
        """Leading tokens of the prompt with these block hashes that are held now.

        A hint, O(log blocks): a block that is held and whose next one is not. HBM gives a prompt's
        last blocks away first, so that this is nearly always the first such block.
        """
        holds = self._holds
        if holds is None or not hashes or not holds(hashes[0]):
            return 0
        held, gone = 0, len(hashes)
        while gone - held > 1:
            middle = (held + gone) // 2
            if holds(hashes[middle]):
                held = middle
            else:
                gone = middle
        return gone * self._layout.hash_tokens

    def weights_changed(self) -> None:
        """From here on its blocks may be of the old weights."""
        self._stale = True

    def is_stale(self, states: Iterable[RequestState]) -> bool:
        """Whether it may still hold blocks of weights that were replaced in place. ``states``: all
        requests; those that have computed nothing lose their taint with the last such block.

        To be asked at every lookup: one with an HBM hit finds HBM not empty.
        """
        if self._stale and self._is_empty():
            self._stale = False
            for state in states:
                if int(state.request.num_computed_tokens) == 0:
                    state.tainted = False  # what it had is gone
                self._stale |= state.tainted
        return self._stale
