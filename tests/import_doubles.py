"""A provider and importers for the tests of imports on demand."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np

from embedonce import Cache, VectorSpace
from embedonce.contracts import FoundVectors, Source
from embedonce.testing import CountingProvider
from embedonce_backends.memory import MemoryBackend


def vector_of(text: str, size: int = 16, seed: int = 0) -> np.ndarray:
    return np.random.default_rng([seed, *text.encode()]).standard_normal(size).astype(np.float32)


class Model:
    """A provider whose vectors depend on the text alone, or on the text and the task."""

    limits = CountingProvider().limits

    def __init__(
        self, *, asymmetric: bool = False, seed: int = 0, dimensions: int | None = 16, name: str = "m"
    ) -> None:
        self.name = name
        self.texts: list[str] = []
        self.asymmetric = asymmetric
        self.seed = seed
        self.dimensions = dimensions

    def space(self, task: str) -> VectorSpace:
        return VectorSpace(
            provider="model", model=self.name, task=task if self.asymmetric else None, dimensions=self.dimensions
        )

    def embed(self, texts: Sequence[str], task: str) -> list[np.ndarray]:
        self.texts += texts
        seed = self.seed + (100 if self.asymmetric and task == "query" else 0)
        return [vector_of(text, seed=seed) for text in texts]

    def close(self) -> None:
        pass


class Store:
    """An importer over a dict."""

    def __init__(
        self, vectors: dict[str, Any], *, name: str = "a store", task: str | None = None, mixing: str = ""
    ) -> None:
        self.vectors = vectors
        self.source = Source(name, task=task, mixing=mixing)
        self.asked: list[str] = []
        self.fail: Callable[[], None] = lambda: None
        self.is_closed = False

    def check(self) -> None:
        pass

    def lookup(self, texts: Sequence[str]) -> FoundVectors:
        self.asked += texts
        self.fail()
        found = [text for text in texts if text in self.vectors]
        return FoundVectors(found, [self.vectors[text] for text in found])

    def close(self) -> None:
        self.is_closed = True


class Scanned:
    """An importer that can only be read as a whole."""

    def __init__(self, parts: Iterable[FoundVectors], gate: threading.Event | None = None) -> None:
        self.parts = list(parts)
        self.source = Source("a scanned store")
        self.gate = gate
        self.scans = 0

    def check(self) -> None:
        pass

    def scan(self) -> Iterable[FoundVectors]:
        self.scans += 1
        if self.gate is not None:
            self.gate.wait()
        yield from self.parts

    def count(self) -> int:
        return sum(len(part.texts) for part in self.parts)

    def close(self) -> None:
        pass


def store_of(texts: Iterable[str], **options: Any) -> Store:
    return Store({text: vector_of(text) for text in texts}, **options)


TEXTS = [f"text {number}" for number in range(50)]


def open_cache(provider: Model, *importers: Any, tiers: Sequence[Any] = (), **options: Any) -> Cache:
    return Cache(provider, tiers or [MemoryBackend()], imports=importers, **options)
