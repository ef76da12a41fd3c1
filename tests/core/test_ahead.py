"""Two windows of a long run are in flight. The rows, errors and limits are those of one window after the other."""

from __future__ import annotations

import asyncio
import gc
import os
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from patience import wait_until

from embedonce import Cache, TextError, Tier
from embedonce._engine.ahead import Turns, run_ahead
from embedonce._engine.ports import run_blocking
from embedonce._engine.workers import Workers
from embedonce.testing.fakes import CountingProvider, DictBackend

SECONDS = 20

faces = pytest.mark.parametrize("asynchronous", [False, True], ids=["sync", "async"])


def read_rows(cache: Cache, texts: Any, batch: int, *, asynchronous: bool) -> tuple[list[Any], Exception | None]:
    """Return the rows that come before an error, and the error."""
    rows: list[Any] = []

    async def read() -> None:
        async for row in cache.aembed_iter(texts, batch=batch):
            rows.append(row)  # noqa: PERF401  (the rows before an error count)

    try:
        if asynchronous:
            asyncio.run(read())
        else:
            for row in cache.embed_iter(texts, batch=batch):
                rows.append(row)  # noqa: PERF402  (the rows before an error count)
    except Exception as error:
        return rows, error
    return rows, None


class GatedProvider(CountingProvider):
    """Waits in each call for a permit."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.permits = threading.Semaphore(0)
        self.started = threading.Semaphore(0)
        inner = self.embed

        def embed(texts: Sequence[str], task: str) -> Any:
            self.started.release()
            assert self.permits.acquire(timeout=SECONDS)
            return inner(texts, task)

        self.embed = embed


class RecordingBackend(DictBackend):
    """Records the sizes of its writes."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.sizes: list[int] = []

    def set_many(self, items: Mapping[str, Any], ttl: float | None, /) -> None:
        super().set_many(items, ttl)
        if any(key.startswith("eo1.") for key in items):
            self.sizes.append(len(items))


# --- embed_iter -------------------------------------------------------------------------------


def test_the_next_window_is_computed_while_the_caller_uses_the_rows() -> None:
    provider = GatedProvider(max_batch=2)
    with Cache(provider, [DictBackend()]) as cache:
        rows = cache.embed_iter((str(number) for number in range(8)), batch=4)
        provider.permits.release(1)
        next(rows)  # the second window has been given to a thread by now
        assert provider.started.acquire(timeout=SECONDS)
        assert provider.started.acquire(timeout=SECONDS)
        provider.permits.release(10)
        assert len(list(rows)) == 7


@faces
@given(st.data())
def test_windows_in_flight_give_the_rows_and_errors_of_windows_in_turn(asynchronous: bool, data: st.DataObject) -> None:
    texts = data.draw(st.lists(st.sampled_from(["a", "b", "c", "d", "e", "f", "bad", "x\ud800"]), max_size=30))
    batch = data.draw(st.integers(1, 8))
    concurrency = data.draw(st.integers(1, 2))
    raises_at = data.draw(st.none() | st.integers(0, 30))

    class Provider(CountingProvider):
        def _embed(self, texts: Sequence[str], task: str) -> Any:
            if "bad" in texts:
                raise ValueError("bad text")
            return super()._embed(texts, task)

    def read() -> Iterator[str]:
        for place, text in enumerate(texts):
            if place == raises_at:
                raise OSError("the file is gone")
            yield text

    provider = Provider(max_batch=1, concurrency=concurrency)
    with Cache(provider, [DictBackend()]) as cache:
        rows, error = read_rows(cache, read(), batch, asynchronous=asynchronous)
        assert provider.most_at_once <= concurrency
        size = batch // 2 if batch // 2 >= concurrency else batch
    window: list[str] = []
    expected: Any = None
    good: list[str] = []
    for place, text in enumerate([*texts, None]):
        if place == raises_at and text is not None:
            expected = OSError
            break
        window += [] if text is None else [text]
        if len(window) == size or text is None:
            problem = next((one for one in window if one in ("bad", "x\ud800")), None)
            if problem is not None:
                expected = ValueError
                break
            good += window
            window = []
    assert isinstance(error, expected) if expected else error is None
    assert [row.tolist() for row in rows] == [provider.vector_of(text).tolist() for text in good]


@faces
def test_the_position_in_an_error_counts_from_the_first_text(asynchronous: bool) -> None:
    with Cache(CountingProvider(max_batch=1), [DictBackend()]) as cache:
        rows, error = read_rows(cache, ["a", "b", "c", "d", "x\ud800"], 4, asynchronous=asynchronous)
    assert len(rows) == 4
    assert isinstance(error, TextError)
    assert error.position == 4


@faces
@pytest.mark.parametrize("concurrency", [1, 3])
def test_the_windows_together_keep_the_limit_of_calls(asynchronous: bool, concurrency: int) -> None:
    provider = CountingProvider(max_batch=1, concurrency=concurrency, delay=0.001)
    with Cache(provider, [DictBackend()]) as cache:
        rows, error = read_rows(cache, map(str, range(60)), 12, asynchronous=asynchronous)
    assert (len(rows), error, len(provider.calls)) == (60, None, 60)
    assert provider.most_at_once <= concurrency


def test_an_iterator_that_is_closed_calls_the_provider_no_more(monkeypatch: pytest.MonkeyPatch) -> None:
    provider = GatedProvider(max_batch=1)
    end = Turns.end

    def end_and_let_calls_go_on(turns: Turns) -> None:
        end(turns)
        provider.permits.release(100)

    monkeypatch.setattr(Turns, "end", end_and_let_calls_go_on)
    with Cache(provider, [DictBackend()]) as cache:
        rows = cache.embed_iter(map(str, range(100)), batch=8)
        provider.permits.release(4)
        next(rows)
        for _ in range(5):
            assert provider.started.acquire(timeout=SECONDS)
        rows.close()  # type: ignore[attr-defined]
        # A call of the second window was in flight, and closing has waited for it.
        assert len(provider.calls) == 5


def test_an_iterator_that_is_not_read_to_its_end_leaves_no_task_behind() -> None:
    async def main() -> int:
        provider = CountingProvider(max_batch=1, delay=0.001)
        async with Cache(provider, [DictBackend()]) as cache:
            async for _ in cache.aembed_iter(map(str, range(100)), batch=8):
                break
            gc.collect()
            while len(asyncio.all_tasks()) > 1:
                await asyncio.sleep(0.001)
            return len(provider.calls)

    assert asyncio.run(main()) < 20


def test_an_async_iterator_can_be_cancelled() -> None:
    async def main() -> None:
        provider = CountingProvider(max_batch=1, delay=30, asynchronous=True)
        cache = Cache(provider, [DictBackend()])

        async def read() -> list[Any]:
            return [row async for row in cache.aembed_iter(map(str, range(10)), batch=4)]

        task = asyncio.create_task(read())
        while not provider.calls:
            await asyncio.sleep(0.001)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(main())


# --- entries that are stored together ---------------------------------------------------------


def test_entries_that_come_during_a_write_are_stored_together() -> None:
    provider = CountingProvider(max_batch=4)

    class Slow(RecordingBackend):
        def set_many(self, items: Mapping[str, Any], ttl: float | None, /) -> None:
            if not self.sizes:  # the first write takes until the window has begun its last call
                wait_until(lambda: len(provider.calls) >= 4)
            super().set_many(items, ttl)

    backend = Slow()
    with Cache(provider, [backend]) as cache:
        assert len(list(cache.embed_iter(map(str, range(16)), batch=32))) == 16
        assert backend.sizes[0] == 4
        assert sum(backend.sizes) == 16
        assert len(backend.sizes) < 4
        assert cache.lookup([str(number) for number in range(16)]).sources == ["slow"] * 16


@faces
def test_no_entry_waits_for_the_provider(asynchronous: bool) -> None:
    """What was computed is stored, and other calls get it, although the next call hangs."""
    provider = GatedProvider(max_batch=2)
    backend = DictBackend(scope="host")
    with Cache(provider, [backend]) as cache, ThreadPoolExecutor(2) as pool:
        provider.permits.release(3)
        run = pool.submit(read_rows, cache, list(map(str, range(16))), 16, asynchronous=asynchronous)
        try:
            texts = list(map(str, range(16)))
            wait_until(lambda: cache.lookup(texts).sources.count("dict") == 6)
            sources = cache.lookup(texts).sources
            stored = [text for text, source in zip(texts, sources, strict=True) if source]
            assert pool.submit(cache.embed_batch, stored).result(SECONDS).shape == (6, 8)
        finally:
            provider.permits.release(100)
        assert len(run.result(SECONDS)[0]) == 16


@faces
def test_a_provider_may_use_its_own_cache(asynchronous: bool) -> None:
    class Nested(CountingProvider):
        def _embed(self, texts: Sequence[str], task: str) -> Any:
            if not texts[0].startswith("part of "):
                cache.embed_batch(["part of " + text for text in texts])
                list(cache.embed_iter(["part of a part of " + text for text in texts], batch=8))
            return super()._embed(texts, task)

    cache = Cache(Nested(max_batch=2), [DictBackend()])
    with cache:
        rows, error = read_rows(cache, list(map(str, range(40))), 8, asynchronous=asynchronous)
    assert (len(rows), error) == (40, None)


def test_an_async_run_that_ends_early_stores_what_is_paid_for(caplog: pytest.LogCaptureFixture) -> None:
    backend = DictBackend()

    async def main() -> int:
        provider = CountingProvider(max_batch=1, delay=0.002, concurrency=2)
        async with Cache(provider, [backend]) as cache:
            async for _ in cache.aembed_iter(map(str, range(100)), batch=8):
                break
            while len(asyncio.all_tasks()) > 1:
                await asyncio.sleep(0.001)
            gc.collect()
            stored = cache.lookup(list(map(str, range(100)))).sources
            return sum(source is not None for source in stored) - len(provider.calls)

    assert asyncio.run(main()) == 0
    assert not caplog.records


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs os.fork")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_child_that_is_forked_in_the_loop_body_goes_on() -> None:
    provider = CountingProvider(max_batch=1, delay=0.005)
    with Cache(provider, [DictBackend()]) as cache:
        pid, count = -1, 0
        for _ in cache.embed_iter(map(str, range(40)), batch=8):
            count += 1
            if count == 2:
                pid = os.fork()
        if pid == 0:
            os._exit(0 if count == 40 else 1)
        assert count == 40
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0


def test_what_was_gathered_is_stored_if_a_later_call_is_interrupted() -> None:
    class Interrupt(BaseException): ...

    backend = RecordingBackend()
    provider = CountingProvider(max_batch=2)
    inner = provider.embed

    def embed(texts: Sequence[str], task: str) -> Any:
        if "6" in texts:
            raise Interrupt
        return inner(texts, task)

    provider.embed = embed
    with Cache(provider, [backend]) as cache:
        with pytest.raises(Interrupt):
            list(cache.embed_iter(map(str, range(20)), batch=20))
        assert cache.lookup([str(number) for number in range(6)]).sources == ["recording"] * 6


def test_entries_that_are_not_stored_are_still_answers() -> None:
    class Full(DictBackend):
        def set_many(self, items: Mapping[str, Any], ttl: float | None, /) -> None:
            raise OSError("full")

    with Cache(CountingProvider(max_batch=2), [Tier(Full(), name="full")]) as cache:
        rows = list(cache.embed_iter(map(str, range(20)), batch=8))
        assert len(rows) == 20
        assert cache.stats().tiers["full"].errors + cache.stats().tiers["full"].dropped == 20


def test_a_run_leaves_no_lease_to_renew() -> None:
    with Cache(CountingProvider(max_batch=2), [DictBackend(scope="host")]) as cache:
        list(cache.embed_iter(map(str, range(20)), batch=8))
        leases = cache._chain.engine.leases
        assert leases is not None
        assert not leases._active


# --- running ahead ----------------------------------------------------------------------------


def test_jobs_run_here_if_no_thread_can_be_started() -> None:
    class NoThreads(Workers):
        def submit(self, call: Callable[[], Any]) -> Any:
            raise RuntimeError("can't start new thread")

    workers = NoThreads()
    threads = list(run_ahead(lambda: workers, [threading.current_thread] * 3))
    assert threads == [threading.current_thread()] * 3


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs os.fork")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_forked_child_continues_a_run() -> None:
    workers = Workers()
    held = threading.Event()

    def wait() -> int:
        if os.getpid() == parent:
            held.wait(SECONDS)
        return os.getpid()

    parent = os.getpid()
    results = run_ahead(lambda: workers, [os.getpid, wait, os.getpid])
    next(results)
    pid = os.fork()
    if pid == 0:
        workers = Workers()
        os._exit(0 if list(results) == [os.getpid()] * 2 else 1)
    held.set()
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    assert list(results) == [parent] * 2


def test_a_turn_that_is_not_waited_for_goes_to_the_next() -> None:
    class Impatient:
        loop = None

        async def wait(self, future: Any, timeout: float | None) -> bool:
            raise KeyboardInterrupt

    class Patient:
        loop = None

        async def wait(self, future: Any, timeout: float | None) -> bool:
            future.result(SECONDS)
            return True

    turns, source = Turns().open_window(), object()
    run_blocking(turns.take(Patient(), source, 1))  # type: ignore[arg-type]
    with pytest.raises(KeyboardInterrupt):
        run_blocking(turns.take(Impatient(), source, 1))  # type: ignore[arg-type]
    turns.give_back(source)
    run_blocking(turns.take(Patient(), source, 1))  # type: ignore[arg-type]


def test_an_earlier_window_calls_the_provider_first() -> None:
    """The second window waits until the first one has begun its last call, even if the second one asks first."""
    provider = GatedProvider(max_batch=1)
    texts: list[str] = []
    inner = provider.embed

    def embed(asked: Sequence[str], task: str) -> Any:
        texts.extend(asked)
        return inner(asked, task)

    provider.embed = embed
    with Cache(provider, [DictBackend()]) as cache:
        provider.permits.release(100)
        assert len(list(cache.embed_iter(map(str, range(40)), batch=8))) == 40
    assert sorted(texts[:4]) == ["0", "1", "2", "3"]
    assert [int(text) // 4 for text in texts] == sorted(int(text) // 4 for text in texts)


@pytest.mark.parametrize("texts", [["a", "b", "a", "b", "c", "d"], ["a", "a", "a", "a", "b", "b"]])
def test_windows_with_the_same_texts_do_not_wait_for_each_other(texts: list[str]) -> None:
    provider = CountingProvider(max_batch=1)
    with Cache(provider, [DictBackend()]) as cache:
        for _ in range(20):
            cache.forget(sorted(set(texts)))
            assert len(list(cache.embed_iter(texts, batch=4))) == len(texts)
