"""Correct backends, providers and steps pass every test of their contract."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar

import pytest
from embedonce_nodes import TwoNodesBackend
from embedonce_shelf import ShelfBackend
from embedonce_single import SingleBackend
from embedonce_wire import Server, WireBackend

from embedonce import Embedded
from embedonce.contracts import Normalizer
from embedonce.keys import NORMALIZERS
from embedonce.testing import (
    BackendContract,
    CountingProvider,
    DictBackend,
    Fault,
    FaultyBackend,
    FaultyProvider,
    ManualClock,
    NormalizerContract,
    ProviderContract,
    Recipe,
)


class OnAClock(BackendContract):
    """The contract of a backend with a manual clock."""

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
    """A backend that declares ``deadline``, so that the test of a stalled store runs."""

    def make(self) -> FaultyBackend:
        return FaultyBackend(DictBackend(clock=self.clock, twin=True), deadline=True, blocking=True)

    @contextmanager
    def stall(self, backend: Any) -> Iterator[None]:
        backend.faults.append(Fault("hang", obey=True))
        yield
        backend.heal()


class TestTwoNodes(BackendContract):
    """A backend of two nodes, one of which may be down."""

    def make(self) -> TwoNodesBackend:
        return TwoNodesBackend()

    @contextmanager
    def lose_a_node(self, backend: Any) -> Iterator[None]:
        backend.away = True
        yield
        backend.away = False


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


class TestAStoreForOneProcessAtATime(BackendContract):
    examples = 10

    @pytest.fixture(autouse=True)
    def in_a_folder(self, tmp_path: Path) -> None:
        self.folder = tmp_path
        self.clock = ManualClock()
        self.made = 0

    def make(self) -> SingleBackend:
        self.made += 1
        path = self.folder / str(self.made)
        path.mkdir()
        return self._make_at(path)

    def reopen(self, backend: SingleBackend) -> SingleBackend:
        return self._make_at(backend.path)

    def recipe(self, backend: SingleBackend) -> Recipe:
        return Recipe(SingleBackend, {"path": str(backend.path)})

    def advance(self, seconds: float) -> None:
        self.clock.advance(seconds)

    def _make_at(self, path: Path) -> SingleBackend:
        backend = SingleBackend(path=path)
        backend.clock = self.clock
        return backend


class TestEitherInADict(OnAClock):
    def make(self) -> DictBackend:
        return DictBackend(clock=self.clock, holds="either", twin=True)


class TestOverTheWire(BackendContract):
    """A store behind TCP, tested directly and through the proxy."""

    examples = 10

    @pytest.fixture(autouse=True)
    def served(self) -> Iterator[None]:
        with Server() as self.wire:
            self.made = 0
            yield
            self.wire.shutdown()

    def make(self) -> WireBackend:
        self.made += 1
        return WireBackend(host="127.0.0.1", port=self.server()[1], store=str(self.made))

    def reopen(self, backend: WireBackend) -> WireBackend:
        return self.through(backend, backend.host, backend.port)

    def recipe(self, backend: WireBackend) -> Recipe:
        return Recipe(WireBackend, {"host": backend.host, "port": backend.port, "store": backend.store})

    def server(self) -> tuple[str, int]:
        return "127.0.0.1", self.wire.server_address[1]

    def through(self, backend: WireBackend, host: str, port: int) -> WireBackend:
        return WireBackend(host=host, port=port, store=backend.store)


class OurSteps(NormalizerContract):
    name: ClassVar[str]

    def make(self) -> Normalizer:
        return NORMALIZERS[self.name]


class TestNfc(OurSteps):
    name = "nfc"
    same = (("e\u0301", "é"),)


class TestNfkc(OurSteps):
    name = "nfkc"
    same = (("ﬁt", "fit"),)


class TestStrip(OurSteps):
    name = "strip"
    same = ((" a text\n", "a text"),)


class TestCollapseWhitespace(OurSteps):
    name = "collapse-whitespace"
    same = (("a  text\n of\twords", "a text of words"),)


class TestCasefold(OurSteps):
    name = "casefold"
    same = (("Straße", "STRASSE"),)


class TestNewlines(OurSteps):
    name = "newlines"
    same = (("one\r\ntwo\rthree", "one\ntwo\nthree"),)


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


class LeavesRowsOut(CountingProvider):
    """Answers None for an empty text."""

    def embed_with_gaps(self, texts: Sequence[str], task: str) -> Embedded:
        rows = [row if text else None for text, row in zip(texts, self._embed(texts, task).vectors, strict=True)]
        return Embedded(rows, model="counting")

    def __init__(self) -> None:
        super().__init__()
        self.embed = self.embed_with_gaps


class TestProviderThatLeavesRowsOut(ProviderContract):
    def make(self) -> LeavesRowsOut:
        return LeavesRowsOut()
