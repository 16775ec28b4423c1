"""Several KV groups (full + sliding window): reloads are right, failures are recomputed."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.e2e.asks import Growth, ask, cold_then_warm, failed_loads, faults
from tests.e2e.prompts import connector, prompt, total
from tests.support import models
from tests.support.engine import EngineLife, assert_same

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(400)]

WINDOW = 256
ARGS = {"max_num_batched_tokens": 1024, "max_model_len": 8192}


@pytest.fixture(scope="module")
def life() -> Iterator[EngineLife]:
    # Every fourth load finds a chunk with a flipped byte, of one group and the other in turn.
    with EngineLife(
        models.sliding(window=WINDOW), connector(), ARGS, faults(worker__corrupt_every=4)
    ) as engine:
        yield engine


def _spend_good_loads(life: EngineLife) -> None:
    """Load until the next load is one that finds a corrupt chunk."""
    tokens = prompt(90, 1024)
    ask(life, tokens, max_tokens=1)
    while _loads(life) % 4 != 3:
        assert life.reset_prefix_cache()
        ask(life, tokens, max_tokens=1)


def _loads(life: EngineLife) -> float:
    """Loads so far, the corrupt ones too, which are no hits."""
    hits = total(life.metrics(), "kvoffload_hit_requests_total", tier="dram")
    return hits + failed_loads(life)


@pytest.fixture(autouse=True)
def fresh(life: EngineLife) -> None:
    while _loads(life) % 4 == 3:  # a test that does not ask for it meets no corrupt chunk
        ask(life, prompt(91, 1024), max_tokens=1)
        assert life.reset_prefix_cache()
    assert life.reset_prefix_cache(reset_connector=True)


@pytest.mark.parametrize("tokens", [512, 640 + 33, 2048 + 57])
def test_longer_than_the_window(life: EngineLife, tokens: int) -> None:
    _, warm = cold_then_warm(life, prompt(1000 + tokens, tokens))
    # Hits end on chunk borders of the full group; one token is always computed.
    assert warm.num_cached_tokens is not None
    assert warm.num_cached_tokens >= (tokens - 1) // 256 * 256
    assert failed_loads(life) == 0


@pytest.mark.parametrize("tokens", [200, 255])
def test_shorter_than_a_chunk_is_computed(life: EngineLife, tokens: int) -> None:
    _, warm = cold_then_warm(life, prompt(2000 + tokens, tokens))
    assert warm.num_cached_tokens == 0


def test_prompt_of_about_one_window(life: EngineLife) -> None:
    _, warm = cold_then_warm(life, prompt(3, WINDOW + 20))
    assert warm.num_cached_tokens == WINDOW


def test_a_longer_prompt_continues_where_the_window_began(life: EngineLife) -> None:
    shared = prompt(4, 1024)
    ask(life, shared, max_tokens=1)
    longer = shared + prompt(5, 700)
    assert life.reset_prefix_cache()
    warm = ask(life, longer)
    # The window's blocks before an earlier boundary were stored too, whichever boundary is used.
    assert warm.num_cached_tokens is not None and warm.num_cached_tokens >= 768
    assert life.reset_prefix_cache(reset_connector=True)
    assert_same(ask(life, longer), warm)


def test_generated_tokens_hit_in_the_next_turn(life: EngineLife) -> None:
    tokens = prompt(6, 700)
    first = ask(life, tokens, max_tokens=400)
    turn = tokens + first.token_ids + prompt(7, 100)
    assert life.reset_prefix_cache()
    warm = ask(life, turn)
    assert warm.num_cached_tokens is not None and warm.num_cached_tokens >= 1024
    assert life.reset_prefix_cache(reset_connector=True)
    assert_same(ask(life, turn), warm)


@pytest.mark.parametrize("round_", [0, 1])
def test_a_corrupt_chunk_is_recomputed(life: EngineLife, round_: int) -> None:
    """With several groups a failed load is answered as failed_recving; once per group."""
    tokens = prompt(8, 1536)
    cold = ask(life, tokens)
    _spend_good_loads(life)
    grew = Growth(life)
    assert life.reset_prefix_cache()
    warm = ask(life, tokens)
    assert_same(cold, warm)
    assert warm.num_cached_tokens == 0
    assert grew("kvoffload_failed_loads_total") == 1
    assert grew("kvoffload_failures_total", kind="corrupt") == 1
    assert life.reset_prefix_cache()
    again = ask(life, tokens)  # the bad chunk was replaced while recomputing
    assert again.num_cached_tokens is not None and again.num_cached_tokens >= 1280
    assert_same(cold, again)
