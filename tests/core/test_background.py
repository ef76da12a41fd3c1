"""The loop on which blocking calls run what is asynchronous alone."""

from __future__ import annotations

import asyncio
import gc
import threading
import weakref
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import pytest

from embedonce.background import BackgroundLoop
from embedonce.errors import CacheClosed

PATIENT = 60.0


async def ident() -> int:
    return threading.get_ident()


def test_every_call_runs_on_one_loop_in_one_thread() -> None:
    loop = BackgroundLoop("the remote backend")
    with ThreadPoolExecutor(4) as pool:
        threads = {call.result() for call in [pool.submit(loop.run, ident, PATIENT) for _ in range(20)]}
    assert len(threads) == 1
    assert threading.get_ident() not in threads
    loop.close()
    loop.close()


def test_a_call_that_takes_too_long_is_cancelled() -> None:
    loop = BackgroundLoop("the remote backend")
    ended = threading.Event()

    async def hang() -> None:
        try:
            await asyncio.Event().wait()
        finally:
            ended.set()

    with pytest.raises(TimeoutError, match="the remote backend did not answer in time"):
        loop.run(hang, 0.05)
    assert ended.wait(PATIENT)
    loop.close()


def test_the_coroutines_own_errors_pass_through() -> None:
    loop = BackgroundLoop("the remote backend")

    async def fail(error: Exception) -> None:
        raise error

    for error in (TimeoutError("of the store"), KeyError("of the store"), CacheClosed("of the store")):
        with pytest.raises(type(error), match="of the store"):
            loop.run(partial(fail, error), PATIENT)
    loop.close()


def test_close_ends_what_is_under_way_and_then_runs_the_last_act() -> None:
    happened: list[str] = []
    started = threading.Event()

    async def hang() -> None:
        started.set()
        try:
            await asyncio.Event().wait()
        finally:
            happened.append("cancelled")

    async def at_end() -> None:
        happened.append("at end")

    loop = BackgroundLoop("the remote backend", at_end=at_end)
    with ThreadPoolExecutor(1) as pool:
        call = pool.submit(loop.run, hang, PATIENT)
        assert started.wait(PATIENT)
        loop.close()
        with pytest.raises(CacheClosed, match="the remote backend was closed while it was at work"):
            call.result(PATIENT)
    assert happened == ["cancelled", "at end"]
    with pytest.raises(CacheClosed, match="the remote backend is closed"):
        loop.run(ident, PATIENT)


def test_nothing_is_started_or_ended_that_was_not_used() -> None:
    async def at_end() -> None:
        raise AssertionError("nothing was begun")

    before = {*threading.enumerate()}
    BackgroundLoop("the remote backend", at_end=at_end).close()
    assert not [one for one in {*threading.enumerate()} - before if "remote" in one.name]


def test_an_object_that_holds_a_loop_ends_it_with_its_last_reference() -> None:
    class Holder:
        def __init__(self) -> None:
            self.loop = BackgroundLoop("the remote backend")
            weakref.finalize(self, self.loop.close)

    holder = Holder()
    number = holder.loop.run(ident, PATIENT)
    (thread,) = (one for one in threading.enumerate() if one.ident == number)
    del holder
    gc.collect()
    thread.join(PATIENT)
    assert not thread.is_alive()
