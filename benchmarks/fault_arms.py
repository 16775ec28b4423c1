"""What the ``faults`` routine makes of its requests: ratios, wrong outputs, recovery."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from common import Json, bootstrap_ratio, percentiles, quantile

# Name in the result -> what the tier's status calls it.
COUNTS = {
    "read": "ok_gets",
    "not_read": "bad_gets",
    "written": "ok_puts",
    "not_written": "bad_puts",
}


@dataclass
class Window:
    """What both engines made of the same requests under one fault."""

    none: list[Json]
    kvoffload: list[Json]
    fault_at: float | None  # monotonic seconds
    chunks: Json  # by COUNTS, while the fault was on
    alive: bool
    recovered_s: float | None
    metrics: Json  # what kvoffload counted in the window

    def report(self) -> Json:
        """This window by itself."""
        cached = [r["cached"] or 0 for r in self.kvoffload if "error" not in r]
        medians = {
            key: round(quantile([r["ttft"] * 1e3 for r in answers if "error" not in r], 0.5), 1)
            for key, answers in (("p50_ms", self.kvoffload), ("recompute_p50_ms", self.none))
            if any("error" not in r for r in answers)
        }
        hits = {"cached_tokens_per_request": round(sum(cached) / max(1, len(cached)), 1)}
        return medians | hits | {"recovered_s": self.recovered_s, "metrics": self.metrics}


@dataclass
class Arm:
    """All windows of one fault."""

    windows: list[Window] = field(default_factory=list)

    def ttft(self, system: str) -> list[float]:
        """Milliseconds of all answered requests."""
        every = [r for w in self.windows for r in getattr(w, system)]
        return [r["ttft"] * 1e3 for r in every if "error" not in r]

    def in_flight(self) -> list[float]:
        """Milliseconds of the requests that had no token yet when the fault began."""
        return [
            r["ttft"] * 1e3
            for w in self.windows
            for r in w.kvoffload
            if "error" not in r and _caught(r, w.fault_at)
        ]

    def pairs(self, *, later: bool = False) -> list[tuple[float, float]]:
        """Milliseconds of the same request, kvoffload's and recomputed; ``later``: only those sent
        under the fault."""
        return [
            (own["ttft"] * 1e3, none["ttft"] * 1e3)
            for w in self.windows
            for own, none in pairs_of(w.kvoffload, w.none)
            if not later or (w.fault_at is not None and own["sent"] >= w.fault_at)
        ]

    def worst(self, n: int = 5) -> list[Json]:
        """The slowest requests: TTFT, prompt tokens not computed, sent when after the fault."""
        every = [(r, w.fault_at) for w in self.windows for r in w.kvoffload if "error" not in r]
        every.sort(key=lambda pair: -pair[0]["ttft"])
        return [
            {
                "ttft_ms": round(r["ttft"] * 1e3, 1),
                "cached": r["cached"],
                "after_s": None if at is None else round(r["sent"] - at, 3),
            }
            for r, at in every[:n]
        ]

    def wrong(self, tolerance: float) -> int:
        """Requests whose tokens or logprobs differ between the engines."""
        return sum(wrong(w.none, w.kvoffload, tolerance) for w in self.windows)

    def errors(self) -> list[str]:
        """Of the engine with the broken tier."""
        return [r["error"] for w in self.windows for r in w.kvoffload if "error" in r]

    def report(self, tolerance: float) -> Json:
        """The contract's keys for one fault."""
        none, own = self.ttft("none"), self.ttft("kvoffload")
        errors = self.errors()
        recovered = [w.recovered_s for w in self.windows if w.recovered_s is not None]
        caught = self.in_flight()
        cached = [r["cached"] or 0 for w in self.windows for r in w.kvoffload if "error" not in r]
        out: Json = {"requests": sum(len(w.kvoffload) for w in self.windows)}
        out |= ratios(self.pairs(), "")
        out |= ratios(self.pairs(later=True), "later_")
        out |= {
            "ttft_ms": percentiles(own, (50, 95, 99)),
            "recompute_ttft_ms": percentiles(none, (50, 95, 99)),
            "worst": self.worst(),
            "in_flight": {"n": len(caught), "max_ms": round(max(caught, default=0.0), 1)},
            "errors": len(errors),
            "first_error": errors[0] if errors else None,
            "recompute_errors": sum("error" in r for w in self.windows for r in w.none),
            "wrong_outputs": self.wrong(tolerance),
            "engine_alive": all(w.alive for w in self.windows),
            # The longest; None when it did not come back in one of the windows.
            "recovered_s": round(max(recovered), 3)
            if recovered and len(recovered) == len(self.windows)
            else None,
            "cached_tokens_per_request": round(sum(cached) / max(1, len(cached)), 1),
            **{f"chunks_{k}": sum(w.chunks[k] for w in self.windows) for k in COUNTS},
            "windows": [w.report() for w in self.windows],
        }
        return out


def _caught(request: Json, fault_at: float | None) -> bool:
    if fault_at is None:
        return False
    return bool(request["sent"] < fault_at < request["sent"] + request["ttft"])


def ratios(pairs: list[tuple[float, float]], prefix: str) -> Json:
    """p95 and p99 of the first values over those of the second, with intervals; p99 only of 200
    pairs, None where there are too few."""
    out: Json = {}
    for point, least in ((95, 20), (99, 200)):
        key = f"{prefix}p{point}_ttft_vs_recompute"
        out[key] = out[f"{key}_lo"] = out[f"{key}_hi"] = None
        if len(pairs) >= least:
            own, none = zip(*pairs, strict=True)
            value = quantile(own, point / 100) / quantile(none, point / 100)
            low, high = bootstrap_ratio(pairs, point / 100)
            out[key] = round(value, 3)
            out[f"{key}_lo"], out[f"{key}_hi"] = round(low, 3), round(high, 3)
    return out


def delta(a: Json, b: Json) -> float:
    """Largest logprob difference of two answers to one prompt."""
    pairs = zip(a["logprobs"], b["logprobs"], strict=False)
    return max((abs(x - y) for x, y in pairs), default=0.0)


def pairs_of(left: list[Json], right: list[Json]) -> Iterator[tuple[Json, Json]]:
    """Requests that both sides answered."""
    by_name = {r["prompt"]: r for r in right if "error" not in r}
    for one in left:
        if "error" not in one and one["prompt"] in by_name:
            yield one, by_name[one["prompt"]]


def wrong(left: list[Json], right: list[Json], tolerance: float) -> int:
    """Prompts answered on both sides whose tokens or logprobs differ."""
    return sum(
        a["tokens"] != b["tokens"] or delta(a, b) > tolerance for a, b in pairs_of(left, right)
    )
