"""The progress of ``embedonce import``, on standard error."""

from __future__ import annotations

import time
from collections.abc import Callable

from embedonce.cli.embedding.progress import ReadingProgress


class ImportProgress(ReadingProgress):
    """The progress of one pass over a source.

    ``total`` is the number of texts of the source, or the number of bytes of the files with the texts to look up.
    """

    def __init__(self, action: str, total: int | None, clock: Callable[[], float] = time.monotonic) -> None:
        super().__init__(total, clock)
        self._action = action

    def describe(self) -> str:
        """Return in one line: what is done, the number of texts, and the rate."""
        rate = self._done / max(self._clock() - self._started, 1e-9)
        return f"{self._action}: {self._done:,} texts  {rate:,.0f}/s"
