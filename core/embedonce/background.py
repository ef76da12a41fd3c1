"""An event loop in a thread of its own: how blocking calls run what is asynchronous alone."""

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
"""How long a close waits for what ignores that it is cancelled."""


class BackgroundLoop:
    """One event loop, started by the first call, and ended by :meth:`close` or with the last reference to this object.

    Its thread is a daemon: a call that hangs keeps no program alive. In a forked child, which has no thread but its
    own, every call raises: declare ``fork=False``, or make another one there.

    Args:
        what: whose it is, for messages and the thread's name: ``"the objects backend"``.
        at_end: run on the loop as its last act, to close a client there.
    """

    def __init__(self, what: str, *, at_end: Callable[[], Coroutine[Any, Any, object]] | None = None) -> None:
        self._loop = _SharedLoop(what, at_end)
        self._finalizer = weakref.finalize(self, self._loop.close)

    @property
    def closed(self) -> bool:
        """Whether :meth:`close` was called."""
        return self._loop.closed

    def run(self, call: Callable[[], Coroutine[Any, Any, T]], timeout: float | None) -> T:
        """Return what a call of ``call`` comes to on the loop; a backend's ``timeout`` is ``time_left()``.

        It is cancelled where nobody waits for it any longer.

        Raises:
            TimeoutError: it took longer than ``timeout`` seconds.
            CacheClosed: :meth:`close` was called, before or meanwhile.
            RuntimeError: this is the loop's own thread, which would wait for itself, or a forked child.
        """
        return self._loop.run(call, timeout)

    def close(self) -> None:
        """Cancel what still runs and end the loop, waiting a moment for a task that ignores it. Twice does nothing.

        Raises:
            Exception: what ``at_end`` raised.
        """
        self._finalizer()


class _SharedLoop:
    """What the thread shares with the object that its users hold, and keeps alive without keeping that one."""

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
                raise CacheClosed(f"{self._what} was closed while it was at work") from None
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
        return future.result()  # a timeout of the call's own, or an answer that came at the last moment

    def close(self) -> None:
        with self._lock:
            self.closed = True
            loop, thread = self._loop, self._thread
        if loop is None or thread is None or self._process != os.getpid():
            return
        loop.call_soon_threadsafe(self._stop)
        if thread is not threading.current_thread():  # a finalizer runs wherever the last reference goes
            thread.join(CLOSE_SECONDS)
            self._cancel_calls()
            if self._failed is not None:
                raise self._failed

    def _schedule(self, call: Callable[[], Coroutine[Any, Any, T]]) -> Future[T]:
        import asyncio

        if self._process != os.getpid():
            raise RuntimeError(f"{self._what} cannot go on in a forked child: make another one there")
        with self._lock:  # held until the loop has the call: what comes after the loop's end is never answered
            if self.closed:
                raise CacheClosed(f"{self._what} is closed")
            if threading.current_thread() is self._thread:
                raise RuntimeError(f"{self._what} is called on its own event loop, and would wait for itself: await it")
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
                except (SystemExit, KeyboardInterrupt):  # a coroutine's: its caller gets it as the loop goes on
                    continue
            loop.run_until_complete(_cancel_tasks())
            if self._at_end is not None:
                loop.run_until_complete(self._at_end())
            loop.run_until_complete(loop.shutdown_asyncgens())
        except BaseException as error:  # noqa: BLE001  (whoever closes gets it)
            self._failed = error
        finally:
            self._cancel_calls()
            loop.close()

    def _cancel_calls(self) -> None:
        """Tell the callers that still wait that no answer will come."""
        for future in list(self._calls):
            future.cancel()


async def _cancel_tasks() -> None:
    """Cancel every other task of this loop, and those that they begin meanwhile."""
    import asyncio

    while others := asyncio.all_tasks() - {asyncio.current_task()}:
        for task in others:
            task.cancel()
        await asyncio.gather(*others, return_exceptions=True)
