"""An ended session: how much of it the live requests still share, and what finding out costs."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from kvoffload.core.hashchain import Chain
from kvoffload.core.hints import Hints
from kvoffload.engines.vllm import hints as module
from kvoffload.engines.vllm.hints import RequestHints, common_chunks
from kvoffload.engines.vllm.requests import RequestState
from tests.support.fakes import chain_of, full_group, layout_of

ONE = layout_of(full_group())
TOK = 16


class Rig:
    def __init__(self) -> None:
        self.released: list[tuple[int, int]] = []
        keep = SimpleNamespace(release=self._release)
        manager: Any = SimpleNamespace(keep=keep)
        self.hints = RequestHints(ONE, manager, SimpleNamespace(), lambda: 1000.0)  # type: ignore[arg-type]

    def _release(self, chain: Chain, start: int, end: int, *, owner: str) -> None:
        self.released.append((start // TOK, end // TOK))

    def state(self, text: str, born: int = 0, end_session: bool = False) -> RequestState:
        request = SimpleNamespace(request_id=text, kv_transfer_params=None)
        hints = Hints(end_session=True) if end_session else Hints()
        state = RequestState(request, chain_of(ONE, text), hints, born=born * TOK)
        state.arrived = 999.0
        return state

    def finish(self, text: str, born: int, live: list[str]) -> None:
        state = self.state(text, born, end_session=True)
        self.hints.finished(state, lambda s: s.chain, [self.state(t) for t in live])


@pytest.mark.parametrize(
    ("born", "live", "want"),
    [
        (2, [], [(2, 6)]),
        (2, ["abXX"], [(2, 6)]),
        (2, ["abcX", "abcdX", "ab"], [(4, 6)]),
        (2, ["abcdX", "abcX"], [(4, 6)]),
        (0, ["X", "a", "abc"], [(3, 6)]),
        (2, ["abcdefgh"], []),
        (2, ["abcdef"], []),
        (6, ["a"], []),
    ],
)
def test_what_a_live_request_shares_is_not_let_go_of(
    born: int, live: list[str], want: list[tuple[int, int]]
) -> None:
    rig = Rig()
    rig.finish("abcdef", born, live)
    assert rig.released == want


def test_live_requests_that_share_the_system_prompt_alone_cost_one_comparison(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    calls = 0

    def counted(*args: Any) -> int:
        nonlocal calls
        calls += 1
        return common_chunks(*args)

    monkeypatch.setattr(module, "common_chunks", counted)
    rig = Rig()
    system = "s" * 20
    rig.finish(system + "abc", 20, [system + chr(200 + n) * 9 for n in range(500)])
    assert rig.released == [(20, 23)] and calls == 0
    rig.finish(system + "abc", 0, [system + chr(200 + n) * 9 for n in range(500)])
    assert rig.released[1:] == [(20, 23)] and calls == 1
