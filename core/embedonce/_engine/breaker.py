"""What keeps calls away from a store that does not answer."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable
from typing import Literal, TypeAlias

BreakerChange: TypeAlias = Callable[[Literal["open", "closed"], str | None], None]
"""What a breaker calls when it opens, with the cause, and when it closes."""


class Breaker:
    """Keeps calls away from a store that does not answer.

    It opens on one timeout or three failures in a row, for a while that doubles from half a second to
    a minute, jittered. Then exactly one probe is let through.
    """

    FAILURES = 3
    FIRST_WAIT, LONGEST_WAIT = 0.5, 60.0
    LOST_PROBE = 30.0

    def __init__(self, changed: BreakerChange) -> None:
        self._changed = changed
        self._lock = threading.RLock()
        self._failures = 0
        self._wait = 0.0
        self._until = 0.0
        self.open = False

    def admit(self) -> Literal["go", "skip", "probe"]:
        """Say whether a call may go, must be skipped, or is the one probe."""
        if not self.open:
            return "go"
        with self._lock:
            now = time.monotonic()
            if not self.open:
                return "go"
            if now < self._until:
                return "skip"
            self._until = now + max(self.LOST_PROBE, self._wait)  # nobody else, unless this probe never returns
            return "probe"

    def succeeded(self) -> None:
        if not self._failures and not self.open:
            return
        with self._lock:
            was_open, self.open = self.open, False
            self._failures, self._wait = 0, 0.0
        if was_open:
            self._changed("closed", None)

    def failed(self, cause: str) -> None:
        with self._lock:
            self._failures += 1
            if not self.open and self._failures < self.FAILURES and cause != "timeout":
                return
            was_open, self.open = self.open, True
            self._wait = min(self.LONGEST_WAIT, self._wait * 2 or self.FIRST_WAIT)
            self._until = time.monotonic() + self._wait * random.uniform(0.75, 1.25)
        if not was_open:
            self._changed("open", cause)
