"""Prices of tokens: how they are written, and what a number of tokens costs."""

from __future__ import annotations

from decimal import Decimal
from fractions import Fraction
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from embedonce import Cache
from embedonce.errors import ConfigError
from embedonce.prices import EXAMPLE, Price, format_money

AMOUNTS = st.decimals(min_value=0, max_value=999_999_999, places=12)
CURRENCIES = st.text("ABCDEFGHIJKLMNOPQRSTUVWXYZ", min_size=3, max_size=3)
ROUND = st.sampled_from([1, 10**3, 500_000, 10**6, 2**20, 10**9])
"""Numbers of tokens without prime factors other than 2 and 5: a share of an amount has finitely many decimals."""


@given(st.builds(Price, AMOUNTS, CURRENCIES, ROUND | st.integers(1, 10**12 - 1)))
def test_a_price_is_parsed_back_from_its_text(price: Price) -> None:
    assert Price.parse(str(price)) == price


@given(st.builds(Price, AMOUNTS, CURRENCIES, ROUND), st.integers(0, 2**60))
def test_the_price_of_tokens_is_exact(price: Price, tokens: int) -> None:
    assert Fraction(price.of(tokens)) == Fraction(price.amount) * tokens / price.tokens


def test_a_price_without_finite_decimals_is_rounded() -> None:
    assert str(Price.parse("1 USD / 3 tokens").of(2))[:20] == "0." + "6" * 18


@pytest.mark.parametrize(
    "written",
    [
        EXAMPLE,
        "0.02USD/1Mtokens",
        "  0.02 USD per 1M tokens\n",
        "0.020 USD / 1000K tokens",
        "0.02 USD / 1000000 token",
        "20 USD / 1B tokens",
    ],
)
def test_spacing_and_units_are_free(written: str) -> None:
    assert Price.parse(written).of(10**6) == Decimal("0.02")
    assert Price.parse(written).currency == "USD"


@pytest.mark.parametrize(
    ("written", "advice"),
    [
        ("$0.02 / 1M tokens", 'write "0.02 USD / 1M tokens"'),
        ("$0.02 CAD / 1M tokens", 'write "0.02 CAD / 1M tokens"'),
        ("0,02 € / 1M tokens", 'write "0.02 EUR / 1M tokens"'),
        ("USD 0.13 per million", 'write "0.13 USD / 1M tokens"'),
        ("0.0001 usd/1k tokens", 'write "0.0001 USD / 1K tokens"'),
        ("2 USD / 1,000,000 tokens", 'write "2 USD / 1M tokens"'),
        ("2 USD / 1_500 tokens", 'write "2 USD / 1500 tokens"'),
        ("2 USD / M tokens", 'write "2 USD / 1M tokens"'),
        ("2 USD / tokens", 'add the number of tokens, for example "2 USD / 1M tokens"'),
        ("2 USD / 0 tokens", 'add the number of tokens, for example "2 USD / 1M tokens"'),
        ("0.02 usd", 'add the number of tokens, for example "0.02 USD / 1M tokens"'),
        ("0.02 / 1K tokens", 'add the currency, for example "0.02 USD / 1K tokens"'),
        (0.5, 'add the currency and the number of tokens, for example "0.5 USD / 1M tokens"'),
        (2, 'add the currency and the number of tokens, for example "2 USD / 1M tokens"'),
    ],
)
def test_other_spellings_are_refused_with_the_right_one(written: Any, advice: str) -> None:
    with pytest.raises(ConfigError) as caught:
        Price.parse(written)
    assert str(caught.value).startswith(f'a price must be written like "{EXAMPLE}", got {written!r}; ')
    assert str(caught.value).endswith(advice)
    if advice.startswith("write"):
        Price.parse(advice.split('"')[1])


NO_PRICES: list[Any] = [
    *("", "free", "-1 USD / 1M tokens", "1e3 USD / 1M tokens", "1,000 USD / 1B tokens", "nan USD / 1M tokens"),
    *("٣ USD / 1M tokens", "1" * 5000 + " USD / 1M tokens", "1 USD / " + "1" * 5000 + " tokens"),
    *(None, True, 1e-7, float("nan"), [EXAMPLE]),
]


@pytest.mark.parametrize("written", NO_PRICES)
def test_what_is_no_price_is_refused(written: Any) -> None:
    with pytest.raises(ConfigError, match="a price must be written like") as caught:
        Price.parse(written)
    assert len(str(caught.value)) < 250


@pytest.mark.parametrize(
    ("amount", "currency", "tokens"),
    [
        (0.02, "USD", 1),
        (Decimal(-1), "USD", 1),
        (Decimal("nan"), "USD", 1),
        (Decimal(1), "usd", 1),
        (Decimal(1), "USD", 0),
        (Decimal(1), "USD", 1.0),
    ],
)
def test_a_price_has_valid_parts(amount: Any, currency: Any, tokens: Any) -> None:
    with pytest.raises(ConfigError):
        Price(amount, currency, tokens)


@pytest.mark.parametrize(
    ("amount", "rounded", "rounded_up"),
    [
        ("0", "0 USD", "0 USD"),
        ("12.341", "12.34 USD", "12.35 USD"),
        ("1234567.1", "1,234,567.10 USD", "1,234,567.10 USD"),
        ("0.123", "0.12 USD", "0.13 USD"),
        ("0.001234", "0.0012 USD", "0.0013 USD"),
        ("1e30", f"1,{','.join(['000'] * 10)}.00 USD", f"1,{','.join(['000'] * 10)}.00 USD"),
    ],
)
def test_money_is_rounded_for_people(amount: str, rounded: str, rounded_up: str) -> None:
    assert format_money(Decimal(amount), "USD") == rounded
    assert format_money(Decimal(amount), "USD", round_up=True) == rounded_up


@pytest.mark.parametrize("name", ["price", "fallback_price"])
def test_the_message_names_the_argument_of_the_cache(name: str) -> None:
    with pytest.raises(ConfigError, match=f'^{name}: a price must be written like "{EXAMPLE}"'):
        Cache(lambda texts: [[1.0]] * len(texts), space={"model": "m"}, **{name: "2"})  # type: ignore[arg-type]
