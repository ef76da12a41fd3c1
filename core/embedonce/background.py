"""An event loop in a background thread, for blocking calls that have to run asynchronous code."""

from __future__ import annotations

import os
import threading
import weakref
from collections.abc import Callable, Coroutine
from typing import TYPE_CHECKING, Any, TypeVar

from .errors import CacheClosed

if TYPE_CHECKING:
    import asyncio
    from concurrent.futures import Future

T = TypeVar("T")

CLOSE_SECONDS = 5.0
"""Maximum number of seconds that ``close`` waits for asyncio tasks that ignore their cancellation."""


class BackgroundLoop:
    """An event loop in a thread of its own.

    The first call starts the loop. The loop ends with :meth:`close`, or when this object is garbage-collected.
    The loop's thread is a daemon, so a hanging call does not keep the program alive. In a forked child the thread does
    not exist, so every call raises. A backend must declare ``fork=False`` or create another ``BackgroundLoop`` in the
    child.

    Args:
        what: a name for the owner, such as ``"the objects backend"``. Messages and the thread's name contain this name.
        at_end: a coroutine function that runs last on the loop, to close a client there.
    """

    def __init__(self, what: str, *, at_end: Callable[[], Coroutine[Any, Any, object]] | None = None) -> None:
        self._loop = _SharedLoop(what, at_end)
        self._finalizer = weakref.finalize(self, self._loop.close)

    @property
    def closed(self) -> bool:
        """Whether :meth:`close` was called."""
        return self._loop.closed

    def run(self, call: Callable[[], Coroutine[Any, Any, T]], timeout: float | None) -> T:
        """Call ``call`` to get a coroutine, run the coroutine on the loop, and return its result.

        A backend passes ``time_left()`` as ``timeout``. The coroutine is cancelled when the caller stops waiting.

        Raises:
            TimeoutError: the coroutine took longer than ``timeout`` seconds.
            CacheClosed: :meth:`close` was called, before or during the call.
            RuntimeError: the caller is on the loop's own thread, or in a forked child.
        """
        return self._loop.run(call, timeout)

    def close(self) -> None:
        """Cancel all asyncio tasks and end the loop. A second call does nothing.

        This method waits a few seconds for asyncio tasks that ignore their cancellation.

        Raises:
            Exception: any error that ``at_end`` raised.
        """
        self._finalizer()


class _SharedLoop:
    """The state of a ``BackgroundLoop``.

    The thread refers only to this state, so that the ``BackgroundLoop`` itself can be garbage-collected.
    """

    def __init__(self, what: str, at_end: Callable[[], Coroutine[Any, Any, object]] | None) -> None:
        self.closed = False
        self._what = what
        self._at_end = at_end
        self._process = os.getpid()
        self._lock = threading.RLock()
        self._calls: set[Future[Any]] = set()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread: threading.Thread | None = None
        self._stopping = False
        self._failed: BaseException | None = None

    def run(self, call: Callable[[], Coroutine[Any, Any, T]], timeout: float | None) -> T:
        from concurrent.futures import CancelledError

        future = self._schedule(call)
        try:
            return self._wait_for_result(future, timeout)
        except CancelledError:
            if self.closed:
                raise CacheClosed(f"{self._what} was closed during the call") from None
            raise
        finally:
            self._calls.discard(future)
            future.cancel()

    def _wait_for_result(self, future: Future[T], timeout: float | None) -> T:
        try:
            return future.result(timeout)
        except TimeoutError:
            if not future.done():
                raise TimeoutError(f"{self._what} did not answer in time") from None
        return future.result()  # the coroutine raised a TimeoutError of its own, or ended at the last moment

    def close(self) -> None:
        with self._lock:
            self.closed = True
            loop, thread = self._loop, self._thread
        if loop is None or thread is None or self._process != os.getpid():
            return
        loop.call_soon_threadsafe(self._stop)
        # Garbage collection may run the finalizer on the loop's thread, and a thread cannot wait for its own end.
        if thread is not threading.current_thread():
            thread.join(CLOSE_SECONDS)
            self._cancel_calls()
            if self._failed is not None:
                raise self._failed

    def _schedule(self, call: Callable[[], Coroutine[Any, Any, T]]) -> Future[T]:
        import asyncio

        if self._process != os.getpid():
            raise RuntimeError(f"{self._what} cannot be used in a forked child; create a new one in the child")
        # Hold the lock until the loop has the call, because a call that arrives after the loop's end gets no result.
        with self._lock:
            if self.closed:
                raise CacheClosed(f"{self._what} is closed")
            if threading.current_thread() is self._thread:
                raise RuntimeError(
                    f"{self._what} was called on its own event loop and would deadlock; await the coroutine instead"
                )
            loop = self._loop or self._start()
            future = asyncio.run_coroutine_threadsafe(call(), loop)
            self._calls.add(future)
            return future

    def _start(self) -> asyncio.AbstractEventLoop:
        import asyncio

        loop = asyncio.new_event_loop()
        thread = threading.Thread(target=self._work, args=(loop,), name=f"embedonce: {self._what}", daemon=True)
        try:
            thread.start()
        except RuntimeError:
            loop.close()
            raise RuntimeError(
                f"{self._what} requires a thread, but no thread can be started; raise the limit of processes (pids.max "
                "or ulimit -u), or use fewer threads"
            ) from None
        except BaseException:
            loop.close()
            raise
        self._loop, self._thread = loop, thread
        return loop

    def _stop(self) -> None:
        assert self._loop is not None
        self._stopping = True
        self._loop.stop()

    def _work(self, loop: asyncio.AbstractEventLoop) -> None:
        import asyncio

        asyncio.set_event_loop(loop)
        try:
            while not self._stopping:
                try:
                    loop.run_forever()
                except (SystemExit, KeyboardInterrupt):
                    continue  # the caller of the coroutine gets the exception
            loop.run_until_complete(_cancel_tasks())
            if self._at_end is not None:
                loop.run_until_complete(self._at_end())
            loop.run_until_complete(loop.shutdown_asyncgens())
        except BaseException as error:  # noqa: BLE001  (close raises it)
            self._failed = error
        finally:
            self._cancel_calls()
            loop.close()

    def _cancel_calls(self) -> None:
        """Cancel the calls that are still waiting, because the loop will not finish them."""
        for future in list(self._calls):
            future.cancel()


async def _cancel_tasks() -> None:
    """Cancel all other asyncio tasks of this loop, including those that start during the cancellation."""
    import asyncio

    while others := asyncio.all_tasks() - {asyncio.current_task()}:
        for task in others:
            task.cancel()
        await asyncio.gather(*others, return_exceptions=True)
