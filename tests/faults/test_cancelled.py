"""Calls that are cancelled while a reply is on its way leave nothing for the calls after them."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Any

import pytest
from faults.stores import Postgres, Redis

from embedonce import Cache, Tier
from embedonce.answers import Fetched
from embedonce.testing import CountingProvider, NetworkFault

TEXTS = [f"text {number}" for number in range(60)]
CANCELLED, CHECKED = 300, 200


@pytest.fixture(params=[Redis, Postgres], ids=["redis", "postgres"])
def store(request: pytest.FixtureRequest) -> Iterator[Any]:
    opened = request.param()
    yield opened
    opened.close()


def checked(provider: CountingProvider, texts: list[str], fetched: Fetched) -> bool:
    """See that every row is right, and tell whether all came from the store."""
    for text, row in zip(texts, fetched.rows, strict=True):
        assert row is not None
        assert row.tobytes() == provider.vector_of(text).tobytes(), "a reply of another call"
    return set(fetched.sources) == {"far"}


async def test_cancelled_calls_shift_no_reply(store: Any) -> None:
    chance = random.Random(7)
    provider = CountingProvider(model="cancelled", dimensions=16)
    cache = Cache(provider, [Tier(store.backend("slow"), name="far", timeout=60.0, write="inline")])
    await cache.afetch(TEXTS)
    usual = 0.015  # seconds of the call that came to its end last: on a busy machine they are many more

    def some() -> list[str]:
        return chance.sample(TEXTS, chance.randint(1, 20))

    async def call(texts: list[str]) -> bool:
        return checked(provider, texts, await cache.afetch(texts))

    async def cancelled_call() -> bool:
        """Make a call, and cancel it at any moment of it; tell whether it was over before."""
        nonlocal usual
        start = time.monotonic()
        task = asyncio.create_task(call(some()))
        # Now and then as long as it takes: so it is seen how long that is by now.
        await asyncio.wait([task], timeout=chance.uniform(0.0, 2 * usual) if chance.random() < 0.9 else None)
        done = task.done()
        if done:
            usual = time.monotonic() - start
        task.cancel()
        with suppress(asyncio.CancelledError):
            await task
        return done

    store.proxy.fault = NetworkFault("latency", seconds=0.01, direction="replies")
    done = await in_turns(cancelled_call, CANCELLED, at_once=6)
    assert 0 < sum(done) < CANCELLED, "some were cancelled and some were not"
    served = [await call(some()) for _ in range(CHECKED // 2)]
    store.proxy.heal()
    served += await in_turns(lambda: call(some()), CHECKED // 2, at_once=6)
    assert all(served), "the store itself was well all the time"
    stats = cache.stats().tiers["far"]
    assert (stats.errors, stats.corrupt, stats.skipped) == (0, 0, 0)
    await cache.aclose()


async def in_turns(call: Callable[[], Any], number: int, *, at_once: int) -> list[bool]:
    """Make so many calls, some at once."""
    left = iter(range(number))
    results: list[bool] = []

    async def work() -> None:
        for _ in left:
            results.append(await asyncio.wait_for(call(), 60))  # noqa: PERF401  (they end in any order)

    async with asyncio.TaskGroup() as group:
        for _ in range(at_once):
            group.create_task(work())
    return results
