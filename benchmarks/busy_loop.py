"""Print what a service on asyncio gets from Redis and Postgres while other tasks block its event loop.

    python benchmarks/busy_loop.py                # a minute per row
    python benchmarks/busy_loop.py --seconds 10

Twenty tasks embed texts whose vectors are in the store. Another task blocks the loop at random for 50 ms to 2 s, and
then leaves it alone for at most 0.5 s. So each computed text was paid for twice. In the rows with a paused store, the
server's process is stopped, and its tier must be skipped.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from embedonce import Cache, Tier
from embedonce.testing import CountingProvider
from embedonce_backends.postgres import PostgresBackend
from embedonce_backends.redis import RedisBackend

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
import servers

TEXTS = [f"text {number}" for number in range(400)]
CALLERS = 20
SHORTEST, LONGEST = 0.05, 2.0
"""Seconds for which the loop is blocked."""
PAUSE = 0.5
"""Maximum number of seconds between two blocks."""


def main() -> None:
    parser = argparse.ArgumentParser(description="hits and timeouts under a blocked event loop")
    parser.add_argument("--seconds", type=float, default=60.0, help="length of each row (default: 60)")
    seconds = parser.parse_args().seconds
    head = (
        "store",
        "hits",
        "misses",
        "timeouts",
        "busy loop",
        "other errors",
        "skipped",
        "computed",
        "longest call, s",
    )
    print(f"\n### blocked event loop, {seconds:g} s each\n\n| {' | '.join(head)} |\n| --- |{' ---: |' * 8}")
    for name, start, backend in (
        ("Redis", servers.RedisServer, RedisBackend),
        ("Postgres", servers.PostgresServer, PostgresBackend),
    ):
        with start() as server:
            with Cache(CountingProvider(), [Tier(backend(url=server.url), lease="off", timeout=60.0)]) as cache:
                cache.embed_batch(TEXTS)
            print_row(name, asyncio.run(serve(lambda: backend(url=server.url), seconds)))  # noqa: B023
            server.pause()
            try:
                print_row(f"{name}, paused", asyncio.run(serve(lambda: backend(url=server.url), seconds)))  # noqa: B023
            finally:
                server.resume()


async def serve(make_backend: Callable[[], Any], seconds: float) -> list[object]:
    """Run the service, and return the counts of its tier, the computed texts and the seconds of the longest call."""
    rng = random.Random(11)
    end = time.monotonic() + seconds
    longest = 0.0

    async def ask(cache: Cache) -> None:
        nonlocal longest
        while time.monotonic() < end:
            start = time.monotonic()
            await cache.aembed(rng.choice(TEXTS))
            longest = max(longest, time.monotonic() - start)
            await asyncio.sleep(rng.uniform(0.0, 0.05))

    async def block() -> None:
        while time.monotonic() < end:
            time.sleep(rng.uniform(SHORTEST, LONGEST))
            await asyncio.sleep(rng.uniform(0.0, PAUSE))

    async with Cache(CountingProvider(), [Tier(make_backend(), name="store", lease="off")]) as cache:
        await asyncio.gather(block(), *(ask(cache) for _ in range(CALLERS)))
        stats = cache.stats()
    counts = stats.tiers["store"]
    causes = Counter(counts.causes)
    timeouts, busy_loops = causes.pop("timeout", 0), causes.pop("busy_loop", 0)
    computed = sum(provider.texts for provider in stats.providers.values())
    return [counts.hits, counts.misses, timeouts, busy_loops, causes.total(), counts.skipped, computed, longest]


def print_row(name: str, cells: list[object]) -> None:
    shown = [f"{cell:.2f}" if isinstance(cell, float) else f"{cell:,}" for cell in cells]
    print(f"| {name} | {' | '.join(shown)} |", flush=True)


if __name__ == "__main__":
    main()
