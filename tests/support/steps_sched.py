"""The mini scheduler: vLLM 0.32's Scheduler as far as a KV connector can tell.

Same order of connector calls, same statuses, same deferred frees, same asserts. Written from the
behaviour, not from the code. ``MiniScheduler.schedule`` and ``update_from_output`` are the two halves
of a step; with two steps in flight the engine calls schedule twice before the first update.
"""

from __future__ import annotations

from collections import Counter, deque
from typing import Any

from tests.support.steps_blocks import KVGroups, MiniRequest, Status
from tests.support.steps_types import Blocks, BlockState, ConnectorOutput, NewData, StepOutput

ASK_AGAIN = -1


class MiniScheduler:
    """``half`` is the connector's scheduler half."""

    def __init__(
        self,
        half: Any,
        kv: KVGroups,
        *,
        budget: int,
        max_running: int,
        asynchronous: bool,
        spec_tokens: int,
        defer_alloc: bool,
    ) -> None:
        self.half = half
        self.kv = kv
        self.budget = budget
        self.max_running = max_running
        self.asynchronous = asynchronous
        self.spec_tokens = spec_tokens
        self.defer_alloc = defer_alloc  # 0.33: update_state_after_alloc comes a step later
        self.requests: dict[str, MiniRequest] = {}
        self.waiting: deque[MiniRequest] = deque()
        self.holding: deque[MiniRequest] = deque()  # waiting, but owns blocks
        self.running: list[MiniRequest] = []
        self.finished_recving: set[str] = set()
        self.failed_recving: set[str] = set()
        self.finished_ids: set[str] = set()
        self.preempted_ids: set[str] = set()
        self.deferred_frees: deque[tuple[int, list[int]]] = deque()
        self.inflight: dict[MiniRequest, None] = {}  # prefills and loads that will need more blocks
        self.owed: list[MiniRequest] = []  # deferred update_state_after_alloc
        self.seq = 0
        self.processed = 0
        self.preemptions = 0
        self.asked_again = 0  # times that a request was told to wait for another one's load
        self.failed_loads = 0
        self.parked = 0
        self.computed: Counter[str] = Counter()

    # -- arrival and end

    def add(self, request: MiniRequest) -> None:
        assert request.request_id not in self.requests, "duplicate request id"
        self.requests[request.request_id] = request
        self.waiting.append(request)
        self.half.on_new_request(request)

    def abort(self, request_id: str) -> None:
        request = self.requests.get(request_id)
        if request is None or request.is_finished():
            return
        delay = False
        if request.status is Status.RUNNING:
            self.running.remove(request)
        else:
            for queue in (self.waiting, self.holding):
                if request in queue:
                    queue.remove(request)
        if request.status is Status.REMOTE:
            delay = request_id not in self.finished_recving
            self.finished_recving.discard(request_id)
            self.failed_recving.discard(request_id)
        if request in self.owed:  # 0.33: the load was never handed to the connector
            self.owed.remove(request)
            delay = False
        self._finish(request, delay_free=delay)

    def _finish(self, request: MiniRequest, *, delay_free: bool = False) -> None:
        request.status = Status.FINISHED
        self.inflight.pop(request, None)
        processed = max(0, request.num_computed_tokens - request.num_in_flight_tokens)
        self.kv.remove_skipped(request, processed)
        self.half.request_finished(request)
        self.finished_ids.add(request.request_id)
        if not delay_free:
            self._free_finished(request)

    def _free_finished(self, request: MiniRequest) -> None:
        self._free_blocks(request)
        del self.requests[request.request_id]

    def _may_free_now(self, request: MiniRequest) -> bool:
        return not self.asynchronous or request.last_sched_seq <= self.processed

    def _free_blocks(self, request: MiniRequest) -> None:
        if self._may_free_now(request):
            self.kv.free(request)
            return
        blocks = self.kv.pop(request)
        if blocks:
            self.deferred_frees.append((self.seq, blocks))

    def has_requests(self) -> bool:
        return bool(
            self.waiting
            or self.holding
            or self.running
            or self.finished_ids
            or self.requests
            or self.half.has_pending_push_work()
        )

    # -- schedule

    def schedule(self) -> StepOutput:
        out = StepOutput(self.seq + 1)
        self._settle_owed()
        left = self._schedule_running(out, self.budget)
        if not self.preempted_ids:
            self._schedule_waiting(out, left)
        out.preempted_req_ids, self.preempted_ids = self.preempted_ids, set()
        out.finished_req_ids, self.finished_ids = self.finished_ids, set()
        out.kv_connector_block_state = BlockState(
            frozenset(out.num_scheduled_tokens), self.kv.block_ids
        )
        out.metadata = self.half.build_connector_meta(out)
        out.kv_connector_block_state = None
        if self.asynchronous and out.num_scheduled_tokens:
            self.seq += 1
        for rid, n in out.num_scheduled_tokens.items():
            self._after_schedule(self.requests[rid], n)
        return out

    def _after_schedule(self, request: MiniRequest, n: int) -> None:
        self.computed[request.request_id] += n
        request.num_computed_tokens += n
        request.num_in_flight_tokens += n
        request.last_sched_seq = self.seq
        prefilling = (
            request.num_computed_tokens < request.num_tokens + request.num_output_placeholders
        )
        if prefilling:
            self.inflight[request] = None
        else:
            self.inflight.pop(request, None)
        if self.asynchronous and not prefilling:
            known = request.num_tokens + request.num_output_placeholders
            drafts = request.num_computed_tokens - known
            request.num_output_placeholders += 1 + drafts
            request.num_spec_tokens = self.spec_tokens

    def _schedule_running(self, out: StepOutput, left: int) -> int:
        index = 0
        while index < len(self.running) and left > 0:
            request = self.running[index]
            n = self._running_tokens(request, left)
            if n <= 0:
                index += 1
                continue
            fresh = self._allocate_or_preempt(request, n)
            if fresh is None:
                break
            cached = out.scheduled_cached_reqs
            cached.req_ids.append(request.request_id)
            cached.new_block_ids.append(fresh if any(fresh) else None)
            cached.num_computed_tokens.append(request.num_computed_tokens)
            out.fresh_blocks += [b for ids in fresh for b in ids]
            out.num_scheduled_tokens[request.request_id] = n
            request.num_spec_tokens = 0
            left -= n
            index += 1
        return left

    def _running_tokens(self, request: MiniRequest, left: int) -> int:
        placeholders = request.num_output_placeholders
        if (
            placeholders > 0
            and request.num_computed_tokens + 2 - placeholders
            >= request.num_prompt_tokens + request.max_tokens
        ):
            return 0  # the step in flight ends it
        n = (
            request.num_tokens
            + request.num_spec_tokens
            + placeholders
            - request.num_computed_tokens
        )
        return min(n, left)

    def _allocate_or_preempt(self, request: MiniRequest, n: int) -> tuple[list[int], ...] | None:
        while True:
            fresh = self.kv.allocate(request, n, self.kv.no_hit(), 0)
            if fresh is not None:
                return fresh
            victim = self.running[-1]
            if not self._may_free_now(victim):
                return None
            self.running.pop()
            self._preempt(victim, drop_stale=False)
            if victim is request:
                return None

    def _preempt(self, request: MiniRequest, *, drop_stale: bool) -> None:
        assert request.status is Status.RUNNING
        self._free_blocks(request)
        self.inflight.pop(request, None)
        request.status = Status.PREEMPTED
        request.num_computed_tokens = 0
        request.num_spec_tokens = 0
        request.drop_stale_output = drop_stale or (
            request.drop_stale_output and request.num_stale_output_tokens > 0
        )
        request.num_stale_output_tokens = request.num_in_flight_tokens
        request.num_output_placeholders = 0
        request.num_preemptions += 1
        self.preemptions += 1
        self.waiting.appendleft(request)
        self.preempted_ids.add(request.request_id)

    def _schedule_waiting(self, out: StepOutput, left: int) -> None:
        skipped: deque[MiniRequest] = deque()
        while left > 0 and len(self.running) < self.max_running:
            queue = self.holding or self.waiting
            if not queue:
                break
            request = queue[0]
            if not self._unblock(request):
                skipped.append(queue.popleft())
                continue
            if request.num_stale_output_tokens and not request.drop_stale_output:
                skipped.append(queue.popleft())
                continue
            taken = self._admit(out, request, left)
            if taken is None:
                break
            if taken == ASK_AGAIN:
                skipped.append(queue.popleft())
                self.asked_again += 1
                continue
            queue.popleft()
            if taken == 0:  # parked: loading
                skipped.append(request)
            left -= taken
        for request in reversed(skipped):
            holds = request.num_computed_tokens > 0 or request.status is Status.REMOTE
            (self.holding if holds else self.waiting).appendleft(request)

    def _admit(self, out: StepOutput, request: MiniRequest, left: int) -> int | None:
        """Tokens scheduled, 0 when the request was parked for a load, ASK_AGAIN when the connector
        wants to be asked again, None when it does not fit."""
        hit, external, asynchronous = self.kv.no_hit(), 0, False
        computed = request.num_computed_tokens
        if computed == 0:
            hit = self.kv.local_hit(request)
            answer = self.half.get_num_new_matched_tokens(request, hit.tokens)
            external, asynchronous = answer if not request.skip_reading_prefix_cache else (0, False)
            if external is None:
                assert not asynchronous
                return ASK_AGAIN
            assert external >= 0
            assert bool(external) == bool(asynchronous), "an async load of nothing, or a sync load"
            computed = hit.tokens + external
            assert computed <= request.num_tokens, "more matched than the request has tokens"
            assert external % self.kv.block_tokens == 0, "a load must end on a block"
        n = 0 if asynchronous else min(request.num_tokens - computed, left)
        assert asynchronous or n > 0
        if self.kv.need(request, request.num_tokens, hit, computed) > self.kv.pool.free_blocks:
            return None  # vLLM reserves room for the whole prompt at admission
        fresh = self.kv.allocate(
            request,
            n,
            hit,
            external,
            delay_cache=asynchronous,
            reserved=self._reserved() if asynchronous else 0,
        )
        if fresh is None:
            return None
        if asynchronous:
            self._park(request, computed, external)
            return 0
        self._tell_alloc(request, external)
        self._start(out, request, computed, n, fresh)
        return n

    def _reserved(self) -> int:
        """Blocks that requests in their prefill, and loads, still need to get through it."""
        none = self.kv.no_hit()
        return sum(
            self.kv.need(r, r.num_tokens, none, r.num_computed_tokens) for r in self.inflight
        )

    def _park(self, request: MiniRequest, computed: int, external: int) -> None:
        request.loads += 1
        self.parked += 1
        if self.defer_alloc:
            request.deferred_external = external
            self.owed.append(request)
        else:
            self._tell_alloc(request, external)
        request.status = Status.REMOTE
        request.num_computed_tokens = computed
        self.inflight[request] = None

    def _settle_owed(self) -> None:
        owed, self.owed = self.owed, []
        for request in owed:
            self._tell_alloc(request, request.deferred_external)

    def _tell_alloc(self, request: MiniRequest, external: int) -> None:
        blocks = Blocks(self.kv.block_ids(request.request_id))
        self.half.update_state_after_alloc(request, blocks, external)
        if external:
            sources = self.half.hit_sources(request, external)
            assert sources is None or sum(sources.values()) == external

    def _start(
        self,
        out: StepOutput,
        request: MiniRequest,
        computed: int,
        n: int,
        fresh: tuple[list[int], ...],
    ) -> None:
        self.running.append(request)
        ids = self.kv.block_ids(request.request_id)
        rid = request.request_id
        if request.status is Status.WAITING:
            out.scheduled_new_reqs.append(NewData(rid, ids, list(request.chain.tokens), computed))
        else:
            assert request.status is Status.PREEMPTED, request.status
            out.scheduled_cached_reqs.req_ids.append(rid)
            out.scheduled_cached_reqs.resumed[rid] = list(request.chain.tokens)
            out.scheduled_cached_reqs.new_block_ids.append(ids)
            out.scheduled_cached_reqs.num_computed_tokens.append(computed)
        out.fresh_blocks += [b for g in fresh for b in g]
        out.num_scheduled_tokens[rid] = n
        request.status = Status.RUNNING
        request.num_computed_tokens = computed

    def _unblock(self, request: MiniRequest) -> bool:
        if request.status is not Status.REMOTE:
            return True
        rid = request.request_id
        if rid not in self.finished_recving:
            return False
        if rid in self.failed_recving:
            self.failed_recving.remove(rid)
            if request.num_computed_tokens:
                self.kv.cache(request, request.num_computed_tokens)
            else:
                self.kv.free(request)
        else:
            self.kv.cache(request, request.num_computed_tokens)
        if request.num_computed_tokens == request.num_tokens:
            request.num_computed_tokens -= 1
        self.finished_recving.remove(rid)
        request.status = Status.PREEMPTED if request.num_preemptions else Status.WAITING
        return True

    # -- update

    def update_from_output(
        self, step: StepOutput, sampled: dict[str, list[int]], conn: ConnectorOutput
    ) -> None:
        if self.asynchronous and step.num_scheduled_tokens:
            self.processed += 1
            while self.deferred_frees and self.deferred_frees[0][0] <= self.processed:
                self.kv.pool.release(self.deferred_frees.popleft()[1])
        self._handle_failed(conn.failed_recving)
        disturbed = self._handle_invalid(conn.invalid_block_ids, step)
        for rid, n in step.num_scheduled_tokens.items():
            self._take_output(rid, n, sampled[rid], skip=rid in disturbed)
        if conn.report or conn.finished_recving or conn.invalid_block_ids:
            self.half.update_connector_output(conn, conn.report)
        self.half.step_ended()  # with get_kv_connector_stats
        for rid in conn.finished_recving:
            assert rid in self.requests, f"finished_recving for unknown request {rid}"
            request = self.requests[rid]
            if request.status is Status.REMOTE:
                assert rid not in self.finished_recving, f"{rid} finished receiving twice"
                self.finished_recving.add(rid)
            else:
                assert request.is_finished(), f"{rid} finished receiving while {request.status}"
                self._free_finished(request)

    def _handle_failed(self, failed: set[str]) -> None:
        for rid in failed:
            request = self.requests.get(rid)
            if request is not None and request.status is Status.REMOTE:
                request.num_computed_tokens = 0
                self.failed_recving.add(rid)
                self.failed_loads += 1

    def _handle_invalid(self, invalid: set[int], step: StepOutput) -> set[str]:
        if not invalid:
            return set()
        assert len(self.kv.specs) == 1, (
            "block-level failures with several KV groups kill the engine"
        )
        loading = [r for r in self.holding if r.status is Status.REMOTE]
        hit = self._truncate(loading, invalid, {})
        self.failed_recving |= hit
        self.failed_loads += len(hit)
        disturbed = self._truncate(self.running, invalid, step.num_scheduled_tokens)
        # vLLM has code for this, but it belongs to synchronous loads: an asynchronous load must not
        # name a block that a running request computes with.
        assert not disturbed, f"invalid blocks {sorted(invalid)} belong to running {disturbed}"
        return disturbed

    def _truncate(
        self, requests: list[MiniRequest], invalid: set[int], scheduled: dict[str, int]
    ) -> set[str]:
        hit: set[str] = set()
        size = self.kv.block_tokens
        for request in requests:
            (table,) = self.kv.block_ids(request.request_id)
            computed = request.num_computed_tokens - scheduled.get(request.request_id, 0)
            for index in range(min(-(-computed // size), len(table))):
                if table[index] in invalid:
                    request.num_computed_tokens = index * size
                    hit.add(request.request_id)
                    break
        return hit

    def _take_output(self, rid: str, n: int, tokens: list[int], *, skip: bool) -> None:
        request = self.requests.get(rid)
        stale = False
        if request is not None:
            request.num_in_flight_tokens -= n
            if request.num_stale_output_tokens > 0:
                stale = True
                request.num_stale_output_tokens -= n
                assert request.num_stale_output_tokens >= 0
        if skip or request is None or request.is_finished():
            return
        if stale and request.drop_stale_output:
            return
        self._append(request, n, tokens, stale=stale)

    def _append(self, request: MiniRequest, n: int, tokens: list[int], *, stale: bool) -> None:
        if not tokens:
            return
        drafts, tokens = tokens[0], tokens[1:]  # the runner says how many drafts it was given
        rejected = drafts - (len(tokens) - 1)
        if not stale:
            request.num_computed_tokens -= rejected
            if self.asynchronous:
                request.num_output_placeholders -= rejected
        delivered = 0
        stopped = False
        for token in tokens:
            request.chain.append(token)
            delivered += 1
            if request.num_output_tokens >= request.max_tokens:
                stopped = True
                break
        if self.asynchronous and not stale:
            request.num_output_placeholders -= delivered
            assert request.num_output_placeholders >= 0
        if request.status is Status.RUNNING and self.asynchronous:
            self.kv.cache(request, request.num_computed_tokens - request.num_output_placeholders)
        if not self.asynchronous:
            request.num_spec_tokens = self.spec_tokens
        if stopped:
            self._stop(request)

    def _stop(self, request: MiniRequest) -> None:
        if request.status is Status.RUNNING:
            self.running.remove(request)
        else:
            self.waiting.remove(request)
        self._finish(request)

    # -- reset

    def reset_prefix_cache(self, *, running: bool, connector: bool) -> bool:
        if running:
            while self.running:
                self._preempt(self.running.pop(), drop_stale=True)
        done = self.kv.pool.reset()
        # vLLM raises here: callers of the harness see to it that no load holds blocks.
        assert done or not running, "reset of running requests while a load holds blocks"
        if connector:
            done = self.half.reset_cache() and done
        return done

    def check(self) -> None:
        self.kv.check()
        queued = [*self.waiting, *self.holding, *self.running]
        assert len({r.request_id for r in queued}) == len(queued), "request queued twice"
        for request in self.requests.values():
            assert request.is_finished() or request in queued, f"{request.request_id} lost"
        refs = [0] * self.kv.pool.num_blocks
        for tables in self.kv.tables:
            for table in tables.values():
                for block in table:
                    refs[block] += block != 0
        for _, blocks in self.deferred_frees:
            for block in blocks:
                refs[block] += 1
        assert refs[1:] == self.kv.pool.refs[1:], "reference counts differ from the tables"
