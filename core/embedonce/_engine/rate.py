"""When a call to a provider may begin: limits per minute, and pauses after a status 429.

A call reserves the time at which it begins, and then sleeps until that time. Times are reserved in the order in which
calls arrive, so the order is kept without a queue, and a call that is cancelled during its sleep blocks no other call.
"""

from __future__ import annotations

import random
import threading
import time
from collections import deque
from dataclasses import dataclass

from embedonce.contracts import Limits

MINUTE = 60.0

MAX_PAUSE = 120.0
"""Longest pause in seconds. An error that asks for a longer one is raised at once."""

MAX_GUESSED_PAUSE = 60.0
"""Longest pause in seconds after an error that names no time."""

STEP = 0.1
"""Seconds between the first two calls that waited for the same pause.

The server may still be limited when the pause ends. The first call then finds this out, and the others pause again.
With each call that works instead, the calls that still wait begin faster: after the first one, twice as fast, then
three times, and so on. Otherwise new calls could join the line faster than it moves, and it would never end.
"""


def guess_pause(retries: int) -> float:
    """Return the seconds of a pause if the error names no time: 1, 2, 4 and so on, and up to a quarter more.

    The random part keeps processes that share a limit from returning at the same moment.
    """
    return min(MAX_GUESSED_PAUSE, 2.0 ** min(retries, 6) * random.uniform(1.0, 1.25))


def guess_backoff(retries: int) -> float:
    """Return the seconds to wait after a failure of the server that names no time: 0.5, 1, 2, 4 and 8, and a bit less.

    The random part keeps processes that met the same failure from returning at the same moment.
    """
    return min(8.0, 0.5 * 2.0 ** min(retries, 4)) * random.uniform(0.75, 1.0)


@dataclass(slots=True, eq=False)
class Turn:
    """The time at which a call begins, on the clock ``time.monotonic``, and the number of tokens that it sends."""

    start: float
    tokens: float
    pause: int
    """How many pauses had begun when the time was reserved."""
    is_in_line: bool = False
    """Whether the call waits in the line after a pause. Then ``start`` is a time on the clock of the line."""


class CallRate:
    """The limits per minute of one provider, and its current pause. Several threads may use it at the same time."""

    def __init__(self, limits: Limits) -> None:
        self._lock = threading.RLock()  # re-entrant, because a signal handler may use the cache
        per_minute = limits.requests_per_minute
        self._requests = None if per_minute is None else max(1, int(per_minute))
        self._window = MINUTE if per_minute is None or per_minute >= 1 else MINUTE / per_minute
        self._tokens = limits.tokens_per_minute
        self._turns: deque[Turn] = deque()  # the turns of the last minute and the reserved ones, by their start
        self._paused_until = -float("inf")
        self.pauses = 0
        """How many pauses have begun so far."""
        # The calls that wait for a pause stand in a line. The clock of the line is the real one at first. It runs
        # faster with each call that works, so that the line moves faster.
        self._resume_at = -float("inf")  # when the next call that joins the line begins, on the clock of the line
        self._line = 0.0, 0.0, 1.0  # a time on the clock of the line, the same time on the real clock, and the speed
        self.is_limited = per_minute is not None or self._tokens is not None
        self.counts_tokens = self._tokens is not None

    def is_open(self) -> bool:
        """Return whether calls may begin at once, without a turn."""
        return not self.is_limited and self._read_line(time.monotonic()) >= self._resume_at

    def _read_line(self, now: float) -> float:
        """Return the time on the clock of the line."""
        at, since, speed = self._line
        return at + (now - since) * speed

    def reserve(self, tokens: float) -> Turn:
        """Reserve the next time at which a call with this number of tokens may begin."""
        with self._lock:
            now = time.monotonic()
            turn = Turn(now, tokens, self.pauses)
            line = self._read_line(now)
            if self._resume_at > line:
                turn.start, turn.is_in_line = self._resume_at, True
                self._resume_at += STEP
            if self.is_limited:
                if turn.is_in_line:
                    turn.start, turn.is_in_line = now + (turn.start - line) / self._line[2], False
                turn.start = self._find_start(now, turn.start, tokens)
                self._turns.append(turn)
            return turn

    def _find_start(self, now: float, start: float, tokens: float) -> float:
        turns = self._turns
        while turns and turns[0].start <= now - max(self._window, MINUTE):
            turns.popleft()
        if turns:
            start = max(start, turns[-1].start)
        if self._requests is not None and len(turns) >= self._requests:
            start = max(start, turns[-self._requests].start + self._window)
        if self._tokens is not None:
            sent = sum(turn.tokens for turn in turns)
            for turn in turns:
                if sent + tokens <= self._tokens and turn.start + MINUTE > start:
                    break
                # Once all earlier turns are over, a call begins even if it alone has more tokens than the limit.
                start = max(start, turn.start + MINUTE)
                sent -= turn.tokens
        return start

    def time_left(self, turn: Turn) -> float:
        """Return the seconds after which to ask again; 0 if the turn begins now.

        After a new pause, the turn begins later. If calls work after a pause, the turn may begin earlier.
        """
        with self._lock:
            now = time.monotonic()
            if turn.pause != self.pauses and (turn.is_in_line or now < self._paused_until):
                self.give_back(turn)
                later = self.reserve(turn.tokens)
                turn.start, turn.pause, turn.is_in_line = later.start, later.pause, later.is_in_line
                if self.is_limited:
                    self._turns[-1] = turn
            if not turn.is_in_line:
                return max(0.0, turn.start - now)
            left = (turn.start - self._read_line(now)) / self._line[2]
            return min(max(0.0, left), max(0.0, self._paused_until - now) + STEP)

    def give_back(self, turn: Turn) -> None:
        """Remove a turn that no call will use."""
        with self._lock:
            if turn in self._turns:
                self._turns.remove(turn)

    def pause(self, seconds: float) -> bool:
        """Let no call begin for some seconds. Return False if a pause was under way already."""
        with self._lock:
            now = time.monotonic()
            is_new = now >= self._paused_until
            if now + seconds > self._paused_until:
                self._paused_until = self._resume_at = now + seconds
                self._line = now, now, 1.0
                self.pauses += 1
            return is_new

    def note_success(self, pauses: int) -> None:
        """Let the line move faster after a call that worked. ``pauses`` is the number of pauses when it began."""
        if self._read_line(time.monotonic()) >= self._resume_at:
            return  # nobody waits
        with self._lock:
            now = time.monotonic()
            if pauses == self.pauses and now >= self._paused_until:
                self._line = self._read_line(now), now, self._line[2] + 1
