"""A call that is cancelled before its reply arrives leaves no reply behind for later calls."""

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


def check_rows(provider: CountingProvider, texts: list[str], fetched: Fetched) -> bool:
    """Check that every row is right, and return whether all rows came from the store."""
    for text, row in zip(texts, fetched.rows, strict=True):
        assert row is not None
        assert row.tobytes() == provider.vector_of(text).tobytes(), "a row from the reply to another call"
    return set(fetched.sources) == {"far"}


async def test_cancelled_calls_shift_no_reply(store: Any) -> None:
    chance = random.Random(7)
    provider = CountingProvider(model="cancelled", dimensions=16)
    cache = Cache(provider, [Tier(store.backend("slow"), name="far", timeout=60.0, write="inline")])
    await cache.afetch(TEXTS)
    last_duration = 0.015  # seconds that the last completed call took; on a busy machine, calls take much longer

    def sample_texts() -> list[str]:
        return chance.sample(TEXTS, chance.randint(1, 20))

    async def call(texts: list[str]) -> bool:
        return check_rows(provider, texts, await cache.afetch(texts))

    async def cancelled_call() -> bool:
        """Make a call and cancel it after a random time; return whether the call completed before that time."""
        nonlocal last_duration
        start = time.monotonic()
        task = asyncio.create_task(call(sample_texts()))
        # One call in ten runs to its end, to measure how long a call takes now.
        await asyncio.wait([task], timeout=chance.uniform(0.0, 2 * last_duration) if chance.random() < 0.9 else None)
        done = task.done()
        if done:
            last_duration = time.monotonic() - start
        task.cancel()
        with suppress(asyncio.CancelledError):
            await task
        return done

    store.proxy.fault = NetworkFault("latency", seconds=0.01, direction="replies")
    done = await run_in_parallel(cancelled_call, CANCELLED, at_once=6)
    assert 0 < sum(done) < CANCELLED, "some calls must be cancelled, and some must complete"
    served = [await call(sample_texts()) for _ in range(CHECKED // 2)]
    store.proxy.heal()
    served += await run_in_parallel(lambda: call(sample_texts()), CHECKED // 2, at_once=6)
    assert all(served), "the store worked all the time, so every row must come from it"
    stats = cache.stats().tiers["far"]
    assert (stats.errors, stats.corrupt, stats.skipped) == (0, 0, 0)
    await cache.aclose()


async def run_in_parallel(call: Callable[[], Any], number: int, *, at_once: int) -> list[bool]:
    """Make ``number`` calls, ``at_once`` of them in parallel, and return their results."""
    left = iter(range(number))
    results: list[bool] = []

    async def work() -> None:
        for _ in left:
            results.append(await asyncio.wait_for(call(), 60))  # noqa: PERF401  (the calls end in any order)

    async with asyncio.TaskGroup() as group:
        for _ in range(at_once):
            group.create_task(work())
    return results
