"""The tests that every provider must pass, and a test that opens this provider from a configuration."""

from __future__ import annotations

import embedonce
from embedonce.testing import ProviderContract, Recipe

from embedonce_example.provider import ExampleProvider


class TestExampleProvider(ProviderContract):
    def make(self) -> ExampleProvider:
        """Return a new provider, each time with the same options."""
        return ExampleProvider(dimensions=512)

    def recipe(self) -> Recipe:
        """Return how another process creates the same provider."""
        return Recipe(ExampleProvider, {"dimensions": 512})


def test_a_configuration_opens_it() -> None:
    with embedonce.open({"provider": {"type": "example"}, "tiers": [{"type": "memory"}]}) as cache:
        assert cache.fetch(["a text"]).sources == ["provider"]
        assert cache.fetch(["a text"]).sources == ["memory"]
