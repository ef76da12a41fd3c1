"""Remembering which texts were imported, in little memory, to notice texts that a source has with several vectors."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

BITS = 27
"""The filter has two to the power of this many bits, which are 16 MiB."""


class TextFilter:
    """A set of texts of a fixed size, a Bloom filter.

    It never misses a text that was added. With a million texts in it, it takes one of 4,000 others for one of them.
    """

    def __init__(self) -> None:
        self._bits = np.zeros(2**BITS // 8, np.uint8)  # the system provides the memory when a part of it is used
        self._is_empty = True

    def add(self, texts: Sequence[str]) -> None:
        """Add texts."""
        self._is_empty = self._is_empty and not texts
        for places in _hash(texts):
            np.bitwise_or.at(self._bits, places >> np.uint64(3), _mask(places))

    def contains(self, texts: Sequence[str]) -> NDArray[np.bool_]:
        """Return for each text whether it was added."""
        found = np.full(len(texts), not self._is_empty)
        if not self._is_empty:
            for places in _hash(texts):
                found &= (self._bits[places >> np.uint64(3)] & _mask(places)) != 0
        return found


def _hash(texts: Sequence[str]) -> tuple[NDArray[np.uint64], NDArray[np.uint64]]:
    # Python keeps the hash of a str, so that this takes little time. It is another one in each process.
    hashes = np.fromiter(map(hash, texts), np.int64, len(texts)).view(np.uint64)
    mask = np.uint64(2**BITS - 1)
    return hashes & mask, (hashes >> np.uint64(BITS)) & mask


def _mask(places: NDArray[np.uint64]) -> NDArray[np.uint8]:
    return np.left_shift(np.uint8(1), (places & np.uint64(7)).astype(np.uint8))
