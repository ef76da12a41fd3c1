"""How tests wait: on a state, for as long as it takes, and never for ever.

A machine that tests share may stop any thread for seconds. What is waited for here comes at once on a quiet one.
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

GENEROUS = 60.0
"""Seconds: far more than anything takes on a busy machine, and less than pytest waits before it ends a test."""


def until(true: Callable[[], object]) -> None:
    """Return as soon as ``true()`` is."""
    end = time.monotonic() + GENEROUS
    while not true():
        assert time.monotonic() < end, "what is waited for does not come"
        time.sleep(0.001)


def until_gone(what: weakref.ref[Any]) -> None:
    """Return when an object is gone. A thread that has used it may hold it for a moment after its answer is there."""

    def gone() -> bool:
        gc.collect()
        return what() is None

    until(gone)


@contextmanager
def held(lock: AbstractContextManager[Any]) -> Iterator[None]:
    """Let another thread hold a lock, as one may at the moment of a fork."""
    begun, end = threading.Event(), threading.Event()

    def hold() -> None:
        with lock:
            begun.set()
            end.wait(GENEROUS)

    holding = threading.Thread(target=hold)
    holding.start()
    try:
        assert begun.wait(GENEROUS)
        yield
    finally:
        end.set()
        holding.join()


async def auntil(true: Callable[[], object]) -> None:
    """Let the tasks of this loop run until ``true()`` is."""
    async with asyncio.timeout(GENEROUS):
        while not true():
            await asyncio.sleep(0.001)


def followers(cache: Cache) -> int:
    """Return how many calls wait at this moment for what others compute."""
    with cache._chain.in_flight._lock:
        futures = [flight._future for flight in cache._chain.in_flight._flights.values() if flight._future is not None]
    return sum(len(future._waiters) + len(future._done_callbacks) for future in futures)  # type: ignore[attr-defined]


def made(call: Callable[[], T]) -> T:
    """Return what a call came to that is given up after a moment; make it again where no thread was free in time.

    A busy machine may start a thread so late that the moment is over before anything was asked: then the tier, or the
    provider, says that it is busy, and not what this call was made for.
    """
    end = time.monotonic() + GENEROUS
    while True:
        try:
            return call()
        except Exception as error:
            if not isinstance(error, TierBusy) and not isinstance(error.__cause__, TierBusy):
                raise
            assert time.monotonic() < end, "no thread is ever free"
