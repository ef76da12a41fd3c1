"""Plugins with bugs that show only in another process."""

from __future__ import annotations

import numpy as np

from embedonce.testing import CountingProvider


class HashingProvider(CountingProvider):
    """Makes vectors from Python's `hash()`, which differs in every process."""

    def vector_of(self, text, task="document"):
        return np.random.default_rng(abs(hash(text))).random(self.dimensions, dtype=np.float32)


def words_as_a_set(text):
    """Puts words into a set, whose order differs in every process."""
    return " ".join(set(text.split(" ")))
