"""The cost of a vector: the tokens charged for its text, and the text's share of the seconds of the provider's call."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate, pairwise
from typing import Any, NamedTuple

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
