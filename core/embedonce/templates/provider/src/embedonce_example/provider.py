"""A provider that counts words. Replace the methods' bodies with calls to your model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from hashlib import blake2b
from typing import Annotated

import numpy as np
from annotated_types import Ge, Le
from embedonce import Limits, TextRefused, VectorSpace, hookimpl
from embedonce.options import Doc
from numpy.typing import NDArray

api = 1
"""Version of the plugin contract that this module implements."""


class ExampleProvider:
    """Computes vectors. Each keyword argument of ``__init__`` is an option in TOML."""

    limits = Limits(max_batch=256)

    def __init__(self, *, dimensions: Annotated[int, Ge(8), Le(8192), Doc("Number of dimensions.")] = 256) -> None:
        self._dimensions = dimensions

    def space(self, task: str, /) -> VectorSpace:
        """Describe everything that determines the vector of a text; vectors of different spaces have different keys."""
        return VectorSpace(provider="example", model="words-1", dimensions=self._dimensions, normalize=True)

    def embed(self, texts: Sequence[str], task: str, /) -> NDArray[np.float32]:
        """Return one vector per text, in order: shape (n, dimensions).

        Raises:
            TextRefused: a text has no words.
        """
        empty = [position for position, text in enumerate(texts) if not text.split()]
        if empty:
            raise TextRefused("a text has no words", empty)
        vectors = np.zeros((len(texts), self._dimensions), np.float32)
        for row, text in zip(vectors, texts, strict=True):
            for word in text.split():
                row[self._find_column(word)] += 1.0
        vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
        return vectors

    def close(self) -> None:
        """Release open resources; a second call does nothing."""

    def _find_column(self, word: str) -> int:
        # Do not use Python's hash(), which returns a different value in every process.
        return int.from_bytes(blake2b(word.encode(), digest_size=8).digest(), "big") % self._dimensions


@hookimpl
def embedonce_providers() -> Mapping[str, type[ExampleProvider]]:
    """Register the provider under its name in TOML."""
    return {"example": ExampleProvider}
