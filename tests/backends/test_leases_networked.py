"""Across processes that share a server a cold text is computed once: Redis, Postgres, memcached."""

from __future__ import annotations

import multiprocessing
from typing import Any

import numpy as np
import pytest

from embedonce import Cache, Tier, config
from embedonce.testing.fakes import CountingProvider
from embedonce_backends.memory import MemoryBackend

GENEROUS = 60.0
PROCESSES = 8
TEXTS = [f"text {i}" for i in range(1000)]

OPTIONS = {
    "redis": lambda request: {"url": request.getfixturevalue("redis_server").url},
    "postgres": lambda request: {"url": request.getfixturevalue("postgres_server").url, "table": "leases"},
    "memcached": lambda request: {"servers": request.getfixturevalue("memcached_servers")},
}


def process(table: dict[str, Any], prefix: str, seed: int, barrier: Any) -> tuple[int, int]:
    """Ask for all texts in an order of its own; return how many it computed, and for how many the tier failed."""
    provider = CountingProvider(delay=0.002, max_batch=32)
    (made,) = config.load({"provider": {"type": "ngram"}, "tiers": [table]}).tiers
    tier = Tier(made.cls(**made.options), name="shared", lease=made.lease, timeout=made.timeout)
    order = np.random.default_rng(seed).permutation(len(TEXTS))
    with Cache(provider, [MemoryBackend(), tier]) as cache:
        barrier.wait(GENEROUS)
        for start in range(0, len(TEXTS), 100):
            mine = [f"{prefix} {TEXTS[i]}" for i in order[start : start + 100]]
            matrix = cache.embed_batch(mine)
            assert all((row == provider.vector_of(text)).all() for text, row in zip(mine, matrix, strict=True))
        return provider.texts, cache.stats().tiers["shared"].errors


@pytest.mark.parametrize("kind", OPTIONS)
def test_eight_processes_compute_a_thousand_cold_texts_a_thousand_times(
    kind: str, request: pytest.FixtureRequest
) -> None:
    table = {"type": kind, "lease": "30s", "timeout": "30s", **OPTIONS[kind](request)}
    context = multiprocessing.get_context("spawn")
    with context.Manager() as manager:
        barrier = manager.Barrier(PROCESSES)
        with context.Pool(PROCESSES) as pool:
            found = pool.starmap(process, [(table, kind, seed, barrier) for seed in range(PROCESSES)])
    assert sum(errors for _, errors in found) == 0
    assert sum(computed for computed, _ in found) == len(TEXTS)
