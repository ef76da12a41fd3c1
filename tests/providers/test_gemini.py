from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from embedonce.testing import GeminiServer, ProviderContract, Recipe
from embedonce_providers.gemini import GeminiProvider


class TestGemini(ProviderContract):
    tasks = ("document", "query", "clustering")

    @pytest.fixture(autouse=True)
    def against_a_server(self) -> Iterator[None]:
        with GeminiServer() as self.server:
            yield

    def options(self) -> dict[str, Any]:
        return {"model": "gemini-embedding-001", "base_url": self.server.base_url, "api_key": "any"}

    def make(self) -> GeminiProvider:
        return GeminiProvider(**self.options())

    def recipe(self) -> Recipe:
        return Recipe(GeminiProvider, self.options())
