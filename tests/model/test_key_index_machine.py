"""The native key index beside its Python reference, with good keys and with keys that all collide."""

from __future__ import annotations

import hashlib
import threading

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from kvoffload._core import KeyIndex
from tests.support.keyindex import ReferenceIndex

SEEDS = (0x0123456789ABCDEF, 0x2545F4914F6CDD1D)
MISSING = 2**64 - 1
NUMBERS = st.integers(0, 2999)
CHAINS = st.lists(NUMBERS, max_size=80)
SPANS = st.tuples(NUMBERS, st.sampled_from([1, 5, 33, 400, 3000]))


def key_of(number: int, hostile: bool) -> bytes:
    if hostile:  # equal to a seed: the product that makes the hash is 0
        return SEEDS[0].to_bytes(8, "little") + number.to_bytes(8, "little")
    return hashlib.sha256(b"index %d" % number).digest()[:16]


class KeyIndexMachine(RuleBasedStateMachine):
    """Every answer of the two is compared; the native one's invariants hold after every step."""

    native: KeyIndex

    @initialize(hostile=st.booleans())
    def start(self, hostile: bool) -> None:
        self.native = KeyIndex(*SEEDS) if hostile else KeyIndex()
        self.reference = ReferenceIndex()
        self.keys = [key_of(n, hostile) for n in range(400 if hostile else 3000)]
        self.probe = self.keys[:: len(self.keys) // 200]
        self.serial = 0

    def chain(self, numbers: list[int]) -> list[bytes]:
        return [self.keys[n % len(self.keys)] for n in numbers]

    def span(self, span: tuple[int, int]) -> list[bytes]:
        first, count = span
        return self.keys[first % len(self.keys) :][:count]

    def insert_both(self, keys: list[bytes]) -> None:
        values = range(self.serial, self.serial + len(keys))
        self.serial += len(keys)
        fresh = self.native.insert(b"".join(keys), np.array(values, dtype=np.uint64))
        assert fresh == self.reference.insert(keys, values)

    @rule(numbers=CHAINS)
    def insert(self, numbers: list[int]) -> None:
        self.insert_both(self.chain(numbers))

    @rule(span=SPANS)
    def insert_span(self, span: tuple[int, int]) -> None:
        self.insert_both(self.span(span))

    @rule(numbers=CHAINS)
    def erase(self, numbers: list[int]) -> None:
        keys = self.chain(numbers)
        assert self.native.erase(b"".join(keys)) == self.reference.erase(keys)

    @rule(span=SPANS)
    def erase_span(self, span: tuple[int, int]) -> None:
        keys = self.span(span)
        assert self.native.erase(b"".join(keys)) == self.reference.erase(keys)

    @rule(n=st.sampled_from([0, 10, 1000, 5000]))
    def reserve(self, n: int) -> None:
        before = self.native.memory_bytes()
        self.native.reserve(n)
        assert self.native.memory_bytes() >= before

    @rule(numbers=CHAINS)
    def ask(self, numbers: list[int]) -> None:
        keys = self.chain(numbers)
        assert self.native.longest_prefix(b"".join(keys)) == self.reference.longest_prefix(keys)
        self.compare(keys)

    @rule(span=SPANS)
    def ask_span(self, span: tuple[int, int]) -> None:
        keys = self.span(span)
        assert self.native.longest_prefix(b"".join(keys)) == self.reference.longest_prefix(keys)

    def compare(self, keys: list[bytes]) -> None:
        joined = b"".join(keys)
        assert self.native.contains(joined) == self.reference.contains(keys)
        assert self.native.get(joined, MISSING).tolist() == self.reference.get(keys, MISSING)

    @invariant()
    def sound(self) -> None:
        if not hasattr(self, "native"):
            return
        self.native.check()
        self.reference.check()
        assert len(self.native) == len(self.reference)
        self.compare(self.probe)

    def teardown(self) -> None:
        if hasattr(self, "native"):
            self.compare(self.keys)


KeyIndexMachine.TestCase.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
TestKeyIndexMachine = KeyIndexMachine.TestCase


def test_refuses_what_is_no_list_of_keys() -> None:
    index = KeyIndex()
    one = np.zeros(1, dtype=np.uint64)
    for call in (index.contains, index.erase, index.longest_prefix):
        with pytest.raises(ValueError, match="multiple of 16"):
            call(bytes(17))
    for values in (np.zeros(2, dtype=np.uint64), one.reshape(1, 1)):
        with pytest.raises(ValueError, match="one number per key"):
            index.insert(bytes(16), values)
    assert index.longest_prefix(b"") == 0 and len(index) == 0


def test_at_most_100_bytes_per_key() -> None:
    grown, reserved, count = KeyIndex(), KeyIndex(), 250_000
    reserved.reserve(count)
    before = reserved.memory_bytes()
    keys, values = np.random.default_rng(1).bytes(16 * count), np.zeros(count, dtype=np.uint64)
    assert grown.insert(keys, values) == reserved.insert(keys, values) == count
    assert grown.memory_bytes() < 100 * count
    assert reserved.memory_bytes() == before < 90 * count


def test_threads_share_one() -> None:
    index, per = KeyIndex(), 4000
    parts = [b"".join(key_of(t * per + i, False) for i in range(per)) for t in range(3)]

    def churn(part: bytes) -> None:
        for _ in range(5):
            assert index.insert(part, np.arange(per, dtype=np.uint64)) == per
            assert index.longest_prefix(part) == per
            assert index.erase(part[: 8 * per]) == per // 2
            assert index.longest_prefix(part) == 0
            assert index.erase(part) == per // 2

    threads = [threading.Thread(target=churn, args=(part,)) for part in parts]
    failed: list[BaseException | None] = []
    hook, threading.excepthook = threading.excepthook, lambda a: failed.append(a.exc_value)
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
    finally:
        threading.excepthook = hook
    assert failed == [] and len(index) == 0
    index.check()
