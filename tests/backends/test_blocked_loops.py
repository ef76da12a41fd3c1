"""Async clients of real servers beside tasks that block the event loop for longer than the tier's timeout."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import Any

import pytest

from embedonce import Cache, Tier
from embedonce.testing import CountingProvider
from embedonce_backends.postgres import PostgresBackend
from embedonce_backends.redis import RedisBackend

TIMEOUT = 2.0
"""Seconds in which a healthy server on loopback answers on any machine."""
TEXTS = ["one text", "another text"]


@pytest.fixture(params=["redis", "cluster", "postgres"])
def make_backend(request: pytest.FixtureRequest) -> Callable[[], Any]:
    server = {"redis": "redis_server", "cluster": "redis_cluster", "postgres": "postgres_server"}[request.param]
    url = request.getfixturevalue(server).url
    if request.param == "postgres":
        return lambda: PostgresBackend(url=url, table="blocked_loops")
    return lambda: RedisBackend(url=url, prefix="blocked-loops:")


async def block(seconds: float) -> None:
    time.sleep(seconds)


def test_a_healthy_server_answers_beside_tasks_that_block_the_loop(make_backend: Callable[[], Any]) -> None:
    with Cache(CountingProvider(), [Tier(make_backend(), timeout=60.0)]) as cache:
        cache.embed_batch(TEXTS)
    provider = CountingProvider()

    async def serve() -> None:
        async with Cache(provider, [Tier(make_backend(), name="far", timeout=TIMEOUT, lease="off")]) as cache:
            for text in TEXTS:
                await asyncio.gather(cache.aembed(text), block(1.2 * TIMEOUT))
            tier = cache.stats().tiers["far"]
            assert (tier.hits, tier.causes, tier.skipped) == (len(TEXTS), {}, 0)

    asyncio.run(serve())
    assert provider.texts == 0
