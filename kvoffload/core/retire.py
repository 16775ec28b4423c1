"""Hints of last use along a chain, made consistent. Pure."""

from __future__ import annotations

from collections.abc import Sequence


def first_retired(marks: Sequence[bool]) -> int:
    """Where the retired tail of a chain begins; ``len(marks)`` when there is none.

    ``marks``: root first, whether each chunk is said not to be used again. A chunk is only ever
    used together with all its ancestors, so whatever is true, the chunks used again are a prefix
    of the chain. The answer is the tail that contradicts the fewest marks, the shortest of
    equals: a wrong mark in the middle neither condemns a prefix that lives nor lets a leaf that
    should have gone keep its dead ancestors from eviction.
    """
    wrong = sum(marks)  # with no tail: every mark is contradicted
    fewest, at = wrong, len(marks)
    for i in range(len(marks) - 1, -1, -1):
        wrong += -1 if marks[i] else 1
        if wrong < fewest:
            fewest, at = wrong, i
    return at
