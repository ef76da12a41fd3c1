"""The limit of ``embedonce embed --max-cost``: read it, compare an estimate with it, and ask whether to exceed it."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from decimal import Decimal
from typing import TYPE_CHECKING

import typer

from embedonce.cli.output import Refused
from embedonce.prices import AMOUNT, CURRENCY, EXAMPLE, Price, format_money

from .reading_options import find_stream

if TYPE_CHECKING:
    from embedonce.answers import Estimate
    from embedonce.config import Config

    from .summary import Summary

_LIMIT = re.compile(rf"\s*({AMOUNT})\s*({CURRENCY})?\s*", re.ASCII)


@dataclass(frozen=True, slots=True)
class CostLimit:
    """The most that a run may cost."""

    amount: Decimal
    price: Price
    """Price of the provider's tokens, in the currency of ``amount``."""

    def __str__(self) -> str:
        return f"{self.amount:f} {self.price.currency}"

    def is_exceeded(self, estimate: Estimate) -> bool:
        """Return whether the missing texts may cost more than the limit."""
        return self.price.of(estimate.max_tokens) > self.amount

    def describe_real_excess(self, summary: Summary) -> str | None:
        """Return a note if a run has cost more than the limit, for example because the files have changed."""
        paid = None if summary.spent is None else summary.spent.money.get(self.price.currency)
        if paid is None or Decimal(paid) <= self.amount:
            return None
        shown = format_money(Decimal(paid), self.price.currency, round_up=True)
        return f"note: the run cost {shown}, more than --max-cost {self}"

    def describe_excess(self, estimate: Estimate) -> str:
        """Return a sentence that compares what the missing texts may cost with the limit."""
        most = format_money(self.price.of(estimate.max_tokens), self.price.currency, round_up=True)
        verb = "would cost" if estimate.method == "counted" else "may cost up to"
        return f"a run {verb} {most}, more than --max-cost {self}"


def read_limit(written: str, config: Config) -> CostLimit:
    """Return the limit that an argument such as ``5`` or ``5 USD`` states.

    Raises:
        Refused: the argument is invalid, it names another currency, or the price is unknown.
    """
    match = _LIMIT.fullmatch(written)
    if match is None or not Decimal(match[1]):
        raise Refused(f"--max-cost {written}: must be an amount of money above 0, such as --max-cost 5 or '5.50 USD'")
    amount, currency = Decimal(match[1]), match[2]
    if config.provider is None or config.provider.price is None:
        raise Refused(
            "--max-cost needs the price of the provider's tokens; write it into "
            f'{config.document.table("provider")}, for example: price = "{EXAMPLE}"'
        )
    price = Price.parse(config.provider.price)
    if currency not in (None, price.currency):
        raise Refused(
            f"--max-cost {written}: the price of the provider is in {price.currency}; write the limit in "
            f"{price.currency} too"
        )
    return CostLimit(amount, price)


def check_can_read_twice(paths: Sequence[str]) -> None:
    """Check that all inputs are files and folders, because ``--max-cost`` reads them twice.

    Raises:
        Refused: an input is standard input or a pipe.
    """
    stream = find_stream(paths)
    if stream is not None:
        raise Refused(
            f"--max-cost cannot be used with {stream}: the input is read twice, first to estimate the price. Write "
            "it to a file first, or estimate the price of the same input with --dry-run"
        )


def ask_to_embed(excess: str) -> bool:
    """Ask on the terminal whether to embed although the limit is exceeded. The end of the input means no.

    Raises:
        KeyboardInterrupt: the user pressed Ctrl-C.
    """
    try:
        return typer.confirm(f"{excess[0].upper()}{excess[1:]}. Embed anyway?", err=True)
    except typer.Abort as error:
        if isinstance(error.__context__, KeyboardInterrupt):
            raise error.__context__ from None
        return False
