"""Calls to EngineCore that change what KV means: who is told of which, before and after."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from kvoffload.engines.vllm import engine_calls
from kvoffload.engines.vllm.engine_calls import Listener, may_change_weights

core = pytest.importorskip("vllm.v1.engine.core")


@pytest.fixture
def engine(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """vLLM's EngineCore with its two methods, without an engine."""
    log: list[str] = []

    class Executor:
        def collective_rpc(self, method: Any, *args: Any, **kwargs: Any) -> str:
            log.append("call")
            if method == "fails":
                raise OSError("gone")
            return "done"

        def remove_lora(self, lora_id: int) -> bool:
            log.append(f"remove {lora_id}")
            return True

    for name in ("collective_rpc", "remove_lora"):  # put back what the test wraps
        monkeypatch.setattr(core.EngineCore, name, getattr(core.EngineCore, name))
    made = core.EngineCore.__new__(core.EngineCore)
    made.model_executor, made.log = Executor(), log
    yield made
    assert not engine_calls._listeners


def test_a_function_sent_to_the_workers_is_told_of_before_and_after(engine: Any) -> None:
    stops = [
        engine_calls.watch(Listener(lambda: engine.log.append("functions"), False)),
        engine_calls.watch(Listener(lambda: engine.log.append("names"))),
    ]
    assert engine.collective_rpc(print) == "done"
    assert engine.log == ["functions", "names", "call", "functions", "names"]
    engine.log.clear()
    engine.collective_rpc("update_named_param", args=("w",))
    assert engine.log == ["names", "call", "names"]
    engine.log.clear()
    engine.collective_rpc("ping")
    assert engine.log == ["call"]
    for stop in stops:
        stop()
    engine.log.clear()
    engine.collective_rpc(print)
    assert engine.log == ["call"]


def test_a_call_that_fails_is_told_of_after_it_too(engine: Any) -> None:
    stop = engine_calls.watch(Listener(lambda: engine.log.append("told")))
    with pytest.raises(OSError, match="gone"):
        engine.model_executor.collective_rpc("fails")
    engine.log.clear()
    engine.model_executor.collective_rpc = lambda *a, **k: 1 / 0
    with pytest.raises(ZeroDivisionError):
        engine.collective_rpc(print)
    assert engine.log == ["told", "told"]
    stop()


def test_the_end_of_an_adapter(engine: Any) -> None:
    removed: list[int] = []
    stop = engine_calls.watch(Listener(lambda: None, adapter_removed=removed.append))
    assert engine.remove_lora(7) is True
    assert engine.log == ["remove 7"] and removed == [7]
    stop()


@pytest.mark.parametrize(
    ("method", "may"),
    [
        (print, True),
        ("apply_model", True),
        ("update_named_param", True),
        ("load_state_dict", True),
        ("sync_from_trainer", True),
        ("reload_weights", True),
        ("load_lora_from", True),
        ("reload_model", True),
        ("upload_metrics", False),
        ("async_ping", False),
        ("get_weights_checksum", False),
        ("profile", False),
        ("list_loras", False),
        ("check_health", False),
    ],
)
def test_what_sounds_like_weights(method: Any, may: bool) -> None:
    assert may_change_weights(method, by_name=True) is may
    assert may_change_weights(method, by_name=False) is callable(method)
