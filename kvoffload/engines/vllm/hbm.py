"""What the scheduler half knows of HBM's prefix cache. Scheduler thread only."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

from kvoffload.engines.vllm.requests import RequestState
from kvoffload.types import CacheLayout

AdapterName = tuple[str, str]
"""How vLLM's block hashes call a LoRA adapter: its name, and its path or ""."""


class HbmCache:
    """Which of a prompt's blocks HBM holds, and whether they may be of weights that are gone.

    Knows nothing until ``watch``: HBM then holds no block, and is never seen empty. ``by_path``:
    vLLM's block hashes tell adapters apart by their paths too (from 0.31 on), not only by names.
    """

    def __init__(self, layout: CacheLayout, by_path: bool = True) -> None:
        self._layout = layout
        self._by_path = by_path
        self._is_empty: Callable[[], bool] = lambda: False
        self._holds: Callable[[Any], bool] | None = None
        self._stale = False
        self._adapters: dict[AdapterName, bytes] = {}  # the digest that each had last
        self._stale_adapters: set[AdapterName] = set()

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

    def weights_changed(self) -> bool:
        """From here on its blocks may be of the old weights. Whether there are any."""
        self._stale = True
        return not self._is_empty()

    def names(self, request: Any, digest: bytes) -> None:
        """A request with an adapter, of these bytes. Where its name had others before, HBM may hold
        their blocks under it: a lookup there asks for the name only."""
        name = self._adapter(request)
        if name is not None and self._adapters.setdefault(name, digest) != digest:
            self._adapters[name] = digest
            self._stale_adapters.add(name)

    def is_stale(self, request: Any, states: Iterable[RequestState]) -> bool:
        """Whether what the request hits may be of weights that were replaced in place, or of
        another adapter of the same name. ``states``: all requests; those that have computed nothing
        lose their taint with the last block of old weights.

        To be asked at every lookup: one with an HBM hit finds HBM not empty.
        """
        if (self._stale or self._stale_adapters) and self._is_empty():
            self._forget_old(states)
        return self._stale or (
            bool(self._stale_adapters) and self._adapter(request) in self._stale_adapters
        )

    def _forget_old(self, states: Iterable[RequestState]) -> None:
        """Every block is gone. What runs with old weights, or with an adapter that may be an old
        one, will leave more of them."""
        tainted, running = False, set()
        for state in states:
            if int(state.request.num_computed_tokens) == 0:
                state.tainted = False  # what it had is gone
            else:
                tainted |= state.tainted
                running.add(self._adapter(state.request))
        self._stale &= tainted
        self._stale_adapters &= running

    def _adapter(self, request: Any) -> AdapterName | None:
        lora = getattr(request, "lora_request", None)
        if lora is None:
            return None
        return str(lora.lora_name), str(lora.lora_path) if self._by_path else ""
