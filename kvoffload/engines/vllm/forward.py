"""Whether the blocks still hold what was computed: a forward that raises leaves garbage in them."""

from __future__ import annotations

import logging
import sys

logger = logging.getLogger("vllm.kvoffload")


class ForwardWatch:
    """Notes a forward that raised, for good. Of the worker's thread, by hooks in call order.

    vLLM's worker goes on after it: it answers FAILURE, and the next step, which had been sent by
    then, computes over what the failed one left. An engine whose caller swallows the exception
    goes on, too. ``raised``: nothing may be stored any more.
    """

    def __init__(self) -> None:
        self.raised = False
        self._in_step = False
        self._handled: BaseException | None = None  # before the step began: not its own

    def begins(self) -> None:
        """A step's orders came. One before it that has not ended raised: where vLLM has no
        ``finally`` around its hooks, or defers some of them to after the drafter."""
        if self._in_step:
            self._note()
        self._in_step = True
        self._handled = sys.exc_info()[1]

    def look(self) -> bool:
        """After the forward. vLLM calls hooks in a ``finally``: an exception on its way is seen."""
        if sys.exc_info()[1] is not self._handled:
            self._note()
        return self.raised

    def ended(self) -> None:
        """End of step."""
        self._in_step = False
        self._handled = None

    def _note(self) -> None:
        if not self.raised:
            self.raised = True
            logger.warning(
                "kvoffload: a forward raised, so that KV blocks may hold garbage: this worker "
                "stores nothing any more."
            )
