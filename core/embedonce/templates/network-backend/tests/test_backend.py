"""The tests that every backend must pass, and a test that opens this backend from a configuration."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import embedonce
import pytest
from embedonce.testing import BackendContract, Recipe

from embedonce_example.backend import ExampleBackend
from embedonce_example.server import Server, run_server


class TestExampleBackend(BackendContract):
    examples = 10

    @pytest.fixture(autouse=True)
    def start_server(self) -> Iterator[None]:
        with run_server() as self._server:
            yield

    def make(self) -> ExampleBackend:
        """Return a client of a new, empty store."""
        self._server.answer({"do": "delete", "keys": list(self._server.answer({**SCAN}))})
        return ExampleBackend(url=f"example://127.0.0.1:{self._server.port}")

    def reopen(self, backend: Any) -> ExampleBackend:
        """Return a second client of the same store."""
        return ExampleBackend(url=backend.url)

    def recipe(self, backend: Any) -> Recipe:
        """Return how another process creates a client of the same store."""
        return Recipe(ExampleBackend, {"url": backend.url})

    def advance(self, seconds: float) -> None:
        """Make the server's clock run ahead, so that entries expire."""
        self._server.offset += seconds

    @contextmanager
    def stall(self, backend: Any) -> Iterator[None]:
        """Make the server hang."""
        self._server.running.clear()
        try:
            yield
        finally:
            self._server.running.set()

    def server(self) -> tuple[str, int]:
        """Return the server's address, for tests with a proxy that breaks connections."""
        return "127.0.0.1", self._server.port

    def through(self, backend: Any, host: str, port: int) -> ExampleBackend:
        """Return a client that connects to the proxy."""
        return ExampleBackend(url=f"example://{host}:{port}")


SCAN = {"do": "scan", "prefix": "", "after": "", "limit": 10**9}


@pytest.fixture
def server() -> Iterator[Server]:
    with run_server() as running:
        yield running


def test_a_configuration_opens_it(server: Server) -> None:
    tier = {"type": "example", "url": f"example://127.0.0.1:{server.port}", "timeout": "30s", "write": "inline"}
    with embedonce.open({"provider": {"type": "ngram"}, "tiers": [tier]}) as cache:
        assert cache.fetch(["a text"]).sources == ["provider"]
        assert cache.fetch(["a text"]).sources == ["example"]
        assert cache.check()[0].ok


def test_a_server_that_is_down_is_skipped() -> None:
    with run_server() as server:
        url = f"example://127.0.0.1:{server.port}"
    with embedonce.open({"provider": {"type": "ngram"}, "tiers": [{"type": "example", "url": url}]}) as cache:
        assert cache.embed("a text").shape == (256,)
        assert not cache.check()[0].ok
