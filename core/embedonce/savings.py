"""Add up what caches have computed and saved, over processes and days.

Each process records its work in its slowest tier that can list its keys and outlives the process. It has one record per
vector space and day. The records contain numbers and the names of models, namespaces and tiers. They contain no texts
and no keys.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from decimal import Decimal
from typing import Literal, TypeAlias

from ._messages import format_count, quote_toml_key
from .events import sum_prices
from .prices import Price
from .vectors import NO_WORK, Work

Group: TypeAlias = Literal["tier", "model", "namespace", "day"]


@dataclass(frozen=True, slots=True)
class SavingsRecord:
    """The work of one process in one vector space on one day."""

    day: str
    """The date in UTC, such as ``2026-11-30``."""
    scope: str
    process: str
    """A random name. Each cache of a process has its own name, and so has a forked child."""
    provider: str
    model: str
    task: str
    version: str
    namespace: str
    computed: Work
    saved: Mapping[str, Work]
    """The work that hits have saved, by tier."""
    price: Price | None = None
    """The price of the provider's tokens on that day, or None if it was unknown."""

    @property
    def all_saved(self) -> Work:
        """The work that the hits of all tiers have saved."""
        return sum(self.saved.values(), NO_WORK)


@dataclass(frozen=True, slots=True)
class Savings:
    """The work that some records add up to."""

    computed: Work = NO_WORK
    saved: Work = NO_WORK
    spent: Mapping[str, Decimal] = field(default_factory=dict)
    """Price of the computed tokens, by currency. Tokens whose price is unknown are not included."""
    money_saved: Mapping[str, Decimal] = field(default_factory=dict)
    """Price of the saved tokens, by currency. Tokens whose price is unknown are not included."""


@dataclass(frozen=True, slots=True, repr=False)
class FoundSavings:
    """The records that were found in the tiers, and the tiers that could not be read."""

    records: list[SavingsRecord]
    errors: Mapping[str, str]
    """The reason, for each tier that failed."""
    tiers: list[str]
    """The tiers that were read. A memory tier, and a tier that cannot list its keys, keep no records."""

    def __repr__(self) -> str:
        failed = f", failed: {', '.join(map(quote_toml_key, self.errors))}" if self.errors else ""
        tiers = ", ".join(map(quote_toml_key, self.tiers)) or "no tier"
        return f"<FoundSavings {format_count(len(self.records), 'record')} in {tiers}{failed}>"


def add_up(records: Iterable[SavingsRecord]) -> Savings:
    """Return the work that the records add up to."""
    records = list(records)
    return Savings(
        sum((record.computed for record in records), NO_WORK),
        sum((record.all_saved for record in records), NO_WORK),
        sum_prices((record.price, record.computed) for record in records),
        sum_prices((record.price, record.all_saved) for record in records),
    )


def group_savings(records: Iterable[SavingsRecord], by: Group) -> dict[str, Savings]:
    """Return what the records of each group add up to. The group with the most saved texts is first; days are in order.

    By ``"tier"``, the work that providers have done is in the group ``"provider"``.
    """
    records = list(records)
    if by == "tier":
        return _group_by_tier(records)
    groups: dict[str, list[SavingsRecord]] = {}
    for record in records:
        groups.setdefault(getattr(record, by), []).append(record)
    sums = {name: add_up(group) for name, group in groups.items()}
    if by == "day":
        return dict(sorted(sums.items()))
    return dict(sorted(sums.items(), key=lambda item: (-item[1].saved.texts, -item[1].computed.texts, item[0])))


def group_by_scope(records: Iterable[SavingsRecord]) -> dict[str, list[SavingsRecord]]:
    """Return the records of each scope, in the order of their days."""
    groups: dict[str, list[SavingsRecord]] = {}
    for record in sorted(records, key=lambda record: (record.scope, record.day)):
        groups.setdefault(record.scope, []).append(record)
    return groups


def _group_by_tier(records: list[SavingsRecord]) -> dict[str, Savings]:
    names = dict.fromkeys(name for record in records for name in record.saved)
    sums = {
        name: Savings(
            saved=sum((record.saved.get(name, NO_WORK) for record in records), NO_WORK),
            money_saved=sum_prices((record.price, record.saved.get(name, NO_WORK)) for record in records),
        )
        for name in names
    }
    sums = dict(sorted(sums.items(), key=lambda item: (-item[1].saved.texts, item[0])))
    whole = add_up(records)
    if whole.computed != NO_WORK:
        sums["provider"] = Savings(computed=whole.computed, spent=whole.spent)
    return sums
