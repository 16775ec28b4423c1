"""The vocabulary: keys, groups, chains and outcomes. A leaf module: imports nothing of ours.

block: vLLM's KV block. page: one block of one layer on one rank. chunk: ``blocks_per_chunk``
consecutive hashed blocks of one KV group counted from the root of the prompt, all layers, the
ranks' shards one after another. slot: a chunk-sized piece of the arena. lease: a pin with an owner
and an end.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum, IntEnum
from typing import NamedTuple, NewType

ChunkKey = NewType("ChunkKey", bytes)
"""16 bytes: hash(namespace, adapter digest, tokens per chunk, KV group, vLLM's chained hash of the
chunk's last hash-block). No rank in it."""

LEAF_BYTES = 16384
"""Checksum leaf; shards are padded to a multiple of it so that no leaf spans two ranks."""


class SlotState(IntEnum):
    """State word of a slot in the shared slot table (csrc/arena)."""

    FREE = 0
    FILLING = 1
    READY = 2
    FAILED = 3


class Tier(str, Enum):
    """Where a chunk's bytes come from."""

    DRAM = "dram"
    NVME = "nvme"
    REMOTE = "remote"

    __hash__ = str.__hash__  # Enum's is Python code, and tiers key the dicts of every lookup


class StoreResult(IntEnum):
    """Outcome of one key of a chunk-store job."""

    OK = 0
    MISS = 1
    CORRUPT = 2
    IO_ERROR = 3
    NO_SPACE = 4
    DROPPED = 5


class LoadFailure(str, Enum):
    """Why a load attempt failed; the ``reason`` label of the failure counters."""

    SLOT_LOST = "slot_lost"
    CORRUPT = "corrupt"
    DEADLINE = "deadline"
    CANCELLED = "cancelled"
    INJECTED = "injected"
    EXCEPTION = "exception"
    WORKER_LOST = "worker_lost"


class GroupKind(str, Enum):
    """What part of a prompt a KV group needs in order to continue at a boundary."""

    FULL = "full"  # every block from the root
    SLIDING = "sliding"  # only the blocks that overlap the last ``window`` tokens
    NONE = "none"  # cannot be served (Mamba, ...): the engine gets 0 hits


@dataclass(frozen=True, slots=True)
class GroupLayout:
    """One KV group, seen by planner and tiers. All sizes in bytes, all spans in tokens."""

    group: int
    kind: GroupKind
    block_tokens: int
    blocks_per_chunk: int
    block_bytes: int  # one block, all layers, one rank
    shards: int  # ranks whose bytes the chunk holds (1 for replicated KV such as MLA)
    window: int = 0  # SLIDING: tokens before the boundary that must be present

    @property
    def chunk_tokens(self) -> int:
        """Tokens per chunk."""
        return self.block_tokens * self.blocks_per_chunk

    @property
    def shard_bytes(self) -> int:
        """Bytes of one rank's shard in a slot, padded to LEAF_BYTES."""
        raw = self.block_bytes * self.blocks_per_chunk
        return -(-raw // LEAF_BYTES) * LEAF_BYTES

    @property
    def slot_bytes(self) -> int:
        """Bytes of a slot: all shards."""
        return self.shard_bytes * self.shards


@dataclass(frozen=True, slots=True)
class CacheLayout:
    """All groups of an engine plus the token grid on which hits may end."""

    groups: tuple[GroupLayout, ...]
    hash_tokens: int  # tokens per entry of vLLM's request.block_hashes
    align_tokens: int  # a hit boundary is a multiple of this (lcm of the groups' blocks)
    world_size: int  # ranks that must attach and report


class SlotRef(NamedTuple):
    """A slot at one moment of its life. Stale once the table's generation differs."""

    slot: int
    generation: int
    offset: int  # bytes from the start of the arena's data area


class MissCause(str, Enum):
    """Why a request computed tokens that a tier might have held; docs/why.md has a line on each."""

    NEVER_STORED = "never_stored"
    EVICTED = "evicted"
    RATE_LIMITED = "rate_limited"  # evicted before the write budget let it go to NVMe
    NVME_DROPPED = "nvme_dropped"  # was on NVMe, whose space was needed
    STORE_SKIPPED = "store_skipped"  # no slot, or its store failed
    STORING = "storing"  # another request's store of it was still under way
    RESET = "reset"
    NAMESPACE = "namespace"
    SALT = "salt"
    ADAPTER = "adapter"
    BELOW_FLOOR = "below_floor"  # less than a chunk
    REFUSED = "refused"
    NO_ROOM = "no_room"  # held, but no slots to bring it up
    TIMED_OUT = "timed_out"
    LOAD_FAILED = "load_failed"
    TIER_OFF = "tier_off"
    NOT_READY = "not_ready"
    NOT_ASKED = "not_asked"


class Decision(str, Enum):
    """What becomes of a request's hit."""

    MISS = "miss"  # nothing is held beyond what HBM has
    WHOLE = "whole"  # worth loading, all of it
    PARTIAL = "partial"  # its head is worth loading, its tail is recomputed
    REFUSED = "refused"  # costs more than it saves
    UNKNOWN = "unknown_rate"  # loaded to learn: no prefill rate yet
    EXPLORE = "explore"  # refused, and loaded all the same to unlearn a bad estimate
    FOLLOW = "follow"  # waits for another request's load of the same prefix, then hits HBM
    FORCED = "forced"  # load=always or load=never
