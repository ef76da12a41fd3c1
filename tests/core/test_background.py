"""The loop on which blocking calls run what is asynchronous alone."""

from __future__ import annotations

import asyncio
import gc
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import CancelledError, ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from pathlib import Path

import pytest

from embedonce import Capabilities, background
from embedonce.background import BackgroundLoop
from embedonce.contracts import time_left
from embedonce.errors import CacheClosed
from embedonce.testing import BackendContract

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
        with pytest.raises(CacheClosed, match="the remote backend was closed during the call"):
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


def test_a_loop_that_nobody_holds_ends() -> None:
    loop = BackgroundLoop("the remote backend")
    number = loop.run(ident, PATIENT)
    (thread,) = (one for one in threading.enumerate() if one.ident == number)
    del loop
    gc.collect()
    thread.join(PATIENT)
    assert not thread.is_alive()


def test_a_call_that_ignores_its_end_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(background, "CLOSE_SECONDS", 0.05)
    started, go = threading.Event(), threading.Event()

    async def stubborn() -> None:
        started.set()
        while not go.is_set():
            with suppress(asyncio.CancelledError):
                await asyncio.sleep(0.01)

    loop = BackgroundLoop("the remote backend")
    with ThreadPoolExecutor(1) as pool:
        call = pool.submit(loop.run, stubborn, None)
        assert started.wait(PATIENT)
        loop.close()
        with pytest.raises(CacheClosed, match="was closed during the call"):
            call.result(PATIENT)
    go.set()


def test_what_a_call_cancels_itself_is_its_own_error() -> None:
    async def cancels() -> None:
        task = asyncio.ensure_future(asyncio.sleep(PATIENT))
        task.cancel()
        await task

    loop = BackgroundLoop("the remote backend")
    with pytest.raises(CancelledError):
        loop.run(cancels, PATIENT)
    loop.close()


def test_a_call_that_ends_its_thread_ends_itself_alone() -> None:
    async def ends() -> None:
        raise SystemExit(3)

    loop = BackgroundLoop("the remote backend")
    with pytest.raises(SystemExit):
        loop.run(ends, None)
    assert loop.run(ident, PATIENT)
    loop.close()


def test_a_call_from_the_loop_itself_is_refused() -> None:
    loop = BackgroundLoop("the remote backend")

    async def nested() -> int:
        return loop.run(ident, None)

    with pytest.raises(RuntimeError, match="would deadlock; await it"):
        loop.run(nested, None)
    loop.close()


def test_what_the_last_act_raises_reaches_who_closes() -> None:
    async def at_end() -> None:
        raise OSError("the connection was gone")

    loop = BackgroundLoop("the remote backend", at_end=at_end)
    loop.run(ident, PATIENT)
    with pytest.raises(OSError, match="the connection was gone"):
        loop.close()
    loop.close()


def test_tasks_that_begin_at_the_end_are_ended_too() -> None:
    begun: list[asyncio.Task[None]] = []
    started = threading.Event()

    async def goes_on() -> None:
        try:
            started.set()
            await asyncio.Event().wait()
        finally:
            begun.append(asyncio.ensure_future(asyncio.sleep(PATIENT)))

    loop = BackgroundLoop("the remote backend")
    with ThreadPoolExecutor(1) as pool:
        call = pool.submit(loop.run, goes_on, None)
        assert started.wait(PATIENT)
        loop.close()
        with pytest.raises(CacheClosed):
            call.result(PATIENT)
    assert begun[0].cancelled()


def test_a_thread_that_cannot_start_is_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    def start(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    loop = BackgroundLoop("the remote backend")
    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", start)
        with pytest.raises(RuntimeError, match="can't start"):
            loop.run(ident, PATIENT)
    assert loop.run(ident, PATIENT)
    loop.close()


class RemoteBackend:
    """As docs/plugins.md shows it: the client is a dict of this process that takes its time."""

    capabilities = Capabilities(scope="process", deadline=True, fork=False)

    def __init__(self) -> None:
        self._loop = BackgroundLoop("the remote backend")
        self._frames: dict[str, bytes] = {}

    def get_many(self, keys: Sequence[str], /) -> Mapping[str, bytes]:
        return self._loop.run(lambda: self._get_many(keys), time_left())

    def set_many(self, items: Mapping[str, bytes], ttl: float | None, /) -> None:
        self._loop.run(lambda: self._set_many(items), time_left())

    def close(self) -> None:
        self._loop.close()

    async def _get_many(self, keys: Sequence[str]) -> Mapping[str, bytes]:
        await asyncio.sleep(0)
        return {key: self._frames[key] for key in keys if key in self._frames}

    async def _set_many(self, items: Mapping[str, bytes]) -> None:
        await asyncio.sleep(0)
        self._frames.update(items)


class TestABackendOnALoop(BackendContract):
    """A forked child among other things, in which every call raises at once."""

    examples = 10

    def make(self) -> RemoteBackend:
        return RemoteBackend()


@pytest.mark.skipif((3, 12) <= sys.version_info < (3, 12, 2), reason="this Python starts no thread as a program ends")
def test_what_is_queued_when_the_program_ends_is_written_by_a_client_with_a_pool_of_threads(tmp_path: Path) -> None:
    """Thread pools take no work any more when atexit's callbacks come."""
    program = f"""
import asyncio, time
from pathlib import Path
from embedonce import Cache, Capabilities, Tier
from embedonce.background import BackgroundLoop
from embedonce.contracts import time_left
from embedonce.testing import CountingProvider

class InThreads:
    capabilities = Capabilities(scope="network", deadline=True, max_batch=10)

    def __init__(self):
        self.loop = BackgroundLoop("the threaded backend")

    def get_many(self, keys):
        return {{}}

    def set_many(self, items, ttl):
        self.loop.run(lambda: asyncio.to_thread(self.write, items), time_left())

    def write(self, items):
        time.sleep(0.01)
        for key in items:
            (Path({str(tmp_path)!r}) / key).touch()

    def close(self):
        self.loop.close()

cache = Cache(CountingProvider(), [Tier(InThreads(), name="far", write="background", timeout=60)], flush_timeout=60)
cache.embed_batch([f"text {{n}}" for n in range(100)])
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=110, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert len(list(tmp_path.iterdir())) >= 100
