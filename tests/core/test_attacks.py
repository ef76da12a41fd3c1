"""Regression tests for attempts to break the engine. Each attempt once caused wrong vectors, lost vectors or a hang."""

from __future__ import annotations

import asyncio
import copy
import gc
import itertools
import multiprocessing
import os
import pickle
import random
import signal
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from enum import Enum
from functools import partial
from pathlib import Path
from typing import Any

import children
import numpy as np
import pytest
from patience import LONG_TIMEOUT, wait_until_async

from embedonce import Cache, CacheClosed, ConfigError, EraseIncomplete, Incomplete, Limits, ProviderError, Tier
from embedonce.functions import FunctionProvider
from embedonce.testing.fakes import CountingProvider, DictBackend
from embedonce.testing.faults import Fault, FaultyBackend, FaultyProvider, ProviderFault
from embedonce_backends.disk import DiskBackend
from embedonce_backends.memory import MemoryBackend

SPACE = {"model": "m"}


def lengths(texts: list[str]) -> list[list[float]]:
    return [[float(len(text)), 1.0] for text in texts]


# --- wrong vectors ----------------------------------------------------------------------------


def test_a_caller_may_change_its_list_during_the_call() -> None:
    backend = DictBackend(scope="host")
    with Cache(lengths, [backend], space=SPACE) as cache:

        async def main() -> Any:
            texts = ["a", "bb"]
            task = asyncio.create_task(cache.aembed_batch(texts))
            await asyncio.sleep(0)
            texts[:] = ["cccccc", "dddddddd"]
            return await task

        assert asyncio.run(main())[:, 0].tolist() == [1, 2]
        assert [row is not None and row[0] for row in cache.lookup(["a", "bb"]).rows] == [1, 2]


class Kind(str, Enum):  # noqa: UP042 - str() of a member is not its text, unlike in a StrEnum
    TEA = "tea"


class Caseless(str):
    def __eq__(self, other: object) -> bool:
        return self.lower() == str(other).lower()

    def __hash__(self) -> int:
        return hash(self.lower())


def test_a_subclass_of_str_counts_as_its_text() -> None:
    seen: list[str] = []

    def embed(texts: list[str]) -> list[list[float]]:
        seen.extend(f"passage: {text}" for text in texts)
        assert all(type(text) is str for text in texts)
        return lengths(texts)

    with Cache(embed, [MemoryBackend()], space=SPACE) as cache:
        cache.embed(Kind.TEA)
        cache.embed("tea")
        cache.embed_batch([Caseless("HELLO")])
        cache.embed("hello")
        cache.embed(np.str_("numpy"))
    assert seen == ["passage: tea", "passage: HELLO", "passage: hello", "passage: numpy"]


def test_vectors_of_different_dimensions_in_one_call_are_never_joined() -> None:
    for _ in range(50):
        barrier = threading.Barrier(2)

        def embed(texts: list[str], barrier: threading.Barrier = barrier) -> list[list[float]]:
            barrier.wait(LONG_TIMEOUT)
            return [[1.0, 2.0]] if texts == ["a"] else [[3.0, 4.0, 5.0, 6.0]]

        provider = FunctionProvider(embed, SPACE, Limits(max_batch=1, concurrency=2))
        with Cache(provider, [MemoryBackend()]) as cache:
            fetched = cache.fetch(["a", "b"])
            assert len(fetched.failed) == 1
            assert isinstance(next(iter(fetched.failed.values())), ProviderError)
    from embedonce.answers import matrix

    with pytest.raises(Incomplete):
        matrix([np.zeros(2, np.float32), np.zeros(4, np.float32)], None)


def test_two_caches_of_different_precision_on_one_memory_backend() -> None:
    shared = MemoryBackend()
    provider = CountingProvider(dimensions=32)
    with Cache(provider, [shared], dtype="int8") as coarse, Cache(provider, [shared]) as fine:
        rough = coarse.embed("x").copy()
        for _ in range(2):
            assert (fine.embed("x") == provider.vector_of("x")).all()
            assert (fine.embed_batch(["x"])[0] == provider.vector_of("x")).all()
            assert (coarse.embed("x") == rough).all()


@pytest.mark.parametrize("junk", ["junk", 7, (), (1, 2, 3, 4, 5)])
def test_junk_from_the_get_of_an_in_process_backend_is_a_miss(junk: Any) -> None:
    class Junk(MemoryBackend):
        def __init__(self) -> None:
            super().__init__()
            self.get = lambda key: junk  # type: ignore[assignment]

    with Cache(lengths, [Junk()], space=SPACE) as cache:
        assert [cache.embed("four")[0] for _ in range(3)] == [4, 4, 4]


# --- hangs ------------------------------------------------------------------------------------


def test_a_token_counter_that_raises_affects_only_its_text_and_nobody_hangs() -> None:
    class Provider(CountingProvider):
        def count_tokens(self, text: str) -> int:
            if text == "<|endoftext|>":
                raise ValueError("a special token")
            return 1

    provider = Provider()
    provider.limits = Limits(max_tokens=100)
    with Cache(provider, [MemoryBackend()]) as cache, ThreadPoolExecutor(1) as pool:
        assert not cache.fetch(["good", "<|endoftext|>"]).failed
        assert pool.submit(cache.embed, "good").result(LONG_TIMEOUT) is not None


def test_an_error_between_claim_and_computation_leaves_no_flight(monkeypatch: pytest.MonkeyPatch) -> None:
    with Cache(lengths, [MemoryBackend()], space=SPACE) as cache, ThreadPoolExecutor(1) as pool:
        route = cache._routes[cache._source, "document"]
        monkeypatch.setattr(route.keyer, "_steps", ())

        def interrupted(*_: Any) -> Any:
            raise KeyboardInterrupt

        with monkeypatch.context() as patch:
            patch.setattr("embedonce._engine.call.Answer.normalize_texts", interrupted)
            with pytest.raises(KeyboardInterrupt):
                cache.embed_batch(["a", "b"])
        assert pool.submit(cache.embed, "a").result(LONG_TIMEOUT)[0] == 1


@pytest.mark.slow
# Python prints and discards a KeyboardInterrupt that is raised in the callback of a weak reference.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("seed", range(12))
def test_ctrl_c_at_any_moment_makes_no_other_call_hang(seed: int, tmp_path: Path) -> None:
    chance = random.Random(seed)
    texts = [f"text {i}" for i in range(3000)]
    tiers = [MemoryBackend(), DiskBackend(path=tmp_path)]
    with Cache(lengths, tiers, space=SPACE, max_wait=5.0) as cache:
        for round_ in range(4):
            mine = [f"{round_} {text}" for text in texts]
            signal.signal(signal.SIGVTALRM, signal.default_int_handler)
            with suppress(KeyboardInterrupt):
                try:
                    signal.setitimer(signal.ITIMER_VIRTUAL, chance.uniform(0.0005, 0.03))
                    cache.embed_batch(mine)
                finally:
                    stop_signals()  # the signal may also arrive during this call
            stop_signals()
            with ThreadPoolExecutor(1) as pool:
                matrix = pool.submit(cache.embed_batch, mine).result(LONG_TIMEOUT)
            assert matrix[:, 0].tolist() == [float(len(text)) for text in mine]
        gc.collect()  # a traceback in a reference cycle may keep the ticket of an interrupted call alive
        assert not cache._chain.in_flight._calls


@pytest.mark.parametrize("where", ["provider", "backend"])
def test_stop_iteration_is_an_ordinary_error(where: str) -> None:
    def embed(texts: list[str]) -> Any:
        return next(iter([])) if where == "provider" else lengths(texts)

    faulty = FaultyBackend(DictBackend(scope="network"), [Fault("raise", error=StopIteration)] * (where == "backend"))

    async def main() -> Any:
        async with asyncio.timeout(LONG_TIMEOUT):
            with Cache(embed, [Tier(faulty, name="far", timeout=LONG_TIMEOUT)], space=SPACE) as cache:
                return await cache.afetch(["four"]), cache.stats()

    fetched, stats = asyncio.run(main())
    if where == "provider":
        assert isinstance(fetched.failed[0], RuntimeError)
    else:
        assert fetched.rows[0][0] == 4
        assert "timeout" not in stats.tiers["far"].causes


def test_a_fork_while_other_threads_count(tmp_path: Path) -> None:
    with Cache(lengths, [MemoryBackend()], space=SPACE) as cache:
        cache.embed_batch(["x", "y"])
        stop = threading.Event()

        def count() -> None:
            while not stop.is_set():
                cache.embed_batch(["x", "y"])

        threads = [threading.Thread(target=count) for _ in range(4)]
        for thread in threads:
            thread.start()
        try:
            for _ in range(25):
                run_in_fork(lambda: bool(cache.embed_batch(["x"])[0, 0] == 1) and cache.stats() is not None)
        finally:
            stop.set()
            for thread in threads:
                thread.join()


def run_in_fork(work: Callable[[], bool]) -> None:
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # the test forks while threads run, on purpose
        pid = os.fork()
    if pid == 0:
        try:
            os._exit(0 if work() else 3)
        finally:
            os._exit(4)
    end = time.monotonic() + LONG_TIMEOUT
    while time.monotonic() < end:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            assert os.waitstatus_to_exitcode(status) == 0
            return
        time.sleep(0.002)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    pytest.fail("the forked child hangs")


@pytest.fixture
def set_alarm() -> Iterator[Callable[[Callable[[], Any]], None]]:
    def every_millisecond(handler: Callable[[], Any]) -> None:
        inside = False

        def handle(*_: Any) -> None:
            nonlocal inside
            if not inside:
                inside = True
                try:
                    handler()
                finally:
                    inside = False

        signal.signal(signal.SIGVTALRM, handle)
        signal.setitimer(signal.ITIMER_VIRTUAL, 0.001, 0.001)  # ITIMER_REAL is used by pytest-timeout

    yield every_millisecond
    stop_signals()


def stop_signals() -> None:
    signal.setitimer(signal.ITIMER_VIRTUAL, 0)
    # The signal is ignored, because with the default handler a pending signal would end the process.
    signal.signal(signal.SIGVTALRM, signal.SIG_IGN)


def test_a_signal_handler_may_use_the_cache(set_alarm: Any) -> None:
    with Cache(lengths, [MemoryBackend()], space=SPACE) as cache:
        handled = 0

        def handler() -> None:
            nonlocal handled
            handled += 1
            cache.embed_batch(["x", f"{handled}"])

        set_alarm(handler)
        end = time.monotonic() + LONG_TIMEOUT
        while handled < 500 and time.monotonic() < end:
            cache.embed_batch(["x", "y"])
        stop_signals()  # the handler uses the cache, and would raise after the cache is closed
        assert handled > 10


def test_close_while_a_blocking_call_runs_an_async_provider() -> None:
    provider = FaultyProvider(CountingProvider(asynchronous=True, max_batch=1), [ProviderFault("hang")])
    cache = Cache(provider, [MemoryBackend()])
    with ThreadPoolExecutor(1) as pool:
        call = pool.submit(cache.embed_batch, ["a", "b", "c"])
        provider.gate.until(1)
        thread = cache._chain.ports._background._loop._thread
        assert thread is not None
        cache.close()
        with pytest.raises(CacheClosed):
            call.result(LONG_TIMEOUT)
        thread.join(LONG_TIMEOUT)
    assert not thread.is_alive()


# --- losses -----------------------------------------------------------------------------------


@pytest.mark.parametrize("store", [True, False])
def test_put_also_stores_a_text_that_is_being_embedded(store: bool) -> None:
    began, go_on = threading.Event(), threading.Event()

    def embed(texts: list[str]) -> list[list[float]]:
        began.set()
        go_on.wait(LONG_TIMEOUT)
        if store:
            raise RuntimeError("the computation fails")
        return [[3.0, 4.0]]

    with Cache(embed, [MemoryBackend()], space=SPACE) as cache, ThreadPoolExecutor(1) as pool:
        computing = pool.submit(lambda: cache.fetch(["x"], store=store))
        began.wait(LONG_TIMEOUT)
        cache.put(["x"], [[1.0, 2.0]])
        assert cache.lookup(["x"]).sources == ["memory"]
        go_on.set()
        computing.result(LONG_TIMEOUT)
        assert cache.lookup(["x"]).rows[0].tolist() == [1.0, 2.0]  # type: ignore[union-attr]


def test_every_idle_worker_gets_a_job(monkeypatch: pytest.MonkeyPatch) -> None:
    from embedonce._engine.workers import Workers

    monkeypatch.setattr(Workers, "IDLE_SECONDS", 0.02)
    for _ in range(300):
        workers = Workers()
        together = threading.Barrier(3)
        futures = [workers.submit(partial(together.wait, LONG_TIMEOUT)) for _ in range(3)]
        assert sorted(future.result(LONG_TIMEOUT) for future in futures) == [0, 1, 2]
        again = threading.Barrier(3)
        futures = [workers.submit(partial(again.wait, LONG_TIMEOUT)) for _ in range(3)]
        assert sorted(future.result(LONG_TIMEOUT) for future in futures) == [0, 1, 2]


def test_calls_beyond_max_threads_wait_and_all_are_done() -> None:
    from embedonce._engine.workers import Workers

    workers = Workers(3)
    at_once, most, lock = 0, 0, threading.Lock()
    numbers, together = itertools.count(), threading.Barrier(3)

    def work() -> int:
        nonlocal at_once, most
        with lock:
            at_once += 1
            most = max(most, at_once)
            mine = next(numbers)
        if mine < 3:  # the first three jobs wait for each other, so that they run at the same time
            together.wait(LONG_TIMEOUT)
        time.sleep(0.001)
        with lock:
            at_once -= 1
        return 1

    assert sum(future.result(LONG_TIMEOUT) for future in [workers.submit(work) for _ in range(100)]) == 100
    assert most == 3


@pytest.mark.parametrize("method", ["fork", "spawn", "forkserver"])
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_background_writes_are_done_when_a_child_process_exits(method: str, tmp_path: Path) -> None:
    child = multiprocessing.get_context(method).Process(target=children.write_in_background, args=(str(tmp_path),))  # type: ignore[attr-defined]
    child.start()
    child.join(LONG_TIMEOUT)
    assert child.exitcode == 0
    with Cache(CountingProvider(), [Tier(DiskBackend(path=tmp_path), name="d")]) as cache:
        assert cache.lookup([str(i) for i in range(10)]).sources == ["d"] * 10


# --- threads, time and memory -----------------------------------------------------------------


@pytest.mark.slow
def test_thousands_of_tasks_do_not_need_thousands_of_threads(tmp_path: Path) -> None:
    provider = CountingProvider(delay=0.0005)
    most, before = 0, threading.active_count()

    async def main(cache: Cache) -> None:
        nonlocal most
        tasks = [asyncio.create_task(cache.aembed(f"text {i}")) for i in range(2000)]
        while not all(task.done() for task in tasks):
            most = max(most, threading.active_count())
            await asyncio.sleep(0.005)
        await asyncio.gather(*tasks)

    with Cache(provider, [Tier(DiskBackend(path=tmp_path), name="disk", timeout=100.0)]) as cache:
        asyncio.run(main(cache))
        stats = cache.stats().tiers["disk"]
    assert (stats.errors, stats.dropped, stats.stored) == (0, 0, 2000)
    assert most - before < 80
    assert provider.most_at_once <= 32


def test_a_hanging_call_does_not_make_later_stores_slower_with_each_forget() -> None:
    provider = FaultyProvider(CountingProvider(), [ProviderFault("hang", calls={1})])
    with Cache(provider, [MemoryBackend()]) as cache, ThreadPoolExecutor(1) as pool:
        hanging = pool.submit(cache.embed, "hanging")
        provider.gate.until(1)
        for i in range(2000):
            cache.forget([f"{i}"])
        in_flight = cache._chain.in_flight
        looked: list[str] = []
        forbidden = in_flight._is_forbidden
        in_flight._is_forbidden = lambda ticket, key: looked.append(key) or forbidden(ticket, key)  # type: ignore[method-assign,func-returns-value]
        cache.embed_batch(["a", "b"])
        assert len(looked) == 2  # one check per key, although 2,000 erasures are remembered
        assert len(in_flight._erased) == 4000 or len(in_flight._erased) == 2000  # one or two keys per erased text
        provider.heal()
        hanging.result(LONG_TIMEOUT)
        assert not in_flight._erased


def test_a_loop_that_is_closed_with_a_flight_is_garbage_collected() -> None:
    provider = FaultyProvider(CountingProvider(asynchronous=True), [ProviderFault("hang")])
    with Cache(provider, [MemoryBackend()]) as cache:
        for i in range(5):
            loop = asyncio.new_event_loop()
            task = loop.create_task(cache.aembed(f"{i}"))
            loop.run_until_complete(wait_until_async(lambda begun=i + 1: len(provider.calls) == begun))
            for pending in asyncio.all_tasks(loop) | {task}:
                pending._log_destroy_pending = False  # type: ignore[attr-defined]  # abandoned on purpose
            loop.close()
            del task, pending
        asyncio.run(cache.aclose())
        assert len(cache._chain.ports._loops) <= 1


# --- small things -----------------------------------------------------------------------------


def test_errors_can_be_pickled_and_caches_cannot() -> None:
    error = EraseIncomplete("could not reach everything", {"far": "timeout"})
    assert pickle.loads(pickle.dumps(error)).tiers == {"far": "timeout"}
    with Cache(lengths, space=SPACE) as cache:
        for attempt in (copy.copy, copy.deepcopy, pickle.dumps):
            with pytest.raises(TypeError, match="cannot be copied or pickled"):
                attempt(cache)


@pytest.mark.parametrize(
    "limits", [Limits(max_batch=0), Limits(concurrency=0), Limits(timeout=0), Limits(timeout=float("inf"))]
)
def test_invalid_limits_are_refused(limits: Limits) -> None:
    with pytest.raises(ConfigError):
        Cache(FunctionProvider(lengths, SPACE, limits))


def test_a_tier_with_an_infinite_timeout_is_refused() -> None:
    with pytest.raises(ConfigError, match='"timeout" must be a finite number of seconds'):
        Cache(lengths, [Tier(DictBackend(scope="host"), timeout=float("inf"))], space=SPACE)


def test_a_provider_may_change_the_list_that_it_gets() -> None:
    class Shortening(CountingProvider):
        def _embed(self, texts: Any, task: Any, /) -> Any:
            answer = super()._embed(texts, task)
            texts.clear()
            return answer

    with Cache(Shortening(), [MemoryBackend()]) as cache:
        assert cache.fetch(["a", "b"]).sources == ["provider", "provider"]


def test_each_caller_gets_its_own_copy_of_an_error() -> None:
    provider = FaultyProvider(CountingProvider(delay=0.1), [ProviderFault("slow", seconds=0.1, calls={1, 2})])
    provider.faults = [ProviderFault("refuse", positions=True)]
    with Cache(provider, [MemoryBackend()]) as cache:

        async def main() -> list[BaseException]:
            return await asyncio.gather(*(cache.aembed("a") for _ in range(200)), return_exceptions=True)  # type: ignore[return-value]

        errors = asyncio.run(main())
    assert all(_count_frames(error) < 60 for error in errors)


def _count_frames(error: BaseException) -> int:
    n, trace = 0, error.__traceback__
    while trace is not None:
        n, trace = n + 1, trace.tb_next
    return n


def test_forget_removes_every_spelling_from_the_memo() -> None:
    from embedonce import KeyPolicy

    with Cache(lengths, [MemoryBackend()], space=SPACE, key=KeyPolicy(normalize=["strip", "casefold"])) as cache:
        cache.embed_batch(["  Tea ", "tea", "other"])
        cache.forget(["TEA"])
        (route,) = {
            id(route.recent_keys): route for route in cache._routes.values() if route.task == "document"
        }.values()
        assert set(route.recent_keys) | set(route._older_keys) == {"other"}
