"""One rank of the step harness: real KV memory, a forward that writes and checks it, the call order.

The bytes of token ``p`` in a page are its prefix digest, tiled, XOR a pattern of (rank, group, layer,
weights). The forward checks every byte it attends to before it trusts it, so that a wrong, stale,
swapped or foreign block is seen in the first step that reads it.
"""

from __future__ import annotations

import hashlib
import pickle
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from kvoffload.copy.base import Fragment
from kvoffload.core.layout import TensorSpec, block_runs
from kvoffload.engines.vllm.meta import StepOrders, WorkerReport
from tests.support.steps_blocks import (
    NULL_BLOCK,
    GroupSpec,
    next_digest,
    sampled_token,
)
from tests.support.steps_types import ConnectorOutput, StepOutput

Bytes = npt.NDArray[np.uint8]
GARBAGE = 0xEE


class WrongBytes(AssertionError):
    """A block does not hold what its prefix demands."""


@dataclass(frozen=True)
class Geometry:
    """KV memory of one rank. ``layout``: LBHNC (a page per layer) or BLHNC (block outermost)."""

    num_blocks: int
    layers: int = 2
    token_bytes: int = 64
    layout: str = "LBHNC"
    pad: int = 0  # unused bytes after each page: strided fragments that cannot be merged


def pattern(rank: int, group: int, layer: int, weights: int, nbytes: int) -> Bytes:
    seed = hashlib.sha256(f"{rank}/{group}/{layer}/{weights}".encode()).digest()
    return np.frombuffer((seed * (nbytes // len(seed) + 1))[:nbytes], np.uint8)


class KVMemory:
    """The KV cache of one rank; all groups lie over the same tensors, as in vLLM."""

    def __init__(self, geometry: Geometry, specs: Sequence[GroupSpec], rank: int) -> None:
        self.geometry, self.specs, self.rank = geometry, tuple(specs), rank
        self.block_tokens = specs[0].block_tokens
        page = self.block_tokens * geometry.token_bytes
        b, n = geometry.num_blocks, geometry.layers
        if geometry.layout == "LBHNC":
            raw = np.full((n, b, page + geometry.pad), GARBAGE, np.uint8)
        else:
            raw = np.full((b, n, page + geometry.pad), GARBAGE, np.uint8).transpose(1, 0, 2)
        self.pages: Bytes = raw[:, :, :page]
        self.tokens = self.pages.reshape(n, b, self.block_tokens, geometry.token_bytes)
        assert np.shares_memory(self.tokens, raw), "a view, not a copy"
        self._keep = raw
        self._patterns: dict[tuple[int, int, int], Bytes] = {}

    def block_bytes(self) -> int:
        return self.geometry.layers * self.block_tokens * self.geometry.token_bytes

    def fragments(self) -> list[Fragment]:
        """Through the same geometry code as real tensors."""
        specs = [
            TensorSpec(layer.shape, layer.strides, 1, layer.ctypes.data) for layer in self.pages
        ]
        return [Fragment(*run) for run in block_runs(specs, self.geometry.num_blocks)]

    def expected(self, digests: Bytes, group: int, layer: int, weights: int) -> Bytes:
        """Bytes (tokens, token_bytes) that a layer of a group holds for these digests."""
        key = (group, layer, weights)
        if key not in self._patterns:
            self._patterns[key] = pattern(
                self.rank, group, layer, weights, self.geometry.token_bytes
            )
        repeat = -(-self.geometry.token_bytes // 32)
        tiled = np.tile(digests, (1, repeat))[:, : self.geometry.token_bytes]
        out: Bytes = tiled ^ self._patterns[key]
        return out

    def poison(self, blocks: Sequence[int]) -> None:
        if blocks:
            assert NULL_BLOCK not in blocks
            self.pages[:, blocks] = GARBAGE

    def write(
        self, group: int, table: Sequence[int], at: int, digests: Bytes, weights: int
    ) -> None:
        where = np.arange(at, at + len(digests))
        blocks = np.asarray(table, np.int64)[where // self.block_tokens]
        assert (blocks != NULL_BLOCK).all(), "writing KV into the null block"
        for layer in range(self.geometry.layers):
            self.tokens[layer][blocks, where % self.block_tokens] = self.expected(
                digests, group, layer, weights
            )

    def verify(
        self,
        what: str,
        group: int,
        table: Sequence[int],
        first: int,
        digests: Bytes,
        weights: int,
    ) -> None:
        """Raise WrongBytes unless tokens [first, first+len(digests)) hold what they must."""
        if not len(digests):
            return
        where = np.arange(first, first + len(digests))
        blocks = np.asarray(table, np.int64)[where // self.block_tokens]
        if not (blocks != NULL_BLOCK).all():
            raise WrongBytes(f"{what}: group {group} attends to a block that is not there")
        for layer in range(self.geometry.layers):
            got = self.tokens[layer][blocks, where % self.block_tokens]
            bad = (got != self.expected(digests, group, layer, weights)).any(axis=1)
            if bad.any():
                at = int(np.argmax(bad))
                kind = "garbage" if (got[at] == GARBAGE).all() else "foreign bytes"
                raise WrongBytes(
                    f"{what}: rank {self.rank} group {group} layer {layer} token {first + at} "
                    f"(block {int(blocks[at])}): {kind}"
                )


@dataclass
class RunnerRequest:
    """What a model runner caches of a request."""

    tokens: list[int]
    digests: list[bytes]
    table: tuple[list[int], ...]
    computed: int


@dataclass
class RankOutput:
    sampled: dict[str, list[int]]
    finished: set[str] = field(default_factory=set)
    failed: set[str] = field(default_factory=set)
    invalid: set[int] = field(default_factory=set)
    report: WorkerReport | None = None


class Rank:
    """A worker process in small: its half of the connector, its memory, its model runner."""

    def __init__(
        self,
        half: Any,
        memory: KVMemory,
        *,
        salt_root: Callable[[str], bytes],
        spec_tokens: int,
        pickled: bool,
    ) -> None:
        self.half, self.memory = half, memory
        self.weights = 0
        self.pending: list[StepOutput] = []
        self.outputs: list[RankOutput] = []
        self._salt_root = salt_root
        self._spec = spec_tokens
        self._pickled = pickled
        self._requests: dict[str, RunnerRequest] = {}

    def push(self, step: StepOutput) -> None:
        """Metadata crosses a process border unless worker and scheduler share one process."""
        meta = step.metadata
        if self._pickled:
            meta = pickle.loads(pickle.dumps(meta))
        self.pending.append(_with_meta(step, meta))

    def run_next(self) -> None:
        self.outputs.append(self._run(self.pending.pop(0)))

    # -- one step, in the order of vLLM's runner

    def _run(self, step: StepOutput) -> RankOutput:
        orders: StepOrders = step.metadata
        half = self.half
        half.handle_preemptions(orders)
        self._poison(step, orders)
        self._update_requests(step)
        idle = half.bind(orders)
        sampled = self._forward(step)
        if idle:  # the connector calls no other hook
            half.clear()
            return RankOutput(sampled, set(), set(), set())
        half.start_load_kv()
        if not self._spec:
            half.wait_for_save()
        answers = half.transfer_results()
        out = RankOutput(
            sampled, set(answers.finished), set(answers.failed), set(half.take_invalid_blocks())
        )
        out.report = half.take_report()
        if self._spec:  # with a drafter vLLM finalises after it, and after the results
            half.wait_for_save()
        half.clear()
        half.check()
        return out

    def _poison(self, step: StepOutput, orders: StepOrders) -> None:
        """Allocated blocks hold garbage until written: what was there before must never be used.

        Only blocks that vLLM may write in this step: those of scheduled requests, and the targets of
        this step's loads.
        """
        loading = [
            int(b) for o in orders.loads for c in o.copies for b in c.block_ids.ravel() if b >= 0
        ]
        self.memory.poison(sorted({*step.fresh_blocks, *loading}))

    def _update_requests(self, step: StepOutput) -> None:
        for rid in step.finished_req_ids:
            self._requests.pop(rid, None)
        for new in step.scheduled_new_reqs:
            self._enter(new.req_id, new.tokens, new.block_ids, new.num_computed_tokens)
        cached = step.scheduled_cached_reqs
        for rid, ids, computed in zip(
            cached.req_ids, cached.new_block_ids, cached.num_computed_tokens, strict=True
        ):
            if rid in cached.resumed:
                assert ids is not None
                self._enter(rid, cached.resumed[rid], ids, computed)
            elif ids is not None:
                for table, fresh in zip(self._requests[rid].table, ids, strict=True):
                    table += fresh

    def _enter(
        self, rid: str, tokens: Sequence[int], ids: tuple[list[int], ...], computed: int
    ) -> None:
        entry = RunnerRequest([], [], tuple(list(t) for t in ids), computed)
        for token in tokens:
            self._append(rid, entry, token)
        self._requests[rid] = entry

    def _append(self, rid: str, entry: RunnerRequest, token: int) -> None:
        last = entry.digests[-1] if entry.digests else self._salt_root(rid)
        entry.tokens.append(token)
        entry.digests.append(next_digest(last, token))

    # -- forward

    def _forward(self, step: StepOutput) -> dict[str, list[int]]:
        plans = [(rid, n, *self._inputs(rid, n)) for rid, n in step.num_scheduled_tokens.items()]
        for rid, _, start, digests in plans:
            entry = self._requests[rid]
            for group in range(len(self.memory.specs)):
                self.memory.write(group, entry.table[group], start, digests, self.weights)
        sampled = {}
        for rid, n, start, digests in plans:
            self._attend(rid, start, digests)
            sampled[rid] = self._sample(rid, n, start)
        return sampled

    def _inputs(self, rid: str, n: int) -> tuple[int, Bytes]:
        """First position and the digests of the input tokens, guessed drafts included."""
        entry = self._requests[rid]
        start = entry.computed
        known = entry.digests[start : start + n]
        digest = entry.digests[-1]
        for token in self._drafts(entry, n - len(known)):
            digest = next_digest(digest, token)
            known.append(digest)
        return start, np.frombuffer(b"".join(known), np.uint8).reshape(-1, 32)

    def _drafts(self, entry: RunnerRequest, n: int) -> list[int]:
        """Guesses of the next tokens; how many are right depends on the prefix."""
        out: list[int] = []
        digest = entry.digests[-1]
        right = digest[5] % (self._spec + 1) if self._spec else 0
        for i in range(n):
            token = sampled_token(digest) + (0 if i < right else 1)
            out.append(token)
            digest = next_digest(digest, token)
        return out

    def _attend(self, rid: str, start: int, digests: Bytes) -> None:
        """Check every byte that this step's tokens attend to."""
        entry = self._requests[rid]
        for group, spec in enumerate(self.memory.specs):
            first = max(0, start - spec.window + 1) if spec.window else 0
            past = np.frombuffer(b"".join(entry.digests[first:start]), np.uint8).reshape(-1, 32)
            self.memory.verify(
                f"request {rid}, tokens before {start}",
                group, entry.table[group], first, past, self.weights,
            )  # fmt: skip
            self.memory.verify(
                f"request {rid}, this step", group, entry.table[group], start, digests, self.weights
            )

    def _sample(self, rid: str, n: int, start: int) -> list[int]:
        """[] inside a prefill, else [drafts given, accepted drafts..., one more token]."""
        entry = self._requests[rid]
        known = len(entry.tokens)
        if start + n < known:
            entry.computed = start + n
            return []
        drafts = self._drafts(entry, start + n - known)
        tokens: list[int] = []
        for draft in [*drafts, None]:
            token = sampled_token(entry.digests[-1])
            self._append(rid, entry, token)
            tokens.append(token)
            if token != draft:
                break
        entry.computed = known + len(tokens) - 1
        return [len(drafts), *tokens]


def _with_meta(step: StepOutput, meta: Any) -> StepOutput:
    copy = replace(step, metadata=meta)
    # Tables are the scheduler's own lists: a worker process would have its own copies.
    (copy.scheduled_new_reqs, copy.scheduled_cached_reqs) = pickle.loads(
        pickle.dumps((step.scheduled_new_reqs, step.scheduled_cached_reqs))
    )
    return copy


class Aggregator:
    """vLLM's KVOutputAggregator: an id counts once all ranks have reported it."""

    def __init__(self, ranks: int) -> None:
        self._ranks = ranks
        self._told: dict[str, set[int]] = {}
        self._failed: set[str] = set()

    def add(self, outputs: Sequence[RankOutput]) -> ConnectorOutput:
        out = ConnectorOutput()
        for rank, one in enumerate(outputs):
            assert one.failed <= one.finished, "failed_recving without finished_recving"
            for rid in one.finished:
                told = self._told.setdefault(rid, set())
                assert rank not in told, f"rank {rank} answered the load of {rid} twice"
                told.add(rank)
                if len(told) == self._ranks:
                    del self._told[rid]
                    out.finished_recving.add(rid)
            out.invalid_block_ids |= one.invalid
            self._failed |= one.failed
            if one.report is not None:
                report = pickle.loads(pickle.dumps(one.report))
                out.report = report if out.report is None else out.report.merge(report)
        out.failed_recving = self._failed & out.finished_recving
        self._failed -= out.failed_recving
        return out

    def check_idle(self) -> None:
        assert not self._told, f"some ranks never answered: {self._told}"
        assert not self._failed
