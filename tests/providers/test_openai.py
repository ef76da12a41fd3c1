"""The openai provider, with the real client, against an API on loopback that misbehaves on demand."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from embedonce.testing import OpenAIServer, ProviderContract, Recipe
from embedonce_providers.openai import OpenAIProvider


@pytest.fixture
def server() -> Iterator[OpenAIServer]:
    with OpenAIServer() as server:
        yield server


class TestOpenAI(ProviderContract):
    @pytest.fixture(autouse=True)
    def against_a_server(self) -> Iterator[None]:
        with OpenAIServer() as self.server:
            yield

    def options(self) -> dict[str, Any]:
        return {"model": "text-embedding-3-small", "base_url": self.server.base_url, "api_key": "any"}

    def make(self) -> OpenAIProvider:
        return OpenAIProvider(**self.options())

    def recipe(self) -> Recipe:
        return Recipe(OpenAIProvider, self.options())


class TestOpenAIWithTasks(TestOpenAI):
    def options(self) -> dict[str, Any]:
        told_apart = {"prefixes": {"query": "query: "}, "task_body": {"document": {"input_type": "passage"}}}
        return {**super().options(), **told_apart, "dimensions": 12, "encoding_format": "base64"}
