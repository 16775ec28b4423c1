"""Orders as they cross to the workers."""

from __future__ import annotations

import pickle

import numpy as np
import pytest

from kvoffload.engines.vllm.meta import ChunkCopies


@pytest.mark.parametrize(("chunks", "blocks"), [(3, 2), (1, 1), (0, 0)])
def test_copies_survive_pickling(chunks: int, blocks: int) -> None:
    ids = np.arange(chunks * blocks, dtype=np.int32).reshape(chunks, blocks) - 1
    before = ChunkCopies(
        group=2,
        slots=np.arange(chunks, dtype=np.uint32) + 2**31,
        generations=np.arange(chunks, dtype=np.uint64) + 2**63,
        offsets=np.arange(chunks, dtype=np.uint64) << np.uint64(40),
        keys=bytes(range(16)) * chunks,
        block_ids=ids,
    )
    after = pickle.loads(pickle.dumps(before, pickle.HIGHEST_PROTOCOL))
    assert (after.group, after.keys, len(after)) == (2, before.keys, chunks)
    for name in ("slots", "generations", "offsets", "block_ids"):
        was, now = getattr(before, name), getattr(after, name)
        assert was.dtype == now.dtype and (was == now).all()
        assert now.flags.c_contiguous
