"""A circuit breaker, which keeps calls away from a store that does not answer."""

from __future__ import annotations

import math
import random
import threading
import time
from collections.abc import Callable
from typing import Literal, TypeAlias

BreakerChange: TypeAlias = Callable[[Literal["open", "closed"], str | None], None]
"""A callback for changes of a breaker. Its arguments are ``"open"`` and the cause, or ``"closed"`` and None."""


class Breaker:
    """Keeps calls away from a store that does not answer.

    The breaker opens after one timeout, or after three failures in a row. At first it stays open for half a second.
    After this wait, the breaker lets exactly one probe through. Each failed probe doubles the wait for the next probe,
    up to a minute. Each wait has some jitter.
    """

    FAILURES = 3
    """Number of failures in a row that open the breaker."""
    BUSY_LOOPS = 3
    """Number of calls in a row, one after the other, that a blocked event loop kept from ending. They count as one
    timeout, because the store may hang as well."""
    FIRST_WAIT, LONGEST_WAIT = 0.5, 60.0
    """Seconds before the first probe, and the longest wait between two probes."""
    LOST_PROBE = 30.0
    """Seconds after which a probe that has not returned counts as lost, and another probe is allowed."""

    def __init__(self, on_change: BreakerChange) -> None:
        self._on_change = on_change
        self._lock = threading.RLock()
        self._failures = 0
        self._busy_loops = 0
        self._last_busy_loop = -math.inf
        """Time on ``time.monotonic`` when the last busy loop was counted."""
        self._wait = 0.0
        self._next_probe = 0.0
        self.is_open = False

    def admit(self) -> Literal["go", "skip", "probe"]:
        """Return ``"go"`` to allow a call, ``"skip"`` to skip it, or ``"probe"`` to allow it as the only probe."""
        if not self.is_open:
            return "go"
        with self._lock:
            now = time.monotonic()
            if not self.is_open:
                return "go"
            if now < self._next_probe:
                return "skip"
            # Allow no other probe until this probe has returned or counts as lost.
            self._next_probe = now + max(self.LOST_PROBE, self._wait)
            return "probe"

    def record_success(self) -> None:
        """Close the breaker if it is open, and forget earlier failures."""
        if not (self._failures or self._busy_loops or self.is_open):
            return
        with self._lock:
            was_open, self.is_open = self.is_open, False
            self._failures, self._busy_loops, self._wait = 0, 0, 0.0
        if was_open:
            self._on_change("closed", None)

    def record_busy_loop(self, started: float) -> bool:
        """Count a call that began at ``started`` and could not end because the event loop was blocked.

        Calls that overlap in time count once. Return True after :attr:`BUSY_LOOPS` of them in a row; the caller then
        records a timeout.
        """
        with self._lock:
            if started > self._last_busy_loop:
                self._busy_loops += 1
                self._last_busy_loop = time.monotonic()
            if self._busy_loops < self.BUSY_LOOPS:
                return False
            self._busy_loops = 0
            return True

    def record_failure(self, cause: str) -> None:
        """Count a failure. Open the breaker after :attr:`FAILURES` failures in a row, or after one timeout.

        If the breaker is open already, double the wait for its next probe.
        """
        with self._lock:
            self._failures += 1
            if not self.is_open and self._failures < self.FAILURES and cause != "timeout":
                return
            was_open, self.is_open = self.is_open, True
            self._wait = min(self.LONGEST_WAIT, self._wait * 2 or self.FIRST_WAIT)
            self._next_probe = time.monotonic() + self._wait * random.uniform(0.75, 1.25)
        if not was_open:
            self._on_change("open", cause)
