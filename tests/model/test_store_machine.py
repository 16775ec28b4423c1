"""The chunk store against a dict, over reopens and kills, with its invariants checked at every step."""

from __future__ import annotations

import hashlib
import shutil
import tempfile
from pathlib import Path

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from kvoffload.config import IoEngine
from kvoffload.store import Store, open_store
from kvoffload.types import StoreResult
from tests.support.store_engines import skip_without

KEYS = st.integers(0, 60)
SIZES = (1, 100, 4096, 5000, 30_000, 70_000)


def key_of(i: int) -> bytes:
    return hashlib.sha256(b"machine %d" % i).digest()[:16]


def payload_of(i: int) -> bytes:
    nbytes = SIZES[i % len(SIZES)]
    return (hashlib.sha256(b"payload %d" % i).digest() * (nbytes // 32 + 1))[:nbytes]


class StoreMachine(RuleBasedStateMachine):
    """``sure``: must be held. ``maybe``: put or deleted since the last flush, or old enough to go.

    ``absent`` keys must not be held: never put, or deleted and flushed (a phantom would be one).
    """

    roomy = True
    io_engine: IoEngine = "threads"

    @initialize(roomy=st.booleans())
    def start(self, roomy: bool) -> None:
        skip_without(self.io_engine)
        self.dir = Path(tempfile.mkdtemp(prefix="kvo-machine-"))
        self.roomy = roomy
        self.sure: set[int] = set()
        self.maybe: set[int] = set()
        self.unflushed: set[int] = set()
        self.store: Store = self.open()

    def open(self) -> Store:
        bound = (16 << 20) if self.roomy else (1 << 20)
        return open_store(
            self.dir / "s",
            max_bytes=bound,
            segment_bytes=1 << (18 if self.roomy else 17),
            threads=2,
            io_engine=self.io_engine,
        )

    @rule(keys=st.lists(KEYS, min_size=1, max_size=12))
    def put(self, keys: list[int]) -> None:
        results = self.store.put_many((key_of(i), payload_of(i)) for i in keys)
        assert set(results) == {StoreResult.OK}
        self.sure |= set(keys)
        self.maybe -= set(keys)
        self.unflushed |= set(keys)

    @rule(keys=st.lists(KEYS, min_size=1, max_size=12))
    def get(self, keys: list[int]) -> None:
        for i, found in zip(keys, self.store.get_many([key_of(i) for i in keys]), strict=True):
            if found is not None:
                assert found == payload_of(i)
                assert i in self.sure | self.maybe, f"phantom {i}"
            elif self.roomy:
                assert i not in self.sure, f"lost {i}"

    @rule(key=KEYS)
    def delete(self, key: int) -> None:
        held = self.store.contains(key_of(key))
        assert self.store.delete(key_of(key)) == held
        assert self.store.get(key_of(key)) is None
        if held:
            self.sure.discard(key)
            self.unflushed.add(key)

    @rule()
    def flush(self) -> None:
        assert self.store.flush()
        self.unflushed = set()

    @rule()
    def reopen(self) -> None:
        held = {row.key for row in self.store.ls()}
        self.store.close()
        self.unflushed = set()
        self.store = self.open()
        # Room may be made at open; nothing may appear.
        now = {row.key for row in self.store.ls()}
        assert now <= held
        assert not self.roomy or now == held

    @rule()
    def kill(self) -> None:
        assert self.store._native is not None
        self.store._native._abandon()
        self.store = self.open()
        self.sure -= self.unflushed
        self.maybe |= self.unflushed  # put: here or not. deleted: gone or back.
        self.unflushed = set()

    @rule()
    def verify(self) -> None:
        report = self.store.verify()
        assert report.bad == 0 and report.checked == len(self.store)

    @invariant()
    def sound(self) -> None:
        if not hasattr(self, "store"):
            return
        self.store.check()
        held_keys = [self.store.contains(key_of(i)) for i in range(61)]
        leading = held_keys.index(False) if False in held_keys else 61
        assert self.store.longest_prefix([key_of(i) for i in range(61)]) == leading
        for i, held in enumerate(held_keys):
            assert not held or i in self.sure | self.maybe, f"phantom {i}"
            assert held or not self.roomy or i not in self.sure, f"lost {i}"
        stats = self.store.stats()
        assert stats["corrupt"] == stats["io_errors"] == 0
        assert self.disk_bytes() <= stats["bytes_max"]

    def disk_bytes(self) -> int:
        total = 0
        for entry in self.dir.rglob("*"):
            try:
                info = entry.lstat()
            except FileNotFoundError:  # a journal whose segment was sealed just now
                continue
            total += max(info.st_size, info.st_blocks * 512)
        return total

    def teardown(self) -> None:
        if hasattr(self, "store"):
            self.store.close()
            shutil.rmtree(self.dir)


class UringMachine(StoreMachine):
    """The same on the other engine."""

    io_engine: IoEngine = "uring"


SETTINGS = settings(
    max_examples=25,
    stateful_step_count=25,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
for machine in (StoreMachine, UringMachine):
    machine.TestCase.settings = SETTINGS
TestStoreMachine = StoreMachine.TestCase
TestUringMachine = UringMachine.TestCase
