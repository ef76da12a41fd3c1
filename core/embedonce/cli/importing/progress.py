"""The progress of ``embedonce import``, ``copy`` and ``export``, on standard error."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import suppress

from embedonce.cli.embedding.progress import Bar, Display, Lines, ReadingProgress
from embedonce.cli.output import is_terminal, say


class ImportProgress(ReadingProgress):
    """The progress of one pass over a source.

    ``total`` is the number of texts of the source, or the number of bytes of the files with the texts to look up.
    ``unit`` is what is counted.
    """

    def __init__(
        self, action: str, total: int | None, clock: Callable[[], float] = time.monotonic, *, unit: str = "texts"
    ) -> None:
        super().__init__(total, clock)
        self._action = action
        self._unit = unit

    def describe(self) -> str:
        """Return in one line: what is done, the number of texts, and the rate."""
        rate = self._done / max(self._clock() - self._started, 1e-9)
        return f"{self._action}: {self._done:,} {self._unit}  {rate:,.0f}/s"


def make_display(action: str, *, total: int | None, is_shown: bool, unit: str = "texts") -> Display:
    """Return the display of one pass. An error in the display costs only the display."""
    if is_shown:
        with suppress(Exception):
            progress = ImportProgress(action, total, unit=unit)
            return Display(progress, Bar(progress) if is_terminal() else Lines(progress, say))
    return Display()
