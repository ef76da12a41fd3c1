"""Backends and providers that are right pass every test of their contract."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from embedonce_shelf import ShelfBackend

from embedonce.testing import (
    BackendContract,
    CountingProvider,
    DictBackend,
    Fault,
    FaultyBackend,
    FaultyProvider,
    ManualClock,
    ProviderContract,
    Recipe,
)


class OnAClock(BackendContract):
    """A backend whose time is moved by hand."""

    clock = ManualClock()

    def advance(self, seconds: float) -> None:
        self.clock.advance(seconds)


class TestFramesInADict(OnAClock):
    def make(self) -> DictBackend:
        return DictBackend(clock=self.clock, twin=True, max_batch=200, max_value_bytes=2**21)


class TestEntriesInADict(OnAClock):
    def make(self) -> DictBackend:
        return DictBackend(clock=self.clock, holds="entries", twin=True, max_batch=200)


class TestADictWithNothingDeclared(BackendContract):
    def make(self) -> DictBackend:
        return DictBackend(ttl=False, get=False, delete=False, scan=False, count=False, add=False)


class TestWrappedWithoutFaults(OnAClock):
    """With a deadline, so that a store which stalls can be left."""

    def make(self) -> FaultyBackend:
        return FaultyBackend(DictBackend(clock=self.clock, twin=True), deadline=True, blocking=True)

    @contextmanager
    def stall(self, backend: Any) -> Iterator[None]:
        backend.faults.append(Fault("hang", obey=True))
        yield
        backend.heal()


class TestFilesInAFolder(BackendContract):
    examples = 10

    @pytest.fixture(autouse=True)
    def in_a_folder(self, tmp_path: Path) -> None:
        self.folder = tmp_path
        self.made = 0

    def make(self) -> ShelfBackend:
        self.made += 1
        path = self.folder / str(self.made)
        path.mkdir()
        return ShelfBackend(path=str(path))

    def reopen(self, backend: ShelfBackend) -> ShelfBackend:
        return ShelfBackend(path=backend.path)

    def recipe(self, backend: ShelfBackend) -> Recipe:
        return Recipe(ShelfBackend, {"path": backend.path})


class TestCountingProvider(ProviderContract):
    def make(self) -> CountingProvider:
        return CountingProvider()

    def recipe(self) -> Recipe:
        return Recipe(CountingProvider)


class TestCountingProviderOnALoop(ProviderContract):
    def make(self) -> CountingProvider:
        return CountingProvider(asynchronous=True, symmetric=False, tells_dimensions=False)

    def recipe(self) -> Recipe:
        return Recipe(CountingProvider, {"asynchronous": True, "symmetric": False, "tells_dimensions": False})


class BothFaces(CountingProvider):
    """Has ``embed`` and ``aembed``."""

    def __init__(self) -> None:
        super().__init__()
        self.aembed = self._aembed


class TestWrappedProvider(ProviderContract):
    def make(self) -> FaultyProvider:
        return FaultyProvider(BothFaces())
