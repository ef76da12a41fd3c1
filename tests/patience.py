"""Helpers with which tests wait for a state, up to a generous timeout.

A busy machine may suspend any thread for seconds. On an idle machine these waits end almost immediately.
"""

from __future__ import annotations

import asyncio
import gc
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any, TypeVar

from embedonce import Cache, TierBusy

T = TypeVar("T")

LONG_TIMEOUT = 60.0
"""Timeout in seconds. It is far longer than any wait on a busy machine, but shorter than pytest's own timeout."""


def wait_until(true: Callable[[], object]) -> None:
    """Wait until ``true()`` returns a true value."""
    end = time.monotonic() + LONG_TIMEOUT
    while not true():
        assert time.monotonic() < end, f"the condition did not become true within {LONG_TIMEOUT:g} s"
        time.sleep(0.001)


def wait_until_collected(what: weakref.ref[Any]) -> None:
    """Wait until an object is garbage-collected. A thread may refer to the object for a moment after its call."""

    def is_gone() -> bool:
        gc.collect()
        return what() is None

    wait_until(is_gone)


@contextmanager
def hold_lock(lock: AbstractContextManager[Any]) -> Iterator[None]:
    """Hold a lock in another thread, so that a test can fork while another thread holds the lock."""
    locked, end = threading.Event(), threading.Event()

    def hold() -> None:
        with lock:
            locked.set()
            end.wait(LONG_TIMEOUT)

    holder = threading.Thread(target=hold)
    holder.start()
    try:
        assert locked.wait(LONG_TIMEOUT)
        yield
    finally:
        end.set()
        holder.join()


async def wait_until_async(true: Callable[[], object]) -> None:
    """Let this event loop run other asyncio tasks until ``true()`` returns a true value."""
    async with asyncio.timeout(LONG_TIMEOUT):
        while not true():
            await asyncio.sleep(0.001)


def count_followers(cache: Cache) -> int:
    """Return the number of calls that are waiting for a vector that another call computes."""
    with cache._chain.in_flight._lock:
        futures = [flight._future for flight in cache._chain.in_flight._flights.values() if flight._future is not None]
    return sum(len(future._waiters) + len(future._done_callbacks) for future in futures)  # type: ignore[attr-defined]


def retry_when_busy(call: Callable[[], T]) -> T:
    """Return the result of a call with a short timeout. Retry the call if no thread was free in time.

    A busy machine may start a thread only after the timeout has passed. Then the tier or the provider raises
    TierBusy, an error that the test is not about.
    """
    end = time.monotonic() + LONG_TIMEOUT
    while True:
        try:
            return call()
        except Exception as error:
            if not isinstance(error, TierBusy) and not isinstance(error.__cause__, TierBusy):
                raise
            assert time.monotonic() < end, f"no thread was free within {LONG_TIMEOUT:g} s"
