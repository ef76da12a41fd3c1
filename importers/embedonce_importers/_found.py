"""Makes the answers of importers from stored values."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from embedonce.contracts import FoundVectors
from embedonce.vectors import Vector

from ._values import DecodedVector

Item = TypeVar("Item")

LEAST_COSINE = 0.999
"""Minimum cosine of two vectors of one text that count as the same. A model computes a text slightly differently each
time."""

NO_VECTOR = "no vector"
NO_TEXT = "no text"
SEVERAL_VECTORS = "several different vectors of one text"


def collect_vectors(items: Iterable[Item], read: Callable[[Item], tuple[str, DecodedVector]]) -> FoundVectors:
    """Return the texts and vectors that ``read`` makes of the items. Its ValueErrors are counted by their messages."""
    texts: list[str] = []
    vectors: list[DecodedVector] = []
    unreadable: Counter[str] = Counter()
    for item in items:
        try:
            text, vector = read(item)
        except ValueError as error:
            unreadable[str(error)] += 1
        else:
            texts.append(text)
            vectors.append(vector)
    return FoundVectors(texts, vectors, unreadable)


def make_found(
    texts: Sequence[str],
    values: Sequence[bytes | str | None],
    decode: Callable[[Any], NDArray[np.floating[Any]]],
) -> FoundVectors:
    """Return texts with the vectors of their values; row i of ``values`` belongs to text i.

    A value that ``decode`` refuses with a ValueError is counted, and so is each value that is None.
    """

    def read(item: tuple[str, bytes | str | None]) -> tuple[str, Vector]:
        text, value = item
        if value is None:
            raise ValueError(NO_VECTOR)
        with np.errstate(over="ignore"):  # it becomes infinity, which the engine refuses
            return text, decode(value).astype(np.float32)

    return collect_vectors(zip(texts, values, strict=True), read)


def add_unreadable(found: FoundVectors, others: Mapping[str, int]) -> FoundVectors:
    """Return the same texts and vectors, with further values that could not be read."""
    unreadable = Counter(found.unreadable) + Counter(others)  # without those that are 0
    return FoundVectors(found.texts, found.vectors, unreadable)


def merge_repeated(found: FoundVectors) -> FoundVectors:
    """Return each text once. A text whose vectors differ is left out and counted, since only one of them is right."""
    if len(set(found.texts)) == len(found.texts):
        return found
    rows: dict[str, list[Vector]] = {}
    for text, row in zip(found.texts, found.vectors, strict=True):
        rows.setdefault(text, []).append(np.asarray(row, np.float32))
    kept = {text: same[0] for text, same in rows.items() if all(_is_same(same[0], other) for other in same[1:])}
    others = {SEVERAL_VECTORS: len(rows) - len(kept)}
    return add_unreadable(FoundVectors(list(kept), list(kept.values()), found.unreadable), others)


def _is_same(left: Vector, right: Vector) -> bool:
    if left.shape != right.shape:
        return False
    product = float(np.linalg.norm(left.astype(np.float64)) * np.linalg.norm(right.astype(np.float64)))
    return bool(product) and float(left.astype(np.float64) @ right) / product >= LEAST_COSINE
