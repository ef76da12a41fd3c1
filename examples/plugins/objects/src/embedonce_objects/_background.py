"""An event loop in a thread of its own: how blocking calls run asynchronous ones, and leave them at their deadline."""

from __future__ import annotations

import asyncio
import concurrent.futures
import threading
import time
from collections.abc import Coroutine
from typing import Any, TypeVar

from embedonce.contracts import time_left
from embedonce.errors import TierTimeout

T = TypeVar("T")

END_SECONDS = 5.0
"""How long a close waits for the thread."""
GRACE_SECONDS = 0.05


class Background:
    """A loop that starts with the first call. Its thread is a daemon: a call that hangs keeps no program alive."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._stop = asyncio.Event()

    def run(self, coroutine: Coroutine[Any, Any, T]) -> T:
        """Return what the coroutine returns; it is cancelled when the time that the call has is over.

        Raises:
            TierTimeout: it was.
        """
        try:
            left = time_left()
            future = asyncio.run_coroutine_threadsafe(coroutine, self._started())
        except BaseException:
            coroutine.close()
            raise
        try:
            return future.result(left)
        except concurrent.futures.TimeoutError:
            if future.done():  # at the last moment; or the error is the coroutine's own
                return future.result()
            raise TierTimeout("the store did not answer in time") from None
        finally:
            future.cancel()

    def _started(self) -> asyncio.AbstractEventLoop:
        with self._lock:
            if self._loop is None:
                started: concurrent.futures.Future[asyncio.AbstractEventLoop] = concurrent.futures.Future()
                main = self._main(started)
                self._thread = threading.Thread(target=asyncio.run, args=(main,), name=self._name, daemon=True)
                self._thread.start()
                self._loop = started.result()
            return self._loop

    async def _main(self, started: concurrent.futures.Future[asyncio.AbstractEventLoop]) -> None:
        started.set_result(asyncio.get_running_loop())
        await self._stop.wait()

    def close(self) -> None:
        """End the loop, and with it what is under way. Calling it twice does nothing."""
        with self._lock:
            if self._loop is None or self._thread is None or not self._thread.is_alive():
                return
            self._loop.call_soon_threadsafe(self._stop.set)
            if self._thread is not threading.current_thread():  # a finalizer runs wherever the last reference goes
                self._thread.join(END_SECONDS)
                # obstore's threads let go of their last Python objects a moment after a call has returned. A program
                # that ends in that moment is aborted by the interpreter.
                time.sleep(GRACE_SECONDS)
