"""Plugins that are broken in a way that only another process shows."""

from __future__ import annotations

import numpy as np

from embedonce.testing import CountingProvider


class HashingProvider(CountingProvider):
    """Makes vectors from Python's own `hash()`, which is another one in every process."""

    def vector_of(self, text, task="document"):
        return np.random.default_rng(abs(hash(text))).random(self.dimensions, dtype=np.float32)


def words_as_a_set(text):
    """Sorts words by way of a set, whose order is another one in every process."""
    return " ".join(set(text.split(" ")))
