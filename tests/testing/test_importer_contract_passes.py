"""Correct importers pass every test of their contract."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
from embedonce_records import LooksUpOnly, RecordsImporter, ScansOnly, damage_record, write_records

from embedonce.testing import ImporterContract, Recipe


class OfRecords(ImporterContract):
    importer: ClassVar[type[RecordsImporter]]
    examples = 10
    secrets = ("hunter2",)

    @pytest.fixture(autouse=True)
    def in_a_folder(self, tmp_path: Path) -> None:
        self.folder = tmp_path
        self.made = 0

    def make(self, texts: Sequence[str], vectors: Any) -> RecordsImporter:
        self.made += 1
        path = self.folder / f"{self.made}.jsonl"
        write_records(path, texts, vectors)
        return self.importer(path=path, password="hunter2")

    def recipe(self, importer: Any) -> Recipe:
        return Recipe(self.importer, {"path": importer.path})

    def missing(self) -> tuple[RecordsImporter, str]:
        return self.importer(path=self.folder / "missing", password="hunter2"), str(self.folder / "missing")

    def damage(self, importer: Any, text: str) -> None:
        damage_record(importer.path, text)

    def snapshot(self, importer: Any) -> object:
        return {file.name: file.read_bytes() for file in self.folder.iterdir()}

    @contextmanager
    def stall(self, importer: Any) -> Iterator[None]:
        importer.stalled.set()
        yield
        importer.stalled.clear()


class TestRecords(OfRecords):
    importer = RecordsImporter


class TestLookupOfRecords(OfRecords):
    importer = LooksUpOnly


class TestScanOfRecords(OfRecords):
    importer = ScansOnly

    def can_hold(self, text: str) -> bool:
        return bool(text)


class TestRoundedRecords(OfRecords):
    """A store that normalises vectors and keeps them as float16."""

    importer = RecordsImporter
    has_unit_vectors = True
    tolerance = 1e-3

    def make(self, texts: Sequence[str], vectors: Any) -> RecordsImporter:
        return super().make(texts, vectors.astype(np.float16).astype(np.float32))


class TestOnlyMake(ImporterContract):
    """A test class that defines only ``make``."""

    examples = 2
    scan_length = 10

    @pytest.fixture(autouse=True)
    def in_a_folder(self, tmp_path: Path) -> None:
        self.paths = (tmp_path / f"{number}.jsonl" for number in range(10))

    def make(self, texts: Sequence[str], vectors: Any) -> RecordsImporter:
        path = next(self.paths)
        write_records(path, texts, vectors)
        return RecordsImporter(path=path)
