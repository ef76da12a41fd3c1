"""Counting distinct texts in little memory."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

MERGE_HASHES = 2**20
"""Minimum number of new hashes that :class:`DistinctTexts` merges at a time."""


class DistinctTexts:
    """Counts distinct texts by their hashes: 8 bytes of Python's own hash per text, which a window needs anyway.

    The counter keeps the hash of every distinct text. New hashes are first collected in a list. The list is merged
    into the known hashes when it takes more than 8 MiB and more memory than the known hashes. Two texts with the same
    hash count as one text. Among ten million texts, the probability that any two have the same hash is 3 in a million.
    """

    def __init__(self) -> None:
        self._known = np.empty(0, np.uint64)
        """Sorted hashes without duplicates."""
        self._new: list[NDArray[np.uint64]] = []
        self._new_count = 0

    def add(self, texts: Sequence[str]) -> None:
        self._new.append(np.fromiter(map(hash, texts), np.int64, len(texts)).view(np.uint64))
        self._new_count += len(texts)
        # Every merge processes all hashes, which is slow. Therefore merge only when the number of hashes has doubled.
        if self._new_count > max(MERGE_HASHES, len(self._known)):
            self._merge()

    def count(self) -> int:
        """Return the number of distinct texts so far."""
        self._merge()
        return len(self._known)

    def _merge(self) -> None:
        new = np.concatenate([*self._new, np.empty(0, np.uint64)])
        self._new, self._new_count = [], 0
        new.sort()
        merged = np.concatenate([self._known, new])
        merged.sort(kind="stable")  # timsort: it merges two sorted halves in linear time
        self._known = merged[np.append(True, merged[1:] != merged[:-1])] if len(merged) else merged
