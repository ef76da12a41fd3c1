"""With ``coalesce``, misses of several calls become one request, and no call notices anything of the others.

Most windows in these tests stay open until they are full, however long this takes. So the tests know which calls join.
"""

from __future__ import annotations

import asyncio
import itertools
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from contextvars import ContextVar
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.core.test_flights import run_in_fork
from tests.core.test_interrupts import interrupted_at
from tests.core.test_isolation import StatusError
from tests.patience import LONG_TIMEOUT, wait_until

from embedonce import Cache, ConfigError, DriftGuard, Embedded, Limits, Tier, config
from embedonce.errors import ProviderError
from embedonce.events import Computed, Event
from embedonce.functions import wrap
from embedonce.testing.fakes import CountingProvider, DictBackend
from embedonce_backends.memory import MemoryBackend

faces = pytest.mark.parametrize("asynchronous", [False, True], ids=["sync", "async"])


def open_cache(
    provider: Any, tiers: Sequence[Any] | None = None, *, wait: float = LONG_TIMEOUT, **options: Any
) -> Cache:
    """Return a cache whose windows stay open for ``wait`` seconds, which may be longer than an option may say."""
    cache = Cache(provider, [MemoryBackend()] if tiers is None else tiers, coalesce=1.0, **options)
    cache._source.coalesce = wait
    return cache


def run_calls(calls: Sequence[Callable[[], Any]], *, asynchronous: bool) -> list[Any]:
    """Run all calls at the same time, as coroutines or in threads. Return their results and exceptions."""
    if asynchronous:

        async def gather() -> list[Any]:
            return await asyncio.gather(*(call() for call in calls), return_exceptions=True)

        return asyncio.run(gather())
    with ThreadPoolExecutor(len(calls)) as pool:
        futures = [pool.submit(call) for call in calls]
        return [future.exception(LONG_TIMEOUT) or future.result() for future in futures]


def embed_each(cache: Cache, texts: Sequence[str], *, asynchronous: bool) -> list[Any]:
    """Embed each text in a call of its own. Return the vectors and exceptions."""
    embed: Callable[..., Any] = cache.aembed if asynchronous else cache.embed
    return run_calls([lambda text=text: embed(text) for text in texts], asynchronous=asynchronous)  # type: ignore[misc]


def list_windows(cache: Cache) -> list[Any]:
    ports = cache._chain.ports
    return [window for port in (ports.blocking, *ports._loops.values()) for window in list(port.windows.values())]


def count_waiting(cache: Cache) -> int:
    """Return the number of chunks that wait in windows."""
    return sum(len(window.parts) for window in list_windows(cache))


class Endpoint:
    """Embeds texts, counts its requests, and charges a token per character and three per request.

    A text that starts with ``bad`` makes its request fail, and a text that starts with ``nan`` gets no valid vector.
    ``failures`` are raised by the first requests.
    """

    def __init__(self, failures: Sequence[Exception] = ()) -> None:
        self.requests: list[list[str]] = []
        self.charged = 0
        self._failures = list(failures)
        self._lock = threading.Lock()

    def embed(self, texts: Sequence[str]) -> Embedded:
        with self._lock:
            self.requests.append(list(texts))
            if self._failures:
                raise self._failures.pop(0)
            if any(text.startswith("bad") for text in texts):
                raise StatusError("refused", 400)
            tokens = 3 + sum(map(len, texts))
            self.charged += tokens
        return Embedded(np.stack([self.vector_of(text) for text in texts]), tokens=tokens)

    async def aembed(self, texts: Sequence[str]) -> Embedded:
        return self.embed(texts)

    @staticmethod
    def vector_of(text: str) -> np.ndarray[Any, Any]:
        vector = CountingProvider(dimensions=4).vector_of(text)
        return np.full_like(vector, np.nan) if text.startswith("nan") else vector

    def open_cache(self, *, asynchronous: bool, tiers: Any = None, wait: float = LONG_TIMEOUT, **limits: Any) -> Cache:
        function: Any = self.aembed if asynchronous else self.embed
        space = {"provider": "endpoint", "model": "m", "dimensions": 4}
        return open_cache(wrap(function, space, Limits(**limits)), tiers, wait=wait)


# --- joining ----------------------------------------------------------------------------------


@faces
def test_misses_of_many_calls_become_one_request_as_soon_as_they_fill_it(asynchronous: bool) -> None:
    texts = [f"text {i}" for i in range(8)]
    provider, events = CountingProvider(max_batch=8), list[Event]()
    with open_cache(provider, listeners=[events.append]) as cache:
        rows = embed_each(cache, texts, asynchronous=asynchronous)
        stats = cache.stats()
        assert cache.lookup(texts).sources == ["memory"] * 8
        assert not list_windows(cache)
    assert all((row == provider.vector_of(text)).all() for text, row in zip(texts, rows, strict=True))
    assert [sorted(request) for _, request in provider.calls] == [texts]
    (computed,) = [event for event in events if isinstance(event, Computed)]
    counted = stats.providers["counting"]
    assert (computed.texts, computed.failed, computed.tokens) == (8, 0, 48)
    assert (counted.texts, counted.tokens, counted.seconds) == (8, 48, computed.seconds)
    assert (stats.computed.texts, stats.computed.tokens, stats.computed.seconds) == (8, 48, computed.seconds)


@faces
def test_a_window_ends_after_its_time(asynchronous: bool) -> None:
    provider = CountingProvider()
    with open_cache(provider, wait=0.001) as cache:
        rows = embed_each(cache, ["a", "b", "c"], asynchronous=asynchronous)
        assert all((row == provider.vector_of(text)).all() for text, row in zip("abc", rows, strict=True))
        assert not list_windows(cache)
    assert provider.texts == 3


def test_without_coalesce_no_call_waits_for_another() -> None:
    provider = CountingProvider(asynchronous=True)
    with Cache(provider, [MemoryBackend()]) as cache:
        embed_each(cache, ["a", "b", "c"], asynchronous=True)
    assert sorted(provider.calls) == [("document", (text,)) for text in "abc"]


def test_a_chunk_that_fills_a_request_does_not_wait() -> None:
    provider = CountingProvider(max_batch=3)
    with open_cache(provider) as cache:
        assert len(cache.embed_batch([str(i) for i in range(9)])) == 9
    assert [len(texts) for _, texts in provider.calls] == [3, 3, 3]


@faces
def test_calls_of_different_sizes_stay_within_max_batch(asynchronous: bool) -> None:
    provider = CountingProvider(max_batch=5)
    batches = [[f"{i}.{j}" for j in range(1 + i % 4)] for i in range(30)]
    with open_cache(provider, wait=0.02) as cache:
        embed: Callable[..., Any] = cache.aembed_batch if asynchronous else cache.embed_batch
        calls: Any = [lambda texts=texts: embed(texts) for texts in batches]
        for texts, rows in zip(batches, run_calls(calls, asynchronous=asynchronous), strict=True):
            assert (rows == np.stack([provider.vector_of(text) for text in texts])).all()
    assert provider.texts == sum(map(len, batches))  # and the provider refuses a request of six texts


def test_a_call_that_no_longer_fits_sends_the_window_and_begins_the_next_one() -> None:
    provider = CountingProvider(max_batch=4, asynchronous=True)

    async def run(cache: Cache) -> None:
        first = [asyncio.create_task(cache.aembed_batch(texts)) for texts in (["a", "b"], ["c"])]
        await asyncio.to_thread(wait_until, lambda: count_waiting(cache) == 2)
        late = asyncio.create_task(cache.aembed_batch(["d", "e"]))
        await asyncio.gather(*first)
        assert count_waiting(cache) == 1
        await asyncio.gather(late, cache.aembed_batch(["f", "g"]))

    with open_cache(provider) as cache:
        asyncio.run(run(cache))
    assert [texts for _, texts in provider.calls] == [("a", "b", "c"), ("d", "e", "f", "g")]


@faces
def test_tokens_limit_a_window_too(asynchronous: bool) -> None:
    class Counting(CountingProvider):
        def __init__(self) -> None:
            super().__init__()
            self.limits = Limits(max_batch=100, max_tokens=10)

        def count_tokens(self, text: str) -> int:
            return len(text)

    provider = Counting()
    with open_cache(provider) as cache:
        for texts in (["aaaaa", "bbbbb"], ["ccccc", "ddddd"]):
            embed_each(cache, texts, asynchronous=asynchronous)
    assert [len(texts) for _, texts in provider.calls] == [2, 2]


@faces
def test_a_limit_that_the_provider_has_named_fills_a_window(asynchronous: bool) -> None:
    endpoint = Endpoint()
    with endpoint.open_cache(asynchronous=asynchronous) as cache:
        cache._source.batches.learn_number(2)
        for texts in (["a", "b"], ["c", "d"]):
            embed_each(cache, texts, asynchronous=asynchronous)
    assert [len(texts) for texts in endpoint.requests] == [2, 2]


@faces
def test_equal_texts_of_several_calls_are_sent_once(asynchronous: bool) -> None:
    provider = CountingProvider(max_batch=2)
    with open_cache(provider) as cache:
        rows = embed_each(cache, ["a", "b", "a", "b"], asynchronous=asynchronous)
        assert all((row == provider.vector_of(text)).all() for text, row in zip("abab", rows, strict=True))
    assert provider.texts == 2


def test_a_call_that_computes_a_text_itself_does_not_join_the_call_that_it_waited_for() -> None:
    provider = CountingProvider(max_batch=2, asynchronous=True)

    async def run(cache: Cache) -> None:
        first = asyncio.create_task(cache.aembed("same"))
        await asyncio.to_thread(wait_until, lambda: count_waiting(cache) == 1)
        second = asyncio.create_task(cache.aembed("same"))
        await first
        await asyncio.to_thread(wait_until, lambda: count_waiting(cache) == 1)
        await asyncio.gather(second, cache.aembed("other"))

    with open_cache(provider, max_wait=0.01) as cache:
        asyncio.run(run(cache))
    assert [texts for _, texts in provider.calls] == [("same",), ("same", "other")]


# --- not joining ------------------------------------------------------------------------------


@faces
def test_calls_of_different_tasks_and_providers_are_not_joined(asynchronous: bool) -> None:
    first, second = CountingProvider(max_batch=2, symmetric=False), CountingProvider(max_batch=2, symmetric=False)
    with open_cache(first) as cache:
        other = cache.for_provider(second, coalesce=1.0)
        other._source.coalesce = LONG_TIMEOUT
        texts = {(cache, "document"): "ab", (cache, "query"): "cd", (other, "document"): "ef", (other, "query"): "gh"}
        calls: Any = [
            lambda of=of, task=task, text=text: of.aembed(text, task) if asynchronous else of.embed(text, task)
            for place in range(2)
            for (of, task), letters in texts.items()
            for text in letters[place]
        ]
        run_calls(calls, asynchronous=asynchronous)
    assert sorted((task, *sorted(sent)) for task, sent in first.calls) == [("document", "a", "b"), ("query", "c", "d")]
    assert sorted((task, *sorted(sent)) for task, sent in second.calls) == [("document", "e", "f"), ("query", "g", "h")]


@faces
def test_calls_of_different_namespaces_are_not_joined(asynchronous: bool) -> None:
    provider = CountingProvider(max_batch=2)
    with open_cache(provider) as cache:
        caches = [cache, cache.for_namespace("one"), cache.for_namespace("two")]
        calls: Any = [
            lambda of=of, text=text: of.aembed(text) if asynchronous else of.embed(text)
            for text in "ab"
            for of in caches
        ]
        run_calls(calls, asynchronous=asynchronous)
    assert [sorted(texts) for _, texts in provider.calls] == [["a", "b"]] * 3


def test_calls_of_two_event_loops_and_of_threads_are_not_joined() -> None:
    provider = CountingProvider(max_batch=2)
    with open_cache(provider) as cache, ThreadPoolExecutor(3) as pool:
        calls = [
            pool.submit(embed_each, cache, list(texts), asynchronous=asynchronous)
            for texts, asynchronous in (("ab", True), ("cd", True), ("ef", False))
        ]
        for call in calls:
            assert not any(isinstance(row, BaseException) for row in call.result(LONG_TIMEOUT))
    assert sorted("".join(sorted(texts)) for _, texts in provider.calls) == ["ab", "cd", "ef"]


@faces
def test_a_long_run_does_not_wait(asynchronous: bool) -> None:
    provider = CountingProvider(max_batch=5)
    texts = [f"{i}" for i in range(48)]

    async def collect(cache: Cache) -> list[Any]:
        return [row async for row in cache.aembed_iter(texts, batch=20)]

    with open_cache(provider) as cache:
        rows = asyncio.run(collect(cache)) if asynchronous else list(cache.embed_iter(texts, batch=20))
    assert all((row == provider.vector_of(text)).all() for text, row in zip(texts, rows, strict=True))


@faces
def test_a_check_for_drift_does_not_wait(asynchronous: bool) -> None:
    provider = CountingProvider(max_batch=8)
    with open_cache(provider, drift=DriftGuard(texts=["canary one", "canary two"])) as cache:
        embed_each(cache, [f"{i}" for i in range(8)], asynchronous=asynchronous)
    assert [len(texts) for _, texts in provider.calls] == [2, 8]


@faces
def test_a_joined_request_does_not_run_in_the_context_of_one_call(asynchronous: bool) -> None:
    """A provider that reads a credential from a context variable must not use it for the texts of other calls."""
    credential: ContextVar[str] = ContextVar("credential", default="none")
    seen = []

    class Reading(CountingProvider):
        def _answer(self, texts: Sequence[str], task: str) -> Embedded:
            seen.append(credential.get())
            return super()._answer(texts, task)

    with open_cache(Reading(max_batch=2)) as cache:

        async def aembed(text: str) -> Any:
            credential.set(text)
            return await cache.aembed(text)

        def embed(text: str) -> Any:
            credential.set(text)
            return cache.embed(text)

        calls: Any = [lambda text=text: (aembed if asynchronous else embed)(text) for text in "ab"]
        run_calls(calls, asynchronous=asynchronous)
    assert seen == ["none"]


# --- cancelled and interrupted calls ----------------------------------------------------------


@pytest.mark.parametrize("cancelled", [0, 1, 2])
def test_cancelling_a_call_leaves_the_others_and_its_own_vector(cancelled: int) -> None:
    provider = CountingProvider(max_batch=4, asynchronous=True)

    async def run(cache: Cache) -> None:
        tasks = [asyncio.create_task(cache.aembed(text)) for text in "abc"]
        await asyncio.to_thread(wait_until, lambda: count_waiting(cache) == 3)
        tasks[cancelled].cancel()
        with pytest.raises(asyncio.CancelledError):
            await tasks[cancelled]
        tasks.append(asyncio.create_task(cache.aembed("d")))
        for text, task in zip("abcd", tasks, strict=True):
            if not task.cancelled():
                assert (await task == provider.vector_of(text)).all()
        await asyncio.to_thread(wait_until, lambda: cache.lookup(list("abcd")).sources == ["memory"] * 4)

    with open_cache(provider) as cache:
        asyncio.run(run(cache))
    assert [len(texts) for _, texts in provider.calls] == [4]


@pytest.fixture
def obeys_ctrl_c() -> Iterator[None]:
    """A program that was started in the background ignores Ctrl-C, and so do its child processes."""
    earlier = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, earlier)


@pytest.mark.usefixtures("obeys_ctrl_c")
@pytest.mark.parametrize("interrupted", ["first", "second"])
def test_ctrl_c_in_a_blocking_call_leaves_the_others(interrupted: str) -> None:
    assert threading.current_thread() is threading.main_thread()
    provider = CountingProvider(max_batch=3)
    with open_cache(provider) as cache, ThreadPoolExecutor(3) as pool:

        def interrupt() -> None:
            wait_until(lambda: count_waiting(cache) == 2)
            signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)

        def join_later() -> Any:
            wait_until(lambda: count_waiting(cache) == 1)
            return cache.embed("other")

        if interrupted == "second":
            other = pool.submit(cache.embed, "other")
            wait_until(lambda: count_waiting(cache) == 1)
        else:
            other = pool.submit(join_later)
        interrupting = pool.submit(interrupt)
        with pytest.raises(KeyboardInterrupt):
            cache.embed("mine")
        interrupting.result(LONG_TIMEOUT)
        assert (cache.embed("third") == provider.vector_of("third")).all()
        assert (other.result(LONG_TIMEOUT) == provider.vector_of("other")).all()
    assert [sorted(texts) for _, texts in provider.calls] == [["mine", "other", "third"]]


# Python warns when it collects a coroutine that was never awaited. An interrupt may leave such a coroutine behind.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.filterwarnings("ignore:coroutine .* was never awaited:RuntimeWarning")
def test_ctrl_c_at_any_line_of_a_window_does_not_block_later_calls() -> None:
    with ThreadPoolExecutor(1) as pool:
        for line in itertools.count():
            provider = CountingProvider()
            with open_cache(provider, wait=0.0001) as cache:
                with suppress(KeyboardInterrupt), interrupted_at(line, "coalescing.py") as lines:
                    cache.embed("mine")
                other = pool.submit(cache.embed, "other")
                assert (cache.embed("mine") == provider.vector_of("mine")).all(), f"interrupted at line {line}"
                assert (other.result(LONG_TIMEOUT) == provider.vector_of("other")).all(), f"interrupted at line {line}"
            if lines[0] < line:
                break
    assert line > 30


def test_an_event_loop_that_ends_leaves_nothing_to_the_next_one() -> None:
    provider = CountingProvider(max_batch=2, asynchronous=True)

    async def leave(cache: Cache) -> None:
        task = asyncio.create_task(cache.aembed("a"))
        await asyncio.to_thread(wait_until, lambda: count_waiting(cache) == 1)
        del task

    with open_cache(provider) as cache:
        asyncio.run(leave(cache))
        rows = embed_each(cache, ["a", "b"], asynchronous=True)
        assert (rows[0] == provider.vector_of("a")).all()
    assert [sorted(texts) for _, texts in provider.calls] == [["a", "b"]]


@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork.*:DeprecationWarning")
def test_a_forked_child_does_not_join_the_windows_of_its_parent() -> None:
    provider = CountingProvider(max_batch=2)
    with open_cache(provider) as cache, ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(cache.embed, "parent")
        wait_until(lambda: count_waiting(cache) == 1)

        def child() -> bool:
            rows = embed_each(cache, ["parent", "child"], asynchronous=False)
            good = [(rows[0] == provider.vector_of("parent")).all(), (rows[1] == provider.vector_of("child")).all()]
            return all(good)

        run_in_fork(child)
        cache.embed("second")
        assert (waiting.result(LONG_TIMEOUT) == provider.vector_of("parent")).all()
    assert [sorted(texts) for _, texts in provider.calls] == [["parent", "second"]]


@pytest.mark.parametrize("allowed", [0, 1])
def test_without_new_threads_each_call_makes_its_own_request(allowed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    provider = CountingProvider(max_batch=5, concurrency=4)
    start, left = threading.Thread.start, [allowed]

    def limited(thread: threading.Thread) -> None:
        left[0] -= 1
        if left[0] < 0:
            raise RuntimeError("can't start new thread")
        start(thread)

    with open_cache(provider, wait=0.001) as cache:
        monkeypatch.setattr(threading.Thread, "start", limited)
        assert (cache.embed("a") == provider.vector_of("a")).all()
        assert len(cache.embed_batch([f"{i}" for i in range(23)])) == 23


# --- failures ---------------------------------------------------------------------------------


@faces
def test_a_text_that_is_refused_fails_only_its_own_call(asynchronous: bool) -> None:
    endpoint = Endpoint()
    texts = ["a", "b", "bad", "c", "d", "e", "f", "g"]
    with endpoint.open_cache(asynchronous=asynchronous, max_batch=8) as cache:
        rows = embed_each(cache, texts, asynchronous=asynchronous)
        assert cache.stats().providers["endpoint"].failed == 1
    assert isinstance(rows.pop(2), StatusError)
    assert all((row == endpoint.vector_of(text)).all() for text, row in zip("abcdefg", rows, strict=True))
    assert len(endpoint.requests) <= 1 + 2 * 3


@faces
def test_an_invalid_vector_fails_only_its_own_text(asynchronous: bool) -> None:
    endpoint = Endpoint()
    with endpoint.open_cache(asynchronous=asynchronous, max_batch=4) as cache:
        fetch: Any = cache.afetch if asynchronous else cache.fetch
        both, alone, good = run_calls(
            [lambda: fetch(["a", "nan"]), lambda: fetch(["nan too"]), lambda: fetch(["b"])], asynchronous=asynchronous
        )
    assert (list(both.failed), list(alone.failed), list(good.failed)) == ([1], [0], [])
    assert both.sources == ["provider", None]
    assert len(endpoint.requests) == 1


@faces
@pytest.mark.parametrize(
    "make_error",
    [lambda: StatusError("no such key", 401), lambda: ConnectionError("refused"), lambda: NameError("a bug")],
)
def test_a_failure_of_the_provider_reaches_every_call_as_its_own_copy(asynchronous: bool, make_error: Any) -> None:
    error = make_error()
    endpoint = Endpoint([error])
    with endpoint.open_cache(asynchronous=asynchronous, max_batch=4) as cache:
        found = embed_each(cache, ["a", "b", "c", "d"], asynchronous=asynchronous)
        assert cache.stats().providers["endpoint"].failed == 4
    assert len({id(one) for one in (error, *found)}) == 5
    assert {(type(one), str(one)) for one in found} == {(type(error), str(error))}
    assert len(endpoint.requests) == 1


@faces
def test_an_answer_that_does_not_fit_is_asked_for_by_each_call_again(asynchronous: bool) -> None:
    """The wrong number of vectors may be due to one text."""

    class Skipping(Endpoint):
        def embed(self, texts: Sequence[str]) -> Embedded:
            found = super().embed(texts)
            kept = [i for i, text in enumerate(texts) if text != "skipped"]
            return Embedded(np.asarray(found.vectors)[kept], tokens=found.tokens)

    endpoint = Skipping()
    with endpoint.open_cache(asynchronous=asynchronous, max_batch=3) as cache:
        a, skipped, b = embed_each(cache, ["a", "skipped", "b"], asynchronous=asynchronous)
    assert (a == endpoint.vector_of("a")).all()
    assert (b == endpoint.vector_of("b")).all()
    assert isinstance(skipped, Exception)


@faces
def test_many_refused_texts_do_not_fail_the_other_calls(asynchronous: bool) -> None:
    endpoint = Endpoint()
    texts = [*(f"bad {i}" for i in range(31)), "good"]
    with endpoint.open_cache(asynchronous=asynchronous, max_batch=32) as cache:
        *bad, good = embed_each(cache, texts, asynchronous=asynchronous)
    assert (good == endpoint.vector_of("good")).all()
    assert all(isinstance(error, StatusError) for error in bad)


@faces
def test_after_status_429_the_joined_request_is_repeated_as_a_whole(asynchronous: bool) -> None:
    endpoint = Endpoint([StatusError("slow down", 429, response=None, headers={"retry-after-ms": "1"})])
    with endpoint.open_cache(asynchronous=asynchronous, max_batch=3, max_retries=2) as cache:
        cache._source.rate.pause = lambda seconds: False  # type: ignore[method-assign]
        rows = embed_each(cache, ["a", "b", "c"], asynchronous=asynchronous)
    assert all((row == endpoint.vector_of(text)).all() for text, row in zip("abc", rows, strict=True))
    assert [len(texts) for texts in endpoint.requests] == [3, 3]


@faces
def test_a_server_that_is_down_gets_as_few_requests_as_from_one_call(asynchronous: bool) -> None:
    endpoint = Endpoint([StatusError("down", 503) for _ in range(100)])
    with endpoint.open_cache(asynchronous=asynchronous, max_batch=8, max_retries=0) as cache:
        found = embed_each(cache, [f"{i}" for i in range(8)], asynchronous=asynchronous)
    assert {str(error) for error in found} == {"down"}
    assert len(endpoint.requests) <= 5


def test_after_an_exit_of_the_provider_each_call_makes_its_own_request() -> None:
    class Exiting(CountingProvider):
        def _answer(self, texts: Sequence[str], task: str) -> Embedded:
            if len(texts) > 1:
                raise SystemExit
            return super()._answer(texts, task)

    provider = Exiting(max_batch=2)
    with open_cache(provider) as cache:
        rows = embed_each(cache, ["a", "b"], asynchronous=False)
        assert all((row == provider.vector_of(text)).all() for text, row in zip("ab", rows, strict=True))


def test_after_a_cancelled_window_each_call_makes_its_own_request() -> None:
    provider = CountingProvider(asynchronous=True)

    async def run(cache: Cache) -> list[Any]:
        calls = [asyncio.create_task(cache.aembed(text)) for text in "ab"]
        await asyncio.to_thread(wait_until, lambda: count_waiting(cache) == 2)
        (window,) = [task for task in asyncio.all_tasks() if "_Window.run" in repr(task)]
        window.cancel()
        return await asyncio.gather(*calls)

    with open_cache(provider) as cache:
        rows = asyncio.run(run(cache))
        assert all((row == provider.vector_of(text)).all() for text, row in zip("ab", rows, strict=True))
        assert not list_windows(cache)
    assert len(provider.calls) == 2


@faces
def test_a_joined_request_keeps_no_landed_flight(asynchronous: bool) -> None:
    """Flights that have landed are kept for calls that have not claimed their keys yet."""
    kept = []

    class Watching(CountingProvider):
        def _answer(self, texts: Sequence[str], task: str) -> Embedded:
            kept.append(len(cache._chain.in_flight._reading))
            return super()._answer(texts, task)

    with open_cache(Watching(max_batch=2)) as cache:
        embed_each(cache, ["a", "b"], asynchronous=asynchronous)
    assert kept == [0]


@faces
def test_the_fallback_serves_the_calls_of_a_joined_request_that_failed(asynchronous: bool) -> None:
    endpoint = Endpoint([ConnectionError("refused")])
    main = wrap(endpoint.embed, {"provider": "endpoint", "model": "m", "dimensions": 4}, Limits(max_batch=3))
    fallback = CountingProvider(dimensions=4, max_batch=3)
    with open_cache(main, fallback=fallback, fallback_coalesce=1.0) as cache:
        assert cache._fallback is not None
        cache._fallback.coalesce = LONG_TIMEOUT
        rows = embed_each(cache, ["a", "b", "c"], asynchronous=asynchronous)
        assert all((row == fallback.vector_of(text)).all() for text, row in zip("abc", rows, strict=True))
    assert (len(endpoint.requests), len(fallback.calls)) == (1, 1)


@faces
def test_a_provider_that_uses_its_own_cache_does_not_wait_for_itself(asynchronous: bool) -> None:
    class Nested(CountingProvider):
        has_nested = False

        def _answer(self, texts: Sequence[str], task: str) -> Embedded:
            if not self.has_nested:
                self.has_nested = True
                cache._source.coalesce = 0.001
                for text in (*texts, "more"):
                    assert (cache.embed(text) == self.vector_of(text)).all()
            return super()._answer(texts, task)

    provider = Nested(max_batch=2)
    with open_cache(provider) as cache:
        rows = embed_each(cache, ["a", "b"], asynchronous=asynchronous)
        assert all((row == provider.vector_of(text)).all() for text, row in zip("ab", rows, strict=True))
    assert sorted(provider.count.items()) == [("a", 2), ("b", 2), ("more", 1)]


# --- other parts of the engine ----------------------------------------------------------------


@faces
def test_joined_calls_take_leases_and_store_their_own_entries(asynchronous: bool) -> None:
    store, provider = DictBackend(scope="host"), CountingProvider(max_batch=4)
    with open_cache(provider, [Tier(store, name="host", timeout=LONG_TIMEOUT)]) as cache:
        fetch: Any = cache.afetch if asynchronous else cache.fetch
        calls: Any = [lambda text=text: fetch([text], metadata=[{"of": text}]) for text in "abcd"]
        found = run_calls(calls, asynchronous=asynchronous)
        assert all(one.seconds["provider"] > 0 for one in found)
        assert [item["of"] for item in cache.lookup(list("abcd")).metadata if item] == list("abcd")
    assert len(provider.calls) == 1


@faces
def test_calls_that_compute_known_texts_again_are_joined(asynchronous: bool) -> None:
    provider = CountingProvider(max_batch=2)
    with open_cache(provider) as cache:
        cache.embed_batch(["a", "b"])
        fetch: Any = cache.afetch if asynchronous else cache.fetch
        calls: Any = [lambda text=text: fetch([text], fresh=True) for text in "ab"]
        for found in run_calls(calls, asynchronous=asynchronous):
            assert (found.sources, found.changed, found.computed.texts) == (["provider"], frozenset(), 1)
    assert [len(texts) for _, texts in provider.calls] == [2, 2]


@faces
def test_a_call_that_stores_nothing_can_join_one_that_does(asynchronous: bool) -> None:
    provider = CountingProvider(max_batch=2)
    with open_cache(provider) as cache:
        fetch: Any = cache.afetch if asynchronous else cache.fetch
        run_calls([lambda: fetch(["kept"]), lambda: fetch(["not kept"], store=False)], asynchronous=asynchronous)
        assert cache.lookup(["kept", "not kept"]).sources == ["memory", None]
    assert len(provider.calls) == 1


def list_tokens(store: DictBackend) -> Iterator[int]:
    for entry, _ in store._store.values():
        assert entry.tokens is not None
        yield entry.tokens


words = st.sampled_from(["a", "bb", "ccc", "déjà", "bad one", "bad two", "nan", "ffffff", "g", "hh", "iii"])


@settings(deadline=None, max_examples=60)
@given(
    st.lists(st.lists(words, min_size=1, max_size=4), min_size=1, max_size=8),
    st.integers(1, 9),
)
def test_any_mix_of_calls_gets_its_vectors_and_pays_exactly_what_was_charged(
    batches: list[list[str]], max_batch: int
) -> None:
    endpoint, store, events = Endpoint(), DictBackend(holds="entries", scope="process"), list[Event]()
    paid = wasted = 0
    with endpoint.open_cache(asynchronous=True, tiers=[store], max_batch=max_batch, wait=0.001) as cache:
        cache.subscribe(events.append)
        calls: Any = [lambda texts=texts: cache.afetch(texts) for texts in batches]
        for texts, found in zip(batches, run_calls(calls, asynchronous=True), strict=True):
            for i, text in enumerate(texts):
                if text.startswith("bad"):
                    assert isinstance(found.failed[i], StatusError)
                elif text == "nan":
                    assert isinstance(found.failed[i], ProviderError)
                else:
                    assert (found.rows[i] == endpoint.vector_of(text)).all()
            paid += found.computed.tokens
            wasted += found.wasted.tokens
            assert found.wasted.texts == 0 or "nan" in texts, "the call pays for an invalid text of another call"
        counted = cache.stats().providers["endpoint"]
        computed = [event for event in events if isinstance(event, Computed)]
    assert all(len(request) <= max_batch for request in endpoint.requests)
    assert len(computed) == len(endpoint.requests)
    assert sum(event.tokens or 0 for event in computed) == counted.tokens == endpoint.charged
    assert sum(event.texts for event in computed) == counted.texts == len(store)
    assert sum(event.seconds for event in computed) == pytest.approx(counted.seconds)
    assert sum(list_tokens(store)) == paid
    assert paid + wasted == endpoint.charged


# --- options ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["coalesce", "fallback_coalesce"])
@pytest.mark.parametrize("seconds", [0, -1.0, 1.5, float("nan"), True, "2ms"])
def test_an_invalid_time_is_refused_with_the_name_of_its_argument(name: str, seconds: Any) -> None:
    with pytest.raises(ConfigError, match=rf"^{name} must be "):
        Cache(CountingProvider(), **{name: seconds})


def test_the_time_is_an_option_of_the_tables_of_both_providers() -> None:
    ngram = {"type": "ngram", "coalesce": "2ms"}
    with config.open({"provider": {**ngram, "fallback": {**ngram, "coalesce": 1}}, "tiers": []}) as cache:
        assert cache._source.coalesce == 0.002
        assert cache._fallback is not None
        assert cache._fallback.coalesce == 1.0


@pytest.mark.parametrize("time", ["0s", "2s"])
def test_a_time_in_a_table_has_bounds(time: str) -> None:
    with pytest.raises(ConfigError, match="coalesce"):
        config.open({"provider": {"type": "ngram", "coalesce": time}, "tiers": []})
