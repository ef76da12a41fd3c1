"""Fixtures for OpenAI's API on loopback and for the event loop of a test."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator

import pytest

from embedonce.testing import OpenAIServer


@pytest.fixture
def server() -> Iterator[OpenAIServer]:
    with OpenAIServer() as server:
        yield server


@pytest.fixture
def runner() -> Iterator[asyncio.Runner]:
    """Hold the single event loop of a test, because an async client belongs to one loop."""
    with asyncio.Runner() as runner:
        yield runner
