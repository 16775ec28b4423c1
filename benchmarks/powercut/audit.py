"""What a reopened store serves, against every value ever put."""

from __future__ import annotations

import random
import shutil
import time
from dataclasses import dataclass, field
from pathlib import Path

from kvoffload.store import Store
from powercut.load import Truth, open_small


@dataclass
class Tally:
    """Sums over crash points. All but ``checked``, ``misses`` and ``corrupt`` must stay 0."""

    engine: str = "threads"  # of the stores that are opened
    points: int = 0
    checked: int = 0  # chunks that came back, compared byte for byte
    misses: int = 0
    corrupt: int = 0  # entries the store itself found damaged: misses
    wrong: int = 0  # chunks with bytes never put under their key
    phantoms: int = 0  # keys held that nobody put
    stale: int = 0  # damaged entries although nothing was lost: a hole in the protocol
    refused: int = 0  # reopens that failed
    reopen_ms: list[float] = field(default_factory=list)

    @property
    def clean(self) -> bool:
        """Nothing that must not be."""
        return not (self.wrong or self.phantoms or self.stale or self.refused)


def audit(path: Path, truth: Truth, tally: Tally, lossless: bool, go_on: int | None = None) -> None:
    """Opens the store in ``path`` as its writer, gets every key and compares; ``path`` changes.

    ``lossless``: nothing was lost and nothing was damaged before, so no entry may be corrupt.
    ``go_on``: a seed; then the store is also written to, killed, and looked at once more.
    """
    tally.points += 1
    start = time.perf_counter()
    try:
        store = open_small(path, tally.engine)
    except OSError:
        tally.refused += 1
        return
    tally.reopen_ms.append((time.perf_counter() - start) * 1e3)
    with store:
        _compare(store, truth, tally, lossless)
        if go_on is None:
            return
        rng = random.Random(go_on)
        for key in rng.sample(sorted(truth.values), min(40, len(truth.values))):
            store.put(key, rng.choice(sorted(truth.values[key])))
        native = store._native
        assert native is not None
        native._abandon()
    with open_small(path, tally.engine) as store:
        _compare(store, truth, tally, False)


def _compare(store: Store, truth: Truth, tally: Tally, lossless: bool) -> None:
    store.check()
    tally.phantoms += len({row.key for row in store.ls()} - truth.values.keys())
    keys = list(truth.values)
    for key, found in zip(keys, store.get_many(keys), strict=True):
        if found is None:
            tally.misses += 1
            continue
        tally.checked += 1
        tally.wrong += found not in truth.values[key]
    store.check()
    corrupt = int(store.stats()["corrupt"])
    tally.corrupt += corrupt
    if lossless:
        tally.stale += corrupt


def discard(path: Path) -> None:
    """Removes a crash point's directory."""
    shutil.rmtree(path)
