"""Which requests a step looks at for chunks to store: those that may have completed one."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from kvoffload.engines.vllm.guard import HookGuard
from kvoffload.engines.vllm.requests import RequestState
from kvoffload.engines.vllm.stores import FEW, StorePlanner
from kvoffload.types import CacheLayout, GroupKind, GroupLayout

CHUNK = 128
LAYOUT = CacheLayout((GroupLayout(0, GroupKind.FULL, CHUNK, 1, 4096, 1),), CHUNK, CHUNK, 1)


class Steps:
    """A planner and its requests; what it looks at is written down, not stored."""

    def __init__(self, computed: dict[str, int]) -> None:
        nothing: Any = None
        self.planner = StorePlanner(LAYOUT, nothing, nothing, HookGuard("scheduler"), nothing)
        self.looked: list[str] = []
        self.states = {name: self._state(name, tokens) for name, tokens in computed.items()}
        patched: Any = self.planner
        self._real, patched._of_request = self.planner._of_request, self._of_request
        patched._of_chunks = self._of_chunks

    def _state(self, name: str, computed: int) -> RequestState:
        request = SimpleNamespace(
            request_id=name,
            num_computed_tokens=computed,
            block_hashes=[b""] * 1000,
        )
        return RequestState(request, stored=computed // CHUNK * CHUNK)

    def _of_request(self, output: Any, state: RequestState, chain_of: Any) -> None:
        self.looked.append(state.request_id)
        self._real(output, state, chain_of)

    def _of_chunks(self, output: Any, state: RequestState, end: int, chain_of: Any) -> None:
        state.stored = end

    def step(self, scheduled: dict[str, int]) -> list[str]:
        """The requests that this step looked at."""
        self.looked.clear()
        output: Any = SimpleNamespace(num_scheduled_tokens=scheduled)
        if self.planner.has_work(output, max(scheduled.values(), default=0)):
            self.planner.orders(output, self.states, lambda state: None)
        self.planner.check()
        for name, tokens in scheduled.items():
            self.states[name].request.num_computed_tokens += tokens
        return list(self.looked)


def test_a_chunk_of_a_prompt_makes_no_decoding_request_due() -> None:
    names = [f"r{i}" for i in range(1000)]
    steps = Steps({**dict.fromkeys(names, CHUNK), "prompt": 0})
    decodes = dict.fromkeys(names, 1)
    assert steps.step(decodes) == names, "all are new"
    for _ in range(20):
        assert steps.step({**decodes, "prompt": 8192}) == ["prompt"]
    for _ in range(CHUNK - 22):
        assert steps.step(decodes) == []
    assert set(steps.step(decodes)) == set(names), "in the step that completes their chunk"


def test_what_is_no_longer_to_be_looked_at_is_forgotten() -> None:
    """Where steps only compute prompts, as with one token to answer, too."""
    steps = Steps({f"r{i}": 0 for i in range(2000)})
    for i in range(2000):
        steps.step({f"r{i}": 1000})
        steps.planner.forget(f"r{i}")
    assert len(steps.planner._queue) <= 2 * CHUNK


amounts = st.sampled_from([0, 1, 1, 1, 2, 5, FEW, FEW + 1, 40, CHUNK, 300])


@given(st.lists(st.lists(amounts, min_size=3, max_size=3), max_size=60))
def test_no_complete_chunk_is_passed_over(steps: list[list[int]]) -> None:
    some = Steps({"a": 0, "b": 100, "c": 17})
    for amount in steps:
        some.step({name: n for name, n in zip("abc", amount, strict=True) if n})
        for state in some.states.values():
            computed = state.request.num_computed_tokens
            assert state.stored // CHUNK == computed // CHUNK, state.request_id
