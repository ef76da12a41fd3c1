"""A limit for the number of simultaneous calls. Calls that wait get their slots in the order in which they came."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable


class _Turn:
    """The turn of one waiting call."""

    def __init__(self) -> None:
        self.has_slot = False
        self.lock = threading.Lock()
        """A lock that is held until the wait ends."""
        self.lock.acquire()

    def give_slot(self) -> None:
        self.has_slot = True
        self.lock.release()


class CallSlots:
    """A number of slots. Each call takes one and frees it when it ends.

    A freed slot is handed to the call that has waited longest. If it were only marked as free, the thread that frees a
    slot would take it again before the thread that it has woken, time after time.
    """

    def __init__(self, limit: int) -> None:
        self._lock = threading.Lock()
        self._free_count = limit
        """Number of free slots. It is above 0 only if no call waits, and below 0 only after :meth:`close`."""
        self._waiting: deque[_Turn] = deque()
        """The turns of the calls that wait, the longest wait first."""
        self._closed = False

    def take(self, get_seconds: Callable[[], float | None]) -> bool:
        """Take a slot and return True, or return False if none was free for the seconds that ``get_seconds`` returns.

        ``get_seconds`` is called only if the call has to wait.
        """
        with self._lock:
            if self._free_count > 0:
                self._free_count -= 1
                return True
        return self._wait(get_seconds())

    def free(self) -> None:
        """Free a slot."""
        with self._lock:
            if self._waiting:
                self._waiting.popleft().give_slot()
            else:
                self._free_count += 1

    def close(self) -> None:
        """End all waits, as if there were a free slot for each."""
        with self._lock:
            self._closed = True
            while self._waiting:
                self._free_count -= 1
                self._waiting.popleft().give_slot()

    def _wait(self, seconds: float | None) -> bool:
        turn = _Turn()
        try:
            with self._lock:
                if self._closed or self._free_count > 0:
                    self._free_count -= 1
                    return True
                self._waiting.append(turn)
            # A call whose time ends at the moment when it is given a slot keeps the slot.
            return turn.lock.acquire(timeout=-1 if seconds is None else max(seconds, 0.0)) or self._end_wait(turn)
        except BaseException:  # Ctrl-C
            if self._end_wait(turn):
                self.free()
            raise

    def _end_wait(self, turn: _Turn) -> bool:
        """Leave the queue, and return whether the call has been given a slot."""
        with self._lock:
            if turn in self._waiting:
                self._waiting.remove(turn)
            return turn.has_slot
