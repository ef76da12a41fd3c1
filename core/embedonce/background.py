"""An event loop in a thread of its own: how blocking calls run what is asynchronous alone."""

from __future__ import annotations

import threading
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
    """One event loop, started by the first call. Its thread is a daemon: a call that hangs keeps no program alive.

    A forked child has no thread but its own: make another there, and leave the parent's alone.

    Args:
        what: whose it is, for the thread's name and for messages: ``"the objects backend"``.
        at_end: run on the loop as its last act, to close a client there.
    """

    def __init__(self, what: str, *, at_end: Callable[[], Coroutine[Any, Any, object]] | None = None) -> None:
        self._what = what
        self._at_end = at_end
        self._lock = threading.RLock()
        self._closed = False
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread: threading.Thread | None = None

    def run(self, call: Callable[[], Coroutine[Any, Any, T]], timeout: float | None) -> T:
        """Return what a call of ``call`` comes to on the loop; a backend's ``timeout`` is ``time_left()``.

        It is cancelled where nobody waits for it any longer.

        Raises:
            TimeoutError: it took longer than ``timeout`` seconds.
            CacheClosed: :meth:`close` was called, before or meanwhile.
        """
        from concurrent.futures import CancelledError, wait

        future = self._begun(call)
        try:
            if not wait([future], timeout).done:
                raise TimeoutError(f"{self._what} did not answer in time")
            return future.result()
        except CancelledError:
            raise CacheClosed(f"{self._what} was closed while it was at work") from None
        finally:
            future.cancel()

    def close(self) -> None:
        """Cancel what still runs and end the loop, waiting a moment for a task that ignores it. Twice does nothing."""
        with self._lock:
            self._closed = True
            loop, self._loop = self._loop, None
            thread, self._thread = self._thread, None
        if loop is not None and thread is not None:
            loop.call_soon_threadsafe(loop.stop)
            if thread is not threading.current_thread():  # a finalizer runs wherever the last reference goes
                thread.join(CLOSE_SECONDS)

    def _begun(self, call: Callable[[], Coroutine[Any, Any, T]]) -> Future[T]:
        import asyncio

        with self._lock:  # held until the loop has the call: what comes after the loop's end is never answered
            if self._closed:
                raise CacheClosed(f"{self._what} is closed")
            if self._loop is None:
                self._loop = asyncio.new_event_loop()
                # Not a method of this object, which a thread would keep alive.
                self._thread = threading.Thread(
                    target=_run, args=(self._loop, self._at_end), name=f"embedonce: {self._what}", daemon=True
                )
                self._thread.start()
            return asyncio.run_coroutine_threadsafe(call(), self._loop)


def _run(loop: asyncio.AbstractEventLoop, at_end: Callable[[], Coroutine[Any, Any, object]] | None) -> None:
    import asyncio

    asyncio.set_event_loop(loop)
    try:
        loop.run_forever()
        left = asyncio.all_tasks(loop)
        for task in left:
            task.cancel()
        loop.run_until_complete(asyncio.gather(*left, return_exceptions=True))
        if at_end is not None:
            loop.run_until_complete(at_end())
        loop.run_until_complete(loop.shutdown_asyncgens())
    finally:
        loop.close()
