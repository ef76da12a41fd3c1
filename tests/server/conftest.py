"""Fixtures of the tests of the server."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from embedonce.testing.servers.openai import OpenAIServer


@pytest.fixture
def api() -> Iterator[OpenAIServer]:
    """Loopback API of a model."""
    with OpenAIServer() as server:
        yield server
