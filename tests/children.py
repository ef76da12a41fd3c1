"""Functions that tests run in child processes. They are in a module because a spawned child imports them."""

from __future__ import annotations

import multiprocessing
from pathlib import Path
from typing import Any

import numpy as np

from embedonce import Cache, Tier, config
from embedonce.testing.fakes import CountingProvider
from embedonce.testing.faults import Fault, FaultyBackend
from embedonce_backends.disk import DiskBackend
from embedonce_backends.memory import MemoryBackend

LONG_TIMEOUT = 60.0
COLD_TEXTS = [f"text {i}" for i in range(1000)]


def write_in_background(folder: str) -> None:
    """Embed ten texts with slow background writes, and exit without closing the cache."""
    backend = FaultyBackend(DiskBackend(path=Path(folder)), [Fault("slow", on="set", seconds=0.02)])
    tier = Tier(backend, name="d", write="background", timeout=LONG_TIMEOUT)
    cache = Cache(CountingProvider(max_batch=1), [tier], flush_timeout=LONG_TIMEOUT)
    cache.embed_batch([str(i) for i in range(10)])


def embed_all_texts(table: dict[str, Any], prefix: str, seed: int, barrier: Any) -> tuple[int, int]:
    """Embed the :data:`COLD_TEXTS` texts in a random order, through a memory tier and a tier with leases.

    Returns the number of texts that this process's provider embedded, and the number of errors of the second tier.
    """
    provider = CountingProvider(delay=0.002, max_batch=32)
    (made,) = config.load({"provider": {"type": "ngram"}, "tiers": [table]}).tiers
    tier = Tier(made.cls(**made.options), name="shared", lease=made.lease, timeout=made.timeout)
    order = np.random.default_rng(seed).permutation(len(COLD_TEXTS))
    with Cache(provider, [MemoryBackend(), tier], max_wait=LONG_TIMEOUT) as cache:
        # Wait until all processes have started. The timeout is shorter than pytest's timeout for a test.
        barrier.wait(LONG_TIMEOUT + 40)
        for start in range(0, len(COLD_TEXTS), 100):
            mine = [f"{prefix} {COLD_TEXTS[i]}" for i in order[start : start + 100]]
            matrix = cache.embed_batch(mine)
            assert all((row == provider.vector_of(text)).all() for text, row in zip(mine, matrix, strict=True))
        return provider.texts, cache.stats().tiers["shared"].errors


def run_eight_processes(table: dict[str, Any], prefix: str) -> list[tuple[int, int]]:
    """Run :func:`embed_all_texts` in eight parallel processes, and return their results."""
    context = multiprocessing.get_context("spawn")
    with context.Manager() as manager:
        barrier = manager.Barrier(8)
        with context.Pool(8) as pool:
            return pool.starmap(embed_all_texts, [(table, prefix, seed, barrier) for seed in range(8)])
