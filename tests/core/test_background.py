"""BackgroundLoop runs asynchronous code for blocking calls."""

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
from patience import LONG_TIMEOUT

from embedonce import Capabilities, background
from embedonce.background import BackgroundLoop
from embedonce.contracts import time_left
from embedonce.errors import CacheClosed
from embedonce.testing import BackendContract


async def get_thread_id() -> int:
    return threading.get_ident()


def test_every_call_runs_on_one_loop_in_one_thread() -> None:
    loop = BackgroundLoop("the remote backend")
    with ThreadPoolExecutor(4) as pool:
        threads = {call.result() for call in [pool.submit(loop.run, get_thread_id, LONG_TIMEOUT) for _ in range(20)]}
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
    assert ended.wait(LONG_TIMEOUT)
    loop.close()


def test_errors_of_the_coroutine_reach_the_caller() -> None:
    loop = BackgroundLoop("the remote backend")

    async def fail(error: Exception) -> None:
        raise error

    for error in (TimeoutError("of the store"), KeyError("of the store"), CacheClosed("of the store")):
        with pytest.raises(type(error), match="of the store"):
            loop.run(partial(fail, error), LONG_TIMEOUT)
    loop.close()


def test_close_cancels_running_calls_and_then_runs_at_end() -> None:
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
        call = pool.submit(loop.run, hang, LONG_TIMEOUT)
        assert started.wait(LONG_TIMEOUT)
        loop.close()
        with pytest.raises(CacheClosed, match="the remote backend was closed during the call"):
            call.result(LONG_TIMEOUT)
    assert happened == ["cancelled", "at end"]
    with pytest.raises(CacheClosed, match="the remote backend is closed"):
        loop.run(get_thread_id, LONG_TIMEOUT)


def test_an_unused_loop_starts_no_thread_and_does_not_run_at_end() -> None:
    async def at_end() -> None:
        raise AssertionError("at_end ran although no call was made")

    before = {*threading.enumerate()}
    BackgroundLoop("the remote backend", at_end=at_end).close()
    assert not [one for one in {*threading.enumerate()} - before if "remote" in one.name]


def test_a_garbage_collected_loop_ends_its_thread() -> None:
    loop = BackgroundLoop("the remote backend")
    number = loop.run(get_thread_id, LONG_TIMEOUT)
    (thread,) = (one for one in threading.enumerate() if one.ident == number)
    del loop
    gc.collect()
    thread.join(LONG_TIMEOUT)
    assert not thread.is_alive()


def test_close_does_not_wait_for_ever_for_a_call_that_ignores_cancellation(monkeypatch: pytest.MonkeyPatch) -> None:
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
        assert started.wait(LONG_TIMEOUT)
        loop.close()
        with pytest.raises(CacheClosed, match="was closed during the call"):
            call.result(LONG_TIMEOUT)
    go.set()


def test_a_cancellation_that_the_call_causes_itself_reaches_the_caller() -> None:
    async def cancels() -> None:
        task = asyncio.ensure_future(asyncio.sleep(LONG_TIMEOUT))
        task.cancel()
        await task

    loop = BackgroundLoop("the remote backend")
    with pytest.raises(CancelledError):
        loop.run(cancels, LONG_TIMEOUT)
    loop.close()


def test_system_exit_in_a_call_does_not_end_the_loop() -> None:
    async def ends() -> None:
        raise SystemExit(3)

    loop = BackgroundLoop("the remote backend")
    with pytest.raises(SystemExit):
        loop.run(ends, None)
    assert loop.run(get_thread_id, LONG_TIMEOUT)
    loop.close()


def test_a_call_from_the_loops_own_thread_is_refused() -> None:
    loop = BackgroundLoop("the remote backend")

    async def nested() -> int:
        return loop.run(get_thread_id, None)

    with pytest.raises(RuntimeError, match="would deadlock; await the coroutine instead"):
        loop.run(nested, None)
    loop.close()


def test_close_raises_the_error_of_at_end() -> None:
    async def at_end() -> None:
        raise OSError("the connection was gone")

    loop = BackgroundLoop("the remote backend", at_end=at_end)
    loop.run(get_thread_id, LONG_TIMEOUT)
    with pytest.raises(OSError, match="the connection was gone"):
        loop.close()
    loop.close()


def test_tasks_that_start_while_the_loop_closes_are_cancelled_too() -> None:
    begun: list[asyncio.Task[None]] = []
    started = threading.Event()

    async def goes_on() -> None:
        try:
            started.set()
            await asyncio.Event().wait()
        finally:
            begun.append(asyncio.ensure_future(asyncio.sleep(LONG_TIMEOUT)))

    loop = BackgroundLoop("the remote backend")
    with ThreadPoolExecutor(1) as pool:
        call = pool.submit(loop.run, goes_on, None)
        assert started.wait(LONG_TIMEOUT)
        loop.close()
        with pytest.raises(CacheClosed):
            call.result(LONG_TIMEOUT)
    assert begun[0].cancelled()


def test_the_next_call_tries_again_to_start_the_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    def start(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    loop = BackgroundLoop("the remote backend")
    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", start)
        with pytest.raises(RuntimeError, match="no thread can be started; raise the limit"):
            loop.run(get_thread_id, LONG_TIMEOUT)
    assert loop.run(get_thread_id, LONG_TIMEOUT)
    loop.close()


class RemoteBackend:
    """The example of docs/plugins.md, whose client is a dict in this process."""

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
    """A backend with ``fork=False``. BackendContract checks that every call in a forked child raises immediately."""

    examples = 10

    def make(self) -> RemoteBackend:
        return RemoteBackend()


@pytest.mark.skipif((3, 12) <= sys.version_info < (3, 12, 2), reason="this Python cannot start a thread during exit")
def test_queued_writes_are_done_at_exit_by_a_client_that_needs_a_thread_pool(tmp_path: Path) -> None:
    """Python shuts down thread pools before it runs the atexit callbacks, so the writes must be done even earlier."""
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
