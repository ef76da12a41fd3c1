"""The answer to a request for vectors, for those who send it, count it and log it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from embedonce import Fetched

from .models import Model


class Embeddings(NamedTuple):
    """The answer to a request, and what it took."""

    body: bytes
    headers: list[tuple[bytes, bytes]]
    model: Model
    hits: int
    """Number of inputs that a tier had."""
    inputs: int
    """Number of inputs."""
    fetched: Fetched
    tiers: Mapping[str, int]
    """Number of inputs by the tier that had them."""
