"""Scheduler half: looks up, leases, orders loads and stores. Runs on the EngineCore thread.

Every call is O(chunks of the request) and does no I/O. vLLM objects are used by attribute only, so
the step harness in tests/support can drive this class without vLLM. Rules of the hooks, their order
and traps: docs/request-lifecycle.md.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping
from typing import Any, Protocol

from kvoffload.config import Config
from kvoffload.core.hashchain import Chain
from kvoffload.core.manager import Manager
from kvoffload.core.pages import PageFormat
from kvoffload.engines.vllm.account import Accounts
from kvoffload.engines.vllm.attach import AttachWatch
from kvoffload.engines.vllm.exports import StatsExport
from kvoffload.engines.vllm.guard import HookGuard, guarded
from kvoffload.engines.vllm.hbm import HbmCache
from kvoffload.engines.vllm.hints import RequestHints
from kvoffload.engines.vllm.loads import Loads
from kvoffload.engines.vllm.lookups import Lookups
from kvoffload.engines.vllm.meta import CALM, ArenaAddress, StepOrders, WorkerReport
from kvoffload.engines.vllm.orders import Fence
from kvoffload.engines.vllm.pace import TickPace
from kvoffload.engines.vllm.requests import RequestState
from kvoffload.engines.vllm.shadow import ShadowCheck
from kvoffload.engines.vllm.stores import StorePlanner
from kvoffload.engines.vllm.telemetry import (
    PREFILL_TOKENS,
    StepClock,
    prefill_work,
    record,
)
from kvoffload.engines.vllm.why import WhyMiss
from kvoffload.metrics import Payload, Recorder
from kvoffload.replay.record import StreamRecorder
from kvoffload.types import CacheLayout, MissCause, Tier

logger = logging.getLogger("vllm.kvoffload")


class Namespaces(Protocol):
    """Where chunk keys get their namespace from; see engines/vllm/namespace.py."""

    persistent: bool | None
    """None until known; False: the namespace is random, nothing may go to NVMe."""

    def namespace(self) -> bytes | None:
        """16 bytes, or None while the weights are still being digested."""

    def adapter(self, request: Any) -> bytes | None:
        """Digest of the request's LoRA adapter, b"" without one, None while not known."""

    def forget_adapter(self, lora_int_id: int) -> None:
        """Another adapter may come under this id and path."""

    def on_first_request(self) -> None:
        """Compute the hash canary (vLLM's hash seed is initialised by now)."""

    def fields(self) -> dict[str, str]:
        """Digests of what the namespace is made of, by name."""

    def new_epoch(self) -> None:
        """Hide everything stored so far behind a random epoch."""


class SchedulerHalf:
    """One per engine. ``serve`` False: its KV cannot be served; every lookup is a miss, and no rank
    attaches.

    ``follow``: HBM's prefix cache is on, so that a request may wait for another one's load.
    ``formats``: pages that the shadow check can compare, by KV group; without any it is off.
    ``adapter_paths``: see HbmCache. ``recorder``: is told of every request that has ended.
    ``alone``: no other connector of the engine loads anything.
    """

    def __init__(
        self,
        config: Config,
        layout: CacheLayout,
        manager: Manager,
        arena: Any,
        namespaces: Namespaces,
        *,
        serve: bool = True,
        eagle: bool = False,
        fail_by_blocks: bool = False,
        adapter_paths: bool = True,
        follow: bool = False,
        formats: Mapping[int, PageFormat] | None = None,
        model: str = "",
        recorder: StreamRecorder | None = None,
        alone: bool = False,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.guard = HookGuard("scheduler")
        self.config = config
        self.layout = layout
        self.manager = manager
        self.arena = arena
        self.namespaces = namespaces
        self.metrics = Recorder()
        self._serve = serve
        self._eagle = eagle
        self._alone = alone
        self._clock = clock
        self._states: dict[str, RequestState] = {}
        self.why = WhyMiss(
            config.why_requests, layout, manager, namespaces, self.metrics, self.guard, clock
        )
        use = manager.levels()
        self._accounts = Accounts(
            layout, self.metrics, self.guard, model, use.bytes_total, use.nvme_max
        )
        self._loads = Loads(
            layout,
            manager,
            self.metrics,
            self.guard,
            self._states,
            config.load_deadline_ms,
            clock,
            fail_by_blocks,
            self._accounts,
            why=self.why,
        )
        self._recorder = recorder
        self._shadow: ShadowCheck | None = None
        if config.verify_sample and formats:
            self._shadow = ShadowCheck(config.verify_sample, formats, manager, arena, self.metrics)
        self._lookups = Lookups(
            layout,
            manager,
            self.metrics,
            self._loads,
            clock,
            eagle=eagle,
            follow=follow,
            shadow=self._shadow,
            why=self.why,
            accounts=self._accounts,
        )
        self._fence = Fence(arena, layout)
        self._hints = RequestHints(layout, manager, self.metrics, clock)
        self._stores = StorePlanner(
            layout,
            manager,
            self._fence,
            self.guard,
            self._hints,
            eagle=eagle,
            accounts=self._accounts,
        )
        self._attach = AttachWatch(arena, layout.world_size, clock)
        self._said_unsupported = False
        self._dram_only = False
        self._hbm = HbmCache(layout, by_path=adapter_paths)
        self._weights_epoch = arena.epoch()
        self._steps = StepClock(clock)
        self._tick_pace = TickPace()
        self._stats = StatsExport(
            self.metrics, manager, self._accounts, self.guard, self._states, clock
        )
        self._last_step = float("-inf")

    def watch_hbm(
        self, is_empty: Callable[[], bool], holds: Callable[[Any], bool] | None = None
    ) -> None:
        """How to see into HBM's prefix cache; see HbmCache.watch."""
        self._hbm.watch(is_empty, holds)

    # ---------------------------------------------------------------- arrival and lookup

    @guarded(lambda self, request: None)
    def on_new_request(self, request: Any) -> None:
        """At arrival: compute the chain and start moving what sits on NVMe towards DRAM."""
        self.namespaces.on_first_request()
        state = self._state(request)
        state.arrived = self._clock()
        chain = self._chain(state)
        if chain is not None:
            self._hints.arrived(state, chain)
        if chain is None or self.config.load == "never" or self._skips_cache(request):
            return
        pin = state.hints.pin is True
        wished = pin or state.hints.prefetch
        # Alone it is looked up in the next step, which starts the same reads.
        if self._ready() and (wished or len(self._states) > 1):
            # What is pinned is pinned in DRAM, whatever HBM holds.
            start = 0 if pin else self._hbm.leading_tokens(request.block_hashes)
            self.manager.prefetch(state.request_id, chain, start, request.num_tokens, wished)

    @guarded(lambda self, request, num_computed: (0, False))
    def get_num_new_matched_tokens(
        self, request: Any, num_computed: int
    ) -> tuple[int | None, bool]:
        """Tokens beyond ``num_computed`` to be loaded asynchronously; (0, False) for none.

        (None, False): ask again next step, another request is loading the same prefix.
        """
        state = self._state(request)
        ready = self._ready()
        if self._hbm.is_stale(request, self._states.values()) and num_computed > 0:
            state.tainted = True  # its HBM hit may hold KV of the old weights
        chain = self._chain(state, num_computed)
        if not ready or self._loads.is_banned(state.request_id):
            why = "workers are attaching" if self._serve else "nothing is served: see the log"
            return self.why.skipped(state, num_computed, MissCause.NOT_READY, why)
        if self._skips_cache(request) or state.tainted:
            cause = MissCause.RESET if state.tainted else MissCause.NOT_ASKED
            return self.why.skipped(state, num_computed, cause, "")
        if state.unsupported:
            return self.why.skipped(state, num_computed, MissCause.NOT_ASKED, "streaming input")
        if chain is None:
            if state.misses("namespace_unknown"):
                self.metrics.miss("namespace_unknown")
            return self.why.skipped(state, num_computed, MissCause.NOT_READY, "being digested")
        began = time.perf_counter()
        offered = self._lookups.offer(state, chain, num_computed)
        self._accounts.ledger.lookup(state.request_id, time.perf_counter() - began)
        return (None, False) if offered is None else (offered, offered > 0)

    # ---------------------------------------------------------------- allocation -> load order

    def update_state_after_alloc(self, request: Any, blocks: Any, num_external: int) -> None:
        """Turn the provisional lease into a load order. Never raises; never leaves vLLM waiting."""
        try:
            self.guard.maybe_fault("update_state_after_alloc")
            self._commit(request, blocks, num_external)
        except Exception as exc:
            self.guard.record("update_state_after_alloc", exc)
            if num_external > 0:
                self._loads.commit_failed(request, blocks, num_external)

    def _commit(self, request: Any, blocks: Any, num_external: int) -> None:
        state = self._state(request)
        self._stores.look_at(state.request_id)
        held = state.provisional
        if num_external <= 0:
            # Not chosen, nothing to load, or the second call after an async load.
            if not self._alone:
                self._fence.note(blocks)
            if not self._loads.outstanding(state.request_id):
                self._lookups.drop(state)
                self.why.settled(state)
            return
        if held is None:
            raise RuntimeError(f"load of {num_external} tokens without a lease")
        self._loads.commit(state, held, blocks.get_block_ids(), num_external)
        self._lookups.committed(state)

    def hit_sources(self, request: Any, num_external: int) -> dict[Tier, int] | None:
        """Tokens by tier of the load just ordered, None when they do not add up."""
        state = self._states.get(str(request.request_id))
        sources = state.hit_sources if state is not None else None
        if not sources or sum(sources.values()) != num_external:
            return None
        return {t: n for t, n in sources.items() if n}

    # ---------------------------------------------------------------- step orders

    def build_connector_meta(self, output: Any) -> StepOrders:
        """Orders of this step. Never raises; on a failure new loads fail, stores are skipped."""
        try:
            self.guard.maybe_fault("build_connector_meta")
            return self._build(output)
        except Exception as exc:
            self.guard.record("build_connector_meta", exc)
        self._steps.built(None, self._clock())  # its output comes all the same
        self._stores.look_at_all()  # it does not know what this step computes
        return StepOrders(
            arena=self._address(),
            idle=False,
            low_water=self._loads.low_water(),
            fence=self._fence.all_pending(),
            fails=self._loads.fail_unsent(self._clock()),
        )

    def _build(self, output: Any) -> StepOrders:
        began = time.perf_counter()
        now = self._last_step = self._clock()
        self._check_epoch()
        calm = self._is_calm(output, now)
        orders = CALM if calm else self._loads_and_fence(output, now)
        most = max(output.num_scheduled_tokens.values(), default=0)
        looks = (calm or self._ready()) and self._stores.has_work(output, most)
        if looks:
            stores = self._stores.orders(output, self._states, self._chain)
            if stores:
                orders = StepOrders(low_water=self._loads.low_water()) if calm else orders
                orders.stores = stores
        if orders is not CALM:
            self._finish_orders(orders, now)
        prefills = looks or most >= PREFILL_TOKENS
        self._steps.built(prefill_work(output, self._states) if prefills else None, now)
        self._stats.step_took(time.perf_counter() - began)
        return orders

    def _is_calm(self, output: Any, now: float) -> bool:
        """Whether nothing is to be loaded, failed, fenced or taken in: most steps are so. Asking
        takes a microsecond; building such orders takes twenty with cold processor caches."""
        return bool(
            output.num_scheduled_tokens
            and self._tick_pace.rests(now)
            and self._loads.is_empty()
            and self._lookups.is_empty()
            and self._fence.is_clear(output)
            and self._serve
            and self._attach.done()
        )

    def _loads_and_fence(self, output: Any, now: float) -> StepOrders:
        self._lookups.expire(now)
        orders = StepOrders(
            arena=self._address(),
            idle=not output.num_scheduled_tokens,
            low_water=self._loads.low_water(),
        )
        orders.loads, orders.fails = self._loads.orders(now)
        spoiled = self._fence.spoil(output, self.manager.spoil_store)
        if spoiled:
            self.metrics.failure("store_source_reused", spoiled)
        orders.fence = self._fence.due(output, orders.loads)
        return orders

    def _finish_orders(self, orders: StepOrders, now: float) -> None:
        tick = self._tick_pace.due(
            now,
            loads=bool(orders.loads),
            reading=bool(orders.loads) and self.manager.reading(),
            stores=bool(orders.stores),
            fails=bool(orders.fails),
        )
        if tick:
            self._tick(busy=not orders.idle)
        self._loads.sent()  # not before: when anything above raises, these loads must be failed

    def _tick(self, busy: bool) -> None:
        try:
            self.manager.tick(busy=busy)
        except Exception as exc:  # the step's stores have begun: they must reach the workers
            self.guard.record("tick", exc)

    def stepped_within(self, seconds: float) -> bool:
        """Whether a step was built in the last ``seconds`` (any thread)."""
        return self._clock() - self._last_step < seconds

    def compare_sample(self) -> bool:
        """One chunk of the shadow check, if one is due (tick thread). True: there may be more."""
        return self._shadow is not None and self._shadow.compare()

    def _address(self) -> ArenaAddress | None:
        if not self._serve or self._attach.done():
            return None
        return ArenaAddress(self.arena.path, self.arena.inode, self.layout)

    # ---------------------------------------------------------------- answers

    @guarded(lambda self, output, report=None: self._loads.answer_blindly(output, report))
    def update_connector_output(self, output: Any, report: WorkerReport | None = None) -> None:
        """Take the ranks' answers: finish attempts, drop bad chunks, feed the rates."""
        if report is not None:
            self._loads.take_report(report)
        if not self._loads.is_empty():
            self._loads.answer(output)

    @guarded(lambda self: None)
    def step_ended(self) -> None:
        """A step's output came, whatever it says: the prefill rate is learned from its time."""
        learned = self._steps.ended()
        if learned is not None:
            self.manager.observe_prefill(*learned)

    @guarded(lambda self, request: self._forget(request))
    def request_finished(self, request: Any) -> None:
        """Forget the request; an outstanding load stays in the table until the ranks answered."""
        self._forget(request)

    def _forget(self, request: Any) -> None:
        state = self._states.pop(str(request.request_id), None)
        self._stats.request_ended()
        if state is not None:
            self._lookups.drop(state)
            if self._recorder is not None and state.chain is not None:
                record(self._recorder, state, self.layout)
            if state.sampled:
                self.manager.shadow.request_over(state.request_id)
        self.manager.cancel_prefetch(str(request.request_id))
        self._loads.forget(str(request.request_id))
        self._stores.forget(str(request.request_id))
        self._accounts.ended(str(request.request_id), state.chain if state is not None else None)
        if state is not None:
            self._hints.finished(state, self._chain, self._states.values())

    # ---------------------------------------------------------------- engine state

    @guarded(lambda self: False)
    def has_pending_push_work(self) -> bool:
        """Keep an idle engine stepping: workers attach, copies are out, or metrics are to be
        exported. Never for disk."""
        if not self._serve:
            return False
        if not self._attach.done():
            return self._attach.worth_waiting()
        storing = self.manager.store_inflight() > 0
        return self._stats.wants_step(storing) or storing

    @guarded(lambda self: False)
    def reset_cache(self) -> bool:
        """Hide DRAM and NVMe behind a new epoch and fail outstanding loads."""
        self._reset("the cache was reset")
        return True

    @guarded(lambda self, lora_int_id: self._reset("a LoRA adapter was removed"))
    def adapter_removed(self, lora_int_id: int) -> None:
        """The workers let an adapter go. What still runs with it is left alone: the next adapter of
        this id and path may be another one."""
        self.namespaces.forget_adapter(lora_int_id)
        theirs = [s for s in self._states.values() if _adapter_id(s.request) == lora_int_id]
        for state in theirs:
            self._lookups.drop(state)
            self.manager.cancel_prefetch(state.request_id)
            state.chain, state.tainted = None, True
        if theirs:
            self._loads.fail_all()

    def _check_epoch(self) -> None:
        epoch = self.arena.epoch()
        if epoch != self._weights_epoch:
            self._weights_epoch = epoch
            self._reset("the model's weights changed in place")
            if self._hbm.weights_changed():
                logger.warning(
                    "kvoffload: requests that hit HBM's prefix cache are neither loaded nor stored "
                    "until it has been empty once: reset it (/reset_prefix_cache)."
                )

    def _reset(self, why: str) -> None:
        logger.info("kvoffload: %s; everything stored so far is now a miss.", why)
        self.namespaces.new_epoch()
        for state in self._states.values():
            self._lookups.drop(state)
            self.manager.cancel_prefetch(state.request_id)
            state.chain = None
            state.stored = 0
            if int(state.request.num_computed_tokens) > 0:
                state.tainted = True
            else:
                state.pin_done = False  # the reset ended its pin: again when it is stored
        self._stores.look_at_all()
        self._loads.fail_all()
        self.manager.reset()
        self.manager.end_idle_writes()
        self.metrics.reset_epoch()

    def has_stats(self) -> bool:
        """Whether ``take_stats`` would find anything. Asked every step."""
        return self._stats.has_any()

    @guarded(lambda self: None)
    def take_stats(self) -> Payload | None:
        """What changed since the last call, None when nothing did or it can wait (ExportPace)."""
        return self._stats.take()

    def shutdown(self, flush_s: float) -> None:
        """Bounded flush of what was not yet written, then close the Manager."""
        try:
            self.manager.drain(flush_s)
        finally:
            self.manager.close()
            if self._recorder is not None:
                self._recorder.close()

    def check(self) -> None:
        """Raise AssertionError on a broken invariant."""
        self._loads.check()
        self.why.check()
        self._accounts.check()
        self._stores.check()
        self._hints.check()
        self.manager.check()

    # ---------------------------------------------------------------- small helpers

    def _state(self, request: Any) -> RequestState:
        request_id = str(request.request_id)
        state = self._states.get(request_id)
        if state is None:
            state = RequestState(request, hints=self._hints.read(request))
            if getattr(request, "resumable", False):
                state.unsupported = True
                if not self._said_unsupported:
                    self._said_unsupported = True
                    logger.info(
                        "kvoffload: streaming-input sessions are neither loaded nor stored."
                    )
            self._states[request_id] = state
            self._accounts.arrived(request, state.hints.tenant)
        return state

    def _chain(self, state: RequestState, num_computed: int = 0) -> Chain | None:
        """None without a name for its KV. ``num_computed``: tokens that it has been found to hit in
        HBM, beyond those that it has computed."""
        if state.unsupported or not self._serve:
            return None
        if state.chain is None:
            if state.tainted:
                return None  # no name for what it holds; an adapter's is not to be asked for again
            namespace = self.namespaces.namespace()
            adapter = self.namespaces.adapter(state.request)
            if namespace is None or adapter is None:
                return None
            if self.namespaces.persistent is False and not self._dram_only:
                self._dram_only = True
                self.manager.drop_nvme()
            if adapter:
                self._hbm.names(state.request, adapter)
                has_any = num_computed > 0 or int(state.request.num_computed_tokens) > 0
                if has_any and self._hbm.is_stale(state.request, self._states.values()):
                    state.tainted = True  # of an adapter that had this name before, perhaps
                    return None
            state.chain = Chain(namespace, adapter, self.layout)
        state.chain.extend(state.request.block_hashes)
        return state.chain

    def _skips_cache(self, request: Any) -> bool:
        return bool(getattr(request, "skip_reading_prefix_cache", False))

    def _ready(self) -> bool:
        self._check_epoch()
        return self._serve and self._attach.done()


def _adapter_id(request: Any) -> int | None:
    lora = getattr(request, "lora_request", None)
    return None if lora is None else int(lora.lora_int_id)
