"""Deadlines of calls on an event loop that other tasks may block."""

from __future__ import annotations

import asyncio
import threading
from contextvars import Token
from time import monotonic
from types import TracebackType
from weakref import WeakKeyDictionary

from .contracts import Deadline, current_deadline
from .errors import LoopBusy, TierTimeout

TICK_SECONDS = 0.02
"""Seconds between two checks of whether an event loop is blocked."""
BUSY_SHARE = 0.2
"""A period does not count if the event loop was blocked for more than this share of it."""
MIN_LATE_SECONDS = 0.005
"""Seconds by which a timer must be late to show that the event loop was blocked at the end of a period."""


class async_deadline:
    """An async context manager that cancels its block after ``seconds``, unless the event loop was blocked meanwhile.

    The async client of a backend uses it instead of ``asyncio.timeout``. While another task blocks the event loop, no
    reply can be read, even if it has arrived. So a period of ``seconds`` does not count if the loop was blocked for
    more than a fifth of it. The block then goes on for another period, at most ``graces`` times. If the loop was
    blocked for less than that, but at the end of the period, the block gets these seconds again, so that a reply that
    has arrived is read.

    ``seconds`` of None means no limit. Inside the block, :func:`~embedonce.contracts.time_left` returns the seconds
    that are left of the period.

    Raises:
        TimeoutError: the block did not end in a period in which the loop ran.
        LoopBusy: the loop was blocked in every period. This is a TimeoutError, too.
    """

    def __init__(self, seconds: float | None, *, graces: int = 1) -> None:
        self._period = None if seconds is None else Period(seconds, graces)
        self._seconds = seconds
        self._has_expired = False
        self._token: Token[Deadline | None]

    async def __aenter__(self) -> None:
        if self._period is not None:
            task = asyncio.current_task()
            if task is None:
                raise RuntimeError("async_deadline must be used in an asyncio task")
            self._task = task
            self._cancelling = task.cancelling()
            self._thread: int | None = threading.get_ident()
            self._started = monotonic()
            self._period.__enter__()
            self._set_timer()
        self._token = current_deadline.set(None if self._period is None else self)

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        current_deadline.reset(self._token)
        if self._period is None:
            return
        self._timer.cancel()
        self._thread = None  # a task that the block has started may outlive it and has its context
        if error is None and not self._has_expired:  # most calls end here
            self._period.__exit__()
            return
        # A timer inside the block, such as the client's own, may fire just after a new period has begun.
        was_blocked = self._period.was_blocked() if self._has_expired else self._period.was_ever_blocked()
        self._period.__exit__()
        is_late = isinstance(error, TimeoutError)
        if self._has_expired and self._task.uncancel() <= self._cancelling and kind is asyncio.CancelledError:
            is_late = True  # only the timer has cancelled the task
        if is_late and was_blocked and not isinstance(error, LoopBusy):
            raise LoopBusy(self._started) from error
        if is_late and kind is asyncio.CancelledError:
            raise TimeoutError from error

    def compute_seconds_left(self) -> float:
        left = self._end - monotonic()
        if left <= 0 and self._extend():  # the timer is late as well, because the loop runs this task first
            left = self._end - monotonic()
        if left <= 0:
            raise TierTimeout("the tier's timeout has passed")
        return left

    def _set_timer(self) -> None:
        assert self._seconds is not None
        self._is_extended = False
        self._call_at(monotonic() + self._seconds)

    def _call_at(self, end: float) -> None:
        self._end = end
        self._timer = asyncio.get_running_loop().call_later(end - monotonic(), self._expire)

    def _extend(self) -> bool:
        """Allow more time if the loop was blocked. Only the loop's thread does this, and only inside the block."""
        assert self._period is not None
        if self._has_expired or threading.get_ident() != self._thread:
            return False
        if self._period.renew():
            self._timer.cancel()
            self._set_timer()
            return True
        late = monotonic() - self._end
        if self._is_extended or late < MIN_LATE_SECONDS or self._period.was_blocked():
            return False
        self._is_extended = True
        self._timer.cancel()
        self._call_at(monotonic() + late)
        return True

    def _expire(self) -> None:
        if not self._extend():
            self._has_expired = True
            self._task.cancel()


class Period:
    """A context manager that tells whether the running event loop was blocked for much of a period of ``seconds``."""

    def __init__(self, seconds: float, graces: int = 1) -> None:
        self._seconds = seconds
        self._graces = graces

    def __enter__(self) -> Period:
        self._watch = _get_watch()
        self._watch.start()
        self._first = self._before = self._watch.read_blocked_seconds()
        return self

    def __exit__(self, *_: object) -> None:
        self._watch.stop()

    def was_blocked(self) -> bool:
        return self._watch.read_blocked_seconds() - self._before > BUSY_SHARE * self._seconds

    def was_ever_blocked(self) -> bool:
        """Return whether the loop was blocked for that long in all periods together."""
        return self._watch.read_blocked_seconds() - self._first > BUSY_SHARE * self._seconds

    def renew(self) -> bool:
        """Begin another period and return True if this one does not count; return False after the last grace."""
        if self._graces <= 0 or not self.was_blocked():
            return False
        self._graces -= 1
        self._before = self._watch.read_blocked_seconds()
        return True


class _LoopWatch:
    """Measures for how many seconds other tasks block an event loop, while at least one period is running."""

    def __init__(self) -> None:
        self._blocked = 0.0
        self._running = 0
        self._due: float | None = None
        """Time on ``monotonic`` when the next check is due; None if no check is scheduled."""

    def start(self) -> None:
        self._running += 1
        if self._due is None:
            self._schedule()

    def stop(self) -> None:
        self._running -= 1

    def read_blocked_seconds(self) -> float:
        """Return for how many seconds the loop was blocked so far; subtract two results to measure a period."""
        return self._blocked if self._due is None else self._blocked + max(0.0, monotonic() - self._due)

    def _schedule(self) -> None:
        self._due = monotonic() + TICK_SECONDS
        asyncio.get_running_loop().call_later(TICK_SECONDS, self._check)

    def _check(self) -> None:
        self._blocked = self.read_blocked_seconds()
        self._due = None
        if self._running:
            self._schedule()


_watches: WeakKeyDictionary[asyncio.AbstractEventLoop, _LoopWatch] = WeakKeyDictionary()


def _get_watch() -> _LoopWatch:
    loop = asyncio.get_running_loop()
    watch = _watches.get(loop)
    if watch is None:
        watch = _watches[loop] = _LoopWatch()
    return watch
