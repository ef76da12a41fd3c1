"""The ledger. It counts the work in each vector space: work that a provider has done, and work that hits have saved."""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence

from embedonce.events import SpaceStats
from embedonce.keys import Value
from embedonce.prices import Price
from embedonce.vectors import NO_WORK, CostColumns, Work, sum_costs

MAX_SPACES = 1024
"""Maximum number of scopes with counts of their own. The work in all further scopes is counted under :data:`OTHERS`."""
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


class Ledger:
    """Counts the work in each vector space. Many threads use it."""

    def __init__(self, tiers: list[str]) -> None:
        self._tiers = tiers
        self._cards: dict[str, Mapping[str, Value]] = {}
        self._prices: dict[str, Price | None] = {}
        self._computed: dict[str, Work] = {}
        self._saved: dict[str, dict[str, Work]] = {}
        """Work by scope and tier."""
        self._unsummed: dict[tuple[str, str], list[CostColumns]] = {}
        """Costs by scope and tier, of hits that are not part of ``_saved`` yet. Adding up each batch alone would take
        more than a hundredth of the time of the batch."""
        self._hot_hits: dict[str, HotHits] = {}
        """Hits of the first tier, by scope."""
        self.renew_lock()

    def renew_lock(self) -> None:
        """Create a new lock. A forked child calls this too.

        The lock is re-entrant, because a signal handler may use the cache.
        """
        self._lock = threading.RLock()

    def add_space(self, scope: str, card: Mapping[str, Value], price: Price | None) -> None:
        """Store the card and the price of a scope. Call this before any work in the scope is counted."""
        with self._lock:
            if self._choose_scope(scope) == scope:
                self._cards[scope] = card
                self._prices[scope] = price

    def count_hot_hits(self) -> int:
        """Return the number of hits on the fast path."""
        with self._lock:
            return sum(hits.texts for hits in self._hot_hits.values())

    def get_hot_hits(self, scope: str) -> HotHits:
        """Return the counts of a scope on the fast path."""
        with self._lock:
            return self._hot_hits.setdefault(self._choose_scope(scope), HotHits())

    def count_computed(self, scope: str, work: Work) -> None:
        """Count work that a provider has done."""
        with self._lock:
            scope = self._choose_scope(scope)
            self._computed[scope] = self._computed.get(scope, NO_WORK) + work

    def count_saved(self, scope: str, tier: str, costs: Sequence[CostColumns]) -> None:
        """Count the work that hits of a tier have saved, from the costs of their entries."""
        with self._lock:
            scope = self._choose_scope(scope)
            unsummed = self._unsummed.setdefault((scope, tier), [])
            unsummed += costs
            if len(unsummed) >= MAX_UNSUMMED:
                self._sum_saved(scope, tier)

    def _sum_saved(self, scope: str, tier: str) -> None:
        """Add up the costs that were only collected so far. Hold the lock."""
        unsummed = self._unsummed.pop((scope, tier), [])
        if unsummed:
            saved = self._saved.setdefault(scope, {})
            saved[tier] = saved.get(tier, NO_WORK) + sum_costs(unsummed)

    def _choose_scope(self, scope: str) -> str:
        """Return the scope under which the work of a scope is counted. Hold the lock."""
        if scope in self._hot_hits or len(self._hot_hits) < MAX_SPACES:
            self._hot_hits.setdefault(scope, HotHits())
            return scope
        return OTHERS

    def read(self) -> dict[str, SpaceStats]:
        """Return the work in each scope in which there was any."""
        with self._lock:
            for scope, tier in list(self._unsummed):
                self._sum_saved(scope, tier)
            spaces = {}
            for scope, hot in list(self._hot_hits.items()):
                saved = dict(self._saved.get(scope, {}))
                if hot.texts:
                    saved[self._tiers[0]] = saved.get(self._tiers[0], NO_WORK) + hot.read()
                computed = self._computed.get(scope, NO_WORK)
                if saved or computed != NO_WORK:
                    spaces[scope] = SpaceStats(
                        card=self._cards.get(scope, {}),
                        computed=computed,
                        saved={tier: saved[tier] for tier in self._tiers if tier in saved},
                        price=self._prices.get(scope),
                    )
            return spaces
