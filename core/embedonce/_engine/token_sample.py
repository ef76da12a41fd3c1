"""Estimate the tokens of texts that no tier has, from the lengths, tokens and calls of texts that a tier has."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

MAX_CALLS = 4096
"""Maximum number of sums that a sample keeps. If there are more calls, calls that follow each other are added up."""

GROUPS = 20
"""Maximum number of groups of calls whose residuals are compared.

A corpus is mostly embedded in its own order, so calls that follow each other are alike. Groups of such calls are more
independent than the calls. With 20 groups, the quantile is only 7 % larger than with infinitely many.
"""

MIN_GROUPS = 4
"""Minimum number of groups, weighted by their size, from which a bound can be measured."""

QUANTILE = 1.959964
"""The 97.5 % quantile of the normal distribution. The real number is above the maximum with a
probability of 2.5 %, and below the minimum with the same probability."""

BYTES_PER_TOKEN = 4
MAX_BYTES_PER_TOKEN = 16
SPECIAL_TOKENS = 4
"""Number of tokens that a text may have apart from its bytes, such as the marks of its start and its end."""


class TokenBound(NamedTuple):
    """A number of tokens, and the limits between which the real number probably lies."""

    tokens: int
    least: int
    most: int
    is_measured: bool


class TokenSample:
    """Collects the lengths and tokens of texts whose tokens are known, grouped by the call that embedded them.

    A provider mostly reports one number of tokens per call, and the texts' shares are apportioned by length. So the
    texts of one call tell nothing about the variation between texts, and only calls can be compared. All entries of a
    call have the same date.
    """

    def __init__(self) -> None:
        self.texts = 0
        self._calls: dict[float, list[int]] = {}
        """Tokens and bytes by the date of a call."""

    def add(self, created: float, tokens: int, size: int) -> None:
        """Add a text of ``size`` bytes, which a call at ``created`` embedded for ``tokens`` tokens."""
        self.texts += 1
        sums = self._calls.get(created)
        if sums is None:
            sums = self._calls[created] = [0, 0]
            if len(self._calls) > MAX_CALLS:
                self._merge_pairs()
                sums = self._calls.setdefault(created, [0, 0])
        sums[0] += tokens
        sums[1] += size

    def _merge_pairs(self) -> None:
        """Merge pairs of calls that follow each other, so that half as many sums are left."""
        dates = sorted(self._calls)
        for earlier, later in zip(dates[::2], dates[1::2], strict=False):
            tokens, size = self._calls.pop(later)
            self._calls[earlier][0] += tokens
            self._calls[earlier][1] += size

    def estimate(self, texts: int, size: int) -> TokenBound:
        """Return the tokens of ``texts`` other texts with ``size`` bytes in total.

        The tokens are R * ``size``, where R is the number of tokens per byte in the sample. The variance of the error
        has two parts. The first is the variation of the other texts themselves: the squared residuals of the groups of
        calls, scaled to the number of the other texts. The second is the error of R: the same sum, scaled to the square
        of their bytes. The residuals are those of the jackknife, because a large group pulls R towards itself.

        If the other texts are longer or shorter than those of the sample, their special tokens have another share in R.
        The sample cannot show this error, so the limits include its maximum.
        """
        tokens_by_group, bytes_by_group = self._sum_groups()
        sampled_bytes = float(bytes_by_group.sum())
        least, most = size // MAX_BYTES_PER_TOKEN, size + SPECIAL_TOKENS * texts
        if not sampled_bytes:
            return TokenBound(-(-size // BYTES_PER_TOKEN), least, most, is_measured=False)
        ratio = float(tokens_by_group.sum()) / sampled_bytes
        tokens = round(ratio * size)
        # Small groups beside a large one do not count fully.
        groups = sampled_bytes**2 / float((bytes_by_group**2).sum())
        if groups < MIN_GROUPS - 0.5:
            return TokenBound(tokens, min(least, tokens), max(most, tokens), is_measured=False)
        shares = bytes_by_group / sampled_bytes
        residuals = (tokens_by_group - ratio * bytes_by_group) / (1 - shares)
        squares = float((residuals**2).sum()) * (1 - 1 / len(shares))
        variance = squares * (texts / self.texts + (size / sampled_bytes) ** 2)
        margin = compute_quantile(max(MIN_GROUPS, groups) - 1) * math.sqrt(variance)
        margin += SPECIAL_TOKENS * abs(size * self.texts / sampled_bytes - texts)
        least = max(least, math.floor(ratio * size - margin))
        most = min(most, math.ceil(ratio * size + margin))
        return TokenBound(tokens, min(least, tokens), max(most, tokens), is_measured=True)

    def _sum_groups(self) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Return the tokens and the bytes of each group of calls that follow each other."""
        sums = np.array([self._calls[date] for date in sorted(self._calls)], np.float64).reshape(-1, 2)
        starts = range(0, len(sums), -(-len(sums) // GROUPS) or 1)
        grouped = np.array([sums[start : start + starts.step].sum(axis=0) for start in starts]).reshape(-1, 2)
        return grouped[:, 0], grouped[:, 1]


def compute_quantile(freedom: float) -> float:
    """Return the 97.5 % quantile of Student's t distribution with at least 3 degrees of freedom.

    This is the expansion of Abramowitz and Stegun, 26.7.5. Its error is below 1 %.
    """
    z = QUANTILE
    terms = (
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
        (79 * z**9 + 776 * z**7 + 1482 * z**5 - 1920 * z**3 - 945 * z) / 92160,
    )
    return z + sum(term / freedom**power for power, term in enumerate(terms, 1))
