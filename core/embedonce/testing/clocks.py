"""A clock that a test moves by hand."""

from __future__ import annotations

import threading


class ManualClock:
    """A replacement for ``time.time``: call the clock to read the time, and :meth:`advance` to let time pass."""

    def __init__(self, now: float = 1_700_000_000.0) -> None:
        self._lock = threading.Lock()
        self._now = now

    def __call__(self) -> float:
        """Return Unix time in seconds."""
        return self._now

    def advance(self, seconds: float) -> float:
        """Advance by ``seconds`` and return the new time."""
        if seconds < 0:
            raise ValueError(f"seconds must be at least 0, got {seconds:g}; make a new clock to go back in time")
        with self._lock:
            self._now += seconds
            return self._now
