"""Requests, block pool and KV groups of the step harness: what vLLM's KVCacheManager does, in small.

Written from the behaviour of vLLM 0.32, not from its code. Tokens are ints; token ``p`` of a request
has a digest that depends on the whole prefix (and salt), which is what the KV bytes are made of.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

import numpy as np
import numpy.typing as npt

NULL_BLOCK = 0
VOCAB = 1 << 20


class Status(Enum):
    WAITING = "waiting"
    REMOTE = "waiting for remote KVs"
    RUNNING = "running"
    PREEMPTED = "preempted"
    FINISHED = "finished"


@dataclass(frozen=True)
class GroupSpec:
    """One KV group. ``window``: vLLM's sliding_window in tokens, 0 for full attention."""

    block_tokens: int = 4
    blocks_per_chunk: int = 2
    window: int = 0

    def skipped_tokens(self, computed: int) -> int:
        """Leading tokens that no later token attends to."""
        return max(0, computed - self.window + 1) if self.window else 0


def next_digest(digest: bytes, token: int) -> bytes:
    return hashlib.sha256(digest + token.to_bytes(4, "little")).digest()


def sampled_token(digest: bytes) -> int:
    """The model: greedy, and a pure function of everything before."""
    return int.from_bytes(digest[:4], "little") % VOCAB


class TokenChain:
    """Tokens with their digests and the block hashes on a grid of ``hash_tokens``."""

    def __init__(self, tokens: Sequence[int], salt: bytes, hash_tokens: int) -> None:
        self._root = hashlib.sha256(b"root" + salt).digest()
        self._hash_tokens = hash_tokens
        self.tokens: list[int] = []
        self.digests: list[bytes] = []
        self.block_hashes: list[bytes] = []
        for token in tokens:
            self.append(token)

    def last(self) -> bytes:
        return self.digests[-1] if self.digests else self._root

    def append(self, token: int) -> None:
        self.tokens.append(token)
        self.digests.append(next_digest(self.last(), token))
        if len(self.tokens) % self._hash_tokens == 0:
            self.block_hashes.append(hashlib.sha256(b"block" + self.digests[-1]).digest())

    def array(self) -> npt.NDArray[np.uint8]:
        """Digests as (tokens, 32) bytes."""
        return np.frombuffer(b"".join(self.digests), np.uint8).reshape(-1, 32)


@dataclass(eq=False)
class MiniRequest:
    """The attributes of vLLM's Request that connectors and the mini scheduler use."""

    request_id: str
    chain: TokenChain
    num_prompt_tokens: int
    max_tokens: int
    skip_reading_prefix_cache: bool = False
    resumable: bool = False
    cache_salt: str | None = None
    kv_transfer_params: dict[str, Any] | None = None
    kv_hints: Any = None
    session_id: str | None = None
    lora_request: Any = None
    status: Status = Status.WAITING
    num_computed_tokens: int = 0
    num_in_flight_tokens: int = 0
    num_stale_output_tokens: int = 0
    drop_stale_output: bool = False
    num_output_placeholders: int = 0
    num_spec_tokens: int = 0
    num_preemptions: int = 0
    last_sched_seq: int = 0
    loads: int = 0  # attempts vLLM parked it for
    deferred_external: int = field(default=0)  # 0.33: update_state_after_alloc still owed
    kv_transfer_params: dict[str, Any] | None = None

    @property
    def block_hashes(self) -> list[bytes]:
        return self.chain.block_hashes

    @property
    def prompt_token_ids(self) -> list[int]:
        return self.chain.tokens[: self.num_prompt_tokens]

    @property
    def num_tokens(self) -> int:
        return len(self.chain.tokens)

    @property
    def num_output_tokens(self) -> int:
        return self.num_tokens - self.num_prompt_tokens

    def is_finished(self) -> bool:
        return self.status is Status.FINISHED


class BlockPool:
    """Blocks with reference counts; free blocks are reused oldest first and keep their hash until then."""

    def __init__(self, num_blocks: int) -> None:
        self.num_blocks = num_blocks
        self.refs = [0] * num_blocks
        self.refs[NULL_BLOCK] = 1
        self._free: OrderedDict[int, None] = OrderedDict((b, None) for b in range(1, num_blocks))
        self.hash_of: dict[int, tuple[int, bytes]] = {}
        self._cached: dict[tuple[int, bytes], dict[int, None]] = {}

    @property
    def free_blocks(self) -> int:
        return len(self._free)

    def is_free(self, block: int) -> bool:
        return block in self._free

    def take(self, n: int) -> list[int]:
        assert n <= len(self._free), "allocating more blocks than are free"
        out = []
        for _ in range(n):
            block, _ = self._free.popitem(last=False)
            self._forget(block)
            self.refs[block] = 1
            out.append(block)
        return out

    def touch(self, blocks: Sequence[int]) -> None:
        for block in blocks:
            if block != NULL_BLOCK:
                self._free.pop(block, None)
                self.refs[block] += 1

    def release(self, blocks: Sequence[int]) -> None:
        for block in blocks:
            if block == NULL_BLOCK:
                continue
            assert self.refs[block] > 0, f"block {block} freed twice"
            self.refs[block] -= 1
            if not self.refs[block]:
                self._free[block] = None

    def cache(self, block: int, group: int, block_hash: bytes) -> None:
        if block == NULL_BLOCK or block in self.hash_of:
            return
        self.hash_of[block] = (group, block_hash)
        self._cached.setdefault((group, block_hash), {})[block] = None

    def cached(self, group: int, block_hash: bytes) -> int | None:
        blocks = self._cached.get((group, block_hash))
        return next(iter(blocks)) if blocks else None

    def _forget(self, block: int) -> None:
        mark = self.hash_of.pop(block, None)
        if mark is not None:
            blocks = self._cached[mark]
            del blocks[block]
            if not blocks:
                del self._cached[mark]

    def reset(self) -> bool:
        if len(self._free) != self.num_blocks - 1:
            return False
        self.hash_of.clear()
        self._cached.clear()
        return True

    def check(self) -> None:
        for block in range(1, self.num_blocks):
            assert (self.refs[block] == 0) == (block in self._free), f"block {block} lost"
        assert self.refs[NULL_BLOCK] == 1


@dataclass(frozen=True)
class LocalHit:
    """Prefix-cache hit in HBM: ``tokens`` and the blocks of each group."""

    tokens: int
    blocks: tuple[list[int], ...]


class KVGroups:
    """Block tables of all groups and the prefix cache over them."""

    def __init__(self, specs: Sequence[GroupSpec], pool: BlockPool, caching: bool) -> None:
        self.specs = tuple(specs)
        self.pool = pool
        self.caching = caching
        self.tables: tuple[dict[str, list[int]], ...] = tuple({} for _ in specs)
        self._n_cached: tuple[dict[str, int], ...] = tuple({} for _ in specs)
        bt = specs[0].block_tokens
        assert all(s.block_tokens == bt for s in specs), "one block size for all groups"
        self.block_tokens = bt

    # -- lookup

    def no_hit(self) -> LocalHit:
        return LocalHit(0, tuple([] for _ in self.specs))

    def local_hit(self, request: MiniRequest) -> LocalHit:
        """Longest prefix that all groups hold, at most all but one token."""
        if not self.caching or request.skip_reading_prefix_cache:
            return self.no_hit()
        limit = (request.num_tokens - 1) // self.block_tokens
        while limit > 0:
            hits = [self._group_hit(g, request.block_hashes, limit) for g in range(len(self.specs))]
            shortest = min(len(h) for h in hits)
            if all(len(h) == limit for h in hits):
                return LocalHit(limit * self.block_tokens, tuple(hits))
            limit = min(shortest, limit - 1) if shortest == limit else shortest
        return self.no_hit()

    def _group_hit(self, group: int, hashes: Sequence[bytes], limit: int) -> list[int]:
        spec = self.specs[group]
        if not spec.window:
            out: list[int] = []
            for i in range(min(limit, len(hashes))):
                block = self.pool.cached(group, hashes[i])
                if block is None:
                    break
                out.append(block)
            return out
        need = -(-(spec.window - 1) // spec.block_tokens)
        found: list[int] = []
        for i in range(min(limit, len(hashes)) - 1, -1, -1):
            block = self.pool.cached(group, hashes[i])
            if block is None:
                found = []
                continue
            found.insert(0, block)
            if len(found) >= need:
                return [NULL_BLOCK] * i + found
        return found

    # -- allocation

    def need(self, request: MiniRequest, tokens: int, hit: LocalHit, total_computed: int) -> int:
        """Free blocks that an allocation would take, cache hits taken out of the free list included."""
        total = 0
        for g, spec in enumerate(self.specs):
            want = -(-tokens // spec.block_tokens)
            table = self.tables[g].get(request.request_id)
            if table is not None:
                total += max(0, want - len(table))
                continue
            skipped = spec.skipped_tokens(total_computed) // spec.block_tokens
            blocks = hit.blocks[g]
            total += max(0, want - max(skipped, len(blocks)))
            total += sum(b != NULL_BLOCK and self.pool.is_free(b) for b in blocks[skipped:])
        return total

    def allocate(
        self,
        request: MiniRequest,
        new_tokens: int,
        hit: LocalHit,
        external: int,
        *,
        lookahead: int = 0,
        delay_cache: bool = False,
        reserved: int = 0,
    ) -> tuple[list[int], ...] | None:
        """New blocks per group, or None when they do not fit."""
        total = request.num_computed_tokens + hit.tokens + external
        need_slot = total + new_tokens + lookahead
        self.remove_skipped(request, max(0, total - request.num_in_flight_tokens))
        if self.need(request, need_slot, hit, total) > self.pool.free_blocks - reserved:
            return None
        rid = request.request_id
        for g, spec in enumerate(self.specs):
            if rid not in self.tables[g]:
                skipped = spec.skipped_tokens(total) // spec.block_tokens
                kept = hit.blocks[g][skipped:]
                self.pool.touch(kept)
                self.tables[g][rid] = [NULL_BLOCK] * skipped + kept
                self._n_cached[g][rid] = len(self.tables[g][rid])
        out = []
        for g, spec in enumerate(self.specs):
            table = self.tables[g][rid]
            fresh = self.pool.take(max(0, -(-need_slot // spec.block_tokens) - len(table)))
            table += fresh
            out.append(fresh)
        if not delay_cache:
            self.cache(request, min(total + new_tokens, request.num_tokens))
        return tuple(out)

    def cache(self, request: MiniRequest, tokens: int) -> None:
        """Register the full blocks of the first ``tokens`` tokens in the prefix cache."""
        if not self.caching:
            return
        for g, spec in enumerate(self.specs):
            table = self.tables[g][request.request_id]
            full = min(tokens // spec.block_tokens, len(request.block_hashes))
            for i in range(self._n_cached[g][request.request_id], full):
                self.pool.cache(table[i], g, request.block_hashes[i])
            self._n_cached[g][request.request_id] = max(full, self._n_cached[g][request.request_id])

    def remove_skipped(self, request: MiniRequest, processed: int) -> None:
        """Free blocks that left the window of every token still to come."""
        for g, spec in enumerate(self.specs):
            table = self.tables[g].get(request.request_id, [])
            n = min(spec.skipped_tokens(processed) // spec.block_tokens, len(table))
            gone = [i for i in range(n) if table[i] != NULL_BLOCK]
            self.pool.release([table[i] for i in reversed(gone)])
            for i in gone:
                table[i] = NULL_BLOCK

    def block_ids(self, request_id: str) -> tuple[list[int], ...]:
        return tuple(list(t.get(request_id, ())) for t in self.tables)

    def pop(self, request: MiniRequest) -> list[int]:
        """Take the request's tables away; blocks in the order in which to free them (tail first)."""
        out: list[int] = []
        for g in range(len(self.specs)):
            out += reversed(self.tables[g].pop(request.request_id, []))
            self._n_cached[g].pop(request.request_id, None)
        return [b for b in out if b != NULL_BLOCK]

    def free(self, request: MiniRequest) -> None:
        self.pool.release(self.pop(request))

    def check(self) -> None:
        """Reference counts equal the tables' references, blocks waiting for a deferred free aside."""
        self.pool.check()
