"""Native core: shared arena and slot table, checksums, CPU block copies, NVMe segment store.

Thread rules: every method may be called from any Python thread. Methods that can block
(``wait*``, ``flush``, ``close``, ``SegmentStore.__init__``, ``verify``) release the GIL. All other
methods are O(items passed) and never do I/O. Work submitted as a *job* runs on native threads that
never take the GIL; its outcome is collected with ``poll()``.

Byte rules: a *key* is 16 bytes; several keys are passed as one ``bytes`` of 16*n. The checksum
*seed* of a key is ``u64le(key[0:8]) ^ u64le(key[8:16])``. A payload's checksum is two-level XXH3-64:
the payload is cut into leaves of ``LEAF_BYTES`` (the last may be shorter),
``leaf[i] = XXH3_64(leaf bytes, seed)`` and ``root = XXH3_64(concatenated little-endian leaf hashes, seed)``.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple, overload

import numpy as np
import numpy.typing as npt

LEAF_BYTES: int  # 16384

# Slot states (also tiers of kvoffload.types.SlotState).
FREE: int  # 0
FILLING: int  # 1
READY: int  # 2
FAILED: int  # 3

def checksum(data: bytes | bytearray | memoryview | npt.NDArray[np.uint8], key: bytes) -> int:
    """Two-level XXH3-64 root of ``data`` seeded with ``key`` (16 bytes)."""

def leaf_checksums(
    data: bytes | bytearray | memoryview | npt.NDArray[np.uint8], key: bytes
) -> npt.NDArray[np.uint64]: ...
def cpu_features() -> list[str]:
    """What the running CPU offers of what the core can use, e.g. ["avx512f", "avx2"]."""

def _set_isa(name: str) -> None:
    """Test hook: "base", "avx2" or "avx512" from now on. Raises ValueError where the CPU lacks it."""

def _isa() -> str:
    """The instruction set in use."""

class Arena:
    """One memfd: [4 KiB header | slot table | leaf hashes | data, 2 MiB aligned].

    The creator is the Manager's process; workers attach by ``path`` (``/proc/<pid>/fd/<n>``) and
    ``inode``. Nothing is visible in /dev/shm and the kernel frees it when the last process that maps
    it is gone, SIGKILL included. Offsets are bytes from the start of the data area.
    """

    path: str
    inode: int
    data_bytes: int
    max_slots: int
    n_ranks: int
    hugepages: bool
    """The data is on huge pages: the creator got the first, or the system gives them (shmem_enabled)."""
    data_ptr: int  # address of the data area in this process

    @staticmethod
    def create(data_bytes: int, max_slots: int, n_ranks: int, hugepages: bool = True) -> Arena:
        """Raises OSError (ENOMEM, ...). ``data_bytes`` is rounded down to 2 MiB."""
    @staticmethod
    def attach(path: str, inode: int) -> Arena:
        """Raises OSError when the path cannot be opened, the inode differs, or the header is not ours."""
    def prefault_start(self, threads: int = 1) -> None:
        """Touch all data pages from background native threads, as huge pages if ``hugepages``.

        Where the system gives none by itself each is asked for (MADV_COLLAPSE); what cannot be had
        in one piece is touched in small pages. What the pages hold stays, also under writers. From
        the first ``begin_fill`` on a thread takes a hundredth of a core at most."""
    def prefaulted_bytes(self) -> int: ...
    def view(self, offset: int, nbytes: int) -> memoryview:
        """Writable view of data bytes (for tests, tools). Raises ValueError out of range."""
    def leaf_hashes(self, offset: int, nbytes: int) -> npt.NDArray[np.uint64]:
        """Copy of the leaf hashes that cover [offset, offset+nbytes); offset is a multiple of LEAF_BYTES."""
    def set_leaf_hashes(self, offset: int, hashes: npt.NDArray[np.uint64]) -> None:
        """Write leaf hashes that a device computed. Offset is a multiple of LEAF_BYTES. Raises
        ValueError outside of the data area. The caller owns the bytes they cover."""
    def hash_leaves(self, offset: int, nbytes: int, key: bytes) -> None:
        """Hash data bytes into the leaf table. Offset is a multiple of LEAF_BYTES. Releases the GIL."""
    def verify_leaves(self, offset: int, nbytes: int, key: bytes) -> bool:
        """Whether data bytes match the leaf table. Releases the GIL."""
    # -- ranks and the weights epoch
    def set_attached(self, rank: int) -> None: ...
    def attached_mask(self) -> int: ...
    def epoch(self) -> int:
        """Shared counter that workers bump when weights change in place; starts at 0."""
    def bump_epoch(self) -> int: ...
    # -- slot table. All operations are atomic on shared memory; wake-ups by futex across processes.
    def begin_fill(self, slot: int, need_mask: int) -> int:
        """Any state -> FILLING, generation += 1, done mask cleared. Returns the new generation (never 0)."""
    def rank_done(self, slot: int, generation: int, rank: int) -> bool:
        """Set the rank's bit; when all of need_mask are set -> READY and wake waiters. False if stale or not FILLING."""
    def fill_done(self, slot: int, generation: int) -> bool:
        """All bits at once (the filler was a tier, not ranks)."""
    def fail(self, slot: int, generation: int) -> bool:
        """FILLING or READY of that generation -> FAILED, wake waiters. False if stale."""
    def set_free(self, slot: int) -> None: ...
    def state(self, slot: int) -> int: ...
    def generation(self, slot: int) -> int: ...
    def done_mask(self, slot: int) -> int: ...
    def states(
        self, slots: npt.NDArray[np.uint32], generations: npt.NDArray[np.uint64]
    ) -> npt.NDArray[np.uint8]:
        """State per slot; FREE where the generation differs."""
    def wait_ready(self, slot: int, generation: int, timeout_ms: int) -> int:
        """Block until the slot leaves FILLING (or its generation changes: FREE). Returns the state; FILLING on timeout."""
    def check(self) -> None:
        """Raise AssertionError naming the first broken invariant."""
    def close(self) -> None: ...

class CopyDone(NamedTuple):
    job: int
    kind: int  # 0 store, 1 load
    status: int  # 0 ok, 1 failed, 2 cancelled, 3 deadline
    failed_item: int  # -1, or the lowest item that did not complete; all items below it did
    reason: int  # 0 none, 1 slot FAILED or reused, 2 checksum mismatch, 3 deadline, 4 cancelled, 5 injected
    nbytes: int
    wait_ns: int  # longest time an item waited for READY
    copy_ns: int  # wall time from first copy to last

class CpuCopyPool:
    """Copies between arena slots and paged KV blocks in this process's memory, on native threads.

    A *group* is the list of fragments that make up one block: ``(base, stride, nbytes)`` means block
    ``b`` has ``nbytes`` at address ``base + b * stride``. In a slot, a rank's shard holds block 0 of
    the chunk (its fragments in list order), then block 1, ...; the rest up to ``shard_bytes`` (a
    multiple of LEAF_BYTES) is zero. Loads are served before stores.
    """

    def __init__(
        self,
        arena: Arena,
        rank: int,
        threads: int = 2,
        nt_stores: bool = True,
        nice: int = 0,
        cores: Sequence[Sequence[int]] = (),
    ) -> None:
        """Thread ``i`` runs on ``cores[i % len(cores)]``, without any on the caller's cores; ``nice``
        is the threads' nice value."""
    def add_group(
        self, fragments: Sequence[tuple[int, int, int]], num_blocks: int, shard_bytes: int
    ) -> int:
        """Returns the group's number. Raises ValueError on fragments that overlap or do not fit."""
    def submit_store(
        self,
        job: int,
        group: int,
        slots: npt.NDArray[np.uint32],
        generations: npt.NDArray[np.uint64],
        offsets: npt.NDArray[np.uint64],
        keys: bytes,
        block_ids: npt.NDArray[np.int32],
    ) -> None:
        """One item per slot: gather ``block_ids[i]`` (2-D, items x blocks per chunk, all >= 0) into the
        data bytes [offsets[i], offsets[i]+shard_bytes), write the leaf hashes (seeded with the item's
        key), then ``rank_done(slot, generation, rank)``. A failed item calls ``fail``."""
    def submit_load(
        self,
        job: int,
        group: int,
        slots: npt.NDArray[np.uint32],
        generations: npt.NDArray[np.uint64],
        offsets: npt.NDArray[np.uint64],
        keys: bytes,
        block_ids: npt.NDArray[np.int32],
        deadline_ms: int,
        verify: bool = True,
    ) -> None:
        """One item per slot: wait until READY with that generation (at most ``deadline_ms`` from now),
        verify the leaves that cover the wanted blocks, scatter blocks with id >= 0 (-1: leave alone),
        re-check the generation. Bytes of a leaf that fails verification are never written to a block.
        A failed item drops the items after it that have not started; those before it go on. Status and
        reason are those of ``failed_item``. The job is done when nothing of it runs."""
    def cancel(self, job: int) -> None:
        """Drop items not yet started; running ones finish. The job is then reported as cancelled (or ok)."""
    def poll(self) -> list[CopyDone]:
        """Each finished job exactly once."""
    def wait(self, job: int, timeout_ms: int) -> bool:
        """True when the job is done (its CopyDone is still returned by poll). False on timeout; True if unknown."""
    def pending(self) -> int: ...
    def inject(self, fail_every: int) -> None:
        """Test hook: every n-th load item fails with reason 5; 0 turns it off."""
    def check(self) -> None: ...
    def close(self) -> None: ...

class KeyIndex:
    """The chunk store's index of keys, by itself: a number per key. Every call takes its lock once and
    releases the GIL. At most 2**32 - 2 keys; erased room is used again and never given back.
    Raises ValueError when ``keys`` is not a multiple of 16 bytes long."""

    @overload
    def __init__(self) -> None: ...
    @overload
    def __init__(self, seed0: int, seed1: int) -> None:
        """Test hook: with known seeds, keys can be made to collide. Else they are random."""
    def insert(self, keys: bytes, values: npt.NDArray[np.uint64]) -> int:
        """Set the value of each key (1-D, one per key); returns how many keys are new."""
    def erase(self, keys: bytes) -> int:
        """Returns how many were there."""
    def contains(self, keys: bytes) -> bytes:
        """One byte per key, 1 if there."""
    def get(self, keys: bytes, missing: int) -> npt.NDArray[np.uint64]:
        """The value of each key, ``missing`` where it is not there."""
    def longest_prefix(self, keys: bytes) -> int:
        """How many keys from the first on are there; looks no further than 32 behind the first miss."""
    def reserve(self, n: int) -> None:
        """Make room for ``n`` keys in all."""
    def memory_bytes(self) -> int:
        """Bytes of the tables and entries, in use or not."""
    def check(self) -> None:
        """Raise AssertionError naming the first broken invariant. O(keys)."""
    def __len__(self) -> int: ...

class StoreDone(NamedTuple):
    job: int
    kind: int  # 0 put, 1 get
    results: bytes  # one byte per key: see kvoffload.types.StoreResult (0 ok, 1 miss, 2 corrupt, 3 io error, 4 no space, 5 dropped)
    nbytes: int  # payload bytes that made it
    ns: int  # submit to done, wall

class SegmentStore:
    """Log-structured chunk store in one directory; format and protocol: docs/format.md."""

    path: str
    writer_dir: str  # ".../w<id>"
    io_engine: str  # "uring" or "threads"
    io_engine_note: str  # why "auto" took threads; else empty

    def __init__(
        self,
        path: str,
        max_bytes: int,
        segment_bytes: int = 0,
        threads: int = 4,
        queue_bytes: int = 268435456,
        direct: bool = True,
        read_only: bool = False,
        io_engine: str = "auto",
    ) -> None:
        """Open or create. ``max_bytes`` 0: as the store was created (at creation half of the free
        space), or what lies there where that is more. ``segment_bytes`` 0: 256 MiB, less where
        ``max_bytes`` is small.
        ``io_engine``: "uring", "threads", or "auto": io_uring where this process can have it.
        Raises OSError whose message is one clear line naming the path (wrong owner or mode, foreign or
        newer format, symlink, read-only file system, no space)."""
    # -- arena slots (the connector's path): no staging copy; the slot is the I/O buffer
    def put_slots(
        self,
        job: int,
        arena: Arena,
        keys: bytes,
        slots: npt.NDArray[np.uint32],
        generations: npt.NDArray[np.uint64],
        offsets: npt.NDArray[np.uint64],
        nbytes: int,
        namespace: int,
        depths: npt.NDArray[np.uint32],
        deadline_ms: int = 0,
    ) -> None:
        """Write READY slots (the caller keeps them leased until the job is done). The record's checksum is
        the root over the arena's leaf hashes. Dropped at once (result 5) when the queue is over queue_bytes."""
    def get_slots(
        self,
        job: int,
        arena: Arena,
        keys: bytes,
        slots: npt.NDArray[np.uint32],
        generations: npt.NDArray[np.uint64],
        offsets: npt.NDArray[np.uint64],
        nbytes: int,
        deadline_ms: int = 0,
    ) -> None:
        """Read into FILLING slots: read, verify, write leaf hashes, ``fill_done``; else ``fail``. A corrupt
        entry is dropped from the index and counted."""
    # -- plain buffers (kvoffload.open_store)
    def put(
        self,
        job: int,
        keys: bytes,
        buffers: Sequence[object],
        namespace: int = 0,
        deadline_ms: int = 0,
    ) -> None: ...
    def get(self, job: int, keys: bytes, buffers: Sequence[object], deadline_ms: int = 0) -> None:
        """Writable buffers of exactly the stored length, else result 1 for that key."""
    # -- common. ``deadline_ms`` (from the call; 0: none, at most a day): what no I/O thread has started by
    # then ends as dropped (5), without I/O, slots FAILED, at the latest with the next poll or wait.
    def cancel(self, job: int) -> int:
        """End what of the job has not started, in the same way; returns the number of its keys. What has
        started ends by itself, and the job with it. 0 when the job is done or unknown."""
    def abandon(self, job: int) -> bool:
        """End a job of plain buffers now, dropped (5) for what has no result, though its I/O goes on or
        hangs: its buffers are not touched any more. What was being written may still be stored. A job of
        slots ends as by ``cancel``. False for a job that is done or unknown."""
    def poll(self) -> list[StoreDone]: ...
    def wait(self, job: int, timeout_ms: int) -> bool: ...
    def wait_any(self, timeout_ms: int) -> bool:
        """Block until ``poll`` has something. False: not within the time, or no job is out."""
    def contains(self, keys: bytes) -> bytes:
        """One byte per key, 1 if held. No I/O."""
    def longest_prefix(self, keys: bytes) -> int:
        """How many keys from the first on are held; stops at the first that is not. No I/O."""
    def length(self, key: bytes) -> int:
        """Payload bytes held under the key, -1 if none."""
    def delete(self, keys: bytes) -> int: ...
    def retain(self, keys: bytes, seconds: float, level: int = 0, owner: int = 0) -> bytes:
        """Keep what of ``keys`` is held (in this writer's directory) from being recycled: ``seconds``
        from now at ``level`` 0 to 3, or pinned at level 4; 0 seconds end that. Kept as strongly as the
        strongest asks; ``owner`` (64 bits) says who, 0 nobody in particular. One byte per key: 1 where
        it was retained before, and for less. At most about half of the store is kept: beyond that the
        lowest level, then the earliest end, is given up and counted (``retained_cut``). In memory only;
        no I/O. Raises ValueError on a level or a time out of range."""
    def retained(self, keys: bytes, owner: int = 0) -> bytes:
        """One byte per key: 1 if pinned, or retained for others than ``owner`` (0: for anybody)."""
    def retain_none(self) -> None:
        """End all retention and all pins."""
    def queued_bytes(self) -> int: ...
    def flush(self, timeout_ms: int) -> bool:
        """All puts so far are written and journalled. False on timeout."""
    def stats(self) -> dict[str, int | float]:
        """entries, bytes_used, bytes_max, segments, puts, gets, hits, misses, corrupt, io_errors, no_space,
        dropped, accepted_bytes, bytes_written, bytes_read, recycled_segments, recovered_entries, recover_ms, queued_bytes;
        also payload_bytes, index_bytes (memory), segment_bytes, writers, journal_bytes, sealed_segments,
        clean_segments, segment_waits, zeroed_bytes, reinserted_chunks, reinserted_bytes, tidy_pending,
        retained_chunks, retained_bytes, retained_max, retained_cut
        (docs/format.md says what they are)"""
    def ls(self, limit: int = 0) -> list[tuple[bytes, int, int, int, int, int]]:
        """(key, namespace, depth, nbytes, segment, seq), newest first."""
    def verify(
        self, repair: bool = False, progress: Callable[[int, int, int], object] | None = None
    ) -> dict[str, int | float]:
        """Read every payload and check it: {checked, bad, bytes, seconds, dropped}.
        ``progress(done, total, bytes)`` is called now and then on the calling thread; what it raises
        ends the verification and is raised."""
    def _abandon(self) -> None:
        """Test hook: stop as a kill would; nothing is flushed, journalled or sealed."""
    def inject(self, what: str, every: int) -> None:
        """Test hook at the I/O seam: "read_eio", "write_eio", "enospc", "short_read", "slow_read_ms",
        "hang_read" (until turned off with 0), "flip_read" (a bit of every piece of every n-th read)."""
    def check(self) -> None: ...
    def close(self, timeout_ms: int = 5000) -> None:
        """Flush (bounded), seal, unlock. Idempotent."""
