"""The tests that every importer must pass, and a test that opens this importer from a configuration."""

from __future__ import annotations

import itertools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import embedonce
import pytest
from embedonce.testing import ImporterContract, Recipe

from embedonce_example.importer import ExampleImporter, make_file_name


def write_store(folder: Path, texts: Sequence[str], vectors: Any) -> None:
    """Write texts and vectors as the other program does. Use the real program if you can."""
    for text, vector in zip(texts, vectors, strict=True):
        record = {"text": text, "vector": [float(value) for value in vector]}
        (folder / make_file_name(text)).write_text(json.dumps(record))


class TestExampleImporter(ImporterContract):
    @pytest.fixture(autouse=True)
    def prepare_folders(self, tmp_path: Path) -> None:
        self.folders = (tmp_path / str(number) for number in itertools.count())

    def make(self, texts: Sequence[str], vectors: Any) -> ExampleImporter:
        """Write a new store and return its importer."""
        folder = next(self.folders)
        folder.mkdir()
        write_store(folder, texts, vectors)
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


def test_a_configuration_imports_from_it(tmp_path: Path) -> None:
    provider = {"type": "ngram"}
    with embedonce.open({"provider": provider, "tiers": []}) as cache:
        vector = cache.embed("a text")
    write_store(tmp_path, ["a text"], [vector])
    # By default, the first 20 texts are computed too, to compare the vectors. With 0, they are imported.
    imports = [{"type": "example", "path": str(tmp_path), "verify": 0}]
    with embedonce.open({"provider": provider, "tiers": [{"type": "memory"}], "imports": imports}) as cache:
        assert cache.fetch(["a text", "another text"]).sources == ["example", "provider"]
        assert cache.fetch(["a text"]).sources == ["memory"]
