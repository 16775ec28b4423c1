"""The ledger: who asked for what, what loads saved and lost, and the bounds on names."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvoffload.core.ledger import (
    DEFAULT,
    INVALID,
    MAX_MODELS,
    MAX_SALTS,
    MAX_TENANTS,
    OTHER,
    Account,
    Ledger,
    plain_name,
    tenant_of,
)
from kvoffload.types import Tier

DRAM, NVME = Tier.DRAM, Tier.NVME


def test_tenants_by_name_by_salt_and_by_default() -> None:
    assert tenant_of("acme", "secret") == "acme"
    assert tenant_of(None, None) == tenant_of(None, "") == DEFAULT
    salted = tenant_of(None, "secret")
    assert salted == tenant_of(None, "secret") != tenant_of(None, "other")
    assert salted.startswith("salt-") and "secret" not in salted
    assert tenant_of("", "salt") == INVALID, "a bad one was given"


def test_names_are_safe_in_labels() -> None:
    assert plain_name('a|b"c\n<d>{e}') == "a_b_c__d__e_"
    assert plain_name("org/Model-7B_v1.2:x@y+z") == "org/Model-7B_v1.2:x@y+z"
    assert len(plain_name("x" * 500)) == 64


def test_a_request_from_start_to_end() -> None:
    ledger = Ledger(ranks=2)
    ledger.begin("r", "m", "t")
    ledger.begin("r", "m2", "t2")  # idempotent
    ledger.asked("r", 1000, 100)
    ledger.asked("r", 9999, 0)  # a later lookup
    ledger.lookup("r", 0.5)
    ledger.load("r", {DRAM: 300, NVME: 100}, {DRAM: 30, NVME: 10}, 1.0, 5.0)
    ledger.stored("r", 77)
    ledger.check()
    ledger.end("r")
    taken = ledger.take()
    account = taken[("m", "t")]
    assert list(taken) == [("m", "t")] and not ledger.changed() and len(ledger) == 0
    assert (account.requests, account.asked, account.hbm) == (1, 1000, 100)
    assert (account.loaded, account.missed, account.stored_bytes) == (400, 500, 77)
    assert account.lookup_s == 0  # it loaded: the lookup was not in vain
    dram, nvme = account.tiers[DRAM], account.tiers[NVME]
    assert (dram.tokens, dram.bytes, dram.loads) == (300, 30, 1)
    assert dram.saved_s == pytest.approx(4.0 * 0.75 * 2)  # seconds x share x ranks
    assert nvme.saved_s == pytest.approx(4.0 * 0.25 * 2)
    assert dram.load_s == pytest.approx(0.75) and account.net_s == pytest.approx(8.0)


def test_slower_loads_and_failed_loads_are_losses() -> None:
    ledger = Ledger()
    ledger.begin("r", "m", "t")
    ledger.asked("r", 100, 0)
    ledger.load("r", {DRAM: 60}, {DRAM: 6}, 3.0, 1.0)
    ledger.load("r", {NVME: 40}, {NVME: 4}, 2.0, 9.0, failed=True)
    ledger.end("r")
    (account,) = ledger.take().values()
    assert account.tiers[DRAM].lost_s == 2.0 and account.tiers[NVME].lost_s == 2.0
    assert account.net_s == -4.0
    assert account.loaded == 60 and account.missed == 40 and account.tiers[NVME].bytes == 4


def test_an_unknown_prefill_rate_books_no_saving() -> None:
    ledger = Ledger()
    ledger.begin("r", "m", "t")
    ledger.asked("r", 100, 0)
    ledger.load("r", {DRAM: 60}, {}, 3.0, None)
    ledger.end("r")
    (account,) = ledger.take().values()
    assert account.net_s == 0 and account.loaded == 60


def test_a_request_that_loads_again_is_not_counted_twice() -> None:
    """A preempted request loads what it computed itself: no more than it asked for is loaded."""
    ledger = Ledger()
    ledger.begin("r", "m", "t")
    ledger.asked("r", 100, 20)
    for _ in range(3):
        ledger.load("r", {DRAM: 64}, {DRAM: 1}, 0.1, 1.0)
    ledger.end("r")
    (account,) = ledger.take().values()
    assert account.loaded == 80 and account.missed == 0 and account.tiers[DRAM].loads == 3


def test_lookups_in_vain_cost_and_followers_hit_hbm() -> None:
    ledger = Ledger()
    for name in ("miss", "follower"):
        ledger.begin(name, "m", "t")
        ledger.asked(name, 100, 0)
    ledger.lookup("miss", 0.25)
    ledger.followed("follower", 64)
    for name in ("miss", "follower"):
        ledger.end(name)
    (account,) = ledger.take().values()
    assert account.lookup_s == 0.25 and account.hbm == 64 and account.missed == 136


def test_late_answers_and_strangers_are_ignored() -> None:
    ledger = Ledger()
    ledger.begin("r", "m", "t")
    ledger.end("r")  # never looked up
    ledger.asked("r", 1, 0)
    ledger.lookup("r", 1.0)
    ledger.followed("r", 1)
    ledger.load("r", {DRAM: 1}, {DRAM: 1}, 1.0, 2.0)
    ledger.stored("r", 5)
    ledger.end("r")
    assert ledger.take() == {}


def test_names_beyond_the_bound_become_other() -> None:
    ledger = Ledger()
    for n in range(3 * MAX_TENANTS):
        rid = str(n)
        ledger.begin(rid, f"m{n}", f"t{n}")
        ledger.asked(rid, 10, 0)
        ledger.end(rid)
        ledger.check()
    taken = ledger.take()
    assert len({m for m, _ in taken}) == MAX_MODELS + 1
    assert len({t for _, t in taken}) == MAX_TENANTS + 1
    assert taken[(OTHER, OTHER)].requests == 2 * MAX_TENANTS
    assert sum(a.requests for a in taken.values()) == 3 * MAX_TENANTS


def test_salts_leave_room_for_named_tenants() -> None:
    """A salt per user, and tenants who name themselves later."""
    ledger = Ledger()
    salts = [tenant_of(None, f"user {n}") for n in range(3 * MAX_SALTS)]
    named = [f"team {n}" for n in range(MAX_TENANTS)]
    for name in salts + named + salts[:2] + named[:2] + ["one more"]:
        rid = name + " request"
        ledger.begin(rid, "m", name)
        ledger.asked(rid, 10, 0)
        ledger.end(rid)
        ledger.check()
    booked = {tenant: account.requests for (_, tenant), account in ledger.take().items()}
    assert all(booked[name] == (2 if n < 2 else 1) for n, name in enumerate(named))
    assert all(booked[name] == (2 if n < 2 else 1) for n, name in enumerate(salts[:MAX_SALTS]))
    assert booked[OTHER] == 2 * MAX_SALTS + 1
    assert len(booked) == MAX_SALTS + MAX_TENANTS + 1


events = st.tuples(
    st.sampled_from(["asked", "load", "fail", "followed", "end"]),
    st.integers(0, 4),
    st.integers(0, 2000),
    st.integers(0, 2000),
    st.floats(0, 10),
    st.none() | st.floats(0, 10),
)


@given(st.lists(events, max_size=60), st.integers(1, 8))
def test_the_books_always_balance(
    script: list[tuple[str, int, int, int, float, float | None]], ranks: int
) -> None:
    """Whatever happens in whatever order: asked = hbm + loaded + missed, nothing negative."""
    ledger, total, expected = Ledger(ranks), Account(), 0.0
    for what, who, a, b, seconds, recompute in script:
        rid = f"r{who}"
        ledger.begin(rid, f"m{who % 2}", f"t{who % 3}")
        if what == "asked":
            ledger.asked(rid, a, b)
        elif what in ("load", "fail"):
            failed = what == "fail"
            ledger.load(rid, {DRAM: a, NVME: b}, {DRAM: a}, seconds, recompute, failed=failed)
            if a + b:
                net = -seconds if failed else None if recompute is None else recompute - seconds
                expected += (net or 0.0) * ranks
        elif what == "followed":
            ledger.followed(rid, a)
        else:
            ledger.end(rid)
        ledger.check()
        if b % 3 == 0:
            for account in ledger.take().values():
                total.add(account)
    for who in range(5):
        ledger.end(f"r{who}")
    for account in ledger.take().values():
        total.add(account)
    assert total.asked == total.hbm + total.loaded + total.missed
    assert min(total.hbm, total.loaded, total.missed) >= 0
    assert total.net_s == pytest.approx(expected, abs=1e-6)
    for tier in total.tiers.values():
        assert tier.saved_s >= 0 and tier.lost_s >= 0 and tier.tokens >= 0
