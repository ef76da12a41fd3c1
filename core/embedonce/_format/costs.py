"""The cost of a vector: the tokens charged for its text, and the text's share of the seconds of the provider's call."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate, chain, pairwise
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

MAX_TOKENS = 2**40
"""Maximum number of tokens of one text. With this limit, the sum over a batch fits into an int64."""
MAX_SECONDS = 1e9


class Cost(NamedTuple):
    """What it cost to compute one vector. A part that is unknown is None; it is never counted as zero."""

    tokens: int | None = None
    """Tokens that the provider charged for the text, from 0 to :data:`MAX_TOKENS`."""
    seconds: float | None = None
    """The text's share of the seconds that the provider's call took, from 0 to :data:`MAX_SECONDS`."""


NO_COST = Cost()


class Work(NamedTuple):
    """The work for some texts: work that a provider has done, or work that hits have saved."""

    texts: int = 0
    tokens: int = 0
    """Tokens of the texts whose tokens are known."""
    seconds: float = 0.0
    """Seconds of computation for the texts whose seconds are known. Seconds of simultaneous calls are added up."""
    unknown_tokens: int = 0
    """Number of texts whose tokens are unknown. ``tokens`` does not include them."""
    unknown_seconds: int = 0
    """Number of texts whose seconds are unknown. ``seconds`` does not include them."""

    def __add__(self, other: Work) -> Work:  # type: ignore[override]
        return Work(
            self.texts + other.texts,
            self.tokens + other.tokens,
            self.seconds + other.seconds,
            self.unknown_tokens + other.unknown_tokens,
            self.unknown_seconds + other.unknown_seconds,
        )

    def __sub__(self, other: Work) -> Work:
        return Work(
            self.texts - other.texts,
            self.tokens - other.tokens,
            self.seconds - other.seconds,
            self.unknown_tokens - other.unknown_tokens,
            self.unknown_seconds - other.unknown_seconds,
        )


NO_WORK = Work()


class CostColumns(NamedTuple):
    """The costs of several texts, as columns that are not added up yet."""

    texts: int
    tokens: NDArray[np.int64] | tuple[int | None, ...] | None
    """One number per text; -1 or None means unknown. None for the column means that no number is known."""
    seconds: NDArray[np.float64] | tuple[float | None, ...] | None
    """One number per text; NaN or None means unknown."""


def sum_costs(columns: Sequence[CostColumns]) -> Work:
    """Return the sum of all costs. Adding up many columns at once is faster than one after the other."""
    texts = sum(column.texts for column in columns)
    tokens, known_tokens = _sum_known([column.tokens for column in columns], 0)
    seconds, known_seconds = _sum_known([column.seconds for column in columns], 0.0)
    return Work(texts, tokens, seconds, texts - known_tokens, texts - known_seconds)


def _sum_known(columns: Sequence[Any], total: Any) -> tuple[Any, int]:
    """Return ``total`` plus the known numbers of all columns, and how many numbers are known."""
    known = 0
    arrays = [column for column in columns if type(column) is np.ndarray]
    if arrays:
        numbers = arrays[0] if len(arrays) == 1 else np.concatenate(arrays)
        numbers = numbers[numbers >= 0]  # an unknown number is -1 or NaN
        total += numbers.sum().item()
        known += len(numbers)
    if len(arrays) < len(columns):
        given = [*chain.from_iterable(column for column in columns if type(column) is tuple)]
        try:
            total += sum(given)
        except TypeError:  # a number is None
            given = [number for number in given if number is not None]
            total += sum(given)
        known += len(given)
    return total, known


def is_valid_cost(tokens: Any, seconds: Any) -> bool:
    """Return whether the two values are a number of tokens and a number of seconds; each may be None."""
    return (tokens is None or (type(tokens) is int and 0 <= tokens <= MAX_TOKENS)) and (
        seconds is None or (type(seconds) in (float, int) and 0 <= seconds <= MAX_SECONDS)
    )


def apportion(total: int, weights: Sequence[int]) -> list[int]:
    """Split a whole number into one share per weight; the shares add up to ``total``.

    Each share differs by less than 1 from the exact share, ``total * weight / sum(weights)``. The sum of the weights
    must be above 0.
    """
    whole = sum(weights)
    return [
        total * after // whole - total * before // whole for before, after in pairwise(accumulate(weights, initial=0))
    ]
