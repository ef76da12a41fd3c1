"""The ledger. It counts the work in each vector space: work that a provider has done, and work that hits have saved."""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from typing import TypeAlias

from embedonce.events import SpaceStats
from embedonce.keys import Value
from embedonce.prices import Price
from embedonce.vectors import NO_WORK, CostColumns, Work, sum_costs

MAX_SPACES = 1024
"""Maximum number of accounts with counts of their own. All further work is counted under :data:`OTHERS`."""
OTHERS = "others"
MAX_UNSUMMED = 64
"""Number of reads of a tier whose costs are added up together."""


class HotHits:
    """Hits of single texts in one scope on the fast path, which takes no lock.

    The fast path adds to these counts without a lock. No count is lost, because CPython changes threads, and runs
    signal handlers, only at calls and at the ends of loops, and ``hits.texts += 1`` has neither.
    """

    __slots__ = ("seconds", "texts", "tokens", "unknown_seconds", "unknown_tokens")

    def __init__(self) -> None:
        self.texts = 0
        self.tokens = 0
        self.seconds = 0.0
        self.unknown_tokens = 0
        self.unknown_seconds = 0

    def read(self) -> Work:
        return Work(self.texts, self.tokens, self.seconds, self.unknown_tokens, self.unknown_seconds)


Account: TypeAlias = tuple[str, Price | None]
"""A scope and a price. Two providers of one space may have different prices, for example a fallback with the same model
at another endpoint."""

OTHER_ACCOUNT: Account = (OTHERS, None)


class Ledger:
    """Counts the work in each vector space, at each price. Many threads use it."""

    def __init__(self, tiers: list[str]) -> None:
        self._tiers = tiers
        self._cards: dict[str, Mapping[str, Value]] = {}
        self._computed: dict[Account, Work] = {}
        self._saved: dict[Account, dict[str, Work]] = {}
        """Work by account and tier."""
        self._unsummed: list[tuple[str, Price | None, str, Sequence[CostColumns]]] = []
        """Scope, price, tier and costs of hits that are not part of ``_saved`` yet. Adding up each batch alone would
        take more than a hundredth of the time of the batch."""
        self._hot_hits: dict[Account, HotHits] = {}
        """Hits of the first tier, by account."""
        self.renew_lock()

    def renew_lock(self) -> None:
        """Create a new lock. A forked child calls this too.

        The lock is re-entrant, because a signal handler may use the cache.
        """
        self._lock = threading.RLock()

    def add_space(self, scope: str, card: Mapping[str, Value], price: Price | None) -> None:
        """Store the card of a scope. Call this before any work in the scope is counted at this price."""
        with self._lock:
            if self._choose_account(scope, price) != OTHER_ACCOUNT:
                self._cards[scope] = card

    def count_hot_hits(self) -> int:
        """Return the number of hits on the fast path."""
        with self._lock:
            return sum(hits.texts for hits in self._hot_hits.values())

    def get_hot_hits(self, scope: str, price: Price | None) -> HotHits:
        """Return the counts of a scope on the fast path."""
        with self._lock:
            return self._hot_hits[self._choose_account(scope, price)]

    def count_computed(self, scope: str, price: Price | None, work: Work) -> None:
        """Count work that a provider has done."""
        with self._lock:
            account = self._choose_account(scope, price)
            self._computed[account] = self._computed.get(account, NO_WORK) + work

    def count_saved(self, scope: str, price: Price | None, tier: str, costs: Sequence[CostColumns]) -> None:
        """Count the work that hits of a tier have saved, from the costs of their entries."""
        unsummed = self._unsummed
        unsummed.append((scope, price, tier, costs))  # one step for other threads, so it needs no lock
        if len(unsummed) >= MAX_UNSUMMED:
            with self._lock:
                self._sum_saved()

    def _sum_saved(self) -> None:
        """Add up the costs that were only collected so far. Hold the lock."""
        collected = self._unsummed[:]
        del self._unsummed[: len(collected)]
        groups: dict[tuple[Account, str], list[CostColumns]] = {}
        for scope, price, tier, costs in collected:
            groups.setdefault((self._choose_account(scope, price), tier), []).extend(costs)
        for (account, tier), columns in groups.items():
            saved = self._saved.setdefault(account, {})
            saved[tier] = saved.get(tier, NO_WORK) + sum_costs(columns)

    def _choose_account(self, scope: str, price: Price | None) -> Account:
        """Return the account under which work is counted. Hold the lock."""
        account = (scope, price)
        if account not in self._hot_hits:
            if len(self._hot_hits) >= MAX_SPACES:
                account = OTHER_ACCOUNT
            self._hot_hits.setdefault(account, HotHits())  # an account without hits is read too
        return account

    def read_accounts(self) -> dict[Account, SpaceStats]:
        """Return the work at each price in each scope in which there was any."""
        with self._lock:
            self._sum_saved()
            accounts = {}
            for account, hot in list(self._hot_hits.items()):
                scope, price = account
                saved = dict(self._saved.get(account, {}))
                if hot.texts:
                    saved[self._tiers[0]] = saved.get(self._tiers[0], NO_WORK) + hot.read()
                computed = self._computed.get(account, NO_WORK)
                if saved or computed != NO_WORK:
                    accounts[account] = SpaceStats(
                        card=self._cards.get(scope, {}),
                        computed=computed,
                        saved={tier: saved[tier] for tier in self._tiers if tier in saved},
                        price=price,
                    )
            return accounts

    def read(self) -> dict[str, SpaceStats]:
        """Return the work in each scope in which there was any."""
        parts: dict[str, list[SpaceStats]] = {}
        for (scope, _), part in self.read_accounts().items():
            parts.setdefault(scope, []).append(part)
        return {scope: _merge(of_scope) for scope, of_scope in parts.items()}


def _merge(parts: list[SpaceStats]) -> SpaceStats:
    """Return the work in one scope at all prices."""
    if len(parts) == 1:
        return parts[0]
    saved: dict[str, Work] = {}
    for part in parts:
        for tier, work in part.saved.items():
            saved[tier] = saved.get(tier, NO_WORK) + work
    return SpaceStats(
        card=parts[0].card,
        computed=sum((part.computed for part in parts), NO_WORK),
        saved=saved,
        price=next((part.price for part in parts if part.price is not None), None),
        parts=tuple(parts),
    )
