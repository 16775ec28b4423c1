"""How long the engine takes to compute a stretch of a prompt, learned from its steps.

A token's prefill costs a constant (the dense layers) plus a share that grows with the tokens
before it (attention): ``seconds(tokens [a, b)) = alpha (b - a) + beta (b^2 - a^2) / 2``. Both are
fitted by least squares over steps, recent ones counting more.
"""

from __future__ import annotations

from dataclasses import dataclass

KEEP = 0.95
"""Weight of all samples before, per sample: about the last 20 count."""
WARM = 2
"""Samples until the model is trusted."""
RIDGE_TOKENS = 256.0
"""Spread of contexts (standard deviation, tokens) at which half of a measured slope is believed:
steps at nearly the same context say nothing about others."""


@dataclass(frozen=True, slots=True)
class PrefillWork:
    """Prompt tokens of one step: ``token_context`` sums, over these, the tokens before each."""

    tokens: int
    token_context: float

    @staticmethod
    def span(start: int, end: int) -> PrefillWork:
        """Tokens [start, end) of one prompt."""
        n = max(0, end - start)
        return PrefillWork(n, n * (start + end) / 2)

    def __add__(self, other: PrefillWork) -> PrefillWork:
        return PrefillWork(self.tokens + other.tokens, self.token_context + other.token_context)


class PrefillModel:
    """The fit. Deterministic; not thread safe (the Manager locks)."""

    def __init__(self, keep: float = KEEP, warm: int = WARM) -> None:
        self._keep = keep
        self._warm = warm
        self._samples = 0
        # Sums over samples: tokens x (1, context, context^2), seconds x (1, context).
        self._w = self._wc = self._wcc = self._y = self._yc = 0.0
        self._fit: tuple[float, float] | None = (0.0, 0.0)  # None: to be worked out anew

    def add(self, work: PrefillWork, seconds: float) -> None:
        """A step computed ``work`` in ``seconds``. Nothing, or no time, is ignored."""
        if work.tokens <= 0 or seconds <= 0:
            return
        context = work.token_context / work.tokens
        self._samples += 1
        self._fit = None
        self._w = self._w * self._keep + work.tokens
        self._wc = self._wc * self._keep + work.token_context
        self._wcc = self._wcc * self._keep + work.token_context * context
        self._y = self._y * self._keep + seconds
        self._yc = self._yc * self._keep + seconds * context

    def coefficients(self) -> tuple[float, float]:
        """(alpha, beta): seconds per token, and per token and token of context; both >= 0."""
        if self._fit is None:
            self._fit = self._solve()
        return self._fit

    def _solve(self) -> tuple[float, float]:
        context, rate = self._wc / self._w, self._y / self._w
        spread = max(0.0, self._wcc / self._w - context * context)
        slope = (self._yc / self._w - rate * context) / (spread + RIDGE_TOKENS**2)
        # Neither part can be negative: the line through the mean is turned as far as that allows.
        steepest = rate / context if context > 0 else 0.0
        slope = min(max(0.0, slope), steepest)
        return max(0.0, rate - slope * context), slope

    def seconds(self, start: int, end: int) -> float | None:
        """Time to compute tokens [start, end) of a prompt; None until known."""
        if self._samples < self._warm:
            return None
        alpha, beta = self._fit or self.coefficients()
        return (end - start) * (alpha + beta * (start + end) / 2) if end > start else 0.0

    def check(self) -> None:
        """Raise AssertionError unless the fit is finite and not negative."""
        alpha, beta = self.coefficients()
        assert 0 <= alpha < float("inf") and 0 <= beta < float("inf"), "prefill fit"
