"""How fast the NVMe drives wear: bytes written to them, beside the payload that was to be kept."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass

_HOUR_S, _DAY_S = 3600.0, 86400.0
_EVERY_S = 60.0


@dataclass(frozen=True, slots=True)
class LifeWear:
    """As long as the store's directories live, by all engines that share them."""

    payload_bytes: int = 0
    device_bytes: int = 0
    bytes_per_day: float = 0.0  # to the devices, by the last 7 days
    days_left: float | None = None  # infinite: nothing is written; None: endurance not known

    @staticmethod
    def of(stats: Mapping[str, float]) -> LifeWear:
        """From a store's ``stats()``; zeros where it keeps no such totals."""
        return LifeWear(
            payload_bytes=int(stats.get("lifetime_payload_bytes", 0)),
            device_bytes=int(stats.get("lifetime_device_bytes", 0)),
            bytes_per_day=stats.get("lifetime_per_day", 0.0),
            days_left=stats.get("lifetime_days_left"),
        )


@dataclass(frozen=True, slots=True)
class Wear:
    """Bytes since this process opened the store, and the decisions behind them."""

    payload_bytes: int  # chunks accepted
    device_bytes: int  # all that was written for them
    bytes_per_day: float  # to the device, at the last hour's rate
    probability: float  # of writing a chunk used once; 1 where everything is written
    value: float  # bytes asked for again per byte that left DRAM, of late
    life: LifeWear = LifeWear()

    def amplification(self) -> float:
        """Device bytes per payload byte; 0 before anything was accepted."""
        return self.device_bytes / self.payload_bytes if self.payload_bytes else 0.0


def days_left(endurance_bytes: float, bytes_per_day: float) -> float | None:
    """Days until drives that endure so many bytes are used up at this rate; None: never."""
    return endurance_bytes / bytes_per_day if bytes_per_day > 0 else None


class HourOf:
    """A running total over the last hour. Not thread safe."""

    def __init__(self) -> None:
        self._seen: deque[tuple[float, int]] = deque()

    def per_day(self, total: int, now: float) -> float:
        """What a day adds to ``total`` at the last hour's rate. In the first hour the rest of it
        counts as nothing: a burst at the start is no rate."""
        if not self._seen or now - self._seen[-1][0] >= _EVERY_S:
            self._seen.append((now, total))
        while len(self._seen) > 2 and now - self._seen[1][0] >= _HOUR_S:
            self._seen.popleft()
        since, before = self._seen[0]
        return (total - before) / max(_HOUR_S, now - since) * _DAY_S
