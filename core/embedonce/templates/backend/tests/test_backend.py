"""The tests that every backend must pass, and a test that opens this backend from a configuration."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import embedonce
import pytest
from embedonce.testing import BackendContract, Recipe

from embedonce_example.backend import ExampleBackend


class TestExampleBackend(BackendContract):
    examples = 10

    @pytest.fixture(autouse=True)
    def prepare_folders(self, tmp_path: Path) -> None:
        self.folders = (tmp_path / str(number) for number in itertools.count())

    def make(self) -> ExampleBackend:
        """Return a new, empty store."""
        return ExampleBackend(path=next(self.folders))

    def reopen(self, backend: Any) -> ExampleBackend:
        """Return a second client of the same store."""
        return ExampleBackend(path=backend._path)

    def recipe(self, backend: Any) -> Recipe:
        """Return how another process creates a client of the same store."""
        return Recipe(ExampleBackend, {"path": str(backend._path)})


def test_a_configuration_opens_it(tmp_path: Path) -> None:
    tier = {"type": "example", "path": str(tmp_path / "vectors")}
    with embedonce.open({"provider": {"type": "ngram"}, "tiers": [tier]}) as cache:
        assert cache.fetch(["a text"]).sources == ["provider"]
        assert cache.fetch(["a text"]).sources == ["example"]
