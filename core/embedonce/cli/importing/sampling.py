"""Choosing some of the texts of a source at random, in one pass and in little memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Generic, TypeVar

import numpy as np

from embedonce.vectors import Matrix, Vector

T = TypeVar("T")

MAX_SIZES = 16
"""Maximum number of different dimensions of which vectors are kept. A source should have one."""


class Reservoir:
    """Chooses up to ``size`` of a stream of items, each with the same probability (algorithm R).

    It decides about positions only; the caller keeps the items.
    """

    def __init__(self, size: int, random: np.random.Generator) -> None:
        self._size = size
        self._random = random
        self.seen = 0
        """Number of items so far."""

    def choose(self, count: int) -> Iterator[tuple[int, int]]:
        """Decide about the next ``count`` items. Yield a slot and an index for each item to keep, in order.

        The slot says where to keep the item: it is the number of kept items, or that of the item to replace. The index
        counts from the first of these items.
        """
        first, self.seen = self.seen, self.seen + count
        filled = min(max(self._size - first, 0), count)
        for index in range(filled):
            yield first + index, index
        slots = self._random.integers(0, np.arange(first + filled, first + count) + 1)
        for place in np.flatnonzero(slots < self._size):
            yield int(slots[place]), filled + int(place)


class Sample(Generic[T]):
    """Items of a stream that were chosen at random."""

    def __init__(self, size: int, random: np.random.Generator) -> None:
        self._reservoir = Reservoir(size, random)
        self.items: list[T] = []

    @property
    def seen(self) -> int:
        """Number of items of the stream so far."""
        return self._reservoir.seen

    def add(self, count: int, get: Callable[[int], T]) -> None:
        """Add the next ``count`` items of the stream. ``get`` returns one of them by its index."""
        for slot, index in self._reservoir.choose(count):
            if slot == len(self.items):
                self.items.append(get(index))
            else:
                self.items[slot] = get(index)


class SamplesBySize:
    """A sample of vectors for each number of dimensions that a source has.

    Single vectors of other dimensions must not decide about the whole source, so they are sampled apart.
    """

    def __init__(self, size: int, random: np.random.Generator) -> None:
        self._size = size
        self._random = random
        self.by_dimensions: dict[int, Sample[tuple[str, Vector]]] = {}
        """Texts and their vectors, by the number of dimensions."""

    def add(self, texts: Sequence[str], matrix: Matrix) -> None:
        dimensions = matrix.shape[1]
        sample = self.by_dimensions.get(dimensions)
        if sample is None:
            if len(self.by_dimensions) == MAX_SIZES:
                return
            sample = self.by_dimensions[dimensions] = Sample(self._size, self._random)
        # A copy of the row, so that the sample does not keep the whole matrix.
        sample.add(len(texts), lambda index: (texts[index], matrix[index].copy()))

    def find_most_common(self) -> int | None:
        """Return the dimensions that most vectors have; None if there is no vector."""
        sizes = self.by_dimensions
        return max(sizes, key=lambda size: sizes[size].seen, default=None)

    def count_most_kept(self) -> int:
        """Return the number of texts in the largest sample."""
        return max((len(sample.items) for sample in self.by_dimensions.values()), default=0)
