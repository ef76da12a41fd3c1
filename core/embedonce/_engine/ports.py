"""The two ways in which the engine waits and calls: blocking, or on an event loop.

The engine consists of coroutines that await only the methods of a port. A :class:`BlockingPort` never suspends, so
:func:`run_blocking` runs a coroutine of the engine to its end with one ``send``. A :class:`LoopPort` suspends on the
running event loop. A call that may hang is made in a thread of :class:`Workers`, so that the engine can stop waiting
for this call.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Coroutine, Iterator, Sequence
from concurrent.futures import CancelledError, Future
from contextvars import Context, copy_context
from typing import TYPE_CHECKING, Any, Protocol, TypeVar
from weakref import WeakKeyDictionary

from embedonce.background import BackgroundLoop
from embedonce.contracts import deadline
from embedonce.errors import LoopBusy, TierBusy

from .workers import Workers

if TYPE_CHECKING:
    import asyncio

    from embedonce.event_loops import Period

T = TypeVar("T")
CHECK_SECONDS = 0.25
"""Seconds between two calls of ``keep_waiting`` during a wait."""

Job = Callable[[], Coroutine[Any, Any, None]]


def run_blocking(coroutine: Coroutine[Any, Any, T]) -> T:
    """Run a coroutine that awaits only a :class:`BlockingPort`, and return its result."""
    try:
        coroutine.send(None)
    except StopIteration as done:
        result: T = done.value
        return result
    coroutine.close()
    raise RuntimeError("the engine awaited something that is not a port; this is a bug in embedonce, please report it")


class Port(Protocol):
    """The operations that the engine may await."""

    windows: dict[Any, Any]
    """The windows of :mod:`coalescing` that gather chunks on this port. They end with the port: after a fork, and with
    the event loop."""

    @property
    def loop(self) -> asyncio.AbstractEventLoop | None: ...

    async def call(
        self, call: Callable[[], T], timeout: float | None, workers: Workers, *, inline: bool, quick: bool
    ) -> T:
        """Make a blocking call within ``timeout`` seconds.

        ``inline``: the call ends at the deadline by itself, so a blocking method makes the call in the caller's thread.
        ``quick``: the call never blocks, so it is made in this thread and without a deadline.

        Raises:
            TimeoutError: the deadline has passed; the call may still be running in its thread.
            TierBusy: all workers were busy for ``timeout`` seconds; the call was not made.
        """
        ...

    async def run_coroutine(
        self, start: Callable[[], Coroutine[Any, Any, T]], timeout: float | None, *, graces: int = 1
    ) -> T:
        """Run a coroutine of a provider or an async backend, on this event loop or on the background loop.

        While other tasks block this event loop, the coroutine gets up to ``graces`` more periods of ``timeout``.

        Raises:
            TimeoutError: the coroutine did not end in time; a LoopBusy if other tasks blocked this event loop.
            concurrent.futures.CancelledError: the coroutine was cancelled, but not by its caller. This is an ordinary
                Exception, unlike the CancelledError of asyncio.
        """
        ...

    async def wait(
        self, future: Future[Any], timeout: float | None, keep_waiting: Callable[[], bool] | None = None
    ) -> bool:
        """Wait until the future is done and return True; return False after ``timeout`` seconds.

        ``keep_waiting`` is called every ``CHECK_SECONDS``; when it returns False, the wait ends.
        """
        ...

    async def run_all(self, jobs: Sequence[Job], limit: int) -> None:
        """Run all jobs, up to ``limit`` at the same time.

        After an error, no more jobs begin. The jobs that have begun run to their end, because they may be paid for.
        After an exception such as KeyboardInterrupt, nothing is waited for.

        Raises:
            Exception: the error of the first job that failed.
        """
        ...

    async def run_shielded(self, job: Job, done: Callable[[], None]) -> None:
        """Run a job to its end even if the caller is cancelled. Then call ``done``, even if the job failed."""
        ...

    def start(self, job: Job) -> None:
        """Start a job that runs beside its caller, to its end, in an empty context. Interrupts do not reach the job.

        Raises:
            RuntimeError: no thread can be started.
        """
        ...

    async def sleep(self, seconds: float) -> None: ...


def call_with_deadline(call: Callable[[], T], timeout: float | None) -> T:
    """Make a call in this thread, with a deadline ``timeout`` seconds from now.

    Inside the call, ``time_left()`` returns the seconds until the deadline.

    The call runs in a copy of the context, because Ctrl-C can end the call before the deadline is reset. Without the
    copy, the deadline would then stay set in this thread. Once the deadline has passed, every later call in this
    thread would fail.
    """
    return copy_context().run(_call_in_this_context, call, timeout)


def _call_in_this_context(call: Callable[[], T], timeout: float | None) -> T:
    deadline(timeout).__enter__()  # without an exit, because the context is dropped after the call
    return call()


def _split_wait(timeout: float | None) -> Iterator[float]:
    """Split a wait of ``timeout`` seconds into parts of up to ``CHECK_SECONDS``, and yield the seconds of each part."""
    end = None if timeout is None else time.monotonic() + timeout
    while end is None or time.monotonic() < end:
        yield CHECK_SECONDS if end is None else max(0.0, min(CHECK_SECONDS, end - time.monotonic()))


class _TimedCall:
    """A call whose timeout starts when a worker starts the call. The wait for a free worker has the same limit."""

    def __init__(self, call: Callable[[], Any], timeout: float | None) -> None:
        self._call = call
        self._timeout = timeout
        self.started = time.monotonic()

    def __call__(self) -> Any:
        self.started = time.monotonic()
        return call_with_deadline(self._call, self._timeout)

    def time_left(self) -> float | None:
        return None if self._timeout is None else max(0.0, self.started + self._timeout - time.monotonic())

    def restart(self) -> None:
        """Wait for another ``timeout`` seconds."""
        self.started = time.monotonic()

    def give_up_if_late(self, future: Future[Any]) -> None:
        """Stop waiting for the call if its timeout has passed.

        Raises:
            TimeoutError, TierBusy: as in :meth:`Port.call`.
        """
        if future.cancel():
            raise TierBusy("all worker threads are in use")
        if self.time_left() == 0.0 and not future.done():
            raise TimeoutError


async def _await_call(port: Port, timed_call: _TimedCall, future: Future[T], period: Period | None = None) -> T:
    """Wait for a call and return its result. If the caller is cancelled, a call that has not started never runs."""
    try:
        while not await port.wait(future, timed_call.time_left()):
            if period is not None and period.renew():
                timed_call.restart()
            else:
                timed_call.give_up_if_late(future)
    except BaseException:
        future.cancel()
        raise
    return future.result()


class BlockingPort:
    """The port of the blocking methods. Each method of the port runs to its end without suspending."""

    @property
    def loop(self) -> asyncio.AbstractEventLoop | None:
        return None

    def __init__(self, workers: Workers, background: BackgroundLoop) -> None:
        self.windows: dict[Any, Any] = {}
        self._workers = workers
        self._background = background

    async def call(
        self, call: Callable[[], T], timeout: float | None, workers: Workers, *, inline: bool, quick: bool
    ) -> T:
        if quick:
            return call()
        if inline or timeout is None:
            return call_with_deadline(call, timeout)
        timed_call = _TimedCall(call, timeout)
        try:
            future: Future[T] = workers.submit(timed_call)
        except RuntimeError:  # no thread can be started, so the call is made here, and nothing can end it early
            return call_with_deadline(call, timeout)
        return await _await_call(self, timed_call, future)

    async def run_coroutine(
        self, start: Callable[[], Coroutine[Any, Any, T]], timeout: float | None, *, graces: int = 1
    ) -> T:
        return self._background.run(start, timeout)

    async def wait(
        self, future: Future[Any], timeout: float | None, keep_waiting: Callable[[], bool] | None = None
    ) -> bool:
        from concurrent.futures import wait

        if keep_waiting is None:
            return bool(wait([future], timeout).done)
        for left in _split_wait(timeout):
            if wait([future], left).done:
                return True
            if not keep_waiting():
                break
        return future.done()

    async def run_all(self, jobs: Sequence[Job], limit: int) -> None:
        if limit <= 1 or len(jobs) <= 1:
            for job in jobs:
                await job()
            return
        waiting = iter(jobs)
        lock = threading.Lock()
        stopped = threading.Event()
        errors: list[Exception] = []

        def work() -> None:
            while not stopped.is_set():
                with lock:
                    job = next(waiting, None)
                if job is None:
                    return
                try:
                    run_blocking(job())
                except Exception as error:  # noqa: BLE001  (raised below)
                    errors.append(error)
                    stopped.set()

        futures: list[Future[None]] = []
        try:
            # This thread works too, so that the jobs are done even if no other thread can be started.
            with contextlib.suppress(RuntimeError):
                for _ in range(min(limit, len(jobs)) - 1):
                    futures.append(self._workers.submit(work))  # noqa: PERF401  (keep the ones before an error)
            work()
            for future in futures:
                future.result()
        finally:
            stopped.set()
        if errors:
            raise errors[0]

    async def run_shielded(self, job: Job, done: Callable[[], None]) -> None:
        try:
            await job()
        finally:
            done()

    def start(self, job: Job) -> None:
        self._workers.submit(lambda: Context().run(lambda: run_blocking(job())))

    async def sleep(self, seconds: float) -> None:
        time.sleep(seconds)


async def _run_uncancelled(start: Callable[[], Coroutine[Any, Any, T]]) -> T:
    """Run a coroutine in the current task.

    A coroutine that awaits a task or a future gets a CancelledError if somebody cancels that. If it passed this error
    on, it would look as if its own caller were cancelled, and would end the work of the call that runs beside it.

    Raises:
        concurrent.futures.CancelledError: the coroutine was cancelled, but the current task was not.
    """
    import asyncio

    try:
        return await start()
    except asyncio.CancelledError as error:
        task = asyncio.current_task()
        if task is None or task.cancelling():
            raise
        raise CancelledError("a coroutine was cancelled, but not by its caller") from error


class LoopPort:
    """The port of the async methods, for the running event loop."""

    def __init__(self, workers: Workers) -> None:
        self.windows: dict[Any, Any] = {}
        self._workers = workers
        self._tasks: set[asyncio.Task[None]] = set()

    @property
    def loop(self) -> asyncio.AbstractEventLoop:
        import asyncio

        return asyncio.get_running_loop()  # the loop is not stored, because a port must not keep it alive

    async def call(
        self, call: Callable[[], T], timeout: float | None, workers: Workers, *, inline: bool, quick: bool
    ) -> T:
        if quick:
            return call()
        timed_call = _TimedCall(call, timeout)
        try:
            future: Future[T] = workers.submit(timed_call)
        except RuntimeError:  # no thread can be started; blocking the loop is better than losing what was paid for
            return timed_call()  # type: ignore[no-any-return]
        if timeout is None:
            return await _await_call(self, timed_call, future)
        from embedonce.event_loops import Period

        # A task that blocks the loop may also keep other threads from running, because it holds Python's lock.
        with Period(timeout) as period:
            try:
                return await _await_call(self, timed_call, future, period)
            except TimeoutError as error:
                if period.was_blocked():
                    raise LoopBusy(timed_call.started) from error
                raise

    async def run_coroutine(
        self, start: Callable[[], Coroutine[Any, Any, T]], timeout: float | None, *, graces: int = 1
    ) -> T:
        from embedonce.event_loops import async_deadline

        async with async_deadline(timeout, graces=graces):
            return await _run_uncancelled(start)

    async def wait(
        self, future: Future[Any], timeout: float | None, keep_waiting: Callable[[], bool] | None = None
    ) -> bool:
        import asyncio

        # Each caller waits for its own event, so that cancelling one caller does not cancel the flight for the others.
        woken = asyncio.Event()
        loop = self.loop

        def wake(_: Future[Any]) -> None:
            with contextlib.suppress(RuntimeError):  # the loop has ended, so there is no waiter left
                loop.call_soon_threadsafe(woken.set)

        future.add_done_callback(wake)
        for left in [timeout] if keep_waiting is None else _split_wait(timeout):
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(woken.wait(), left)
            if future.done() or (keep_waiting is not None and not keep_waiting()):
                break
        return future.done()

    async def run_all(self, jobs: Sequence[Job], limit: int) -> None:
        if limit <= 1 or len(jobs) <= 1:
            for job in jobs:
                await job()
            return
        import asyncio

        waiting = iter(jobs)
        errors: list[Exception] = []

        async def work() -> None:
            while not errors and (job := next(waiting, None)) is not None:
                try:
                    await job()
                except Exception as error:  # noqa: BLE001  (raised below)
                    errors.append(error)

        tasks = [asyncio.create_task(work()) for _ in range(min(limit, len(jobs)))]
        try:
            await asyncio.gather(*tasks)
        finally:
            for task in tasks:
                task.cancel()
        if errors:
            raise errors[0]

    async def run_shielded(self, job: Job, done: Callable[[], None]) -> None:
        import asyncio

        task = asyncio.create_task(job())
        self._tasks.add(task)  # an event loop keeps only weak references to asyncio tasks

        def finish_job(task: asyncio.Task[None]) -> None:
            self._tasks.discard(task)
            done()

        task.add_done_callback(finish_job)
        await asyncio.shield(task)

    def start(self, job: Job) -> None:
        import asyncio

        task = Context().run(asyncio.create_task, job())
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def sleep(self, seconds: float) -> None:
        import asyncio

        await asyncio.sleep(seconds)


class Ports:
    """Provides the ports: one blocking port, and one loop port per running event loop."""

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        """Start over. A forked child calls this too, because threads and event loops belong to the parent."""
        self.workers = Workers()
        self._background = BackgroundLoop("the provider")
        self.blocking = BlockingPort(self.workers, self._background)
        self._loops: WeakKeyDictionary[asyncio.AbstractEventLoop, LoopPort] = WeakKeyDictionary()

    def get_loop_port(self) -> LoopPort:
        """Return the port of the running event loop."""
        import asyncio

        loop = asyncio.get_running_loop()
        port = self._loops.get(loop)
        if port is None:
            # A port's unfinished asyncio tasks keep its closed loop alive, so drop the ports of closed loops here.
            for ref in self._loops.keyrefs():  # iterating over the dictionary fails if another loop adds its port
                other = ref()
                if other is not None and other.is_closed():
                    self._loops.pop(other, None)
            port = self._loops[loop] = LoopPort(self.workers)
        return port

    def close(self) -> None:
        self._background.close()
