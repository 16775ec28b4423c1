"""A striped store against a dict: restarts with drives reordered, gone and back, and failing ones."""

from __future__ import annotations

import hashlib
import shutil
import tempfile
from pathlib import Path

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from kvoffload._core import SegmentStore
from kvoffload.store import Store
from kvoffload.tiers.nvme import StripedStore
from kvoffload.tiers.nvme.breaker import MAX_PAUSE_S
from kvoffload.tiers.nvme.drive import Drive
from kvoffload.types import StoreResult

KEYS = st.integers(0, 40)
SIZES = (1, 4096, 30_000, 70_000)
DRIVES = 3
DRIVE = st.integers(0, DRIVES - 1)
FAULTS = ("read_eio", "write_eio", "enospc")


def key_of(i: int) -> bytes:
    return hashlib.sha256(b"drives %d" % i).digest()[:16]


def payload_of(i: int) -> bytes:
    nbytes = SIZES[i % len(SIZES)]
    return (hashlib.sha256(b"payload %d" % i).digest() * (nbytes // 32 + 1))[:nbytes]


class DrivesMachine(RuleBasedStateMachine):
    """``where``: for each key that must be held, the drives that may have it.

    A key is held for sure while one of its drives is in use and none failed since it was put;
    ``maybe`` says which keys may be held (a failure may or may not have cost them).
    """

    @initialize()
    def start(self) -> None:
        self.dir = Path(tempfile.mkdtemp(prefix="kvo-drives-"))
        self.now = 0.0
        self.used = list(range(DRIVES))
        self.where: dict[int, int] = {}  # key -> the drive that took it, for sure
        self.maybe: set[int] = set()
        self.faulty: set[int] = set()
        self.open()

    def open(self) -> None:
        self.drives = {
            i: Drive(
                str(self.dir / f"d{i}"),
                SegmentStore(str(self.dir / f"d{i}"), 8 << 20, 1 << 18, 1, io_engine="threads"),
            )
            for i in self.used
        }
        native = StripedStore(list(self.drives.values()), lambda: self.now)
        self.store = Store(native, 20.0)  # type: ignore[arg-type]

    def holder(self, key: int) -> int | None:
        """The drive whose native store holds the key."""
        for i, drive in self.drives.items():
            assert drive.store is not None
            if drive.store.length(key_of(key)) >= 0:
                return i
        return None

    def sure(self, key: int) -> bool:
        at = self.where.get(key)
        return at is not None and at in self.drives and self.drives[at].readable

    @rule(keys=st.lists(KEYS, min_size=1, max_size=8, unique=True))
    def put(self, keys: list[int]) -> None:
        able = [i for i, drive in self.drives.items() if drive.writable(self.now)]
        good = [i for i in able if i not in self.faulty]
        results = self.store.put_many((key_of(i), payload_of(i)) for i in keys)
        for key, result in zip(keys, results, strict=True):
            if good:
                assert result is StoreResult.OK
            if result is StoreResult.OK:
                self.maybe.add(key)
                at = self.holder(key)
                # Held when the put came; a drive that is full may have made room since.
                assert at is not None or self.faulty
                if at is not None and at not in self.faulty:
                    self.where.setdefault(key, at)

    @rule(keys=st.lists(KEYS, min_size=1, max_size=8, unique=True))
    def get(self, keys: list[int]) -> None:
        sure = [self.sure(k) and self.where[k] not in self.faulty for k in keys]
        found = self.store.get_many([key_of(i) for i in keys])
        for key, must, payload in zip(keys, sure, found, strict=True):
            assert payload in (None, payload_of(key))
            assert payload is None or key in self.maybe, f"phantom {key}"
            assert payload is not None or not must, f"lost {key}"

    @rule(key=KEYS)
    def delete(self, key: int) -> None:
        self.store.delete(key_of(key))
        assert not self.store.contains(key_of(key)) and self.store.get(key_of(key)) is None
        self.where.pop(key, None)
        if set(self.used) == set(range(DRIVES)) and not self.faulty:
            self.maybe.discard(key)  # else a drive that is away may still have it

    @rule(drive=DRIVE, what=st.sampled_from(FAULTS))
    @precondition(lambda self: len(self.faulty) < len(self.drives) - 1)
    def fail(self, drive: int, what: str) -> None:
        if drive in self.drives:
            store = self.drives[drive].store
            assert store is not None
            store.inject(what, 1)
            self.faulty.add(drive)
            for key in [k for k, at in self.where.items() if at == drive]:
                del self.where[key]  # a full drive recycles; a failed one loses its journal

    @rule()
    def heal(self) -> None:
        for drive in self.drives.values():
            assert drive.store is not None
            for what in FAULTS:
                drive.store.inject(what, 0)
        self.faulty = set()

    @rule()
    def time_passes(self) -> None:
        self.now += MAX_PAUSE_S
        self.store.contains(key_of(0))
        for drive in self.drives.values():
            assert drive.store is not None
            for kind in (0, 1):
                for inner in list(drive.out[kind]):
                    drive.store.wait(inner, 5000)
        self.store.contains(key_of(0))

    @rule(order=st.permutations(range(DRIVES)), leave_out=st.integers(0, DRIVES - 1))
    def restart(self, order: list[int], leave_out: int) -> None:
        self.heal()
        self.store.close()
        self.used = order[leave_out if leave_out < DRIVES - 1 else 0 :]
        self.open()

    @invariant()
    def sound(self) -> None:
        if not hasattr(self, "store"):
            return
        self.store.check()
        for key in range(41):
            held = self.store.contains(key_of(key))
            assert not held or key in self.maybe, f"phantom {key}"
            assert held or not self.sure(key), f"lost {key}"
        stats = self.store.stats()
        assert stats["corrupt"] == 0 and stats["drives"] == len(self.used)
        assert stats["bytes_max"] == len(self.used) * (8 << 20)
        if not self.faulty and all(d.readable for d in self.drives.values()):
            rows = [row for d in self.drives.values() if d.store for row in d.store.ls()]
            assert len(rows) == stats["entries"]
            keys = [chunk.key for chunk in self.store.ls()]
            assert len(keys) == len(set(keys)) and set(keys) == {row[0] for row in rows}

    def teardown(self) -> None:
        if hasattr(self, "store"):
            self.heal()
            self.store.close()
            shutil.rmtree(self.dir)


DrivesMachine.TestCase.settings = settings(
    max_examples=25,
    stateful_step_count=25,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
TestDrivesMachine = DrivesMachine.TestCase
