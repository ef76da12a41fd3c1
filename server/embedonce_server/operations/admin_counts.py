"""The counters of caches as JSON, and their sums over all workers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from decimal import Decimal
from typing import Any

from embedonce.events import Stats
from embedonce.vectors import Work


def describe_stats(stats: Stats) -> dict[str, Any]:
    """Return the counters of a worker. Amounts of money are strings of digits, because they are exact."""
    return {
        "requested": stats.requested,
        "found": stats.found,
        "shared": stats.shared,
        "computed": _describe_work(stats.computed),
        "saved": _describe_work(stats.saved),
        "spent": _describe_money(stats.spent),
        "money_saved": _describe_money(stats.money_saved),
        "tiers": {
            name: {
                **{count: getattr(tier, count) for count in ("hits", "misses", "errors", "corrupt", "skipped")},
                **{count: getattr(tier, count) for count in ("stored", "dropped", "seconds")},
                "causes": dict(tier.causes),
                "drops": dict(tier.drops),
                "is_skipped": tier.is_skipped,
                "last_cause": tier.last_cause,
            }
            for name, tier in stats.tiers.items()
        },
        "providers": {
            name: {
                **{count: getattr(provider, count) for count in ("texts", "failed", "tokens", "seconds")},
                "last_error": provider.last_error,
            }
            for name, provider in stats.providers.items()
        },
    }


def _describe_work(work: Work) -> dict[str, Any]:
    return {"texts": work.texts, "tokens": work.tokens, "seconds": work.seconds}


def _describe_money(amounts: Mapping[str, Decimal]) -> dict[str, str]:
    return {currency: f"{amount:f}" for currency, amount in amounts.items()}


_MONEY = ("spent", "money_saved")


def _add_money(workers: Sequence[Mapping[str, str]]) -> dict[str, str]:
    sums: dict[str, Decimal] = {}
    for amounts in workers:
        for currency, amount in amounts.items():
            sums[currency] = sums.get(currency, Decimal(0)) + Decimal(amount)
    return _describe_money(sums)


def add_counts(workers: Sequence[Any]) -> Any:
    """Return the sum of the counters of workers, item by item.

    Numbers and amounts of money are added. Of other values, such as the last error of a tier, the first that is set is
    kept.
    """
    present = [value for value in workers if value is not None]
    if not present:
        return None
    first = present[0]
    if isinstance(first, dict):
        names = dict.fromkeys(name for value in present for name in value)
        return {
            name: (_add_money if name in _MONEY else add_counts)([value[name] for value in present if name in value])
            for name in names
        }
    if isinstance(first, bool):
        return any(present)
    if isinstance(first, int | float):
        return sum(present)
    return first
