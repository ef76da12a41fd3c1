"""Work and money in tables: tokens, durations and amounts."""

from __future__ import annotations

from collections.abc import Mapping
from decimal import Decimal
from typing import TYPE_CHECKING, Any

from embedonce._messages import format_count

from .embedding.progress import format_seconds

if TYPE_CHECKING:
    from embedonce.vectors import Work


def format_money(sums: Mapping[str, Decimal]) -> str | None:
    """Return amounts such as ``12.50 USD`` or ``0.00042 USD``; return None if there are none."""
    return ", ".join(f"{_format_amount(amount)} {currency}" for currency, amount in sorted(sums.items())) or None


def _format_amount(amount: Decimal) -> str:
    """Return an amount with two decimals, or with two significant digits if it is below one."""
    if amount >= 1 or amount == 0:
        return f"{amount:,.2f}"
    return f"{amount:.{1 - amount.adjusted()}f}"


def format_work_seconds(work: Work) -> str | None:
    """Return a duration such as ``40 ms``, ``8 s`` or ``3 h 5 min``; return None if no text's seconds are known."""
    if work.texts and work.unknown_seconds == work.texts:
        return None
    return format_seconds(work.seconds) if work.seconds >= 1 else f"{work.seconds * 1000:.3g} ms"


def list_work(work: Work, money: Mapping[str, Decimal]) -> list[Any]:
    """Return the cells of a table for some work: texts, tokens, time and money. A cell is None if it is unknown."""
    has_tokens = work.unknown_tokens < work.texts or not work.texts
    return [
        work.texts,
        work.tokens if has_tokens else None,
        format_work_seconds(work),
        format_money(money) if has_tokens else None,
    ]


def describe_unknown(work: Work, what: str) -> str | None:
    """Return a note about texts whose tokens are unknown, or None. ``what`` is ``"computed"`` or ``"saved"``.

    If no tokens are known at all, the table shows that, and no note is needed.
    """
    if not 0 < work.unknown_tokens < work.texts:
        return None
    texts = format_count(work.unknown_tokens, f"{what} text")
    return f"note: the tokens of {texts} are unknown, and are not included"


def export_work(work: Work, money: Mapping[str, Decimal]) -> dict[str, Any]:
    """Return some work for a JSON document. Amounts are strings, because JSON numbers are not exact."""
    return {**work._asdict(), "money": {currency: f"{amount:f}" for currency, amount in sorted(money.items())}}
