"""Each text is embedded once, even if many callers request it at the same time, and no call hangs."""

from __future__ import annotations

import asyncio
import os
import threading
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
from patience import LONG_TIMEOUT, count_followers, wait_until, wait_until_async

from embedonce import Cache, Tier
from embedonce.testing.fakes import CountingProvider, DictBackend
from embedonce.testing.faults import Fault, FaultyBackend, FaultyProvider, ProviderFault
from embedonce_backends.memory import MemoryBackend


def background(backend: Any | None = None) -> Tier:
    # With the default timeout of 250 ms, the breaker would open on a busy machine, and texts would be embedded again.
    return Tier(backend or DictBackend(scope="network"), name="far", write="background", timeout=LONG_TIMEOUT)


def all_correct(provider: CountingProvider, texts: list[str], matrix: np.ndarray) -> bool:
    return all((row == provider.vector_of(text)).all() for text, row in zip(texts, matrix, strict=True))


def assert_computed_once(provider: CountingProvider, texts: Iterable[str]) -> None:
    assert provider.count == dict.fromkeys(texts, 1)


@pytest.fixture(params=["memory", "background", "none"])
def tiers(request: pytest.FixtureRequest) -> list[Any]:
    return {"memory": [MemoryBackend()], "background": [background()], "none": []}[request.param]


@pytest.mark.parametrize("asynchronous", [False, True], ids=["sync provider", "async provider"])
@pytest.mark.parametrize("concurrency", [1, 4])
def test_concurrent_threads_and_asyncio_tasks_embed_each_text_once(asynchronous: bool, concurrency: int) -> None:
    """32 threads and 1,000 asyncio tasks request overlapping batches. The only tier is written in the background."""
    provider = CountingProvider(asynchronous=asynchronous, concurrency=concurrency, max_batch=16, delay=0.002)
    texts = [f"text {i}" for i in range(200)]
    with Cache(provider, [background()]) as cache:

        def from_thread(n: int) -> bool:
            mine = texts[n * 3 :] + texts[: n * 3]
            if n % 2:
                mine.reverse()
            return all_correct(provider, mine, cache.embed_batch(mine))

        async def from_tasks() -> bool:
            async def one(i: int) -> bool:
                if i % 10:
                    return bool((await cache.aembed(texts[i % 200]) == provider.vector_of(texts[i % 200])).all())
                return all_correct(provider, texts[i % 150 :], await cache.aembed_batch(texts[i % 150 :]))

            return all(await asyncio.gather(*(one(i) for i in range(1000))))

        with ThreadPoolExecutor(33) as pool:
            tasks = pool.submit(asyncio.run, from_tasks())
            assert all(pool.map(from_thread, range(32)))
            assert tasks.result(LONG_TIMEOUT)
        assert cache.flush(LONG_TIMEOUT)
    assert_computed_once(provider, texts)


def test_batches_with_the_same_texts_in_opposite_order_do_not_deadlock(tiers: list[Any]) -> None:
    provider = CountingProvider(delay=0.005)
    with Cache(provider, tiers) as cache, ThreadPoolExecutor(8) as pool:
        for round_ in range(20):
            a, b = f"a{round_}", f"b{round_}"
            batches = [[a, b], [b, a]] * 4
            for batch, matrix in zip(batches, pool.map(cache.embed_batch, batches, timeout=LONG_TIMEOUT), strict=True):
                assert all_correct(provider, batch, matrix)


def test_five_calls_to_a_chain_with_only_a_background_written_tier_embed_once() -> None:
    slow = FaultyBackend(DictBackend(scope="network"), [Fault("slow", on="set", seconds=0.2)])
    provider = CountingProvider()
    with Cache(provider, [Tier(slow, name="far", write="background", timeout=LONG_TIMEOUT)]) as cache:
        for _ in range(5):
            cache.embed("text")
            assert cache.lookup(["text"]).sources != [None]
    assert_computed_once(provider, ["text"])


def test_a_landed_flight_is_removed_once_it_is_written() -> None:
    with Cache(CountingProvider(), [background()]) as cache:
        cache.embed_batch([str(i) for i in range(500)])
        assert cache.flush(LONG_TIMEOUT)
        assert not cache._chain.in_flight._flights
        assert not cache._chain.in_flight._calls
        assert not cache._chain.in_flight._retired


def test_cancelling_the_leader_does_not_fail_its_followers_and_its_vector_is_stored() -> None:
    provider = FaultyProvider(CountingProvider(asynchronous=True), [ProviderFault("hang")])
    backend = DictBackend()
    with Cache(provider, [backend]) as cache:

        async def main() -> None:
            leader = asyncio.create_task(cache.aembed("text"))
            await wait_until_async(lambda: provider.gate.waiting)
            others = [asyncio.create_task(cache.aembed("text")) for _ in range(10)]
            await wait_until_async(lambda: count_followers(cache) == 10)
            leader.cancel()
            with pytest.raises(asyncio.CancelledError):
                await leader
            provider.heal()
            async with asyncio.timeout(LONG_TIMEOUT):
                vectors = await asyncio.gather(*others)
            assert all((v == provider.inner.vector_of("text")).all() for v in vectors)

        asyncio.run(main())
        assert cache.lookup(["text"]).sources == ["dict"]
    assert_computed_once(provider.inner, ["text"])


def test_cancelling_a_follower_does_not_affect_the_others() -> None:
    provider = FaultyProvider(CountingProvider(asynchronous=True), [ProviderFault("hang")])
    with Cache(provider, [MemoryBackend()]) as cache:

        async def main() -> None:
            leader = asyncio.create_task(cache.aembed("text"))
            await wait_until_async(lambda: provider.gate.waiting)
            victim = asyncio.create_task(cache.aembed("text"))
            other = asyncio.create_task(cache.aembed("text"))
            await wait_until_async(lambda: count_followers(cache) == 2)
            victim.cancel()
            with pytest.raises(asyncio.CancelledError):
                await victim
            provider.heal()
            assert ((await leader) == (await other)).all()

        asyncio.run(main())
    assert_computed_once(provider.inner, ["text"])


@pytest.mark.parametrize("asynchronous", [False, True], ids=["sync provider", "async provider"])
def test_when_the_leader_fails_one_follower_computes_once(asynchronous: bool) -> None:
    gate = threading.Event()
    calls: list[int] = []

    def embed(texts: list[str]) -> Any:
        calls.append(len(texts))
        gate.wait(LONG_TIMEOUT)
        if len(calls) == 1:
            raise RuntimeError("the first one fails")
        return [[1.0, 2.0]] * len(texts)

    async def aembed(texts: list[str]) -> Any:
        return await asyncio.to_thread(embed, texts)

    function = aembed if asynchronous else embed
    with Cache(function, [MemoryBackend()], space={"model": "m"}) as cache, ThreadPoolExecutor(8) as pool:
        futures = [pool.submit(cache.embed, "text") for _ in range(8)]
        wait_until(lambda: count_followers(cache) == 7)
        gate.set()
        outcomes = [future.exception(LONG_TIMEOUT) for future in futures]
    assert sum(error is not None for error in outcomes) == 1
    assert len(calls) == 2


def test_a_provider_that_always_fails_fails_every_caller_and_nobody_hangs() -> None:
    provider = FaultyProvider(CountingProvider(delay=0.02), [ProviderFault("raise", error=RuntimeError)])
    with Cache(provider, [MemoryBackend()]) as cache, ThreadPoolExecutor(16) as pool:
        futures = [pool.submit(cache.embed, "text") for _ in range(16)]
        for future in futures:
            assert isinstance(future.exception(LONG_TIMEOUT), RuntimeError)
    assert not cache._chain.in_flight._flights


def test_a_loop_that_ends_wakes_its_followers() -> None:
    """The leader's loop is closed without cancelling its asyncio tasks, so the leader can never return a vector."""
    provider = FaultyProvider(CountingProvider(asynchronous=True), [ProviderFault("hang", calls={1})])
    with Cache(provider, [MemoryBackend()]) as cache:
        loop = asyncio.new_event_loop()
        task = loop.create_task(cache.aembed("text"))
        loop.run_until_complete(wait_until_async(lambda: provider.gate.waiting))
        with ThreadPoolExecutor(4) as pool:

            async def while_others_follow() -> list[Any]:
                following = [pool.submit(cache.embed, "text") for _ in range(4)]
                await wait_until_async(lambda: count_followers(cache) == 4)
                return following

            futures = loop.run_until_complete(while_others_follow())
            loop.close()
            for future in futures:
                assert (future.result(LONG_TIMEOUT) == provider.inner.vector_of("text")).all()
        for pending in asyncio.all_tasks(loop) | {task}:
            pending._log_destroy_pending = False  # type: ignore[attr-defined]  # abandoned on purpose


def test_a_loop_that_is_shut_down_by_asyncio_run_wakes_its_followers() -> None:
    provider = FaultyProvider(CountingProvider(asynchronous=True), [ProviderFault("hang", calls={1})])
    with Cache(provider, [MemoryBackend()]) as cache, ThreadPoolExecutor(4) as pool:

        async def main() -> None:
            task = asyncio.create_task(cache.aembed("text"))
            await wait_until_async(lambda: count_followers(cache))
            task.cancel()

        running = pool.submit(asyncio.run, main())
        provider.gate.until(1)
        follower = pool.submit(cache.embed, "text")
        assert (follower.result(LONG_TIMEOUT) == provider.inner.vector_of("text")).all()
        running.result(LONG_TIMEOUT)


@pytest.mark.parametrize("concurrency", [1, 3])
def test_a_provider_may_call_the_cache_for_other_texts_and_its_own(concurrency: int) -> None:
    depth = threading.local()

    def embed(texts: list[str]) -> list[list[float]]:
        if not getattr(depth, "inside", False):
            depth.inside = True
            try:
                cache.embed_batch(["helper", *texts])
            finally:
                depth.inside = False
        return [[float(len(text)), 1.0] for text in texts]

    from embedonce import Limits
    from embedonce.functions import FunctionProvider

    provider = FunctionProvider(embed, {"model": "m"}, Limits(max_batch=2, concurrency=concurrency))
    done: list[Any] = []

    def run() -> None:
        done.append(cache.embed_batch(["a", "bb", "ccc", "dddd", "eeeee"]))

    with Cache(provider, [MemoryBackend()], max_wait=5.0) as cache:
        thread = threading.Thread(target=run, daemon=True)
        thread.start()
        thread.join(LONG_TIMEOUT)
        assert done, "a call of the cache from its provider hangs"
        assert done[0][:, 0].tolist() == [1, 2, 3, 4, 5]


def test_a_blocking_call_on_the_leaders_event_loop_computes_for_itself() -> None:
    provider = FaultyProvider(CountingProvider(asynchronous=True), [ProviderFault("hang", calls={1})])
    with Cache(provider, [MemoryBackend()], max_wait=2 * LONG_TIMEOUT) as cache:

        async def main() -> None:
            leader = asyncio.create_task(cache.aembed("text"))
            await wait_until_async(lambda: provider.gate.waiting)
            vector = cache.embed("text")  # waiting for the leader here would prevent the leader from finishing
            assert provider.gate.waiting, "the blocking call must not wait for the leader, which still hangs"
            provider.heal()
            assert (vector == await leader).all()

        asyncio.run(main())


def test_waiting_has_a_limit_after_which_the_caller_computes() -> None:
    provider = FaultyProvider(CountingProvider(), [ProviderFault("hang", calls={1})])
    with Cache(provider, [MemoryBackend()], max_wait=0.3) as cache, ThreadPoolExecutor(2) as pool:
        leader = pool.submit(cache.embed, "text")
        provider.gate.until(1)
        assert (cache.embed("text") == provider.inner.vector_of("text")).all()
        provider.release()
        assert (leader.result(LONG_TIMEOUT) == provider.inner.vector_of("text")).all()


def test_later_calls_follow_the_call_that_has_waited_too_long() -> None:
    provider = FaultyProvider(CountingProvider(), [ProviderFault("hang", calls={1, 2})])
    with Cache(provider, [MemoryBackend()], max_wait=0.0) as cache, ThreadPoolExecutor(3) as pool:
        calls = [pool.submit(cache.embed, "text")]
        provider.gate.until(1)
        (late,) = cache._chain.in_flight._flights.values()
        calls.append(pool.submit(cache.embed, "text"))
        provider.gate.until(2)
        (flight,) = cache._chain.in_flight._flights.values()
        assert flight is not late
        cache._chain.engine._max_wait = 1e6
        calls.append(pool.submit(cache.embed, "text"))
        wait_until(lambda: count_followers(cache))
        assert list(cache._chain.in_flight._flights.values()) == [flight]
        provider.release()
        for call in calls:
            assert (call.result(LONG_TIMEOUT) == provider.inner.vector_of("text")).all()
        assert not cache._chain.in_flight._flights
    assert provider.inner.count["text"] == 2


def test_after_several_leaders_are_interrupted_one_follower_computes_once() -> None:
    calls: list[int] = []

    def embed(texts: list[str]) -> Any:
        calls.append(len(texts))
        if len(calls) <= 3:
            wait_until(lambda: count_followers(cache) == 8 - len(calls))
            raise KeyboardInterrupt
        return [[1.0, 2.0]] * len(texts)

    with Cache(embed, [MemoryBackend()], space={"model": "m"}) as cache, ThreadPoolExecutor(8) as pool:
        futures = [pool.submit(cache.embed, "text") for _ in range(8)]
        outcomes = [future.exception(LONG_TIMEOUT) for future in futures]
    assert sum(isinstance(error, KeyboardInterrupt) for error in outcomes) == 3
    assert outcomes.count(None) == 5
    assert len(calls) == 4


def test_a_follower_stores_the_vector_of_a_leader_with_store_false() -> None:
    provider = FaultyProvider(CountingProvider(), [ProviderFault("hang")])
    backend = DictBackend()
    with Cache(provider, [backend]) as cache, ThreadPoolExecutor(2) as pool:
        leader = pool.submit(lambda: cache.fetch(["text"], store=False))
        provider.gate.until(1)
        follower = pool.submit(lambda: cache.fetch(["text"]))
        wait_until(lambda: count_followers(cache))
        provider.heal()
        assert leader.result(LONG_TIMEOUT).sources == ["provider"]
        assert follower.result(LONG_TIMEOUT).sources == ["provider"]
        assert cache.lookup(["text"]).sources == ["dict"]
    assert_computed_once(provider.inner, ["text"])


def test_store_false_writes_and_promotes_nothing() -> None:
    provider = CountingProvider()
    near, far = DictBackend(), DictBackend()
    with Cache(provider, [Tier(near, name="near"), Tier(far, name="far")]) as cache:
        cache.fetch(["text"], store=False)
        assert len(near) == len(far) == 0
        cache.embed("text")
        near.delete_many(list(near.scan("")))
        assert cache.fetch(["text"], store=False).sources == ["far"]
        assert len(near) == 0


def run_in_fork(work: Callable[[], bool]) -> None:
    """Fork, run ``work`` in the child, and fail if it returns False, raises or hangs."""
    pid = os.fork()
    if pid == 0:
        try:
            os._exit(0 if work() else 3)
        except BaseException:
            import traceback

            traceback.print_exc()
            os._exit(4)
    end = time.monotonic() + LONG_TIMEOUT
    while time.monotonic() < end:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            assert os.waitstatus_to_exitcode(status) == 0
            return
        time.sleep(0.01)
    os.kill(pid, 9)
    os.waitpid(pid, 0)
    pytest.fail("the forked child hangs")


@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork.*:DeprecationWarning")
@pytest.mark.parametrize("asynchronous", [False, True], ids=["sync provider", "async provider"])
def test_a_fork_while_flights_and_queued_writes_are_in_progress(asynchronous: bool) -> None:
    provider = FaultyProvider(CountingProvider(asynchronous=asynchronous), [ProviderFault("hang", calls={2})])
    far = FaultyBackend(DictBackend(scope="network"), [Fault("hang", on="set", calls={1})])
    tier = Tier(far, name="far", write="background", timeout=LONG_TIMEOUT)
    with Cache(provider, [MemoryBackend(), tier]) as cache:
        cache.embed("before")
        far.gate.until(1)
        leader = threading.Thread(target=cache.embed, args=("text",), daemon=True)
        leader.start()
        provider.gate.until(1)

        def child() -> bool:
            # The child must not wait for the parent's flight of "text". The flight has no leader in the child, and
            # the lock of the flight may have been held during the fork.
            vector = cache.embed("text")
            known = cache.embed("before")
            cache.close()
            return bool(
                (vector == provider.inner.vector_of("text")).all()
                and (known == provider.inner.vector_of("before")).all()
            )

        for _ in range(3):
            run_in_fork(child)
        provider.release()
        far.release()
        leader.join(LONG_TIMEOUT)
        assert not leader.is_alive()


@pytest.mark.parametrize("asynchronous", [False, True], ids=["sync provider", "async provider"])
@pytest.mark.parametrize("face", ["sync", "async"])
def test_chunks_run_concurrently_up_to_the_providers_concurrency(asynchronous: bool, face: str) -> None:
    inner = CountingProvider(asynchronous=asynchronous, concurrency=3, max_batch=5, delay=0.01)
    provider = FaultyProvider(inner, [ProviderFault("hang", calls={1, 2, 3})])
    texts = [str(i) for i in range(50)]
    with Cache(provider) as cache, ThreadPoolExecutor(1) as pool:
        if face == "sync":
            matrix = pool.submit(cache.embed_batch, texts)
        else:
            matrix = pool.submit(asyncio.run, cache.aembed_batch(texts))
        provider.gate.until(3)
        provider.heal()
        assert all_correct(inner, texts, matrix.result(LONG_TIMEOUT))
    assert provider.most_at_once == 3


@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork.*:DeprecationWarning")
def test_a_forked_child_leaves_the_leases_of_its_parent_alone() -> None:
    provider = FaultyProvider(CountingProvider(), [ProviderFault("hang", calls={1})])
    with Cache(provider, [Tier(DictBackend(scope="host"), name="host", timeout=LONG_TIMEOUT)]) as cache:
        leader = threading.Thread(target=cache.embed, args=("text",), daemon=True)
        leader.start()
        provider.gate.until(1)
        leases = cache._chain.engine.leases
        assert leases is not None
        run_in_fork(lambda: not leases._active and not leases._held and not leases._has_thread)
        assert leases._active
        provider.release()
        leader.join(LONG_TIMEOUT)
