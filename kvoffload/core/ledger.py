"""Who asked for what, and what loading it saved or cost: by model, tenant and tier.

Pure bookkeeping, in GPU-seconds: wall seconds times the ranks that were busy or waited. What a load
saved is the time the engine would have computed its tokens, less the time until they were there;
where that is negative it is booked as lost, and a load that failed is lost altogether.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from dataclasses import dataclass, field

from kvoffload.types import Tier

DEFAULT = "default"
"""Tenant of requests that name none, and a model without a name."""
OTHER = "other"
"""Tenant (or model) of all that come after the bound."""
INVALID = "invalid"
"""Tenant of requests whose tenant is no text of 1 to 256 characters (core/hints.py)."""
MAX_TENANTS = 64
MAX_SALTS = 64
"""Tenants that are told by their salts: of their own, for there may be one per user."""
SALT = "salt-"
MAX_MODELS = 32
MAX_NAME = 64
_PLAIN = frozenset("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789._:@/+-")
_SALT_KEY = os.urandom(16)


def plain_name(text: str) -> str:
    """``text`` as a label value: letters, digits and ._:@/+- kept, others "_", at most 64."""
    return "".join(c if c in _PLAIN else "_" for c in text[:MAX_NAME])


def tenant_of(named: str | None, salt: str | None) -> str:
    """Tenant of a request.

    ``named``: the ``tenant`` of its hints; "" where a bad one was given, None where none was.
    ``salt``: its ``cache_salt``, which tells tenants apart but is a secret: shown as a digest under
    this process's own random key, so the name changes with every start.
    """
    if named is not None:
        return plain_name(named) or INVALID
    if salt:
        digest = hashlib.blake2b(salt.encode("utf-8", "surrogatepass"), key=_SALT_KEY)
        return SALT + digest.hexdigest()[:12]
    return DEFAULT


@dataclass(slots=True)
class TierAccount:
    """One tier's part. Seconds are GPU-seconds, except ``load_s``: wall seconds of loads."""

    loads: int = 0
    tokens: int = 0  # loaded: not recomputed
    bytes: int = 0  # moved for loads, whether these succeeded or not
    saved_s: float = 0.0
    lost_s: float = 0.0
    load_s: float = 0.0

    def add(self, other: TierAccount) -> None:
        """Fold ``other`` in."""
        self.loads += other.loads
        self.tokens += other.tokens
        self.bytes += other.bytes
        self.saved_s += other.saved_s
        self.lost_s += other.lost_s
        self.load_s += other.load_s


@dataclass(slots=True)
class Account:
    """One tenant's use of one model. Prompt tokens: asked = hbm + loaded (by tier) + missed."""

    requests: int = 0
    asked: int = 0
    hbm: int = 0
    missed: int = 0
    lookup_s: float = 0.0  # wall seconds of the scheduler's lookups that ended in no load
    stored_bytes: int = 0
    tiers: dict[Tier, TierAccount] = field(default_factory=dict)

    @property
    def loaded(self) -> int:
        """Tokens that loads brought."""
        return sum(t.tokens for t in self.tiers.values())

    @property
    def net_s(self) -> float:
        """GPU-seconds saved less lost; negative where the cache cost more than it gave."""
        return sum(t.saved_s - t.lost_s for t in self.tiers.values())

    def tier(self, tier: Tier) -> TierAccount:
        """The tier's part, made when first asked for."""
        return self.tiers.setdefault(tier, TierAccount())

    def add(self, other: Account) -> None:
        """Fold ``other`` in."""
        self.requests += other.requests
        self.asked += other.asked
        self.hbm += other.hbm
        self.missed += other.missed
        self.lookup_s += other.lookup_s
        self.stored_bytes += other.stored_bytes
        for tier, part in other.tiers.items():
            self.tier(tier).add(part)


@dataclass(slots=True)
class _Open:
    """A request under way. ``loaded`` never exceeds ``asked - hbm``: preempted ones load again."""

    who: tuple[str, str]
    asked: int = 0
    hbm: int = 0
    loaded: int = 0
    looked_up: bool = False
    lookup_s: float = 0.0
    load_ordered: bool = False


class Ledger:
    """Accounts by (model, tenant). One thread. Bounded: at most (MAX_MODELS + 1) x (MAX_TENANTS +
    MAX_SALTS + 1); a tenant beyond its bound is booked under OTHER, and so is a model.

    A request is ``begin``-ed, then ``loaded`` or ``failed`` any number of times, then ``end``-ed;
    calls about a request that is not open are ignored, so that an answer may come late. ``ranks``:
    GPUs that one second of the engine occupies.
    """

    def __init__(self, ranks: int = 1) -> None:
        self._ranks = ranks
        self._open: dict[str, _Open] = {}
        self._models: set[str] = set()
        self._tenants: set[str] = set()
        self._salts: set[str] = set()
        self._changed: dict[tuple[str, str], Account] = {}

    def begin(self, request_id: str, model: str, tenant: str) -> None:
        """A request arrived; idempotent."""
        if request_id not in self._open:
            if tenant.startswith(SALT):
                tenant = _bounded(tenant, self._salts, MAX_SALTS)
            else:
                tenant = _bounded(tenant, self._tenants, MAX_TENANTS)
            model = _bounded(plain_name(model) or DEFAULT, self._models, MAX_MODELS)
            self._open[request_id] = _Open((model, tenant))

    def asked(self, request_id: str, prompt_tokens: int, hbm_tokens: int) -> None:
        """Its first lookup: prompt tokens, and how many of these HBM held. Later ones: ignored."""
        it = self._open.get(request_id)
        if it is not None and not it.looked_up:
            it.looked_up = True
            it.asked = prompt_tokens
            it.hbm = min(hbm_tokens, prompt_tokens)

    def followed(self, request_id: str, hbm_tokens: int) -> None:
        """It waited for another request's load, and so finds this much in HBM."""
        it = self._open.get(request_id)
        if it is not None:
            it.hbm = max(it.hbm, min(hbm_tokens, it.asked - it.loaded))

    def lookup(self, request_id: str, seconds: float) -> None:
        """The scheduler spent wall ``seconds`` on looking for it."""
        it = self._open.get(request_id)
        if it is not None:
            it.lookup_s += seconds

    def load(
        self,
        request_id: str,
        tokens: Mapping[Tier, int],
        nbytes: Mapping[Tier, int],
        seconds: float,
        recompute_s: float | None,
        *,
        failed: bool = False,
    ) -> None:
        """A load ended after ``seconds`` of wall time. ``tokens`` and ``nbytes`` by source tier.

        ``recompute_s``: what computing its tokens takes; None: not known, nothing is booked as
        saved. A failed load brought no tokens and lost its time. Seconds and savings are shared
        among tiers by tokens.
        """
        it = self._open.get(request_id)
        if it is None:
            return
        it.load_ordered = True
        account = self._account(it.who)
        whole = sum(tokens.values())
        net = -seconds if failed else None if recompute_s is None else recompute_s - seconds
        for tier, part in tokens.items():
            if part <= 0:
                continue
            share = part / whole
            entry = account.tier(tier)
            entry.loads += 1
            entry.load_s += seconds * share
            if not failed:
                new = min(part, it.asked - it.hbm - it.loaded)
                it.loaded += new
                entry.tokens += new
            if net is not None:
                gpu_s = net * share * self._ranks
                entry.saved_s += max(0.0, gpu_s)
                entry.lost_s += max(0.0, -gpu_s)
        for tier, moved in nbytes.items():
            if moved:
                account.tier(tier).bytes += moved

    def stored(self, request_id: str, nbytes: int) -> None:
        """Chunks of so many bytes were ordered to be stored for it."""
        it = self._open.get(request_id)
        if it is not None and nbytes:
            self._account(it.who).stored_bytes += nbytes

    def end(self, request_id: str) -> None:
        """The request is over; a load of it that is still out is no longer booked."""
        it = self._open.pop(request_id, None)
        if it is None or not it.looked_up:
            return
        account = self._account(it.who)
        account.requests += 1
        account.asked += it.asked
        account.hbm += it.hbm
        account.missed += it.asked - it.hbm - it.loaded
        if not it.load_ordered:
            account.lookup_s += it.lookup_s

    def take(self) -> dict[tuple[str, str], Account]:
        """What was booked since the last call, by (model, tenant); the caller owns it."""
        taken, self._changed = self._changed, {}
        return taken

    def changed(self) -> bool:
        """Whether ``take`` would give anything."""
        return bool(self._changed)

    def _account(self, who: tuple[str, str]) -> Account:
        return self._changed.setdefault(who, Account())

    def __len__(self) -> int:
        return len(self._open)

    def check(self) -> None:
        """Raise AssertionError naming the first broken invariant."""
        assert len(self._models) <= MAX_MODELS and len(self._tenants) <= MAX_TENANTS, "unbounded"
        assert len(self._salts) <= MAX_SALTS, "salts are not bounded"
        for it in self._open.values():
            assert 0 <= it.hbm <= it.asked and 0 <= it.loaded <= it.asked - it.hbm, "tokens"


def _bounded(name: str, known: set[str], most: int) -> str:
    """``name``, or OTHER where it is new and ``most`` are known."""
    if name not in known:
        if len(known) >= most:
            return OTHER
        known.add(name)
    return name
