"""The price of a provider's tokens, such as ``0.02 USD / 1M tokens``."""

from __future__ import annotations

import re
from dataclasses import dataclass
from decimal import ROUND_CEILING, Context, Decimal

from .errors import ConfigError
from .options import BadValue

EXAMPLE = "0.02 USD / 1M tokens"
AMOUNT = r"[0-9]{1,9}(?:\.[0-9]{1,12})?"
CURRENCY = r"[A-Z]{3}"
PATTERN = rf"\s*({AMOUNT})\s*({CURRENCY})(?:\s*/\s*|\s+per\s+)([1-9][0-9]{{0,11}})([KMB]?)\s*tokens?\s*"
"""Pattern of a price, without anchors. Its groups are the amount, the currency, the number of tokens and its unit."""

_UNITS = {"": 1, "K": 1_000, "M": 1_000_000, "B": 1_000_000_000}
_PRICE = re.compile(PATTERN, re.ASCII)
_PRECISE = Context(prec=100)
"""100 digits, which hold the exact product of every valid amount and every number of tokens."""


@dataclass(frozen=True, slots=True)
class Price:
    """An amount of money for a number of tokens."""

    amount: Decimal
    currency: str
    """Three letters, such as USD."""
    tokens: int
    """Number of tokens that ``amount`` pays for."""

    def __post_init__(self) -> None:
        if not isinstance(self.amount, Decimal) or not self.amount.is_finite() or self.amount < 0:
            raise ConfigError(f"the amount of a price must be a finite Decimal of at least 0, got {self.amount!r}")
        if not re.fullmatch(CURRENCY, self.currency):
            raise ConfigError(
                f"the currency of a price must be three capital letters, such as USD, got {_shorten(self.currency)}"
            )
        if type(self.tokens) is not int or self.tokens < 1:
            raise ConfigError(f"the number of tokens of a price must be a whole number above 0, got {self.tokens!r}")

    @classmethod
    def parse(cls, text: str) -> Price:
        """Return the price that a text such as ``0.02 USD / 1M tokens`` states. K, M and B are 10^3, 10^6 and 10^9.

        Raises:
            ConfigError: the text is not a price.
        """
        try:
            return _parse_price(text)
        except BadValue as error:
            hint = f"; {error.hint}" if error.hint else ""
            raise ConfigError(f"a price {error}, got {_shorten(text)}{hint}") from None

    def of(self, tokens: float) -> Decimal:
        """Return the price of a number of tokens.

        It is exact, unless it has no finite decimal expansion. Then it is rounded to 100 digits.
        """
        return _PRECISE.divide(_PRECISE.multiply(self.amount, Decimal(tokens)), Decimal(self.tokens))

    def __str__(self) -> str:
        unit, size = next((unit, size) for unit, size in reversed(_UNITS.items()) if self.tokens % size == 0)
        return f"{self.amount:f} {self.currency} / {self.tokens // size}{unit} token{'' if self.tokens == 1 else 's'}"


def parse_price_option(value: object) -> str:
    """Return the price that an option of a configuration states, in the form ``0.02 USD / 1M tokens``.

    Raises:
        BadValue: the value is not a price.
    """
    return str(_parse_price(value))


def format_money(amount: Decimal, currency: str, *, round_up: bool = False) -> str:
    """Return an amount of money: rounded to cents, or to two significant digits if it is below 1.

    >>> format_money(Decimal("12.3456"), "USD"), format_money(Decimal("0.0012345"), "USD", round_up=True)
    ('12.35 USD', '0.0013 USD')
    """
    if not amount:
        return f"0 {currency}"
    places = max(2, 1 - amount.adjusted())
    # The precision must hold all digits before the point. With the default context, a large amount would be an error.
    context = Context(prec=100, rounding=ROUND_CEILING) if round_up else _PRECISE
    return f"{amount.quantize(Decimal(1).scaleb(-places), context=context):,f} {currency}"


# --- reading a price --------------------------------------------------------------------------


def _parse_price(value: object) -> Price:
    match = _PRICE.fullmatch(value) if isinstance(value, str) else None
    if match is None:
        raise BadValue(f'must be written like "{EXAMPLE}"', hint=_suggest_price(value))
    amount, currency, number, unit = match.groups()
    return Price(Decimal(amount), currency, int(number) * _UNITS[unit])


_SYMBOLS = {"$": "USD", "€": "EUR", "£": "GBP"}
_NUMBER = r"(?P<amount>[0-9]{1,9}(?:\.[0-9]{1,12}|,(?![0-9]{3}(?![0-9]))[0-9]{1,12})?)"
"""The comma may be a decimal comma. If exactly three digits follow, it may also separate thousands."""
_NAME = r"(?P<{}>[A-Za-z]{{3}}|[$€£])"
_LIKE_A_PRICE = re.compile(
    rf"\s*(?:{_NAME.format('before')}\s*)?{_NUMBER}\s*(?:{_NAME.format('after')})?\s*(?:(?:/|per\b|for\b)\s*(?P<tokens>.*))?",
    re.ASCII | re.IGNORECASE | re.DOTALL,
)
_LIKE_TOKENS = re.compile(
    r"(?P<number>[0-9]{1,3}(?:[,_' ][0-9]{3})+|[0-9]{1,12})?\s*(?P<unit>k|m|b|mio|thousand|million|billion)?\s*"
    r"(?:tok(?:en)?s?)?\.?\s*",
    re.ASCII | re.IGNORECASE,
)


def _suggest_price(value: object) -> str:
    """Return how to write a value that looks like a price, or an empty text."""
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        return ""
    found = _LIKE_A_PRICE.fullmatch(str(value))
    if found is None:
        return ""
    amount = f"{Decimal(found['amount'].replace(',', '.')):f}"
    name = found["after"] or found["before"] or ""
    currency = _SYMBOLS.get(name, name.upper())
    tokens = _read_tokens(found["tokens"])
    if currency and tokens:
        return f'write "{Price(Decimal(amount), currency, tokens)}"'
    missing = [*([] if currency else ["the currency"]), *([] if tokens else ["the number of tokens"])]
    example = f"{amount} {currency or 'USD'} / {'1M tokens' if not tokens else _format_tokens(tokens)}"
    return f'add {" and ".join(missing)}, for example "{example}"'


def _format_tokens(tokens: int) -> str:
    return str(Price(Decimal(1), "USD", tokens)).partition(" / ")[2]


def _read_tokens(written: str | None) -> int:
    """Return a number of tokens such as ``1,000 tokens`` or ``million``; return 0 if there is none."""
    found = _LIKE_TOKENS.fullmatch(written) if written else None
    if found is None or not (found["number"] or found["unit"]):
        return 0
    number = int(re.sub("[^0-9]", "", found["number"] or "1"))
    return number * _UNITS[(found["unit"] or "")[:1].upper().replace("T", "K")]


def _shorten(value: object) -> str:
    shown = repr(value)
    return shown if len(shown) <= 60 else f"{shown[:59]}…"
