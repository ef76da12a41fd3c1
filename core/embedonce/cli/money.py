"""Format work and money for tables and JSON documents."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from decimal import Decimal
from typing import TYPE_CHECKING, Any

from embedonce._messages import format_count
from embedonce.prices import format_money

from .embedding.progress import format_seconds

if TYPE_CHECKING:
    from embedonce.vectors import Work


@dataclass(frozen=True, slots=True)
class SummedCost:
    """Cost of some texts. Texts whose cost is unknown are counted separately, so that they do not count as free."""

    texts: int
    tokens: int | None
    """Tokens of the texts whose tokens are known; None if there are texts, but the tokens of none are known."""
    seconds: float | None
    """Seconds of computation of the texts whose seconds are known; None if there are texts, but the seconds of none are
    known. Seconds of simultaneous calls are added up."""
    money: dict[str, str]
    """Price of ``tokens`` by currency. It is empty if the configuration has no price, or if ``tokens`` is None."""
    unknown_tokens: int
    """Number of texts whose tokens are unknown."""
    unknown_seconds: int
    """Number of texts whose seconds are unknown."""


def sum_cost(work: Work, money: Mapping[str, Decimal]) -> SummedCost:
    """Return the cost of some work, whose price by currency is ``money``."""
    is_known = work.unknown_tokens < work.texts or not work.texts
    return SummedCost(
        texts=work.texts,
        tokens=work.tokens if is_known else None,
        seconds=round(work.seconds, 3) if work.unknown_seconds < work.texts or not work.texts else None,
        money={currency: f"{amount:f}" for currency, amount in money.items()} if is_known else {},
        unknown_tokens=work.unknown_tokens,
        unknown_seconds=work.unknown_seconds,
    )


def format_sums(sums: Mapping[str, Decimal]) -> str | None:
    """Return amounts such as ``12.50 USD, 3.00 EUR``; return None if there are none."""
    return ", ".join(format_money(amount, currency) for currency, amount in sorted(sums.items())) or None


def format_work_seconds(work: Work) -> str | None:
    """Return a duration such as ``40 ms``, ``8 s`` or ``3 h 5 min``; return None if no text's seconds are known."""
    if work.texts and work.unknown_seconds == work.texts:
        return None
    return format_seconds(work.seconds) if work.seconds >= 1 else f"{work.seconds * 1000:.3g} ms"


def list_cells(work: Work, money: Mapping[str, Decimal]) -> list[Any]:
    """Return the cells of a table for some work: texts, tokens, time and money. A cell is None if it is unknown."""
    cost = sum_cost(work, money)
    return [cost.texts, cost.tokens, format_work_seconds(work), format_sums(money) if cost.money else None]


def describe_unknown(computed: Work, saved: Work) -> Iterator[str]:
    """Yield a note for each of the two works in which some texts have unknown tokens.

    If no tokens are known at all, the table shows that, and no note is needed.
    """
    for word, work in (("computed", computed), ("saved", saved)):
        if 0 < work.unknown_tokens < work.texts:
            texts = format_count(work.unknown_tokens, f"{word} text")
            yield f"note: the tokens of {texts} are unknown and not included"
