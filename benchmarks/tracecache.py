"""A cache of one tier that replays a request trace through one eviction policy. No bytes move.

Counted as published simulations of prefix caches do: the capacity is a share of the trace's unique
blocks; a request hits its leading run of resident blocks, at most ``input_length - 1`` tokens;
afterwards all its blocks are resident, or as many from the root as fit. Only blocks without a
resident child are offered to the policy, which is what the index does.
"""

from __future__ import annotations

import hashlib
import json
import lzma
import random
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from common import Skip

Request = tuple[int, list[bytes]]  # input tokens, keys of its full blocks, root first
DEEP = 30_600  # a token at this depth costs twice as much to compute as the first one


def seconds(start: int, end: int) -> float:
    """What computing tokens [start, end) of a prompt takes; the first token takes 1."""
    return (end - start) * (1 + (start + end) / (2 * DEEP))


@dataclass(frozen=True)
class Trace:
    """Requests in order of arrival; ``block`` tokens per key."""

    name: str
    block: int
    requests: list[Request]
    unique: int


def _key(number: int) -> bytes:
    return hashlib.sha256(b"%d" % number).digest()[:16]


def _trace(name: str, block: int, rows: Sequence[tuple[int, list[int]]]) -> Trace:
    keys = {n: _key(n) for n in {n for _, ids in rows for n in ids}}
    return Trace(name, block, [(t, [keys[n] for n in ids]) for t, ids in rows], len(keys))


def load(path: Path) -> Trace:
    """A .jsonl or .jsonl.xz whose first line is ``{"meta": true, "block_size": N, ...}``.

    Raises Skip where the file is not there.
    """
    if not path.is_file():
        raise Skip(f"no file {path.name}")
    opener = lzma.open if path.suffix == ".xz" else open
    with opener(path, "rt") as lines:
        meta = json.loads(next(iter(lines)))
        rows = [(r["input_length"], r["hash_ids"]) for r in map(json.loads, lines)]
    return _trace(meta["name"], meta["block_size"], rows)


def chat(seed: int, sessions: int) -> Trace:
    """A made-up trace: chats under one system prompt, most of one turn, some of many."""
    rng = random.Random(seed)
    fresh = iter(range(1000, 1 << 40))
    rows: list[tuple[float, list[int]]] = []
    for _ in range(sessions):
        at, ids = rng.uniform(0, sessions), [0, 1]
        for _ in range(rng.choice((1, 1, 1, 2, 6))):
            ids = ids + [next(fresh) for _ in range(rng.randint(1, 12))]
            rows.append((at, ids))
            at += rng.expovariate(1 / 20)
    rows.sort()
    return _trace("made up", 16, [(16 * len(ids) + 5, ids) for _, ids in rows])


def last_use(trace: Trace, accuracy: float, seed: int) -> Iterator[list[bool]]:
    """Per request, per block: whether it is not used again, right with this probability."""
    last = {k: i for i, (_, keys) in enumerate(trace.requests) for k in keys}
    rng = random.Random(seed)
    for i, (_, keys) in enumerate(trace.requests):
        yield [(last[k] == i) != (rng.random() >= accuracy) for k in keys]


@dataclass
class Result:
    """Hits over the whole trace, from a cold start."""

    token_hit: float
    cost_hit: float  # share of the prefill work saved, where deep tokens cost more
    ns_per_block: float  # CPU time of cache and policy per block of a request


class Cache:
    """Blocks in one tier of ``room``; the policy is one of kvoffload.core.policy."""

    def __init__(self, policy, room: int, block: int) -> None:
        self._policy = policy
        self._room = room
        self._block = block  # tokens
        self._children: dict[bytes, int] = {}  # resident blocks
        self._parent: dict[bytes, bytes] = {}

    def run(self, keys: Sequence[bytes]) -> int:
        """One request. Returns the length of the leading run that was resident."""
        resident, policy = self._children, self._policy
        run = 0
        while run < len(keys) and keys[run] in resident:
            run += 1
        keys = keys[: self._room]
        if run:
            policy.touch(keys[:run])
        at = keys[run - 1] if run else None
        if at is not None and run < len(keys) and not resident[at]:
            policy.withhold(at)  # in use, and about to be a parent
        for depth, key in enumerate(keys[run:], run):
            if len(resident) >= self._room:
                self._evict(at)
            if policy.weighs:
                start = depth * self._block
                policy.insert(key, at, seconds(start, start + self._block))
            else:
                policy.insert(key, at)
            resident[key] = 0
            if at is not None:
                self._parent[key] = at
                resident[at] += 1
            at = key
        if run < len(keys):
            policy.offer(at)
        return run

    def _evict(self, used: bytes | None) -> None:
        victim = self._policy.victim()
        assert self._children[victim] == 0, "an orphan"
        self._policy.remove(victim)
        del self._children[victim]
        parent = self._parent.pop(victim, None)
        if parent is not None:
            self._children[parent] -= 1
            if not self._children[parent] and parent != used:
                self._policy.offer(parent)


def replay(trace: Trace, policy, share: float, hints: Iterator[list[bool]] | None = None) -> Result:
    """The whole trace through a cache of ``share`` of its unique blocks."""
    from kvoffload.core.retire import first_retired

    cache = Cache(policy, max(1, int(share * trace.unique)), trace.block)
    hit = total = blocks = 0
    saved = work = 0.0
    start = time.thread_time_ns()
    for tokens, keys in trace.requests:
        got = min(cache.run(keys) * trace.block, tokens - 1)
        hit += got
        total += tokens
        blocks += len(keys)
        saved += seconds(0, got)
        work += seconds(0, tokens)
        if hints is not None:
            policy.retire(keys[first_retired(next(hints)) :])
    took = time.thread_time_ns() - start
    return Result(round(hit / total, 4), round(saved / work, 4), round(took / max(1, blocks), 1))
