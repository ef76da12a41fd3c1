"""Functions that tests run in child processes. They are in a module because a spawned child imports them."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from embedonce import Cache, Tier, config
from embedonce.contracts import Embedded
from embedonce.testing.fakes import CountingProvider
from embedonce.testing.faults import Fault, FaultyBackend
from embedonce_backends.disk import DiskBackend

LONG_TIMEOUT = 60.0
COLD_TEXTS = [f"text {i}" for i in range(1000)]


def write_in_background(folder: str) -> None:
    """Embed ten texts with slow background writes, and exit without closing the cache."""
    backend = FaultyBackend(DiskBackend(path=Path(folder)), [Fault("slow", on="set", seconds=0.02)])
    tier = Tier(backend, name="d", write="background", timeout=LONG_TIMEOUT)
    cache = Cache(CountingProvider(max_batch=1), [tier], flush_timeout=LONG_TIMEOUT)
    cache.embed_batch([str(i) for i in range(10)])


class LoggingProvider(CountingProvider):
    """A provider that appends each text that it embeds as a line to a file, so that several processes can be counted.

    The provider embeds ``hang``, if given, only after a long time.
    """

    def __init__(self, log: str, hang: str | None = None, **options: Any) -> None:
        super().__init__(**options)
        self._file = os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
        self._hang = hang

    def _answer(self, texts: Sequence[str], task: str) -> Embedded:
        os.write(self._file, "".join(f"{text}\n" for text in texts).encode())
        if self._hang in texts:
            time.sleep(LONG_TIMEOUT)
        return super()._answer(texts, task)


def embed_cold_texts(tiers: list[dict[str, Any]], log: str, seed: int, barrier: Any, face: str) -> dict[str, int]:
    """Embed the :data:`COLD_TEXTS` texts in a random order. Return the causes of the last tier's errors."""
    order = np.random.default_rng(seed).permutation(len(COLD_TEXTS))
    texts = [COLD_TEXTS[i] for i in order]
    provider = LoggingProvider(log, delay=0.003, max_batch=32, asynchronous=face == "async")
    with config.open({"tiers": tiers}, provider=provider) as cache:
        cache.lookup([f"opens a connection {seed}"])
        barrier.wait(LONG_TIMEOUT + 40)
        matrix = asyncio.run(cache.aembed_batch(texts)) if face == "async" else cache.embed_batch(texts)
        assert all((row == provider.vector_of(text)).all() for text, row in zip(texts, matrix, strict=True))
        return dict(list(cache.stats().tiers.values())[-1].causes)


def embed_and_hang(tiers: list[dict[str, Any]], log: str) -> None:
    """Embed the text "a" with a provider that logs the text and then hangs."""
    with config.open({"tiers": tiers}, provider=LoggingProvider(log, hang="a")) as cache:
        cache.embed("a")


def embed_with_api(tiers: list[dict[str, Any]], base_url: str, seed: int) -> int:
    """Embed texts of several lengths in a random order with OpenAI's client. Return the number of requested texts."""
    provider = {
        "type": "openai",
        "model": "text-embedding-3-small",
        "base_url": base_url,
        "api_key": "any",
        "price": "0.02 USD / 1M tokens",
        "batch_size": 7,
    }
    texts = [f"text {i} " * (1 + i % 9) for i in range(200)]
    with config.open({"provider": provider, "tiers": tiers}) as cache:
        for round_number in range(3):
            order = np.random.default_rng(10 * seed + round_number).permutation(len(texts))
            cache.embed_batch([texts[i] for i in order])
        for text in texts[:50]:
            cache.embed(text)
        return cache.stats().requested
