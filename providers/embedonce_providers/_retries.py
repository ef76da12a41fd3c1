"""How often a client repeats a request that failed with status 500."""

from __future__ import annotations

import math
from collections.abc import Sequence

MAX_REMEMBERED = 10_000
"""Number of texts above which all are forgotten."""


class RetryLimits:
    """Limits the retries after a status 500, which may be about one text of the request.

    The engine halves a call that fails until it has found the text, so a request of several texts is not repeated. The
    search ends with a request of one text. It may take at most 2 · ceil(log2 n) requests for n texts, so only the
    rest of this number is left for retries of the last request.
    """

    def __init__(self, max_retries: int) -> None:
        self._max_retries = max_retries
        self._left: dict[int, int] = {}
        """For the hash of a text: how often a request with only this text may be repeated."""

    def count_retries(self, texts: Sequence[str]) -> int:
        """Return how often a request with these texts may be repeated after a status 500."""
        if len(texts) > 1:
            return 0
        return min(self._max_retries, *(self._left.get(hash(text), self._max_retries) for text in texts))

    def note_failure(self, texts: Sequence[str]) -> None:
        """Remember that a request with these texts failed with status 500."""
        if len(texts) < 2:
            return
        if len(self._left) > MAX_REMEMBERED:
            self._left.clear()
        # Halving takes ceil(log2 n) requests. One more request has the texts that were set aside, and another one
        # confirms that the text is refused.
        left = max(0, math.ceil(math.log2(len(texts))) - 2)
        for text in texts:
            self._left.setdefault(hash(text), left)
