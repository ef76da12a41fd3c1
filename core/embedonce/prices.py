"""The price of a provider's tokens, such as ``0.02 USD / 1M tokens``."""

from __future__ import annotations

import re
from dataclasses import dataclass
from decimal import Decimal

from .errors import ConfigError

_UNITS = {"": 1, "K": 1_000, "M": 1_000_000, "B": 1_000_000_000}
_PRICE = re.compile(
    r"\s*(?P<amount>[0-9]+(?:\.[0-9]+)?)\s*(?P<currency>[A-Z]{3})\s*/"
    r"\s*(?P<tokens>[0-9]+|[0-9]{1,3}(?:_[0-9]{3})+)?\s*(?P<unit>[KMB]?)\s*tokens?\s*"
)
EXAMPLE = "0.02 USD / 1M tokens"


@dataclass(frozen=True, slots=True)
class Price:
    """An amount of money for a number of tokens."""

    amount: Decimal
    currency: str
    """Three letters, such as USD."""
    tokens: int
    """Number of tokens that ``amount`` pays for."""

    @classmethod
    def parse(cls, text: str) -> Price:
        """Return the price that a text such as ``0.02 USD / 1M tokens`` states. K, M and B are 10^3, 10^6 and 10^9.

        Raises:
            ConfigError: the text is not a price.
        """
        match = _PRICE.fullmatch(text) if isinstance(text, str) else None
        tokens = 0 if match is None else int(match["tokens"] or 1) * _UNITS[match["unit"]]
        if match is None or tokens == 0:
            raise ConfigError(f'a price must be written like "{EXAMPLE}", got {text!r}')
        return cls(Decimal(match["amount"]), match["currency"], tokens)

    def of(self, tokens: float) -> Decimal:
        """Return the price of a number of tokens, exactly."""
        return self.amount * Decimal(tokens) / self.tokens

    def __str__(self) -> str:
        for unit, size in reversed(_UNITS.items()):
            if self.tokens % size == 0:
                return f"{self.amount} {self.currency} / {self.tokens // size}{unit} tokens"
        raise AssertionError("every number of tokens is a multiple of 1")
