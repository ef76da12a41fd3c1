"""The tests that every importer must pass, and a test that finds this importer by its name."""

from __future__ import annotations

import itertools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from embedonce import plugins
from embedonce.testing import ImporterContract, Recipe

from embedonce_example.importer import ExampleImporter, make_file_name


class TestExampleImporter(ImporterContract):
    @pytest.fixture(autouse=True)
    def prepare_folders(self, tmp_path: Path) -> None:
        self.folders = (tmp_path / str(number) for number in itertools.count())

    def make(self, texts: Sequence[str], vectors: Any) -> ExampleImporter:
        """Write a new store and return its importer. Write the store with the real program if you can."""
        folder = next(self.folders)
        folder.mkdir()
        for text, vector in zip(texts, vectors, strict=True):
            record = {"text": text, "vector": [float(value) for value in vector]}
            (folder / make_file_name(text)).write_text(json.dumps(record))
        return ExampleImporter(path=folder)

    def recipe(self, importer: Any) -> Recipe:
        """Return how to create another importer of the same store, with the options as in TOML."""
        return Recipe(ExampleImporter, {"path": str(importer._path)})

    def missing(self) -> tuple[ExampleImporter, str]:
        """Return an importer of a store that does not exist, and what the error must name."""
        folder = next(self.folders)
        return ExampleImporter(path=folder), str(folder)

    def damage(self, importer: Any, text: str) -> None:
        """Damage the value of a text."""
        file = importer._path / make_file_name(text)
        file.write_bytes(file.read_bytes()[:-10])

    def snapshot(self, importer: Any) -> object:
        """Return everything that reading must not change."""
        return {file.name: file.read_bytes() for file in importer._path.iterdir()}


def test_its_name_means_this_importer() -> None:
    assert plugins.importer("example") is ExampleImporter
