"""The chunk store's tests run on both I/O engines: import ``io_engine`` and they do.

The fixture is used by every test of a module that imports it, and gives that module's ``open_store``
and ``SegmentStore`` the engine's name.
"""

from __future__ import annotations

from functools import partial

import pytest

from kvoffload._core import io_uring_problem

ENGINES = ("threads", "uring")


def skip_without(engine: str) -> None:
    """Skip the running test where this machine does not let us use the engine."""
    problem = io_uring_problem() if engine == "uring" else None
    if problem is not None:
        pytest.skip(f"io_engine=uring: {problem}")


@pytest.fixture(autouse=True, params=ENGINES)
def io_engine(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    engine: str = request.param
    skip_without(engine)
    for name in ("open_store", "SegmentStore"):
        opener = getattr(request.module, name, None)
        if opener is not None:
            monkeypatch.setattr(request.module, name, partial(opener, io_engine=engine))
    return engine
