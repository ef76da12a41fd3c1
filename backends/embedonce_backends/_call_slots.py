"""A limit for the number of simultaneous calls, which lets waiting calls go first."""

from __future__ import annotations

import threading
from collections.abc import Callable


class CallSlots:
    """A number of slots. Each call takes one and frees it when it ends.

    A new call leaves a slot to each call that waits. With ``threading.Semaphore``, a thread that frees a slot and takes
    one again is faster than the thread that it has woken, time after time, and taking a slot costs three times as much.
    """

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._lock = threading.Lock()
        self._changed = threading.Condition(self._lock)
        self._used = 0
        self._waiting = 0
        self._closed = False

    def take(self, get_seconds: Callable[[], float | None]) -> bool:
        """Take a slot and return True, or return False if none was free for the seconds that ``get_seconds`` returns.

        ``get_seconds`` is called only if the call has to wait.
        """
        with self._lock:
            if self._used + self._waiting >= self._limit and not self._wait(get_seconds()):
                return False
            self._used += 1
            return True

    def free(self) -> None:
        """Free a slot."""
        with self._lock:
            self._used -= 1
            if self._waiting:
                self._changed.notify()

    def close(self) -> None:
        """End all waits, as if there were a free slot for each."""
        with self._lock:
            self._closed = True
            self._changed.notify_all()

    def _wait(self, seconds: float | None) -> bool:
        self._waiting += 1
        try:
            return self._changed.wait_for(lambda: self._closed or self._used < self._limit, seconds)
        except BaseException:  # Ctrl-C, after this call may have been woken instead of another one
            self._changed.notify()
            raise
        finally:
            self._waiting -= 1
