"""Two drives under a real engine: restart with the list in another order and a drive that is none.

Oracle: tokens and logprobs of the first life's cold requests, for which nothing was loaded.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from kvoffload.store import open_store
from tests.e2e.prompts import connector, prompt, total, until
from tests.support import models
from tests.support.engine import EngineLife, assert_same

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(600)]

ASK = {"max_tokens": 8, "logprobs": 1}
TOKENS = 2048
PROMPTS = [prompt(150 + i, TOKENS) for i in range(4)]


def test_two_drives_and_a_restart(tmp_path: Path) -> None:
    a, b, bad = (str(tmp_path / name) for name in ("a", "b", "bad"))
    with EngineLife(models.llama(), connector(nvme_path=[a, b], nvme_gib=1)) as life:
        cold = [life.generate([p], **ASK)[0] for p in PROMPTS]  # type: ignore[arg-type]
        assert [o.num_cached_tokens for o in cold] == [0] * 4

        def written() -> bool:
            life.generate([prompt(999, 20)], max_tokens=1)
            return total(life.metrics(), "kvoffload_events_total", event="nvme_written") >= 32

        assert until(written), life.metrics()
    for path in (a, b):
        with open_store(path, read_only=True) as store:
            assert len(store) > 0
    Path(bad).write_text("not a directory")
    with EngineLife(models.llama(), connector(nvme_path=[bad, b, a], nvme_gib=1)) as life:
        for before, p in zip(cold, PROMPTS, strict=True):
            out = life.generate([p], **ASK)[0]  # type: ignore[arg-type]
            assert_same(before, out)
            assert out.num_cached_tokens == TOKENS
        life.generate([prompt(998, 20)], max_tokens=1)
        metrics = life.metrics()
        assert total(metrics, "kvoffload_hit_tokens_total") == 4 * TOKENS
        up = [total(metrics, "kvoffload_drive_up", path=p) for p in (a, b, bad)]
        assert up == [1, 1, 0]
        assert total(metrics, "kvoffload_failures_total", kind="drive_open") == 1
        assert total(metrics, "kvoffload_failures_total", kind="exception") == 0
