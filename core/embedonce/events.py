"""Events for listeners, and statistics. No event contains a text or a key."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from decimal import Decimal
from typing import Literal, TypeAlias

from ._messages import format_count, quote_toml_key
from ._reprs import format_percent, make_html_table
from .keys import Value
from .prices import Price, format_money
from .vectors import NO_WORK, Work


def sum_prices(items: Iterable[tuple[Price | None, Work]]) -> dict[str, Decimal]:
    """Return the price of the tokens of all items whose price is known, by currency."""
    sums: dict[str, Decimal] = {}
    for price, work in items:
        if price is not None:
            sums[price.currency] = sums.get(price.currency, Decimal(0)) + price.of(work.tokens)
    return sums


@dataclass(frozen=True, slots=True, kw_only=True)
class LookedUp:
    """Some keys were looked up in a tier. The counts are numbers of texts."""

    tier: str
    task: str
    hits: int = 0
    misses: int = 0
    errors: int = 0
    corrupt: int = 0
    skipped: int = 0
    seconds: float = 0.0
    cause: str | None = None
    """Cause of ``errors``: ``"timeout"``, ``"busy_loop"`` or the exception's class name."""
    scope: str = ""
    saved: Work = NO_WORK
    """The work that the hits have saved, according to the costs that are stored with the entries."""
    price: Price | None = None
    """The price of the provider's tokens, or None if it is unknown. ``price.of(saved.tokens)`` is the money saved."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Stored:
    """Entries were written to a tier, or dropped."""

    tier: str
    stored: int = 0
    dropped: int = 0
    errors: int = 0
    seconds: float = 0.0
    cause: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Computed:
    """A request to a provider ended."""

    provider: str
    task: str
    texts: int
    """Number of texts that got a vector."""
    failed: int = 0
    """Number of texts that got no vector from this request. If a text is sent again, each failed request counts it."""
    tokens: int | None = None
    seconds: float = 0.0
    fallback: bool = False
    scope: str = ""
    price: Price | None = None
    """The price of the provider's tokens, or None if it is unknown. ``price.of(tokens)`` is the money spent."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TierChanged:
    """A tier's breaker opened or closed."""

    tier: str
    state: Literal["open", "closed"]
    operation: Literal["read", "write"]
    cause: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Imported:
    """An importer was asked for texts that no tier has. The counts are numbers of texts."""

    importer: str
    task: str
    found: int = 0
    missing: int = 0
    invalid: int = 0
    """Texts whose vector the source has, but it is unreadable or invalid."""
    errors: int = 0
    skipped: int = 0
    seconds: float = 0.0
    cause: str | None = None
    """Cause of ``errors``: ``"timeout"``, ``"busy_loop"`` or the exception's class name."""
    scope: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class ImporterChanged:
    """The breaker of an importer opened or closed."""

    importer: str
    state: Literal["open", "closed"]
    cause: str | None = None


Event: TypeAlias = LookedUp | Stored | Computed | TierChanged | Imported | ImporterChanged

Verification: TypeAlias = Literal["off", "unverified", "verified", "refused"]
"""Whether the vectors of an importer are known to be those of the provider. With ``"unverified"``, texts that it finds
are computed as well. With ``"refused"``, it is not asked any more."""


@dataclass(frozen=True, slots=True)
class TierStats:
    """Counters of a tier since the cache was created. The counts are numbers of texts."""

    hits: int
    misses: int
    errors: int
    corrupt: int
    skipped: int
    stored: int
    dropped: int
    seconds: float
    """Seconds spent in calls to the tier. If the first tier is a memory tier, its hits of single texts are not
    included, because reading the clock would take as long as such a hit."""
    causes: Mapping[str, int]
    """Errors by cause: ``"timeout"``, ``"busy_loop"`` or the exception's class name."""
    drops: Mapping[str, int]
    """Dropped entries by cause: ``"too large"``, ``"queue full"`` or ``"skipped"`` (the breaker was open)."""
    saved: Work = NO_WORK
    """The work that the hits have saved."""
    is_skipped: bool = False
    """Whether the breaker is open now, so that reads or writes skip the tier until a probe succeeds."""
    last_cause: str | None = None
    """Cause of the last error, as in ``causes``; None if there was no error."""

    @property
    def hit_rate(self) -> float | None:
        """Share of hits among hits and misses, from 0 to 1; None if both are 0. Errors do not count."""
        return self.hits / (self.hits + self.misses) if self.hits + self.misses else None


@dataclass(frozen=True, slots=True)
class ImporterStats:
    """Counters of an importer since the cache was created. The counts are numbers of texts."""

    imported: int
    """Texts whose vector came from the importer."""
    found: int
    """Texts that the importer had, including those that were computed to verify it."""
    missing: int
    invalid: int
    """Texts whose vector the source has, but it is unreadable or invalid."""
    errors: int
    skipped: int
    """Texts for which it was not asked, because its breaker was open or its source was still being read."""
    seconds: float
    causes: Mapping[str, int]
    """Errors by cause: ``"timeout"``, ``"busy_loop"`` or the exception's class name."""
    verification: Verification
    is_skipped: bool = False
    """Whether the breaker is open now."""
    last_cause: str | None = None
    """Cause of the last error, as in ``causes``; None if there was no error."""


@dataclass(frozen=True, slots=True)
class ProviderStats:
    """Counters of a provider since the cache was created."""

    texts: int
    """Number of texts that the provider embedded, because no tier had them."""
    failed: int
    """Number of texts that failed in the end. A text that is sent several times counts once."""
    tokens: int
    seconds: float
    last_error: str | None = None
    """Class name of the last error, if the provider has embedded nothing since; else None. Errors that concern only
    their text do not count."""


@dataclass(frozen=True, slots=True)
class SpaceStats:
    """The work in one vector space since the cache was created: computed by the provider, and saved by hits."""

    card: Mapping[str, Value]
    """The space card: the provider, the model, the task, the version, the namespace and the other parts of the scope.
    Empty for the scope ``"others"``, under which work is counted if there are more than 1,024 scopes."""
    computed: Work
    saved: Mapping[str, Work]
    """The work that hits have saved, by tier."""
    price: Price | None = None
    """The price of the provider's tokens, or None if it is unknown. If there are several prices, this is the first."""
    parts: Sequence[SpaceStats] = ()
    """The work at each price, if providers with different prices share the space. Empty if there is only one price."""

    def split_prices(self) -> Sequence[SpaceStats]:
        """Return the work at each price: ``parts``, or this object alone if there is only one price."""
        return self.parts or (self,)

    @property
    def all_saved(self) -> Work:
        """The work that the hits of all tiers have saved."""
        return sum(self.saved.values(), NO_WORK)


@dataclass(frozen=True, slots=True)
class Stats:
    """The counters that ``Cache.stats`` returns, by the names of tiers and providers."""

    tiers: Mapping[str, TierStats]
    providers: Mapping[str, ProviderStats]
    shared: int
    """Number of texts whose vector another call was already computing."""

    requested: int = 0
    """Number of texts that calls requested. Equal texts in one call count once."""
    found: int = 0
    """Number of requested texts that some tier had."""
    passed_by: int = 0
    """Number of calls of a wrapped client that did not use the cache, because their answers cannot be cached."""
    spaces: Mapping[str, SpaceStats] = field(default_factory=dict)
    """The work in each vector space, by scope."""
    importers: Mapping[str, ImporterStats] = field(default_factory=dict)
    """The counters of the importers, by name."""

    @property
    def imported(self) -> int:
        """Number of texts whose vector came from an importer. They are neither hits nor computed."""
        return sum(importer.imported for importer in self.importers.values())

    @property
    def computed(self) -> Work:
        """The work that providers have done."""
        return sum((space.computed for space in self.spaces.values()), NO_WORK)

    @property
    def saved(self) -> Work:
        """The work that hits have saved."""
        return sum((space.all_saved for space in self.spaces.values()), NO_WORK)

    @property
    def spent(self) -> Mapping[str, Decimal]:
        """The price of the computed tokens, by currency, for the spaces whose price is known."""
        return sum_prices(
            (part.price, part.computed) for space in self.spaces.values() for part in space.split_prices()
        )

    @property
    def money_saved(self) -> Mapping[str, Decimal]:
        """The price of the saved tokens, by currency, for the spaces whose price is known."""
        return sum_prices(
            (part.price, part.all_saved) for space in self.spaces.values() for part in space.split_prices()
        )

    @property
    def hit_rate(self) -> float | None:
        """Share of the requested texts that some tier had, from 0 to 1; None before the first request."""
        return self.found / self.requested if self.requested else None

    def __repr__(self) -> str:
        rates = ", ".join(
            f"{quote_toml_key(name)} {format_percent(tier.hit_rate)}" for name, tier in self.tiers.items()
        )
        computed = sum(provider.texts for provider in self.providers.values())
        failed = sum(provider.failed for provider in self.providers.values())
        passed_by = f", {format_count(self.passed_by, 'call')} passed by" if self.passed_by else ""
        imported = f"{self.imported:,} imported, " if self.importers else ""
        return (
            f"<Stats hit rate {format_percent(self.hit_rate)}{f' ({rates})' if rates else ''}, "
            f"{imported}{computed:,} computed, {failed:,} failed, {self.shared:,} shared{passed_by}"
            f"{self._describe_saved()}>"
        )

    def _describe_saved(self) -> str:
        """Return the tokens and the money that hits have saved, if the tokens of any hit are known."""
        saved = self.saved
        if saved.unknown_tokens == saved.texts:
            return ""
        money = "".join(f" ({format_money(amount, currency)})" for currency, amount in sorted(self.money_saved.items()))
        return f", {format_count(saved.tokens, 'token')} saved{money}"

    def _repr_html_(self) -> str:
        """Return a table with a row for each tier and provider, for notebooks."""
        rows: list[tuple[object, ...]] = [
            (
                name,
                format_percent(tier.hit_rate),
                *(f"{number:,}" for number in (tier.hits, tier.misses, tier.errors, tier.corrupt, tier.skipped)),
                f"{tier.stored:,}",
                f"{tier.dropped:,}",
                f"{tier.seconds:.3f}",
                f"{tier.saved.tokens:,}",
                f"{tier.saved.seconds:.3f}",
            )
            for name, tier in self.tiers.items()
        ]
        providers = ", ".join(
            f"{name}: {provider.texts:,} computed, {provider.failed:,} failed, {provider.seconds:.3f} s"
            for name, provider in self.providers.items()
        )
        importers = ", ".join(f"{name}: {importer.imported:,} imported" for name, importer in self.importers.items())
        parts = [f"hit rate {format_percent(self.hit_rate)}", importers, providers, f"{self.shared:,} shared"]
        parts += [f"{format_count(self.passed_by, 'call')} passed by"] if self.passed_by else []
        title = "Stats: " + "; ".join(part for part in parts if part)
        counts = ("hits", "misses", "errors", "corrupt", "skipped", "stored", "dropped")
        head = ("tier", "hit rate", *counts, "seconds", "saved tokens", "saved seconds")
        return make_html_table(title, head, rows)
