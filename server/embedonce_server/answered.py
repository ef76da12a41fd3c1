"""What a request for vectors asks for, and its answer, for those who send it, count it and log it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

from embedonce import Cache
from embedonce.prices import Price

from .api.cache_control import CacheControl
from .api.request_body import EmbeddingRequest
from .models import Model


class Asked(NamedTuple):
    """A valid request to a model."""

    model: Model
    request: EmbeddingRequest
    control: CacheControl
    namespace: str
    plain_cache: Cache | None
    """The cache, if the request asks for the vectors that the model gives by itself. Otherwise the cache belongs to a
    variation, which may have been closed when the same request comes again."""


class Embeddings(NamedTuple):
    """The answer to a request, and what it took."""

    body: bytes | None
    """The body, if it is short; else None."""
    parts: list[bytes]
    """The parts of a long body. Their bytes are taken from the memory for answers, and must be given back to it."""
    headers: list[tuple[bytes, bytes]]
    model: Model
    price: Price | None
    """The price of the provider that has answered."""
    inputs: int
    """Number of inputs."""
    tiers: Mapping[str, int]
    """Number of inputs by the tier that had them."""
    hits: int
    """Number of inputs that a tier had: the sum of ``tiers``."""
    saved_tokens: int
    charged_tokens: int = 0
    """Tokens that the model has charged for this request, as far as its endpoint has reported them."""
    changed: int = 0
    """Number of inputs whose stored vector is not the vector that was computed now."""


make_embeddings: Callable[[tuple[Any, ...]], Embeddings] = partial(tuple.__new__, Embeddings)
"""Makes an answer from a tuple of all its fields. It runs in C, which is faster than ``Embeddings(...)``."""
