"""Measure what it costs to count saved work: batch hits with and without the counting, in turn, in one process.

    python benchmarks/counting.py

A row reads 256 stored vectors per call. The times are CPU times of this process per text: the fastest call, and the
median of the ratios of calls that follow each other. The servers are those of tests/servers.py.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np

from embedonce import Cache, Embedded, Tier
from embedonce._engine.ledger import Ledger
from embedonce.vectors import Entries
from embedonce_backends.disk import DiskBackend
from embedonce_backends.memory import MemoryBackend
from embedonce_backends.postgres import PostgresBackend
from embedonce_backends.redis import RedisBackend

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
import servers

TEXTS = 256
TIMEOUT = 60.0
_METHODS = (Entries.list_costs, Ledger.count_saved)


def turn_on() -> None:
    Entries.list_costs, Ledger.count_saved = _METHODS  # type: ignore[method-assign]


def turn_off() -> None:
    Entries.list_costs = lambda self: []  # type: ignore[method-assign]
    Ledger.count_saved = lambda self, scope, tier, costs: None  # type: ignore[method-assign]


def measure(name: str, backend: Any, dimensions: int, pairs: int) -> None:
    numbers = np.random.default_rng(1)

    def embed(texts: list[str]) -> Embedded:
        return Embedded(numbers.random((len(texts), dimensions), dtype=np.float32) + 0.1, tokens=40 * len(texts))

    texts = [f"text number {i} " * 10 for i in range(TEXTS)]
    tier = backend if isinstance(backend, MemoryBackend) else Tier(backend, timeout=TIMEOUT)
    with Cache(embed, [tier], space={"model": f"{name} {dimensions}"}) as cache:
        cache.embed_batch(texts)
        cache.flush(TIMEOUT)
        cache.embed_batch(texts)
        times: dict[Callable[[], None], list[float]] = {turn_on: [], turn_off: []}
        gc.disable()
        for number in range(pairs):
            for turn in (turn_on, turn_off) if number % 2 else (turn_off, turn_on):
                turn()
                start = time.process_time()
                cache.embed_batch(texts)
                times[turn].append((time.process_time() - start) / TEXTS * 1e9)
        gc.enable()
        turn_on()
        assert cache.stats().saved.tokens > 0
    counted, uncounted = times[turn_on], times[turn_off]
    ratios = [one / other for one, other in zip(counted, uncounted, strict=True)]
    print(
        f"| {name} | {dimensions:,} | {min(uncounted):,.0f} | {min(counted):,.0f} "
        f"| {min(counted) / min(uncounted):.3f} | {statistics.median(ratios):.3f} |",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure what it costs to count saved work.")
    parser.add_argument("--pairs", type=int, default=1000, help="number of pairs of calls (default: %(default)s)")
    options = parser.parse_args()
    print("| tier | dimensions | ns without | ns with | ratio of the fastest | median ratio |")
    print("| --- | ---: | ---: | ---: | ---: | ---: |")
    with ExitStack() as stack:
        redis = stack.enter_context(servers.RedisServer())
        postgres = stack.enter_context(servers.PostgresServer())
        for dimensions in (384, 1536):
            folder = stack.enter_context(tempfile.TemporaryDirectory())
            measure("memory", MemoryBackend(), dimensions, 4 * options.pairs)
            measure("disk", DiskBackend(path=folder), dimensions, options.pairs)
            measure("Redis", RedisBackend(url=redis.url), dimensions, options.pairs)
            table = f"vectors_{dimensions}"
            measure("Postgres", PostgresBackend(url=postgres.url, table=table), dimensions, options.pairs)


if __name__ == "__main__":
    main()
