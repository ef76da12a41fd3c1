"""Long runs: the next window of a stream is looked up and computed while the window before is still being stored.

Without this, the provider would wait at the end of each window: for its last write, for the reading of the next window,
and for its lookup. Two windows are in flight, in two threads or asyncio tasks. Together they make no more calls of the
provider than one call of the cache does: each call of the provider takes a turn, and there are as many turns as the
provider's ``concurrency``.
"""

from __future__ import annotations

import math
import os
import threading
from collections import deque
from collections.abc import (
    AsyncGenerator,
    AsyncIterable,
    AsyncIterator,
    Awaitable,
    Callable,
    Coroutine,
    Iterable,
    Iterator,
    Mapping,
)
from concurrent.futures import Future, wait
from contextlib import suppress
from contextvars import ContextVar
from itertools import islice
from operator import itemgetter
from typing import Any, NamedTuple, TypeVar

from embedonce.vectors import Entry

from .flights import Flight
from .ports import Port
from .workers import Workers

T = TypeVar("T")

IN_FLIGHT = 2
"""Number of windows in flight."""
GRACE = 2.0
"""Maximum number of seconds that a run that ends early waits for its calls in flight.

The caller may close the cache next, which must not happen in the middle of a write. There is a limit because the
garbage collector may end the run in one of its own threads, which would otherwise wait for itself."""


class RunEnded(BaseException):
    """The run has ended early, so its windows in flight stop calling the provider. Callers never see this exception."""


class Turns:
    """The calls that the windows of one run may make to each provider at the same time.

    An earlier window goes first: a later one gets a turn only if no earlier window has a call to begin. So the rows
    that the caller waits for come first.
    """

    def __init__(self) -> None:
        self._lock = threading.RLock()  # re-entrant, because the garbage collector may end the run anywhere
        self._free: dict[object, int] = {}
        self._waiting: list[tuple[int, object, Future[None]]] = []
        """The window, the provider and the future of each call that waits, in the order of asking."""
        self._to_begin: dict[int, float] = {}
        """For each window in flight, the number of calls that it has yet to begin; infinite until this is known."""
        self._windows = 0
        self.has_ended = False
        self.process = os.getpid()

    def open_window(self) -> WindowTurns:
        """Return the turns of the next window."""
        with self._lock:
            self._windows += 1
            self._to_begin[self._windows] = math.inf
            return WindowTurns(self, self._windows)

    def set_to_begin(self, window: int, calls: int) -> None:
        """Set how many calls a window has yet to begin."""
        with self._lock:
            if window in self._to_begin:
                self._to_begin[window] = calls
                self._hand_out()

    def close_window(self, window: int) -> None:
        """Forget a window that has ended."""
        with self._lock:
            self._to_begin.pop(window, None)
            self._hand_out()

    async def take(self, port: Port, window: int, source: object, limit: int) -> None:
        """Wait for a turn.

        Raises:
            RunEnded: the run has ended.
        """
        turn: Future[None] = Future()
        with self._lock:
            self._free.setdefault(source, limit)
            self._waiting.append((window, source, turn))
            self._hand_out()
        if not turn.done():
            try:
                await port.wait(turn, None)
            except BaseException:
                if not turn.cancel():
                    self.give_back(source)
                raise
        if self.has_ended:
            self.give_back(source)
            raise RunEnded

    def give_back(self, source: object) -> None:
        with self._lock:
            self._free[source] += 1
            self._hand_out()

    def end(self) -> None:
        """Let no further call begin."""
        with self._lock:
            self.has_ended = True
            self._hand_out()

    def _hand_out(self) -> None:
        """Give the free turns to the calls that may begin, or wake all calls if the run has ended. Hold the lock."""
        first = min((window for window, calls in self._to_begin.items() if calls > 0), default=math.inf)
        for place in sorted(self._waiting, key=itemgetter(0)):
            window, source, turn = place
            if not self.has_ended and (window > first or not self._free[source]):
                continue
            self._waiting.remove(place)
            if turn.set_running_or_notify_cancel():
                self._free[source] -= 1
                if window in self._to_begin:
                    self._to_begin[window] = max(0, self._to_begin[window] - 1)
                    first = min((other for other, calls in self._to_begin.items() if calls > 0), default=math.inf)
                turn.set_result(None)


class WindowTurns(NamedTuple):
    """The turns of one window of a run."""

    turns: Turns
    number: int

    async def take(self, port: Port, source: object, limit: int) -> None:
        """Wait until fewer than ``limit`` calls of ``source`` are running. Call :meth:`give_back` after the call.

        Raises:
            RunEnded: the run has ended.
        """
        await self.turns.take(port, self.number, source, limit)

    def give_back(self, source: object) -> None:
        """Let another call of ``source`` begin."""
        self.turns.give_back(source)

    def close(self, _: object = None) -> None:
        """Say that the window has ended. This is the callback of its thread or task."""
        self.turns.close_window(self.number)


window_turns: ContextVar[WindowTurns | None] = ContextVar("embedonce_window_turns", default=None)
"""The turns of the window that the current call belongs to."""


async def call_in_turn(port: Port, source: object, limit: int, call: Callable[[], Awaitable[T]]) -> T:
    """Return ``await call()``, which calls a provider. In a window of a run, wait for a turn first.

    The call itself belongs to no window. A provider that uses a cache would otherwise wait for its own turn to end.

    Raises:
        RunEnded: the run has ended.
    """
    window = window_turns.get()
    if window is None:
        return await call()
    await window.take(port, source, limit)
    token = window_turns.set(None)
    try:
        return await call()
    finally:
        window_turns.reset(token)
        window.give_back(source)


async def run_unless_ended(job: Callable[[], Awaitable[None]]) -> None:
    """Run a job. If its run has ended, let the other jobs go on, because their calls in flight are paid for."""
    with suppress(RunEnded):
        await job()


def raise_if_run_has_ended() -> None:
    """Raise RunEnded in a window of a run that has ended."""
    window = window_turns.get()
    if window is not None and window.turns.has_ended:
        raise RunEnded


def set_calls_to_begin(calls: int) -> None:
    """Say how many calls of the provider the current window has yet to begin, if there is a window."""
    window = window_turns.get()
    if window is not None:
        window.turns.set_to_begin(window.number, calls)


class Gathered:
    """Computed entries of one call that wait until the entries before them are stored. Several threads add entries.

    No entry waits for the provider. If the tiers are slower than the provider, more entries are stored together.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._is_storing = False
        self._entries: dict[str, Entry] = {}
        self._flights: dict[str, Flight] = {}

    def add(self, entries: Mapping[str, Entry], flights: Mapping[str, Flight]) -> bool:
        """Add entries. Return whether the caller has to store them, because nobody is storing at the moment."""
        with self._lock:
            self._entries.update(entries)
            self._flights.update(flights)
            is_free, self._is_storing = not self._is_storing, True
            return is_free

    def take(self) -> tuple[dict[str, Entry], dict[str, Flight]] | None:
        """Return what has to be stored next. If this is nothing, the caller stops storing."""
        with self._lock:
            if not self._entries:
                self._is_storing = False
                return None
            taken = self._entries, self._flights
            self._entries, self._flights = {}, {}
        return taken

    def stop(self) -> None:
        """Let another caller store, because this one was interrupted."""
        with self._lock:
            self._is_storing = False


class _Started(NamedTuple):
    """A job that runs in a thread."""

    job: Callable[[], Any]
    future: Future[Any]
    process: int

    def get_result(self) -> Any:
        # A fork copies no threads, so a child runs the job again.
        return self.future.result() if self.process == os.getpid() else self.job()


def run_ahead(get_workers: Callable[[], Workers], jobs: Iterable[Callable[[], T]]) -> Iterator[T]:
    """Yield the results of jobs in order. While the caller uses a result, the next job runs in a thread.

    Raises:
        Exception: the error of a job, or of ``jobs``, after the results of the jobs before it.
    """
    own_turns = Turns()
    started: deque[_Started] = deque()
    problem: Exception | None = None
    iterator = iter(jobs)
    try:
        while True:
            try:
                job = next(iterator, None)
            except Exception as error:  # noqa: BLE001  (raised below, after the results of the earlier jobs)
                job, problem = None, error
            if job is None:
                break
            if own_turns.process != os.getpid():  # in a forked child, the turns belong to threads of the parent
                own_turns = Turns()
            started.append(_start(get_workers(), own_turns, job))
            if len(started) == IN_FLIGHT:
                yield started.popleft().get_result()
        while started:
            yield started.popleft().get_result()
        if problem is not None:
            raise problem
    except KeyboardInterrupt:  # the user does not want to wait
        started.clear()
        raise
    finally:
        own_turns.end()
        wait([one.future for one in started if one.process == os.getpid()], GRACE)


def _start(workers: Workers, own_turns: Turns, job: Callable[[], T]) -> _Started:
    window = own_turns.open_window()
    token = window_turns.set(window)
    try:
        future: Future[T] = workers.submit(job)
    except RuntimeError:  # no thread can be started, so the job runs here
        future = Future()
        future.set_result(job())
    finally:
        window_turns.reset(token)
    future.add_done_callback(window.close)
    return _Started(job, future, os.getpid())


async def run_ahead_async(jobs: AsyncIterator[Callable[[], Coroutine[Any, Any, T]]]) -> AsyncGenerator[T]:
    """Like :func:`run_ahead`, with asyncio tasks."""
    import asyncio

    own_turns = Turns()
    started: deque[asyncio.Task[T]] = deque()
    problem: Exception | None = None
    try:
        while True:
            try:
                job = await anext(jobs, None)
            except Exception as error:  # noqa: BLE001  (raised below, after the results of the earlier jobs)
                job, problem = None, error
            if job is None:
                break
            window = own_turns.open_window()
            token = window_turns.set(window)
            started.append(asyncio.create_task(job()))
            window_turns.reset(token)
            started[-1].add_done_callback(window.close)
            if len(started) == IN_FLIGHT:
                yield await started.popleft()
        while started:
            yield await started.popleft()
        if problem is not None:
            raise problem
    finally:
        own_turns.end()
        for task in started:
            task.cancel()
            with suppress(RuntimeError):  # the loop is closed
                task.add_done_callback(lambda task: task.cancelled() or task.exception())


# --- reading ----------------------------------------------------------------------------------


def read_windows(texts: Iterable[str], size: int) -> Iterator[list[str]]:
    """Yield the texts in lists of up to ``size``."""
    iterator = iter(texts)
    while window := list(islice(iterator, size)):
        yield window


async def read_windows_async(texts: Iterable[str] | AsyncIterable[str], size: int) -> AsyncIterator[list[str]]:
    """Like :func:`read_windows`, but ``texts`` may be an async iterable."""
    if isinstance(texts, Iterable):
        for window in read_windows(texts, size):
            yield window
        return
    window = []
    async for text in texts:
        window.append(text)
        if len(window) == size:
            yield window
            window = []
    if window:
        yield window
