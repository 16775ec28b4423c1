"""What a client may ask of the cache for one request: the vocabulary and its checks. Pure.

Hints are wishes: a wrong one is left out and reported, never an error of the request.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

MAX_RETAIN_S = 7 * 86400.0
MAX_PRIORITY = 3
MAX_NAME = 256
PRIORITY_S = 600.0
"""How long a use by a request with ``priority`` and without ``retain_s`` counts."""


@dataclass(frozen=True, slots=True)
class Hints:
    """Hints of one request, checked. The defaults ask for nothing."""

    retain_s: float | None = None  # seconds that its chunks stay in DRAM after their last use
    store: bool = True  # False: its new chunks are not kept; hits are used all the same
    end_session: bool = False  # what only its session used may go first
    priority: int = 0  # 0 to MAX_PRIORITY: what is kept longer under pressure
    prefetch: bool = False  # move the prompt up from NVMe whatever it saves
    pin: bool | None = None  # keep the prompt in DRAM (True) or no longer (False)
    session: str | None = None  # whose turns belong together
    tenant: str | None = None  # whose account the request is booked to; "": a bad one was given

    @property
    def keeps_s(self) -> float:
        """Seconds that a use holds the request's chunks; 0 without such a hint."""
        return self.retain_s or (PRIORITY_S if self.priority else 0.0)

    def kinds(self) -> list[str]:
        """What is asked for: labels of the hint counter."""
        asked = {
            "retain": self.retain_s is not None,
            "one_shot": not self.store,
            "end_session": self.end_session,
            "priority": bool(self.priority),
            "prefetch": self.prefetch,
            "pin": self.pin is True,
            "unpin": self.pin is False,
        }
        return [kind for kind, there in asked.items() if there]


NO_HINTS = Hints()


@dataclass(frozen=True, slots=True)
class Problem:
    """Why a hint is ignored: a label of the counter, one line for the log, the key if known."""

    reason: str
    line: str
    key: str = ""


_ALLOWED = {
    "retain_s": f"a number of seconds above 0, at most {MAX_RETAIN_S:.0f}",
    "store": "true or false",
    "end_session": "true or false",
    "priority": f"a whole number from 0 to {MAX_PRIORITY}",
    "prefetch": "true or false",
    "pin": "true or false",
    "session": f"a text of 1 to {MAX_NAME} characters",
    "tenant": f"a text of 1 to {MAX_NAME} characters",
}


def _good(key: str, value: Any) -> bool:
    if key == "retain_s":
        number = isinstance(value, int | float) and not isinstance(value, bool)
        return number and 0 < value <= MAX_RETAIN_S  # false of NaN; right of any whole number
    if key == "priority":
        return type(value) is int and 0 <= value <= MAX_PRIORITY
    if key in ("session", "tenant"):
        return isinstance(value, str) and 0 < len(value) <= MAX_NAME
    return isinstance(value, bool)


def _shown(value: Any) -> str:
    """At most 40 characters of a client's value, printable whatever it is."""
    if isinstance(value, int) and value.bit_length() > 128:  # Python refuses to write some out
        return f"a number of {value.bit_length()} bits"
    if isinstance(value, str):
        value = value[:41]
    text = ascii(value) if isinstance(value, str | int | float) else type(value).__name__
    return text if len(text) <= 40 else f"{text[:37]}..."


def parse_hints(given: Any, base: Hints = NO_HINTS) -> tuple[Hints, list[Problem]]:
    """The good hints of ``given`` over ``base``, and what is wrong with the others. Never raises.

    At most eight problems are told apart: the input is a client's.
    """
    if not isinstance(given, Mapping):
        line = f"kvoffload={_shown(given)}: give an object of hints"
        return base, [Problem("not_an_object", line)]
    good: dict[str, Any] = {}
    problems: list[Problem] = []
    for key, value in given.items():
        if key not in _ALLOWED:
            line = f"kvoffload has no {_shown(key)}: known are {', '.join(_ALLOWED)}"
            problems.append(Problem("unknown_key", line))
        elif value is None:
            continue  # as if it were not there: what optional fields of clients serialise to
        elif _good(key, value):
            good[key] = value
        else:
            line = f"kvoffload.{key}={_shown(value)}: give {_ALLOWED[key]}"
            problems.append(Problem("bad_value", line, key))
        if len(problems) == 8:
            break
    return replace(base, **good), problems
